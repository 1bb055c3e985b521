"""Reads what a trainer left in its output folder: settings, logged numbers, and one line for each trained pair."""

from __future__ import annotations

import csv
import json
import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

INFO, STATE, PAIRS = "margin_run.json", "trainer_state.json", "pair_log.csv"

MOST_BYTES = 100_000_000  # of a pair log, about a million pairs, that are read: a long run's has many times as many

# what is said of a file that is not there
WRITTEN_BY = {
    INFO: "the trainers of trl_margins write it to their output_dir when training begins, unless log_pairs is off",
    STATE: "the trainers of trl_margins write it to their output_dir when training ends, and with every checkpoint",
    PAIRS: "the trainers of trl_margins write it to their output_dir at every log, unless log_pairs is off",
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str  # in legends and tables; no two runs of a report share it
    path: Path
    info: Mapping[str, Any]  # margin_run.json
    log_history: Sequence[Mapping[str, Any]]  # of trainer_state.json; empty without one
    pairs: Mapping[str, np.ndarray]  # column → [trained pairs] float64, NaN where a cell is empty; empty without a log
    one_in: int = 1  # so many pairs of the log, of which one was read

    @property
    def config(self) -> Mapping[str, Any]:
        return self.info.get("config") or {}


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Every folder once, under its own name, or as much of its path as tells it from the others.

    Raises:
        ValueError: a folder that is given twice, or a file that does not say what it should.
        FileNotFoundError: no such folder, or no run in it.
    """
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice: name every run once")
    return [replace(read_run(f), name=name) for f, name in zip(folders, distinct_names(paths), strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that are all different."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same folder twice: {[str(path) for path in paths]}")


def read_run(folder: str | Path) -> Run:
    """The run in a folder. One of the numbers and the pair log may be missing: then the pictures made from it are.

    Raises:
        FileNotFoundError: no such folder, no `margin_run.json`, or neither numbers nor pairs.
        ValueError: a file that does not say what it should.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: a run is the output_dir of a training")
    if not (path / INFO).is_file():
        raise FileNotFoundError(f"{path} has no {INFO}: {WRITTEN_BY[INFO]}")
    info = _read_json(path / INFO)
    state, pairs = state_file(path), path / PAIRS
    if state is None and not pairs.is_file():
        raise FileNotFoundError(
            f"{path} has neither {STATE} nor {PAIRS}. {STATE}: {WRITTEN_BY[STATE]}. {PAIRS}: {WRITTEN_BY[PAIRS]}"
        )
    for name, missing in ((STATE, state is None), (PAIRS, not pairs.is_file())):
        if missing:
            logger.warning("%s has no %s (%s): the pictures from it are left out", path, name, WRITTEN_BY[name])
    history = [] if state is None else _read_json(state).get("log_history", [])
    run = Run(path.resolve().name, path, info, history, {})
    if not pairs.is_file():
        return run
    one_in = 1 + pairs.stat().st_size // MOST_BYTES
    if one_in > 1:
        logger.info("%s has %.0f MB: one in %d of its pairs is read", pairs, pairs.stat().st_size / 1e6, one_in)
    return replace(run, pairs=read_pairs(pairs, one_in), one_in=one_in)


def state_file(folder: Path) -> Path | None:
    """The folder's own `trainer_state.json`, else the newest checkpoint's."""
    if (folder / STATE).is_file():
        return folder / STATE
    numbered = [
        (int(number), path)
        for path in folder.glob(f"checkpoint-*/{STATE}")
        if (number := path.parent.name.removeprefix("checkpoint-")).isdecimal()
    ]
    return max(numbered)[1] if numbered else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): was the training stopped while writing it?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object: the trainer writes one")
    return content


def read_pairs(path: Path, one_in: int = 1) -> dict[str, np.ndarray]:
    """The columns of a pair log, [rows] each, steps in order.

    A last line that was cut off is dropped.

    Args:
        path: the file; a line at a time is in memory, and the numbers that are kept.
        one_in: so many pairs, of which the first is kept.

    Raises:
        ValueError: no header, no column `step`, steps out of order, a line of the wrong length, or a cell that is no
            number.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if "step" not in header:
            raise ValueError(f"{path} has no column 'step' in its first line, which reads {','.join(header)!r}")
        numbers, torn, seen = array("d"), None, 0
        for row in reader:
            if torn:
                raise ValueError(f"{path}, {torn} for {len(header)} columns: remove the line")
            if len(row) == len(header):
                if seen % one_in == 0:
                    cells = zip(row, header, strict=True)
                    numbers.extend(_number(cell, name, reader.line_num, path) for cell, name in cells)
                seen += 1
            elif row:
                torn = f"line {reader.line_num}: {len(row)} cells"
    if torn:
        logger.warning("%s: the last line is cut off, and dropped", path)
    table = np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(header))
    step = table[:, header.index("step")]
    if (falls := np.flatnonzero(~(np.diff(step) >= 0))).size:
        before, after = step[falls[0] : falls[0] + 2]
        raise ValueError(
            f"{path}, pair {one_in * (falls[0] + 1) + 1}: step {after:g} comes after step {before:g}; "
            "a log is of one training: remove what is not"
        )
    return {name: table[:, i] for i, name in enumerate(header)}


def _number(cell: str, column: str, line: int, path: Path) -> float:
    try:
        return float(cell) if cell else np.nan
    except ValueError:
        raise ValueError(
            f"{path}, line {line}, column {column!r}: {cell!r} is no number; correct the cell or leave it empty"
        ) from None
