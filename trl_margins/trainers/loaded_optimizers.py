"""Whether an optimizer and its schedule, as a checkpoint has them, are those of the run that goes on."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .weights import is_broken

# of an optimizer, under the names that a config has for them
_NAMES = {"initial_lr": "learning_rate", "betas": "adam_beta1, adam_beta2", "eps": "adam_epsilon"}
_TURNED = ("last_epoch", "lr_lambda")  # of a schedule
# what the schedule turns, and how the same is computed
_NO_OPTIONS = ("params", "lr", "foreach", "fused", "capturable", "differentiable")


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group of parameters, by the names of a config."""
    return as_values({_NAMES.get(name, name): value for name, value in group.items() if name not in _NO_OPTIONS})


def as_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options that JSON has too: a rate may be a tensor, and of a tuple it makes a list."""
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in options.items()}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    kinds = (bool, int, float, str, tuple, type(None))
    return {name: value for name, value in values.items() if isinstance(value, kinds)}


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


def inner(schedule: Any) -> Any:
    return getattr(schedule, "scheduler", schedule)  # of what accelerate makes of it


def numbers_of(schedule: Any) -> dict[str, Any]:
    """The settings of a schedule that are in its state, too: loading it puts the checkpoint's in their place."""
    schedule = inner(schedule)
    known, state = inspect.signature(type(schedule).__init__).parameters, schedule.state_dict()
    names = [name for name in (*known, "_schedule_phases") if name in state and name not in _TURNED]
    numbers = {"schedule": type(schedule).__name__} | {name: copy.deepcopy(state[name]) for name in names}
    for i, each in enumerate(getattr(schedule, "_schedulers", ())):
        numbers |= {f"{name} of part {i + 1}": value for name, value in numbers_of(each).items()}
    return numbers


def check_lambdas(checkpoint: str, schedule: Any) -> None:
    """
    Raises:
        ValueError: a schedule's function, which no state holds, gives another rate than that of the checkpoint.
    """
    schedule = inner(schedule)
    if type(schedule) is not LambdaLR:  # AdafactorSchedule is one by name
        return
    now = [
        rate * factor(schedule.last_epoch) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    if any(not math.isclose(old, new, rel_tol=1e-6) for old, new in zip(schedule.get_last_lr(), now, strict=True)):
        old = {"learning rate by its schedule": schedule.get_last_lr()[0]}
        check_options(checkpoint, [{"learning rate by its schedule": now[0]}], [old])


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
