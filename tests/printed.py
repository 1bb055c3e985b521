"""Finds what is printed for people to type: commands, flags, fields with a value, functions.

It looks in Markdown, recipes' comments, strings of the package (errors, logs, help, docstrings), templates, and the
docstrings of benchmarks. What is printed anew is found without anybody remembering it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trl_margins.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE, DOCS, RECIPES = ROOT / "trl_margins", ROOT / "docs", ROOT / "recipes"
PAGES = [
    ROOT / name
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/plugin/README.md")
]
PAGES += [*sorted(DOCS.rglob("*.md")), *sorted((ROOT / ".github").rglob("*.*"))]
PAGES.remove(
    DOCS / "reproduce.md"
)  # whole commands and loops, which `test_reproduce.py` has bash and the parsers read

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`{1,2})(?!`)(?P<code>.+?)(?<!`)\1(?!`)", re.DOTALL)
PROGRAMS = ("trl-margins", "accelerate", "make", "pip", "hf")
GAP = "…"  # what a string is filled in with, and what a page leaves out


@dataclass(frozen=True)
class Text:
    """A piece of text, and where it stands."""

    file: str
    line: int
    text: str
    is_code: bool = False  # nothing but what is to be typed
    around: str = ""  # the paragraph

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def everything() -> list[Text]:
    """All places."""
    found = [text for page in PAGES for text in of_page(page)]
    found += [text for file in sorted(RECIPES.rglob("*.yaml")) for text in of_comments(file)]
    found += [text for file in sorted(PACKAGE.rglob("*.py")) for text in of_strings(file)]
    found += [text for file in sorted(PACKAGE.rglob("*.jinja")) for text in of_lines(file)]
    for file in [*sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]:
        found += of_strings(file)
    return found


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name


def of_page(file: Path) -> Iterator[Text]:
    """Code within the lines of a page, and indented lines that begin with a program. Fenced blocks are run by
    `test_docs.py`.
    """
    page = FENCE.sub(lambda match: "\n" * match.group().count("\n"), file.read_text(encoding="utf-8"))
    for match in CODE.finditer(page):
        start, end = (page.rfind("\n\n", 0, match.start()) + 2, page.find("\n\n", match.end()))
        around = page[start : end if end >= 0 else None]
        code = " ".join(match["code"].split())
        yield Text(relative(file), page[: match.start()].count("\n") + 1, code, is_code=True, around=around)
    for number, line in enumerate(page.splitlines(), 1):
        code = line.strip()
        if line.startswith("    ") and code.split(" ")[0] in PROGRAMS:
            yield Text(relative(file), number, code.split("  #")[0].strip(), is_code=True, around=line)


def of_comments(file: Path) -> Iterator[Text]:
    """Comments of a recipe: each line with its continuations; what is to be typed ends at two spaces."""
    lines = file.read_text(encoding="utf-8").splitlines()
    whole, start = "", 0
    for number, line in enumerate(lines, 1):
        if not line.startswith("#"):
            continue
        listed = line.startswith("#   --")
        text = line.removeprefix("#").strip()
        whole, start = (f"{whole} {text}", start) if whole else (text, number)
        if whole.endswith("\\"):
            whole = whole.removesuffix("\\").strip()
            continue
        is_code = listed or whole.split(" ")[0] in PROGRAMS
        code, _, also = whole.partition("  ") if is_code else (whole, "", "")
        yield Text(relative(file), start, code, is_code=is_code, around=also.strip())
        whole = ""


def of_strings(file: Path) -> Iterator[Text]:
    """Strings, whole where they are put together; not the patterns of regular expressions, and no lists of flags."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(getattr(node.func, "value", None), "id", "") == "re":
            inside.update(ast.walk(node.args[0]))
        if isinstance(node, ast.List):  # arguments of a command, which is no message
            inside.update(each for each in node.elts if (_text(each, set()) or "").startswith("--"))
        if node in inside:
            continue
        text = _text(node, inside)
        if text is not None:
            yield Text(relative(file), node.lineno, " ".join(text.split()))


def _text(node: ast.AST, parts: set[ast.AST]) -> str | None:
    """The string that a node is, with gaps for what is not known; `parts` takes the nodes that it is made of."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        known = [part for part in node.values if isinstance(part, ast.Constant)]
        parts.update(known)
        return "".join(part.value if part in known else GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [_text(side, parts) for side in (node.left, node.right)]
        if sides != [None, None]:
            parts.update((node.left, node.right))
            return "".join(side or GAP for side in sides)
    return None


def of_lines(file: Path) -> Iterator[Text]:
    """The lines of a template, its placeholders as gaps."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        yield Text(relative(file), number, re.sub(r"\{[{%#].*?[}%#]\}", GAP, line))


# What is in a text

_VALUE = r"""(?:'[^']*'|"[^"]*"|\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|[\w.+/*-]+|…)"""
_VALUES = r"(?: --?\w[\w-]*(?:[ =][\w./:=,…-]*[\w/…])?)"
_COMMAND = re.compile(
    rf"(?:(?:trl-margins|trl_margins\.cli) (?P<name>[a-z]+)\b(?P<rest>{_VALUES}*)"
    rf"|(?<![\w-])(?P<alone>{'|'.join(COMMANDS)})(?P<flags>{_VALUES}+))"
)
_FLAG = re.compile(r"(?<![\w-])--(?P<name>[a-z][\w-]+)(?:[ =](?P<value>[\w./:…-]*[\w/…]))?")
_FLAG_IN_CODE = re.compile(r"(?<![\w-])--(?P<name>[a-z][\w-]+)(?:[ =](?P<value>[^\s-]\S*(?: [^\s-]\S*)*))?")
_FIELD = re.compile(rf"(?<![\w.'\"-])(?P<name>[a-z]\w*[a-z]\w*)=(?P<value>{_VALUE})")
_METHOD = re.compile(r"(?<![\w.])(?P<of>trainer|model|tokenizer|dataset)\.(?!json\b)(?P<path>[a-z_]\w*(?:\.\w+)*)")
_CLASS = re.compile(
    r"(?<![\w.])(?P<name>[A-Z]\w*(?:Trainer|Config|Model|ForCausalLM|ForSeq2SeqLM))\b(?P<path>(?:\.\w+)*)"
)
# words that stand behind a flag and are no value of it
_PROSE = frozenset(
    "a and are as at before by for from gives has in is makes needs of on or resumes runs takes the to".split()  # noqa: SIM905
)


def commands(text: Text) -> list[list[str]]:
    """Commands of `trl-margins`, each as words from the subcommand on."""
    found = _COMMAND.finditer(text.text)
    return [[match["name"] or match["alone"], *(match["rest"] or match["flags"] or "").split()] for match in found]


def flags(text: Text) -> list[tuple[str, str | None]]:
    """Flags that are not behind a command, each with what stands behind it: its values, or in prose one or none."""
    alone, pattern = _COMMAND.sub("", text.text), _FLAG_IN_CODE if text.is_code else _FLAG
    found = [(match["name"].replace("-", "_"), match["value"]) for match in pattern.finditer(alone)]
    return [(name, None if value in _PROSE else value) for name, value in found]


def fields(text: Text) -> list[tuple[str, str]]:
    """`name=value`."""
    return [(match["name"], match["value"]) for match in _FIELD.finditer(text.text)]


def methods(text: Text) -> list[tuple[str, str]]:
    """(object, attributes of it)."""
    return [(match["of"], match["path"]) for match in _METHOD.finditer(text.text)]


def classes(text: Text) -> list[tuple[str, str]]:
    """(class, attributes of it)."""
    return [(match["name"], match["path"].removeprefix(".")) for match in _CLASS.finditer(text.text)]
