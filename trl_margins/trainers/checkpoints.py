"""What a run leaves in its folder: its settings, and in each checkpoint the states of terms and probes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import __version__
from .base import MarginTrainer
from .step_size import pairs_per_step

logger = logging.getLogger(__name__)

TERMS_FILE = "margin_terms.safetensors"
SHARING_FILE = "shared_prompts.json"
_PLAIN = "plain"


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
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{term}/{name}"] = value.detach().clone(memory_format=torch.contiguous_format)
                continue
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"the state {name!r} of term {term!r} is a {type(value).__name__}: a checkpoint holds tensors, "
                    "and numbers, strings, None, lists and dicts of these"
                ) from error
            plain[term][name] = value
    save_file(tensors, file, metadata={_PLAIN: json.dumps(plain)})


def load_states(file: Path, device: torch.device) -> dict[str, dict[str, Any]]:
    """What `save_states` wrote."""
    with safe_open(file, "pt", device=str(device)) as saved:
        states: dict[str, dict[str, Any]] = json.loads(saved.metadata()[_PLAIN])
        for key in saved.keys():  # noqa: SIM118 - it is not a mapping
            term, name = key.split("/", 1)
            states[term][name] = saved.get_tensor(key)
    return states


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint; incomplete ones are named in the log."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if is_whole(path):
            return str(path)
        logger.warning("%s is incomplete: it is left out", path)
    return None


def is_whole(checkpoint: str | Path) -> bool:
    """Whether its trainer state, which is written last, can be read."""
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def run_settings(trainer: MarginTrainer) -> dict[str, Any]:
    """A run's settings, for `margin_run.json`."""
    method, objective, rows = trainer.options.method, trainer.objective, trainer.train_dataset
    return {
        "version": __version__,
        "method": method and method.id,
        "name": method.name if method else type(trainer).__name__,
        "base": trainer._config_class._base,
        "trainer": type(trainer).__name__,
        "model": trainer.model.config.name_or_path,
        "weight": ", ".join(term.name for term in objective.weights) or None,
        "margin": ", ".join(term.name for term in objective.margins) or None,
        "term_options": [*trainer.options.term_options("weight"), *trainer.options.term_options("margin")],
        "train_rows": len(rows) if hasattr(rows, "__len__") else None,
        "pairs_per_step": pairs_per_step(trainer),
        "config": json.loads(trainer.args.to_json_string()),
    }


class CheckpointMixin(MarginTrainer):
    """Saves what terms and probes remember in every checkpoint, and resumes from complete ones only."""

    _rng_state_of: str | None = None  # a checkpoint whose random state is still to be loaded

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's; `True` takes the newest complete checkpoint.

        Raises:
            ValueError: the checkpoint that is named is incomplete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir) or True
        elif resume_from_checkpoint and not is_whole(resume_from_checkpoint):
            others = last_whole_checkpoint(Path(resume_from_checkpoint).parent)
            raise ValueError(
                f"{resume_from_checkpoint} is not a complete checkpoint: its {TRAINER_STATE_NAME} is missing or cut "
                "off. " + (f"The last complete one beside it is {others}" if others else "There is none beside it")
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._pair_log is not None:
            self._pair_log.flush(self.accelerator)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            try:
                self._save_remembered(folder)
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"{folder} cannot be written ({error}): make room. Checkpoints before it are complete, and "
                    "resume_from_checkpoint=True takes the last of them"
                ) from error
        super()._save_checkpoint(model, trial)

    def _save_remembered(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an earlier run: this one is not complete yet
        if states := self._term_states():
            save_states(states, folder / TERMS_FILE)
        if timed := self._sharing.state_dict():
            Path(folder, SHARING_FILE).write_text(json.dumps(timed))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the trainer state comes next, and says that all of it is there

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._rng_state_of is not None:  # else it is loaded already, and drawn from
            self._rng_state_of = None
            super()._load_rng_state(checkpoint)

    def _term_states(self) -> dict[str, Any]:
        return {term.name: term.state_dict() for term in self.objective.remembering}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} is of a run that trained other parameters ({error}): resume with its train_only and "
                "adapters, or start with another output_dir"
            ) from error
        self._rng_state_of = checkpoint
        if checkpoint is None:
            return
        if (timed := Path(checkpoint, SHARING_FILE)).exists():
            with _readable(timed):
                self._sharing.load_state_dict(self, json.loads(timed.read_text()))
        if not self.objective.remembering:
            return
        if not (file := Path(checkpoint, TERMS_FILE)).exists():
            logger.warning("%s has no %s: training goes on without what it held", checkpoint, TERMS_FILE)
            return
        with _readable(file):
            states = load_states(file, self.args.device)
            for term in self.objective.remembering:
                if term.name in states:
                    term.load_state_dict(states[term.name])


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not what a checkpoint has under that name ({error}): it is damaged, or another program's. "
            "Resume from another checkpoint, or without what this file held: remove it"
        ) from error
