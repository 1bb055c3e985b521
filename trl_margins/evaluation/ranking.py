"""Pairwise accuracy and rank correlation, as functions and as `evaluate` metrics that do not need the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import spearmanr

from ..pairs import has_gap

CITATION = "GapPO: Gradient-Adaptive Pairwise Preference Optimization, eqs. 9 and 10."


def pairwise_accuracy(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    score_gaps: ArrayLike | None = None,
    min_score_gap: float = 0.0,
) -> tuple[float | None, int]:
    r"""Share of pairs with :math:`r_w > r_l`; a tie of rewards counts as wrong.

    Args:
        chosen_rewards: [M] rewards of the preferred completions.
        rejected_rewards: [M] rewards of the others.
        score_gaps: [M] annotation score gaps; only pairs with |gap| ≥ `min_score_gap` count, reversed ones among
            them. Without it, all count.
        min_score_gap: τ; 2 in the paper's tables.

    Returns:
        The accuracy in [0, 1] (None if no pair counts) and the number of pairs.

    Source: GapPO, eq. 9.
    """
    right = np.asarray(chosen_rewards, float) > np.asarray(rejected_rewards, float)
    if score_gaps is not None:
        gaps = np.asarray(score_gaps, float)
        right = right[has_gap(gaps, np.zeros_like(gaps), min_score_gap)]
    return (float(right.mean()) if right.size else None), int(right.size)


def pooled_spearman(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
) -> float | None:
    """Spearman's ρ between rewards and scores of all completions, chosen and rejected in one pool.

    Ties get their mean rank, so for data without ties this is exactly eq. 10. Completions whose score is NaN are left
    out.

    Returns:
        ρ in [−1, 1]; None if there are fewer than two completions or either side is constant.

    Source: GapPO, eq. 10.
    """
    rewards = np.concatenate([np.asarray(chosen_rewards, float), np.asarray(rejected_rewards, float)])
    scores = np.concatenate([np.asarray(chosen_scores, float), np.asarray(rejected_scores, float)])
    scored = np.isfinite(scores)
    rewards, scores = rewards[scored], scores[scored]
    if rewards.size < 2 or np.ptp(rewards) == 0 or np.ptp(scores) == 0:
        return None
    return float(spearmanr(rewards, scores).statistic)


def ranking_metrics(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    chosen_scores: ArrayLike | None = None,
    rejected_scores: ArrayLike | None = None,
    *,
    min_score_gap: float = 2.0,
    gap_only: bool = False,
) -> dict[str, float | int | None]:
    """The metrics that the trainers and the CLI report for one set of pairs.

    Args:
        chosen_rewards, rejected_rewards: [M].
        chosen_scores, rejected_scores: [M] annotation scores, where the data has them.
        min_score_gap: τ of `pwa`.
        gap_only: only the difference of the scores has a meaning, so there is no Spearman.

    Returns:
        `pwa_all` and `n_pairs`; with scores also `pwa`, `n_pairs_gap` and `spearman`, of the pairs of which both
        completions have one. None where a metric is undefined.
    """
    pwa_all, n_pairs = pairwise_accuracy(chosen_rewards, rejected_rewards)
    metrics: dict[str, float | int | None] = {"pwa_all": pwa_all, "n_pairs": n_pairs}
    if chosen_scores is not None and rejected_scores is not None:
        rewards = np.array([chosen_rewards, rejected_rewards], float)
        scores = np.array([chosen_scores, rejected_scores], float)
        clear = has_gap(scores[0], scores[1], min_score_gap)
        metrics["pwa"], metrics["n_pairs_gap"] = pairwise_accuracy(*rewards[:, clear])
        if not gap_only:
            scored = np.isfinite(scores).all(0)
            metrics["spearman"] = pooled_spearman(*rewards[:, scored], *scores[:, scored])
    return metrics


class _PairMetric(evaluate.Metric):
    """A metric of two columns with one number per pair or completion."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=CITATION,
            inputs_description="One number per pair in each of: predictions, references.",
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("float64"))),
        )


class PairwiseAccuracy(_PairMetric):
    """`PairwiseAccuracy().compute(predictions=chosen_rewards, references=rejected_rewards)` → `{"pwa", "n_pairs"}`.

    With `score_gaps` and `min_score_gap` given to `compute`, only pairs of at least that gap count.
    """

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        score_gaps: Sequence[float] | None = None,
        min_score_gap: float = 0.0,
    ) -> dict[str, Any]:
        pwa, n_pairs = pairwise_accuracy(predictions, references, score_gaps, min_score_gap)
        return {"pwa": pwa, "n_pairs": n_pairs}


class PooledSpearman(_PairMetric):
    """`PooledSpearman().compute(predictions=rewards, references=scores)` → `{"spearman"}`, one per completion."""

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, Any]:
        return {"spearman": pooled_spearman(predictions, [], references, [])}
