"""Nothing that is not a number reaches the weights: a step whose model output is NaN or infinite is not taken."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..distributed import full_tensor
from ..objective import ObjectiveOutput
from ..pairs import CACHED, CARRIED, ROW, SHARED, PairLogps
from ..recording.metrics import MetricBuffer
from ..rows.tokens import tokenizer_of

if TYPE_CHECKING:
    from .mixin import MarginMixin

logger = logging.getLogger(__name__)

_IN_A_ROW = 10  # so many steps left out one after another are no accident
_NAMED = 8  # pairs that a message names


@dataclass(frozen=True)
class _Seen:
    """What a mini-batch came to, on the device."""

    batch: Mapping[str, Any]
    outputs: Tensor  # [B] whether what the model gave for both answers is finite
    losses: Tensor  # [B]


class FiniteSteps(TrainerCallback):
    """Looks, before each optimizer step, at whether all that it is made of is finite.

    One value is read from the device a step, after the backward pass, where transformers has just waited for the loss
    itself (`logging_nan_inf_filter`). All ranks decide alike.

    Args:
        trainer: whose steps.
        skip: leave such a step out and go on, instead of stopping. The terms then remember nothing of it, nor do the
            pair log and the logged means.

    Raises:
        ValueError: to skip under DeepSpeed.
    """

    def __init__(self, trainer: MarginMixin, skip: bool) -> None:
        if skip and trainer.is_deepspeed_enabled:
            raise ValueError(
                "nonfinite_steps='skip' needs a say before the optimizer's step, which DeepSpeed takes within the "
                "backward pass: leave it at 'stop'"
            )
        self.trainer, self.skip = trainer, skip
        self.n_skipped = self._in_a_row = 0
        self._seen: list[_Seen] | None = None  # of the window that is open
        self._before: tuple[dict[str, Any], MetricBuffer]

    def begin(self) -> None:
        """Notes what a window is about to change."""
        self._seen = []
        self._before = copy.deepcopy(self.trainer._term_states()), self.trainer._buffers["train"].copy()

    def see(self, batch: Mapping[str, Any], pairs: PairLogps, output: ObjectiveOutput, loss: Tensor) -> None:
        """Notes what a mini-batch came to, where it is part of a window."""
        if self._seen is None:
            return
        # a loss beside those of the pairs (mixture of experts, SFT) belongs to all of them
        seen = _Seen(batch, _outputs(pairs), output.losses.detach().isfinite() & loss.detach().isfinite())
        if self.trainer.is_deepspeed_enabled:  # the backward pass that comes takes the step
            self._check([seen], torch.tensor(True), self.trainer.model)
        else:
            self._seen.append(seen)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        seen, self._seen = self._seen, None
        if seen is not None and not self.trainer.is_deepspeed_enabled:
            self._check(seen, self._gradient_is_finite(), model)

    def _check(self, seen: list[_Seen], gradient: Tensor, model: nn.Module) -> None:
        trainer, device = self.trainer, self.trainer.accelerator.device
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for each in seen:  # none where TRL's own method computes the loss
            counts = counts + torch.stack([(~each.outputs).sum(), (~each.losses).sum()])
        total = torch.stack([*counts, (~gradient).long().to(device)])
        n_outputs, n_losses, n_gradients = trainer.accelerator.reduce(total, "sum").tolist()
        if not n_outputs + n_losses + n_gradients:
            self._in_a_row = 0
            return
        step = trainer.state.global_step + 1
        found = gather_object(self._described(seen, by_output=n_outputs > 0))
        message = f"step {step}: " + _message(found, n_outputs > 0)
        self._undo(step)
        self._in_a_row += 1
        if self.skip and self._in_a_row < _IN_A_ROW:
            self.n_skipped += 1
            trainer.store_metrics({"skipped_steps": torch.tensor(float(self.n_skipped))})
            logger.warning("%s. The step is left out; %d so far", message, self.n_skipped)
            if trainer.accelerator.scaler is None:
                model.zero_grad()
            return
        raise FloatingPointError(f"{message}. {self._kept(step - 1)} {self._advice()}")

    def _gradient_is_finite(self) -> Tensor:
        if self.trainer.accelerator.scaler is not None:
            return torch.tensor(True)  # the scale itself may overflow; the scaler leaves such steps out and lowers it
        norm = torch.as_tensor(self.trainer.last_grad_norm)
        return full_tensor(norm).isfinite()

    def _described(self, seen: list[_Seen], by_output: bool) -> list[str]:
        """This rank's pairs that are not finite."""
        right = [self._alone(each) if by_output else each.losses for each in seen]
        return [
            self._pair(each.batch, i)
            for each, finite in zip(seen, right, strict=True)
            for i in (~finite).nonzero().flatten().tolist()
        ]

    @torch.no_grad()
    def _alone(self, seen: _Seen) -> Tensor:
        """[B] the same of another pass, in which pairs share no row: there, one's NaN reaches its neighbours."""
        if SHARED not in seen.batch:
            return seen.outputs
        batch = {key: value for key, value in seen.batch.items() if key not in (SHARED, CACHED)}
        alone = _outputs(self.trainer.forward_pairs(batch))
        return torch.where(alone.all(), seen.outputs, alone)

    def _pair(self, batch: Mapping[str, Any], i: int) -> str:
        numbers = batch.get(CARRIED, {}).get(ROW)
        number = "a row" if numbers is None else f"row {int(numbers[i])}"
        rows = self.trainer.standard_rows()(batch)
        if rows is None:
            return number
        ids, mask, _ = rows
        text = tokenizer_of(self.trainer.processing_class).decode(ids[i][mask[i].bool()], skip_special_tokens=True)
        return f"{number} ({text[:60]!r}…)"

    def _undo(self, step: int) -> None:
        trainer, (states, metrics) = self.trainer, self._before
        for term in trainer.objective.terms:
            if term.name in states:
                term.load_state_dict(states[term.name])
        trainer._buffers["train"] = metrics
        if trainer._pair_log is not None:
            trainer._pair_log.forget(step)

    def _kept(self, step: int) -> str:
        """Saves the weights, which are those of before, unless the run saves none."""
        trainer = self.trainer
        if trainer.args.save_strategy == SaveStrategy.NO or step == 0:
            return f"The weights are those after step {step}."
        trainer._save_checkpoint(trainer.model, trial=None)
        return f"The weights after step {step} are saved in checkpoint-{step}."

    def _advice(self) -> str:
        if self.skip:
            return f"{self._in_a_row} steps in a row are not finite: the model itself is broken, or its precision."
        return (
            "Look at these rows, the learning rate and the precision (fp16 overflows where bf16 does not), or leave "
            "such steps out and count them with nonfinite_steps='skip'"
        )


def without_neighbours(trainer: MarginMixin, batch: Mapping[str, Any], pairs: PairLogps) -> PairLogps:
    """The pairs of an evaluation's batch, computed anew with a row for each answer where something is not finite: in a
    row that pairs share, one's NaN reaches its neighbours. All ranks decide alike.
    """
    if SHARED not in batch or not trainer.accelerator.gather((~_outputs(pairs)).any()[None]).any():
        return pairs
    return trainer.forward_pairs({key: value for key, value in batch.items() if key != SHARED})


def _outputs(pairs: PairLogps) -> Tensor:
    return pairs.chosen.detach().isfinite() & pairs.rejected.detach().isfinite()


def _message(found: list[str], outputs: bool) -> str:
    if not found:
        return "the gradient is NaN or infinite, although the model's output and the loss are not"
    what = "the model's output" if outputs else "the loss"
    named, more = ", ".join(found[:_NAMED]), len(found) - _NAMED
    return f"{what} is NaN or infinite for {len(found)} pair(s): {named}" + (f" and {more} more" if more > 0 else "")
