"""Each pair's own gradient: its norm, or, where few parameters train, the gradient itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import gathered_parameters, is_sharded, most_pairs
from ..forward.precision import narrow_dtype
from ..pairs import PairLogps, upcast, with_columns
from ..terms.anchor import RELATIVE_NORM
from .direction import own_gradients, total_norm
from .probe import Batch, Probe, ProbedTrainer, Window

# In fp16 the backward pass begins with gaps this many times as large. An update's loss is scaled by more, and can be:
# one pair's gradient is much larger than its part of that loss.
_FP16_SCALE = 2.0**8


@dataclass(frozen=True)
class PairGradient:
    """One pair's forward pass, detached, its score gap Δ, and ∇Δ (for fp16 parameters in float32)."""

    batch: Batch  # of this pair alone
    pairs: PairLogps
    gap: Tensor  # [1]
    gradient: Mapping[str, Tensor]  # parameter name → tensor of its shape, sharded as the parameter is
    own: bool = True  # whether the gradient is this pair's, or another rank's pair's


def pair_gradients(
    trainer: ProbedTrainer, batch: Batch, parameters: Mapping[str, nn.Parameter]
) -> Iterator[PairGradient]:
    """The pairs of a batch one after the other: a small forward and backward pass for each.

    Where FSDP2 shards the parameters, a gradient is in parts on all ranks. So they take turns, and every rank gets the
    gradients of all ranks' pairs, with one of its own pairs beside each: that gradient's, where it is `own`. All ranks
    take part in each pass, and must in whatever they do with a gradient.
    """
    scale = _fp16_scale(trainer)
    if any(map(is_sharded, parameters.values())):
        yield from _in_turns(trainer, batch, parameters, scale)
        return
    for i in range(trainer.n_pairs(batch)):
        pair = trainer.one_pair(batch, i)
        pairs = trainer.forward_pairs(pair)
        gap = trainer.score_gap(pairs)
        value = gap.sum() * scale
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
        gradient = {name: _unscaled(each, scale) for name, each in zip(parameters, found, strict=True)}
        yield PairGradient(pair, _detached(pairs), gap.detach(), gradient)


def _in_turns(
    trainer: ProbedTrainer, batch: Batch, parameters: Mapping[str, nn.Parameter], scale: float
) -> Iterator[PairGradient]:
    accelerator, n = trainer.accelerator, trainer.n_pairs(batch)
    for i in range(most_pairs(accelerator, n)):
        pair = trainer.one_pair(batch, min(i, n - 1))
        for rank in range(accelerator.num_processes):
            own = rank == accelerator.process_index and i < n
            with own_gradients(accelerator, trainer.model, parameters) as gradients:
                pairs = trainer.forward_pairs(pair)
                gap = trainer.score_gap(pairs)
                gradients.add(gap.sum() * (scale * own))
                gradient = {name: _unscaled(each, scale) for name, each in gradients.take().items()}
            yield PairGradient(pair, _detached(pairs), gap.detach(), gradient, own)


def _fp16_scale(trainer: ProbedTrainer) -> float:
    fp16 = narrow_dtype(trainer.model, trainer.accelerator.mixed_precision) == torch.float16
    return _FP16_SCALE if fp16 else 1.0


def _unscaled(gradient: Tensor, scale: float) -> Tensor:
    return gradient if scale == 1 else upcast(gradient) / scale


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
        """[B] ‖∇Δ_i‖."""
        if any(map(is_sharded, self.parameters.values())):
            return self._norms_of_gathered(batch)
        pairs = pair_gradients(self.trainer, batch, self.parameters)
        return torch.stack([total_norm(pair.gradient.values()) for pair in pairs])

    def _norms_of_gathered(self, batch: Batch) -> Tensor:
        """Where FSDP2 shards the parameters, each rank measures its own pair's gradient before FSDP2 averages it. All
        ranks take part in each pass; a rank with fewer pairs repeats its last.
        """
        trainer, scale, n = self.trainer, _fp16_scale(self.trainer), self.trainer.n_pairs(batch)
        norms, of_pair = [], dict[str, Tensor]()

        def note(name: str, gradient: Tensor) -> None:
            of_pair[name] = total_norm([gradient])

        with ExitStack() as undo:
            gradients = undo.enter_context(own_gradients(trainer.accelerator, trainer.model, self.parameters))
            for name, tensor in gathered_parameters(trainer.model, self.parameters).items():
                undo.callback(tensor.register_hook(partial(note, name)).remove)
            for i in range(most_pairs(trainer.accelerator, n)):
                of_pair.clear()
                gap = trainer.score_gap(trainer.forward_pairs(trainer.one_pair(batch, min(i, n - 1))))
                gradients.add(gap.sum() * scale)
                if not of_pair:
                    raise RuntimeError("no gradient of a pair arrived where FSDP2 gathers the parameters")
                norms.append(total_norm(of_pair[name] for name in sorted(of_pair)) / scale)
        return torch.stack(norms[:n])


@dataclass(frozen=True)
class CachedGradients:
    """A mini-batch's pairs with their gradients: everything that direction, anchor gap and update need."""

    pairs: PairLogps  # of B pairs, detached
    gap: Tensor  # [B] Δ
    gradients: Mapping[str, Tensor]  # parameter name → [B, its shape]

    @classmethod
    def of(cls, trainer: ProbedTrainer, batch: Batch, parameters: Mapping[str, nn.Parameter]) -> CachedGradients:
        """The gradients of a prepared mini-batch: B times the memory of the parameters."""
        each = list(pair_gradients(trainer, batch, parameters))
        gradients = {name: torch.stack([pair.gradient[name] for pair in each]) for name in parameters}
        return cls(_joined([pair.pairs for pair in each]), torch.cat([pair.gap for pair in each]), gradients)

    def summed(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Σ_i ∇Δ_i of these parameters."""
        return {name: self.gradients[name].sum(0) for name in names}

    def norms(self, names: Iterable[str]) -> Tensor:
        """[B] ‖∇Δ_i‖ over these parameters."""
        of_each = [torch.linalg.vector_norm(upcast(self.gradients[name].flatten(1)), dim=1) for name in names]
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
