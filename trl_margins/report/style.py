"""How pictures look: one palette for light and dark pages, for color-blind readers too; panels and legends."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.colors import to_hex, to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from .run_folder import Run

# at least 3 : 1 on white; the test measures it, and how far apart they are for color-blind readers
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#1a4fb0", "#e8551e", "#05664f", "#b76ba8", "#7a5200", "#2b90d9"
GREY, INK, PAPER = "#767676", "#222222", "#ffffff"
_GRID = "#e4e4e4"

# each color on a dark page, with the same contrasts
DARK = {
    **dict(zip((BLUE, VERMILLION, GREEN), ("#5f8af5", "#e8644c", "#35d6a0"), strict=True)),
    **dict(zip((PURPLE, ORANGE, SKY), ("#e59aee", "#f5c84b", "#bfebfa"), strict=True)),
    **{GREY: "#969ca6", INK: "#e6e6e6", PAPER: "#1e2129", _GRID: "#383d49"},
}

# the same in every picture of report, card and documentation; others have what is left
METHOD_COLORS = {
    "gappo": BLUE,
    "gap-aware": VERMILLION,
    "gamma-po": GREEN,
    "geometric-anchor": PURPLE,
    "amapo": ORANGE,
    "simpo": GREY,
}

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.")
LOOKS: Sequence[dict[str, Any]] = tuple(
    {"color": c, "marker": m} for c, m in zip((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), MARKERS, strict=True)
)
METHOD_LOOKS: Mapping[str | None, dict[str, Any]] = {
    name: next((look for look in LOOKS if look["color"] == color), {"color": color, "marker": "X"})
    for name, color in METHOD_COLORS.items()
}
BEST = {"color": GREY, "linestyle": "none", "marker": "o", "markersize": 9, "fillstyle": "none"}  # in legends
TIERS, TIER_COLORS = ("lowest third of weights", "middle", "highest"), (VERMILLION, GREY, BLUE)

WIDTH = 9.6  # inches; a page shows one as 96 pixels

STYLE = Path(__file__).parent / "templates" / "pictures.mplstyle"
styled = matplotlib.style.context(STYLE)  # a decorator


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Color, marker and dashes of each. Where curves coincide, the one below shows between the dashes of the other."""
    return {name: LOOKS[i % len(LOOKS)] | {"linestyle": DASHES[i % len(DASHES)]} for i, name in enumerate(names)}


def run_styles(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Those of the runs: the same in every picture, also where other runs are left out.

    The first run of a method has the method's color, where it has one.
    """
    methods = [run.info.get("method") for run in runs]
    looks = {run.name: METHOD_LOOKS.get(method) for run, method in zip(runs, methods, strict=True)}
    for i, run in enumerate(runs):
        if methods[i] in methods[:i]:
            looks[run.name] = None
    free = [look for look in LOOKS if look not in looks.values()] or list(LOOKS)
    others = iter(range(len(runs)))
    return {
        name: (look or free[next(others) % len(free)]) | {"linestyle": DASHES[i % len(DASHES)]}
        for i, (name, look) in enumerate(looks.items())
    }


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


def step_size(*runs: Run) -> dict[str, int]:
    """What a step of each run is on the axis: its pairs, or 1 where a run does not say how many they are."""
    sizes = {run.name: run.pairs_per_step or 0 for run in runs}
    return sizes if all(sizes.values()) else dict.fromkeys(sizes, 1)


def over_training(axes: Axes, *runs: Run) -> None:
    """What is below a panel when its curves are drawn: pairs, with steps above where all runs have as many in a step.
    Runs that do not say how many they are, are over steps.
    """
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(_locator())
    if not all(run.pairs_per_step for run in runs):
        axes.set_xlabel("optimizer step")
        return
    axes.set_xlabel("pairs trained")
    size, *others = {*step_size(*runs).values()}
    if not others:
        steps = axes.secondary_xaxis("top", functions=(partial(np.multiply, 1 / size), partial(np.multiply, size)))
        steps.set_xlabel(f"optimizer step ({size:,} {'pair' if size == 1 else 'pairs'} each)")
        steps.xaxis.set_major_locator(_locator())


def _locator() -> MaxNLocator:
    return MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10])


def percent(share: float, _: float = 0) -> str:
    """As an axis formats it."""
    return f"{100 * share:.3g} %"


def signed(value: float, form: str = ".2f") -> str:
    """With a sign, and a minus sign as it is printed."""
    return f"{value:+{form}}".replace("-", "−")


@styled
def render(figure: Figure, image_format: str, dark: bool = False) -> bytes:
    """The image of a figure. The same figure gives the same bytes."""
    figure.draw_without_rendering()  # makes the ticks, which have colors too
    figure.set_layout_engine("none")  # it stays where it is: finding the places takes longer than drawing
    buffer = io.BytesIO()
    metadata = {"Date": None} if image_format == "svg" else None
    if dark:
        _recolor(figure, DARK)
    try:
        figure.savefig(buffer, format=image_format, metadata=metadata, facecolor=DARK[PAPER] if dark else PAPER)
    finally:
        if dark:
            _recolor(figure, {after: before for before, after in DARK.items()})
    return buffer.getvalue()


def write_both(figure: Figure, file: Path) -> None:
    """`name-light.svg` and `name-dark.svg` for a file `name`, as the documentation shows them."""
    for scheme in ("light", "dark"):
        file.with_name(f"{file.name}-{scheme}.svg").write_bytes(render(figure, "svg", dark=scheme == "dark"))


def _recolor(figure: Figure, colors: Mapping[str, str]) -> None:
    """Every artist's colors, where they are among these; how transparent they are stays."""
    for artist in figure.findobj(lambda each: isinstance(each, Text | Line2D | Patch | Collection)):
        for kind in ("color", "markerfacecolor", "markeredgecolor", "facecolor", "edgecolor"):
            before = _color(artist, kind)
            if before is not None and before.size:
                after = [(*to_rgb(colors.get(to_hex(each), to_hex(each))), each[3]) for each in before]
                getattr(artist, f"set_{kind}")(after if isinstance(artist, Collection) else after[0])


def _color(artist: Artist, kind: str) -> np.ndarray | None:
    """[n, 4] what an artist of this kind has; None where it has none, or it is another's."""
    has_color, has_faces = isinstance(artist, Text | Line2D), isinstance(artist, Patch | Collection)
    if (kind == "color" and not has_color) or (kind in ("facecolor", "edgecolor") and not has_faces):
        return None
    get = getattr(artist, f"get_{kind}", None)
    return None if get is None else to_rgba_array(get())
