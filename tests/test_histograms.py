"""What reaches TensorBoard, W&B and Trackio: histograms by the callback, and everything else under tidy names."""

from __future__ import annotations

import csv
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import load, preference_rows, quiet
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from trl_margins import PairHistograms
from trl_margins.data.noise import flip_labels
from trl_margins.recording.histograms import NAMES
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class


class FakeWriter:
    """As much of a SummaryWriter as is called; like it, it takes no empty, infinite or NaN values."""

    def __init__(self):
        self.histograms, self.scalars = [], []

    def add_histogram(self, tag, values, global_step):
        assert values.size
        assert np.isfinite(values).all()
        self.histograms.append((tag, global_step, np.array(values)))

    def add_scalar(self, tag, value, global_step):
        self.scalars.append((tag, global_step))

    def add_text(self, *args): ...

    def flush(self): ...

    def close(self): ...


class FakeTensorBoard(TensorBoardCallback):
    """transformers' own callback, without TensorBoard."""

    def __init__(self):
        self.tb_writer = self.kept = FakeWriter()
        self.logging_dir, self._SummaryWriter = "unused", None


class FakeWandb(WandbCallback):
    def __init__(self):
        self._wandb = None  # transformers' part then does nothing


class FakeTrackio(TrackioCallback):
    def __init__(self): ...

    def on_train_begin(self, *args, **kwargs): ...

    on_log = on_train_end = on_train_begin


def build(method, folder, tokenizer, out, base="cpo", callbacks=None, **options):
    rows = flip_labels(preference_rows(10, seed=3), 0.3)
    return trainer_class(method, base)(
        load(folder),
        args=config_class(method, base)(
            **quiet(output_dir=str(out), **{"max_steps": 3, "logging_steps": 2, **options})
        ),
        train_dataset=rows,
        eval_dataset=preference_rows(4, seed=5),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def lines(folder):
    with (folder / "pair_log.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    return dict(zip(head, np.array(rows, float).T, strict=True))


@pytest.mark.parametrize(
    ("method", "columns"), [("gappo", ["weight", "reward_gap"]), ("geometric-anchor", ["margin", "reward_gap"])]
)
def test_the_pairs_between_two_logs(method, columns, tiny_model, tokenizer, tmp_path):
    """Every pair of the pair log in exactly one histogram, at the step of the log after it."""
    reporter = FakeTensorBoard()
    trainer = build(method, tiny_model, tokenizer, tmp_path, callbacks=[reporter])
    trainer.add_callback(PairHistograms(trainer))
    trainer.train()
    trainer.evaluate()
    found, pairs = reporter.kept.histograms, lines(tmp_path)
    assert {tag for tag, _, _ in found} == {NAMES[column] for column in columns}
    for column in columns:
        of_column = [(step, values) for tag, step, values in found if tag == NAMES[column]]
        assert [step for step, _ in of_column] == [2, 3]
        for (_, values), steps in zip(of_column, ([1, 2], [3]), strict=True):
            expected = pairs[column][np.isin(pairs["step"], steps)]
            np.testing.assert_allclose(np.sort(values), np.sort(expected), rtol=1e-5)


def test_a_writer_of_ones_own(tiny_model, tokenizer, tmp_path):
    """It is the only one that gets them."""
    writer, reporter = FakeWriter(), FakeTensorBoard()
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, callbacks=[reporter], max_steps=1, logging_steps=1)
    trainer.add_callback(PairHistograms(trainer, writer))
    trainer.train()
    assert [tag for tag, _, _ in writer.histograms] == [NAMES["weight"], NAMES["reward_gap"]]
    assert reporter.kept.histograms == []


@pytest.mark.parametrize(("library", "reporter"), [("wandb", FakeWandb), ("trackio", FakeTrackio)])
def test_wandb_and_trackio(library, reporter, tiny_model, tokenizer, tmp_path, monkeypatch):
    logged = []
    fake = SimpleNamespace(Histogram=lambda values: ("histogram", len(values)), log=logged.append)
    monkeypatch.setitem(sys.modules, library, fake)
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, callbacks=[reporter()])
    trainer.add_callback(PairHistograms(trainer))
    trainer.train()
    last = len(lines(tmp_path)["step"]) - 8  # ten pairs: the third step has the two that are left
    assert logged == [
        {NAMES["weight"]: ("histogram", n), NAMES["reward_gap"]: ("histogram", n), "train/global_step": step}
        for n, step in ((8, 2), (last, 3))
    ]


def test_values_that_no_writer_takes_are_left_out():
    log = SimpleNamespace(drained={"weight": np.array([np.nan, 1.0, np.inf]), "reward_gap": np.array([np.nan])})
    objective = SimpleNamespace(weights=(object(),), margins=())
    writer = FakeWriter()
    callback = PairHistograms(SimpleNamespace(_pair_log=log, objective=objective), writer)
    state = SimpleNamespace(is_world_process_zero=True, global_step=7)
    callback.on_log(None, state, None)
    ((tag, step, values),) = writer.histograms
    assert (tag, step, values.tolist()) == (NAMES["weight"], 7, [1.0])
    state.is_world_process_zero = False
    callback.on_log(None, state, None)
    assert len(writer.histograms) == 1


def test_nobody_to_give_them_to(tiny_model, tokenizer, tmp_path):
    trainer = build("gappo", tiny_model, tokenizer, tmp_path)
    trainer.add_callback(PairHistograms(trainer))
    with pytest.raises(ValueError, match=r"nothing that takes histograms: report_to is \[\].*'tensorboard', 'wandb'"):
        trainer.train()
    quiet_one = build("gappo", tiny_model, tokenizer, tmp_path, log_pairs=False)
    with pytest.raises(ValueError, match="which this run does not write: leave log_pairs on"):
        PairHistograms(quiet_one)


@pytest.mark.parametrize("base", ["cpo", "dpo"])
@pytest.mark.parametrize("method", ["gappo", "gap-aware", "geometric-anchor"])
def test_scalars_have_tidy_names(method, base, tiny_model, tokenizer, tmp_path):
    """Under train/ or eval/, in groups, and what spreads with five numbers; none by two names."""
    reporter = FakeTensorBoard()
    trainer = build(
        method, tiny_model, tokenizer, tmp_path, base, callbacks=[reporter], eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    names = {tag for tag, _ in reporter.kept.scalars}
    assert all(re.fullmatch(r"(train|eval)(/[a-z][a-z_]*){1,3}", name) for name in names), names
    groups = {
        "gappo": ["weights"],
        "gap-aware": ["target_margins"],
        "geometric-anchor": ["target_margins", "anchor/gap", "anchor/weight"],
    }
    for group in groups[method]:
        spread = {f"train/{group}/{name}" for name in ("mean", "std", "min", "max", "zero")}
        assert {name for name in names if name.startswith(f"train/{group}/")} == spread
    flips = {"rate", "gradient_scale", "gradient_scale_clean", "gradient_share", "rate_low", "rate_mid", "rate_high"}
    assert {f"train/flips/{name}" for name in flips} <= names
    assert {"eval/pwa", "eval/pwa_all", "eval/spearman", "eval/n_pairs", "train/rewards/margins"} <= names
    assert not names & set(NAMES.values())
