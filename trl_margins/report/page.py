"""One HTML file with everything in it: settings, numbers, pictures, and what is missing. It loads nothing else."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from . import summaries
from .figures import draw_pictures, flip_columns, no_flips, pair_weight
from .margin_figures import SMOOTHING, no_smoothing, smoothing_of
from .markdown import one_line
from .picture import Picture, Usable, thinned_logs, usable
from .ranking_figures import METRICS, UNINTERESTING, differing
from .run_folder import ANCHORS, INFO, PAIRS, STATE, TRAINING, Run
from .style import styled

logger = logging.getLogger(__name__)

PAGE = "report.html"
MEDIA = {"png": "image/png", "svg": "image/svg+xml"}

# shown for every run, beside the fields of its terms and those in which the runs differ
_SETTINGS = ("beta", "gamma_beta_ratio", "simpo_gamma", "reward", "loss_type", *TRAINING)


def write_report(runs: Sequence[Run], out: str | Path, image_format: str = "png") -> list[Path]:
    """Draws all pictures of the runs, and writes the page and them to a folder. Returns the files, the page first."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(runs)
    images = {p.name: render(p.figure, image_format) for p in pictures if p.figure is not None}
    for picture in pictures:
        for name, reason in picture.left_out.items():
            logger.info("%s leaves out %s: %s", picture.name, name, reason)
    files = {out / PAGE: html_page(runs, pictures, images, image_format).encode()}
    files |= {out / f"{name}.{image_format}": image for name, image in images.items()}
    for file, content in files.items():
        file.write_bytes(content)
    return list(files)


@styled
def render(figure: Figure, image_format: str) -> bytes:
    """The image of a figure. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=image_format, metadata={"Date": None} if image_format == "svg" else None)
    return buffer.getvalue()


def html_page(runs: Sequence[Run], pictures: Sequence[Picture], images: Mapping[str, bytes], image_format: str) -> str:
    """The page, from its template."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    template = Environment(loader=loader, autoescape=True).get_template("report.html.jinja")
    data = f"data:{MEDIA[image_format]};base64,"
    flipped, _ = usable(runs, flip_columns, no_flips)
    smoothed, _ = usable(runs, SMOOTHING, no_smoothing)
    return template.render(
        title=f"Training report: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        files=(INFO, STATE, PAIRS, *([ANCHORS] if any(run.anchors for run in runs) else [])),
        runs=runs,
        settings=_settings(runs),
        evaluations=_evaluations(runs),
        flips=list(map(_flips, flipped)),
        smoothing=list(map(_smoothing, smoothed)),
        thinned={"flips": thinned_logs(of.run for of in flipped), "smoothing": thinned_logs(o.run for o in smoothed)},
        pictures=pictures,
        images={name: data + base64.b64encode(image).decode() for name, image in images.items()},
        left_out=[(picture.title, *left) for picture in pictures for left in picture.left_out.items()],
    )


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    """A name and a value for each run; nothing that no run says."""
    from ..registry import METHODS, method_ids

    ids = [run.info.get("method") for run in runs]
    methods = [METHODS[each] if each in method_ids() else None for each in ids]
    papers = [method and method.paper for method in methods]
    info = {"trainer": "trainer", "model": "model", "weight term": "weight", "margin term": "margin"}
    rows: dict[str, list[Any]] = {
        "method": [run.info.get("name") or run.info.get("method") for run in runs],
        "paper": [p and (f"{p.title} (arXiv {p.arxiv})" if p.arxiv else p.title) for p in papers],
        "objective, as in the paper": [method and method.formula for method in methods],
        **{label: [run.info.get(key) for run in runs] for label, key in info.items()},
        "training pairs": [run.info.get("train_rows") for run in runs],
        "pairs per step": [run.pairs_per_step for run in runs],
        "steps trained": [_last_step(run) for run in runs],
        **{name: [run.config.get(name) for run in runs] for name in _fields(runs)},
        "trl_margins": [run.info.get("version") for run in runs],
    }
    return [[name, *map(one_line, row)] for name, row in rows.items() if any(value is not None for value in row)]


def _fields(runs: Sequence[Run]) -> list[str]:
    """The config fields to show: the usual ones, those of a run's terms, and those in which the runs differ."""
    every = dict.fromkeys(name for run in runs for name in run.config)
    options = {name for run in runs for name in run.info.get("term_options", [])}
    options |= {"sam_radius" for run in runs if run.config.get("sam_radius")}
    others = [name for name in every if not UNINTERESTING.search(name)]
    usual = [name for name in _SETTINGS if name in every]
    of_terms = [name for name in others if name in options]
    return list(dict.fromkeys([*usual, *of_terms, *differing(runs)]))


def _last_step(run: Run) -> int | None:
    logged = [entry["step"] for entry in run.log_history if "step" in entry]
    trained = run.pairs.get("step", np.empty(0))
    return max([*logged, *(int(step) for step in trained[np.isfinite(trained)][-1:])], default=None)


def _evaluations(runs: Sequence[Run]) -> dict[str, Any]:
    """A row for each run and evaluation set; best and last value of each metric, with the step."""
    curves = {run.name: summaries.ranking_curves(run) for run in runs}
    keys = list(dict.fromkeys((run, of_set) for run, of_run in curves.items() for of_set, _ in of_run))
    metrics = [m for m in summaries.RANKING if any((of_set, m) in curves[run] for run, of_set in keys)]
    n_names = 2 if any(of_set for _, of_set in keys) else 1
    rows = []
    for run, of_set in keys:
        rows.append([run, of_set][:n_names])
        for metric in metrics:
            if curve := curves[run].get((of_set, metric)):
                rows[-1] += [f"{curve.values[i]:.4f} ({curve.steps[i]:g})" for i in (curve.best, -1)]
            else:
                rows[-1] += ["–", "–"]
    heads = [f"{METRICS[metric]}: {which} (step)" for metric in metrics for which in ("best", "last")]
    return {
        "rows": rows,
        "head": ["run", "evaluation set"][:n_names] + heads,
        "numbers": len(heads),
        "min_score_gaps": sorted({one_line(run.config.get("eval_min_score_gap")) for run in runs}),
    }


def _flips(of: Usable) -> list[str]:
    """The cells of a run whose pair log knows which labels are flipped, over the whole training."""
    name, weight = pair_weight(of)
    marked = of["is_flipped"] > 0.5
    tier = summaries.tiers(weight)
    means = [_interval(summaries.mean(weight[rows])) for rows in (~marked, marked)]
    by_tier = [_interval(summaries.rate(marked[tier == t]), _percent) for t in (0, 2)]
    return [of.run.name, f"{marked.sum():,} of {marked.size:,} ({_percent(marked.mean())})", name, *means, *by_tier]


def _smoothing(of: Usable) -> list[str]:
    """The cells of a run whose margins lie around a shared target, over the whole training."""
    (target, rate), gap = smoothing_of(of), of["reward_gap"]
    cells = [of.run.name, f"{target:g}"]
    for side in (gap < 0, gap > 0):
        quartiles = np.quantile(rate[side], (0.5, 0.25, 0.75)).tolist() if side.any() else None
        cells += [f"{side.sum():,} ({_percent(side.mean())})", _interval(quartiles) if quartiles else "–"]
    near = np.abs(of["margin"] - target) < np.abs(gap) / 10
    return [*cells, _percent(((rate >= 0) & (rate <= 0.5)).mean()), _percent(near.mean())]


def _interval(value_low_high: Sequence[float], form: Callable[[float], str] = "{:.4g}".format) -> str:
    value, low, high = map(form, value_low_high)
    return f"{value} [{low}, {high}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
