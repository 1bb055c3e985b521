"""What is wrong with a data file that could not be read, in words that name the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

_FOR_LINES = (".jsonl", ".json")
_FOR_COLUMNS = ".csv"


def check_header(file: Path) -> None:
    """Refuses a CSV file two of whose columns have one name: a reader renames the second.

    Raises:
        ValueError: such a column, by its name.
    """
    if _FOR_COLUMNS not in file.name.lower():
        return
    try:
        with _text_of(file) as lines:
            names = next(csv.reader(lines), [])
    except (OSError, UnicodeDecodeError):  # found again, and named, in reading the whole
        return
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{file.name}: its header has the column {twice[0]!r} more than once: rename one of them")


def why_unreadable(files: Sequence[Path], error: Exception) -> str | None:
    """The first file that is at fault and what is wrong with it; None where no single file is."""
    for file in files:
        if problem := _problem_of(file):
            return f"{file.name}{problem}"
    if len(files) != 1:
        return None
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return f"{files[0].name} has no rows"
    return f"{files[0].name} cannot be read: {error.__cause__ or error}"


def _problem_of(file: Path) -> str | None:
    if not file.stat().st_size:
        return " is empty"
    if not any(suffix in file.name.lower() for suffix in _FOR_LINES) or file.suffix == ".xz":
        return None
    number = 0
    try:
        with _text_of(file) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1 and ".jsonl" not in file.name.lower() and not _is_json(line):
                    return _problem_of_whole(line + lines.read())
                if line.strip() and (problem := _problem_of_line(line)):
                    return f", line {number}: {problem}: {shortened(line.strip())}"
    except UnicodeDecodeError as error:
        return f", after line {number}: {error}; write the file in UTF-8"
    except OSError as error:
        return f", after line {number}: {error}; the file is damaged or was not written to its end"
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
def _text_of(file: Path) -> Iterator[io.TextIOWrapper]:
    """A file's lines, decompressed by its name."""
    import pyarrow as pa

    with pa.input_stream(str(file)) as stream, io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig") as lines:
        yield lines
