"""Several preference sets as one: each is read by its own columns before they are concatenated."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Json, Value, concatenate_datasets

from ..pairs import SCORES
from .form import TEMPLATE, Part, RowReader
from .opened import OpenedSet, open_rows
from .scores import ScoreColumns, check_row, find_score_columns, refuse_class_labels
from .tokens import VERSION, read_batch

logger = logging.getLogger(__name__)

_PARTS = ("prompt", "chosen", "rejected", *TEMPLATE)


def mixed(parts: Sequence[tuple[str, Dataset]]) -> Dataset:
    """The rows of all sets, each with its own prompt, completions and scores.

    Sets with the same columns are concatenated unchanged. Otherwise prompt, completions and scores are read as each
    set has them, and a further column stays if all sets have it with the same type.

    Errors have the name of the set, which comes before its rows in `parts`.
    """
    sets = [dataset for _, dataset in parts]
    opened = [open_rows(dataset, name) for name, dataset in parts]
    ways = {(each.reader.repeats_prompt, each.reader.stored) for each in opened}
    if len(ways) == 1 and all(dataset.features == sets[0].features for dataset in sets):
        return concatenate_datasets(sets)
    features = [dataset.features for dataset in sets]
    alike = {name for name in sets[0].column_names if len({str(each.get(name)) for each in features}) == 1}
    scores = [find_score_columns(dataset.column_names) for dataset in sets]
    if scores[0] and len({*scores}) == 1 and alike.issuperset(scores[0].names):
        scores = [None] * len(sets)  # they stay where they are
    without = [name for (name, _), found in zip(parts, scores, strict=True) if found is None]
    if without and len(without) < len(parts):
        logger.warning("no scores in %s, so those of the other sets are left out", ", ".join(without))
    read_scores = {name for found in scores if found for name in (*SCORES, *found.names)}
    common = [name for name in sets[0].column_names if name in alike and name not in (*_PARTS, *read_scores)]
    read = [_read(each, None if without else found, common) for each, found in zip(opened, scores, strict=True)]
    dropped = {name for dataset in sets for name in dataset.column_names} - set(read[0].column_names)
    dropped -= read_scores
    if dropped:
        logger.info("columns that not all sets have in one type are left out: %s", ", ".join(sorted(dropped)))
    unused = [name for name in TEMPLATE if not any(name in dataset.column_names for dataset in sets)]
    return concatenate_datasets(read).remove_columns(unused)


def _read(opened: OpenedSet, scores: ScoreColumns | None, common: list[str]) -> Dataset:
    dataset, name = opened.dataset, opened.reader.split
    if scores is not None:
        refuse_class_labels(dataset, scores, name)
    # Json columns hold text beside messages, and messages with different keys
    features = {column: Json() for column in _PARTS}
    features |= {column: Value("float64") for column in SCORES} if scores else {}
    return dataset.map(
        _rows,
        batched=True,
        with_indices=True,
        fn_kwargs={"reader": opened.reader, "scores": scores, "version": VERSION},
        remove_columns=[column for column in dataset.column_names if column not in common],
        features=Features({column: kind for column, kind in dataset.features.items() if column in common} | features),
        desc=f"Reading {name}",
    )


def _rows(
    batch: Mapping[str, list[Any]],
    numbers: list[int],
    reader: RowReader,
    scores: ScoreColumns | None,
    version: str,  # only part of the fingerprint
) -> dict[str, list[Any]]:
    rows = read_batch(reader, batch, numbers)
    made: dict[str, list[Any]] = {
        "prompt": [_as_json(row.prompt) for row in rows],
        "chosen": [_as_json(row.completions[0]) for row in rows],
        "rejected": [_as_json(row.completions[1]) for row in rows],
        "tools": [row.template.get("tools") for row in rows],
        "chat_template_kwargs": [
            {name: value for name, value in row.template.items() if name != "tools"} or None for row in rows
        ],
    }
    if scores is not None:
        given = [{name: batch[name][i] for name in scores.names} for i in range(len(rows))]
        pairs = list(map(scores.read, given))
        for number, row, pair in zip(numbers, given, pairs, strict=True):
            if any(isinstance(score, bool) for score in pair):  # whose column would have numbers in its place
                check_row(row, scores, f"row {number} of the {reader.split} data set")
        made |= dict(zip(SCORES, map(list, zip(*pairs, strict=True)), strict=True))
    return made


def _as_json(part: Part) -> Any:
    """Text as JSON text, since a Json column reads any text as JSON."""
    return json.dumps(part) if isinstance(part, str) else part
