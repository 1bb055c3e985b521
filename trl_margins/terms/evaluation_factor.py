"""GaPO: a margin from the texts: the less alike the two answers are, the larger."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..checks import Number, unknown
from ..pairs import PairBatch

Mapping = Literal["log", "linear", "square", "sqrt"]
Normalization = Literal["scale", "add", "none"]
FLOOR = 0.01


def mapped_factor(ef: Tensor, mapping: Mapping = "log", floor: float = FLOOR) -> Tensor:
    """f(EF): log(1/EF), 1 − EF, 1 − EF² or 1 − √EF, with EF clipped to [floor, 1].

    Answers that are the same (EF = 1) have f = 0 under every mapping.

    Raises:
        ValueError: an unknown mapping; a floor outside (0, 1).
    """
    _check(mapping, "scale", floor)
    ef = ef.detach().float().clamp(floor, 1.0)
    if mapping == "log":
        return -ef.log()
    if mapping == "linear":
        return 1 - ef
    return 1 - (ef.square() if mapping == "square" else ef.sqrt())


def evaluation_factor_margin(
    ef: Tensor,
    gamma: float,
    mapping: Mapping = "log",
    normalization: Normalization = "scale",
    mean: Tensor | float | None = None,
    floor: float = FLOOR,
) -> Tensor:
    r"""Margin per pair from the evaluation factor EF, the likeness of the two answers.

    =============  ==========================
    normalization  margin
    =============  ==========================
    scale          γ · f / mean(f), the method
    add            f − mean(f) + γ
    none           f
    =============  ==========================

    Args:
        ef: [B] evaluation factors in [0, 1]; see `trl_margins.data.evaluation_factors`.
        gamma: γ in reward units.
        mapping: f, see `mapped_factor`.
        normalization: a row of the table.
        mean: mean of f over the whole training set; over these B without it.
        floor: smaller EFs count as this one, since log(1/0) is no margin.

    Returns:
        [B] margins in reward units, float32, without gradient. With equal EFs it is γ for every pair (scale, add),
        also where all answers are the same and the mean is 0.

    Raises:
        ValueError: an unknown mapping or normalization; a floor outside (0, 1).

    Source: GaPO, eqs. 5 to 9 and section 3.3. Eq. 5 multiplies the margin by β and eq. 9 does not; the published
        γ is SimPO's γ/β, so γ here has β inside.
    """
    _check(mapping, normalization, floor)
    f = mapped_factor(ef, mapping, floor)
    if normalization == "none":
        return f
    mean = torch.as_tensor(f.mean() if mean is None else mean, dtype=f.dtype, device=f.device)
    if normalization == "add":
        return f - mean + gamma
    return gamma * torch.where(mean > 0, f / mean.clamp(min=torch.finfo(f.dtype).tiny), 1.0)


def _check(mapping: str, normalization: str, floor: float) -> None:
    if mapping not in get_args(Mapping):
        raise unknown("mapping", mapping, get_args(Mapping))
    if normalization not in get_args(Normalization):
        raise unknown("normalization", normalization, get_args(Normalization))
    if not 0 < floor < 1:
        raise ValueError(f"the floor of the evaluation factor lies between 0 and 1, not at {floor}")


class EvaluationFactorMargin:
    """`evaluation_factor_margin` with the mean over the training set, which the checkpoint keeps.

    Args:
        gamma: γ in reward units.
        mapping, normalization, floor: as in `evaluation_factor_margin`.
    """

    name: ClassVar[str] = "gap-aware"
    holds_target: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("evaluation_factor",)

    def __init__(
        self, gamma: float, mapping: Mapping = "log", normalization: Normalization = "scale", floor: float = FLOOR
    ) -> None:
        _check(mapping, normalization, floor)
        # scaled, a negative target would give the most alike answers the largest margin
        Number(least=0 if normalization == "scale" else None).check("γ of GaPO", gamma)
        self.gamma, self.mapping, self.normalization, self.floor = gamma, mapping, normalization, floor
        self.mean: float | None = None

    def fit(self, ef: Tensor) -> int:
        """Takes the mean over a whole training set; returns how many EFs lie below the floor."""
        self.mean = mapped_factor(ef, self.mapping, self.floor).mean(dtype=torch.float64).item()
        return int((ef < self.floor).sum())

    def __call__(self, batch: PairBatch, reward_gap: Tensor) -> Tensor:
        ef = batch["evaluation_factor"]
        return evaluation_factor_margin(ef, self.gamma, self.mapping, self.normalization, self.mean, self.floor)

    def observed(self, batch: PairBatch, reward_gap: Tensor, margin: Tensor) -> dict[str, Tensor]:
        """[B] EF and f(EF)."""
        ef = batch["evaluation_factor"]
        return {"evaluation_factor": ef, "mapped_factor": mapped_factor(ef, self.mapping, self.floor)}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]
