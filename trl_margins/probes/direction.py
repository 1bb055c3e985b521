"""Where the anchor lies: the gradient of the mean score gap, or an estimate of it that the optimizer already has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn

from ..distributed import forget_gathered, is_sharded, local, whole

_MOMENTUM = ("exp_avg", "momentum_buffer")  # Adam's first moment, SGD's momentum


@dataclass(frozen=True)
class Direction:
    """∇M̄ up to a factor, and its norm over all tensors: kept apart, so that no normalised copy is needed."""

    vectors: Mapping[str, Tensor]  # parameter name → tensor of its shape
    norm: Tensor  # []
    sign: int = 1  # −1 for vectors that point the other way

    @classmethod
    def along(cls, vectors: Mapping[str, Tensor], sign: int = 1) -> Direction:
        # in one order, for the same rounding after a resume
        return cls(vectors, total_norm(vectors[name] for name in sorted(vectors)), sign)

    @property
    def per_unit(self) -> Tensor:
        """[] the factor that makes it a unit vector; 0 where there is no direction."""
        usable = torch.isfinite(self.norm) & (self.norm > 0)
        return torch.where(usable, self.sign / self.norm, 0.0)

    def finite(self) -> Direction:
        """Itself, with vectors of 0 (in place) where their norm is not finite: a step of 0 · ∞ would be NaN."""
        for vector in self.vectors.values():
            local(vector).masked_fill_(~torch.isfinite(self.norm), 0.0)
        return self


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """[] Euclidean norm over all tensors, in float32 or wider; of sharded tensors, over all shards."""
    norms = [
        torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors
    ]
    return torch.linalg.vector_norm(torch.stack([whole(norm) for norm in norms]))


def momentum_direction(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Direction | None:
    """The direction in which the optimizer's running mean of the loss gradient says that gaps grow, −momentum; None
    before the first step. Its vectors are the optimizer's own tensors.

    Raises:
        ValueError: an optimizer without momentum, or with one that is not kept as a plain tensor of the parameter.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in known for parameter in parameters.values()):
        raise ValueError(
            f"anchor_direction='momentum' finds none of the model's parameters in {type(optimizer).__name__}, which "
            "keeps them in parts of its own (DeepSpeed does): take anchor_direction='gradient'"
        )
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    if not any(states.values()):
        return None
    vectors = {}
    for name, state in states.items():
        if not state:
            continue  # a parameter that no batch has used yet
        momentum = next((state[key] for key in _MOMENTUM if isinstance(state.get(key), Tensor)), None)
        if momentum is None or momentum.shape != parameters[name].shape:
            raise ValueError(
                f"anchor_direction='momentum' reads {' or '.join(_MOMENTUM)} from the optimizer's state; "
                f"{type(optimizer).__name__} keeps {', '.join(state)} for {name}. Take an optimizer with a plain "
                "momentum (adamw_torch), or anchor_direction='gradient'"
            )
        vectors[name] = momentum
    return Direction.along(vectors, sign=-1)


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
