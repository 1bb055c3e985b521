"""Columns that are not read, and may hold a part of the prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from .form import BESIDE_A_PROMPT, DIALOGUE, RowError, RowReader, is_system, like_a_prompt
from .messages import SHAREGPT, is_messages, spelled, texts_in
from .raw import first_row, raw_rows

_LETTER = r"[0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u058f\u1e00-\u1fff]"  # or digit
_WITHIN = re.compile(rf"(?<={_LETTER})(?={_LETTER})|(?<=\d\.)(?=\d)|(?<=\d)(?=\.\d)")  # a word or a number
_WHOLE = re.compile(r"-?\d+\.0")  # Arrow and pandas widen whole numbers beside an empty field


@dataclass
class Seen:
    """Rows that have something in common: how many, and the first of them."""

    n: int = 0
    first: int = 0

    def add(self, number: int) -> None:
        self.first = self.first if self.n else number
        self.n += 1


def suspects_of(reader: RowReader) -> list[str]:
    """The unread columns that may hold a part of the prompt."""
    used = set(reader.needed) - set(SHAREGPT)  # they may be something else, and then are no prompt
    beside = BESIDE_A_PROMPT if reader.has_prompts else ()
    names = [*like_a_prompt(reader.columns), *(name for name in reader.columns if _usual(name) in beside)]
    return [name for name in names if name not in used]


def _usual(name: str) -> str:
    return name if name.lower() == "functions" else name.lower()  # `Functions` are taken for tools


def texts_beside(dataset: Dataset | IterableDataset, reader: RowReader) -> list[str]:
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


def count_unused(
    unused: dict[str, Seen], raw: Mapping[str, Any], number: int, prompt: str, suspects: Iterable[str]
) -> None:
    """Counts the columns of a row that have text which the prompt lacks."""
    for name in suspects:
        value = raw.get(name)
        found = spelled(value)
        if is_messages(found):
            value = [message.get("content", message.get("value")) for message in found]
        elif found in ([], {}):
            continue
        lacks = any(text.strip() not in prompt for text in texts_in(value))
        if lacks or (not is_system(name) and not all(_says(prompt, number) for number in _numbers_in(value))):
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
        given = str(row["input"]) if isinstance(row["input"], bool) else row["input"]
        if not all(_says(prompt, text) for text in (*texts_in(given), *_numbers_in(given))):
            raise RowError(
                f"column 'input', {where(number)}: {row['input']!r:.100} is not part of the column "
                "'instruction', which holds the prompts: join the two in a column of their own, or, if it does "
                "not belong to the prompt, name the column with prompt_column='instruction' (--prompt_column "
                "instruction)"
            )


def _numbers_in(value: Any) -> Iterator[str]:
    """A number, or those of a list."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, int | float) and not isinstance(each, bool) and not math.isnan(each):
            yield str(each)


def _says(prompt: str, text: str) -> bool:
    """Whether a prompt has a text, not as a part of a word or of a number. Words are told in scripts that set them
    apart, and put nothing before or behind them: Latin, Greek, Cyrillic.
    """
    text = text.strip()
    return any(
        not (_WITHIN.match(prompt, at) or _WITHIN.match(prompt, at + len(each)))
        for each in {text, text[:-2] if _WHOLE.fullmatch(text) else text}
        if each in prompt
        for at in (found.start() for found in re.finditer(re.escape(each), prompt))
    )
