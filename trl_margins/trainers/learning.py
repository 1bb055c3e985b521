"""A run that learns nothing says so at its first steps, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..distributed import fsdp_modules
from .base import MarginTrainer

logger = logging.getLogger(__name__)

_STEPS = 10  # without an effect, after which it is no accident
_SMALL = 1e-20  # weights of pairs with which gradients are 0 in float32


def check_optimizer(trainer: MarginTrainer, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks an optimizer that the trainer was given.

    Raises:
        ValueError: it has none of the weights that train.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or fsdp_modules(trainer.model):
        return  # which have tensors of their own
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = [name for name, parameter in parameters.items() if id(parameter) not in held]
    name = optimizer_name(optimizer)
    if len(left) == len(parameters):
        raise ValueError(
            f"the {name} that the trainer was given has none of the {len(left)} weight tensors that train: it was "
            "made for another model, or before an adapter or new embeddings came in. Make it from this model's "
            "parameters, or leave optimizers out"
        )
    if left:
        logger.warning(
            "the %s that the trainer was given lacks %d of the %d weight tensors that train, which stay as they are: "
            "%s is one",
            *(name, len(left), len(parameters), left[0]),
        )


def check_plateau(args: Any, scheduler: Any) -> None:
    """
    Raises:
        ValueError: a schedule by a metric that never hears of it, or lowers the learning rate where it improves.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(schedule, ReduceLROnPlateau):
        return
    name, metric = type(schedule).__name__, args.metric_for_best_model
    if args.eval_strategy == IntervalStrategy.NO or metric is None:
        raise ValueError(
            f"{name} follows a metric of the evaluations: set eval_strategy, and metric_for_best_model to the metric, "
            "for example 'epoch' and 'eval_loss' (--eval_strategy epoch --metric_for_best_model eval_loss)"
        )
    if (mode := "max" if args.greater_is_better else "min") != schedule.mode:
        raise ValueError(
            f"{name} has mode {schedule.mode!r}, and {metric} is better where it is "
            f"{'higher' if args.greater_is_better else 'lower'}: it would lower the learning rate as the model "
            f"improves. Set mode to {mode!r} (lr_scheduler_kwargs={{'mode': {mode!r}}}, or on the command line "
            f'--lr_scheduler_kwargs \'{{"mode": "{mode}"}}\'), or metric_for_best_model to another metric'
        )


def warn_of_schedule(args: Any, scheduler: Any, first: int, last: int) -> None:
    """Says where the learning rate is 0 in every step, or is still rising at the end."""
    schedule, warmup = getattr(scheduler, "scheduler", scheduler), args.get_warmup_steps(last)
    if not isinstance(schedule, LambdaLR) or first >= last:
        return
    groups = list(zip(schedule.base_lrs, schedule.lr_lambdas, strict=True))
    n, why = last - first, ""
    if not any(float(rate) > 0 and factor(step) > 0 for rate, factor in groups for step in range(first, last)):
        if n == 1 and any(float(rate) > 0 and factor(step) > 0 for rate, factor in groups for step in range(first)):
            return  # the last step of a resumed run, at the end of its schedule
        if any(float(rate) > 0 for rate, _ in groups):
            kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
            why = f": lr_scheduler_type {kind!r} with warmup_steps={args.warmup_steps:g}"
        logger.warning(
            "the learning rate is 0 in %s%s: nothing is learnt",
            *("the only step" if n == 1 else f"all {n} steps", why),
        )
    elif warmup >= last > 1 and all(factor(last - 1) > factor(last - 2) for _, factor in groups):
        logger.warning(
            "the learning rate is still rising when training ends: warmup_steps=%g is the whole of its %d steps, and "
            "%.3g of %.3g is reached. Lower warmup_steps, or train longer",
            *(args.warmup_steps, last, max(rate * factor(last - 1) for rate, factor in groups), args.learning_rate),
        )


def warn_of_negative(metrics: Mapping[str, float]) -> bool:
    """Whether a pair has a weight below 0 by the logged metrics, which is said."""
    least = metrics.get("weights/min", 0.0)
    if least < 0:
        logger.warning(
            "a pair has the weight %.3g (weights/min): with a negative weight, its loss is made larger. If that is "
            "not intended, let the term return weights of at least 0",
            least,
        )
    return least < 0


def optimizer_name(optimizer: Any) -> str:
    """Of the optimizer itself, without accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


class Idle:
    """Counts steps without an effect, and says so: at the first step of a run, and after 10, 100, 1000 in a row."""

    def __init__(self) -> None:
        self._zero = self._still = 0
        self._said_still = False
        self._last: tuple[int, str, float, torch.dtype]  # the latest step of `weights`

    def gradient(self, step: int, is_zero: bool, is_first: bool, why: Iterator[str]) -> None:
        """Of a step: whether its gradient is exactly zero. The reasons are looked for only when they are said."""
        self._zero = self._zero + 1 if is_zero else 0
        n = self._zero
        if (n == 1 and is_first) or (n >= _STEPS and n == 10 ** (len(str(n)) - 1)):
            steps = f"step {step}" if n == 1 else f"the last {n} steps (up to step {step})"
            logger.warning("the gradient of %s is exactly 0, and nothing is learnt: %s", steps, next(why))

    def weights(self, step: int, optimizer: str, rate: float, dtype: torch.dtype) -> None:
        """Of a step with a gradient: no weight has changed since training began."""
        self._still += 1
        self._last = step, optimizer, rate, dtype
        if self._still >= _STEPS:
            self.say()

    def say(self) -> None:
        """That no weight has changed, if none has, once: no step may follow."""
        if self._said_still or not self._still:
            return
        self._said_still = True
        step, optimizer, rate, dtype = self._last
        if rate == 0 and self._still == 1 < step:  # the last step of a resumed run, at the end of its schedule
            return
        name = str(dtype).removeprefix("torch.")
        why = "are too small for float32 (look at max_grad_norm, too), or do not reach the model"
        if rate == 0:
            why = "are none: something ends the run in its warm-up, or sets the rate, such as a callback"
        elif dtype.itemsize < 4:
            why = f"are lost in the rounding of {name} weights: load them in float32, and train with bf16=True"
        logger.warning(
            "no weight has changed up to step %d, by a sample of each tensor, although there is a gradient: the steps "
            "of %s with the learning rate %.3g %s",
            *(step, optimizer, rate, why),
        )


class TakesSteps(TrainerCallback):
    """Ends a run whose epochs go by without a step. A stream may have fewer mini-batches than a step takes, and
    transformers would read it again without end.
    """

    def __init__(self) -> None:
        self._last, self._idle = 0, 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: two epochs without a step; a resumed one may be at the end of its epoch.
        """
        self._idle = self._idle + 1 if state.global_step == self._last else 0
        self._last = state.global_step
        if self._idle > 1 and not control.should_training_stop:
            raise ValueError(
                f"the stream ends before the {args.gradient_accumulation_steps} mini-batches of "
                f"{args.per_device_train_batch_size} pairs that a step takes: lower gradient_accumulation_steps, or "
                "load the data set instead of streaming it"
            )


def why_no_gradient(
    pairs: int, same: Tensor | None, weights: Mapping[str, Tensor], slope: Tensor | None, gaps: Tensor | None
) -> Iterator[str]:
    """Why the gradient of a window's pairs is zero. Reads values from the device.

    Args:
        pairs: how many.
        same: [pairs] whether both completions have the same tokens.
        weights: "weight 'name'" → [pairs] its values.
        slope: [pairs] of the loss against the reward gap.
        gaps: [pairs] reward gaps.
    """
    if same is not None and same.all():
        yield f"both completions of all {pairs} pairs have the same tokens"
    for name, value in weights.items():
        if not value.any():
            yield f"{name} is 0 for all {pairs} pairs"
        elif (most := value.abs().max()) < _SMALL:
            yield f"{name} is at most {most:.3g} for all {pairs} pairs"
    if slope is not None and gaps is not None and not slope.any():
        yield (
            f"the loss is flat at all {pairs} pairs, whose reward gaps are from {gaps.min():.3g} to {gaps.max():.3g}: "
            "lower beta, or look at the margin and the loss_type"
        )
    yield (
        "the loss does not depend on the weights that train: an adapter that is switched off, parts of the model that "
        "the forward pass leaves out, weights that are all 0, or a beta so small that its gradient is 0 in their type"
    )
