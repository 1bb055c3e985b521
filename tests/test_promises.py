"""What README.md and SECURITY.md promise has the names of its tests in docs/promises.md, and these tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
ADVICE = "advice"  # in place of a test, for a sentence that tells the reader what to do
# the sections of which every sentence has its line
WHOLE = {"README.md": "What you can rely on", "SECURITY.md": "What to know"}


def plain(markdown: str) -> str:
    """The words, without links, emphasis and code."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown)
    return " ".join(re.sub(r"[*`]", "", text).split())


def text_of(file: str) -> str:
    return plain((ROOT / file).read_text(encoding="utf-8"))


def sentences(file: str) -> list[str]:
    """Those of the points of the file's section; the point's title is none."""
    section = (
        (ROOT / file)
        .read_text(encoding="utf-8")
        .split(f"## {WHOLE[file]}\n")[1]
        .split("\n## ")[0]
        .split("\nCheck for yourself:\n")[0]
    )
    points = re.findall(r"^\* (.*(?:\n  .*)*)", section, re.MULTILINE)
    texts = [plain(re.sub(r"^\*\*[^*]+\*\*:?", "", point)) for point in points]
    return [each.strip() for text in texts for each in re.split(r"(?<=[.]) ", text)]


def lines() -> list[tuple[str, str, str]]:
    """File, promise and tests of every line of the tables."""
    found = []
    for part in TABLES.split("\n## ")[1:]:
        file = part.split("\n")[0].strip()
        rows = re.findall(r"^\| (.*?) \| (.*?) \|$", part, re.MULTILINE)
        found += [(file, plain(promise), tests) for promise, tests in rows if promise not in ("promise", "---")]
    return found


@cache
def names_in(file: str) -> set[str]:
    """Functions that pytest collects, by their names."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    places = {"": tree, **{f"{each.name}::": each for each in classes}}
    return {
        f"{place}{node.name}"
        for place, holder in places.items()
        for node in holder.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize(("file", "promise", "tests"), lines())
def test_a_line(file: str, promise: str, tests: str) -> None:
    """The promise is in its file, word for word, and each of its tests is there."""
    assert promise in text_of(file)
    if tests == ADVICE:
        return
    named = re.findall(r"`(test_\w+\.py)::([\w:]+)`", tests)
    assert named, tests
    assert ", ".join(f"`{module}::{name}`" for module, name in named) == tests
    assert not [f"{module}::{name}" for module, name in named if name not in names_in(module)]


@pytest.mark.parametrize("file", WHOLE)
def test_no_promise_is_without_a_test(file: str) -> None:
    promised = [promise for of, promise, _ in lines() if of == file]
    found = sentences(file)
    assert len(found) > 5
    assert not [sentence for sentence in found if sentence not in promised]
