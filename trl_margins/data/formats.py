"""A data set in somebody's format or behind somebody's transform, as plain Python values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

logger = logging.getLogger(__name__)


def as_plain(dataset: AnyDataset) -> AnyDataset:
    """The same data set without a format; where it has a transform, what that makes of the rows, once and for all.

    `with_format(None)` alone would give the rows that the transform never saw.
    """
    return transformed(dataset).with_format(None)


def transformed(dataset: AnyDataset) -> AnyDataset:
    """The same data set; where `set_transform` gave it a transform, what that makes of the rows."""
    given = getattr(dataset, "format", {})  # a stream has none
    if given.get("type") != "custom":
        return dataset
    plain = dataset.with_format(None)
    others = [name for name in plain.column_names if name not in given["columns"]]
    logger.info("the transform of a data set is applied to its %d rows once, and not again while training", len(plain))
    return plain.map(
        _apply,
        batched=True,
        fn_kwargs={
            "transform": given["format_kwargs"]["transform"],
            "columns": given["columns"],
            "beside": others if given["output_all_columns"] else [],
        },
        remove_columns=plain.column_names,
        desc="Applying the transform",
    )


def _apply(
    batch: Mapping[str, list[Any]],
    transform: Callable[[dict[str, list[Any]]], Mapping[str, Any]],
    columns: Sequence[str],
    beside: Sequence[str],
) -> dict[str, Any]:
    made = transform({name: batch[name] for name in columns})
    return {**made, **{name: batch[name] for name in beside}}
