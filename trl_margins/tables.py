"""Tables as plain text, for consoles and Markdown files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from .printable import printable


def aligned(rows: Iterable[Sequence[str]], heads: Sequence[str] = (), left: int = 1, indent: str = "") -> str:
    """Lines with aligned columns: the first `left` to the left, the others to the right.

    Args:
        rows: the cells.
        heads: the columns' names, if they have any.
        left: number of columns.
        indent: before each line.
    """
    sides = {"stralign": "right", "colalign": ["left"] * left}
    rows, heads = [list(map(_in_a_line, row)) for row in rows], list(map(_in_a_line, heads))
    text = tabulate(rows, heads, "plain", disable_numparse=True, preserve_whitespace=True, **sides)
    return "\n".join(indent + line.rstrip() for line in text.splitlines())


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that also reads well on a console: the first column to the left, the others to the right."""
    heads, *body = ([_in_a_line(str(cell)).replace("|", "\\|") for cell in row] for row in (heads, *rows))
    sides = ["left", *["right"] * (len(heads) - 1)]
    return tabulate(body, heads, "pipe", disable_numparse=True, colalign=sides)


def _in_a_line(cell: str) -> str:
    return printable(cell).replace("\n", "\\n")
