"""Tables of text, CSV and TSV: what their columns hold, and options for `datasets` that keep it as it is written."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from .local_files import kind_of, open_text

_MISSING = ["", "NaN", "nan", "NA", "N/A", "null", "NULL", "None"]  # in columns that are no prompts or answers
_AT_ONCE = 10_000  # rows that `datasets` reads at once: a column's type is that of the first of them
_ALL = 2**31 - 1  # rows, or characters
_WHOLE = re.compile(r"\s*[+-]?\d+\s*", re.ASCII)
_NUMBER = re.compile(r"(?i)\s*[+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|inf|infinity)\s*", re.ASCII)
_FLAGS = ("true", "false")
_CODE = re.compile(r"\s*[+-]?0\d+\s*", re.ASCII)


class Kinds(NamedTuple):
    """What a table holds.

    Attributes:
        codes: the columns in which a number begins with 0, since `007` is no 7.
        of: for each column that has something, what it is: "flag", "whole", "number" or "text". "both" is of whole
            numbers and others.
        is_late: whether a column has something in later rows alone.
    """

    codes: list[str]
    of: dict[str, str]
    is_late: bool


@contextmanager
def any_length() -> Iterator[None]:
    """Within the block, a field may hold a long completion."""
    limit = csv.field_size_limit(_ALL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def delimiter_of(file: Path) -> str:
    """The delimiter between the columns of a table."""
    if kind_of(file) == ".tsv":
        return "\t"

    def fits(mark: str) -> tuple[int, int]:
        try:
            header = _header_of(file, mark, strict=True)  # in which a column may have another mark in its name
        except csv.Error:  # a mark within quotes
            return 0, 0
        return len({"prompt", "chosen", "rejected"} & {*header}), len(header)

    return max(",;\t|", key=fits)


def table_options(files: Sequence[Path], texts: Collection[str], first: int | None) -> tuple[dict[str, Any], bool]:
    """Options of `datasets` for tables of the same columns, and whether one of them has nothing in a column in which
    another has something: read together, what comes first would have another type.

    Args:
        files: the tables.
        texts: the columns that hold prompts or answers.
        first: how many rows of each to look at, by default all.
    """
    from ..rows.form import like_a_prompt  # with the whole of `rows`, which takes seconds to import

    delimiter = _same_delimiter(files)
    header = _header_of(files[0], delimiter)
    found = [_kinds_of(file, delimiter, first) for file in files]
    texts = (*texts, *chain.from_iterable(each.codes for each in found))
    # of several files, text in all of them: else they differ, and an error says so
    kinds = {name: {each.of[name] for each in found if name in each.of} for name in header}
    others = (*like_a_prompt(header), *(name for name in header if kinds[name] == {"text"}))
    missing = dict.fromkeys(header, _MISSING)
    options = {  # a completion may be "None" or "007"
        "sep": delimiter,
        "converters": dict.fromkeys((*texts, *others), str),
        "keep_default_na": False,
        # no prompt is an empty one, no completion is none
        "na_values": missing | {name: [] if name == "prompt" else [""] for name in texts if name in missing},
    }
    # 1.5 may be behind 10,000 whole numbers, or the first text behind 10,000 rows without one
    if not first and (any("both" in each for each in kinds.values()) or any(each.is_late for each in found)):
        options["chunksize"] = _ALL  # not None, which the settings of a folder would not take
    return options, len({frozenset(each.of) for each in found}) > 1


def _same_delimiter(files: Sequence[Path]) -> str:
    """
    Raises:
        ValueError: the tables have different ones.
    """
    found: dict[str, str] = {}
    for file in files:
        found.setdefault(delimiter_of(file), file.name)
    (one, first), *others = found.items()
    if others:
        other, second = others[0]
        raise ValueError(
            f"{first} has {one!r} between its columns, and {second} has {other!r}: give all files of the folder the "
            "same, or name one of them"
        )
    return one


def _header_of(file: Path, delimiter: str, strict: bool = False) -> list[str]:
    with open_text(file, newline="") as lines, any_length():
        return next(filter(None, csv.reader(lines, delimiter=delimiter, strict=strict)), [])


def _kinds_of(file: Path, delimiter: str, first: int | None) -> Kinds:
    codes: dict[str, None] = {}
    kinds: dict[str, set[str]] = {}
    is_late = False
    with open_text(file, newline="") as lines, any_length(), suppress(csv.Error):  # whoever reads the file says so
        rows = filter(None, csv.reader(lines, delimiter=delimiter))
        header = next(rows, [])
        for i, row in enumerate(islice(rows, first)):
            for name, cell in zip(header, row, strict=False):
                found = kinds.setdefault(name, set())
                if "text" not in found and cell not in _MISSING:
                    is_late = is_late or (not found and i >= _AT_ONCE)
                    found.add(_kind_of(cell))
                if name not in codes and _CODE.fullmatch(cell):
                    codes[name] = None
    return Kinds(list(codes), {name: _joint(found) for name, found in kinds.items() if found}, is_late)


def _joint(kinds: set[str]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return "text" if kinds & {"text", "flag"} else "both"


def _kind_of(cell: str) -> str:
    if _WHOLE.fullmatch(cell):
        return "whole"
    return "number" if _NUMBER.fullmatch(cell) else "flag" if cell.lower() in _FLAGS else "text"
