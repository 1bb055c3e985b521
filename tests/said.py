"""What a test module hears, word for word: the errors that its tests expect, and the package's log.

A test looks at a few words of a message. With `from said import word_for_word` in its module, the whole of it is held
against `said/<module>.txt`: columns, numbers and the advice. A test that is not in the file is not looked at.
`SAID=write pytest -m "" tests/test_x.py` writes the file anew, with the long tests: read what has changed.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest

_heard: list[str] = []  # in the test that runs

FOLDER = Path(__file__).with_name("said")
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
# whose own words are in some messages
_OTHERS = ("trl", "transformers", "datasets", "accelerate", "peft", "torch")


def hear(text: str | None) -> None:
    """Notes what a test has caught by other means than `pytest.raises`."""
    _heard.append(f"said: {text}")


@cache
def has_the_tested_versions() -> bool:
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().split() if "==" in line)
    found = {name: version(name).partition("+")[0] for name in _OTHERS}
    return sys.version_info[:2] == (3, 11) and all(pinned.get(name) == each for name, each in found.items())


def blocks_of(file: Path) -> dict[str, list[str]]:
    """By the first line of each: what a test, or a case, has heard. Empty without a file."""
    blocks = file.read_text().strip("\n").split("\n\n") if file.exists() else []
    return {name: lines for name, *lines in (block.split("\n") for block in blocks)}


@cache
def written(module: str) -> dict[str, list[str]]:
    """By test."""
    return blocks_of(FOLDER / f"{module}.txt")


def plain(text: str, base: Path) -> str:
    """Without what differs from one run to the next."""
    for place in (base, base.resolve()):
        text = re.sub(rf"{re.escape(str(place))}/[\w.-]*", "TMP", text)
    text = re.sub(rf"{re.escape(gettempdir())}/trl-margins-[\w-]+", "TMP", text)
    text = re.sub(r"[\d.]+ ([MG]B (?:free|left))", r"0 \1", text)
    text = re.sub(r"\d+ bytes instead of \d+", "0 bytes instead of 0", text)
    return re.sub(r"0x[0-9a-f]{6,}", "0x", text).replace("\n", "⏎")


@pytest.fixture(autouse=True)
def word_for_word(request: Any, monkeypatch: Any, tmp_path_factory: Any) -> Iterator[list[str]]:
    if not has_the_tested_versions():
        yield []
        return
    heard, expect = _heard, pytest.raises
    heard.clear()

    @contextmanager
    def raises(*kinds: Any, **options: Any) -> Iterator[Any]:
        with expect(*kinds, **options) as info:
            yield info
        heard.append(f"{info.typename}: {info.value}")

    # INFO only where a module asks for it: an earlier test may have left the logger at that level, at which less is a
    # warning
    hears, logger = getattr(request.module, "HEARS", "WARNING"), logging.getLogger("trl_margins")
    handler, level = logging.Handler(hears), logger.level
    logger.setLevel(hears)
    handler.emit = lambda record: heard.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    monkeypatch.setattr(pytest, "raises", raises)
    logger.addHandler(handler)
    yield heard
    logger.removeHandler(handler)
    logger.setLevel(level)
    lines = [plain(each, tmp_path_factory.getbasetemp()) for each in heard]
    module, name = request.module.__name__, request.node.nodeid.partition("::")[2].encode("unicode_escape").decode()
    said = written(module)
    if os.environ.get("SAID") == "write":
        said.pop(name, None)
        if lines:
            said[name] = lines
        (FOLDER / f"{module}.txt").write_text("\n\n".join("\n".join([key, *of]) for key, of in said.items()) + "\n")
    elif name in said:
        assert lines == said[name], "\n".join(["is now:", *lines, "and was:", *said[name]])
