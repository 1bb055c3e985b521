"""Whether a checkpoint is whole: everything that was saved is there, as it was saved.

`trainer_state.json` is written last. It holds a digest of every other file, so that a file that is missing, cut off or
of another run is named before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..report.run_folder import is_history

logger = logging.getLogger(__name__)

_NAME = "CheckpointFiles"  # among trainer_state.json's `stateful_callbacks`, where transformers keeps what others add
_SAMPLES, _BLOCK = 256, 4096  # of a large file, whose every byte would take as long as saving it
_MEGABYTE = 2**20

# What no resumed run reads. Whoever has edited it is told, and goes on
_NOT_READ = (
    *("README.md", TRAINING_ARGS_NAME, "generation_config.json", "*processor_config.json"),
    *("*token*", "*.jinja", "additional_chat_templates/*", "vocab.json", "merges.txt", "spiece.model"),
)


def record_files(folder: Path, state: TrainerState) -> None:
    """Notes digests of a checkpoint's files in the trainer state that is about to be saved, with them on the disk."""
    files = {name: path for name, path in _files(folder) if name != TRAINER_STATE_NAME}
    for path in files.values():
        if path.stat().st_size >= _MEGABYTE:  # a network's file system may only now find that there is no room
            with path.open("rb") as written:
                os.fsync(written.fileno())
    digests = {name: _digest(path) for name, path in files.items()}
    kept_of_others(state)[_NAME] = {"args": {}, "attributes": {"files": digests}}


def forget_files(state: TrainerState) -> None:
    """Drops the digests of an earlier checkpoint."""
    kept_of_others(state).pop(_NAME, None)


def kept_of_others(state: TrainerState) -> dict[str, Any]:
    """What callbacks keep in a trainer state; transformers' declaration has the callbacks themselves."""
    kept: Any = state.stateful_callbacks
    return kept


def kept_by(callbacks: Sequence[Any], state: TrainerState) -> list[dict[str, Any]]:
    """What each of the callbacks had counted, as a checkpoint has it under the name of its class."""
    names, found = [type(each).__name__ for each in callbacks], []
    for i, name in enumerate(names):
        kept = kept_of_others(state).get(name, {})
        n = names.count(name)
        of_class = (kept if isinstance(kept, list) else [kept])[-n:]  # transformers puts every save's behind the last
        place = names[:i].count(name)
        found.append(of_class[place].get("attributes", {}) if place < len(of_class) else {})
    return found


def check_exported(callbacks: Sequence[Any]) -> None:
    """Warns of keys that a checkpoint gives back as text.

    Raises:
        TypeError: a callback's state that a checkpoint cannot hold.
    """
    for callback in callbacks:
        state, name = callback.state(), type(callback).__name__
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the state of the callback {name} cannot be saved ({error}): a checkpoint holds numbers, strings, "
                "None, and lists and dicts of these"
            ) from error
        if _has_other_keys(state):
            logger.warning("the state of the callback %s has keys that come back from a checkpoint as text", name)


def _has_other_keys(value: Any) -> bool:
    """Whether any key is not text, at any depth."""
    if isinstance(value, dict):
        return any(not isinstance(key, str) or _has_other_keys(inner) for key, inner in value.items())
    return isinstance(value, list | tuple) and any(map(_has_other_keys, value))


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a run can go on from it."""
    return fault_of(checkpoint) is None


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None if it is no checkpoint's."""
    named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name, re.ASCII)
    return int(named[1]) if named else None


def fault_of(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None if nothing is."""
    folder = Path(checkpoint)
    if (folder / TRAINER_STATE_NAME).exists() and not (folder / TRAINER_STATE_NAME).is_file():
        return f"its {TRAINER_STATE_NAME} is no file"
    try:
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    except FileNotFoundError:
        return f"its {TRAINER_STATE_NAME}, which is written last, is missing"
    except TypeError as error:
        return f"its {TRAINER_STATE_NAME} is no trainer state of this version of transformers ({error})"
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"its {TRAINER_STATE_NAME}, which is written last, is cut off or no trainer state"
    if not isinstance(state.global_step, int) or not state.global_step:
        return f"its {TRAINER_STATE_NAME} has {state.global_step!r} as global_step"
    if not is_history(state.log_history):
        return f"its {TRAINER_STATE_NAME} has a log_history that is no list of what was logged"
    if step_of(folder.absolute()) not in (None, state.global_step):
        return f"its {TRAINER_STATE_NAME} is of step {state.global_step}: give the folder its name again"
    try:
        saved = _saved(state)
        sizes = {name: int(digest.split(" ")[0]) for name, digest in saved.items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return f"its {TRAINER_STATE_NAME} is damaged where it names the other files"
    found = dict(_files(folder))
    if missing := [name for name in saved if name not in found and _is_read(name)]:
        return f"{_named(missing)} missing, which its {TRAINER_STATE_NAME} names"
    for name, path in found.items():
        # where digests were noted, other files are somebody's own
        if not saved and _is_read(name) and (damage := damage_of(path)):
            return f"its {name} {damage}"
    others = [name for name, digest in saved.items() if name in found and _digest(found[name]) != digest]
    if changed := [name for name in others if _is_read(name)]:
        before, now = sizes[changed[0]], found[changed[0]].stat().st_size
        other = f" ({now} bytes instead of {before})" if len(changed) == 1 and now != before else ""
        return f"{_named(changed)} not what was saved with its {TRAINER_STATE_NAME}{other}"
    if others:
        logger.warning("%s has other files than were saved: %s. No resumed run reads them", folder, ", ".join(others))
    return None


def _saved(state: TrainerState) -> dict[str, str]:
    """Digests by file; empty for a checkpoint of an earlier version, or of another trainer."""
    noted = kept_of_others(state).get(_NAME)
    return {} if noted is None else dict(noted["attributes"]["files"])


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _is_read(name: str) -> bool:
    return not any(fnmatch(name, pattern) for pattern in _NOT_READ)


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"its {shown} {'is' if len(names) == 1 else 'are'}"


def _digest(file: Path) -> str:
    """Size and digest: of all of a small file, of blocks all over a large one."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        if size <= _SAMPLES * _BLOCK:
            digest.update(opened.read())
        else:
            for i in range(_SAMPLES):
                opened.seek(i * (size - _BLOCK) // (_SAMPLES - 1))
                digest.update(opened.read(_BLOCK))
    return f"{size} {digest.hexdigest()[:16]}"


def damage_of(file: Path) -> str | None:
    """What can be seen of a file without its digest."""
    if not file.stat().st_size:
        return "is empty"
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # which compares the header with the file's length
                pass
        elif file.name.endswith(".index.json"):
            return _damage_of_shards(file, json.loads(file.read_text())["weight_map"])
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
            return "is cut off, or no file of torch.save"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({error})"
    return None


def _damage_of_shards(index: Path, shards: Mapping[str, str]) -> str | None:
    """What is missing of the files that an index names; `shards`: tensor → file."""
    for name in sorted({*shards.values()}):
        if not (file := index.parent / name).is_file():
            return f"names {name}, which is missing"
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as saved:
                lost = {tensor for tensor, place in shards.items() if place == name} - {*saved.keys()}
            if lost:
                return f"names {min(lost)}, which {name} does not have"
    return None
