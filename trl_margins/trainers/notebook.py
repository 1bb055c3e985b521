"""transformers' progress table in a notebook has a column for every metric; these are the ones to watch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer
from transformers.utils.notebook import NotebookProgressCallback

SHOWN = ("_loss", "_pwa", "_pwa_all", "_spearman")


class NarrowTable(NotebookProgressCallback):
    """Its columns are the losses, the ranking metrics and `metric_for_best_model`. The log has all of them."""

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        ends = dict.fromkeys([*SHOWN, args.metric_for_best_model or "_loss"])
        narrow = {name: value for end in ends for name, value in (metrics or {}).items() if name.endswith(end)}
        narrow = {name: value for name, value in narrow.items() if not name.endswith("_nll_loss")}  # TRL's, a part
        super().on_evaluate(args, state, control, metrics=narrow, **kwargs)


def narrow_table(trainer: Trainer) -> None:
    """Puts it in the place of transformers' table. With `disable_tqdm` there is none."""
    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(NarrowTable())
