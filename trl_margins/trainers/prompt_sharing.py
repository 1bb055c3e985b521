"""How a trainer's passes come to log-probabilities: asked of the model, tried on the first batch, and timed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from .collator import PairCollator

if TYPE_CHECKING:
    from .mixin import MarginMixin

logger = logging.getLogger(__name__)

MODES = ("auto", "always", "never")
_TIMED_BATCHES = 3  # of unlike shapes, mostly
_TIMED_PASSES = 2  # of each batch and way, after one that builds what the shape needs


class PromptSharing:
    """Decides between the shared-prompt pass and the standard one, once, and says why. Both, and the LM head that they
    go through, are first compared with the model's own logits.

    Args:
        trainer: its model is looked at now, its first batches later.
        mode: "never"; "always", which asks the model alone; or "auto", which takes the shared pass where it gives what
            the model's own logits give and, on an accelerator, is the faster one.

    Raises:
        ValueError: an unknown mode, or "always" for a model that cannot.
    """

    def __init__(self, trainer: MarginMixin, mode: str) -> None:
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
        logger.info("prompts are computed once for each answer: %s", reason)

    @property
    def possible(self) -> bool:
        """Whether batches need the shared layout."""
        return self.decided is not False

    def __call__(self, trainer: MarginMixin, batch: Mapping[str, Any]) -> bool:
        """Whether this batch's pass shares prompts."""
        self.check(trainer, batch)
        return SHARED in batch and self.decided is True

    def check(self, trainer: MarginMixin, batch: Mapping[str, Any]) -> None:
        """Compares a prepared batch's first pass with the model's own logits, once; all ranks come to the same end."""
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
        if no_layout or more_than_text:
            logger.info(
                "log-probabilities are not compared with the model's own logits: batches %s",
                "of a collator other than TRL's" if no_layout else "of more than text",
            )
            if self.decided is None:
                self._decide(trainer, shares=False)
            return
        dtype = narrow_dtype(trainer.model, trainer.accelerator.mixed_precision)
        with eval_mode(trainer.model):
            right = checked_ways(trainer.model, *rows, ways, dtype=dtype, max_over_ranks=max_over_ranks)
        trainer._fused = right.fused
        if self.decided is None:
            self._decide(trainer, right.shared)
            if right.shared and not self._to_time:
                logger.info("prompts are computed once for both answers")

    def time(self, trainer: MarginMixin, batches: Sequence[Mapping[str, Any]]) -> None:
        """Times both ways on the first batches of a training, forward and backward, and takes the faster.

        Neither gradients nor the random state change.

        Args:
            trainer: whose model is to be trained next.
            batches: a window's, as the data loader gave them.
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

    def state_dict(self) -> dict[str, Any]:
        """What was timed: a run that goes on must not come to another end."""
        if not any(self._seconds.values()):
            return {}
        return {"seconds": list(self._seconds.values()), "to_time": self._to_time, "shares": self.decided}

    def load_state_dict(self, trainer: MarginMixin, state: Mapping[str, Any]) -> None:
        """Goes on where the run stood."""
        if not self._to_time or not self.possible:
            return
        self._seconds, self._to_time = dict(zip((True, False), state["seconds"], strict=True)), state["to_time"]
        if state["shares"] is False:
            self._decide(trainer, shares=False)

    def _take_the_faster(self, trainer: MarginMixin) -> None:
        device = trainer.accelerator.device
        totals = torch.tensor([list(self._seconds.values())], device=device, dtype=torch.float32)
        shared, standard = trainer.accelerator.gather(totals).amax(0).tolist()  # the slowest rank is waited for
        self._decide(trainer, shared <= standard)
        logger.info(
            "prompts are computed once for %s: forward and backward of the first %d batches take %.3f s with one "
            "prompt for both answers, %.3f s with one for each",
            "both answers" if self.decided else "each answer",
            _TIMED_BATCHES,
            shared,
            standard,
        )

    def _decide(self, trainer: MarginMixin, shares: bool) -> None:
        self.decided = shares
        if not shares and isinstance(trainer.data_collator, PairCollator):
            trainer.data_collator.standard_rows = None  # nobody reads the layout


def _is_timed(trainer: MarginMixin) -> bool:
    """Whether speed is asked for too: on a CPU what is computed less is faster."""
    if not _on_accelerator(trainer) or trainer.args.n_gpu > 1 or trainer.is_deepspeed_enabled:
        return False
    sharded = (FSDPModule, FullyShardedDataParallel)
    if trainer.is_fsdp_enabled or any(isinstance(module, sharded) for module in trainer.model.modules()):
        return False  # their backward passes cannot be tried
    return not trainer.checkpoints_reentrantly  # nor can this one


def _on_accelerator(trainer: MarginMixin) -> bool:
    return trainer.accelerator.device.type != "cpu"


def _seconds(trainer: MarginMixin, batch: Mapping[str, Any], shared: bool) -> float:
    """Of a batch, forward and backward; infinite where memory does not do."""
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
        logger.info("the %s pass does not fit into memory", "shared-prompt" if shared else "standard")
        least = math.inf
    finally:
        for module, mode in modes:
            module.training = mode
    if least == math.inf:
        clear_device_cache(garbage_collection=True)
    return least


def _forward_and_backward(trainer: MarginMixin, batch: Mapping[str, Any], shared: bool) -> None:
    with torch.enable_grad(), trainer._adapter_autocast():
        pairs = pair_logps(trainer.token_logps(trainer.model, batch, shared))
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        # not `backward`, which would leave gradients, and have DDP send them
        torch.autograd.grad((pairs.rejected - pairs.chosen).sum(), parameters, allow_unused=True)


def _clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _why_not_here(trainer: MarginMixin) -> str | None:
    if trainer.args.n_gpu > 1:
        return "nn.DataParallel, which cuts every tensor of a batch by its first dimension"
    if trainer.args.neftune_noise_alpha:
        return "NEFTune, whose noise depends on what is in a row"
    loader = trainer.args.accelerator_config
    streamed = not hasattr(getattr(trainer, "train_dataset", None), "__len__") and loader.dispatch_batches is not False
    if trainer.accelerator.num_processes > 1 and (streamed or loader.dispatch_batches or loader.split_batches):
        return "batches that accelerate cuts up for the ranks (dispatch_batches or split_batches)"
    return None
