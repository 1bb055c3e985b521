"""One HTML file with everything in it: results, pictures, settings, and what is missing. It loads nothing else."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader

from ..disk import write
from ..printable import printable
from . import summaries
from .figures import draw_pictures, flip_columns, no_flips, pair_weight
from .margin_figures import SMOOTHING, no_smoothing, smoothing_of
from .picture import Picture, Usable, thinned_logs, usable
from .results import headline, ranked, reached, table, without_evaluation
from .run_folder import ANCHORS, INFO, PAIRS, STATE, Run
from .settings import other_settings, settings
from .style import BLUE, DARK, INK, PAPER, render

PAGE = "report.html"
MEDIA = {"png": "image/png", "svg": "image/svg+xml"}


def write_report(runs: Sequence[Run], out: str | Path, image_format: str = "png") -> list[Path]:
    """Draws all pictures of the runs, and writes the page and them to a folder. Returns the files, the page first.

    The page has the pictures of a dark page, too.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(runs)
    images = {
        p.name: (render(p.figure, image_format), render(p.figure, image_format, dark=True))
        for p in pictures
        if p.figure is not None
    }
    files = {out / PAGE: html_page(runs, pictures, images, image_format).encode()}
    files |= {out / f"{name}.{image_format}": image for name, (image, _) in images.items()}
    for file, content in files.items():
        if file.is_symlink():  # what it leads to is no page
            file.unlink()
        write(file, content)
    return list(files)


def html_page(
    runs: Sequence[Run], pictures: Sequence[Picture], images: Mapping[str, tuple[bytes, bytes]], image_format: str
) -> str:
    """The page, from its template. `images` are those for a light page, and for a dark one."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    template = Environment(loader=loader, autoescape=True).get_template("report.html.jinja")
    data = f"data:{MEDIA[image_format]};base64,"
    flipped, _ = usable(runs, flip_columns, no_flips)
    smoothed, _ = usable(runs, SMOOTHING, no_smoothing)
    shown = settings(runs)
    page = template.render(
        title=f"Training report: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        files=(INFO, STATE, PAIRS, *([ANCHORS] if any(run.anchors for run in runs) else [])),
        runs=runs,
        headlines=[
            (run.name, headline(run), ranked(run) if reached(run) else " ".join(without_evaluation(run)))
            for run in runs
        ],
        results=table(runs),
        settings=shown,
        other_settings=other_settings(runs, shown),
        paper=DARK[PAPER],
        ink=DARK[INK],
        link=(BLUE, DARK[BLUE]),
        flips=list(map(_flips, flipped)),
        smoothing=list(map(_smoothing, smoothed)),
        thinned={"flips": thinned_logs(of.run for of in flipped), "smoothing": thinned_logs(o.run for o in smoothed)},
        pictures=pictures,
        images={name: [data + base64.b64encode(each).decode() for each in both] for name, both in images.items()},
        left_out=[(picture.title, *left) for picture in pictures for left in picture.left_out.items()],
    )
    return printable(page)


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
