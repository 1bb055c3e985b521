"""Moves a model's parameters a little way along a direction, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import forget_gathered, local

_SEED = 0x5EED  # the same draws on every rank and after a resume
_PART = 2**22  # elements that move together: what the arithmetic needs beside the weights is bounded by it


@contextmanager
def perturbed(model: nn.Module, direction: Mapping[str, Tensor], radius: float | Tensor) -> Iterator[None]:
    """Within the block the parameters are θ + radius · direction; after it they are θ again, bit for bit, also when
    the block raises, runs out of memory or is interrupted.

    The parameters keep their storage, so that sharded, tied and compiled models see the change. Below float32 a
    perturbation is often smaller than half a rounding step and plain rounding would swallow it: there the values are
    rounded stochastically, each up or down with the probability that makes it right on average. Every rank draws the
    same. Memory: one copy of the parameters that `direction` names, for as long as the block lasts.

    Args:
        model: any model; its gradients, its optimizer and its other parameters are left alone.
        direction: parameter name → tensor of its shape; of unit norm over all of them, for `radius` to be one.
        radius: how far; negative goes the other way. A 0-d tensor stays on its device.

    Raises:
        ValueError: a name that the model does not have, or a shape that is not the parameter's.
    """
    forget_gathered(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check(parameters, direction)
    backups: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for position, (name, along) in enumerate(direction.items()):
                values = local(parameters[name].data)
                # noted before the first byte changes, so that no interruption can come between the two
                backups.append((values, values.clone()))
                move(values, local(along), radius, seed=_SEED + position)
        torch.clear_autocast_cache()  # or autocast would go on using its low-precision copies
        forget_gathered(model)
        yield
    finally:
        for values, backup in backups:
            values.copy_(backup)
        torch.clear_autocast_cache()
        forget_gathered(model)


def _check(parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> None:
    for name, along in direction.items():
        if name not in parameters:
            raise ValueError(f"direction names {name!r}, which is no parameter of the model")
        if along.shape != parameters[name].shape:
            raise ValueError(
                f"direction of {name!r} has shape {tuple(along.shape)}, the parameter {tuple(parameters[name].shape)}"
            )


def move(values: Tensor, along: Tensor, radius: float | Tensor, seed: int = 0) -> None:
    """values += radius · along, in place; below float32 rounded stochastically."""
    if values.dtype.itemsize >= 4:
        for part, step in _parts(values, along):
            part.add_(step.to(part.dtype) * radius)
        return
    generator = torch.Generator(values.device).manual_seed(seed)
    for part, step in _parts(values, along):
        part.copy_(stochastic_round((step.float() * radius).add_(part), part.dtype, generator))


def _parts(values: Tensor, along: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Views of `values`, and the steps that belong to them."""
    if not values.is_contiguous():
        return [(values, along)]
    return zip(values.view(-1).split(_PART), along.reshape(-1).split(_PART), strict=True)


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 `values` in a 16-bit float type: one of the two nearest numbers, so drawn that the mean is right."""
    near = values.to(dtype)
    # as integers, neighbouring floats of one sign differ by one, upwards away from zero
    outwards = torch.where(values.abs() > near.float().abs(), 1, -1).to(torch.int16)
    other = (near.view(torch.int16) + outwards).view(dtype)
    share = (values - near.float()) / (other.float() - near.float())
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    return torch.where(draw < share, other, near)
