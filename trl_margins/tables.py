"""Tables as plain text, for consoles and Markdown files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def aligned(rows: Iterable[Sequence[str]], right: Sequence[bool], heads: Sequence[str] = ()) -> list[str]:
    """Lines with aligned columns.

    Args:
        rows: the cells.
        right: for each column, whether it is aligned to the right.
        heads: the columns' names, if they have any.
    """
    sides = ["right" if each else "left" for each in right]
    text = tabulate(list(rows), heads, "plain", disable_numparse=True, colalign=sides, preserve_whitespace=True)
    return [line.rstrip() for line in text.splitlines()]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that also reads well on a console: the first column to the left, the others to the right."""
    heads, *body = ([str(cell).replace("|", "\\|") for cell in row] for row in (heads, *rows))
    sides = ["left", *["right"] * (len(heads) - 1)]
    return tabulate(body, heads, "pipe", disable_numparse=True, colalign=sides)
