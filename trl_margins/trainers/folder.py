"""An output folder is one run: what is in it already, and whether a run may start or go on there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..recording.pair_log import PAIRS_FILE, RUN_FILE

logger = logging.getLogger(__name__)

CHECKPOINTS = (f"{PREFIX_CHECKPOINT_DIR}-*",)
FULL_MODEL = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER = ("adapter_config.json", "adapter_model.*")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.*", "additional_chat_templates")
# By these a folder is known to have been used. A `margin_run.json` alone is of a run that stopped before it logged.
_TELLING = (*CHECKPOINTS, *FULL_MODEL, *ADAPTER, *_TOKENIZER, PAIRS_FILE, TRAINER_STATE_NAME, TRAINING_ARGS_NAME)
_OTHERS = (
    *("config.json", "generation_config.json", "*.safetensors.index.json", "pytorch_model*.index.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("all_results.json", "train_results.json", "eval_results.json", "pair_log-*.csv"),
)
_OF_A_CARD = ("README.md", "figures")
LOCK = "_run.lock"  # uploads to the Hub leave out what begins with _

# Config fields that change nothing about what is trained
_NEUTRAL = frozenset(
    (
        *("log_pairs", "share_prompt", "nonfinite_steps", "eval_min_score_gap", "overwrite_output_dir"),
        *("dataset_num_proc", "generate_during_eval", "precompute_ref_log_probs", "precompute_ref_batch_size"),
        *("anchor_keep_graphs", "model_init_kwargs", "use_liger_kernel", "use_logits_to_keep"),
    )
)
# transformers' fields that a checkpoint's optimizer has its own values of, which take the place of new ones
_OF_THE_OPTIMIZER = (
    "learning_rate",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
_OF_THE_RUN = ("base", "reward", "weight", "margin", "trained_parameters", "adapter")
_OF_THE_ORDER = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last")  # of the rows
_OF_THE_ROWS = ("train_rows", "pairs_per_step")
_ONLY_SAID = ("version", "model", "processes")
_NOT_SAID = ("resume_from_checkpoint", "overwrite_output_dir")


# Checkpoints


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


# A folder that has been used


def files_of(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files and folders in a folder whose names match."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns))


def earlier_run(folder: str | Path) -> list[Path]:
    """What an earlier run, or another program, left in a folder."""
    return files_of(Path(folder), _TELLING)


def check_unused(folder: str | Path) -> None:
    """
    Raises:
        ValueError: a run that starts anew would leave its files among those of an earlier one.
    """
    if found := earlier_run(folder):
        raise ValueError(_used(folder, found))


def _used(folder: str | Path, found: list[Path], why: str = "") -> str:
    return (
        f"output_dir {folder} has files of an earlier run ({_names(found)}){why}: name another output_dir, set "
        "overwrite_output_dir to true, which moves them into a folder of their own there, or resume that run with "
        "resume_from_checkpoint set to true"
    )


def _names(found: list[Path]) -> str:
    shown = ", ".join(path.name for path in found[:4])
    return shown if len(found) <= 4 else f"{shown} and {len(found) - 4} more"


def why_mixed(trainer: Any, found: list[Path]) -> str | None:
    """Why a run of this trainer would leave a folder that is partly an earlier run's, after these files of it."""
    folder = Path(trainer.args.output_dir)
    is_adapter = hasattr(trainer.model, "peft_config")
    last = last_whole_checkpoint(folder) if trainer.args.save_strategy != "no" else None
    if last and not _is_the_same(trainer, Path(last)):
        return "its checkpoints would be beside this run's, which has other settings"
    full, adapter = files_of(folder, FULL_MODEL), files_of(folder, ADAPTER)
    if adapter and not is_adapter:
        return "its adapter would be loaded instead of the trained model"
    if full and is_adapter:
        return "its model would be beside the trained adapter"
    if (full or adapter) and settings_of(folder).get("model") != trainer.model.config.name_or_path:
        return "files of its model that this one does not have would stay"
    if files_of(folder, ("chat_template.*",)) and not getattr(trainer.processing_class, "chat_template", None):
        return "its chat template would be loaded with the trained model, which has none"
    return None


def _is_the_same(trainer: Any, checkpoint: Path) -> bool:
    """Whether an earlier run had the settings of this one, whose checkpoints then take the place of its own."""
    before, now = settings_of(checkpoint), trainer.settings
    which = ("max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit")
    old = before.get("config", {})
    same = all(name in old and old[name] == now["config"][name] for name in which)
    return same and not differences(before, now, trainer.args)[0]


def check_may_start(trainer: Any) -> None:
    """Checks, before a run that starts anew, what its folder has; moves it with `overwrite_output_dir`.

    Files that are replaced one by one do no harm, which notebooks and tests rely on: that is a warning.

    Raises:
        ValueError: the folder would be partly an earlier run's.
    """
    folder = Path(trainer.args.output_dir)
    found = earlier_run(folder)
    if not found:
        return
    if trainer.options.overwrite_output_dir:
        _check_outside(trainer, folder)
        move_aside(folder)
    elif reason := why_mixed(trainer, found):
        raise ValueError(_used(folder, found, f", and {reason}"))
    else:
        logger.warning(
            "output_dir %s has files of an earlier run (%s), which this run replaces. overwrite_output_dir=True keeps "
            "them in a folder of their own",
            *(folder, _names(found)),
        )


def _check_outside(trainer: Any, folder: Path) -> None:
    configs = getattr(trainer.model, "peft_config", {}).values()
    names = [trainer.model.config.name_or_path, *(config.base_model_name_or_path for config in configs)]
    for name in filter(None, names):
        if Path(name).is_dir() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"the model {name} is in output_dir {folder}, whose files overwrite_output_dir would move: name "
                "another output_dir"
            )


def move_aside(folder: Path) -> Path:
    """Moves an earlier run's files into the first free `_previous-N` of their folder."""
    number = 1
    while (aside := folder / f"_previous-{number}").exists():
        number += 1
    of_a_card = _OF_A_CARD if (folder / RUN_FILE).exists() else ()
    found = files_of(folder, (*_TELLING, *_OTHERS, *of_a_card, RUN_FILE))
    aside.mkdir()
    for path in found:
        shutil.move(path, aside / path.name)
    logger.warning("overwrite_output_dir: the files of an earlier run are now in %s", aside)
    return aside


# Two runs at once


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other runs out of a folder. The lock is the system's: that of a killed process is gone.

    Raises:
        ValueError: a run is going on there.
    """
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
    try:
        found = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
    before = settings_of(checkpoint) or settings_of(checkpoint.parent)
    wrong, others = differences(before, now, config)
    if wrong:
        raise ValueError(
            f"{checkpoint} is of a run with other settings: {'; '.join(wrong)}. {_anew(checkpoint)}. All its settings "
            f"are in {RUN_FILE}"
        )
    if others:
        logger.info("resuming %s with other settings: %s", checkpoint, "; ".join(others))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], config: Any) -> tuple[list[str], list[str]]:
    """Settings that differ, as "beta 0.1 → 0.2": those that a resumed run must share, and the others."""
    transformers = {field.name for field in fields(TrainingArguments)}
    free_order = config.ignore_data_skip  # the rows that were trained on are not looked for
    strict = {*_OF_THE_OPTIMIZER, *_OF_THE_RUN, *(() if free_order else (*_OF_THE_ORDER, *_OF_THE_ROWS))}
    if config.auto_find_batch_size:
        strict.discard("pairs_per_step")
    wrong: list[str] = []
    others: list[str] = []
    for name, old, new in _pairs(before, now):
        if old == new or name in _NOT_SAID:
            continue
        is_ours = name not in transformers and name in now["config"] and name not in _NEUTRAL
        (wrong if name in strict or is_ours else others).append(f"{name} {old} → {new}")
    return list(dict.fromkeys(wrong)), list(dict.fromkeys(others))


def _pairs(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The settings that both have."""
    for names, old, new in (
        ((*_OF_THE_RUN, *_OF_THE_ROWS, *_ONLY_SAID), before, now),
        (now["config"], before.get("config", {}), now["config"]),
    ):
        yield from ((name, old[name], new[name]) for name in names if name in old)
