"""Several preference sets as one: each is read by its own columns before they are concatenated."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from datasets import Dataset, Features, Json, Value, concatenate_datasets

from ..pairs import SCORES
from .form import COMPLETIONS, TEMPLATE, RowError, RowReader
from .messages import Part
from .opened import OpenedSet, open_rows
from .scores import ScoreColumns, ScoreError, check_row, find_score_columns, refuse_class_labels
from .tokens import VERSION, in_parts, read_batch

logger = logging.getLogger(__name__)


class Named(NamedTuple):
    """The columns that a user has named: `prompt_column`, `system_column` and `score_columns`."""

    prompt: str | None = None
    system: str | None = None
    scores: Sequence[str] | None = None


NOTHING_NAMED = Named()


def mixed(parts: Sequence[tuple[str, Dataset]], named: Named = NOTHING_NAMED) -> Dataset:
    """The rows of all sets, each with its own prompt, completions and scores.

    Sets with the same columns are concatenated unchanged. Otherwise prompt, system message, completions and scores are
    read as each set has them, into the columns that are named, and a further column stays if all sets have it with the
    same type.

    Args:
        parts: the name of each set, for errors, and its rows.
        named: these columns. A set without that of the prompt may have a usual one, or completions that begin with
            their prompt; one without that of the system message has none.

    Raises:
        ValueError: a set that cannot be read, or has not the scores that are named.
    """
    sets = [dataset for _, dataset in parts]
    _check_named(parts, named)
    opened = []
    for name, dataset in parts:
        prompt, system = (each if each in dataset.column_names else None for each in (named.prompt, named.system))
        with _naming_prompt(None if prompt else named.prompt, name):
            opened.append(open_rows(dataset, name, prompt, system))
    ways = {(each.reader.repeats_prompt, each.reader.stored) for each in opened}
    if len(ways) == 1 and all(dataset.features == sets[0].features for dataset in sets):
        return concatenate_datasets(sets)
    features = [dataset.features for dataset in sets]
    alike = {name for name in sets[0].column_names if len({str(each.get(name)) for each in features}) == 1}
    scores = [find_score_columns(dataset.column_names, named.scores) for dataset in sets]
    if scores[0] and len({*scores}) == 1 and alike.issuperset(scores[0].names):
        scores = [None] * len(sets)  # they stay where they are
    without = [name for (name, _), found in zip(parts, scores, strict=True) if found is None]
    if without and len(without) < len(parts):
        logger.warning("no scores in %s, so those of the other sets are left out", ", ".join(without))
    read_scores = {name for found in scores if found for name in (*SCORES, *found.names)}
    own = {named.prompt or "prompt", "prompt", *COMPLETIONS, *TEMPLATE, named.system}
    common = [name for name in sets[0].column_names if name in alike and name not in {*own, *read_scores}]
    both = zip(opened, scores, strict=True)
    read = [_read(each, None if without else found, common, named) for each, found in both]
    dropped = {name for dataset in sets for name in dataset.column_names} - set(read[0].column_names)
    dropped -= {*read_scores, *(each.reader.prompt_column for each in opened)}
    if dropped:
        logger.info("columns that not all sets have in one type are left out: %s", ", ".join(sorted(dropped)))
    unused = [name for name in TEMPLATE if not any(name in dataset.column_names for dataset in sets)]
    return concatenate_datasets(read).remove_columns(unused)


def _check_named(parts: Sequence[tuple[str, Dataset]], named: Named) -> None:
    """
    Raises:
        ValueError: no set has the column that is named, or one has not the scores.
    """
    for option, column in {"prompt_column": named.prompt, "system_column": named.system}.items():
        has = [column in dataset.column_names for _, dataset in parts]
        if column is not None and not any(has):
            there = ", ".join(dict.fromkeys(name for _, dataset in parts for name in dataset.column_names))
            raise RowError(f"{option} names {column!r}, which no set of the mixture has: there are {there}")
        if option == "system_column" and column is not None and not all(has):
            without = ", ".join(name for (name, _), there in zip(parts, has, strict=True) if not there)
            logger.info("no column %r in %s, whose rows get no system message", column, without)
    for name, dataset in parts:
        if missing := [column for column in named.scores or () if column not in dataset.column_names]:
            raise ScoreError(
                f"score_columns names {missing}, but {name} has only the columns {dataset.column_names}: rename its "
                "scores, or train without those of all sets"
            )


@contextmanager
def _naming_prompt(column: str | None, name: str) -> Iterator[None]:
    """Says of a set without the prompt column that is named that this is so, where it cannot be read without."""
    try:
        yield
    except RowError as error:
        if column is None:
            raise
        raise RowError(f"prompt_column names {column!r}, which {name} does not have; without it: {error}") from error


def _read(opened: OpenedSet, scores: ScoreColumns | None, common: list[str], named: Named) -> Dataset:
    dataset, name = opened.dataset, opened.reader.split
    if scores is not None:
        refuse_class_labels(dataset, scores, name)
    # Json columns hold text beside messages, and messages with different keys
    features: dict[str, Any] = {
        named.prompt or "prompt": Json(),
        **{name: Json() for name in (*COMPLETIONS, *TEMPLATE)},
    }
    features |= {named.system: Value("string")} if named.system else {}
    features |= {column: Value("float64") for column in named.scores or SCORES} if scores else {}
    return dataset.map(
        _rows,
        batched=True,
        with_indices=True,
        fn_kwargs={"reader": opened.reader, "scores": scores, "named": named, "version": VERSION},
        remove_columns=[column for column in dataset.column_names if column not in common],
        features=Features({column: kind for column, kind in dataset.features.items() if column in common} | features),
        desc=f"Reading {name}",
    )


def _rows(
    batch: Mapping[str, list[Any]],
    numbers: list[int],
    reader: RowReader,
    scores: ScoreColumns | None,
    named: Named,
    version: str,  # only part of the fingerprint
) -> dict[str, list[Any]]:
    rows = read_batch(replace(reader, system_column=None), batch, numbers)
    made: dict[str, list[Any]] = {
        named.prompt or "prompt": [_as_json(row.prompt) for row in rows],
        "chosen": [_as_json(row.completions[0]) for row in rows],
        "rejected": [_as_json(row.completions[1]) for row in rows],
        "tools": [row.template.get("tools") for row in rows],
        "chat_template_kwargs": [
            {name: value for name, value in row.template.items() if name != "tools"} or None for row in rows
        ],
    }
    if named.system:
        systems = batch.get(named.system) or [None] * len(rows)
        both = zip(numbers, systems, strict=True)
        made[named.system] = [reader.system_text({named.system: text}, reader.where(i)) for i, text in both]
    if scores is not None:
        given = [{name: batch[name][i] for name in scores.names} for i in range(len(rows))]
        pairs = list(map(scores.read, given))
        for number, row, pair in zip(numbers, given, pairs, strict=True):
            if not all(score is None or _is_number(score) for score in pair):  # which the column could not hold
                check_row(row, scores, f"row {number} of the {reader.split} data set")
        if named.scores is not None and scores.rejected is None:
            made[scores.chosen] = [_gap(*pair) for pair in pairs]
        else:
            made |= dict(zip(named.scores or SCORES, map(list, zip(*pairs, strict=True)), strict=True))
    return made


def _is_number(score: Any) -> bool:
    return isinstance(score, int | float) and not isinstance(score, bool)


def _gap(chosen: Any, rejected: Any) -> Any:
    return chosen - rejected if _is_number(chosen) and _is_number(rejected) else chosen


def _as_json(part: Part) -> Any:
    """Text as JSON text, since a Json column reads any text as JSON."""
    return json.dumps(part) if isinstance(part, str) else list(map(in_parts, part))
