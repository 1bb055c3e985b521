"""Writes a data set to a file of JSON, CSV or Parquet, and says beforehand what the format has no type for."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Json

logger = logging.getLogger(__name__)

_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_DIGITS = 15  # pandas writes ten by default


def check_types(features: Features, suffix: str, output: str) -> None:
    """
    Args:
        features: of what is to be written.
        suffix: of the file: .json, .jsonl and .jsonl.gz, .csv, or .parquet, which has every type.
        output: its name, for the error.

    Raises:
        ValueError: the format cannot hold a column.
    """
    if suffix == ".parquet":
        return
    if suffix == ".csv" and (nested := _columns(features, pa.types.is_nested)):
        raise ValueError(f"{output}: CSV has no lists, and {nested} are more than text and numbers; use .jsonl")
    if suffix == ".csv" and (mixed := [name for name, feature in features.items() if isinstance(feature, Json)]):
        raise ValueError(
            f"{output}: in CSV all is text, and {mixed} have JSON, such as messages beside text, or objects: "
            "use .jsonl, or make them one type"
        )
    name = "CSV" if suffix == ".csv" else "JSON"
    if raw := _columns(features, _is_binary):
        raise ValueError(f"{output}: {name} has no bytes, and {raw} have them: use .parquet, or remove the columns")
    if name == "JSON" and (times := _columns(features, _is_time)):
        logger.warning(
            "%s: JSON has no dates and times: %s become milliseconds (of a date, since 1970). Parquet keeps them",
            *(output, ", ".join(times)),
        )


def save(rows: Dataset, file: str | Path, suffix: str) -> None:
    """Writes all rows, with the digits and the line breaks that they have."""
    if suffix == ".parquet":
        rows.to_parquet(file)
    elif suffix == ".csv":
        _warn_of_lost(rows, pc.is_nan, "CSV has no NaN: %d of column %s become empty cells. Parquet keeps them")
        rows.to_csv(file, quoting=csv.QUOTE_NONNUMERIC)  # a lone carriage return would end a row
    else:
        said = "JSON has no NaN and no infinity: %d of column %s become null. Parquet keeps them"
        _warn_of_lost(rows, lambda numbers: pc.invert(pc.is_finite(numbers)), said)
        compression = "gzip" if suffix.endswith(".gz") else None
        rows.to_json(file, lines=suffix != ".json", compression=compression, double_precision=_DIGITS)


def _warn_of_lost(rows: Dataset, is_lost: Callable[[pa.Array], Any], said: str) -> None:
    """Of numbers that the format does not have."""
    floats = _columns(rows.features, pa.types.is_floating)
    found: dict[str, int] = {}
    for table in rows.with_format("arrow", columns=floats).iter(batch_size=2048) if floats else ():
        for name in floats:
            for numbers in _numbers_in(table[name].combine_chunks()):
                strange = pc.sum(is_lost(numbers)).as_py()
                found[name] = found.get(name, 0) + (strange or 0)
    for name, n in found.items():
        if n:
            logger.warning(said, n, name)


def _numbers_in(values: pa.Array) -> Iterator[pa.Array]:
    """Of a column, at any depth."""
    if pa.types.is_floating(values.type):
        yield values
    elif any(is_one(values.type) for is_one in _LISTS):
        yield from _numbers_in(values.flatten())
    elif pa.types.is_struct(values.type):
        for each in values.flatten():
            yield from _numbers_in(each)


def _columns(features: Features, is_one: Callable[[pa.DataType], bool]) -> list[str]:
    """The columns with a type of this kind, at any depth."""
    return [field.name for field in features.arrow_schema if any(map(is_one, _types(field.type)))]


def _types(kind: pa.DataType) -> Iterator[pa.DataType]:
    yield kind
    for i in range(kind.num_fields):
        yield from _types(kind.field(i).type)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_time(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_duration(kind)
