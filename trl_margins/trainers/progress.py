"""One readable line per log, where transformers prints the whole dict. Trackers and `log_history` get all of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_callback import CallbackHandler

from ..printable import printable

# What a line shows first: its word → the name in the log
_SHOWN: Mapping[str, str] = {
    "loss": "loss",
    "pwa": "pwa",
    "pwa_all": "pwa_all",
    "spearman": "spearman",
    "accuracy": "rewards/accuracies",
    "gap": "rewards/margins",
    "weight": "weights/mean",
    "target margin": "target_margins/mean",
    "lr": "learning_rate",
    "grad norm": "grad_norm",
}
# What it leaves out, beside these. Whatever else is logged comes at its end.
_LEFT_OUT = re.compile(
    r"logits/|logps/|rewards/(chosen|rejected)$|(weights|target_margins)/|(nll|aux)_loss$|total_flos$|epoch$|n_pairs"
    r"|num_(input_)?tokens|entropy$|mean_token_accuracy$|(train_)?(runtime$|(samples|steps|tokens)_per_second)"
)


def line_of(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """A log entry in one line."""
    at = f"step {step:>{len(str(max_steps))}}/{max_steps}"
    if logs.keys() >= {"train_runtime", "train_loss"}:
        return f"trained to step {step} in {_duration(logs['train_runtime'])}, mean loss {_number(logs['train_loss'])}"
    prefix = next((key.removesuffix("loss") for key in logs if re.fullmatch(r"eval_(.+_)?loss", key)), "")
    if prefix == "" and any(key.startswith("eval_") for key in logs):
        prefix = "eval_"
    values = {key.removeprefix(prefix): value for key, value in logs.items()}
    return printable("  ".join([at, *([prefix[:-1]] if prefix else []), *_words(values)]))


def _words(values: Mapping[str, Any]) -> Iterator[str]:
    for word, name in _SHOWN.items():
        if name in values:
            yield f"{word} {_number(values[name])}"
    for name, value in values.items():
        if name not in _SHOWN.values() and not _LEFT_OUT.match(name):
            yield f"{name} {_number(value)}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:.100}" if isinstance(value, str) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


class PrintsLines(PrinterCallback):
    """transformers' for runs without a progress bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero and logs:
            tqdm.write(line_of(logs, state.global_step, state.max_steps))  # above the bars of others


class LinesAboveTheBar(ProgressCallback):
    """transformers' progress bar, which only a terminal gets."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)
        self.current_step = 0

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(*args, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(line_of(logs, state.global_step, state.max_steps))


def print_lines(handler: CallbackHandler) -> None:
    """Puts these in place of transformers' own. A notebook's table stays."""
    instead = {PrinterCallback: PrintsLines, ProgressCallback: LinesAboveTheBar}
    handler.callbacks = [instead[type(each)]() if type(each) in instead else each for each in handler.callbacks]
