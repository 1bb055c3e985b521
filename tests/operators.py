"""What PyTorch is asked to compute, and the tensors that come of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Made:
    """A tensor with memory of its own, and the operator that made it."""

    by: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Operators(TorchDispatchMode):
    """While active, the names of all operators that are no views, and what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[Made] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            name = function.overloadpacket.__name__
            self.names.append(name)
            if not any(returned.alias_info for returned in function._schema.returns):  # in place, or into an `out`
                tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
                self.made += [Made(name, tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        return result

    def of_shape(self, shape: Any) -> list[Made]:
        return [made for made in self.made if made.shape == tuple(shape)]
