"""AMaPO: a margin from the batch's statistics: large where the model ranks wrongly, none where it ranks well."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..checks import Number, unknown
from ..pairs import PairView, upcast
from . import Term
from .history import GapHistory, spread

Variant = Literal["code", "paper"]
# e^80 is far past any reward, and still a float32 after a multiplication with β
_LARGEST_EXPONENT = 80.0


def adaptive_margin(
    length_normalized_gap: Tensor,
    beta: float,
    variant: Variant = "code",
    z_normalize: bool = True,
    exponential: bool = True,
    zero_well_ranked: bool = True,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    r"""Margin per pair from how far its gap lies below the mean.

    =======  ======================================  =========================================  ================
    variant  exponent a_i                            margin                                     0 where
    =======  ======================================  =========================================  ================
    code     (μ − Δ_i)/σ · μ, of Δ without β         β·e^a                                      Δ_i ≥ μ
    paper    (μ − m_i)/σ · μ, of m = βΔ (eq. 9)      β·e^a (eq. 10)                             a_i ≤ 0
    =======  ======================================  =========================================  ================

    The two differ by β in the exponent, and where μ < 0: there the paper's equation gives its margins to the pairs
    above the mean. "code" is the default, since it is what the authors have published to train with. It has no switch
    for the ablations of Table 5: those are the equations', with Δ in place of m.

    Args:
        length_normalized_gap: [B] Δ, without β, per token.
        beta: β.
        variant: a row of the table.
        z_normalize: without it a = μ, eq. 8 with the mean for the oracle margin (Table 5, "w/o Z-norm").
        exponential: without it the margin is β·a (code) or a (paper; its a has β inside) ("w/o exp"; "w/o adaptive"
            has neither).
        zero_well_ranked: without it every pair has its margin ("w/o zero").
        mean: [] μ of Δ to take instead of this batch's.
        std: [] σ of Δ (unbiased) to take instead of this batch's.

    Returns:
        [B] margins in reward units, without gradient. One pair alone, or σ = 0, gives 0. The exponent stops at 80.

    Raises:
        ValueError: an unknown variant.

    Source: AMaPO (arXiv 2511.09385), eqs. 8 to 11 and Table 5; the authors' code for "code".
    """
    _check(variant)
    scale = 1.0 if variant == "code" else beta
    gap = scale * upcast(length_normalized_gap.detach())
    mean = gap.mean() if mean is None else scale * mean
    std = spread(gap) if std is None else scale * std
    known = std > 0  # false for NaN, too
    exponent = (
        torch.where(known, (mean - gap) / torch.where(known, std, 1.0) * mean, 0.0)
        if z_normalize
        else mean.expand_as(gap)
    )
    if exponential:
        margin = beta * exponent.clamp(max=_LARGEST_EXPONENT).exp()
    else:
        margin = exponent * (beta if variant == "code" else 1.0)
    margin = torch.where(known, margin, 0.0)
    if zero_well_ranked:
        below = gap < mean if variant == "code" or not z_normalize else exponent > 0
        margin = torch.where(below, margin, 0.0)
    return margin


def _check(variant: str) -> None:
    if variant not in get_args(Variant):
        raise unknown("AMaPO variant", variant, get_args(Variant))


class AdaptiveMargin(Term):
    """`adaptive_margin` with statistics over the batch of all ranks, filled up with the most recent gaps of training.

    In evaluation the statistics are those of the evaluation batch. Δ is per token under every reward: where the reward
    is a sum over tokens (`log-ratio`, `sum`), each score is divided by its length. With summed nats, e^a is far too
    large for a margin.

    Args:
        beta: β.
        variant, z_normalize, exponential, zero_well_ranked: as in `adaptive_margin`.
        estimation_size: pairs behind μ and σ (the paper's batch of 32); a larger batch is taken whole. So a device
            batch of 1 works, and accumulation does not change what is estimated. 1 takes the batch alone, as the
            authors' code does.
    """

    name: ClassVar[str] = "amapo"
    holds_target: ClassVar[bool] = True

    def __init__(
        self,
        beta: float,
        variant: Variant = "code",
        z_normalize: bool = True,
        exponential: bool = True,
        zero_well_ranked: bool = True,
        estimation_size: int = 32,
    ) -> None:
        _check(variant)
        Number(above=0).check("beta of AMaPO", beta)
        Number(least=1, whole=True).check("estimation_size of AMaPO", estimation_size)
        self.beta, self.variant, self.estimation_size = beta, variant, estimation_size
        self.z_normalize, self.exponential, self.zero_well_ranked = z_normalize, exponential, zero_well_ranked
        self.history = GapHistory(estimation_size)

    def __call__(self, view: PairView) -> Tensor:
        gap = view.reward_gap / self.beta if view.per_token_gap is None else view.per_token_gap
        everyone = upcast(view.gather(gap))
        filling = None if view.evaluation else self.history.recent(self.estimation_size - everyone.numel())
        seen = everyone if filling is None else torch.cat([everyone, filling.to(everyone)])
        if view.training:
            self.history.push(everyone)
        return adaptive_margin(
            gap,
            self.beta,
            self.variant,
            self.z_normalize,
            self.exponential,
            self.zero_well_ranked,
            mean=seen.mean(),
            std=spread(seen),
        )

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state)
