"""Every file of every kind of checkpoint, missing, empty, cut off, or from elsewhere: an error that names it and says
which checkpoint to take, or the run that would have been.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, byte_tokenizer, load, preference_rows, quiet, saved
from faults import drop_digests
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from said import word_for_word  # noqa: F401 - its messages are held against said/
from transformers import LlamaConfig, LlamaForCausalLM

from trl_margins.trainers.configs import config_class
from trl_margins.trainers.folder import checkpoint_to_resume
from trl_margins.trainers.named import trainer_class
from trl_margins.trainers.whole import fault_of

KINDS = ("full", "sharded", "adapter")
UNREAD = (
    *("README.md", "training_args.bin", "generation_config.json"),
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
)


def build(kind, model, out, seed=3, **options):
    """A run of a term that remembers, with dropout, so that every file of a checkpoint matters."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "disable_dropout": False, **options}
    loaded = load(model)
    for module in loaded.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    if kind == "sharded":
        loaded.save_pretrained = partial(loaded.save_pretrained, max_shard_size="60KB")
    config = quiet(output_dir=str(out), learning_rate=1e-2, per_device_train_batch_size=2, seed=seed, **options)
    return trainer_class("amapo", "cpo")(
        loaded,
        args=config_class("amapo", "cpo")(**config),
        train_dataset=preference_rows(12, seed=5),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1) if kind == "adapter" else None,
    )


def end_of(trainer):
    """Weights, optimizer, losses and pairs of a run."""
    history = [{key: entry[key] for key in ("step", "loss", "grad_norm")} for entry in losses(trainer)]
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moments = [value for state in trainer.optimizer.state_dict()["state"].values() for value in state.values()]
    return weights, moments, history, Path(trainer.args.output_dir, "pair_log.csv").read_text()


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def same(one, other):
    weights = one[0].keys() == other[0].keys() and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    return weights and all(map(torch.equal, one[1], other[1])) and one[2:] == other[2:]


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """Of each kind: a run, its end, and what two others left, one of another seed and one of another model."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("runs")
    small = LlamaConfig(**{**TINY, "num_hidden_layers": 1, "hidden_size": 16}, pad_token_id=0)
    small = saved(LlamaForCausalLM(small), folder / "small")
    found = {}
    for kind in KINDS:
        run, seed, model = (folder / kind / name for name in ("run", "seed", "model"))
        trainer = build(kind, tiny_model, run)
        trainer.train()
        build(kind, tiny_model, seed, seed=4, max_steps=2).train()
        build(kind, small, model, max_steps=2).train()
        found[kind] = trainer, run, end_of(trainer), (seed, model)
    return found


def _replace(file, run):
    if (other := run / "checkpoint-2" / file.name).exists():  # a smaller model has fewer shards
        shutil.copy(other, file)


DAMAGES = {
    "missing": lambda file, others: file.unlink(),
    "empty": lambda file, others: file.write_bytes(b""),
    "cut": lambda file, others: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "another run's": lambda file, others: _replace(file, others[0]),
    "another model's": lambda file, others: _replace(file, others[1]),
}


def copied(run, out):
    """Its first two checkpoints, in a folder of their own."""
    return Path(shutil.copytree(run, out, ignore=shutil.ignore_patterns("checkpoint-3"))) / "checkpoint-2"


def resume(trainer, checkpoint, how=None):
    """The run goes on from a checkpoint, in its folder."""
    trainer.args.output_dir = str(checkpoint.parent)
    for log in trainer._logs:
        log.file = checkpoint.parent / log.file.name
    trainer.train(resume_from_checkpoint=how or str(checkpoint))
    return end_of(trainer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_of_a_checkpoint(kind, damage, runs, tmp_path):
    trainer, run, whole, others = runs[kind]
    checkpoint, unread = copied(run, tmp_path / "out"), []
    for file in sorted((run / "checkpoint-2").iterdir()):
        DAMAGES[damage](checkpoint / file.name, others)
        if fault_of(checkpoint) is None:
            unread.append(file.name)
        else:
            with pytest.raises(ValueError, match=f"its .*{re.escape(file.name)}") as caught:
                checkpoint_to_resume(checkpoint.parent, str(checkpoint))
            assert f"Resume from the last complete one beside it, {checkpoint.parent}/checkpoint-1" in str(
                caught.value
            )
        shutil.copy(file, checkpoint)
    if not damage.startswith("another"):  # whose configuration may be the same
        assert {*unread} <= {*UNREAD}
    for name in unread:
        DAMAGES[damage](checkpoint / name, others)
    assert same(resume(trainer, checkpoint), whole), unread


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_without_digests(kind, damage, runs, tmp_path):
    """As versions before this one wrote them, or transformers' own trainer."""
    trainer, run, whole, others = runs[kind]
    checkpoint = copied(run, tmp_path / "out")
    drop_digests(checkpoint.parent)
    for file in sorted((run / "checkpoint-2").iterdir()):
        before = (checkpoint / file.name).read_bytes()
        DAMAGES[damage](checkpoint / file.name, others)
        fault = fault_of(checkpoint)
        assert (fault is None) == (file.name in UNREAD), file.name
        assert fault is None or f"its {file.name}" in fault
        (checkpoint / file.name).write_bytes(before)
    for name in UNREAD:
        if (checkpoint / name).exists():
            DAMAGES[damage](checkpoint / name, others)
    assert same(resume(trainer, checkpoint), whole)


def test_the_newest_that_is_whole(runs, tmp_path, caplog):
    """`True` takes it, and says what is wrong with a newer one."""
    trainer, run, whole, _ = runs["full"]
    checkpoint = copied(run, tmp_path / "out")
    (checkpoint / "optimizer.pt").write_bytes(b"")
    assert same(resume(trainer, checkpoint, how=True), whole)
    assert "checkpoint-2 is incomplete (its optimizer.pt is not what was saved" in caplog.text


def test_files_of_somebody_else(runs, tmp_path):
    """Marks of other programs beside what was saved are none of the run's business."""
    trainer, run, whole, _ = runs["full"]
    checkpoint = copied(run, tmp_path / "out")
    (checkpoint / "_SUCCESS").touch()
    (checkpoint / "notes.json").write_text("{")
    assert same(resume(trainer, checkpoint, how=True), whole)


def test_a_checkpoint_under_another_name(runs, tmp_path):
    """transformers goes by the name in one place and by the state in another."""
    trainer, run, *_ = runs["full"]
    checkpoint = copied(run, tmp_path / "out")
    other = checkpoint.rename(checkpoint.with_name("checkpoint-9"))
    with pytest.raises(ValueError, match=r"is of step 2: give the folder its name again.*checkpoint-1"):
        resume(trainer, other)


@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_a_trainer_state_that_is_no_file(kind, runs, tmp_path):
    _, run, *_ = runs["full"]
    state = copied(run, tmp_path / "out") / "trainer_state.json"
    state.unlink()
    os.mkfifo(state) if kind == "a pipe" else state.mkdir()
    assert fault_of(state.parent) == "its trainer_state.json is no file"


@pytest.mark.parametrize("history", [5, [5, "a"], {}])
def test_a_history_that_is_damaged(history, runs, tmp_path):
    """The card at the end of training is made of it."""
    _, run, *_ = runs["full"]
    state = copied(run, tmp_path / "out") / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"log_history": history}))
    assert fault_of(state.parent) == "its trainer_state.json has a log_history that is no list of what was logged"


def test_a_list_of_files_that_is_damaged(runs, tmp_path):
    _, run, *_ = runs["full"]
    checkpoint = copied(run, tmp_path / "out")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for damaged in ({}, {"attributes": {"files": 1}}, {"attributes": {"files": {"optimizer.pt": "much"}}}):
        state["stateful_callbacks"]["CheckpointFiles"] = damaged
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        assert "trainer_state.json is damaged" in fault_of(checkpoint)


def test_the_only_checkpoint(runs, tmp_path):
    trainer, run, *_ = runs["full"]
    checkpoint = copied(run, tmp_path / "out")
    shutil.rmtree(checkpoint.parent / "checkpoint-1")
    (checkpoint / "trainer_state.json").write_text('{"epoch": 1.')
    for how, advice in ((True, "leave resume_from_checkpoint out"), (None, "start the run again")):
        with pytest.raises(ValueError, match=f"trainer_state.json, which is written last, is cut off.*{advice}"):
            resume(trainer, checkpoint, how)


def test_a_checkpoint_of_another_model(runs, tmp_path):
    """Whole, and of the same settings: nothing but its shapes tells."""
    trainer, run, _, (_, other) = runs["full"]
    checkpoint = copied(run, tmp_path / "out")
    shutil.rmtree(checkpoint)
    shutil.copytree(other / "checkpoint-2", checkpoint)
    for settings in (checkpoint / "margin_run.json", checkpoint.parent / "margin_run.json"):
        settings.unlink()
    drop_digests(checkpoint.parent)
    with pytest.raises(ValueError, match=f"the model of {checkpoint} cannot be loaded .*size mismatch.*its model"):
        resume(trainer, checkpoint)


def less_a_tensor(file):
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, {"format": "pt"})


def written(value):
    return lambda file: torch.save(value, file)


def without_moments(file):
    torch.save({**torch.load(file), "state": {}}, file)


@pytest.mark.parametrize(
    ("kind", "name", "damage", "said"),
    [
        ("full", "model.safetensors", less_a_tensor, "the model of .* no tensor for "),
        (
            "sharded",
            "model-00001-of-*.safetensors",
            less_a_tensor,
            "its model.safetensors.index.json names .* not",
        ),
        ("adapter", "adapter_model.safetensors", less_a_tensor, "the model of .* no tensor for "),
        ("full", "optimizer.pt", written([1]), "the optimizer and its schedule of"),
        ("full", "optimizer.pt", without_moments, "the optimizer and .*no state of any parameter"),
        ("adapter", "optimizer.pt", written({"state": {}, "param_groups": []}), "its train_only and adapters"),
        ("full", "scheduler.pt", written(None), "the optimizer and its schedule of"),
        (
            "full",
            "scheduler.pt",
            written({"lr_lambdas": [None]}),
            "the optimizer and .*schedule has taken no step",
        ),
        ("full", "rng_state.pth", written({"python": 1}), "the random state of"),
        ("full", "margin_terms.safetensors", less_a_tensor, "margin_terms.safetensors is not what a checkpoint has"),
    ],
)
def test_other_contents_without_digests(kind, name, damage, said, runs, tmp_path):
    """A file of the right form that is not what the run needs."""
    trainer, run, *_ = runs[kind]
    checkpoint = copied(run, tmp_path / "out")
    drop_digests(checkpoint.parent)
    damage(next(checkpoint.glob(name)))
    with pytest.raises(ValueError, match=said) as caught:
        resume(trainer, checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_a_full_disk_under_the_final_model(runs, tmp_path, monkeypatch):
    """An earlier one stays; the last checkpoint has this one, or a folder that is named."""
    trainer, run, whole, _ = runs["full"]
    checkpoint = copied(run, tmp_path / "out")
    out, write = checkpoint.parent, torch.save
    (out / "training_args.bin").touch()
    resume(trainer, checkpoint)
    assert not (out / "training_args.bin").exists()  # it would say that the run's model is there already
    (out / "model.safetensors").write_text("earlier")

    def save(value, file, *args, **kwargs):
        if str(file).startswith(str(out)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        write(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"_saving/training_args.bin: No space.* MB free.*takes it from .*checkpoint-3"):
        trainer.save_model()
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(OSError, match="No checkpoint has it, so it is in") as caught:
        trainer.save_model()
    elsewhere = Path(str(caught.value).partition("so it is in ")[2].partition(":")[0])
    assert torch.equal(load_file(elsewhere / "model.safetensors")["model.norm.weight"], whole[0]["model.norm.weight"])
    shutil.rmtree(elsewhere)
    assert (out / "model.safetensors").read_text() == "earlier"
    assert not (out / "_saving").exists()
    monkeypatch.undo()
    trainer.save_model()
    assert torch.equal(load_file(out / "model.safetensors")["model.norm.weight"], whole[0]["model.norm.weight"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"global_step": 2, "of_a_later_version": 1}', "is no trainer state of this version of .*of_a_later_version"),
        ('\ufeff{"global_step": 2}', "is cut off or no trainer state"),
        ("[]", "is no trainer state of this version of .*mapping"),
        ("{}", "has 0 as global_step"),
        ('{"global_step": "2"}', "has '2' as global_step"),
        ('{"global_step": 2, "stateful_callbacks": "x"}', "is no trainer state of this version of"),
        ('{"global_step": 2, "log_history": [{"step": "x"}]}', "has a log_history that is no list of what was logged"),
    ],
)
def test_what_is_wrong_with_a_trainer_state_is_said(content, words, tmp_path):
    (tmp_path / "trainer_state.json").write_text(content, encoding="utf-8")
    assert re.search(words, str(fault_of(tmp_path)))
