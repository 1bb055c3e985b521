"""Checkpoints: no pickle, whole or not taken, and the same weights at the end however often a run is killed."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import killed
import processes
import pytest
import torch
from conftest import METHODS_AND_BASES, OWN_METHODS, bases_of, load, preference_rows, quiet
from safetensors.torch import load_file

from trl_margins.methods import MARGINS, METHODS, WEIGHTS, names_of
from trl_margins.terms import Term
from trl_margins.trainers.checkpoints import load_states, save_states
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.folder import is_whole, last_whole_checkpoint
from trl_margins.trainers.named import trainer_class


def test_states_come_back_as_they_were(tmp_path):
    states = {
        "a": {
            "queue": torch.randn(3, dtype=torch.float64),
            "mean": 0.1,
            "none": None,
            "seen": [1, 2],
            "of": {"x": "y"},
        },
        "b": {"flags": torch.tensor([True, False]), "empty": torch.empty(0)},
        "c": {},
    }
    save_states(states, tmp_path / "s.safetensors")
    found = load_states(tmp_path / "s.safetensors", torch.device("cpu"))
    assert found.keys() == states.keys()
    for term, state in states.items():
        assert found[term].keys() == state.keys()
        for name, value in state.items():
            same = torch.equal(found[term][name], value) if torch.is_tensor(value) else found[term][name] == value
            assert same, (term, name)


def test_a_state_that_no_file_can_hold(tmp_path):
    with pytest.raises(TypeError, match="state 'rng' of term 'mine' is a Random"):
        save_states({"mine": {"rng": random.Random(0)}}, tmp_path / "s.safetensors")


def test_only_whole_checkpoints_are_taken(tmp_path, caplog):
    assert last_whole_checkpoint(tmp_path) is None
    whole = '{"global_step": 2}'
    for step, text in ((2, whole), (10, whole), (12, '{"epoch": 1.'), (13, "{}"), (14, None), (15, "[]")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-14 is incomplete" in caplog.text
    assert not is_whole(tmp_path / "checkpoint-12")


def remembers(row):
    tables = {"weight": WEIGHTS, "margin": MARGINS}
    terms = [table[name] for kind, table in tables.items() for name in names_of(getattr(row, kind))]
    return any(term.state_dict is not Term.state_dict for term in terms)


def build(method, base, folder, tokenizer, out, **options):
    model = load(folder)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0 if options.get("disable_dropout", True) else 0.3
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    return trainer_class(method, base)(
        model,
        args=config_class(method, base)(**quiet(output_dir=str(out), **settings | options)),
        train_dataset=preference_rows(12, seed=5),
        eval_dataset=preference_rows(4, seed=6),
        processing_class=tokenizer,
    )


# baselines whose terms have no state resume as TRL does
RESUMED = [*OWN_METHODS, *(id for id, row in METHODS.items() if id not in OWN_METHODS and remembers(row))]
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
RUNS = [
    *((method, base, {}) for method, base in METHODS_AND_BASES if method in RESUMED),
    *((method, "dpo", {"reward": "log-ratio"}) for method in ("gamma-po", "amapo", "geometric-anchor")),
    *((method, bases_of(method)[0], ACCUMULATED) for method in RESUMED),
    ("geometric-anchor", "cpo", {"anchor_direction": "momentum"}),
    ("gamma-po", "cpo", {"eval_strategy": "steps", "eval_steps": 1}),  # which must not be in the queue
    ("amapo", "cpo", {"disable_dropout": False}),
    ("geometric-anchor", "cpo", {"disable_dropout": False}),  # whose looks draw too
    ("gradient-norm", "dpo", {"disable_dropout": False}),
    ("simpo-sam", "cpo", {"disable_dropout": False, **ACCUMULATED}),
]


@pytest.mark.parametrize(("method", "base", "options"), RUNS)
def test_half_and_half_is_a_whole(method, base, options, tiny_model, tokenizer, tmp_path):
    """Six shuffled steps, and the same stopped after the fourth: the same weights, bit for bit."""
    options = {"num_train_epochs": 1, "seed": 3, **options}
    whole = build(method, base, tiny_model, tokenizer, tmp_path / "whole", **options)
    whole.train()
    build(method, base, tiny_model, tokenizer, tmp_path / "cut", **options).train()
    for file in (tmp_path / "cut" / "checkpoint-6").iterdir():  # as if it had been killed before
        file.unlink()
    resumed = build(method, base, tiny_model, tokenizer, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    first = next(log for log in resumed.state.log_history if "loss" in log and log["step"] == 5)
    assert first["loss"] == next(log for log in whole.state.log_history if log["step"] == 5)["loss"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    ours = {file.name for file in (tmp_path / "cut" / "checkpoint-4").iterdir()} & {"margin_terms.safetensors"}
    assert bool(ours) == bool(whole._term_states())


def test_a_checkpoint_that_is_cut_off_is_refused(tiny_model, tokenizer, tmp_path):
    trainer = build("amapo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=4)
    trainer.train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint-4 is not a complete checkpoint.*checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_one_that_is_written_again_is_not_whole_meanwhile(tiny_model, tokenizer, tmp_path):
    """What says that a checkpoint is complete goes first, and comes back last."""
    trainer, folder = build("amapo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2), tmp_path / "checkpoint-2"
    trainer.train()
    assert is_whole(folder)

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer._save_optimizer_and_scheduler = fails
    with pytest.raises(OSError, match="No space left"):
        trainer._save_checkpoint(trainer.model, trial=None)
    assert not is_whole(folder)


def test_another_runs_checkpoint(tiny_model, tokenizer, tmp_path):
    build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2).train()
    other = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=4, train_only=["mlp"])
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is of a run with other settings: .*train_only None → \['mlp'\]"
    ):
        other.train(resume_from_checkpoint=True)


def test_kills_change_nothing(tiny_model, tmp_path):
    """Three kills at random moments, a checkpoint being written at nearly every one of them."""
    kills = int(os.environ.get("KILLS", "3"))

    def start(out):
        return processes.start(killed.train, tiny_model, out, 8 * (kills + 1))

    def code(process):
        process.join()
        return process.exitcode

    assert code(start(tmp_path / "whole")) == 0
    rng = random.Random(1)
    out = tmp_path / "killed"
    for _ in range(kills):
        process = start(out)
        before = len(_lines(out))
        while len(_lines(out)) < before + 2 and process.is_alive():  # past what the last kill left
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
    assert code(start(out)) == 0
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    logs = [(tmp_path / name / "pair_log.csv").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    starts = [json.loads(line)["from"] for line in _lines(out) if "from" in line]
    assert len(starts) == kills + 1
    assert starts[-1] > 0


def _lines(out: Path) -> list[str]:
    file = out / "steps.jsonl"
    return file.read_text().splitlines() if file.exists() else []
