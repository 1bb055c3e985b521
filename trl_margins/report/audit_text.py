"""A data set's audit as text for a console."""

from __future__ import annotations

import textwrap
from functools import partial
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from ..data.audit import Audit, Distribution
from ..data.audit.counting import PairLengths
from ..tables import aligned

BAR = 40  # characters of the longest bar


def audit_text(found: Audit) -> str:
    """The whole audit, the warnings last."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"bars": _bars, "filled": _filled, "length_table": _length_table, "share": _share}
    text = environment.get_template("audit.txt.jinja").render(audit=found)
    # names come from the data, and a console obeys escape sequences
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _bars(values: Distribution) -> str:
    edges, counts = values.histogram.edges, values.histogram.counts
    labels = [f"{low:g} – {high:g}" for low, high in pairwise(edges)]
    below, above = values.reaches_beyond
    if below:
        labels[0] = f"< {edges[1]:g}"
    if above:
        labels[-1] = f"≥ {edges[-2]:g}"
    bars = ["█" * round(BAR * count / max(counts)) or ("▏" if count else "") for count in counts]
    filled = [i for i, count in enumerate(counts) if count]
    rows = [(labels[i], f"{bars[i]:<{BAR}}", _share(counts[i], values.n)) for i in range(filled[0], filled[-1] + 1)]
    return textwrap.indent("\n".join(aligned(rows, right=(True, False, False))), "  ")


def _length_table(lengths: PairLengths, implicit: bool) -> str:
    rows = [[f"Lengths in {lengths.unit}", "mean", "median", "95 %", "max"]]
    for name in ("prompt", "chosen", "rejected"):
        d: Distribution = getattr(lengths, name)
        implied = " (implicit)" if name == "prompt" and implicit else ""
        cells = (f"{cell:.0f}" for cell in (d.mean, d.median, d.percentile_95, d.maximum))
        rows.append([f"  {name}{implied}", *cells])
    return "\n".join(aligned(rows, right=(False, True, True, True, True)))


def _filled(head: str, text: str) -> str:
    fill = partial(textwrap.fill, width=110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return fill(text, initial_indent=head)


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole and part else str(part)
