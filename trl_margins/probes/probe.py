"""What a probe is, and all that it asks of a trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments

from ..distributed import check_movable, forget_gathered
from ..objective import Objective
from ..pairs import PairLogps
from .scope import parameters_in_scope

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


class ProbeOptions(Protocol):
    """The config fields that probes read."""

    anchor_radius: float
    anchor_batch_multiplier: int
    anchor_direction: str
    anchor_estimator: str
    anchor_scope: list[str] | None
    anchor_keep_graphs: int
    sam_radius: float


class ProbedTrainer(Protocol):
    """The trainer as a probe sees it: a model, its forward pass outside of an update, and its loss."""

    args: TrainingArguments
    model: nn.Module
    model_wrapped: nn.Module
    optimizer: Any
    accelerator: Accelerator
    state: TrainerState
    callback_handler: Any
    objective: Objective
    options: ProbeOptions
    train_dataset: Any
    is_deepspeed_enabled: bool
    fuses_head: bool
    has_aux_loss: bool

    def before_measuring(self, batch: Batch) -> Batch: ...
    def forward_pairs(self, batch: Batch, model: nn.Module | None = None, fused: bool = True) -> PairLogps: ...
    def score_gap(self, pairs: PairLogps) -> Tensor: ...
    def measured_loss(self, batch: Batch) -> Tensor: ...
    def n_pairs(self, batch: Batch) -> int: ...
    def one_pair(self, batch: Batch, i: int) -> Batch: ...
    def graphs_can_wait(self, n_mini_batches: int) -> bool: ...
    def store_metrics(self, metrics: Mapping[str, Tensor]) -> None: ...
    def get_train_dataloader(self) -> DataLoader: ...
    def is_world_process_zero(self) -> bool: ...


class Probe:
    """Looks at the mini-batches of an accumulation window before they are trained on.

    A probe is called with the window's mini-batches and returns them, with what it measured among their columns.

    Args:
        trainer: its model must be on its device by the first call.
        options: `anchor_scope` says which parameters count; an empty scope is refused at once.
    """

    columns: ClassVar[tuple[str, ...]] = ()  # what it measures

    def __init__(self, trainer: ProbedTrainer, options: ProbeOptions) -> None:
        self.trainer, self.options = trainer, options
        _without_reentry(trainer.args)
        self.n_parameters = sum(p.numel() for p in parameters_in_scope(trainer.model, options.anchor_scope).values())

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        raise NotImplementedError

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
