"""What every look at a window has in common: a trainer, and the parameters that are looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from .configs import MarginOptions
from .direction import parameters_in_scope

if TYPE_CHECKING:
    from .mixin import MarginMixin

Batch = Mapping[str, Any]


class Probe:
    """Looks at a window's mini-batches before they are trained on.

    Args:
        trainer: gives the model, its forward pass and the score; `trainer.model` must be on its device by then.
        options: `anchor_scope` says which parameters count; one that is empty is refused at once.
    """

    def __init__(self, trainer: MarginMixin, options: MarginOptions) -> None:
        self.trainer, self.options = trainer, options
        self.n_parameters = sum(p.numel() for p in parameters_in_scope(trainer.model, options.anchor_scope).values())

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        # looked up again when training has begun: FSDP puts others in their place
        return parameters_in_scope(self.trainer.model, self.options.anchor_scope)

    def prepared(self, batches: Sequence[Batch]) -> list[Batch]:
        """The mini-batches on their device, and the model in training mode."""
        self.trainer.model.train()
        return [self.trainer.before_measuring(batch) for batch in batches]
