"""What a trainer is called with: each argument of its kind, before anything is made of it."""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments
from transformers.trainer_utils import denumpify_detensorize

from ..checks import nearest
from ..evaluation.tables import RANKING

logger = logging.getLogger(__name__)

_LOAD = "AutoModelForCausalLM.from_pretrained(...)"
_ADAPTER = "default"  # which PEFT loads from a folder, and TRL copies for the reference
_READ_AT_ONCE = (  # of transformers' own
    *("seed", "data_seed", "full_determinism", "bf16", "fp16", "tf32", "use_cpu", "torch_compile"),
    *("per_device_train_batch_size", "use_liger_kernel", "accelerator_config", "neftune_noise_alpha", "fsdp"),
)
_READ_LATER = ("eval_min_score_gap", "overwrite_output_dir", "push_pair_log")


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
    if isinstance(reference, PeftModel):
        raise _another("ref_model", reference, "the model itself: ref_model.merge_and_unload(), or leave it out")
    config: Any = getattr(reference, "config", None)
    if reference is not None and (not hasattr(reference, "generation_config") or config.is_encoder_decoder):
        raise _another("ref_model", reference, f"one that writes text from left to right, as the model: {_LOAD}")
    _check_values("ref_model", reference)
    if isinstance(given.get("processing_class"), str | Path):
        raise _another("processing_class", given["processing_class"], "AutoTokenizer.from_pretrained(...)")
    if (adapter := given.get("peft_config")) is not None and not isinstance(adapter, PeftConfig):
        raise _another("peft_config", adapter, "a config of PEFT's: LoraConfig(...)")
    if adapter is not None and (adapter.peft_type is None or (adapter.is_prompt_learning and not adapter.task_type)):
        missing = "the task type CAUSAL_LM" if adapter.peft_type else "a kind of adapter: LoraConfig(...)"
        raise ValueError(f"peft_config: the {type(adapter).__name__} needs {missing}")
    for name, value in vars(adapter).items() if adapter is not None else ():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"peft_config: {name} is {value}: give a finite number")
    if isinstance(evals := given.get("eval_dataset"), Mapping):
        for name in [name for name in evals if not isinstance(name, str)]:
            raise _another("eval_dataset", name, "text as the name of each set: the metrics are called after it")
        if not evals or "" in evals:
            what = "has a set without a name" if evals else "is a dict without sets"
            raise ValueError(
                f"eval_dataset {what}: give one data set, or a dict with a name for each; or leave it out"
            )
    _check_callbacks(given.get("callbacks"))
    _check_optimizers(given.get("optimizers"))
    return given


def settings_read(config: Any) -> dict[str, Any]:
    """The fields of a config that a trainer reads when it is built, and never again."""
    names = {item.name for item in fields(config)} - {item.name for item in fields(TrainingArguments)} - {*_READ_LATER}
    return {name: _as_written(getattr(config, name)) for name in sorted(names | {*_READ_AT_ONCE})}


def _as_written(value: Any) -> Any:
    """A copy, in which dtypes are texts: writing a config makes them that in the config itself, as TRL's makes them
    dtypes."""
    if not isinstance(value, dict):
        return copy(value)
    return {
        key: str(each).removeprefix("torch.") if isinstance(each, torch.dtype) else each for key, each in value.items()
    }


def check_settings(config: Any, read: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: one of `settings_read` has been set since, which would do nothing.
    """
    for name, value in read.items():
        if (now := _as_written(getattr(config, name))) != value:
            raise ValueError(
                f"args.{name} was {value!r} when the trainer was made, and has been set to {now!r}, which would do "
                "nothing: set it in the config before, and make a new trainer"
            )


def _check_model(model: Any) -> None:
    if isinstance(model, PreTrainedConfig):
        raise _another("model", model, "a model of that config: AutoModelForCausalLM.from_config(config)")
    if not isinstance(model, str | nn.Module):
        raise _another("model", model, f"a name, a folder, or a model that has been loaded: {_LOAD}")
    if isinstance(model, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel):
        raise _another("model", model, "the model in it: the trainer wraps it itself")
    if isinstance(model, nn.Module) and not hasattr(model, "config"):
        raise _another("model", model, f"a model of transformers': {_LOAD}")
    _check_values("model", model)
    check_active(model)
    is_wrapped = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    parts = model.modules() if isinstance(model, nn.Module) and not is_wrapped else ()
    if any(isinstance(each, BaseTunerLayer) for each in parts):
        raise ValueError(
            f"model is a {type(model).__name__} with an adapter's layers in it, of which nothing could load what is "
            "saved: pass a PeftModel that it is part of, or model.merge_and_unload()"
        )
    if hasattr(model, "_orig_mod"):
        raise _another("model", model, "the model itself, and torch_compile=True in the config to compile it")


def _check_values(name: str, model: Any) -> None:
    """FSDP loads the weights on one process alone, and sends them to the others."""
    if not isinstance(model, nn.Module) or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    weights = [*model.named_parameters()]
    if made := [each for each, weight in weights if weight.is_inference()]:
        raise ValueError(
            f"{len(made)} of the {len(weights)} weight tensors of {name} ({made[0]}) were made under "
            "torch.inference_mode(), so nothing can train through them: load it outside of that"
        )
    if overlapping := [each for each, weight in weights if weight.requires_grad and _overlaps(weight)]:
        raise ValueError(
            f"{len(overlapping)} of the {len(weights)} weight tensors of {name} ({overlapping[0]}) have values that "
            "share memory, as expand() leaves them, and would be written over one another: make each contiguous"
        )
    if empty := [each for each, weight in weights if weight.is_meta and not hasattr(weight, "ds_id")]:
        raise ValueError(
            f"{len(empty)} of the {len(weights)} weight tensors of {name} have no values ({empty[0]}, on the device "
            f"'meta'): load it with {_LOAD}, without a device_map that keeps weights on the disk"
        )


def _overlaps(weight: Tensor) -> bool:
    """Whether its values take less room than there are of them."""
    if weight.layout != torch.strided or not weight.numel():
        return False
    room = 1 + sum((size - 1) * step for size, step in zip(weight.shape, weight.stride(), strict=True))
    return room < weight.numel()


def check_active(model: Any) -> None:
    """
    Raises:
        ValueError: another adapter is active than the one that trains.
    """
    if not isinstance(model, PeftModel) or (active := list(model.active_adapters)) == [_ADAPTER]:
        return
    there = f"call model.set_adapter({_ADAPTER!r})" if _ADAPTER in model.peft_config else "leave adapter_name out"
    raise ValueError(
        f"the model's active adapters are {active}, of {list(model.peft_config)}: one adapter trains, under the name "
        f"{_ADAPTER!r}, which is what a saved folder is loaded with. To train that one, {there}; to go on from "
        "another, load it with PeftModel.from_pretrained(model, folder, is_trainable=True)"
    )


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
    closure = None if optimizer is None else inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise _another("optimizers", optimizer, "one whose step needs no closure, which transformers does not give")
    if schedule is not None and (isinstance(schedule, type) or not hasattr(schedule, "step")):
        raise _another("optimizers", schedule, "second a schedule of that optimizer, or None")
    # a wrapper has the optimizer itself, and so has a schedule
    if schedule is not None and getattr(schedule, "optimizer", optimizer) not in (
        optimizer,
        getattr(optimizer, "optimizer", optimizer),
    ):
        raise ValueError(
            f"optimizers: the {type(schedule).__name__} sets the learning rate of another optimizer than the one "
            "given with it: make it of that one, as (optimizer, schedule)"
        )


def _another(name: str, value: Any, needed: str) -> TypeError:
    kind = (value if isinstance(value, type) else type(value)).__name__
    what = "the class" if isinstance(value, type) else "an" if kind[0] in "AEIOUaeiou" else "a"
    return TypeError(f"{name} has {what} {kind} where it needs {needed}")


class OwnMetrics:
    """A `compute_metrics` of the user's, whose answer is looked at before it is logged."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        self.compute, self.said = compute, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            TypeError: not numbers by name.
        """
        found = self.compute(*args, **kwargs)
        if not kwargs.get("compute_result", True):  # batch_eval_metrics
            return found
        if not isinstance(found, Mapping):
            raise _another("the answer of compute_metrics", found, 'numbers by name, such as {"length": 3.5}')
        found = denumpify_detensorize(dict(found))
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, int | float | str):
                raise _another(f"compute_metrics: {name!r}", value, "a number, under a name that is text")
        taken = [name for name in found if name.removeprefix("eval_") in ("loss", *RANKING)]
        if taken and not self.said:
            logger.warning(
                "compute_metrics gives %s, which the trainer measures itself: those of compute_metrics are left out. "
                "Give them other names",
                " and ".join(map(repr, taken)),
            )
            self.said = True
        return {name: value for name, value in found.items() if name not in taken}


class ReadOnce:
    """An attribute of TRL's that cannot be set once a trainer has been made: what it decides has been decided, or
    margin_run.json would not say what it is.

    Args:
        config_name: of the field in the config, or of the argument, that decides it.
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
                f"trainer.{self.name} cannot be set any more: it was read when the trainer was made. Give "
                f"{self.config_name or self.name}, in the config or as an argument, to a new trainer"
            )
        trainer.__dict__[self.name] = value
