"""The local files that a name stands for, and names for them in which `datasets` sees no pattern and no URL."""

from __future__ import annotations

import csv
import glob
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, TextIO

import datasets
import pyarrow.parquet as pq
import yaml
from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from huggingface_hub import DatasetCardData, metadata_load

logger = logging.getLogger(__name__)

# The builder of `datasets` for each kind; compressed files are passed on as they are
BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".ndjson": "json",
    ".tsv": "csv",
}
_PREFERRED = ("parquet", "arrow", "json", "csv")  # by `datasets`, if a folder has as many of one as of another
_NO_DATA = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    *("metadata.jsonl", "metadata.csv", "metadata.parquet"),
)
_UNREAD = (".zip", ".tar", ".tgz", ".lz4", ".7z", ".rar", ".xlsx", ".xls", ".ods")  # data, but not beside others
# Settings of a configuration in README.md that do not change how a table is read
_OF_A_PLACE = {"data_files", "data_dir", "default", "drop_labels", "description", "version"}
# What may be called train or test, and is no data
_NOTES = (
    *("", ".py", ".ipynb", ".sh", ".md", ".txt", ".rst", ".html", ".pdf", ".log", ".yaml", ".yml", ".toml"),
    *(".bin", ".pt"),
)
_SHOWN = 8  # names of files
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def existing(name: str) -> Path | None:
    """The file or folder of that name, whatever characters it has; None if there is none, and it is not a path."""
    path = Path(name)
    if not path.exists() and name.startswith("~"):
        path = path.expanduser()
    if path.exists():
        return path
    if name != name.strip():
        raise FileNotFoundError(f"no data set at {name!r}, a name with blanks around it: remove them")
    if path.is_absolute() or name.startswith((".", "~")) or kind_of(path) in BUILDERS:
        raise FileNotFoundError(f"no data set at {name if name.isprintable() else ascii(name)}")
    return None


def kind_of(file: Path) -> str:
    """The suffix that tells the format of a file, without that of a compression."""
    suffixes = [suffix for suffix in map(str.lower, file.suffixes) if suffix not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def builder_of(file: Path) -> str:
    """The builder of `datasets` that reads a file; a ValueError if it reads no such file."""
    if kind_of(file) not in BUILDERS:
        kinds, compressed = ", ".join(BUILDERS), ", ".join(COMPRESSED)
        raise ValueError(
            f"{file.name}: a data file is one of {kinds}, also with {compressed} behind it, not {kind_of(file)!r}"
        )
    return BUILDERS[kind_of(file)]


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it: a data set, or several splits of one."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def names_files(folder: Path) -> bool:
    """Whether a folder's README.md says which of its files are data."""
    return any("data_files" in entry for entry in _card(folder).get("configs") or () if isinstance(entry, dict))


def files_of(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """A folder's files by split, found as `datasets` finds them; none if only `datasets` itself can read them.

    Raises a ValueError if README.md points elsewhere, or leaves open which of several configurations is meant.
    """
    chosen = _configuration(folder, config)
    base, found = _found(folder, chosen)
    taken = [file for some in found.values() for files in some.values() for file in files]
    splits = {split: _with_rows(folder, split, [*chain(*some.values())], base) for split, some in found.items()}
    every = [file for files in splits.values() for file in files]
    if not every:
        _check_taken(folder, base, taken, "data_files" in chosen)
    if all(file.stem == "metadata" for file in every):  # a folder of images, or no files
        return {}
    counts = Counter(map(builder_of, every))
    builder = max(_PREFERRED, key=lambda name: counts[name])
    if packed := [file.name for file in taken if kind_of(file) in _UNREAD]:
        logger.warning(f"{folder}: {', '.join(packed)} is not read beside other data: unpack or convert it")
    if left_out := [file.name for file in every if builder_of(file) != builder]:
        logger.warning(
            f"{folder}: only its {builder} files are read, not {', '.join(left_out)}: a data set has one format, that "
            "of most files"
        )
    splits = {split: [file for file in files if builder_of(file) == builder] for split, files in splits.items()}
    if builder == "csv" and (settings := sorted(chosen.keys() - _OF_A_PLACE)):
        logger.warning(
            f"{folder}: its README.md sets {', '.join(settings)} for its tables, which are checked without that: in "
            "UTF-8, with the column names in the first line, and the delimiter that they have. If this fails, write "
            "them so"
        )
    _say_what_is_read(folder, splits)
    if "data_files" not in chosen and (unread := _unread(base.iterdir(), taken)):
        logger.warning(
            f"{folder}: {', '.join(file.name for file in unread)} is not read: its name says of no split that it is "
            "train, test or validation. Name it as a set of its own, or move it out"
        )
    return {split: files for split, files in splits.items() if files}


def _found(folder: Path, chosen: Mapping[str, Any]) -> tuple[Path, dict[str, dict[str, list[Path]]]]:
    """Where the files lie, and those that each pattern of each split finds.

    Raises:
        FileNotFoundError: no files.
        ValueError: README.md names others.
    """
    place, are_named = str(chosen.get("data_dir") or ""), "data_files" in chosen
    named = f"{folder}: data_dir of its README.md, {place!r}," if place else str(folder)
    if not (folder / place).is_dir():
        raise FileNotFoundError(f"{named} is no folder: correct it")
    base = linked(folder / place)
    try:
        patterns = sanitize_patterns(chosen["data_files"] or []) if are_named else get_data_patterns(base)
    except EmptyDatasetError:
        raise FileNotFoundError(f"{named} doesn't contain any data files") from None
    found = {
        str(split): {each: [folder / place / file for file in _resolved(each, base)] for each in some}
        for split, some in patterns.items()
    }
    if are_named:
        _check_named(folder, {each: files for some in found.values() for each, files in some.items()})
    return folder / place, found


def _with_rows(folder: Path, split: str, files: Sequence[Path], base: Path) -> list[Path]:
    """Those of data, without the parts that have no rows."""
    files = [file for file in files if kind_of(file) in BUILDERS]
    empty = _empty_parts(files, by_spark=(base / "_SUCCESS").exists())
    kept = [file for file in files if file not in empty] or files[:1]
    if left_out := [file.name for file in files if file not in kept]:
        logger.info(f"{folder}: {split!r} has parts without rows: {', '.join(left_out[:_SHOWN])}")
    return kept


def open_bytes(file: Path) -> BinaryIO:
    """A file, decompressed by its name."""
    return LocalFileSystem().open(str(file.absolute()), "rb", compression="infer")


def open_text(file: Path, newline: str | None = None) -> TextIO:
    """A file as text, decompressed by its name."""
    path = str(file.absolute())
    return LocalFileSystem().open(path, "rt", compression="infer", encoding="utf-8-sig", newline=newline)


def first_lines(file: Path) -> list[str]:
    """Up to two lines of a text that are not blank."""
    with open_text(file, newline="") as lines:
        return [*islice(filter(str.strip, lines), 2)]


def _empty_parts(files: Sequence[Path], by_spark: bool) -> set[Path]:
    """Those of partitions without rows: a table of columns alone, the same as in another, or no bytes, by Spark. Other
    files without rows may have been cut, or lack their header.
    """
    empty = {file for file in files if by_spark and not file.stat().st_size}
    tables: dict[Path, list[str]] = {}
    for file in files:
        with suppress(Exception):  # of a damaged file: whoever reads it says so
            if kind_of(file) == ".parquet" and not pq.read_metadata(file).num_rows:
                empty.add(file)
            if builder_of(file) == "csv":
                tables[file] = first_lines(file)
    headers = [_cells(lines[0]) for lines in tables.values() if len(lines) == 2]
    return empty | {file for file, lines in tables.items() if len(lines) == 1 and _cells(lines[0]) in headers}


def _cells(line: str) -> list[str]:
    return next(csv.reader([line.strip()]), [])


def _check_named(folder: Path, found: Mapping[str, list[Path]]) -> None:
    """Looks for the `data_files` of a README.md; of patterns, as in a part of a data set, some may find none.

    Raises:
        ValueError: a file that is not there, or nothing at all.
    """
    gone = [pattern for pattern, files in found.items() if not files]
    if len(gone) == len(found) or not all(map(glob.has_magic, gone)):
        named = ", ".join(gone) or "an empty list"
        raise ValueError(f"{folder}: no file matches the data_files of its README.md, {named}: correct them")
    if gone:
        logger.warning(f"{folder}: of the data_files of its README.md, no file matches {', '.join(gone)}")


def _check_taken(folder: Path, base: Path, taken: list[Path], are_named: bool) -> None:
    """
    Raises:
        ValueError: what is taken for a split are scripts or notes, and there is data beside it.
    """
    names = sorted({file.name for file in taken})
    notes = {*_NOTES} - ({".txt"} if are_named else set())  # of which `datasets` makes rows
    if not names or not all(file.suffix.lower() in notes for file in taken):
        return
    files = (file for file in base.rglob("*") if not any(part[0] in "._" for part in file.relative_to(base).parts))
    if unread := _unread(files, ()):
        by = "by the data_files of its README.md" if are_named else "by their names or folders"
        raise ValueError(
            f"{folder}: {by}, its splits would be made of {', '.join(names[:_SHOWN])}, which is "
            f"no data, and {', '.join(str(file.relative_to(base)) for file in unread[:_SHOWN])} would not be read: "
            "move out what is no data, or name the data alone"
        )


def _say_what_is_read(folder: Path, splits: Mapping[str, list[Path]]) -> None:
    """Of which files each split is made, if there are several; a warning if two have one name."""
    for split, files in splits.items():
        names = [file.name for file in files]
        stems = [file.parent / file.name.split(".")[0] for file in files]
        counts = Counter(stems)
        if twice := [name for name, stem in zip(names, stems, strict=True) if counts[stem] > 1]:
            logger.warning(
                f"{folder}: {' and '.join(twice)} are both read, as rows of {split!r}: if they hold the same rows, "
                "remove one"
            )
        elif len(names) > 1:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            logger.info(f"{folder}: {split!r} is read from {', '.join(names[:_SHOWN])}{more}")


def _unread(files: Iterable[Path], read: Iterable[Path]) -> list[Path]:
    """Those of data that are in no split."""
    known = {file.resolve() for file in read}
    return [
        file
        for file in sorted(files)
        if kind_of(file) in BUILDERS and file.name not in _NO_DATA and file.is_file() and file.name[0] not in "._"
        if file.resolve() not in known and file.stat().st_size
    ]


def literal(file: Path) -> str:
    """A name for a file that `datasets` takes for this file only."""
    target = file.resolve()  # a link stays the same when its target changes, and `datasets` would read its cache
    return linked(target if kind_of(target) == kind_of(file) else file)


def is_plain(path: Path) -> bool:
    """Whether `datasets` takes the name as it is: it has no pattern, and no `::`, which joins the parts of a URL."""
    return not re.search(r"[*?\[\]]|::", str(path.absolute()))


def has_usual_suffix(file: Path) -> bool:
    """Whether `datasets` knows the format by the name."""
    return kind_of(file) in file.suffixes


def linked(path: Path) -> str:
    """The name; if it is not plain, the name of a link to it."""
    path = path.absolute()
    if is_plain(path):
        return str(path)
    stat = path.stat()
    key = hashlib.sha256(repr((str(path), stat.st_mtime_ns, stat.st_size)).encode()).hexdigest()[:16]
    link = Path(datasets.config.HF_DATASETS_CACHE) / "links" / key / re.sub(r"::|[*?\[\]]", "_", path.name)
    link.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another process may be making it
        link.symlink_to(path, target_is_directory=path.is_dir())
    return str(link)


def _resolved(pattern: str, base: str) -> list[Path]:
    with suppress(FileNotFoundError):
        return [Path(file).relative_to(base) for file in resolve_pattern(pattern, base)]
    return []


def _configuration(folder: Path, config: str | None) -> Mapping[str, Any]:
    """The settings of a configuration in README.md; none if it has no configurations."""
    card = _card(folder)
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**card))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its README.md has bad `configs`: {error}") from error
    for name, entries in configs.items():
        for entry in _places(entries.get("data_files"), entries.get("data_dir")):
            if _is_elsewhere(entry):
                raise ValueError(
                    f"{folder}: the configuration {name!r} of its README.md takes files from {entry!r}, outside the "
                    "folder: only files in it are read, so put them there, or remove the entry"
                )
    if not configs and config is not None:
        raise ValueError(f"{folder} has no configuration {config!r}, since its README.md has none: leave it out")
    if not configs:
        return {}
    chosen = config or configs.get_default_config_name()
    if chosen not in configs:
        raise ValueError(
            f"{folder} has the configurations {list(configs)}, not {config!r}: name one of them as its configuration"
        )
    return configs[chosen]


def _card(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = {}
    for name in ("README.md", ".huggingface.yaml"):
        if not (file := folder / name).is_file():
            continue
        try:
            found = metadata_load(file) if name == "README.md" else yaml.safe_load(file.read_text("utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{folder}: the YAML of its {name} cannot be read: {error}") from error
        card.update(found or {})
    return card


def _places(*entries: Any) -> Iterator[str]:
    """Every path in `data_files` and `data_dir`, which may be lists, also of splits with paths."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, Mapping):
            yield from _places(entry.get("path"))
        elif isinstance(entry, Iterable):
            yield from _places(*entry)


def _is_elsewhere(entry: str) -> bool:
    return (
        "://" in entry
        or "::" in entry
        or any(kind(entry).is_absolute() or ".." in kind(entry).parts for kind in (PurePosixPath, PureWindowsPath))
    )
