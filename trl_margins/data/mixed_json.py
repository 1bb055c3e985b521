"""JSON files whose values do not fit into columns of one type: each stays as it is written there.

`datasets` takes the columns and their types from the first 10 MB. What differs later is turned into text, with the
quotes of JSON around every text of its column, or is left out. A column of several types it holds as JSON, and takes a
text that spells JSON for what it spells: the answer `"4"` would be a number. And all objects of a column get the same
keys, so that a tool's `"default": null` is gone and an argument `1` beside a fraction is `1.0`. It takes a column of
nothing but dates for times, and NaN and infinity in a list of rows, or beside such a column, for null.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as paj
from datasets import Dataset, DatasetDict, Features, Json, List, Value, concatenate_datasets

from .broken_files import NO_NUMBER, may_not_be_finite, not_finite, python_values
from .local_files import open_bytes, open_text

logger = logging.getLogger(__name__)

_READ_AT_ONCE = 10 << 20  # bytes, by `datasets`
_PIECE = 2**26
_FREE = ("tools", "arguments", "parameters", "chat_template_kwargs")  # have other keys in each row
_LONG = re.compile(r"\d{19}")


def fits(features: Features, files: Sequence[Path], only_first: bool = False) -> bool:
    """Whether these columns hold all that the files do; `only_first`: what their first 64 MB do."""
    seen = 0
    for file in files:
        try:
            for piece in _pieces(file):
                if _is_document(piece) and _has_odd_numbers(piece):
                    return False
                if len(files) == 1 and len(piece) <= _READ_AT_ONCE:
                    return True  # `datasets` has seen all of it at once
                if not _holds(features, _schema(piece)):
                    return False
                seen += len(piece)
                if only_first and seen >= _PIECE:
                    return True
        except (pa.ArrowException, ValueError):  # a value of another type, within these rows
            return False
    return True


def lost_number(features: Features, files: Sequence[Path], first: int) -> str | None:
    """Where the first rows of a stream have None for a number that is NaN or infinite, in words."""
    for file in files if any(map(_is_mixed, features.values())) else ():
        with open_text(file) as lines:
            for number, line in enumerate(islice(lines, first), start=1):
                if number == 1 and line.lstrip().startswith("["):
                    break  # `check_file` has looked at all of it
                with suppress(ValueError):  # an object over several lines
                    if may_not_be_finite(line) and (found := not_finite(json.loads(line, strict=False))):
                        return f"{file.name}, line {number}: {found}, {NO_NUMBER}"
    return None


def python_rows(files: Sequence[Path]) -> Dataset:
    """The rows of JSON files, read by Python."""
    return _from_python(_values(files))


def _from_python(rows: list[Any]) -> Dataset:
    if not all(isinstance(row, dict) for row in rows):
        return Dataset.from_list(rows)  # and its error
    names = dict.fromkeys(chain.from_iterable(rows))
    kinds = with_free_parts({name: _kind([row.get(name) for row in rows]) for name in names})
    for name in [name for name, kind in kinds.items() if _is_mixed(kind)]:
        if n := sum(_has_nan(row.get(name), kinds[name]) for row in rows):
            logger.warning(
                "NaN in %d rows of column %r becomes null: what has several types, or keys of its own in each row, is "
                "held as JSON, which has no NaN",
                *(n, name),
            )
    written = [{name: _encoded(row.get(name), kind) for name, kind in kinds.items()} for row in rows]
    return Dataset.from_list(written, features=Features(kinds))


def _has_nan(value: Any, kind: Any) -> bool:
    """Within what is held as JSON."""
    if isinstance(kind, Json):
        return not_finite({"": value}, math.isnan) is not None
    if isinstance(kind, List):
        return any(_has_nan(each, kind.feature) for each in value or ())
    return isinstance(kind, dict) and any(_has_nan((value or {}).get(name), inner) for name, inner in kind.items())


def _kind(values: list[Any]) -> Any:
    """What holds a column; Arrow would take `true` among fractions for 1.0, and refuses large integers among them."""
    try:
        kind = Dataset.from_dict({"": values}, on_mixed_types="use_json").features[""]
    except (pa.ArrowException, OverflowError):
        return Json()
    is_text = kind == Value("string")
    if is_text and any(isinstance(value, float) for value in values):  # NaN and infinity would be words
        return Json()
    return Json() if _has_others(values, kind) else kind


def _has_others(values: Iterable[Any], kind: Any) -> bool:
    """Whether there is `true` among fractions, or NaN where all else is null."""
    there = [value for value in values if value is not None]
    if isinstance(kind, List):
        return _has_others(chain.from_iterable(there), kind.feature)
    if isinstance(kind, dict):
        return any(_has_others([value.get(name) for value in there], inner) for name, inner in kind.items())
    if isinstance(kind, Json):
        return False
    if pa.types.is_null(kind.pa_type):
        return bool(there)
    return pa.types.is_floating(kind.pa_type) and any(isinstance(value, bool) for value in there)


def as_written(loaded: Mapping[str, Dataset], splits: Mapping[str, Sequence[Path]]) -> DatasetDict:
    """The splits that were read from these files, with what columns of one type do not hold as it is written there."""
    files = [file for each in splits.values() for file in each]
    if not all(fits(rows.features, files) for rows in loaded.values()):
        return DatasetDict({split: python_rows(files) for split, files in splits.items()})
    return DatasetDict({split: _as_written(rows, partial(_values, splits[split])) for split, rows in loaded.items()})


def _values(files: Sequence[Path]) -> list[Any]:
    return [row for file in files for row in python_values(file)]


def _as_written(rows: Dataset, read: Callable[[], list[Any]]) -> Dataset:
    features = rows.features  # each look at it copies it
    kinds = {name: _as_text(kind) for name, kind in with_free_parts(features).items()}
    mixed = {name: kind for name, kind in kinds.items() if kind != features[name] or _is_mixed(kind)}
    if not mixed:
        return rows
    values = read()
    if any(map(_is_mixed, features.values())) and any(map(not_finite, values)):
        return _from_python(values)
    written = [{name: _encoded(row.get(name), feature) for name, feature in mixed.items()} for row in values]
    columns, found = rows.column_names, Dataset.from_list(written, features=Features(mixed))
    if len(mixed) < len(columns):
        found = concatenate_datasets([rows.remove_columns([*mixed]), found], axis=1)
    return found.select_columns(columns)


def _pieces(file: Path) -> Iterator[bytes]:
    """Of whole lines; a document that is a list, as one."""
    with open_bytes(file) as content:
        piece = content.read(_PIECE)
        if _is_document(piece):
            yield piece + content.read()
            return
        while piece:
            yield piece + content.readline()
            piece = content.read(_PIECE)


def _is_document(piece: bytes) -> bool:
    return piece.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _has_odd_numbers(document: bytes) -> bool:
    text = document.decode("utf-8-sig")
    return may_not_be_finite(text) and any(map(not_finite, json.loads(text, strict=False)))


def _schema(piece: bytes) -> pa.Schema:
    text = piece.removeprefix(b"\xef\xbb\xbf")
    if text.lstrip().startswith(b"["):
        return pa.Table.from_pylist(json.loads(text, strict=False)).schema
    return paj.read_json(io.BytesIO(text), read_options=paj.ReadOptions(block_size=len(text) + 1)).schema


def _holds(features: Mapping[str, Any], fields: Any) -> bool:
    return all(field.name in features and _holds_all(features[field.name], field.type) for field in fields)


def _holds_all(feature: Any, kind: pa.DataType) -> bool:
    if isinstance(feature, Json) or pa.types.is_null(kind):
        return True
    if isinstance(feature, List):
        return pa.types.is_list(kind) and _holds_all(feature.feature, kind.value_type)
    if isinstance(feature, dict):
        return pa.types.is_struct(kind) and _holds(feature, kind)
    if pa.types.is_nested(kind):
        return False
    if pa.types.is_integer(feature.pa_type) and pa.types.is_floating(kind):
        return False
    return sort_of(feature.pa_type) == sort_of(kind)


def sort_of(kind: pa.DataType) -> str:
    """What a type holds, in whatever width, unit or layout."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    return str(kind).split("[")[0].removeprefix("large_")


def with_free_parts(features: Mapping[str, Any]) -> dict[str, Any]:
    """The features, with JSON where each row has keys of its own."""
    return {name: _as_json(feature, name) for name, feature in features.items()}


def _as_json(feature: Any, name: str) -> Any:
    if isinstance(feature, Json) or (name in _FREE and isinstance(feature, dict | List)):
        return Json()
    if isinstance(feature, List):
        return List(_as_json(feature.feature, ""))
    return with_free_parts(feature) if isinstance(feature, dict) else feature


def _as_text(feature: Any) -> Any:
    """The feature, with text for what was taken for times."""
    if isinstance(feature, List):
        return List(_as_text(feature.feature))
    if isinstance(feature, dict):
        return {name: _as_text(inner) for name, inner in feature.items()}
    return Value("string") if pa.types.is_timestamp(feature.pa_type) else feature


def _is_mixed(feature: Any) -> bool:
    if isinstance(feature, List):
        return _is_mixed(feature.feature)
    return isinstance(feature, Json) or (isinstance(feature, dict) and any(map(_is_mixed, feature.values())))


def _encoded(value: Any, feature: Any) -> Any:
    """The value with its mixed parts as JSON, which is kept as it is."""
    if value is None:
        return None
    if isinstance(feature, Json):
        text = json.dumps(value)
        if _LONG.search(text) and (large := _beyond_64_bits(value)) is not None:
            raise ValueError(f"the integer {large} does not fit into 64 bits: write it as text, in quotes")
        return text
    if isinstance(feature, List):
        return [_encoded(each, feature.feature) for each in value]
    if isinstance(feature, dict):
        return {name: _encoded(value.get(name), inner) for name, inner in feature.items()}
    return value


def _beyond_64_bits(value: Any) -> int | None:
    """An integer for which `datasets` would give back the text of all JSON around it."""
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**64 else value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for found in map(_beyond_64_bits, inner) if found is not None), None)
