"""How long prompts and answers are, and what `max_length` cuts off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .distributions import Distribution, distribution, nice_edges

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from ...rows import RowReader

# of a data set, how it is read, and the rows that can be
Measure = Callable[["Dataset", "RowReader", "list[int]"], "Lengths"]


@dataclass(frozen=True)
class Lengths:
    """Lengths of N pairs, [N] each.

    `whole`, [2, N], is prompt and chosen, prompt and rejected together, as `max_length` cuts them; None of words.
    `problems` are the rows that could not be counted, and are not among the N.
    """

    unit: str
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    whole: np.ndarray | None = None
    problems: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerLengths:
    """Lengths in `unit`; the answers' histograms have the same edges."""

    unit: str
    prompt: Distribution | None
    chosen: Distribution | None
    rejected: Distribution | None
    n_chosen_longer: int
    n_chosen_shorter: int
    n_equal: int


@dataclass(frozen=True)
class Truncation:
    """Pairs that max_length tokens of prompt and answer do not hold."""

    max_length: int
    n: int  # pairs that were counted
    n_chosen: int
    n_rejected: int
    n_pairs: int  # on one side at least
    n_left_empty: int  # pairs in which the prompt leaves an answer no token


def answer_lengths(lengths: Lengths) -> AnswerLengths:
    """Their distributions, and which answer is the longer one."""
    import numpy as np

    chosen, rejected = lengths.chosen, lengths.rejected
    edges = nice_edges(np.concatenate([chosen, rejected]), bars=24) if len(chosen) else None
    return AnswerLengths(
        unit=lengths.unit,
        prompt=distribution(lengths.prompt),
        chosen=distribution(chosen, edges),
        rejected=distribution(rejected, edges),
        n_chosen_longer=int((chosen > rejected).sum()),
        n_chosen_shorter=int((chosen < rejected).sum()),
        n_equal=int((chosen == rejected).sum()),
    )


def truncation(lengths: Lengths, max_length: int) -> Truncation | None:
    """None where lengths are not in tokens."""
    import numpy as np

    if lengths.whole is None:
        return None
    cut = lengths.whole > max_length
    left_empty = lengths.whole - np.stack([lengths.chosen, lengths.rejected]) >= max_length
    n_chosen, n_rejected = cut.sum(axis=1).tolist()
    return Truncation(
        max_length=max_length,
        n=cut.shape[1],
        n_chosen=n_chosen,
        n_rejected=n_rejected,
        n_pairs=int(cut.any(axis=0).sum()),
        n_left_empty=int(left_empty.any(axis=0).sum()),
    )
