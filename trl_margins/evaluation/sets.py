"""What a model is evaluated on: scored pairs, scored lists of answers, or RM-Bench, told apart by their columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trl.data_utils import maybe_extract_prompt

from ..data.rows import without_extras
from ..data.scores import ScoreColumns, ScoreError, check_scores, find_score_columns, problem_of
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
    prompts: list[Any]  # [N] texts or messages
    answers: list[list[Any]]  # [N] of [k]; the chosen one first; RM-Bench: three chosen styles, three rejected ones
    scores: list[Sequence[float]] | None = None  # [N] of [k]
    gap_only: bool = False  # scores stand for nothing but their difference
    domains: list[str] = field(default_factory=list)  # [N] of RM-Bench


def evaluation_set(
    dataset: Dataset, name: str, score_columns: Sequence[str] | None = None, as_chat: bool = False, source: str = ""
) -> EvaluationSet:
    """Reads a data set of any of the three kinds.

    Args:
        dataset: rows with `prompt`, `responses`, `scores`; RM-Bench's rows; or pairs in any form that TRL takes.
        name: in tables and messages.
        score_columns: of pairs, if not the usual names.
        as_chat: RM-Bench's texts become messages, as a model with a chat template was trained on.
        source: its file, whose name may say the domain of RM-Bench's rows.

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
    return _pairs(dataset, name, score_columns)


def _pairs(dataset: Dataset, name: str, score_columns: Sequence[str] | None) -> EvaluationSet:
    columns = find_score_columns(dataset.column_names, score_columns)
    if columns is not None:
        try:
            check_scores(dataset, columns, name)
        except ScoreError as error:
            logger.warning("%s; pairs without scores count in pwa_all alone", error)
    rows = [maybe_extract_prompt(row) for row in without_extras(dataset, name)]
    return EvaluationSet(
        name,
        "pairs",
        prompts=[row["prompt"] for row in rows],
        answers=[[row["chosen"], row["rejected"]] for row in rows],
        scores=None if columns is None else [_scores(row, columns) for row in rows],
        gap_only=columns is not None and columns.rejected is None,
    )


def _scores(row: Mapping[str, Any], columns: ScoreColumns) -> list[float]:
    return [math.nan if problem_of(score) else float(score) for score in columns.read(row)]


def _listwise(dataset: Dataset, name: str) -> EvaluationSet:
    rows = dataset.select_columns(list(LISTS)).to_list()
    for i, row in enumerate(rows):
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
        prompts=[row["prompt"] for row in rows],
        answers=[[_as_answer(answer, row["prompt"]) for answer in row["responses"]] for row in rows],
        scores=[row["scores"] for row in rows],
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
        prompts=prompts,
        answers=[
            [_as_answer(answer, prompt) for answer in (*row["chosen"], *row["rejected"])]
            for row, prompt in zip(rows, prompts, strict=True)
        ],
        domains=[domain_of(row.get("domain"), source) for row in rows],
    )


def _as_answer(answer: Any, prompt: Any) -> Any:
    """A text answers a conversation as a message does."""
    if isinstance(prompt, list) and isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return answer
