"""What every picture has: a figure, a caption, and the runs that are left out with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps

import numpy as np
from matplotlib.figure import Figure

from .run_folder import ANCHORS, PAIRS, WRITTEN_BY, Run
from .style import styled

_NO_TEXTS = "only a margin from the two texts ('gap-aware') has one"
_ABSENT = {
    "score_gap": "the training set has no scores",
    "is_flipped": "the training set does not say which labels are flipped",
    "evaluation_factor": _NO_TEXTS,
    "mapped_factor": _NO_TEXTS,
}


@dataclass(frozen=True)
class Picture:
    """A figure (None if no run has the numbers), its caption, and why runs are left out."""

    name: str  # of its file
    title: str
    figure: Figure | None = None
    caption: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)  # run → reason


@dataclass(frozen=True)
class Usable:
    """The pairs of a run with a number in every column that a picture needs, in the order of training."""

    run: Run
    columns: Mapping[str, np.ndarray]
    logged: int  # pairs in the log
    file: str = PAIRS  # the log

    @property
    def size(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]


Objection = Callable[[Usable], "str | None"]
Draw = Callable[[Sequence[Run]], Picture]
Columns = Sequence[str] | Callable[[Run], Sequence[str]]  # that a picture needs, of any run or of this one
DrawUsable = Callable[[list[Usable], Sequence[Run]], tuple[Figure, str]]


def from_pairs(
    name: str,
    title: str,
    columns: Columns,
    objection: Objection = lambda _: None,
    file: str = PAIRS,
) -> Callable[[DrawUsable], Draw]:
    """Decorator: a picture from the pair logs, of a function from the usable and all runs to figure and caption."""

    def decorate(draw: DrawUsable) -> Draw:
        @wraps(draw)
        @styled
        def drawn(runs: Sequence[Run]) -> Picture:
            found, left_out = usable(runs, columns, objection, file)
            figure, caption = draw(found, runs) if found else (None, "")
            return Picture(name, title, figure, caption, left_out)

        return drawn

    return decorate


def usable(
    runs: Sequence[Run],
    columns: Columns,
    objection: Objection = lambda _: None,
    file: str = PAIRS,
) -> tuple[list[Usable], dict[str, str]]:
    """The runs that have the columns and raise no objection; and why the others are left out."""
    found, left_out = [], {}
    for run in runs:
        chosen = _choose(run, columns(run) if callable(columns) else columns, file)
        reason = chosen if isinstance(chosen, str) else objection(chosen)
        if isinstance(chosen, Usable) and reason is None:
            found.append(chosen)
        else:
            left_out[run.name] = str(reason)
    return found, left_out


def _choose(run: Run, names: Sequence[str], file: str) -> Usable | str:
    pairs = run.anchors if file == ANCHORS else run.pairs
    if not pairs:
        return f"the folder has no {file}: {WRITTEN_BY[file]}"
    if missing := [name for name in names if name not in pairs]:
        reason = f" ({_ABSENT[missing[0]]})" if missing[0] in _ABSENT else ""
        return f"{file} has no column {missing[0]}{reason}"
    rows = np.isfinite([pairs[name] for name in names]).all(axis=0)
    if not rows.any():
        return f"no line of {file} has a number in each of {', '.join(names)}"
    return Usable(run, {name: pairs[name][rows] for name in names}, rows.size, file)


def source(runs: Sequence[Usable], columns: str) -> str:
    """Where the numbers of a picture are from, how many there are, and how many could not be used."""
    each = " per run" if len(runs) > 1 else ""
    file = runs[0].file
    kind = "trained" if file == PAIRS else "measured"
    text = f"From {file}: {columns} of {span(of.size for of in runs)} {kind} pairs{each}."
    if incomplete := [f"{of.logged - of.size:,} of {of.run.name}" for of in runs if of.size < of.logged]:
        text += f" Left out for an empty cell: {', '.join(incomplete)}."
    return text + (thinned_logs(of.run for of in runs) if file == PAIRS else "")


def thinned_logs(runs: Iterable[Run]) -> str:
    """A sentence about logs that are too long to be read whole; empty if there are none."""
    parts = ", ".join(f"one in {run.one_in} of {run.name}" for run in runs if run.one_in > 1)
    return f" These are not all pairs, but evenly spaced ones of long logs: {parts}." if parts else ""


def span(numbers: Iterable[int]) -> str:
    """One number, or the least and the greatest of several."""
    least, *_, greatest = sorted({*numbers}) * 2
    return f"{least:,}" if least == greatest else f"{least:,} to {greatest:,}"
