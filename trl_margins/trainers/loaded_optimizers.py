"""Whether an optimizer and its schedule, as a checkpoint has them, are those of the run that goes on."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .fingerprints import of_arguments
from .weights import is_broken

# of an optimizer, under the names that a config has for them
_NAMES = {"initial_lr": "learning_rate", "betas": "adam_beta1, adam_beta2", "eps": "adam_epsilon"}
_TURNED = ("optimizer", "last_epoch", "lr_lambda", "schedulers")  # of a schedule: no settings, or looked into
_COMPUTED = ("total_size", "step_ratio", "_schedule_phases")  # of cycles, from arguments that they do not keep
_STEPS = 1000  # at which a schedule's function is asked
_SHOWN = (0, 1, 2, 3, 10, 100)  # of these
# what the schedule turns, and how the same is computed
_NO_OPTIONS = ("params", "lr", "foreach", "fused", "capturable", "differentiable")


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group of parameters, by the names of a config."""
    return as_values({_NAMES.get(name, name): value for name, value in group.items() if name not in _NO_OPTIONS})


def as_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options that JSON has too: a rate may be a tensor, and of a tuple it makes a list."""
    plain = {name: _plain(value) for name, value in options.items()}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    kinds = (bool, int, float, str, tuple, type(None))
    return {name: value for name, value in values.items() if isinstance(value, kinds)}


def _plain(value: Any) -> Any:
    """A tensor's number, with the digits that it has: 0.1 in float32 is 0.1."""
    if not isinstance(value, Tensor):
        return value
    return float(f"{value.item():.7g}") if value.dtype == torch.float32 and value.numel() == 1 else value.tolist()


def options_before(loaded: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The options with which a run began: schedules and callbacks may have turned any of them since.

    Args:
        loaded: of each group, those of a checkpoint's optimizer.
        first: those that the checkpoint has noted; empty for an older one, of which the usual ones count.
    """
    usual = {*_NAMES.values(), "weight_decay", "momentum"}
    noted = [as_values(each) for each in first] or [{}] * len(loaded)
    both = zip(loaded, noted, strict=True)
    return [{name: old[name] for name in old if name in usual} | new for old, new in both]


def unwrapped(made: Any) -> Any:
    """An optimizer, or a schedule, without what accelerate puts around it."""
    if isinstance(made, AcceleratedOptimizer):
        return made.optimizer
    return made.scheduler if isinstance(made, AcceleratedScheduler) else made


def of_schedule(schedule: Any) -> dict[str, Any]:
    """The class of a schedule and the arguments that it was made with, of its parts too; of a function, which no state
    holds, what it gives.
    """
    found = {name: value for name, value in of_arguments(schedule).items() if name not in _TURNED}
    of_groups = {name: f"{name}s" for name, value in found.items() if value is None}  # one number for each
    kept = of_groups | {name: name for name in _COMPUTED if hasattr(schedule, name)}
    values = {name: getattr(schedule, attribute, None) for name, attribute in kept.items()}
    found |= json.loads(json.dumps(values, default=str))
    for i, function in enumerate(getattr(schedule, "lr_lambdas", ()), start=1):
        found[f"function {i}"] = _factors(function)
    for i, part in enumerate(getattr(schedule, "_schedulers", ()), start=1):
        found |= {f"part {i}'s {name}": value for name, value in of_schedule(part).items()}
    return found


def _factors(function: Any) -> str:
    factors = []
    with suppress(Exception):  # each function has its own; one may know no more steps
        own = copy.deepcopy(function)  # of an object that counts
        for step in range(_STEPS):
            factors.append(f"{float(own(step)):.6g}")
    shown = ", ".join(factors[step] for step in _SHOWN if step < len(factors))
    digest = hashlib.sha256(" ".join(factors).encode()).hexdigest()[:8]
    return f"{shown} (at the steps {', '.join(map(str, _SHOWN))}; {digest})"


def check_same_kind(made: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises:
        RuntimeError: an optimizer's groups have lost options to those that were loaded, as of another class.
    """
    lost = [name for mine, of_file in zip(made, loaded, strict=True) for name in mine if name not in of_file]
    if lost:
        raise RuntimeError(f"it is of another class of optimizer, which has no {lost[0]}")


def check_options(checkpoint: str, now: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises:
        ValueError: an optimizer that was loaded has brought other options than the run's.
    """
    found = [
        f"{name} {old[name]} → {value}"
        for old, new in zip(loaded, now, strict=True)
        for name, value in new.items()
        if name in old and old[name] != value
    ]
    if found:
        raise ValueError(
            f"{checkpoint} is of a run with other settings: {'; '.join(dict.fromkeys(found))}. Resume with its "
            "settings, or start a new run from its weights, in another output_dir"
        )


def check_goes_on(optimizer: Any, schedule: Any) -> None:
    """
    Raises:
        RuntimeError: optimizer or schedule are as at a run's first step, after they were loaded.
    """
    has_moments = any(group.get("betas") or group.get("momentum") for group in optimizer.param_groups)
    if has_moments and not any(optimizer.state.values()):
        raise RuntimeError("the optimizer has no state of any parameter")
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    if is_broken(dict(enumerate(moments))):
        raise RuntimeError("the optimizer's moments hold NaN or infinity")
    if isinstance(schedule, LambdaLR) and not schedule.last_epoch:  # others may wait for an evaluation
        raise RuntimeError("the schedule has taken no step")
