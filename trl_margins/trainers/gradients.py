"""Gradients that are looked at and not applied: they gather in `.grad`, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def own_gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Within the block `.grad` starts empty; the function that it gives takes what has gathered there by then.

    Gradients gather where those of the update will, so they cost no memory that training does not need anyway.
    """
    before = {name: parameter.grad for name, parameter in parameters.items()}

    def take() -> dict[str, Tensor]:
        gathered = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        return gathered

    try:
        for parameter in parameters.values():
            parameter.grad = None
        yield take
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]


def add_gradients(
    accelerator: Any, value: Tensor, parameters: Mapping[str, nn.Parameter], retain_graph: bool = False
) -> None:
    """Adds ∇value to `.grad`. In fp16, scaled up for the way back as the update's are, and down again."""
    scaler = accelerator.scaler
    scale = None if scaler is None else scaler.scale(torch.ones((), device=value.device))
    value = value if scale is None else value * scale
    leaves = list(parameters.values())
    if scale is None and not retain_graph:
        torch.autograd.backward(value, inputs=leaves)
        return
    # not through `backward`, whose hooks would have DDP believe that the update's gradients are there
    for leaf, gradient in zip(
        leaves, torch.autograd.grad(value, leaves, retain_graph=retain_graph, allow_unused=True), strict=True
    ):
        if gradient is not None:
            gradient = gradient if scale is None else gradient / scale
            leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
