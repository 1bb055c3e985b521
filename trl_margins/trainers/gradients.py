"""Gradients that are looked at and not applied: they gather in `.grad`, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn

from .sharding import forget_gathered, is_sharded


class GatheringGradients:
    """Σ ∇value over everything that is added on any rank.

    Args:
        accelerator: the trainer's.
        parameters: by name, those whose gradients are looked at.
    """

    def __init__(self, accelerator: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self.accelerator, self.parameters = accelerator, parameters
        self.sharded = any(is_sharded(parameter) for parameter in parameters.values())

    def add(self, value: Tensor, retain_graph: bool = False) -> None:
        """Adds ∇value. In fp16, scaled up for the way back as the update's are, and down again."""
        leaves, scaler = list(self.parameters.values()), self.accelerator.scaler
        if self.sharded:
            # FSDP2's graph ends in gathered parameters of its own, and leaves the shards' gradient in `.grad`
            torch.autograd.backward(value)
            return
        scale = None if scaler is None else scaler.scale(torch.ones((), device=value.device))
        value = value if scale is None else value * scale
        # DDP would believe that the update's gradients are there, and DeepSpeed would take these for them
        kind = self.accelerator.distributed_type
        hooked = kind == DistributedType.DEEPSPEED or (retain_graph and kind != DistributedType.NO)
        if scale is None and not hooked:
            torch.autograd.backward(value, inputs=leaves, retain_graph=retain_graph)
            return
        found = torch.autograd.grad(value, leaves, retain_graph=retain_graph, allow_unused=True)
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                gradient = gradient if scale is None else gradient / scale
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)

    def take(self) -> dict[str, Tensor]:
        """What has gathered, over all ranks; `.grad` is empty afterwards."""
        gathered = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        if not self.sharded:
            return over_ranks(self.accelerator, gathered, "sum")
        # FSDP2 has reduced them, to the mean
        return {name: gradient.mul_(self.accelerator.num_processes) for name, gradient in gathered.items()}


def over_ranks(accelerator: Any, tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """The "sum" or the "mean" of every tensor over all ranks; `tensors` is handed over.

    accelerate reduces copies. One process needs none, and several hold that of one tensor at a time.
    """
    if accelerator.num_processes > 1:
        for name in list(tensors):
            tensors[name] = accelerator.reduce(tensors[name], how)
    return tensors


@contextmanager
def own_gradients(
    accelerator: Any, model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[GatheringGradients]:
    """Within the block `.grad` starts empty; after it, it is what it was.

    Gradients gather where those of the update will, so they cost no memory that training does not need anyway.
    """
    forget_gathered(model)
    # sharded, those that are not looked at get one too
    before = {parameter: parameter.grad for parameter in model.parameters() if parameter.requires_grad}
    try:
        for parameter in before:
            parameter.grad = None
        yield GatheringGradients(accelerator, parameters)
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient
