"""A data set with a format or a transform, as plain Python values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

logger = logging.getLogger(__name__)


def as_plain(dataset: AnyDataset) -> AnyDataset:
    """The same data set without a format; a transform is applied once and for all.

    `with_format(None)` alone would give the rows that the transform never saw.
    """
    return transformed(dataset).with_format(None)


def one_split(dataset: Any, function: str) -> Dataset:
    """A data set in memory or on disk, with its transform applied; a TypeError for a stream, or several splits."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{function} takes one split that is not streamed, got {type(dataset).__name__}")
    return transformed(dataset)


def transformed(dataset: AnyDataset) -> AnyDataset:
    """The same data set, with the rows that its `set_transform` makes, if it has one."""
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
    n, what = len(next(iter(batch.values()))), ""
    if not isinstance(made, Mapping):
        what = f"a {type(made).__name__}"
    elif odd := [name for name, values in made.items() if not hasattr(values, "__len__") or isinstance(values, str)]:
        what = f"a {type(made[odd[0]]).__name__} for the column {odd[0]!r}"
    elif odd := [name for name, values in made.items() if len(values) != n]:
        what = f"{len(made[odd[0]])} values for the column {odd[0]!r}"
    if what:
        raise ValueError(
            f"the transform of the data set (set_transform) gives {what}, of {n} rows: it is to "
            "return a dict with a list of as many values for each column. To drop or add rows, use dataset.filter or "
            "dataset.map"
        )
    return {**made, **{name: batch[name] for name in beside}}


def with_format_of(dataset: Dataset, other: Dataset, *new: str) -> Dataset:
    """The data set with the format of another one, which also applies to its new columns."""
    shown = other.format
    return dataset.with_format(
        shown["type"], [*shown["columns"], *new], shown["output_all_columns"], **shown["format_kwargs"]
    )
