"""The pictures of reward gaps and margins: γ-PO's figures 2 and 5, and the label smoothing that margins amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.label_smoothing import implied_label_smoothing
from . import summaries
from .anchor_figures import MOST_POINTS
from .picture import Usable, from_pairs, source, span
from .run_folder import Run
from .style import GREY, INK, SKY, VERMILLION, label, legend_below, panels, percent, signed

BOUND = 1.0  # of the rates that are drawn: near m = 0 they have none
FIFTHS = 5


def shared_target(run: Run) -> float | None:
    """γ0 in reward units: the target margin of the run's settings, where its margins are made from it or around it.

    It is 0 where the margins are those of γ-PO less γ0. None where the margins have none, or are not known here.
    """
    from ..registry import term_class

    gamma = run.info.get("gamma", run.config.get("simpo_gamma"))
    names = str(run.info.get("margin") or "").replace(",", " ").split()
    try:
        terms = [term_class("margin", name) for name in names]
    except ValueError:  # of a package that is not installed here
        return None
    if any(term.holds_target for term in terms) and not any(term.takes_target() for term in terms):
        return None
    if "gamma-po" in names and run.config.get("gamma_po_centered"):
        return 0.0
    return None if gamma is None else float(gamma)


def _one_margin(of: Usable) -> str | None:
    margin = of["margin"]
    if np.ptp(margin) > 0:
        return None
    term = "no margin term" if of.run.info.get("margin") is None else f"margin term {of.run.info['margin']!r}"
    return f"all pairs have the same margin, {margin[0]:g} ({term})"


@from_pairs("margins", "Margin against reward gap", ("reward_gap", "margin"), _one_margin)
def margins(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """Margin against reward gap, in the first and in the last third of training, and the target that pairs share."""
    figure, axes = panels(len(found), height=3.3)
    diagonal: dict[str, Any] = {"color": GREY, "linewidth": 1}
    dashed: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": "--"}
    there, targets, lines, outside = [], {}, {}, []
    for panel, of in zip(axes, found, strict=True):
        there.append(_scatter(panel, of, of["reward_gap"], of["margin"]))
        if (target := shared_target(of.run)) is not None:
            targets[of.run.name] = target
            lines["target margin γ₀"] = dashed
            panel.axhline(target, zorder=3, **dashed)
        x, y = panel.get_xlim(), panel.get_ylim()
        ends = max(x[0], y[0]), min(x[1], y[1])
        if ends[0] < ends[1]:  # the line is in range
            lines["margin = reward gap"] = diagonal
            panel.plot(ends, ends, zorder=3, **diagonal)
        else:
            outside.append(of.run.name)
        panel.set(xlim=x, ylim=y, ylabel="margin (reward units)")
    _legend(figure, lines)
    caption = "One point per trained pair. Right of the grey line the reward gap of a pair is larger than its margin. "
    if outside:
        caption += f"In {', '.join(outside)} all points are on one side of that line, and it is outside the axes. "
    if targets:
        each = ", ".join(f"{target:g} in {name}" for name, target in targets.items())
        caption += f"The dashed line is the target margin γ₀ of the run's settings: {each}. "
    return figure, caption + source(found, "reward_gap and margin") + _thinned(there)


SMOOTHING = ("reward_gap", "margin", "slope")  # what the implied label smoothing is made from


def no_smoothing(of: Usable) -> str | None:
    """Why Theorem 3.1 says nothing about a run."""
    if (reason := _one_margin(of)) is not None:
        return reason
    if shared_target(of.run) is None:
        return f"margin term {of.run.info.get('margin')!r} has no target margin γ₀ that pairs share"
    if not of["reward_gap"].any():
        return "all reward gaps are 0, where the theorem has no ε"
    expected = np.exp(-np.logaddexp(0, of["reward_gap"] - of["margin"]))  # σ(margin − m), without overflow
    if not np.allclose(of["slope"], expected, atol=1e-3):
        return "its slopes are not σ(margin − m): the theorem is about the loss −log σ(m − margin)"
    return None


def smoothing_of(of: Usable) -> tuple[float, np.ndarray]:
    """γ0, and [pairs] γ-PO's ε; NaN where the reward gap is 0."""
    target = shared_target(of.run)
    assert target is not None  # else `no_smoothing` objects
    return target, implied_label_smoothing(of["reward_gap"], of["margin"], target)


@from_pairs("label_smoothing", "Label smoothing that the margins amount to", SMOOTHING, no_smoothing)
def label_smoothing(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """γ-PO's implied ε against reward gap, with medians of pairs that are ranked wrongly and rightly."""
    figure, axes = panels(len(found), height=3.3)
    median: dict[str, Any] = {"color": INK, "marker": "s", "zorder": 3}
    edge = median | {"linestyle": "none", "fillstyle": "none", "markersize": 7}
    lines = {"median of a fifth of the pairs on one side of 0": median}
    there, beyond = [], []
    for panel, of in zip(axes, found, strict=True):
        gap, (_, rate) = of["reward_gap"], smoothing_of(of)
        there.append(_scatter(panel, of, gap, rate))
        beyond.append(int((~(np.abs(rate) <= BOUND)).sum()))
        middles = []  # of both sides, [fifths, 2] gap and rate
        for side in (gap < 0, gap > 0):  # at 0 the rate has a pole
            rows = np.flatnonzero(side)[np.argsort(gap[side], kind="stable")]
            parts = [part for part in np.array_split(rows, FIFTHS) if part.size]
            middles.append(np.reshape([(np.median(gap[i]), np.median(rate[i])) for i in parts], (-1, 2)))
        panel.axhline(0, color=GREY, linewidth=1)
        inside = np.abs(rate[np.abs(rate) <= BOUND])
        medians = np.abs(np.concatenate(middles)[:, 1])
        reach = max([float(np.quantile(inside, 0.99)) if inside.size else BOUND, *medians[medians <= BOUND], 1e-3])
        reach *= 1.1
        for x, y in (middle.T for middle in middles):
            panel.plot(x, np.where(np.abs(y) <= BOUND, y, np.nan), **median)
            for sign, marker in ((1, "^"), (-1, "v")):
                if (far := sign * y > BOUND).any():
                    lines["median beyond the axis"] = edge | {"marker": "^"}
                    panel.plot(x[far], np.full(far.sum(), 0.96 * sign * reach), **edge | {"marker": marker})
        panel.set(ylim=(-reach, reach), ylabel="implied label smoothing ε")
    _legend(figure, lines)
    caption = (
        "With the target margin γ₀ and labels smoothed by ε, a pair has the loss that its own margin gives it, to "
        "first order in the difference of the margins (γ-PO, Theorem 3.1). Below 0 it is no rate of smoothing: the "
        "loss is smaller than with a hard label. "
        f"{source(found, 'reward_gap and margin')}{_thinned(there)}"
    )
    if any(beyond):
        caption += f" The axis leaves out single pairs; beyond ±{BOUND:g}, or without ε at m = 0, are {span(beyond)}."
    return figure, caption


@from_pairs(
    "reward_gaps",
    "Reward gaps",
    ("reward_gap",),
    lambda of: None if np.ptp(of["reward_gap"]) > 0 else "all pairs have the same reward gap",
)
def reward_gaps(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """How the reward gaps are distributed, in the first and in the last third of training: whole, and near 0."""
    figure, (whole, near) = panels(2, height=1.6 + 0.9 * len(found))
    gaps = [of["reward_gap"] for of in found]
    reach = max(float(np.median(np.abs(gap))) for gap in gaps)
    said = []
    for i, (of, gap) in enumerate(zip(found, gaps, strict=True)):
        for (third, color), above in zip(_thirds(of), (True, False), strict=True):
            for panel, shown in ((whole, gap[third]), (near, gap[third][np.abs(gap[third]) <= reach])):
                _half_violin(panel, shown, -i, above, color)
        last = gap[_thirds(of)[1][0]]
        middle = signed(np.median(last), ".3g")
        wrong, close = percent((last <= 0).mean()), percent((np.abs(last) <= reach).mean())
        said.append(
            f"In the last third of {of.run.name} the median is {middle}, {wrong} are not above "
            f"0, and {close} lie within ±{reach:.3g}."
        )
    for panel, title in ((whole, "all pairs"), (near, f"within ±{reach:.3g}")):
        panel.axvline(0, color=GREY, linewidth=1)
        panel.set(title=title, xlabel="reward gap m (reward units, β inside)", ylim=(0.4 - len(found), 0.6))
        panel.set_yticks([-i for i in range(len(found))], [label(of.run.name, 16) for of in found])
        panel.grid(visible=False, axis="y")
    near.set_xlim(-reach, reach)
    _legend(figure, {"median": {"color": INK, "linewidth": 1.8}})
    caption = (
        "Densities of the reward gaps that the trained pairs had when they were trained, all of the same height. "
        "Pairs near 0 are ambiguous to the model (γ-PO, figure 2). "
        f"{' '.join(said)} {source(found, 'reward_gap')}"
    )
    return figure, caption


def _half_violin(panel: Axes, values: np.ndarray, at: float, above: bool, color: str) -> None:
    """Above or below a line, with the median; nothing where the values have no density."""
    if not values.size or np.ptp(values) == 0:
        return
    side: Literal["high", "low"] = "high" if above else "low"
    parts: Any = panel.violinplot([values], [at], orientation="horizontal", side=side, widths=0.9, showextrema=False)
    (body,) = parts["bodies"]
    body.set(facecolor=color, edgecolor=color, alpha=0.6)
    median = np.median(values)
    panel.vlines(median, at, at + (0.45 if above else -0.45), color=INK, linewidth=1.8)


def _thirds(of: Usable) -> tuple[tuple[slice, str], tuple[slice, str]]:
    """The first and the last third of training with their colors, which are the same where there are too few pairs."""
    thirds = summaries.phases(of.size, most=3, least=1)
    return (thirds[0], SKY), (thirds[-1], VERMILLION)


def _scatter(panel: Axes, of: Usable, x: np.ndarray, y: np.ndarray) -> int:
    """Points of the two thirds. Returns how many there are, where not all are drawn, else 0."""
    drawn = there = 0
    for third, color in _thirds(of):
        shown = summaries.thinned(x[third].size, MOST_POINTS // 2)
        drawn, there = drawn + shown.size, there + x[third].size
        alpha = 0.35 if shown.size > 500 else 0.7
        panel.scatter(x[third][shown], y[third][shown], s=10, alpha=alpha, color=color, linewidths=0, rasterized=True)
    panel.set_xlabel("reward gap m (reward units, β inside)")
    panel.locator_params(axis="x", nbins=7)
    panel.set_title(label(of.run.name))
    return there if drawn < there else 0


def _legend(figure: Figure, lines: Mapping[str, Mapping[str, Any]]) -> None:
    thirds = [{"color": c, "linestyle": "none", "marker": "o", "markersize": 6} for c in (SKY, VERMILLION)]
    names, columns = ["first third of training", "last third", *lines], 3 if len(lines) == 1 else 4
    legend_below(figure, [*thirds, *lines.values()], names, columns)


def _thinned(there: Sequence[int]) -> str:
    there = [n for n in there if n]
    return f" Of {span(there)} pairs in the two thirds {MOST_POINTS:,} are drawn, evenly spaced." if there else ""
