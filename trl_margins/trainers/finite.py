"""Steps that are not finite are not taken, and weights that are not finite are not kept: none are saved."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..distributed import fsdp_modules, full_tensor
from ..objective import ObjectiveOutput
from ..pairs import CACHED, CARRIED, ROW, SHARED, PairLogps
from ..recording.metrics import MetricBuffer
from ..rows.tokens import tokenizer_of
from .base import MarginTrainer
from .folder import last_whole_checkpoint
from .learning import Idle, check_optimizer, check_plateau, optimizer_name, warn_of_schedule, why_no_gradient
from .weights import Sample, broken_names, is_broken, largest

logger = logging.getLogger(__name__)

_IN_A_ROW = 10  # so many steps left out one after another are no accident
_NAMED = 8  # pairs that a message names
_LARGE = 1e6  # weights of pairs beyond any use
_GROWN = 1000  # times as large as before training, and no model is left


@dataclass(frozen=True)
class _Seen:
    """What is finite in a mini-batch, on the device."""

    batch: Mapping[str, Any]
    outputs: Tensor  # [B] whether the log-probabilities of both completions are
    losses: Tensor  # [B] whether the loss and every term's value are
    terms: Mapping[str, Tensor]  # "weight 'name'" → [B] its values; and the reference model's
    slope: Tensor | None = None  # [B] of the loss against the reward gap
    gaps: Tensor | None = None  # [B] reward gaps


@dataclass(frozen=True)
class _Step:
    """An optimizer step that was taken."""

    number: int
    optimizer: str
    rates: list[Any]  # learning rates of the groups: numbers, or tensors on the device
    has_gradient: bool

    @property
    def rate(self) -> float:
        return max(map(float, self.rates), default=0.0)


class FiniteSteps(TrainerCallback):
    """Checks before each optimizer step that the model's output, the loss and the gradient are finite, and after it
    that the weights are.

    One value per step is read from the device, after the backward pass, where transformers has just waited for the
    loss itself (`logging_nan_inf_filter`). With it comes whether the step before has left the weights finite: until
    then nobody has seen them, except where they are to be measured, saved or handed back, which is checked first.
    All ranks decide alike.

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
        self._trained: dict[str, nn.Parameter] = {}
        self._last: _Step | None = None  # whose weights nobody has looked at
        self._most = math.inf  # of a weight
        self._shapes: dict[int, torch.Size] = {}  # of the weights that train, by their identity; none if sharded
        self._sample: Sample | None = None  # until a step has changed it
        self._idle, self._is_first = Idle(), True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: weights that are not finite, as those of a damaged checkpoint; an optimizer without them.
        """
        trainer, optimizer = self.trainer, kwargs.get("optimizer")
        self.n_skipped = self._in_a_row = 0
        self._trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        self._last, self._idle, self._is_first = None, Idle(), True
        # DeepSpeed steps on float32 copies, which the weights may not show for long
        self._sample = None if trainer.is_deepspeed_enabled else Sample(self._trained)
        if names := gather_object(broken_names(self._trained)):
            raise ValueError(
                f"{len(set(names))} of the {len(self._trained)} weight tensors that train hold NaN or infinity before "
                f"step {state.global_step + 1}, {names[0]} among them: "
                + ("resume from an earlier checkpoint" if state.global_step else "load the model again")
            )
        is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or fsdp_modules(trainer.model)
        # shards are tensors of their own
        self._shapes = {} if is_sharded else {id(each): each.shape for each in self._trained.values()}
        self._most = _GROWN * max(1.0, *gather_object([float(largest(self._trained))]))
        if not trainer._made_optimizer and optimizer is not None:
            check_optimizer(trainer, optimizer, self._trained)
        check_plateau(args, kwargs.get("lr_scheduler"))
        if state.is_world_process_zero:
            warn_of_schedule(args, kwargs.get("lr_scheduler"), state.global_step, state.max_steps)

    def begin(self) -> None:
        """Remembers what an accumulation window is about to change."""
        self._seen = []
        self._before = copy.deepcopy(self.trainer._term_states()), self.trainer._buffers["train"].copy()

    def see(self, batch: Mapping[str, Any], pairs: PairLogps, output: ObjectiveOutput, loss: Tensor) -> None:
        """Looks at a mini-batch of the open window."""
        if self._seen is None:
            return
        _check_graph(loss, self._trained)
        terms: dict[str, Tensor] = {}
        if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
            terms["the reference model's output"] = pairs.ref_chosen + pairs.ref_rejected
        terms |= {f"weight {name!r}": value for name, value in output.weights.items()}
        terms |= {f"margin {name!r}": value for name, value in output.margins.items()}
        finite = output.losses.detach().isfinite()
        for value in terms.values():
            finite = finite & value.isfinite()
        # a loss beside those of the pairs (mixture of experts, SFT) belongs to all of them
        finite = finite & (loss.detach().isfinite() | ~finite.all())
        gaps = output.chosen_reward - output.rejected_reward
        self._note(_Seen(batch, _outputs(pairs), finite, terms, output.gradient_scale, gaps))

    def see_loss(self, loss: Tensor) -> None:
        """Looks at the loss of a mini-batch that TRL's own method computed."""
        _check_graph(loss, self._trained)
        finite = loss.detach().isfinite().reshape(1)
        self._note(_Seen({}, torch.ones_like(finite), finite, {}))

    def _note(self, seen: _Seen) -> None:
        if self._seen is None:
            return
        if self.trainer.is_deepspeed_enabled:  # the backward pass that follows takes the step
            self._check([seen], None, self.trainer.model)
        else:
            self._seen.append(seen)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen, self._seen = self._seen, None
        has_gradient = True
        if seen is not None and not self.trainer.is_deepspeed_enabled:
            norm = full_tensor(torch.as_tensor(self.trainer.last_grad_norm)).detach()
            has_gradient = self._check(seen, norm, kwargs["model"])
        optimizer = kwargs["optimizer"]
        rates = [group["lr"] for group in optimizer.param_groups if group.get("lr") is not None]
        self._last = _Step(state.global_step + 1, optimizer_name(optimizer), rates, has_gradient)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            self.check_weights(is_last=True)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # a stream may be at its end, and the best model take the place of the last
        self.check_weights(is_last=control.should_training_stop)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check_weights(is_last=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check_same()

    def _check_same(self) -> None:
        """
        Raises:
            ValueError: weights were put in others' place, or resized, since training began.
        """
        if not self._shapes:
            return
        trainer = self.trainer
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and self._shapes.get(id(parameter)) != parameter.shape:
                raise ValueError(
                    f"after step {trainer.state.global_step}, {name} is not the weight tensor that it was when "
                    "training began, and the optimizer does not have it: something replaced, resized or unfroze it, "
                    "such as a callback that calls resize_token_embeddings. Do that before the trainer is made"
                )

    def _check(self, seen: list[_Seen], norm: Tensor | None, model: nn.Module) -> bool:
        """Whether the step that follows has a gradient, as far as is known."""
        trainer, device = self.trainer, self.trainer.accelerator.device
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for each in seen:
            counts = counts + torch.stack([(~each.outputs).sum(), (~each.losses).sum()])
        # so no further value is read from the device
        asked = torch.full((), int(trainer.asked_to_stop), device=device)
        # with a scaler, the scale itself may overflow; it leaves such steps out and lowers the scale
        known = norm if norm is not None and trainer.accelerator.scaler is None else torch.ones(())
        zero = torch.zeros(()) if norm is None else norm == 0
        marks = [~known.isfinite(), zero, *self._marks()]
        total = torch.stack([*counts, asked, *(mark.long().to(device) for mark in marks)])
        n_outputs, n_losses, n_asked, n_gradients, n_zero, *of_weights = trainer.accelerator.reduce(
            total, "sum"
        ).tolist()
        trainer.agree_to_stop(n_asked)
        self._heed(*of_weights)
        if not n_outputs + n_losses + n_gradients:
            self._in_a_row = 0
            step, is_first, self._is_first = trainer.state.global_step + 1, self._is_first, False
            if norm is not None and trainer.is_world_process_zero():
                self._idle.gradient(step, n_zero > 0, is_first, self._why_no_gradient(seen))
            return not n_zero
        step = trainer.state.global_step + 1
        found = gather_object(self._named_pairs(seen, by_output=n_outputs > 0))
        broken = [name for each in seen for name, value in each.terms.items() if not value.isfinite().all()]
        terms = " and ".join(dict.fromkeys(gather_object(broken)))
        what = "the model's output" if n_outputs else terms or "the loss"
        message = f"step {step}: " + _message(found, what, is_loss=n_losses > 0)
        self._undo(step)
        self._in_a_row += 1
        if not self.skip or self._in_a_row >= _IN_A_ROW:
            every = n_outputs and len(found) == sum(gather_object([len(each.losses) for each in seen]))
            raise FloatingPointError(f"{message}. {self._save(step - 1)} {self._advice(seen, bool(every))}")
        self.n_skipped += 1
        trainer.store_metrics({"skipped_steps": float(self.n_skipped)})
        logger.warning("%s. The step is left out; %d so far", message, self.n_skipped)
        if trainer.accelerator.scaler is None:
            model.zero_grad()
        return False

    def check_weights(self, is_last: bool = False, alone: bool = False) -> None:
        """Looks at the weights that the last step left, if nobody has: before they are measured, saved or handed back.

        Args:
            is_last: no step follows.
            alone: this rank looks for itself; the others may not be here.

        Raises:
            FloatingPointError: NaN or infinity in them.
        """
        if not self._trained:  # of a trainer that has not trained
            return
        self._check_same()
        marks = torch.stack([mark.long().to(self.trainer.accelerator.device) for mark in self._marks()])
        found = marks if alone else self.trainer.accelerator.reduce(marks, "sum")
        n_broken, n_still = found.tolist()
        self._heed(n_broken, n_still, alone)
        if is_last and self._sample is not None:
            self._idle.say()

    def _marks(self) -> tuple[Tensor, Tensor]:
        """On the device: whether this rank's weights are broken, and whether the last step left them as they were."""
        still = torch.tensor(False) if self._sample is None or self._last is None else self._sample.is_unchanged()
        return is_broken(self._trained, self._most), still

    def _heed(self, n_broken: int, n_still: int, alone: bool = False) -> None:
        """What `_marks` says of all ranks."""
        last, trainer = self._last, self.trainer
        if n_broken:
            raise FloatingPointError(self._changed(alone) if last is None else self._broken(last, alone))
        if last is None:
            return
        self._last = last if alone else None
        if self._sample is None or alone:
            return
        if n_still < trainer.accelerator.num_processes:
            self._sample = None
        elif (
            last.has_gradient
            and (last.rate > 0 or self._is_rate_due())  # a schedule's zeros are said at first
            and not trainer.accelerator.optimizer_step_was_skipped
            and trainer.is_world_process_zero()
        ):
            dtype = next(iter(self._trained.values())).dtype
            self._idle.weights(last.number, last.optimizer, last.rate, dtype)

    def _is_rate_due(self) -> bool:
        """Whether the schedule of the whole run has a learning rate, though the last step had none."""
        return self.trainer.state.max_steps > 1 and max(self.trainer.lr_scheduler.get_last_lr()) > 0

    def _broken(self, last: _Step, alone: bool) -> str:
        lower = "Lower the learning rate, or look" if last.rate > 0 else "Look"
        return (
            f"step {last.number} broke {self._named_weights(alone)}. It is the step itself, of {last.optimizer} with "
            f"the learning rate {last.rate:g}, or a callback at its end, and not the rows. Nothing of it is saved. "
            f"{self._last_good()}. {lower} at the optimizer's options, the dtype of the weights (float16 ends at "
            "65504), and callbacks that change gradients or weights"
        )

    def _changed(self, alone: bool) -> str:
        return (
            f"after step {self.trainer.state.global_step}, which left them whole, something else broke "
            f"{self._named_weights(alone)}. Look at what changes weights beside the optimizer, such as a callback. "
            f"Nothing of it is saved. {self._last_good()}"
        )

    def _named_weights(self, alone: bool) -> str:
        names = broken_names(self._trained, self._most)
        names = list(dict.fromkeys(names if alone else gather_object(names)))
        dtype = str(self._trained[names[0]].dtype).removeprefix("torch.") if names[0] in self._trained else ""
        return (
            f"{len(names)} of the {len(self._trained)} weight tensors that train, {names[0]} ({dtype}) among them: "
            f"they hold NaN, infinity or values above {self._most:.3g}, {_GROWN} times the largest before training"
        )

    def _last_good(self) -> str:
        good = last_whole_checkpoint(self.trainer.args.output_dir)
        return f"The last checkpoint before it is {good}" if good else "No checkpoint was saved before it"

    def _why_no_gradient(self, seen: list[_Seen]) -> Iterator[str]:
        if not seen:
            yield "no pair went through the trainer's loss, but through that of a subclass, or none"
            return
        columns = [
            None if any(value is None for value in values) else torch.cat([v for v in values if v is not None])
            for values in (
                [self.trainer.same_completions(each.batch) if each.batch else None for each in seen],
                [each.slope for each in seen],
                [each.gaps for each in seen],
            )
        ]
        same, slope, gaps = columns
        yield from why_no_gradient(sum(len(each.losses) for each in seen), same, _weights_of(seen), slope, gaps)

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

    def _advice(self, seen: list[_Seen], is_every_pair: bool) -> str:
        if self.skip:
            return f"{self._in_a_row} steps in a row are not finite: the model itself is broken, or its precision."
        options = self.trainer.options
        read = ("sam_radius", *options.term_options("margin"), *options.term_options("weight"))
        radii = ("anchor_radius", "sam_radius")
        causes: list[str] = [name for name in radii if name in read and getattr(options, name, None)]
        largest = max((float(value.abs().max()) for value in _weights_of(seen).values()), default=0.0)
        if _LARGE < largest < math.inf:
            causes.append(f"the weights of the pairs, of up to {largest:.3g}")
        causes.append("the learning rate")
        precision = "precision (fp16 overflows where bf16 does not)"
        if is_every_pair:
            return (
                "No pair of the step is left, so look at the model rather than at the rows: "
                f"{_listed(['its config.json', f'its {precision}', *causes])}"
            )
        return (
            f"Look at {_listed(['these rows', *causes, f'the {precision}'])}, or leave such steps out and count them "
            "with nonfinite_steps='skip'"
        )


def _weights_of(seen: list[_Seen]) -> dict[str, Tensor]:
    """Of a window's pairs, by "weight 'name'"."""
    names = [name for name in seen[0].terms if name.startswith("weight ")]
    return {name: torch.cat([each.terms[name] for each in seen]) for name in names}


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _check_graph(loss: Tensor, trained: Mapping[str, nn.Parameter]) -> None:
    """
    Raises:
        ValueError: no gradient can reach the weights that train.
    """
    if loss.requires_grad:
        return
    if not trained:
        raise ValueError("no weight of the model trains any more: something froze it after the trainer was made")
    raise ValueError(
        f"the loss depends on none of the {len(trained)} weight tensors that train ({next(iter(trained))} is the "
        "first): switch the adapter on, or let parts train that the forward pass uses. With gradient checkpointing, "
        "set use_reentrant to False"
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
    return pairs.chosen.isfinite() & pairs.rejected.isfinite()


def _message(found: list[str], what: str, is_loss: bool) -> str:
    if not found and is_loss:  # computed by TRL's own method
        return f"{what} is NaN or infinite. share_prompt='auto' would name the pairs"
    if not found:
        return "the gradient is NaN or infinite, although the model's output and the objective's loss are not"
    named, more = ", ".join(found[:_NAMED]), len(found) - _NAMED
    return f"{what} is NaN or infinite for {len(found)} pair(s): {named}" + (f" and {more} more" if more > 0 else "")
