"""Mean, quantiles and histogram of some numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Histogram:
    """Counts between edges. The first and the last bar also hold what lies beyond them."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Distribution:
    """n numbers."""

    n: int
    mean: float
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    percentile_95: float
    maximum: float
    histogram: Histogram

    @property
    def reaches_beyond(self) -> tuple[bool, bool]:
        """Whether numbers lie below the histogram's first edge, and whether above its last."""
        return self.minimum < self.histogram.edges[0], self.maximum > self.histogram.edges[-1]


def distribution(values: np.ndarray, edges: np.ndarray | None = None) -> Distribution | None:
    """Of finite numbers; None of none."""
    import numpy as np

    if not len(values):
        return None
    edges = nice_edges(values) if edges is None else edges
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    quantiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 0.95, 1)).tolist()
    return Distribution(
        len(values), float(np.mean(values)), *quantiles, histogram=Histogram(edges.tolist(), counts.tolist())
    )


def nice_edges(values: np.ndarray, bars: int = 12) -> np.ndarray:
    """Edges at multiples of 1, 2 or 5 times a power of ten, of `bars` bars or a few less or more, around all numbers
    but the outermost half per cent on either side, so that one outlier does not squeeze all others into a bar. Whole
    numbers get no bar that none can fall into.
    """
    import numpy as np

    low, high = np.quantile(values, 0.005, method="lower"), np.quantile(values, 0.995, method="higher")
    if low == high:
        low, high = float(np.min(values)), float(np.max(values))
    raw = (high - low) / bars or 1.0
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if (np.mod(values, 1) == 0).all():
        step = max(step, 1.0)
    first, last = np.floor(low / step + 1e-9), np.floor(high / step + 1e-9) + 1
    return np.round(np.arange(first, last + 1) * step, 12)
