"""GapPO: weight a pair by the gap between its two annotation scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..checks import Number, unknown
from ..pairs import SCORE_CHOSEN, SCORE_REJECTED, SCORES, PairView, has_gap, upcast
from . import Term

_LARGEST_EXPONENT = 30.0
Transform = Literal["linear", "quadratic", "exponential", "hard"]


def score_gap_weight(
    score_chosen: Tensor,
    score_rejected: Tensor,
    transform: Transform = "linear",
    threshold: float | None = None,
    normalize: bool = False,
) -> Tensor:
    r"""Weight per pair from the score gap :math:`\delta_i = |s_{w,i} - s_{l,i}|`.

    ===========  ==========================  ================
    transform    w                           in the paper
    ===========  ==========================  ================
    linear       δ                           eq. 7, the method
    quadratic    δ²                          Fig. 2
    exponential  e^δ − 1                     Fig. 2
    hard         1[δ ≥ threshold]            section 3.3
    ===========  ==========================  ================

    Args:
        score_chosen: [B] annotation scores of the chosen completions, any scale.
        score_rejected: [B] those of the rejected completions.
        transform: a row of the table.
        threshold: pairs with δ below it have weight 0; `hard` needs one. Rounding does not count: see `has_gap`.
        normalize: divide by the mean weight of these B, so that a batch of clear pairs takes no larger step (Table
            2). A batch of ties keeps weight 0.

    Returns:
        [B] weights ≥ 0 in the dtype of the scores, at least float32, without gradient. Equal scores give 0. The
        exponential stops at e^30: a weight times its loss stays finite.

    Raises:
        ValueError: an unknown transform; `hard` without a threshold.

    Source: GapPO, eqs. 6 and 7.
    """
    _check(transform, threshold)
    chosen, rejected = upcast(score_chosen.detach()), upcast(score_rejected.detach())
    gap = (chosen - rejected).abs()
    if transform == "linear":
        weight = gap
    elif transform == "quadratic":
        weight = gap.square()
    elif transform == "exponential":
        weight = torch.expm1(gap.clamp(max=_LARGEST_EXPONENT))
    else:
        weight = torch.ones_like(gap)
    if threshold is not None:
        weight = torch.where(has_gap(chosen, rejected, threshold), weight, 0.0)
    return _over_mean(weight, weight.mean()) if normalize else weight


def _check(transform: str, threshold: float | None) -> None:
    if transform not in get_args(Transform):
        raise unknown("score-gap transform", transform, get_args(Transform))
    Number(least=0, optional=True).check("threshold of the score gap", threshold)
    if transform == "hard" and threshold is None:
        raise ValueError(
            "the score-gap transform 'hard' keeps pairs whose gap reaches a threshold: give one (score_gap_threshold)"
        )


def _over_mean(weight: Tensor, mean: Tensor) -> Tensor:
    return torch.where(mean > 0, weight / mean, 0.0)


@dataclass(frozen=True)
class ScoreGapWeight(Term):
    """`score_gap_weight` as a term of an objective.

    With `normalize` the mean is over the optimizer's batch: the accumulation window of all ranks. Trainers leave out
    the training pairs that the hard filter discards, so that its weights are 1 in training.
    """

    transform: Transform = "linear"
    threshold: float | None = None
    normalize: bool = False
    name: ClassVar[str] = "score-gap"
    columns = SCORES

    def __post_init__(self) -> None:
        _check(self.transform, self.threshold)

    def __call__(self, view: PairView) -> Tensor:
        weight = self._weight(view)
        return _over_mean(weight, self.batch_mean(view, weight)) if self.normalize else weight

    def averaged(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        return self._weight(columns) if self.normalize else None

    @property
    def keeps_only(self) -> str:  # type: ignore[override]
        least = f"of at least {self.threshold:g} (score_gap_threshold)" if self.threshold else "other than 0"
        return f"pairs with a score gap {least}"

    def keeps(self, columns: Mapping[str, Tensor]) -> Tensor:
        return self._weight(columns) > 0

    def _weight(self, columns: Mapping[str, Tensor] | PairView) -> Tensor:
        return score_gap_weight(columns[SCORE_CHOSEN], columns[SCORE_REJECTED], self.transform, self.threshold)
