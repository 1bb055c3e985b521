"""`trl-margins report`: run folders made in code; numbers against independent NumPy; what is left out, and why."""

from __future__ import annotations

import base64
import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from said import hear, word_for_word  # noqa: F401 - its messages are held against said/

from trl_margins.cli import main
from trl_margins.report import figures, results, style, summaries
from trl_margins.report import page as page_module
from trl_margins.report.figures import PICTURES, draw_pictures
from trl_margins.report.margin_figures import MOST_POINTS, _half_violin, shared_target
from trl_margins.report.page import html_page, write_report
from trl_margins.report.picture import Picture, Usable, source, span, thinned_logs, usable
from trl_margins.report.run_folder import Run, read_pairs, read_run, read_runs
from trl_margins.report.settings import settings as page_settings
from trl_margins.report.style import label, render

TERMS = {
    "gappo": ("GapPO", "score-gap", None),
    "gap-aware": ("GaPO", None, "gap-aware"),
    "gamma-po": ("γ-PO", None, "gamma-po"),
    "amapo": ("AMaPO", None, "amapo"),
    "geometric-anchor": ("GAPO", None, "geometric-anchor"),
    None: ("MarginCPO", None, None),
}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def pair_columns(method: str | None, steps: int, batch: int, seed: int, flips: float) -> dict[str, np.ndarray]:
    """A made-up training: reward gaps grow, more slowly where the label is flipped."""
    rng = np.random.default_rng(seed)
    n = steps * batch
    step = np.repeat(np.arange(1, steps + 1), batch)
    done = step / steps
    beta, gamma = {"gappo": (1.0, 0.5), "geometric-anchor": (2.5, 0.25)}.get(method, (10.0, 3.0))
    score_gap = np.round(rng.gamma(1.6, 1.0, n) * 4) / 4
    flipped = rng.random(n) < flips
    quality = np.where(flipped, -1, 1) * (0.05 + 0.06 * score_gap)
    chosen = -1.25 - 0.15 * done + 0.25 * rng.standard_normal(n)
    rejected = chosen - quality * (0.2 + done) + 0.22 * rng.standard_normal(n)
    gap = beta * (chosen - rejected)
    columns: dict[str, np.ndarray] = {"step": step, "reward_gap": gap, "weight": np.ones(n), "margin": np.zeros(n)}
    target = np.full(n, gamma)
    if method == "gappo":
        columns["weight"] = score_gap
    elif method == "gap-aware":
        ef = rng.beta(2.2, 6, n)
        columns |= {"evaluation_factor": ef, "mapped_factor": -np.log(np.maximum(ef, 0.01))}
        target = gamma * columns["mapped_factor"] / columns["mapped_factor"].mean()
    elif method == "gamma-po":
        target = gamma * (0.85 + 0.35 * sigmoid(gap - gamma))
    elif method == "amapo":
        mean, spread = gap.mean() / beta, gap.std() / beta
        target = np.where(gap / beta < mean, beta * np.exp((mean - gap / beta) / spread * mean), 0)
    elif method == "geometric-anchor":
        fall = rng.gamma(4, 0.04, n) * np.where(flipped, 1 + done, 1)
        target = gap - beta * fall + gamma
        columns |= {"anchor_gap": fall, "anchor_weight": beta * sigmoid(gamma - beta * fall)}
    if method not in ("gappo", None):
        columns["margin"] = target
    columns["slope"] = sigmoid(target - gap)
    columns |= {"logp_chosen": chosen, "logp_rejected": rejected, "score_gap": score_gap}
    columns |= {"length_chosen": rng.integers(20, 400, n), "length_rejected": rng.integers(20, 400, n)}
    if flips:
        columns["is_flipped"] = flipped.astype(int)
    return columns


def history(steps: int, every: int, seed: int, sets: tuple[str, ...] = ("",)) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    entries: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        done = step / steps
        entries.append(
            {
                "step": step,
                "loss": 1.2 - 0.5 * done + 0.05 * rng.standard_normal(),
                "rewards/margins": 0.6 * done + 0.05 * rng.standard_normal(),
                "grad_norm": float(np.exp(0.5 * np.sin(7 * step))),
            }
        )
        for i, name in enumerate(sets):
            prefix = f"eval_{name}_" if name else "eval_"
            rise = 0.12 * np.tanh(3 * done) - 0.03 * done - 0.04 * i + 0.006 * rng.standard_normal(3)
            values = dict(zip(("pwa", "pwa_all", "spearman"), np.array([0.52, 0.5, 0.02]) + rise, strict=True))
            entries.append({"step": step, **{f"{prefix}{key}": value for key, value in values.items()}})
    return entries


def write_pairs(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def make_run(
    folder: Path,
    method: str | None = "gappo",
    steps: int = 40,
    batch: int = 8,
    seed: int = 0,
    flips: float = 0.0,
    sets: tuple[str, ...] = ("",),
    **config: Any,
) -> Path:
    name, weight, margin = TERMS[method]
    folder.mkdir(parents=True)
    info = {
        "version": "0.1.0",
        "method": method,
        "name": name,
        "base": "cpo",
        "trainer": f"{name}Trainer",
        "model": "a-small-model",
        "weight": weight,
        "margin": margin,
        **({"reward": "length-normalized"} if method else {}),  # one as older versions wrote it
        "gamma": {"gappo": 0.5, "geometric-anchor": 0.25}.get(method, 3.0),
        "term_options": [key for key in config if key.startswith(("score_gap_", "gamma_po_", "anchor_"))],
        "train_rows": steps * batch,
        **({"pairs_per_step": batch} if method else {}),
        "config": {
            "loss_type": "simpo",
            "beta": 1.0,
            "learning_rate": 1e-5,
            "seed": seed,
            "eval_min_score_gap": 2.0,
            **config,
        },
    }
    (folder / "margin_run.json").write_text(json.dumps(info))
    state = {"log_history": history(steps, max(steps // 20, 1), seed, sets)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    write_pairs(folder / "pair_log.csv", pair_columns(method, steps, batch, seed, flips))
    return folder


@pytest.fixture
def run_of(tmp_path):
    """Makes and reads a run."""

    def make(method: str | None = "gappo", name: str = "run", **options: Any) -> Any:
        return read_run(make_run(tmp_path / name, method, **options))

    return make


def of_pairs(folder: Path, **columns: Any) -> Any:
    """A run whose pair log has these columns, and nothing else of interest."""
    make_run(folder, "gappo", steps=1, batch=1)
    write_pairs(folder / "pair_log.csv", {name: np.asarray(column) for name, column in columns.items()})
    return read_run(folder)


def evaluated(*entries: dict[str, Any], **config: Any) -> Any:
    """A run with this log."""
    return Run("run", Path("run"), {"config": config}, entries, {})


# Reading


def test_a_run_is_what_was_written(tmp_path):
    columns = pair_columns("geometric-anchor", 5, 3, 0, 0.4)
    run = read_run(make_run(tmp_path / "gapo", "geometric-anchor", steps=5, batch=3, flips=0.4))
    assert run.name == "gapo"
    assert run.info["trainer"] == "GAPOTrainer"
    assert run.pairs.keys() == columns.keys()
    for name, column in columns.items():
        np.testing.assert_allclose(run.pairs[name], column, rtol=1e-15)
    assert len(run.log_history) == 10


def test_an_empty_cell_is_nan(tmp_path):
    (tmp_path / "pairs.csv").write_text("step,score_gap\n1,\n2,-0.5\n")
    pairs = read_pairs(tmp_path / "pairs.csv")
    np.testing.assert_array_equal(pairs["step"], [1, 2])
    np.testing.assert_array_equal(pairs["score_gap"], [np.nan, -0.5])


def test_a_line_that_was_cut_off_is_dropped(tmp_path, caplog):
    path = tmp_path / "pairs.csv"
    path.write_text("step,weight,slope\n1,2,0.5\n2,3")
    assert read_pairs(path)["weight"].tolist() == [2]
    assert "the last line is incomplete" in caplog.text
    path.write_text("step,weight,slope\n1,2\n2,3,0.5\n")
    with pytest.raises(ValueError, match=r"pairs\.csv, line 2: 2 cells for 3 columns: remove the line"):
        read_pairs(path)


def test_bad_pair_logs_are_named(tmp_path):
    path = tmp_path / "pairs.csv"
    for text, said in (
        ("step,weight\n1,2\n2,heavy\n", r", line 3, column 'weight': 'heavy' is not a number; correct the"),
        ("step,weight\n1,2\n2,2\n2,2\n1,2\n", r", pair 4: step 1 comes after step 2; a log holds one training"),
        ("step,weight\n1,inf\n2,3e38\n3,-1e39\n", r", line 4, column 'weight': '-1e39' is larger than any number of"),
        ("step,weight,weight\n1,2,3\n", r" has the column 'weight' more than once"),
        ("", r" has no column 'step' in its first line"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"pairs\.csv{said}"):
            read_pairs(path)


def test_what_is_missing_is_named(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory: a run is the output_dir of a training"):
        read_run(tmp_path / "nowhere")
    folder = make_run(tmp_path / "run")
    (folder / "trainer_state.json").unlink()
    assert read_run(folder).log_history == []
    assert (
        "has no trainer_state.json (the trainers of trl_margins write it to their output_dir when training ends"
        in caplog.text
    )
    (folder / "pair_log.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither trainer_state\.json nor pair_log\.csv.*checkpoint"):
        read_run(folder)
    (folder / "margin_run.json").write_text('{"version"')
    with pytest.raises(ValueError, match=r"margin_run\.json is not JSON .*: was the training stopped"):
        read_run(folder)
    (folder / "margin_run.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no margin_run\.json: the trainers of trl_margins write it"):
        read_run(folder)


def test_a_run_before_its_base_was_written(tmp_path):
    folder = make_run(tmp_path / "run")
    info = json.loads((folder / "margin_run.json").read_text())
    del info["base"]
    (folder / "margin_run.json").write_text(json.dumps(info))
    assert read_run(folder).info == info


DAMAGED = [
    *(("base", None), ("base", "x")),
    *((name, 5) for name in ("method", "name", "model", "reference", "reward", "weight", "margin", "version")),
    *((name, "x") for name in ("term_options", "reward_options", "score_columns", "config", "adapter")),
    *((name, "x") for name in ("beta", "gamma", "train_rows", "pairs_per_step")),
]


@pytest.mark.parametrize(("name", "value"), DAMAGED)
def test_damaged_settings(name, value, tmp_path):
    file = make_run(tmp_path / "run") / "margin_run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"margin_run.json: '{name}' is {value!r}, which no trainer writes"):
        read_run(file.parent)


@pytest.mark.parametrize("history", [5, None, [5, "a"], [{"step": "2", "loss": 1.0}], [{"step": 2, "loss": "low"}]])
def test_a_damaged_history(history, tmp_path):
    file = make_run(tmp_path / "run") / "trainer_state.json"
    file.write_text(json.dumps({"log_history": history}))
    with pytest.raises(ValueError, match=r"trainer_state\.json: its log_history is not a list of objects"):
        read_run(file.parent)


def test_the_log_of_the_newest_checkpoint(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "trainer_state.json").unlink()
    for step in (9, 10, 2):
        (folder / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": step, "loss": 1.0}]}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-best" / "trainer_state.json").write_text("{}")
    assert [entry["step"] for entry in read_run(folder).log_history] == [10]


def test_runs_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / name, steps=2) for name in ("a/out", "b/out", "other")]
    assert [run.name for run in read_runs(folders)] == ["a/out", "b/out", f"{tmp_path.name}/other"]
    assert [run.name for run in read_runs(folders[1:])] == ["out", "other"]
    with pytest.raises(ValueError, match="given twice: name every run once"):
        read_runs([folders[0], tmp_path / "b" / ".." / "a" / "out"])


# Numbers


def test_curves_by_evaluation_set():
    run = evaluated(
        {"step": 10, "eval_ultra_pwa": 0.6, "eval_ultra_pwa_all": 0.5, "eval_loss": 1.0},
        {"step": 10, "eval_my_pwa_set_spearman": 0.1, "eval_ultra_pwa": 0.61},
        {"step": 20, "eval_ultra_pwa": float("nan"), "eval_ultra_pwa_all": 0.7, "eval_pwa": None},
        {"step": 5, "eval_ultra_pwa_all": 0.7, "pwa": 0.1},
    )
    curves = summaries.ranking_curves(run)
    assert set(curves) == {("ultra", "pwa"), ("ultra", "pwa_all"), ("my_pwa_set", "spearman")}
    assert curves["ultra", "pwa"].values.tolist() == [0.61]
    assert curves["ultra", "pwa_all"].steps.tolist() == [5, 10, 20]
    assert curves["ultra", "pwa_all"].best == 0  # the first of equals
    assert set(summaries.ranking_curves(evaluated({"step": 1, "eval_pwa": 0.5}))) == {("", "pwa")}


def test_target_margins_by_their_name_today_or_before():
    values = {"step": 2, "rewards/margins": 0.5}
    for name in ("target_margins", "margins"):
        run = evaluated({"step": 1, f"{name}/mean": 0.25, "rewards/margins": 0.5}, values)
        assert summaries.logged_curve(run, "target_margins/mean").values.tolist() == [0.25]
        assert [panel.get_ylabel() for panel in figures.loss([run]).figure.axes] == [
            "mean reward gap m\n(reward units, β inside)",
            "mean target margin\n(reward units)",
        ]
    assert summaries.logged_curve(evaluated(values), "target_margins/mean").steps.size == 0


def test_what_the_best_checkpoint_scored_is_no_point_of_the_last_step():
    log = ({"step": 10, "eval_pwa": 0.7}, {"step": 20, "eval_pwa": 0.4}, {"step": 20, "train_runtime": 9.0})
    after = {"step": 20, "eval_pwa": 0.7}
    values = {}
    for best in (True, False):
        run = evaluated(*log, after, load_best_model_at_end=best)
        values[best] = summaries.ranking_curves(run)["", "pwa"].values.tolist()
    assert values == {True: [0.7, 0.4], False: [0.7, 0.7]}


def test_shares_of_mass_by_bin():
    rng = np.random.default_rng(0)
    gap, mass, edges = rng.gamma(2, 1, 500), rng.random(500), np.array([0.0, 1.0, 2.0, 4.0])
    got = summaries.shares(gap, edges, mass)
    for i, (low, high) in enumerate(((0, 1), (1, 2), (2, np.inf))):  # what is beyond belongs to the last
        inside = [m for g, m in zip(gap, mass, strict=True) if low <= g < high]
        assert got[i] == pytest.approx(sum(inside) / mass.sum())
    np.testing.assert_allclose(summaries.shares(gap, edges), summaries.shares(gap, edges, np.full(500, 3.0)))


@pytest.mark.parametrize(("n", "parts"), [(1, 1), (79, 1), (80, 2), (1000, 10)])
def test_phases_are_equal_and_whole(n, parts):
    slices = summaries.phases(n, most=10, least=40)
    sizes = [part.stop - part.start for part in slices]
    assert len(slices) == parts
    assert max(sizes) - min(sizes) <= 1
    assert np.concatenate([np.arange(n)[part] for part in slices]).tolist() == list(range(n))


def test_thinning_is_even_and_repeats():
    kept = summaries.thinned(100_003, 5000)
    assert kept.size == len(set(kept)) == 5000
    assert (kept[0], kept[-1]) == (0, 100_002)
    assert set(np.diff(kept)) <= {20, 21}
    np.testing.assert_array_equal(kept, summaries.thinned(100_003, 5000))
    assert summaries.thinned(7, 5000).tolist() == list(range(7))


def test_tiers_by_rank():
    weight = np.array([5.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 0.0])
    assert summaries.tiers(weight).tolist() == [1, 0, 2, 0, 2, 0, 2, 1, 1, 0]
    assert np.bincount(summaries.tiers(np.zeros(9))).tolist() == [3, 3, 3]


def test_wilson_interval():
    marked = np.array([1.0] * 7 + [0.0] * 33)
    n, p, z = 40, 7 / 40, 1.959964
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = (p, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
    assert summaries.rate(marked) == pytest.approx(expected, abs=1e-6)
    assert np.isnan(summaries.rate(marked[:0])).all()
    assert np.isnan(summaries.mean(marked[:0])).all()


def test_flips_by_phase_and_tier():
    """Against loops over the pairs."""
    rng = np.random.default_rng(1)
    n = 200
    step, flipped = np.arange(n) // 4 + 1.0, (rng.random(n) < 0.3).astype(float)
    weight = rng.random(n) - 0.2 * flipped
    result = summaries.flips(step, weight, flipped, most=10, least=40)
    assert result.steps.size == 5
    assert result.overall == flipped.mean()
    for phase in range(5):
        rows = sorted(range(40 * phase, 40 * phase + 40), key=lambda i: weight[i])
        assert result.steps[phase] == np.mean([step[i] for i in rows])
        assert result.flipped[phase, 0] == pytest.approx(np.mean([weight[i] for i in rows if flipped[i]]))
        clean = [weight[i] for i in rows if not flipped[i]]
        half = 1.96 * np.std(clean, ddof=1) / len(clean) ** 0.5
        np.testing.assert_allclose(result.clean[phase], np.mean(clean) + np.array([0, -half, half]))
        for tier, part in zip(result.by_tier, (rows[:14], rows[14:27], rows[27:]), strict=True):
            assert tier[phase, 0] == pytest.approx(np.mean([flipped[i] for i in part]))


def test_agreement_of_two_rankings():
    """Against pandas and a loop over the pairs."""
    rng = np.random.default_rng(2)
    norm, cos = np.exp(rng.standard_normal(60)), np.tanh(0.3 + rng.standard_normal(60))
    got = summaries.agreement(norm, cos, (0.1, 0.25))
    table = pd.DataFrame({"own": norm, "shared": norm * cos})
    assert got.spearman == pytest.approx(table.corr("spearman").loc["own", "shared"])
    assert got.positive == sum(c > 0 for c in cos) / 60
    assert got.median == sorted(cos)[29] / 2 + sorted(cos)[30] / 2
    for share, n in ((0.1, 6), (0.25, 15)):
        best = [set(sorted(range(60), key=lambda i: -values[i])[:n]) for values in (norm, norm * cos)]
        assert got.overlap[share] == len(best[0] & best[1]) / n
    logs = [np.log(c) for c in cos if c > 0]
    mean = sum(logs) / len(logs)
    assert got.spread_alignment == pytest.approx((sum((x - mean) ** 2 for x in logs) / (len(logs) - 1)) ** 0.5)
    assert got.spread_norm == pytest.approx(pd.Series(np.log(norm)).std())


def test_smoothing_is_the_mean_of_three_neighbours():
    values = np.array([3.0, 0.0, 6.0, 9.0, 1.0])
    np.testing.assert_allclose(summaries.smoothed(values), [2, 3, 5, 16 / 3, 11 / 3])
    assert summaries.smoothed(values[:1]).tolist() == [3]


# Pictures

ALWAYS = {"ranking", "gradient_mass", "reward_gaps", "logps", "loss", "gradient_norm"}


@pytest.mark.parametrize(
    ("method", "flips", "more"),
    [
        ("gappo", 0.0, {"cases"}),
        ("gap-aware", 0.0, {"cases", "margins", "label_smoothing", "evaluation_factors"}),
        ("gamma-po", 0.2, {"cases", "margins", "label_smoothing", "flips"}),
        ("geometric-anchor", 0.2, {"cases", "margins", "label_smoothing", "flips"}),
        ("amapo", 0.0, {"cases", "margins"}),
        (None, 0.0, set()),
    ],
)
def test_a_run_has_the_pictures_it_has_numbers_for(run_of, method, flips, more):
    pictures = draw_pictures([run_of(method, flips=flips)])
    assert len(pictures) == len(PICTURES)
    assert {p.name for p in pictures if p.figure is not None} == ALWAYS | more
    for picture in pictures:
        assert (picture.figure is None) == ("run" in picture.left_out)
        assert isinstance(picture.figure, Figure) == bool(picture.caption)


def test_why_a_picture_is_missing(tmp_path):
    n = 4
    always = {"step": range(n), "weight": np.zeros(n), "slope": np.full(n, 0.5), "margin": np.zeros(n)}
    run = of_pairs(tmp_path / "a", **always, reward_gap=range(n), score_gap=range(n), is_flipped=np.zeros(n))
    reasons = {p.name: p.left_out.get("a") for p in draw_pictures([run])}
    assert reasons["gradient_mass"] == "no pair has a gradient: weight × slope is 0 for all"
    assert reasons["margins"] == "all pairs have the same margin, 0 (no margin term)"
    assert reasons["flips"] == "no pair is marked as flipped"
    assert reasons["logps"] == "pair_log.csv has no column logp_chosen"
    assert reasons["evaluation_factors"].startswith("pair_log.csv has no column evaluation_factor (only a margin from")

    run = of_pairs(tmp_path / "b", **always, score_gap=[""] * n, is_flipped=[0, 1, 0, 1])
    reasons = {p.name: p.left_out.get("b") for p in draw_pictures([run])}
    assert reasons["gradient_mass"] == "no line of pair_log.csv has a number in each of score_gap, weight, slope"
    assert reasons["flips"] == "all pairs have the same weight × slope"

    (tmp_path / "b" / "pair_log.csv").unlink()
    reasons = {p.name: p.left_out.get("b") for p in draw_pictures([read_run(tmp_path / "b")])}
    assert reasons["flips"].startswith("the folder has no pair_log.csv: the trainers")
    reasons = {p.name: p.left_out.get("run") for p in draw_pictures([evaluated({"step": 1, "grad_norm": 1.0})])}
    assert reasons["ranking"] == (
        "trainer_state.json has no eval_pwa, eval_pwa_all or eval_spearman: it was trained without evaluation"
    )
    assert reasons["loss"] == "trainer_state.json has no loss or rewards/margins"
    assert reasons["gradient_norm"] is None
    assert reasons["anchor_parts"] == (
        "the folder has no anchor_diagnostics.csv: the trainers of trl_margins write it where an anchor is measured "
        "(GAPO) and anchor_diagnostics is set"
    )
    reasons = {p.name: p.left_out.get("run") for p in draw_pictures([evaluated({"step": 1, "loss": 1.0})])}
    assert reasons["gradient_norm"] == "trainer_state.json has no grad_norm"


def test_gradient_mass_in_the_bars(tmp_path):
    """Four bars a bin: pairs, weight, slope, weight × slope; a negative score gap counts by its size."""
    gap = np.array([0.0, -1.0, 1.0, 2.0, 3.0, -3.0, ""], dtype=object)
    weight, slope = np.array([0, 1, 1, 2, 3, 3, 9.0]), np.array([0.9, 0.5, 0.6, 0.5, 0.1, 0.4, 0.9])
    run = of_pairs(tmp_path / "run", step=np.ones(7), score_gap=gap, weight=weight, slope=slope)
    picture = figures.gradient_mass([run])
    (panel,) = picture.figure.axes
    heights = [[bar.get_height() for bar in bars] for bars in panel.containers]
    np.testing.assert_allclose(heights[0], np.array([1, 2, 1, 2]) / 6)
    np.testing.assert_allclose(heights[1], np.array([0, 2, 2, 6]) / 10)
    np.testing.assert_allclose(heights[2], np.array([0.9, 1.1, 0.5, 0.5]) / 3.0)
    np.testing.assert_allclose(heights[3], np.array([0, 1.1, 1.0, 1.5]) / 3.6)
    assert [bars.get_label() for bars in panel.containers][1:] == [
        "weights",
        "gradient before weighting",
        "gradient after weighting",
    ]
    assert "of 6 trained pairs. Left out for an empty cell: 1 of run." in picture.caption


def test_far_score_gaps_do_not_flatten_the_rest(tmp_path):
    gap = np.array([0.5] * 600 + [1.5] * 399 + [1000.0])
    run = of_pairs(tmp_path / "run", step=np.ones(1000), score_gap=gap, weight=gap, slope=np.ones(1000))
    picture = figures.gradient_mass([run])
    assert picture.figure.axes[0].get_xlim()[1] < 5
    assert "The last bin also holds the pairs beyond it, 1." in picture.caption


def test_margins_are_thinned_and_say_so(run_of):
    run = run_of("gamma-po", steps=1200, batch=8)
    picture = figures.margins([run])
    early, late = (points.get_offsets() for points in picture.figure.axes[0].collections)
    assert len(early) == len(late) == MOST_POINTS // 2
    assert {tuple(point) for point in late} <= set(
        zip(run.pairs["reward_gap"][-3200:], run.pairs["margin"][-3200:], strict=True)
    )
    assert "Of 6,400 pairs in the two thirds 5,000 are drawn" in picture.caption
    assert "are drawn" not in figures.margins([run_of("gamma-po", "small")]).caption


@pytest.mark.parametrize(
    ("method", "config", "line"),
    [
        ("gamma-po", {}, 3.0),
        ("gap-aware", {}, 3.0),
        ("geometric-anchor", {}, 0.25),
        ("gamma-po", {"gamma_po_centered": True}, 0.0),  # the margins are the authors' γ_i − γ0
        ("amapo", {}, None),  # makes its margins without the target
    ],
)
def test_the_line_at_the_shared_target(run_of, method, config, line):
    picture = figures.margins([run_of(method, **config)])
    dashed = [each.get_ydata()[0] for each in picture.figure.axes[0].lines if each.get_linestyle() == "--"]
    assert dashed == ([] if line is None else [line])
    assert (f"γ₀ of the run's settings: {line or 0:g} in run." in picture.caption) == (line is not None)


def test_the_target_of_a_run_before_it_was_written_and_of_an_unknown_term(run_of):
    run = run_of("gamma-po", beta=10.0, simpo_gamma=1.5)
    older = replace(run, info={key: value for key, value in run.info.items() if key != "gamma"})
    assert shared_target(older) == 1.5
    assert shared_target(replace(run, info={**run.info, "margin": "gamma-po, of-no-package"})) is None


def test_label_smoothing_in_picture_and_table(run_of):
    """The points are the theorem's, the table's medians NumPy's, and what the theorem is not about is left out."""
    run, amapo = run_of("gamma-po"), run_of("amapo", "amapo")
    m, margin = run.pairs["reward_gap"], run.pairs["margin"]
    rate = (margin - 3) * (1 - sigmoid(m - 3)) / (np.log1p(np.exp(m + 3)) - np.log1p(np.exp(3 - m)))
    picture = figures.label_smoothing([run, amapo])
    early, late = picture.figure.axes[0].collections
    third = len(m) // 3
    np.testing.assert_allclose(early.get_offsets()[:100], np.column_stack([m, rate])[:100], rtol=1e-9)
    np.testing.assert_allclose(late.get_offsets()[-third:], np.column_stack([m, rate])[-third:], rtol=1e-9)
    assert picture.left_out["amapo"] == "margin term 'amapo' has no target margin γ₀ that pairs share"
    page = html_page([run, amapo], [], {}, "png")
    for side in (m < 0, m > 0):
        quartiles = [f"{each:.4g}" for each in np.percentile(rate[side], [50, 25, 75])]
        assert f'<td class="number">{side.sum()} ({100 * side.mean():.1f} %)</td>' in page
        assert "{} [{}, {}]".format(*quartiles) in page
    assert "Implied label smoothing" not in html_page([amapo], [], {}, "png")
    smoothed = replace(run, pairs={**run.pairs, "slope": 0.8 * run.pairs["slope"]})
    reason = figures.label_smoothing([smoothed]).left_out["run"]
    assert reason == "its slopes are not σ(margin − m): the theorem is about the loss −log σ(m − margin)"


def test_reward_gaps_are_those_of_the_thirds(run_of):
    run = run_of("gamma-po", steps=60)
    picture = figures.reward_gaps([run])
    whole, near = picture.figure.axes
    gap = run.pairs["reward_gap"]
    reach = np.median(np.abs(gap))
    medians = [lines.get_segments()[0][0][0] for panel in (whole, near) for lines in panel.collections[1::2]]
    parts = [gap[:160], gap[-160:]]
    inside = [part[np.abs(part) <= reach] for part in parts]
    np.testing.assert_allclose(medians, [np.median(part) for part in parts + inside])
    assert f"{100 * (gap[-160:] <= 0).mean():.3g} % are not above 0" in picture.caption
    assert near.get_xlim() == (-reach, reach)


def test_flips_are_by_anchor_weight_where_there_is_one(run_of):
    gapo, gappo = run_of("geometric-anchor", "gapo", flips=0.2), run_of("gappo", "gappo", flips=0.2)
    panels = figures.flips([gapo, gappo]).figure.axes
    assert [panel.get_ylabel() for panel in panels] == [
        "mean anchor weight",
        "flip rate",
        "mean weight × slope",
        "flip rate",
    ]
    clean = gapo.pairs["anchor_weight"][gapo.pairs["is_flipped"] == 0]
    drawn = panels[0].lines[0].get_ydata()
    assert clean.min() < drawn.min() < clean.mean() < drawn.max() < clean.max()


def diagnosed(folder: Path, flips: bool = True, own: bool = False, steps: tuple[int, ...] = (1, 51)) -> Any:
    """A run with 50 pairs in each recorded step, made up."""
    rng, n = np.random.default_rng(4), 50 * len(steps)
    step, norm = np.repeat(steps, 50), np.exp(rng.standard_normal(n))
    cos = np.ones(n) if own else np.tanh(0.5 + 0.5 * rng.standard_normal(n))
    first, curvature = 0.05 * norm * cos, 0.01 * rng.standard_normal(n)
    parts = {"gradient_norm": norm, "alignment": cos, "first_order": first, "curvature": curvature}
    marked = {"is_flipped": (rng.random(n) < 0.3).astype(int)} if flips else {}
    make_run(folder, "geometric-anchor", steps=100, anchor_radius=0.05)
    write_pairs(folder / "anchor_diagnostics.csv", {"step": step, **marked, "anchor_gap": first + curvature, **parts})
    return read_run(folder)


def test_both_rankings_in_the_picture(tmp_path):
    """Clean and flipped pairs apart, where both are known; without curvature, and with it."""
    known, unknown = diagnosed(tmp_path / "known"), diagnosed(tmp_path / "unknown", flips=False)
    picture = figures.anchor_ranking([known, unknown])
    left, middle, right, *others = picture.figure.axes
    pairs, flipped = known.anchors, known.anchors["is_flipped"] == 1
    assert left.get_title(loc="left").startswith(f"known\ncos φ > 0: {100 * (pairs['alignment'] > 0).mean():.3g} %")
    own = 0.05 * pairs["gradient_norm"]
    for points, rows in zip(middle.collections, (~flipped, flipped), strict=True):
        expected = np.column_stack([own, pairs["first_order"]])[rows]
        np.testing.assert_allclose(points.get_offsets(), expected)
    best = [set(np.argsort(-values)[:20]) for values in (own, pairs["first_order"])]
    assert right.containers[0][1].get_height() == len(best[0] & best[1]) / 20
    assert len(others[1].collections) == 1
    assert others[1].collections[0].get_offsets().shape == (100, 2)


def test_gaps_over_the_recorded_steps(tmp_path):
    run = diagnosed(tmp_path / "run", steps=(1, 21, 41))
    scatter, gaps, ranks = figures.anchor_parts([run]).figure.axes
    table = pd.DataFrame(run.anchors)
    for points, step in zip(scatter.collections, (1, 41), strict=True):
        np.testing.assert_allclose(points.get_offsets(), table[table["step"] == step][["first_order", "curvature"]])
    thirds = [table[50 * i : 50 * i + 50] for i in range(3)]
    for line, kind in zip(gaps.lines, (0, 1), strict=True):
        means = [part[part["is_flipped"] == kind]["anchor_gap"].mean() for part in thirds]
        np.testing.assert_allclose(line.get_xydata(), np.column_stack([8 * np.array([1, 21, 41]), means]))
    median, rank, _ = ranks.lines
    np.testing.assert_allclose(median.get_ydata(), [part["alignment"].median() for part in thirds])
    np.testing.assert_allclose(
        rank.get_ydata(), [part["first_order"].corr(part["gradient_norm"], "spearman") for part in thirds]
    )


def test_pairs_without_a_gradient_are_not_ranked(tmp_path):
    """Twice the same completion: what its gradient is, is rounding error."""
    run = diagnosed(tmp_path / "run")
    caption = figures.anchor_ranking([run]).caption
    assert "of 100 measured pairs." in caption
    assert "Left out" not in caption
    run.anchors["gradient_norm"][::20] = 1e-7
    caption = figures.anchor_ranking([run]).caption
    assert "of 95 measured pairs. Left out, as without a gradient: 5 below a thousandth of the median" in caption
    rest = np.delete(run.anchors["gradient_norm"], np.arange(0, 100, 20))
    assert f"a standard deviation of {np.log(rest).std(ddof=1):.2f}" in caption


def test_why_there_is_no_ranking(tmp_path):
    run = diagnosed(tmp_path / "own", own=True)
    reason = figures.anchor_ranking([run]).left_out["own"]
    assert reason == "each pair was measured along its own direction: every alignment is 1"
    assert figures.anchor_parts([run]).figure is not None
    one = diagnosed(tmp_path / "one")
    write_pairs(one.path / "anchor_diagnostics.csv", {name: column[:1] for name, column in one.anchors.items()})
    one = read_run(one.path)
    assert "there is nothing to rank" in figures.anchor_ranking([one]).left_out["one"]
    assert figures.anchor_parts([one]).left_out["one"] == "all pairs have the same anchor gap"
    equal = diagnosed(tmp_path / "equal")
    for norm, alignment in ((1.0, np.linspace(0.1, 0.9, 100)), (2.0 ** (np.arange(100) % 3), None)):
        equal.anchors["gradient_norm"][:] = norm
        equal.anchors["alignment"][:] = 1 / equal.anchors["gradient_norm"] if alignment is None else alignment
        assert "there is nothing to rank" in figures.anchor_ranking([equal]).left_out["equal"]


def test_gradient_norms_of_several_runs_have_one_threshold():
    norms = {"calm": [1.0, 2.0, 3.0, 2.0, 2.0], "wild": [4.0, 9.0, 4.0, 30.0, 4.0]}
    runs = [
        Run(name, Path(name), {}, [{"step": i + 1, "grad_norm": value} for i, value in enumerate(values)], {})
        for name, values in norms.items()
    ]
    picture = figures.gradient_norm(runs)
    (panel,) = picture.figure.axes
    drawn = [line.get_ydata() for line in panel.lines]
    np.testing.assert_allclose(drawn[1], [4 / 3, 2, 7 / 3, 7 / 3, 2])
    np.testing.assert_allclose(drawn[2], norms["wild"])
    assert set(drawn[-1]) == {6.0}  # twice the median of 2 and 4
    assert "In calm the greatest is 3, in step 3; 0 of 5 (0 %) are above the line." in picture.caption
    assert "In wild the greatest is 30, in step 4; 2 of 5 (40 %) are above the line." in picture.caption


def test_flips_are_said_of_the_end_of_training(run_of):
    run = run_of("geometric-anchor", flips=0.3, steps=100)
    last = pd.DataFrame(run.pairs)[-80:].sort_values("anchor_weight")  # of ten parts
    means, third = last.groupby("is_flipped")["anchor_weight"].mean(), last["is_flipped"].to_numpy()
    caption = figures.flips([run]).caption
    assert f"flipped pairs weigh {means[1]:.4g} on average and clean ones {means[0]:.4g}; " in caption
    assert f"{100 * third[:27].mean():.3g} % of the lowest third" in caption
    assert f"{100 * third[-26:].mean():.3g} % of the highest" in caption


def test_log_probabilities_are_medians(run_of):
    run = run_of("gappo", steps=100, batch=8)
    chosen, rejected = figures.logps([run]).figure.axes[0].lines
    for line, name in ((chosen, "logp_chosen"), (rejected, "logp_rejected")):
        expected = np.median(run.pairs[name].reshape(20, 40), axis=1)
        np.testing.assert_allclose(line.get_ydata(), expected)
    np.testing.assert_allclose(chosen.get_xdata(), 8 * (np.arange(20) * 5 + 3))  # pairs


def test_a_run_keeps_its_colour(run_of):
    """Also where another one is left out; several evaluation sets differ by dashes."""
    runs = [run_of("gappo", "a", sets=("x", "y")), run_of("gap-aware", "b"), run_of("gap-aware", "c")]
    curves = figures.ranking(runs).figure.axes[0].lines
    colour = {run.name: figures.run_styles(runs)[run.name]["color"] for run in runs}
    assert len(set(colour.values())) == 3
    drawn = [(line.get_color(), line.get_linestyle()) for line in curves if line.get_fillstyle() == "full"]
    assert [drawn[0][0], drawn[1][0]] == [colour["a"]] * 2
    assert drawn[0][1] != drawn[1][1]
    stairs = figures.evaluation_factors(runs).figure.axes[0].lines
    assert [line.get_color() for line in stairs] == [colour["b"], colour["c"]]


def steps_above(panel: Any) -> list[str]:
    return [axis.get_xlabel() for axis in panel.child_axes]


@pytest.mark.rehearsal
def test_curves_are_over_pairs(run_of):
    """Steps, as logged, times pairs per step; steps above where a step of each run has as many pairs."""
    one, alike, larger, old = (
        *(run_of("gappo", name, batch=batch) for name, batch in (("one", 8), ("alike", 8), ("larger", 16))),
        run_of(None, "old"),  # its trainer did not write the number
    )
    above = ["optimizer step (8 pairs each)"]
    for draw in (figures.ranking, figures.loss, figures.gradient_norm, figures.logps):
        for panel in draw([one]).figure.axes:
            assert panel.get_xlabel() == "pairs trained"
            assert steps_above(panel) == above
            panel.figure.draw_without_rendering()
            assert panel.child_axes[0].get_xlim() == pytest.approx([end / 8 for end in panel.get_xlim()])
        for panel in draw([old]).figure.axes:
            assert panel.get_xlabel() == "optimizer step"
            assert steps_above(panel) == []
    for draw in (figures.ranking, figures.loss, figures.gradient_norm):
        assert steps_above(draw([one, alike]).figure.axes[0]) == above
        for runs, said in (((one, old), "optimizer step"), ((one, larger), "pairs trained")):
            panels = draw(list(runs)).figure.axes
            assert [panel.get_xlabel() for panel in panels] == [said] * len(panels)
            assert [steps_above(panel) for panel in panels] == [[]] * len(panels)
    # the log's own steps, and as many lines of the pair log up to each
    evaluated_at = [entry["step"] for entry in larger.log_history if "eval_pwa_all" in entry]
    trained = [int((larger.pairs["step"] <= step).sum()) for step in evaluated_at]
    for runs in ([larger], [one, larger]):
        panel = figures.ranking(runs).figure.axes[1]
        lines = [line for line in panel.lines if line.get_fillstyle() == "full" and len(line.get_xdata()) > 2]
        assert lines[-1].get_xdata().tolist() == trained


def test_the_page_says_pairs_per_step(run_of):
    runs = run_of("gappo", "one"), run_of("gappo", "larger", batch=16), run_of(None, "old")
    assert ["pairs per step", "8", "16", "–"] in page_settings(runs)
    assert not [row for row in page_settings(runs[2:]) if row[0] == "pairs per step"]


@pytest.mark.rehearsal
def test_drawing_warns_of_nothing_and_leaves_no_trace(run_of, recwarn, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    one_step = run_of("geometric-anchor", "_$one step", steps=1, batch=4, flips=0.5)
    recorded = diagnosed(tmp_path / "recorded", steps=(1,))
    for picture in draw_pictures([run_of("gap-aware", flips=0.2), one_step, recorded]):
        render(picture.figure, "png")
    assert not recwarn.list
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("image_format", ["png", "svg"])
def test_the_same_run_the_same_bytes(run_of, image_format):
    run = run_of("geometric-anchor", flips=0.2)
    first, second = (render(figures.logps([run]).figure, image_format) for _ in range(2))
    assert first == second


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


COLORS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY, style.GREY)


def test_colors_can_be_seen_on_light_and_dark_pages():
    """3 : 1 for what is drawn, 7 : 1 for text (WCAG 1.4.11 and 1.4.6)."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # as WebAIM's checker says
    for color in COLORS:
        assert contrast(color, style.PAPER) >= 3
        assert contrast(style.DARK[color], style.DARK[style.PAPER]) >= 3
    assert contrast(style.INK, style.PAPER) >= 7
    assert contrast(style.DARK[style.INK], style.DARK[style.PAPER]) >= 7
    assert contrast(style.BLUE, style.PAPER) >= 4.5  # the page's links
    assert contrast(style.DARK[style.BLUE], style.DARK[style.PAPER]) >= 4.5
    assert len(set(style.DARK.values())) == len(style.DARK)  # else the way back is another color


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(
    "seen",
    [
        np.eye(3),
        np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    ],
    ids=["all", "protanopia", "deuteranopia"],
)
def test_color_blind_readers_tell_methods_apart(seen, dark):
    """Under Machado, Oliveira and Fernandes' matrices (2009), by distance in CIELAB (a just noticeable one is 2.3)."""
    methods = [style.DARK[c] if dark else c for c in style.METHOD_COLORS.values()]
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in methods])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = (
        np.clip(linear @ seen.T, 0, 1)
        @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
        / [0.9505, 1, 1.089]
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2)[np.triu_indices(len(lab), 1)]
    assert distances.min() > 10


@pytest.mark.rehearsal
def test_dark_pictures_have_dark_colors(run_of):
    """No light page's color is left, and the figure is as before."""
    picture = figures.ranking([run_of("gappo")])
    before, pixels = (render(picture.figure, kind) for kind in ("svg", "png"))
    dark = render(picture.figure, "svg", dark=True).decode()
    drawn = {color for color in (*COLORS, style.INK) if color in before.decode()}
    assert {style.BLUE, style.INK} <= drawn
    for color in drawn:
        assert color not in dark
        assert style.DARK[color] in dark
    assert style.PAPER not in dark
    assert render(picture.figure, "png") == pixels


def test_pictures_of_cards_have_a_paper_of_their_own(run_of):
    """A card is shown on light and dark pages, with the same file: it must not be transparent."""
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(render(figures.loss([run_of("gappo")]).figure, "png")))
    assert pixels.shape[2] == 3 or (pixels[..., 3] == 1).all()
    assert (pixels[0, 0, :3] == 1).all()


def test_a_method_has_its_color(run_of):
    runs = [run_of("amapo", "a"), run_of("gappo", "b"), run_of("gappo", "c"), run_of(None, "d")]
    colors = [look["color"] for look in style.run_styles(runs).values()]
    assert colors[:2] == [style.ORANGE, style.BLUE]
    assert len(set(colors)) == 4


def test_names_are_text():
    assert label("$x_1$") == r"\$x_1\$"
    assert label("_private") == "\u200b_private"
    assert max(map(len, label("no-" * 40).splitlines())) <= 34
    name = "gappo-num_train_epochs=3,learning_rate=1e-4,lr_scheduler_type=constant,warmup_steps=0-lr0.0001-seed42"
    lines = label(name).split("\n")
    assert "".join(lines) == name
    assert lines == [
        *("gappo-num_train_epochs=3,", "learning_rate=1e-4,", "lr_scheduler_type=constant,"),
        "warmup_steps=0-lr0.0001-seed42",
    ]
    assert label("six by seven", width=12) == label("six by seven ", width=12) == "six by seven"  # it just fits
    assert label("six by seven", width=11) == "six by\nseven"
    assert label("a name of several words, as of a folder") == "a name of several words, as of a\nfolder"


@pytest.mark.parametrize("names", [["a" * 30] * 4, ["short", "w" * 34, "b", "c" * 20, "d"], ["a"] * 12])
def test_a_legend_is_no_wider_than_its_figure(names):
    """By matplotlib's own measure."""
    from matplotlib.lines import Line2D

    from trl_margins.report.style import legend_below, panels

    for n in (1, 2):
        figure, _ = panels(n)
        legend_below(figure, [Line2D([], []) for _ in names], names, columns=6)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert legend.get_window_extent().width <= figure.bbox.width


@pytest.mark.parametrize(("letter", "columns"), [("W", 1), ("0", 2), ("i", 3)])
def test_a_legend_has_as_many_columns_as_fit(letter, columns):
    from trl_margins.report.style import legend_below, panels

    figure, _ = panels(2)
    legend_below(figure, [{"color": "k"}] * 3, [letter * 34] * 3)
    (legend,) = figure.legends
    assert legend._ncols == columns
    assert figure.get_figheight() == pytest.approx(3.0 + 0.3 + 0.18 * -(-3 // columns))


def legend_of(picture):
    return [text.get_text() for text in picture.figure.legends[0].get_texts()]


def test_rings_and_lines_are_in_the_legends(run_of):
    runs = [run_of("gap-aware", "a"), run_of("gap-aware", "b")]
    assert legend_of(figures.ranking(runs)) == ["a", "b", "best value"]
    assert legend_of(figures.evaluation_factors(runs)) == ["a", "b", "mean"]
    assert legend_of(figures.gradient_norm(runs)) == ["a", "b", "as logged", "2 × median"]
    low = evaluated({"step": 1, "eval_pwa_all": 0.4}, {"step": 2, "eval_pwa_all": 0.6})
    assert legend_of(figures.ranking([low])) == ["run", "best value", "guessing"]
    looks = figures.run_styles(runs)
    assert looks["a"]["linestyle"] != looks["b"]["linestyle"]


def test_a_line_outside_the_axes_is_not_in_the_legend(tmp_path):
    gap = np.array([-1.0, -0.5, 0.5, 1.0])
    near = of_pairs(tmp_path / "near", step=[1, 1, 2, 2], reward_gap=gap, margin=gap * [1.2, 0.7, 1.2, 0.7])
    far = of_pairs(tmp_path / "far", step=[1, 1, 2, 2], reward_gap=gap, margin=gap / 10 + 5)
    assert "margin = reward gap" in legend_of(figures.margins([near]))
    picture = figures.margins([replace(far, info={**far.info, "margin": "amapo"})])
    assert "margin = reward gap" not in legend_of(picture)
    assert "In far all points are on one side of that line, and it is outside the axes." in picture.caption


def test_medians_of_label_smoothing_are_in_the_picture(tmp_path):
    """Theorem 3.1 in NumPy: of three pairs, the one near m = 0 is beyond ±1."""
    gap, target = np.array([0.01, 1.0, 2.0]), 0.5
    margin = np.array([0.6, 1.8, 1.0])
    slope = 1 / (1 + np.exp(gap - margin))
    run = of_pairs(tmp_path / "run", step=[1, 1, 2], reward_gap=gap, margin=margin, slope=slope)
    info = {**run.info, "gamma": target, "margin": "gamma-po"}
    picture = figures.label_smoothing([replace(run, info=info)])
    (panel,) = picture.figure.axes
    between = np.log1p(np.exp(gap + target)) - np.log1p(np.exp(target - gap))
    expected = (margin - target) / (1 + np.exp(gap - target)) / between
    assert (np.abs(expected) > 1).tolist() == [True, False, False]
    low, high = panel.get_ylim()
    drawn = next(line for line in panel.lines if line.get_marker() == "s" and len(line.get_xdata()) == 3)
    assert np.isnan(drawn.get_ydata()[0])
    np.testing.assert_allclose(drawn.get_ydata()[1:], expected[1:], rtol=1e-6)
    assert low < drawn.get_ydata()[1:].min()
    assert drawn.get_ydata()[1:].max() < high
    (edge,) = (line for line in panel.lines if line.get_marker() == "^")
    assert edge.get_xdata().tolist() == [0.01]
    assert 0.9 * high < edge.get_ydata()[0] < high
    assert "median beyond the axis" in legend_of(picture)


# The page


class Page(HTMLParser):
    """Checks the nesting; keeps text and attributes."""

    VOID = ("meta", "img", "br", "source")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.folded = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "details" in self.open:
            self.folded += data
        else:
            self.text += data


def page_of(*runs: Any) -> Page:
    """The page without its images."""
    pictures = draw_pictures(runs)
    return Page(html_page(runs, pictures, {p.name: (b"", b"") for p in pictures if p.figure is not None}, "png"))


@pytest.mark.rehearsal
def test_a_page_holds_everything_and_fetches_nothing(run_of, tmp_path):
    runs = [run_of("geometric-anchor", "gapo", flips=0.2, anchor_radius=0.05), run_of("gappo", "gappo", seed=3)]
    files = write_report(runs, tmp_path / "a" / "new")
    page = Page(files[0].read_text(encoding="utf-8"))
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(files) - 1 == 10
    for image, file in zip(images, files[1:], strict=True):
        head, data = image.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == file.read_bytes()
        assert file.read_bytes().startswith(b"\x89PNG")
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    for text in ("anchor_radius", "0.05", "Learning Where It Matters", "|s_w − s_l|", "evaluation_factors"):
        assert (text in page.text) == (text != "evaluation_factors")
    for tag, attributes in page.tags:
        if tag == "img":
            assert len(str(attributes["alt"])) > 40
        if tag == "source":
            assert attributes["media"] == "(prefers-color-scheme: dark)"
            assert str(attributes["srcset"]).startswith("data:image/png;base64,")
    for picture in draw_pictures(runs):
        for reason in picture.left_out.values():
            assert reason in page.folded
        assert picture.caption in page.text


def test_numbers_of_the_page(run_of):
    run = run_of("geometric-anchor", flips=0.3, steps=60)
    curve = [(e["step"], e["eval_pwa"]) for e in run.log_history if "eval_pwa" in e]
    best = max(curve, key=lambda point: point[1])
    text = page_of(run).text
    for step, value in (best, curve[-1]):
        assert f"{100 * value:.1f} % (step {step})" in text
    flipped = run.pairs["is_flipped"] == 1
    assert f"{flipped.sum()} of 480 ({100 * flipped.mean():.1f} %)" in text
    weight = run.pairs["anchor_weight"]
    assert f"{weight[flipped].mean():.4g} [" in text
    lowest = np.argsort(weight, kind="stable")[:160]
    assert f"{100 * flipped[lowest].mean():.1f} % [" in text


def test_only_settings_that_the_method_reads(run_of):
    """The others are folded, secrets nowhere."""
    shared = {"beta": 10.0, "gamma_po_tau": 10.0, "adam_beta2": 0.999, "hub_token": "secret", "gamma_beta_ratio": 0.3}
    one = run_of("gamma-po", "one", **shared, weight_decay=0.0, output_dir="a", bf16=True, amapo_variant="code")
    two = run_of("gamma-po", "two", **(shared | {"hub_token": "other"}), weight_decay=0.1, bf16=False, output_dir="b")
    page = page_of(one, two)
    shown = {row[0] for row in page_settings([one, two])}
    assert {"gamma_po_tau", "gamma_beta_ratio", "beta", "weight_decay", "bf16"} <= shown  # bf16 because it differs
    assert not shown & {"adam_beta2", "amapo_variant", "output_dir", "hub_token"}
    for name in ("adam_beta2", "amapo_variant"):
        assert name in page.folded
        assert name not in page.text
    secret = {"model_init_kwargs": {"token": "secret"}}
    assert "secret" not in page.text + page.folded + page_of(run_of("gamma-po", "three", **secret), two).text
    assert "output_dir" not in page.text + page.folded


def test_private_settings_that_differ_are_not_shown(run_of):
    one, two = (
        run_of("gappo", name, accelerator_config={"x": i}, model_init_kwargs={"y": i}, tf32=bool(i))
        for i, name in enumerate(("one", "two"))
    )
    shown = {row[0] for row in page_settings([one, two])}
    assert "tf32" in shown
    assert not shown & {"accelerator_config", "model_init_kwargs"}


def test_pairs_per_step_that_a_run_has(run_of):
    run = run_of("gappo", "one")
    for given, found in ((1, 1), (0, None), (-2, None), (2.5, None), (None, None)):
        assert replace(run, info={**run.info, "pairs_per_step": given}).pairs_per_step == found
    four, none = (replace(run, name=str(n), info={**run.info, "pairs_per_step": n}) for n in (4, None))
    assert style.step_size(four) == {"4": 4}
    assert style.step_size(four, none) == {"4": 1, "None": 1}  # on one axis


@pytest.mark.parametrize(("values", "is_drawn"), [([1.0], False), ([1.0, 1.0, 1.0], False), ([1.0, 2.0], True)])
def test_half_a_violin_of_few_values(values, is_drawn):
    _, (panel,) = style.panels(1)
    _half_violin(panel, np.array(values), 0.0, above=True, color="blue")
    assert len(panel.collections) == 2 * is_drawn


def test_the_settings_of_runs_in_full(run_of):
    """Of two methods, and of a run that is of none."""
    one = run_of("gappo", "one", warmup_steps=0.1, max_steps=7, learning_rate=1e-6, score_gap_threshold=2.0)
    two = run_of("gamma-po", "two", warmup_steps=0, max_steps=-1, num_train_epochs=3, learning_rate=2e-6)
    three = run_of(None, "three", warmup_steps=12, loss_type=["hinge"], beta=0.1)
    hear("\n".join(" | ".join(row) for row in page_settings([one, two, three])))


@pytest.mark.parametrize(
    ("method", "reads"), [("gappo", True), ("gamma-po", True), ("gap-aware", True), ("amapo", False)]
)
def test_the_target_margin_is_a_setting_where_it_is_read(run_of, method, reads):
    """AMaPO's margin is its own."""
    rows = page_settings([run_of(method, gamma_beta_ratio=0.5, simpo_gamma=0.5)])
    assert (["gamma_beta_ratio", "0.5"] in rows) == reads
    assert "simpo_gamma" not in {row[0] for row in rows}


def test_results_come_first_then_pictures_then_settings(run_of):
    page = page_of(run_of("gappo", learning_rate=1e-5))
    heads = [page.text.index(head) for head in ("Results", "Pairwise accuracy and Spearman", "Settings", "Files")]
    assert heads == sorted(heads)
    assert page.text.index("It ranks ") < heads[1]
    assert page.text.index("learning_rate") > heads[2]


def test_results_of_the_kept_step(tmp_path):
    """First evaluation, best, and the step whose model was loaded at the end, from the log by hand."""
    folder = make_run(
        tmp_path / "run", "gappo", steps=30, load_best_model_at_end=True, metric_for_best_model="eval_pwa"
    )
    log = [
        {"step": s, "eval_pwa": a, "eval_pwa_all": b} for s, a, b in ((0, 0.5, 0.4), (10, 0.9, 0.55), (20, 0.7, 0.61))
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "best_global_step": 10}))
    run = read_run(folder)
    clear, whole = results.reached(run)
    assert (clear.first, clear.best, clear.kept) == ((0, 0.5), (10, 0.9), (10, 0.9))
    assert (whole.first, whole.best, whole.kept) == ((0, 0.4), (20, 0.61), (10, 0.55))
    said = list(results.lines([run]))
    assert said[0] == "run: GapPO on a-small-model, 240 pairs in 30 steps. Kept: step 10, the best by eval_pwa."
    assert said[2].split("  ")[-1].strip() == "40.0 % (before training) → 55.0 % (step 10)"
    assert max(map(len, said[1:])) <= 80
    assert "It ranks 55.0 % of the evaluation pairs right (40.0 % before training)." in page_of(run).text
    (folder / "margin_run.json").write_text(
        json.dumps({**run.info, "config": {**run.config, "load_best_model_at_end": False}})
    )
    assert results.reached(read_run(folder))[1].kept == (20, 0.61)


def test_results_without_evaluation(tmp_path):
    folder = make_run(tmp_path / "run", "amapo")
    log = [{"step": s, "rewards/accuracies": a, "rewards/margins": m} for s, a, m in ((1, 0.25, -1.5), (2, 0.75, 2.0))]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    said = list(results.lines([read_run(folder)]))
    assert said[1:] == [
        "  No evaluations: it was trained without evaluation (--eval_strategy).",
        "  Training pairs ranked right: 25 % → 75 % (first and last log).",
        "  Mean reward gap: −1.5 → +2 (first and last log).",
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log[1:]}))
    alone = list(results.lines([read_run(folder)]))[2:]
    assert alone == ["  Training pairs ranked right: 75 % (the only log).", "  Mean reward gap: +2 (the only log)."]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert all(line.strip() in page_of(read_run(folder)).text for line in said[1:])


def test_what_files_say_is_text(tmp_path):
    evil = '<script>alert("1")</script>&amp;'
    folder = make_run(tmp_path / "a<b>$x$", "gappo", steps=4, beta=evil, sets=(evil,))
    info = json.loads((folder / "margin_run.json").read_text())
    (folder / "margin_run.json").write_text(json.dumps(info | {"model": evil, "name": evil, "method": evil}))
    columns = pair_columns("gappo", 4, 2, 0, 0.0)
    write_pairs(folder / "pair_log.csv", columns | {evil: np.zeros(8)})
    page = page_of(*read_runs([folder]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 4
    assert "a<b>$x$" in page.text


# Word for word


def test_all_words_of_a_page(run_of):
    """Without its pictures: results, tables of flips and of margins, settings, and what is left out."""
    one = run_of("gamma-po", "one", flips=0.2, label_smoothing=0.1, batch=8, sets=("a", "b"))
    two = replace(run_of("geometric-anchor", "two", flips=0.3, anchor_radius=0.05), one_in=3, best_step=20)
    three = run_of(None, "three", warmup_steps=0.1)
    for runs in ([one, two, three], [three], [replace(two, anchors={"step": np.ones(2)})]):
        pictures = [Picture("p", "A picture", None, "", {run.name: "it has none" for run in runs})]
        page = Page(html_page(runs, pictures, {}, "png"))
        hear("\n".join(line.strip() for line in page.text.partition("\nResults")[2].splitlines() if line.strip()))
        hear("\n".join(line.strip() for line in page.folded.splitlines() if line.strip()))


def test_the_images_of_a_page(run_of):
    figure = Figure()
    picture = Picture("p", "A picture", figure, "What is seen.")
    for form, media in (("png", "image/png"), ("svg", "image/svg+xml")):
        page = Page(html_page([run_of("gappo", form)], [picture], {"p": (b"light", b"dark")}, form))
        light, dark = (f"data:{media};base64,{base64.b64encode(each).decode()}" for each in (b"light", b"dark"))
        (image,) = (attributes for tag, attributes in page.tags if tag == "img")
        (other,) = (attributes for tag, attributes in page.tags if tag == "source")
        assert (image["src"], other["srcset"]) == (light, dark)


def test_shares_at_their_edges(tmp_path):
    """By hand: a gap of 0 has no side, a weight of exactly a half is flipped or not, and the near ones are within."""
    gap, target = np.array([-2.0, -1.0, 0.0, 1.0, 3.0, 4.0]), np.full(6, 0.5)
    run = of_pairs(tmp_path / "run", step=np.arange(6), reward_gap=gap, margin=target)
    with pytest.MonkeyPatch.context() as patch:
        rate = np.array([-0.1, 0.0, 0.25, 0.5, 0.6, 1.0])
        patch.setattr(page_module, "smoothing_of", lambda of: ((0.5, rate)))
        columns = {"reward_gap": gap, "margin": np.array([0.5, 0.61, 0.5, 0.6, 0.79, 0.8])}
        cells = page_module._smoothing(Usable(run, columns, 6))
        assert cells == [
            "run",
            "0.5",
            "2 (33.3 %)",
            "-0.05 [-0.075, -0.025]",
            "3 (50.0 %)",
            "0.6 [0.55, 0.8]",
            "50.0 %",
            "66.7 %",
        ]
        columns["reward_gap"] = np.array([0.0, 1, 1, 1, 1, 1])
        assert page_module._smoothing(Usable(run, columns, 6))[2:4] == ["0 (0.0 %)", "–"]
        weight = np.array([1.0, 2, 3, 4, 5, 6])
        patch.setattr(page_module, "pair_weight", lambda of: ("the weight", weight))
        hear(" | ".join(page_module._flips(Usable(run, {"is_flipped": np.array([1, 0.5, 0, 0.51, 0, 1])}, 6))))


def test_what_a_picture_says_of_its_pairs(tmp_path):
    """Where they are from, how many, and which could not be used."""
    nan = np.nan
    one = of_pairs(tmp_path / "one", step=[1, 1, 2, 2], a=[1, nan, 3, 4], b=[1, 2, nan, 4], score_gap=[nan] * 4)
    two = replace(of_pairs(tmp_path / "two", step=[1], a=[2], b=[2], is_flipped=[1]), one_in=4)
    empty = Run("empty", Path("empty"), {}, [], {})
    for runs in ([one], [one, two], [one, two, empty], []):
        for columns in (("a", "b"), ("a",), ("score_gap",), ("is_flipped",), ("mapped_factor",), ("nothing",)):
            found, left_out = usable(runs, columns)
            hear(f"{[run.size for run in found]} {left_out} {source(found, 'the numbers') if found else ''}")
        found, left_out = usable(
            runs, lambda run: ("a",) if run is one else ("b",), lambda of: "too few" if of.size < 2 else None
        )
        hear(f"{[run.run.name for run in found]} {left_out}")
    anchors = replace(two, anchors={"step": np.ones(3), "a": np.array([1, 2, nan])})
    found, left_out = usable([anchors, one], ("a",), file="anchor_diagnostics.csv")
    hear(f"{source(found, 'angles')} {left_out}")
    np.testing.assert_array_equal(usable([one], ("a", "b"))[0][0]["b"], [1, 4])
    assert [span(each) for each in ([3], [3, 3], [3000, 1, 20], [2, 1])] == ["3", "3", "1 to 3,000", "1 to 2"]
    assert thinned_logs([one, replace(two, one_in=1)]) == ""
    assert thinned_logs([two, anchors]).endswith("one in 4 of two, one in 4 of two.")


def test_results_word_for_word():
    """Every kind of run: how long it was, which step was kept, and when it was evaluated first."""
    evals = [{"step": s, "eval_pwa_all": 0.5 + s / 100, "eval_spearman": s / 100 - 0.05} for s in (0, 1, 9)]
    sets = [{"step": 3, "eval_b_pwa": 0.5, "eval_a_pwa_all": 0.25, "eval_a_pwa": 1}]
    for log in (evals, evals[1:], evals[2:], sets, [{"step": 1, "rewards/margins": -0.5}], [{"loss": 1}], []):
        for best in (None, 1, 4):
            for info in (
                {},
                {"method": "m", "pairs_per_step": 1200, "config": {"eval_min_score_gap": 1.5}},
                {"name": "N", "model": "x", "pairs_per_step": 0, "config": {"metric_for_best_model": "eval_pwa"}},
            ):
                run = Run("run", Path("run"), info, log, {}, best_step=best)
                hear("\n".join([*results.lines([run]), results.ranked(run)]))
    one, two = (Run(name, Path(name), {}, log, {}) for name, log in (("one", evals), ("two", sets)))
    for runs in ([one], [two], [one, two], []):
        hear(str(results.table(runs)))
    for steps, last in (([3, 5], 5), ([3, np.nan], 3), ([np.nan], None), ([3, 20], 20)):
        pairs = {"step": np.array(steps)}
        assert results.last_step(Run("run", Path("run"), {}, [], pairs)) == last
        assert results.last_step(Run("run", Path("run"), {}, [{"step": 7}, {"x": 1}], pairs)) == max(7, last or 0)


def test_curves_and_numbers_at_their_edges():
    log = [
        {"step": 2, "x": 1.0},
        {"step": 1, "x": 3},
        {"step": 2, "x": 2.0, "margins/a": 4},
        {"step": 3, "x": np.inf},
        {"step": 4, "x": "text"},
        {"step": 4, "target_margins/a": 5, "margins/a": 6},
        {"x": 9.0},
    ]
    curve = summaries.logged_curve(evaluated(*log), "x")
    assert (curve.steps.tolist(), curve.values.tolist(), curve.best) == ([1, 2], [3, 2], 0)
    assert summaries.logged_curve(evaluated(*log), "target_margins/a").values.tolist() == [4, 5]
    for ends in (True, False):
        log = [{"step": 1, "x": 1}, {"train_runtime": 1, "step": 1}, {"step": 1, "x": 2}]
        assert summaries.logged_curve(evaluated(*log, load_best_model_at_end=ends), "x").values.tolist() == [
            1 + (not ends)
        ]
        assert summaries.logged_curve(evaluated(log[2], load_best_model_at_end=ends), "x").values.tolist() == [2]
    values, edges = np.array([-5.0, 0, 0.5, 1, 2, 9]), np.array([0.0, 1, 2])
    np.testing.assert_allclose(summaries.shares(values, edges), [0.5, 0.5])
    np.testing.assert_allclose(summaries.shares(values, edges, np.arange(6.0)), [3 / 15, 12 / 15])
    assert summaries.thinned(3, 3).tolist() == [0, 1, 2]
    assert summaries.thinned(4, 3).tolist() == [0, 2, 3]
    assert [[s.start, s.stop] for s in summaries.phases(7, 3, 2)] == [[0, 2], [2, 5], [5, 7]]
    assert [[s.start, s.stop] for s in summaries.phases(1, 3, 2)] == [[0, 1]]
    assert summaries.tiers(np.array([2.0, 1, 1, 5, 0, 9, 9])).tolist() == [1, 0, 0, 1, 0, 2, 2]
    assert summaries.tiers(np.empty(0)).tolist() == []
    assert np.isnan([*summaries.rate(np.empty(0)), *summaries.mean(np.empty(0))]).all()
    assert summaries.mean(np.array([3.0])) == (3, 3, 3)
    half = 1.96 * np.std([1, 2, 4], ddof=1) / 3**0.5
    np.testing.assert_allclose(summaries.mean(np.array([1.0, 2, 4])), [7 / 3, 7 / 3 - half, 7 / 3 + half])
    np.testing.assert_allclose(summaries.smoothed(np.array([1.0, 2, 6])), [4 / 3, 3, 14 / 3])
    found = summaries.agreement(np.array([1.0, 2, 0, 4]), np.array([1.0, -1, 0, 0.5]), (0.01, 0.5, 1.0))
    assert (found.positive, found.median, found.overlap) == (0.5, 0.25, {0.01: 1.0, 0.5: 0.5, 1.0: 1.0})
    assert found.spread_norm == pytest.approx(np.log([1, 2, 4]).std(ddof=1))
    assert found.spread_alignment == pytest.approx(np.log([1, 0.5]).std(ddof=1))
    assert np.isnan(summaries.agreement(np.ones(2), np.array([1.0, 0]), ()).spearman)
    assert np.isnan(summaries.agreement(np.array([1.0, 0]), np.ones(2), ()).spread_norm)


def test_both_files_of_a_picture(tmp_path):
    figure = Figure()
    figure.add_subplot().plot([1, 2], color=style.BLUE)
    style.write_both(figure, tmp_path / "a")
    light, dark = ((tmp_path / f"a-{scheme}.svg").read_text() for scheme in ("light", "dark"))
    assert (style.BLUE in light, style.DARK[style.BLUE] in light) == (True, False)
    assert (style.BLUE in dark, style.DARK[style.BLUE] in dark) == (False, True)
    assert f"fill: {style.DARK[style.PAPER]}" in dark
    assert "<dc:date>" not in light + dark
    assert light.encode() == render(figure, "svg")  # its colors are what they were
    assert [style.percent(each) for each in (0.12345, 1)] == ["12.3 %", "100 %"]
    assert [style.signed(each) for each in (-0.5, 0.5)] == ["−0.50", "+0.50"]


def test_where_a_report_is_written(tmp_path, capsys, monkeypatch):
    """A link in its place is no longer one; a word about other formats, libraries and names."""
    monkeypatch.setattr("trl_margins.report.figures.PICTURES", ())
    folder = make_run(tmp_path / "run")
    (tmp_path / "mine").write_text("mine")
    (folder / "report").mkdir()
    (folder / "report" / "report.html").symlink_to(tmp_path / "mine")
    assert main(["report", str(folder)]) == 0
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (folder / "report" / "report.html").is_symlink()
    hear(capsys.readouterr().out)
    for argv in ([str(folder), "--format", "pdf"], ["a\0b"], [str(folder), "--out", "a\0b"]):
        with pytest.raises(SystemExit):
            main(["report", *argv])
        hear(capsys.readouterr().err.splitlines()[-1])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["report", str(folder)])


# The command


def test_report_of_one_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_margins.report.figures.PICTURES", (figures.gradient_mass, figures.margins, figures.flips))
    folder = make_run(tmp_path / "run", "geometric-anchor", flips=0.2)
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("run: GAPO on a-small-model, 320 pairs in 40 steps. Kept: the last step's model.\n  acc")
    assert printed.endswith(
        f"\nReport: {folder / 'report' / 'report.html'}\n"
        "PNG files of its pictures are beside it.\nIt says which pictures are left out, and why.\n"
    )
    assert {file.name for file in (folder / "report").iterdir()} == {
        *("report.html", "gradient_mass.png", "margins.png", "flips.png")
    }


@pytest.mark.rehearsal
def test_report_of_several_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_margins.report.figures.PICTURES", (figures.ranking, figures.flips))
    for name in ("a", "b"):
        make_run(tmp_path / name, "gappo")
    assert main(["report", "a", "b", "--format", "svg"]) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith(("a", "b"))] == ["a", "b"]
    assert "Report: report/report.html\nSVG files of its pictures are beside it.\n" in printed
    page = Page(Path("report/report.html").read_text(encoding="utf-8"))
    assert "Flipped labels and their weightsbpair_log.csv has no column is_flipped" in page.folded.replace("\n", "")
    assert Path("report/ranking.svg").read_text().startswith("<?xml")


def test_report_elsewhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_margins.report.figures.PICTURES", ())
    out = tmp_path / "deep" / "out"
    assert main(["report", str(make_run(tmp_path / "run")), "--out", str(out)]) == 0
    assert list(out.iterdir()) == [out / "report.html"]
    with pytest.raises(SystemExit):
        main(["report"])


@pytest.mark.rehearsal
def test_drawing_loads_no_torch():
    code = "import sys, trl_margins.report.page; print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]
