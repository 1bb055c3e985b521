"""Files that are whole or not there; and a disk without room: which file could not be written, and what is free."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_OF_LIBRARIES = re.compile(
    r"(?:os error|\[[Ee]rrno) (?:28|122|27|30|5)\b|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos"
    r"|basic_ios::clear: iostream error"
    r"|open file failed with strerror: (?:No space left|Disk quota|File too large|Read-only file|Input/output)"
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
    return f"{file}: {reason}, {free(folder)}"


@contextmanager
def writing_to(folder: str | Path, advice: str = "name another folder, or make room") -> Iterator[None]:
    """
    Raises:
        OSError: something inside of it could not write; with the folder's name.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{folder} cannot be written to ({reason}): {advice}") from error


def check_writable(folder: str | Path, advice: str = "name another folder, or make room") -> None:
    """Creates a folder and checks that files can be written to it, before hours of work.

    Raises:
        OSError: they cannot.
    """
    with writing_to(folder, advice):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def written(file: str | Path) -> Iterator[Path]:
    """Where to write a file: beside it, until all of it is there. What has its name stays until then.

    A console, a pipe or a device is written to itself.

    Raises:
        OSError: the disk has no room; with the file's name.
    """
    place = Path(file).resolve()
    is_file = place.is_file() or not place.exists()
    beside = place.with_name(f"_writing-{os.getpid()}{place.suffix[:9]}") if is_file else Path(file)
    try:
        with naming(file, beside):
            yield beside
            if is_file:
                beside.replace(place)
    finally:
        if is_file:
            beside.unlink(missing_ok=True)


def write(file: str | Path, content: str | bytes) -> None:
    """Writes a file as `written` has it, text in UTF-8."""
    with written(file) as place:
        place.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def naming(place: str | Path, *others: Path) -> Iterator[None]:
    """Gives an error of the disk, which often says nothing but its number, the name of what is written.

    Args:
        place: the file or folder.
        others: names that it has meanwhile.
    """
    try:
        yield
    except Exception as error:  # each library has its own
        named = getattr(error, "filename", None)
        if not is_of_the_disk(error) or (named and Path(os.fsdecode(named)) not in (Path(place), *others)):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"{place} cannot be written ({reason}, {free(Path(place).parent)}): make room, or name another place"
        ) from error


def free(folder: Path) -> str:
    """The room that is left where a folder is, or would be, and how large a file may be."""
    try:
        place = folder.absolute()
    except FileNotFoundError:
        return "and the working directory is gone"
    there = next(path for path in (place, *place.parents) if path.is_dir())
    return f"{shutil.disk_usage(there).free / 1e6:.1f} MB free{_limit()}"


def _limit() -> str:
    try:
        import resource  # not on Windows

        most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    except ImportError:
        return ""
    return "" if most == resource.RLIM_INFINITY else f" (`ulimit -f` allows {most / 1e6:.3g} MB in one file)"


def rooms(*folders: str | Path) -> str:
    """The room that is left in each folder."""
    return ", ".join(f"{folder} {free(Path(folder))}" for folder in dict.fromkeys(map(str, folders)))
