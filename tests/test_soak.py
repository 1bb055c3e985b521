"""Nothing grows with the steps of a run but its logs, and of those no more is in memory than it takes.

`benchmarks/soak.py` looks at memory too, over 2,000 steps of every method.
"""

from __future__ import annotations

import importlib
import json
import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import load, preference_rows, quiet
from transformers import TrainerCallback

from trl_margins import AMaPOConfig, AMaPOTrainer
from trl_margins.recording import pair_log
from trl_margins.recording.pair_log import PairLog
from trl_margins.report import run_folder
from trl_margins.report.picture import source, usable
from trl_margins.report.run_folder import read_pairs, read_run

pytestmark = pytest.mark.rehearsal

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def soak():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("soak")


class Looks(TrainerCallback):
    """What a run holds every so many steps, at the same point between two logs."""

    def __init__(self, look, every):
        self.look, self.every, self.taken = look, every, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.taken.append(self.look())


# Whole runs


@pytest.mark.parametrize(
    ("name", "options", "queues"),
    [
        ("GapPO", {}, {}),
        ("γ-PO", {"gamma_po_queue_size": 30}, {"gamma-po's state": 30}),
        ("AMaPO", {"amapo_estimation_size": 20}, {"amapo's state": 20}),
        ("GAPO", {"gradient_accumulation_steps": 2}, {}),
    ],
)
def test_nothing_grows(soak, name, options, queues, tmp_path):
    """60 steps, 12 logs, 6 evaluations and checkpoints."""
    options |= {"per_device_train_batch_size": 2, "logging_steps": 5, "eval_steps": 10, "save_steps": 10}
    trainer = soak.build(name, str(tmp_path), 60, **options)
    looks = Looks(lambda: soak.look(trainer), every=20)  # never at an epoch's end, where no batch has been fetched yet
    trainer.add_callback(looks)
    trainer.train()
    _, half, last = looks.taken
    assert soak.grown(looks.taken) == []
    assert half["tensors"] == last["tensors"]
    sizes = {key: size for key, size in last["remembered"].items() if "state" in key}
    assert sizes == queues
    assert last["remembered"]["pairs not logged"] == 0
    assert last["log_history"] < 60 / 5 + 60 / 10
    assert last["files"]["pair_log.csv"] == pytest.approx(1.5 * half["files"]["pair_log.csv"], rel=0.1)


def test_what_grows_is_named(soak):
    """Of two looks that differ in everything."""
    first, last = (
        {
            "step": step,
            "held": 1000 + 30 * i,
            "tensors": 5 + i,
            "remembered": {"queue": 7 + i, "metrics": 3},
            "files": {"margin_run.json": 100 * (1 + i), "pair_log.csv": 100 * (1 + i)},
        }
        for i, step in enumerate((100, 200))
    )
    assert soak.grown([first, first]) == soak.grown([last, first]) == []
    assert soak.grown([first, first, last]) == [
        "memory at the end is 1.0300 of memory at step 100",
        "queue: 7 at step 100, 8 at the end",
        "live tensors: 5 at step 100, 6 at the end",
        "margin_run.json: 100 bytes at step 100, 200 at the end",
    ]


# The pair log


def test_a_run_that_never_logs(tiny_model, tokenizer, tmp_path, monkeypatch):
    """Its pairs wait on the device for a while, not for the whole run."""
    monkeypatch.setattr(pair_log, "MOST_WAITING", 6)
    monkeypatch.setattr(pair_log, "MOST_CACHED", 10)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    trainer = AMaPOTrainer(
        load(tiny_model),
        AMaPOConfig(**quiet(output_dir=str(tmp_path), logging_strategy="no", **options)),
        train_dataset=preference_rows(60),
        processing_class=tokenizer,
    )
    log = trainer._pair_log
    looks = Looks(lambda: (len(log._waiting), sum(map(len, log._not_logged))), every=1)
    trainer.callback_handler.callbacks.insert(0, looks)  # before the log's own
    trainer.train()
    waiting, kept = zip(*looks.taken, strict=True)
    assert max(waiting) == 6
    assert max(kept) == 12  # never less than it may, and nothing is cut in two
    steps = np.genfromtxt(tmp_path / "pair_log.csv", delimiter=",", names=True)["step"]
    assert np.bincount(steps.astype(int)).tolist() == [0, *[4] * 15]


def test_a_long_interval_s_log_is_of_its_last_pairs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pair_log, "MOST_CACHED", 4)
    log = PairLog(tmp_path / "x.csv")
    for step in (1, 2, 3, 4):
        log.add(step, {"weight": torch.full((3,), float(step))})
        log.flush(Accelerator())
    with caplog.at_level(logging.INFO, "trl_margins"):
        assert log.drain()["weight"].tolist() == [3.0] * 3 + [4.0] * 3
        assert "of the pairs since the last log, the first 6 are only in x.csv" in caplog.text
        caplog.clear()
        assert log.drain()["weight"].size == 0
    assert not caplog.text
    assert len((tmp_path / "x.csv").read_text().split()) == 13


def write_log(folder, n, pairs_a_step=10):
    """n pairs, weights 0, 1, 2, …"""
    file = folder / "pair_log.csv"
    rows = (f"{i // pairs_a_step + 1},{i},0.5,1.25,-2.5" for i in range(n))
    file.write_text("\r\n".join(["step,weight,slope,logp_chosen,logp_rejected", *rows]) + "\r\n")
    return file


def peak_of(call):
    """Greatest bytes that a call had at once, and what it gave."""
    tracemalloc.start()
    try:
        given = call()
        return tracemalloc.get_traced_memory()[1], given
    finally:
        tracemalloc.stop()


def test_going_on_takes_no_memory_for_the_log(tmp_path):
    file = write_log(tmp_path, 40_000)
    lines = file.read_bytes().splitlines(keepends=True)
    with file.open("a") as out:
        out.write("4001,1,0.")
    peak, _ = peak_of(lambda: PairLog(file).rewind(3000))
    assert file.read_bytes() == b"".join(lines[: 1 + 30_000])
    assert peak < 1_000_000  # as text in lists it would have 14 MB
    assert [path.name for path in tmp_path.iterdir()] == ["pair_log.csv"]


def test_a_log_without_a_line(tmp_path):
    """As a kill may leave it between opening and writing."""
    (tmp_path / "x.csv").touch()
    PairLog(tmp_path / "x.csv").rewind(3)
    assert (tmp_path / "x.csv").read_text() == ""


def test_of_a_long_log_one_pair_in_so_many_is_read(tmp_path, monkeypatch, caplog):
    file = write_log(tmp_path, 3000)
    (tmp_path / "margin_run.json").write_text(json.dumps({"method": "gappo"}))
    whole = read_run(tmp_path)
    assert whole.one_in == 1
    monkeypatch.setattr(run_folder, "MOST_BYTES", file.stat().st_size // 4)
    with caplog.at_level(logging.INFO, "trl_margins"):
        run = read_run(tmp_path)
    assert run.one_in == 5
    assert "one in 5 of its pairs is read" in caplog.text
    for name, column in whole.pairs.items():
        np.testing.assert_array_equal(run.pairs[name], column[::5])
    for of, said in ((run, True), (whole, False)):
        found, _ = usable([of], lambda _: ("step", "weight"))
        assert (f"one in 5 of {tmp_path.name}" in source(found, "weight")) == said


def test_reading_takes_memory_for_what_it_keeps(tmp_path):
    file = write_log(tmp_path, 40_000)
    peaks = [peak_of(lambda n=n: read_pairs(file, one_in=n))[0] for n in (1, 20)]
    assert peaks[1] < peaks[0] / 5
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:101], "1,1,0.5,1.25,-2.5", *lines[101:]]))
    with pytest.raises(ValueError, match=r"pair 101: step 1 comes after step 10"):
        read_pairs(file, one_in=10)
