"""Finding the annotation scores of a preference set, and refusing bad ones before training starts."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

# Names on the Hub, in the order in which they are looked for
PAIRED_COLUMNS: tuple[tuple[str, str], ...] = (
    ("score_chosen", "score_rejected"),  # UltraFeedback binarized
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),  # Argilla's UltraFeedback
    ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
)
GAP_COLUMNS: tuple[str, ...] = ("margin", "score_gap", "score_margin")  # the gap itself, as reward trainers take it

# Past any annotator's scale. Squared as a weight, and squared again in a gradient's norm, it is still a float32
LARGEST_SCORE = 1e6


class ScoreError(ValueError):
    """Scores that cannot be trained on; the text names column, row, value and the fix."""


@dataclass(frozen=True)
class ScoreColumns:
    """Where a data set keeps its scores. Without `rejected`, `chosen` holds the gap and the rejected score is 0."""

    chosen: str
    rejected: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)

    def is_gap(self, rejected_scores: Iterable[float]) -> bool:
        """Whether the scores, as they were read, stand for nothing but their difference."""
        return self.rejected is None and not any(rejected_scores)

    def read(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """(score_chosen, score_rejected) of one row; a value that is no score stays as it is.

        Numbers written as text are numbers. A list, which is the scores of all responses, counts as the highest and
        the lowest.
        """
        chosen = row.get(self.chosen)
        if self.rejected is None:
            return _extremes(chosen) if isinstance(chosen, list) else (as_number(chosen), 0.0)
        return as_number(chosen), as_number(row.get(self.rejected))


def as_number(value: Any) -> Any:
    """The number that a text spells, else the value."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


def _extremes(scores: list[Any]) -> tuple[Any, Any]:
    numbers = [as_number(score) for score in scores]
    bad = next((score for score in numbers if problem_of(score)), None)
    if bad is not None or not numbers:
        return bad, bad
    return max(numbers), min(numbers)


def find_score_columns(
    column_names: Iterable[str], given: Sequence[str] | None = None, strict: bool = True
) -> ScoreColumns | None:
    """The score columns among `column_names`: the `given` ones, or the first known pair, or a known gap column.

    Args:
        column_names: of a data set.
        given: what a user named.
        strict: given names that are not there are an error, and not a set without scores.

    Raises:
        ScoreError: `given` names a column that is not there, or more than two.
    """
    names = list(column_names)
    if given is not None:
        if not 1 <= len(given) <= 2:
            raise ScoreError(f"score_columns takes one gap column or two score columns, got {list(given)}")
        missing = [name for name in given if name not in names]
        if missing and not strict:
            return None
        if missing:
            raise ScoreError(f"score_columns names {missing}, but the data set has only the columns {names}")
        return ScoreColumns(*given)
    return next(iter(known_score_columns(names)), None)


def known_score_columns(column_names: Iterable[str]) -> list[ScoreColumns]:
    """All that could be meant, the first of which is taken."""
    names = set(column_names)
    pairs = [ScoreColumns(*pair) for pair in PAIRED_COLUMNS if names.issuperset(pair)]
    return pairs + [ScoreColumns(name) for name in GAP_COLUMNS if name in names]


def require_score_columns(
    column_names: Iterable[str], given: Sequence[str] | None, needed_by: str, split: str
) -> ScoreColumns:
    """`find_score_columns`, where a data set without scores is an error.

    Raises:
        ScoreError: no score column, naming those there are.
    """
    names = list(column_names)
    columns = find_score_columns(names, given)
    if columns is None:
        known = ", ".join("/".join(pair) for pair in PAIRED_COLUMNS) + ", " + ", ".join(GAP_COLUMNS)
        half = next((pair for pair in PAIRED_COLUMNS if set(pair) & set(names)), None)
        alone = f" {' and '.join(half)} would be scores, but only one of them is there." if half else ""
        raise ScoreError(
            f"{needed_by} needs annotation scores, and the {split} data set has none: its columns are {names}.{alone} "
            f"Known score columns are {known}; name yours with score_columns=[chosen, rejected] (--score_columns "
            "CHOSEN REJECTED), or one column that holds the gap, or the list of all responses' scores"
        )
    return columns


@dataclass(frozen=True)
class ScoreSummary:
    """What the scores of one data set look like."""

    n_pairs: int
    n_ties: int
    n_reversed: int
    max_gap: float
    n_at_least: int  # pairs with |gap| ≥ the evaluation's threshold


def check_scores(dataset: Dataset, columns: ScoreColumns, split: str, min_score_gap: float = 0.0) -> ScoreSummary:
    """Checks every score of a data set and counts what a trainer should know.

    Raises:
        ScoreError: a score that is None, NaN, infinite, too large or not a number, with its column and first row.
    """
    import numpy as np

    refuse_class_labels(dataset, columns, split)
    values = [_checked_column(dataset, name, split, takes_lists=columns.rejected is None) for name in columns.names]
    gaps = values[0] - values[1] if len(values) == 2 else values[0]
    return ScoreSummary(
        n_pairs=len(gaps),
        n_ties=int((gaps == 0).sum()),
        n_reversed=int((gaps < 0).sum()),
        max_gap=float(np.abs(gaps).max(initial=0.0)),
        n_at_least=int((np.abs(gaps) >= min_score_gap).sum()),
    )


def refuse_class_labels(dataset: Any, columns: ScoreColumns, split: str) -> None:
    """
    Raises:
        ScoreError: a column of class labels, whose values are the indices of names.
    """
    from datasets import ClassLabel

    for name in columns.names:
        feature = (getattr(dataset, "features", None) or {}).get(name)
        if isinstance(feature, ClassLabel):
            raise ScoreError(
                f"column {name!r} of the {split} data set holds class labels: its values are the places of "
                f"{feature.names[:5]}, not scores. Put numbers for the names, or name other columns with "
                "score_columns (--score_columns)"
            )


def report_scores(summary: ScoreSummary, columns: ScoreColumns, split: str, weighted: bool) -> None:
    """Logs the counts; warns where most pairs are ties and a weight term will drop them."""
    logger.info(
        "%s scores from %s: %d pairs, %d ties%s, %d whose rejected answer scores higher",
        split,
        "/".join(columns.names),
        summary.n_pairs,
        summary.n_ties,
        " (weight 0)" if weighted else "",
        summary.n_reversed,
    )
    if summary.n_reversed * 2 > summary.n_pairs - summary.n_ties:
        logger.warning(
            "in %d of %d %s pairs the rejected completion scores higher: see that %s are not swapped, and that a "
            "higher score is the better one",
            summary.n_reversed,
            summary.n_pairs,
            split,
            " and ".join(columns.names),
        )
    if weighted and summary.n_ties * 2 > summary.n_pairs:
        logger.warning(
            "%d of %d %s pairs are ties: their score gap is 0, so they weigh nothing and training sees only the other "
            "%d. If that is not meant, check that %s hold the scores of the two completions",
            summary.n_ties,
            summary.n_pairs,
            split,
            summary.n_pairs - summary.n_ties,
            " and ".join(columns.names),
        )


def _checked_column(dataset: Dataset, name: str, split: str, takes_lists: bool) -> Any:
    """A column as float64, by way of Arrow: no Python object per row where the values are numbers."""
    import numpy as np
    import pyarrow as pa

    if not len(dataset):
        return np.empty(0)
    plain = dataset.select_columns([name]).with_format(None)
    column = plain.with_format("arrow")[:][name]
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        values = column.to_numpy().astype(np.float64)
        bad = ~(np.abs(values) <= LARGEST_SCORE)
        if not bad.any():
            return values
        row, count = int(bad.argmax()), int(bad.sum())
        raise ScoreError(_complaint(column[row].as_py(), name, f"row {row} of the {split} data set", count))
    cells = plain[:][name]  # not Arrow's own: a column of mixed types holds JSON there
    values = [spread(value) if takes_lists and isinstance(value, list) else as_number(value) for value in cells]
    rows = [row for row, value in enumerate(values) if problem_of(value)]
    if rows:
        raise ScoreError(_complaint(cells[rows[0]], name, f"row {rows[0]} of the {split} data set", len(rows)))
    return np.array(values, np.float64)


def spread(scores: list[Any]) -> Any:
    """The highest score minus the lowest; of a list with a value that is no score, that value."""
    highest, lowest = _extremes(scores)
    return highest if problem_of(highest) else highest - lowest


def check_numbers(dataset: Dataset, name: str, split: str, least: float | None = None) -> None:
    """Checks a column that a term reads: numbers of any size, or truth values.

    Args:
        dataset: has the column.
        name: of the column.
        split: of the data set.
        least: the smallest value that it may have.

    Raises:
        ScoreError: a value that is None, NaN, infinite or not a number, with its column and first row.
    """
    for row, value in enumerate(dataset.select_columns([name]).with_format(None)[:][name]):
        _check_number(value, name, row, split, least)


def checked_stream(dataset: IterableDataset, name: str, split: str, least: float | None = None) -> IterableDataset:
    """The same stream, which checks a column as `check_numbers` does, row by row."""

    def checked(row: dict[str, Any], number: int) -> dict[str, Any]:
        _check_number(row[name], name, number, split, least)
        return row

    return dataset.map(checked, with_indices=True, features=dataset.features)


def _check_number(value: Any, name: str, row: int, split: str, least: float | None) -> None:
    where = f"column {name!r}, row {row} of the {split} data set"
    problem = None if isinstance(value, bool) else _not_finite(value)
    if problem:
        raise ScoreError(f"{where}: the value {value!r} {problem}")
    if least is not None and as_number(value) < least:
        raise ScoreError(
            f"{where}: the value {value!r} is below {least:g}: change it with dataset.map, or drop the row"
        )


def problem_of(value: Any) -> str | None:
    """What keeps a value from being a score, and the fix; None where it is one."""
    if problem := _not_finite(value):
        return problem
    if abs(as_number(value)) > LARGEST_SCORE:
        return f"is too large to train with (more than {LARGEST_SCORE:g}): divide the column, or drop the row"
    return None


def _not_finite(value: Any) -> str | None:
    value = as_number(value)
    if value is None:
        return "is None: drop the row, for example with dataset.filter"
    if isinstance(value, str):
        return "is not a number: put numbers for such words with dataset.map, or drop the row"
    if isinstance(value, bool) or not isinstance(value, Real):
        return "is not a number: give each row one, for example with dataset.map"
    if value != value:
        return "is NaN: drop the row, for example with dataset.filter"
    return "is infinite: clip it or drop the row" if abs(value) == math.inf else None


def check_row(row: Mapping[str, Any], columns: ScoreColumns, where: str) -> None:
    """The same check for one row of a stream, whose scores nobody could check in advance.

    Raises:
        ScoreError: as `check_scores`.
    """
    for name, value in zip(columns.names, columns.read(row), strict=False):
        if problem_of(value):
            raise ScoreError(_complaint(row.get(name), name, where, 1))


def _complaint(value: Any, column: str, where: str, count: int) -> str:
    others = f" ({count} such rows in all)" if count > 1 else ""
    problem = (isinstance(value, list) and problem_of(_extremes(value)[0])) or problem_of(value)
    return f"column {column!r}, {where}: the score {value!r} {problem}{others}"
