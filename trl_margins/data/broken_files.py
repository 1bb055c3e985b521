"""Explains why a data file cannot be read: the file, the line and the fix."""

from __future__ import annotations

import csv
import json
import lzma
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from itertools import islice
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from datasets.config import ZSTANDARD_AVAILABLE

from ..checks import RepeatedKeyError, without_repeats
from .local_files import builder_of, first_lines, open_text
from .tables import any_length, delimiter_of

_OF_ROWS = {"prompt", "chosen", "rejected", "responses"}  # columns
_FOR_LINES = (".jsonl", ".json", ".ndjson")
_FOR_COLUMNS = (".csv", ".tsv")
_OF_ZSTD = (import_module("zstandard").ZstdError,) if ZSTANDARD_AVAILABLE else ()
_DAMAGES: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error, *_OF_ZSTD)
_NOT_BLANK = re.compile(r"\S")
_NEXT_OBJECT = re.compile(r"\n\{")
_POINTER = b"version https://git-lfs.github.com/spec/"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_FINITE = re.compile(r"NaN|Infinity|\d[eE]\+?\d{3}|\d{300}")
NO_NUMBER = "where the stream has None: write another number, or null"
_HALF = "half of a surrogate pair, which is not a character"
_TOO_DEEP = "lists or objects within one another, deeper than Python reads"
_TWICE = "JSON that was made JSON again, so that a row is one text: write the rows themselves, once"
_DAMAGED = "the file is damaged or was not written to its end"


def check_file(file: Path, first: int | None = None) -> None:
    """Refuses a file that a reader would silently misread: an empty one, a Git LFS pointer, a CSV file with a column
    twice, a row with fewer or more fields than columns, one that repeats the header, or text after a closing quote;
    a JSON file with a key twice in an object, or half a character. `first` is how many lines of a table, or of JSON
    lines, to look at: `datasets` reads a JSON document whole, also as a stream.
    """
    with file.open("rb") as content:
        start = content.read(len(_POINTER))
    if not start:
        raise ValueError(f"{file.name} is empty")
    if start == _POINTER:
        raise ValueError(f"{file.name} is only Git LFS's pointer to a file: get the file with `git lfs pull`")
    if any(suffix in file.name.lower() for suffix in _FOR_COLUMNS):
        _check_table(file, first)
    if builder_of(file) == "json":
        _check_json(file, first)


def _check_json(file: Path, first: int | None) -> None:
    decoder = json.JSONDecoder(object_pairs_hook=without_repeats, strict=False)
    of_lines = ".jsonl" in file.name.lower()
    number, line = 0, ""
    try:
        with open_text(file) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1 and not isinstance(_object(line, strict=False), dict):
                    if first and of_lines and not line.startswith("["):
                        if next(lines, None) is not None:  # objects over several lines, or what Arrow says
                            return
                        break
                    line += lines.read()
                    checks = [_check_characters] * bool(_SURROGATE.search(line))
                    checks += [_check_numbers] * bool(first and may_not_be_finite(line))
                    _check_rows(decoder.decode(line), checks)
                elif first and number > first:
                    break
                elif line.strip():
                    row = decoder.decode(line.strip())
                    if _SURROGATE.search(line):
                        _check_characters(row)
    except (RepeatedKeyError, NotReadError) as error:
        raise ValueError(f"{file.name}, line {number}: {error}") from None
    except TypeError as error:
        raise ValueError(f"{file.name}: {error}") from None
    except UnicodeDecodeError:  # whoever reads it says so
        return
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error) or number != 1 or (of_lines and not _is_one_line(file)):
            return
    except _DAMAGES:
        return
    text = line.strip()
    # of one object that Arrow cannot read, `datasets` makes as many rows as its lists are long
    if number != 1 or not text.startswith("{") or ("\n" in text if of_lines else _NEXT_OBJECT.search(text)):
        return
    if of_lines and (problem := _problem_of_line(line) or _too_large(line)):
        raise ValueError(f"{file.name}, line 1: {problem}: {shortened(text)}")
    if not of_lines and (problem := _problem_of_document(text)):
        raise ValueError(f"{file.name}{problem}")
    if not of_lines and (problem := _too_large(text)):
        raise ValueError(f"{file.name}: {problem}")


def _is_one_line(file: Path) -> bool:
    with suppress(ValueError, *_DAMAGES), open_text(file) as lines:
        return sum(1 for line in islice(filter(str.strip, lines), 2)) == 1
    return False


def _check_characters(row: Any) -> None:
    """Raises a NotReadError for text that holds half of a surrogate pair, which `datasets` leaves out."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise NotReadError(f"{_HALF}: write the whole one, or leave it out") from None


def _too_large(line: str) -> str | None:
    def finite(text: str) -> float:
        if math.isinf(number := float(text)):
            raise ValueError(f"the number {text} is too large")
        return number

    try:
        json.loads(line, parse_float=finite)
    except ValueError as error:
        return str(error)
    return None


@any_length()
def _check_table(file: Path, first: int | None) -> None:
    number = 0
    try:
        delimiter = delimiter_of(file)
        with open_text(file, newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(filter(None, rows), [])  # empty lines are no rows
            if not any(map(str.strip, names)):
                raise ValueError(f"{file.name} has no columns: its first line is their names")
            number = rows.line_num
            if names[0].lower().startswith("sep=") and not any(names[2:]):
                raise ValueError(f"{file.name}, line {number}: Excel's line 'sep=', which is no header: remove it")
            words = re.findall(r"[^\W_]+", names[0])
            if len(names) == 1 and " " not in names[0] and len(_OF_ROWS.intersection(words)) > 1:
                marks = "a tab, or rename the file" if delimiter == "\t" else "a comma, a semicolon, a tab or |"
                raise ValueError(f"{file.name}: {names[0]!r} is one column: between columns, write {marks}")
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                fix = "rename one"
                if not twice[0].strip():
                    fix = "give each a name, delete empty columns, or remove the line if it is no header"
                raise ValueError(f"{file.name}: its header has the column {twice[0]!r} more than once: {fix}")
            if names[0].startswith("\ufeff"):
                raise ValueError(f"{file.name} begins with a byte-order mark twice: remove one, or both")
            if odd := [name for name in names if "\0" in name]:
                raise ValueError(f"{file.name}: the column {odd[0]!r} has a NUL in its name: write the header anew")
            for i, row in enumerate(filter(None, rows)):
                number = rows.line_num
                if len(row) != len(names):
                    found = f"{len(row)} fields, but the header has {len(names)} columns"
                    fix = f"put text that has {delimiter!r} or a line break in it in double quotes"
                    if any(field[:1].isspace() and field.lstrip().startswith('"') for field in row):
                        fix = f"remove the blanks between {delimiter!r} and a double quote, which open no quoted text"
                    is_title = i == 0 and len(names) == 1
                    above = f", or remove {names[0][:50]!r} above it if that is no header" if is_title else ""
                    raise ValueError(f"{file.name}, line {number}: {found}: {fix}{above}")
                if row == names and len(names) > 1:
                    raise ValueError(f"{file.name}, line {number}: the row repeats the header: remove it")
                if first and number > first:
                    break
    except csv.Error as error:
        raise ValueError(
            f"{file.name}, in the row after line {number}: {error}; write a double quote within double quotes as two"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}, after line {number}: {error}; write the file in UTF-8") from error
    except _DAMAGES as error:
        raise ValueError(f"{file.name}, after line {number}: {error}; {_DAMAGED}") from error


def rows_inside(splits: Mapping[str, Any]) -> str | None:
    """Where the rows are, in words, in a file that was read as one row that holds them."""
    for row in filter(None, map(_only_row, splits.values())):
        firsts = {name: next(iter(value), None) for name, value in row.items() if isinstance(value, list)}
        for name, inside in firsts.items():
            if isinstance(inside, Mapping) and inside.keys() & _OF_ROWS:
                return f"with its rows under {name!r}"
            of_viewer = inside.get("row") if isinstance(inside, Mapping) else None
            if isinstance(of_viewer, Mapping) and of_viewer.keys() & _OF_ROWS:
                return f"with its rows under {name!r}, and in each of them under 'row', as the Hub's viewer has them"
        of_columns = all(isinstance(value, Mapping) and "0" in value for value in row.values())
        if row.keys() <= {"columns", "index", "data"} and {"columns", "data"} <= row.keys():
            return "with its rows under 'data'"
        if all(isinstance(value, Mapping) and value.keys() & _OF_ROWS for value in row.values()):
            return "of rows, each under its index, as pandas writes it without orient='records', lines=True"
        # a prompt that is a list of texts is no prompt; of messages, it is a list of lists
        inside = next((firsts[name] for name in ("prompt", "chosen") if firsts.get(name) is not None), {})
        if of_columns or (len(firsts) == len(row) and not isinstance(inside, Mapping)):
            return "of columns, as pandas writes it without orient='records', lines=True"
    return None


def _only_row(rows: Any) -> Mapping[str, Any] | None:
    """The row of a set, or of a stream, that has one."""
    with suppress(ValueError, TypeError, pa.ArrowException):  # whoever reads the rows says so
        if isinstance(rows, Dataset):
            return rows.data.to_pylist()[0] if len(rows) == 1 else None
        first = [*islice(rows.decode(False) if rows.features else rows, 2)]
        return first[0] if len(first) == 1 else None
    return None


def rows_as_text(splits: Mapping[str, Dataset]) -> str | None:
    """Why a file has a text for each row, in words."""
    for rows in splits.values():
        if rows.column_names == ["text"] and len(rows) and isinstance(_object(str(rows[0]["text"])), dict):
            return _TWICE
    return None


def times_for_text(splits: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """Which text column of a JSON file was read as timestamps, because it holds only dates."""
    for rows in splits.values():
        kinds = rows.features or {name: Value("timestamp[us]") for name in _times_in(next(iter(rows), {}))}
        for name in columns:
            if "timestamp" in str(kinds.get(name)):
                return f"column {name!r} has nothing but dates, which are read as timestamps, not as the text they are"
    return None


def _times_in(row: Mapping[str, Any]) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, datetime)]


def problem_of(files: Sequence[Path]) -> str | None:
    """The first file that is at fault, and what is wrong with it; None if no single file is."""
    return next((f"{file.name}{problem}" for file in files if (problem := _problem_of(file))), None)


def why_unreadable(file: Path, error: Exception) -> str:
    """What a library's error says of a file in which there is no fault to be found."""
    said = str(innermost(error))
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return f"{file.name} has no rows"
    if "Recursion level" in said:
        return f"{file.name}: lists or objects lie more than 60 deep within one another, which Arrow does not hold"
    if "Value is too big" in said:  # of the library that reads JSON
        said += ": an integer does not fit into 64 bits; write it as text, in quotes"
    damaged = f"; {_DAMAGED}: write it anew, or get it again" if builder_of(file) in ("parquet", "arrow") else ""
    return f"{file.name} cannot be read: {said}{damaged}"


def python_values(file: Path) -> list[Any]:
    """What Python reads in a JSON file: a list, or one object after another, on lines of their own or not."""
    with open_text(file) as lines:
        text = lines.read()
    decoder, rows, at = json.JSONDecoder(strict=False), [], 0  # Arrow takes control characters, too
    while found := _NOT_BLANK.search(text, at):
        row, at = decoder.raw_decode(text, found.start())
        rows.append(row)
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows


def innermost(error: BaseException) -> BaseException:
    """The first of the errors that led to this one, which says most."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return error


def _problem_of(file: Path) -> str | None:
    """What keeps a file from being read: its columns, or its JSON, one object per line or a whole document."""
    if builder_of(file) in ("parquet", "arrow"):
        return _problem_of_columns(file)
    if builder_of(file) == "csv":
        return " has no rows" if len(first_lines(file)) < 2 else None
    if not any(suffix in file.name.lower() for suffix in _FOR_LINES):
        return None
    number = 0
    try:
        with open_text(file) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1 and ".jsonl" not in file.name.lower() and not isinstance(_object(line), dict):
                    return _problem_of_document(line + lines.read())
                if line.strip() and (problem := _problem_of_line(line) or _too_large(line)):
                    return f", line {number}: {problem}: {shortened(line.strip())}"
    except UnicodeDecodeError as error:
        return f", after line {number}: {error}; write the file in UTF-8"
    except _DAMAGES as error:
        return f", after line {number}: {error}; {_DAMAGED}"
    return None


def _problem_of_columns(file: Path) -> str | None:
    """A column that is there twice, or of a type that `datasets` does not have."""
    try:
        if builder_of(file) == "parquet":
            schema = pq.read_schema(file)
        else:
            with pa.memory_map(str(file)) as source:
                opened = pa.ipc.open_file if source.read(6) == b"ARROW1" else pa.ipc.open_stream
                source.seek(0)
                schema = opened(source).schema
    except (OSError, pa.ArrowException):
        return None
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        return f" has the column {twice[0]!r} more than once: rename one"
    for column in schema:
        try:
            Features.from_arrow_schema(pa.schema([column]))
        except ValueError:
            return f": column {column.name!r} is of the type {column.type}, which is not read: leave it out"
    return None


def _object(text: str, strict: bool = True) -> Any:
    try:
        return json.loads(text, strict=strict)
    except (ValueError, RecursionError):
        return None


def _problem_of_document(text: str) -> str | None:
    if text.startswith("\x1e"):
        return f", line 1: {_problem_of_line(text)}"
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        return f", line {error.lineno}, character {error.colno}: not JSON ({error.msg})"
    except RecursionError:
        return f": {_TOO_DEEP}"
    except ValueError:  # Python's limit
        return ": an integer of thousands of digits: write it as text, in quotes"
    if isinstance(found, str) and isinstance(_object(found), dict | list):
        return f": {_TWICE}"
    return None if isinstance(found, list | dict) else ": not a list of rows, nor one row per line"


def _problem_of_line(line: str) -> str | None:
    """What keeps a line from being a row."""
    if line.startswith("\x1e"):
        return "a record separator (RFC 7464) before the row: remove it, for example with tr -d '\\036'"
    try:
        row = json.loads(line, object_pairs_hook=without_repeats)
        _check_characters(row)
    except json.JSONDecodeError as error:
        curly = "; its quotes are curly, write straight ones" if {*"“”„"} & {*line[: error.pos + 2]} else ""
        return f"not JSON ({error.msg} at character {error.pos}{curly})"
    except RecursionError:
        return _TOO_DEEP
    except NotReadError:
        return _HALF
    except ValueError as error:
        return str(error)
    if isinstance(row, str) and isinstance(_object(row), dict | list):
        return _TWICE
    return None if isinstance(row, dict) else "not an object with a value for each column, so correct or remove it"


def _check_numbers(row: Any) -> None:
    """Raises a NotReadError for a number of a stream's row that `datasets` makes a None of."""
    if (found := not_finite(row)) is not None:
        raise NotReadError(f"{found}, {NO_NUMBER}")


def _is_odd(number: float) -> bool:
    return not math.isfinite(number)


def not_finite(row: Any, is_odd: Callable[[float], bool] = _is_odd) -> str | None:
    """Which column of a row has a number that is NaN or infinite, in words."""
    for name, value in row.items() if isinstance(row, dict) else ():
        for number in _numbers_in(value):
            if is_odd(number):
                return f"column {name!r} has {number}"
    return None


def may_not_be_finite(text: str) -> bool:
    """Whether JSON may have a number that is NaN or infinite; a quick look."""
    return _NOT_FINITE.search(text) is not None


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _numbers_in(inner)


def _check_rows(document: Any, checks: Sequence[Callable[[Any], None]]) -> None:
    """Raises a TypeError for a list in which not everything is an object, or a row that is not read as it is."""
    for check in () if isinstance(document, list) else checks:
        check(document)
    for number, row in enumerate(document if isinstance(document, list) else ()):
        try:
            for check in checks:
                check(row)
        except NotReadError as error:
            raise TypeError(f"row {number}: {error}") from None
        if not isinstance(row, dict):
            if isinstance(row, str) and isinstance(_object(row), dict | list):
                raise TypeError(_TWICE)
            what = "an object with a value for each column (pandas' orient='records')"
            raise TypeError(f"row {number} is a {type(row).__name__}, and a row is {what}")


class NotReadError(ValueError):
    """A value is none that `datasets` reads: half of a surrogate pair, or in a stream one that is not finite."""
