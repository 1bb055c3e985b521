"""How a model ranks the k completions of one prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import ndcg_score

from .intervals import bootstrap_intervals

logger = logging.getLogger(__name__)

NDCG_AT = (1, 3)


def listwise_metrics(rewards: ArrayLike, scores: ArrayLike, zero: float = 0.0) -> dict[str, float | None]:
    """Of the k completions of one prompt.

    ============= ======================================================================================
    spearman      Spearman's ρ of rewards and scores, ties at their mean rank
    kendall       Kendall's τ-b
    ndcg@1, 3, k  Σ score / log2(1 + rank) over the first completions by reward, divided by the best
                  possible sum; tied rewards share their ranks
    regret        best score − score of the completion with the highest reward: what best-of-n loses
    regret_random best score − mean score: what a random pick loses
    best_worst    1 where the completion with the best score has a higher reward than the one with the
                  worst, else 0: the pair of AMaPO's Table 4. A tie of rewards counts as wrong. Where
                  several completions share the best or the worst score, the mean over all such pairs
    ============= ======================================================================================

    Args:
        rewards: [k] from the model.
        scores: [k] from the annotators.
        zero: the score with zero gain; none may be below it.

    Returns:
        By name; None where a metric is undefined: correlations of fewer than two completions or of a constant side,
        NDCG and `best_worst` where all scores are the same.

    Source: AMaPO (arXiv 2511.09385), Table 4 and appendix D.1, for `best_worst`.
    """
    rewards, scores = np.asarray(rewards, float), np.asarray(scores, float)
    ranked = len(scores) > 1 and np.ptp(scores) > 0
    correlated = ranked and np.ptp(rewards) > 0
    metrics: dict[str, float | None] = {
        "spearman": float(spearmanr(rewards, scores).statistic) if correlated else None,
        "kendall": float(kendalltau(rewards, scores).statistic) if correlated else None,
    }
    for k in (*NDCG_AT, None):
        value = float(ndcg_score(scores[None] - zero, rewards[None], k=k)) if ranked else None
        metrics[f"ndcg@{k or 'k'}"] = value
    picked = scores[rewards == rewards.max(initial=-np.inf)]
    metrics["regret"] = float(scores.max() - picked.mean()) if len(scores) else None
    metrics["regret_random"] = float(scores.max() - scores.mean()) if len(scores) else None
    best, worst = (rewards[scores == end] for end in (scores.max(initial=-np.inf), scores.min(initial=np.inf)))
    metrics["best_worst"] = float((best[:, None] > worst).mean()) if ranked else None
    return metrics


def best_and_worst(scores: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs behind `best_worst`: each completion with its list's best score against each with its worst.

    Args:
        scores: [N] of [k] from the annotators.

    Returns:
        [M] rows, [M, 2] which completion is the best and which the worst, and [M] weights that add up to 1 in each
        list whose scores differ. The others have no pairs.
    """
    found = []
    for i, each in enumerate(scores):
        highest, lowest = max(each, default=0), min(each, default=0)
        if highest > lowest:
            ends = [[j for j, score in enumerate(each) if score == end] for end in (highest, lowest)]
            found += [(i, best, worst, 1 / (len(ends[0]) * len(ends[1]))) for best, worst in product(*ends)]
    rows, best, worst, weights = np.array(found, float).reshape(-1, 4).T
    return rows.astype(int), np.stack([best, worst], axis=1).astype(int), weights


def listwise_report(
    rewards: Sequence[ArrayLike], scores: Sequence[ArrayLike], n_resamples: int = 1000
) -> dict[str, Any]:
    """Means over prompts.

    Args:
        rewards, scores: [N] of [k] each; k may differ.
        n_resamples: of the bootstrap over prompts.

    Returns:
        The means of `listwise_metrics` over the prompts where each is defined, `intervals` (95 %), `n_prompts`,
        `n_completions`, and `n_defined`, by name.
    """
    zero = min((np.min(each, initial=0.0) for each in scores), default=0.0)
    if zero < 0:
        logger.info("NDCG: scores go down to %g, which has zero gain", zero)
    rows = [listwise_metrics(*each, zero) for each in zip(rewards, scores, strict=True)]
    names = list(rows[0]) if rows else list(listwise_metrics([], []))
    values = np.array([[np.nan if row[name] is None else row[name] for name in names] for row in rows])
    values = values.reshape(len(rows), len(names))

    def means(some: np.ndarray) -> Mapping[str, float | None]:
        return {name: _mean(column) for name, column in zip(names, values[some].T, strict=True)}

    return {
        "n_prompts": len(rows),
        "n_completions": sum(len(np.asarray(each)) for each in scores),
        **means(np.arange(len(rows))),
        "n_defined": dict(zip(names, np.isfinite(values).sum(0).tolist(), strict=True)),
        "intervals": bootstrap_intervals(means, range(len(rows)), n_resamples=n_resamples) if rows else {},
    }


def _mean(values: np.ndarray) -> float | None:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else None
