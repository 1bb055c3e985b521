"""One accumulation window: what a method measures on the model before the optimizer's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..distributed import fsdp_modules
from ..forward.checkpointing import checkpointing_kwargs
from ..forward.shared_rows import packed, shared_rows, width_step
from ..objective import averaged_values
from ..pairs import CACHED, CARRIED, SHARED, PairLogps, one_pair, with_columns
from .base import MarginTrainer
from .collator import StandardRows
from .finite import FiniteSteps
from .model_checks import naming_dtypes

_DDP = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_NPU, DistributedType.MULTI_XPU)


class WindowMixin(MarginTrainer, ABC):
    """Shows a window's mini-batches to the probes, and gives the probes what they look with."""

    _probes: list[Any]
    _finite: FiniteSteps

    @abstractmethod
    def pair_logps(self, model: nn.Module, batch: Mapping[str, Any], fused: bool = True) -> PairLogps:
        """Model and batch to log-probabilities: the only look at the model that a step takes."""

    @abstractmethod
    def n_pairs(self, batch: Mapping[str, Any]) -> int:
        """The number of pairs of a collated batch."""

    @abstractmethod
    def standard_rows(self) -> Callable[[Mapping[str, Any]], StandardRows | None]:
        """From a collated batch to its 2B rows, chosen first: what the shared layout is made of."""

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The window's mini-batches, with what the probes measured on them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._sharing.check(self, batches[0])
            self._sharing.time(self, batches)
        self._finite.begin()
        # transformers loads a checkpoint's only after this, and the probes draw from it
        self._load_rng_state(self._loaded_from)
        if batches:
            batches = self._with_batch_means(batches)
            for probe in self._probes:
                batches = probe(batches)
        return batches, num_items

    def _with_batch_means(self, batches: list) -> list:
        """The mini-batches, with the means over all of them and over all ranks that the terms need."""
        for term in self.objective.terms:
            values = [averaged_values(term, batch.get(CARRIED, {})) for batch in batches]
            known = [value for value in values if value is not None]
            if not known:
                continue
            if len(known) < len(values):
                raise ValueError(f"averaged of term {term.name!r} returned None for some mini-batches, not for all")
            window = torch.cat(known).to(self.accelerator.device)
            total, number = self.accelerator.reduce(torch.stack([window.sum(), torch.ones_like(window).sum()]), "sum")
            mean = total / number
            batches = [
                with_columns(batch, {term.mean_column: mean.expand(len(value))})
                for batch, value in zip(batches, known, strict=True)
            ]
        return batches

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        self.last_grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.last_grad_norm

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, within what the probes do around it: SAM moves to the nearby policy with the higher loss."""
        with naming_dtypes(self.model), ExitStack() as around:
            for probe in self._probes:
                around.enter_context(probe.around_update())
            return super().training_step(model, inputs, *args, **kwargs)

    def before_measuring(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A mini-batch on its device, with whatever does not change with the policy."""
        return dict(self._prepare_inputs(batch))

    def forward_pairs(self, batch: Mapping[str, Any], model: nn.Module | None = None, fused: bool = True) -> PairLogps:
        """The forward pass of an update, outside of it.

        Args:
            batch: a prepared mini-batch.
            model: the model's wrapper; without one, the model itself.
            fused: whether TRL's fused LM head may be used, where the trainer uses it.
        """
        anew = {key: value for key, value in batch.items() if key != CACHED}
        with self._adapter_autocast():
            return self.pair_logps(self.model if model is None else model, anew, fused)

    @property
    def fuses_head(self) -> bool:
        """Whether TRL's fused head computes log-probabilities."""
        return self._fused

    def one_pair(self, batch: Mapping[str, Any], i: int) -> dict[str, Any]:
        """Pair i of a prepared mini-batch, as a mini-batch."""
        whole = {key: value for key, value in batch.items() if key not in (SHARED, CACHED)}
        pair: dict[str, Any] = one_pair(whole, i, self.n_pairs(batch))
        rows = self.standard_rows()(pair) if SHARED in batch else None
        if rows is None:
            return pair
        device = self.accelerator.device
        ids, mask, labels = (values.cpu() for values in rows)
        shared = shared_rows(ids, mask, labels, step=width_step(device))
        return {**pair, SHARED: send_to_device(dict(packed(shared)), device)}

    def score_gap(self, pairs: PairLogps) -> Tensor:
        """[B] the reward's gap without β: Δ where the reward is length-normalized."""
        chosen, rejected = self.objective.reward(pairs)
        return chosen - rejected

    def measured_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch, of which no term learns and nothing is logged."""
        with self._adapter_autocast():
            return self._loss(self.pair_logps(self.model, batch), batch, training=False)[0]

    @property
    def has_aux_loss(self) -> bool:
        """Whether the model's auxiliary loss (mixture of experts) is added to that of the pairs."""
        return bool(self.aux_loss_enabled)

    @property
    def graphs_can_wait(self) -> bool:
        """Whether a mini-batch's graph survives a look at its gradient, for the update to use."""
        # FSDP2 lets go of its parameters after the first way back, and a compiled graph of its buffers
        sharded = bool(fsdp_modules(self.model))
        if self.args.n_gpu > 1 or self.checkpoints_reentrantly or sharded or self.args.torch_compile:
            return False
        return self.accelerator.distributed_type == DistributedType.NO or self.reduces_in_backward

    @property
    def reduces_in_backward(self) -> bool:
        """Whether gradients are reduced by DDP: in the backward pass that follows its wrapper's forward pass."""
        return self.accelerator.distributed_type in _DDP

    @property
    def checkpoints_reentrantly(self) -> bool:
        """Whether activations are checkpointed in the way that knows one kind of backward pass alone."""
        return bool(checkpointing_kwargs(self.args).get("use_reentrant"))

    def _adapter_autocast(self) -> AbstractContextManager:
        cast = getattr(self, "_peft_has_been_casted_to_bf16", False)
        return torch.autocast(self.accelerator.device.type) if cast else nullcontext()
