"""Short digests of what a run reads: its rows, and weights that it does not train. A resumed run reads the same."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from array import array as array_of_numbers
from collections import UserList, UserString, deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from pathlib import PurePath
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributions import Distribution

from ..distributed import local
from ..rows.tokenized import arrow_columns
from ..terms import Term

_ADDRESS = re.compile(r" at 0x\w+")
_VALUES = 64  # of each weight tensor
_DEPTH = 8  # of what is within an argument
_OPENED = 200  # objects within an argument
_LONG = 10_000  # values, of which JSON would be long, too
_OF_ONE_VALUE = (
    *(bytes, bytearray, complex, range, slice, Decimal, Enum, Fraction, PurePath, UUID, date, timedelta),
    *(torch.dtype, torch.device),
)


def of_columns(rows: Dataset, names: Iterable[str]) -> dict[str, str]:
    """A digest of each column that there is, over all rows."""
    there = [name for name in dict.fromkeys(names) if name in rows.column_names]
    digests = {name: hashlib.sha256() for name in there}
    for arrays in arrow_columns(rows, *there) if there else ():
        for name, array in zip(there, arrays, strict=True):
            digests[name].update(_content(array))
    return {name: digest.hexdigest()[:8] for name, digest in digests.items()}


def of_rows(rows: Dataset) -> str:
    """Of the tokens of the first, the middle and the last row, as earlier versions have it."""
    tokens = token_columns(rows)
    some = [[rows[i][name] for name in tokens] for i in (0, len(rows) // 2, len(rows) - 1)] if len(rows) else []
    return hashlib.sha256(json.dumps(some).encode()).hexdigest()[:8]


def token_columns(rows: Dataset) -> list[str]:
    """The columns with token ids and labels."""
    return [name for name in rows.column_names if name.endswith(("_ids", "_labels"))]


def _content(array: pa.Array) -> bytes:
    """The values of an array, whatever its buffers are."""
    kind = array.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type):
        lengths = pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False)
        values = array.flatten().to_numpy(zero_copy_only=False)
        return lengths.astype(np.int64).tobytes() + values.astype(np.int64).tobytes()
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        return array.to_numpy(zero_copy_only=False).astype(np.float64).tobytes()
    return json.dumps(array.to_pylist(), default=str).encode()


def of_arguments(part: Any) -> dict[str, Any]:
    """The class of a term or a reward, and the arguments that it was made with, as far as it keeps them by name."""
    values, modules = _arguments(part)
    return {"class": type(part).__qualname__, **{name: _argument(each, modules) for name, each in values.items()}}


def of_objects(part: Any) -> dict[str, str]:
    """A digest of each argument that has more in it than `of_arguments` shows, which training may change.

    None of a term that restores what it holds.
    """
    values, modules = _arguments(part)
    if isinstance(part, Term) and not modules:
        return {}
    found = {name: (_argument(each, modules), _argument(each, modules, [])) for name, each in values.items()}
    return {
        name: hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:8]
        for name, (shown, whole) in found.items()
        if whole != shown
    }


def _arguments(part: Any) -> tuple[dict[str, Any], bool]:
    """The arguments that a part was made with, and whether nothing restores the modules among them."""
    names = inspect.signature(type(part)).parameters
    modules = isinstance(part, Term) and type(part).load_state_dict is Term.load_state_dict
    return {name: getattr(part, name, getattr(part, f"_{name}", None)) for name in names}, modules


def _argument(value: Any, modules: bool, opened: list[Any] | None = None) -> Any:
    try:
        return _described(value, modules, opened)
    except Exception:  # each class has its own
        return type(value).__qualname__


def _described(value: Any, modules: bool, opened: list[Any] | None = None, depth: int = 0) -> Any:
    """An argument as JSON can hold it: its values where they can be seen, else the name of its class.

    Args:
        value: the argument.
        modules: look into modules too, which nothing restores.
        opened: look into all objects, as pickle does, and add each; None shows their classes alone.
        depth: how deep within the argument it is.
    """
    inner = partial(_described, modules=modules, opened=opened, depth=depth + 1)
    kind = type(value).__qualname__
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return "NaN"  # which equals itself
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, _OF_ONE_VALUE):
        return str(value)
    if isinstance(value, np.ndarray | Tensor):
        value = value.to_dense() if isinstance(value, Tensor) and value.layout != torch.strided else value
        if value.dtype == object:
            return inner(value.tolist())
        return kind if isinstance(value, nn.Parameter) and opened is None else _of_values(value)
    if depth > _DEPTH or hasattr(value, "__qualname__"):  # a class or a function
        return getattr(value, "__qualname__", kind)
    if isinstance(value, Mapping):
        return {str(inner(key)): inner(each) for key, each in value.items()}
    if isinstance(value, deque):
        return [value.maxlen, *map(inner, value)]
    if isinstance(value, list | tuple):
        return [inner(each) for each in value] if len(value) < _LONG else _of_values(np.asarray(value))
    if isinstance(value, UserList | UserString):
        return inner(value.data)
    if isinstance(value, array_of_numbers | memoryview):
        return inner(value.tolist())
    if isinstance(value, re.Pattern):
        return [inner(value.pattern), value.flags]
    if isinstance(value, Distribution):  # also of what it computes on demand, whether that was asked for or not
        return [kind, {name: inner(getattr(value, name)) for name in value.arg_constraints}]
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, torch.Generator):
        return value.initial_seed()  # the rest is what has been drawn
    if hasattr(value, "to_numpy"):  # of pandas and the like
        return [kind, inner(value.to_numpy())]
    if isinstance(value, set | frozenset):
        return sorted(str(inner(each)) for each in value)
    if isinstance(value, partial):
        return [inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, nn.Module):
        if not modules:
            return kind
        weights = {name: inner(some_of(each, _VALUES)) for name, each in value.state_dict().items()}
        return {"class": kind, "shown": _ADDRESS.sub("", repr(value)), **weights}
    if is_dataclass(value) or isinstance(value, SimpleNamespace):
        return {"class": kind, **inner(vars(value))}
    if opened is None:
        return kind  # whatever it counts or holds
    opened.append(value)
    if len(opened) > _OPENED:
        raise ValueError("it has a trainer or the like in it")
    return [kind, inner([*value.__reduce_ex__(2)[1:]])]


def _of_values(values: Any) -> str:
    """A digest of an array's or a tensor's values."""
    if math.prod(values.shape) < _LONG:
        return hashlib.sha256(repr(values.tolist()).encode()).hexdigest()[:8]
    array = np.asarray(values)
    if array.dtype.hasobject:
        raise TypeError("an array of objects, whose bytes say where they are")
    return hashlib.sha256(array.tobytes()).hexdigest()[:8]


def of_attributes(part: Any) -> dict[str, str]:
    """A digest of each attribute that a term has now; not of models, which are large, nor of what cannot be hashed."""
    found = {}
    for name, value in getattr(part, "__dict__", {}).items():
        if isinstance(value, torch.nn.Module):
            continue
        with suppress(Exception):  # each class has its own
            found[name] = Hasher.hash(value)
    return found


def of_optimizer(optimizer: Any, model: Any) -> str | None:
    """The class of an optimizer, and its parameters in their order, by which its state has them."""
    if optimizer is None:
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = " ".join(names.get(id(each), "") for group in optimizer.param_groups for each in group["params"])
    sizes = " + ".join(str(len(group["params"])) for group in optimizer.param_groups)
    return (
        f"{type(optimizer).__name__} ({sizes} tensors in the order {hashlib.sha256(order.encode()).hexdigest()[:8]})"
    )


def of_reference(model: Any, reference: Any) -> str | None:
    """Of weights that no checkpoint has: those of a reference model, and those below an adapter.

    None where there are none, or where this process has only a part of them.
    """
    weights: list[tuple[str, Tensor]] = []
    models = [each for each in (model, reference) if each is not None]
    if any(isinstance(part, FullyShardedDataParallel) for each in models for part in each.modules()):
        return None
    if reference is not None:
        weights += _base_weights(reference)
    if is_peft_model(model):
        if any(moves_base(getattr(config, "init_lora_weights", True)) for config in model.peft_config.values()):
            return None  # what is left of it is what a computation gives, not the same everywhere
        weights += _base_weights(model)
    if not weights or any(is_part(each) for _, each in weights):
        return None
    digest = hashlib.sha256()
    for name, weight in weights:
        some = some_of(weight, _VALUES).to(torch.bfloat16).cpu()  # also in float32 the same
        digest.update(f"{name} {tuple(weight.shape)} ".encode() + some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:8]


def moves_base(init_lora_weights: Any) -> bool:
    """Whether an adapter takes its first values out of the model under it."""
    return str(init_lora_weights).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def is_part(weight: Tensor) -> bool:
    """Whether other processes have values of a weight tensor."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


def place_of(weight: Tensor) -> int:
    """Where its values are in memory; 0 where there are none, as of a part that others have, or none to be seen."""
    try:
        here = local(weight).detach()
        return here.data_ptr() if here.numel() else 0
    except RuntimeError:  # of several tensors, as quantized ones
        return 0


def some_of(weight: Tensor, most: int) -> Tensor:
    """[up to `most`] values of a weight tensor, evenly spaced."""
    flat = weight.detach().flatten()
    return flat[:: max(1, -(-len(flat) // most))]


def _base_weights(model: Any) -> list[tuple[str, Tensor]]:
    """All but what adapters add and train."""
    adapters = {*getattr(model, "peft_config", {})}
    return [
        (name, weight)
        for name, weight in model.named_parameters()
        if not adapters or not (weight.requires_grad or adapters & {*name.split(".")})
    ]
