"""Evaluation sets: scored pairs, scored lists of completions, or RM-Bench, recognized by their columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset

from ..rows import PreferenceRow, RowError, RowReader, open_rows
from ..rows.form import TEMPLATE, part_of, pruned, without_prompt
from ..rows.scores import (
    ScoreError,
    as_number,
    check_scores,
    find_score_columns,
    problem_of,
    refuse_class_labels,
)
from .rm_bench import STYLES, domain_of

logger = logging.getLogger(__name__)

Kind = Literal["pairs", "listwise", "rm-bench"]
LISTS = ("prompt", "responses", "scores")


@dataclass(frozen=True)
class EvaluationSet:
    """N prompts with the completions that a model scores."""

    name: str
    kind: Kind
    rows: list[PreferenceRow]  # [N] with k completions, the chosen one first; RM-Bench: three chosen, three rejected
    scores: list[list[float]] | None = None  # [N] of [k]
    gap_only: bool = False  # only the difference of the scores has a meaning
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
        score_columns: of pairs, if they do not have the usual names.
        as_chat: turn RM-Bench's texts into messages, for a model that was trained on a chat template.
        source: its file, whose name may tell the domain of RM-Bench's rows.
        prompt_column, system_column: of pairs, as for `RowReader`.

    Raises:
        ValueError: no rows, or rows of another kind; the message names the row and the column.
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
    if isinstance(first, list) and all(isinstance(each, str) for each in first):
        return _rm_bench(dataset, name, as_chat, source or name)
    return _pairs(dataset, name, score_columns, prompt_column, system_column)


def _pairs(
    dataset: Dataset,
    name: str,
    score_columns: Sequence[str] | None,
    prompt_column: str | None,
    system_column: str | None,
) -> EvaluationSet:
    columns, scores, gap_only = find_score_columns(dataset.column_names, score_columns), None, False
    if columns is not None:
        refuse_class_labels(dataset, columns, name)
        try:
            check_scores(dataset, columns, name)
        except ScoreError as error:
            logger.warning("%s; pairs without scores count in pwa_all alone", error)
        pairs = [columns.read(row) for row in dataset.select_columns(list(columns.names))]
        scores = [[math.nan if problem_of(score) else float(score) for score in pair] for pair in pairs]
        gap_only = columns.is_gap(score for _, score in scores)
    rows = list(open_rows(dataset, name, prompt_column, system_column))
    return EvaluationSet(name, "pairs", rows, scores, gap_only)


def _listwise(dataset: Dataset, name: str) -> EvaluationSet:
    reader = RowReader(name, tuple(dataset.column_names), features=dataset.features)
    raws = dataset.select_columns([column for column in (*LISTS, *TEMPLATE) if column in reader.columns]).to_list()
    rows = []
    for i, raw in enumerate(raws):
        where = f"row {i} of {name}"
        for column in LISTS[1:]:
            if not isinstance(raw[column], list) or not raw[column]:
                raise RowError(f"column {column!r}, {where}: {raw[column]!r} is not a list of one or more")
        if len(raw["responses"]) != len(raw["scores"]):
            raise ValueError(
                f"{name}, row {i}: {len(raw['responses'])} responses and {len(raw['scores'])} scores: give each "
                "response one"
            )
        for j, score in enumerate(raw["scores"]):
            if problem := problem_of(score):
                raise ScoreError(f"column 'scores', {where}, response {j}: the score {score!r} {problem}")
        within = getattr(dataset.features["responses"], "feature", None)
        completions = [pruned(part, within) for part in raw["responses"]]
        prompt = pruned(raw["prompt"], dataset.features["prompt"])
        rows.append(_row(prompt, completions, where, reader.template(raw, where)))
    scores = [[as_number(score) for score in raw["scores"]] for raw in raws]
    return EvaluationSet(name, "listwise", rows, scores)


def _rm_bench(dataset: Dataset, name: str, as_chat: bool, source: str) -> EvaluationSet:
    rows, domains = [], []
    for i, raw in enumerate(dataset.to_list()):
        for side in ("chosen", "rejected"):
            if len(raw[side]) != len(STYLES):
                raise ValueError(
                    f"{name}, row {i}: {side} has {len(raw[side])} completions, RM-Bench has {len(STYLES)}"
                )
        prompt = [{"role": "user", "content": raw["prompt"]}] if as_chat else raw["prompt"]
        rows.append(_row(prompt, [*raw["chosen"], *raw["rejected"]], f"row {i} of {name}", {}))
        domains.append(domain_of(raw.get("domain"), source))
    return EvaluationSet(name, "rm-bench", rows, domains=domains)


def _row(prompt: Any, completions: list[Any], where: str, template: Mapping[str, Any]) -> PreferenceRow:
    """If anything is in messages, all text becomes messages; completions lose the prompt that they repeat."""
    parts: list[Any]
    try:
        prompt, *parts = (part_of(part) for part in (prompt, *completions))
    except ValueError as error:
        raise RowError(f"{where}: {error}") from None
    if any(isinstance(part, list) for part in (prompt, *parts)):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        parts = [[{"role": "assistant", "content": part}] if isinstance(part, str) else part for part in parts]
        parts = [*without_prompt(prompt, parts)[1]]
    return PreferenceRow(prompt, parts, template)
