"""Faults of a disk and of a run."""

from __future__ import annotations

import builtins
import io
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from transformers import TrainerState

from trl_margins.trainers import checkpoints
from trl_margins.trainers.whole import forget_files


def drop_digests(run: Path) -> None:
    """Makes the checkpoints of a run those of a version that noted none of its files."""
    for file in run.glob("checkpoint-*/trainer_state.json"):
        state = TrainerState.load_from_json(str(file))
        forget_files(state)
        state.save_to_json(str(file))


# The n-th operation on the files of a run


class Fault:
    """Kills this process, or lets the disk be full, at the n-th time that a file below a folder is opened for writing,
    written or moved. Later writes fail too, until the run has ended: a disk stays full.

    torch's and safetensors' own writes are no calls of Python's: they count as one that comes before them, and half of
    what they write is there.

    Args:
        folder: the run's.
        number: of the operation, from 1; 0 only counts.
        how: an errno, or `signal.SIGKILL`.
    """

    def __init__(self, folder: Path, number: int, how: int) -> None:
        self.folder, self.number, self.how, self.seen = str(folder), number, how, 0
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Fault:
        patch, original = self._patch, {"open": builtins.open, "io": io.open}
        patch.setattr(builtins, "open", self._opening(original["open"]))
        patch.setattr(io, "open", self._opening(original["io"]))  # pathlib's
        for module, name, at in ((os, "replace", 1), (os, "rename", 1), (os, "mkdir", 0), (os, "unlink", 0)):
            patch.setattr(module, name, self._calling(getattr(module, name), at))
        for module, name, at in (
            *((torch, "save", 1), (safetensors.torch, "save_file", 1), (checkpoints, "save_file", 1)),
            (transformers.modeling_utils, "safe_save_file", 1),
        ):
            patch.setattr(module, name, self._writing(getattr(module, name), at))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _is_due(self, file: object) -> bool:
        if not isinstance(file, str | os.PathLike) or not os.path.abspath(file).startswith(self.folder):
            return False
        self.seen += 1
        return self.number != 0 and self.seen >= self.number

    def _strike(self, *file: object) -> None:
        if self.how == signal.SIGKILL:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.how, os.strerror(self.how), *map(os.fspath, file))  # type: ignore[call-overload]

    def _opening(self, original: Any) -> Any:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if any(letter in mode for letter in "wax+"):
                if self._is_due(file):
                    self._strike(file)
                return _Written(original(file, mode, *args, **kwargs), self, file)
            return original(file, mode, *args, **kwargs)

        return opened

    def _calling(self, original: Any, at: int) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            is_removal = original.__name__ == "unlink" and self.how != signal.SIGKILL  # which works on a full disk
            if not is_removal and self._is_due(args[at]):
                self._strike(args[at])
            return original(*args, **kwargs)

        return called

    def _writing(self, original: Any, at: int) -> Any:
        def written(*args: Any, **kwargs: Any) -> Any:
            file = args[at]
            if not self._is_due(file):
                original(*args, **kwargs)
                return
            with tempfile.TemporaryDirectory() as elsewhere:
                whole = Path(elsewhere, "whole")
                original(*args[:at], whole, *args[at + 1 :], **kwargs)
                content = whole.read_bytes()
            half = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.write(half, content[: len(content) // 2])
            os.close(half)
            self._strike(file)

        return written


class _Written:
    """A file whose writes count."""

    def __init__(self, file: Any, fault: Fault, name: object) -> None:
        self._file, self._fault, self._name = file, fault, name

    def write(self, content: Any) -> Any:
        if self._fault._is_due(self._name):
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            self._fault._strike()  # the system's error of a write has no name
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        self._file.__enter__()
        return self

    def __exit__(self, *args: Any) -> Any:
        return self._file.__exit__(*args)

    def __iter__(self) -> Any:
        return iter(self._file)
