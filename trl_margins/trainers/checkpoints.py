"""What a run leaves in its folder: its settings, and in each checkpoint the states of terms and probes."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import EarlyStoppingCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from trl import BEMACallback

from ..checks import check_path
from ..disk import is_of_the_disk, where
from ..distributed import agreed, check_alike
from ..objective import of_part
from ..recording.metrics import MetricBuffer
from ..recording.pair_log import RUN_FILE
from .arguments import check_active, check_settings
from .base import MarginTrainer
from .fingerprints import of_attributes
from .folder import (
    BESIDE,
    check_links,
    check_same_run,
    check_states,
    checkpoint_to_resume,
    last_whole_checkpoint,
    locked,
    make_room,
    make_room_for_model,
    replace_links,
    settings_before,
    take_place,
)
from .loaded import adapter_tensors, check_saved, has_weights, is_converted, load_converted, why_not_loaded
from .loaded_optimizers import (
    check_goes_on,
    check_options,
    check_same_kind,
    options_before,
    options_of,
    unwrapped,
)
from .settings import exported_states, of_every_rank, run_settings
from .whole import check_exported, forget_files, is_whole, kept_by, kept_of_others, record_files, step_of

logger = logging.getLogger(__name__)

TERMS_FILE = "margin_terms.safetensors"
SHARING_FILE = "shared_prompts.json"
_PLAIN = "plain"
# what libraries raise for a file that holds something else than it should
_UNREADABLE = (AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError)


def save_states(states: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Saves the terms' states without pickle: tensors as safetensors, everything else as JSON in its metadata.

    Args:
        states: term → name → tensor, or number, string, None, and lists and dicts of these.
        file: where to.

    Raises:
        TypeError: a value of another kind, with term and name.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for term, state in states.items():
        plain[term] = {}
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise TypeError(f"the state of term {term!r} is {state!r:.80}: let state_dict() return a dict, by name")
        for name, value in state.items():
            if isinstance(value, Tensor):
                if value.layout != torch.strided or value.is_meta:
                    raise TypeError(
                        f"the state {name!r} of term {term!r} is a sparse or meta tensor: keep a dense one"
                    )
                tensors[f"{term}/{name}"] = value.detach().clone(memory_format=torch.contiguous_format)
                continue
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"the state {name!r} of term {term!r} is a {type(value).__name__} that cannot be saved ({error}): "
                    "a checkpoint holds tensors by name, and numbers, strings, None, lists and dicts of these"
                ) from error
            plain[term][name] = value
    save_file(tensors, file, metadata={_PLAIN: json.dumps(plain)})


def load_states(file: Path, device: torch.device) -> dict[str, dict[str, Any]]:
    """What `save_states` wrote."""
    place = "cpu" if device.type == "cpu" else str(device)  # torchrun's processes have "cpu:0", which it does not know
    with safe_open(file, "pt", device=place) as saved:
        states: dict[str, dict[str, Any]] = json.loads(saved.metadata()[_PLAIN])
        for key in saved.keys():  # noqa: SIM118 - it is not a mapping
            term, name = key.split("/", 1)
            states[term][name] = saved.get_tensor(key)
    return states


class CheckpointMixin(MarginTrainer):
    """Makes its folder one run: saves what terms and probes remember in every checkpoint, resumes from complete ones
    of the same run only, and lets no other run into the folder meanwhile.
    """

    settings: dict[str, Any]  # of the run, for `margin_run.json`
    holds_folder = False  # whether the caller of `train` keeps other runs out already
    is_complete = False  # whether the checkpoint that was resumed is the run's last
    _first_states: dict[str, Any]  # of the terms, when the trainer had been built
    _made_optimizer = False  # whether an earlier call of `train` did
    _made_schedule = False
    _first_schedule: tuple[Any, dict[str, Any]] = (None, {})  # one of its own, and what it was when it was given
    _first_attributes: dict[str, dict[str, str]]  # of the terms without a state, then
    _first_types: str  # of the weights, then
    _kind_of_rows: type[Any]  # of the training set, then
    _settings_read: dict[str, Any]  # of the config, when the trainer had been built
    _steps_before = 0  # of the checkpoint that is resumed
    _counts_before: Sequence[int] = ()  # of the evaluations without progress, by its early-stopping callbacks
    _loaded_from: str | None = None  # a checkpoint, until its random state is loaded

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """TRL's; `True` takes the newest complete checkpoint.

        Without a checkpoint a run begins, on a second call too: an earlier run's files are moved into a folder of
        their own, and terms and optimizer forget what they remember.

        Raises:
            ValueError: an incomplete checkpoint or one of another run, a folder in which a run is training or which
                holds the trained model, a setting that came too late, or nothing to train.
        """
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise ValueError(
                "gradients are switched off where train() is called: call it outside of torch.no_grad() and "
                "torch.inference_mode(), and after torch.set_grad_enabled(True)"
            )
        if trial is not None:
            raise ValueError("trial is for hyperparameter_search, which these trainers do not have: leave it out")
        check_settings(self.args, self._settings_read)
        if not isinstance(self.train_dataset, self._kind_of_rows):
            raise TypeError(
                f"trainer.train_dataset is a {type(self.train_dataset).__name__}, and the trainer was made with a "
                f"{self._kind_of_rows.__name__}: give the data set to a new trainer, which makes its tokens"
            )
        check_active(self.model)
        check_saved(self.model)
        self.settings = run_settings(self)  # before the model is wrapped
        types = self.settings["weight_types"]
        if any("16" in each for each in {*types.split(", ")} - {*self._first_types.split(", ")}):
            by = ". An evaluation with fp16_full_eval or bf16_full_eval converts them: load the model again"
            logger.warning(
                f"the weights are {types} by now, and were {self._first_types} when the trainer was made: they train "
                "so" + by * (self.args.fp16_full_eval or self.args.bf16_full_eval)
            )
        check_path("resume_from_checkpoint", place := resume_from_checkpoint)
        place = os.path.realpath(place) if isinstance(place, str | os.PathLike) else place and str(place)
        given = {"resume_from_checkpoint of train()": place}
        check_alike(self.accelerator, of_every_rank(self, self.settings) | given)
        with ExitStack() as held:
            check = partial(self._enter_folder, held, resume_from_checkpoint)
            checkpoint, self._steps_before, self._counts_before = agreed(self.accelerator, check)
            self._forget()
            output = super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
        if self.state.global_step == self._steps_before and not self.is_complete:
            raise ValueError("nothing was trained: the training set gave no batch")
        return output

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: in a trial, transformers sets `objective` to a number."""
        raise NotImplementedError(
            "hyperparameter_search sets trainer.objective, which is this trainer's loss, to a number: start one run "
            "per setting, each with a trainer and an output_dir of its own, in a loop or in a study of optuna's"
        )

    def _forget(self) -> None:
        """Puts back what an earlier call of `train`, complete or not, changed beside the model. transformers would
        make a new schedule, and keep the optimizer that it made, with its moments.
        """
        if self._made_optimizer:
            self.optimizer = None
        self._made_optimizer = self.optimizer is None
        self._made_schedule = self._made_schedule or self.lr_scheduler is None
        for callback in self._early_stopping:
            callback.early_stopping_patience_counter = 0
        if self.state.global_step and not (self._made_optimizer and self._made_schedule):
            logger.warning("train() again: an optimizer and a schedule of your own go on where they are")
        for term in self.objective.remembering:
            if term.name in self._first_states:
                term.load_state_dict(copy.deepcopy(self._first_states[term.name]))
        self._buffers["train"] = MetricBuffer()

    @property
    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]

    def _enter_folder(self, held: ExitStack, resume: str | bool | None) -> tuple[str | None, int, list[int]]:
        """Checks the folder, on the main process, and keeps other runs out of it; the checkpoint, its step, and what
        its early-stopping callbacks had counted.
        """
        folder = Path(self.args.output_dir)
        if (limit := self.args.save_total_limit) is not None and limit < 1:
            logger.warning("save_total_limit=%d: every checkpoint is kept, as with None", limit)
        elif limit is not None and "\n" in str(folder.absolute()):
            raise ValueError(
                f"save_total_limit={limit}: transformers finds no checkpoint to delete in a "
                f"folder with a line break in its path ({str(folder)!r}): name another output_dir"
            )
        for log in self._logs:  # output_dir may have been set since
            log.file = folder / log.file.name
        if not self.holds_folder:
            held.enter_context(locked(folder))
        checkpoint = checkpoint_to_resume(folder, resume)
        if checkpoint is None:
            make_room(self, folder)
            check_links(folder)
            return None, 0, []
        check_states(checkpoint)
        check_same_run(checkpoint, self.settings, self.args)
        if any(isinstance(each, BEMACallback) for each in self.callback_handler.callbacks):
            logger.warning("%s does not have the averages of BEMACallback, which begins again", checkpoint)
        if why := why_not_loaded(self.model):
            raise ValueError(f"{checkpoint} cannot be resumed: {why}. Start with another output_dir")
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        step = state.global_step
        began_again = not has_length(self.train_dataset) and (state.epoch or 0) > 1 and step < self.args.max_steps
        if began_again and not self.args.ignore_data_skip:  # its epochs are passes
            raise ValueError(
                f"{checkpoint} cannot be resumed where it was: the stream had begun again, and how many rows it has "
                "is not known. Go on from its first row with ignore_data_skip=True (--ignore_data_skip true), or load "
                "the data set instead of streaming it"
            )
        counts = [each.get("early_stopping_patience_counter", 0) for each in kept_by(self._early_stopping, state)]
        goes_on = checkpoint.absolute().parent.resolve() == folder.resolve()  # also in one that is a link
        make_room(self, folder, after=step if goes_on else None)
        check_links(folder, after=step if goes_on else -1)
        return str(checkpoint), step, counts

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any) -> Any:
        """transformers' numbers of epochs and steps, of which there must be one.

        Raises:
            ValueError: there is nothing to train.
        """
        if has_length(dataloader) and not len(dataloader):
            raise ValueError(
                f"the training set has {len(self.train_dataset)} rows, which make no batch: nothing to train"
                + (" (dataloader_drop_last drops a smaller one)" if args.dataloader_drop_last else "")
            )
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader, *more)
        if max_steps < 1:
            raise ValueError(
                f"{args.num_train_epochs:g} epochs: there is nothing to train; evaluate() needs no training"
            )
        schedule = None if self._made_schedule else unwrapped(self.lr_scheduler)
        if isinstance(most := getattr(schedule, "total_steps", None), int) and most < max_steps:  # of OneCycleLR
            raise ValueError(
                f"the {type(schedule).__name__} ends after {most} steps, and the run has {max_steps}: make it with "
                "as many"
            )
        if self._steps_before > max_steps:
            raise ValueError(
                f"the checkpoint has {self._steps_before} steps, and this run {max_steps}: raise max_steps or "
                "num_train_epochs, or leave resume_from_checkpoint out"
            )
        counts = zip(self._early_stopping, self._counts_before, strict=False)
        stopped = any(count >= callback.early_stopping_patience for callback, count in counts)
        self.is_complete = self._steps_before == max_steps or stopped
        if stopped:
            logger.warning(
                "the run in %s is complete: early stopping ended it after %d of %d steps. A larger "
                "early_stopping_patience goes on with it",
                *(args.output_dir, self._steps_before, max_steps),
            )
        elif self.is_complete:
            logger.warning(
                "the run in %s is complete: it has %d of %d steps, and nothing is left to train. More max_steps or "
                "num_train_epochs go on with it",
                *(args.output_dir, max_steps, max_steps),
            )
        if self.is_complete:
            epochs = 0  # transformers would take one more step in the middle of an epoch
        elif self.args.should_save:  # saved last, it says that the run's model is there: it would be an earlier one
            with suppress(OSError):  # a folder that cannot be written to is refused where the first file is written
                Path(self.args.output_dir, TRAINING_ARGS_NAME).unlink()
        return (epochs, *others, max_steps)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers'. An adapter in the folder would be loaded instead of the whole model: it is moved aside."""
        check_path("output_dir of save_model", output_dir)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            replace_links(folder)
            make_room_for_model(folder, is_adapter=is_peft_model(self.model))
        super().save_model(output_dir, _internal_call)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """transformers'. A file of all results that cannot be read is written anew: it has nothing to add to."""
        file = Path(self.args.output_dir, "all_results.json")
        if combined and self.is_world_process_zero() and file.exists():
            found: Any = None
            with suppress(ValueError):
                found = json.loads(file.read_text())
            if not isinstance(found, dict):
                logger.warning("%s has no results that can be read, and is written anew", file)
                file.unlink()
        super().save_metrics(split, metrics, combined)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """transformers'. The final model is written beside an earlier one, which it replaces when it is whole."""
        folder = Path(output_dir or self.args.output_dir)
        if step_of(folder) is not None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        beside = folder / BESIDE
        try:
            shutil.rmtree(beside, ignore_errors=True)  # a killed run's
            super()._save(str(beside), state_dict)
            take_place(beside, folder, replaces_model=not is_peft_model(self.model))
        except Exception as error:  # each library has its own
            if not is_of_the_disk(error):
                raise
            said = where(error, folder)
            shutil.rmtree(beside, ignore_errors=True)
            raise OSError(f"the model cannot be saved ({said}). {self._model_is_in(state_dict)}") from error

    def _model_is_in(self, state_dict: Any) -> str:
        """Where a model is that could not be saved, and what to do."""
        last = last_whole_checkpoint(self.args.output_dir)
        if last and Path(last).name == f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}":
            if self.args.save_only_model:
                return f"Nothing is lost: {last} has the same weights"
            return (
                f"Nothing is lost: make room, and the same run with --resume_from_checkpoint true (from Python: "
                f"resume_from_checkpoint=True) takes it from {last} and saves it, without a further step"
            )
        elsewhere = tempfile.mkdtemp(prefix="trl-margins-")
        try:
            super()._save(elsewhere, state_dict)
        except Exception as error:  # the first error is the one to show
            shutil.rmtree(elsewhere, ignore_errors=True)
            return f"No checkpoint has it, and {elsewhere} cannot be written either ({error})"
        return f"No checkpoint has it, so it is in {elsewhere}: move it from there"

    def _attributes_without_state(self) -> dict[str, dict[str, str]]:
        terms = [term for term in self.objective.terms if term not in self.objective.remembering]
        return {term.name: of_attributes(term) for term in terms}

    def _warn_of_lost_state(self) -> None:
        """Once, at the first checkpoint: what a term has remembered, and no checkpoint will."""
        for name, now in self._attributes_without_state().items():
            before = self._first_attributes.pop(name, now)
            if changed := [each for each in now if before.get(each) != now[each]]:
                logger.warning(
                    "training has changed %s of the term %r, which has no state_dict: no checkpoint has it, and a "
                    "resumed run begins with the first values. Give the term state_dict and load_state_dict",
                    *(", ".join(changed), name),
                )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._warn_of_lost_state()
        for log in self._logs:
            log.flush(self.accelerator)
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        agreed(self.accelerator, partial(self._save_remembered, folder))
        if self.args.should_save and not self.accelerator.is_main_process:  # with `save_on_each_node`
            self._save_remembered(folder)
        forget_files(self.state)
        exported = [*exported_states(self), self.control]
        check_exported(exported)
        kept = [type(each).__name__ for each in exported]
        for name in kept:  # transformers appends to a list of all earlier states, and a new name is a KeyError
            kept_of_others(self.state)[name] = [] if kept.count(name) > 1 else {}
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # each library has its own
            if not is_of_the_disk(error):
                raise
            raise self._not_written(folder, error) from error

    def _save_remembered(self, folder: Path) -> None:
        try:
            replace_links(folder, "*")
            folder.mkdir(parents=True, exist_ok=True)
            Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)  # of a cut-off run: this one is not complete yet
            if states := self._term_states():
                save_states(states, folder / TERMS_FILE)
            if decided := self._sharing.state_dict(self):
                Path(folder, SHARING_FILE).write_text(json.dumps(decided))
            Path(folder, RUN_FILE).write_text(json.dumps(self.settings, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise self._not_written(folder, error) from error

    def _not_written(self, folder: Path, error: Exception) -> OSError:
        """The error of a checkpoint that could not be written. Its half is removed: it takes the room."""
        said = where(error, folder)
        if self.args.should_save and not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        last = last_whole_checkpoint(folder.parent)
        way_on = "It was the first one"
        if last:
            resumed = "" if self.args.save_only_model else ", and resume_from_checkpoint=True takes it"
            way_on = f"{last} is complete{resumed}"
        fix = "give back the right to write there" if isinstance(error, PermissionError) else "make room"
        return OSError(f"{folder} cannot be written ({said}): {fix}. {way_on}")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the trainer state comes next, and says what must be there
        if self.args.should_save:
            record_files(Path(output_dir), self.state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._loaded_from is not None:  # else it is loaded already, and drawn from
            self._loaded_from = None
            with _loads(checkpoint, "the random state"):
                super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _loads(checkpoint, "the gradient scaler's state"):
            super()._load_scaler(checkpoint)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        with _loads(checkpoint, "the model", "its model"), _in_its_dtypes(self.model):
            if self._loads_converted:
                load_converted(self.model, checkpoint)
            else:
                super()._load_from_checkpoint(checkpoint, model)
            if is_peft_model(self.model) and (saved := adapter_tensors(checkpoint)):
                wanted = get_peft_model_state_dict(self.model, save_embedding_layers=False)
                _check_none_lost({*wanted} - saved)  # which PEFT says to nobody

    def _load_best_model(self) -> None:
        checkpoint = self.state.best_model_checkpoint
        with _loads(checkpoint, "the best model"), _in_its_dtypes(self.model):
            # transformers warns where there is no file
            if checkpoint and self._loads_converted and has_weights(checkpoint):
                load_converted(self.model, checkpoint)
            else:
                super()._load_best_model()

    @property
    def _loads_converted(self) -> bool:
        """Whether transformers' trainer, which loads tensors by the names in the file, would not find some."""
        in_own_form = self.is_fsdp_enabled or self.is_deepspeed_enabled  # with the model's names
        return not in_own_form and is_converted(self.model)

    def _load_callback_state(self) -> None:
        """transformers', which replaces callbacks by new ones, and only if it is told to. Here each goes on with what
        it had counted: a resumed run is to stop where it would have stopped.
        """
        if self.args.restore_callback_states_from_checkpoint:
            super()._load_callback_state()
            return
        callbacks = exported_states(self)
        for callback, attributes in zip(callbacks, kept_by(callbacks, self.state), strict=True):
            for name, value in attributes.items():
                try:
                    setattr(callback, name, value)
                except AttributeError:  # a property
                    logger.warning("%s does not take back its %r: it counts afresh", type(callback).__name__, name)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """transformers', of a model that has been loaded. A tensor that was not there keeps its first values.

        Raises:
            RuntimeError: there is one.
        """
        lost, model = {*load_result.missing_keys}, self.accelerator.unwrap_model(self.model)
        names = {name: id(each) for name, each in model.named_parameters(remove_duplicate=False)}
        there = {tied for name, tied in names.items() if name not in lost}
        _check_none_lost({name for name in lost if names.get(name, 0) not in {0, *there}})
        super()._issue_warnings_after_load(load_result)

    def _term_states(self) -> dict[str, Any]:
        states = {}
        for term in self.objective.remembering:
            with of_part(f"state_dict of term {term.name!r}", term):
                states[term.name] = term.state_dict()
        return states

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        is_watched = checkpoint is not None and not self.is_deepspeed_enabled
        before = [options_of(group) for group in self.optimizer.param_groups] if is_watched else []
        with _loads(checkpoint, "the optimizer and its schedule", "its train_only and adapters"):
            super()._load_optimizer_and_scheduler(checkpoint)
            loaded = [options_of(group) for group in self.optimizer.param_groups] if is_watched else []
            if is_watched:
                check_same_kind(before, loaded)
                check_goes_on(self.optimizer, self.lr_scheduler)
        self._loaded_from = checkpoint
        if checkpoint is None:
            return
        settings = settings_before(Path(checkpoint))
        if is_watched:
            began_with = options_before(loaded, settings.get("optimizer_options") or ())
            if self._made_optimizer and settings:  # compared already, but for the rates of an own create_optimizer()
                began_with = [{name: group[name] for name in group if name == "learning_rate"} for group in began_with]
            check_options(checkpoint, before, began_with)
        if (decided := Path(checkpoint, SHARING_FILE)).exists():
            with _readable(decided):
                self._sharing.load_state_dict(self, json.loads(decided.read_text()))
        if not self.objective.remembering:
            return
        if not (file := Path(checkpoint, TERMS_FILE)).exists():
            logger.warning("%s has no %s: training goes on without what it held", checkpoint, TERMS_FILE)
            return
        with _readable(file):
            states = load_states(file, self.args.device)
            for term in self.objective.remembering:
                if term.name in states:
                    with of_part(f"load_state_dict of term {term.name!r}", term):
                        term.load_state_dict(states[term.name])
                else:
                    logger.warning("%s has no state of %r, which begins anew", file, term.name)


def _check_none_lost(lost: set[str]) -> None:
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise RuntimeError(f"it has no tensor for {', '.join(sorted(lost)[:3])}{more}")


@contextmanager
def _in_its_dtypes(model: Any) -> Iterator[None]:
    """PEFT makes an adapter float32 when it loads its weights, also one that was bfloat16."""
    if not is_peft_model(model):
        yield
        return
    model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)
    try:
        yield
    finally:
        del model.load_adapter


@contextmanager
def _loads(checkpoint: str | None, what: str, fits: str | None = None) -> Iterator[None]:
    """Names the checkpoint in what a library says of a state that it cannot load, and what would fit."""
    try:
        yield
    except Exception as error:  # PyTorch has its own of pickle's
        if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        way_on = f"Resume with {fits}, from another checkpoint" if fits else "Resume from another checkpoint"
        raise ValueError(
            f"{what} of {checkpoint} cannot be loaded into this run ({reason}). {way_on}, or start with another "
            "output_dir"
        ) from error


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(
            f"{file} is not what a checkpoint has under that name ({error}): it is damaged, or another program's. "
            "Resume from another checkpoint, or without what this file held: remove it"
        ) from error
