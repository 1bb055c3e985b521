"""What every look at a window has in common: a trainer, and the parameters that are looked at."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from .configs import MarginOptions
from .direction import parameters_in_scope
from .sharding import check_movable, forget_gathered

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .mixin import MarginMixin

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


class Probe:
    """Looks at a window's mini-batches before they are trained on.

    Args:
        trainer: gives the model, its forward pass and the score; `trainer.model` must be on its device by then.
        options: `anchor_scope` says which parameters count; one that is empty is refused at once.
    """

    def __init__(self, trainer: MarginMixin, options: MarginOptions) -> None:
        self.trainer, self.options = trainer, options
        _without_reentry(trainer.args)
        self.n_parameters = sum(p.numel() for p in parameters_in_scope(trainer.model, options.anchor_scope).values())

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        # looked up again when training has begun: FSDP puts others in their place
        forget_gathered(self.trainer.model)
        parameters = parameters_in_scope(self.trainer.model, self.options.anchor_scope)
        check_movable(self.trainer.model, parameters)
        return parameters

    def prepared(self, batches: Sequence[Batch]) -> list[Batch]:
        """The mini-batches on their device, and the model in training mode."""
        self.trainer.model.train()
        return [self.trainer.before_measuring(batch) for batch in batches]


def _without_reentry(config: TrainingArguments) -> None:
    """Reentrant checkpointing knows whole backward passes alone, and a probe asks for single gradients.

    PyTorch's other kind gives the same numbers.
    """
    kwargs = config.gradient_checkpointing_kwargs
    if config.gradient_checkpointing and kwargs and kwargs.get("use_reentrant"):
        logger.warning(
            "use_reentrant=True cannot give single gradients: checkpointing goes on with use_reentrant=False"
        )
        kwargs = {**kwargs, "use_reentrant": False}
        config.gradient_checkpointing_kwargs = config.activation_checkpointing_kwargs = kwargs
