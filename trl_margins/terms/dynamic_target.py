"""γ-PO: a margin from the model's own gaps: pairs that it tells apart well get a larger one."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import Number
from ..pairs import PairView, upcast
from . import Term
from .history import GapHistory

_NOTHING = -80.0  # log n·p of a pair without a margin
_SECTIONS, _ROUNDS, _HALVINGS = 8, 20, 12  # of the bisection


def dynamic_target_margin(
    reward_gap: Tensor,
    gamma0: float,
    tau: float,
    history: Tensor | None = None,
    steps: int = 20,
) -> Tensor:
    r"""Splits the target margin γ0 unevenly over n pairs: :math:`\gamma_i = \gamma_0\, n\, p_i`, where p minimises

    .. math:: -\frac1n \sum_i \log\sigma(m_i - \gamma_0 n p_i) + \tau\, KL(p \,\|\, uniform)

    over the simplex. The mean of γ over the n pairs is γ0.

    Args:
        reward_gap: [B] reward gaps m of this batch, β inside.
        gamma0: γ0 in reward units.
        tau: τ, the price of leaving the uniform distribution; large τ gives every pair γ0.
        history: [H] further gaps that are solved for together with the batch, n = B + H.
        steps: of the authors' mirror descent, p ← p·exp(−η g)/Σ with η = 0.5/τ and
            g_i = γ0·σ(γ_i − m_i) + τ(1 + log n p_i). Near the optimum, where no
            margin is above γ0·exp(γ0/τ), a step multiplies the distance by between 1/2 and 1/2 − γ0²·exp(γ0/τ)/(8τ).
            Where that can be below −5/8, they may swing around the optimum for ever: there, bisection finds it.

    Returns:
        [B] margins γ_i in reward units, without gradient; in the dtype of the gaps, at least float32.

    Raises:
        ValueError: τ or γ0 that is not positive.

    Source: γ-PO, eqs. 9, 22 to 24 and appendix C.
    """
    _check(gamma0, tau)
    gaps = upcast(reward_gap.detach())
    if history is not None:
        gaps = torch.cat([gaps, history.to(gaps)])
    if gamma0**2 * math.exp(min(gamma0 / tau, 700)) > 9 * tau:  # a step may lead farther away than it began
        log_share = _bisected(gaps, gamma0, tau)
        return (gamma0 * log_share.exp())[: reward_gap.numel()].to(gaps)
    rate = 0.5 / tau
    log_share = torch.zeros_like(gaps)  # log n·p from the uniform distribution; in logarithms p cannot vanish
    log_n = math.log(gaps.numel())
    for _ in range(steps):
        gradient = gamma0 * torch.sigmoid(gamma0 * log_share.exp() - gaps) + tau * (1 + log_share)
        log_share = log_share - rate * gradient
        log_share = log_share - log_share.logsumexp(0) + log_n
    return (gamma0 * log_share.exp())[: reward_gap.numel()]


def _bisected(gaps: Tensor, gamma0: float, tau: float) -> Tensor:
    """[n] log n·p of the optimum, in float64.

    There, γ0·σ(γ0 e^u − m) + τ u is the same λ for every pair, and the mean of e^u is 1. Both rise with u. So λ and
    every u lie between bounds, which come closer together: those of the u by halves, at several λ side by side, and
    those of λ to the last one whose upper bounds are too small and the first one whose lower ones are too large.
    """
    gaps = gaps.cpu().double() if gaps.device.type == "mps" else gaps.double()  # which has no float64
    grid = torch.linspace(0, 1, _SECTIONS + 1, dtype=gaps.dtype, device=gaps.device)[:, None]
    ends = gaps.new_tensor([0.0, gamma0])[:, None]
    # below the least, a margin is nothing; above the most, one pair has more than all
    least, most = gaps.new_full(gaps.shape, _NOTHING), gaps.new_full(gaps.shape, math.log(gaps.numel()) + 1)
    for _ in range(_ROUNDS):
        levels = torch.lerp(ends[:1], ends[1:], grid)
        low, high = least.expand(len(grid), -1), most.expand(len(grid), -1)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            rises = gamma0 * torch.sigmoid(gamma0 * middle.exp() - gaps) + tau * middle < levels
            low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
        under = ((high.exp().mean(1) < 1).sum() - 1).clamp(min=0)[None]
        over = (low.exp().mean(1) <= 1).sum().clamp(max=_SECTIONS)[None]
        least, most = low.index_select(0, under)[0], high.index_select(0, over)[0]
        ends = levels.index_select(0, torch.cat([under, over]))
    found = (least + most) / 2
    return found - found.logsumexp(0) + math.log(gaps.numel())


def _check(gamma0: float, tau: float) -> None:
    options = {"gamma0": "simpo_gamma, or gamma_beta_ratio · beta", "tau": "gamma_po_tau"}
    for (name, option), value in zip(options.items(), (gamma0, tau), strict=True):
        if not 0 < value < math.inf:
            raise ValueError(
                f"γ-PO divides a positive target margin at a positive price: {name} must be > 0 and finite, not "
                f"{value} (in a config it is {option})"
            )


class DynamicTargetMargin(Term):
    """`dynamic_target_margin` over the batch of all ranks, filled up from the last gaps.

    Args:
        gamma0: γ0 in reward units.
        tau: τ.
        steps: of mirror descent.
        estimation_size: gaps that are solved for together (the authors' 256); a larger batch is taken whole.
        queue_size: how many past gaps are cached. The filling is spread evenly over them, where the authors draw at
            random: so it is the same on every rank and after a resume.
        centered: subtract γ_i − γ0 instead of γ_i, so that an average pair has no margin.
    """

    name: ClassVar[str] = "gamma-po"
    holds_target: ClassVar[bool] = True

    def __init__(
        self,
        gamma0: float,
        tau: float = 10.0,
        steps: int = 20,
        estimation_size: int = 256,
        queue_size: int = 2048,
        centered: bool = False,
    ) -> None:
        _check(gamma0, tau)
        Number(least=1, whole=True).check("steps of γ-PO", steps)
        Number(least=1, whole=True).check("estimation_size of γ-PO", estimation_size)
        Number(least=0, whole=True).check("queue_size of γ-PO", queue_size)
        self.gamma0, self.tau, self.steps = gamma0, tau, steps
        self.estimation_size, self.centered = estimation_size, centered
        self.history = GapHistory(queue_size)

    def __call__(self, view: PairView) -> Tensor:
        everyone = view.gather(view.reward_gap)
        filling = self.history.spread(self.estimation_size - everyone.numel())
        margins = dynamic_target_margin(everyone, self.gamma0, self.tau, filling, self.steps)
        if view.training:
            self.history.push(everyone)
        mine = margins[view.first :][: view.reward_gap.numel()]
        return mine - self.gamma0 if self.centered else mine

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state)
