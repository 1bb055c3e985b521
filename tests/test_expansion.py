"""Small files that become large ones: an error before the memory is full."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import time
import zipfile
from resource import RUSAGE_SELF, getrusage

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import preference_rows
from said import word_for_word  # noqa: F401 - its messages are held against said/

from trl_margins.data import expansion
from trl_margins.data.loading import load_splits

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
LINE = (json.dumps(ROW) + "\n").encode()


@pytest.fixture
def small(monkeypatch):
    """A machine on which the bounds are reached at once."""
    monkeypatch.setattr(expansion, "ANY_SIZE", 2**20)
    monkeypatch.setattr(expansion, "memory", lambda: 2**24)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_what_expands_too_far(pack, streaming, kind, tmp_path, small):
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[pack]
    file = tmp_path / f"pairs.{kind}.{suffix}"
    file.write_bytes(pack((b"prompt,chosen,rejected\n" + b"a,b,c\n" * 400_000) if kind == "csv" else LINE * 60_000))
    with pytest.raises(ValueError, match=rf"{file.name} has .* bytes and expands .*decompress it yourself"):
        load_splits(str(file), streaming=streaming)


@pytest.mark.parametrize("name", ["one.jsonl", "one.jsonl.gz", "one.json", "one.json.gz", "one.csv"])
def test_one_row_beyond_all_memory(name, tmp_path, small):
    text = json.dumps(
        [ROW | {"chosen": "b" * 2_000_000}] if ".json." in f"{name}." else ROW | {"chosen": "b" * 2_000_000}
    )
    text = "prompt,chosen,rejected\na," + "b" * 2_000_000 + ",c" if name.endswith("csv") else text
    (tmp_path / name).write_bytes(gzip.compress(text.encode(), 0) if name.endswith("gz") else text.encode())
    with pytest.raises(ValueError, match=rf"{name}: one (line|document) has more than .* memory has"):
        load_splits(str(tmp_path / name))


def archive(kind: str, inside: str = "pairs.jsonl") -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
            made.writestr(inside, LINE * 9)
    else:
        with tarfile.open(fileobj=out, mode="w") as made:
            told = tarfile.TarInfo("pairs.jsonl")
            told.size = len(LINE)
            made.addfile(told, io.BytesIO(LINE))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("pairs.jsonl", gzip.compress(LINE), ".gz"),
        ("pairs.json", lzma.compress(LINE), ".xz"),
        ("pairs.csv.gz", bz2.compress(LINE), ".bz2"),
        ("pairs.jsonl", archive("zip"), ".zip"),
        ("pairs.parquet", archive("zip"), ".zip"),
        ("pairs.jsonl", archive("tar"), ".tar"),
        ("pairs.jsonl", b"7z\xbc\xaf\x27\x1c" + bytes(99), ".7z"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,  # gzip's hold the time
)
def test_an_archive_by_another_name(name, content, kind, tmp_path):
    (tmp_path / name).write_bytes(content)
    ends = rf", or call it {name}\{kind}$" if kind in (".gz", ".xz", ".bz2") else "$"
    with pytest.raises(ValueError, match=rf"{name} is a \{kind} file by its content: unpack it{ends}"):
        load_splits(str(tmp_path / name))


def test_a_pdf_by_another_name(tmp_path):
    for name in ("pairs.csv", "pairs.json"):
        (tmp_path / name).write_bytes(b"%PDF-1.7\n%\xe2\xe3")
        with pytest.raises(ValueError, match=rf"{name} is a PDF by its content"):
            load_splits(str(tmp_path / name))


def test_a_workbook_by_another_name(tmp_path):
    (tmp_path / "pairs.csv").write_bytes(archive("zip", "xl/workbook.xml"))
    with pytest.raises(ValueError, match=r"pairs.csv is an Excel workbook by its content: export the sheet as CSV"):
        load_splits(str(tmp_path / "pairs.csv"))
    (tmp_path / "pairs.csv").write_bytes(archive("zip")[:40])
    with pytest.raises(ValueError, match=r"pairs.csv is a .zip file by its content: unpack it$"):
        load_splits(str(tmp_path / "pairs.csv"))


def test_parquet(tmp_path, small):
    rows = pa.table({name: ["x" * 100] * 100_000 for name in ROW})
    pq.write_table(rows, tmp_path / "coded.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"coded.parquet has .* expands to .*decoded, over 1000 times"):
        load_splits(str(tmp_path / "coded.parquet"))
    rows = pa.table({name: ["x" * 1_000_000] * 3 for name in ROW})
    pq.write_table(rows, tmp_path / "packed.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=r"packed.parquet has .* expands to .* over 100 times"):
        load_splits(str(tmp_path / "packed.parquet"))
    rows = pa.table({name: [str(i) * 9 + "x" * 990 for i in range(9_000)] for name in ROW})
    pq.write_table(rows, tmp_path / "group.parquet", row_group_size=8_999, compression="none", use_dictionary=False)
    with pytest.raises(ValueError, match=r"group.parquet: a row group has .*smaller row groups"):
        load_splits(str(tmp_path / "group.parquet"))


@pytest.mark.rehearsal
def test_a_real_bomb_takes_neither_time_nor_memory(tmp_path):
    """Ten gigabytes in ten megabytes, on this machine as it is."""
    with (tmp_path / "bomb.jsonl.gz").open("wb") as out:
        packed = gzip.compress(b"a" * 2**24)
        for _ in range(640):
            out.write(packed)
    before, began = getrusage(RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=r"bomb.jsonl.gz has .* bytes and expands"):
        load_splits(str(tmp_path / "bomb.jsonl.gz"))
    assert time.perf_counter() - began < 60
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json.xz", "x.csv.bz2", "x.parquet"])
def test_what_is_usual(name, tmp_path):
    rows = preference_rows(300)
    if ".csv" in name:
        (tmp_path / name).write_bytes(bz2.compress(b"prompt,chosen,rejected\n" + b"a,b,c\n" * 300))
    else:
        rows.to_parquet(tmp_path / name) if "parquet" in name else rows.to_json(tmp_path / name)
    assert len(load_splits(str(tmp_path / name))["train"]) == 300


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_depth_is_that_of_the_whole_file_whatever_its_blocks(size, monkeypatch):
    """Brackets within texts do not count, nor quotes that are escaped; the line is named."""
    monkeypatch.setattr(expansion, "MAX_DEPTH", 5)
    plain = rb'{"a": "[[[[[[\"[{{{{{\\\\", "b": [[1], {"c": [[]]}], "d\\\"[": "]"}' + b"\n"

    def look(text: bytes) -> None:
        looks = expansion._Nesting("x.jsonl")
        for start in range(0, len(text), size):
            looks.look(text[start : start + size])

    assert all(json.loads(line) for line in plain.split(b"\n") if line)
    look(plain * 9 + b'{"a": [[[[1]]]]}' + b"\n" + plain)
    with pytest.raises(
        ValueError, match=r"^x.jsonl, line 10: lists or objects lie more than 5 deep within one another"
    ):
        look(plain * 9 + b'{"a": [[{"b": [[1]]}]]}' + b"\n" + plain)


def test_zstd_needs_a_package(tmp_path, monkeypatch):
    monkeypatch.setattr(expansion, "ZSTANDARD_AVAILABLE", False)
    file = tmp_path / "pairs.jsonl.zst"
    file.write_bytes(b"\x28\xb5\x2f\xfd and more")
    with pytest.raises(ValueError, match=r"pairs.jsonl.zst: reading zstd needs a package: pip install zstandard"):
        load_splits(str(file))
