"""The histograms of a data set's audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#3b6fb6", "#c8732c")


@dataclass(frozen=True)
class Panel:
    """Histograms with the same n + 1 edges."""

    label: str  # of the axis
    edges: Sequence[float]
    counts: Mapping[str, Sequence[int]]  # name → n counts


def draw(splits: Mapping[str, Mapping[str, Panel]]) -> Figure:
    """A row for each split, a column for each title that a split has a panel of."""
    titles = list(dict.fromkeys(title for row in splits.values() for title in row)) or ["no pairs"]
    figure = Figure(figsize=(4 * len(titles), 0.4 + 2.8 * len(splits)), layout="constrained")
    grid = figure.subplots(len(splits), len(titles), squeeze=False)
    for (name, row), axes in zip(splits.items(), grid, strict=True):
        for title, cell in zip(titles, axes, strict=True):
            cell.set_title(title, loc="left", fontsize=10)
            if title in row:
                _draw(cell, row[title])
            else:
                cell.text(0.5, 0.5, "none", transform=cell.transAxes, ha="center", va="center", color="0.4")
                cell.set(xticks=[], yticks=[])
            cell.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(f"{name}: pairs" if len(splits) > 1 else "pairs")
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    for (name, counts), colour in zip(panel.counts.items(), COLOURS, strict=False):
        axes.stairs(counts, panel.edges, color=colour, alpha=0.3, fill=True)
        axes.stairs(counts, panel.edges, color=colour, linewidth=1.5, label=name)
    axes.set_xlabel(panel.label)
    axes.margins(x=0.02)
    if panel.edges[0] < 0:
        axes.axvline(0, color="0.3", linewidth=1)
    if len(panel.counts) > 1:
        axes.legend(frameon=False)
