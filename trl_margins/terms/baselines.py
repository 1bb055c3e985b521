"""Weights and margins of the methods that the papers compare with, each a few lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Number
from ..pairs import SCORE_CHOSEN, SCORE_REJECTED, SCORES, PairView, upcast
from . import Term

_LEAST = -1e4  # a margin at which −log σ is 0 in every dtype that a loss has


def dr_dpo_weight(reward_gap: Tensor, beta_prime: float, everyone: Tensor | None = None) -> Tensor:
    """Dr. DPO's weight σ(m_i)^(1/β′) over its mean.

    Dr. DPO's loss is −β′ log mean exp(−ℓ_i/β′) with DPO's ℓ_i = −log σ(m_i). Its gradient is the mean of w_i ∇ℓ_i with
    these weights: pairs with a small loss count more.

    Args:
        reward_gap: [B] m = r_w − r_l, β inside.
        beta_prime: β′ > 0; the larger, the more alike the weights.
        everyone: [N] the gaps over which the mean is taken; those of this batch, if not given.

    Returns:
        [B] weights ≥ 0 with mean 1 over `everyone`, without gradient.

    Source: Dr. DPO (arXiv 2407.07880), eq. 11.
    """
    own = _log_likelihood(reward_gap) / beta_prime
    whole = own if everyone is None else _log_likelihood(everyone) / beta_prime
    top = whole.max()  # taken off first: what float32 drops of a large logarithm would scale every weight
    return torch.exp(own - top) / torch.exp(whole - top).mean()


def _log_likelihood(reward_gap: Tensor) -> Tensor:
    return F.logsigmoid(upcast(reward_gap.detach()))


def score_offset_margin(score_chosen: Tensor, score_rejected: Tensor, alpha: float) -> Tensor:
    r"""ODPO's offset :math:`\alpha \log(s_w - s_l)`: the more the scores differ, the more the rewards must.

    A gap below 1 has a negative offset. A pair without a score gap, or one whose rejected completion has the higher
    score, has the offset −∞ and therefore no loss −log σ; here −10,000, so that nothing becomes NaN.

    Args:
        score_chosen: [B] annotation scores of the chosen completions.
        score_rejected: [B] those of the rejected completions.
        alpha: α ≥ 0; 0 is DPO.

    Returns:
        [B] margins in reward units, without gradient.

    Source: ODPO (arXiv 2402.10571), eq. 9; its repository has α = 1 by default.
    """
    gap = upcast(score_chosen.detach()) - upcast(score_rejected.detach())
    if not alpha:
        return torch.zeros_like(gap)
    return (alpha * torch.log(gap.clamp(min=0))).clamp(min=_LEAST)


def length_margin(length_chosen: Tensor, length_rejected: Tensor, alpha: float) -> Tensor:
    """R-DPO's margin −α(|y_w| − |y_l|): less is asked of a pair whose chosen completion is longer.

    Park et al. subtract α|y| from the reward that DPO fits. The implicit reward is then β log π/π_ref + α|y|, so the
    reward gap *gains* α(|y_w| − |y_l|) inside the sigmoid, and the margin, which is subtracted, has the other sign.
    γ-PO's Table 6 and public forks print it with the opposite sign, which a negative α gives.

    Args:
        length_chosen: [B] |y_w| in completion tokens.
        length_rejected: [B] |y_l|.
        alpha: α in reward units per token; 0 is DPO.

    Returns:
        [B] margins in reward units, without gradient.

    Source: Park et al., Disentangling Length from Quality in Direct Preference Optimization (arXiv 2403.19159), eq. 9.
    """
    return alpha * (length_rejected - length_chosen).detach().float()


def margin_adaptive_weight(
    score_chosen: Tensor,
    score_rejected: Tensor,
    c_max: float = 2.0,
    c_min: float = 0.5,
    steepness: float = 1.0,
    tau: float = math.log(999),
) -> Tensor:
    r"""MADPO's weight :math:`\sigma(c_i h_i)/\sigma(h_i)`, from a reward model's margin h = s_w − s_l:

    .. math:: c_i = c_{min} + (c_{max} - c_{min}) / (1 + (c_{max} - 1)/(1 - c_{min}) \cdot e^{\lambda(|h_i| - \tau)})

    c falls in |h| and is 1 at τ: a right pair weighs more than 1 where its margin is below τ, and less above. A wrong
    pair, h < 0, weighs less than 1 down to −τ; from there on it weighs 1.

    Args:
        score_chosen: [B] the reward model's scores of the chosen completions, as logits: σ(h) is its belief.
        score_rejected: [B] those of the rejected completions.
        c_max: c of a pair without a margin is nearly this; above 1.
        c_min: c of the largest margins, in (0, 1).
        steepness: λ.
        tau: τ, where the weight is 1; by default where σ(h) is 0.999.

    Returns:
        [B] weights > 0, without gradient.

    Source: MADPO (arXiv 2510.05342); its repository, utils/loss_functions.py, with the values of notebooks/MADPO.ipynb
    (the function's own are τ = 2).
    """
    margin = upcast(score_chosen.detach()) - upcast(score_rejected.detach())
    odds = math.log((c_max - 1) / (1 - c_min))
    c = c_min + (c_max - c_min) * torch.sigmoid(steepness * (tau - margin.abs()) - odds)
    weight = torch.exp(F.logsigmoid(c * margin) - F.logsigmoid(margin))
    return torch.where(margin > -tau, weight, 1.0)


@dataclass(frozen=True)
class DrDPOWeight(Term):
    """`dr_dpo_weight` over the batch of all ranks.

    The gradient is exactly Dr. DPO's where the link is −log σ of the reward gap, without a margin. The value of the
    loss is not: it is the weighted mean.
    """

    beta_prime: float = 1.0
    name: ClassVar[str] = "dr-dpo"
    compares_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Number(above=0).check("dr_dpo_beta_prime", self.beta_prime)

    def __call__(self, view: PairView) -> Tensor:
        return dr_dpo_weight(view.reward_gap, self.beta_prime, view.gather(view.reward_gap))


@dataclass(frozen=True)
class MarginAdaptiveWeight(Term):
    """`margin_adaptive_weight` from the score columns, which hold a reward model's scores."""

    c_max: float = 2.0
    c_min: float = 0.5
    steepness: float = 1.0
    tau: float = math.log(999)
    name: ClassVar[str] = "madpo"
    columns = SCORES

    def __post_init__(self) -> None:
        Number(above=1).check("madpo_c_max", self.c_max)
        Number(above=0, below=1).check("madpo_c_min", self.c_min)
        Number(above=0).check("madpo_steepness", self.steepness)
        Number(above=0).check("madpo_tau", self.tau)

    def __call__(self, view: PairView) -> Tensor:
        scores = view[SCORE_CHOSEN], view[SCORE_REJECTED]
        return margin_adaptive_weight(*scores, self.c_max, self.c_min, self.steepness, self.tau)


@dataclass(frozen=True)
class ScoreOffsetMargin(Term):
    """`score_offset_margin` from the score columns.

    Pairs whose chosen score is not the higher one have margin 0 and no loss, whatever the link.
    """

    alpha: float = 1.0
    name: ClassVar[str] = "odpo"
    columns = SCORES
    keeps_only = "pairs whose chosen completion has the higher score"

    def __post_init__(self) -> None:
        Number(least=0).check("odpo_alpha", self.alpha)

    def __call__(self, view: PairView) -> Tensor:
        offset = score_offset_margin(view[SCORE_CHOSEN], view[SCORE_REJECTED], self.alpha)
        return torch.where(view[SCORE_CHOSEN] > view[SCORE_REJECTED], offset, 0.0)

    def keeps(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        return columns[SCORE_CHOSEN] > columns[SCORE_REJECTED] if self.alpha else None  # with α = 0 it is DPO


@dataclass(frozen=True)
class LengthMargin(Term):
    """`length_margin` from the completions' tokens."""

    alpha: float = 0.05
    name: ClassVar[str] = "r-dpo"

    def __post_init__(self) -> None:
        Number().check("r_dpo_alpha", self.alpha)

    def __call__(self, view: PairView) -> Tensor:
        return length_margin(view.chosen_length, view.rejected_length, self.alpha)
