"""`trl-margins compare`: the same budget for all methods, and a table that the run folders bear out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import preference_rows
from scipy import stats

from trl_margins.cli import compare, main, train
from trl_margins.evaluation.intervals import student_interval
from trl_margins.methods import METHODS

pytestmark = pytest.mark.usefixtures("few_objects_to_collect")

METRICS = ("eval_pwa", "eval_pwa_all", "eval_spearman")


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> dict[str, Any]:
    """What a base config says."""
    folder = tmp_path_factory.mktemp("data")
    preference_rows(24).to_json(folder / "pairs.jsonl")
    preference_rows(40, seed=5).to_json(folder / "eval.jsonl")
    return {
        "model_name_or_path": tiny_model,
        "dataset_name": str(folder / "pairs.jsonl"),
        "eval_dataset_name": str(folder / "eval.jsonl"),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "max_length": 128,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def config(folder: Path, settings: dict[str, Any], name: str = "base.yaml") -> list[str]:
    (folder / name).write_text(yaml.safe_dump(settings))
    return ["compare", "--config", str(folder / name)]


def numbers(out: Path, method: str, seed: int, rate: str = "0.01") -> dict[str, float]:
    return json.loads((out / f"{method}-lr{rate}-seed{seed}" / "eval_results.json").read_text())


def cells(text: str, method: str) -> list[str]:
    """Of a method's row of the table of numbers, which is the last one."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {method} ")][-1:]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def compared(base, tmp_path_factory) -> tuple[Path, str]:
    """Two methods, two seeds; the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("compared")
    words = [*config(folder, base), "--methods", "amapo", "gappo", "--seeds", "1", "2", "--out", str(folder / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "trl_margins.cli", *words], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out", done.stdout


def test_the_table_is_that_of_the_runs(compared):
    """By hand: NumPy's means, SciPy's intervals, from what each run folder's own file says."""
    out, printed = compared
    found = {(method, seed): numbers(out, method, seed) for method in ("amapo", "gappo") for seed in (1, 2)}
    for method in ("amapo", "gappo"):
        expected = []
        for name in METRICS:
            values = np.array([found[method, seed][name] for seed in (1, 2)])
            theirs = np.array([found["amapo", seed][name] for seed in (1, 2)])
            for numbers_, sign in ((values, ""), (values - theirs, "+")):
                low, high = stats.t.interval(0.95, 1, numbers_.mean(), stats.sem(numbers_))
                if np.isnan(low):  # no spread at all
                    low = high = numbers_.mean()
                expected.append(f"{numbers_.mean() + 0.0:{sign}.4f} ± {(high - low) / 2:.4f}")
            if method == "amapo":
                expected[-1] = "–"
        assert cells(printed, method)[:3] == [method, "0.01", "2"]
        assert cells(printed, method)[3:] == [cell.replace("-0.0000", "+0.0000") for cell in expected]
    assert {tuple(each.values()) for each in ({n: v[n] for n in METRICS} for v in found.values())} != 1
    assert (out / "compare.md").read_text().splitlines()[-5:] == printed.rstrip().splitlines()[-9:-4]
    table = json.loads((out / "results.json").read_text())["table"]
    mean = np.mean([found["gappo", seed]["eval_pwa_all"] for seed in (1, 2)])
    assert table[1]["eval_pwa_all"]["mean"] == pytest.approx(mean)


def test_the_interval_is_scipys():
    values = [0.3, 0.5, 0.8, 0.9]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert student_interval(values) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert np.isnan(student_interval([0.3])[1])
    assert student_interval([0.5, 0.5, 0.5]) == (0.5, 0.0)
