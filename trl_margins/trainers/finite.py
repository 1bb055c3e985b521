"""Steps that are not finite are not taken: no NaN and no infinity reaches the weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from .base import MarginTrainer

logger = logging.getLogger(__name__)

_IN_A_ROW = 10  # so many steps left out one after another are no accident
_NAMED = 8  # pairs that a message names


@dataclass(frozen=True)
class _Seen:
    """What is finite in a mini-batch, on the device."""

    batch: Mapping[str, Any]
    outputs: Tensor  # [B] whether the log-probabilities of both completions are
    losses: Tensor  # [B] whether the loss and every term's value are
    terms: Mapping[str, Tensor]  # "weight 'name'" → [B] its values


class FiniteSteps(TrainerCallback):
    """Checks before each optimizer step that the model's output, the loss and the gradient are finite.

    One value per step is read from the device, after the backward pass, where transformers has just waited for the
    loss itself (`logging_nan_inf_filter`). All ranks decide alike.

    Args:
        trainer: whose steps.
        skip: leave such a step out and go on, instead of stopping. The terms, the pair log and the logged means then
            hold nothing of it.

    Raises:
        ValueError: skipping under DeepSpeed.
    """

    def __init__(self, trainer: MarginTrainer, skip: bool) -> None:
        if skip and trainer.is_deepspeed_enabled:
            raise ValueError(
                "nonfinite_steps='skip' must decide before the optimizer's step, which DeepSpeed takes within the "
                "backward pass: leave it at 'stop'"
            )
        self.trainer, self.skip = trainer, skip
        self.n_skipped = self._in_a_row = 0
        self._seen: list[_Seen] | None = None  # of the open accumulation window
        self._before: tuple[dict[str, Any], MetricBuffer]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.n_skipped = self._in_a_row = 0

    def begin(self) -> None:
        """Remembers what an accumulation window is about to change."""
        self._seen = []
        self._before = copy.deepcopy(self.trainer._term_states()), self.trainer._buffers["train"].copy()

    def see(self, batch: Mapping[str, Any], pairs: PairLogps, output: ObjectiveOutput, loss: Tensor) -> None:
        """Looks at a mini-batch of the open window."""
        if self._seen is None:
            return
        terms = {f"weight {name!r}": value for name, value in output.weights.items()}
        terms |= {f"margin {name!r}": value for name, value in output.margins.items()}
        finite = output.losses.detach().isfinite()
        for value in terms.values():
            finite = finite & value.isfinite()
        # a loss beside those of the pairs (mixture of experts, SFT) belongs to all of them
        finite = finite & (loss.detach().isfinite() | ~finite.all())
        self._note(_Seen(batch, _outputs(pairs), finite, terms))

    def see_loss(self, loss: Tensor) -> None:
        """Looks at the loss of a mini-batch that TRL's own method computed."""
        finite = loss.detach().isfinite().reshape(1)
        self._note(_Seen({}, torch.ones_like(finite), finite, {}))

    def _note(self, seen: _Seen) -> None:
        if self._seen is None:
            return
        if self.trainer.is_deepspeed_enabled:  # the backward pass that follows takes the step
            self._check([seen], torch.tensor(True), self.trainer.model)
        else:
            self._seen.append(seen)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen, self._seen = self._seen, None
        if seen is not None and not self.trainer.is_deepspeed_enabled:
            self._check(seen, self._gradient_is_finite(), kwargs["model"])

    def _check(self, seen: list[_Seen], gradient: Tensor, model: nn.Module) -> None:
        trainer, device = self.trainer, self.trainer.accelerator.device
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for each in seen:
            counts = counts + torch.stack([(~each.outputs).sum(), (~each.losses).sum()])
        asked = torch.full(
            (), int(trainer.asked_to_stop), device=device
        )  # so no further value is read from the device
        total = torch.stack([*counts, (~gradient).long().to(device), asked])
        n_outputs, n_losses, n_gradients, n_asked = trainer.accelerator.reduce(total, "sum").tolist()
        trainer.agree_to_stop(n_asked)
        if not n_outputs + n_losses + n_gradients:
            self._in_a_row = 0
            return
        step = trainer.state.global_step + 1
        found = gather_object(self._named_pairs(seen, by_output=n_outputs > 0))
        broken = [name for each in seen for name, value in each.terms.items() if not value.isfinite().all()]
        terms = " and ".join(dict.fromkeys(gather_object(broken)))
        what = "the model's output" if n_outputs else terms or "the loss"
        message = f"step {step}: " + _message(found, what, is_loss=n_losses > 0)
        self._undo(step)
        self._in_a_row += 1
        if not self.skip or self._in_a_row >= _IN_A_ROW:
            raise FloatingPointError(f"{message}. {self._save(step - 1)} {self._advice()}")
        self.n_skipped += 1
        trainer.store_metrics({"skipped_steps": float(self.n_skipped)})
        logger.warning("%s. The step is left out; %d so far", message, self.n_skipped)
        if trainer.accelerator.scaler is None:
            model.zero_grad()

    def _gradient_is_finite(self) -> Tensor:
        if self.trainer.accelerator.scaler is not None:
            return torch.tensor(True)  # the scale itself may overflow; the scaler leaves such steps out and lowers it
        return full_tensor(torch.as_tensor(self.trainer.last_grad_norm)).isfinite()

    def _named_pairs(self, seen: list[_Seen], by_output: bool) -> list[str]:
        """This rank's pairs that are not finite."""
        finite = [self._alone(each) if by_output else each.losses for each in seen]
        return [
            self._name(each.batch, i)
            for each, pairs in zip(seen, finite, strict=True)
            for i in (~pairs).nonzero().flatten().tolist()
            if each.batch
        ]

    @torch.no_grad()
    def _alone(self, seen: _Seen) -> Tensor:
        """[B] `seen.outputs` of a forward pass in which no pairs share a row: there, a NaN reaches its neighbours."""
        if SHARED not in seen.batch:
            return seen.outputs
        alone = _outputs(self.trainer.forward_pairs(_without(seen.batch, SHARED, CACHED)))
        return torch.where(alone.all(), seen.outputs, alone)

    def _name(self, batch: Mapping[str, Any], i: int) -> str:
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
        for term in trainer.objective.remembering:
            term.load_state_dict(states[term.name])
        trainer._buffers["train"] = metrics
        for log in trainer._logs:
            log.forget(step)

    def _save(self, step: int) -> str:
        """Saves the weights, which this step has not changed, unless the run saves none."""
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


def without_neighbours(trainer: MarginTrainer, batch: Mapping[str, Any], pairs: PairLogps) -> PairLogps:
    """The pairs of an evaluation batch, computed again with one row per completion where something is not finite: in a
    row that pairs share, a NaN reaches its neighbours. All ranks decide alike.
    """
    if SHARED not in batch or not trainer.accelerator.gather((~_outputs(pairs)).any()[None]).any():
        return pairs
    return trainer.forward_pairs(_without(batch, SHARED))


def _without(batch: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in keys}


def _outputs(pairs: PairLogps) -> Tensor:
    return pairs.chosen.detach().isfinite() & pairs.rejected.detach().isfinite()


def _message(found: list[str], what: str, is_loss: bool) -> str:
    if not found and is_loss:  # computed by TRL's own method
        return f"{what} is NaN or infinite. share_prompt='auto' would name the pairs"
    if not found:
        return "the gradient is NaN or infinite, although the model's output and the loss are not"
    named, more = ", ".join(found[:_NAMED]), len(found) - _NAMED
    return f"{what} is NaN or infinite for {len(found)} pair(s): {named}" + (f" and {more} more" if more > 0 else "")
