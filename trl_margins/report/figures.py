"""The pictures: each a pure function of the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluation.tables import MEANING
from . import style, summaries
from .anchor_figures import anchor_parts, anchor_ranking
from .margin_figures import label_smoothing, margins, reward_gaps
from .picture import Draw, Picture, Usable, from_pairs, source, span
from .ranking_figures import cases, setting, swept
from .run_folder import STATE, WRITTEN_BY, Run
from .style import (
    BLUE,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    band,
    label,
    legend_below,
    over_training,
    panels,
    percent,
    run_styles,
    signed,
    step_size,
    styled,
)

LEAST_RANGE = 0.04  # of an axis of accuracies or correlations
LARGE = 2.0  # times the median: a large gradient


def draw_pictures(runs: Sequence[Run]) -> list[Picture]:
    """All pictures, in the order of the page."""
    return [draw(runs) for draw in (*PICTURES, *([setting] if swept(runs) else []))]


@styled
def ranking(runs: Sequence[Run]) -> Picture:
    """PWA of clear pairs and of all, and Spearman over steps; all runs and evaluation sets in the same axes."""
    picture = Picture("ranking", "Pairwise accuracy and Spearman")
    curves = {run.name: summaries.ranking_curves(run) for run in runs}
    nothing = "eval_pwa, eval_pwa_all or eval_spearman: it was trained without evaluation"
    left_out = {run.name: _unlogged(run, nothing) for run in runs if not curves[run.name]}
    metrics = [m for m in summaries.RANKING if any(m == metric for c in curves.values() for _, metric in c)]
    if not metrics:
        return replace(picture, left_out=left_out)
    least = {run.config.get("eval_min_score_gap") for run in runs}
    threshold = f"{least.pop():g}" if len(least) == 1 and None not in least else "τ"
    shown = {
        "pwa": (f"Accuracy (PWA), score gap ≥ {threshold}", "share of pairs ranked right", 0.5),
        "pwa_all": ("Accuracy (PWA), all pairs", "share of pairs ranked right", 0.5),
        "spearman": ("Spearman ρ, all completions", "rank correlation", 0.0),
    }
    looks = _curve_looks(runs, curves)
    drawn = [run for run in runs if curves[run.name]]
    figure, axes = panels(len(metrics), 3.2, columns=len(metrics))
    scale = step_size(*drawn)
    names = {f"{run}, {of_set}" if of_set else run: look for (run, of_set), look in looks.items()}
    names["best value"] = style.BEST
    for panel, metric in zip(axes, metrics, strict=True):
        for (run, of_set), look in looks.items():
            if (curve := curves[run].get((of_set, metric))) is not None:
                _plot(panel, curve, look, scale[run])
                best = curve.steps[curve.best] * scale[run], curve.values[curve.best]
                panel.plot(*best, marker="o", markersize=11, fillstyle="none", color=look["color"])
        title, ylabel, guessing = shown[metric]
        panel.set(title=title, ylabel=ylabel)
        over_training(panel, *drawn)
        low, high = panel.get_ylim()
        if high - low < LEAST_RANGE:  # a flat curve looks flat
            low, high = ((low + high + sign * LEAST_RANGE) / 2 for sign in (-1, 1))
        if metric != "spearman":
            panel.yaxis.set_major_formatter(percent)
            low, high = max(low, -0.02), min(high, 1.02)
        if low < guessing < high:
            names["guessing"] = {"color": GREY, "linewidth": 1.2, "linestyle": ":"}
            panel.axhline(guessing, zorder=1, **names["guessing"])
        panel.set_ylim(low, high)
    legend_below(figure, names.values(), names)
    caption = (
        f"{MEANING} A ring marks the best value of a curve; a dotted line, where it is in range, the value of "
        f"guessing. From {STATE}: "
        f"{', '.join(f'eval_{m}' for m in metrics)}."
    )
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


def _curve_looks(runs: Sequence[Run], curves: Mapping[str, Mapping[tuple[str, str], object]]) -> dict:
    """(run, evaluation set) → line style: a color for each run, dashes for each set."""
    sets = list(dict.fromkeys(of_set for of_run in curves.values() for of_set, _ in of_run))
    looks = {}
    for run, look in run_styles(runs).items():
        for of_set in dict.fromkeys(of_set for of_set, _ in curves[run]):
            i = sets.index(of_set)
            if len(runs) == 1:  # colors are free to tell the sets apart
                look = dict(style.LOOKS[i % len(style.LOOKS)])
            looks[run, of_set] = look | ({"linestyle": style.DASHES[i % len(style.DASHES)]} if len(sets) > 1 else {})
    return looks


@from_pairs(
    "gradient_mass",
    "Gradient mass by score gap",
    ("score_gap", "weight", "slope"),
    lambda of: None if of["weight"] @ of["slope"] > 0 else "no pair has a gradient: weight × slope is 0 for all",
)
def gradient_mass(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """Where the gradient comes from, by score gap, before and after weighting."""
    figure, axes = panels(len(found))
    beyond = []
    for panel, of in zip(axes, found, strict=True):
        gap = np.abs(of["score_gap"])
        edges = _gap_edges(gap)
        beyond.append(int((gap > edges[-1]).sum()))
        series = {
            "pairs": (None, GREY),
            "weights": (of["weight"], ORANGE),
            "gradient before weighting": (of["slope"], SKY),
            "gradient after weighting": (of["weight"] * of["slope"], BLUE),
        }
        width = 0.21 * (edges[1] - edges[0])
        for i, (name, (mass, color)) in enumerate(series.items()):
            middles = (edges[:-1] + edges[1:]) / 2 + (i - 1.5) * width
            panel.bar(middles, summaries.shares(gap, edges, mass), 0.94 * width, color=color, label=name)
        panel.set_xticks(edges)
        panel.grid(visible=False, axis="x")
        panel.set(xlabel="|score gap| (score points)", ylabel="share of the total", title=label(of.run.name))
        panel.yaxis.set_major_formatter(percent)
    legend_below(figure, *axes[0].get_legend_handles_labels(), columns=4)
    caption = (
        "The gradient scale of a pair is its slope −∂link/∂gap before weighting, and weight × slope after it; each "
        "color adds up to 100 %. Where the bar 'gradient after weighting' of a bin is higher than the "
        "grey one, its pairs get more gradient "
        "than the average pair. The weights alone are what GapPO's figure 1 shows: they leave out how well the model "
        "ranks the pairs already. Without a weight term they are the pairs, and the two gradients are the same. "
        f"{source(found, '|score_gap|, weight and slope')}"
    )
    if any(beyond):
        caption += f" The last bin also holds the pairs beyond it, {span(beyond)}."
    return figure, caption


def _gap_edges(gap: np.ndarray) -> np.ndarray:
    """About eight bins with round edges from 0 to beyond the greatest gap, except a few far ones."""
    whole = bool((gap == np.round(gap)).all())
    greatest = np.quantile(gap, 0.995)
    locator = MaxNLocator(nbins=8, integer=whole, steps=[1, 2, 2.5, 5, 10])
    edges = np.array([edge for edge in locator.tick_values(0, greatest or 1.0) if edge >= 0])
    return np.append(edges, 2 * edges[-1] - edges[-2]) if greatest >= edges[-1] else edges


@from_pairs(
    "evaluation_factors",
    "From evaluation factor to margin",
    ("evaluation_factor", "mapped_factor", "margin"),
)
def evaluation_factors(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """How similarity becomes a margin: the evaluation factor, f of it, and the normalised margin."""
    figure, axes = panels(3, columns=3)
    colors = {name: look["color"] for name, look in run_styles(runs).items()}
    labels = {
        "evaluation_factor": ("raw", "evaluation factor EF (1: the same)"),
        "mapped_factor": ("mapped", "f(EF)"),
        "margin": ("normalised", "margin (reward units)"),
    }
    for panel, (column, (title, xlabel)) in zip(axes, labels.items(), strict=True):
        reach = (0.0, 1.0) if column == "evaluation_factor" else None
        edges = np.histogram_bin_edges(np.concatenate([of[column] for of in found]), 25, reach)
        for of in found:
            color, heights = colors[of.run.name], summaries.shares(of[column], edges)
            panel.stairs(heights, edges, color=color, fill=True, alpha=0.25 / len(found))
            panel.stairs(heights, edges, color=color, linewidth=1.6)
            panel.axvline(of[column].mean(), color=color, linewidth=1.2, linestyle="--")
        panel.set(title=title, xlabel=xlabel, ylabel="share of pairs")
        panel.yaxis.set_major_formatter(percent)
    names = [of.run.name for of in found]
    mean = {"color": GREY, "linewidth": 1.2, "linestyle": "--"}
    legend_below(figure, [*({"color": colors[name]} for name in names), mean], [*names, "mean"])
    caption = (
        "The trained pairs in 25 bins; dashed lines are means. The mapping turns the similarity of the two "
        "completions into a distance, and normalisation gives it the size of a target margin. "
        f"{source(found, 'evaluation_factor, mapped_factor and margin')}"
    )
    return figure, caption


def flip_columns(run: Run) -> tuple[str, ...]:
    """GAPO's own weight where there is one; else the factors of the gradient of a pair's gap."""
    own = run.pairs.get("anchor_weight")
    weight = ("weight", "slope") if own is None or not np.isfinite(own).any() else ("anchor_weight",)
    return "step", "is_flipped", *weight


def pair_weight(of: Usable) -> tuple[str, np.ndarray]:
    """The weight that flipped and clean pairs are compared by, with its name."""
    if "anchor_weight" in of.columns:
        return "anchor weight", of["anchor_weight"]
    return "weight × slope", of["weight"] * of["slope"]


def no_flips(of: Usable) -> str | None:
    """Why clean and flipped pairs cannot be compared."""
    marked = of["is_flipped"] > 0.5
    if marked.all() or not marked.any():
        return f"{'every' if marked.any() else 'no'} pair is marked as flipped"
    name, weight = pair_weight(of)
    return None if np.ptp(weight) > 0 else f"all pairs have the same {name}"


@from_pairs("flips", "Flipped labels and their weights", flip_columns, no_flips)
def flips(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """Whether flipped labels weigh less: mean weights of clean and flipped pairs, and flip rates by weight."""
    figure, axes = panels(2 * len(found))
    most, said = 0, []
    for of, left, right in zip(found, axes[::2], axes[1::2], strict=True):
        name, weight = pair_weight(of)
        result = summaries.flips(of["step"], weight, of["is_flipped"])
        most = max(most, result.steps.size)
        _draw_flips(left, right, replace(result, steps=step_size(of.run)[of.run.name] * result.steps))
        said.append(_last_flips(of.run.name, result))
        left.set(title=label(of.run.name), ylabel=f"mean {name}")
        over_training(left, of.run)
        over_training(right, of.run)
    _legend_of_flips(figure, *axes[:2])
    weights = dict.fromkeys(pair_weight(of)[0] for of in found)
    columns = dict.fromkeys(" × ".join(c for c in of.columns if c not in ("step", "is_flipped")) for of in found)
    caption = (
        f"The weight of a pair is the factor of its gradient: its {' or '.join(weights)}. Training is cut into "
        f"{_parts(most)}, and the pairs of each into thirds by weight. Bands and bars "
        "are 95 % intervals (normal for means, Wilson's for rates) over the pairs of one run: they say nothing about "
        f"other seeds. {''.join(said)}{source(found, 'step, is_flipped and ' + ' or '.join(columns))}"
    )
    return figure, caption


def _parts(n: int) -> str:
    return f"up to {n} parts with equally many pairs" if n > 1 else "one part, since it has few pairs"


def _draw_flips(left: Axes, right: Axes, result: summaries.Flips) -> None:
    """Mean weights of clean and flipped pairs, and flip rates by weight."""
    band(left, result.steps, result.clean, color=BLUE, marker="o", label="clean")
    band(left, result.steps, result.flipped, color=VERMILLION, marker="s", label="flipped")
    aside = 0.12 * np.diff(result.steps).min() if result.steps.size > 1 else 0.05 * max(result.steps[-1], 1)
    for i, (tier, rows) in enumerate(zip(style.TIERS, result.by_tier, strict=True)):
        right.errorbar(
            result.steps + (i - 1) * aside,
            rows[:, 0],
            yerr=np.abs(rows[:, 1:] - rows[:, :1]).T,
            color=style.TIER_COLORS[i],
            marker=style.MARKERS[i],
            clip_on=False,
            elinewidth=1,
            capsize=2,
            label=tier,
        )
    right.axhline(result.overall, color=style.INK, linewidth=1, linestyle="--", label="flip rate of all pairs")
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(percent)
    right.set(title="flip rate by tier of weight", ylabel="flip rate")


def _legend_of_flips(figure: Figure, left: Axes, right: Axes) -> None:
    (lines, names), (bars, tiers) = (panel.get_legend_handles_labels() for panel in (left, right))
    legend_below(figure, lines + bars, names + tiers, columns=6)


@styled
def flips_at(models: Sequence[str], result: summaries.Flips) -> Figure:
    """The same pairs at several models, in their order."""
    figure, (left, right) = panels(2)
    _draw_flips(left, right, result)
    left.set(title="the same pairs at each checkpoint", ylabel="mean anchor weight")
    slanted: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(models) > 3 else {}
    for panel in (left, right):
        panel.set_xticks(result.steps, [label(name, 16) for name in models], **slanted)
    _legend_of_flips(figure, left, right)
    return figure


def _last_flips(run: str, result: summaries.Flips) -> str:
    """A sentence about the last part of training; empty where one of the two kinds has no pair there."""
    (clean, flipped), tiers = (rows[-1, 0] for rows in (result.clean, result.flipped)), result.by_tier
    if not np.isfinite([clean, flipped]).all():
        return ""
    lowest, highest = (percent(tiers[t][-1, 0]) for t in (0, -1))
    return (
        f"In the last part of {run} flipped pairs weigh {flipped:.4g} on average and clean ones {clean:.4g}; {lowest} "
        f"of the lowest third of weights are flipped, {highest} of the highest. "
    )


@from_pairs(
    "logps",
    "Log-probability of chosen and rejected completions",
    ("step", "logp_chosen", "logp_rejected"),
)
def logps(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """Whether the log-probability of the chosen completions falls together with that of the rejected ones."""
    figure, axes = panels(len(found))
    for panel, of in zip(axes, found, strict=True):
        parts = summaries.phases(of.size, most=20, least=20)
        x = step_size(of.run)[of.run.name] * np.array([of["step"][part].mean() for part in parts])
        changes = []
        for name, color, marker in (("chosen", BLUE, "o"), ("rejected", VERMILLION, "s")):
            values = of[f"logp_{name}"]
            rows = np.array([np.quantile(values[part], (0.5, 0.25, 0.75)) for part in parts])
            band(panel, x, rows, color=color, marker=marker, label=f"{name}: median, middle half")
            changes.append(f"{name} {signed(rows[-1, 0] - rows[0, 0])}")
        panel.set_ylabel("log-probability (nats per token)")
        title = label(of.run.name)
        panel.set_title(f"{title}\nchange: {', '.join(changes)}" if len(parts) > 1 else title)
        over_training(panel, of.run)
    legend_below(figure, *axes[0].get_legend_handles_labels())
    caption = (
        "Mean log-probability per token under the model in training: the median of up to 20 parts of training with "
        "equally many pairs, and the middle half of the pairs as a band. Above each panel: the change of the median "
        "from the first part to the last. Parts hold different pairs, and every panel has its own scale. "
        f"{source(found, 'step, logp_chosen and logp_rejected')}"
    )
    return figure, caption


@styled
def loss(runs: Sequence[Run]) -> Picture:
    """Loss, reward gap and target margin as the trainer logged them."""
    picture = Picture("loss", "Loss, reward gap and target margin")
    labels = {
        "loss": "loss",
        "rewards/margins": "mean reward gap m\n(reward units, β inside)",
        "target_margins/mean": "mean target margin\n(reward units)",
    }
    curves = {run.name: {key: summaries.logged_curve(run, key) for key in labels} for run in runs}
    curves = {run: of_run for run, of_run in curves.items() if any(c.steps.size for c in of_run.values())}
    left_out = {run.name: _unlogged(run, "loss or rewards/margins") for run in runs if run.name not in curves}
    if not curves:
        return replace(picture, left_out=left_out)
    looks = {run: look for run, look in run_styles(runs).items() if run in curves}
    logged = [key for key in labels if any(of_run[key].steps.size for of_run in curves.values())]
    drawn = [run for run in runs if run.name in curves]
    figure, axes = panels(len(logged), 2.4, columns=len(logged))
    scale = step_size(*drawn)
    for panel, key in zip(axes, logged, strict=True):
        for run, of_run in curves.items():
            _plot(panel, of_run[key], looks[run], scale[run])
        panel.set_ylabel(labels[key])
        over_training(panel, *drawn)
    legend_below(figure, looks.values(), looks)
    caption = (
        "Of the training batches; each point is the mean since the one before. Weights and margins are part of the "
        f"loss, so its level cannot be compared between methods. From {STATE}: {', '.join(logged)}."
    )
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


@styled
def gradient_norm(runs: Sequence[Run]) -> Picture:
    """The logged gradient norms, smoothed; their maximum, and how often they are large."""
    picture = Picture("gradient_norm", "Gradient norm")
    curves = {run.name: summaries.logged_curve(run, "grad_norm") for run in runs}
    left_out = {run.name: _unlogged(run, "grad_norm") for run in runs if not curves[run.name].steps.size}
    drawn = [run for run in runs if run.name not in left_out]
    if not drawn:
        return replace(picture, left_out=left_out)
    medians = [float(np.median(curves[run.name].values)) for run in drawn]
    threshold = LARGE * float(np.median(medians))
    line: dict[str, Any] = {"color": GREY, "linewidth": 1.2, "linestyle": "--", "marker": ""}
    figure, (panel,) = panels(1)
    scale = step_size(*drawn)
    looks = {name: look for name, look in run_styles(runs).items() if name not in left_out}
    for name, look in looks.items():
        curve = curves[name]
        smooth = summaries.Curve(curve.steps, summaries.smoothed(curve.values))
        panel.plot(scale[name] * curve.steps, curve.values, color=look["color"], linewidth=0.8, alpha=0.35)
        _plot(panel, smooth, look, scale[name])
    panel.axhline(threshold, zorder=1, **line)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("norm of the loss gradient")
    over_training(panel, *drawn)
    thin: dict[str, Any] = {"color": GREY, "linewidth": 0.8}
    legend_below(figure, [*looks.values(), thin, line], [*looks, "as logged", f"{LARGE:g} × median"])
    said = []
    for run in drawn:
        curve = curves[run.name]
        large = int((curve.values > threshold).sum())
        said.append(
            f"In {run.name} the greatest is {curve.values[curve.best]:.4g}, in step {curve.steps[curve.best]:g}; "
            f"{large:,} of {curve.steps.size:,} ({percent(large / curve.steps.size)}) are above the line."
        )
    median = "their median" if len(drawn) == 1 else "the median of the runs' medians, one threshold for all"
    caption = (
        "The gradient of the loss before clipping, in the steps that were logged: thin as it is, thick the mean of "
        f"each three neighbours. {' '.join(said)} The dashed line is at {threshold:.4g}, {LARGE:g} times {median}. "
        f"From {STATE}: grad_norm."
    )
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


PICTURES: tuple[Draw, ...] = (
    *(
        ranking,
        cases,
        gradient_mass,
        margins,
        label_smoothing,
        evaluation_factors,
        flips,
        anchor_ranking,
        anchor_parts,
    ),
    *(reward_gaps, logps, loss, gradient_norm),
)


def _unlogged(run: Run, what: str) -> str:
    if not run.log_history:
        return f"the folder has no {STATE} with a log: {WRITTEN_BY[STATE]}"
    return f"{STATE} has no {what}"


def _plot(panel: Axes, curve: summaries.Curve, look: Mapping[str, Any], scale: int) -> None:
    panel.plot(scale * curve.steps, curve.values, markevery=max(1, curve.steps.size // 12), **look)
