"""A preference set from wherever it is: a file, a saved data set, a folder of files, or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
        ValueError: a file of another kind.
        FileNotFoundError: something that looks like a path and is not there.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(name).expanduser()
    if path.is_file():
        return load_dataset(_builder(path), data_files={"train": str(path)}, streaming=streaming)
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        loaded = load_from_disk(str(path))
        return DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or _kind(path) in _BUILDERS):
        raise FileNotFoundError(f"no data set at {name}")
    return load_dataset(str(path) if path.is_dir() else name, config, streaming=streaming)


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


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _builder(path: Path) -> str:
    kind = _kind(path)
    if kind not in _BUILDERS:
        raise ValueError(f"{path.name}: a data file is one of {', '.join(_BUILDERS)} (also compressed), not {kind!r}")
    return _BUILDERS[kind]
