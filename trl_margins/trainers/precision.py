"""Passes that see a small step of the weights although the training computes in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def narrow_dtype(model: nn.Module, mixed_precision: str) -> torch.dtype | None:
    """The 16-bit type in which a trainer's forward pass computes; None where it is float32 or wider."""
    if mixed_precision in _MIXED:
        return _MIXED[mixed_precision]
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize == 2), None)


def widened(tensor: Tensor) -> Tensor:
    """In float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within the block, weights narrower than float32 are widened, and autocast is off. Afterwards the tensors are the
    very ones they were.

    Memory: a float32 copy of the narrow weights, for as long as the block lasts.
    """
    wrapped = model.__dict__.get("forward")  # accelerate puts its autocast here, and keeps what it found
    unwrapped = model.__dict__.get("_original_forward")
    narrow = {}
    try:
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                narrow[tensor] = tensor.data
                tensor.data = tensor.data.float()
        if unwrapped is not None:
            model.forward = unwrapped
        with torch.autocast(_device_type(model), enabled=False):
            yield
    finally:
        for tensor, data in narrow.items():
            tensor.data = data
        if unwrapped is not None:
            model.forward = wrapped


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


@contextmanager
def displaced(
    model: nn.Module, direction: Mapping[str, Tensor], radius: float | Tensor, dtype: torch.dtype
) -> Iterator[None]:
    r"""Within the block the model computes in 16 bits at θ + radius · direction, without rounding that sum to 16 bits.

    A small step is lost when a 16-bit weight takes it, and random rounding, right on average, moves the weights
    further than the step does. So the step stays beside the weight: a linear layer becomes one product
    :math:`[x\; x]\,[W\; \delta]^\top`, with the sum in the product's float32 accumulator. All other parameters (norms,
    embeddings, biases) are float32 meanwhile, under autocast. No byte of the model changes; float32 copies are made of
    those others alone.

    Args:
        model: a model whose matrices belong to linear layers and embeddings: see `cannot_displace`.
        direction: parameter name → tensor of its shape.
        radius: how far; a 0-d tensor stays on its device.
        dtype: the 16-bit type that the training computes in.
    """
    owners = _owners(model)
    widened: list[tuple[Tensor, Tensor]] = []
    products: list[nn.Module] = []
    try:
        with torch.no_grad():
            # the products first: a tied head must not see the embedding's float32 values
            for name, along in direction.items():
                for module in owners[name]:
                    if _is_product(module, name):
                        products.append(module)
                        module.forward = _product_beside(module.weight.data, along, radius, module, dtype)
            for name, along in direction.items():
                if not all(_is_product(module, name) for module in owners[name]):
                    parameter = model.get_parameter(name)
                    widened.append((parameter, parameter.data))
                    parameter.data = parameter.data.float() + along.float() * radius
        torch.clear_autocast_cache()
        with torch.autocast(_device_type(model), dtype=dtype):
            yield
    finally:
        for parameter, data in widened:
            parameter.data = data
        for module in products:
            module.__dict__.pop("forward", None)
        torch.clear_autocast_cache()


def cannot_displace(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why `displaced` does not do for a step of these parameters; None where it does."""
    owners = _owners(model)
    for name in names:
        parameter = model.get_parameter(name)
        for module in owners[name]:
            if "forward" in module.__dict__:
                return f"the forward pass of {name}'s {type(module).__name__} is wrapped (several devices, offloading)"
            if parameter.ndim > 1 and not _is_product(module, name) and not isinstance(module, nn.Embedding):
                return f"{name} is a matrix of {type(module).__name__}, neither a linear layer nor an embedding"
    return None


def _owners(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Every parameter's modules, by the one name that `named_parameters` gives it."""
    modules: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                modules.setdefault(id(parameter), []).append(module)
    return {name: modules[id(parameter)] for name, parameter in model.named_parameters()}


def _is_product(module: nn.Module, name: str) -> bool:
    return type(module).forward is nn.Linear.forward and name.endswith("weight")


def _product_beside(
    weight: Tensor, along: Tensor, radius: float | Tensor, module: nn.Linear, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        x = x.to(dtype)
        both = torch.cat([weight.to(dtype), (along.float() * radius).to(dtype)], dim=1)
        y = F.linear(torch.cat([x, x], dim=-1), both)
        # in float32, where a displaced bias keeps its step
        return y if module.bias is None else (y.float() + module.bias.float()).to(dtype)

    return forward


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Two passes that are compared must not differ by chance."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
