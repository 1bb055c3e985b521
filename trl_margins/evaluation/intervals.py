"""Bootstrap intervals of several metrics at once, and Student's over seeds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

Numbers = Mapping[str, float | None]


def bootstrap_intervals(
    numbers: Callable[[np.ndarray], Numbers],
    clusters: Sequence[Hashable],
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals; whole clusters are drawn, with replacement.

    Pairs of one prompt are correlated, so drawing them one by one would make intervals too narrow.

    Args:
        numbers: from row numbers [n] (possibly repeated) to metrics by name; None where one is undefined.
        clusters: [M] the cluster of each row: its prompt.
        n_resamples: how many samples are drawn.
        seed: of the draws.

    Returns:
        (low, high) by name; None if there is only one cluster, or if a metric is undefined in too many resamples.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for i, cluster in enumerate(clusters):
        rows_of.setdefault(cluster, []).append(i)
    groups = [np.array(rows) for rows in rows_of.values()]
    names = list(numbers(np.arange(len(clusters))))
    if len(groups) < 2:
        return dict.fromkeys(names)
    rng = np.random.default_rng(seed)
    drawn = np.empty((n_resamples, len(names)))
    for row in drawn:
        picked = rng.integers(0, len(groups), len(groups))
        found = numbers(np.concatenate([groups[g] for g in picked]))
        row[:] = [np.nan if found[name] is None else found[name] for name in names]
    return {name: percentile_interval(column) for name, column in zip(names, drawn.T, strict=True)}


def percentile_interval(drawn: ArrayLike) -> tuple[float, float] | None:
    """The middle 95 % of resampled values; None if more than 5 % of them are undefined (NaN)."""
    values = np.asarray(drawn, float)
    if np.isnan(values).mean() > 0.05:
        return None
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def student_interval(values: ArrayLike) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval; NaN for a single value.

    Args:
        values: [n] one per run; for two methods compared on the same seeds, the differences by seed.
    """
    numbers = np.asarray(values, float)
    n = numbers.size
    half = t.ppf(0.975, n - 1) * numbers.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return float(numbers.mean()), float(half)
