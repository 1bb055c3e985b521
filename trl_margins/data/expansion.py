"""What a file becomes when it is read is bounded: archives that expand without end, rows beyond all memory, and lists
within lists without end.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.config import ZSTANDARD_AVAILABLE

from .local_files import COMPRESSED, builder_of, open_bytes

# By these `datasets` knows a compressed file, whatever its name
_BY_CONTENT = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\x04\x22\x4d\x18": ".lz4",
    b"PK\x03\x04": ".zip",
    b"Rar!": ".rar",
    b"7z\xbc\xaf\x27\x1c": ".7z",
}
_FORMATS = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}  # by their first bytes
_BYTE_ORDERS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # of UTF-16 and UTF-32
ANY_SIZE = 2**30  # bytes that any file may become; more, only if they are not these times its size
TIMES = 100  # text becomes five times as large, a log of one line a few dozen
TIMES_DECODED = 1000  # of Parquet, which holds a repeated value once
_PART = 16  # of the memory that one row may have: reading takes several copies of it
MAX_DEPTH = 1000  # of lists and objects in JSON: Python reads no more, and Arrow's reader ends the process at 20,000
_BLOCK = 2**20
_FIRST = 2**26  # bytes of a stream that are looked at


def check_expansion(file: Path, only_first: bool = False) -> None:
    """
    Args:
        only_first: of a file that is streamed, only its beginning.

    Raises:
        ValueError: an archive under the name of a data file, one that expands too far, a row that does not fit into
            the memory, or JSON that no reader takes.
    """
    with file.open("rb") as content:
        start = content.read(265)
    found = next((suffix for mark, suffix in _BY_CONTENT.items() if start.startswith(mark)), "")
    found = ".tar" if start[257:262] == b"ustar" else found
    if found and file.suffix.lower() != found:
        if found == ".zip" and _is_workbook(file):
            raise ValueError(f"{file.name} is an Excel workbook by its content: export the sheet as CSV")
        called = f", or call it {file.name}{found}" * (found in COMPRESSED)
        raise ValueError(f"{file.name} is a {found} file by its content: unpack it{called}")
    if found == ".zst" and not ZSTANDARD_AVAILABLE:
        raise ValueError(f"{file.name}: reading zstd needs a package: pip install zstandard, or decompress the file")
    check_format(file, bool(found))
    if builder_of(file) == "parquet" and not found:
        _check_parquet(file)
    elif builder_of(file) in ("json", "csv"):
        _check_text(file, bool(found), start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[", only_first)


def check_format(file: Path, is_compressed: bool) -> None:
    """
    Raises:
        ValueError: a file of another format than its name says, or one that was compressed twice.
    """
    start, builder, name = next(_blocks(file, 2**10), b""), builder_of(file), file.name.split(".")[0]
    found = next((_FORMATS[mark] for mark in _FORMATS if start.startswith(mark)), "")
    binary = builder in ("parquet", "arrow")
    if is_compressed and binary:
        raise ValueError(f"{file.name}: {builder} is not read where it is compressed as a whole: decompress it")
    if is_compressed and any(start.startswith(mark) for mark in _BY_CONTENT):
        raise ValueError(f"{file.name} was compressed twice: decompress it once")
    if found and found != builder:
        first = "decompress it, and " * is_compressed
        raise ValueError(f"{file.name} is {found.capitalize()} by its content: {first}call it {name}.{found}")
    begin = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:40]
    if begin.lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{file.name} is a web page, perhaps one that says why there is no file: get the file itself")
    if begin.startswith(b"%PDF"):
        raise ValueError(f"{file.name} is a PDF by its content: get the data in one of the formats that are read")
    is_pointer = begin.startswith(b"version https://git-lfs")  # of which `check_file` knows more
    is_text = begin and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in begin)
    if binary and is_text and not found and not is_pointer:
        raise ValueError(f"{file.name} is text by its content: give its name the ending of what it is, such as .jsonl")
    wide = len(start) > 3 and any(start[i:16:2].strip(b"\0") == b"" for i in (0, 1)) and start[:16].strip(b"\0")
    if not binary and (wide or start.startswith(_BYTE_ORDERS)):
        raise ValueError(f"{file.name} is written in UTF-16 or UTF-32: write it in UTF-8")
    if builder == "csv" and re.match(rb'[\[\s]*\{\s*"', begin):
        raise ValueError(f"{file.name} is JSON by its content: call it {name}.jsonl")


def _is_workbook(file: Path) -> bool:
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        return any(name.startswith("xl/") for name in archive.namelist())
    return False


def memory() -> int:
    """Bytes of the memory of the machine, or of the container; a guess where the system does not say."""
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**34
    with suppress(OSError, ValueError):  # no container, or "max"
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole


def _check_text(file: Path, is_compressed: bool, is_document: bool, only_first: bool) -> None:
    size, most = file.stat().st_size, memory() // _PART
    nesting = _Nesting(file.name) if builder_of(file) == "json" else None
    if nesting is None and not is_compressed and (size <= most or only_first):
        return
    total = line = 0
    for block in _blocks(file):
        if nesting is not None:
            nesting.look(block)
        total += len(block)
        last = -1 if is_document else block.rfind(b"\n")
        line = line + len(block) if last < 0 else len(block) - last - 1
        if is_compressed and not total - len(block):
            is_document = block.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
        if line > most:
            raise ValueError(
                f"{file.name}: one {'document' if is_document else 'line'} has more than {_gib(most)}, which reading "
                f"copies several times, and this machine's memory has {_gib(memory())}: write one row per line, "
                "or Parquet"
            )
        if is_compressed and total > max(ANY_SIZE, TIMES * size):
            raise ValueError(
                f"{file.name} has {size:,} bytes and expands to more than {_gib(total)}, over {TIMES} times as much, "
                "as no text does: if that is right, decompress it yourself and name the file that this gives"
            )
        if only_first and total > _FIRST:
            return


class _Nesting:
    """Looks at JSON block by block, before a reader does that ends the process over it.

    Args:
        name: of the file, for errors.
    """

    _OTHERS = bytes(set(range(256)) - {*b'"[]{}\n'})
    _STEPS = np.zeros(256, np.int8)
    _STEPS[[*b"[{"]] = 1
    _STEPS[[*b"]}"]] = -1

    def __init__(self, name: str) -> None:
        self.name, self._is_first, self._rest = name, True, b""
        self._depth = self._quotes = self._lines = 0

    def look(self, block: bytes) -> None:
        """
        Raises:
            ValueError: a file that begins with null, or lists and objects that lie deeper than `MAX_DEPTH`.
        """
        if self._is_first and block.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"null"):
            raise ValueError(f"{self.name} begins with null, which is not a row: remove it")
        self._is_first = False
        text = (self._rest + block).replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        self._rest = b"\\" if text.endswith(b"\\") else b""  # what it escapes is in the next block
        marks = np.frombuffer(text.translate(None, self._OTHERS), np.uint8)
        if not marks.size:
            return
        quotes = self._quotes + np.cumsum(marks == ord('"'), dtype=np.int32)
        ends = marks == ord("\n")  # no text goes beyond a line
        within = quotes - np.maximum.accumulate(np.where(ends, quotes, 0)) & 1
        depths = self._depth + np.cumsum(self._STEPS[marks] * (1 - within), dtype=np.int32)
        if depths.max() > MAX_DEPTH:
            line = 1 + self._lines + int(ends[: depths.argmax()].sum())
            raise ValueError(
                f"{self.name}, line {line}: lists or objects lie more than {MAX_DEPTH:,} deep within one another, "
                "which no reader takes: correct the line, or remove it"
            )
        self._depth, self._quotes, self._lines = int(depths[-1]), int(within[-1]), self._lines + int(ends.sum())


def _blocks(file: Path, size: int = _BLOCK) -> Iterator[bytes]:
    try:
        with open_bytes(file) as content:
            while block := content.read(size):
                yield block
    except Exception:  # of a damaged file, or without a library: whoever reads it says so
        return


def _check_parquet(file: Path) -> None:
    size = file.stat().st_size
    try:
        opened = pq.ParquetFile(file)
        groups = list(_groups(opened))
    except (pa.ArrowException, OSError):  # whoever reads it says so
        return
    if not opened.metadata.num_rows:
        raise ValueError(f"{file.name} is empty")
    plain, decoded = (sum(each) for each in zip(*groups, strict=True))
    for what, expanded, times in (("", plain, TIMES), (", decoded,", decoded, TIMES_DECODED)):
        if expanded > max(ANY_SIZE, times * size):
            raise ValueError(
                f"{file.name} has {size:,} bytes and expands to {_gib(expanded)}{what} over {times} times as much: if "
                "that is right, write it without compression and dictionaries"
            )
    largest = max(map(max, groups))
    if largest > memory() / 2:
        raise ValueError(
            f"{file.name}: a row group has {_gib(largest)}, and is read at once, and this machine's memory has "
            f"{_gib(memory())}: write smaller row groups"
        )


def _groups(opened: Any) -> Iterator[tuple[int, int]]:
    """Bytes of each row group without compression, and an estimate from its first rows of what it becomes."""
    sampled: dict[int, float] = {}
    for number in range(opened.num_row_groups):
        group = opened.metadata.row_group(number)
        plain = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))
        if plain > ANY_SIZE or not group.num_rows:  # too large to be tried
            yield plain, plain
            continue
        if number < 8:
            first = next(opened.iter_batches(batch_size=min(1000, group.num_rows), row_groups=[number]))
            sampled[number] = first.nbytes / max(1, len(first))
        yield plain, int(max(sampled.values(), default=0) * group.num_rows)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
