"""A weight or a margin that the data set says: one number per pair, in a column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..checks import Number, unknown
from ..pairs import FACTOR, ROW, SCORES, PairView
from . import Term

Unit = Literal["reward", "gamma_beta_ratio"]


def _check(option: str, column: str) -> None:
    if not isinstance(column, str) or not column:
        raise ValueError(f"{option} must be the name of a column; it is {column!r}")
    if column in (*SCORES, FACTOR, ROW):
        raise ValueError(
            f"{option} cannot be {column!r}, a name under which the package carries numbers of its own: rename the "
            "column with dataset.rename_column"
        )


class ColumnWeight(Term):
    """The weight of each pair is the value of a column, at least 0.

    Args:
        column: its name in the data set.
    """

    name: ClassVar[str] = "column"
    option_prefix: ClassVar[str] = "weight_"
    column_minimum: ClassVar[float | None] = 0.0

    def __init__(self, column: str) -> None:
        _check("weight_column", column)
        self.column, self.columns = column, (column,)
        self.keeps_only = "pairs with a value above 0 (weight_column)"

    def __call__(self, view: PairView) -> Tensor:
        return view[self.column]

    def keeps(self, columns: Mapping[str, Tensor]) -> Tensor:
        return columns[self.column] > 0


class ColumnMargin(Term):
    """The whole target margin of each pair is the value of a column; no γ is added.

    Args:
        column: its name in the data set.
        column_unit: "reward" for reward units, β inside, as TRL's `simpo_gamma`; "gamma_beta_ratio" for the same
            divided by β, as SimPO's code gives γ.
        beta: β, for "gamma_beta_ratio".
    """

    name: ClassVar[str] = "column"
    option_prefix: ClassVar[str] = "margin_"
    holds_target: ClassVar[bool] = True

    def __init__(self, column: str, column_unit: Unit, beta: float = 1.0) -> None:
        if column_unit not in get_args(Unit):
            raise unknown("margin_column_unit", column_unit, get_args(Unit))
        _check("margin_column", column)
        Number(above=0).check(f"beta of margin {self.name!r}", beta)
        self.column, self.columns = column, (column,)
        self.column_unit, self.scale = column_unit, beta if column_unit == "gamma_beta_ratio" else 1.0

    def __call__(self, view: PairView) -> Tensor:
        return self.scale * view[self.column]
