"""Where the anchor lies: the gradient of the mean score gap, or an estimate of it that the optimizer already has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .scope import matching
from .sharding import local, whole

LM_HEAD = "lm-head"
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


class FadingGradient:
    """A gradient over k mini-batches, whatever the length of an accumulation window.

    A window of n ≥ k mini-batches gives the gradient of its first k, and nothing is remembered. Shorter windows go on
    over each other: G ← (1 − n/k)·G + Σ of the window's gradients, so that the weights of all mini-batches so far add
    up to k. That takes one copy of the parameters, and is part of the checkpoint.
    """

    def __init__(self, mini_batches: int) -> None:
        self.mini_batches = mini_batches
        self._total: dict[str, Tensor] = {}
        self._pairs: Tensor | None = None

    def add(self, gradients: dict[str, Tensor], n_pairs: Tensor, n_mini_batches: int) -> tuple[Direction, Tensor]:
        """The direction after a window, and the number of pairs behind it.

        A gradient that is not finite (fp16 overflows) is left out: the direction is then that of the last windows.

        Args:
            gradients: Σ_i ∇Δ_i over the window's pairs of all ranks; handed over.
            n_pairs: [] their number.
            n_mini_batches: n, at most k.
        """
        if n_mini_batches >= self.mini_batches:
            return Direction.along(gradients), n_pairs
        usable = torch.isfinite(total_norm(gradients.values()))
        fade = 1 - n_mini_batches / self.mini_batches
        if not self._total:
            self._total = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
            self._pairs = torch.zeros_like(n_pairs)
        for name, total in self._total.items():
            total.copy_(torch.where(usable, fade * total + gradients[name], total))
        self._pairs = torch.where(usable, fade * self._pairs + n_pairs, self._pairs)
        return Direction.along(self._total), self._pairs

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._pairs is None else {**self._total, _PAIRS: self._pairs}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._total = {name: tensor for name, tensor in state.items() if name != _PAIRS}
        self._pairs = state.get(_PAIRS)


_PAIRS = "n_pairs"


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


def parameters_in_scope(model: nn.Module, scope: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The trained parameters that the anchor moves, by name.

    Args:
        model: the model, without wrappers.
        scope: "lm-head" and regular expressions searched in the parameters' names; None for all.

    Raises:
        ValueError: nothing in it trains.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if scope is None:
        return trained
    patterns = [pattern for pattern in scope if pattern != LM_HEAD]
    chosen = matching([name for name, _ in model.named_parameters()], patterns, "anchor_scope")
    if LM_HEAD in scope and (head := model.get_output_embeddings()) is not None:
        # by identity: a tied head goes by its embedding's name
        of_head = {id(parameter) for parameter in head.parameters()}
        chosen |= {name for name, parameter in trained.items() if id(parameter) in of_head}
    if not chosen & trained.keys():
        names = f"{', '.join(trained):.300}"
        raise ValueError(f"anchor_scope={list(scope)} holds none of the {len(trained)} tensors that train: {names}")
    return {name: parameter for name, parameter in trained.items() if name in chosen}
