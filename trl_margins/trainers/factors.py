"""Evaluation factors for a trainer: from the column where there is one, else computed."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset

from ..data.evaluation_factors import add_evaluation_factor, check_evaluation_factors

logger = logging.getLogger(__name__)

COLUMN = "evaluation_factor"


def with_evaluation_factors(
    dataset: Any, split: str, metric: str, encoder: str | None, num_proc: int | None = None
) -> Dataset:
    """The data set with its column of evaluation factors, checked.

    Raises:
        ValueError: a factor that is None, NaN or outside [0, 1], with its row.
        TypeError: a streamed data set, of which nobody knows the mean.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"GaPO's margin is scaled by the mean over the whole training set, which a {type(dataset).__name__} does "
            "not show: load the data set instead of streaming it"
        )
    if COLUMN in dataset.column_names:
        logger.info("%s: %s column found", split, COLUMN)
    else:
        logger.info("%s: no %s column, computing %s of the two answers", split, COLUMN, metric)
        dataset = add_evaluation_factor(dataset, metric, COLUMN, encoder=encoder, num_proc=num_proc)
    check_evaluation_factors(dataset[COLUMN], COLUMN, split)
    return dataset
