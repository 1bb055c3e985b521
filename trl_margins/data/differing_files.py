"""Files of one folder that do not hold the same columns, or not the same types in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .broken_files import delimiter_of, header_of, innermost, text_of
from .local_files import builder_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

_LOOKED_AT = 1 << 20  # characters of a file of JSON
_BETWEEN = re.compile(r"[\s\[,]*")


def check_columns(folder: Path, files: Sequence[Path]) -> None:
    """Looks at the beginning of each file, before the slow work.

    Raises:
        ValueError: two files of which one lacks a column that all rows of the other have.
    """
    if len(files) < 2:
        return
    first, *others = files
    delimiter = delimiter_of(first) if builder_of(first) == "csv" else ""
    always, ever = _columns(first, delimiter)
    for other in others:
        its_always, its_ever = _columns(other, delimiter)
        only_first = [name for name in always if its_ever and name not in its_ever and _lacks(other, name)]
        only_other = [name for name in its_always if ever and name not in ever and _lacks(first, name)]
        if only_first or only_other:
            parts = [
                f"only {file.relative_to(folder)} has {', '.join(map(repr, names))}"
                for file, names in ((first, only_first), (other, only_other))
                if names
            ]
            raise ValueError(
                f"{folder}: {first.relative_to(folder)} and {other.relative_to(folder)} have different columns "
                f"({'; '.join(parts)}): name one of the files, or give all files of the folder the same columns"
            )


def joined(
    folder: Path, splits: Mapping[str, Sequence[Path]], load: Callable[[Path], Dataset], error: Exception
) -> DatasetDict:
    """The files read each on its own, and put together with types that hold the values of all: a whole number beside
    a fraction, a column that is empty in one of them.

    Raises:
        ValueError: two files with types that have no such type, or one file that cannot be read.
    """
    from datasets import DatasetDict, concatenate_datasets

    parts: dict[Path, Dataset] = {}
    for file in (file for files in splits.values() for file in files):
        try:
            parts[file] = load(file)
        except Exception as problem:
            raise ValueError(f"{folder}: {file.relative_to(folder)} cannot be read: {innermost(problem)}") from error
    features = _common(folder, parts)
    return DatasetDict(
        {
            split: concatenate_datasets([_cast(parts[file], features) for file in files])
            for split, files in splits.items()
        }
    )


def _common(folder: Path, parts: Mapping[Path, Dataset]) -> Features:
    import pyarrow as pa
    from datasets import Features

    (first, start), *others = parts.items()
    schema = start.features.arrow_schema
    kept = dict(start.features)
    for other, part in others:
        its_schema = part.features.arrow_schema
        for name, kind in part.features.items():
            if name not in kept:
                kept[name] = kind
            if kept[name] == kind:
                continue
            fields = [schema.field(name), its_schema.field(name)]
            try:
                both = pa.unify_schemas([pa.schema([field]) for field in fields], promote_options="permissive")
            except pa.ArrowException:
                raise ValueError(
                    f"{folder}: column {name!r} is {fields[0].type} in {first.relative_to(folder)} and "
                    f"{fields[1].type} in {other.relative_to(folder)}: give it one type in all files, or name one of "
                    "the files"
                ) from None
            kept[name] = Features.from_arrow_schema(both)[name]
        schema = Features(kept).arrow_schema
    return Features(kept)


def _cast(part: Dataset, features: Features) -> Dataset:
    for name in set(features) - set(part.column_names):
        part = part.add_column(name, [None] * len(part), feature=features[name])
    return part.select_columns(list(features)).cast(features)


def _columns(file: Path, delimiter: str) -> tuple[list[str], set[str]]:
    """The columns that each row at the beginning of a file has, and those that any has; none where that is unclear."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    builder = builder_of(file)
    try:
        if builder == "json":
            rows = _first_rows(file)
            names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
            return names, set().union(*rows)
        if builder == "csv":
            names = header_of(file, delimiter)
        elif builder == "parquet":
            with file.open("rb") as opened:
                names = pq.read_schema(opened).names
        else:
            names = _arrow_names(file)
    except (OSError, ValueError, pa.ArrowException):  # found again, and named, in reading the whole
        return [], set()
    return list(names), set(names)


def _arrow_names(file: Path) -> list[str]:
    import pyarrow as pa

    for opened in (pa.ipc.open_stream, pa.ipc.open_file):
        try:
            with pa.memory_map(str(file)) as content:
                return opened(content).schema.names
        except pa.ArrowInvalid:  # the other of the two
            continue
    return []


def _first_rows(file: Path) -> list[dict[str, Any]]:
    """The objects at the beginning, one a line or in a list."""
    with text_of(file) as lines:
        text = lines.read(_LOOKED_AT)
    decoder, rows, end = json.JSONDecoder(), [], 0
    while True:
        try:
            row, end = decoder.raw_decode(text, _BETWEEN.match(text, end).end())
        except json.JSONDecodeError:
            return rows
        if not isinstance(row, dict):
            return []
        rows.append(row)


def _lacks(file: Path, name: str) -> bool:
    """Whether a file has no such column in any row; of JSON, whether that text is nowhere in it."""
    if builder_of(file) != "json":
        return True
    written = {json.dumps(name, ensure_ascii=plain) for plain in (True, False)}
    with text_of(file) as lines:
        return not any(key in line for line in lines for key in written)
