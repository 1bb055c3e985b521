"""Implicit rewards: from a completion's log-probability to a score, before the factor β.

The reward of the papers is r = β · score; `objective` multiplies by β once, for all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import unknown
from .pairs import PairLogps, mean_logps, upcast

_LARGEST_EXPONENT = 80.0  # e^80 is still a float32 after a division by α − 1


def length_normalized(logps_sum: Tensor, lengths: Tensor) -> Tensor:
    r"""SimPO's and GapPO's score: the mean log-probability per token, :math:`\frac{1}{|y|} \log \pi_\theta(y|x)`.

    A completion that truncation left empty has reward 0, where 0/0 would be NaN (GapPO, section 3.6).

    Args:
        logps_sum: [B] summed log-probabilities of the completions, in nats.
        lengths: [B] number of completion tokens.

    Returns:
        [B] mean log-probabilities, in nats per token.

    Source: SimPO (arXiv 2405.14734), eq. 3; GapPO, eq. 8.
    """
    return mean_logps(logps_sum, lengths)


DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def log_ratio(logps: Tensor, ref_logps: Tensor, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    r"""DPO's score :math:`f'(u)` with :math:`u = \pi_\theta(y|x) / \pi_{ref}(y|x)`; for the reverse KL, log u.

    ==================  =====================================
    divergence          f'(u), up to a constant
    ==================  =====================================
    reverse_kl          log u
    forward_kl          1 − 1/u
    js_divergence       log(2u / (1 + u))
    alpha_divergence    (u^(α−1) − 1) / (α − 1); log u at α=1
    ==================  =====================================

    Args:
        logps: [B] summed log-probabilities under the policy, in nats.
        ref_logps: [B] the same under the reference model.
        divergence: which row of the table.
        alpha: α of the α-divergence.

    Returns:
        [B] scores. Those of the α-divergence are at least float32, and stop at an exponent of 80.

    Raises:
        ValueError: an unknown divergence.

    Source: DPO (arXiv 2305.18290), eq. 5; f-DPO (arXiv 2309.16240), table 1.
    """
    log_u = logps - ref_logps
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and math.isclose(alpha, 1.0, abs_tol=1e-6)):
        return log_u
    if divergence == "forward_kl":
        return 1 - torch.exp(-log_u)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_u)
    if divergence == "alpha_divergence":
        return torch.expm1(((alpha - 1) * upcast(log_u)).clamp(max=_LARGEST_EXPONENT)) / (alpha - 1)
    raise unknown("f_divergence_type", divergence, DIVERGENCES)


def alphapo(logps: Tensor, alpha: float) -> Tensor:
    r"""AlphaPO's reward shape :math:`(1 - p^{-\alpha}) / \alpha` with :math:`p = e^{logps}`; α = 0 gives log p.

    Both minus signs and the division belong together: for every α the reward rises with p, is 0 at p = 1, and becomes
    log p as α → 0. Its slope over log p is :math:`p^{-\alpha}`. With α > 0 the loss therefore moves a completion more
    the less likely it is, and the reward has no lower bound; with α < 0 it moves it less, down to the bound 1/α.

    Args:
        logps: [B] log-probabilities in nats: per token for SimPO-like losses, summed for the others; or of each token.
        alpha: α.

    Source: AlphaPO (arXiv 2501.03884), eq. 6, where p is the length-normalized probability π(y|x)^(1/|y|).
    """
    if abs(alpha) < 1e-7:  # no difference that float32 could show, and in it α may round to 0
        return logps
    return -torch.expm1(-alpha * logps) / alpha


def log_odds(mean_logp: Tensor) -> Tensor:
    """ORPO's score log(p / (1 − p)) with p = exp(mean log π).

    Args:
        mean_logp: [B] mean log-probability per token, in nats, at most 0.

    Returns:
        [B] log-odds, in the dtype of the log-probabilities, at least float32. They are finite: nearer to p = 1
        than the dtype's ε they are those of log p = −ε.

    Source: ORPO (arXiv 2403.07691), eqs. 4 and 6.
    """
    mean_logp = upcast(mean_logp)
    mean_logp = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    return mean_logp - torch.log(-torch.expm1(mean_logp))


class Reward(ABC):
    """An implicit reward: from the log-probabilities of B pairs to the two scores of each, before β.

    An argument of `__init__` is a config field: `option_prefix` and the argument's name, or what `option_fields` says.
    """

    name: ClassVar[str]
    option_prefix: ClassVar[str] = ""  # "" makes it the name with underscores
    option_fields: ClassVar[Mapping[str, str]] = {}  # argument → config field
    needs_reference: ClassVar[bool] = False  # reads `ref_chosen` and `ref_rejected`
    summed: ClassVar[bool] = False  # over a completion's tokens, so that it grows with the length

    @abstractmethod
    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """[B] scores of the chosen and of the rejected completions, with gradient."""

    @property
    def of_token(self) -> Callable[[Tensor], Tensor] | None:
        """A function of each token's log-probability, whose sums this reward reads as `PairLogps.chosen_score` and
        `rejected_score`.
        """
        return None


@dataclass(frozen=True)
class LengthNormalizedReward(Reward):
    """SimPO: mean log-probability per token; with α ≠ 0 in AlphaPO's shape. No reference model."""

    alpha: float = 0.0
    name: ClassVar[str] = "length-normalized"
    option_fields: ClassVar[Mapping[str, str]] = {"alpha": "alpha"}

    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return (
            alphapo(length_normalized(pairs.chosen, pairs.chosen_length), self.alpha),
            alphapo(length_normalized(pairs.rejected, pairs.rejected_length), self.alpha),
        )


@dataclass(frozen=True)
class SummedReward(Reward):
    """CPO: summed log-probability; with α ≠ 0 in AlphaPO's shape. No reference model."""

    alpha: float = 0.0
    name: ClassVar[str] = "sum"
    summed: ClassVar[bool] = True
    option_fields: ClassVar[Mapping[str, str]] = {"alpha": "alpha"}

    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return alphapo(pairs.chosen, self.alpha), alphapo(pairs.rejected, self.alpha)


@dataclass(frozen=True)
class LogRatioReward(Reward):
    """DPO: log-ratio to the reference model, or another f-divergence's score of it."""

    divergence: str = "reverse_kl"
    alpha: float = 0.5
    name: ClassVar[str] = "log-ratio"
    option_fields: ClassVar[Mapping[str, str]] = {
        "divergence": "f_divergence_type",
        "alpha": "f_alpha_divergence_coef",
    }
    needs_reference: ClassVar[bool] = True
    summed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise unknown("f_divergence_type", self.divergence, DIVERGENCES)

    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        ref_chosen, ref_rejected = _reference(pairs, self.name)
        return (
            log_ratio(pairs.chosen, ref_chosen, self.divergence, self.alpha),
            log_ratio(pairs.rejected, ref_rejected, self.divergence, self.alpha),
        )


@dataclass(frozen=True)
class MeanLogRatioReward(Reward):
    """The log-ratio to the reference model per token, as γ-DPO's authors compute it (`length_norm`); with the sigmoid
    link, TRL's `sigmoid_norm`.
    """

    name: ClassVar[str] = "mean-log-ratio"
    needs_reference: ClassVar[bool] = True

    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        ref_chosen, ref_rejected = _reference(pairs, self.name)
        return (
            mean_logps(pairs.chosen - ref_chosen, pairs.chosen_length),
            mean_logps(pairs.rejected - ref_rejected, pairs.rejected_length),
        )


@dataclass(frozen=True)
class TokenAlphaReward(Reward):
    """AlphaPO's shape taken of each token's probability, and averaged over the tokens. No reference model.

    The paper and TRL shape the mean log-probability instead: that is `length-normalized` with the same α.
    """

    alpha: float = 0.0
    name: ClassVar[str] = "alphapo-token"
    option_fields: ClassVar[Mapping[str, str]] = {"alpha": "alpha"}

    @property
    def of_token(self) -> Callable[[Tensor], Tensor]:
        return partial(alphapo, alpha=self.alpha)

    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        if pairs.chosen_score is None or pairs.rejected_score is None:
            raise ValueError(f"reward {self.name!r} needs PairLogps.chosen_score: let pair_logps have its of_token")
        return (
            mean_logps(pairs.chosen_score, pairs.chosen_length),
            mean_logps(pairs.rejected_score, pairs.rejected_length),
        )


@dataclass(frozen=True)
class LogOddsReward(Reward):
    """ORPO: log-odds of the mean log-probability per token. No reference model."""

    name: ClassVar[str] = "log-odds"

    def __call__(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return (
            log_odds(length_normalized(pairs.chosen, pairs.chosen_length)),
            log_odds(length_normalized(pairs.rejected, pairs.rejected_length)),
        )


def _reference(pairs: PairLogps, reward: str) -> tuple[Tensor, Tensor]:
    if pairs.ref_chosen is None or pairs.ref_rejected is None:
        raise ValueError(
            f"reward {reward!r} needs the reference model's log-probabilities: train on DPOTrainer's base"
        )
    return pairs.ref_chosen, pairs.ref_rejected


REWARDS: dict[str, type[Reward]] = {
    reward.name: reward
    for reward in (
        LengthNormalizedReward,
        SummedReward,
        LogRatioReward,
        MeanLogRatioReward,
        TokenAlphaReward,
        LogOddsReward,
    )
}
