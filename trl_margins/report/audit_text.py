"""A data set's audit as text for a console."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from ..data.audit import Audit, Distribution
from ..data.audit.counting import PairLengths
from ..data.audit.factor_margins import GAMMA_BETA_RATIO, FactorMargins
from ..data.audit.gradient_mass import BATCH, GradientMass
from ..printable import printable
from ..tables import aligned

BAR = 40  # characters of the longest bar
MAPPED = {"log": "log(1/EF)", "linear": "1 − EF", "square": "1 − EF²", "sqrt": "1 − √EF"}
NORMALIZED = {"none": "f", "scale": "scaled", "add": "added"}


def audit_text(found: Audit) -> str:
    """The whole audit, the warnings last."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    helpers = (_bars, _factor_table, _filled, _length_table, _margin_table, _mass_table, _share)
    environment.globals |= {each.__name__.removeprefix("_"): each for each in helpers} | {"ratio": GAMMA_BETA_RATIO}
    return printable(environment.get_template("audit.txt.jinja").render(audit=found))  # names come from the data


def _bars(values: Distribution) -> str:
    counts, labels = values.histogram.counts, filled_bins(values)
    width, lines = max(map(len, labels.values())), []
    for i, label in labels.items():
        bar = "█" * round(BAR * counts[i] / max(counts)) or ("▏" if counts[i] else "")
        lines.append(f"  {label:>{width}}  {bar:<{BAR}}  {_share(counts[i], values.n)}")
    return "\n".join(lines)


def filled_bins(values: Distribution) -> dict[int, str]:
    """Numbers and labels of the bins from the first to the last that holds a number."""
    edges = values.histogram.edges
    labels = [f"{low:g} – {high:g}" for low, high in pairwise(edges)]
    below, above = values.reaches_beyond
    if below:
        labels[0] = f"< {edges[1]:g}"
    if above:
        labels[-1] = f"≥ {edges[-2]:g}"
    filled = [i for i, count in enumerate(values.histogram.counts) if count]
    return {i: labels[i] for i in range(filled[0], filled[-1] + 1)}


def _mass_table(mass: GradientMass) -> str:
    heads = ["|score gap|", *(mass_names(mass).get(name, name) for name in mass.shares)]
    rows = [
        [label, *(f"{shares[i]:.1%}" if any(shares) else "–" for shares in mass.shares.values())]
        for i, label in filled_bins(mass.sizes).items()
    ]
    return aligned(rows, heads, left=0, indent="  ")


def _factor_table(compared: Sequence[FactorMargins]) -> str:
    heads = ["metric", "pairs", "mean", "25 %", "median", "75 %", "EF = 0", "EF = 1"]
    rows = [
        [
            *(of.metric, str(of.factors.n), f"{of.factors.mean:.3f}", *_quartiles(of.factors)),
            *(f"{part / of.factors.n:.1%}" for part in (of.n_zero, of.n_one)),
        ]
        for of in compared
    ]
    return aligned(rows, heads, indent="  ")


def _margin_table(compared: Sequence[FactorMargins]) -> str:
    """Quartiles of the margins: a line for each metric and mapping, three columns for each normalisation."""
    heads = ["metric", "f", *(cell for name in NORMALIZED.values() for cell in (f"{name}: 25 %", "median", "75 %"))]
    rows = [
        [of.metric if i == 0 else "", MAPPED[mapping], *(q for name in NORMALIZED for q in _quartiles(margins[name]))]
        for of in compared
        for i, (mapping, margins) in enumerate(of.margins.items())
    ]
    return aligned(rows, heads, left=2, indent="  ")


def _quartiles(values: Distribution) -> list[str]:
    return [f"{each:.3f}" for each in (values.lower_quartile, values.median, values.upper_quartile)]


def mass_names(mass: GradientMass) -> dict[str, str]:
    """How a transform's weights are called where its name does not say it."""
    names = {"linear": "δ", "quadratic": "δ²", "exponential": "e^δ − 1", "normalized": f"δ / mean of {BATCH}"}
    return names | {"hard": f"1[δ ≥ {mass.threshold:g}]"}


def _length_table(lengths: PairLengths, implicit: bool) -> str:
    rows = [[f"Lengths in {lengths.unit}", "mean", "median", "95 %", "max"]]
    for name in ("prompt", "chosen", "rejected"):
        d: Distribution = getattr(lengths, name)
        implied = " (implicit)" if name == "prompt" and implicit else ""
        cells = (f"{cell:.0f}" for cell in (d.mean, d.median, d.percentile_95, d.maximum))
        rows.append([f"  {name}{implied}", *cells])
    return aligned(rows)


def _filled(head: str, text: str) -> str:
    fill = partial(textwrap.fill, width=110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return fill(text, initial_indent=head)


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole and part else str(part)
