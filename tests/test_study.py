"""`benchmarks/study.py`: its numbers are the trainers', and several processes share out its runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer, preference_rows, trainer_of

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import pictures
import study

from trl_margins.report import style

SIZE = study.Size(1, 4, 2, (1e-3, 1e-2), 256, 2, (1, 2), (None, "random:0.2"), ("simpo", "dpo", "gappo"))


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_its_numbers_are_the_trainer_s(base, tiny_model, tokenizer, tmp_path):
    """Without a reference model and with it, where the trainer logs the sum over tokens."""
    rows, sets = preference_rows(8), {"test": preference_rows(40, seed=5), "ood": preference_rows(30, seed=6)}
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, rows, sets)
    expected = trainer.evaluate()
    found = study.measured(trainer.model, byte_tokenizer(), {"train": rows, **sets}, SIZE)
    assert len(found) == 8
    for name, value in found.items():
        if "logp" not in name:
            of_set, key = ("ood", name.removeprefix("ood_")) if name.startswith("ood_") else ("test", name)
            assert value == pytest.approx(expected[f"eval_{of_set}_{key}"], rel=1e-6), name
    assert study.measured(trainer.model, byte_tokenizer(), sets, SIZE) == pytest.approx(found)


@pytest.fixture
def made(monkeypatch) -> Counter:
    """The runs that are made, none of which trains; one method fails."""
    counted: Counter = Counter()

    def train(model, data, method, noise, seed, rate, k, size):
        counted[method, noise, seed, rate] += 1
        if method == "dpo" and noise:
            raise ValueError("of this method")
        numbers = dict.fromkeys(("pwa", "pwa_all", "spearman", "logp_chosen"), seed + 0.1)
        flips = {"flips/rate": 0.2, "flips/gradient_share": 0.3} if noise else {}
        return {**numbers, **flips, "pwa_all": rate}

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "small", lambda args, size: ("model", lambda seed: {}))
    return counted


def studied(out: Path) -> study.Study:
    (out / "locks").mkdir(parents=True, exist_ok=True)
    return study.Study(argparse.Namespace(size="small", out=out), SIZE)


def test_processes_share_out_the_runs(made, tmp_path):
    """Each run is made once; with the best learning rate, once all are known."""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda one: one.run(), [studied(tmp_path) for _ in range(3)]))
    assert set(made.values()) - {2} == {1}
    assert {run: n for run, n in made.items() if n == 2}.keys() == {(method, None, 0, 1e-2) for method in SIZE.methods}
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 3 * 2 + 2 * 2 * 3
    assert {line["learning_rate"] for line in lines if "seed" in line and line["method"] != "start"} == {1e-2}


def test_gapos_groups_are_chosen_with_its_learning_rate(monkeypatch, tmp_path):
    found = {(1e-3, 1): 0.5, (1e-3, 2): 0.7, (1e-2, 1): 0.6, (1e-2, 2): 0.4}
    taken = []

    def train(model, data, method, noise, seed, rate, k, size):
        taken.append((method, noise, seed, rate, k))
        return dict.fromkeys(("pwa", "pwa_all", "spearman", "logp_chosen"), found.get((rate, k), 0.1))

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "small", lambda args, size: ("model", lambda seed: {}))
    size = replace(SIZE, methods=("simpo", "geometric-anchor"))
    (tmp_path / "locks").mkdir()
    run = study.Study(argparse.Namespace(size="small", out=tmp_path), size)
    run.run()
    assert {one[3:] for one in taken if one[0] == "geometric-anchor" and not (one[2] == 0 and one[1] is None)} == {
        (1e-3, 2)
    }
    assert {one[4] for one in taken if one[0] == "simpo"} == {None}
    runs = [made for made in run.runs.values() if "seed" in made]
    assert "geometric-anchor 0.001. geometric-anchor: k = 2." in study.tables(runs, size)


def test_what_failed_is_tried_again(made, tmp_path):
    studied(tmp_path).run()
    first = Counter(made)
    again = studied(tmp_path)
    again.run()
    assert made - first == {("dpo", "random:0.2", seed, 1e-2): 1 for seed in (0, 1)}
    runs = [run for run in again.runs.values() if "seed" in run and "error" not in run]
    text = study.tables(runs, SIZE)
    assert "Without dpo, of which runs are missing." in text
    assert "| gappo | +0.0000 ± 0.0000 | +0.0000 ± 0.0000 |" in text


ROOT = Path(__file__).parent.parent


def test_the_picture_has_the_committed_runs(monkeypatch, tmp_path):
    """GAPO's two lines, by a loop over the file."""
    drawn = []
    monkeypatch.setattr(style, "write_both", lambda figure, file: drawn.append(figure))
    runs = [json.loads(line) for line in (ROOT / "benchmarks" / "study-small.jsonl").read_text().splitlines()]
    runs = [run for run in runs if "seed" in run and "error" not in run]
    study.plot(runs, study.SIZES["small"], tmp_path / "study")
    panel = next(axes for axes in drawn[0].axes if axes.get_title(loc="left") == "GAPO")
    by = {(run["method"], run["noise"], run["seed"]): run["pwa_all"] for run in runs}
    for kind, color in (("length", style.BLUE), ("random", style.VERMILLION)):
        (line,) = (line for line in panel.lines if line.get_color() == color)
        assert list(line.get_xdata()) == [0, 0.2, 0.4]
        for noise, shown in zip((None, f"{kind}:0.2", f"{kind}:0.4"), line.get_ydata(), strict=True):
            gains = [by["geometric-anchor", noise, seed] - by["simpo", noise, seed] for seed in range(8)]
            assert shown == pytest.approx(100 * np.mean(gains))


def test_the_seconds_are_the_page_s():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    found = pictures.seconds(page)
    assert found["Training on a CPU: a step of 4 pairs"]["MarginCPOTrainer(simpo)"] == {"seconds": 16.1}
    for rows in found.values():
        for name, row in rows.items():
            cells = re.findall(rf"^\| {re.escape(name)} \| ([0-9.]+) \|", page, re.MULTILINE)
            assert row["seconds"] in map(float, cells), name


def test_pictures_of_the_documentation_are_for_light_and_dark_pages():
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
    shown = [
        (path, *each)
        for path, page in pages.items()
        for each in re.findall(r"!\[([^]]*)\]\(([^)]+?)-(light|dark)\.svg#only-(light|dark)\)", page)
    ]
    assert len(shown) >= 4
    for path, alt, name, scheme, only in shown:
        assert scheme == only
        assert len(alt) > 40
        other = {"light": "dark", "dark": "light"}[scheme]
        assert (path, alt, name, other, other) in shown
        assert (path.parent / f"{name}-{scheme}.svg").is_file()
    assert not list((ROOT / "docs").rglob("*.png"))
