"""The direction of a step away from the policy: a gradient of gaps or losses, or the optimizer's momentum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import full_tensor, is_sharded, local, reduce_tensors, reshard
from ..zero3 import PartitionedSum, is_partitioned, optimizer_state

_MOMENTUM = ("exp_avg", "momentum_buffer")  # Adam's first moment, SGD's momentum
_SETTINGS = ("betas", "momentum", "beta1")  # of optimizers that keep one of these


@dataclass(frozen=True)
class Direction:
    """A gradient up to a factor, and its norm over all tensors: kept apart, so that no normalised copy is needed."""

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


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """[] Euclidean norm over all tensors, in float32 or wider; of sharded tensors, over all shards."""
    norms = [
        torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors
    ]
    return torch.linalg.vector_norm(torch.stack([full_tensor(norm) for norm in norms]))


def gradient_direction(accelerator: Accelerator, gradient: Mapping[str, Tensor]) -> Direction:
    """The direction of a gradient. In fp16, one that overflows becomes 0 in place: a step of 0 · ∞ would be NaN."""
    direction = Direction.along(gradient)
    if accelerator.scaler is not None:
        for vector in gradient.values():
            local(vector).masked_fill_(~torch.isfinite(direction.norm), 0.0)
    return direction


def momentum_direction(optimizer: Optimizer | None, parameters: Mapping[str, nn.Parameter]) -> Direction | None:
    """The direction in which gaps grow according to the optimizer's running mean of the loss gradient: −momentum.
    None before the first step. Its vectors are the optimizer's own tensors.

    Raises:
        ValueError: no optimizer, or one whose momentum is not a plain tensor of the parameter's shape.
    """
    if optimizer is None:
        raise ValueError("anchor_direction='momentum' reads a training's optimizer: use anchor_direction='gradient'")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
    settings = getattr(getattr(optimizer, "optimizer", optimizer), "defaults", {})  # DeepSpeed wraps it once more
    if settings and not any(settings.get(name) for name in _SETTINGS):
        raise ValueError(
            f"anchor_direction='momentum' needs an optimizer with a momentum, and {type(optimizer).__name__} has none "
            "here: use adamw_torch, give it one with optim_args, or use anchor_direction='gradient'"
        )
    partitioned = any(map(is_partitioned, parameters.values()))
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not partitioned and not any(id(parameter) in known for parameter in parameters.values()):
        raise ValueError(
            f"anchor_direction='momentum' finds none of the model's parameters in {type(optimizer).__name__}, which "
            "keeps them in parts of its own (ZeRO-2 does): use anchor_direction='gradient', or ZeRO-3"
        )
    states = {
        name: optimizer_state(parameter, _MOMENTUM) if partitioned else optimizer.state.get(parameter, {})
        for name, parameter in parameters.items()
    }
    vectors = {}
    for name, state in states.items():
        if not state:
            continue  # a parameter that no batch has used yet
        momentum = next((state[key] for key in _MOMENTUM if isinstance(state.get(key), Tensor)), None)
        if momentum is None or local(momentum).shape != local(parameters[name]).shape:
            raise ValueError(
                f"anchor_direction='momentum' reads {' or '.join(_MOMENTUM)} from the optimizer's state; "
                f"{type(optimizer).__name__} keeps {', '.join(state)} for {name}. Use an optimizer with a plain "
                "momentum (adamw_torch), or anchor_direction='gradient'"
            )
        vectors[name] = momentum
    return Direction.along(vectors, sign=-1) if vectors else None


class GradientSum:
    """Σ ∇value over everything that is added on any rank, for these parameters; gathered in `.grad`."""

    def __init__(self, accelerator: Accelerator, parameters: Mapping[str, nn.Parameter]) -> None:
        self.accelerator, self.parameters = accelerator, parameters
        self.sharded = any(is_sharded(parameter) for parameter in parameters.values())

    def add(self, value: Tensor, retain_graph: bool = False) -> None:
        """Adds ∇value. In fp16 the backward pass is scaled, as the update's is."""
        if self.sharded:
            # FSDP2's graph ends in gathered parameters of its own, and leaves the shards' gradient in `.grad`
            torch.autograd.backward(value)
            return
        leaves, scaler = list(self.parameters.values()), self.accelerator.scaler
        # DDP would take this backward pass for the update's, and DeepSpeed these gradients
        kind = self.accelerator.distributed_type
        hooked = kind == DistributedType.DEEPSPEED or (retain_graph and kind != DistributedType.NO)
        if scaler is None and not hooked:
            torch.autograd.backward(value, inputs=leaves, retain_graph=retain_graph)
            return
        scale = None if scaler is None else scaler.scale(torch.ones((), device=value.device))
        value = value if scale is None else value * scale
        found = torch.autograd.grad(value, leaves, retain_graph=retain_graph, allow_unused=True)
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                gradient = gradient if scale is None else gradient / scale
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)

    def take(self) -> dict[str, Tensor]:
        """The sum over all ranks; `.grad` is empty afterwards."""
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        if not self.sharded:
            return reduce_tensors(self.accelerator, found, "sum")
        # FSDP2 has reduced them, to the mean
        return {name: gradient.mul_(self.accelerator.num_processes) for name, gradient in found.items()}


@contextmanager
def own_gradients(
    accelerator: Accelerator, model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[GradientSum | PartitionedSum]:
    """Within the block `.grad` starts empty; after it, it is what it was before.

    Gradients gather where those of the update will, so they cost no memory beyond what training needs anyway.
    """
    reshard(model)
    with ExitStack() as undo:
        for parameter in model.parameters():  # FSDP2 gives those that are not asked for a gradient too
            if parameter.requires_grad:
                undo.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
        partitioned = any(map(is_partitioned, parameters.values()))
        yield PartitionedSum(parameters) if partitioned else GradientSum(accelerator, parameters)
