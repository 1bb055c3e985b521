"""What a terminal or a page would obey is shown, and does nothing, wherever it comes from."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import sys
import unicodedata
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, preference_rows
from datasets import Dataset
from tqdm import tqdm

from trl_margins import cli
from trl_margins import logging as log
from trl_margins.logging import PACKAGE
from trl_margins.printable import Plain, printable
from trl_margins.tables import aligned, markdown_table

# ESC, BEL, NUL, backspace, carriage return, DEL, C1, bidi overrides and isolates, line separators, an invisible tag
ODD = "\x1b[2J\x07\x00\b\r\x7f\x9b31m\u202e\u2066\u200f\u2028\U000e0041"
IN_FILES = ODD.replace("\x00", "")  # a file's name cannot have it


def orders(text: str) -> set[str]:
    return {c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


def test_all_of_unicode():
    """Every control character, every half of a surrogate pair, and all that turns text around; text stays."""
    whole = "".join(map(chr, range(sys.maxunicode + 1)))
    left = orders(printable(whole))
    # what joins letters, hyphens and accents, as scripts and emoji need it
    assert left <= {c for c in whole if unicodedata.category(c) == "Cf"}
    assert not left & set("".join(map(chr, (*range(0x202A, 0x202F), *range(0x2060, 0x2070), 0x200E, 0x200F, 0x61C))))
    printable(whole).encode()
    text = "\tnaïve – 日本 👩\u200d🚀 می\u200cخواهم |x|\n"
    assert printable(text) == text


@pytest.mark.parametrize("said", [("%s", ODD), (ODD,)])
def test_logs(said, caplog):
    with caplog.at_level(logging.DEBUG, "trl_margins"):
        logging.getLogger("trl_margins.somewhere").warning(*said)
    assert "\\x1b[2J" in caplog.text
    assert not orders(caplog.text)


def test_tables():
    for text in (aligned([[ODD, "1"]], ["a" + ODD, "b"]), markdown_table([ODD, "b"], [[ODD, "c"]])):
        assert not orders(text)
        assert "\\x1b" in text
    for text in (aligned([["a\nb", "1"]]), markdown_table(["head", "n"], [["a\nb", "1"]])):
        assert text.splitlines()[-1].split("|")[-3 * ("|" in text) :][0].split()[0] == "a\\nb"


@pytest.fixture
def heard(monkeypatch):
    """What the package passes on to a script's handler."""
    root, package, said = logging.getLogger(), logging.getLogger("trl_margins"), []
    handler, level = logging.Handler(), package.level
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(root, "level", 1)
    monkeypatch.setattr(package, "handlers", [log._handler])
    root.addHandler(handler)
    yield said
    root.removeHandler(handler)
    package.setLevel(level)


def test_the_lowest_level_that_is_shown(heard):
    levels = {"debug": 10, "info": 20, "warning": 30, "error": 40}
    for level, shown in (("ERROR", ["error"]), (logging.INFO, ["info", "warning", "error"]), ("DEBUG", [*levels])):
        log.set_verbosity(level)
        heard.clear()
        for name, number in levels.items():
            PACKAGE.log(number, name)
        assert heard == shown == [name for name, number in levels.items() if log.shows(number)]


@pytest.mark.parametrize(("rank", "asked", "said"), [("0", False, 2), ("1", False, 1), ("1", True, 2)])
def test_another_rank_says_what_is_wrong_alone(rank, asked, said, heard, monkeypatch):
    """Unless a script asks for more."""
    monkeypatch.setenv("RANK", rank)
    PACKAGE.setLevel(logging.INFO if asked else log._DEFAULT)
    PACKAGE.info("usual")
    PACKAGE.warning("wrong")
    assert heard == ["usual", "wrong"][-said:]
    assert [log.shows(logging.INFO), log.shows(logging.WARNING)] == [said == 2, True]


def test_what_is_held_back(heard):
    """INFO alone, until others have been let pass, or to the end of the block, also of one that fails."""
    log.set_verbosity("INFO")
    with log.holding_info():
        PACKAGE.info("first")
        PACKAGE.warning("wrong")
        assert heard == ["wrong"]
        with log.first():
            PACKAGE.info("before")
        PACKAGE.info("afterwards")
    assert heard == ["wrong", "before", "first", "afterwards"]
    heard.clear()
    with suppress(KeyError), log.holding_info():
        PACKAGE.info("held")
        assert not heard
        raise KeyError
    PACKAGE.info("now")
    assert heard == ["held", "now"]


def test_a_table_s_columns():
    """The first one to the left, where nothing else is asked for."""
    rows = [["a", "b", "1"], ["aa", "bb", "22"]]
    assert aligned(rows, ["name", "by", "n"]) == "name      by    n\na          b    1\naa        bb   22"
    assert aligned(rows, left=0, indent="> ") == ">  a   b   1\n> aa  bb  22"
    assert aligned(rows, left=2) == "a   b    1\naa  bb  22"
    assert aligned([["", "x"], ["  a", "y"]]) == "     x\n  a  y"
    lines = ["| a   |   n |", "|:----|----:|", "| x   |   1 |"]
    assert markdown_table(["a", "n"], [["x", "1"]]).splitlines() == lines


def test_a_stream():
    """Whoever writes; bars move, and what a bar is called does not."""
    stream = io.StringIO()
    plain = Plain(stream)
    print(ODD, "\ud800", file=plain)
    plain.writelines([warnings.formatwarning(ODD, UserWarning, "x.py", 1)])
    assert not orders(stream.getvalue())
    stream = io.StringIO()
    plain = Plain(stream)
    list(tqdm(range(3), desc=ODD, file=plain, ascii=True, mininterval=0))
    assert orders(stream.getvalue()) == {"\r"}
    assert "\\x1b" in stream.getvalue()
    assert not plain.isatty()


@pytest.fixture
def odd_inputs(tmp_path, tiny_model):
    """A model and a data set with control characters in all that has a name, and in texts."""
    model = Path(shutil.copytree(tiny_model, tmp_path / f"model{IN_FILES}"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{# " + IN_FILES.replace("\r", "") + " #}")
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"name_or_path": ODD}))
    (model / "README.md").write_text(f'---\nlicense: "{json.dumps(ODD)[1:-1]}"\n---\n{IN_FILES}')
    rows = [{**row, f"column{IN_FILES}": ODD} for row in preference_rows(8)]
    rows[3]["chosen"] = rows[3]["chosen"] + ODD if isinstance(rows[3]["chosen"], str) else rows[3]["chosen"]
    data = tmp_path / f"pairs{IN_FILES}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(model), str(data), tmp_path / f"out{IN_FILES}"


def commands(model: str, data: str, out: Path) -> list[list[str]]:
    both = ["--model_name_or_path", model, "--dataset_name", data]
    training = [*both, "--output_dir", str(out), "--max_steps", "1", "--max_length", "64", "--report_to", "none"]
    return [
        ["inspect", *both],
        ["train", *training, "--use_cpu", "--eval_strategy", "no", "--run_name", ODD.replace("\0", "")],
        ["train", *training, "--use_cpu"],  # the folder is in use
        ["report", str(out)],
        ["evaluate", *both, "--bootstrap", "2"],
        ["train", *training, "--use_cpu", f"--no{ODD}", "x"],
        ["inspect", f"{data}.nowhere{ODD}.jsonl"],
        ["inspect", data, "--score_columns", ODD, ODD],
        ["evaluate", "--model_name_or_path", f"./no{ODD}", "--dataset_name", data],
        [f"no{ODD}"],
    ]


def test_commands_and_what_they_write(odd_inputs, capfd, monkeypatch):
    monkeypatch.setattr("trl_margins.report.page.draw_pictures", lambda runs: [])
    ended = []
    for argv in commands(*odd_inputs):
        monkeypatch.setattr(sys, "argv", ["trl-margins", *argv])
        try:
            ended.append(cli.main())
        except SystemExit as left:
            ended.append(left.code)
        printed = capfd.readouterr()
        found = orders(printed.out) | orders(re.sub(r"(^|\n)(\r(?!\r).*)+", "", printed.err))  # but bars
        assert not found, (argv[0], found, printed)
    assert ended == [0, 0, 1, 0, 0, 2, 2, 2, 2, 2]
    folder = odd_inputs[2]
    for name in ("README.md", "report.html", "margin_run.json"):
        for file in folder.rglob(name):
            assert not orders(file.read_text()), file


def test_a_yaml_file(tmp_path, capfd, monkeypatch):
    for text in (f'"a\\e[2J{chr(0x202E)}": 1', '"beta": "\\x1b[2J"', 'env: {"\\e[2J=": 1}', f"beta: {ODD}"):
        (tmp_path / "c.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["trl-margins", "train", "--config", str(tmp_path / "c.yaml")])
        with suppress(SystemExit):
            assert cli.main() != 0
        printed = capfd.readouterr()
        assert not orders(printed.out + printed.err)
        assert printed.err


def test_a_name_that_is_no_utf8(tmp_path, capfd, monkeypatch):
    file = os.fsencode(tmp_path) + b"/pairs\xff.jsonl"
    Dataset.from_list(list(preference_rows(4))).to_json(tmp_path / "x.jsonl")
    os.rename(tmp_path / "x.jsonl", file)
    monkeypatch.setattr(sys, "argv", ["trl-margins", "inspect", os.fsdecode(file)])
    status = cli.main()
    printed = capfd.readouterr()
    assert (status == 0) or "pairs" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(("rank", "leaves"), [(None, False), ("0", False), ("1", True), ("12", True)])
def test_what_is_left_to_the_first_rank(rank, leaves, monkeypatch):
    monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(PACKAGE, "level", log._DEFAULT)
    assert log._is_of_another_rank() == leaves
    monkeypatch.setattr(PACKAGE, "level", logging.INFO)  # somebody asked for all of them
    assert not log._is_of_another_rank()


def test_what_the_screen_says_of_a_line():
    """An INFO line is its message alone; what matters more says whose it is."""
    written = io.StringIO()
    for level in ("DEBUG", "INFO", "WARNING", "ERROR"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", written)
            log.Screen().emit(logging.makeLogRecord({"name": "a", "msg": "m", **of_level(level)}))
    assert written.getvalue().splitlines() == ["m", "m", "WARNING a: m", "ERROR a: m"]


def of_level(name: str) -> dict[str, Any]:
    return {"levelname": name, "levelno": getattr(logging, name)}


class Fails(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.left = [*errors]

    def write(self, text: str) -> int:
        raise self.left.pop(0)

    def flush(self) -> None:
        raise self.left.pop(0)


def test_what_a_stream_cannot_take():
    """The first error of a disk is kept, a reader that has left is an error, and letters an encoding lacks are not."""
    one, two = OSError(28, "full"), OSError(5, "bad")
    plain = Plain(Fails(one, two))
    assert plain.lost is None
    assert plain.write("abc") == 3
    plain.flush()
    assert plain.lost is one
    for call in (lambda plain: plain.write("x"), lambda plain: plain.flush()):
        with pytest.raises(BrokenPipeError):
            call(Plain(Fails(BrokenPipeError())))
        with pytest.raises(ValueError, match="closed"):
            call(Plain(Fails(ValueError("closed"))))
        plain = Plain(Fails(left := BrokenPipeError()))
        plain.outlives_readers = True
        call(plain)
        assert plain.lost is left
    raw = io.BytesIO()
    plain = Plain(io.TextIOWrapper(raw, "ascii"))
    assert plain.write("γ=1\x1b") == 4
    plain.flush()
    assert raw.getvalue() == b"\\u03b3=1\\x1b"
    stream = io.StringIO()
    for text in ("\r\x1b[2J", "\n\x1b[A\rx\r", "\r\n\n\x1b[A\x1b[Ay", "z\r"):
        Plain(stream).write(text)
    assert stream.getvalue() == "\r\\x1b[2J" + "\n\x1b[A\rx\\r" + "\r\n\n\x1b[A\x1b[Ay" + "z\\r"


def test_the_package_s_own_logger():
    assert PACKAGE.name == "trl_margins"
    assert not PACKAGE.propagate
    assert log._handler in PACKAGE.handlers
    assert log._DEFAULT == 19


def test_a_script_s_own_logging(monkeypatch, capsys):
    """Its handlers get what it asked for, by the nearest logger's level; without any, the package writes itself."""
    root, package, below = logging.getLogger(), PACKAGE, logging.getLogger("trl_margins.a")
    said: list[str] = []
    quiet_one, other = logging.Handler(logging.ERROR), logging.Handler()
    for handler, name in ((quiet_one, "quiet"), (other, "other")):
        handler.emit = lambda record, name=name: said.append(f"{name}: {record.getMessage()}")
    monkeypatch.setattr(package, "handlers", [log._handler])
    monkeypatch.setattr(package, "level", log._DEFAULT)
    monkeypatch.delenv("RANK", raising=False)
    for logger in (package, below):
        logger.manager._clear_cache()
    monkeypatch.setattr(root, "handlers", [quiet_one, other])
    for level, shown in ((logging.WARNING, False), (logging.INFO, True), (logging.INFO + 1, False)):
        monkeypatch.setattr(root, "level", level)
        said.clear()
        below.info("info")
        below.error("error %s", 1)
        assert said == ["other: info"] * shown + ["quiet: error 1", "other: error 1"]
        assert log.shows(logging.INFO) == shown
        assert log.shows(logging.WARNING) == (level <= logging.WARNING)
    monkeypatch.setattr(root, "handlers", [other, log._handler])
    monkeypatch.setattr(package, "handlers", [log._handler, other])
    said.clear()
    below.error("to the package's other handler alone")
    assert said == ["other: to the package's other handler alone"]
    monkeypatch.setattr(package, "handlers", [log._handler])
    monkeypatch.setattr(root, "handlers", [])
    capsys.readouterr()
    below.info("hub_token=%s", "abc")
    below.warning("\x07")
    assert capsys.readouterr().err.splitlines() == ["hub_token=…", "WARNING trl_margins.a: \\x07"]
    assert log.shows(logging.INFO)
    monkeypatch.setenv("RANK", "3")
    below.info("of another rank")
    assert capsys.readouterr().err == ""
    assert not log.shows(logging.INFO)
    monkeypatch.delenv("RANK")
    package.handlers.append(other)  # who has set up the package's logger sees to its lines
    below.info("x")
    assert capsys.readouterr().err == ""
    assert said[-1] == "other: x"


def test_lines_go_above_a_bar(monkeypatch):
    written = []
    monkeypatch.setitem(
        sys.modules, "tqdm", SimpleNamespace(tqdm=SimpleNamespace(write=lambda *a, **k: written.append((a, k))))
    )
    log.Screen().emit(logging.makeLogRecord({"name": "a", "msg": "m", **of_level("INFO")}))
    assert written == [(("m",), {"file": sys.stderr})]
    monkeypatch.delitem(sys.modules, "tqdm")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    log.Screen().emit(logging.makeLogRecord({"name": "a", "msg": "m", **of_level("WARNING")}))
    assert stream.getvalue() == "WARNING a: m\n"
    log.Screen().emit(logging.makeLogRecord({"name": "a", "msg": "%d", "args": ("x",), **of_level("INFO")}))
    assert "Logging error" in stream.getvalue()


def test_cells_with_bars_and_lines():
    lines = markdown_table(["a|b", 1, "c"], [["x|y", 2.50, "long"], [None, "", "z"]]).splitlines()
    assert lines == [
        "| a\\|b   |   1 |    c |",
        "|:-------|----:|-----:|",
        "| x\\|y   | 2.5 | long |",
        "| None   |     |    z |",
    ]
    assert aligned([["a", "1.50"], ["b", "  2"]], ["x", "y"], indent="  ") == "  x       y\n  a    1.50\n  b       2"
