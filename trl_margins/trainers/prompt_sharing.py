"""Which forward pass a trainer uses: decided by the model, checked on the first batch, and timed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from ..checks import unknown
from ..forward.checked import Ways, checked_ways
from ..forward.precision import eval_mode, narrow_dtype
from ..forward.shared_prompt import why_not_shared
from ..forward.standard import pair_logps
from ..pairs import SHARED
from .base import MarginTrainer
from .collator import PairCollator

logger = logging.getLogger(__name__)

MODES = ("auto", "always", "never")
_TIMED_BATCHES = 3  # mostly of different shapes
_TIMED_PASSES = 2  # per batch and way, after a first one that builds what the shape needs


class PromptSharing:
    """Decides once between the shared-prompt forward pass and the standard one, and logs why. Both, and their LM head,
    are first compared with the model's own logits.

    Args:
        trainer: its model is checked now, its first batches later.
        mode: "never"; "always", wherever the model allows it; or "auto", which takes the shared forward pass where it
            matches the model's own logits and, on an accelerator, is the faster one.

    Raises:
        ValueError: an unknown mode, or "always" for a model that does not allow it.
    """

    def __init__(self, trainer: MarginTrainer, mode: str) -> None:
        if mode not in MODES:
            raise unknown("share_prompt", mode, MODES)
        self.decided: bool | None = {"never": False, "always": True, "auto": None}[mode]
        self._checked = False
        self._seconds = {True: 0.0, False: 0.0}  # so far, by way
        self._to_time = _TIMED_BATCHES if mode == "auto" and _is_timed(trainer) else 0
        reason = None if mode == "never" else why_not_shared(trainer.model) or _why_not_here(trainer)
        if reason is None:
            return
        if mode == "always":
            raise ValueError(f"share_prompt='always' does not go with {reason}")
        self.decided = False
        logger.info("prompts are computed once per completion: %s", reason)

    @property
    def possible(self) -> bool:
        """Whether batches need the shared layout."""
        return self.decided is not False

    def __call__(self, trainer: MarginTrainer, batch: Mapping[str, Any]) -> bool:
        """Whether this batch shares prompts."""
        self.check(trainer, batch)
        return SHARED in batch and self.decided is True

    def check(self, trainer: MarginTrainer, batch: Mapping[str, Any]) -> None:
        """Compares the first prepared batch with the model's own logits, once; all ranks decide alike."""
        ways = Ways(fused=trainer._fused, shared=self.decided is None)
        if self._checked or not (ways.fused or ways.shared):
            return
        self._checked = True

        def max_over_ranks(values: Tensor) -> Tensor:
            return trainer.accelerator.gather(values[None]).amax(0)

        rows = trainer.standard_rows()(batch)
        no_layout = rows is None or (self.possible and SHARED not in batch)
        # on one rank, a batch may hold an image where another's does not
        kinds = torch.tensor([no_layout, not trainer.is_plain_text(batch)], device=trainer.accelerator.device)
        no_layout, more_than_text = max_over_ranks(kinds.long()).tolist()
        if rows is None or no_layout or more_than_text:
            logger.info(
                "log-probabilities are not compared with the model's own logits: batches %s",
                "come from a custom collator" if no_layout else "hold more than text",
            )
            if self.decided is None:
                self._decide(trainer, shares=False)
            return
        dtype = narrow_dtype(trainer.model, trainer.accelerator.mixed_precision)
        with eval_mode(trainer.model):
            right = checked_ways(
                trainer.model,
                *rows,
                ways,
                dtype=dtype,
                max_over_ranks=max_over_ranks,
                more=trainer.inputs_beside_tokens,
            )
        trainer._fused = right.fused
        if self.decided is None:
            self._decide(trainer, right.shared)
            if right.shared and not self._to_time:
                logger.info("prompts are computed once for both completions")

    def time(self, trainer: MarginTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Times both ways on the first training batches, forward and backward, and takes the faster.

        Neither gradients nor the random state change.

        Args:
            trainer: its model is trained next.
            batches: of an accumulation window, as the data loader gave them.
        """
        for batch in batches:
            if not self._to_time or self.decided is not True or SHARED not in batch:
                return
            batch = trainer._prepare_inputs(batch)
            for way in self._seconds:
                self._seconds[way] += _seconds(trainer, batch, way)
            self._to_time -= 1
            if not self._to_time:
                self._take_the_faster(trainer)

    def state_dict(self, trainer: MarginTrainer) -> dict[str, Any]:
        """What was compared and timed: a resumed run must decide as before."""
        found: dict[str, Any] = {}
        if self._checked:
            found |= {"fused": trainer._fused, "dtype": _dtype_of(trainer), "shares": self.decided}
        if any(self._seconds.values()):
            found |= {"seconds": [*self._seconds.values()], "to_time": self._to_time, "shares": self.decided}
        return found

    def load_state_dict(self, trainer: MarginTrainer, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint."""
        shares = state["shares"]
        if state.get("dtype") == _dtype_of(trainer) and (self.decided is None or shares == self.decided):
            self._checked, trainer._fused = True, trainer._fused and state["fused"]
            if self.decided is None:
                self._decide(trainer, shares)
        if not self._to_time or not self.possible or "seconds" not in state:
            return
        self._seconds, self._to_time = dict(zip((True, False), state["seconds"], strict=True)), state["to_time"]
        if shares is False:
            self._decide(trainer, shares=False)

    def _take_the_faster(self, trainer: MarginTrainer) -> None:
        device = trainer.accelerator.device
        totals = torch.tensor([list(self._seconds.values())], device=device, dtype=torch.float32)
        shared, standard = trainer.accelerator.gather(totals).amax(0).tolist()  # the slowest rank is waited for
        self._decide(trainer, shared <= standard)
        logger.info(
            "prompts are computed once %s: forward and backward of the first %d batches take %.3f s with a shared "
            "prompt, %.3f s without",
            "for both completions" if self.decided else "per completion",
            _TIMED_BATCHES,
            shared,
            standard,
        )

    def _decide(self, trainer: MarginTrainer, shares: bool) -> None:
        self.decided = shares
        if not shares and isinstance(trainer.data_collator, PairCollator):
            trainer.data_collator.standard_rows = None  # the layout is not needed


def _dtype_of(trainer: MarginTrainer) -> str:
    return f"{trainer.model.dtype} {narrow_dtype(trainer.model, trainer.accelerator.mixed_precision)}"


def _is_timed(trainer: MarginTrainer) -> bool:
    """Whether both ways are timed: on a CPU, fewer computed tokens are faster."""
    if not _on_accelerator(trainer) or trainer.args.n_gpu > 1 or trainer.is_deepspeed_enabled:
        return False
    sharded = (FSDPModule, FullyShardedDataParallel)
    if trainer.is_fsdp_enabled or any(isinstance(module, sharded) for module in trainer.model.modules()):
        return False  # their backward passes cannot be tried out
    return not trainer.checkpoints_reentrantly  # nor can these


def _on_accelerator(trainer: MarginTrainer) -> bool:
    return trainer.accelerator.device.type != "cpu"


def _seconds(trainer: MarginTrainer, batch: Mapping[str, Any], shared: bool) -> float:
    """Time of one batch, forward and backward; infinite where it runs out of memory."""
    model, device = trainer.model, trainer.accelerator.device
    modes = [(module, module.training) for module in model.modules()]
    devices = [] if device.type == "cpu" else [device]
    least = math.inf
    try:
        model.train()
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            for attempt in range(1 + _TIMED_PASSES):
                started = _clock(device)
                _forward_and_backward(trainer, batch, shared)
                if attempt:
                    least = min(least, _clock(device) - started)
    except torch.OutOfMemoryError:
        logger.info("the %s forward pass does not fit into memory", "shared-prompt" if shared else "standard")
        least = math.inf
    finally:
        for module, mode in modes:
            module.training = mode
    if least == math.inf:
        clear_device_cache(garbage_collection=True)
    return least


def _forward_and_backward(trainer: MarginTrainer, batch: Mapping[str, Any], shared: bool) -> None:
    with torch.enable_grad(), trainer._adapter_autocast():
        pairs = pair_logps(trainer.token_logps(trainer.model, batch, shared))
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        # not `backward`, which would leave gradients, and have DDP send them
        torch.autograd.grad((pairs.rejected - pairs.chosen).sum(), parameters, allow_unused=True)


def _clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _why_not_here(trainer: MarginTrainer) -> str | None:
    if trainer.args.n_gpu > 1:
        return "nn.DataParallel, which splits every tensor of a batch along its first dimension"
    if trainer.args.neftune_noise_alpha:
        return "NEFTune, whose noise depends on what else is in a row"
    if trainer.accelerator.num_processes > 1 and trainer.args.accelerator_config.split_batches:
        return "batches that accelerate splits over the ranks (split_batches)"
    return None
