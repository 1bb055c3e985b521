"""The pictures of a data set's audit: its histograms, and what the papers' methods would make of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..data.audit import Audit, Distribution, SplitAudit
from ..data.audit.factor_margins import GAMMA_BETA_RATIO, FactorMargins
from ..data.audit.gradient_mass import GradientMass
from ..disk import written
from ..terms.evaluation_factor import FLOOR
from .audit_text import MAPPED, NORMALIZED, filled_bins, mass_names
from .picture import Picture
from .style import BLUE, GREY, INK, LOOKS, ORANGE, VERMILLION, WIDTH, label, legend_below, panels, percent, styled


@styled
def write_figures(found: Audit, file: Path) -> dict[Path, str]:
    """The histograms to the file, and beside it, with the names of the pictures in theirs, the other pictures. Returns
    their captions.
    """
    pictures = {file: Picture("audit", "Audit of a preference set", audit_figure(found), _ABOUT)}
    pictures |= {file.with_stem(f"{file.stem}-{picture.name}"): picture for picture in _pictures(found)}
    for path, picture in pictures.items():
        assert picture.figure is not None
        about = {"Title": picture.title, "Description": picture.caption}
        date = {"Date": None} if path.suffix == ".svg" else {}
        with written(path) as place:
            picture.figure.savefig(place, metadata=about | date)
    return {path: picture.caption for path, picture in pictures.items()}


FENCE = 3.0  # times the width of the middle half of the numbers
_ABOUT = "Histograms of score gaps, completion lengths and evaluation factors, a row for each split."


def _pictures(found: Audit) -> Iterator[Picture]:
    for name, split in found.splits.items():
        suffix = f"-{name}" if len(found.splits) > 1 else ""
        if split.gradient_mass is not None:
            yield mass_picture(split.gradient_mass, suffix)
        if split.factor_margins:
            yield factors_picture(split.factor_margins, suffix)


@styled
def audit_figure(found: Audit) -> Figure:
    """Score gaps, completion lengths and evaluation factors: a row of panels for each split."""
    splits = {name: _panels(split) for name, split in found.splits.items()}
    titles = list(dict.fromkeys(title for row in splits.values() for title in row)) or ["no pairs"]
    figure = Figure(figsize=(4 * len(titles), 0.4 + 2.8 * len(splits)), layout="constrained")
    grid = figure.subplots(len(splits), len(titles), squeeze=False)
    for (name, row), axes in zip(splits.items(), grid, strict=True):
        for title, cell in zip(titles, axes, strict=True):
            cell.set_title(title)
            if title in row:
                _draw(cell, *row[title])
            else:
                cell.text(0.5, 0.5, "none", transform=cell.transAxes, ha="center", va="center", color="0.4")
                cell.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label(f"{name}: pairs") if len(splits) > 1 else "pairs")
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
    for (name, values), color in zip(shown.items(), (BLUE, VERMILLION), strict=False):
        edges, counts = values.histogram.edges, values.histogram.counts
        axes.stairs(counts, edges, color=color, alpha=0.3, fill=True)
        axes.stairs(counts, edges, color=color, linewidth=1.5, label=name)
    beyond = any(any(values.reaches_beyond) for values in shown.values())
    axes.set_xlabel(f"{label} (ends: and beyond)" if beyond else label)
    axes.margins(x=0.02)
    if edges[0] < 0:
        axes.axvline(0, color="0.3", linewidth=1)
    if len(shown) > 1:
        axes.legend()


@styled
def mass_picture(mass: GradientMass, suffix: str = "") -> Picture:
    """GapPO's figures 1 and 2: the pairs beside its weights, and its weights beside the other transforms."""
    figure, (left, right) = panels(2, height=3.2)
    names = {"pairs": "pairs (w = 1)"} | mass_names(mass)
    rows = filled_bins(mass.sizes)
    at = np.arange(len(rows))
    for i, (name, color) in enumerate({"pairs": GREY, "linear": ORANGE}.items()):
        left.bar(at + 0.4 * (i - 0.5), [mass.shares[name][row] for row in rows], 0.38, color=color)
    looks = dict(zip(mass.shares, ({"color": GREY, "marker": "X"}, *_TRANSFORMS), strict=True))
    without = [names[name] for name, shares in mass.shares.items() if not any(shares)]
    for name, shares in mass.shares.items():
        if any(shares):
            right.plot(at, [shares[row] for row in rows], label=names[name], **looks[name])
    for panel, title in ((left, "GapPO's weights"), (right, "all transforms")):
        panel.set_xticks(at, list(rows.values()), rotation=30, ha="right", rotation_mode="anchor")
        panel.set(title=title, xlabel="|score gap| δ", ylabel="share of the total", ylim=(0, None))
        panel.yaxis.set_major_formatter(percent)
        panel.grid(visible=False, axis="x")
    legend_below(figure, *right.get_legend_handles_labels(), columns=6)
    caption = (
        "How the weights alone divide the gradient over the score gaps, all slopes taken as equal (GapPO, figures 1 "
        f"and 2); each series adds up to 100 %. From the score gaps of {mass.sizes.n:,} pairs."
    )
    if without:
        caption += f" No pair has a weight under {', '.join(without)}."
    return Picture(f"gradient-mass{suffix}", "Gradient mass by score gap", figure, caption)


_TRANSFORMS = ({**LOOKS[4]}, {**LOOKS[5], "linestyle": "--"}, LOOKS[0], LOOKS[1], {**LOOKS[2], "linestyle": ":"})


@styled
def factors_picture(compared: Sequence[FactorMargins], suffix: str = "") -> Picture:
    """GaPO's figure 2 for all metrics at once: EF, f(EF), and the margins under both normalisations."""
    mappings, normalizations = list(MAPPED), list(NORMALIZED)
    height = 0.75 + 0.26 * len(compared)
    figure = Figure(figsize=(1.25 * WIDTH, height * (1 + len(normalizations))), layout="constrained")
    grid = figure.add_gridspec(1 + len(normalizations), len(mappings))
    first = figure.add_subplot(grid[0, :2])
    _ridges(first, [(of.metric, of.factors) for of in compared])
    first.set(title="evaluation factor EF (1: the same)", xlim=(0, 1), xlabel="EF")
    zeros = [f"{of.metric}: {percent(of.n_zero / of.factors.n)}" for of in compared if of.n_zero]
    handles = [
        Patch(color=BLUE, alpha=0.45),
        Line2D([], [], color=INK, linewidth=1.5, linestyle="none", marker="|", markersize=12, markeredgewidth=1.5),
        Line2D([], [], color=GREY, linewidth=1.2, linestyle="--"),
        *([Patch(alpha=0)] if zeros else []),
    ]
    texts = ["pairs, each histogram of the same height", "median", f"target margin, γ/β = {GAMMA_BETA_RATIO:g}"]
    texts += [f"EF = 0 counts as {FLOOR:g} in f: the bars at the right edge\n({', '.join(zeros)})"] if zeros else []
    figure.legend(handles, texts, loc="upper right")
    for row, normalization in enumerate(normalizations, 1):
        for column, mapping in enumerate(mappings):
            panel = figure.add_subplot(grid[row, column])
            _ridges(panel, [(of.metric, of.margins[mapping][normalization]) for of in compared], named=column == 0)
            f = MAPPED[mapping]
            titles = {"none": f, "scale": f"scaled: γ f / mean f\nf = {f}", "add": f"added: f − mean f + γ\nf = {f}"}
            panel.set_title(titles[normalization])
            panel.set_xlabel("f(EF)" if normalization == "none" else "margin / β")
            if normalization != "none":
                panel.axvline(GAMMA_BETA_RATIO, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
    caption = (
        "Histograms of the evaluation factors, of f(EF), and of both normalised margins, in units of β and all of the "
        "same height. Single pairs far from the middle half are beyond the axes. A tick marks the median, a dashed "
        f"line γ/β = {GAMMA_BETA_RATIO:g} (GaPO, figure 2 and table 4). Without normalisation the margin is f(EF). "
        f"An EF below {FLOOR:g} counts as {FLOOR:g} in f, so that such pairs have the largest margin. "
        "From " + ", ".join(f"{of.factors.n:,} pairs ({of.metric})" for of in compared) + "."
    )
    return Picture(f"evaluation-factors{suffix}", "Evaluation factors and the margins from them", figure, caption)


def _ridges(panel: Axes, rows: Sequence[tuple[str, Distribution]], named: bool = True) -> None:
    """Histograms below each other, each with its median."""
    for i, (_, values) in enumerate(rows):
        heights = 0.8 * np.array(values.histogram.counts) / max(values.histogram.counts) - i
        panel.stairs(heights, values.histogram.edges, baseline=-i, fill=True, color=BLUE, alpha=0.45)
        low, high = values.histogram.edges[0], values.histogram.edges[-1]
        panel.vlines(np.clip(values.median, low, high), -i, 0.8 - i, color=INK, linewidth=1.5)
    texts = [label(name, 20) if named else "" for name, _ in rows]
    panel.set_yticks([-i for i in range(len(rows))], texts, va="bottom")
    lows, highs = zip(*(_reach(values) for _, values in rows), strict=True)
    if min(lows) < max(highs):
        panel.set_xlim(min(lows), max(highs))
    panel.set_ylim(0.9 - len(rows), 0.95)
    panel.grid(visible=False, axis="y")


def _reach(values: Distribution) -> tuple[float, float]:
    """The ends of the histogram, but no further from the middle half than three times its width."""
    edges, low, high = values.histogram.edges, values.lower_quartile, values.upper_quartile
    return max(edges[0], low - FENCE * (high - low)), min(edges[-1], high + FENCE * (high - low))
