"""A file is read as what it is, whatever it is called and whatever lies beside it, or refused by its name."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import logging
import lzma
import re
import shutil
import socket
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load, preference_rows, quiet
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    Image,
    List,
    Value,
    concatenate_datasets,
)
from PIL import Image as Picture
from said import word_for_word  # noqa: F401 - its messages are held against said/

from trl_margins import GapPOConfig, MarginCPOTrainer
from trl_margins.cli import main
from trl_margins.data.evaluation_factors import add_evaluation_factor
from trl_margins.data.formats import as_plain, transformed
from trl_margins.data.loading import load_splits, pick_split
from trl_margins.data.media import without_decoding
from trl_margins.data.noise import flip_labels
from trl_margins.rows import open_rows
from trl_margins.trainers.preparation import as_taken

ROW = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2.0, "score_rejected": 1.0}
LINE = json.dumps(ROW) + "\n"
HEAD = "prompt,chosen,rejected\n"
_TABLE, _PARQUET, _ARROW = pa.Table.from_pylist([ROW] * 3), pa.BufferOutputStream(), pa.BufferOutputStream()
pq.write_table(_TABLE, _PARQUET)
with pa.ipc.new_stream(_ARROW, _TABLE.schema) as _stream:
    _stream.write_table(_TABLE)
PARQUET, ARROW = (each.getvalue().to_pybytes() for each in (_PARQUET, _ARROW))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of its own, and no network."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refused)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write(folder: Any, **contents: str | bytes) -> Any:
    """Files by their names, in which `__` is a dot."""
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def rows_of(path: Any, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    return list(load_splits(str(path), **options)[split])


# Names

NAMES = ["pairs[ab]", "p*s", "c**", "a::b", "what?", "a b", "a#b", "a%20b", "é漢", "-x", "{a,b}", "http:x", "~x", "!a"]


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_exists_is_that_file(name, streaming, folder, monkeypatch):
    """Beside files that a pattern of this name would find."""
    for other in ("pairsa", "pairs", "what1", "b", "c"):
        (folder / f"{other}.jsonl").write_text(LINE.replace('"b"', '"other"'))
    (folder / f"{name}.jsonl").write_text(LINE)
    monkeypatch.chdir(folder)
    for path in (f"{name}.jsonl", folder / f"{name}.jsonl"):
        assert rows_of(path, streaming=streaming) == [ROW]


@pytest.mark.parametrize("name", ["pairs[ab]", "a::b", "p*s?"])
def test_every_kind_of_file_by_any_name(name, folder):
    table, text = Dataset.from_list([ROW]), ",".join(ROW) + "\na,b,c,2.0,1.0\n"
    kinds = {
        "json": json.dumps([ROW]).encode(),
        "ndjson": LINE.encode(),
        "csv": text.encode(),
        "tsv": text.replace(",", "\t").encode(),
        "jsonl.gz": gzip.compress(LINE.encode()),
        "jsonl.xz": lzma.compress(LINE.encode()),
        "jsonl.bz2": bz2.compress(LINE.encode()),
        "csv.gz": gzip.compress(text.encode()),
    }
    for kind, content in kinds.items():
        (folder / f"{name}.{kind}").write_bytes(content)
    table.to_parquet(folder / "plain.parquet")
    shutil.move(folder / "plain.parquet", folder / f"{name}.parquet")
    table.save_to_disk(folder / "saved")
    shutil.copy(folder / "saved" / "data-00000-of-00001.arrow", folder / f"{name}.arrow")
    shutil.move(folder / "saved", folder / name)
    for kind in (*kinds, "parquet", "arrow"):
        assert rows_of(folder / f"{name}.{kind}") == [ROW], kind
    assert rows_of(folder / name) == [ROW]


@pytest.mark.parametrize("name", ["d[x]", "e::f", "g*?", "%20 #"])
def test_a_folder_by_any_name(name, folder):
    strange = folder / name
    strange.mkdir()
    write(strange, train__jsonl=LINE * 2, test__jsonl=LINE)
    (strange / "test-[1]::x.jsonl").write_text(LINE)
    assert {split: len(rows) for split, rows in load_splits(str(strange)).items()} == {"train": 2, "test": 2}


def test_a_link_is_read_anew_when_its_target_changes(folder):
    write(folder, first__jsonl=LINE, second__jsonl=LINE * 2)
    link = folder / "pairs.jsonl"
    for name, rows in (("first.jsonl", 1), ("second.jsonl", 2)):
        link.unlink(missing_ok=True)
        link.symlink_to(folder / name)
        assert len(rows_of(link)) == rows
    (folder / "second.jsonl").write_text(LINE * 3)
    assert len(rows_of(link)) == 3


def test_a_wrong_split_is_an_error_that_lists_the_splits(folder):
    write(folder, train__jsonl=LINE, test__jsonl=LINE)
    with pytest.raises(
        ValueError,
        match=r"'pairs' has the splits \['train', 'test'\], not 'tset': name one of them with --dataset_split",
    ):
        pick_split(load_splits(str(folder)), "tset", "pairs")


# What a folder says of itself


def readme(*entries: Any) -> str:
    return f"---\n{json.dumps({'configs': entries})}\n---\n"


@pytest.mark.parametrize(
    "entry",
    [
        {"data_files": "../outside.jsonl"},
        {"data_files": ["a.jsonl", "../*.jsonl"]},
        {"data_files": [{"split": "train", "path": ["a.jsonl", "/outside.jsonl"]}]},
        {"data_files": "x/../../outside.jsonl"},
        {"data_files": "..\\outside.jsonl"},
        {"data_files": "https://example.com/x.jsonl"},
        {"data_files": [{"split": "train", "path": "hf://datasets/a/b/x.jsonl"}]},
        {"data_files": "gzip://x.jsonl::x.jsonl.gz"},
        {"data_dir": ".."},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["README__md", "__huggingface__yaml"])
def test_a_folder_s_own_word_does_not_lead_out_of_it(entry, where, folder, tmp_path):
    (tmp_path / "outside.jsonl").write_text(LINE)
    card = readme({"config_name": "default", **entry})
    write(folder, a__jsonl=LINE, **{where: card if where == "README__md" else card.strip("-\n")})
    with pytest.raises(ValueError, match=r"configuration 'default' .* takes files from '.*', outside the folder"):
        load_splits(str(folder))


def test_a_folder_s_configurations(folder):
    (folder / "sub").mkdir()
    write(folder / "sub", train__jsonl=LINE * 3)
    one = {"config_name": "one", "data_files": [{"split": "good", "path": "a.jsonl"}, {"split": "bad", "path": "b*"}]}
    write(folder, README__md=readme(one, {"config_name": "two", "data_dir": "sub"}), a__jsonl=LINE, b__jsonl=LINE * 2)
    splits = load_splits(str(folder), "one")
    assert {split: len(rows) for split, rows in splits.items()} == {"good": 1, "bad": 2}
    assert len(rows_of(folder, config="two")) == 3
    for name in (None, "three"):
        with pytest.raises(ValueError, match=rf"data has the configurations \['one', 'two'\], not {name!r}"):
            load_splits(str(folder), name)
    write(folder / "sub", README__md="no configurations")
    with pytest.raises(ValueError, match="sub has no configuration 'one'"):
        load_splits(str(folder / "sub"), "one")
    write(folder, README__md="---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"data: the YAML of its README.md cannot be read"):
        load_splits(str(folder))


def test_files_that_are_no_data_are_no_data(folder, caplog):
    write(folder, README__md="hello", __DS_Store=b"\0\1", LICENSE__txt="x", to_do__txt="x", notes__md="x", x__py="x")
    write(folder, train__jsonl=LINE * 2, test__jsonl=LINE, test_more__csv=HEAD + "a,b,c\n")
    with caplog.at_level(logging.WARNING, "trl_margins"):
        splits = load_splits(str(folder))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2, "test": 1}
    assert "only its json files are read, not test_more.csv" in caplog.text


@pytest.mark.parametrize(
    ("names", "level", "words"),
    [
        (["train.jsonl", "train_old.jsonl"], logging.INFO, "'train' is read from train.jsonl, train_old.jsonl"),
        (["train.jsonl", "train.ndjson"], logging.WARNING, "train.jsonl and train.ndjson are both read, as rows of"),
        (["train.jsonl", "test.jsonl"], None, ""),
        (["train.jsonl", "holdout.jsonl"], logging.WARNING, "holdout.jsonl is not read: its name says of no split"),
        (["train.jsonl", "dataset_info.json", ".old.jsonl"], None, ""),
    ],
)
def test_files_that_make_a_split_are_said(names, level, words, folder, caplog):
    for name in names:
        (folder / name).write_text(LINE)
    with caplog.at_level(logging.INFO, "trl_margins"):
        load_splits(str(folder))
    found = [(record.levelno, words in record.message) for record in caplog.records]
    assert found == ([] if level is None else [(level, True)])


def test_a_folder_of_images_beside_pairs(folder):
    """Is read as `datasets` reads it, and its images decoded where they are used."""
    Picture.new("RGB", (2, 1), (255, 0, 0)).save(folder / "a.png")
    write(folder, metadata__jsonl=json.dumps({"file_name": "a.png", **ROW}) + "\n")
    (row,) = rows_of(folder)
    assert row["image"]["path"].endswith("a.png")
    (row,) = rows_of(folder, decoded=["image"])
    assert row["image"].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["empty.txt", "code.py", "broken.tar"])
def test_a_folder_with_files_that_are_no_data(name, folder):
    (folder / name).write_text("x" * (name != "empty.txt"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"data has no file that is data \(.jsonl, .*: "):
        load_splits(str(folder))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_repeats_the_header(streaming, folder):
    write(folder, pairs__jsonl=LINE + json.dumps({**ROW, "chosen": "chosen", "rejected": "rejected"}) + "\n")
    rows = load_splits(str(folder / "pairs.jsonl"), streaming=streaming)["train"]
    with pytest.raises(ValueError, match="row 1 of the dev data set repeats the names of the columns, as a header"):
        open_rows(rows, "dev")


@pytest.mark.parametrize("data", ["pairs.jsonl", "data/pairs.jsonl"])
@pytest.mark.parametrize(
    "name", ["train_notes.txt", "train.py", "test.log", "train/notes.md", "out/training_args.bin"]
)
def test_what_is_no_data_does_not_take_the_place_of_data(name, data, folder):
    for each, content in ((data, LINE), (name, "x = 1\n"), (".git/a.json", "{}")):
        (folder / each).parent.mkdir(exist_ok=True)
        (folder / each).write_text(content)
    said = rf"would be made of {Path(name).name}, which is no data, and {data} would not be read: move out what is"
    with pytest.raises(ValueError, match=said):
        load_splits(str(folder))
    (folder / "README.md").write_text(configured(name))
    if name.endswith(".txt"):  # then it is what somebody wants
        assert load_splits(str(folder))["train"].column_names == ["text"]
    else:
        with pytest.raises(
            ValueError, match=rf"by the data_files of its README\.md, .*, and {data} would not be read"
        ):
            load_splits(str(folder))


def test_an_archive_beside_files_is_said_not_to_be_read(folder, caplog):
    """`datasets` would read some of them, and make their rows a part of the split."""
    (folder / "train.jsonl").write_text(LINE)
    for name in ("train-2.zip", "train-3.xlsx", "train.md"):
        (folder / name).write_text("x")
    assert len(load_splits(str(folder))["train"]) == 1
    assert "train-2.zip, train-3.xlsx is not read beside other data: unpack or convert it" in caplog.text


@pytest.mark.parametrize("name", ["train.zip", "train.tar"])
def test_what_datasets_reads_may_take_the_place_of_data(name, folder):
    (folder / "stats.json").write_text('{"n": 1}')
    if name == "train.zip":
        with zipfile.ZipFile(folder / name, "w") as packed:
            packed.writestr("train.jsonl", LINE)
    else:
        (folder / "0.json").write_text(LINE)
        with tarfile.open(folder / name, "w") as packed:
            packed.add(folder / "0.json", "0.json")
        (folder / "0.json").unlink()
    assert len(load_splits(str(folder))["train"]) == 1


def configured(files: str) -> str:
    return f"---\nconfigs:\n- config_name: a\n  data_files: {files}\n---\n"


@pytest.mark.parametrize(
    ("files", "gone"),
    [
        ("old-*.jsonl", r"old-\*\.jsonl"),
        ("old.jsonl", r"old\.jsonl"),
        ("[{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]", r"test\.jsonl"),
        ("[]", "an empty list"),
        ("", "an empty list"),
    ],
)
def test_a_readme_whose_files_are_gone(files, gone, folder):
    (folder / "README.md").write_text(configured(files))
    (folder / "train.jsonl").write_text(LINE)
    with pytest.raises(ValueError, match=rf"no file matches the data_files of its README\.md, {gone}: correct them"):
        load_splits(str(folder))


def test_a_part_of_what_a_readme_names(folder, caplog):
    """A part of a data set may have been copied, for which `datasets` has patterns."""
    (folder / "README.md").write_text(
        configured("[{split: train, path: train.jsonl}, {split: test, path: test-*.jsonl}]")
    )
    (folder / "train.jsonl").write_text(LINE)
    assert list(load_splits(str(folder))) == ["train"]
    assert "of the data_files of its README.md, no file matches test-*.jsonl" in caplog.text


def test_settings_of_a_readme_for_its_tables(folder, caplog):
    row = "prompt;chosen;rejected\nhi;yes, of course;no\n"
    (folder / "train.csv").write_text(row)
    (folder / "README.md").write_text(configured('train.csv\n  sep: ";"'))
    assert load_splits(str(folder))["train"].to_list() == [
        {"prompt": "hi", "chosen": "yes, of course", "rejected": "no"}
    ]
    assert "its README.md sets sep for its tables, which are checked without that" in caplog.text
    (folder / "train.csv").write_text(f"My table\n{row}")
    (folder / "README.md").write_text(configured('train.csv\n  sep: ";"\n  skiprows: 1'))
    with pytest.raises(ValueError, match="line 3: 2 fields, but the header has 1"):
        load_splits(str(folder))
    assert "its README.md sets sep, skiprows for its tables" in caplog.text


def test_a_readme_whose_folder_is_gone(folder):
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_dir: old\n---\n")
    (folder / "train.jsonl").write_text(LINE)
    with pytest.raises(FileNotFoundError, match=r"data_dir of its README\.md, 'old', is no folder: correct it"):
        load_splits(str(folder))
    (folder / "old").mkdir()
    with pytest.raises(FileNotFoundError, match="'old', doesn't contain any data files"):
        load_splits(str(folder))


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_without_rows_that_spark_writes(streaming, folder):
    for name, content in {"part-00000.json": LINE, "part-00001.json": "", "_SUCCESS": ""}.items():
        (folder / name).write_text(content)
    assert len(list(load_splits(str(folder), streaming=streaming)["train"])) == 1
    (folder / "part-00000.json").write_text("")
    with pytest.raises(ValueError, match=r"part-00000\.json is empty"):
        load_splits(str(folder), streaming=streaming)


@pytest.mark.parametrize("kind", ["pandas", "arrow", "numpy", "torch"])
def test_a_set_saved_in_a_format_is_read_as_any_other(kind, folder):
    rows = Dataset.from_list([json.loads(LINE)] * 2)
    rows.with_format(kind, columns=["score_chosen"]).save_to_disk(str(folder / "set"))
    assert load_splits(str(folder / "set"))["train"][:] == rows[:]


def test_types_of_a_table_are_those_of_all_its_rows(folder):
    lines = [f"p{i},a,b,{i % 5},{i}" for i in range(12_000)]
    lines[-1] = "p,a,b,9.75,x7"
    (folder / "a.csv").write_text("prompt,chosen,rejected,score,id\n" + "\n".join(lines) + "\n")
    rows = load_splits(str(folder / "a.csv"))["train"]
    assert (rows[3]["score"], rows[-1]["score"]) == (3.0, 9.75)
    assert (rows[3]["id"], rows[-1]["id"]) == ("3", "x7")


LATE = [("Be brief", "Be brief"), ("007", "007"), ("True", True), ("3", 3.0), ("2.5", 2.5)]


@pytest.mark.parametrize(("cell", "value"), LATE)
def test_a_column_of_a_table_that_begins_late(cell, value, folder):
    lines = [f"p{i},a,b," for i in range(10_002)]
    (folder / "a.csv").write_text("prompt,chosen,rejected,x\n" + "\n".join(lines) + cell + "\n")
    for name in (folder, folder / "a.csv"):
        assert load_splits(str(name))["train"]["x"][-2:] == [None, value]


@pytest.mark.parametrize(("cell", "value"), LATE)
def test_a_column_that_is_empty_in_one_table(cell, value, folder):
    for name, last in {"a": "", "b": cell, "c": ""}.items():
        (folder / f"{name}.csv").write_text(f"prompt,chosen,rejected,x\np,a,b,\np,a,b,{last}\n")
    assert load_splits(str(folder))["train"]["x"][:] == [None, None, None, value, None, None]


@pytest.mark.parametrize(
    "header", ["prompt;chosen;rejected;rating (1=bad, 2=ok, 3=good, 4=great)", "prompt,chosen,rejected,a|b|c|d"]
)
def test_a_column_whose_name_has_another_delimiter(header, folder):
    mark = header[6]
    (folder / "a.csv").write_text(f"{header}\n{mark.join('pab1')}\n")
    assert load_splits(str(folder))["train"].column_names == header.split(mark)


def test_a_delimiter_within_quotes(folder):
    (folder / "a.csv").write_text('"prompt, all";"chosen, a";"rejected, b"\n"p, q";"a, b";"c, d"\n')
    found = load_splits(str(folder / "a.csv"))["train"].to_list()
    assert found == [{"prompt, all": "p, q", "chosen, a": "a, b", "rejected, b": "c, d"}]


def test_tables_with_several_delimiters(folder):
    """Together they are an error that names them; alone each is read, whatever stands within its name."""
    (folder / "a.tsv.csv").write_text("prompt,chosen,rejected\np,a,b\n")
    for name, mark in {"b.csv": ";", "b.tsv": "\t"}.items():
        (folder / name).write_text("prompt,chosen,rejected\np,a,b\n".replace(",", mark))
        for each in ("a.tsv.csv", name):
            found = load_splits(str(folder / each))["train"].to_list()
            assert found == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
        said = f"a.tsv.csv has ',' between its columns, and {name} has {mark!r}: give all files"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
            load_splits(str(folder))
        (folder / name).unlink()


def test_a_table_without_a_header_whose_first_answer_is_long(folder):
    (folder / "a.csv").write_text(f"p,{'a ' * 70_000},b\np,a,b\n")
    assert len(load_splits(str(folder / "a.csv"))["train"].column_names) == 3


def test_columns_that_are_empty_or_not_there_in_one_file(folder):
    """Beside another that has to be cast; and rows of which nothing is left stay rows."""
    (folder / "a.jsonl").write_text('{"s": 1}\n')
    (folder / "b.jsonl").write_text('{"s": 1.5, "note": null}\n')
    (folder / "c.jsonl").write_text('{"s": null}\n' * 3)
    found = load_splits(str(folder))["train"].to_list()
    assert found == [{"s": s, "note": None} for s in (1.0, 1.5, None, None, None)]


def test_a_type_is_said_of_a_file_that_has_it(folder):
    for name, cell in {"a": "", "b": "x", "c": "True"}.items():
        (folder / f"{name}.csv").write_text(f"prompt,x\np,{cell}\n")
    with pytest.raises(ValueError, match=r"column 'x' is large_string in b\.csv and bool in c\.csv"):
        load_splits(str(folder))


def test_an_integer_that_no_fraction_is_names_its_column(folder):
    for name, (big, note) in {"a": (2**53 + 1, "x"), "b": (1.5, "")}.items():
        (folder / f"{name}.csv").write_text(f"prompt,x,note\np,{big},{note}\n")
    with pytest.raises(
        ValueError, match=r"data: column 'x' of a\.csv, Integer value 9007199254740993 [^:]*: -[^:]*: give"
    ):
        load_splits(str(folder))


def test_a_code_behind_a_long_completion(folder):
    (folder / "a.csv").write_text(f"prompt,chosen,id\np,a,1\np,{'x' * 140_000},2\np,a,007\n")
    assert load_splits(str(folder))["train"]["id"][:] == ["1", "2", "007"]


@pytest.mark.parametrize("streaming", [False, True])
def test_errors_in_a_folder_that_is_named_from_where_one_is(streaming, folder, monkeypatch):
    (folder / "a.jsonl").write_text('{"prompt": "a", "x": 1}\n')
    (folder / "b.jsonl").write_text('{"prompt": "a", "y": 1}\n')
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match=rf"^{folder.name}: a\.jsonl and b\.jsonl have different columns"):
        load_splits(folder.name, streaming=streaming)


def test_prompts_of_a_table_are_text_by_any_usual_name(folder):
    (folder / "a.csv").write_text("query,Prompt,system,chosen,rejected\n5,x,0,a,b\nTrue,,NaN,c,d\n")
    rows = load_splits(str(folder / "a.csv"))["train"]
    assert (rows["query"][:], rows["Prompt"][:], rows["system"][:]) == (["5", "True"], ["x", None], ["0", None])


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_without_rows_beside_others(streaming, folder, caplog):
    (folder / "a.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    (folder / "b.csv").write_text("prompt,chosen,rejected\n")
    assert len(list(load_splits(str(folder), streaming=streaming)["train"])) == 1
    assert "is not read" not in caplog.text
    (folder / "c.csv").write_text("q,x,y\n")  # a row, which lacks its header
    with pytest.raises(ValueError, match=r"c\.csv"):
        load_splits(str(folder), streaming=streaming)
    (folder / "c.csv").unlink()
    (folder / "a.csv").unlink()
    if not streaming:
        with pytest.raises(ValueError, match=r"b\.csv has no rows"):
            load_splits(str(folder))


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_parts_without_rows(streaming, folder):
    rows = Dataset.from_list([json.loads(LINE)] * 2)
    for number, (start, end) in enumerate([(0, 0), (0, 2), (2, 2)]):
        table = rows.with_format("arrow")[start:end]
        with pq.ParquetWriter(folder / f"part-{number}.parquet", table.schema) as part:
            if number:  # the first part has no row group, the last one has one without rows
                part.write_table(table)
    assert len(list(load_splits(str(folder), streaming=streaming)["train"])) == 2
    (folder / "part-1.parquet").unlink()
    with pytest.raises(ValueError, match=r"part-0\.parquet is empty"):
        load_splits(str(folder), streaming=streaming)


def test_a_folder_without_files(folder):
    with pytest.raises(FileNotFoundError, match="data doesn't contain any data files"):
        load_splits(str(folder))


# Files of one folder that differ

OTHER = json.dumps({"question": "x", "prompt": "y"}) + "\n"


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"a__jsonl": LINE, "b__jsonl": OTHER}, "a.jsonl and b.jsonl .*a.jsonl has 'chosen', .* only b.* 'question'"),
        ({"train__jsonl": LINE, "test__jsonl": OTHER}, "train.jsonl and test.jsonl have different columns"),
        ({"a__jsonl": LINE, "b__jsonl": '{"prompt": "x"}\n'}, "columns .only a.jsonl has 'chosen', 'rejected'"),
        ({"a__json": f"[{LINE}]", "b__json": f"[{OTHER}]"}, "a.json and b.json have different columns"),
        ({"a__csv": HEAD + "a,b,c\n", "b__csv": "prompt,chosen\na,b\n"}, "a.csv and b.csv .*a.csv has 'rejected'"),
        ({"a__jsonl": LINE, "b__jsonl": LINE.replace("2.0", '"x"')},
         "'score_chosen' is double in a.jsonl and string in b.jsonl: give it one type"),
        ({"a__jsonl": LINE, "b__jsonl": LINE.replace('"c"', '[{"role": "user", "content": "c"}]')},
         "'rejected' is string in a.jsonl and list<.* in b.jsonl"),
        ({"a__csv": HEAD + "a,b,c\n", "b__csv": HEAD + "a,b\n"}, "b.csv, line 2: 2 fields"),
        ({"a__csv": HEAD + "a,b,c\n", "b__csv": "prompt;chosen;rejected\na;b;c\n"}, "and b.csv has .;.: give all"),
        ({"a__jsonl": LINE, "b__jsonl": ""}, "b.jsonl is empty"),
        ({"train__csv": HEAD + "q,x,y\n", "test__csv": HEAD}, "test.csv has no rows"),
        ({"a__jsonl": LINE, "b__jsonl": "{\n"}, "b.jsonl, line 1: not JSON"),
    ],
)  # fmt: skip
def test_files_that_differ_are_named(files, error, folder):
    with pytest.raises(ValueError, match=error):
        load_splits(str(write(folder, **files)))


def test_parquet_and_arrow_files_that_differ_are_named(folder):
    for name, row in (("a", ROW), ("b", {"prompt": "x"})):
        Dataset.from_list([row]).to_parquet(folder / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"a.parquet and b.parquet have different columns"):
        load_splits(str(folder))
    for name, row in (("a", ROW), ("b", {"prompt": "x"})):
        (folder / f"{name}.parquet").unlink()
        Dataset.from_list([row]).save_to_disk(folder / name)
        shutil.move(folder / name / "data-00000-of-00001.arrow", folder / f"{name}.arrow")
        shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=r"a.arrow and b.arrow have different columns"):
        load_splits(str(folder))


@pytest.mark.parametrize(
    ("first", "second", "scores"),
    [("2", "2.5", [2.0, 2.5]), ("2.5", "2", [2.5, 2.0]), ("null", "2.5", [None, 2.5]), ("2.5", "null", [2.5, None])],
)
def test_files_whose_difference_does_no_harm(first, second, scores, folder):
    write(folder, a__jsonl=LINE.replace("2.0", first), b__jsonl=LINE.replace("2.0", second))
    loaded = load_splits(str(folder))["train"]
    assert loaded["score_chosen"][:] == scores
    assert (
        loaded.remove_columns("score_chosen").to_list() == [{k: v for k, v in ROW.items() if k != "score_chosen"}] * 2
    )


def test_a_key_that_few_rows_have(folder):
    """In the one file at its end, in the other at its beginning."""
    rare = json.dumps({**ROW, "system": "s"}) + "\n"
    write(folder, a__jsonl=LINE * 3 + rare, b__jsonl=rare + LINE)
    assert [row["system"] for row in rows_of(folder)] == [None, None, None, "s", "s", None]
    write(folder, b__jsonl=LINE.replace("2.0", "2"))
    assert [row["system"] for row in rows_of(folder)] == [None, None, None, "s", None]
    write(folder, a__jsonl=LINE.replace("2.0", "2"), b__jsonl=rare + LINE)  # of two types, too
    assert [row["system"] for row in rows_of(folder)] == [None, "s", None]


# Images, audio and video


def pictures() -> Dataset:
    """Pairs beside images that cannot be had: as a value, in a list and in a dict."""
    far = "https://example.com/image.png"
    columns = {"picture": far, "pictures": [far, far], "deep": {"seen": far}}
    rows = Dataset.from_list([{**row, **columns} for row in preference_rows(4).to_list()])
    kinds = {"picture": Image(), "pictures": List(Image()), "deep": {"seen": Image()}}
    return rows.cast(Features({**rows.features, **kinds}))


def test_the_network_is_asked_where_an_image_is_decoded():
    """So the tests below could fail."""
    with pytest.raises((AssertionError, FileNotFoundError)):
        pictures()[0]


def test_nobody_decodes_what_nobody_uses(folder):
    rows = without_decoding(pictures())
    for changed in (rows, rows.select([0]), rows.add_column("n", range(4)), rows.map(lambda row: {"n": 1})):
        assert changed[0]["picture"] == {"bytes": None, "path": "https://example.com/image.png"}
        assert changed[0]["pictures"][1]["path"] == changed[0]["deep"]["seen"]["path"] == changed[0]["picture"]["path"]
    assert len(list(concatenate_datasets([rows, rows]))) == 8
    stream = without_decoding(pictures().to_iterable_dataset())
    assert [row["picture"]["path"] for row in stream] == ["https://example.com/image.png"] * 4


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_a_loaded_set_decodes_nothing(streaming, folder):
    pq.write_table(pictures().data.table, folder / "pairs.parquet")  # `to_parquet` would fetch the images
    rows = load_splits(str(folder / "pairs.parquet"), streaming=streaming)["train"]
    assert rows.features["pictures"] == List(Image(decode=False))
    assert [row["picture"]["bytes"] for row in rows] == [None] * 4
    kept = load_splits(str(folder / "pairs.parquet"), streaming=streaming, decoded=["picture"])["train"]
    with pytest.raises((AssertionError, FileNotFoundError)):
        next(iter(kept))


def test_what_is_used_is_decoded():
    picture = Picture.new("RGB", (2, 1), (255, 0, 0))
    rows = Dataset.from_dict({"images": [[picture]], "image": [picture], "n": [1]}).cast_column(
        "images", List(Image())
    )
    kept = without_decoding(rows, keep=["images"])
    assert kept[0]["images"][0].getpixel((1, 0)) == (255, 0, 0)
    assert set(kept[0]["image"]) == {"bytes", "path"}
    assert without_decoding(rows.select_columns("n"))[0] == {"n": 1}
    with_map = rows.map(lambda row: {"n": 2}), without_decoding(rows).map(lambda row: {"n": 2})
    assert isinstance(with_map[0][0]["image"], Picture.Image)  # and not from the cache of the other
    assert isinstance(with_map[1][0]["image"], dict)


def test_other_columns_are_what_they_were():
    features = Features({"label": ClassLabel(names=["a", "b"]), "sound": Audio(), "text": Value("string")})
    sounds = [{"bytes": b"x", "path": "x.wav"}]
    table = pa.table({"label": [1], "sound": sounds, "text": ["t"]})
    rows = Dataset(table, DatasetInfo(features=features))
    stored = without_decoding(rows)
    assert stored[0] == {"label": 1, "sound": sounds[0], "text": "t"}
    assert stored.features == {**features, "sound": Audio(decode=False)}
    assert rows.features == features
    mixed = Dataset.from_list([{"x": 1}, {"x": "a"}], on_mixed_types="use_json")
    assert list(without_decoding(mixed)) == list(mixed)


def test_images_that_a_model_sees_are_decoded():
    """In the columns that TRL gives to it."""
    picture = Picture.new("RGB", (2, 1), (255, 0, 0))
    rows = Dataset.from_dict({"images": [[picture]], "image": [picture], "other": [picture]})
    taken = as_taken(rows, "train", GapPOConfig(**quiet()))[0]
    assert taken["images"][0].size == taken["image"].size == (2, 1)
    assert set(taken["other"]) == {"bytes", "path"}


def test_scoring_leaves_images_as_they_were(folder):
    picture = Picture.new("RGB", (2, 1), (255, 0, 0))
    rows = Dataset.from_dict({**preference_rows(2).to_dict(), "images": [[picture]] * 2})
    rows.to_parquet(folder / "pairs.parquet")
    command = ["score", "--dataset_name", str(folder / "pairs.parquet"), "--metric", "jaccard"]
    assert main([*command, "--output", str(folder / "scored.parquet")]) == 0
    assert load_splits(str(folder / "scored.parquet"), decoded=None)["train"].features["images"] == List(Image())


def test_training_beside_images_that_cannot_be_had(tiny_model, tokenizer, tmp_path):
    trainer = MarginCPOTrainer(
        load(tiny_model),
        args=GapPOConfig(**quiet(output_dir=str(tmp_path), max_steps=1)),
        train_dataset=pictures(),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 1


# Transforms and formats


def louder(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, "chosen": [text.upper() for text in batch["chosen"]]}


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (lambda batch: None, "a NoneType, of 3 rows"),
        (lambda batch: [batch], "a list, of 3 rows"),
        (lambda batch: {**batch, "margin": 1.0}, "a float for the column 'margin', of 3 rows"),
        (lambda batch: {**batch, "margin": "abc"}, "a str for the column 'margin', of 3 rows"),
        (lambda batch: {**batch, "margin": [1, 2]}, "2 values for the column 'margin', of 3 rows"),
        (lambda batch: {name: values * 2 for name, values in batch.items()}, "6 values for the column 'prompt'"),
        (lambda batch: {name: [] for name in batch}, "0 values for the column 'prompt', of 3 rows"),
    ],
)
def test_a_transform_that_gives_something_else(transform, said):
    rows = Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3)
    with pytest.raises(ValueError, match=f"the transform of the data set .* gives {said}"):
        transformed(rows.with_transform(transform))


def test_a_transform_is_applied():
    rows = preference_rows(3)
    given = rows.with_transform(louder)
    plain = as_plain(given)
    assert plain.to_list() == list(given) == [{**row, "chosen": row["chosen"].upper()} for row in rows]
    assert plain.format["type"] is None
    assert as_plain(rows.with_transform(lambda batch: batch)).to_list() == rows.to_list()


@pytest.mark.parametrize("output_all_columns", [False, True])
def test_a_transform_may_make_other_columns(output_all_columns):
    rows = Dataset.from_dict({"question": ["q", "r"], "answers": [["a", "b"], ["c", "d"]], "n": [1, 2]})

    def pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        chosen, rejected = zip(*batch["answers"], strict=True)
        return {"prompt": batch["question"], "chosen": list(chosen), "rejected": list(rejected)}

    given = rows.with_transform(pairs, ["question", "answers"], output_all_columns)
    assert as_plain(given).to_list() == list(given)
    others = {"n"} if output_all_columns else set()
    assert set(as_plain(given).column_names) == {"prompt", "chosen", "rejected"} | others


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_a_format_is_only_how_values_look(kind):
    rows = preference_rows(3)
    assert as_plain(rows.with_format(kind, columns=["score_chosen"])).to_list() == rows.to_list()
    assert transformed(rows.with_format("numpy")).format["type"] == "numpy"
    assert list(as_plain(rows.to_iterable_dataset().with_format("numpy"))) == rows.to_list()


def test_what_the_transform_gives_is_trained_on(tiny_model, tokenizer, tmp_path):
    def prepared(rows: Dataset) -> Dataset:
        trainer = MarginCPOTrainer(
            load(tiny_model),
            args=GapPOConfig(**quiet(output_dir=str(tmp_path))),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        return trainer.train_dataset.remove_columns(trainer._mark)  # which is called after the data set

    rows = preference_rows(4)
    mapped, transformed_ = prepared(rows.map(louder, batched=True)), prepared(rows.with_transform(louder))
    assert transformed_.to_list() == mapped.to_list()
    assert transformed_.to_list() != prepared(rows).to_list()


def test_tools_for_data_see_what_the_transform_gives():
    rows = preference_rows(6)
    given, mapped = rows.with_transform(louder), rows.map(louder, batched=True)
    assert flip_labels(given, 0.5).to_list() == flip_labels(mapped, 0.5).to_list()
    scored = add_evaluation_factor(given, "jaccard")
    assert scored["chosen"][0].isupper()
    assert scored.to_list() == add_evaluation_factor(mapped, "jaccard").to_list()


# Broken files, and files that only look so


def test_cells_of_a_table_are_the_text_that_they_are(folder):
    table = "prompt,chosen,rejected,score_chosen,n\\na,None,NA,,x\\nb,007,1e5,NaN,NA\\nc,True,2024-01-01,2.5,\\n"
    write(folder, pairs__csv=table.replace("\\n", "\n"))
    rows = load_splits(str(folder / "pairs.csv"))["train"]
    assert rows["chosen"][:] == ["None", "007", "True"]
    assert rows["rejected"][:] == ["NA", "1e5", "2024-01-01"]
    assert rows["score_chosen"][:] == [None, None, 2.5]
    assert rows["n"][:] == ["x", None, None]
    write(folder, pairs__csv=HEAD + 'a,,c\n,b,c\n"",b,c\n')
    first, *others = rows_of(folder / "pairs.csv")
    assert first == {"prompt": "a", "chosen": None, "rejected": "c"}
    assert others == [{"prompt": "", "chosen": "b", "rejected": "c"}] * 2  # as they are written where there is none


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("semicolons.csv", "prompt;chosen;rejected\na;b, b;c\n", ("a", "b, b", "c")),
        ("tabs.csv", "prompt\tchosen\trejected\na\tb, b\tc\n", ("a", "b, b", "c")),
        ("comma.csv", '"n, 1";prompt;chosen;rejected\n1;a;b;c\n', ("a", "b", "c")),
        ("bars.csv", "prompt|chosen|rejected\na|b, b|c\n", ("a", "b, b", "c")),
        ("tabs.tsv", 'prompt\tchosen\trejected\na\t"b\nb"\tc\n', ("a", "b\nb", "c")),
        ("lines.csv", HEAD + '"a\r\na",b,c\r\n', ("a\r\na", "b", "c")),
        ("mark.csv", b"\xef\xbb\xbf" + (HEAD + "a,b,c\n").encode(), ("a", "b", "c")),
        ("blank.csv", HEAD + "\na,b,c\n\n", ("a", "b", "c")),
        ("long.csv", HEAD + f"a,{'b' * 200_000},c\n", ("a", "b" * 200_000, "c")),
        ("pretty.json", json.dumps(ROW, indent=1), ("a", "b", "c")),
        ("mark.json", b"\xef\xbb\xbf" + json.dumps([ROW]).encode(), ("a", "b", "c")),
        ("crlf.jsonl", LINE.replace("\n", "\r\n"), ("a", "b", "c")),
        ("long.jsonl", LINE.replace('"b"', f'"{"b" * 12_000_000}"'), ("a", "b" * 12_000_000, "c")),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_a_file_that_only_looks_broken(name, content, row, folder):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (found,) = rows_of(folder / name)
    assert tuple(found[column] for column in ("prompt", "chosen", "rejected")) == row


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("twice.csv", HEAD + "a,b,c\n" + HEAD, "twice.csv, line 3: the row repeats the header: remove it"),
        ("shifted.csv", HEAD + "x,a,b,c\ny,a,b,c\n", "shifted.csv, line 2: 4 fields, but the header has 3 columns"),
        ("ending.csv", HEAD + "a,b,c,\n", "ending.csv, line 2: 4 fields"),
        ("short.csv", HEAD + "a,b,c\n" * 3 + "a,b\n", "short.csv, line 5: 2 fields"),
        ("shifted.tsv", "prompt\tchosen\na\tb\tc\n", r"shifted.tsv, line 2: 3 fields.* that has '\\t'"),
        ("backslash.csv", HEAD + 'a,b,c\na,"b \\"b\\" b",c\n', "in the row after line 2: .*double quotes as two"),
        ("wide.csv", (HEAD + "a,b,c\n").encode("utf-16"), "wide.csv is written in UTF-16 or UTF-32: write"),
        ("latin.csv", (HEAD + "a,é,c\n" * 9).encode("latin-1"), "latin.csv, after line .*write the file in UTF-8"),
        ("cut.jsonl.xz", lzma.compress(LINE.encode() * 9)[:-30], "cut.jsonl.xz, after line 9: .*to its end"),
        ("inside.json", json.dumps({"n": 1, "data": [ROW, ROW]}), "inside.json is one object with its rows under"),
        ("split.json", pd.DataFrame([ROW]).to_json(orient="split"), "split.json is one object with its rows under"),
        ("index.json", pd.DataFrame([ROW]).to_json(orient="index"), "index.json is one object of rows, each under"),
        ("inside.jsonl", json.dumps({"train": [ROW, ROW]}), "inside.jsonl is one object with its rows under 'train'"),
        ("rows.json", json.dumps({"rows": [{"row": ROW}] * 2}), "under 'rows', and in each of them under 'row'"),
        ("title.csv", "Pairs of chosen and rejected\n" + HEAD + "a,b,c\n", "or remove 'Pairs of chosen and rejected'"),
        ("commas.tsv", "prompt,chosen,rejected\na,b,c\n", "is one column: between columns, write a tab, or rename"),
        ("carets.csv", "prompt^chosen^rejected\na^b^c\n", "is one column: between columns, write a comma, a semicolo"),
        ("pandas.json", json.dumps({k: {"0": v, "1": v} for k, v in ROW.items()}), "is one object of columns"),
        ("pointer.csv", POINTER, "pointer.csv is only Git LFS's pointer to a file"),
        ("pointer.parquet", POINTER, "pointer.parquet is only Git LFS's pointer to a file"),
        ("again.jsonl", json.dumps(LINE) + "\n", "again.jsonl, line 1: JSON that was made JSON again, .*: write"),
        ("again.json", json.dumps([LINE]), "again.json: JSON that was made JSON again"),
        ("whole.json", json.dumps(f"[{LINE}]"), "whole.json: JSON that was made JSON again"),
        ("curly.jsonl", LINE.replace('"', "“"), "curly.jsonl, line 1: not JSON .*; its quotes are curly"),
        ("comma.jsonl", LINE.replace("}", "},"), "comma.jsonl, line 1: not JSON .Extra data"),
        ("python.jsonl", LINE + str(ROW) + "\n", "python.jsonl, line 2: not JSON"),
        ("no.arrow", LINE, "no.arrow is text by its content: give its name the ending of what it is"),
        ("twice.jsonl.gz", gzip.compress(gzip.compress(LINE.encode())), "twice.jsonl.gz was compressed twice"),
        ("both.csv.gz", gzip.compress(lzma.compress(HEAD.encode())), "both.csv.gz was compressed twice"),
        ("whole.parquet.gz", gzip.compress(PARQUET), "whole.parquet.gz: parquet is not read where .*: decompress it"),
        ("other.jsonl", PARQUET, "other.jsonl is Parquet by its content: call it other.parquet"),
        ("other.csv.gz", gzip.compress(PARQUET), "by its content: decompress it, and call it other.parquet"),
        ("other.parquet", ARROW, "other.parquet is Arrow by its content: call it other.arrow"),
        ("cut.arrow", ARROW[:-60], "cut.arrow cannot be read: .*not written to its end: write it anew"),
        ("cut.parquet", PARQUET[:-60], "cut.parquet cannot be read: .*not written to its end: write it anew"),
        ("other.csv", LINE, "other.csv is JSON by its content: call it other.jsonl"),
        ("page.csv", "\n<!DOCTYPE html>\n<html></html>\n", "page.csv is a web page"),
        ("little.jsonl", LINE.encode("utf-16-le"), "little.jsonl is written in UTF-16 or UTF-32: write it in UTF-8"),
        ("big.csv", (HEAD + "a,b,c\n").encode("utf-16-be"), "big.csv is written in UTF-16 or UTF-32"),
        ("marks.jsonl", LINE + "\x1e" + LINE, "marks.jsonl, line 2: a record separator .RFC 7464. before the row"),
        ("marks.json", "\x1e" + LINE, "marks.json, line 1: a record separator .RFC 7464. before the row: remove it"),
        ("pairs.zip", LINE, "pairs.zip: a data file is one of"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and len(value) < 16 else "",
)  # fmt: skip
def test_a_broken_file_is_named(name, content, error, folder):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=error):
        load_splits(str(folder / name))


def test_columns_by_the_names_of_agents_traces(folder):
    row = {**ROW, "id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": [{"role": "r"}]}
    write(folder, pairs__jsonl=json.dumps(row) + "\n")
    assert rows_of(folder / "pairs.jsonl") == [row]


def test_nested_types_of_parquet(folder):
    rows = preference_rows(3, "conversational")
    rows.to_parquet(folder / "pairs.parquet")
    assert rows_of(folder / "pairs.parquet") == rows.to_list()
    DatasetDict({"a": rows, "b": rows}).save_to_disk(folder / "saved")
    assert list(load_splits(str(folder / "saved"))) == ["a", "b"]


# Files that readers take for something else, or end the process over


def test_a_saved_set_whose_split_has_no_rows(folder):
    rows = Dataset.from_list([ROW])
    DatasetDict({"train": rows, "test": rows.select([])}).save_to_disk(folder / "both")
    rows.select([]).save_to_disk(folder / "none")
    found = load_splits(str(folder / "both"))
    assert {name: len(split) for name, split in found.items()} == {"train": 1, "test": 0}
    assert found["test"].features == found["train"].features == load_splits(str(folder / "none"))["train"].features


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize(
    ("names", "more", "error"),
    [
        (["prompt", "chosen", "chosen"], pa.array(["x"]), " has the column 'chosen' more than once: rename one"),
        (
            ["prompt", "chosen", "meta"],
            pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            ": column 'meta' is of the type map<string, int64.*>, which is not read: leave it out",
        ),
    ],
    ids=["twice", "map"],
)
def test_columns_that_are_not_read(kind, names, more, error, folder):
    table = pa.table([["a"], ["b"], more], names=names)
    file = folder / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        opened = pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file
        with opened(file, table.schema) as out:
            out.write_table(table)
    with pytest.raises(ValueError, match=f"x.{kind}{error}"):
        load_splits(str(file))


@pytest.mark.parametrize("scores", [{}, {"score_chosen": [2, 3], "score_rejected": [1, 1]}], ids=["texts", "scored"])
def test_an_object_of_columns(scores, folder):
    columns = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"], **scores}
    chats = {name: [[{"role": "user", "content": text}] for text in columns[name]] for name in ("prompt", "chosen")}
    for made in (columns, {**columns, **chats}):
        (folder / "x.json").write_text(json.dumps(made))
        with pytest.raises(ValueError, match=r"x.json is one object of columns, .*: write only the rows"):
            load_splits(str(folder / "x.json"))


def test_one_row_of_messages_is_no_object_of_columns(folder):
    said = {name: [{"role": "user", "content": "a"}] for name in ("prompt", "chosen", "rejected")}
    (folder / "x.json").write_text(json.dumps(said))
    assert rows_of(folder / "x.json") == [said]


DEEP = '{"prompt": "a \\\\", "more": ' + "[" * 200_000 + "]" * 200_000 + "}\n"


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("x.jsonl", LINE * 9 + DEEP, "x.jsonl, line 10: lists or objects lie more than 1,000 deep"),
        ("x.json", f"[{LINE},\n{DEEP}]", "x.json, line 3: lists or objects lie more than 1,000 deep"),
        ("x.jsonl.gz", gzip.compress((LINE + DEEP).encode()), "x.jsonl.gz, line 2: lists or objects lie more than"),
        ("x.jsonl", "null", "x.jsonl begins with null, which is not a row: remove it"),
        ("x.json.gz", gzip.compress(b"\xef\xbb\xbf\n null\n" + LINE.encode()), "x.json.gz begins with null"),
        ("x.jsonl", '{"a": 1}\n{"a" 1}\n', "x.jsonl, line 2: not JSON"),
        ("x.csv", "\n \n", "x.csv has no columns: its first line is their names"),
        ("x.csv", "a\0b,c\n1,2\n", r"x.csv: the column 'a\\x00b' has a NUL in its name"),
        ("x.csv", "sep=;\nprompt;chosen\na;b\n", "x.csv, line 1: Excel's line 'sep=', which is no header: remove it"),
        ("x.csv", "SEP=;,,\nprompt,chosen,rejected\na,b,c\n", "x.csv, line 1: Excel's line 'sep='"),
        ("x.csv", "My data\nprompt,chosen,rejected\na,b,c\n", "x.csv, line 2: 3 .*, or remove 'My data' above it if"),
        ("x.csv", "My data,,\nprompt,chosen,rejected\na,b,c\n", "the column '' more than once: give each a name, del"),
        ("x.json", "12", "x.json: not a list of rows, nor one row per line"),
    ],
    ids=[
        "deep",
        "deep document",
        "deep, packed",
        "null",
        "null, packed",
        "a broken line",
        "blanks",
        "NUL",
        "Excel's delimiter",
        "Excel's delimiter, padded",
        "a title alone",
        "a title",
        "a number",
    ],
)
def test_what_ends_a_reader(name, content, error, streaming, folder):
    """Arrow's ends the process over the first ones."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=error):
        load_splits(str(folder / name), streaming=streaming)


def test_brackets_in_texts_are_not_deep(folder):
    odd = {**ROW, "chosen": '"[{\\' * 2000, "rejected": "[" * 1_050_000}
    write(folder, x__jsonl=json.dumps(odd) + "\n" + LINE)
    assert rows_of(folder / "x.jsonl") == [odd, ROW]


def test_a_null_that_a_list_begins_with(folder):
    """Arrow's reader loses it, and pandas', which `datasets` tries then, takes no 2 beside a 2.5."""
    rows = [{"prompt": "a", "scores": [None, 1], "more": score} for score in (2, 2.5)]
    write(folder, x__jsonl="".join(json.dumps(row) + "\n" for row in rows), y__json=json.dumps(rows))
    assert rows_of(folder / "x.jsonl") == rows_of(folder / "y.json") == rows


def test_lines_before_the_header(folder):
    write(folder, x__csv="\n\nprompt;chosen;rejected\na;b;c\n")
    assert rows_of(folder / "x.csv") == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


SPELLING = [
    '"x"',
    "42",
    "1e3",
    "true",
    "null",
    "NaN",
    "[1, 2]",
    '{"a": 1}',
    '[{"type": "text", "text": "t"}]',
    "01",
    "a\\nb",
]


@pytest.mark.parametrize(
    ("text", "ending"), [*((text, "jsonl") for text in [*SPELLING, "plain", ""]), ('"x"', "json"), ('"x"', "jsonl.gz")]
)
def test_texts_in_columns_of_several_types_stay_as_they_are(text, ending, folder):
    """A column that holds text in some rows and messages in others, or a content that is text or a list of parts."""
    parts = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    chat = {"prompt": parts, "chosen": [{"role": "assistant", "content": text}], "rejected": [parts[0]]}
    plain = {"prompt": text, "chosen": text, "rejected": "b"}
    of_parts = {**chat, "prompt": [{"role": "user", "content": text}]}
    for i, rows in enumerate(([chat, plain], [plain, chat], [of_parts, chat])):
        rows = [{"made": f"2024-01-0{n + 1}", **row, "n": n} for n, row in enumerate(rows)]
        whole = "\n".join(map(json.dumps, rows)) if "jsonl" in ending else json.dumps(rows)
        file = folder / f"{i}.{ending}"
        file.write_bytes(gzip.compress(whole.encode()) if ending.endswith("gz") else whole.encode())
        read = load_splits(str(file))["train"]
        assert read.column_names == list(rows[0])
        found = [without_none(row) for row in read]
        assert found == rows


def without_none(value):
    if isinstance(value, list):
        return [without_none(each) for each in value]
    if isinstance(value, dict):
        return {name: without_none(each) for name, each in value.items() if each is not None}
    return value


# Rows behind the first 10 MB, from which `datasets` takes the columns and their types

PADDED = 150_000  # bytes of each row
LATER = {
    "a number": {"chosen": 1.5},
    "a boolean": {"prompt": True},
    "an object": {"rejected": {"role": "assistant", "content": "z"}},
    "a list": {"chosen": ["x", "y"]},
    "a column": {"system": "s"},
    "dates": {"chosen": "2026-01-01"},
}
LATER_OF_MESSAGES = {
    "parts": {"chosen": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]},
    "tools": {"tools": [{"function": {"name": "f", "parameters": {"a": {"default": None}}}}]},
}
LATER |= LATER_OF_MESSAGES


def padded(later: str, all_later: bool) -> list[dict[str, Any]]:
    made: dict[str, Any] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    if later in LATER_OF_MESSAGES:
        made = {name: [{"role": "assistant", "content": f"{text} 1.50"}] for name, text in made.items()}
    rows = [{**made, "pad": "x" * PADDED} for _ in range(11 * 2**20 // PADDED + 2)]
    for row in rows[-3 if all_later else -1 :]:
        row.update(LATER[later])
    return rows


@pytest.mark.rehearsal
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("later", LATER)
def test_rows_behind_the_first_megabytes(later, suffix, folder):
    rows = padded(later, all_later=suffix == ".jsonl")
    text = "\n".join(map(json.dumps, rows)).encode()
    (folder / f"a{suffix}").write_bytes(text if suffix == ".jsonl" else gzip.compress(text, 1))
    found = rows_of(folder / f"a{suffix}")
    assert [without_none(row) for row in found] == [without_none(row) for row in rows]
    if later == "tools":
        assert found[-1]["tools"] == rows[-1]["tools"]


@pytest.mark.parametrize("later", ["a number", "a column", "parts"])
def test_a_stream_whose_later_rows_are_of_another_form(later, folder):
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, padded(later, all_later=False))))
    with pytest.raises(ValueError, match=r"a.jsonl: later files, or rows beyond the first 10 MB, have other columns"):
        load_splits(str(folder / "a.jsonl"), streaming=True)


def test_dates_are_the_texts_that_they_are(folder):
    """Where a column has nothing else, at any depth, in one file or in the second."""
    rows = [
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "2024-01-01"}], "system": "2026-07-26T10:00"},
        {"prompt": "r", "chosen": [{"role": "assistant", "content": "2024-01-02"}], "system": "2026-07-27T10:00"},
    ]
    for row, day in zip(rows, ("2024-07-26", "2024-07-27"), strict=True):
        row["chat_template_kwargs"] = {"date_string": day}
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert rows_of(folder / "a.jsonl") == rows
    with pytest.raises(ValueError, match=r"nothing but dates.*: load the data set instead of streaming it"):
        load_splits(str(write(folder, b__jsonl=LINE.replace('"b"', '"2024-01-01"')) / "b.jsonl"), streaming=True)
    (folder / "a.jsonl").write_text(LINE)
    assert [row["chosen"] for row in rows_of(folder)] == ["b", "2024-01-01"]
    (folder / "a.jsonl").write_text(LINE.replace("}", ', "made": "unknown"}'))
    (folder / "b.jsonl").write_text(LINE.replace("}", ', "made": "2024-01-01"}'))
    assert [row["made"] for row in rows_of(folder)] == ["unknown", "2024-01-01"]


def test_two_files_of_which_the_second_has_a_number_among_its_texts(folder):
    write(folder, a__jsonl=LINE * 2, b__jsonl=LINE + LINE.replace('"b"', "1.50"))
    assert [row["chosen"] for row in rows_of(folder)] == ["b", "b", "b", 1.5]


def test_tools_and_arguments_are_those_of_their_row(folder):
    """Without the keys of other rows; a null and a whole number stay."""
    tools = [{"name": "f", "parameters": {"x": {"default": None}}}, {"name": "g", "parameters": {"y": {"default": 2}}}]
    rows = [
        {
            "prompt": "q",
            "tools": [tool],
            "chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}],
        }
        for tool, arguments in zip(tools, ({"k": 1}, {"k": 1.5, "j": None}), strict=True)
    ]
    for text in ("\n".join(map(json.dumps, rows)), "".join(map(json.dumps, rows)), json.dumps(rows)):
        (folder / "a.json").write_text(text)
        assert json.dumps(rows_of(folder / "a.json")) == json.dumps(rows)
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert json.dumps(rows_of(folder / "a.jsonl")) == json.dumps(rows)
    for row in rows:
        row["tools"][0]["since"] = "2026-01-01"
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert json.dumps(rows_of(folder / "a.jsonl", streaming=True)) == json.dumps(rows)
    rows[1]["prompt"] = 1.5
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert json.dumps(rows_of(folder / "b.jsonl")) == json.dumps(rows)


def test_two_files_with_objects_of_other_keys(folder):
    """Which no one type holds: a content that is text in one and parts in the other."""
    parts = [{"type": "text", "text": "x"}]
    for name, content in {"a": "said", "b": parts}.items():
        row = {"prompt": "q", "chosen": [{"role": "assistant", "content": content}]}
        (folder / f"{name}.jsonl").write_text(json.dumps(row))
    assert [row["chosen"][0]["content"] for row in rows_of(folder)] == ["said", parts]
    for name, value in {"a": 1, "b": "x"}.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": "q", "n": value}))
    with pytest.raises(ValueError, match=r"column 'n' is int64 in a.jsonl and string in b.jsonl"):
        load_splits(str(folder))


FLAGS = {
    "later": ([5.5, 2.5], [True], [5.5, 2.5, True]),
    "first": ([True], [5.5], [True, 5.5]),
    "whole": ([5, 1], [True], [5, 1, True]),
    "lists": ([[0.5, 1]], [[True, 2]], [[0.5, 1], [True, 2]]),
    "objects": ([{"x": 0.5}], [{"x": True}], [{"x": 0.5}, {"x": True}]),
    "large": ([0.5], [2**60 + 1], [0.5, 2**60 + 1]),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_and_large_integers_among_the_numbers_of_another_file(name, folder):
    """Arrow would take `true` for 1.0, which is a score."""
    *files, wanted = FLAGS[name]
    for file, values in zip("ab", files, strict=True):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(ROW | {"score_chosen": v}) + "\n" for v in values))
    found = [row["score_chosen"] for row in rows_of(folder)]
    assert json.dumps(found) == json.dumps(wanted)


def test_integers_beyond_64_bits_are_named(folder):
    """Among arguments `datasets` would give them back within the text of all of them."""
    for large in (2**64, -(2**63) - 1):
        for values in ([1, large], [large, large]):
            rows = [{"prompt": "12345678901234567890", "tools": [{"parameters": {"x": [v]}}]} for v in values]
            (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            with pytest.raises(ValueError, match=f"the integer {large} does not fit into 64 bits: write it as text"):
                load_splits(str(folder / "a.jsonl"))
    rows = [{"prompt": "q", "tools": [{"parameters": {"x": v}}]} for v in (2**64 - 1, -(2**63), str(2**70))]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(folder / "a.jsonl") == rows


DAY = datetime.date(2026, 1, 1)
OF_ANOTHER_KIND = {
    "chosen": [(1, "int64"), (1.5, "double"), (True, "bool"), (DAY, "date32.day."), (b"x", "binary")],
    "score_chosen": [(True, "bool")],
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("split", ["b", "test"])
@pytest.mark.parametrize("streaming", [False, True])
def test_values_that_another_files_type_would_change(suffix, split, streaming, folder, caplog):
    """Numbers, times and bytes into answers, flags into numbers; in another column, that is said."""

    def written(name: str, row: dict[str, Any]) -> None:
        table = pa.Table.from_pylist([row])
        if suffix == "parquet":
            pq.write_table(table, folder / f"{name}.parquet")
        else:
            with pa.ipc.new_stream(folder / f"{name}.arrow", table.schema) as stream:
                stream.write_table(table)

    written("train" if split == "test" else "a", ROW | {"note": "x", "m": [{"k": 1}]})
    for column, values in OF_ANOTHER_KIND.items():
        for value, kind in values:
            written(split, ROW | {"note": "x", "m": [{"k": 1}], column: value})
            said = (
                f"column '{column}' is (string|double) in .* and {kind} in {split}.{suffix}: give it one type in all"
            )
            with pytest.raises(ValueError, match=said):
                load_splits(str(folder), streaming=streaming)
    written(split, ROW | {"note": 1, "m": [{"k": 2}]})
    splits = load_splits(str(folder), streaming=streaming)
    assert [row["note"] for rows in splits.values() for row in rows] == ["x", "1"]
    assert [
        each for each in caplog.messages if f"int64 in {split}.{suffix}: all its values are read as string" in each
    ]


def test_flags_beside_the_scores_of_an_earlier_file_than_the_one_before(folder, caplog):
    """A file of nulls says nothing of the type. A column that is no score is only warned of."""
    for name, value in {"a": None, "b": 1.5, "c": True}.items():
        pq.write_table(pa.Table.from_pylist([ROW | {"score_chosen": value}]), folder / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"'score_chosen' is double in b.parquet and bool in c.parquet"):
        load_splits(str(folder))
    for name, value in {"a": [1.5], "b": [2.0], "c": [True]}.items():
        pq.write_table(pa.Table.from_pylist([{"prompt": "q", "scores": value}]), folder / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"'scores' is .*double.* in a.parquet and .*bool.* in c.parquet"):
        load_splits(str(folder))
    for name, value in {"a": 0, "b": 1, "c": True}.items():
        pq.write_table(pa.Table.from_pylist([ROW | {"verified": value}]), folder / f"{name}.parquet")
    assert [row["verified"] for row in rows_of(folder)] == [0, 1, 1]
    assert "column 'verified' is int64 in a.parquet and bool in c.parquet: all its values are read as" in caplog.text


def test_a_table_with_flags_beside_one_with_numbers(folder):
    write(folder, train__csv="prompt,chosen,rejected,score_chosen\na,b,c,1.5\n")
    write(folder, test__csv="prompt,chosen,rejected,score_chosen\na,True,7,True\n")
    with pytest.raises(ValueError, match=r"column 'score_chosen' is double in train.csv and bool in test.csv"):
        load_splits(str(folder))
    write(folder, test__csv="prompt,chosen,rejected,score_chosen\na,True,7,2\n")
    found = list(load_splits(str(folder))["test"])
    assert found == [{"prompt": "a", "chosen": "True", "rejected": "7", "score_chosen": 2.0}]


def test_streams_of_tables(folder, recwarn):
    """Of other types in an unread column, too; else without a word of pandas'."""
    write(folder, a__csv=HEAD + "a,b,c\n", b__csv=HEAD + "d,7,f\n")
    assert [row["chosen"] for row in rows_of(folder, streaming=True)] == ["b", "7"]
    assert not [each for each in recwarn if "converter" in str(each.message)]
    write(folder, a__csv="prompt,n\na,1\n", b__csv="prompt,n\nb,x\n")
    with pytest.raises(ValueError, match=r"cannot be streamed: a.csv has .* and b.csv .*: load the data set instead"):
        load_splits(str(folder), streaming=True)
    for file in folder.iterdir():
        file.unlink()
    write(folder, train__csv="prompt,n\na,1\n", test__csv="prompt,n\nb,x\n")
    assert [row["n"] for row in rows_of(folder, "test", streaming=True)] == ["x"]


@pytest.mark.parametrize("name", ["TRAIN.JSONL", "Train.Jsonl", "train.CSV", "train.Parquet"])
def test_a_folder_of_files_in_capitals(name, folder):
    """Read as a file alone is."""
    rows = Dataset.from_list([json.loads(LINE)] * 2)
    {"l": rows.to_json, "v": rows.to_csv, "t": rows.to_parquet}[name[-1].lower()](folder / name)
    assert [dict(row) for row in rows_of(folder)] == list(rows)


@pytest.mark.parametrize("name", [" {} ", "{} ", " {}"])
def test_a_name_with_blanks_around_it(name, folder):
    with pytest.raises(FileNotFoundError, match=r"no data set at ' ?.*, a name with blanks around it: remove them"):
        load_splits(name.format(folder))


def test_a_stream_whose_second_file_does_not_fit(folder):
    """Training would find that out where it comes to the file."""
    messages = [{"role": "user", "content": "q"}]
    pq.write_table(pa.Table.from_pylist([{"prompt": messages}]), folder / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"prompt": [{**messages[0], "name": "x"}]}]), folder / "b.parquet")
    with pytest.raises(ValueError, match=r"cannot be streamed: .*: load the data set instead of streaming it"):
        load_splits(str(folder), streaming=True)
    assert len(rows_of(folder)) == 2


HALF = '{"prompt": "p", "chosen": "cat a\\ud83d x", "rejected": "b"}'
WHOLE = '{"prompt": "q", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("half.json", f"[{WHOLE}, {HALF}]", "half.json: row 1: half of a surrogate pair"),
        ("half.jsonl", f"{WHOLE}\n{HALF}\n", "half.jsonl, line 2: half of a surrogate pair"),
        ("one.jsonl", HALF, "one.jsonl, line 1: half of a surrogate pair"),
        ("low.json", f"[{HALF}]".replace("ud83d", "udc00"), "low.json: row 0: half of a surrogate pair"),
        ("tab.jsonl", '{"prompt": "p", "responses": ["a", "b"], "n": "a\tb"}', "tab.jsonl, line 1: not JSON"),
        (
            "large.jsonl",
            '{"prompt": "p", "responses": ["a", "b"], "n": 1e400}',
            "line 1: the number 1e400 is too large",
        ),
    ],
)
def test_what_a_reader_would_leave_out_or_take_apart(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_splits(str(tmp_path / name))


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path):
    (tmp_path / "whole.json").write_text(f"[{HALF}]".replace("ud83d", "ud83d\\ude00"))
    assert load_splits(str(tmp_path / "whole.json"))["train"][0]["chosen"] == "cat a\U0001f600 x"
