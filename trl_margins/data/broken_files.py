"""What is wrong with a data file that could not be read, in words that name the file and the line."""

from __future__ import annotations

import csv
import io
import json
import lzma
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from datasets import Dataset

_FOR_LINES = (".jsonl", ".json", ".ndjson")
_FOR_COLUMNS = (".csv", ".tsv")
_DAMAGES = (OSError, EOFError, lzma.LZMAError)
_POINTER = b"version https://git-lfs.github.com/spec/"
_DAMAGED = "the file is damaged or was not written to its end"


def check_file(file: Path, only_first: bool = False) -> None:
    """Refuses a file that a reader takes without a word for something else: one that is empty or was never fetched, a
    CSV file with a column's name twice, a row with fewer fields than columns, or with more, which shifts all of them,
    or text behind a closing quote.

    Args:
        only_first: look at the first row only.

    Raises:
        ValueError: what it is, in which line.
    """
    with file.open("rb") as content:
        start = content.read(len(_POINTER))
    if not start:
        raise ValueError(f"{file.name} is empty")
    if start == _POINTER:
        raise ValueError(f"{file.name} is only Git LFS's pointer to a file: get the file with `git lfs pull`")
    if any(suffix in file.name.lower() for suffix in _FOR_COLUMNS):
        _check_table(file, only_first)


def _check_table(file: Path, only_first: bool) -> None:
    number = 0
    try:
        delimiter = delimiter_of(file)
        with text_of(file, newline="") as lines, _long_fields():
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(rows, [])
            number = rows.line_num
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(
                    f"{file.name}: its header has the column {twice[0]!r} more than once: rename one of them"
                )
            for row in rows:
                number = rows.line_num
                if row and len(row) != len(names):
                    raise ValueError(
                        f"{file.name}, line {number}: {len(row)} fields, but the header has {len(names)} columns: put "
                        f"text that has {delimiter!r} or a line's end in it in double quotes"
                    )
                if only_first:
                    break
    except csv.Error as error:
        raise ValueError(
            f"{file.name}, in the row after line {number}: {error}; write a double quote within double quotes as two"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}, after line {number}: {error}; write the file in UTF-8") from error
    except _DAMAGES as error:
        raise ValueError(f"{file.name}, after line {number}: {error}; {_DAMAGED}") from error


def delimiter_of(file: Path) -> str:
    """What stands between the columns of a table."""
    if ".tsv" in file.name.lower():
        return "\t"
    with text_of(file) as lines, _long_fields():
        header = lines.readline()
        return max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def header_of(file: Path, delimiter: str) -> list[str]:
    """The columns of a table."""
    with text_of(file, newline="") as lines, _long_fields():
        return next(csv.reader(lines, delimiter=delimiter), [])


def rows_inside(splits: Mapping[str, Dataset]) -> str | None:
    """Where the rows are in a file that was read as one row of them, in words."""
    for rows in splits.values():
        if len(rows) != 1:
            continue
        for name, feature in rows.features.items():
            inside = feature.feature if hasattr(feature, "feature") else None
            if isinstance(inside, dict) and inside.keys() & {"prompt", "chosen", "rejected", "responses"}:
                return f"with its rows under {name!r}"
        if all(isinstance(feature, dict) and "0" in feature for feature in rows.features.values()):
            return "of columns, as pandas writes it without orient='records', lines=True"
    return None


def times_for_text(splits: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """What is wrong with text of JSON that was read as points in time, as text is that has nothing but dates."""
    for rows in splits.values():
        for name in columns:
            if rows.features and "timestamp" in str(rows.features.get(name)):
                return (
                    f"column {name!r} has nothing but dates, which are read as points in time, not as the text it has"
                )
    return None


def why_unreadable(files: Sequence[Path], error: Exception) -> str | None:
    """The first file that is at fault and what is wrong with it; None where no single file is."""
    for file in files:
        if problem := _problem_of(file):
            return f"{file.name}{problem}"
    if len(files) != 1:
        return None
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return f"{files[0].name} has no rows"
    return f"{files[0].name} cannot be read: {innermost(error)}"


def innermost(error: BaseException) -> BaseException:
    """The first of the errors that led to this one, which says most."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return error


def _problem_of(file: Path) -> str | None:
    if not any(suffix in file.name.lower() for suffix in _FOR_LINES):
        return None
    number = 0
    try:
        with text_of(file) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1 and ".jsonl" not in file.name.lower() and not _is_json(line):
                    return _problem_of_whole(line + lines.read())
                if line.strip() and (problem := _problem_of_line(line)):
                    return f", line {number}: {problem}: {shortened(line.strip())}"
    except UnicodeDecodeError as error:
        return f", after line {number}: {error}; write the file in UTF-8"
    except _DAMAGES as error:
        return f", after line {number}: {error}; {_DAMAGED}"
    return None


def _problem_of_line(line: str) -> str | None:
    """What keeps a line from being a row."""
    try:
        row = json.loads(line, object_pairs_hook=_without_repeats)
        json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at character {error.pos})"
    except UnicodeEncodeError:
        return "half of a surrogate pair, which is no character"
    except ValueError as error:
        return str(error)
    return None if isinstance(row, dict) else "not an object with a value for each column"


def _problem_of_whole(text: str) -> str | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f", line {error.lineno}, character {error.colno}: not JSON ({error.msg})"
    return None


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"the key {twice[0]!r} more than once")
    return dict(pairs)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lets a field be as long as an answer; the module's limit is for all of Python."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@contextmanager
def text_of(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file's lines, decompressed by its name."""
    import pyarrow as pa

    if file.suffix.lower() == ".xz":  # which Arrow does not know
        with lzma.open(file, "rt", encoding="utf-8-sig", newline=newline) as lines:
            yield lines
        return
    with (
        pa.input_stream(str(file)) as stream,
        io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig", newline=newline) as lines,
    ):
        yield lines
