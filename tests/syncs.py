"""Counts, on a CPU, what would make an accelerator wait: values that are read, shapes that hang on values."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "masked_scatter_backward",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
    "repeat_interleave",
    "bincount",
    "allclose",
    "equal",
    "is_nonzero",
)
_TO_PYTHON = ("tolist", "numpy", "cpu")  # a CPU's tensors are read without an operator


class Syncs(TorchDispatchMode):
    """While open, `found` grows by a line for each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if (name in _READS and not _has_size(kwargs)) or (
            name.startswith(("index", "_index", "_unsafe_index")) and _has_bool(args[1:])
        ):
            self._note(name)
        return func(*args, **kwargs or {})

    def __enter__(self) -> Syncs:
        self._before = {name: getattr(Tensor, name) for name in _TO_PYTHON}
        for name, method in self._before.items():

            def noted(tensor: Tensor, *args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
                self._note(_name)
                return _method(tensor, *args, **kwargs)

            setattr(Tensor, name, noted)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        for name, method in self._before.items():
            setattr(Tensor, name, method)
        super().__exit__(*args)

    def _note(self, name: str) -> None:
        where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-2]]
        if any("torch/utils/data/" in frame for frame in where):
            return  # a batch is put together on the CPU
        self.found.append(f"{name} at {' < '.join(where[-1:-5:-1])}")


def _has_size(kwargs: Any) -> bool:
    """Whether the caller has said the size of what comes out, which nobody has to wait for."""
    return (kwargs or {}).get("output_size") is not None


def _has_bool(args: Any) -> bool:
    """Among indices, which come as a list."""
    indices = [value for arg in args if isinstance(arg, (list, tuple)) for value in arg]
    return any(isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) for value in indices)
