"""γ-PO: a margin from the model's own gaps: pairs that it tells apart well get a larger one."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import Number
from ..pairs import PairBatch
from .history import GapHistory

_POINTS = 128


def dynamic_target_margin(
    reward_gap: Tensor,
    gamma0: float,
    tau: float,
    history: Tensor | None = None,
    steps: int | None = 20,
) -> Tensor:
    r"""Splits the target margin γ0 unevenly over n pairs: :math:`\gamma_i = \gamma_0\, n\, p_i`, where p minimises

    .. math:: -\frac1n \sum_i \log\sigma(m_i - \gamma_0 n p_i) + \tau\, KL(p \,\|\, uniform)

    over the simplex. The mean of γ over the n pairs is γ0.

    Args:
        reward_gap: [B] reward gaps m of this batch, β inside.
        gamma0: γ0 in reward units.
        tau: τ, the price of leaving the uniform distribution; large τ gives every pair γ0.
        history: [H] further gaps that are solved for together with the batch, n = B + H.
        steps: of the authors' mirror descent, p ← p·exp(−η g)/Σ with η = min(0.5/τ, 1) and
            g_i = γ0·σ(γ_i − m_i) + τ(1 + log n p_i). None gives the optimum itself.

    Returns:
        [B] margins γ_i in reward units, without gradient; in the dtype of the gaps, at least float32.

    Raises:
        ValueError: τ or γ0 that is not positive.

    Source: γ-PO, eqs. 9, 22 to 24 and appendix C.
    """
    _check(gamma0, tau)
    gaps = reward_gap.detach() if history is None else torch.cat([reward_gap.detach(), history.to(reward_gap)])
    gaps = gaps.to(torch.promote_types(gaps.dtype, torch.float32))
    share = _descend(gaps, gamma0, tau, steps) if steps is not None else _solve(gaps, gamma0, tau)
    return (gamma0 * share)[: reward_gap.numel()]


def _descend(gaps: Tensor, gamma0: float, tau: float, steps: int) -> Tensor:
    """n·p after `steps` of mirror descent from the uniform distribution. In logarithms, so that p cannot vanish."""
    rate = min(0.5 / tau, 1.0)
    log_share = torch.zeros_like(gaps)
    log_n = math.log(gaps.numel())
    for _ in range(steps):
        gradient = gamma0 * torch.sigmoid(gamma0 * log_share.exp() - gaps) + tau * (1 + log_share)
        log_share = log_share - rate * gradient
        log_share = log_share - log_share.logsumexp(0) + log_n
    return log_share.exp()


def _solve(gaps: Tensor, gamma0: float, tau: float) -> Tensor:
    r"""n·p at the optimum. With u = log(n·p) the mean of e^u is 1 there, and one number c is what all of these are:

    .. math:: f_i(u_i) = \gamma_0\,\sigma(\gamma_0 e^{u_i} - m_i) + \tau u_i

    Every f_i rises with u_i, so a bracket around c gives one around every u_i. A round cuts all of them into many
    parts at once and keeps those that hold the solution; Newton's method ends it. Nothing is asked of the device.
    """
    m = gaps.double()[:, None]  # [n, 1]
    n = len(m)
    part = torch.linspace(0, 1, _POINTS, dtype=m.dtype, device=m.device)
    c_low, c_high = m.new_zeros(1), m.new_full((1,), gamma0)  # u ≤ 0 for all i, u ≥ 0 for all i
    low = torch.full_like(m, -gamma0 / tau)
    high = torch.full_like(m, min(gamma0 / tau, math.log(n)))
    # enough for float64 up to γ0 = 1,000 τ (usually it is below τ), and up to 10,000 τ
    times = 4 if gamma0 <= 1000 * tau else 8
    for _ in range(times):
        u, c = torch.lerp(low, high, part), torch.lerp(c_low, c_high, part)  # [n, points], [points]
        f = gamma0 * torch.sigmoid(gamma0 * u.exp() - m) + tau * u
        right = torch.searchsorted(f, c.repeat(n, 1))
        below, above = u.gather(1, (right - 1).clamp_(min=0)), u.gather(1, right.clamp_(max=_POINTS - 1))
        # the last c that is certainly too small, the first that is certainly too large
        last = ((above.exp().mean(0) < 1).sum(0, keepdim=True) - 1).clamp_(min=0)
        first = (_POINTS - (below.exp().mean(0) > 1).sum(0, keepdim=True)).clamp_(max=_POINTS - 1)
        # as indices in brackets the host would read them
        c_low, c_high = c.index_select(0, last), c.index_select(0, first)
        low, high = below.index_select(1, last), above.index_select(1, first)
    u = (low + high) / 2
    for _ in range(times):
        q = u.exp()
        s = torch.sigmoid(gamma0 * q - m)
        f, slope = gamma0 * s + tau * u, gamma0**2 * s * (1 - s) * q + tau
        c = ((q * f / slope - q).sum() + n) / (q / slope).sum()
        u = torch.clamp(u + (c - f) / slope, low, high)
    return u.exp()[:, 0].to(gaps.dtype)


def _check(gamma0: float, tau: float) -> None:
    options = {"gamma0": "simpo_gamma, or gamma_beta_ratio · beta", "tau": "gamma_po_tau"}
    for (name, option), value in zip(options.items(), (gamma0, tau), strict=True):
        if not 0 < value < math.inf:
            raise ValueError(
                f"γ-PO divides a positive target margin at a positive price: {name} must be > 0 and finite, not "
                f"{value} (in a config it is {option})"
            )


class DynamicTargetMargin:
    """`dynamic_target_margin` over the batch of all ranks, filled up from the last gaps.

    Args:
        gamma0: γ0 in reward units.
        tau: τ.
        steps: mirror descent steps; None or 0 for the optimum.
        estimation_size: gaps that are solved for together (the authors' 256); a larger batch is taken whole.
        queue_size: how many past gaps are kept. The filling is spread evenly over them, where the authors draw at
            random: so it is the same on every rank and after a resume.
        centered: subtract γ_i − γ0 instead of γ_i, so that an average pair has no margin.
    """

    name: ClassVar[str] = "gamma-po"
    holds_target: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        gamma0: float,
        tau: float = 10.0,
        steps: int | None = 20,
        estimation_size: int = 256,
        queue_size: int = 2048,
        centered: bool = False,
    ) -> None:
        _check(gamma0, tau)
        Number(least=0, whole=True, optional=True).check("steps of γ-PO", steps)
        Number(least=1, whole=True).check("estimation_size of γ-PO", estimation_size)
        Number(least=0, whole=True).check("queue_size of γ-PO", queue_size)
        self.gamma0, self.tau, self.steps = gamma0, tau, steps or None
        self.estimation_size, self.centered = estimation_size, centered
        self.history = GapHistory(queue_size)

    def __call__(self, batch: PairBatch, reward_gap: Tensor) -> Tensor:
        everyone = batch.gather(reward_gap)
        filling = self.history.spread(self.estimation_size - everyone.numel())
        margins = dynamic_target_margin(everyone, self.gamma0, self.tau, filling, self.steps)
        if batch.training:
            self.history.push(everyone)
        mine = margins[batch.first :][: reward_gap.numel()]
        return mine - self.gamma0 if self.centered else mine

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state)
