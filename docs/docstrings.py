"""Docstrings for the site: their tables become Markdown's, their formulas the site's."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_RETURNS = re.compile(r"^Returns:\n +", re.MULTILINE)
_DISPLAYED = re.compile(r"^( *)\.\. math::((?: .+\n?|\n(?:\1    .+(?:\n|$))+))", re.MULTILINE)
_RULE = re.compile(r"^=+(?: +=+)+$")


class Readable(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if not obj.docstring or not obj.path.startswith("trl_margins"):
            return
        text = readable(obj.docstring.value)
        if isinstance(obj, griffe.Function) and obj.returns is not None:
            # without a type before it, the parser would take what stands before a first colon for one
            text = _RETURNS.sub(lambda match: f"{match[0]}{obj.returns}: ", text)
        obj.docstring.value = text


def readable(text: str) -> str:
    """A docstring in Markdown, with its formulas as pymdownx.arithmatex reads them."""
    text = _DISPLAYED.sub(lambda match: f"{match[1]}$$\n{_upright(textwrap.dedent(match[2]).strip())}\n$$\n", text)
    text = re.sub(r":math:`([^`]+)`", lambda match: f"${_upright(match[1])}$", text)
    return "\n".join(_with_tables(text.replace("``", "`").splitlines()))


def _upright(latex: str) -> str:
    """Words such as `KL`, which the code has as they are: in LaTeX they would be products of letters."""
    return re.sub(r"(?<![\\A-Za-z])[A-Za-z]{2,}", r"\\text{\g<0>}", latex)


def _with_tables(lines: list[str]) -> list[str]:
    """Lines with reStructuredText's simple tables (rule, head, rule, rows, rule; or without a head) in Markdown's."""
    out: list[str] = []
    rules: list[int] = []  # of the table that has begun
    for number, line in enumerate(lines):
        if _RULE.match(line.strip()):
            rules.append(number)
            if number + 1 == len(lines) or not lines[number + 1].strip():
                out += _table(lines, rules)
                rules = []
        elif not rules:
            out.append(line)
    return out


def _table(lines: list[str], rules: list[int]) -> list[str]:
    top, *_, bottom = rules
    starts = [match.start() for match in re.finditer("=+", lines[top])]
    spans = list(zip(starts, [*starts[1:], None], strict=True))
    head = _row(lines[top + 1] if len(rules) == 3 else "", spans)
    rows = [_row(line, spans) for line in lines[rules[-2] + 1 : bottom]]
    return [head, "|" + " --- |" * len(spans), *rows]


def _row(line: str, spans: list[tuple[int, int | None]]) -> str:
    cells = (line[start:end].strip().replace("|", r"\|") for start, end in spans)
    return "| " + " | ".join(cells) + " |"
