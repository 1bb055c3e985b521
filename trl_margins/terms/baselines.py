"""Weights and margins of the methods that the papers compare with, each a few lines."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairs import upcast

_LEAST = -1e4  # a margin at which −log σ is 0 in every dtype that a loss has


def focal_weight(reward_gap: Tensor, gamma: float) -> Tensor:
    r"""FocalPO's factor :math:`\sigma(m_i)^\gamma`: pairs that the model ranks wrongly count less.

    Args:
        reward_gap: [B] m = r_w − r_l, β inside.
        gamma: γ ≥ 0; 0 weighs all pairs alike. It is no target margin.

    Returns:
        [B] weights in [0, 1], without gradient.

    Source: FocalPO (arXiv 2501.06645).
    """
    return torch.exp(gamma * _log_likelihood(reward_gap))


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
    return torch.exp(own - whole.logsumexp(0) + math.log(whole.numel()))


def _log_likelihood(reward_gap: Tensor) -> Tensor:
    return F.logsigmoid(upcast(reward_gap.detach()))


def score_offset_margin(score_chosen: Tensor, score_rejected: Tensor, alpha: float) -> Tensor:
    r"""ODPO's offset :math:`\alpha \log(s_w - s_l)`: the more the scores differ, the more the rewards must.

    A gap below 1 has a negative offset. A pair without a score gap, or one whose rejected completion has the higher
    score, has the offset −∞ and therefore no loss; here −10,000, so that nothing becomes NaN.

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

    Args:
        length_chosen: [B] |y_w| in completion tokens.
        length_rejected: [B] |y_l|.
        alpha: α ≥ 0, in reward units per token; 0 is DPO.

    Returns:
        [B] margins in reward units, without gradient.

    Source: Park et al., Disentangling Length from Quality in Direct Preference Optimization (arXiv 2403.19159), eq. 9.
    """
    return alpha * (length_rejected - length_chosen).detach().float()
