"""Moves a model's parameters a small step along a direction, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeGuard
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import local, reshard, shard_index
from ..forward.head import causal_model, decoder

_SEED = 0x5EED  # the same draws after a resume, and on every rank that holds the same values
_OF_A_SHARD = 2**20  # more than a model has parameters; a CPU seeds with 32 bits
_PART = 2**22  # elements that move together: this bounds the memory that the arithmetic needs beside the weights


@contextmanager
def perturbed(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    radius: float | Tensor,
    computed_in: Mapping[str, torch.dtype] | None = None,
) -> Iterator[None]:
    """Within the block the parameters are θ + radius · direction; after it they are θ again, bit for bit, also when
    the block raises, runs out of memory or is interrupted.

    The parameters keep their storage, so that sharded, tied and compiled models see the change. Below float32 a
    perturbation is often smaller than half a rounding step, and rounding to nearest would lose it: there the values
    are rounded stochastically, each up or down with the probability that makes it right on average. Ranks that hold
    the same values draw the same numbers. Memory: one copy of the parameters in `direction` (of this rank's shards,
    where they are sharded), for as long as the block lasts.

    Args:
        model: any model; its gradients, its optimizer and its other parameters are left alone.
        direction: parameter name → tensor of its shape; with unit norm over all of them, `radius` is the distance.
        radius: how far; negative goes the other way. A 0-d tensor stays on its device.
        computed_in: parameter name → the dtype to which the forward pass casts it, where that is not its own. Its
            values are rounded as that cast would round them, and take the step in that dtype.

    Raises:
        ValueError: a name that the model does not have, or a shape that is not the parameter's.
    """
    reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, along in direction.items():
        if name not in parameters:
            raise ValueError(f"direction names {name!r}, which is not a parameter of the model")
        if local(along).shape != (shape := local(parameters[name]).shape):
            raise ValueError(f"direction of {name!r} has shape {tuple(along.shape)}, the parameter {tuple(shape)}")
    with ExitStack() as undo:
        undo.push(partial(_leave_forward, model))
        undo.callback(torch.clear_autocast_cache)  # else autocast would go on using its 16-bit copies
        with torch.no_grad():
            for position, (name, along) in enumerate(direction.items()):
                whole, dtype = parameters[name], (computed_in or {}).get(name)
                values = local(whole).data  # apart from the version that a kept graph has noted
                # noted before the first byte changes, so that no interruption can come between the two
                undo.callback(values.copy_, values.clone())
                move(values, local(along), radius, _SEED + position + _OF_A_SHARD * shard_index(whole), dtype)
        torch.clear_autocast_cache()
        reshard(model)
        yield


def _leave_forward(model: nn.Module, kind: type[BaseException] | None, *error: object) -> None:
    reshard(model, after_error=kind is not None)


def move(
    values: Tensor, along: Tensor, radius: float | Tensor, seed: int = 0, dtype: torch.dtype | None = None
) -> None:
    """values += radius · along, in place; below float32 rounded stochastically.

    Args:
        dtype: what the values are cast to before they are used. The sum starts from the cast values, and is one that
            the cast leaves alone. Starting from the values themselves would draw for every one of them, and these
            random steps would be larger than those of the values that the step alone moves.
    """
    dtype = values.dtype if dtype is None else dtype
    parts: Iterable[tuple[Tensor, Tensor]] = [(values, along)]
    if values.is_contiguous():  # then views of it
        parts = zip(values.view(-1).split(_PART), along.reshape(-1).split(_PART), strict=True)
    if dtype.itemsize >= 4:
        for part, step in parts:
            part.add_(step.to(part.dtype) * radius)
        return
    generator = torch.Generator(values.device).manual_seed(seed)
    for part, step in parts:
        part.copy_(stochastic_round((step.float() * radius).add_(part.to(dtype)), dtype, generator))


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 `values` in a 16-bit float dtype: one of the two nearest numbers, drawn so that the mean is right."""
    near = values.to(dtype)
    # as integers, neighbouring floats of one sign differ by one, upwards away from zero
    outwards = torch.where(values.abs() > near.float().abs(), 1, -1).to(torch.int16)
    other = (near.view(torch.int16) + outwards).view(dtype)
    share = (values - near.float()) / (other.float() - near.float())
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    return torch.where(draw < share, other, near)


@contextmanager
def displaced(
    model: nn.Module, direction: Mapping[str, Tensor], radius: float | Tensor, dtype: torch.dtype, fused: bool = False
) -> Iterator[Mapping[str, Product]]:
    r"""Within the block the model computes in 16 bits at θ + radius · direction, without rounding that sum to 16 bits.

    A small step is lost when it is added to a 16-bit weight, and stochastic rounding, right on average, moves the
    weights further than the step does. So the step stays beside the weight: a linear layer becomes two products, whose
    sum is in float32 until the layer's output is rounded. All other parameters (norms, embeddings, biases) are float32
    meanwhile, under autocast. No byte of the model changes.

    Memory: a float32 copy of those others; 2 bytes for every weight of a linear layer whose direction is not in 16
    bits; and 4 for every weight of the LM head.

    Args:
        model: a model whose matrices belong to linear layers and embeddings: see `cannot_displace`.
        direction: parameter name → tensor of its shape.
        radius: how far; a 0-d tensor stays on its device.
        dtype: the 16-bit dtype that the training computes in.
        fused: whether TRL's fused head will be asked for log-probabilities.

    Yields:
        The linear layers' products, by the weight's name.
    """
    owners, head = _owners(model), causal_model(model).get_output_embeddings()
    products: dict[str, Product] = {}
    with ExitStack() as undo:
        # the products first: a tied head must not see the embedding's float32 values
        for name, along in direction.items():
            for module in owners[name]:
                if not _is_product(module, name):
                    continue
                product: Product = (_HeadProduct if module is head else Product)(module, along, radius, dtype)
                if fused and isinstance(product, _HeadProduct):
                    undo.enter_context(_fused_head(model, product))
                undo.enter_context(patch.object(module, "forward", product))
                products[name] = product
        for name, along in direction.items():
            if not all(_is_product(module, name) for module in owners[name]):
                parameter = model.get_parameter(name)
                undo.callback(setattr, parameter, "data", parameter.data)
                moved = parameter.data.to(torch.float32, copy=True)
                move(moved, along, radius)
                parameter.data = moved
        torch.clear_autocast_cache()
        undo.callback(torch.clear_autocast_cache)
        with torch.autocast(next(model.parameters()).device.type, dtype=dtype):
            yield products


class Product:
    """A linear layer's forward pass with a step beside its weight. `called` says whether it took part.

    The step is the direction times a factor, and the factor is applied to the layer's input: a direction that is in 16
    bits already is used as it is, and any other is cast once.
    """

    def __init__(self, module: nn.Linear, along: Tensor, radius: float | Tensor, dtype: torch.dtype) -> None:
        self.module, self.dtype, self.called = module, dtype, False
        self.along, self.factor = _narrow(along, radius, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        self.called = True
        x = x.to(self.dtype)
        rows = x.reshape(-1, x.size(-1))
        with torch.autocast(x.device.type, enabled=False):
            y = _wide_product(rows, self.module.weight.data.to(self.dtype))
            y = _wide_product(rows * self.factor, self.along, y)
        if self.module.bias is not None:
            y += self.module.bias  # in float32, where a displaced bias keeps its step
        return y.to(self.dtype).view(*x.shape[:-1], -1)


class _HeadProduct(Product):
    """The LM head's, as one product [x x'] [W δ]ᵀ: its many outputs should not be copied in float32."""

    def __init__(self, module: nn.Linear, along: Tensor, radius: float | Tensor, dtype: torch.dtype) -> None:
        super().__init__(module, along, radius, dtype)
        self.weight = torch.cat([module.weight.data.to(dtype), self.along], dim=1)
        self.bias = module.bias

    def doubled(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return torch.cat([x, x * self.factor], dim=-1)

    def __call__(self, x: Tensor) -> Tensor:
        self.called = True
        y = F.linear(x if x.size(-1) == self.weight.size(1) else self.doubled(x), self.weight)
        return y if self.bias is None else (y.float() + self.bias.float()).to(self.dtype)


@contextmanager
def _fused_head(model: nn.Module, product: _HeadProduct) -> Iterator[None]:
    """Within the block TRL's fused head, which multiplies the decoder's output with the head's weight itself, a tile
    of logits at a time, does so with both parts of each.
    """

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = product.doubled(output.last_hidden_state)
        return output

    def head() -> _HeadProduct:
        product.called = True
        return product

    with (
        decoder(model).register_forward_hook(double),
        patch.object(causal_model(model), "get_output_embeddings", head),
    ):
        yield


def _narrow(along: Tensor, radius: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, float | Tensor]:
    """radius · along as a 16-bit tensor and a factor."""
    if along.dtype == dtype or dtype == torch.bfloat16:
        return along.to(dtype), radius
    largest = torch.linalg.vector_norm(along, torch.inf).clamp(min=torch.finfo(along.dtype).tiny)
    return torch.div(along, largest, out=torch.empty_like(along, dtype=dtype)), radius * largest


def _wide_product(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """x · weightᵀ (+ plus, in place), summed in float32 and left in it."""
    if not x.is_cuda:  # PyTorch has no such product elsewhere; float32 holds a product of 16-bit numbers exactly
        x, weight = x.float(), weight.float()
        return x @ weight.t() if plus is None else plus.addmm_(x, weight.t())
    if plus is None:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.addmm(plus, x, weight.t(), out_dtype=torch.float32, out=plus)


def cannot_displace(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why `displaced` cannot make a step of these parameters; None if it can."""
    owners = _owners(model)
    for name in names:
        parameter = model.get_parameter(name)
        for module in owners[name]:
            # kernels that replace the forward pass of other modules (norms, above all) read float32 weights too
            if isinstance(module, (nn.Linear, nn.Embedding)) and "forward" in module.__dict__:
                return f"the forward pass of {name}'s {type(module).__name__} is wrapped (several devices, offloading)"
            if parameter.ndim > 1 and not _is_product(module, name) and not isinstance(module, nn.Embedding):
                return f"{name} is a matrix of {type(module).__name__}, neither a linear layer nor an embedding"
    return None


def cast_by_autocast(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The parameters that autocast casts before they are used: those of modules that multiply with a matrix, whatever
    their class is (GPT-2's Conv1D, a mixture's experts). Embeddings look theirs up, and norms have none.
    """

    def multiplies(module: nn.Module) -> bool:
        own = (parameter for parameter in module._parameters.values() if parameter is not None)
        return not isinstance(module, nn.Embedding) and any(parameter.ndim > 1 for parameter in own)

    owners = _owners(model)
    return {name for name in names if any(map(multiplies, owners[name]))}


def fused_head_moves(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether TRL's fused head, which reads the LM head's parameters itself, sees the step that `displaced` makes."""
    head = causal_model(model).get_output_embeddings()
    own = {id(parameter): name for name, parameter in ({} if head is None else dict(head.named_parameters())).items()}
    moved = {own.get(id(model.get_parameter(name))) for name in names} - {None}
    return not moved or (moved == {"weight"} and type(head).forward is nn.Linear.forward)


def _owners(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Every parameter's modules, by the one name that `named_parameters` gives it."""
    modules: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                modules.setdefault(id(parameter), []).append(module)
    return {name: modules[id(parameter)] for name, parameter in model.named_parameters()}


def _is_product(module: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    return type(module).forward is nn.Linear.forward and name.endswith("weight")
