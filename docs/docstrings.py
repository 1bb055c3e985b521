"""Docstrings for the site: their tables become Markdown's, their LaTeX letters, so that no script is needed."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LETTERS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "Gamma": "Γ", "delta": "δ", "Delta": "Δ", "varepsilon": "ε",
    "theta": "θ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "nabla": "∇", "sum": "Σ",
    "lambda": "λ", "ge": "≥", "cdot": "·", "top": "⊤", "log": "log ", "cos": "cos ", "|": "‖", ",": " ", ";": " ",
}  # fmt: skip
_GROUP = r"(?:\{(?P<group>[^{}]*)\}|(?P<single>\w))"
_RETURNS = re.compile(r"^Returns:\n +", re.MULTILINE)
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
    """A docstring in Markdown.

    Raises:
        ValueError: a LaTeX command that has no letter in the table above.
    """
    text = re.sub(r"(?m)^( *)\.\. math:: (.+)$", lambda m: f"{m[1]}{_as_html(m[2])}", text)
    text = re.sub(r":math:`([^`]+)`", lambda m: _as_html(m[1]), text)
    return "\n".join(_with_tables(text.replace("``", "`").splitlines()))


def _as_html(latex: str) -> str:
    """LaTeX of one line, with the few commands that our docstrings use.

    >>> _as_html(r"\\gamma_0\\, n\\, p_i")
    '<i>γ<sub>0</sub> n p<sub>i</sub></i>'
    """
    text = latex.replace("<", "&lt;").replace(">", "&gt;").replace("-", "−")
    text = re.sub(r"\\frac" + _GROUP + _GROUP.replace("group", "below").replace("single", "one"), _fraction, text)

    def letter(match: re.Match[str]) -> str:
        if match[1] not in _LETTERS:
            raise ValueError(f"docs/docstrings.py has no letter for \\{match[1]} in {latex!r}: add it there")
        return _LETTERS[match[1]]

    text = re.sub(" +", " ", re.sub(r"\\([A-Za-z]+|[|,;])", letter, text))
    for mark, tag in (("_", "sub"), ("^", "sup")):
        text = re.sub(re.escape(mark) + _GROUP, lambda m, tag=tag: f"<{tag}>{m['group'] or m['single']}</{tag}>", text)
    return f"<i>{text.replace('{', '').replace('}', '')}</i>"


def _fraction(match: re.Match[str]) -> str:
    return f"{match['group'] or match['single']}/{match['below'] or match['one']} "


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
