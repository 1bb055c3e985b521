"""How the pictures look: colors that color-blind readers can tell apart, sizes, panels and legends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .run_folder import Run

# Okabe and Ito's
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, INK = "#9A9A9A", "#222222"

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.")
LOOKS: Sequence[dict[str, Any]] = tuple(
    {"color": c, "marker": m} for c, m in zip((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), MARKERS, strict=True)
)
BEST = {"color": GREY, "linestyle": "none", "marker": "o", "markersize": 9, "fillstyle": "none"}  # in legends
TIERS, TIER_COLORS = ("lowest third of weights", "middle", "highest"), (VERMILLION, GREY, BLUE)

WIDTH = 9.6  # inches; a page shows one as 96 pixels

styled = matplotlib.style.context(Path(__file__).parent / "templates" / "pictures.mplstyle")  # a decorator


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Color, marker and dashes of each. Where curves coincide, the one below shows between the dashes of the other."""
    return {name: LOOKS[i % len(LOOKS)] | {"linestyle": DASHES[i % len(DASHES)]} for i, name in enumerate(names)}


def run_styles(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Those of the runs: the same in every picture, also where other runs are left out."""
    return line_styles(run.name for run in runs)


def label(name: str, width: int = 34) -> str:
    """A name as plain text: dollars start no formula, and no line is longer than a panel. It breaks after spaces,
    commas and slashes, or else between words, or else anywhere.
    """
    words, lines = [name], [""]
    for ends in (r"(?<=[,/ ])", r"(?<=[-=])", r"(?<=_)"):
        words = [part for word in words for part in (re.split(ends, word) if len(word) > width else [word])]
    for word in (whole[i : i + width] for whole in words for i in range(0, len(whole), width)):
        if len(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    text = "\n".join(line.strip() for line in lines).strip() or " "
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text  # legends skip what begins with _


def panels(n: int, height: float = 3.0, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """n panels in rows; a single one is narrower than the page."""
    columns = min(n, columns)
    rows = -(-n // columns)
    layout = ConstrainedLayoutEngine(wspace=0.03, hspace=0.03, w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.72 * WIDTH, height * rows), layout=layout)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


def legend_below(figure: Figure, handles: Iterable[Any], names: Iterable[str], columns: int = 3) -> None:
    """One legend for all panels, below them, of artists and of lines that look so. The figure grows by its height."""
    handles = [Line2D([], [], **each) if isinstance(each, Mapping) else each for each in handles]
    texts = [label(name) for name in names]
    columns = min(columns, len(texts))
    legend = figure.legend(handles, texts, loc="outside lower center", ncols=columns)
    while columns > 1 and legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        columns -= 1
        legend = figure.legend(handles, texts, loc="outside lower center", ncols=columns)
    lines = -(-len(texts) // columns) * max(text.count("\n") + 1 for text in texts)
    figure.set_figheight(figure.get_figheight() + 0.3 + 0.18 * lines)


def band(axes: Axes, x: np.ndarray, rows: np.ndarray, **line: Any) -> None:
    """A line with its band, at x [n] from rows [n, 3] of value, low, high."""
    (drawn,) = axes.plot(x, rows[:, 0], **line)
    axes.fill_between(x, rows[:, 1], rows[:, 2], color=drawn.get_color(), alpha=0.15, linewidth=0)


def over_steps(axes: Axes, runs: Sequence[Run], scale: Mapping[str, int] | None = None) -> None:
    """What is below a panel when its curves are drawn: steps, with pairs above where all runs have as many a step; or
    pairs, where `scale` says that the curves are over them.
    """
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(_locator())
    over_pairs = scale is not None and set(scale.values()) != {1}
    axes.set_xlabel("pairs (steps × pairs per step)" if over_pairs else "optimizer step")
    size, *others = {run.pairs_per_step for run in runs}
    if size and not others and not over_pairs:
        pairs = axes.secondary_xaxis("top", functions=(partial(np.multiply, size), partial(np.multiply, 1 / size)))
        pairs.set_xlabel(f"pairs ({size:,} per step)")
        pairs.xaxis.set_major_locator(_locator())


def _locator() -> MaxNLocator:
    return MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10])


def percent(share: float, _: float = 0) -> str:
    """As an axis formats it."""
    return f"{100 * share:.3g} %"


def signed(value: float, form: str = ".2f") -> str:
    """With a sign, and a minus sign as it is printed."""
    return f"{value:+{form}}".replace("-", "−")
