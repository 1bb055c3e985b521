"""An output folder is one run. Whatever an error advises is done, and works."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import CHAT_TEMPLATE, byte_tokenizer, load, preference_rows, quiet
from datasets import Dataset
from faults import drop_digests
from filelock import FileLock
from huggingface_hub import HfApi
from peft import LoraConfig, VeraConfig, get_peft_model
from processes import start
from safetensors.torch import load_file
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from transformers import AutoTokenizer, LlamaConfig, TrainerCallback

from trl_margins import MarginCPOConfig, MarginCPOTrainer, Objective, Term
from trl_margins.cli import main
from trl_margins.cli.train import CARD_IS_DUE, _enter_folder
from trl_margins.links import LINKS
from trl_margins.rewards import LengthNormalizedReward
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.folder import (
    BESIDE,
    FIGURES,
    LOCK,
    check_links,
    check_same_run,
    checkpoint_to_resume,
    differences,
    locked,
    make_room,
)
from trl_margins.trainers.named import trainer_class
from trl_margins.trainers.settings import run_settings
from trl_margins.trainers.whole import is_whole

SMALL = "--max_length 128 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --report_to none --use_cpu"


def build(folder, out, method="gappo", base="cpo", n=12, rows=None, model=None, tokenizer=None, lora=None, **options):
    optimizers, evals = options.pop("optimizers", (None, None)), options.pop("eval_dataset", None)
    settings = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "seed": 3}
    return trainer_class(method, base)(
        model or load(folder),
        args=config_class(method, base)(**quiet(output_dir=str(out), **settings | options)),
        train_dataset=rows or preference_rows(n, seed=5),
        eval_dataset=evals,
        processing_class=tokenizer or byte_tokenizer(),
        peft_config=lora,
        optimizers=optimizers,
    )


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    preference_rows(12, seed=5).to_json(file)
    return str(file)


@pytest.fixture
def train(tiny_model, pairs, tmp_path):
    """The command line, into `out`."""

    def run(*flags):
        argv = ["train", "--model_name_or_path", tiny_model, "--dataset_name", pairs, *SMALL.split()]
        return main([*argv, "--output_dir", str(tmp_path / "out"), "--save_steps", "2", *flags])

    return run


# A used folder, from the command line


def test_the_command_refuses_a_used_folder_and_its_advice_works(train, tiny_model, tmp_path):
    out = tmp_path / "out"
    train("--max_steps", "3")
    first = weights(out)
    with pytest.raises(
        ValueError, match=r"has files of an earlier run \(chat_template.jinja, checkpoint-2, .* more\)"
    ):
        train("--max_steps", "3")
    # advice 1: resume that run
    train("--max_steps", "5", "--resume_from_checkpoint", "true")
    # advice 2: another folder
    train("--max_steps", "3", "--output_dir", str(tmp_path / "other"))
    assert all(torch.equal(value, first[name]) for name, value in weights(tmp_path / "other").items())
    # advice 3: overwrite, which loses nothing
    fifth = weights(out)
    (out / "mine.txt").write_text("not of a run")
    train("--max_steps", "3", "--overwrite_output_dir", "true")
    assert all(torch.equal(value, first[name]) for name, value in weights(out).items())
    assert all(torch.equal(value, fifth[name]) for name, value in weights(out / "_previous-1").items())
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert {path.name for path in (out / "_previous-1").glob("checkpoint-*")} >= {"checkpoint-4", "checkpoint-5"}
    assert (out / "mine.txt").exists()
    train("--max_steps", "3", "--overwrite_output_dir")
    assert (out / "_previous-2" / "README.md").exists()
    assert not (out / LOCK).exists()


@pytest.mark.parametrize(
    "left",
    [
        "pair_log.csv",
        "trainer_state.json",
        "adapter_config.json",
        "model-00001-of-00002.safetensors",
        "chat_template.jinja",
    ],
)
def test_whatever_a_run_left_is_seen(left, train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / left).write_text("{}")
    with pytest.raises(ValueError, match=left):
        train("--max_steps", "1")
    train("--max_steps", "1", "--overwrite_output_dir")
    assert (tmp_path / "out" / "_previous-1" / left).read_text() == "{}"


def test_a_model_in_the_folder_is_not_moved_from_under_its_run(train, tiny_model, tmp_path):
    train("--max_steps", "1")
    with pytest.raises(ValueError, match=r"is in output_dir .* name another output_dir"):
        train("--max_steps", "1", "--model_name_or_path", str(tmp_path / "out"), "--overwrite_output_dir")
    assert weights(tmp_path / "out")


# A used folder, from Python: what is there is moved


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("other", [{}, {"beta": 0.2, "max_steps": 3}, {"save_strategy": "no"}])
def test_a_new_run_has_its_folder_for_itself(other, tiny_model, tmp_path, caplog):
    """The files of the earlier run are moved, whatever its settings, and said to be."""
    first = build(tiny_model, tmp_path / "out")
    first.train()
    first.save_model()
    (tmp_path / "out" / "mine.txt").write_text("not of a run")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    for folder in ("out", "alone"):
        build(tiny_model, tmp_path / folder, **other).train()
    assert names_in(tmp_path / "out") == {*names_in(tmp_path / "alone"), "mine.txt", "_previous-1"}
    kept = tmp_path / "out" / "_previous-1"
    for file, content in before.items():
        if file.name != "mine.txt":
            assert (kept / file.relative_to(tmp_path / "out")).read_bytes() == content
    assert f"are now in {kept}" in caplog.text


@pytest.mark.parametrize("name", ["README.md", "config.json", "figures", "generation_config.json"])
def test_files_of_ones_own_are_not_lost(name, tiny_model, tmp_path, caplog):
    """Of the names that a run writes; what else lies there stays."""
    for each in (name, "notes.md"):
        path = tmp_path / each / "mine.png" if each == "figures" else tmp_path / each
        path.parent.mkdir(exist_ok=True)
        path.write_text("six weeks")
    build(tiny_model, tmp_path).train()
    kept = tmp_path / "_previous-1"
    assert names_in(kept) == {name}
    assert (kept / name / "mine.png" if name == "figures" else kept / name).read_text() == "six weeks"
    assert (tmp_path / "notes.md").read_text() == "six weeks"
    assert f"has files of the names that a run writes: {name} are now in {kept}" in caplog.text


def test_notes_of_ones_own_outlive_a_resume(tiny_model, tmp_path, caplog):
    build(tiny_model, tmp_path, max_steps=4).train()
    card = (tmp_path / "README.md").read_text()
    build(tiny_model, tmp_path, max_steps=5).train(resume_from_checkpoint=True)
    assert not (tmp_path / "_previous-1").exists()
    (tmp_path / "README.md").write_text("six weeks")
    build(tiny_model, tmp_path, max_steps=6).train(resume_from_checkpoint=True)
    assert (tmp_path / "_previous-1" / "README.md").read_text() == "six weeks"
    assert (tmp_path / "README.md").read_text()[:100] == card[:100]
    assert "has files of the names that a run writes: README.md are now in" in caplog.text


def test_results_of_an_evaluation_before_training_stay(tiny_model, tmp_path):
    """transformers' `save_metrics` adds to what is there. A tokenizer's files would be read with the run's own."""
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<end>"}')
    trainer = build(tiny_model, tmp_path)
    trainer.save_metrics("eval", {"eval_loss": 1.0})
    trainer.save_metrics("train", trainer.train().metrics)
    assert {"eval_loss", "train_loss"} <= json.loads((tmp_path / "all_results.json").read_text()).keys()
    assert names_in(tmp_path / "_previous-1") == {"special_tokens_map.json"}


@pytest.mark.parametrize("method", ["gamma-po", "amapo"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_trainer_that_trains_again_is_a_new_run(method, stopped, tiny_model, tmp_path, caplog):
    """From the trained weights: as another trainer that is given them, bit for bit, terms and pair log included."""
    trainer, stop = build(tiny_model, tmp_path / "a", method=method, max_steps=6, logging_steps=2), Stop(3)
    if stopped:
        trainer.add_callback(stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(stop)
    else:
        trainer.train()
    trainer.model.save_pretrained(tmp_path / "trained")
    trainer.args.max_steps = 3
    trainer.train()
    other = build(str(tmp_path / "trained"), tmp_path / "b", method=method, max_steps=3, logging_steps=2)
    other.train()
    assert [log.get("loss") for log in trainer.state.log_history] == [
        log.get("loss") for log in other.state.log_history
    ]
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    assert (tmp_path / "a" / "pair_log.csv").read_text() == (tmp_path / "b" / "pair_log.csv").read_text()
    assert names_in(tmp_path / "a") == {*names_in(tmp_path / "b"), "_previous-1"}
    assert {"checkpoint-2", "pair_log.csv"} <= names_in(tmp_path / "a" / "_previous-1")
    assert "pair_log.csv are now in" in caplog.text or "pair_log.csv, trainer_state.json are now in" in caplog.text
    trainer.train(resume_from_checkpoint=True)  # this run's last checkpoint, not a later one of the first
    assert trainer.state.global_step == 3


def test_an_earlier_checkpoint_is_resumed(tiny_model, tmp_path, caplog):
    """Later ones are not left to be resumed from."""
    build(tiny_model, tmp_path, max_steps=6).train()
    build(tiny_model, tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert names_in(tmp_path / "_previous-1") == {"checkpoint-4", "checkpoint-6"}
    assert "checkpoint-4, checkpoint-6 are now in" in caplog.text


def test_a_search_for_hyperparameters(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path)
    with pytest.raises(
        NotImplementedError, match=r"sets trainer\.objective, which is this trainer's loss, to a number"
    ):
        trainer.hyperparameter_search(direction="minimize", n_trials=1)
    for beta in (0.5, 1.0):  # as advised
        assert build(tiny_model, tmp_path / str(beta), beta=beta).train().global_step == 4


LORA = LoraConfig(r=2, target_modules=["q_proj"])


def test_a_full_model_beside_an_adapter(tiny_model, tmp_path):
    """What is loaded from the folder is what was trained last."""
    adapter = build(tiny_model, tmp_path, lora=LORA, save_strategy="no")
    adapter.train()
    adapter.save_model()
    full = build(tiny_model, tmp_path, save_strategy="no")
    full.train()
    full.save_model()
    for name, value in load(str(tmp_path)).state_dict().items():
        assert torch.equal(value, full.model.state_dict()[name]), name
    assert "adapter_model.safetensors" in names_in(tmp_path / "_previous-1")
    again = build(tiny_model, tmp_path, lora=LORA, save_strategy="no")
    again.train()
    again.save_model()
    assert "model.safetensors" not in names_in(tmp_path)
    assert "model.safetensors" in names_in(tmp_path / "_previous-2")


def test_another_tokenizer(tiny_model, tmp_path):
    """Without a template: that of the earlier run's is not loaded with it."""
    trainer = build(tiny_model, tmp_path, save_strategy="no")
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    plain = byte_tokenizer()
    plain.chat_template = None
    other = build(tiny_model, tmp_path, tokenizer=plain, save_strategy="no")
    other.train()
    other.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


# Another run's checkpoint


@pytest.fixture(scope="module")
def two_steps(tiny_model, tmp_path_factory):
    """The folder of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("two-steps")
    build(tiny_model, folder, max_steps=2, disable_dropout=True).train()
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.2}, "beta 1.0 → 0.2"),
        ({"method": "gamma-po"}, "weight score-gap → None; margin None → gamma-po"),
        ({"margin": "amapo"}, "margin None → amapo"),
        ({"score_gap_transform": "quadratic"}, "score_gap_transform linear → quadratic"),
        ({"base": "dpo"}, "base cpo → dpo"),
        ({"loss_type": "sigmoid", "gamma_beta_ratio": None}, "loss_type simpo → sigmoid"),
        ({"train_only": ["mlp"]}, r"train_only None → \['mlp'\]"),
        ({"train_only": ["q_proj"]}, r"trained_parameters 21 tensors \(.*\) → 2 tensors"),
        ({"learning_rate": 0.5}, "learning_rate .* → 0.5"),
        ({"seed": 4}, "seed 3 → 4"),
        ({"n": 13}, "train_rows 12 → 13"),
        ({"per_device_train_batch_size": 3}, "pairs_per_step 2 → 3"),
        ({"gradient_accumulation_steps": 2}, "pairs_per_step 2 → 4"),
        ({"max_length": 64}, "max_length 128 → 64"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type cosine → linear"),
        ({"warmup_steps": 2}, "warmup_steps 0.1 → 2"),
        ({"max_grad_norm": 0.5}, "max_grad_norm 1.0 → 0.5"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha None → 5.0"),
    ],
)
def test_a_checkpoint_of_another_run(options, said, two_steps, tiny_model, tmp_path):
    if "loss_type" not in options:
        options = {"disable_dropout": True, **options}
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"checkpoint-2 is of a run with other settings: .*{said}"):
        build(tiny_model, tmp_path, **options).train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row, i: {"score_chosen": row["score_chosen"] + (i == 3)}, "score_chosen"),
        (lambda row, i: {"rejected": row["rejected"] + "." * (i == 3)}, "tokens"),
    ],
    ids=["a score", "a text"],
)
def test_other_values_in_one_row(change, said, two_steps, tiny_model, tmp_path):
    """Neither the first, the middle nor the last row."""
    rows = preference_rows(12, seed=5).map(change, with_indices=True)
    other = build(tiny_model, tmp_path, rows=rows, disable_dropout=True)
    with pytest.raises(ValueError, match=f"other settings: columns {said} "):
        other.train(resume_from_checkpoint=str(two_steps / "checkpoint-2"))


def test_a_checkpoint_from_before_all_values_were_compared(two_steps, tiny_model, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.rglob("margin_run.json"):
        found = json.loads(file.read_text())
        del found["columns"], found["fixed_weights"]
        file.write_text(json.dumps(found))
    drop_digests(tmp_path)
    build(tiny_model, tmp_path, disable_dropout=True).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("given", [4, b"checkpoint-2", "checkpoint-2", "last", "TRUE"])
def test_the_checkpoint_that_there_is_is_named(given, two_steps):
    with pytest.raises(ValueError, match=f"resume_from_checkpoint.*one in output_dir is {two_steps}/checkpoint-2"):
        checkpoint_to_resume(two_steps, given)


@pytest.mark.parametrize(
    ("rate", "schedule", "said"),
    [
        (0.1, lambda optimizer: ExponentialLR(optimizer, 0.5), None),
        (0.2, lambda optimizer: ExponentialLR(optimizer, 0.5), "learning_rate 0.1 → 0.2"),
        (0.1, lambda optimizer: ExponentialLR(optimizer, 0.9), "the schedule's gamma 0.5 → 0.9"),
    ],
)
def test_an_optimizer_of_ones_own_with_other_settings(rate, schedule, said, tiny_model, tmp_path, own_optimizer):
    shutil.copytree(own_optimizer, tmp_path, dirs_exist_ok=True)
    trainer = with_optimizer(tiny_model, tmp_path, rate, schedule)
    if said is None:
        trainer.train(resume_from_checkpoint=True)
        return
    with pytest.raises(ValueError, match=f"other settings: {said}"):
        trainer.train(resume_from_checkpoint=True)


def test_a_schedule_of_another_function(tiny_model, tmp_path):
    def run(base):
        return with_optimizer(
            tiny_model,
            tmp_path,
            0.1,
            lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: base**i),
        )

    run(0.5).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=r"the schedule's function 1 1, 0\.5, 0\.25, .* → 1, 0\.9, 0\.81"):
        run(0.9).train(resume_from_checkpoint=True)
    run(0.5).train(resume_from_checkpoint=True)


def with_optimizer(folder, out, rate, schedule):
    model = load(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    return build(folder, out, model=model, optimizers=(optimizer, schedule(optimizer)), disable_dropout=True)


@pytest.fixture(scope="module")
def own_optimizer(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own-optimizer")
    with_optimizer(tiny_model, folder, 0.1, lambda optimizer: ExponentialLR(optimizer, 0.5)).train()
    shutil.rmtree(folder / "checkpoint-4")
    return folder


@pytest.mark.parametrize("of", ["reference", "adapter", "precomputed"])
def test_other_weights_under_the_same_name(of, tiny_model, tmp_path):
    def trainer(noise):
        given = {
            "reference": {"ref_model": load(tiny_model, noise)},
            "adapter": {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")},
            "precomputed": {},
        }
        options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "reward": "log-ratio"}
        options["precompute_ref_log_probs"] = of == "precomputed"
        return trainer_class("gamma-po", "dpo")(
            load(tiny_model, 0.0 if of == "reference" else noise),
            args=config_class("gamma-po", "dpo")(**quiet(output_dir=str(tmp_path), **options)),
            train_dataset=preference_rows(4, seed=5),
            processing_class=byte_tokenizer(),
            **given[of],
        )

    trainer(0.0).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="fixed_weights"):
        trainer(0.1).train(resume_from_checkpoint=True)
    trainer(0.0).train(resume_from_checkpoint=True)


def test_a_reference_that_followed_the_model_is_not_there(tmp_path, caplog):
    now = {"adapter": None, "term_options": [], "reward_options": [], "config": {}}
    config = SimpleNamespace(ignore_data_skip=False, auto_find_batch_size=False, sync_ref_model=True)
    check_same_run(tmp_path / "checkpoint-2", now, config)
    assert "does not have the reference model that had followed the model" in caplog.text


def test_a_stream_cannot_be_compared(tiny_model, tmp_path, caplog):
    rows = preference_rows(12, seed=5).to_iterable_dataset()
    build(tiny_model, tmp_path, rows=rows, max_steps=2).train()
    build(tiny_model, tmp_path, rows=rows, max_steps=3).train(resume_from_checkpoint=True)
    assert "is a stream" in caplog.text


@pytest.mark.parametrize(
    ("changed", "given", "is_wrong"),
    [
        ({"model": ("/a/m", "/b/m")}, {}, None),  # folders move
        ({"model": ("/a/m", "/a/other")}, {}, False),
        ({"model": ("/a/m", "/a/other"), "adapter": ({"r": 4}, {"r": 4})}, {}, True),
        ({"model": ("/a/m", "/b/m"), "adapter": ({"r": 4}, {"r": 4})}, {}, None),
        ({"pairs_per_step": (2, 4)}, {}, True),
        ({"pairs_per_step": (2, 4)}, {"auto_find_batch_size": True}, False),
        ({"seed": (1, 2)}, {}, True),
        ({"seed": (1, 2)}, {"ignore_data_skip": True}, False),
        ({"anchor_scope": (["mlp"], None)}, {}, False),
        ({"anchor_scope": (["mlp"], None), "sam_radius": (0.1, 0.1)}, {}, True),
        ({"anchor_scope": (["mlp"], None), "term_options": (["anchor_scope"], ["anchor_scope"])}, {}, True),
        ({"anchor_diagnostics": (1, 2), "term_options": (["anchor_diagnostics"],) * 2}, {}, False),
        ({"alpha": (0.1, 0.2), "reward_options": (["alpha"],) * 2}, {}, True),
        ({"logging_steps": (1, 2)}, {}, False),
    ],
    ids=str,
)
def test_which_settings_a_resumed_run_must_share(changed, given, is_wrong):
    of_run = {"adapter": None, "term_options": [], "reward_options": [], "model": "m", "pairs_per_step": 2}
    runs = []
    for side in (0, 1):
        values = {name: both[side] for name, both in changed.items()}
        runs.append({name: values.pop(name, value) for name, value in of_run.items()} | {"config": values})
    config = SimpleNamespace(**{"ignore_data_skip": False, "auto_find_batch_size": False, **given})
    name, (old, new) = next(iter(changed.items()))
    said = [] if is_wrong is None else [f"{name} {old} → {new}"]
    assert differences(*runs, config) == ((said, []) if is_wrong else ([], said))


def test_the_advice_is_to_start_from_its_weights(tiny_model, tmp_path):
    build(tiny_model, tmp_path / "a", max_steps=2).train()
    new = build(str(tmp_path / "a" / "checkpoint-2"), tmp_path / "b", beta=0.2)
    start = {name: value.clone() for name, value in new.model.state_dict().items()}
    assert all(torch.equal(value, start[name]) for name, value in weights(tmp_path / "a" / "checkpoint-2").items())
    assert new.train().global_step == 4


def test_what_a_resumed_run_may_change(tiny_model, tmp_path, caplog):
    """Longer, logged and saved otherwise, elsewhere: the same steps, and one line that says so."""
    build(tiny_model, tmp_path / "a", max_steps=2, lr_scheduler_type="constant", warmup_steps=0).train()
    free = {"max_steps": 6, "save_steps": 3, "logging_steps": 2, "run_name": "b", "save_total_limit": 1}
    more = build(tiny_model, tmp_path / "b", **free, lr_scheduler_type="constant", warmup_steps=0)
    with caplog.at_level(logging.INFO, "trl_margins.trainers.folder"):
        more.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    lines = [record.message for record in caplog.records if record.name == "trl_margins.trainers.folder"]
    assert len(lines) == 1
    assert "max_steps 2 → 6" in lines[0]
    whole = build(tiny_model, tmp_path / "c", max_steps=6, lr_scheduler_type="constant", warmup_steps=0)
    whole.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, more.model.state_dict()[name]), name
    assert [each["step"] for each in more.state.log_history if "loss" in each][-2:] == [4, 6]
    # a's checkpoint is resumed where c was
    build(tiny_model, tmp_path / "c", **free, lr_scheduler_type="constant", warmup_steps=0).train(
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")
    )
    assert {path.name for path in (tmp_path / "c").glob("checkpoint-*")} == {"checkpoint-6"}
    assert {path.name for path in (tmp_path / "c").glob("_previous-1/checkpoint-*")} >= {
        "checkpoint-2",
        "checkpoint-4",
    }


HARMLESS = {
    "trust_remote_code": True,
    "score_columns": ["score_chosen", "score_rejected"],  # those that are found
    "prompt_column": "prompt",
    "gamma_po_tau": 3.0,  # of a term that is not in the run
    "anchor_radius": 0.1,
    "anchor_scope": ["mlp"],
    "gradient_checkpointing": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize(("base", "more"), [("cpo", {}), ("dpo", {"pad_to_multiple_of": 8})])
def test_what_changes_nothing_is_not_refused(base, more, tiny_model, tmp_path, caplog):
    build(tiny_model, tmp_path, base=base, max_steps=2, gradient_checkpointing=False).train()
    again = build(tiny_model, tmp_path, base=base, **HARMLESS, **more)
    settings = run_settings(again)
    if base == "dpo":  # which a CPU cannot do
        settings["config"]["activation_offloading"] = True
    with caplog.at_level(logging.WARNING):
        check_same_run(tmp_path / "checkpoint-2", settings, again.args)
    said = next(record.message for record in caplog.records if "with other settings" in record.message)
    assert all(
        f"{name} " in said
        for name in (
            {*HARMLESS, *more, *(["activation_offloading"] if more else [])} - {"score_columns", "prompt_column"}
        )
    )
    assert again.train(resume_from_checkpoint=True).global_step == 4


def test_another_objective_from_python(tiny_model, tmp_path):
    """The config says nothing about it."""

    def run(beta):
        objective = Objective(LengthNormalizedReward(), LINKS["cpo"]["simpo"], beta=beta, gamma=0.5)
        settings = {"output_dir": str(tmp_path), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        return MarginCPOTrainer(
            load(tiny_model),
            args=MarginCPOConfig(**quiet(**settings)),
            train_dataset=preference_rows(12, seed=5),
            processing_class=byte_tokenizer(),
            objective=objective,
        )

    run(2.0).train()
    with pytest.raises(ValueError, match=r"beta 2.0 → 3.0\. Resume"):
        run(3.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert run(2.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")).global_step == 2


def test_resumed_from_a_file(train, tmp_path):
    """YAML's true and false are what the flag's are, and so is a path."""
    out, file = tmp_path / "out", tmp_path / "run.yaml"

    def run(value, steps):
        file.write_text(f"resume_from_checkpoint: {value}\n")
        train("--max_steps", str(steps), "--config", str(file))
        return json.loads((out / "trainer_state.json").read_text())["global_step"]

    assert run("null", 2) == 2
    for anew in ("false", "null", "'false'"):
        with pytest.raises(ValueError, match="has files of an earlier run"):
            run(anew, 3)
    assert run("true", 3) == 3
    assert run(out / "checkpoint-3", 4) == 4
    assert run("'true'", 5) == 5
    other = (out / "checkpoint-5").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="has files of an earlier run"):  # of another run than the one resumed
        run(other, 6)


def test_no_state_to_go_on_with(tiny_model, tmp_path):
    build(tiny_model, tmp_path, max_steps=2, save_only_model=True).train()
    with pytest.raises(
        ValueError, match=r"checkpoint-2 has no optimizer.pt and no scheduler.pt, as with save_only_model"
    ):
        build(tiny_model, tmp_path).train(resume_from_checkpoint=True)


def test_no_random_state(tiny_model, tmp_path, caplog):
    """As in the checkpoint of another trainer."""
    build(tiny_model, tmp_path, max_steps=2).train()
    drop_digests(tmp_path)
    (tmp_path / "checkpoint-2" / "rng_state.pth").unlink()
    build(tiny_model, tmp_path).train(resume_from_checkpoint=True)
    assert "has no rng_state.pth" in caplog.text


def test_an_adapter_of_another_scale(tiny_model, tmp_path):
    """PEFT loads it into whatever adapter there is."""
    build(tiny_model, tmp_path, lora=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]), max_steps=2).train()
    other = build(tiny_model, tmp_path, lora=LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapter .*'lora_alpha': 4.* → .*'lora_alpha': 64"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_settings_and_a_term_without_state(tiny_model, tmp_path, caplog):
    """As versions before this one wrote them."""
    build(tiny_model, tmp_path, max_steps=2).train()
    drop_digests(tmp_path)
    for file in tmp_path.rglob("margin_run.json"):
        file.unlink()
    rows = preference_rows(12, seed=5).add_column("is_flipped", [0.0] * 12)
    build(tiny_model, tmp_path, margin="amapo", rows=rows).train(resume_from_checkpoint=True)
    assert "has no margin_terms.safetensors" in caplog.text
    assert "has other columns (step,reward_gap" in caplog.text
    logs = {path.name: path.read_text().splitlines() for path in tmp_path.glob("pair_log*.csv")}
    assert {line.split(",")[0] for line in logs["pair_log-before-3.csv"][1:]} == {"1", "2"}
    assert {line.split(",")[0] for line in logs["pair_log.csv"][1:]} == {"3", "4"}
    drop_digests(tmp_path)
    for file in tmp_path.rglob("margin_run.json"):
        file.unlink()
    again = build(tiny_model, tmp_path, margin=["amapo", "gamma-po"], rows=rows, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert "has no state of 'gamma-po', which begins anew" in caplog.text
    assert "has no state of 'amapo'" not in caplog.text


# Two runs at once


def test_a_second_run_is_refused_and_the_first_goes_on(tiny_model, tmp_path):
    class Meanwhile(TrainerCallback):
        refused = 0

        def on_step_end(self, *args, **kwargs):
            with pytest.raises(ValueError, match="another run is training in output_dir"):
                build(tiny_model, tmp_path, save_strategy="no").train()
            self.refused += 1

    trainer, meanwhile = build(tiny_model, tmp_path, max_steps=2), Meanwhile()
    trainer.add_callback(meanwhile)
    trainer.train()
    assert meanwhile.refused == 2
    assert build(tiny_model, tmp_path, save_strategy="no").train().global_step == 4  # as advised: wait


def test_the_command_refuses_it_before_it_loads_anything(train, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_margins.cli.train.build_trainer", None)
    with locked(tmp_path / "out"), pytest.raises(ValueError, match="another run is training"):
        train("--max_steps", "1")


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, *more, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_lets_go(tiny_model, tmp_path):
    trainer, stop = build(tiny_model, tmp_path), Stop(1)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    assert trainer.train().global_step == 4


def killed_within(folder):
    with locked(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_no_lock(tmp_path):
    process = start(killed_within, tmp_path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks(tiny_model, tmp_path, monkeypatch, caplog):
    def none(*args, **kwargs):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", none)
    assert build(tiny_model, tmp_path, max_steps=2).train().global_step == 2
    assert "cannot be locked" in caplog.text


# Nothing trained


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": 0}, "max_steps must be a whole number, at least 1, or -1"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs must be a number, above 0"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 16}, "12 rows, which make no batch.*drop_last"),
    ],
)
def test_nothing_to_train(options, said, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=said):
        build(tiny_model, tmp_path, **options).train()
    assert not list(tmp_path.rglob("*.json"))


def test_a_finished_run(train, tmp_path, caplog, capsys):
    """Is complete, in the middle of an epoch too; delivered where that is missing."""
    out = tmp_path / "out"
    train("--max_steps", "3")
    assert "trained to step 3" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".md", ".csv")}
    with pytest.raises(ValueError, match="has the complete run and its model: nothing was trained"):
        train("--max_steps", "3", "--resume_from_checkpoint", "true")
    assert "the run in" in caplog.text
    assert "it has 3 of 3 steps" in caplog.text
    assert "trained to step" not in capsys.readouterr().out  # by that call
    assert all(path.read_bytes() == content for path, content in before.items())
    for name in ("model.safetensors", "training_args.bin", "README.md"):  # as if it had been killed before it saved
        (out / name).unlink()
    train("--max_steps", "3", "--resume_from_checkpoint", "true")
    assert (out / "model.safetensors").read_bytes() == before[out / "model.safetensors"]
    (out / "model.safetensors").write_bytes(before[out / "model.safetensors"][:5000])  # half of a copy
    train("--max_steps", "3", "--resume_from_checkpoint", "true")
    assert (out / "model.safetensors").read_bytes() == before[out / "model.safetensors"]
    assert (out / "README.md").exists()
    kept = (out / "README.md").read_bytes()
    (out / CARD_IS_DUE).touch()  # as if it had been killed before it wrote the last card
    (out / "README.md").write_text("a card of a checkpoint")
    train("--max_steps", "3", "--resume_from_checkpoint", "true")
    assert (out / "README.md").read_bytes() == kept
    with pytest.raises(ValueError, match="has the complete run and its model: nothing was trained"):
        train("--max_steps", "3", "--resume_from_checkpoint", "true")
    train("--max_steps", "4", "--resume_from_checkpoint", "true")  # as advised
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4


def test_a_finished_run_from_python(tiny_model, tmp_path, caplog):
    """Loads what was trained, as transformers does, and takes no step more."""
    first = build(tiny_model, tmp_path)
    first.train()
    again = build(tiny_model, tmp_path)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert "is complete: it has 4 of 4 steps" in caplog.text
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


# What a resumed run shares, from outside: the files that two runs left


def test_other_rows_of_the_same_number_are_not_resumed_on(tiny_model, tmp_path):
    build(tiny_model, tmp_path, rows=preference_rows(12, seed=5)).train()
    for place in (0, 6, 11):
        rows = preference_rows(12, seed=5).to_list()
        rows[place]["chosen"] += "!"
        others = build(tiny_model, tmp_path, rows=Dataset.from_list(rows), max_steps=6)
        with pytest.raises(ValueError, match=r"run with other settings: columns tokens \w{8} → \w{8}\. "):
            others.train(resume_from_checkpoint=True)
    build(tiny_model, tmp_path, rows=preference_rows(12, seed=5), max_steps=6).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("base", "strict"), [("dpo", True), ("cpo", False)])
def test_another_model_is_another_reference(base, strict, tiny_model, tmp_path, caplog):
    """Folders may move: the last part of the name counts."""
    for place in ("a/model", "b/model", "other"):
        load(tiny_model).save_pretrained(tmp_path / place)
    kwargs = {"method": None, "base": base}

    def trainer(place, steps):
        return build(tiny_model, tmp_path / "out", model=load(tmp_path / place), max_steps=steps, **kwargs)

    trainer("a/model", 2).train()
    trainer("b/model", 4).train(resume_from_checkpoint=True)
    if strict:
        with pytest.raises(ValueError, match=r"reference .*model → .*other"):
            trainer("other", 6).train(resume_from_checkpoint=True)
    else:
        trainer("other", 6).train(resume_from_checkpoint=True)
        assert "model → " in caplog.text


def test_fewer_steps_than_the_checkpoint_has(tiny_model, tmp_path):
    build(tiny_model, tmp_path).train()
    with pytest.raises(ValueError, match="the checkpoint has 4 steps, and this run 3: raise max_steps"):
        build(tiny_model, tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_a_whole_model_saved_over_an_adapter_is_what_is_loaded(tiny_model, tmp_path, caplog):
    adapter = build(tiny_model, tmp_path / "a", lora=LoraConfig(target_modules=["q_proj"]))
    whole = build(tiny_model, tmp_path / "b")
    adapter.save_model(str(tmp_path / "both"))
    whole.save_model(str(tmp_path / "both"))
    assert not hasattr(load(tmp_path / "both"), "peft_config")
    assert (tmp_path / "both" / "_previous-1" / "adapter_model.safetensors").is_file()
    adapter.save_model(str(tmp_path / "both"))
    assert "beside it, the adapter that is saved is what will be loaded" in caplog.text


# Links


@pytest.fixture
def elsewhere(tmp_path):
    """A file and a folder that a run has no business with."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    yield tmp_path / "elsewhere"
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["file"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"


FILES = ("README.md", "pair_log.csv", "margin_run.json", LOCK, "model.safetensors", "training_args.bin", "config.json")
FOLDERS = ("checkpoint-2", "figures", "runs", BESIDE)


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_link_in_the_folder_is_refused_or_moved(name, tmp_path, elsewhere):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(elsewhere / "file" if name in FILES else elsewhere)
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.*: remove the link"), locked(out):
        check_links(out)
    if name == LOCK:
        return
    (out / "training_args.bin").touch()  # of an earlier run
    (out / "margin_run.json").touch()
    make_room(SimpleNamespace(model=SimpleNamespace(config=LlamaConfig())), out)
    if name in ("runs", BESIDE):  # of a tracker, which may have others' there; and of no earlier run
        with pytest.raises(ValueError, match="is a link to"):
            check_links(out)
    else:
        check_links(out)
        assert (out / "_previous-1" / name).is_symlink()


@pytest.mark.parametrize("name", ["config.json", "margin_run.json", "training_args.bin", BESIDE])
def test_a_folder_in_the_place_of_a_file(name, tmp_path):
    """And the other way round: the model could not be saved after training."""
    (tmp_path / name).touch() if name == BESIDE else (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is a f\w+, and the run would make a f\w+ of that name: move it"):
        check_links(tmp_path)
    (tmp_path / name).unlink() if name == BESIDE else (tmp_path / name).rmdir()
    (tmp_path / name).mkdir() if name == BESIDE else (tmp_path / name).touch()
    (tmp_path / "README.md").mkdir()  # a model without its card is there
    check_links(tmp_path)


def test_links_to_checkpoints_stay(tiny_model, tmp_path, caplog):
    """One that was moved to another disk, and what names the last one for others."""
    out = tmp_path / "out"
    build(tiny_model, out, max_steps=2, save_steps=2).train()
    shutil.move(out / "checkpoint-2", tmp_path / "elsewhere")
    (out / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    (out / "checkpoint-last").symlink_to("checkpoint-2")
    trainer = build(tiny_model, out, max_steps=4, save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert trainer.state.global_step == 4
    assert (out / "checkpoint-2").is_symlink()
    assert (out / "checkpoint-last").is_symlink()
    assert (out / "checkpoint-4" / "trainer_state.json").exists()
    assert "takes its place" not in caplog.text


def test_a_link_that_comes_later_is_replaced(tiny_model, tmp_path, elsewhere):
    """After hours of training, an error would cost the model."""
    out = tmp_path / "out"
    trainer = build(tiny_model, out, max_steps=2, save_steps=1)
    names = {name for name in (*FILES, *FOLDERS) if name not in (LOCK, "runs", "pair_log.csv", "margin_run.json")}

    class Links(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                for name in names:
                    (out / name).unlink(missing_ok=True)  # TRL's card of the first checkpoint
                    (out / name).symlink_to(elsewhere / "file" if name in FILES else elsewhere)

    trainer.add_callback(Links())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert (out / "checkpoint-2" / "model.safetensors").exists()
    assert "GapPO" in (out / "README.md").read_text()


def test_folders_in_the_place_of_a_checkpoint_s_files(tiny_model, tmp_path):
    """Of a damaged checkpoint, which is saved again: it is moved, as nothing can be written over them."""
    build(tiny_model, tmp_path, max_steps=2, save_steps=1).train()
    for name in ("optimizer.pt", "config.json", "margin_run.json"):
        (tmp_path / "checkpoint-2" / name).unlink()
        (tmp_path / "checkpoint-2" / name).mkdir()
    build(tiny_model, tmp_path, max_steps=2, save_steps=1).train(resume_from_checkpoint=True)
    assert is_whole(tmp_path / "checkpoint-2")
    assert (tmp_path / "_previous-1" / "checkpoint-2" / "optimizer.pt").is_dir()


def test_links_among_the_pictures_of_a_card_are_replaced(tiny_model, tmp_path, elsewhere):
    trainer = build(tiny_model, tmp_path / "out", max_steps=1)
    trainer.train()
    (tmp_path / "out" / FIGURES).mkdir()
    (tmp_path / "out" / FIGURES / "gap.png").symlink_to(elsewhere / "file")
    trainer.create_model_card()
    assert not (tmp_path / "out" / FIGURES / "gap.png").is_symlink()


def test_links_within_a_checkpoint_are_replaced(tiny_model, tmp_path, elsewhere):
    """One that a killed run left, or that is written again."""
    trainer = build(tiny_model, tmp_path / "out", max_steps=1, save_steps=1)
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    for name in ("model.safetensors", "margin_run.json", "optimizer.pt", "trainer_state.json", "shared_prompts.json"):
        (tmp_path / "out" / "checkpoint-1" / name).symlink_to(elsewhere / "file")
    trainer.train()
    assert not [path for path in (tmp_path / "out" / "checkpoint-1").iterdir() if path.is_symlink()]


def test_nothing_is_written_through_a_link_in_a_checkpoint(tiny_model, tmp_path, elsewhere):
    """Of a step that a killed run had begun to save, beside the one that is resumed."""
    build(tiny_model, tmp_path / "out", max_steps=1, save_steps=1).train()
    (tmp_path / "out" / "checkpoint-2").mkdir()
    for name in ("margin_run.json", "model.safetensors"):
        (tmp_path / "out" / "checkpoint-2" / name).symlink_to(elsewhere / "file")
    build(tiny_model, tmp_path / "out", max_steps=2, save_steps=1).train(resume_from_checkpoint=True)
    assert (elsewhere / "file").read_text() == "mine"
    assert is_whole(tmp_path / "out" / "checkpoint-2")


def test_the_folder_itself_may_be_a_link(tiny_model, tmp_path, caplog):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    build(tiny_model, tmp_path / "out", max_steps=2, save_steps=1, save_total_limit=1).train()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "checkpoint-2" / "trainer_state.json").exists()
    # a checkpoint that is resumed may be one, too: it is only read
    shutil.move(tmp_path / "disk" / "checkpoint-2", tmp_path / "kept")
    (tmp_path / "disk" / "checkpoint-2").symlink_to(tmp_path / "kept")
    before = {path: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    trainer = build(tiny_model, tmp_path / "out", max_steps=3, save_steps=1, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert before == {path: path.read_bytes() for path in (tmp_path / "kept").iterdir()}  # nor is it deleted
    assert (tmp_path / "disk" / "checkpoint-3" / "trainer_state.json").exists()


def test_a_file_that_the_run_reads_is_not_moved(train, tmp_path):
    train("--max_steps", "1")
    rows = tmp_path / "out" / "checkpoint-1.jsonl"
    preference_rows(4).to_json(rows)
    with pytest.raises(ValueError, match=r"checkpoint-1\.jsonl is in output_dir .* would be moved"):
        train("--max_steps", "1", "--dataset_name", str(rows), "--overwrite_output_dir")
    assert rows.exists()


# What no config describes


class Scaled(Term):
    """A weight of 2, or of another number."""

    name = "scaled"

    def __init__(self, by=2.0, table=None):
        self.by, self.table = by, table

    def __call__(self, pairs):
        return torch.full_like(pairs.reward_gap, self.by)


def from_python(tiny_model, out, term, make=None, **options):
    """A trainer with a term, and perhaps an optimizer and a schedule, from Python."""
    model = load(tiny_model)
    optimizers = (None, None) if make is None else make(model)
    config = MarginCPOConfig(**quiet(output_dir=str(out), save_strategy="steps", save_steps=2, **options))
    return MarginCPOTrainer(
        model,
        args=config,
        train_dataset=preference_rows(12, seed=5),
        processing_class=byte_tokenizer(),
        weight_term=term,
        optimizers=optimizers,
    )


def sgd(order=1, schedule=None, cls=torch.optim.SGD):
    def make(model):
        optimizer = cls([*model.parameters()][::order], lr=0.01)
        return optimizer, schedule and schedule(optimizer)

    return make


def stepped(optimizer):
    return StepLR(optimizer, 1)


def exponential(optimizer):
    return ExponentialLR(optimizer, 0.9)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ((Scaled(2.0), None), (Scaled(2.0), None), None),
        ((Scaled(2.0), None), (Scaled(3.0), None), "scaled.by 2.0 → 3.0"),
        ((Scaled(table=torch.ones(2)), None), (Scaled(table=torch.ones(2)), None), None),
        ((Scaled(table=torch.ones(2)), None), (Scaled(table=torch.zeros(2)), None), "scaled.table "),
        ((Scaled(), sgd()), (Scaled(), sgd()), None),
        ((Scaled(), sgd()), (Scaled(), sgd(order=-1)), r"optimizer SGD \(21 tensors in the order \w+\) → SGD \(21 t"),
        ((Scaled(), sgd()), (Scaled(), sgd(cls=torch.optim.RMSprop)), "optimizer SGD .* → RMSprop"),
        ((Scaled(), sgd(schedule=stepped)), (Scaled(), sgd(schedule=exponential)), "schedule StepLR → ExponentialLR"),
    ],
    ids=range(8),
)
def test_a_resumed_run_has_the_same_parts(before, after, named, tiny_model, tmp_path):
    """Terms, optimizer and schedule that are made in Python are compared as far as they can be."""
    from_python(tiny_model, tmp_path, *before, max_steps=2).train()
    again = from_python(tiny_model, tmp_path, *after, max_steps=2)
    if named is None:
        assert again.train(resume_from_checkpoint=True).global_step == 2
    else:
        with pytest.raises(ValueError, match=named):
            again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("ours", [False, True])
def test_settings_that_another_optimizer_does_not_read(ours, tiny_model, tmp_path):
    """They are the trainer's own optimizer's and schedule's: beside others they change nothing."""
    optimizers = sgd(schedule=stepped) if not ours else None
    options = {"learning_rate": 0.5, "weight_decay": 0.3, "warmup_steps": 1, "lr_scheduler_type": "cosine"}
    from_python(tiny_model, tmp_path, Scaled(), optimizers, max_steps=2).train()
    again = from_python(tiny_model, tmp_path, Scaled(), optimizers, max_steps=2, **options)
    if ours:
        with pytest.raises(ValueError, match=r"learning_rate 1e-06 → 0\.5") as caught:
            again.train(resume_from_checkpoint=True)
        assert all(f"{name} " in str(caught.value) for name in options)
    else:
        assert again.train(resume_from_checkpoint=True).global_step == 2


def test_pipes_in_an_incomplete_checkpoint(tiny_model, tmp_path, caplog):
    """Nobody waits for them: the checkpoint that is saved again takes their places."""
    build(tiny_model, tmp_path).train()
    last = tmp_path / "checkpoint-4"
    for name in ("optimizer.pt", "margin_run.json"):
        (last / name).unlink()
        os.mkfifo(last / name)
    assert build(tiny_model, tmp_path).train(resume_from_checkpoint=True).global_step == 4
    assert f"{last / 'optimizer.pt'} was a pipe: the run's own takes its place" in caplog.text
    assert (last / "margin_run.json").is_file()


def test_a_run_s_folder_is_no_checkpoint(tiny_model, tmp_path):
    """Not that of another run beside it, but the last of its own is named, from Python and by the command."""
    for name in ("run", "other"):
        build(tiny_model, tmp_path / name).train()
    (tmp_path / "other" / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    said = (
        f"It is the folder of a run: resume from the last complete checkpoint in it, {tmp_path / 'run/checkpoint-4'}"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        build(tiny_model, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run"))
    with ExitStack() as held, pytest.raises(ValueError, match=re.escape(said)):
        _enter_folder(held, SimpleNamespace(output_dir=str(tmp_path / "run")), str(tmp_path / "run"))
    with ExitStack() as held, pytest.raises(ValueError, match="there is no folder checkpoint-9"):
        _enter_folder(held, SimpleNamespace(output_dir=str(tmp_path / "run")), "checkpoint-9")


def test_arguments_of_train_that_there_are_not_move_nothing(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path)
    trainer.train()
    there = sorted(tmp_path.iterdir())
    with pytest.raises(TypeError, match="nope"):
        trainer.train(nope=1)
    with pytest.raises(ValueError, match="trial is for hyperparameter_search"):
        trainer.train(trial={})
    assert sorted(tmp_path.iterdir()) == there


def test_a_precision_from_the_environment_is_said(tiny_model, tmp_path, monkeypatch, caplog):
    """As `accelerate launch` sets it: no config has it."""
    build(tiny_model, tmp_path, bf16=False).train()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    build(tiny_model, tmp_path, bf16=False).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    AcceleratorState._reset_state()
    assert "with other settings: precision no → bf16" in caplog.text


@pytest.mark.parametrize(("kept", "first"), [(None, 1), ("", 1), ("head", 1), ("one", 2)])
def test_pairs_that_a_log_lacks_are_said(kept, first, tiny_model, tmp_path, caplog):
    build(tiny_model, tmp_path).train()
    log = tmp_path / "pair_log.csv"
    head, *lines = log.read_text().splitlines(keepends=True)
    texts = {"": "", "head": head, "one": "".join([head, *(line for line in lines if line.startswith("1,"))])}
    log.write_text(texts[kept]) if kept is not None else log.unlink()
    build(tiny_model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert f"{log} has no pairs of the steps from {first} to 2" in caplog.text
    caplog.clear()
    build(tiny_model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "has no pairs" not in caplog.text


def test_what_a_model_is_not_computed_by(tiny_model, tmp_path):
    """How weights began, and which tokens mark a beginning: a resumed run may have others."""
    build(tiny_model, tmp_path).train()
    model = load(tiny_model)
    model.config.initializer_range, model.config.bos_token_id = 0.7, 5
    assert build(tiny_model, tmp_path, model=model).train(resume_from_checkpoint=True).global_step == 4
    model = load(tiny_model)
    model.config.rms_norm_eps = 0.1
    with pytest.raises(ValueError, match="the model's rms_norm_eps"):
        build(tiny_model, tmp_path, model=model).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_below_an_adapter_that_would_be_lost(when, tiny_model, tmp_path):
    """PEFT saves the adapter alone, with what it names: the rest of what trains would be in no file."""

    def adapted(**options):
        return get_peft_model(load(tiny_model), LoraConfig(r=2, target_modules=["q_proj"], **options))

    def unfreeze(model):
        model.base_model.model.lm_head.weight.requires_grad_(True)

    model = adapted()
    if when == "before":
        unfreeze(model)
    trainer = build(tiny_model, tmp_path / "lost", model=model)
    if when == "after":
        unfreeze(model)
    with pytest.raises(
        ValueError, match=r"lm_head.weight would train below the adapter, .* in the adapter's modules_to"
    ):
        trainer.train()
    assert not (tmp_path / "lost" / "checkpoint-2").exists()
    named = adapted(modules_to_save=["lm_head"])
    build(tiny_model, tmp_path / "named", model=named).train()
    saved = load_file(tmp_path / "named" / "checkpoint-4" / "adapter_model.safetensors")
    trained = named.base_model.model.lm_head.modules_to_save["default"].weight
    assert any(torch.equal(each, trained) for each in saved.values())
    assert build(tiny_model, tmp_path / "tokens", model=adapted(trainable_token_indices=[5])).train().global_step == 4


@pytest.mark.parametrize("kind", [LoraConfig, VeraConfig])
def test_an_adapter_goes_on_in_its_dtype(kind, tiny_model, tmp_path):
    """PEFT loads one in float32, whatever it was; also the best one, at the end."""

    def trainer(folder):
        torch.manual_seed(1)
        adapter = kind(r=2, target_modules=["q_proj"])
        model = get_peft_model(load(tiny_model).bfloat16(), adapter, autocast_adapter_dtype=False)
        best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_steps": 2}
        return build(tiny_model, tmp_path / folder, model=model, eval_dataset=preference_rows(4, seed=9), **best)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=True)
    expected = dict(whole.model.named_parameters())
    for name, weight in resumed.model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected[name])


def test_patterns_of_an_adapter_are_compared(tiny_model, tmp_path):
    def run(**options):
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **options)
        return build(tiny_model, tmp_path, lora=lora)

    run(alpha_pattern={"q_proj": 16}).train()
    at = str(tmp_path / "checkpoint-2")
    for other in ({}, {"alpha_pattern": {"q_proj": 1}}):
        with pytest.raises(ValueError, match="is of a run with other settings: adapter "):
            run(**other).train(resume_from_checkpoint=at)
    assert run(alpha_pattern={"q_proj": 16}).train(resume_from_checkpoint=at).global_step == 4


def test_settings_that_came_too_late(tiny_model, tmp_path):
    """transformers and TRL read them when the trainer is made."""
    late = {"seed": 5, "bf16": True, "neftune_noise_alpha": 5.0, "per_device_train_batch_size": 1}
    for name, value in (late | {"use_liger_kernel": True}).items():
        trainer = build(tiny_model, tmp_path)
        setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match=rf"args.{name} was .* which would do nothing"):
            trainer.train()
    for name in ("cpo_alpha", "max_length", "truncation_mode", "neftune_noise_alpha", "optimizer_cls_and_kwargs"):
        with pytest.raises(ValueError, match=rf"trainer.{name} cannot be set any more: it was read when the trainer"):
            setattr(trainer, name, 5)


def test_an_adapter_that_comes_too_late(tiny_model, tmp_path):
    """It would train, and the folder of the run would hold the one that did not."""
    trainer = build(tiny_model, tmp_path, lora=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.model.add_adapter("late", LoraConfig(r=2, target_modules=["v_proj"]))
    trainer.model.set_adapter("late")
    with pytest.raises(ValueError, match=r"active adapters are \['late'\]"):
        trainer.train()


def test_a_reference_that_is_taken_away(tiny_model, tmp_path):
    """The policy would be its own."""
    trainer = build(tiny_model, tmp_path, base="dpo", reward="log-ratio")
    with pytest.raises(ValueError, match=r"trainer.ref_model cannot be set any more: it was read when the trainer"):
        trainer.ref_model = None


def test_a_model_that_was_made_in_inference_mode(tiny_model, tmp_path):
    with torch.inference_mode():
        model = load(tiny_model)
    with pytest.raises(ValueError, match=r"21 weight tensors of model .* were made under torch.inference_mode\(\)"):
        build(tiny_model, tmp_path, model=model)


def test_another_class_of_optimizers_of_ones_own(tiny_model, tmp_path):
    """Named at a resume, however the class is given; torch would miss a key of its state."""

    def run(cls, way="argument", **options):
        if way == "argument":
            trainer = build(tiny_model, tmp_path)
            vars(trainer)["optimizer_cls_and_kwargs"] = (cls, options)  # as the argument
            return trainer
        kind = trainer_class("gappo", "cpo")
        own = type("Own", (kind,), {"get_optimizer_cls_and_kwargs": staticmethod(lambda *_: (cls, options))})
        config = config_class("gappo", "cpo")(
            **quiet(output_dir=str(tmp_path), save_strategy="steps", save_steps=2, max_steps=4, seed=3),
        )
        return own(load(tiny_model), args=config, train_dataset=preference_rows(12, seed=5))

    for way in ("argument", "method"):
        run(torch.optim.AdamW, way, lr=0.01).train()
        at = str(tmp_path / "checkpoint-2")
        for cls, options in ((torch.optim.SGD, {"lr": 0.01}), (torch.optim.AdamW, {"lr": 0.02})):
            with pytest.raises(ValueError, match="is of a run with other settings: optimizer_class "):
                run(cls, way, **options).train(resume_from_checkpoint=at)
        assert run(torch.optim.AdamW, way, lr=0.01).train(resume_from_checkpoint=at).global_step == 4


def test_a_line_break_in_the_path_and_a_limit(tiny_model, tmp_path):
    """transformers does not find the checkpoints that it would delete."""
    trainer = build(tiny_model, tmp_path / "a\nb", save_total_limit=1)
    with pytest.raises(ValueError, match=r"save_total_limit=1: .*line break in its path .*name another output_dir"):
        trainer.train()
    assert build(tiny_model, tmp_path / "c\nd").train().global_step == 4


# Pushing


@pytest.fixture
def hub(monkeypatch):
    """A Hub that makes repositories and takes no folder, or none at all."""

    def refuse(*args, **kwargs):
        raise OSError("the Hub is down")

    def of(which):
        monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: SimpleNamespace(repo_id="me/run"))
        monkeypatch.setattr(HfApi, which, refuse)

    return of


def test_a_repository_that_cannot_be_made(hub, tiny_model, tmp_path):
    hub("create_repo")
    with pytest.raises(
        ConnectionError, match=r"push_to_hub: the repository me/run cannot be made or reached: the Hub"
    ):
        build(tiny_model, tmp_path, push_to_hub=True, hub_model_id="me/run")


def test_an_upload_that_fails_says_how_to_repeat_it(hub, tiny_model, tmp_path):
    hub("upload_folder")
    trainer = build(tiny_model, tmp_path, push_to_hub=True, hub_model_id="me/run", hub_strategy="end")
    trainer.train()
    with pytest.raises(
        ConnectionError, match=rf"upload of {tmp_path} failed: the Hub is down. .*`hf upload me/run {tmp_path}`"
    ):
        trainer.push_to_hub()
    assert (tmp_path / "model.safetensors").exists()


def test_a_training_set_of_another_kind_that_came_too_late(tiny_model, tmp_path):
    """Its rows have no tokens."""
    rows = preference_rows(4)
    for other in ([*rows], rows.to_iterable_dataset(), None, "rows"):
        trainer = build(tiny_model, tmp_path)
        trainer.train_dataset = other
        with pytest.raises(TypeError, match=rf"trainer.train_dataset is a {type(other).__name__}, and .* a Dataset"):
            trainer.train()


def test_files_that_are_removed_during_a_run(tiny_model, tmp_path, caplog):
    class Removes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                Path(args.output_dir, "margin_run.json").unlink()
                Path(args.output_dir, "pair_log.csv").unlink()

    trainer = build(tiny_model, tmp_path, logging_steps=1, logging_strategy="steps")
    trainer.add_callback(Removes())
    trainer.train()
    assert [each for each in caplog.messages if "pair_log.csv was removed, or moved: it begins anew at step" in each]
    assert (tmp_path / "pair_log.csv").is_file()
    assert json.loads((tmp_path / "margin_run.json").read_text())["method"] == "gappo"


def test_paths_that_no_file_can_have(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint is 'a\\x00b', and no path has"):
        trainer.train(resume_from_checkpoint="a\0b")
    with pytest.raises(ValueError, match=r"output_dir of save_model is 'a\\x00b', and no path has"):
        trainer.save_model("a\0b")
