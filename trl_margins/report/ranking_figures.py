"""AMaPO's pictures of training: its four cases, and ranking accuracy over a setting."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from numbers import Real

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..evaluation.cases import CASES, ranking_cases
from ..evaluation.tables import CASE_ROWS
from . import summaries
from .picture import Picture, Usable, from_pairs, source
from .run_folder import STATE, Run
from .style import (
    BEST,
    BLUE,
    LOOKS,
    ORANGE,
    SKY,
    VERMILLION,
    label,
    legend_below,
    over_training,
    panels,
    percent,
    step_size,
    styled,
)

CASE_COLORS = dict(zip(CASES, (BLUE, VERMILLION, ORANGE, SKY), strict=True))

# fields that do not affect the training, or are private
UNINTERESTING = re.compile(r"_dir$|_token$|^run_name$|hub_|_hub|^logging_|^report_to$")
_SEEDS = ("seed", "data_seed")
_OF_CASES = ("step", "reward_gap", "margin", "logp_chosen", "logp_rejected", "length_chosen", "length_rejected")
METRICS = {"pwa": "PWA, clear pairs", "pwa_all": "PWA, all pairs", "spearman": "Spearman ρ"}


def _no_cases(of: Usable) -> str | None:
    from ..methods import names_of
    from ..registry import find_link, reward_class

    info, losses = of.run.info, names_of(of.run.config.get("loss_type"))
    if not (losses and {"reward", "base"} <= info.keys()):
        return "margin_run.json does not say reward and loss: an older version wrote it"
    try:
        reward_class(info["reward"])
        links = [find_link(info["base"], name) for name in losses]
    except ValueError as error:  # of a plug-in that is not installed
        return str(error)
    no_gap = [link.name for link in links if not (link.takes_margin or link.of_batch)]
    return f"loss_type {no_gap[0]!r} is no function of the reward gap less a margin" if no_gap else None


def cases_of(of: Usable) -> np.ndarray:
    """[pairs] 1 to 4, see `ranking_cases`."""
    from ..registry import reward_class

    reward, gap = reward_class(of.run.info["reward"]), of["reward_gap"]
    policy_gap = gap
    if reward.needs_reference:  # it is a part of the margin
        chosen, rejected = (
            of[f"logp_{side}"] * (of[f"length_{side}"] if reward.summed else 1) for side in ("chosen", "rejected")
        )
        policy_gap = chosen - rejected
    return ranking_cases(policy_gap, gap - of["margin"])


@from_pairs("cases", "Over- and underfitting: AMaPO's four cases", _OF_CASES, _no_cases)
def cases(found: list[Usable], runs: Sequence[Run]) -> tuple[Figure, str]:
    """How many pairs were in each case, over training."""
    figure, axes = panels(len(found))
    for panel, of in zip(axes, found, strict=True):
        case, step, size = cases_of(of), of["step"], step_size(of.run)[of.run.name]
        parts = summaries.phases(of.size, most=min(20, len(np.unique(step))), least=20)
        edges = np.array([step[part.start] - 1 for part in parts] + [step[-1]])
        below = np.zeros(len(parts))
        for i, color in enumerate(CASE_COLORS.values(), 1):
            above = below + [(case[part] == i).mean() for part in parts]
            panel.stairs(above, size * edges, baseline=below, fill=True, color=color, alpha=0.85)
            below = above
        over, under = (percent(round((case == i).mean(), 3)) for i in (2, 3))
        panel.set(ylim=(0, 1), ylabel="share of pairs")
        panel.set_title(f"{label(of.run.name)}\noverfitting {over}, underfitting {under}")
        panel.yaxis.set_major_formatter(percent)
        over_training(panel, of.run)
    legend_below(figure, [Patch(color=color) for color in CASE_COLORS.values()], list(CASE_ROWS.values()), columns=2)
    caption = (
        "r is the gap between the policy's own rewards, and γ what it is compared with: the target margin, and with a "
        "reference model that model's gap too. A pair beyond its margin (r ≥ γ) has a small gradient: wasted is the "
        "large one of a pair that is ranked right (overfitting), missing that of a pair that is ranked wrong "
        "(underfitting). Each pair at the step that trained on it, in up to 20 parts of training with equally many "
        f"pairs; the shares above a panel are of all. AMaPO, Table 1. {source(found, 'reward_gap, margin and logp')}"
    )
    return figure, caption


def differing(runs: Sequence[Run]) -> list[str]:
    """The config fields in which the runs differ, but for those that do not affect the training."""
    names = dict.fromkeys(name for run in runs for name in run.config if not UNINTERESTING.search(name))
    return [name for name in names if len({json.dumps(run.config.get(name)) for run in runs}) > 1]


def swept(runs: Sequence[Run]) -> str | None:
    """The one number in which the runs differ, apart from their seeds; None where it is another field or several.

    Of the two fields of the target margin, one follows from the other and β.
    """
    names = [name for name in differing(runs) if name not in _SEEDS]
    if {"simpo_gamma", "gamma_beta_ratio"} <= {*names}:
        names.remove("simpo_gamma")
    elif "beta" in names:
        names = [name for name in names if name not in ("simpo_gamma", "gamma_beta_ratio")]
    numbers = [run.config.get(name) for name in names[:1] for run in runs]
    of_numbers = all(isinstance(each, Real) and not isinstance(each, bool) for each in numbers)
    same_method = len({run.info.get("method") for run in runs}) == 1
    return names[0] if len(names) == 1 and of_numbers and same_method else None


@styled
def setting(runs: Sequence[Run]) -> Picture:
    """Ranking metrics over the one number in which the runs differ: of runs that are `swept`."""
    field = swept(runs)
    assert field is not None
    picture = Picture("setting", f"Ranking over {field}")
    curves = {run.name: summaries.ranking_curves(run) for run in runs}
    metrics = [m for m in summaries.RANKING if any(m == metric for c in curves.values() for _, metric in c)]
    sets = list(dict.fromkeys(of_set for c in curves.values() for of_set, _ in c))
    drawn = [run for run in runs if curves[run.name]]
    left_out = {run.name: f"{STATE} has no evaluation" for run in runs if run not in drawn}
    if not metrics:
        return replace(picture, left_out=left_out)
    figure, axes = panels(len(metrics), columns=len(metrics))
    at = np.array([run.config[field] for run in drawn], float)
    for panel, metric in zip(axes, metrics, strict=True):
        for of_set, look in zip(sets, cycle(LOOKS), strict=False):
            found = [curves[run.name].get((of_set, metric)) for run in drawn]
            there = [(x, curve) for x, curve in zip(at, found, strict=True) if curve is not None]
            values = np.array([curve.values[-1] for _, curve in there])
            xs = np.array([x for x, _ in there])
            panel.plot(xs, values, **{**look, "linestyle": "none"})
            middles = np.unique(xs)
            panel.plot(middles, [values[xs == x].mean() for x in middles], color=look["color"], marker="")
            best = [curve.values[curve.best] for _, curve in there]
            panel.plot(xs, best, linestyle="none", marker=look["marker"], fillstyle="none", color=look["color"])
        panel.set(title=METRICS[metric], xlabel=field)
        panel.set_ylabel("rank correlation" if metric == "spearman" else "share of pairs")
        if at.min() > 0 and at.max() >= 20 * at.min():
            panel.set_xscale("log")
    shown = dict(zip(sets, cycle(LOOKS), strict=False)) if len(sets) > 1 else {}
    shown |= {"last evaluation": BEST | {"fillstyle": "full"}, "best one": BEST}
    legend_below(figure, shown.values(), shown)
    caption = (
        f"A point per run, over {field}; all other settings but seeds are the same. Filled: the last evaluation of "
        "the training, with a line through the means of equal settings. Hollow: the best one. As AMaPO's figure 1a "
        f"for β. From {STATE}: {', '.join(f'eval_{m}' for m in metrics)}."
    )
    return replace(picture, figure=figure, caption=caption, left_out=left_out)
