"""What commands write is whole or not there, and a full disk is said with the file's name."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import preference_rows, rest_rehearsed
from datasets import load_from_disk
from faults import Fault

from trl_margins import disk
from trl_margins.cli import main


def lines(file: Path) -> Any:
    return [json.loads(line) for line in file.read_text().splitlines()]


LISTS = [{"prompt": f"q{i}?", "responses": ["yes", "no", "perhaps"], "scores": [i, i + 1, i + 3]} for i in range(5)]
PAIRS = ["--dataset_name", "pairs.jsonl"]
SCORE = ["score", *PAIRS, "--metric", "jaccard", "--output"]
INSPECT = ["inspect", *PAIRS, "--ef_sample", "0"]
# the command, the file that it writes, and how that is read
COMMANDS: dict[str, tuple[list[str], str, Callable[[Path], Any]]] = {
    "pairs": (["pairs", "lists.jsonl", "--out", "made/out.jsonl"], "made/out.jsonl", lines),
    "jsonl": ([*SCORE, "made/out.jsonl"], "made/out.jsonl", lines),
    "gz": ([*SCORE, "made/out.jsonl.gz"], "made/out.jsonl.gz", lambda file: gzip.decompress(file.read_bytes())),
    "json": ([*SCORE, "made/out.json"], "made/out.json", lambda file: json.loads(file.read_text())),
    "csv": ([*SCORE, "made/out.csv"], "made/out.csv", lambda file: pd.read_csv(file).to_dict()),
    "parquet": ([*SCORE, "made/out.parquet"], "made/out.parquet", lambda file: pd.read_parquet(file).to_dict()),
    "folder": ([*SCORE, "made/out"], "made/out", lambda folder: load_from_disk(folder).to_dict()),
    "numbers": ([*INSPECT, "--json", "made/out.json"], "made/out.json", lambda file: json.loads(file.read_text())),
    "yaml": (["convert", "old.yaml", "--out", "made/out.yaml"], "made/out.yaml", lambda file: file.read_text()),
    "picture": (
        [*INSPECT, "--plot", "made/out.svg"],
        "made/out.svg",
        lambda file: file.read_text().endswith("</svg>\n"),
    ),
}


@pytest.mark.parametrize("command", rest_rehearsed(COMMANDS, len(COMMANDS) - 1))
def test_a_full_disk_at_any_operation(command, tmp_path, monkeypatch, capsys):
    """The file that was there stays, or none is; and the command works where there is room again."""
    monkeypatch.chdir(tmp_path)
    preference_rows(6, seed=1).to_json("pairs.jsonl")
    Path("lists.jsonl").write_text("\n".join(map(json.dumps, LISTS)))
    Path("old.yaml").write_text(
        "model_name_or_path: m\ndataset_name: pairs.jsonl\noutput_dir: o\ntorch_dtype: bfloat16\n"
    )
    arguments, name, read = COMMANDS[command]
    main(arguments)
    whole, made, is_folder = read(Path(name)), {*os.listdir("made")}, Path(name).is_dir()
    shutil.rmtree(name) if is_folder else Path(name).write_text("earlier")
    with Fault(tmp_path, 0, errno.ENOSPC) as counted:
        main(arguments)
    assert counted.seen > 1
    shutil.rmtree(name) if is_folder else Path(name).write_text("earlier")
    for number in sorted({*range(1, counted.seen + 1)[:3], *range(1, counted.seen + 1)[-3:]}):
        if is_folder:
            shutil.rmtree(name, ignore_errors=True)
        with Fault(tmp_path, number, errno.ENOSPC), pytest.raises(OSError, match="No space left on device") as caught:
            main(arguments)
        assert "made" in str(caught.value), number
        # of several files, the first ones may be there
        assert is_folder or Path(name).read_text() == "earlier" or read(Path(name)) == whole, number
        assert {*os.listdir("made")} <= made, number
    main(arguments)
    assert read(Path(name)) == whole
    assert {*os.listdir("made")} == made


def test_where_a_file_is_written(tmp_path):
    """What a link leads to is the file; a device has nothing beside it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "file.json")
    disk.write(tmp_path / "link.json", "ä")
    assert (tmp_path / "real" / "file.json").read_bytes() == "ä".encode()
    assert (tmp_path / "link.json").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["file.json"]
    disk.write("/dev/null", b"nothing")
    assert not Path("/dev/null").is_file()
    with disk.written(tmp_path / f"{'n' * 250}.json") as beside:  # as long as a name may be
        beside.write_text("{}")
    assert (tmp_path / f"{'n' * 250}.json").read_text() == "{}"


@pytest.mark.parametrize(
    "error",
    [ValueError("wrong"), PermissionError(errno.EACCES, "no"), OSError(errno.ENOSPC, "full", "/cache/file")],
    ids=repr,
)
def test_another_error_is_left_as_it_is(error, tmp_path):
    """Of the disk, it may be about another file, which it names."""

    def fail():
        with disk.written(tmp_path / "file") as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert not os.listdir(tmp_path)


def test_torch_finds_no_inode_left():
    """Bytes are free then, and torch's error has no number."""
    said = "[enforce fail at inline_container.cc:747] . open file failed with strerror: No space left on device"
    assert disk.is_of_the_disk(RuntimeError(said))
    assert not disk.is_of_the_disk(RuntimeError("open file failed with strerror: No such file or directory"))


def test_a_file_that_may_not_be_so_large():
    """As `ulimit -f` has it; safetensors gives the number alone."""
    assert disk.is_of_the_disk(RuntimeError("Error while serializing: I/O error: File too large (os error 27)"))
    assert not disk.is_of_the_disk(RuntimeError("No such device (os error 2)"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_each_way_in_which_a_disk_takes_no_more(number):
    assert disk.is_of_the_disk(OSError(number, "x"))
    assert disk.is_of_the_disk(OSError(f"a library's: [errno {number}] x"))
    assert disk.is_of_the_disk(RuntimeError(f"x (os error {number})"))
    assert not disk.is_of_the_disk(OSError(errno.ENOENT, f"os error {number}"))  # its own number counts
    assert not disk.is_of_the_disk(RuntimeError(f"os error {number}0"))


class SafetensorError(Exception):
    """As safetensors names its errors, which have no file."""


def test_which_file_an_error_is_about(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free", lambda folder: f"{Path(folder).name} 1 MB free")
    left = ", out 1 MB free"
    out = tmp_path / "out"
    said = {
        OSError(errno.ENOSPC, "full", "a/file"): "a/file: full",
        SafetensorError("no room"): f"a .safetensors file in {out}: no room",
        RuntimeError("cryptic"): f"{out}: its writing failed",
        OSError("no number"): f"{out}: no number",
    }
    for error, text in said.items():
        assert disk.where(error, out) == text + left
    (out / "new").mkdir(parents=True)
    for age, name in enumerate(("b", "new/c", "a")):
        (out / name).write_text("x")
        os.utime(out / name, (10 - age % 2, 10 + age % 2))  # new/c is the last one
    assert disk.where(RuntimeError("cryptic"), out) == f"{out / 'new' / 'c'}: its writing failed{left}"
    error = OSError(errno.ENOSPC, "full", "file")
    error.strerror = None
    assert disk.where(error, out).startswith("file: [Errno 28]")


def test_the_name_of_what_could_not_be_written(tmp_path, monkeypatch):
    """And of its folder the room, which is that of the nearest one there is."""
    file, beside = tmp_path / "none" / "file", tmp_path / "beside"
    looked = []

    def usage(folder):
        looked.append(folder)
        return shutil._ntuple_diskusage(9e6, 9e6, 1_260_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    for error, reason in (
        (OSError(errno.ENOSPC, "full"), "full"),
        (OSError(errno.ENOSPC, "full", str(file)), "full"),
        (OSError(errno.ENOSPC, "full", os.fsencode(beside)), "full"),
        (RuntimeError("x (os error 28)"), r"x \(os error 28\)"),
    ):
        said = rf"^{file} cannot be written \({reason}, 1\.3 MB free\): make room, or name another place$"
        with pytest.raises(OSError, match=said) as caught, disk.naming(file, beside):
            raise error
        assert caught.value.__cause__ is error
    assert {*looked} == {tmp_path}
    monkeypatch.chdir(tmp_path)
    looked.clear()
    assert disk.free(Path("x/y")) == "1.3 MB free"
    assert disk.rooms(tmp_path, "none", str(tmp_path)) == f"{tmp_path} 1.3 MB free, none 1.3 MB free"
    assert looked == [tmp_path] * 3
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert disk.free(Path("x")) == "and the working directory is gone"
    monkeypatch.chdir(tmp_path)


def test_a_file_beside_the_other(tmp_path):
    """Of this process, with the suffix that a library goes by; and the other stays until all is there."""
    file = tmp_path / "a.csv"
    file.write_text("earlier")
    with disk.written(file) as beside:
        assert beside == tmp_path / f"_writing-{os.getpid()}.csv"
        beside.write_text("now")
        assert file.read_text() == "earlier"
    assert (file.read_text(), os.listdir(tmp_path)) == ("now", ["a.csv"])
    with disk.written(tmp_path / "a.123456789") as beside:
        assert beside.suffix == ".12345678"
        beside.touch()
    (tmp_path / "folder").mkdir()
    with disk.written(tmp_path / "folder") as place:
        assert place == tmp_path / "folder"
    disk.write(file, b"\xff\n")
    assert file.read_bytes() == b"\xff\n"
