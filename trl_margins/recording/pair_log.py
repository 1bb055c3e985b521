"""What every trained pair came to, in a file beside the checkpoints: what the report's pictures are made of."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer

from .. import __version__
from ..pairs import IS_FLIPPED, ROW

if TYPE_CHECKING:
    from ..trainers.mixin import MarginMixin

logger = logging.getLogger(__name__)

PAIRS_FILE = "pair_log.csv"
RUN_FILE = "margin_run.json"
STATE_FILE = "trainer_state.json"
_WHOLE = ("step", ROW)

# bounds for runs that log rarely, or never
MOST_WAITING = 1024  # mini-batches on the device until they are written
MOST_KEPT = 100_000  # pairs that a log's histograms and flips are of


class PairLog:
    """One line of CSV a pair. Values stay on the device until `flush`.

    Args:
        file: where to; lines are added to it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._names: list[str] | None = None
        self._waiting: list[tuple[int, Tensor]] = []  # step, [B, columns]
        self._not_logged: deque[np.ndarray] = deque()
        self._too_old = 0  # pairs that are not in there any more
        self.n_lost = 0  # pairs that the disk did not take
        self.drained: dict[str, np.ndarray] = {}  # what the last call of `drain` gave, for callbacks

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Notes B pairs.

        Args:
            step: of the optimizer, from 1.
            values: name → [B]; the same names every time.
        """
        if self._names is None:
            self._names = list(values)
        stacked = torch.stack([values[name].detach().float() for name in self._names], dim=1)
        self._waiting.append((step, stacked))

    def forget(self, step: int) -> None:
        """Drops what was noted of a step that is not taken."""
        self._waiting = [(taken, values) for taken, values in self._waiting if taken != step]

    @property
    def is_full(self) -> bool:
        """Whether it is time to flush: the same on every rank."""
        return len(self._waiting) >= MOST_WAITING

    def flush(self, accelerator: Accelerator) -> None:
        """Writes what was noted on all ranks since the last call, on the first of them."""
        names = ["step", *(self._names or [])]
        steps = [np.full((len(values), 1), step) for step, values in self._waiting]
        rows = np.empty((0, len(names)))
        if self._waiting:
            values = torch.cat([values for _, values in self._waiting]).cpu().numpy()  # the only transfer
            rows = np.hstack([np.concatenate(steps), values])
        self._waiting = []
        if accelerator.num_processes > 1:
            rows = np.concatenate([part for part in gather_object([rows]) if part.size] or [rows])
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
        if not rows.size:
            return
        self._not_logged.append(rows)
        while sum(map(len, self._not_logged)) - len(self._not_logged[0]) >= MOST_KEPT:
            self._too_old += len(self._not_logged.popleft())
        if accelerator.is_main_process:
            self._write(names, rows)

    def drain(self) -> dict[str, np.ndarray]:
        """By name, what was flushed since the last call, of all ranks; of very many pairs the last ones."""
        names = ["step", *(self._names or [])]
        rows = np.concatenate(self._not_logged or [np.empty((0, len(names)))])
        if self._too_old:
            logger.info("of the pairs since the last log, the first %d are only in %s", self._too_old, self.file.name)
        self._not_logged, self._too_old = deque(), 0
        self.drained = dict(zip(names, rows.T, strict=True))
        return self.drained

    def _write(self, names: list[str], rows: np.ndarray) -> None:
        """Adds the lines, or none of them: no log is worth a run that the disk has no room for."""
        whole: int | None = None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            whole = self.file.stat().st_size if self.file.exists() else 0
            with self.file.open("a", newline="") as out:
                self._write_lines(csv.writer(out), names, rows, with_names=not whole)
        except OSError as error:
            if not self.n_lost:
                logger.warning(
                    "%s cannot be written (%s): training goes on, and the log lacks pairs from step %d until it can",
                    self.file,
                    error.strerror or error,
                    rows[0, 0],
                )
            self.n_lost += len(rows)
            if whole is not None:
                with suppress(OSError):
                    os.truncate(self.file, whole)

    @staticmethod
    def _write_lines(writer: Any, names: list[str], rows: np.ndarray, with_names: bool) -> None:
        if with_names:
            writer.writerow(names)
        formats = [".0f" if name in _WHOLE else ".7g" for name in names]
        writer.writerows([format(value, form) for value, form in zip(row, formats, strict=True)] for row in rows)

    def rewind(self, step: int) -> None:
        """Drops what the file has of later steps, which a resumed run goes through again; all of it at step 0."""
        if not self.file.exists():
            return
        if step == 0:
            self.file.unlink()
            return
        shorter = self.file.with_suffix(".tmp")  # a kill leaves the one or the other whole
        with self.file.open(newline="") as file, shorter.open("w", newline="") as out:
            rows, writer = csv.reader(file), csv.writer(out)
            if head := next(rows, None):
                writer.writerow(head)
            n_dropped = 0
            for row in rows:  # a week's log does not fit into memory
                if len(row) == len(head) and int(row[0]) <= step:  # a kill may cut the last line
                    writer.writerow(row)
                else:
                    n_dropped += 1
        if n_dropped:
            logger.info("%s: %d lines of steps after %d are written anew", self.file.name, n_dropped, step)
        shorter.replace(self.file)


class RunFolder(TrainerCallback):
    """Puts a run's settings, pairs and history into its folder.

    Args:
        trainer: whose run it is.
        log: its pairs.
    """

    def __init__(self, trainer: MarginMixin, log: PairLog) -> None:
        self.trainer, self.log = trainer, log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        file = Path(args.output_dir, RUN_FILE)
        try:
            self.log.rewind(state.global_step)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(described(self.trainer), indent=2) + "\n")
        except OSError as error:  # now, while nothing is lost: no checkpoint could be saved there either
            raise OSError(
                f"output_dir {args.output_dir} cannot be written to ({error.strerror or error}): name another folder, "
                "or make room"
            ) from error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.log.is_full:
            self.log.flush(self.trainer.accelerator)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.log.n_lost:
            logger.warning("%s lacks %d pairs that could not be written", self.log.file, self.log.n_lost)
        try:
            state.save_to_json(str(Path(args.output_dir, STATE_FILE)))
        except OSError as error:  # the trained model is still to be saved
            logger.warning("%s of %s cannot be written (%s)", STATE_FILE, args.output_dir, error.strerror or error)


def described(trainer: MarginMixin) -> dict[str, Any]:
    """A run's settings, for its folder."""
    method, objective, rows = trainer.options.method, trainer.objective, trainer.train_dataset
    return {
        "version": __version__,
        "method": method and method.id,
        "name": method.name if method else type(trainer).__name__,
        "base": "dpo" if isinstance(trainer, DPOTrainer) else "cpo",
        "trainer": type(trainer).__name__,
        "model": trainer.model.config.name_or_path,
        "weight": ", ".join(term.name for term in objective.weights) or None,
        "margin": ", ".join(term.name for term in objective.margins) or None,
        "term_options": [*trainer.options.term_options("weight"), *trainer.options.term_options("margin")],
        "train_rows": len(rows) if hasattr(rows, "__len__") else None,
        "config": json.loads(trainer.args.to_json_string()),
    }


def flip_metrics(pairs: Mapping[str, np.ndarray], weighted: bool) -> dict[str, float]:
    """What became of pairs whose label was flipped, among those of one logging interval.

    The pull of a pair is weight × slope, the factor of its reward gap's gradient.

    Args:
        pairs: from `PairLog.drain`.
        weighted: whether there is a weight term.

    Returns:
        `flips/rate`; the mean `flips/pull` of flipped pairs and `flips/pull_clean` of the others, and with a weight
        term `flips/weight` and `flips/weight_clean`; `flips/gradient_share`, the part of the summed pull that is
        flipped pairs'; `flips/rate_low`, `_mid`, `_high`: flip rates of the thirds by pull. Empty without flips known.
    """
    if IS_FLIPPED not in pairs or not len(pairs[IS_FLIPPED]):
        return {}
    flipped = pairs[IS_FLIPPED] == 1
    pull = pairs["weight"] * pairs["slope"]
    found = {"flips/rate": float(flipped.mean())}
    for name, values in {"pull": pull, "weight": pairs["weight"]}.items():
        if name == "pull" or weighted:
            parts = {f"flips/{name}": values[flipped], f"flips/{name}_clean": values[~flipped]}
            found |= {key: float(part.mean()) for key, part in parts.items() if part.size}
    if pull.sum() > 0:
        found["flips/gradient_share"] = float(pull[flipped].sum() / pull.sum())
    tiers = np.array_split(flipped[np.argsort(pull, kind="stable")], 3)
    names = ("low", "mid", "high")
    return found | {f"flips/rate_{n}": float(tier.mean()) for n, tier in zip(names, tiers, strict=True) if tier.size}
