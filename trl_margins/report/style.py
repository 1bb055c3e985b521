"""How the pictures look, in one place: colours that colour-blind readers can tell apart, sizes, and panels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .run_folder import Run

# Okabe and Ito's
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, FAINT, INK = "#9A9A9A", "#E4E4E4", "#222222"

SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.")
LOOKS: Sequence[Mapping[str, Any]] = tuple({"color": c, "marker": m} for c, m in zip(SERIES, MARKERS, strict=True))

CHOSEN, REJECTED = BLUE, VERMILLION
CLEAN, FLIPPED = BLUE, VERMILLION
EARLY, LATE = SKY, VERMILLION
PAIRS, BEFORE, AFTER = GREY, SKY, BLUE
TIERS, TIER_COLOURS = ("lowest third of weights", "middle", "highest"), (VERMILLION, GREY, BLUE)

WIDTH = 9.6  # inches; a page shows one as 96 pixels

_RC: Mapping[str, Any] = MappingProxyType(
    {
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 10,
        "axes.labelcolor": INK,
        "text.color": INK,
        "axes.edgecolor": GREY,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.8,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
        "savefig.dpi": 144,
        "savefig.facecolor": "white",
        "svg.hashsalt": "trl-margins",  # the same picture, the same bytes
    }
)
styled = matplotlib.rc_context(dict(_RC))  # decorates what draws or saves


def run_styles(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each run: the same in every picture, whoever is left out of it."""
    return {run.name: dict(LOOKS[i % len(LOOKS)]) for i, run in enumerate(runs)}


def label(name: str, width: int = 34) -> str:
    """A name as text, whatever is in it: no formula where there are dollars, no line longer than a panel has room."""
    text = "\n".join(textwrap.wrap(name, width)) or " "
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text  # legends skip what begins with _


def panels(n: int, height: float = 3.0, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """n panels in rows; one alone is not as wide as the page."""
    columns = min(n, columns)
    rows = -(-n // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.72 * WIDTH, height * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.03, hspace=0.03, w_pad=0.06, h_pad=0.06)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(n)]
    return figure, axes


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int = 3) -> None:
    """One legend for all panels, below them; the figure grows by its height."""
    texts = [label(name) for name in names]
    columns = min(columns, len(texts))
    figure.legend(handles, texts, loc="outside lower center", ncols=columns)
    lines = -(-len(texts) // columns) * max(text.count("\n") + 1 for text in texts)
    figure.set_figheight(figure.get_figheight() + 0.3 + 0.18 * lines)


def band(axes: Axes, x: np.ndarray, rows: np.ndarray, **line: Any) -> Any:
    """A line with its band.

    Args:
        x: [n].
        rows: [n, 3] value, low, high.
    """
    (drawn,) = axes.plot(x, rows[:, 0], **line)
    axes.fill_between(x, rows[:, 1], rows[:, 2], color=drawn.get_color(), alpha=0.15, linewidth=0)
    return drawn
