"""The margins that GaPO would make, for every metric, mapping and normalisation: its figure 2 and table 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from ...methods import METHODS
from ...terms.evaluation_factor import FactorMapping, Normalization, evaluation_factor_margin
from .counting import Distribution, distribution, nice_edges

GAMMA_BETA_RATIO: float = METHODS["gap-aware"].defaults["gamma_beta_ratio"]
BINS = 40


@dataclass(frozen=True)
class FactorMargins:
    """Evaluation factors of one metric, and the margins from them."""

    metric: str  # or the column that holds them
    n_zero: int
    n_one: int
    factors: Distribution
    margins: dict[str, dict[str, Distribution]]  # mapping → normalization → margin / β; "none" is f(EF) itself


def factor_margins(factors: Mapping[str, np.ndarray]) -> list[FactorMargins]:
    """Of each metric that has any, with the method's γ/β and floor.

    Args:
        factors: metric → [N] numbers in [0, 1].
    """
    return [
        FactorMargins(
            metric,
            n_zero=int((values == 0).sum()),
            n_one=int((values == 1).sum()),
            factors=_distribution(values),
            margins={
                mapping: {name: _distribution(_margin(values, mapping, name)) for name in get_args(Normalization)}
                for mapping in get_args(FactorMapping)
            },
        )
        for metric, values in factors.items()
        if len(values)
    ]


def _margin(factors: np.ndarray, mapping: FactorMapping, normalization: Normalization) -> np.ndarray:
    return evaluation_factor_margin(torch.from_numpy(factors), GAMMA_BETA_RATIO, mapping, normalization).numpy()


def _distribution(values: np.ndarray) -> Distribution:
    found = distribution(values, nice_edges(values, BINS))
    assert found is not None  # there are values
    return found
