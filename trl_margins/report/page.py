"""One HTML file with everything in it: settings, numbers, pictures, and what is missing. It loads nothing."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from . import summaries
from .figures import draw_pictures, flip_columns, no_flips, pair_weight
from .picture import Picture, thinned_logs, usable
from .run_folder import INFO, PAIRS, STATE, Run
from .style import WIDTH, styled

if TYPE_CHECKING:
    from ..methods import Method

logger = logging.getLogger(__name__)

PAGE = "report.html"
MEDIA = {"png": "image/png", "svg": "image/svg+xml"}

# shown of every run; beyond these the fields of its terms, and whatever differs between the runs
_SETTINGS = (
    "beta",
    "gamma_beta_ratio",
    "simpo_gamma",
    "reward",
    "loss_type",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "train_only",
    "seed",
)
# differ between runs without making them different, or are nobody's business
_UNINTERESTING = ("_dir", "_token", "run_name", "hub_", "_hub", "logging_", "report_to")

_METRICS = {"pwa": "PWA, clear pairs", "pwa_all": "PWA, all pairs", "spearman": "Spearman ρ"}

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: #fff; color: #222;
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p, figcaption, li { overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption, .note { color: #555; font-size: .9rem; max-width: 46rem; }
.wide { overflow-x: auto; }
.wide img { display: block; max-width: 100%; height: auto; min-width: 30rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
.number { text-align: right; }
td.number { white-space: nowrap; }
td { min-width: 4rem; max-width: 22rem; overflow-wrap: break-word; }
tbody th { font-weight: 400; color: #555; white-space: nowrap; }
code { font-size: .9em; }
"""
# nothing may be fetched, whatever a file of the run says
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(runs: Sequence[Run], out: str | Path, image_format: str = "png") -> list[Path]:
    """Draws all pictures of the runs and writes them, and the page that holds them, to a folder.

    Returns:
        The files, the page first.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(runs)
    images = {p.name: render(p.figure, image_format) for p in pictures if p.figure is not None}
    for picture in pictures:
        for name, reason in picture.left_out.items():
            logger.info("%s leaves out %s: %s", picture.name, name, reason)
    page = out / PAGE
    page.write_text(html_page(runs, pictures, images, image_format), encoding="utf-8")
    files = [page]
    for name, image in images.items():
        files.append(out / f"{name}.{image_format}")
        files[-1].write_bytes(image)
    return files


@styled
def render(figure: Figure, image_format: str) -> bytes:
    """The same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=image_format, metadata={"Date": None} if image_format == "svg" else None)
    return buffer.getvalue()


def html_page(runs: Sequence[Run], pictures: Sequence[Picture], images: Mapping[str, bytes], image_format: str) -> str:
    title = f"Training report: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _folders(runs),
        "<h2>Settings</h2>",
        _settings(runs),
        "<h2>Evaluation</h2>",
        _evaluations(runs),
        *_flips(runs),
        *(_section(picture, images[picture.name], image_format) for picture in pictures if picture.name in images),
        _left_out(pictures, several=len(runs) > 1),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _folders(runs: Sequence[Run]) -> str:
    rows = "".join(f"<li><b>{escape(run.name)}</b> – <code>{escape(str(run.path))}</code></li>" for run in runs)
    return (
        f"<p>Made by trl-margins from {INFO}, {STATE} and {PAIRS} of "
        f"{'these folders' if len(runs) > 1 else 'this folder'}, and from nothing else.</p>\n<ul>{rows}</ul>"
    )


def _settings(runs: Sequence[Run]) -> str:
    rows: dict[str, list[Any]] = {
        "method": [run.info.get("name") or run.info.get("method") for run in runs],
        "paper": [_paper(run) for run in runs],
        "objective, as in the paper": [_formula(run) for run in runs],
        "trainer": [run.info.get("trainer") for run in runs],
        "model": [run.info.get("model") for run in runs],
        "training pairs": [run.info.get("train_rows") for run in runs],
        "steps trained": [_last_step(run) for run in runs],
        "weight term": [run.info.get("weight") for run in runs],
        "margin term": [run.info.get("margin") for run in runs],
    }
    for name in _fields(runs):
        rows[name] = [run.config.get(name) for run in runs]
    rows["trl_margins"] = [run.info.get("version") for run in runs]
    body = [[name, *map(_text, values)] for name, values in rows.items() if any(v is not None for v in values)]
    return _table(["", *(run.name for run in runs)], body)


def _fields(runs: Sequence[Run]) -> list[str]:
    """Config fields worth a row: the usual ones, those of a run's terms, and those in which the runs differ."""
    every = dict.fromkeys(name for run in runs for name in run.config)
    usual = [name for name in _SETTINGS if name in every]
    others = [name for name in every if name not in usual and not any(part in name for part in _UNINTERESTING)]
    options = {name for run in runs for name in run.info.get("term_options", [])}
    sam = any(run.config.get("sam_radius") for run in runs)
    terms = [name for name in others if name in options or (sam and name.startswith("sam_"))]
    different = [name for name in others if len({json.dumps(run.config.get(name)) for run in runs}) > 1]
    return list(dict.fromkeys([*usual, *terms, *different]))


def _method(run: Run) -> Method | None:
    """The run's method, where it is known here."""
    from ..registry import METHODS, method_ids

    method = run.info.get("method")
    return METHODS[method] if method in method_ids() else None


def _paper(run: Run) -> str | None:
    method = _method(run)
    if method is None:
        return None
    return f"{method.paper.title} (arXiv {method.paper.arxiv})" if method.paper.arxiv else method.paper.title


def _formula(run: Run) -> str | None:
    method = _method(run)
    return method.formula if method else None


def _last_step(run: Run) -> int | None:
    logged = [entry["step"] for entry in run.log_history if "step" in entry]
    trained = run.pairs.get("step", np.empty(0))
    steps = [*logged, *(int(step) for step in trained[np.isfinite(trained)][-1:])]
    return max(steps, default=None)


def _evaluations(runs: Sequence[Run]) -> str:
    """A row for each run and evaluation set; best and last of each metric, with the step."""
    curves = {run.name: summaries.ranking_curves(run) for run in runs}
    rows = list(dict.fromkeys((run, of_set) for run, of_run in curves.items() for of_set, _ in of_run))
    metrics = [m for m in summaries.RANKING if any((of_set, m) in curves[run] for run, of_set in rows)]
    if not rows:
        return f'<p class="note">No run has evaluations in its {STATE}.</p>'
    named = any(of_set for _, of_set in rows)
    body = []
    for run, of_set in rows:
        cells = [run, of_set] if named else [run]
        for metric in metrics:
            curve = curves[run].get((of_set, metric))
            points = (curve.best, -1) if curve else ()
            cells += [f"{curve.values[i]:.4f} ({curve.steps[i]:g})" for i in points] or ["–", "–"]
        body.append(cells)
    head = ["run", "evaluation set"] if named else ["run"]
    head += [f"{_METRICS[metric]}: {which} (step)" for metric in metrics for which in ("best", "last")]
    least = sorted({_text(run.config.get("eval_min_score_gap")) for run in runs})
    note = (
        f"From the log in {STATE}. Clear pairs are those whose score gap is at least eval_min_score_gap "
        f"({', '.join(least)}). The best of several evaluations on one set is a little flattered by being picked."
    )
    return _table(head, body, numbers=2 * len(metrics)) + f'\n<p class="note">{escape(note)}</p>'


def _flips(runs: Sequence[Run]) -> list[str]:
    """A row a run whose pair log knows which labels are flipped; over the whole of training."""
    found, _ = usable(runs, flip_columns, no_flips)
    rows = []
    for of in found:
        name, weight = pair_weight(of)
        marked = of["is_flipped"] > 0.5
        tier = summaries.tiers(weight)
        by_tier = [_interval(summaries.rate(marked[tier == t]), _percent) for t in (0, 2)]
        means = [_interval(summaries.mean(weight[rows])) for rows in (~marked, marked)]
        rows.append(
            [of.run.name, f"{marked.sum():,} of {marked.size:,} ({_percent(marked.mean())})", name, *means, *by_tier]
        )
    if not rows:
        return []
    head = [
        "run",
        "flipped pairs",
        "weight",
        "mean, clean",
        "mean, flipped",
        "flipped in lowest third",
        "in highest third",
    ]
    note = f"Over the trained pairs of {PAIRS}; in brackets 95 % intervals.{thinned_logs(of.run for of in found)}"
    return ["<h2>Flipped labels</h2>", _table(head, rows, numbers=4), f'<p class="note">{escape(note)}</p>']


def _interval(value_low_high: Sequence[float], form: Callable[[float], str] = "{:.4g}".format) -> str:
    value, low, high = map(form, value_low_high)
    return f"{value} [{low}, {high}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _section(picture: Picture, image: bytes, image_format: str) -> str:
    data = base64.b64encode(image).decode()
    width = round(96 * picture.figure.get_figwidth()) if picture.figure is not None else round(96 * WIDTH)
    return (
        f"<h2>{escape(picture.title)}</h2>\n<figure>\n"
        f'<div class="wide"><img src="data:{MEDIA[image_format]};base64,{data}" width="{width}" '
        f'alt="{escape(picture.title)}"></div>\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    )


def _left_out(pictures: Sequence[Picture], several: bool) -> str:
    """Every picture that is not there, or not of all runs."""
    reasons = [
        [picture.title, *([name] if several else []), reason]
        for picture in pictures
        for name, reason in picture.left_out.items()
    ]
    if not reasons:
        return ""
    head = ["picture", *(["run"] if several else []), "why"]
    return "<h2>Left out</h2>\n" + _table(head, reasons)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """The first cell of a row is its heading; the last so many hold numbers."""

    def cell(tag: str, text: str, i: int) -> str:
        number = ' class="number"' if i >= len(head) - numbers else ""
        return f"<{tag}{number}>{escape(text)}</{tag}>"

    top = "".join(cell("th", text, i) for i, text in enumerate(head))
    body = "\n".join(
        "<tr>" + "".join(cell("td" if i else "th", text, i) for i, text in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)
