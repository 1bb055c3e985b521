"""What is counted in one split: score gaps, lengths, duplicates and evaluation factors."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ...pairs import has_gap
from ...rows.scores import as_number, changed_gaps, find_score_columns, problem_of, spread, warn_of_doubts
from ..evaluation_factors import check_evaluation_factors

if TYPE_CHECKING:
    from datasets import Dataset

    from ...rows import RowReader

FACTOR, ROUGE_L = "evaluation_factor", "rougeL"
Key = tuple[bytes, bytes, bytes]  # digests of prompt, chosen, rejected

# from a data set, how it is read, and its readable rows
Measure = Callable[["Dataset", "RowReader", "list[int]"], "Lengths"]


def shortened(text: str) -> str:
    """At most 300 characters, for one line of a report. Errors repeat the data at their end, so the end is cut."""
    return text if len(text) <= 300 else f"{text[:299]}…"


# Distributions


@dataclass(frozen=True)
class Histogram:
    """Counts between edges. The first and the last bin also hold what lies beyond them."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Distribution:
    """Mean, quantiles and histogram of n numbers."""

    n: int
    mean: float
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    percentile_95: float
    maximum: float
    histogram: Histogram

    @property
    def reaches_beyond(self) -> tuple[bool, bool]:
        """Whether numbers lie below the first edge of the histogram, and above the last."""
        return self.minimum < self.histogram.edges[0], self.maximum > self.histogram.edges[-1]


def distribution(values: np.ndarray, edges: np.ndarray | None = None) -> Distribution | None:
    """The distribution of finite numbers; None if there are none."""
    if not len(values):
        return None
    edges = nice_edges(values) if edges is None else edges
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    low, q25, q50, q75, q95, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 0.95, 1)).tolist()
    histogram = Histogram(edges.tolist(), counts.tolist())
    return Distribution(len(values), float(np.mean(values)), low, q25, q50, q75, q95, high, histogram)


def nice_edges(values: np.ndarray, bins: int = 12) -> np.ndarray:
    """Edges of about `bins` bins at multiples of 1, 2 or 5 times a power of ten.

    They span all numbers but the outermost half per cent on either side, so that one outlier does not squeeze the
    others into one bin. Bins of whole numbers are at least 1 wide.
    """
    low, high = np.quantile(values, 0.005, method="lower"), np.quantile(values, 0.995, method="higher")
    if low == high:
        low, high = float(np.min(values)), float(np.max(values))
    raw = (high - low) / bins or 1.0
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if (np.mod(values, 1) == 0).all():
        step = max(step, 1.0)
    first, last = np.floor(low / step + 1e-9), np.floor(high / step + 1e-9) + 1
    return np.round(np.arange(first, last + 1) * step, 12)


# Scores


@dataclass(frozen=True)
class BadScores:
    """What is wrong with a score column: the number of bad values by kind, and the first of them."""

    column: str
    counts: dict[str, int]
    first_row: int
    first_value: str

    def __str__(self) -> str:
        """For example "1 value that is None and 2 values that are infinite, the first in row 3 (None)"."""
        plural = {"not a number": "not numbers", "a class label": "class labels"}
        counts = " and ".join(
            f"{n} values that are {plural.get(kind, kind)}" if n > 1 else f"1 value that is {kind}"
            for kind, n in self.counts.items()
        )
        return f"{counts}, the first in row {self.first_row} ({self.first_value})"


@dataclass(frozen=True)
class Scores:
    """Gaps score_chosen − score_rejected of the pairs whose scores are numbers."""

    columns: list[str]
    bad: list[BadScores]
    min_score_gap: float
    gap: Distribution | None  # None without such pairs
    n_ties: int
    n_reversed: int
    n_at_least: int  # pairs with |gap| ≥ min_score_gap, as the evaluation counts
    n_changed: int  # gaps that are another where training reads the scores


def score_gaps(
    dataset: Dataset, split: str, given: Sequence[str] | None, min_score_gap: float
) -> tuple[Scores | None, np.ndarray]:
    """The score gaps of a split, counted and as [N] numbers; None and no number without score columns.

    Raises:
        ScoreError: `given` names columns that are not there.
    """
    columns = find_score_columns(dataset.column_names, given)
    if columns is None:
        return None, np.empty(0)
    warn_of_doubts(columns, dataset.column_names, split)
    read = [_score_column(dataset, name, takes_lists=columns.rejected is None) for name in columns.names]
    one, other = (read[0][0], read[1][0] if len(read) == 2 else np.zeros(len(dataset)))
    gaps = one - other
    gaps = gaps[~np.isnan(gaps)]
    scores = Scores(
        columns=list(columns.names),
        bad=[bad for _, bad in read if bad],
        min_score_gap=min_score_gap,
        gap=distribution(gaps),
        n_ties=int((gaps == 0).sum()),
        n_reversed=int((gaps < 0).sum()),
        n_at_least=int(has_gap(one, other, min_score_gap).sum()),
        n_changed=changed_gaps([values for values, _ in read]),
    )
    return scores, gaps


def _score_column(dataset: Dataset, name: str, takes_lists: bool) -> tuple[np.ndarray, BadScores | None]:
    """The column with NaN in place of bad values, and what those were."""
    from datasets import ClassLabel

    given = dataset.with_format(None, columns=[name])[:][name]
    cells = [spread(value) if takes_lists and isinstance(value, list) else as_number(value) for value in given]
    labels = isinstance(dataset.features[name], ClassLabel)
    problems = ["is a class label" if labels else problem_of(cell) for cell in cells]
    values = np.array([np.nan if bad else cell for cell, bad in zip(cells, problems, strict=True)], np.float64)
    bad = [row for row, problem in enumerate(problems) if problem]
    if not bad:
        return values, None
    # the rest of a problem's text is its fix
    counts = Counter(re.sub(r"is ([^:(]*\w).*", r"\1", str(problems[row])) for row in bad)
    return values, BadScores(name, dict(counts), bad[0], shortened(repr(given[bad[0]])))


# Lengths


@dataclass(frozen=True)
class Lengths:
    """Lengths of N pairs, each array [N].

    `whole`, [2, N], is prompt + chosen and prompt + rejected, which `max_length` cuts, and `alike` how far both
    completions begin with the same tokens; None for words. `problems` maps the rows that could not be measured, and
    are not among the N, to the reason.
    """

    unit: str
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    alike: np.ndarray | None = None
    whole: np.ndarray | None = None
    problems: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PairLengths:
    """Distributions of lengths in `unit`. Chosen and rejected have the same edges."""

    unit: str
    prompt: Distribution | None
    chosen: Distribution | None
    rejected: Distribution | None
    n_chosen_longer: int
    n_chosen_shorter: int
    n_equal: int


@dataclass(frozen=True)
class Truncation:
    """Pairs whose prompt and completion are longer than max_length tokens."""

    max_length: int
    n: int  # pairs that were counted
    n_chosen: int
    n_rejected: int
    n_pairs: int  # on at least one side
    n_left_empty: int  # the prompt leaves no token for a completion
    n_alike: int  # the others whose completions differ as text, and have the same tokens
    n_told_apart: int  # those whose completions have other tokens


def pair_lengths(lengths: Lengths) -> PairLengths:
    """The distributions of lengths, and which completion is the longer one."""
    chosen, rejected = lengths.chosen, lengths.rejected
    edges = nice_edges(np.concatenate([chosen, rejected]), bins=24) if len(chosen) else None
    return PairLengths(
        unit=lengths.unit,
        prompt=distribution(lengths.prompt),
        chosen=distribution(chosen, edges),
        rejected=distribution(rejected, edges),
        n_chosen_longer=int((chosen > rejected).sum()),
        n_chosen_shorter=int((chosen < rejected).sum()),
        n_equal=int((chosen == rejected).sum()),
    )


def truncation(lengths: Lengths, max_length: int, same: np.ndarray) -> Truncation | None:
    """What `max_length` cuts; None where lengths are not in tokens. `same`, [N]: both texts are equal."""
    if lengths.whole is None or lengths.alike is None:
        return None
    cut = lengths.whole > max_length
    left_empty = lengths.whole - np.stack([lengths.chosen, lengths.rejected]) >= max_length
    left_empty = left_empty.any(axis=0)
    room = np.maximum(max_length - lengths.prompt, 0)
    chosen, rejected = np.minimum(lengths.chosen, room), np.minimum(lengths.rejected, room)
    alike = (chosen == rejected) & (lengths.alike >= chosen)
    of_pairs = (cut.any(axis=0), left_empty, ~left_empty & alike & ~same, ~left_empty & ~alike)
    counts = (*cut.sum(axis=1), *(each.sum() for each in of_pairs))
    return Truncation(max_length, cut.shape[1], *map(int, counts))


# Duplicates. Digests of the texts fit in memory where the texts do not


@dataclass(frozen=True)
class Duplicates:
    """Repetitions within a split. Empty prompts do not repeat each other."""

    n_identical: int  # rows beyond the first of their kind
    n_contradicting: int  # rows whose completions are swapped in another row
    n_same_completion: int  # chosen equals rejected
    n_prompts: int  # distinct
    n_repeated_prompts: int  # distinct prompts with several rows
    most_frequent_prompt: int  # its number of rows


@dataclass(frozen=True)
class SharedPrompts:
    """Prompts that are in two splits."""

    splits: tuple[str, str]
    n_prompts: int
    n_rows: tuple[int, int]  # rows with these prompts, per split


def digest(value: Any) -> bytes:
    """16 bytes, the same for the same text or messages."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def count_prompts(keys: Iterable[Key]) -> Counter[bytes]:
    """The rows of each prompt that is not empty."""
    prompts = Counter(prompt for prompt, _, _ in keys)
    del prompts[digest("")]
    return prompts


def count_duplicates(keys: Iterable[Key]) -> Duplicates:
    """The repetitions among rows."""
    rows, prompts = Counter(keys), count_prompts(keys)
    return Duplicates(
        n_identical=rows.total() - len(rows),
        n_contradicting=sum(n for (p, w, r), n in rows.items() if w != r and (p, r, w) in rows),
        n_same_completion=sum(n for (_, w, r), n in rows.items() if w == r),
        n_prompts=len(prompts),
        n_repeated_prompts=sum(n > 1 for n in prompts.values()),
        most_frequent_prompt=max(prompts.values(), default=0),
    )


def shared_prompts(prompts: Mapping[str, Counter[bytes]]) -> list[SharedPrompts]:
    """For each two splits that share prompts."""
    return [
        SharedPrompts((a, b), len(both), (sum(prompts[a][p] for p in both), sum(prompts[b][p] for p in both)))
        for a, b in combinations(prompts, 2)
        if (both := prompts[a].keys() & prompts[b].keys())
    ]


# Evaluation factors


@dataclass(frozen=True)
class Factors:
    """Evaluation factors of the column, or of a sample of rows. Bad values are left out."""

    column: str | None
    metric: str | None  # of a sample
    values: Distribution | None
    n_zero: int
    n_one: int
    problem: str | None = None


def evaluation_factors(
    column: Sequence[Any] | None, sample: Sequence[float], split: str
) -> tuple[Factors, np.ndarray]:
    """Those of the column, or else of the sample: ROUGE-L, which the trainers compute without a column. Counted, and
    as [N] numbers without the bad values.
    """
    values, problem = sample if column is None else column, None
    try:
        check_evaluation_factors(values, FACTOR, split)
    except ValueError as error:
        problem = str(error)
        values = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1]
    numbers = np.asarray(values, np.float64)
    factors = Factors(
        column=None if column is None else FACTOR,
        metric=ROUGE_L if column is None else None,
        values=distribution(numbers, np.round(np.linspace(0, 1, 11), 12)),
        n_zero=int((numbers == 0).sum()),
        n_one=int((numbers == 1).sum()),
        problem=problem,
    )
    return factors, numbers
