"""A disk without room: which file could not be written, and what is free there."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_OF_LIBRARIES = re.compile(
    r"os error (?:28|122|30|5)\b|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos"
)  # those that write themselves: safetensors, torch


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a disk has no room, or takes no more."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    return _OF_LIBRARIES.search(str(error)) is not None


def where(error: BaseException, folder: Path) -> str:
    """The file that an error is about, the reason, and the room that is left: "FILE: No space left on device, 0.1 MB
    free".
    """
    if named := getattr(error, "filename", None):
        file, reason = str(named), str(getattr(error, "strerror", None) or error)
    elif type(error).__name__ == "SafetensorError":  # which does not name the file, and removes it
        file, reason = f"a .safetensors file in {folder}", str(error)
    else:  # torch, which leaves it half-written
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        file = str(max(files, key=lambda path: path.stat().st_mtime_ns, default=folder))
        reason = "its writing failed" if isinstance(error, RuntimeError) else str(error)
    return f"{file}: {reason}, {free(folder)} free"


def free(folder: Path) -> str:
    """The room that is left where a folder is, or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return f"{shutil.disk_usage(there).free / 1e6:.1f} MB"


def rooms(*folders: str | Path) -> str:
    """The room that is left in each folder."""
    return ", ".join(f"{folder} {free(Path(folder))}" for folder in dict.fromkeys(map(str, folders)))
