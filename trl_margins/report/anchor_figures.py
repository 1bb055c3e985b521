"""The pictures of what anchor gaps are made of: GAPO's figure 4, appendix F and proposition 5.2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import summaries
from .picture import Columns, Usable, from_pairs, source
from .run_folder import ANCHORS, Run
from .style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PURPLE,
    SKY,
    VERMILLION,
    band,
    label,
    legend_below,
    over_training,
    panels,
    percent,
    signed,
    step_size,
)

MOST_POINTS = 5000  # of a scatter
LEAST = 1e-3  # times the median gradient norm: what is less may be rounding error
TOP = (0.1, 0.2, 0.3)  # the shares of pairs whose overlap is drawn
NORM, ALIGNMENT, FIRST, CURVATURE = "gradient_norm", "alignment", "first_order", "curvature"


def _columns(*names: str) -> Columns:
    """These, and which pairs are flipped, where that is known."""

    def of_run(run: Run) -> Sequence[str]:
        flipped = run.anchors.get("is_flipped", np.empty(0))
        return [*names, "is_flipped"] if np.isfinite(flipped).any() else names

    return of_run


def _groups(of: Usable) -> dict[str, tuple[np.ndarray, str]]:
    """Name → which pairs and their color: clean and flipped ones, where both are known."""
    flipped = of.columns.get("is_flipped", np.zeros(of.size)) > 0.5
    if flipped.all() or not flipped.any():
        return {"pairs": (np.full(of.size, True), BLUE)}
    return {"clean": (~flipped, BLUE), "flipped": (flipped, VERMILLION)}


def _with_gradient(of: Usable) -> Usable:
    """Without pairs that have no gradient, such as those with twice the same completion."""
    rows = of[NORM] >= LEAST * np.median(of[NORM])
    columns = {name: column[rows] for name, column in of.columns.items()}
    return replace(of, columns=columns, logged=of.logged - int((~rows).sum()))


def _no_ranking(of: Usable) -> str | None:
    if (of[ALIGNMENT] == 1).all():
        return "each pair was measured along its own direction: every alignment is 1"
    if np.ptp(of[NORM]) == 0 or np.ptp(of[NORM] * of[ALIGNMENT]) == 0:
        return "all pairs have the same gradient norm or the same first order: there is nothing to rank"
    return None


@from_pairs(
    "anchor_ranking",
    "Do pairs rank as they would by their own directions?",
    _columns(NORM, ALIGNMENT),
    _no_ranking,
    file=ANCHORS,
)
def anchor_ranking(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """The shared direction against each pair's own: alignments, both first orders, overlap of the top pairs."""
    figure, axes = panels(3 * len(found), height=3.2, columns=3)
    said = []
    n_measured = sum(of.size for of in found)
    found, groups = list(map(_with_gradient, found)), _all_groups(found)
    n_without = n_measured - sum(of.size for of in found)
    for i, of in enumerate(found):
        left, middle, right = axes[3 * i : 3 * i + 3]
        result = summaries.agreement(of[NORM], of[ALIGNMENT], TOP)
        _histogram(left, of, result)
        own = float(of.run.config["anchor_radius"]) * of[NORM]
        for rows, color in _groups(of).values():
            shown = summaries.thinned(int(rows.sum()), MOST_POINTS)
            x, y = own[rows][shown], (own * of[ALIGNMENT])[rows][shown]
            middle.scatter(x, y, s=10, alpha=0.5, color=color, linewidths=0, rasterized=True)
        middle.axline((0, 0), slope=1, color=GREY, linewidth=1)
        middle.set(xlim=(0, None), xlabel="along its own direction: ρ‖∇Δ‖", ylabel="along the shared one: ρ‖∇Δ‖ cos φ")
        middle.set_title(f"first order, Spearman {result.spearman:.2f}")
        names = [percent(share) for share in TOP]
        bars = right.bar(names, list(result.overlap.values()), width=0.6, color=GREEN)
        right.bar_label(bars, [percent(height) for height in result.overlap.values()])
        right.hlines(
            TOP, np.arange(len(TOP)) - 0.4, np.arange(len(TOP)) + 0.4, color=INK, linewidth=1.2, linestyle="--"
        )
        right.set(ylim=(0, 1.08), xlabel="pairs with the largest first order", ylabel="the same in both rankings")
        right.set_title("overlap of the top pairs")
        right.yaxis.set_major_formatter(percent)
        right.grid(visible=False, axis="x")
        said.append(_ranked(of, result))
    points = [{"color": color, "marker": "o", "linestyle": "none"} for color in groups.values()]
    lines: dict[str, dict[str, Any]] = {
        "median of cos φ": {"color": INK, "linestyle": ":", "linewidth": 1.2},
        "cos φ = 1": {"color": GREY, "linewidth": 1.2},
        "of random rankings": {"color": INK, "linestyle": "--", "linewidth": 1.2},
    }
    legend_below(figure, [*points, *lines.values()], [*groups, *lines], columns=5)
    caption = (
        "An anchor is one step for many pairs, along the gradient of their mean gap; cos φ is the cosine of a pair's "
        f"own gradient with it. {' '.join(said)} Pairs of all recorded steps are in one ranking. "
        f"{source(found, f'{NORM} and {ALIGNMENT}')}"
    )
    if n_without:
        caption += f" Left out, as without a gradient: {n_without:,} below a thousandth of the median norm."
    return figure, caption


def _histogram(axes: Axes, of: Usable, result: summaries.Agreement) -> None:
    edges = np.histogram_bin_edges(of[ALIGNMENT], min(max(of.size // 8, 8), 25))
    for rows, color in _groups(of).values():
        heights = summaries.shares(of[ALIGNMENT][rows], edges)
        axes.stairs(heights, edges, color=color, fill=True, alpha=0.2)
        axes.stairs(heights, edges, color=color, linewidth=1.6)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.axvline(result.median, color=INK, linewidth=1.2, linestyle=":")
    axes.set(xlabel="alignment cos φ", ylabel="share of pairs")
    axes.set_title(f"{label(of.run.name, 28)}\ncos φ > 0: {percent(result.positive)}, median {result.median:.2f}")
    axes.yaxis.set_major_formatter(percent)


def _ranked(of: Usable, result: summaries.Agreement) -> str:
    overlap = ", ".join(f"{percent(same)} of the top {percent(top)}" for top, same in result.overlap.items())
    text = (
        f"In {of.run.name} the step lowers {percent(result.positive)} of the gaps to first order (cos φ > 0; median "
        f"{result.median:.3f}). Its ranking of the pairs agrees with that by their own directions with Spearman's "
        f"ρ = {result.spearman:.3f}, and shares {overlap}."
    )
    norm, alignment = result.spread_norm, result.spread_alignment
    if not np.isfinite([norm, alignment]).all():
        return text
    more = "gradient norms" if norm > alignment else "alignments"
    return (
        f"{text} The natural logarithm of ‖∇Δ‖ has a standard deviation of {norm:.2f}, that of cos φ (where it is "
        f"positive) one of {alignment:.2f}: {more} vary more."
    )


def _all_groups(found: Sequence[Usable]) -> dict[str, str]:
    """Name → color, of the groups of any run."""
    return {name: color for of in found for name, (_, color) in _groups(of).items()}


@from_pairs(
    "anchor_parts",
    "What anchor gaps are made of",
    _columns("step", "anchor_gap", NORM, ALIGNMENT, FIRST, CURVATURE),
    lambda of: None if np.ptp(of["anchor_gap"]) else "all pairs have the same anchor gap",
    file=ANCHORS,
)
def anchor_parts(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """Curvature against first order in the first and last recorded step; gaps, alignment and ranking over steps."""
    figure, axes = panels(3 * len(found), columns=3)
    said = []
    for i, of in enumerate(found):
        left, middle, right = axes[3 * i : 3 * i + 3]
        said.append(_scatter_parts(left, of))
        parts = summaries.phases(of.size, most=10, least=40)
        x = step_size(of.run)[of.run.name] * np.array([of["step"][part].mean() for part in parts])
        for rows, color in _groups(of).values():
            means = [summaries.mean(of["anchor_gap"][part][rows[part]]) for part in parts]
            band(middle, x, np.array(means), color=color, marker="o")
        middle.set(ylabel="mean anchor gap Γ")
        agreed = [summaries.agreement(of[NORM][part], of[ALIGNMENT][part], ()) for part in parts]
        right.plot(x, [each.median for each in agreed], color=PURPLE, marker="s", label="median of cos φ")
        right.plot(x, [each.spearman for each in agreed], color=GREEN, marker="^", label="Spearman ρ, both rankings")
        right.axhline(0, color=GREY, linewidth=1)
        right.set(ylim=(min(0, *right.get_ylim()), 1.02), ylabel="alignment, rank correlation")
        for panel in (middle, right):
            over_training(panel, of.run)
    groups = _all_groups(found)
    points = [{"color": color, "marker": "o", "linestyle": "none"} for color in (SKY, VERMILLION)]
    points += [{"color": color, "marker": "o"} for color in groups.values()]
    lines, names = axes[2].get_legend_handles_labels()
    legend_below(figure, [*points, *lines], ["first recorded step", "last", *groups, *names])
    caption = (
        "An anchor gap Γ is its first order ρ‖∇Δ‖ cos φ plus what the gap's curvature adds along the step "
        f"(proposition 5.2). {' '.join(said)} Over steps: up to ten parts with equally many pairs, 40 or more; bands "
        f"are 95 % intervals of the mean. {source(found, f'{FIRST}, {CURVATURE}, anchor_gap, {NORM} and {ALIGNMENT}')}"
    )
    return figure, caption


def _scatter_parts(axes: Axes, of: Usable) -> str:
    """Draws the first and the last recorded step, and says what their means are."""
    ends = dict.fromkeys((of["step"].min(), of["step"].max()))
    said = []
    for step, color in zip(ends, (SKY, VERMILLION), strict=False):
        rows = of["step"] == step
        first, curvature = of[FIRST][rows], of[CURVATURE][rows]
        shown = summaries.thinned(first.size, MOST_POINTS // 2)
        axes.scatter(first[shown], curvature[shown], s=10, alpha=0.6, color=color, linewidths=0, rasterized=True)
        means = signed(curvature.mean(), ".3g"), signed(first.mean(), ".3g")
        said.append("{} to a first order of {} in step {:g}".format(*means, step))
    axes.axhline(0, color=GREY, linewidth=1)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel="first order ρ‖∇Δ‖ cos φ", ylabel="curvature", title=label(of.run.name, 28))
    return f"In {of.run.name} curvature adds on average {', and '.join(said)}."
