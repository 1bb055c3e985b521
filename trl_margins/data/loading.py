"""A preference set from wherever it is: a file, a saved data set, a folder of files, or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .broken_files import check_header, why_unreadable

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

# What `datasets` reads each file with; .gz and .zst go through unchanged
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """All splits of a data set; a single file is one split named "train".

    Args:
        name: a `.jsonl`, `.json`, `.csv` or `.parquet` file (also compressed), a folder written by `save_to_disk`,
            a folder of files, or a Hub id.
        config: the configuration of a Hub set.
        streaming: read while training instead of before.

    Raises:
        ValueError: a file of another kind, or one that cannot be read, with its name, and the line where it has one.
        FileNotFoundError: something that looks like a path and is not there.
    """
    from datasets import load_dataset

    path = Path(name).expanduser()
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~")) or _kind(path) in _BUILDERS:
            raise FileNotFoundError(f"no data set at {name}")
        return load_dataset(name, config, streaming=streaming)
    if path.is_file():
        _builder(path)  # refuses other kinds
    for file in _data_files(path):
        check_header(file)
    try:
        return _read(path, config, streaming)
    except FileNotFoundError:  # of a folder without data; says so itself
        raise
    except Exception as error:  # the libraries have a dozen kinds, which seldom name the file
        raise ValueError(why_unreadable(_data_files(path), error) or f"{path} cannot be read: {error}") from error


def _read(path: Path, config: str | None, streaming: bool) -> DatasetDict:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if path.is_file():
        return load_dataset(_builder(path), data_files={"train": str(path)}, streaming=streaming)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = load_from_disk(str(path))
        return DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded
    return load_dataset(str(path), config, streaming=streaming)


def pick_split(splits: DatasetDict, split: str | None, name: str) -> Dataset | IterableDataset:
    """One split by name; without a name the only one there is.

    Raises:
        ValueError: no such split, naming those there are.
    """
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise ValueError(f"data set {name!r} has the splits {list(splits)}, not {split!r}: name one of them")
    return splits[split]


def _data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in found if _kind(file) in _BUILDERS]


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in _COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _builder(path: Path) -> str:
    kind = _kind(path)
    if kind not in _BUILDERS:
        raise ValueError(f"{path.name}: a data file is one of {', '.join(_BUILDERS)} (also compressed), not {kind!r}")
    return _BUILDERS[kind]
