"""Each pair's own gradient: its norm, or, where few parameters train, the gradient itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import check_unsharded
from ..forward.precision import narrow_dtype
from ..pairs import PairLogps, upcast, with_columns
from ..terms.anchor import RELATIVE_NORM
from .direction import total_norm
from .probe import Batch, Probe, ProbedTrainer, Window

# In fp16 the backward pass begins with gaps this many times as large. An update's loss is scaled by more, and can be:
# one pair's gradient is much larger than its part of that loss.
_FP16_SCALE = 2.0**8


@dataclass(frozen=True)
class PairGradient:
    """One pair's forward pass, detached, its score gap Δ, and ∇Δ (for fp16 parameters in float32)."""

    pairs: PairLogps  # of one pair
    gap: Tensor  # [1]
    gradient: Mapping[str, Tensor]  # parameter name → tensor of its shape


def pair_gradients(
    trainer: ProbedTrainer, batch: Batch, parameters: Mapping[str, nn.Parameter], what: str
) -> Iterator[PairGradient]:
    """The pairs of a batch one after the other: a small forward and backward pass for each.

    Raises:
        ValueError: sharded parameters; `what` names the use of the gradients.
    """
    check_unsharded(parameters, what)
    fp16 = narrow_dtype(trainer.model, trainer.accelerator.mixed_precision) == torch.float16
    for i in range(trainer.n_pairs(batch)):
        pairs = trainer.forward_pairs(trainer.one_pair(batch, i))
        gap = trainer.score_gap(pairs)
        value = gap.sum() * _FP16_SCALE if fp16 else gap.sum()
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
        if fp16:
            found = tuple(upcast(each) / _FP16_SCALE for each in found)
        yield PairGradient(_detached(pairs), gap.detach(), dict(zip(parameters, found, strict=True)))


def _detached(pairs: PairLogps) -> PairLogps:
    tensors: dict[str, Any] = {
        name: value.detach() for name, value in vars(pairs).items() if isinstance(value, Tensor)
    }
    return replace(pairs, **tensors)


class GradientNorms(Probe):
    """Measures ‖∇Δ_i‖ of every pair of an accumulation window, divided by the mean norm over all ranks."""

    columns = (RELATIVE_NORM,)

    def __call__(self, batches: Window) -> Window:
        """The same mini-batches, each with `relative_gradient_norm` among its columns."""
        batches = self.prepared(batches)
        norms = [self._norms(batch) for batch in batches]
        window = torch.cat(norms)
        total, number = self.trainer.accelerator.reduce((window.sum(), torch.ones_like(window).sum()), "sum")
        factor = torch.where(total > 0, number / total, 0.0)
        return [
            with_columns(batch, {RELATIVE_NORM: factor * norm}) for batch, norm in zip(batches, norms, strict=True)
        ]

    def _norms(self, batch: Batch) -> Tensor:
        pairs = pair_gradients(self.trainer, batch, self.parameters, "the gradient-norm control")
        return torch.stack([total_norm(pair.gradient.values()) for pair in pairs])


@dataclass(frozen=True)
class CachedGradients:
    """A mini-batch's pairs with their gradients: everything that direction, anchor gap and update need."""

    pairs: PairLogps  # of B pairs, detached
    gap: Tensor  # [B] Δ
    gradients: Mapping[str, Tensor]  # parameter name → [B, its shape]

    @classmethod
    def of(cls, trainer: ProbedTrainer, batch: Batch, parameters: Mapping[str, nn.Parameter]) -> CachedGradients:
        """The gradients of a prepared mini-batch: B times the memory of the parameters."""
        each = list(pair_gradients(trainer, batch, parameters, "anchor_estimator='per-pair'"))
        gradients = {name: torch.stack([pair.gradient[name] for pair in each]) for name in parameters}
        return cls(_joined([pair.pairs for pair in each]), torch.cat([pair.gap for pair in each]), gradients)

    def summed(self) -> dict[str, Tensor]:
        """Σ_i ∇Δ_i."""
        return {name: gradient.sum(0) for name, gradient in self.gradients.items()}

    def norms(self) -> Tensor:
        """[B] ‖∇Δ_i‖."""
        of_each = [torch.linalg.vector_norm(upcast(each.flatten(1)), dim=1) for each in self.gradients.values()]
        return torch.linalg.vector_norm(torch.stack(of_each), dim=0)

    def along(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """[B] ∇Δ_i · vectors."""
        products = [self.gradients[name].flatten(1) @ along.flatten() for name, along in vectors.items()]
        return torch.stack([upcast(product) for product in products]).sum(0)

    def for_the_update(
        self, parameters: Mapping[str, nn.Parameter], reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> PairLogps:
        """The forward pass that an update asks for: its backward pass adds the cached gradients, weighted.

        Only the gap has a gradient: a loss that is a function of the gap alone gives the same update.
        """
        gap = _FromCached.apply(self.gap, reduce, self.gradients, *parameters.values())
        length = self.pairs.chosen_length.clamp(min=1)
        return replace(self.pairs, chosen=self.pairs.chosen + length * (gap - self.gap))


class _FromCached(torch.autograd.Function):
    """[B] gaps whose gradient for each parameter is Σ_i dL/dΔ_i · ∇Δ_i."""

    @staticmethod
    def forward(ctx: Any, gap: Tensor, reduce: Any, gradients: Mapping[str, Tensor], *parameters: Tensor) -> Tensor:
        ctx.reduce, ctx.gradients = reduce, gradients
        return gap.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        summed = {name: torch.tensordot(upstream.to(each.dtype), each, dims=1) for name, each in ctx.gradients.items()}
        return (None, None, None, *ctx.reduce(summed).values())


def _joined(pairs: Sequence[PairLogps]) -> PairLogps:
    """Single pairs as one batch; losses and token statistics are the mean over the pairs."""

    def join(values: list[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        return torch.cat(values) if values[0].ndim else torch.stack(values).mean()

    fields = {name: join([getattr(pair, name) for pair in pairs]) for name in vars(pairs[0]) if name != "token_stats"}
    stats = {name: join([pair.token_stats[name] for pair in pairs]) for name in pairs[0].token_stats}
    return PairLogps(**fields, token_stats=stats)
