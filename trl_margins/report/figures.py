"""The pictures: each a pure function of the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from . import style, summaries
from .picture import Picture, Usable, source, span, usable
from .run_folder import STATE, WRITTEN_BY, Run
from .style import band, label, legend_below, panels, run_styles, styled

MOST_POINTS = 5000  # of a scatter

_STEP = "optimizer step"


def draw_pictures(runs: Sequence[Run]) -> list[Picture]:
    """All of them, in the order in which a page shows them."""
    return [draw(runs) for draw in PICTURES]


@styled
def ranking(runs: Sequence[Run]) -> Picture:
    """PWA, of clear pairs and of all, and Spearman over steps; all runs and evaluation sets in the same axes."""
    picture = Picture("ranking", "Pairwise accuracy and Spearman")
    curves = {run.name: summaries.ranking_curves(run) for run in runs}
    left_out = {
        run.name: _unlogged(run, "eval_pwa, eval_pwa_all or eval_spearman: it was trained without evaluation")
        for run in runs
        if not curves[run.name]
    }
    metrics = [m for m in summaries.RANKING if any(m == metric for c in curves.values() for _, metric in c)]
    if not metrics:
        return replace(picture, left_out=left_out)
    figure, axes = panels(len(metrics), height=3.2, columns=3)
    looks = _curve_looks(runs, curves)
    for panel, metric in zip(axes, metrics, strict=True):
        for (run, of_set), look in looks.items():
            if (curve := curves[run].get((of_set, metric))) is None:
                continue
            panel.plot(curve.steps, curve.values, markevery=max(1, curve.steps.size // 12), **look)
            at_best = curve.steps[curve.best], curve.values[curve.best]
            panel.plot(*at_best, marker="o", markersize=11, fillstyle="none", color=look["color"])
        panel.set_title(_ranking_title(metric, runs))
        panel.set_ylabel("rank correlation" if metric == "spearman" else "share of pairs")
        _steps(panel)
        _reference(panel, 0.0 if metric == "spearman" else 0.5)
    names = [f"{run}, {of_set}" if of_set else run for run, of_set in looks]
    legend_below(figure, [Line2D([], [], **look) for look in looks.values()], names)
    caption = (
        "PWA is the share of held-out pairs whose chosen answer has the higher reward; Spearman's ρ compares rewards "
        "and annotation scores of all answers in one pool. A ring marks the best value of a curve, and a dotted line, "
        f"where it is in sight, what guessing gets. From {STATE}: {', '.join(f'eval_{m}' for m in metrics)}."
    )
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


def _curve_looks(runs: Sequence[Run], curves: Mapping[str, Mapping[tuple[str, str], object]]) -> dict:
    """(run, evaluation set) → how its curve is drawn: a colour for each run, dashes for each set."""
    sets = list(dict.fromkeys(of_set for of_run in curves.values() for of_set, _ in of_run))
    looks = {}
    for run, look in run_styles(runs).items():
        for of_set in dict.fromkeys(of_set for of_set, _ in curves[run]):
            i = sets.index(of_set)
            if len(runs) == 1:  # colours are free to tell the sets apart
                look = style.LOOKS[i % len(style.LOOKS)]
            looks[run, of_set] = look | {"linestyle": style.DASHES[i % len(style.DASHES)]}
    return looks


def _ranking_title(metric: str, runs: Sequence[Run]) -> str:
    if metric == "spearman":
        return "Spearman ρ, all completions"
    least = {run.config.get("eval_min_score_gap") for run in runs}
    threshold = f"{least.pop():g}" if len(least) == 1 and None not in least else "τ"
    return "PWA, all pairs" if metric == "pwa_all" else f"PWA, score gap ≥ {threshold}"


@styled
def gradient_mass(runs: Sequence[Run]) -> Picture:
    """Where the gradient comes from, by score gap, before and after weighting."""
    picture = Picture("gradient_mass", "Gradient mass by score gap")
    found, left_out = usable(runs, lambda _: ("score_gap", "weight", "slope"), _no_mass)
    if not found:
        return replace(picture, left_out=left_out)
    figure, axes = panels(len(found))
    beyond = []
    for panel, of in zip(axes, found, strict=True):
        gap = np.abs(of["score_gap"])
        edges = _gap_edges(gap)
        beyond.append(int((gap > edges[-1]).sum()))
        series = {
            "pairs": (None, style.PAIRS),
            "gradient before weighting": (of["slope"], style.BEFORE),
            "gradient after weighting": (of["weight"] * of["slope"], style.AFTER),
        }
        width = 0.28 * (edges[1] - edges[0])
        for i, (name, (mass, colour)) in enumerate(series.items()):
            middles = (edges[:-1] + edges[1:]) / 2 + (i - 1) * width
            panel.bar(middles, summaries.shares(gap, edges, mass), 0.94 * width, color=colour, label=name)
        panel.set_xticks(edges)
        panel.grid(visible=False, axis="x")
        panel.set_xlabel("|score gap| (score points)")
        panel.set_ylabel("share of the total")
        panel.yaxis.set_major_formatter(_percent)
        panel.set_title(label(of.run.name))
    legend_below(figure, *axes[0].get_legend_handles_labels())
    caption = (
        "A pair's gradient is its slope −∂link/∂gap before weighting and weight × slope after it; each colour adds up "
        "to 100 %. Where a bin's blue bar is higher than its grey one, a pair in it gets more gradient than the "
        "average pair. Without a weight term the two gradients are the same. "
        f"{source(found, '|score_gap|, weight and slope')}"
    )
    if any(beyond):
        caption += f" The last bin also holds the pairs beyond it, {span(beyond)}."
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


def _no_mass(of: Usable) -> str | None:
    mass = of["weight"] * of["slope"]
    return None if mass.sum() > 0 else "no pair has a gradient: weight × slope is 0 for all"


def _gap_edges(gap: np.ndarray) -> np.ndarray:
    """About eight bins with round edges from 0 to beyond the greatest gap, a few far ones aside."""
    whole = bool((gap == np.round(gap)).all())
    greatest = np.quantile(gap, 0.995)
    edges = MaxNLocator(nbins=8, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(0, greatest or 1.0)
    edges = edges[edges >= 0]
    return np.append(edges, 2 * edges[-1] - edges[-2]) if greatest >= edges[-1] else edges


@styled
def margins(runs: Sequence[Run]) -> Picture:
    """Margin against reward gap, in the first and in the last third of training."""
    picture = Picture("margins", "Margin against reward gap")
    found, left_out = usable(runs, lambda _: ("reward_gap", "margin"), _one_margin)
    if not found:
        return replace(picture, left_out=left_out)
    figure, axes = panels(len(found), height=3.3)
    thinned = []
    for panel, of in zip(axes, found, strict=True):
        thirds = summaries.phases(of.size, most=3, least=1)
        drawn = there = 0
        for third, colour in zip((thirds[0], thirds[-1]), (style.EARLY, style.LATE), strict=True):
            gap, margin = of["reward_gap"][third], of["margin"][third]
            kept = summaries.thinned(gap.size, MOST_POINTS // 2)
            drawn, there = drawn + kept.size, there + gap.size
            alpha = 0.35 if kept.size > 500 else 0.7
            panel.scatter(gap[kept], margin[kept], s=10, alpha=alpha, color=colour, linewidths=0, rasterized=True)
        if drawn < there:
            thinned.append(there)
        _diagonal(panel)
        panel.locator_params(axis="x", nbins=7)
        panel.set_xlabel("reward gap m (reward units, β inside)")
        panel.set_ylabel("margin (reward units)")
        panel.set_title(label(of.run.name))
    dot = {"linestyle": "none", "marker": "o", "markersize": 6}
    handles = [Line2D([], [], color=colour, **dot) for colour in (style.EARLY, style.LATE)]
    handles.append(Line2D([], [], color=style.GREY, linewidth=1))
    legend_below(figure, handles, ["first third of training", "last third", "margin = reward gap"])
    caption = (
        "One point a trained pair. Right of the grey line a pair's reward gap is larger than its margin. "
        f"{source(found, 'reward_gap and margin')}"
    )
    if thinned:
        caption += f" Of {span(thinned)} pairs in the two thirds {MOST_POINTS:,} are drawn, spaced evenly."
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


def _one_margin(of: Usable) -> str | None:
    margin = of["margin"]
    if np.ptp(margin) > 0:
        return None
    term = "no margin term" if of.run.info.get("margin") is None else f"margin term {of.run.info['margin']!r}"
    return f"all pairs have the same margin, {margin[0]:g} ({term})"


def _diagonal(panel: Axes) -> None:
    """gap = margin, as far as the points reach."""
    limits = panel.get_xlim(), panel.get_ylim()
    ends = max(limits[0][0], limits[1][0]), min(limits[0][1], limits[1][1])
    if ends[0] < ends[1]:
        panel.plot(ends, ends, color=style.GREY, linewidth=1, zorder=3)
    panel.set(xlim=limits[0], ylim=limits[1])


@styled
def evaluation_factors(runs: Sequence[Run]) -> Picture:
    """How likeness becomes a margin: the raw evaluation factor, f of it, and what normalisation makes of that."""
    picture = Picture("evaluation_factors", "From evaluation factor to margin")
    found, left_out = usable(runs, lambda _: ("evaluation_factor", "mapped_factor", "margin"))
    if not found:
        return replace(picture, left_out=left_out)
    figure, axes = panels(3, columns=3)
    looks = run_styles(runs)
    labels = {
        "evaluation_factor": ("raw", "evaluation factor EF (1: alike)"),
        "mapped_factor": ("mapped", "f(EF)"),
        "margin": ("normalised", "margin (reward units)"),
    }
    for panel, (column, (title, axis)) in zip(axes, labels.items(), strict=True):
        reach = (0.0, 1.0) if column == "evaluation_factor" else None
        edges = np.histogram_bin_edges(np.concatenate([of[column] for of in found]), 25, reach)
        for of in found:
            colour = looks[of.run.name]["color"]
            heights = summaries.shares(of[column], edges)
            panel.stairs(heights, edges, color=colour, fill=True, alpha=0.25 / len(found))
            panel.stairs(heights, edges, color=colour, linewidth=1.6)
            panel.axvline(of[column].mean(), color=colour, linewidth=1.2, linestyle="--")
        panel.set_title(title)
        panel.set_xlabel(axis)
        panel.set_ylabel("share of pairs")
        panel.yaxis.set_major_formatter(_percent)
    handles = [Line2D([], [], color=looks[of.run.name]["color"]) for of in found]
    legend_below(figure, handles, [of.run.name for of in found])
    caption = (
        "How the trained pairs spread over 25 bins; dashed lines are means. The mapping turns the two answers' "
        "likeness into a distance, and normalisation gives it the size of a target margin. "
        f"{source(found, 'evaluation_factor, mapped_factor and margin')}"
    )
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


@styled
def flips(runs: Sequence[Run]) -> Picture:
    """Whether flipped labels weigh less: mean weights of clean and flipped pairs, and flip rates by weight."""
    picture = Picture("flips", "Flipped labels and their weights")
    found, left_out = usable(runs, flip_columns, no_flips)
    if not found:
        return replace(picture, left_out=left_out)
    figure, axes = panels(2 * len(found))
    most = 0
    for of, left, right in zip(found, axes[::2], axes[1::2], strict=True):
        name, weight = pair_weight(of)
        result = summaries.flips(of["step"], weight, of["is_flipped"])
        most = max(most, result.steps.size)
        band(left, result.steps, result.clean, color=style.CLEAN, marker="o", label="clean")
        band(left, result.steps, result.flipped, color=style.FLIPPED, marker="s", label="flipped")
        left.set_ylabel(f"mean {name}")
        aside = 0.12 * np.diff(result.steps).min() if result.steps.size > 1 else 0.05 * max(of["step"][-1], 1)
        for i, (tier, rows) in enumerate(zip(style.TIERS, result.by_tier, strict=True)):
            right.errorbar(
                result.steps + (i - 1) * aside,
                rows[:, 0],
                yerr=np.abs(rows[:, 1:] - rows[:, :1]).T,
                color=style.TIER_COLOURS[i],
                marker=style.MARKERS[i],
                clip_on=False,
                elinewidth=1,
                capsize=2,
                label=tier,
            )
        right.axhline(result.overall, color=style.INK, linewidth=1, linestyle="--", label="flip rate of all pairs")
        right.set_ylim(bottom=0)
        right.set_ylabel("flip rate")
        right.yaxis.set_major_formatter(_percent)
        left.set_title(label(of.run.name))
        right.set_title("flip rate by tier of weight")
        _steps(left)
        _steps(right)
    (lines, names), (bars, tiers) = (panel.get_legend_handles_labels() for panel in axes[:2])
    legend_below(figure, lines + bars, names + tiers, columns=6)
    weights = dict.fromkeys(pair_weight(of)[0] for of in found)
    caption = (
        f"The weight of a pair is what multiplies its gradient: its {' or '.join(weights)}. Training is cut into at "
        f"most {most} parts with equally many pairs, and the pairs of each part into thirds by weight. Bands and bars "
        "are 95 % intervals (normal for means, Wilson's for rates) over the pairs of one run: they say nothing about "
        "other seeds. "
        f"{source(found, 'step, is_flipped and ' + ' or '.join(dict.fromkeys(map(_weight_columns, found))))}"
    )
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


def flip_columns(run: Run) -> tuple[str, ...]:
    """GAPO's own weight where there is one; else what stands before the gradient of a pair's gap."""
    own = run.pairs.get("anchor_weight")
    return ("step", "is_flipped", *(("anchor_weight",) if own is not None and np.isfinite(own).any() else _WEIGHT))


_WEIGHT = ("weight", "slope")


def _weight_columns(of: Usable) -> str:
    return " × ".join(name for name in of.columns if name not in ("step", "is_flipped"))


def pair_weight(of: Usable) -> tuple[str, np.ndarray]:
    """The weight that pictures of flips compare, with its name."""
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


@styled
def logps(runs: Sequence[Run]) -> Picture:
    """Whether the chosen answers' log-probability falls with the rejected ones'."""
    picture = Picture("logps", "Log-probability of chosen and rejected answers")
    found, left_out = usable(runs, lambda _: ("step", "logp_chosen", "logp_rejected"))
    if not found:
        return replace(picture, left_out=left_out)
    figure, axes = panels(len(found))
    for panel, of in zip(axes, found, strict=True):
        parts = summaries.phases(of.size, most=20, least=20)
        steps = np.array([of["step"][part].mean() for part in parts])
        changes = []
        for name, colour, marker in (("chosen", style.CHOSEN, "o"), ("rejected", style.REJECTED, "s")):
            values = of[f"logp_{name}"]
            rows = np.array([np.quantile(values[part], (0.5, 0.25, 0.75)) for part in parts])
            band(panel, steps, rows, color=colour, marker=marker, label=name)
            changes.append(f"{name} {rows[-1, 0] - rows[0, 0]:+.2f}".replace("-", "−"))
        panel.set_ylabel("log-probability (nats per token)")
        panel.set_title(label(of.run.name) + "\n ")  # the second line is for the changes
        if len(parts) > 1:
            panel.text(0, 1.02, f"change: {', '.join(changes)}", transform=panel.transAxes, va="bottom", fontsize=9)
        _steps(panel)
    legend_below(figure, *axes[0].get_legend_handles_labels())
    caption = (
        "Mean log-probability per token under the model in training: the median of up to 20 parts of training with "
        "equally many pairs, and the middle half of the pairs as a band. Above each panel: the change of the median "
        "from the first part to the last. Parts hold different pairs, and every panel has its own scale. "
        f"{source(found, 'step, logp_chosen and logp_rejected')}"
    )
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


@styled
def loss(runs: Sequence[Run]) -> Picture:
    """Loss and reward margin as the trainer logged them."""
    picture = Picture("loss", "Loss and reward margin")
    labels = {"loss": "loss", "rewards/margins": "mean reward gap m\n(reward units, β inside)"}
    curves = {run.name: {key: summaries.logged_curve(run, key) for key in labels} for run in runs}
    curves = {name: of_run for name, of_run in curves.items() if any(c.steps.size for c in of_run.values())}
    left_out = {run.name: _unlogged(run, "loss or rewards/margins") for run in runs if run.name not in curves}
    if not curves:
        return replace(picture, left_out=left_out)
    looks = {name: look for name, look in run_styles(runs).items() if name in curves}
    figure, axes = panels(2, height=2.4)
    for panel, (key, axis) in zip(axes, labels.items(), strict=True):
        for name, of_run in curves.items():
            every = max(1, of_run[key].steps.size // 12)
            panel.plot(of_run[key].steps, of_run[key].values, markevery=every, **looks[name])
        panel.set_ylabel(axis)
        _steps(panel)
    legend_below(figure, [Line2D([], [], **look) for look in looks.values()], list(looks))
    caption = (
        "Of the training batches; each point is the mean since the one before. Weights and margins are part of the "
        "loss, so its level cannot be compared between methods. "
        f"From {STATE}: {' and '.join(labels)}."
    )
    return replace(picture, figure=figure, caption=caption, left_out=left_out)


PICTURES: tuple[Callable[[Sequence[Run]], Picture], ...] = (
    ranking,
    gradient_mass,
    margins,
    evaluation_factors,
    flips,
    logps,
    loss,
)


def _unlogged(run: Run, what: str) -> str:
    if not run.log_history:
        return f"the folder has no {STATE} with a log: {WRITTEN_BY[STATE]}"
    return f"{STATE} has no {what}"


def _percent(share: float, _: int | None = None) -> str:
    return f"{100 * share:g} %"


def _steps(panel: Axes) -> None:
    panel.set_xlim(left=0)
    panel.set_xlabel(_STEP)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))


def _reference(panel: Axes, value: float) -> None:
    """A line where it is in sight; it does not make the panel larger."""
    limits = panel.get_ylim()
    if limits[0] < value < limits[1]:
        panel.axhline(value, color=style.GREY, linewidth=1.2, linestyle=":", zorder=1)
    panel.set_ylim(limits)
