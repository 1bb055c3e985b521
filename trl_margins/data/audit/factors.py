"""The evaluation factors of a split: of its column, or of a sample of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..evaluation_factors import check_evaluation_factors
from .distributions import Distribution, distribution

FACTOR = "evaluation_factor"


@dataclass(frozen=True)
class Factors:
    """Evaluation factors, the bad ones left out."""

    column: str | None
    metric: str | None  # of a sample
    values: Distribution | None
    n_zero: int
    n_one: int
    problem: str | None = None


def factors_of_column(values: Sequence[Any], split: str) -> Factors:
    """Of what the column `evaluation_factor` holds."""
    problem = None
    try:
        check_evaluation_factors(values, FACTOR, split)
    except ValueError as error:
        problem = str(error)
        values = [v for v in values if isinstance(v, Real) and not isinstance(v, bool) and 0 <= v <= 1]
    return _summary(values, column=FACTOR, problem=problem)


def factors_of_sample(values: Sequence[float]) -> Factors:
    """Of ROUGE-L, which the trainers take where there is no column."""
    return _summary(values, metric="rougeL")


def _summary(
    values: Sequence[float], column: str | None = None, metric: str | None = None, problem: str | None = None
) -> Factors:
    import numpy as np

    array = np.asarray(values, np.float64)
    return Factors(
        column=column,
        metric=metric,
        values=distribution(array, np.round(np.linspace(0, 1, 11), 12)),
        n_zero=int((array == 0).sum()),
        n_one=int((array == 1).sum()),
        problem=problem,
    )
