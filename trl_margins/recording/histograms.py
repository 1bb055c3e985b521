"""How weights, margins and reward gaps spread over the pairs, as histograms in TensorBoard, W&B or Trackio."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

if TYPE_CHECKING:
    from ..trainers.mixin import MarginMixin

logger = logging.getLogger(__name__)

# column of the pair log → its histogram; beside the reporters' own "train/weights/mean" and so on
NAMES = {
    "weight": "train/weights/histogram",
    "margin": "train/target_margins/histogram",
    "reward_gap": "train/reward_gaps/histogram",
}
_WITH_HISTOGRAM = {WandbCallback: "wandb", TrackioCallback: "trackio"}


class Writer(Protocol):
    """What TensorBoard's `SummaryWriter` has."""

    def add_histogram(self, tag: str, values: np.ndarray, global_step: int) -> Any: ...


class PairHistograms(TrainerCallback):
    """Gives every reporter of the trainer, at each log, histograms over the pairs trained since the one before.

    Reward gaps always; weights and margins where there is such a term.

        trainer.add_callback(PairHistograms(trainer))

    Args:
        trainer: whose pairs.
        writer: takes them instead of the reporters: a `SummaryWriter`, or whatever has its `add_histogram`.

    Raises:
        ValueError: the trainer keeps no pair log; when training begins: nothing there that takes histograms.
    """

    def __init__(self, trainer: MarginMixin, writer: Writer | None = None) -> None:
        if trainer._pair_log is None:
            raise ValueError("PairHistograms shows what the pair log holds, and log_pairs is off: leave it on")
        self.trainer, self.writer = trainer, writer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.writer is None and not self._reporters():
            raise ValueError(
                f"PairHistograms found nothing to give histograms to: report_to is {args.report_to}. Set report_to to "
                "'tensorboard', 'wandb' or 'trackio', or hand over a SummaryWriter as writer"
            )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not (found := self._histograms()):
            return
        try:
            self._give(found, state.global_step)
        except OSError as error:
            logger.warning("step %d: no histograms (%s): training goes on", state.global_step, error.strerror or error)

    def _give(self, found: Mapping[str, np.ndarray], step: int) -> None:
        if self.writer is not None:
            _write(self.writer, found, step)
            return
        for reporter in self._reporters():
            if isinstance(reporter, TensorBoardCallback):
                if reporter.tb_writer is not None:
                    _write(reporter.tb_writer, found, step)
                continue
            library = next(name for kind, name in _WITH_HISTOGRAM.items() if isinstance(reporter, kind))
            tracker = import_module(library)
            histograms = {name: tracker.Histogram(values) for name, values in found.items()}
            tracker.log({**histograms, "train/global_step": step})

    def _reporters(self) -> list[TrainerCallback]:
        kinds = (TensorBoardCallback, *_WITH_HISTOGRAM)
        return [callback for callback in self.trainer.callback_handler.callbacks if isinstance(callback, kinds)]

    def _histograms(self) -> Mapping[str, np.ndarray]:
        """Name → values; none of them empty, infinite or NaN, which SummaryWriter refuses."""
        objective, pairs = self.trainer.objective, self.trainer._pair_log.drained
        found = {}
        for column, name in NAMES.items():
            if column == "reward_gap" or getattr(objective, column) is not None:
                values = pairs.get(column, np.empty(0))
                values = values[np.isfinite(values)]
                if values.size:
                    found[name] = values
        return found


def _write(writer: Writer, histograms: Mapping[str, np.ndarray], step: int) -> None:
    for name, values in histograms.items():
        writer.add_histogram(name, values, step)
