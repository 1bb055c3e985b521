"""Reads the prompts of a data set of any kind: pairs, lists, conversations, or prompts alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from datasets import Dataset

from .form import SHAREGPT, PreferenceRow, RowError, RowReader, text_of
from .lists import chat_turns
from .opened import (
    Seen,
    count_unused,
    holds_messages,
    like_a_prompt,
    open_rows,
    raw_rows,
    refuse_input,
    unused_notes,
)

logger = logging.getLogger(__name__)

WHOLE = ("messages", *SHAREGPT)  # conversations, whose last answer is not part of the prompt
COLUMNS = ("prompt", *WHOLE, "instruction", "question", "query")


def open_prompts(
    dataset: Dataset,
    split: str,
    prompt_column: str | None = None,
    system_column: str | None = None,
    as_chat: bool = False,
) -> list[PreferenceRow]:
    """The prompt of every row, in the form in which training has it: rows without completions.

    Args:
        dataset: pairs in any form, which keep it; else rows with a column of `COLUMNS`.
        split: name of the set in errors.
        prompt_column, system_column: as for `RowReader`.
        as_chat: a prompt in text, without completions beside it, is the user's message.

    Raises:
        RowError: no column with prompts, or a row without one.
    """
    if not len(dataset):
        raise RowError(f"the {split} data set has no rows")
    columns = dataset.column_names
    if {"chosen", "rejected"} <= set(columns) and not _is_list_of_texts(dataset[0]["chosen"]):
        rows = [replace(row, completions=[]) for row in open_rows(dataset, split, prompt_column, system_column)]
    else:
        rows = _alone(dataset, _reader(dataset, split, prompt_column, system_column), as_chat)
    if empty := [i for i, row in enumerate(rows) if not text_of(row.prompt).strip()]:
        raise RowError(
            f"{len(empty)} of {len(rows)} rows of the {split} data set have an empty prompt, the first is row "
            f"{empty[0]}: drop them, for example with dataset.filter"
        )
    return rows


def _is_list_of_texts(value: Any) -> bool:  # RM-Bench's
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _reader(dataset: Dataset, split: str, prompt_column: str | None, system_column: str | None) -> RowReader:
    columns = dataset.column_names
    for option, given in {"prompt_column": prompt_column, "system_column": system_column}.items():
        if given is not None and given not in columns:
            raise RowError(f"{option} names {given!r}, but the {split} data set has only the columns {columns}")
    name = prompt_column or next((each for each in COLUMNS if each in columns), None)
    if name is None:
        raise RowError(
            f"the {split} data set has the columns {columns}, and none of {', '.join(COLUMNS)}: name the one with the "
            "prompts with prompt_column (--prompt_column NAME)"
        )
    if name != "prompt":
        logger.info("%s: column %r holds the prompts", split, name)
    reader = RowReader(split, tuple(columns), name, system_column, features=dataset.features)
    stored = frozenset([name] if holds_messages(dataset, name, reader) else [])
    refuse_input(dataset, reader, prompt_column, reader.where)
    return replace(reader, stored=stored)


def _alone(dataset: Dataset, reader: RowReader, as_chat: bool) -> list[PreferenceRow]:
    rows, answered = [], 0
    unused: dict[str, Seen] = {}
    suspects = [name for name in like_a_prompt(reader) if name not in SHAREGPT]
    for number, raw in enumerate(raw_rows(dataset, [*reader.needed, *suspects], reader.split)):
        row = reader.prompt_of(raw, number)
        prompt = row.prompt
        if isinstance(prompt, str) and as_chat:
            prompt = chat_turns(prompt)
        if isinstance(prompt, list) and reader.prompt_column in WHOLE and prompt[-1]["role"] == "assistant":
            prompt, answered = prompt[:-1], answered + 1
            if not prompt:
                raise RowError(
                    f"column {reader.prompt_column!r}, {reader.where(number)}: before the assistant's answer there is "
                    "no message to answer: drop the row"
                )
        count_unused(unused, raw, number, text_of(prompt), suspects)
        rows.append(replace(row, prompt=prompt))
    for note in unused_notes(unused, len(rows), reader):
        logger.warning("%s: %s", reader.split, note)
    if answered:
        logger.info(
            "%s: %d of %d conversations end with an answer, which is not part of their prompt",
            *(reader.split, answered, len(rows)),
        )
    return rows
