"""Histograms of weights, margins and reward gaps over the pairs, in TensorBoard, W&B or Trackio."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .pair_log import PairLog

logger = logging.getLogger(__name__)

# column of the pair log → its histogram, beside the reporters' own "train/weights/mean" and so on
NAMES = {
    "weight": "train/weights/histogram",
    "margin": "train/target_margins/histogram",
    "reward_gap": "train/reward_gaps/histogram",
}
_WITH_HISTOGRAM = {WandbCallback: "wandb", TrackioCallback: "trackio"}


class Writer(Protocol):
    """TensorBoard's `SummaryWriter`, or anything with its `add_histogram`."""

    def add_histogram(self, tag: str, values: np.ndarray, global_step: int) -> Any: ...


class LoggingTrainer(Protocol):
    """The trainer as `PairHistograms` sees it."""

    callback_handler: Any
    objective: Any
    _pair_log: PairLog | None


class PairHistograms(TrainerCallback):
    """Gives every reporter of the trainer, at each log, histograms over the pairs trained since the one before.

    Reward gaps always; weights and margins where there is such a term.

        trainer.add_callback(PairHistograms(trainer))

    Args:
        trainer: whose pairs.
        writer: takes them instead of the reporters: a `SummaryWriter`, or anything with its `add_histogram`.

    Raises:
        ValueError: the trainer writes no pair log; when training begins: nothing there takes histograms.
    """

    def __init__(self, trainer: LoggingTrainer, writer: Writer | None = None) -> None:
        if trainer._pair_log is None:
            raise ValueError(
                "PairHistograms shows the pairs of the pair log, which this run does not write: leave log_pairs on, "
                "and without a term also share_prompt at 'auto'"
            )
        self.trainer, self.log, self.writer = trainer, trainer._pair_log, writer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.writer is None and not self._reporters():
            raise ValueError(
                f"PairHistograms found nothing that takes histograms: report_to is {args.report_to}. Set report_to to "
                "'tensorboard', 'wandb' or 'trackio', or give a SummaryWriter as writer"
            )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not (found := self._histograms()):
            return
        try:
            for reporter in [self.writer] if self.writer is not None else self._reporters():
                _write(reporter, found, state.global_step)
        except OSError as error:
            logger.warning("step %d: no histograms (%s): training goes on", state.global_step, error.strerror or error)

    def _reporters(self) -> list[Any]:
        kinds = (TensorBoardCallback, *_WITH_HISTOGRAM)
        return [callback for callback in self.trainer.callback_handler.callbacks if isinstance(callback, kinds)]

    def _histograms(self) -> dict[str, np.ndarray]:
        """Name → values; none of them empty, infinite or NaN, which SummaryWriter refuses."""
        found = {}
        for column, name in NAMES.items():
            if column == "reward_gap" or getattr(self.trainer.objective, f"{column}s"):
                values = self.log.drained.get(column, np.empty(0))
                found[name] = values[np.isfinite(values)]
        return {name: values for name, values in found.items() if values.size}


def _write(reporter: Any, histograms: Mapping[str, np.ndarray], step: int) -> None:
    """Writes to a SummaryWriter, or to a reporter of transformers."""
    for kind, library in _WITH_HISTOGRAM.items():
        if isinstance(reporter, kind):
            tracker = import_module(library)
            made = {name: tracker.Histogram(values) for name, values in histograms.items()}
            tracker.log({**made, "train/global_step": step})
            return
    writer = reporter.tb_writer if isinstance(reporter, TensorBoardCallback) else reporter
    if writer is not None:
        for name, values in histograms.items():
            writer.add_histogram(name, values, step)
