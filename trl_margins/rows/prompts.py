"""Reads the prompts of a data set of any kind: pairs, lists, conversations, or prompts alone."""

from __future__ import annotations

import logging
from dataclasses import replace

from datasets import Dataset

from .beside import Seen, count_unused, refuse_input, suspects_of, unused_notes
from .form import PreferenceRow, RowError, RowReader, refuse_images, require_named
from .messages import SHAREGPT, Part, is_list_of, spelled, text_of
from .opened import hold_messages, open_rows
from .raw import raw_rows
from .turns import chat_turns, mended, unsplit_note

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "messages", *SHAREGPT, "instruction", "question", "query")


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
        RowError: no column with prompts, a row without one, or images.
    """
    if not len(dataset):
        raise RowError(f"the {split} data set has no rows")
    columns = dataset.column_names
    refuse_images(dataset, f"the {split} data set: prompts are answered")
    if {"chosen", "rejected"} <= set(columns) and not is_list_of(dataset[0]["chosen"], str):  # RM-Bench's
        rows = [replace(row, completions=[]) for row in open_rows(dataset, split, prompt_column, system_column)]
    else:
        rows = _alone(dataset, _reader(dataset, split, prompt_column, system_column), as_chat)
    if empty := [i for i, row in enumerate(rows) if not text_of(row.prompt).strip()]:
        raise RowError(
            f"{len(empty)} of {len(rows)} rows of the {split} data set have an empty prompt, the first is row "
            f"{empty[0]}: drop them, for example with dataset.filter"
        )
    return rows


def _reader(dataset: Dataset, split: str, prompt_column: str | None, system_column: str | None) -> RowReader:
    columns = dataset.column_names
    require_named(columns, split, prompt_column, system_column)
    name = prompt_column or next((each for each in COLUMNS if each in columns), None)
    if name is None:
        raise RowError(
            f"the {split} data set has the columns {columns}, and none of {', '.join(COLUMNS)}: name the one with the "
            "prompts with prompt_column (--prompt_column NAME)"
        )
    if name != "prompt":
        logger.info("%s: column %r holds the prompts", split, name)
    reader = RowReader(split, tuple(columns), name, system_column, features=dataset.features)
    stored = frozenset([name] if hold_messages(dataset, [name], reader) else [])
    refuse_input(dataset, reader, prompt_column, reader.where)
    return replace(reader, stored=stored)


def _alone(dataset: Dataset, reader: RowReader, as_chat: bool) -> list[PreferenceRow]:
    rows, answered, several, prefilled = [], 0, Seen(), Seen()
    unused: dict[str, Seen] = {}
    made: list[tuple[Part, int]] = []  # messages of text
    name = str(reader.prompt_column)
    asked = (spelled(raw[name]) for raw in raw_rows(dataset, [name], reader.split))
    are_turns = all(each and is_list_of(each, str | None) for each in asked)
    suspects = [name for name in suspects_of(reader) if name not in SHAREGPT]
    for number, raw in enumerate(raw_rows(dataset, [*reader.needed, *suspects], reader.split)):
        if are_turns:
            first, *later = spelled(raw[name])
            raw[name] = mended(first)
            if later:
                several.add(number)
        row = reader.prompt_of(raw, number)
        prompt = row.prompt
        if isinstance(prompt, str) and as_chat:
            prompt = chat_turns(prompt)
            made.append((prompt, number))
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            if name == "prompt":
                prefilled.add(number)
            else:
                prompt, answered = prompt[:-1], answered + 1
            if not prompt:
                raise RowError(
                    f"column {name!r}, {reader.where(number)}: before the assistant's answer there is "
                    "no message to answer: drop the row"
                )
        count_unused(unused, raw, number, text_of(prompt), suspects)
        rows.append(replace(row, prompt=prompt))
    if are_turns:
        logger.info(
            "%s: column %r holds lists of the user's turns, of which the first is the prompt", reader.split, name
        )
    if several.n:
        logger.warning(
            "%s: %d of %d prompts have further turns (the first is row %d), which are left out: they follow answers "
            "that the model has not given. To ask them, too, make messages of the turns and the answers between them",
            *(reader.split, several.n, len(rows), several.first),
        )
    for note in unused_notes(unused, len(rows), reader):
        logger.warning("%s: %s", reader.split, note)
    if unsplit := unsplit_note(made):
        logger.warning("%s: %s", reader.split, unsplit)
    if prefilled.n:
        logger.warning(
            "%s: %d of %d prompts end with the assistant's turn (the first is row %d): the answer is a further turn",
            *(reader.split, prefilled.n, len(rows), prefilled.first),
        )
    if answered:
        logger.info(
            "%s: %d of %d conversations end with an answer, which is not part of their prompt",
            *(reader.split, answered, len(rows)),
        )
    return rows
