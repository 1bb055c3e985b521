"""Preference rows as TRL's trainers take them: what they stumble over is left out, or refused by its row."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

ANSWERS = ("chosen", "rejected")
PARTS = ("prompt", *ANSWERS)
# Columns by which TRL would take a row for another kind: language modelling, completions, judged completions
_OTHER_KINDS = ("messages", "completion", "label")
# What its collator pads as tokens, whoever the column is from
_TOKEN_ENDINGS = ("input_ids", "attention_mask", "labels", "pixel_values")
_NOBODYS_ANSWER = ("system", "user")


class RowError(ValueError):
    """A row that cannot be trained on; the text names column, row, value and the fix."""


def without_extras(dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
    """The same rows without what TRL would misread beside `chosen` and `rejected`.

    UltraFeedback binarized has the pair's better answer once more as `messages`, and the prompt, which its answers
    begin with, once more as text. TRL's chat templates refuse both.
    """
    row = next(iter(dataset), None)
    if row is None or not set(ANSWERS) <= row.keys():
        return dataset
    extras = [name for name in row if name in _OTHER_KINDS or name.endswith(_TOKEN_ENDINGS)]
    if isinstance(row.get("prompt"), str) and isinstance(row["chosen"], list):
        extras.append("prompt")
    if extras:
        logger.info(
            "%s: leaving out %s, which TRL would misread beside chosen and rejected", split, " and ".join(extras)
        )
        dataset = dataset.remove_columns(extras)
    return dataset


def check_rows(dataset: Dataset, split: str) -> int:
    """Checks every row of a data set, one form of row for all.

    Returns:
        The number of pairs whose two answers are the same.

    Raises:
        RowError: a column that is missing; the first row that no trainer can read.
    """
    _require_answers(dataset.column_names, split)
    check: RowCheck | None = None
    same = 0
    for number, row in enumerate(_rows(dataset, split)):
        check = check or RowCheck.like(row, split)
        check(row, number)
        same += row["chosen"] == row["rejected"]
    return same


def checked_stream(dataset: IterableDataset, split: str) -> IterableDataset:
    """The same stream, each of whose rows is checked as it comes.

    Raises:
        RowError: a column that is missing in its first row.
    """
    first = next(iter(dataset))
    _require_answers(first, split)
    return dataset.map(RowCheck.like(first, split), with_indices=True, features=dataset.features)


@dataclass(frozen=True)
class RowCheck:
    """Refuses a row that TRL's trainers could not read, or would read otherwise than the first."""

    split: str
    has_prompt: bool
    as_text: bool

    @classmethod
    def like(cls, row: Mapping[str, Any], split: str) -> RowCheck:
        """Of rows in this one's form."""
        return cls(split, "prompt" in row, isinstance(row["chosen"], str))

    def __call__(self, row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        where = f"row {number} of the {self.split} data set"
        parts = {name: row.get(name) for name in (PARTS if self.has_prompt else ANSWERS)}
        for name, value in parts.items():
            if problem := _problem_of(name, value):
                raise RowError(f"column {name!r}, {where}: {problem}")
        for name, value in parts.items():
            if isinstance(value, str) != self.as_text:
                kinds = "a list of messages", "text"
                raise RowError(
                    f"column {name!r}, {where}: {shortened(value)} is {kinds[not self.as_text]}, but chosen is "
                    f"{kinds[self.as_text]} in row 0: give prompt, chosen and rejected of all rows in one form"
                )
        if not self.has_prompt and not _share_a_beginning(*parts.values()):
            what = "characters" if self.as_text else "messages"
            raise RowError(
                f"columns 'chosen' and 'rejected', {where}: there is no prompt beside them in their form, and the "
                f"{what} that both begin with, which would be it, are none: {shortened(parts['chosen'])} and "
                f"{shortened(parts['rejected'])}. Add a prompt column in the form of the answers"
                + (", with '' where there is no prompt" if self.as_text else "")
            )
        return row


def _require_answers(names: Sequence[str] | Mapping[str, Any], split: str) -> None:
    if missing := [name for name in ANSWERS if name not in names]:
        raise RowError(
            f"the {split} data set has no column {' and no column '.join(map(repr, missing))}, only {list(names)}: a "
            "preference pair is chosen and rejected, and usually prompt; rename yours with dataset.rename_column"
        )


def _problem_of(name: str, value: Any) -> str | None:
    """What keeps a prompt or an answer from being one, and the fix."""
    if value is None:
        end = ", or the column if the answers begin with their prompts" if name == "prompt" else ""
        return f"the value is None: drop the row, for example with dataset.filter{end}"
    if isinstance(value, str):
        return _problem_of_text(value)
    if not isinstance(value, list):
        return f"{name} should be an str or a list of messages, but is of type {type(value).__name__}: {value!r}"
    if not value:
        return "the value is an empty list of messages: give it one, or drop the row"
    for i, message in enumerate(value):
        if problem := _problem_of_message(message):
            return f"message {i} {problem}"
    if name in ANSWERS and value[-1]["role"] in _NOBODYS_ANSWER:
        said = shortened(value[-1]["content"])
        return (
            f"the last message, {said}, is of the role {value[-1]['role']!r}: an answer ends with the assistant's; "
            "cut what follows it, or drop the row"
        )
    return None


def _problem_of_message(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f"is {shortened(message)}: a message is a mapping with role and content, in one list, not nested"
    there = {key: value for key, value in message.items() if value is not None}
    missing = [key for key in ("role", "content") if key not in there]
    if missing and not ("role" in there and there.get("tool_calls")):
        return (
            f"has no {' and no '.join(missing)}, only {there!r:.200}: give it both, under these names, or drop the row"
        )
    content = there.get("content", "")
    if not isinstance(there["role"], str) or not isinstance(content, (str, list)):
        return f"is {shortened(message)}: role is text, and content is text or a list of parts"
    return _problem_of_text(content) if isinstance(content, str) else None


def _problem_of_text(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"character {error.start} of {text[: error.start + 1][-20:]!r} is half of a surrogate pair, which no "
            "tokenizer takes: clean it, for example with text.encode(errors='replace').decode()"
        )
    return None


def _share_a_beginning(chosen: Sequence[Any], rejected: Sequence[Any]) -> bool:
    """Whether TRL finds a prompt in them; something of both has to be left as the answer."""
    return min(len(chosen), len(rejected)) > 1 and chosen[0] == rejected[0]


def _rows(dataset: Dataset, split: str) -> Iterator[dict[str, Any]]:
    """Many times faster than by the dataset's own iterator."""
    columns = dataset.select_columns([name for name in PARTS if name in dataset.column_names])
    try:
        for batch in columns.iter(batch_size=1000):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except UnicodeDecodeError as error:
        number = next(i for i in range(len(columns)) if not _decodes(columns, i))
        raise RowError(f"row {number} of the {split} data set is not UTF-8 ({error}): convert its file") from error


def _decodes(dataset: Dataset, number: int) -> bool:
    try:
        return bool(dataset[number])
    except UnicodeDecodeError:
        return False
