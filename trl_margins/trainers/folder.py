"""An output folder is one run: what is in it already, and whether a run may start or go on there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from operator import itemgetter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..probes.diagnostics import ANCHORS_FILE
from ..recording.pair_log import PAIRS_FILE, RUN_FILE
from ..report.card import MADE_BY_A_RUN
from ..rows.messages import is_list_of
from .whole import damage_of, fault_of, is_whole, step_of

logger = logging.getLogger(__name__)

FULL_MODEL = ("model*.safetensors", "pytorch_model*.bin")
_INDEX = ("*.safetensors.index.json", "pytorch_model*.index.json")
ADAPTER = ("adapter_config.json", "adapter_model.*")
_CHECKPOINTS = f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"  # checkpoint-last is a link that somebody else has made
# By these a folder is known to have been used. A `margin_run.json` alone is of a run that stopped before it logged.
_TELLING = (
    *(_CHECKPOINTS, PAIRS_FILE, TRAINER_STATE_NAME, TRAINING_ARGS_NAME),
    *(*FULL_MODEL, *ADAPTER),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.*", "additional_chat_templates"),
)
# What a model is loaded with: such a file of another one would be read with those that a run saves
_BESIDE_WEIGHTS = (
    *(CONFIG_NAME, GENERATION_CONFIG_NAME, *_INDEX),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
_OTHERS = (
    *(RUN_FILE, *_BESIDE_WEIGHTS),
    *("all_results.json", "train_results.json", "eval_results.json", "pair_log-*.csv"),
    *(ANCHORS_FILE, "anchor_diagnostics-*.csv"),
)
CARD, FIGURES = "README.md", "figures"
BESIDE = "_saving"  # where the model is until all of it is written
LOCK = "_run.lock"  # uploads to the Hub leave out what begins with _
# into a run's folder, by whomever
_WRITTEN = (*_TELLING, *_OTHERS, CARD, FIGURES, LOCK, BESIDE, "pair_log.tmp", "runs")

# those of them that are folders. A card or a picture that cannot be written ends no run
_FOLDERS = (_CHECKPOINTS, "additional_chat_templates", BESIDE)
_NOT_NEEDED = (CARD, FIGURES, "runs")

_ORDER = (  # of the rows
    *("train_rows", "rows", "columns", "pairs_per_step", "seed", "data_seed"),
    *("train_sampling_strategy", "dataloader_drop_last", "sampling"),
)
_OF_OPTIMIZER = (  # that the trainer makes
    *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    "learning_rate",
)
_OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
# What a resumed run shares with its checkpoint, beside the options of its reward and terms. What is not here can be
# changed; what differs is named.
_SHARED = (
    *("base", "reference", "fixed_weights", "reward", "weight", "margin", "parts"),
    *("optimizer", "optimizer_arguments", "optimizer_class", "schedule", "schedule_arguments"),
    *("trained_parameters", "model_config", "reference_config", "train_only", "adapter"),
    *("loss_type", "loss_weights", "beta", "gamma", "simpo_gamma", "label_smoothing", "discopop_tau", "cpo_alpha"),
    *("use_weighting", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "router_aux_loss_coef"),
    *("ld_alpha", "disable_dropout", "neftune_noise_alpha", "sam_radius"),
    *("score_columns", "prompt_column", "system_column"),
    *("max_length", "max_completion_length", "truncation_mode", "tokenization"),
    *_OF_OPTIMIZER,
    *_OF_SCHEDULE,
    "max_grad_norm",
    *_ORDER,
)
# settings that are dicts, of which what differs is said, and how each entry is named
_SAID_BY_PART = {
    "columns": "columns ",
    "parts": "",
    "objects": "what is in ",  # which training may have changed
    "sampling": "",
    "model_config": "the model's ",
    "reference_config": "the reference model's ",
    "optimizer_arguments": "the optimizer's ",
    "schedule_arguments": "the schedule's ",
}
_NOTHING: tuple[Any, ...] = (None, "", [], {})
_NOT_SAID = (
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "config",
    "term_options",
    "reward_options",
    "optimizer_options",  # compared where the optimizer is loaded
)


def make_folder(config: Any) -> None:
    """Makes the output folder, as transformers would later.

    Raises:
        OSError: something else has its name, or it cannot be made.
    """
    try:
        if config.should_save:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"output_dir {config.output_dir} cannot be made ({error.strerror or error}): name another folder"
        ) from error


# Checkpoints


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint; incomplete ones are named in the log."""
    return next(whole_checkpoints(folder), None)


def whole_checkpoints(folder: str | Path) -> Iterator[str]:
    """The complete checkpoints, the newest first; incomplete ones are named in the log."""
    for path in reversed(_checkpoints(Path(folder))):
        if (fault := fault_of(path)) is None:
            yield str(path)
        else:
            logger.warning("%s is incomplete (%s): it is left out", path, fault)


def _checkpoints(folder: Path) -> dict[Path, int]:
    """Its checkpoints with their steps, the oldest first."""
    found = {path: step for path in folder.glob(_CHECKPOINTS) if (step := step_of(path)) is not None}
    return dict(sorted(found.items(), key=itemgetter(1)))


def checkpoint_to_resume(folder: str | Path, resume: Any) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; None without one.

    Args:
        folder: the run's output folder, of which `True` takes the newest complete checkpoint.

    Raises:
        ValueError: it is not complete, or there is none that is.
    """
    if not resume:
        return None
    if resume is True:
        if found := last_whole_checkpoint(folder):
            return Path(found)
        faults = "; ".join(f"{path.name}: {fault_of(path)}" for path in _checkpoints(Path(folder)))
        raise ValueError(
            f"output_dir {folder} has no complete checkpoint to resume from{f' ({faults})' if faults else ''}: leave "
            "resume_from_checkpoint out (with --overwrite_output_dir true if it has files of an earlier run)"
        )
    if not isinstance(resume, str | os.PathLike) or not isinstance(os.fspath(resume), str):
        raise ValueError(
            f"resume_from_checkpoint must be True or the path of a checkpoint; it is {resume!r}. "
            f"{_in(Path(folder)) or 'There is no complete one in output_dir: leave it out'}"
        )
    checkpoint = Path(resume)
    if not checkpoint.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {resume}. {_beside(checkpoint, Path(folder))}")
    if fault := fault_of(checkpoint):
        raise ValueError(f"{resume} is not a complete checkpoint: {fault}. {_beside(checkpoint, Path(folder))}")
    return checkpoint


def _beside(checkpoint: Path, folder: Path) -> str:
    """The complete checkpoint that there is: in that folder, beside it, or else in the run's."""
    if _checkpoints(checkpoint) and (inside := last_whole_checkpoint(checkpoint)):
        return f"It is the folder of a run: resume from the last complete checkpoint in it, {inside}"
    if other := last_whole_checkpoint(checkpoint.parent):
        return f"Resume from the last complete one beside it, {other}"
    elsewhere = _in(folder) if folder.resolve() != checkpoint.parent.resolve() else ""
    return elsewhere or "There is no complete one beside it: start the run again, without resume_from_checkpoint"


def _in(folder: Path) -> str:
    found = last_whole_checkpoint(folder)
    return (
        f"The last complete one in output_dir is {found}: name it, or set resume_from_checkpoint to true"
        if found
        else ""
    )


def _json_of(file: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where there is none, or something else."""
    try:
        found = {} if _is_pipe(file) else json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# A folder that has been used


def earlier_run(folder: str | Path) -> list[Path]:
    """What an earlier run, or another program, left in a folder."""
    return _matching(Path(folder), _TELLING)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns))


def check_unused(folder: str | Path) -> None:
    """
    Raises:
        ValueError: there are files of an earlier run.
    """
    if found := earlier_run(folder):
        shown = ", ".join(path.name for path in found[:4])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise ValueError(
            f"output_dir {folder} has files of an earlier run ({shown}{more}): name another output_dir, set "
            "overwrite_output_dir to true, which moves them into a folder of their own there, or resume that run with "
            "resume_from_checkpoint set to true"
        )


def check_stays(folder: Path, names: list[str]) -> None:
    """
    Raises:
        ValueError: a run that moves an earlier one out of its way would move a file that it reads.
    """
    moved = [path.resolve() for path in _of_earlier_run(folder)]
    for name in names:
        if any(Path(name).resolve().is_relative_to(path) for path in moved):
            raise ValueError(
                f"{name} is in output_dir {folder}, among the files that would be moved to make room: name another "
                "output_dir, or move it out of there"
            )


def _is_no_file(path: Path) -> bool:
    return path.is_dir() and path.suffix in (".json", ".safetensors", ".bin", ".pt", ".pth")


def _of_earlier_run(folder: Path) -> list[Path]:
    """All that `make_room` moves, among it files that a user has written and a run would write over."""
    of_a_run = (*_TELLING, *_OTHERS) if earlier_run(folder) else _BESIDE_WEIGHTS
    found = _matching(folder, (*of_a_run, CARD, FIGURES))
    return [path for path in found if path.name != CARD or path.is_file()]


def make_room(trainer: Any, folder: Path, after: int | None = None) -> None:
    """Moves out of a run's way what an earlier one left in its folder.

    Args:
        trainer: the run's.
        folder: its output folder.
        after: the step of the checkpoint there that is resumed. Then later checkpoints alone are moved, which would
            be taken for this run's, and a README.md that is not a model card.

    Raises:
        ValueError: the trained model is among it.
    """
    if after is not None:
        later = [path for path, step in sorted(_checkpoints(folder).items()) if step > after]
        # a damaged one is written over, unless folders have the names of its files
        found = [path for path in later if is_whole(path) or any(map(_is_no_file, path.iterdir()))]
        if (card := folder / CARD).is_file() and MADE_BY_A_RUN not in card.read_text(errors="replace"):
            found.append(card)
    elif found := _of_earlier_run(folder):
        _check_outside(trainer, folder, found)
    if found:
        _move_aside(folder, found)


def make_room_for_model(folder: Path, is_adapter: bool) -> None:
    """Moves an adapter out of the way of a whole model, and warns of a whole model beside an adapter."""
    if not is_adapter and (found := _matching(folder, ADAPTER)):
        _move_aside(folder, found)
    elif is_adapter and _matching(folder, FULL_MODEL):
        logger.warning("%s has a whole model: beside it, the adapter that is saved is what will be loaded", folder)


def holds_model(folder: str | Path) -> bool:
    """Whether a run has saved its model there, and its files are whole. `training_args.bin` is moved there last."""
    weights = weight_files(folder)
    return Path(folder, TRAINING_ARGS_NAME).exists() and bool(weights) and not any(map(damage_of, weights))


def weight_files(folder: str | Path) -> list[Path]:
    """The files of a model's or an adapter's weights; none of a Hub id."""
    return _matching(Path(folder), (*FULL_MODEL, *ADAPTER, *_INDEX))


def take_place(written: Path, folder: Path, replaces_model: bool) -> None:
    """Moves a model that has been written into its folder, and removes what an earlier whole model has more there.

    `training_args.bin` is moved last: it says that the model is there.
    """
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
    if replaces_model:
        for path in _matching(folder, (*FULL_MODEL, *_INDEX)):
            if not (written / path.name).exists():
                path.unlink()
    if (folder / CARD).exists():
        (written / CARD).unlink(missing_ok=True)  # PEFT's, which knows less
    for path in sorted(written.iterdir(), key=lambda path: path.name == TRAINING_ARGS_NAME):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    written.rmdir()


def _check_outside(trainer: Any, folder: Path, found: list[Path]) -> None:
    configs = getattr(trainer.model, "peft_config", {}).values()
    names = [trainer.model.config.name_or_path, *(config.base_model_name_or_path for config in configs)]
    for name in filter(None, names):
        model = Path(name).resolve()
        if model.is_dir() and (
            model == folder.resolve() or any(model.is_relative_to(each.resolve()) for each in found)
        ):
            raise ValueError(
                f"the model {name} is in output_dir {folder}, whose files would be moved to make room: name another "
                "output_dir"
            )


def _move_aside(folder: Path, found: list[Path]) -> None:
    """Moves files into the first free `_previous-N` of their folder."""
    of_a_run = not {*earlier_run(folder)}.isdisjoint(found)
    whose = "files of an earlier run" if of_a_run else "files of the names that a run writes"
    number = 1
    while os.path.lexists(aside := folder / f"_previous-{number}"):
        number += 1
    aside.mkdir()
    for path in found:
        shutil.move(path, aside / path.name)
    names = ", ".join(path.name for path in found)
    logger.warning("output_dir %s has %s: %s are now in %s", folder, whose, names, aside)


# Links, which would lead what is written out of the folder; the folder itself may be one


def check_links(folder: Path, *patterns: str, after: int = -1) -> None:
    """
    Args:
        patterns: names to look at; by default all that a run writes.
        after: the step of the checkpoint that is resumed. It and those before it are only read.

    Raises:
        ValueError: one of these is a link, a pipe, which would be waited for, or a folder in the place of a file.
    """
    for path in _matching(folder, patterns or _WRITTEN):
        if _is_pipe(path):
            raise ValueError(f"{path} is a pipe, not a file: remove it, or name another output_dir")
        if path.is_symlink() or path.name in _NOT_NEEDED:
            continue
        if path.is_dir() != (takes_folder := any(fnmatch(path.name, pattern) for pattern in _FOLDERS)):
            kinds = ("a file", "a folder") if takes_folder else ("a folder", "a file")
            raise ValueError(
                f"{path} is {kinds[0]}, and the run would make {kinds[1]} of that name: move it, or name another "
                "output_dir"
            )
    steps = _checkpoints(folder)
    for path in _links(folder, patterns or _WRITTEN):
        if path not in steps or steps[path] > after:
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, and the run would write there: remove the link, or name "
                "another output_dir"
            )


def replace_links(folder: Path, *patterns: str) -> None:
    """Removes links that came after the run began, which would be written through, and pipes, which would be waited
    for. What they lead to is left as it is.

    Args:
        patterns: names to look at; by default all that a run writes, but for its earlier checkpoints. With "*" it is a
            folder of the run's own.
    """
    own = [folder] if patterns == ("*",) and folder.is_symlink() else []
    kept = _checkpoints(folder)
    for path in own or [each for each in _links(folder, patterns or _WRITTEN) if each not in kept]:
        logger.warning("%s was a link to %s: the run's own takes its place", path, os.readlink(path))
        path.unlink()
    for path in filter(_is_pipe, _matching(folder, patterns or _WRITTEN)):
        logger.warning("%s was a pipe: the run's own takes its place", path)
        path.unlink()


def _is_pipe(path: Path) -> bool:
    return path.is_fifo() or path.is_socket()


def _links(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    # nothing is lost in a device
    return [path for path in _matching(folder, patterns) if path.is_symlink() and not path.is_char_device()]


# Two runs at once


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other runs out of a folder. The lock is the system's: that of a killed process is gone.

    Raises:
        ValueError: a run is going on there, or the lock is a link.
    """
    check_links(Path(folder), LOCK)
    file = Path(folder, LOCK)
    lock = FileLock(file, timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another run is training in output_dir {folder} at this moment: name another output_dir, or wait"
        ) from None
    except (OSError, NotImplementedError) as error:  # a file system that has no locks, or is full or read-only
        logger.warning("%s cannot be locked (%s): start no other run there", folder, error)
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()


# A run that is resumed


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings in a folder's `margin_run.json`; empty without one."""
    return _json_of(folder / RUN_FILE)


def settings_before(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint is of; empty for one of another trainer."""
    return settings_of(checkpoint) or settings_of(checkpoint.parent)


def check_states(checkpoint: Path) -> None:
    """
    Raises:
        ValueError: no state of the optimizer or the scheduler, which transformers would start afresh.
    """
    names = [path.name for path in checkpoint.iterdir()]
    is_deepspeed = any(name.startswith("global_step") for name in names)
    missing = []
    if not is_deepspeed and not any(name.startswith("optimizer") or "-optimizer." in name for name in names):
        missing.append("optimizer.pt")
    if not is_deepspeed and SCHEDULER_NAME not in names:
        missing.append(SCHEDULER_NAME)
    if missing:
        raise ValueError(
            f"{checkpoint} has no {' and no '.join(missing)}, as with save_only_model: training would go on with "
            f"others. {_anew(checkpoint)}"
        )
    if not any(name.startswith("rng_state") for name in names):
        logger.warning("%s has no rng_state.pth: dropout and sampling draw other numbers than they would", checkpoint)


def _anew(checkpoint: Path) -> str:
    return (
        f"Resume from a checkpoint that fits, or start a new run from these weights, in another output_dir: with "
        f"--model_name_or_path {checkpoint} (from Python: as the model)"
    )


def check_same_run(checkpoint: Path, now: Mapping[str, Any], config: Any) -> None:
    """Compares a run's settings with those of the checkpoint from which it is resumed, and logs harmless differences.

    Raises:
        ValueError: the objective, the optimizer's settings, the trained parameters or the order of the rows differ.
    """
    before = settings_before(checkpoint)
    if not before:
        logger.warning(
            "%s has no %s, as of another trainer: that it was trained with this run's objective and schedule, on the "
            "same rows, is not checked",
            *(checkpoint, RUN_FILE),
        )
    wrong, others = differences(before, now, config)
    if wrong:
        raise ValueError(
            f"{checkpoint} is of a run with other settings: {'; '.join(wrong)}. {_anew(checkpoint)}. All its settings "
            f"are in {RUN_FILE}"
        )
    if now.get("train_rows", 0) is None:
        logger.warning(
            "the training set is a stream: that it gives the rows of %s again, in their order, is not checked",
            checkpoint,
        )
    if getattr(config, "sync_ref_model", False):
        logger.warning(
            "sync_ref_model: %s does not have the reference model that had followed the model, which begins again",
            checkpoint,
        )
    if others:
        logger.warning("resuming %s with other settings: %s", checkpoint, "; ".join(others))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], config: Any) -> tuple[list[str], list[str]]:
    """Settings that differ, as "beta 0.1 → 0.2": those that a resumed run must share, and the others."""
    shared = {*_SHARED, *now["term_options"], *now["reward_options"]} - {"anchor_keep_graphs", "anchor_diagnostics"}
    if now["config"].get("sam_radius"):
        shared.add("anchor_scope")
    if now["adapter"]:  # of which the checkpoint has not the base
        shared.add("model")
    if now.get("optimizer"):  # made in a script, and compared with what it was made with
        shared -= {*_OF_OPTIMIZER}
    if now.get("schedule"):
        shared -= {*_OF_SCHEDULE}
    if config.ignore_data_skip:  # the rows that were trained on are not looked for
        shared -= {*_ORDER}
    if config.auto_find_batch_size:
        shared.discard("pairs_per_step")
    if "discopop" not in str(now.get("loss_type")):
        shared.discard("discopop_tau")
    wrong: list[str] = []
    others: list[str] = []
    seen = {*_NOT_SAID, *(("rows",) if before.get("columns") and now.get("columns") else ())}  # which holds less
    for old, new in ((before, now), (before.get("config", {}), now["config"])):
        for name in [name for name in new if name in old and name not in seen]:
            seen.add(name)
            if name in _SAID_BY_PART and isinstance(old[name], dict) and isinstance(new[name], dict):
                names = {**old[name], **new[name]}
                if name in ("model_config", "reference_config"):  # another version of transformers has other names
                    names = {each: value for each, value in old[name].items() if each in new[name]}
                changed = [each for each in names if old[name].get(each) != new[name].get(each)]
                what = _SAID_BY_PART[name]
                said = [f"{what}{each} {old[name].get(each)} → {new[name].get(each)}" for each in changed]
                (wrong if name in shared else others).extend(said)
                continue
            same = _meaning(name, old[name]) == _meaning(name, new[name])
            if name == "fixed_weights":  # not looked at everywhere
                same = same or None in (old[name], new[name])
            if name in ("model", "reference") and None not in (old[name], new[name]):
                same = Path(old[name]).name == Path(new[name]).name  # folders move
            if not same:
                (wrong if name in shared else others).append(f"{name} {old[name]} → {new[name]}")
    return wrong, others


def _meaning(name: str, value: Any) -> Any:
    """A setting as it is compared: equal where it is only written in another way."""
    if value in _NOTHING:
        return None
    if name == "optim_args":
        options = (part.partition("=") for part in str(value).replace(" ", "").split(","))
        return {option: _number(text) for option, _, text in options}
    if name == "train_only" and isinstance(value, list):
        return {*value}
    if name == "adapter" and isinstance(value, Mapping):  # its lists of names are sets
        return {each: {*of} if is_list_of(of, str) else of for each, of in value.items() if of not in _NOTHING}
    return value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
