"""GaPO: a margin from the texts: the less similar the two completions are, the larger."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..checks import Number, unknown
from ..pairs import FACTOR, PairView, upcast
from . import Term

logger = logging.getLogger(__name__)

FactorMapping = Literal["log", "linear", "square", "sqrt"]
Normalization = Literal["scale", "add", "none"]
FLOOR = 0.01


def mapped_factor(ef: Tensor, mapping: FactorMapping = "log", floor: float = FLOOR) -> Tensor:
    """f(EF): log(1/EF), 1 − EF, 1 − EF² or 1 − √EF, with EF clipped to [floor, 1].

    Completions that are the same (EF = 1) have f = 0 under every mapping.

    Raises:
        ValueError: an unknown mapping; a floor outside (0, 1).
    """
    _check(mapping, "scale", floor)
    ef = upcast(ef.detach()).clamp(floor, 1.0)
    if mapping == "log":
        return -ef.log()
    if mapping == "linear":
        return 1 - ef
    return 1 - (ef.square() if mapping == "square" else ef.sqrt())


def evaluation_factor_margin(
    ef: Tensor,
    gamma: float,
    mapping: FactorMapping = "log",
    normalization: Normalization = "scale",
    mean: Tensor | float | None = None,
    floor: float = FLOOR,
    beta: float = 1.0,
) -> Tensor:
    r"""Margin per pair from the evaluation factor EF, the similarity of the two completions.

    =============  ============================================
    normalization  margin, where γ has β inside (γ = β · 0.3)
    =============  ============================================
    scale          γ · f / mean(f), the method
    add            β · (f − mean(f)) + γ
    none           β · f
    =============  ============================================

    Args:
        ef: [B] evaluation factors in [0, 1]; see `trl_margins.data.evaluation_factors`.
        gamma: γ in reward units.
        mapping: f, see `mapped_factor`.
        normalization: a row of the table.
        mean: mean of f over the whole training set; over these B without it.
        floor: smaller EFs count as this one, since log(1/0) is infinite.
        beta: β.

    Returns:
        [B] margins in reward units, in the dtype of the EFs, at least float32, without gradient. With equal EFs it is
        γ for every pair (scale, add), also where all completions are the same and the mean is 0.

    Raises:
        ValueError: an unknown mapping or normalization; a floor outside (0, 1).

    Source: GaPO, eqs. 5 to 9 and section 3.3. Eq. 5 multiplies the margin by β and eq. 9 does not; the published
        γ is SimPO's γ/β, so all three margins are β times the paper's, as in eqs. 5 and 6.
    """
    _check(mapping, normalization, floor)
    f = mapped_factor(ef, mapping, floor)
    if normalization == "none":
        return beta * f
    mean = torch.as_tensor(f.mean() if mean is None else mean, dtype=f.dtype, device=f.device)
    if normalization == "add":
        return beta * (f - mean) + gamma
    return gamma * torch.where(mean > 0, f / mean.clamp(min=torch.finfo(f.dtype).tiny), 1.0)


def _check(mapping: str, normalization: str, floor: float) -> None:
    if mapping not in get_args(FactorMapping):
        raise unknown("mapping", mapping, get_args(FactorMapping))
    if normalization not in get_args(Normalization):
        raise unknown("normalization", normalization, get_args(Normalization))
    if not 0 < floor < 1:
        raise ValueError(f"the floor of the evaluation factor lies between 0 and 1, not at {floor}")


class EvaluationFactorMargin(Term):
    """`evaluation_factor_margin` with the mean over the training set, which the checkpoint keeps.

    Args:
        gamma: γ in reward units.
        mapping, normalization, floor, beta: as in `evaluation_factor_margin`.
    """

    name: ClassVar[str] = "gap-aware"
    option_prefix: ClassVar[str] = "gap_aware_"
    holds_target: ClassVar[bool] = True
    columns = (FACTOR,)

    def __init__(
        self,
        gamma: float,
        mapping: FactorMapping = "log",
        normalization: Normalization = "scale",
        floor: float = FLOOR,
        beta: float = 1.0,
    ) -> None:
        _check(mapping, normalization, floor)
        # scaled, a negative target would give the most similar completions the largest margin
        Number(least=0 if normalization == "scale" else None).check("γ of GaPO", gamma)
        Number(above=0).check(f"beta of margin {self.name!r}", beta)
        self.gamma, self.mapping, self.normalization, self.floor = gamma, mapping, normalization, floor
        self.beta = beta
        self.mean: float | None = None
        self.n_floored: int | None = None  # training pairs below the floor

    def fit(self, columns: Mapping[str, Tensor]) -> None:
        """Takes the mean over a whole training set."""
        ef = columns[FACTOR]
        self.mean = mapped_factor(ef, self.mapping, self.floor).mean(dtype=torch.float64).item()
        self.n_floored = int((ef < self.floor).sum())
        logger.info(
            "evaluation factor of %d training pairs: mean margin factor %.4f; %d below the floor of %g count as it",
            len(ef),
            self.mean,
            self.n_floored,
            self.floor,
        )

    def __call__(self, view: PairView) -> Tensor:
        return evaluation_factor_margin(
            view[FACTOR], self.gamma, self.mapping, self.normalization, self.mean, self.floor, self.beta
        )

    def observed(self, view: PairView, value: Tensor) -> dict[str, Tensor]:
        """[B] EF and f(EF)."""
        ef = view[FACTOR]
        return {FACTOR: ef, "mapped_factor": mapped_factor(ef, self.mapping, self.floor)}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]
