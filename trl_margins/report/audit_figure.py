"""The histograms of a data set's audit."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data.audit import Audit, Distribution, SplitAudit

COLORS = ("#3b6fb6", "#c8732c")


def audit_figure(found: Audit) -> Figure:
    """Score gaps, completion lengths and evaluation factors: a row of panels for each split."""
    splits = {name: _panels(split) for name, split in found.splits.items()}
    titles = list(dict.fromkeys(title for row in splits.values() for title in row)) or ["no pairs"]
    figure = Figure(figsize=(4 * len(titles), 0.4 + 2.8 * len(splits)), layout="constrained")
    grid = figure.subplots(len(splits), len(titles), squeeze=False)
    for (name, row), axes in zip(splits.items(), grid, strict=True):
        for title, cell in zip(titles, axes, strict=True):
            cell.set_title(title, loc="left", fontsize=10)
            if title in row:
                _draw(cell, *row[title])
            else:
                cell.text(0.5, 0.5, "none", transform=cell.transAxes, ha="center", va="center", color="0.4")
                cell.set(xticks=[], yticks=[])
            cell.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(f"{name}: pairs" if len(splits) > 1 else "pairs")
    return figure


def _panels(split: SplitAudit) -> dict[str, tuple[str, Mapping[str, Distribution]]]:
    """Title → axis label and distributions with the same edges."""
    panels: dict[str, tuple[str, Mapping[str, Distribution]]] = {}
    scores, lengths, factors = split.scores, split.lengths, split.factors
    if scores is not None and scores.gap is not None:
        panels["Score gap"] = " − ".join(scores.columns), {"gap": scores.gap}
    if lengths is not None and lengths.chosen is not None and lengths.rejected is not None:
        panels["Completion length"] = lengths.unit, {"chosen": lengths.chosen, "rejected": lengths.rejected}
    if factors is not None and factors.values is not None:
        label = factors.column or f"{factors.metric} of {factors.values.n} pairs"
        panels["Evaluation factor"] = label, {"factor": factors.values}
    return panels


def _draw(axes: Axes, label: str, shown: Mapping[str, Distribution]) -> None:
    for (name, values), color in zip(shown.items(), COLORS, strict=False):
        edges, counts = values.histogram.edges, values.histogram.counts
        axes.stairs(counts, edges, color=color, alpha=0.3, fill=True)
        axes.stairs(counts, edges, color=color, linewidth=1.5, label=name)
    beyond = any(any(values.reaches_beyond) for values in shown.values())
    axes.set_xlabel(f"{label} (ends: and beyond)" if beyond else label)
    axes.margins(x=0.02)
    if edges[0] < 0:
        axes.axvline(0, color="0.3", linewidth=1)
    if len(shown) > 1:
        axes.legend(frameon=False)
