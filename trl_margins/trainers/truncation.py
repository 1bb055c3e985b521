"""Counts what truncation did to a tokenized data set."""

from __future__ import annotations

import logging

import numpy as np
from datasets import Dataset

logger = logging.getLogger(__name__)

IGNORE = -100


def count_empty_answers(dataset: Dataset) -> int:
    """Number of pairs of which at least one answer has no token left, in a set that `CPOTrainer` tokenized."""
    columns = ["chosen_labels", "rejected_labels"]
    total = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=2048):
        total += int(np.logical_or(*(_ends_in_prompt(table[name].combine_chunks()) for name in columns)).sum())
    return total


def _ends_in_prompt(labels) -> np.ndarray:
    """Rows of a list array whose last label is none: the answer comes last, so it is empty."""
    ends = labels.offsets.to_numpy()[1:]
    lengths = np.diff(labels.offsets.to_numpy())
    flat = labels.values.to_numpy()
    last = flat[np.maximum(ends - 1, 0)] if flat.size else np.full(len(ends), IGNORE)
    return (lengths == 0) | (last == IGNORE)


def report_empty_answers(dataset: Dataset, split: str, max_length: int) -> int:
    """Warns with the number of pairs that have an empty answer, and returns it.

    Raises:
        ValueError: all have.
    """
    empty = count_empty_answers(dataset)
    if empty == len(dataset):
        raise ValueError(_none_left(empty, split, max_length))
    if empty:
        logger.warning(
            "%d of %d %s pairs have an answer that truncation left empty, because the prompt fills max_length=%d: "
            "that answer's reward is 0. Raise max_length, or filter out long prompts.",
            empty,
            len(dataset),
            split,
            max_length,
        )
    return empty


def report_dropped(before: int, after: int, split: str, max_length: int) -> int:
    """Warns with the number of pairs that `DPOTrainer` dropped, and returns it.

    Raises:
        ValueError: none is left.
    """
    if not after:
        raise ValueError(_none_left(before, split, max_length))
    if after < before:
        logger.warning(
            "%d of %d %s pairs were dropped, because the prompt fills max_length=%d: raise it to keep them.",
            before - after,
            before,
            split,
            max_length,
        )
    return before - after


def _none_left(pairs: int, split: str, max_length: int) -> str:
    return (
        f"truncation leaves an answer empty in every one of the {pairs} {split} pairs, because the prompt fills "
        f"max_length={max_length}: raise max_length, or cut the prompts"
    )
