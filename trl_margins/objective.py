"""Puts reward, weight, margin and loss together: from `PairLogps` and `PairBatch` to one loss per pair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Number, unknown
from .links import NOT_PER_PAIR, READS_SMOOTHING, TAKES_MARGIN, LossInputs, PairLoss, margin_loss
from .pairs import PairBatch, PairLogps
from .rewards import DIVERGENCES, alphapo, length_normalized, log_ratio
from .terms import Term

__all__ = [
    "LengthNormalizedReward",
    "LogRatioReward",
    "Objective",
    "ObjectiveOutput",
    "SummedReward",
    "margin_loss",
]

logger = logging.getLogger(__name__)

Reward = Callable[[PairLogps], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LengthNormalizedReward:
    """SimPO: mean log-probability per token; with α ≠ 0 in AlphaPO's shape. No reference model."""

    alpha: float = 0.0

    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return (
            alphapo(length_normalized(pairs.chosen, pairs.chosen_length), self.alpha),
            alphapo(length_normalized(pairs.rejected, pairs.rejected_length), self.alpha),
        )


@dataclass(frozen=True)
class SummedReward:
    """CPO: summed log-probability; with α ≠ 0 in AlphaPO's shape. No reference model."""

    alpha: float = 0.0

    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return alphapo(pairs.chosen, self.alpha), alphapo(pairs.rejected, self.alpha)


@dataclass(frozen=True)
class LogRatioReward:
    """DPO: log-ratio to the reference model, or another f-divergence's score of it."""

    divergence: str = "reverse_kl"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise unknown("f_divergence_type", self.divergence, DIVERGENCES)

    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return (
            log_ratio(pairs.chosen, pairs.ref_chosen, self.divergence, self.alpha),
            log_ratio(pairs.rejected, pairs.ref_rejected, self.divergence, self.alpha),
        )


@dataclass(frozen=True)
class ObjectiveOutput:
    """What one batch of B pairs came to. Everything but `losses` is detached."""

    losses: Tensor  # [B] weight included
    chosen_reward: Tensor  # [B] β inside
    rejected_reward: Tensor  # [B]
    weight: Tensor | None  # [B], None where every pair weighs 1
    margin: Tensor | None  # [B] reward units, None without a margin term
    slope: Tensor | None = None  # [B] how fast the loss falls in the reward gap, weight not included; in training


@dataclass(frozen=True)
class Objective:
    """A reward, the losses of its gap, and the optional weight and margin of each pair.

    Args:
        reward: from log-probabilities to the two scores of each pair.
        losses: loss type → its share of the sum (TRL's multi-loss lists have several).
        table: loss type → function; one of the tables in `losses`.
        beta: β.
        gamma: target margin that all pairs share, in reward units; not used by a margin term that holds it itself.
        weight: weight term.
        margin: margin term.
        label_smoothing: ε of the losses that have one.
        discopop_tau: τ of DiscoPOP.

    Raises:
        ValueError: an unknown loss type, a term that does not go with one, or a number that a loss cannot take.
    """

    reward: Reward
    losses: Mapping[str, float]
    table: Mapping[str, PairLoss]
    beta: float
    gamma: float = 0.0
    weight: Term | None = None
    margin: Term | None = None
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        for name in self.losses:
            if name not in self.table:
                raise ValueError(
                    f"loss_type {name!r} is unknown or does not go with {type(self.reward).__name__}; "
                    f"these do: {', '.join(sorted(self.table))}"
                )
            if self.weight is not None and name in NOT_PER_PAIR:
                raise ValueError(
                    f"weight {self.weight.name!r} does not go with loss_type {name!r}, "
                    "which has no loss per pair to weigh"
                )
            if name not in TAKES_MARGIN and (self.margin is not None or self.gamma):
                margin = repr(self.margin.name) if self.margin is not None else f"of {self.gamma} (simpo_gamma)"
                raise ValueError(
                    f"margin {margin} does not go with loss_type {name!r}: "
                    f"only {', '.join(sorted(TAKES_MARGIN))} subtract a margin from the reward gap"
                )
        self._check_numbers()

    def _check_numbers(self) -> None:
        Number(above=0).check("beta", self.beta)
        Number().check("simpo_gamma", self.gamma)
        Number(above=0).check("discopop_tau", self.discopop_tau)
        Number(least=0, most=0.5).check("label_smoothing", self.label_smoothing)
        if "robust" in self.losses:  # it divides by 1 − 2ε
            Number(least=0, below=0.5).check("label_smoothing of loss_type 'robust'", self.label_smoothing)
        if "exo_pair" in self.losses:  # and this takes its logarithm
            Number(above=0, most=0.5).check("label_smoothing of loss_type 'exo_pair'", self.label_smoothing)
        for name, share in self.losses.items():
            Number(least=0).check(f"the weight of loss_type {name!r} (loss_weights)", share)
        if not any(self.losses.values()):
            raise ValueError(f"no loss to train on: loss_type is {list(self.losses)}, and all its loss_weights are 0")
        reads_smoothing = [name for name in self.losses if self.table.get(name) in READS_SMOOTHING]
        if self.label_smoothing and not reads_smoothing:
            logger.warning("label_smoothing=%g has no effect with loss_type %s", self.label_smoothing, [*self.losses])

    @property
    def columns(self) -> tuple[str, ...]:
        """Batch columns that the terms read."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.columns))

    @property
    def terms(self) -> tuple[Term, ...]:
        return tuple(term for term in (self.weight, self.margin) if term is not None)

    @property
    def _shared_margin(self) -> float:
        return 0.0 if getattr(self.margin, "holds_target", False) else self.gamma

    def __call__(self, pairs: PairLogps, batch: PairBatch) -> ObjectiveOutput:
        chosen, rejected = self.reward(pairs)
        gap = self.beta * (chosen - rejected).detach()
        with torch.no_grad():
            weight = self.weight(batch, gap) if self.weight is not None else None
            margin = self.margin(batch, gap) + self._shared_margin if self.margin is not None else None
        inputs = LossInputs(
            pairs,
            chosen,
            rejected,
            beta=self.beta,
            margin=self.gamma if margin is None else margin,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.discopop_tau,
        )
        losses = sum(share * self.table[name](inputs) for name, share in self.losses.items())
        if pairs.policy_weight is not None:
            losses = pairs.policy_weight * losses
        slope = self._slope(losses, chosen, rejected) if batch.training and losses.requires_grad else None
        if weight is not None:
            losses = weight * losses
        rewards = self.beta * chosen.detach(), self.beta * rejected.detach()
        return ObjectiveOutput(losses, *rewards, weight, margin, slope)

    def _slope(self, losses: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        """[B] −∂loss/∂(r_w − r_l); of a loss that is no function of the gap, the mean of both sides' slopes."""
        sides = [(sign, score) for sign, score in ((-1, chosen), (1, rejected)) if score.requires_grad]
        gradients = torch.autograd.grad(
            losses.sum(), [score for _, score in sides], retain_graph=True, materialize_grads=True
        )
        slopes = [sign * gradient for (sign, _), gradient in zip(sides, gradients, strict=True)]
        return sum(slopes) / (len(slopes) * self.beta)
