"""Rewards on scored pairs: accuracy, rank correlation, and their breakdown by score gap, length and subset."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .intervals import bootstrap_intervals
from .ranking import ranking_metrics
from .reward_bench import SUBSETS, section_scores

LENGTH_TOLERANCE = 0.2  # lengths that differ by less than this share of the longer one are similar
LENGTH_BINS = ("chosen shorter", "similar length", "chosen longer")
SECTION_SCORES = {  # of `section_scores`, by their names in a report
    "reward_bench": "score",
    "reward_bench_chat": "Chat",
    "reward_bench_chat_hard": "Chat Hard",
    "reward_bench_safety": "Safety",
    "reward_bench_reasoning": "Reasoning",
}


class Pairs(NamedTuple):
    """M pairs and their rewards."""

    chosen_rewards: np.ndarray  # [M]
    rejected_rewards: np.ndarray  # [M]
    chosen_lengths: np.ndarray  # [M] tokens
    rejected_lengths: np.ndarray  # [M]
    chosen_scores: np.ndarray | None = None  # [M] annotation scores, where the data has them
    rejected_scores: np.ndarray | None = None
    gap_only: bool = False  # only the difference of the scores has a meaning
    subsets: np.ndarray | None = None  # [M] names, where the data has them

    def take(self, rows: np.ndarray) -> Pairs:
        arrays = {name: value[rows] for name, value in self._asdict().items() if isinstance(value, np.ndarray)}
        return self._replace(**arrays)


def pair_report(
    pairs: Pairs, prompts: Sequence[Hashable], min_score_gap: float = 2.0, n_resamples: int = 1000
) -> dict[str, Any]:
    """All metrics of a set of pairs.

    Args:
        pairs: M pairs.
        prompts: [M] identifies each pair's prompt: the bootstrap draws whole prompts.
        min_score_gap: τ of `pwa`.
        n_resamples: of the bootstrap.

    Returns:
        `ranking_metrics`; where there are any, `n_equal_rewards` (pairs that count as ranked wrong, as in RewardBench
        and in TRL's accuracies) and `n_equal_scores` (of whose order the scores say nothing); `reward_gap`,
        `chosen_longer` (share of pairs whose chosen completion is longer), `prefers_longer` (share of pairs of
        different lengths in which the model prefers the longer completion), `intervals` (95 %, by name), and
        `by_score_gap`, `by_length`, `by_subset`: one row per bin with `bin`, `n`, `accuracy`, `interval`. Of
        RewardBench's subsets also `section_scores`, by the names in `SECTION_SCORES`.
    """
    bins = {
        "by_score_gap": _score_gap_bins(pairs),
        "by_length": _length_bins(pairs),
        "by_subset": _subset_bins(pairs),
    }
    pairs = pairs._replace(subsets=None)  # names are slow to draw

    def numbers(rows: np.ndarray) -> dict[str, float | int | None]:
        some = pairs.take(rows)
        found = _numbers(some, min_score_gap)
        right = some.chosen_rewards > some.rejected_rewards
        for title, (labels, member) in bins.items():
            in_bin = member[rows]
            for i in range(len(labels)):
                found[f"{title} {i}"] = float(right[in_bin == i].mean()) if (in_bin == i).any() else None
        return found | _sections(bins["by_subset"][0], found)

    found = numbers(np.arange(len(pairs.chosen_rewards)))
    of_bins = {f"{title} {i}" for title, (labels, _) in bins.items() for i in range(len(labels))}
    counts = {name for name in found if name.startswith("n_")}
    intervals = bootstrap_intervals(
        lambda rows: {name: value for name, value in numbers(rows).items() if name not in counts},
        prompts,
        n_resamples=n_resamples,
    )
    tables = {
        title: [
            {
                "bin": label,
                "n": int((member == i).sum()),
                "accuracy": found[f"{title} {i}"],
                "interval": intervals.get(f"{title} {i}"),
            }
            for i, label in enumerate(labels)
        ]
        for title, (labels, member) in bins.items()
    }
    return {
        **{name: found[name] for name in found if name in counts},
        **_equal(pairs),
        **{name: found[name] for name in found if name not in counts | of_bins},
        "intervals": {name: interval for name, interval in intervals.items() if name not in of_bins},
        **tables,
    }


def _equal(pairs: Pairs) -> dict[str, int]:
    """How many pairs have two equal rewards, and two equal scores."""
    sides = {"n_equal_rewards": (pairs.chosen_rewards, pairs.rejected_rewards)}
    if pairs.chosen_scores is not None and pairs.rejected_scores is not None:
        sides["n_equal_scores"] = (pairs.chosen_scores, pairs.rejected_scores)
    counted = {name: int((chosen == rejected).sum()) for name, (chosen, rejected) in sides.items()}
    return {name: n for name, n in counted.items() if n}


def _sections(subsets: Sequence[str], found: Mapping[str, float | None]) -> dict[str, float | None]:
    """RewardBench's scores, of its subsets."""
    if not subsets or not SUBSETS.issuperset(subsets):
        return {}
    accuracies = {name: found[f"by_subset {i}"] for i, name in enumerate(subsets)}
    scores = section_scores({name: value for name, value in accuracies.items() if value is not None})
    return {name: scores[section] for name, section in SECTION_SCORES.items()}


def _numbers(pairs: Pairs, min_score_gap: float) -> dict[str, float | int | None]:
    chosen, rejected, scores = (
        pairs.chosen_rewards,
        pairs.rejected_rewards,
        (pairs.chosen_scores, pairs.rejected_scores),
    )
    metrics = ranking_metrics(chosen, rejected, *scores, min_score_gap=min_score_gap, gap_only=pairs.gap_only)
    gap, longer = chosen - rejected, pairs.chosen_lengths - pairs.rejected_lengths
    metrics["reward_gap"] = float(gap.mean()) if gap.size else None
    metrics["chosen_longer"] = float((longer > 0).mean()) if gap.size else None
    metrics["prefers_longer"] = float((gap * longer > 0)[longer != 0].mean()) if longer.any() else None
    return metrics


def _score_gap_bins(pairs: Pairs) -> tuple[list[str], np.ndarray]:
    """Labels of the quartiles of |score gap|, and the quartile of each pair (−1 where the gap is unknown)."""
    gaps = np.array([]) if pairs.chosen_scores is None else np.abs(pairs.chosen_scores - pairs.rejected_scores)
    if not np.isfinite(gaps).any():
        return [], np.full(len(pairs.chosen_rewards), -1)
    edges = np.unique(np.quantile(gaps[np.isfinite(gaps)], np.linspace(0, 1, 5)))
    inner = edges[1:-1]
    labels = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)] or [f"{edges[0]:.3g}"]
    return labels, np.where(np.isfinite(gaps), np.searchsorted(inner, gaps, side="right"), -1)


def _subset_bins(pairs: Pairs) -> tuple[list[str], np.ndarray]:
    if pairs.subsets is None:
        return [], np.full(len(pairs.chosen_rewards), -1)
    names, member = np.unique(pairs.subsets, return_inverse=True)
    return names.tolist(), member


def _length_bins(pairs: Pairs) -> tuple[list[str], np.ndarray]:
    longest = np.maximum(pairs.chosen_lengths, pairs.rejected_lengths).clip(1)
    difference = (pairs.chosen_lengths - pairs.rejected_lengths) / longest
    return list(LENGTH_BINS), np.digitize(difference, (-LENGTH_TOLERANCE, LENGTH_TOLERANCE))
