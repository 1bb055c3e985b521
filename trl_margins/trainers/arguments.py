"""What a trainer is called with: each argument of its kind, before anything is made of it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftConfig
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments

from ..checks import nearest

_LOAD = "AutoModelForCausalLM.from_pretrained(...)"


def bound(constructor: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by their names.

    Raises:
        TypeError: a name that it does not have.
    """
    signature = inspect.signature(constructor)
    for name in kwargs:
        if name not in signature.parameters:
            if name == "tokenizer":
                raise TypeError("tokenizer is no argument of TRL's trainers any more: pass it as processing_class")
            close = nearest(name, signature.parameters)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(signature.parameters)}"
            raise TypeError(f"got an unexpected keyword argument {name!r}: {hint}")
    return dict(signature.bind_partial(*args, **kwargs).arguments)


def checked(given: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """The arguments, with a path as text, and a config's numbers of NumPy's as Python's.

    Raises:
        TypeError: one of another kind, with its name and the fix.
    """
    given = dict(given)
    if isinstance(model := given.get("model"), os.PathLike):
        given["model"] = os.fspath(model)
    _check_model(given.get("model"))
    if (args := given.get("args")) is not None:
        _check_config(args, config_class)
        for item in fields(args):
            if isinstance(value := getattr(args, item.name, None), np.generic):  # which JSON does not take
                setattr(args, item.name, value.item())
    if (reference := given.get("ref_model")) is not None and not isinstance(reference, nn.Module):
        raise _another("ref_model", reference, f"a model that has been loaded: {_LOAD}")
    if isinstance(given.get("processing_class"), str | Path):
        raise _another("processing_class", given["processing_class"], "AutoTokenizer.from_pretrained(...)")
    if (adapter := given.get("peft_config")) is not None and not isinstance(adapter, PeftConfig):
        raise _another("peft_config", adapter, "a config of PEFT's: LoraConfig(...)")
    _check_callbacks(given.get("callbacks"))
    _check_optimizers(given.get("optimizers"))
    return given


def _check_model(model: Any) -> None:
    if isinstance(model, PreTrainedConfig):
        raise _another("model", model, "a model of that config: AutoModelForCausalLM.from_config(config)")
    if not isinstance(model, str | nn.Module):
        raise _another("model", model, f"a name, a folder, or a model that has been loaded: {_LOAD}")
    if hasattr(model, "_orig_mod"):
        raise _another("model", model, "the model itself, and torch_compile=True in the config to compile it")


def _check_config(args: Any, config_class: Any) -> None:
    name = config_class.__name__
    if isinstance(args, Mapping):
        raise _another("args", args, f"a config: {name}(**args)")
    if isinstance(args, type):
        raise _another("args", args, f"a config, not its class: {args.__name__}('out')")
    own = next(each for each in config_class.__mro__ if each.__module__.startswith("trl."))
    if not isinstance(args, own):
        kind = f"a {name}, or TRL's {own.__name__}"
        if isinstance(args, TrainingArguments) and hasattr(args, "_base"):
            kind += ", or take the trainer of its base"
        raise _another("args", args, kind)
    if not is_dataclass(args):
        raise _another("args", args, f"a {name}")


def _check_callbacks(callbacks: Any) -> None:
    if callbacks is None:
        return
    if not isinstance(callbacks, list):
        raise _another("callbacks", callbacks, "a list, even of one")
    for each in callbacks:
        kind = each if isinstance(each, type) else type(each)
        if not issubclass(kind, TrainerCallback):
            raise _another("callbacks", each, "a TrainerCallback in each place: a class with on_step_end, say")


def _check_optimizers(optimizers: Any) -> None:
    if optimizers is None:
        return
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        raise _another("optimizers", optimizers, "two things: (optimizer, schedule), or (optimizer, None)")
    optimizer, schedule = optimizers
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise _another("optimizers", optimizer, "first an optimizer of the model's parameters, or None")
    if schedule is not None and (isinstance(schedule, type) or not hasattr(schedule, "step")):
        raise _another("optimizers", schedule, "second a schedule of that optimizer, or None")


def _another(name: str, value: Any, needed: str) -> TypeError:
    kind = (value if isinstance(value, type) else type(value)).__name__
    what = "the class" if isinstance(value, type) else "an" if kind[0] in "AEIOUaeiou" else "a"
    return TypeError(f"{name} has {what} {kind} where it needs {needed}")


class ReadOnce:
    """An attribute of TRL's that the objective has read: set later, it would do nothing, where TRL would follow it.

    Args:
        config_name: of the field in the config.
    """

    def __init__(self, config_name: str | None = None) -> None:
        self.config_name = config_name

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        try:
            return trainer.__dict__[self.name]
        except KeyError:
            raise AttributeError(f"{type(trainer).__name__!r} has no attribute {self.name!r}", obj=trainer) from None

    def __set__(self, trainer: Any, value: Any) -> None:
        if trainer.__dict__.get("is_built") and trainer.__dict__.get(self.name) != value:
            raise ValueError(
                f"trainer.{self.name} cannot be set any more: the loss was made from the config. Set "
                f"{self.config_name or self.name} there, and make a new trainer"
            )
        trainer.__dict__[self.name] = value
