"""Where commands write is checked before the work, and what earlier runs have left is named where it is damaged."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import preference_rows
from datasets import DatasetDict

from trl_margins.cli import main
from trl_margins.cli.compare_runs import Run
from trl_margins.cli.setup import check_files, find_model, run_of
from trl_margins.cli.train_options import chat_template
from trl_margins.generation.store import Store
from trl_margins.report.run_folder import read_pairs


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    preference_rows(4).to_json("rows.jsonl")
    Path("file").write_text("mine")
    return tmp_path


MODEL = ["--model_name_or_path", "/no/model", "--dataset_name"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inspect", "none.jsonl", "--json", "."], ". is a folder: name a file in it"),
        (["inspect", "rows.jsonl", "--json", "rows.jsonl"], "rows.jsonl is read, and would be lost"),
        (["inspect", "none.jsonl", "--json", "x.png", "--plot", "x.png"], "x.png is to be written twice"),
        (["evaluate", *MODEL, "none.jsonl", "--rewards", "."], ". is a folder: name a file in it"),
        (["evaluate", *MODEL, "none", "rows.jsonl", "--json", "rows.jsonl"], "rows.jsonl is read, and would be lost"),
        (["evaluate", *MODEL, "none.jsonl", "--json", "x", "--markdown", "./x"], "x is to be written twice"),
        (["hessian", *MODEL, "none.jsonl", "--json", "."], ". is a folder: name a file in it"),
        (["hessian", *MODEL, "none.jsonl", "--json", "x.csv"], "x.csv would hold JSON: name it x.json"),
        (["inspect", "none.jsonl", "--json", "a/x.y.md"], "a/x.y.md would hold JSON: name it x.y.json"),
        (["evaluate", *MODEL, "none.jsonl", "--json", "x.PDF"], "x.PDF would hold JSON: name it x.json"),
        (["evaluate", *MODEL, "none.jsonl", "--rewards", "x.csv"], "x.csv would hold JSON lines: name it x.jsonl"),
        (["evaluate", *MODEL, "none.jsonl", "--markdown", "x.html"], "x.html would hold Markdown: name it x.md"),
        (["generate", *MODEL, "rows.jsonl", "--out", "rows.jsonl"], "rows.jsonl is read, and would be lost"),
        (["score", "rows.jsonl", "--out", "file"], "file is a file, and a name without one of"),
        (["score", "rows.jsonl", "--out", "rows.jsonl"], "rows.jsonl is read, and would be lost"),
        (
            ["inspect", "rows.jsonl", "b.jsonl"],
            "'b.jsonl': --dataset_name takes one value: join the files, or name a f",
        ),
        (["score", "--dataset_name=rows.jsonl", "rows.jsonl"], "'rows.jsonl': --dataset_name takes one value: join"),
        (["score", "rows.jsonl", "--num_proc", "2", "4"], "unexpected argument '4': --num_proc takes one value"),
        (["pairs", "--out", "a", "b", "--dataset_name", "c"], "unexpected argument 'b': --out takes one value"),
        (["score", "saved", "--out", "saved"], "saved is read, and would be lost"),
        (["score", "both", "--out", "saved"], "saved has another saved data set: name another folder"),
        (["score", "rows.jsonl", "--out", "both"], "both has another saved data set: name another folder"),
        (["score", "rows.jsonl", "--column", "chosen"], "'chosen' is a column of the pairs themselves: give column"),
        (["score", "rows.jsonl", "--column", "prompt", "--overwrite", "true"], "'prompt' is a column of the pairs"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_an_output_is_refused_before_the_work(argv, words, here):
    rows = preference_rows(4)
    rows.save_to_disk("saved")
    DatasetDict({"train": rows, "test": rows}).save_to_disk("both")
    before = Path("rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match=re.escape(words)):
        main(argv)
    assert Path("rows.jsonl").read_bytes() == before
    assert Path("file").read_text() == "mine"
    assert not Path("x").exists()


def test_a_file_is_what_it_was_after_the_check(here):
    check_files(["file", "new/x.json", None], ["rows.jsonl"])
    assert Path("file").read_text() == "mine"
    assert not Path("new/x.json").exists()
    with pytest.raises(OSError, match="file cannot be written to"):
        check_files(["file/x"])


def test_what_is_written_over_is_said_before(here, caplog):
    """Each command once, then into the place of its own result."""
    for out in ("scored.jsonl", "folder"):
        for said in (False, True):
            caplog.clear()
            main(["score", "rows.jsonl", "--out", out])
            assert (f"{out} is there" in caplog.text or f"data set in {out} will be" in caplog.text) is said
    caplog.clear()
    Path("empty").touch()
    check_files(["file", "empty", "new.json"])
    assert [record.message for record in caplog.records] == ["file is there, and will be written over"]


def test_a_saved_data_set_does_not_hide_files(here):
    """`datasets` reads the one or the others."""
    for name, kept in {"data": "train.csv", "model": "config.json"}.items():
        Path(name).mkdir()
        (here / name / kept).write_text("{}")
        with pytest.raises(ValueError, match=f"^{name} has {kept}, which nobody reads beside a saved data set"):
            main(["score", "rows.jsonl", "--out", name])
        assert os.listdir(name) == [kept]


@pytest.mark.parametrize("place", ["data/train-00000-of-00001.parquet", "train/part.csv", "test.jsonl.gz", "no.json"])
def test_nor_files_in_the_folders_of_its_splits(place, here):
    (here / "data" / place).parent.mkdir(parents=True)
    name = re.sub(r"\.gz$", "", place)
    preference_rows(3).to_parquet(here / "data" / place) if "parquet" in name else (here / "data" / place).touch()
    with pytest.raises(ValueError, match=f"^data has {place}, which nobody reads beside a saved data set"):
        main(["score", "rows.jsonl", "--out", "data"])


def test_results_and_runs_are_no_data_that_would_be_hidden(here):
    (here / "work" / "run").mkdir(parents=True)
    (here / "work" / "cache-1.arrow").touch()
    (here / "work" / ".notes.jsonl").touch()
    for name in ("config.json", "pair_log.csv"):
        (here / "work" / "run" / name).write_text("{}")
    main(["inspect", "rows.jsonl", "--json", "work/audit.json"])
    results = (
        {"model": "m", "reward": "sum", "ref_model": None, "min_score_gap": 2.0},
        {"set": "s", "row": 0, "rewards": [1.0], "lengths": [2]},
        {"table": [{"method": "simpo"}]},
    )
    for n, result in enumerate(results):
        (here / "work" / f"result{n}.json").write_text(json.dumps(result))
    main(["score", "rows.jsonl", "--out", "work/set"])
    main(["score", "rows.jsonl", "--out", "work"])
    assert (here / "work" / "state.json").is_file()
    for name, row in {
        "list": {"rewards": [1.0], "lengths": [2]},
        "score": {"prompt": "p", "min_score_gap": 1},
    }.items():
        (here / name).mkdir()
        (here / name / "train.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=r"has train\.jsonl, which nobody reads"):
            main(["score", "rows.jsonl", "--out", name])
    with pytest.raises(ValueError, match="lists"):
        main(["pairs", "rows.jsonl", "--out", "new/pairs"])
    assert not (here / "new").exists()


def test_a_pipe_is_opened_by_who_writes_to_it(here):
    """Opened and closed before, it would end for its reader."""
    os.mkfifo("pipe")
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_text()))
    reader.start()
    main(["inspect", "rows.jsonl", "--json", "pipe"])
    reader.join(30)
    assert json.loads(found[0])["splits"]["train"]["n_rows"] == 4


def test_what_an_earlier_run_has_left_damaged(here):
    Path("margin_run.json").write_bytes(b'{"model": "caf\xe9"')
    Path("adapter_config.json").write_text("[")
    for read in (lambda: run_of("."), lambda: find_model(".")):
        with pytest.raises(ValueError, match=r"(margin_run|adapter_config)\.json is not JSON"):
            read()
    for written, error in (
        (b"\x00\xff\xfe\x01" * 200, r"log\.csv has no column 'step' in its first line, which reads"),
        (b'step\n"' + b"a" * 200_000, r"log\.csv, line 2: field larger than field limit"),
        (b"step,gap\n1,\xff\n", r"log\.csv, line 2, column 'gap': '\\\\xff' is not a number"),
    ):
        Path("log.csv").write_bytes(written)
        with pytest.raises(ValueError, match=error) as raised:
            read_pairs(Path("log.csv"))
        assert len(str(raised.value)) < 500
    Path("x.jsonl.partial").write_text("{}\n")
    Path("x.jsonl.settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"x.jsonl.settings.json is damaged"):
        Store("x.jsonl", {})
    Path("template.jinja").write_bytes("{{ é }}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"chat_template: template.jinja is not UTF-8 .*: save the file as UTF-8"):
        chat_template("template.jinja")
    Path("template.jinja").write_bytes("\ufeff{{ messages }}".encode())
    assert chat_template("template.jinja") == "{{ messages }}"
    Path("template.jinja").write_text("\n")
    with pytest.raises(ValueError, match=r"chat_template: template.jinja is empty"):
        chat_template("template.jinja")
    with pytest.raises(ValueError, match=r"chat_template: 'x{199}"):
        chat_template("x" * 5000)


@pytest.mark.parametrize("written", [b"caf\xe9: 1\n", b"- a\n", b"a: [\n"], ids=["latin-1", "a list", "cut"])
def test_a_damaged_run_of_a_comparison(written, here):
    entry: Any = type("Entry", (), {"name": "gappo", "settings": {}, "said": ()})
    run = Run(entry, 0, 1e-6, here)
    run.folder.mkdir()
    (run.folder / "run.yaml").write_bytes(written)
    with pytest.raises(ValueError, match=r"run\.yaml.* This file is compare's own, and is damaged: name another"):
        run.check_folder({})
