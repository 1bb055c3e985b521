"""α-DPO: a margin that grows with how far a pair has moved from the reference, seen against the other pairs."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..checks import Number
from ..pairs import PairView, mean_logps, upcast
from . import Term
from .history import RunningMoments


class ReferenceMargin(Term):
    r""":math:`\gamma + \beta\,\alpha\,(M_i - c_1)/c_2` with M = Δ − Δ_ref and its running mean c_1 and deviation c_2.

    So the loss is −log σ(βΔ − β(γ/β + αz)), with β inside: Δ of the policy, less SimPO's target, less α times the
    standardized log-ratio gap z. M has no β in it. It is per token where the reward is, and a sum over the tokens
    where the reward is one, as the authors' `ln` switches both.

    c_1 and c_2 begin at 0 and keep 0.9 at each batch of all ranks, which is learned before it is used, as in the
    authors' code: the first batch has (M − 0.1 μ)/(0.1 σ). Their code learns from evaluations too. Here evaluations
    are standardized by what training has left, and have z = 0 before it.

    Args:
        gamma: target margin in reward units, β times the code's `gamma_beta_ratio`.
        alpha: how much z counts; 0 is SimPO.

    Source: α-DPO (arXiv 2410.10148); its repository, scripts/dpo_trainer.py.
    """

    name: ClassVar[str] = "alpha-dpo"
    holds_target: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    def __init__(self, gamma: float, alpha: float = 0.2) -> None:
        Number().check(f"gamma of margin {self.name!r}", gamma)
        Number(least=0).check("alpha_dpo_alpha", alpha)
        self.gamma, self.alpha = gamma, alpha
        self.moments = RunningMoments()

    def __call__(self, view: PairView) -> Tensor:
        moved = upcast(self._moved(view))
        if view.training:
            self.moments.learn(view.gather(moved))
        return self.gamma + view.beta * self.alpha * self.moments.standardized(moved)

    def _moved(self, view: PairView) -> Tensor:
        """[B] M."""
        chosen, rejected = view.chosen_log_ratio, view.rejected_log_ratio
        if chosen is None or rejected is None:
            raise ValueError(f"margin {self.name!r} compares with a reference model, which these pairs do not have")
        if view.per_token_gap is not None:  # the reward is a sum over the tokens
            return chosen - rejected
        return mean_logps(chosen, view.chosen_length) - mean_logps(rejected, view.rejected_length)

    def state_dict(self) -> dict[str, Any]:
        return self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments.load_state_dict(state)
