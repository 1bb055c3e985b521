"""Tables as plain text, for consoles and Markdown files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def aligned(rows: Iterable[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Lines with aligned columns.

    Args:
        rows: the cells.
        right: for each column, whether it is aligned to the right.
    """
    table = Table.grid(padding=(0, 2))
    for each in right:
        table.add_column(justify="right" if each else "left")
    return _lines(table, rows)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that also reads well on a console: the first column to the left, the others to the right."""
    heads, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (heads, *rows))
    table = Table(box=box.MARKDOWN)
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if i else "left", min_width=3)
    _, head, rule, *body = _lines(table, rows)
    first, rest = rule[1:].split("|", 1)
    return "\n".join([head, f"|{first}|{rest.replace('-|', ':|')}", *body[:-1]])


def _lines(table: Table, rows: Iterable[Sequence[str]]) -> list[str]:
    for row in rows:
        table.add_row(*map(Text, row))
    # as wide as the table needs; no color codes whatever the terminal is
    console = Console(file=io.StringIO(), width=100_000, color_system=None)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]
