"""Evaluation sets: scored pairs, scored lists of completions, or RM-Bench, recognized by their columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from datasets import Dataset, Value

from ..checks import shown
from ..rows import PreferenceRow, open_rows
from ..rows.counts import is_blank
from ..rows.form import COMPLETIONS, refuse_images
from ..rows.list_forms import FORMS, list_form
from ..rows.lists import ScoredLists, row_of
from ..rows.messages import Message, is_list_of, says
from ..rows.raw import first_row
from ..rows.scores import (
    ScoreError,
    check_scores,
    find_score_columns,
    problem_of,
    refuse_class_labels,
    report_scores,
    warn_of_doubts,
)
from .reward_bench import SUBSETS
from .rm_bench import STYLES, domain_of

logger = logging.getLogger(__name__)

Kind = Literal["pairs", "listwise", "rm-bench"]
MOST_SUBSETS = 100


@dataclass(frozen=True)
class EvaluationSet:
    """N prompts with the completions that a model scores."""

    name: str
    kind: Kind
    rows: list[PreferenceRow]  # [N] with k completions, the chosen one first; RM-Bench: three chosen, three rejected
    scores: list[list[float]] | None = None  # [N] of [k]
    gap_only: bool = False  # only the difference of the scores has a meaning
    groups: list[str] = field(default_factory=list)  # [N] RM-Bench's domain, or the subset of a pair that has one


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
        dataset: scored lists in any known form; RM-Bench's rows; or pairs in any form that training takes.
        name: in tables and messages.
        score_columns: if they do not have the usual names.
        as_chat: turn the texts of RM-Bench, of RewardBench and of others' lists into messages, for a model with a
            chat template. The texts of `responses` are used as they are.
        source: its file, whose name may tell the domain of RM-Bench's rows.
        prompt_column, system_column: as for `RowReader`.

    Raises:
        ValueError: no rows, or rows of another kind; the message names the row and the column.
    """
    if not len(dataset):
        raise ValueError(f"{name}: the data set has no rows")
    columns = set(dataset.column_names)
    if {"prompt", "responses", "scores"} <= columns:  # the options may be for other sets of the same call
        score_columns = score_columns if columns.issuperset(score_columns or ()) else None
        prompt_column = prompt_column if prompt_column in columns else None
        system_column = system_column if system_column in columns else None
    refuse_images(dataset, f"{name}: completions are scored")
    form = list_form(columns, score_columns, prompt_column)
    if form is not None and (form.is_plain or not {"chosen", "rejected"} <= columns):
        if {"chosen", "rejected"} <= columns:
            logger.warning(
                "%s: its lists (responses, scores) are measured, and not the pairs (chosen, rejected) beside them: "
                "for those, remove the column responses",
                name,
            )
        as_chat = as_chat and not form.is_plain
        if as_chat:
            logger.info("%s: texts are turns of a chat, for the model's template", name)
        lists = ScoredLists.of(dataset, name, score_columns, prompt_column, system_column, as_chat, strict=True)
        return _listwise(lists, name)
    if not {"chosen", "rejected"} <= columns:
        raise ValueError(
            f"{name}: its columns are {sorted(columns)}; an evaluation set has chosen and rejected, or {FORMS}"
        )
    first = (first_row(dataset, name) or {}).get("chosen")
    if first and is_list_of(first, str):
        if "num_correct" in columns:
            raise ValueError(
                f"{name}: these are the rows of RewardBench 2 (num_correct), one good answer against several, which "
                "are not read; RewardBench's own file (allenai/reward-bench) is"
            )
        return _rm_bench(dataset, name, as_chat, source or name)
    return _pairs(dataset, name, score_columns, as_chat, prompt_column, system_column)


def _pairs(
    dataset: Dataset,
    name: str,
    score_columns: Sequence[str] | None,
    as_chat: bool,
    prompt_column: str | None,
    system_column: str | None,
) -> EvaluationSet:
    subsets = _subsets(dataset, name)
    texts = all(isinstance(dataset.features.get(column), Value) for column in ("prompt", "chosen", "rejected"))
    if as_chat and texts and subsets and SUBSETS.issuperset(subsets):
        dataset = dataset.map(_as_messages, desc="Texts as messages")
    columns, scores, gap_only = find_score_columns(dataset.column_names, score_columns), None, False
    if columns is not None:
        warn_of_doubts(columns, dataset.column_names, name)
        refuse_class_labels(dataset, columns, name)
        try:
            summary = check_scores(dataset, columns, name)
            report_scores(replace(summary, n_changed=0), columns, name)  # that is in float32, and these are not
        except ScoreError as error:
            logger.warning("%s; pairs without scores count in pwa_all alone", error)
        pairs = [columns.read(row) for row in dataset.select_columns(list(columns.names))]
        scores = [[math.nan if problem_of(score) else float(score) for score in pair] for pair in pairs]
        gap_only = columns.is_gap(score for _, score in scores)
    rows = list(open_rows(dataset, name, prompt_column, system_column))
    return EvaluationSet(name, "pairs", rows, scores, gap_only, subsets)


def _subsets(dataset: Dataset, name: str) -> list[str]:
    """[N] values of the column `subset`; empty without one."""
    if "subset" not in dataset.column_names:
        return []
    subsets = [each if isinstance(each, str) else str(each) for each in dataset.with_format(None)["subset"]]
    if (n := len(set(subsets))) > MOST_SUBSETS:
        logger.warning("%s: the column subset has %d values, too many for an accuracy of each", name, n)
        return []
    return subsets


def _as_messages(row: Mapping[str, str]) -> dict[str, list[Message]]:
    """A pair of texts, as RewardBench renders it: one question and its answers."""
    return {"prompt": says("user", row["prompt"])} | {side: says("assistant", row[side]) for side in COMPLETIONS}


def _listwise(lists: ScoredLists, name: str) -> EvaluationSet:
    found = [each.distinct() for each in lists]  # an answer is no better than itself
    if not found:
        why = "; ".join(lists.reasons.values()) or "no row has answers with scores"
        raise ValueError(f"{name}: there is nothing to measure: {why}")
    rows = [PreferenceRow(each.prompt, each.responses, each.template) for each in found]
    if blank := [each.row for each in found for part in each.responses if is_blank(part)]:
        logger.warning(
            "%s: %d answers have no text (the first is in row %d): they are ranked by how probable it is to say "
            "nothing. If that is not intended, drop them",
            *(name, len(blank), blank[0]),
        )
    return EvaluationSet(name, "listwise", rows, [each.scores for each in found])


def _rm_bench(dataset: Dataset, name: str, as_chat: bool, source: str) -> EvaluationSet:
    rows, domains = [], []
    for i, raw in enumerate(dataset.to_list()):
        for side in COMPLETIONS:
            texts = raw[side]
            if not is_list_of(texts, str) or len(texts) != len(STYLES):
                found = f"a list of {len(texts)} texts" if is_list_of(texts, str) else shown(texts)
                raise ValueError(
                    f"{name}, row {i}: {side} is {found}. RM-Bench's rows have lists of {len(STYLES)} texts; of a "
                    "pair, each completion is text, in no list"
                )
        prompt = says("user", raw["prompt"]) if as_chat else raw["prompt"]
        rows.append(row_of(prompt, [*raw["chosen"], *raw["rejected"]], f"row {i} of {name}", {}))
        domains.append(domain_of(raw.get("domain"), source))
    return EvaluationSet(name, "rm-bench", rows, groups=domains)
