"""The score columns of a split: their gaps, and what in them is no score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from ...rows.scores import LARGEST_SCORE, as_number, find_score_columns, spread
from .distributions import Distribution, distribution
from .reading import shortened

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

_KINDS = ("None", "NaN", "infinite", "too large", "not a number", "a class label")  # of what `problem_of` refuses
_SEVERAL = {"not a number": "not numbers", "a class label": "class labels"}


@dataclass(frozen=True)
class BadScores:
    """What is wrong with a score column: how many values of each kind, and the first."""

    column: str
    counts: dict[str, int]
    first_row: int
    first_value: str

    def kinds(self) -> str:
        """In words, such as "1 value that is None and 2 values that are infinite"."""
        counts = " and ".join(_counted(kind, n) for kind, n in self.counts.items())
        return f"{counts}, the first in row {self.first_row} ({self.first_value})"


def _counted(kind: str, n: int) -> str:
    if n == 1:
        return f"1 value that is {kind}"
    return f"{n} values that are {_SEVERAL.get(kind, kind)}"


@dataclass(frozen=True)
class Scores:
    """Gaps score_chosen − score_rejected of the pairs whose scores are numbers; None of no such pair."""

    columns: list[str]
    bad: list[BadScores]
    min_score_gap: float
    gap: Distribution | None
    n_ties: int
    n_reversed: int
    n_at_least: int  # pairs with |gap| ≥ min_score_gap, as the evaluation counts


def score_gaps(dataset: Dataset, given: Sequence[str] | None, min_score_gap: float) -> Scores | None:
    """None of a split without score columns.

    Raises:
        ScoreError: `given` names columns that are not there.
    """
    import numpy as np

    columns = find_score_columns(dataset.column_names, given)
    if columns is None:
        return None
    read = [_column(dataset, name, takes_lists=columns.rejected is None) for name in columns.names]
    gaps = read[0][0] - read[1][0] if len(read) == 2 else read[0][0]
    gaps = gaps[~np.isnan(gaps)]
    return Scores(
        columns=list(columns.names),
        bad=[bad for _, bad in read if bad],
        min_score_gap=min_score_gap,
        gap=distribution(gaps),
        n_ties=int((gaps == 0).sum()),
        n_reversed=int((gaps < 0).sum()),
        n_at_least=int((np.abs(gaps) >= min_score_gap).sum()),
    )


def _column(dataset: Dataset, name: str, takes_lists: bool) -> tuple[np.ndarray, BadScores | None]:
    """A column with NaN for all that is no score, and what that was."""
    import numpy as np
    from datasets import ClassLabel

    given = dataset.select_columns([name]).with_format(None)[:][name]
    cells = [spread(value) if takes_lists and isinstance(value, list) else as_number(value) for value in given]
    labels = isinstance(dataset.features[name], ClassLabel)
    kinds = ["a class label" if labels else _kind(cell) for cell in cells]
    values = np.array([np.nan if kind else cell for cell, kind in zip(cells, kinds, strict=True)], np.float64)
    counts = {kind: n for kind in _KINDS if (n := kinds.count(kind))}
    if not counts:
        return values, None
    row = next(i for i, kind in enumerate(kinds) if kind)
    return values, BadScores(name, counts, row, shortened(repr(given[row])))


def _kind(value: Any) -> str | None:
    if value is None:
        return "None"
    if isinstance(value, bool) or not isinstance(value, Real):
        return "not a number"
    if value != value:
        return "NaN"
    if abs(value) > LARGEST_SCORE:
        return "infinite" if abs(value) == math.inf else "too large"
    return None
