"""Text from data and configs inside Markdown: it is shown as it is, and does nothing."""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any

MOST_NAMES = 12  # of a list that is shown

# an underscore within a word has no meaning in Markdown
_SPECIAL = re.compile(r"[&<>`*\[\]\\|~$#{}@]|(?<![^\W_])_|_(?![^\W_])")


def one_line(value: Any) -> str:
    """A value as people write it, without line breaks and control characters."""
    if value is None:
        return "–"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple | set | frozenset):
        names = sorted(map(one_line, value)) if isinstance(value, set | frozenset) else list(map(one_line, value))
        more = f", … ({len(names)} in all)" if len(names) > MOST_NAMES else ""
        return ", ".join(names[:MOST_NAMES]) + more
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def inline(value: Any) -> str:
    """Part of a line. Characters that Markdown or HTML interpret become numeric entities."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", one_line(value))


def code(value: Any) -> str:
    """A code span, also in a table."""
    text = one_line(value)
    return f"`{text}`" if text and not set(text) & set("`|") else f"<code>{inline(text)}</code>"


def python_text(value: str) -> str:
    """A string in Python code."""
    return json.dumps(value, ensure_ascii=not value.isprintable())


def fenced(text: str, language: str = "") -> str:
    """A block of code that nothing in the text can end."""
    text = "".join(c for c in text.replace("\r\n", "\n") if c.isprintable() or c in "\n\t").strip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
