"""Sharpness-aware minimisation: the update's gradient is taken at a nearby policy with a higher loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .direction import Direction, gradient_direction, own_gradients
from .perturbation import perturbed
from .probe import Probe, ProbedTrainer, ProbeOptions, Window


class SharpnessAware(Probe):
    r"""SAM: the gradient at :math:`\theta + \rho\,\nabla L / \|\nabla L\|`, applied at θ.

    L is the loss over the whole accumulation window and all ranks: the loss that one optimizer step descends.

    The option `sam_radius` is ρ, and `anchor_scope` selects the parameters that move.

    Source: Foret et al. (arXiv 2010.01412), eqs. 2 and 3; GAPO's control (arXiv 2602.04909), appendix G.5.
    """

    def __init__(self, trainer: ProbedTrainer, options: ProbeOptions) -> None:
        super().__init__(trainer, options)
        if trainer.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed takes its step within the backward pass, which SAM makes elsewhere: use DDP or FSDP2"
            )
        self._direction: Direction | None = None

    def __call__(self, batches: Window) -> Window:
        """Finds the direction; the mini-batches stay as they are."""
        self._direction = None
        batches = self.prepared(batches)
        accelerator = self.trainer.accelerator
        with own_gradients(accelerator, self.trainer.model, self.parameters) as gradients:
            for batch in batches:
                gradients.add(self.trainer.measured_loss(batch))
            self._direction = gradient_direction(accelerator, gradients.take())
        return batches

    @contextmanager
    def around_update(self) -> Iterator[None]:
        """Within the block the weights are those at which the gradient is taken."""
        if self._direction is None:
            yield
            return
        step = self.options.sam_radius * self._direction.per_unit
        with perturbed(self.trainer.model, self._direction.vectors, step):
            yield
