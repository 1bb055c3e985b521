"""All about one split."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...pairs import IS_FLIPPED
from ...rows import RowError, RowReader
from ...rows.opened import notes, reader_for, why_refused
from ..formats import transformed
from .duplicates import Duplicates, count_duplicates, count_prompts
from .factors import FACTOR, Factors, factors_of_column, factors_of_sample
from .lengths import AnswerLengths, Lengths, Measure, Truncation, answer_lengths, truncation
from .reading import Found, read_texts, shortened
from .score_gaps import Scores, score_gaps

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitAudit:
    """What needs pairs is None where there are no columns chosen and rejected."""

    n_rows: int
    columns: list[str]
    n_read: int = 0  # pairs; what follows is about them
    unreadable: Found | None = None
    untokenizable: Found | None = None
    implicit: bool = False  # no prompt apart from the answers
    refused: str | None = None  # why training does not take the set, beside single rows
    notes: list[str] = field(default_factory=list)  # what training says of the rows
    empty_prompts: Found | None = None
    empty_chosen: Found | None = None
    empty_rejected: Found | None = None
    n_flipped: int | None = None  # None without that column
    scores: Scores | None = None
    lengths: AnswerLengths | None = None
    truncation: Truncation | None = None
    duplicates: Duplicates | None = None
    factors: Factors | None = None
    methods: dict[str, str | None] = field(default_factory=dict)  # id → why not; None: it can be trained


def audit_split(
    dataset: Dataset,
    split: str,
    *,
    score_columns: Sequence[str] | None,
    min_score_gap: float,
    measure: Measure | None,
    max_length: int,
    ef_sample: int,
    seed: int,
    prompt_column: str | None = None,
    system_column: str | None = None,
) -> tuple[SplitAudit, Counter[bytes]]:
    """The arguments are those of `audit`.

    Returns:
        The split's audit, but for the methods, and the rows of each of its prompts.
    """
    import numpy as np

    dataset = transformed(dataset)
    columns = list(dataset.column_names)
    if not {"chosen", "rejected"} <= set(columns):
        return SplitAudit(len(dataset), columns), Counter()
    n_rows = len(dataset)
    dataset = dataset.with_format(None)
    refused = None
    try:
        reader = reader_for(dataset, split, prompt_column, system_column)
    except RowError as error:  # an audit goes on
        reader, refused = RowReader.of(columns, split, prompt_column, system_column), str(error)
    scores = score_gaps(dataset, score_columns, min_score_gap)
    n_sampled = 0 if FACTOR in columns else min(ef_sample, n_rows)
    sample = np.random.default_rng(seed).choice(n_rows, n_sampled, replace=False)
    texts = read_texts(dataset, reader, set(sample.tolist()))
    reader = replace(reader, repeats_prompt=texts.counts.repeats_prompt)
    n_read = len(texts.rows)
    if n_read < n_rows:
        logger.warning("%s: %d of %d rows cannot be read", split, n_rows - n_read, n_rows)
    if measure is None:
        lengths = Lengths("words", *np.array(texts.n_words, int).reshape(-1, 3).T)
    else:
        lengths = measure(dataset, reader, texts.rows)
    untokenizable = None
    if lengths.problems:
        first = min(lengths.problems)
        untokenizable = Found(len(lengths.problems), first, shortened(lengths.problems[first]))
    found = SplitAudit(
        n_rows=n_rows,
        columns=columns,
        n_read=n_read,
        untokenizable=untokenizable,
        implicit=reader.prompt_column is None,
        refused=refused or why_refused(reader, texts.counts),
        notes=[note.text for note in notes(reader, texts.counts)],
        n_flipped=sum(map(bool, dataset[IS_FLIPPED][:])) if IS_FLIPPED in columns else None,
        scores=scores,
        lengths=answer_lengths(lengths),
        truncation=truncation(lengths, max_length),
        duplicates=count_duplicates(texts.keys),
        factors=factors_of_column(dataset[FACTOR][:], split)
        if FACTOR in columns
        else factors_of_sample(texts.factors),
        **texts.found,
    )
    return found, count_prompts(texts.keys)
