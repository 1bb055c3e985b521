"""What is drawn: each part of each picture of the report and of `inspect`, with its color, marker, place and words.

`drawn.txt` has them all. `python tests/test_drawn.py` writes it anew: read what has changed, and look at the pictures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from matplotlib import colors
from matplotlib.collections import Collection
from matplotlib.legend import Legend
from test_report import diagnosed, make_run, pair_columns, write_pairs

from trl_margins.data.audit import audit
from trl_margins.report.audit_figure import _pictures, audit_figure
from trl_margins.report.densities import densities
from trl_margins.report.figures import draw_pictures
from trl_margins.report.run_folder import read_run

LONG = "0123456789" * 7  # no picture has it in one line
WRITTEN = Path(__file__).with_name("drawn.txt")


def number(value: Any) -> str:
    return f"{float(value):.3g}"


def color(value: Any) -> str:
    values = np.atleast_2d(colors.to_rgba_array(value))
    return " ".join(dict.fromkeys(colors.to_hex(each, keep_alpha=True) for each in values)) or "none"


def words(*values: Any) -> str:
    return " ".join(number(each) if isinstance(each, float) else str(each) for each in values)


def of_line(line: Any) -> str:
    x, y = (np.asarray(each, float) for each in (line.get_xdata(), line.get_ydata()))
    look = words(line.get_linestyle(), line.get_linewidth(), line.get_marker(), line.get_markersize())
    of_marker = words(color(line.get_markerfacecolor()), color(line.get_markeredgecolor()), line.get_markevery())
    ends = ", ".join(map(number, (*x[[0, -1]], *y[[0, -1]])))
    order = line.get_zorder()
    return f"line {line.get_label()!r} {color(line.get_color())} {look} {of_marker} {order} [{len(x)}: {ends}]"


def of_collection(found: Collection) -> str:
    widths, sizes = (np.asarray(each, float)[:1] for each in (found.get_linewidths(), getattr(found, "_sizes", ())))
    look = words(color(found.get_facecolor()), color(found.get_edgecolor()), found.get_zorder(), *widths, *sizes)
    extents = ", ".join(map(number, found.get_datalim(found.axes.transData).extents))
    return f"{type(found).__name__} {found.get_label()!r} {look} [{extents}]"


def of_patch(patch: Any) -> str:
    look = words(color(patch.get_facecolor()), color(patch.get_edgecolor()), patch.get_linewidth(), patch.get_hatch())
    extents = patch.get_path().transformed(patch.get_patch_transform()).get_extents().extents
    return f"{type(patch).__name__} {patch.get_label()!r} {look} [{', '.join(map(number, extents))}]"


def of_text(text: Any) -> str:
    return words(
        "text", repr(text.get_text()), color(text.get_color()), text.get_fontsize(), text.get_ha(), text.get_va()
    )


def of_legend(legend: Legend) -> str:
    return words("legend", [each.get_text() for each in legend.get_texts()], legend._ncols, legend.get_frame_on())


def of_axes(panel: Any) -> Iterator[str]:
    yield "panel " + ", ".join(f"{each:.2f}" for each in panel.get_position().bounds)
    yield f"titles {[panel.get_title(loc) for loc in ('left', 'center', 'right')]}"
    for name, axis in (("x", panel.xaxis), ("y", panel.yaxis)):
        ticks = [text.get_text() for text in axis.get_ticklabels()]
        ends = ", ".join(map(number, axis.get_view_interval()))
        yield f"{name} {axis.get_label_text()!r} {axis.get_scale()} [{ends}] {axis.get_visible()} {ticks}"
    yield from map(of_line, panel.lines)
    yield from map(of_collection, panel.collections)
    yield from map(of_patch, panel.patches)
    yield from map(of_text, panel.texts)
    if panel.get_legend() is not None:
        yield of_legend(panel.get_legend())


def of_figure(figure: Any) -> Iterator[str]:
    yield "figure " + " × ".join(map(number, figure.get_size_inches()))
    yield f"layout {figure.get_layout_engine().get()}"
    for panel in figure.axes:
        yield from of_axes(panel)
    yield from map(of_text, figure.texts)
    yield from map(of_legend, figure.legends)


def runs(folder: Path) -> Iterator[tuple[str, list[Any]]]:
    """Of one run, of several at once, with what only some runs have."""
    for method, flips in (("gappo", 0.0), ("gap-aware", 0.0), ("geometric-anchor", 0.2)):
        yield method, [read_run(make_run(folder / method, method, flips=flips))]
    several = [
        read_run(make_run(folder / f"{method}-{seed}-{LONG}", method, seed=seed, sets=("a", "b"), learning_rate=rate))
        for method, seed, rate in (("gappo", 0, 1e-5), ("gamma-po", 1, 1e-5), ("gappo", 2, 1e-6))
    ]
    yield "several", several
    equal = pair_columns("gappo", 2, 4, 0, 0.0)
    equal["reward_gap"] = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0])  # the first have no density
    equal["score_gap"] = np.zeros(8)
    make_run(folder / "equal", "gappo", steps=2, batch=4)
    write_pairs(folder / "equal" / "pair_log.csv", equal)
    yield "few", [read_run(folder / "equal")]
    yield (
        "anchors",
        [
            diagnosed(folder / f"known-{LONG}", steps=(1, 21, 41)),
            diagnosed(folder / f"unknown-{LONG}", flips=False),
        ],
    )
    yield (
        "swept",
        [
            read_run(make_run(folder / f"beta-{beta:g}-{seed}", "gappo", 20, seed=seed, beta=beta))
            for beta, seed in ((1.0, 0), (1.0, 1), (20.0, 0))
        ],
    )


def audited() -> Any:
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"q {i} ",
            "chosen": " ".join(f"w{n}" for n in rng.integers(0, 9, 3 + i % 5)),
            "rejected": " ".join(f"w{n}" for n in rng.integers(0, 9, 4)),
            "score_chosen": float(i % 6),
            "score_rejected": 1.0,
        }
        for i in range(40)
    ]
    return audit(
        {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:9])}, ef_metrics=["rouge1", "rougeL"]
    )


@cache
def drawn() -> tuple[str, ...]:
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, some in runs(Path(folder)):
            for picture in draw_pictures(some):
                lines += [
                    "",
                    f"{name}: {picture.name}",
                    f"caption {picture.caption!r}",
                    f"left out {picture.left_out}",
                ]
                lines += of_figure(picture.figure) if picture.figure is not None else ()
    found = audited()
    lines += ["", "inspect: histograms", *of_figure(audit_figure(found))]
    for picture in _pictures(found):
        lines += ["", f"inspect: {picture.name}", f"caption {picture.caption!r}", *of_figure(picture.figure)]
    rng = np.random.default_rng(1)
    sets = {name: {model: tuple(rng.random((3, 8))) for model in ("one", "other")} for name in ("a", "b")}
    for reward in ("length-normalized", "sum"):
        figure, caption = densities(sets, reward)
        lines += ["", f"evaluate: {reward}", f"caption {caption!r}", *of_figure(figure)]
    return tuple(lines)


@pytest.mark.rehearsal
def test_what_is_drawn():
    assert drawn() == tuple(WRITTEN.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    WRITTEN.write_text("\n".join(drawn()) + "\n", encoding="utf-8")
