"""GAPO: a margin from a nearby, worse policy: pairs whose gap collapses there count less."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..checks import Number
from ..pairs import PairView
from . import Term

# what the trainer measures on the model, by the names under which a batch carries it
ANCHOR_SCORE_GAP = "anchor_score_gap"
ANCHOR_GAP = "anchor_gap"
RELATIVE_NORM = "relative_gradient_norm"


def anchor_margin(reward_gap: Tensor, anchor_gap: Tensor, beta: float, gamma: float = 0.0) -> Tensor:
    r"""The pair's reward gap at the anchor, plus γ.

    .. math:: \beta\,\Delta_i(\theta') + \gamma = m_i - \beta\,\Gamma_i + \gamma

    With it the loss −log σ(m − margin) is GAPO's −log σ(βΓ − γ), and its gradient that of Δ_i, times `anchor_weight`.

    Args:
        reward_gap: [B] reward gaps m = βΔ(θ).
        anchor_gap: [B] Γ_i = Δ_i(θ) − Δ_i(θ'), without β: how far the gap falls at the anchor θ' = θ − ρ·∇M̄/‖∇M̄‖,
            where M̄ is the mean Δ over the anchor batch.
        beta: β.
        gamma: target margin in reward units, β times the paper's γ.

    Returns:
        [B] margins in reward units, without gradient.

    Source: GAPO (arXiv 2602.04909), eqs. 5 to 8.
    """
    return (reward_gap - beta * anchor_gap + gamma).detach()


def anchor_weight(anchor_gap: Tensor, beta: float, gamma: float = 0.0) -> Tensor:
    r"""The factor of a pair's gradient under GAPO's logistic loss: :math:`\beta\,\sigma(\gamma - \beta\,\Gamma_i)`.

    It falls in Γ.

    Args:
        anchor_gap: [B] Γ, without β.
        beta: β.
        gamma: target margin in reward units, β times the paper's γ.

    Source: GAPO (arXiv 2602.04909), eqs. 9 and 25.
    """
    return beta * torch.sigmoid(gamma - beta * anchor_gap.detach())


class AnchorMargin(Term):
    """`anchor_margin`, from what the trainer measures before each optimizer step: `anchor_score_gap`, Δ_i(θ') itself,
    or `anchor_gap`, Γ_i. Where neither was measured (in evaluation) the margin is γ, as in SimPO.

    Args:
        beta: β.
        gamma: target margin in reward units.
    """

    name: ClassVar[str] = "geometric-anchor"
    option_prefix: ClassVar[str] = "anchor_"
    holds_target: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = (ANCHOR_SCORE_GAP, ANCHOR_GAP)

    def __init__(self, beta: float, gamma: float = 0.0) -> None:
        Number(above=0).check(f"beta of margin {self.name!r}", beta)
        Number().check(f"gamma of margin {self.name!r}", gamma)
        self.beta, self.gamma = beta, gamma

    def __call__(self, view: PairView) -> Tensor:
        gap = view.reward_gap
        measured = next((name for name in self.probes if name in view.columns), None)
        if measured is None:
            if view.training:
                raise KeyError(
                    f"margin {self.name!r} needs {self.probes[-1]!r}, which our trainers measure before each "
                    "optimizer step: train with MarginCPOTrainer or MarginDPOTrainer, or put it "
                    "among the batch's columns"
                )
            return torch.full_like(gap, self.gamma)
        value = view[measured].to(gap)
        anchor_gap = gap / self.beta - value if measured == ANCHOR_SCORE_GAP else value
        return anchor_margin(gap, anchor_gap, self.beta, self.gamma)

    def observed(self, view: PairView, value: Tensor) -> dict[str, Tensor]:
        """[B] Γ (or what stands in its place) and `anchor_weight`, of pairs whose margin this term gave."""
        anchor_gap = (view.reward_gap - value + self.gamma) / self.beta
        return {"anchor/gap": anchor_gap, "anchor/weight": anchor_weight(anchor_gap, self.beta, self.gamma)}


class GradientNormMargin(AnchorMargin):
    """GAPO's control: Γ replaced by the norm of the pair's own gradient, over the mean norm of its accumulation
    window.
    """

    name: ClassVar[str] = "gradient-norm"
    further_options: ClassVar[tuple[str, ...]] = ("anchor_scope",)
    probes: ClassVar[tuple[str, ...]] = (RELATIVE_NORM,)
