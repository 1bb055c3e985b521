"""Reads a preference set once before anything slow, and logs what a user should know about it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from reprlib import repr as shortened
from typing import Any, NamedTuple
from unicodedata import category

from datasets import Dataset, IterableDataset

from ..checks import looks_like, odd_letters
from ..pairs import FACTOR, IS_FLIPPED
from .form import (
    BESIDE_A_PROMPT,
    COMPLETIONS,
    DIALOGUE,
    TEMPLATE,
    PreferenceRow,
    RowError,
    RowReader,
    around_prompt,
    is_system,
    like_a_prompt,
    turn_mark,
)
from .messages import (
    SHAREGPT,
    USUAL_ROLES,
    Part,
    is_like_messages,
    is_messages,
    may_be_messages,
    seem_messages,
    spelled,
    stored_messages,
    text_of,
    texts_in,
    without_notes,
)
from .references import may_be_meant, referred

logger = logging.getLogger(__name__)

# Columns that may say which completion is the better one
_VERDICTS = {"label", "labels", "winner", "preference", "preferred", "better", "best", "choice", "is_chosen"}
_STREAMED = 32  # rows of a stream that are read ahead
_HUMAN = re.compile(  # begins a turn of the user in text
    r"\n\r?\nHuman:|\[INST\]"
    r"|<(?:[|｜](?:[Uu]ser|USER|prompter)[|｜]>|\|?(?:im_start|start|start_\w+)\|?>(?:user|human)\b)"
)
_OF_TOOLS = re.compile("tool|function", re.IGNORECASE)
_OF_A_TOOL = {"parameters", "input_schema", "description"}


@dataclass
class Seen:
    """Rows that have something in common: how many, and the first of them."""

    n: int = 0
    first: int = 0

    def add(self, number: int) -> None:
        self.first = self.first if self.n else number
        self.n += 1


@dataclass
class RowCounts:
    """What reading the rows of a set found."""

    n: int = 0
    text: Seen = field(default_factory=Seen)
    messages: Seen = field(default_factory=Seen)
    same_rows: set[int] = field(default_factory=set)  # the same completion twice
    blank: dict[str, Seen] = field(default_factory=dict)  # completions without text of their own, by their column
    spelled: dict[str, Seen] = field(default_factory=dict)  # texts that spell messages, by their column
    user_turns: Seen = field(default_factory=Seen)  # within a completion
    user_marks: Seen = field(default_factory=Seen)  # within a completion, what begins a turn of the user in text
    user_mark: str = ""  # the first of them
    prefilled: Seen = field(default_factory=Seen)  # prompts that end with the assistant's turn
    roles: dict[str, Seen] = field(default_factory=dict)  # that chat templates seldom know
    repeated: Seen = field(default_factory=Seen)  # text completions that both begin with their prompt
    repeated_once: Seen = field(default_factory=Seen)  # one of them does
    repeated_within: Seen = field(default_factory=Seen)  # they hold it behind the same text
    dialogues: Seen = field(default_factory=Seen)  # of these, those that mark turns
    seem: Seen = field(default_factory=Seen)  # texts that all seem to be messages, and are not `spelled`
    named: int = 0  # rows whose completions are names of columns, or their ends
    referring: int = 0  # rows whose completions point to other columns
    referred: set[str] = field(default_factory=set)  # these columns
    unused: dict[str, Seen] = field(default_factory=dict)  # columns like a prompt whose text the prompt lacks
    beside: dict[str, Seen] = field(default_factory=dict)  # the same of columns of any other name
    contradicted: Seen = field(default_factory=Seen)  # prompts as text beside conversations that begin otherwise
    unprompted: Seen = field(default_factory=Seen)  # text rows whose prompt is empty
    alike: dict[str, Seen] = field(default_factory=dict)  # columns whose names look like those of others that are read
    prompts: set[int] = field(default_factory=set)  # hashes of prompts

    @property
    def prompted(self) -> int:
        """Text rows whose prompt is not empty."""
        return self.text.n - self.unprompted.n

    @property
    def repeats_prompt(self) -> bool:
        """Whether all text completions begin with their prompt."""
        return 0 < self.repeated.n == self.prompted

    def add(
        self, row: PreferenceRow, raw: Mapping[str, Any], number: int, asked: Any, suspects: Iterable[str]
    ) -> None:
        """Counts a row, given also as the data set has it (`raw`), with the value of its prompt column (`asked`) and
        unread columns that may hold a part of the prompt (`suspects`).
        """
        completions: list[Any] = row.completions
        self.n += 1
        (self.messages if row.is_conversational else self.text).add(number)
        if without_notes(completions[0]) == without_notes(completions[1]):
            self.same_rows.add(number)
        if isinstance(row.prompt, str):
            if not row.prompt:
                self.unprompted.add(number)
            if row.prompt.rstrip().endswith("\nHuman:"):
                self.user_turns.add(number)
            around = [around_prompt(row.prompt, part) for part in completions]
            befores = [each and each[0].strip() for each in around]
            if befores == ["", ""]:
                self.repeated.add(number)
                completions = [behind for _, behind in filter(None, around)]
            elif "" in befores and row.prompt.strip():
                self.repeated_once.add(number)
            elif befores[0] and befores[0] == befores[1]:
                self.repeated_within.add(number)
                if all(each and _marks_turns(*each) for each in around):
                    self.dialogues.add(number)
        else:
            if any(message["role"] == "user" for part in completions for message in part):
                self.user_turns.add(number)
            if row.prompt[-1]["role"] == "assistant":
                self.prefilled.add(number)
            found = {message["role"] for part in (row.prompt, *completions) for message in part}
            for role in found.difference(USUAL_ROLES):
                self.roles.setdefault(role, Seen()).add(number)
        for name, part in zip(COMPLETIONS, completions, strict=True):
            if is_blank(part):
                self.blank.setdefault(name, Seen()).add(number)
        if mark := next(filter(None, (_HUMAN.search(text_of(part)) for part in completions)), None):
            self.user_mark = self.user_mark or mark[0].strip()
            self.user_marks.add(number)
        prompt = text_of(row.prompt)
        self.prompts.add(hash(prompt))
        # the reader compares a prompt in messages
        if row.is_conversational and isinstance(asked, str) and asked.strip() not in prompt:
            self.contradicted.add(number)
        count_unused(self.unused, raw, number, prompt, suspects)


def _marks_turns(before: str, behind: str) -> bool:
    """Whether the text around a prompt marks turns, one of them before it."""
    mark = turn_mark(f"{before}x{behind}")
    return mark is not None and mark in before


def is_blank(part: Part) -> bool:
    """Whether a completion has neither text nor anything else, such as a call of a tool."""
    others = part if isinstance(part, list) else []
    return not any(_is_shown(each) and not each.isspace() for each in text_of(part)) and all(
        message.keys() <= {"role", "content"} and isinstance(message["content"], str) for message in others
    )


def _is_shown(character: str) -> bool:
    return character.isprintable() or category(character) == "Co"  # private use: a font's, or a tokenizer's


def suspects_of(reader: RowReader) -> list[str]:
    """The unread columns that may hold a part of the prompt."""
    used = set(reader.needed) - set(SHAREGPT)  # they may be something else, and then are no prompt
    beside = BESIDE_A_PROMPT if reader.prompt_column not in (None, *SHAREGPT) else ()
    names = [*like_a_prompt(reader.columns), *(name for name in beside if name in reader.columns)]
    return [name for name in names if name not in used]


def _texts_beside(dataset: Dataset | IterableDataset, reader: RowReader) -> list[str]:
    """Columns of any other name with text in words, or with messages, where text completions have no prompt column."""
    first = first_row(dataset, reader.split) if reader.prompt_column is None else None
    if first is None or not isinstance(first.get("chosen"), str) or DIALOGUE.search(first["chosen"]):
        return []
    known = {*reader.needed, *like_a_prompt(reader.columns)}
    return [
        name
        for name, value in first.items()
        if name not in known and (is_messages(value) or (isinstance(value, str) and " " in value.strip()))
    ]


def _pointed(dataset: Dataset | IterableDataset, reader: RowReader) -> list[str]:
    """The columns to which the completions of the first row only point, if they do."""
    others = [name for name in reader.columns if name not in reader.needed and may_be_meant(name)]
    first = next(raw_rows(dataset, [*COMPLETIONS, *others], reader.split), {}) if others else {}
    parts = [first.pop(name, None) for name in COMPLETIONS]
    return sorted(referred(parts, first, ""))


def count_unused(
    unused: dict[str, Seen], raw: Mapping[str, Any], number: int, prompt: str, suspects: Iterable[str]
) -> None:
    """Counts the columns of a row that have text which the prompt lacks."""
    for name in suspects:
        value = raw.get(name)
        if is_messages(found := spelled(value)):
            value = [message.get("content", message.get("value")) for message in found]
        if any(not _says(prompt, text) for text in _said_in(value)):
            unused.setdefault(name, Seen()).add(number)


def unused_notes(unused: Mapping[str, Seen], n: int, reader: RowReader) -> Iterator[str]:
    """What `count_unused` found in n rows, one sentence for each column."""
    for name, seen in unused.items():
        fix = "add it to the prompt column"
        if is_system(name) and reader.system_column is None:
            fix = f"set system_column={name!r} (--system_column {name})"
        elif reader.prompt_column is None:
            fix = f"set prompt_column={name!r} (--prompt_column {name})"
        yield (
            f"column {name!r} is not used, and in {seen.n} of {n} rows it holds text that the prompt does not (the "
            f"first is row {seen.first}): {fix}, if it belongs there"
        )


def refuse_input(dataset: Dataset, reader: RowReader, prompt_column: str | None, where: Callable[[int], str]) -> None:
    """Raises a RowError for Alpaca's rows, whose question is in two columns, unless `prompt_column` names the one."""
    if prompt_column is not None or reader.prompt_column != "instruction" or "input" not in reader.columns:
        return
    for number, row in enumerate(raw_rows(dataset, ["input", "instruction"], reader.split)):
        prompt = "\n".join(texts_in(row["instruction"]))
        if not all(_says(prompt, text) for text in _said_in(row["input"])):
            raise RowError(
                f"column 'input', {where(number)}: {row['input']!r:.100} is not part of the column "
                "'instruction', which holds the prompts: join the two in a column of their own, or, if it does "
                "not belong to the prompt, name the column with prompt_column='instruction' (--prompt_column "
                "instruction)"
            )


def _said_in(value: Any) -> Iterator[str]:
    """The texts and numbers in a value."""
    if isinstance(value, list):
        for each in value:
            yield from _said_in(each)
    elif isinstance(value, float) and value.is_integer():  # Arrow and pandas widen numbers beside an empty field
        yield str(int(value))
    elif isinstance(value, int | float):
        yield from () if math.isnan(value) else (str(value),)
    else:
        yield from texts_in(value)


def _says(prompt: str, text: str) -> bool:
    """Whether a prompt has a text, not as a part of a word or of a number."""
    text = text.strip()
    before = r"(?<![A-Za-z0-9])" if re.match(r"[A-Za-z0-9]", text) else ""
    behind = r"(?![A-Za-z0-9])" if re.search(r"[A-Za-z0-9]$", text) else ""
    return text in prompt and re.search(before + re.escape(text) + behind, prompt) is not None


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
) -> OpenedSet:
    """Reads every row of a data set, or the first few of a stream, and logs what training would otherwise hide.

    The arguments are those of `RowReader`. Raises a RowError for a missing column, a row that cannot be read, or
    prompts that would be a guess.
    """
    reader = reader_for(dataset, split, prompt_column, system_column, keeps_parts)
    counts = count_rows(dataset, reader)
    if refusal := why_refused(reader, counts):
        raise RowError(refusal)
    for note in notes(reader, counts):
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


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Also of a stream, which may not know its columns before its first rows."""
    known = getattr(dataset, "column_names", None)
    return list(known or dict.fromkeys(name for row in islice(dataset, _STREAMED) for name in row))


def count_rows(
    dataset: Dataset | IterableDataset,
    reader: RowReader,
    on_error: Callable[[RowError, int], None] | None = None,
    on_row: Callable[[PreferenceRow, int], None] | None = None,
) -> RowCounts:
    """Reads every row, or the first few of a stream.

    A row that cannot be read is an error, or is left out and given to `on_error`; `on_row` gets every other row.
    """
    suspects, beside, pointed = suspects_of(reader), _texts_beside(dataset, reader), _pointed(dataset, reader)
    counts, prompt = RowCounts(), reader.prompt_column
    has_conversations = "messages" in reader.columns and prompt not in (None, "messages", *SHAREGPT)
    conversations = ["messages"] if has_conversations else []
    columns = list(dict.fromkeys([*reader.needed, *suspects, *beside, *conversations, *pointed]))
    alike = [name for name in reader.columns if _taken_for(name, reader)]
    of_tools = [] if "tools" in reader.columns else [*filter(_OF_TOOLS.search, reader.columns)]
    of_tools = [name for name in of_tools if name not in (*suspects, prompt, reader.system_column)]
    columns += [name for name in (*alike, *of_tools) if name not in columns]
    ends = {f"_{name}"[i:] for name in reader.columns for i in range(len(name)) if f"_{name}"[i] == "_"}
    texts = [name for name in (prompt, *COMPLETIONS) if name is not None and name not in reader.stored]
    for number, raw in enumerate(_ahead(dataset, columns, reader.split)):
        try:
            row = reader(raw, number)
        except RowError as error:
            if on_error is None:
                raise
            on_error(error, number)
            continue
        asked = None if prompt is None or prompt in reader.stored else raw.get(prompt)
        is_read = prompt in suspects and (prompt in reader.stored or is_messages(asked))
        counts.add(row, raw, number, asked, [name for name in suspects if not (is_read and name == prompt)])
        count_unused(counts.beside, raw, number, text_of(row.prompt), beside)
        # beside a prompt, they usually are the prompt and the chosen completion
        whole = "\n".join(map(text_of, (row.prompt, *row.completions))) if conversations else ""
        count_unused(counts.beside, raw, number, whole, conversations)
        if found := referred(row.completions, {name: raw.get(name) for name in pointed}, text_of(row.prompt)):
            counts.referring += 1
            counts.referred |= found
        for name in dict.fromkeys([*alike, *of_tools]):
            if raw.get(name) not in (None, "", [], {}) and (name in alike or _defines_tools(raw[name])):
                counts.alike.setdefault(name, Seen()).add(number)
        counts.named += all(isinstance(part, str) and f"_{part}" in ends for part in row.completions)
        spelled_out = [name for name in texts if may_be_messages(raw.get(name))]
        spelled_out += [str(reader.system_column)] * reader.has_unread_system(raw)
        if not spelled_out and all(isinstance(part, str) and seem_messages(part) for part in row.completions):
            counts.seem.add(number)
        for name in spelled_out:
            counts.spelled.setdefault(name, Seen()).add(number)
        if on_row is not None:
            on_row(row, number)
    return counts


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
    for number, row in enumerate(_ahead(dataset, list(names), reader.split)):
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


def first_row(dataset: Dataset | IterableDataset, split: str) -> dict[str, Any] | None:
    """The first row, with everything that its columns are decoded to; None of an empty set.

    Raises:
        RowError: a text that is not UTF-8, with its row.
    """
    try:
        return next(iter(dataset), None)
    except UnicodeDecodeError:
        for _ in raw_rows(dataset, column_names(dataset), split):  # which names it
            pass
        raise


def raw_rows(dataset: Dataset | IterableDataset, columns: list[str], split: str) -> Iterator[dict[str, Any]]:
    """These columns of every row; of a loaded set many times faster than its own iterator."""
    if not isinstance(dataset, Dataset):
        number = 0
        try:
            for row in dataset:
                yield {name: row.get(name) for name in columns}
                number += 1
        except UnicodeDecodeError as error:  # rows are decoded several at a time
            where = f"the {split} data set, after {number} rows"
            raise RowError(f"{where}: a text is not UTF-8 ({error}): convert its file") from error
        return
    some = dataset.with_format(None, columns=columns)
    try:
        for batch in some.iter(batch_size=1000):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except UnicodeDecodeError as error:
        for number in range(len(some)):
            try:
                some[number]
            except UnicodeDecodeError:
                where = f"row {number} of the {split} data set"
                raise RowError(f"{where} is not UTF-8 ({error}): convert its file") from error
        raise


def _ahead(dataset: Dataset | IterableDataset, columns: list[str], split: str) -> Iterator[dict[str, Any]]:
    """All rows of a set, and the first few of a stream."""
    return islice(raw_rows(dataset, columns, split), None if isinstance(dataset, Dataset) else _STREAMED)


def why_refused(reader: RowReader, counts: RowCounts) -> str | None:
    """Why reading a set would be a guess: a column has more of the prompt, or completions begin alike by chance."""
    if 1 < counts.named == counts.n:
        return (
            f"chosen and rejected of the {reader.split} data set are names of columns, or their ends, in all its "
            f"{counts.n} rows: replace them by the completions themselves, with dataset.map; or, if these are the "
            "completions, rename the columns that are called so"
        )
    if 1 < counts.referring == counts.n:
        return (
            f"chosen and rejected of the {reader.split} data set only say which text of the columns "
            f"{sorted(counts.referred)} they are, in all its {counts.n} rows: replace them by the texts themselves, "
            "with dataset.map"
        )
    if 0 < counts.dialogues.n == counts.prompted:
        return (
            f"columns 'chosen' and 'rejected', {reader.where(counts.dialogues.first)}: they are whole dialogues, "
            f"which begin with the same text, and their prompt in it, as in all {counts.prompted} rows of text with a "
            "prompt. Take all that is before the answers out of them, or save the dialogues as lists of messages with "
            "role and content"
        )
    if reader.prompt_column is not None and reader.prompt_column not in SHAREGPT:
        return None
    if counts.unused:
        name, seen = next(iter(counts.unused.items()))
        option = "system_column" if is_system(name) else "prompt_column"
        how = "Add a prompt column and set" if is_system(name) and counts.text.n else "Set"
        return (
            f"column {name!r}, {reader.where(seen.first)}: there is no prompt column, so what chosen and rejected "
            f"both begin with would be the prompt, and it does not contain this column's text ({seen.n} such rows). "
            f"{how} {option}={name!r} (--{option} {name}), or remove the column if it is not part of the prompt"
        )
    if counts.text.n == counts.n >= 3 and len(counts.prompts) == 1 and len(counts.same_rows) < counts.n:
        return (
            f"the {reader.split} data set has no prompt column, and chosen and rejected begin alike in all {counts.n} "
            "rows, with the same text: that looks like chance, not like a prompt. Add a prompt column, with '' where "
            "there is no prompt"
        )
    return None


def _taken_for(name: str, reader: RowReader) -> str | None:
    """Of the columns that are read where they are there, one that is not, and that a reader takes the name for."""
    known = [each for each in (*TEMPLATE, "system", IS_FLIPPED, FACTOR) if each not in reader.columns]
    if name in (reader.prompt_column, reader.system_column):
        return None
    return name.lower() if name.lower() in known and name.lower() in TEMPLATE else looks_like(name, known)


def _defines_tools(value: Any) -> bool:
    found = spelled(value)
    found = [found] if isinstance(found, Mapping) else found
    is_list = isinstance(found, list) and bool(found) and all(isinstance(each, Mapping) for each in found)
    return is_list and all("function" in each or ("name" in each and {*each} & _OF_A_TOOL) for each in found)


class Note(NamedTuple):
    """A message about a data set."""

    level: int
    text: str


def notes(reader: RowReader, counts: RowCounts) -> Iterator[Note]:
    """What training would otherwise hide, one sentence each."""
    info, warning = partial(Note, logging.INFO), partial(Note, logging.WARNING)
    n = counts.n
    if reader.prompt_column not in (None, "prompt"):
        yield info(f"column {reader.prompt_column!r} holds the prompts")
    for name, seen in counts.alike.items():
        odd = odd_letters(name) or "its name is written otherwise"
        meant = _taken_for(name, reader) or "tools"
        yield warning(
            f"the column {name!a}, which {seen.n} of {n} rows have, is not read as {meant!r}, "
            f"since {odd}: rename it if it is meant as that"
        )
    if same := len(counts.same_rows):
        yield warning(f"{same} of {n} pairs have the same completion twice: they have no gap to learn from")
    for name, seen in counts.blank.items():
        yield warning(
            f"{seen.n} of {n} {name} completions have no text of their own (the first is in row {seen.first}): they "
            "teach whether to say nothing. If that is not intended, drop the rows, for example with dataset.filter"
        )
    for name, seen in counts.spelled.items():
        yield warning(
            f"in {seen.n} of {n} rows column {name!r} holds messages, written as text (the first is row "
            f"{seen.first}), and is read as text"
            + ": to be read as messages, all rows must have them, chosen and rejected alike"
            * (name != reader.system_column)
            + ". If they are messages, save them as lists"
        )
    if 0 < (seen := counts.seem).n == counts.text.n:
        yield warning(
            "chosen and rejected of all text rows begin as messages do, with a role and a content, and are read as "
            f"the text that they are (the first is row {seen.first}): if they are messages, save them as lists"
        )
    if (seen := counts.contradicted).n:
        yield warning(
            f"in {seen.n} of {n} rows the text in column {reader.prompt_column!r} is not what the conversations in "
            f"chosen and rejected begin with (the first is row {seen.first}): the beginning of the conversations is "
            "the prompt"
        )
    if counts.repeats_prompt:
        yield info(
            f"chosen and rejected repeat their prompt in all {counts.prompted} text rows: it is removed from them"
        )
    elif (seen := counts.repeated_within).n and counts.dialogues.n < counts.prompted:
        yield warning(
            f"in {seen.n} of {counts.prompted} text rows, chosen and rejected begin with the same text, "
            f"and their prompt in it (the first is row {seen.first}): all of it counts as part of the completions. "
            "Take it out of them if that is not intended"
        )
    if not counts.repeats_prompt and (seen := counts.repeated).n:
        yield warning(
            f"in {seen.n} of {counts.prompted} text rows, not in all, chosen and rejected begin with their prompt "
            f"(the first is row {seen.first}): there it counts as part of the completions. Remove it from them if "
            "that is not intended"
        )
    if (seen := counts.repeated_once).n > n / 2:
        yield warning(
            f"in {seen.n} of {n} rows only one of chosen and rejected begins with the prompt (the first is row "
            f"{seen.first}): there it counts as part of the completion. Remove it from them if that is not intended"
        )
    if 0 < (seen := counts.unprompted).n < counts.text.n:
        yield warning(
            f"in {seen.n} of {counts.text.n} text rows the prompt is empty (the first is row {seen.first}): there the "
            "completions follow nothing. If that is not intended, drop the rows, for example with dataset.filter"
        )
    if (seen := counts.user_turns).n:
        yield warning(
            f"in {seen.n} of {n} rows a completion holds turns of the user (the first is row {seen.first}): their "
            "tokens are scored as if the model had written them. Put earlier turns into the prompt, or end the "
            "completion before them"
        )
    if (seen := counts.user_marks).n:
        yield warning(
            f"in {seen.n} of {n} rows a completion holds {counts.user_mark!r} or the like (the first is row "
            f"{seen.first}): if turns of the user begin with it, their tokens are scored as if the model had written "
            "them. Put earlier turns into the prompt, and end the completion before them"
        )
    if (seen := counts.prefilled).n:
        yield warning(
            f"{seen.n} of {n} prompts end with the assistant's turn (the first is row {seen.first}): the chat "
            "template makes the completion a further turn. To continue the turn, move its text into the completions"
        )
    for role, seen in counts.roles.items():
        yield warning(
            f"in {seen.n} of {n} rows a message has the role {role!r} (the first is row {seen.first}): a chat "
            "template that does not know it leaves the message out, or prints the role as it is. If it means one of "
            f"{', '.join(USUAL_ROLES[:4])}, rename it"
        )
    if counts.text.n and (seen := counts.messages).n:
        yield warning(
            f"{counts.text.n} rows are text (the first is row {counts.text.first}) and {seen.n} are messages (the "
            f"first is row {seen.first}): the chat template renders only the messages"
        )
    for name in sorted(_VERDICTS.intersection(reader.columns)):
        yield warning(
            f"column {name!r} is not read: whatever it says, chosen is the better completion of every row. If it says "
            "otherwise of some, swap their completions, for example with dataset.map"
        )
    yield from map(warning, unused_notes(counts.beside, n, reader))
    if reader.prompt_column is None or reader.prompt_column in SHAREGPT:
        return
    yield from map(warning, unused_notes(counts.unused, n, reader))
