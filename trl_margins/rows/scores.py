"""Finds the annotation scores of a preference set, and refuses bad ones before training starts."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset

from ..checks import why_look_alike
from ..pairs import IS_FLIPPED, has_gap
from .list_forms import is_rank

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

# Beyond any annotator's scale. Squared as a weight, and again in the gradient's norm, it still fits a float32
LARGEST_FLOAT = float(np.finfo(np.float32).max)
LARGEST_SCORE = 1e6

_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


class ScoreError(ValueError):
    """Scores that cannot be trained on. The message names the column, the row, the value and the fix."""


@dataclass(frozen=True)
class ScoreColumns:
    """Where a data set keeps its scores. Without `rejected`, `chosen` holds the gap and the rejected score is 0."""

    chosen: str
    rejected: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)

    def doubts(self, column_names: Iterable[str]) -> Iterator[str]:
        """What may be meant otherwise, by the names of the columns; one sentence each."""
        pair = next((pair for pair in PAIRED_COLUMNS if self.chosen in pair and {*pair} <= {*column_names}), ())
        if self.rejected is None and pair:
            yield (
                f"score_columns names {self.chosen!r} alone, which is read as the gap, and the data set has "
                f"{pair[0]!r} and {pair[1]!r}: if they are scores, name both (--score_columns {' '.join(pair)})"
            )
        if ranks := list(filter(is_rank, self.names)):
            yield (
                f"by its name, {ranks[0]!r} holds ranks: it is read as a score, of which the higher is the better. If "
                "the lowest rank is the best, negate it with dataset.map"
            )

    def is_gap(self, rejected_scores: Iterable[float]) -> bool:
        """Whether only the difference of the scores, as they were read, has a meaning."""
        return self.rejected is None and not any(rejected_scores)

    def read(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """(score_chosen, score_rejected) of one row; a value that is not a score is returned as it is.

        Numbers written as text are numbers. Of a list, which holds the scores of all responses, the highest and the
        lowest count.
        """
        chosen = row.get(self.chosen)
        if self.rejected is None:
            return _extremes(chosen) if isinstance(chosen, list) else (as_number(chosen), 0.0)
        return as_number(chosen), as_number(row.get(self.rejected))


def as_number(value: Any) -> Any:
    """The number that a text spells or a database's decimal is, else the value."""
    is_written = isinstance(value, str) and _NUMBER.fullmatch(value)
    return float(value) if is_written or isinstance(value, Decimal) else value


def _extremes(scores: list[Any]) -> tuple[Any, Any]:
    numbers = [as_number(score) for score in scores]
    # of one there is no difference
    bad = [score for score in numbers if problem_of(score)] if len(numbers) > 1 else [scores or None]
    return (bad[0], bad[0]) if bad else (max(numbers), min(numbers))


def spread(scores: list[Any]) -> Any:
    """The highest score minus the lowest; of a list with a value that is not a score, that value."""
    highest, lowest = _extremes(scores)
    return highest if problem_of(highest) else highest - lowest


def find_score_columns(
    column_names: Iterable[str], given: Sequence[str] | None = None, strict: bool = True
) -> ScoreColumns | None:
    """The score columns among `column_names`: the `given` ones, or the first known pair, or a known gap column.

    A given column that is missing is a ScoreError, or, if not `strict`, the set is one without scores.
    """
    names = list(column_names)
    if given is None:
        # one beside its other half: a column that nothing reads may look like anything
        halves = [pair for pair in PAIRED_COLUMNS if {*pair} & {*names}]
        if why := why_look_alike(names, chain(*halves)):
            raise ScoreError(f"the scores: {why}")
        return next(iter(known_score_columns(names)), None)
    check_given(given)
    if missing := [name for name in given if name not in names]:
        if not strict:
            return None
        raise ScoreError(f"score_columns names {missing}, but the data set has only the columns {names}")
    return ScoreColumns(*given)


def warn_of_doubts(columns: ScoreColumns, column_names: Iterable[str], split: str) -> None:
    """Logs what `ScoreColumns.doubts` says, where the columns of a set have been found."""
    for doubt in columns.doubts(column_names):
        logger.warning("%s: %s", split, doubt)


def check_given(given: Sequence[str]) -> None:
    """
    Raises:
        ScoreError: more than two score columns, or none, or one twice.
    """
    check_once(given)
    if not 1 <= len(given) <= 2:
        raise ScoreError(f"score_columns takes one gap column or two score columns, got {list(given)}")


def check_once(given: Sequence[str]) -> None:
    """
    Raises:
        ScoreError: a score column that is named twice.
    """
    if twice := [name for name in given if list(given).count(name) > 1]:
        raise ScoreError(f"score_columns names {twice[0]!r} twice: name each column once")


def known_score_columns(column_names: Iterable[str]) -> list[ScoreColumns]:
    """All candidates; the first one is used."""
    names = set(column_names)
    pairs = [ScoreColumns(*pair) for pair in PAIRED_COLUMNS if names.issuperset(pair)]
    return pairs + [ScoreColumns(name) for name in GAP_COLUMNS if name in names]


def require_score_columns(
    column_names: Iterable[str], given: Sequence[str] | None, needed_by: str, split: str
) -> ScoreColumns:
    """`find_score_columns`, where a data set without scores is a ScoreError."""
    names = list(column_names)
    if columns := find_score_columns(names, given):
        return columns
    known = ", ".join("/".join(pair) for pair in PAIRED_COLUMNS) + ", " + ", ".join(GAP_COLUMNS)
    half = next((pair for pair in PAIRED_COLUMNS if set(pair) & set(names)), None)
    alone = f" {' and '.join(half)} would be scores, but only one of them is there." if half else ""
    raise ScoreError(
        f"{needed_by} needs annotation scores, and the {split} data set has none: its columns are {names}.{alone} "
        f"Known score columns are {known}; name yours with score_columns=[chosen, rejected] (--score_columns "
        "CHOSEN REJECTED), or one column that holds the gap, or the list of all responses' scores"
    )


@dataclass(frozen=True)
class ScoreSummary:
    """Counts over the scores of one data set."""

    n_pairs: int
    n_ties: int
    n_reversed: int
    max_gap: float
    n_at_least: int  # pairs with |gap| ≥ the evaluation's threshold
    n_changed: int  # by `changed_gaps`


def changed_gaps(scores: Sequence[np.ndarray]) -> int:
    """How many gaps are another by more than a hundredth in float32, in which a batch has the scores.

    Args:
        scores: [N] of the chosen and [N] of the rejected completions, or [N] gaps alone.
    """
    if len(scores) == 1:
        return 0
    chosen, rejected = scores
    gaps = chosen - rejected
    in_a_batch = chosen.astype(np.float32) - rejected.astype(np.float32)
    return int((np.abs(in_a_batch - gaps) > 0.01 * np.abs(gaps)).sum())


def why_changed(n: int, names: Iterable[str]) -> str:
    return (
        f"score gaps: {n} are another by more than 1 % in float32, in which training has the scores "
        f"({'/'.join(names)}), as these are large beside them: subtract the same number from both scores of a pair"
    )


def check_scores(dataset: Dataset, columns: ScoreColumns, split: str, min_score_gap: float = 0.0) -> ScoreSummary:
    """Checks every score of a data set, and counts ties, reversed pairs and clear pairs.

    Raises:
        ScoreError: a score that is None, NaN, infinite, too large or not a number, with its column and first row.
    """
    refuse_class_labels(dataset, columns, split)
    values = [_checked_column(dataset, name, split, takes_lists=columns.rejected is None) for name in columns.names]
    one, other = (values[0], values[1] if len(values) == 2 else np.zeros(len(dataset)))
    gaps = one - other
    return ScoreSummary(
        n_pairs=len(gaps),
        n_ties=int((gaps == 0).sum()),
        n_reversed=int((gaps < 0).sum()),
        max_gap=float(np.abs(gaps).max(initial=0.0)),
        n_at_least=int(has_gap(one, other, min_score_gap).sum()),
        n_changed=changed_gaps(values),
    )


def _checked_column(dataset: Dataset, name: str, split: str, takes_lists: bool) -> np.ndarray:
    def number(value: Any) -> Any:
        return spread(value) if takes_lists and isinstance(value, list) else as_number(value)

    values = _values(dataset, name)
    refuse_bad_values(values, lambda value: problem_of(number(value)), name, split, "score")
    return np.array(list(map(number, values)), np.float64)


def _values(dataset: Dataset, name: str) -> list[Any]:
    return list(dataset.with_format(None, columns=[name])[:][name])


def check_numbers(dataset: Dataset, name: str, split: str, least: float | None = None) -> None:
    """Raises a ScoreError if a column that a term reads has other values than numbers from `least` on, or booleans."""
    refuse_bad_values(_values(dataset, name), lambda value: _number_problem(value, least), name, split, "value")


def count_flipped(dataset: Dataset, split: str) -> int:
    """How many pairs are marked as having their labels flipped; a ScoreError as `check_numbers`."""

    def problem(value: Any) -> str | None:
        return "is None: fill it with 0, or remove the column" if value is None else _number_problem(value, None)

    values = _values(dataset, IS_FLIPPED)
    refuse_bad_values(values, problem, IS_FLIPPED, split, "value")
    return sum(as_number(value) == 1 for value in values)


def checked_stream(dataset: IterableDataset, name: str, split: str, least: float | None = None) -> IterableDataset:
    """The same stream, whose column is checked as `check_numbers` does, row by row."""

    def checked(row: dict[str, Any], number: int) -> dict[str, Any]:
        if problem := _number_problem(row[name], least):
            raise ScoreError(
                f"column {name!r}, row {number} of the {split} data set: the value {row[name]!r} {problem}"
            )
        return row

    return dataset.map(checked, with_indices=True, features=dataset.features)


def _number_problem(value: Any, least: float | None) -> str | None:
    if isinstance(value, bool):
        return None
    if problem := _not_finite(value):
        return problem
    if abs(as_number(value)) > LARGEST_FLOAT:
        return "is not a float32 number: scale the column"
    if least is not None and as_number(value) < least:
        return f"is below {least:g}: change it with dataset.map, or drop the row"
    return None


def refuse_bad_values(
    values: Sequence[Any], problem_of: Callable[[Any], str | None], column: str, split: str, what: str
) -> None:
    """Raises a ScoreError if a value has a problem, with the column, the first row and the number of such rows."""
    if rows := [row for row, value in enumerate(values) if problem_of(value)]:
        value, others = values[rows[0]], f" ({len(rows)} such rows in all)" if len(rows) > 1 else ""
        where = f"column {column!r}, row {rows[0]} of the {split} data set"
        raise ScoreError(f"{where}: the {what} {value!r} {problem_of(value)}{others}")


def check_row(row: Mapping[str, Any], columns: ScoreColumns, where: str) -> None:
    """The check of `check_scores` for one row of a stream, whose scores cannot be checked in advance."""
    for name, value in zip(columns.names, columns.read(row), strict=False):
        if problem := problem_of(value):
            raise ScoreError(f"column {name!r}, {where}: the score {row.get(name)!r} {problem}")


def refuse_class_labels(dataset: Any, columns: ScoreColumns, split: str) -> None:
    """Raises a ScoreError for a column of class labels, whose values are indices of names."""
    for name in columns.names:
        feature = (getattr(dataset, "features", None) or {}).get(name)
        feature = getattr(feature, "feature", feature)  # of a list
        if isinstance(feature, ClassLabel):
            raise ScoreError(
                f"column {name!r} of the {split} data set holds class labels: its values are indices into "
                f"{feature.names[:5]}, not scores. Replace the names by numbers, or name other columns with "
                "score_columns (--score_columns)"
            )


def problem_of(value: Any) -> str | None:
    """Why a value is not a score, and the fix; None for a score."""
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
        if _NUMBER.fullmatch(value.replace("\u2212", "-")):
            return "is not a number, for its minus is no hyphen: replace it with dataset.map"
        return "is not a number: replace such words by numbers with dataset.map, or drop the row"
    if isinstance(value, bool) or not isinstance(value, Real):
        return "is not a number: give each row one, for example with dataset.map"
    if value != value:
        return "is NaN: drop the row, for example with dataset.filter"
    return "is infinite: clip it or drop the row" if abs(value) == math.inf else None


def report_scores(summary: ScoreSummary, columns: ScoreColumns, split: str) -> None:
    """Warns where most pairs are reversed, or gaps are lost; the counts are said before the first step."""
    n, ties = summary.n_pairs, summary.n_ties
    logger.debug(
        f"{split} scores from {'/'.join(columns.names)}: {n} pairs, {ties} ties, "
        f"{summary.n_reversed} whose rejected completion scores higher"
    )
    if summary.n_changed:
        logger.warning("%s: %s", split, why_changed(summary.n_changed, columns.names))
    if summary.n_reversed * 2 > n - ties:
        order = f"{columns.chosen} and {columns.rejected} are not swapped"
        if columns.rejected is None:
            order = f"{columns.chosen} is the chosen score minus the rejected one"
        logger.warning(
            f"in {summary.n_reversed} of {n} {split} pairs the rejected completion scores higher: check that {order}, "
            "and that a higher score is better"
        )
