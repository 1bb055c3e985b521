"""The numbers behind the pictures: curves, shares, phases, tiers. NumPy in, NumPy out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .run_folder import Run

RANKING = ("pwa", "pwa_all", "spearman")
TIERS = 3  # thirds, as the trainers' flips/rate_low, _mid and _high

_RANKING_KEY = re.compile(rf"eval_(?:(?P<set>.+)_)?(?P<metric>{'|'.join(sorted(RANKING, reverse=True))})")


@dataclass(frozen=True)
class Curve:
    """A logged number over training."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def best(self) -> int:
        """Index of the greatest value, the first of them."""
        return int(np.argmax(self.values))


def ranking_curves(run: Run) -> dict[tuple[str, str], Curve]:
    """(evaluation set, metric) → curve; the set is "" where there is only one."""
    entries = during_training(run)
    keys = dict.fromkeys(key for entry in entries for key in entry)
    found = {key: match for key in keys if (match := _RANKING_KEY.fullmatch(key))}
    curves = {(match["set"] or "", match["metric"]): _curve(entries, key) for key, match in found.items()}
    return {name: curve for name, curve in curves.items() if curve.steps.size}


def logged_curve(run: Run, key: str) -> Curve:
    """Any number of the log; empty where it was never logged."""
    return _curve(during_training(run), key)


def _curve(entries: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """The last value of every step; not a number is no point."""
    points = {
        entry["step"]: entry[key]
        for entry in entries
        if "step" in entry and isinstance(entry.get(key), int | float) and np.isfinite(entry[key])
    }
    steps = sorted(points)
    return Curve(np.array(steps, float), np.array([points[step] for step in steps], float))


def during_training(run: Run) -> Sequence[Mapping[str, Any]]:
    """The log without what was evaluated after the best checkpoint had been loaded: it goes by the last step's number,
    and is another step's model.
    """
    if not run.config.get("load_best_model_at_end"):
        return run.log_history
    ends = [i for i, entry in enumerate(run.log_history) if "train_runtime" in entry]
    return run.log_history[: ends[-1] + 1] if ends else run.log_history


def shares(values: np.ndarray, edges: np.ndarray, mass: np.ndarray | None = None) -> np.ndarray:
    """Share of the mass (of the number, without one) in each bin; what lies beyond the last edge is in the last bin.

    Args:
        values: [N] ≥ the first edge.
        edges: [bins + 1] rising.
        mass: [N] ≥ 0, not all 0.
    """
    inside = np.clip(values, edges[0], edges[-1])  # the last bin is closed
    counted, _ = np.histogram(inside, edges, weights=mass)
    return counted / counted.sum()


def thinned(n: int, most: int) -> np.ndarray:
    """At most so many of 0 … n−1, evenly spaced and always the same."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(int)


def phases(n: int, most: int, least: int) -> list[slice]:
    """Cuts n rows into equal parts: at most so many, of at least so many rows each (one part, if there are fewer)."""
    cuts = np.linspace(0, n, min(most, max(n // least, 1)) + 1).round().astype(int)
    return [slice(a, b) for a, b in pairwise(cuts)]


def tiers(weight: np.ndarray) -> np.ndarray:
    """[N] 0, 1 or 2: whether a weight is in the lowest third, the middle or the highest; equal ones as they come."""
    tier = np.empty(weight.size, dtype=int)
    for i, rows in enumerate(np.array_split(np.argsort(weight, kind="stable"), TIERS)):
        tier[rows] = i
    return tier


def rate(marked: np.ndarray) -> tuple[float, float, float]:
    """Share of ones, with the ends of Wilson's 95 % interval; NaN of none."""
    from scipy.stats import binomtest

    if not marked.size:
        return np.nan, np.nan, np.nan
    ones = int(marked.sum())
    interval = binomtest(ones, marked.size).proportion_ci(0.95, method="wilson")
    return ones / marked.size, interval.low, interval.high


def mean(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, with the ends of its normal 95 % interval; NaN of none, an empty interval of one."""
    if not values.size:
        return np.nan, np.nan, np.nan
    half = 1.96 * values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else 0.0
    return values.mean(), values.mean() - half, values.mean() + half


@dataclass(frozen=True)
class Flips:
    """How clean and flipped pairs were weighed. Arrays: [phases, 3] value, low, high."""

    steps: np.ndarray  # [phases] mean step
    clean: np.ndarray
    flipped: np.ndarray
    by_tier: Sequence[np.ndarray]  # bottom, middle, top
    overall: float  # flip rate of all pairs


def flips(step: np.ndarray, weight: np.ndarray, is_flipped: np.ndarray, most: int = 10, least: int = 40) -> Flips:
    """Phases of pairs in the order of training; tiers are those of each phase."""
    marked = is_flipped > 0.5

    def rows() -> Iterator[list[Any]]:
        for phase in phases(step.size, most, least):
            w, f = weight[phase], marked[phase]
            tier = tiers(w)
            yield [step[phase].mean(), mean(w[~f]), mean(w[f]), *(rate(f[tier == t]) for t in range(TIERS))]

    steps, clean, flipped, *by_tier = (np.array(column, float) for column in zip(*rows(), strict=True))
    return Flips(steps, clean, flipped, by_tier, float(marked.mean()))
