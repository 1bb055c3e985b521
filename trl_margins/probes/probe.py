"""What a probe is, and everything that it asks of a trainer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, Protocol

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments

from ..distributed import check_reachable, reshard
from ..forward.checkpointing import NAMES, checkpointing_kwargs
from ..objective import Objective
from ..pairs import PairLogps
from ..recording.pair_log import PairLog
from ..zero3 import check_settings, n_elements
from .scope import parameters_in_scope

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]  # a collated mini-batch


class Window(Sized, Iterable[Batch], Protocol):
    """The mini-batches of one optimizer step."""


class ProbeOptions(Protocol):
    """The config fields that probes read."""

    anchor_radius: float
    anchor_batch_multiplier: int
    anchor_direction: str
    anchor_estimator: str
    anchor_scope: list[str] | None
    anchor_keep_graphs: int
    anchor_diagnostics: int
    sam_radius: float


class ProbedTrainer(Protocol):
    """The trainer as a probe sees it: a model, its forward pass outside the update, and its loss."""

    args: TrainingArguments
    model: nn.Module
    model_wrapped: nn.Module
    optimizer: Optimizer | None  # None before training
    accelerator: Accelerator
    state: TrainerState
    objective: Objective
    train_dataset: Dataset
    is_deepspeed_enabled: bool

    @property
    def options(self) -> ProbeOptions: ...
    @property
    def fuses_head(self) -> bool: ...
    @property
    def has_aux_loss(self) -> bool: ...
    @property
    def graphs_can_wait(self) -> bool: ...
    @property
    def reduces_in_backward(self) -> bool: ...
    def before_measuring(self, batch: Batch) -> Batch: ...
    def forward_pairs(self, batch: Batch, model: nn.Module | None = None, fused: bool = True) -> PairLogps: ...
    def score_gap(self, pairs: PairLogps) -> Tensor: ...
    def measured_loss(self, batch: Batch) -> Tensor: ...
    def n_pairs(self, batch: Batch) -> int: ...
    def one_pair(self, batch: Batch, i: int) -> Batch: ...
    def store_metrics(self, metrics: Mapping[str, Tensor]) -> None: ...
    def get_train_dataloader(self) -> DataLoader: ...
    def is_world_process_zero(self) -> bool: ...


class Probe(ABC):
    """Sees the mini-batches of an accumulation window before they are trained on.

    A probe is called with the window's mini-batches and returns them, with its measurements among their columns.

    Args:
        trainer: its model must be on its device by the first call.
        options: `anchor_scope` selects the parameters; an empty scope is refused immediately.
    """

    columns: ClassVar[tuple[str, ...]] = ()  # what it measures
    log: PairLog | None = None  # what it adds about pairs, which the trainer writes

    def __init__(self, trainer: ProbedTrainer, options: ProbeOptions) -> None:
        self.trainer, self.options = trainer, options
        _without_reentry(trainer.args)
        check_settings(trainer.accelerator)
        parameters = parameters_in_scope(trainer.model, options.anchor_scope).values()
        self.n_parameters = sum(map(n_elements, parameters))

    @abstractmethod
    def __call__(self, batches: Window) -> Window:
        """The same mini-batches, with what was measured among their columns."""

    def around_update(self) -> AbstractContextManager[None]:
        """Entered around the forward and backward pass of each of these mini-batches."""
        return nullcontext()

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        # not before training has begun: FSDP replaces the parameters
        reshard(self.trainer.model)
        parameters = parameters_in_scope(self.trainer.model, self.options.anchor_scope)
        check_reachable(self.trainer.model, parameters)
        return parameters

    def prepared(self, batches: Window) -> list[Batch]:
        """The mini-batches on their device, and the model in training mode."""
        self.trainer.model.train()
        return [self.trainer.before_measuring(batch) for batch in batches]


def _without_reentry(config: TrainingArguments) -> None:
    """Reentrant checkpointing only knows whole backward passes, and a probe asks for single gradients.

    PyTorch's other kind gives the same numbers.
    """
    kwargs = checkpointing_kwargs(config)
    if kwargs.get("use_reentrant"):
        logger.warning("use_reentrant=True cannot give single gradients: using use_reentrant=False instead")
        for name in NAMES:
            setattr(config, f"{name}_kwargs", {**kwargs, "use_reentrant": False})
