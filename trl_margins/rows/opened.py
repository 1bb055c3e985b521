"""Reads a preference set once before anything slow, and logs what a user should know about it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as shortened

from datasets import Dataset, IterableDataset

from .counts import RowCounts, count_rows
from .form import COMPLETIONS, PreferenceRow, RowError, RowReader
from .messages import SHAREGPT, is_like_messages, stored_messages
from .notes import notes, why_refused
from .raw import ahead, column_names, raw_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedSet:
    """A data set and how to read it."""

    dataset: Dataset | IterableDataset
    reader: RowReader
    counts: RowCounts

    def __iter__(self) -> Iterator[PreferenceRow]:
        for number, raw in enumerate(raw_rows(self.dataset, self.reader.needed, self.reader.split)):
            yield self.reader(raw, number)


def open_rows(
    dataset: Dataset | IterableDataset,
    split: str,
    prompt_column: str | None = None,
    system_column: str | None = None,
    keeps_parts: bool = False,
    read: Collection[str] = (),
) -> OpenedSet:
    """Reads every row of a data set, or the first few of a stream, and logs what training would otherwise hide.

    The arguments are those of `RowReader`, and further columns that are read. Raises a RowError for a missing column,
    a row that cannot be read, or prompts that would be a guess.
    """
    reader = reader_for(dataset, split, prompt_column, system_column, keeps_parts)
    counts = count_rows(dataset, reader)
    if refusal := why_refused(reader, counts):
        raise RowError(refusal)
    for note in notes(reader, counts, read):
        logger.log(note.level, "%s: %s", split, note.text)
    return OpenedSet(dataset, replace(reader, repeats_prompt=counts.repeats_prompt), counts)


def reader_for(
    dataset: Dataset | IterableDataset,
    split: str,
    prompt_column: str | None = None,
    system_column: str | None = None,
    keeps_parts: bool = False,
) -> RowReader:
    """A reader for a data set that knows which columns hold messages written as text."""
    features = getattr(dataset, "features", None)
    reader = RowReader.of(column_names(dataset), split, prompt_column, system_column, keeps_parts, features)
    return replace(reader, stored=frozenset(_stored(dataset, reader)))


def _stored(dataset: Dataset | IterableDataset, reader: RowReader) -> set[str]:
    """The columns in which all values are messages written as text; of the completions both, or none."""
    found = {*COMPLETIONS} if hold_messages(dataset, COMPLETIONS, reader) else set()
    first = next(raw_rows(dataset, list(COMPLETIONS), reader.split), {})
    prompt = reader.prompt_column
    # beside text completions, a prompt that is JSON may be just that
    as_messages = found or prompt in SHAREGPT or not all(isinstance(value, str) for value in first.values())
    if prompt is not None and as_messages and hold_messages(dataset, [prompt], reader):
        found.add(prompt)
    return found


def hold_messages(dataset: Dataset | IterableDataset, names: Sequence[str], reader: RowReader) -> bool:
    """Whether all values of these columns are messages written as text, in whatever order the rows are.

    Raises a RowError where that is so in most rows: for messages that cannot be read, or a row that is text.
    """
    n = others = 0
    problem = None
    for number, row in enumerate(ahead(dataset, list(names), reader.split)):
        if None in row.values():
            continue  # whoever reads the row says so
        n += 1
        is_text = False
        for name, text in row.items():
            if not isinstance(text, str):
                return False  # data of another kind
            where = f"column {name!r}, {reader.where(number)}"
            try:
                if not is_like_messages(text) or stored_messages(text) is None:
                    is_text = True
                    problem = problem or (
                        f"{where}: {shortened(text)} is text, and most rows hold messages, written as text: give all "
                        "rows in one form, or drop the row"
                    )
            except ValueError as error:
                problem = problem or f"{where}: {error}"
        others += is_text
    if problem is not None and others < n / 2:
        raise RowError(problem)
    return problem is None and n > 0
