"""Reads what a trainer wrote to its output folder: settings, logged numbers, and one line per trained pair."""

from __future__ import annotations

import csv
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from ..checks import shown

logger = logging.getLogger(__name__)

INFO, STATE, PAIRS = "margin_run.json", "trainer_state.json", "pair_log.csv"
ANCHORS = "anchor_diagnostics.csv"

# of `margin_run.json`, where they are not null
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("base", "method", "name", "model", "reference", "reward", "weight", "margin", "version"), str),
    **dict.fromkeys(("term_options", "reward_options", "score_columns"), list),
    **dict.fromkeys(("beta", "gamma", "train_rows", "pairs_per_step"), (int, float)),
    **dict.fromkeys(("config", "adapter"), dict),
}

# the config fields of every training that reports and cards show
TRAINING = (
    *("train_only", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_length", "max_completion_length", "seed"),
)

_LARGEST = float(np.finfo(np.float32).max)
MOST_BYTES = 100_000_000  # of a pair log, about a million pairs, that are read: long runs have many times as many

# said of a file that is missing
WRITTEN_BY = {
    INFO: "the trainers of trl_margins write it to their output_dir when training begins",
    STATE: "the trainers of trl_margins write it to their output_dir when training ends, and with every checkpoint",
    PAIRS: "the trainers of trl_margins write it to their output_dir at every log, unless log_pairs is off",
    ANCHORS: "the trainers of trl_margins write it where an anchor is measured (GAPO) and anchor_diagnostics is set",
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str  # in legends and tables; unique in a report
    path: Path
    info: Mapping[str, Any]  # margin_run.json
    log_history: Sequence[Mapping[str, Any]]  # of trainer_state.json; empty without one
    pairs: Mapping[str, np.ndarray]  # column → [trained pairs] float64, NaN where a cell is empty; empty without a log
    one_in: int = 1  # one in so many pairs of the log was read
    anchors: Mapping[str, np.ndarray] = field(default_factory=dict)  # anchor_diagnostics.csv, likewise
    best_step: int | None = None  # whose model was loaded at the end; None for the last step's

    @property
    def config(self) -> Mapping[str, Any]:
        return self.info.get("config") or {}

    @property
    def pairs_per_step(self) -> int | None:
        """Of a whole optimizer step; None of a run before the trainers wrote it."""
        number = self.info.get("pairs_per_step")
        return number if isinstance(number, int) and number > 0 else None


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs, each named after its folder, or by as much of the path as makes the name unique.

    Raises:
        ValueError: a folder that is given twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice: name every run once")
    return [replace(read_run(folder), name=name) for folder, name in zip(folders, unique_names(paths), strict=True)]


def unique_names(paths: Sequence[str | Path]) -> list[str]:
    """Each by its last part, or by as many parts as make all of them unique."""
    depth = 1
    while len(set(names := ["/".join(Path(path).parts[-depth:]) for path in paths])) < len(paths):
        depth += 1
    return names


def read_run(folder: str | Path) -> Run:
    """The run in a folder. Numbers or pair log may be missing: then the pictures from them are left out.

    Raises:
        FileNotFoundError: no such folder, no `margin_run.json`, or neither numbers nor pairs.
        ValueError: a malformed file.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory: a run is the output_dir of a training")
    if not (path / INFO).is_file():
        raise FileNotFoundError(f"{path} has no {INFO}: {WRITTEN_BY[INFO]}")
    info = _read_info(path / INFO)
    state, pairs = _state_file(path), path / PAIRS
    missing = [name for name, there in ((STATE, state), (PAIRS, pairs.is_file())) if not there]
    if len(missing) == 2:
        raise FileNotFoundError(
            f"{path} has neither {STATE} nor {PAIRS}. {STATE}: {WRITTEN_BY[STATE]}. {PAIRS}: {WRITTEN_BY[PAIRS]}"
        )
    for name in missing:
        logger.warning("%s has no %s (%s): the pictures from it are left out", path, name, WRITTEN_BY[name])
    content = read_json(state) if state else {}
    history = content.get("log_history", [])
    if not is_history(history):
        raise ValueError(f"{state}: its log_history is not a list of objects with numbers: it is damaged, remove it")
    anchors = read_pairs(path / ANCHORS) if (path / ANCHORS).is_file() else {}
    best = content.get("best_global_step") if (info.get("config") or {}).get("load_best_model_at_end") else None
    run = Run(path.resolve().name, path, info, history, {}, anchors=anchors, best_step=best)
    if PAIRS in missing:
        return run
    one_in = 1 + pairs.stat().st_size // MOST_BYTES
    if one_in > 1:
        logger.info("%s has %.0f MB: one in %d of its pairs is read", pairs, pairs.stat().st_size / 1e6, one_in)
    return replace(run, pairs=read_pairs(pairs, one_in), one_in=one_in)


def _state_file(folder: Path) -> Path | None:
    """The `trainer_state.json` of the folder, or else of the newest checkpoint."""
    if (folder / STATE).is_file():
        return folder / STATE
    steps = {path: path.parent.name.removeprefix("checkpoint-") for path in folder.glob(f"checkpoint-*/{STATE}")}
    return max((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]), default=None)


def is_history(content: Any) -> bool:
    """Whether it is what a trainer state calls `log_history`."""
    numbers = ("step", "epoch", "loss", "learning_rate")
    return isinstance(content, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(name, 0), int | float) for name in numbers)
        for entry in content
    )


def _read_info(path: Path) -> dict[str, Any]:
    """A run's settings.

    Raises:
        ValueError: they are damaged.
    """
    info = read_json(path)
    wrong = [name for name, kinds in _KINDS.items() if not isinstance(info.get(name), (kinds, NoneType))]
    if info.get("base", "cpo") not in ("cpo", "dpo"):
        wrong.append("base")
    if wrong:
        raise ValueError(
            f"{path}: {wrong[0]!r} is {shown(info[wrong[0]])}, which no trainer writes: it is damaged. Put the "
            "file of a checkpoint of the run in its place"
        )
    return info


def read_json(path: Path) -> dict[str, Any]:
    """A file that a trainer wrote, as an object.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): was the training stopped while writing it?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object: the trainer writes an object")
    return content


def read_pairs(path: Path, one_in: int = 1) -> dict[str, np.ndarray]:
    """The columns of a pair log, [rows] each, in the order of training. An incomplete last line is dropped.

    Args:
        path: the file. It is never in memory as a whole: one line, and the numbers that are used.
        one_in: read the first of every so many pairs.

    Raises:
        ValueError: no text, no header, no column `step` or one twice, steps out of order, a line of the wrong length,
            or a cell that is not a number, or a larger one than training has.
    """
    with path.open(newline="", encoding="utf-8", errors="backslashreplace") as file:
        reader = csv.reader(file)
        header = next(_rows(reader, path), [])
        if "step" not in header:
            raise ValueError(f"{path} has no column 'step' in its first line, which reads {','.join(header)!r:.200}")
        if twice := [name for name, n in Counter(header).items() if n > 1]:
            raise ValueError(f"{path} has the column {twice[0]!r} more than once in its first line: remove one")
        numbers, torn, seen = array("d"), None, 0
        for row in filter(None, _rows(reader, path)):
            if torn:
                raise ValueError(f"{path}, {torn} for {len(header)} columns: remove the line")
            if len(row) != len(header):
                torn = f"line {reader.line_num}: {len(row)} cells"
                continue
            if seen % one_in == 0:
                cells = zip(row, header, strict=True)
                numbers.extend(_number(cell, name, reader.line_num, path) for cell, name in cells)
            seen += 1
    if torn:
        logger.warning("%s: the last line is incomplete and is dropped", path)
    table = np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(header))
    step = table[:, header.index("step")]
    if (falls := np.flatnonzero(~(np.diff(step) >= 0))).size:
        before, after = step[falls[0] : falls[0] + 2]
        raise ValueError(
            f"{path}, pair {one_in * (falls[0] + 1) + 1}: step {after:g} comes after step {before:g}; "
            "a log holds one training: remove the lines of the other"
        )
    return {name: table[:, i] for i, name in enumerate(header)}


def _rows(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; the file is damaged") from error


def _number(cell: str, column: str, line: int, path: Path) -> float:
    try:
        number = float(cell) if cell else np.nan
    except ValueError:
        number = None
    if number is None or _LARGEST < abs(number) < np.inf:
        what = "not a number" if number is None else "larger than any number of a training in float32"
        raise ValueError(
            f"{path}, line {line}, column {column!r}: {cell!r} is {what}; correct the cell or leave it empty"
        )
    return number
