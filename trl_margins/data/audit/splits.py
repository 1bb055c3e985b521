"""The audit of one split."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...pairs import IS_FLIPPED
from ...rows import PreferenceRow, RowError, RowReader
from ...rows.counts import RowCounts, count_rows
from ...rows.form import IMAGES, require_columns
from ...rows.notes import notes, why_refused
from ...rows.opened import reader_for
from ...rows.scores import ScoreError, count_flipped
from ..evaluation_factors import add_columns
from ..formats import transformed
from . import counting
from .counting import FACTOR, ROUGE_L, shortened
from .factor_margins import FactorMargins, factor_margins
from .gradient_mass import GradientMass, gradient_mass

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The settings of an audit."""

    score_columns: Sequence[str] | None = None  # as for `find_score_columns`
    min_score_gap: float = 2.0  # the evaluation's threshold
    score_gap_threshold: float = 1.0  # of GapPO's hard filter, in its gradient mass
    measure: counting.Measure | None = None  # counts tokens in readable rows; without it lengths are in words
    max_length: int = 1024  # tokens of prompt and completion; needs `measure`
    ef_sample: int = 1000  # at most so many rows get evaluation factors: ROUGE-L where there is no column of them,
    ef_metrics: Sequence[str] = ()  # and these
    encoder: str | None = None  # of BERTScore
    seed: int = 0  # of that sample, and of the batches of normalised weights
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
    scores: counting.Scores | None = None
    gradient_mass: GradientMass | None = None  # None without scores
    lengths: counting.PairLengths | None = None
    truncation: counting.Truncation | None = None
    duplicates: counting.Duplicates | None = None
    factors: counting.Factors | None = None
    factor_margins: list[FactorMargins] = field(default_factory=list)  # of the metrics that were asked for
    methods: dict[str, str | None] = field(default_factory=dict)  # id → why not; None: it can be trained


def audit_split(dataset: Dataset, split: str, settings: Settings) -> tuple[SplitAudit, Counter[bytes]]:
    """The audit of a split without the methods, and the number of rows of each prompt."""
    dataset = transformed(dataset)
    columns, n_rows = list(dataset.column_names), len(dataset)
    try:
        require_columns(columns, split)
    except RowError as error:
        return SplitAudit(n_rows, columns, refused=str(error)), Counter()
    dataset = dataset.with_format(None)
    named, refused = (settings.prompt_column, settings.system_column), None
    try:
        reader = reader_for(dataset, split, *named)
    except RowError as error:  # an audit goes on
        reader, refused = RowReader.of(columns, split, *named), str(error)
    n_flipped = None
    if IS_FLIPPED in columns:
        try:
            n_flipped = count_flipped(dataset, split)
        except ScoreError as error:
            refused = refused or str(error)
    scores, gaps = counting.score_gaps(dataset, split, settings.score_columns, settings.min_score_gap)
    given = dataset[FACTOR][:] if FACTOR in columns else None
    texts = _read_texts(dataset, reader)
    reader = replace(reader, repeats_prompt=texts.counts.repeats_prompt)
    sampled = _sampled_factors(dataset, reader, texts.rows, [] if given is not None else [ROUGE_L], settings)
    factors, of_column = counting.evaluation_factors(given, sampled.get(ROUGE_L, ()), split)
    compared = {metric: np.array(sampled[metric]) for metric in settings.ef_metrics}
    if compared and given is not None:
        compared[f"column {FACTOR}"] = of_column
    if texts.unreadable:
        logger.warning("%s: %d of %d rows cannot be read", split, len(texts.unreadable), n_rows)
    words = np.array(texts.n_words, int).reshape(-1, 3)
    if settings.measure is None:
        lengths = counting.Lengths("words", *words.T)
    else:
        lengths = settings.measure(dataset, reader, texts.rows)
    measured = zip(texts.rows, texts.keys, strict=True)
    same = np.array([chosen == rejected for i, (_, chosen, rejected) in measured if i not in lengths.problems], bool)
    empty: dict[str, Any] = {
        f"empty_{part}": _found({texts.rows[i]: "" for i in np.flatnonzero(column == 0)})
        for part, column in zip(("prompts", "chosen", "rejected"), words.T, strict=True)
    }
    found = SplitAudit(
        n_rows=n_rows,
        columns=columns,
        n_read=len(texts.rows),
        unreadable=_found(texts.unreadable),
        untokenizable=_found(lengths.problems),
        implicit=reader.prompt_column is None,
        refused=refused or why_refused(reader, texts.counts),
        notes=[*_of_images(columns), *(note.text for note in notes(reader, texts.counts))],
        n_flipped=n_flipped,
        scores=scores,
        gradient_mass=gradient_mass(gaps, settings.score_gap_threshold, settings.seed),
        lengths=counting.pair_lengths(lengths),
        truncation=counting.truncation(lengths, settings.max_length, same),
        duplicates=counting.count_duplicates(texts.keys),
        factors=factors,
        factor_margins=factor_margins(compared),
        **empty,
    )
    return found, counting.count_prompts(texts.keys)


def _of_images(columns: Sequence[str]) -> Iterator[str]:
    for name in columns:
        if name in IMAGES:
            yield (
                f"column {name!r}: images are not looked at here, and train a vision-language model on DPOTrainer's "
                "base alone; other training, and evaluate, refuse the column"
            )


def _found(problems: Mapping[int, str]) -> Found | None:
    first = min(problems, default=None)
    return None if first is None else Found(len(problems), first, shortened(problems[first]))


@dataclass
class Texts:
    """What is gathered while the rows are read: never the texts themselves."""

    counts: RowCounts = field(default_factory=RowCounts)
    unreadable: dict[int, str] = field(default_factory=dict)  # row → why
    rows: list[int] = field(default_factory=list)  # the readable ones, to which the next two lists belong
    keys: list[counting.Key] = field(default_factory=list)
    n_words: list[list[int]] = field(default_factory=list)  # prompt, chosen, rejected


def _sampled_factors(
    dataset: Dataset, reader: RowReader, readable: list[int], metrics: Sequence[str], settings: Settings
) -> dict[str, list[float]]:
    """Metric → evaluation factors of the readable rows in a sample: of these metrics and the settings'."""
    columns = {metric: metric for metric in (*metrics, *settings.ef_metrics)}
    if not columns:
        return {}
    n_sampled = min(settings.ef_sample, len(dataset))
    sample = set(np.random.default_rng(settings.seed).choice(len(dataset), n_sampled, replace=False).tolist())
    rows = dataset.select([row for row in readable if row in sample]).select_columns(reader.needed)
    scored = add_columns(rows, columns, reader, encoder=settings.encoder)
    return {metric: scored[metric][:] for metric in columns}


def _read_texts(dataset: Dataset, reader: RowReader) -> Texts:
    """Reads every row as training does."""
    from datasets.utils import tqdm

    texts = Texts()
    with tqdm(total=len(dataset), desc=f"Reading {reader.split}", delay=2, leave=False) as bar:

        def unreadable(error: RowError, number: int) -> None:
            bar.update()
            texts.unreadable[number] = shortened(str(error))

        def read(row: PreferenceRow, number: int) -> None:
            bar.update()
            prompt, completions = row.texts
            chosen, rejected = map(counting.digest, row.completions)
            texts.rows.append(number)
            texts.keys.append((counting.digest(prompt), chosen, rejected))
            texts.n_words.append([len(text.split()) for text in (prompt, *completions)])

        texts.counts = count_rows(dataset, reader, unreadable, read)
    return texts
