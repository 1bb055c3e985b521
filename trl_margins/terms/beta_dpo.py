"""β-DPO: a β for each batch from its gaps, on the pairs whose gaps are not too far from those of the run."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import Number
from ..pairs import PairView, upcast
from . import Term
from .history import RunningMoments

_LEAST_BETA = 1e-3


class BatchBeta(Term):
    r"""The loss of β-DPO is −log σ(β_b g), averaged over the kept pairs, where g is the reward gap without β and

    .. math:: \beta_b = \beta\,(1 + a\,(mean_{kept}\,g - M_0)) \ge 0.001

    The gap in β_b has no β in it, as in the authors' code. γ-PO's Table 6 has it inside: its a is a/β there.

    M_0 is the running mean of g over training. Kept are int(`keep` · n) of the n pairs of all ranks (at least one),
    drawn without replacement with probabilities in proportion to exp(−½((g − M_0)/σ_0)²).

    Two terms make this loss together: weight `beta-dpo-kept`, which is (β_b/β)·n/kept for a kept pair and 0 for
    another, and margin `beta-dpo`, (β − β_b) g. The gradient of weight · −log σ(βg − margin) is that of β-DPO's loss.
    Its value is β_b/β times as large. With SimPO's reward they are β-SimPO, and γ is subtracted beside the margin.

    In evaluation no pair is left out and β_b is β: the loss is DPO's, whatever the batches. (The authors' code draws
    and learns in evaluations, too.) Their mean is over the kept pairs of each rank, and then over the ranks; here it
    is over the kept pairs of all ranks.

    M_0 and σ_0 begin at 0, keep 0.9 at each batch and learn it before it is used. Each term has them, and a count of
    the batches from which the draw is made: so both terms, all ranks and a resumed run draw the same.

    Args:
        a: how much β_b follows the mean gap; 0 is DPO on the kept pairs.
        keep: the share of pairs that is kept; 1 keeps all.

    Source: β-DPO (arXiv 2407.08639); its repository, trainers.py. β-SimPO: γ-PO (arXiv 2506.03690), section 4.2.
    """

    option_prefix: ClassVar[str] = "beta_dpo_"

    def __init__(self, a: float = 0.6, keep: float = 0.8) -> None:
        Number().check("beta_dpo_a", a)
        Number(above=0, most=1).check("beta_dpo_keep", keep)
        self.a, self.keep = a, keep
        self.moments, self.batches = RunningMoments(), 0

    def _batch(self, view: PairView) -> tuple[Tensor, Tensor]:
        """[B] n/kept for a kept pair and 0 for another, and [] β_b/β, of a training batch."""
        gaps = upcast(view.gather(view.unscaled_gap))
        self.moments.learn(gaps)
        n_pairs = gaps.numel()
        n_kept = max(int(self.keep * n_pairs + 1e-9), 1)
        # the largest of log-weights with Gumbel noise are a draw without replacement, as torch.multinomial makes it
        keys = (
            _gumbel(n_pairs, self.batches).to(gaps, non_blocking=True) - self.moments.standardized(gaps).square() / 2
        )
        kept = keys.topk(n_kept).indices
        self.batches += 1
        ratio = 1 + self.a * self.moments.deviation(gaps[kept].mean())
        shares = torch.zeros_like(gaps).scatter(0, kept, n_pairs / n_kept)
        mine = shares[view.first :][: view.unscaled_gap.numel()]
        return mine, ratio.clamp(min=_LEAST_BETA / view.beta)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, **self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]
        self.moments.load_state_dict(state)


class KeptWeight(BatchBeta):
    """The weight of β-DPO; see `BatchBeta`."""

    name: ClassVar[str] = "beta-dpo-kept"
    option_prefix: ClassVar[str] = "beta_dpo_"

    def __call__(self, view: PairView) -> Tensor:
        if not view.training:
            return torch.ones_like(upcast(view.unscaled_gap))
        shares, ratio = self._batch(view)
        return ratio * shares


class BatchBetaMargin(BatchBeta):
    """The margin of β-DPO; see `BatchBeta`. β_b is logged."""

    name: ClassVar[str] = "beta-dpo"
    option_prefix: ClassVar[str] = "beta_dpo_"

    def __call__(self, view: PairView) -> Tensor:
        gap = upcast(view.reward_gap)
        if not view.training:
            return torch.zeros_like(gap)
        _, self._ratio = self._batch(view)
        return (1 - self._ratio) * gap

    def observed(self, view: PairView, value: Tensor) -> dict[str, Tensor]:
        """[B] β_b."""
        return {"beta_dpo/beta": (view.beta * self._ratio).expand_as(value)}


def _gumbel(n: int, seed: int) -> Tensor:
    """[n] noise on the CPU, the same wherever it is made."""
    exponential = torch.empty(n).exponential_(generator=torch.Generator().manual_seed(seed))
    return -exponential.clamp(min=torch.finfo(torch.float32).tiny).log()
