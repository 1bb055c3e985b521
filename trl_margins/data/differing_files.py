"""Files of one folder that do not have the same columns, or not the same types in them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, Json, Value, concatenate_datasets

from .broken_files import innermost
from .local_files import builder_of, open_text
from .mixed_json import sort_of

logger = logging.getLogger(__name__)

_LOOKED_AT = 100  # rows of a file
_FLAGS = frozenset({"bool", "number"})
_OF_NUMBERS = re.compile("(?i)score|rating|reward|weight|margin|factor|logp|gap")  # columns that training reads
_ONE_TYPE = "give it one type in all files, or name one of the files"


def check_columns(folder: Path, files: Sequence[Path], stream: Callable[[Path], IterableDataset]) -> None:
    """Raises a ValueError for two files of which one lacks a column that all first rows of the other have."""
    if len(files) < 2:
        return
    first, *others = files
    always, ever = _columns(first, stream)
    for other in others:
        its_always, its_ever = _columns(other, stream)
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


def check_types(
    folder: Path, files: Sequence[Path], stream: Callable[[Path], IterableDataset], texts: Collection[str]
) -> None:
    """Warns of two files, not of JSON, of which `datasets` turns the values of one into another kind.

    Args:
        folder: with the files.
        files: of all splits.
        stream: reads one.
        texts: the columns with prompts or answers.

    Raises:
        ValueError: numbers, times or bytes would become answers, or flags scores.
    """
    found: dict[str, tuple[Path, pa.DataType]] = {}
    for file in files if len(files) > 1 else ():
        try:
            features = _first_features(stream(file))
        except Exception:  # reading the whole file raises it again, with its name
            continue
        has_types = builder_of(file) in ("arrow", "parquet")  # in tables of text, a flag alone is told from a number
        for field in features.arrow_schema:
            if pa.types.is_null(field.type):
                continue
            first, kind = found.setdefault(field.name, (file, field.type))
            differ = _differences(kind, field.type)
            if not differ or (not has_types and _FLAGS not in differ):
                continue
            said = _of_types(folder, field.name, (first, kind), (file, field.type))
            if field.name in texts or (_FLAGS in differ and _OF_NUMBERS.search(field.name)):
                raise ValueError(f"{said}: {_ONE_TYPE}")
            logger.warning("%s: all its values are read as %s", said, kind)


def check_tables(files: Sequence[Path], stream: Callable[[Path], IterableDataset]) -> None:
    """Raises a ValueError for two tables of text whose first rows have other types, which no stream puts together."""
    kinds = {file: _first_features(stream(file)) for file in files}
    for file, features in kinds.items():
        if features != kinds[files[0]]:
            raise ValueError(f"{files[0].name} has {kinds[files[0]]} and {file.name} {features}")


def _first_features(rows: IterableDataset) -> Features:
    return rows.features or Dataset.from_list(list(islice(rows, _LOOKED_AT))).features


def _differences(one: pa.DataType, other: pa.DataType) -> set[frozenset[str]]:
    """The sorts of values that stand in one place, where they are two. Reading other nesting is an error by itself."""
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        both = {field.name for field in one} & {field.name for field in other}
        return set().union(*(_differences(one.field(name).type, other.field(name).type) for name in both))
    if _is_list(one) and _is_list(other):
        return _differences(one.value_type, other.value_type)
    sorts = frozenset(map(sort_of, (one, other)))
    is_alike = any(pa.types.is_null(each) or pa.types.is_nested(each) for each in (one, other)) or len(sorts) == 1
    return set() if is_alike else {sorts}


def _is_list(kind: pa.DataType) -> bool:
    return any(is_one(kind) for is_one in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _of_types(folder: Path, name: str, *types: tuple[Path, pa.DataType]) -> str:
    places = " and ".join(f"{kind} in {file.relative_to(folder)}" for file, kind in types)
    return f"{folder}: column {name!r} is {places}"


def _columns(file: Path, stream: Callable[[Path], IterableDataset]) -> tuple[list[str], set[str]]:
    """The columns that the first rows all have, in JSON with a value, and those that any of them has."""
    try:
        rows = stream(file)
        names = rows.column_names or list(next(iter(rows)))
        found = list(islice(rows, _LOOKED_AT)) if builder_of(file) == "json" else []
    except Exception:  # reading the whole file raises it again, with its name
        return [], set()
    return [name for name in names if all(row[name] is not None for row in found)], set(names)


def _lacks(file: Path, name: str) -> bool:
    """Whether a file has no such column in any row; of JSON, whether the name occurs nowhere in the text."""
    if builder_of(file) != "json":
        return True
    written = {json.dumps(name, ensure_ascii=plain) for plain in (True, False)}
    with open_text(file) as lines:
        return not any(key in line for line in lines for key in written)


class TypesOfJsonError(ValueError):
    """Lists, objects or values of several types in two files, which only a column of JSON holds."""


def joined(
    folder: Path, splits: Mapping[str, Sequence[Path]], load: Callable[[Path], Dataset], error: Exception | None = None
) -> DatasetDict:
    """Reads each file on its own, and concatenates them with types that hold the values of all: an integer beside a
    fraction, a column that is empty in one of them. A ValueError names two files with incompatible types.
    """
    parts: dict[Path, Dataset] = {}
    for file in (file for files in splits.values() for file in files):
        try:
            parts[file] = load(file)
        except Exception as problem:
            raise ValueError(f"{folder}: {file.relative_to(folder)} cannot be read: {innermost(problem)}") from error
    features = _common(folder, parts)
    try:
        return DatasetDict(
            {
                split: concatenate_datasets([_cast(parts[file], features) for file in files])
                for split, files in splits.items()
            }
        )
    except pa.ArrowException as problem:  # an integer that no fraction is exactly
        file, name = next(_not_cast(parts, features), (folder, ""))
        where = f"column {name!r} of {file.relative_to(folder)}, " if name else ""
        raise TypesOfJsonError(f"{folder}: {where}{problem}: give each column one type in all files") from error


def _common(folder: Path, parts: Mapping[Path, Dataset]) -> Features:
    found: dict[str, Any] = {}
    firsts: dict[str, Path] = {}  # files in which a column has something
    for file, part in parts.items():
        for name, kind in part.features.items():
            if _has_nothing(part, name):
                continue
            first = firsts.setdefault(name, file)
            if found.setdefault(name, kind) == kind:
                continue
            schemas = [Features({name: each}).arrow_schema for each in (found[name], kind)]
            try:
                both = pa.unify_schemas(schemas, promote_options="permissive")
            except pa.ArrowException:
                one, other = (schema.field(name).type for schema in schemas)
                kinds = (found[name], kind)
                is_mixed, is_plain = (any(isinstance(each, of) for each in kinds) for of in (Json, Value))
                of = TypesOfJsonError if is_mixed or not is_plain else ValueError
                raise of(f"{_of_types(folder, name, (first, one), (file, other))}: {_ONE_TYPE}") from None
            found[name] = Features.from_arrow_schema(both)[name]
    by_itself = {name: kind for part in parts.values() for name, kind in part.features.items()}
    return Features({name: found.get(name, kind) for name, kind in by_itself.items()})


def _cast(part: Dataset, features: Features) -> Dataset:
    if [*part.features.items()] == [*features.items()]:
        return part
    kept = [name for name, kind in part.features.items() if kind == features[name] or not _has_nothing(part, name)]
    nothing = {name: [None] * len(part) for name in features if name not in kept}
    parts = [part.select_columns(kept)] if kept else []
    if nothing:
        parts.append(Dataset.from_dict(nothing, features=Features({name: features[name] for name in nothing})))
    return concatenate_datasets(parts, axis=1).select_columns(list(features)).cast(features)


def _not_cast(parts: Mapping[Path, Dataset], features: Features) -> Iterator[tuple[Path, str]]:
    for file, part in parts.items():
        for name in part.column_names:
            try:
                part.select_columns(name).cast(Features({name: features[name]}))
            except pa.ArrowException:
                yield file, name


def _has_nothing(part: Dataset, name: str) -> bool:
    return part.data.column(name).null_count == len(part)
