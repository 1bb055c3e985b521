"""What a trainer is given as a data set: loaded, a stream, or something else by mistake."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from trl.trainer.utils import global_then_local_main_first

from ..data.formats import as_plain
from ..data.media import IMAGES, without_decoding

logger = logging.getLogger(__name__)


def as_taken(dataset: Any, split: str, config: Any) -> Dataset | IterableDataset:
    """The same data set, as Python values, a transform applied; a stream is read by every process for itself.

    Raises:
        TypeError: something that is no data set.
        ValueError: one without rows.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"the {split} data set is a {type(dataset).__name__}, {_instead(dataset)}")
    if isinstance(dataset, IterableDataset):
        _deal_out(config)
    if not (len(dataset) if isinstance(dataset, Dataset) else next(iter(dataset), None)):
        raise ValueError(f"the {split} data set has no rows: see what it was loaded or filtered from")
    with global_then_local_main_first():  # of a transform: the others read what the first one made
        plain = as_plain(dataset)
    return without_decoding(plain, keep=IMAGES)


def _deal_out(config: Any) -> None:
    """Lets every process read its own rows of a stream, as TRL does where it trains on one. Else accelerate cuts each
    tensor of a batch to the length of the first, which rows that share their prompt do not survive.
    """
    if config.accelerator_config.dispatch_batches:
        logger.warning("accelerator_config: dispatch_batches=True does not go with a stream, and is not used")
    config.accelerator_config.dispatch_batches = False


def _instead(given: Any) -> str:
    if isinstance(given, Mapping):
        one = next(iter(given), "train")
        return (
            f"with the keys {list(given)}: give one data set, for example dataset[{one!r}], or use Dataset.from_dict"
        )
    if isinstance(given, (str, Path)):
        return f"{str(given)!r}: load it first, with trl_margins.data.loading.load_splits or datasets.load_dataset"
    return "not a datasets.Dataset: Dataset.from_list makes one from a list of rows"
