"""The numbers behind the pictures: curves, shares, phases, tiers. NumPy in, NumPy out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .run_folder import Run

RANKING = ("pwa", "pwa_all", "spearman")
TIERS = 3  # thirds, as in the trainers' flips/rate_low, _mid and _high

_RANKING_KEY = re.compile(rf"eval_(?:(?P<set>.+)_)?(?P<metric>{'|'.join(sorted(RANKING, reverse=True))})")


@dataclass(frozen=True)
class Curve:
    """A logged number over training."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def best(self) -> int:
        """Index of the first greatest value."""
        return int(np.argmax(self.values))


def ranking_curves(run: Run) -> dict[tuple[str, str], Curve]:
    """(evaluation set, metric) → curve. A single evaluation set has the name ""."""
    keys = dict.fromkeys(key for entry in run.log_history for key in entry)
    matches = {key: match for key in keys if (match := _RANKING_KEY.fullmatch(key))}
    curves = {(match["set"] or "", match["metric"]): logged_curve(run, key) for key, match in matches.items()}
    return {name: curve for name, curve in curves.items() if curve.steps.size}


def logged_curve(run: Run, key: str) -> Curve:
    """The last finite value of every step; empty if there is none."""
    older = key.replace("target_margins/", "margins/")  # the name in logs of older versions
    points = {
        entry["step"]: value
        for entry in _during_training(run)
        if "step" in entry
        and isinstance(value := entry.get(key, entry.get(older)), int | float)
        and np.isfinite(value)
    }
    steps = sorted(points)
    return Curve(np.array(steps, float), np.array([points[step] for step in steps], float))


def _during_training(run: Run) -> Sequence[Mapping[str, Any]]:
    """The log without evaluations of the best checkpoint after training: they have the last step's number, and are of
    another step's model.
    """
    if not run.config.get("load_best_model_at_end"):
        return run.log_history
    ends = [i for i, entry in enumerate(run.log_history) if "train_runtime" in entry]
    return run.log_history[: ends[-1] + 1] if ends else run.log_history


def shares(values: np.ndarray, edges: np.ndarray, mass: np.ndarray | None = None) -> np.ndarray:
    """Share of the mass [N] (by default of the number) of the values [N] in each bin between the edges [bins + 1].

    Values beyond the last edge are in the last bin.
    """
    counted, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges, weights=mass)
    return counted / counted.sum()


def thinned(n: int, most: int) -> np.ndarray:
    """At most `most` of 0 … n−1, evenly spaced and always the same."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(int)


def phases(n: int, most: int, least: int) -> list[slice]:
    """Cuts n rows into at most `most` equal parts of at least `least` rows each; one part if there are fewer."""
    cuts = np.linspace(0, n, min(most, max(n // least, 1)) + 1).round().astype(int)
    return [slice(a, b) for a, b in pairwise(cuts)]


def tiers(weight: np.ndarray) -> np.ndarray:
    """[N] 0, 1 or 2: the lowest third of the weights, the middle or the highest. Ties go by position."""
    rank = np.empty(weight.size, dtype=int)
    rank[np.argsort(weight, kind="stable")] = np.arange(weight.size) * TIERS // max(weight.size, 1)
    return rank


def rate(marked: np.ndarray) -> tuple[float, float, float]:
    """Share of ones, with the ends of Wilson's 95 % interval; NaN if there are none."""
    from scipy.stats import binomtest

    if not marked.size:
        return np.nan, np.nan, np.nan
    ones = int(marked.sum())
    interval = binomtest(ones, marked.size).proportion_ci(0.95, method="wilson")
    return ones / marked.size, interval.low, interval.high


def mean(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, with the ends of its normal 95 % interval; NaN for no values, an empty interval for one."""
    if not values.size:
        return np.nan, np.nan, np.nan
    half = 1.96 * values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else 0.0
    return values.mean(), values.mean() - half, values.mean() + half


@dataclass(frozen=True)
class Flips:
    """The weights of clean and flipped pairs. Arrays: [phases, 3] value, low, high."""

    steps: np.ndarray  # [phases] mean step
    clean: np.ndarray
    flipped: np.ndarray
    by_tier: Sequence[np.ndarray]  # lowest, middle, highest
    overall: float  # flip rate of all pairs


def flips(step: np.ndarray, weight: np.ndarray, is_flipped: np.ndarray, most: int = 10, least: int = 40) -> Flips:
    """Phases of pairs in the order of training, and the tiers within each phase."""
    parts = phases(step.size, most, least)
    return flips_of_parts((step[part].mean(), weight[part], is_flipped[part] > 0.5) for part in parts)


def flips_of_parts(parts: Iterable[tuple[float, np.ndarray, np.ndarray]]) -> Flips:
    """The same of parts: each a step, weights and which pairs are flipped."""
    rows, flipped_in = [], []
    for step, w, f in parts:
        by_tier = [rate(f[tiers(w) == t]) for t in range(TIERS)]
        rows.append((step, mean(w[~f]), mean(w[f]), *by_tier))
        flipped_in.append(f)
    steps, clean, flipped, *of_tiers = (np.array(column, float) for column in zip(*rows, strict=True))
    return Flips(steps, clean, flipped, of_tiers, float(np.concatenate(flipped_in).mean()))


@dataclass(frozen=True)
class Agreement:
    """How a direction that pairs share ranks them, against each pair's own: by ‖∇Δ‖ cos φ, and by ‖∇Δ‖."""

    positive: float  # share of pairs with cos φ > 0
    median: float  # of cos φ
    spearman: float  # of the two rankings
    overlap: Mapping[float, float]  # share of the pairs → how many of those at the top of both are the same
    spread_norm: float  # standard deviation of log ‖∇Δ‖, where it is positive; NaN for fewer than two pairs
    spread_alignment: float  # of log cos φ


def agreement(norm: np.ndarray, alignment: np.ndarray, shares: Sequence[float]) -> Agreement:
    """Of [N] gradient norms and alignments cos φ.

    Source: GAPO (arXiv 2602.04909), figure 4 and appendix F.
    """
    from scipy.stats import spearmanr

    shared = norm * alignment
    ranks = np.ptp(norm) > 0 and np.ptp(shared) > 0
    overlap = {}
    for share in shares:
        n = max(1, round(share * norm.size))
        top, other = (set(np.argsort(-values, kind="stable")[:n].tolist()) for values in (shared, norm))
        overlap[share] = len(top & other) / n
    return Agreement(
        positive=float((alignment > 0).mean()),
        median=float(np.median(alignment)),
        spearman=float(spearmanr(shared, norm).statistic) if ranks else np.nan,
        overlap=overlap,
        spread_norm=_log_spread(norm),
        spread_alignment=_log_spread(alignment),
    )


def _log_spread(values: np.ndarray) -> float:
    logs = np.log(values[values > 0])
    return float(logs.std(ddof=1)) if logs.size > 1 else np.nan


def smoothed(values: np.ndarray, width: int = 3) -> np.ndarray:
    """[N] means of so many neighbours; at the ends, the last value stands for those that are missing."""
    from scipy.ndimage import uniform_filter1d

    return uniform_filter1d(values, width, mode="nearest")
