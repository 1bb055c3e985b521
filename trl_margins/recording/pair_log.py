"""Per-pair logs: CSV files beside the checkpoints, from which the report draws its pictures."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from ..disk import writing_to
from ..distributed import agreed
from ..pairs import IS_FLIPPED, ROW

logger = logging.getLogger(__name__)

PAIRS_FILE = "pair_log.csv"
RUN_FILE = "margin_run.json"
STATE_FILE = "trainer_state.json"
_WHOLE = ("step", ROW)

# Bounds for runs that log rarely, or never
MOST_WAITING = 1024  # mini-batches on the device until they are written
MOST_CACHED = 100_000  # pairs for the histograms and flip metrics of one log


class PairLog:
    """One CSV line per pair. Values stay on the device until `flush`.

    Args:
        file: lines are added to it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._names: list[str] = []
        self._waiting: list[tuple[int, Tensor]] = []  # step, [B, columns]
        self._not_logged: deque[np.ndarray] = deque()
        self._too_old = 0  # pairs that have left it again
        self._has_lines = False  # whether lines have been written
        self._is_checked = False  # whether the file, if there is one, has these columns
        self.n_lost = 0  # pairs that could not be written
        self.drained: dict[str, np.ndarray] = {}  # what the last call of `drain` returned, for callbacks

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Adds B pairs.

        Args:
            step: of the optimizer, from 1.
            values: name → [B]; the same names every time.
        """
        self._names = self._names or list(values)
        if missing := [name for name in self._names if name not in values]:
            raise ValueError(
                f"a mini-batch gives no {missing[0]!r}, which is a column of {self.file.name}: let observed() of "
                "a term return the same names every time"
            )
        self._waiting.append((step, torch.stack([values[name].detach().float() for name in self._names], dim=1)))

    def forget(self, step: int) -> None:
        """Drops the pairs of a step that is not taken."""
        self._waiting = [(taken, values) for taken, values in self._waiting if taken != step]

    @property
    def is_full(self) -> bool:
        """Whether it is time to flush: the same on every rank."""
        return len(self._waiting) >= MOST_WAITING

    def flush(self, accelerator: Accelerator) -> None:
        """Writes the pairs that were added on all ranks since the last call; the main process writes."""
        names, waiting, self._waiting = ["step", *self._names], self._waiting, []
        rows = np.empty((0, len(names)))
        if waiting:
            steps = np.repeat([step for step, _ in waiting], [len(values) for _, values in waiting])
            values = torch.cat([values for _, values in waiting]).cpu().numpy()  # the only transfer
            rows = np.column_stack([steps, values])
        if accelerator.num_processes > 1:
            rows = np.concatenate([part for part in gather_object([rows]) if part.size] or [rows])
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
        if not rows.size:
            return
        self._not_logged.append(rows)
        while sum(map(len, self._not_logged)) - len(self._not_logged[0]) >= MOST_CACHED:
            self._too_old += len(self._not_logged.popleft())
        if accelerator.is_main_process:
            self._write(names, rows)

    def drain(self) -> dict[str, np.ndarray]:
        """The pairs flushed since the last call, over all ranks: name → [pairs]. Of very many pairs, the last ones."""
        names = ["step", *self._names]
        rows = np.concatenate(self._not_logged or [np.empty((0, len(names)))])
        if self._too_old:
            logger.info("of the pairs since the last log, the first %d are only in %s", self._too_old, self.file.name)
        self._not_logged, self._too_old = deque(), 0
        self.drained = dict(zip(names, rows.T, strict=True))
        return self.drained

    def _write(self, names: list[str], rows: np.ndarray) -> None:
        """Adds all of the lines or none: a full disk does not stop the run."""
        size: int | None = None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_checked:
                self._keep_apart(names, int(rows[0, 0]))
            elif self._has_lines and not self.file.exists():
                logger.warning("%s was removed, or moved: it begins anew at step %d", self.file, rows[0, 0])
            with self.file.open("a") as out:
                size = out.tell()
                self._write_lines(out, names, rows)
            self._has_lines = True
        except OSError as error:
            if not self.n_lost:
                logger.warning(
                    "%s cannot be written (%s): training goes on, and the log lacks pairs from step %d until it can",
                    *(self.file, error.strerror or error, rows[0, 0]),
                )
            self.n_lost += len(rows)
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.file, size)

    def _keep_apart(self, names: list[str], step: int) -> None:
        """Moves a log with other columns away, in a run that is resumed with another term or data set."""
        self._is_checked = True
        if not self.file.is_file():
            return
        with self.file.open() as lines:
            if (head := next(lines, "").rstrip("\n")) and head != ",".join(names):
                aside = self.file.with_stem(f"{self.file.stem}-before-{step}")
                self.file.replace(aside)
                logger.warning("%s has other columns (%s) than this run: it is now %s", self.file, head, aside.name)

    @staticmethod
    def _write_lines(out: TextIO, names: list[str], rows: np.ndarray) -> None:
        head = "" if out.tell() else ",".join(names)
        formats = ["%.0f" if name in _WHOLE else "%.7g" for name in names]
        np.savetxt(out, rows, fmt=formats, delimiter=",", header=head, comments="")

    def clear(self) -> None:
        """Drops what an earlier call of `train` left, if it was stopped."""
        self._waiting, self._not_logged, self._too_old, self.n_lost = [], deque(), 0, 0
        self._has_lines = False

    def rewind(self, step: int) -> None:
        """Drops the lines of later steps, which a resumed run takes again; the whole file at step 0."""
        if not self.file.exists():
            self._warn_of_gap(0, step)
            return
        if step == 0:
            self.file.unlink()
            return
        shorter = self.file.with_suffix(".tmp")  # after a kill, one of the two files is whole
        try:
            n_dropped, last = _copy_until(step, self.file, shorter)
        except ValueError as error:
            shorter.unlink()
            aside = self.file.with_stem(f"{self.file.stem}-damaged-{step}")
            self.file.replace(aside)
            logger.warning("%s is damaged (%s): it is now %s, and a new one begins", self.file, error, aside.name)
            return
        if n_dropped:
            logger.info("%s: %d lines of steps after %d are removed", self.file.name, n_dropped, step)
        shorter.replace(self.file)
        self._warn_of_gap(last, step)

    def _warn_of_gap(self, last: int, step: int) -> None:
        """Of the log that has all pairs of all steps."""
        if self.file.name == PAIRS_FILE and last < step:
            logger.warning("%s has no pairs of the steps from %d to %d", self.file, last + 1, step)


def _copy_until(step: int, file: Path, copy: Path) -> tuple[int, int]:
    """Copies the lines of a log to a step; how many it leaves out, and the last step that it has.

    Raises:
        ValueError: a line that is none of a log.
    """
    with file.open(newline="", encoding="utf-8") as lines, copy.open("w", newline="", encoding="utf-8") as out:
        head, n_dropped, last = next(lines, ""), 0, 0
        out.write(head)
        for line in lines:  # a long run's log does not fit into memory
            # a kill may cut the last line
            is_whole = line.endswith("\n") and line.count(",") == head.count(",")
            if is_whole and (taken := int(line.partition(",")[0])) <= step:
                last = max(last, taken)
                out.write(line)
            else:
                n_dropped += 1
    return n_dropped, last


class RunFolder(TrainerCallback):
    """Writes a run's settings, pairs and history into its folder.

    Args:
        logs: about its pairs.
        accelerator: the trainer's.
        settings: what `margin_run.json` holds, asked for when training begins.
    """

    def __init__(
        self, logs: Sequence[PairLog], accelerator: Accelerator, settings: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.logs, self.accelerator, self.settings = logs, accelerator, settings

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for log in self.logs:
            log.clear()
        agreed(self.accelerator, partial(self._begin, args, state))

    def _begin(self, args: Any, state: Any) -> None:
        # now, while nothing is lost: no checkpoint could be saved there either
        with writing_to(f"output_dir {args.output_dir}"):
            for log in self.logs:
                log.rewind(state.global_step)
            self._write_settings(args)

    def _write_settings(self, args: Any) -> None:
        file = Path(args.output_dir, RUN_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.settings(), indent=2) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for log in self.logs:
            if log.is_full:
                log.flush(self.accelerator)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for log in self.logs:
            if log.n_lost:
                logger.warning("%s lacks %d pairs that could not be written", log.file, log.n_lost)
        with suppress(OSError):
            if not Path(args.output_dir, RUN_FILE).exists():  # removed meanwhile
                self._write_settings(args)
        try:
            state.save_to_json(str(Path(args.output_dir, STATE_FILE)))
        except OSError as error:  # the trained model is still to be saved
            logger.warning("%s of %s cannot be written (%s)", STATE_FILE, args.output_dir, error.strerror or error)


def flip_metrics(pairs: Mapping[str, np.ndarray], weighted: bool) -> dict[str, float]:
    """Metrics of the pairs whose label was flipped, among those of one logging interval.

    A pair's gradient scale is weight × slope, the factor of its reward gap's gradient.

    Args:
        pairs: from `PairLog.drain`.
        weighted: whether there is a weight term.

    Returns:
        `flips/rate`; the mean `flips/gradient_scale` of flipped pairs and `flips/gradient_scale_clean` of the others,
        and with a weight term `flips/weight` and `flips/weight_clean`; `flips/gradient_share`, the flipped pairs' part
        of the summed gradient scale; `flips/rate_low`, `_mid`, `_high`: flip rates of the thirds by gradient scale.
        Empty where no flips are known.
    """
    if IS_FLIPPED not in pairs or not len(pairs[IS_FLIPPED]):
        return {}
    flipped = pairs[IS_FLIPPED] == 1
    scale = pairs["weight"] * pairs["slope"]
    found = {"flips/rate": flipped.mean()}
    for name, values in {"gradient_scale": scale, **({"weight": pairs["weight"]} if weighted else {})}.items():
        parts = {f"flips/{name}": values[flipped], f"flips/{name}_clean": values[~flipped]}
        found |= {key: part.mean() for key, part in parts.items() if part.size}
    if scale.sum() > 0:
        found["flips/gradient_share"] = scale[flipped].sum() / scale.sum()
    thirds = np.array_split(flipped[np.argsort(scale, kind="stable")], 3)
    names = ("low", "mid", "high")
    found |= {f"flips/rate_{name}": third.mean() for name, third in zip(names, thirds, strict=True) if third.size}
    return {name: float(value) for name, value in found.items()}
