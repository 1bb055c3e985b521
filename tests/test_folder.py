"""An output folder is one run. Whatever an error advises is done, and works."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, byte_tokenizer, load, preference_rows, quiet
from filelock import FileLock
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_margins.cli import main
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.folder import LOCK, locked
from trl_margins.trainers.named import trainer_class

SMALL = "--max_length 128 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --report_to none --use_cpu"


def build(folder, out, method="gappo", base="cpo", n=12, rows=None, model=None, tokenizer=None, lora=None, **options):
    settings = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "seed": 3}
    return trainer_class(method, base)(
        model or load(folder),
        args=config_class(method, base)(**quiet(output_dir=str(out), **settings | options)),
        train_dataset=rows or preference_rows(n, seed=5),
        processing_class=tokenizer or byte_tokenizer(),
        peft_config=lora,
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


# A used folder, from Python: what is replaced is said, what would be mixed is refused


def test_notebooks_train_again(tiny_model, tmp_path, caplog):
    trainer = build(tiny_model, tmp_path)
    trainer.train()
    trainer.train()
    trainer.save_model()
    assert "earlier run" not in caplog.text
    again = build(tiny_model, tmp_path, save_strategy="no")
    again.train()
    again.save_model()
    assert "has files of an earlier run" in caplog.text
    for moved in (True, False):  # in place of the run that saved nothing, and once more in the same way
        build(tiny_model, tmp_path, overwrite_output_dir=moved).train()
    for other in ({"beta": 0.2}, {"max_steps": 3}, {"save_steps": 1}):
        with pytest.raises(ValueError, match="its checkpoints would be beside this run's, which has other settings: "):
            build(tiny_model, tmp_path, **other).train()
    assert build(tiny_model, tmp_path, beta=0.2, overwrite_output_dir=True).train().global_step == 4
    assert (tmp_path / "_previous-1" / "checkpoint-4" / "optimizer.pt").exists()


LORA = LoraConfig(r=2, target_modules=["q_proj"])


def test_a_full_model_beside_an_adapter(tiny_model, tmp_path):
    """What is loaded from the folder is what was trained last."""
    adapter = build(tiny_model, tmp_path, lora=LORA, save_strategy="no")
    adapter.train()
    adapter.save_model()
    with pytest.raises(ValueError, match="its adapter would be loaded instead of the trained model"):
        build(tiny_model, tmp_path, save_strategy="no").train()
    full = build(tiny_model, tmp_path, save_strategy="no", overwrite_output_dir=True)
    full.train()
    full.save_model()
    for name, value in load(str(tmp_path)).state_dict().items():
        assert torch.equal(value, full.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="its model would be beside the trained adapter"):
        build(tiny_model, tmp_path, lora=LORA, save_strategy="no").train()


def test_another_model_and_another_tokenizer(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path, save_strategy="no")
    trainer.train()
    trainer.save_model()
    other = load(tiny_model)
    other.config.name_or_path = "another"
    with pytest.raises(ValueError, match="files of its model that this one does not have would stay"):
        build(tiny_model, tmp_path, model=other, save_strategy="no").train()
    plain = byte_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="its chat template would be loaded"):
        build(tiny_model, tmp_path, tokenizer=plain, save_strategy="no").train()
    assert CHAT_TEMPLATE


# Another run's checkpoint


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
    ],
)
def test_a_checkpoint_of_another_run(options, said, tiny_model, tmp_path):
    if "loss_type" not in options:
        options = {"disable_dropout": True, **options}
    build(tiny_model, tmp_path, max_steps=2, disable_dropout=True).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"checkpoint-2 is of a run with other settings: .*{said}"):
        build(tiny_model, tmp_path, **options).train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


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
    with pytest.raises(ValueError, match="has files of an earlier run"):  # a's checkpoint among c's
        build(tiny_model, tmp_path / "c", **free).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_no_state_to_go_on_with(missing, tiny_model, tmp_path):
    build(tiny_model, tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / missing).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-2 has no {missing}, as with save_only_model"):
        build(tiny_model, tmp_path).train(resume_from_checkpoint=True)


def test_no_random_state(tiny_model, tmp_path, caplog):
    build(tiny_model, tmp_path, max_steps=2).train()
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
    for file in tmp_path.rglob("margin_run.json"):
        file.unlink()
    rows = preference_rows(12, seed=5).add_column("is_flipped", [0.0] * 12)
    build(tiny_model, tmp_path, margin="amapo", rows=rows).train(resume_from_checkpoint=True)
    assert "has no margin_terms.safetensors" in caplog.text
    assert "has other columns (step,reward_gap" in caplog.text
    logs = {path.name: path.read_text().splitlines() for path in tmp_path.glob("pair_log*.csv")}
    assert {line.split(",")[0] for line in logs["pair_log-before-3.csv"][1:]} == {"1", "2"}
    assert {line.split(",")[0] for line in logs["pair_log.csv"][1:]} == {"3", "4"}


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


def test_an_interrupted_run_lets_go(tiny_model, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer, stop = build(tiny_model, tmp_path), Stop()
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    assert trainer.train().global_step == 4


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import os, sys\nfrom trl_margins.trainers.folder import locked\n"
        "with locked(sys.argv[1]):\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
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


def test_a_finished_run(train, tmp_path, caplog):
    """Is complete, in the middle of an epoch too; delivered where that is missing."""
    out = tmp_path / "out"
    train("--max_steps", "3")
    before = {path: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".md", ".csv")}
    with pytest.raises(ValueError, match="has the complete run and its model: nothing was trained"):
        train("--max_steps", "3", "--resume_from_checkpoint", "true")
    assert "the run in" in caplog.text
    assert "it has 3 of 3 steps" in caplog.text
    assert all(path.read_bytes() == content for path, content in before.items())
    for name in ("model.safetensors", "training_args.bin", "README.md"):  # as if it had been killed before it saved
        (out / name).unlink()
    train("--max_steps", "3", "--resume_from_checkpoint", "true")
    assert (out / "model.safetensors").read_bytes() == before[out / "model.safetensors"]
    assert (out / "README.md").exists()
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
