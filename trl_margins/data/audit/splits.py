"""The audit of one split."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ...pairs import IS_FLIPPED
from ...rows import PreferenceRow, RowError, RowReader
from ...rows.opened import RowCounts, count_rows, notes, reader_for, why_refused
from ..evaluation_factors import completion_texts, compute
from ..formats import transformed
from .counting import (
    FACTOR,
    Duplicates,
    Factors,
    Key,
    Lengths,
    Measure,
    PairLengths,
    Scores,
    Truncation,
    count_duplicates,
    count_prompts,
    digest,
    evaluation_factors,
    pair_lengths,
    score_gaps,
    shortened,
    truncation,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The settings of an audit."""

    score_columns: Sequence[str] | None = None  # as for `find_score_columns`
    min_score_gap: float = 2.0  # the evaluation's threshold
    measure: Measure | None = None  # counts tokens in readable rows; without it lengths are in words
    max_length: int = 1024  # tokens of prompt and completion; needs `measure`
    ef_sample: int = 1000  # at most so many rows get an evaluation factor, where there is no column of them
    seed: int = 0  # of that sample
    prompt_column: str | None = None  # as for `RowReader`
    system_column: str | None = None


@dataclass(frozen=True)
class Found:
    """Rows that have something in common."""

    n: int
    first_row: int
    example: str = ""


@dataclass(frozen=True)
class SplitAudit:
    """The audit of one split. What needs pairs is None without the columns chosen and rejected."""

    n_rows: int
    columns: list[str]
    n_read: int = 0  # pairs; what follows is about them
    unreadable: Found | None = None
    untokenizable: Found | None = None
    implicit: bool = False  # no prompt apart from the completions
    refused: str | None = None  # why training does not take the set, apart from single rows
    notes: list[str] = field(default_factory=list)  # what training says of the rows
    empty_prompts: Found | None = None
    empty_chosen: Found | None = None
    empty_rejected: Found | None = None
    n_flipped: int | None = None  # None without that column
    scores: Scores | None = None
    lengths: PairLengths | None = None
    truncation: Truncation | None = None
    duplicates: Duplicates | None = None
    factors: Factors | None = None
    methods: dict[str, str | None] = field(default_factory=dict)  # id → why not; None: it can be trained


@dataclass
class Texts:
    """What is gathered while the rows are read: never the texts themselves."""

    counts: RowCounts = field(default_factory=RowCounts)
    rows: list[int] = field(default_factory=list)  # the readable ones, to which the next two lists belong
    keys: list[Key] = field(default_factory=list)
    n_words: list[tuple[int, int, int]] = field(default_factory=list)  # prompt, chosen, rejected
    factors: list[float] = field(default_factory=list)  # of the sample
    found: dict[str, Found] = field(default_factory=dict)  # problem, a field of `SplitAudit` → rows

    def note(self, problem: str, row: int, example: str = "") -> None:
        found = self.found.get(problem, Found(0, row, example))
        self.found[problem] = replace(found, n=found.n + 1)


def audit_split(dataset: Dataset, split: str, settings: Settings) -> tuple[SplitAudit, Counter[bytes]]:
    """The audit of a split without the methods, and the number of rows of each prompt."""
    dataset = transformed(dataset)
    columns, n_rows = list(dataset.column_names), len(dataset)
    if not {"chosen", "rejected"} <= set(columns):
        return SplitAudit(n_rows, columns), Counter()
    dataset = dataset.with_format(None)
    names, refused = (settings.prompt_column, settings.system_column), None
    try:
        reader = reader_for(dataset, split, *names)
    except RowError as error:  # an audit goes on
        reader, refused = RowReader.of(columns, split, *names), str(error)
    scores = score_gaps(dataset, settings.score_columns, settings.min_score_gap)
    n_sampled = 0 if FACTOR in columns else min(settings.ef_sample, n_rows)
    sample = np.random.default_rng(settings.seed).choice(n_rows, n_sampled, replace=False)
    texts = _read_texts(dataset, reader, set(sample.tolist()))
    reader = replace(reader, repeats_prompt=texts.counts.repeats_prompt)
    if n_unreadable := n_rows - len(texts.rows):
        logger.warning("%s: %d of %d rows cannot be read", split, n_unreadable, n_rows)
    if settings.measure is None:
        lengths = Lengths("words", *np.array(texts.n_words, int).reshape(-1, 3).T)
    else:
        lengths = settings.measure(dataset, reader, texts.rows)
    for row, problem in sorted(lengths.problems.items()):
        texts.note("untokenizable", row, shortened(problem))
    found = SplitAudit(
        n_rows=n_rows,
        columns=columns,
        n_read=len(texts.rows),
        implicit=reader.prompt_column is None,
        refused=refused or why_refused(reader, texts.counts),
        notes=[note.text for note in notes(reader, texts.counts)],
        n_flipped=sum(map(bool, dataset[IS_FLIPPED][:])) if IS_FLIPPED in columns else None,
        scores=scores,
        lengths=pair_lengths(lengths),
        truncation=truncation(lengths, settings.max_length),
        duplicates=count_duplicates(texts.keys),
        factors=evaluation_factors(dataset[FACTOR][:] if FACTOR in columns else None, texts.factors, split),
        **texts.found,
    )
    return found, count_prompts(texts.keys)


def _read_texts(dataset: Dataset, reader: RowReader, sample: set[int]) -> Texts:
    """Reads every row as training does; computes evaluation factors in those of the sample."""
    from datasets.utils import tqdm

    texts = Texts()
    implicit = reader.prompt_column is None
    with tqdm(total=len(dataset), desc=f"Reading {reader.split}", delay=2, leave=False) as bar:

        def unreadable(error: RowError, number: int) -> None:
            bar.update()
            texts.note("unreadable", number, shortened(str(error)))

        def read(row: PreferenceRow, number: int) -> None:
            bar.update()
            prompt, (chosen, rejected) = row.texts
            texts.rows.append(number)
            texts.keys.append((digest(prompt), *map(digest, row.completions)))
            texts.n_words.append((len(prompt.split()), len(chosen.split()), len(rejected.split())))
            if number in sample:
                compared = completion_texts(row, implicit)
                texts.factors += compute(compared[:1], compared[1:])
            for part, text in (("prompts", prompt), ("chosen", chosen), ("rejected", rejected)):
                if not text.strip():
                    texts.note(f"empty_{part}", number)

        texts.counts = count_rows(dataset, reader, unreadable, read)
    return texts
