"""Sharpness-aware minimisation: the update's gradient is taken at a nearby policy with a higher loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from .configs import MarginOptions
from .direction import Direction, parameters_in_scope
from .gradients import add_gradients, own_gradients
from .perturbation import perturbed

if TYPE_CHECKING:
    from .mixin import MarginMixin

Batch = Mapping[str, Any]


class SharpnessAware:
    r"""SAM: the gradient at :math:`\theta + \rho\,\nabla L / \|\nabla L\|`, applied at θ.

    L is the loss over the whole accumulation window and all ranks, which is what one optimizer step descends.

    Args:
        trainer: gives the model and the loss.
        options: `sam_radius` is ρ, `anchor_scope` the parameters that move.

    Source: Foret et al. (arXiv 2010.01412), eqs. 2 and 3; GAPO's control (arXiv 2602.04909), appendix G.5.
    """

    def __init__(self, trainer: MarginMixin, options: MarginOptions) -> None:
        self.trainer, self.radius = trainer, options.sam_radius
        self.scope = options.anchor_scope
        parameters_in_scope(trainer.model, self.scope)  # a scope that is empty is said now
        self._direction: Direction | None = None

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return parameters_in_scope(self.trainer.model, self.scope)

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        """Finds the window's direction; the mini-batches stay as they are."""
        self._direction = None
        self.trainer.model.train()
        batches = [self.trainer.before_measuring(batch) for batch in batches]
        with own_gradients(self.parameters) as gradients:
            for batch in batches:
                loss = self.trainer.measured_loss(batch)
                add_gradients(self.trainer.accelerator, loss, self.parameters)
            summed = self.trainer.accelerator.reduce(gradients(), "sum")
        self._direction = Direction.along(summed)
        return batches

    @contextmanager
    def at_the_worse_policy(self) -> Iterator[None]:
        """Within the block the weights are those at which the gradient is taken."""
        if self._direction is None:
            yield
            return
        with perturbed(self.trainer.model, self._direction.vectors, self.radius * self._direction.per_unit):
            yield
