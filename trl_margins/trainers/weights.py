"""The weights that train: whether they are finite, and whether they change. Nothing is read from the device here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import local

_SAMPLED = 2**17  # elements of each tensor, at most


def largest(parameters: Mapping[Any, Tensor]) -> Tensor:
    """[] the largest absolute value of this rank's parts; NaN where there is one. The weights are read once, and not
    copied: no norm is as fast in every dtype, and a sum of squares would overflow.
    """
    ends = [torch.aminmax(part) for part in map(_part, parameters.values()) if part.numel()]
    if not ends:
        return torch.zeros(())
    device = ends[0].max.device
    return torch.stack([end.float().to(device) for low, high in ends for end in (-low, high)]).max()


def is_broken(parameters: Mapping[Any, Tensor], most: float = math.inf) -> Tensor:
    """[] whether this rank's part of one of them holds NaN, infinity, or a larger value than `most`."""
    value = largest(parameters)
    return ~(value.isfinite() & (value <= most))


def broken_names(parameters: Mapping[str, nn.Parameter], most: float = math.inf) -> list[str]:
    """Which of them `is_broken`. Reads a value of each."""
    return [name for name, parameter in parameters.items() if is_broken({name: parameter}, most)]


def _part(parameter: Tensor) -> Tensor:
    """This rank's part; empty where it holds no numbers of 16 bits or more."""
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2 or parameter.is_meta:
        return torch.empty(0)  # quantized, or somewhere else
    return local(parameter.detach())


@dataclass
class Sample:
    """An element of every row of every tensor, as it was: they show whether a step has any effect, also where it
    changes a few rows of the token table alone.
    """

    parameters: Mapping[str, nn.Parameter]
    before: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = [part.clone() for part in self._now()]

    def is_unchanged(self) -> Tensor:
        """[] whether all of them are what they were, on this rank."""
        changed = [(now != then).any() for now, then in zip(self._now(), self.before, strict=True)]
        return ~torch.stack(changed).any() if changed else torch.tensor(True)

    def _now(self) -> list[Tensor]:
        parts = (_part(parameter) for parameter in self.parameters.values())
        rows = [part.reshape(len(part) if part.dim() else 1, -1)[:, 0] for part in parts if part.numel()]
        return [row[:: -(-len(row) // _SAMPLED)] for row in rows]
