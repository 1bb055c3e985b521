"""What a model is evaluated on: scored pairs, scored lists of answers, or RM-Bench, told apart by their columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..rows import PreferenceRow, RowError, RowReader, open_rows
from ..rows.form import TEMPLATE, part_of, pruned, without_prompt
from ..rows.scores import (
    ScoreColumns,
    ScoreError,
    as_number,
    check_scores,
    find_score_columns,
    problem_of,
    refuse_class_labels,
)
from .rm_bench import STYLES, domain_of

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Kind = Literal["pairs", "listwise", "rm-bench"]
LISTS = ("prompt", "responses", "scores")


@dataclass(frozen=True)
class EvaluationSet:
    """N prompts with the answers that a model scores."""

    name: str
    kind: Kind
    rows: list[PreferenceRow]  # [N] with k completions; the chosen one first; RM-Bench: three chosen, three rejected
    scores: list[Sequence[float]] | None = None  # [N] of [k]
    gap_only: bool = False  # scores stand for nothing but their difference
    domains: list[str] = field(default_factory=list)  # [N] of RM-Bench


def evaluation_set(
    dataset: Dataset,
    name: str,
    score_columns: Sequence[str] | None = None,
    as_chat: bool = False,
    source: str = "",
    prompt_column: str | None = None,
    system_column: str | None = None,
) -> EvaluationSet:
    """Reads a data set of any of the three kinds.

    Args:
        dataset: rows with `prompt`, `responses`, `scores`; RM-Bench's rows; or pairs in any form that training takes.
        name: in tables and messages.
        score_columns: of pairs, if not the usual names.
        as_chat: RM-Bench's texts become messages, as a model with a chat template was trained on.
        source: its file, whose name may say the domain of RM-Bench's rows.
        prompt_column, system_column: of pairs, as for `RowReader`.

    Raises:
        ValueError: no rows, or rows that are none of these; the text names row and column.
    """
    if not len(dataset):
        raise ValueError(f"{name}: the data set has no rows")
    columns = set(dataset.column_names)
    if set(LISTS) <= columns:
        return _listwise(dataset, name)
    if not {"chosen", "rejected"} <= columns:
        raise ValueError(
            f"{name}: its columns are {sorted(columns)}; an evaluation set has chosen and rejected, or "
            f"{', '.join(LISTS)}"
        )
    first = dataset[0]["chosen"]
    if isinstance(first, list) and all(isinstance(answer, str) for answer in first):
        return _rm_bench(dataset, name, as_chat, source or name)
    return _pairs(dataset, name, score_columns, prompt_column, system_column)


def _pairs(
    dataset: Dataset,
    name: str,
    score_columns: Sequence[str] | None,
    prompt_column: str | None,
    system_column: str | None,
) -> EvaluationSet:
    columns = find_score_columns(dataset.column_names, score_columns)
    scores = None
    if columns is not None:
        refuse_class_labels(dataset, columns, name)
        try:
            check_scores(dataset, columns, name)
        except ScoreError as error:
            logger.warning("%s; pairs without scores count in pwa_all alone", error)
        scores = [_scores(row, columns) for row in dataset.select_columns(list(columns.names))]
    opened = open_rows(dataset, name, prompt_column, system_column)
    return EvaluationSet(
        name,
        "pairs",
        rows=list(opened),
        scores=scores,
        gap_only=columns is not None and columns.is_gap(score for _, score in scores),
    )


def _scores(row: Mapping[str, Any], columns: ScoreColumns) -> list[float]:
    return [math.nan if problem_of(score) else float(score) for score in columns.read(row)]


def _listwise(dataset: Dataset, name: str) -> EvaluationSet:
    reader = RowReader(name, tuple(dataset.column_names), features=dataset.features)
    rows = dataset.select_columns([column for column in (*LISTS, *TEMPLATE) if column in reader.columns]).to_list()
    for i, row in enumerate(rows):
        for column in LISTS[1:]:
            if not isinstance(row[column], list) or not row[column]:
                raise RowError(f"column {column!r}, row {i} of {name}: {row[column]!r} is not a list of one or more")
        if len(row["responses"]) != len(row["scores"]):
            raise ValueError(
                f"{name}, row {i}: {len(row['responses'])} responses and {len(row['scores'])} scores: each response "
                "has one"
            )
        for j, score in enumerate(row["scores"]):
            if problem := problem_of(score):
                raise ScoreError(f"column 'scores', row {i} of {name}, response {j}: the score {score!r} {problem}")
    return EvaluationSet(
        name,
        "listwise",
        rows=[_row(row["prompt"], row["responses"], i, name, reader, row) for i, row in enumerate(rows)],
        scores=[[as_number(score) for score in row["scores"]] for row in rows],
    )


def _rm_bench(dataset: Dataset, name: str, as_chat: bool, source: str) -> EvaluationSet:
    rows = dataset.to_list()
    for i, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            if len(row[side]) != len(STYLES):
                raise ValueError(f"{name}, row {i}: {side} has {len(row[side])} answers, RM-Bench has {len(STYLES)}")
    prompts = [[{"role": "user", "content": row["prompt"]}] if as_chat else row["prompt"] for row in rows]
    return EvaluationSet(
        name,
        "rm-bench",
        rows=[
            _row(prompt, [*row["chosen"], *row["rejected"]], i, name)
            for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        ],
        domains=[domain_of(row.get("domain"), source) for row in rows],
    )


def _row(
    prompt: Any,
    completions: list[Any],
    number: int,
    name: str,
    reader: RowReader | None = None,
    raw: Mapping[str, Any] | None = None,
) -> PreferenceRow:
    """A text completes a conversation as a message does, and conversations lose the prompt that they repeat.

    Raises:
        RowError: something that is neither text nor messages.
    """
    features = reader.features if reader else {}
    within = getattr(features.get("responses"), "feature", None)
    try:
        parts = [part_of(pruned(prompt, features.get("prompt")))]
        parts += [part_of(pruned(part, within)) for part in completions]
    except ValueError as error:
        raise RowError(f"row {number} of {name}: {error}") from None
    if any(isinstance(part, list) for part in parts):
        speakers = ["user", *["assistant"] * len(completions)]
        parts = [
            [{"role": role, "content": part}] if isinstance(part, str) else part
            for role, part in zip(speakers, parts, strict=True)
        ]
        parts = [parts[0], *without_prompt(parts[0], parts[1:])[1]]
    template = reader.template(raw, f"row {number} of {name}") if reader and raw else {}
    return PreferenceRow(parts[0], parts[1:], template)
