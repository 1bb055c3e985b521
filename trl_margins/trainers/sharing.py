"""Whether a trainer's passes take both answers of a pair in one row: asked of the model, then tried on a batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import unknown
from ..forward.shareable import why_not_shared
from ..forward.standard import pair_logps
from .collator import SHARED
from .precision import narrow_dtype, without_dropout

if TYPE_CHECKING:
    from .mixin import MarginMixin

logger = logging.getLogger(__name__)

MODES = ("auto", "always", "never")
# How far an answer's mean log-probability per token may be from the standard pass's, in nats
TOLERANCE = {None: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class PromptSharing:
    """Decides between the shared-prompt pass and the standard one, once, and says why.

    Args:
        trainer: its model is looked at now, its first batch later.
        mode: "never"; "always", which asks the model alone; or "auto", which also computes the first batch both ways.

    Raises:
        ValueError: an unknown mode, or "always" for a model that cannot.
    """

    def __init__(self, trainer: MarginMixin, mode: str) -> None:
        if mode not in MODES:
            raise unknown("share_prompt", mode, MODES)
        self.decided: bool | None = {"never": False, "always": True, "auto": None}[mode]
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
        if SHARED not in batch:
            return False
        if self.decided is None:
            self.decided = _agrees(trainer, batch)
        return self.decided


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


def _agrees(trainer: MarginMixin, batch: Mapping[str, Any]) -> bool:
    """Computes a batch both ways; all ranks come to the same answer."""
    with torch.no_grad(), without_dropout(trainer.model):
        standard, shared = (_means(trainer, batch, way) for way in (False, True))
    difference = trainer.accelerator.gather((standard - shared).abs().max()[None]).max().item()
    dtype = narrow_dtype(trainer.model, trainer.accelerator.mixed_precision)
    if difference <= TOLERANCE[dtype]:
        logger.info("prompts are computed once for both answers; largest difference on the first batch: %.1e nats per "
                    "token", difference)  # fmt: skip
        return True
    logger.warning(
        "the shared-prompt pass differs from the standard one by %.1e nats per token on the first batch (tolerance "
        "%.0e in %s): prompts are computed once for each answer. share_prompt='never' spares the comparison; please "
        "report the model: %s",
        difference,
        TOLERANCE[dtype],
        dtype or "float32",
        type(trainer.model).__name__,
    )
    return False


def _means(trainer: MarginMixin, batch: Mapping[str, Any], shared: bool) -> Tensor:
    pairs = pair_logps(trainer.token_logps(trainer.model, batch, shared))
    return torch.cat(
        [
            (pairs.chosen / pairs.chosen_length.clamp(min=1)).float(),
            (pairs.rejected / pairs.rejected_length.clamp(min=1)).float(),
        ]
    )
