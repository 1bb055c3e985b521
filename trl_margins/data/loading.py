"""A preference set from wherever it is: a file, a saved data set, a folder of files, or the Hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .broken_files import check_file, delimiter_of, header_of, innermost, rows_inside, times_for_text, why_unreadable
from .differing_files import check_columns, joined
from .local_files import builder_of, existing, files_of, is_plain, linked, literal
from .media import without_decoding

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

TEXTS = ("prompt", "chosen", "rejected")
_MISSING = ["", "NaN", "nan", "NA", "N/A", "null", "NULL", "None"]  # in a table's other columns


def load_splits(
    name: str, config: str | None = None, streaming: bool = False, decoded: Collection[str] | None = ()
) -> DatasetDict:
    """All splits of a data set; a single file is one split named "train".

    Nothing that is on this machine needs the network, whatever it says of itself.

    Args:
        name: a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow` file (also compressed), a folder written by
            `save_to_disk`, a folder of files, or a Hub id. What exists is that file, whatever characters it has.
        config: the configuration of a Hub set, or of a folder whose README.md has several.
        streaming: read while training instead of before.
        decoded: columns whose images, audio or video are decoded when a row is read; None for all.

    Raises:
        ValueError: a file of another kind, one that cannot be read, with its name, and the line where it has one, or
            a folder of files that do not belong together, with two of them.
        FileNotFoundError: something that looks like a path and is not there.
    """
    from datasets import load_dataset

    path = existing(name)
    splits = load_dataset(name, config, streaming=streaming) if path is None else _read(path, config, streaming)
    if decoded is None:
        return splits
    return type(splits)({split: without_decoding(rows, keep=decoded) for split, rows in splits.items()})


def pick_split(
    splits: DatasetDict, split: str | None, name: str, flag: str = "--dataset_split"
) -> Dataset | IterableDataset:
    """One split by name; without a name the only one there is. `flag` is how a command names it.

    Raises:
        ValueError: no such split, naming those there are.
    """
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        named = "" if split is None else f", not {split!r}"
        raise ValueError(f"data set {name!r} has the splits {list(splits)}{named}: name one of them with {flag}")
    return splits[split]


def _read(path: Path, config: str | None, streaming: bool) -> DatasetDict:
    from datasets import load_dataset

    if path.is_file():
        splits = {"train": [path]}
        source, options = builder_of(path), {}
    elif not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder: write its rows to a file first")
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _saved(path)
    else:
        splits = files_of(path, config)
        # the folder's own settings come with its name, which `datasets` must be able to read
        source = str(path) if is_plain(path) or not splits else builder_of(next(iter(splits.values()))[0])
        options = {} if source != str(path) else {"name": config}
    files = [file for each in splits.values() for file in each]
    for file in files:
        check_file(file, only_first=streaming)
    check_columns(path, files)
    if files:
        options |= _options(files)
    read = partial(_load, source=source, options=options, streaming=streaming)
    try:
        loaded = read(splits) if files else load_dataset(str(path), config, streaming=streaming)
    except FileNotFoundError:  # says so itself
        raise
    except Exception as error:  # the libraries have a dozen kinds, which seldom name the file
        if problem := why_unreadable(files, error):
            raise ValueError(problem) from error
        if len(files) < 2 or streaming:
            raise ValueError(f"{path} cannot be read: {innermost(error)}") from error
        loaded = joined(path, splits, lambda file: read({"train": [file]})["train"], error)
    if not streaming and (found := rows_inside(loaded)):
        raise ValueError(f"{path.name} is one object {found}: write the rows alone, one object a line")
    if files and builder_of(files[0]) == "json" and (found := times_for_text(loaded, TEXTS)):
        raise ValueError(f"{path.name}: {found}: write it as Parquet or CSV")
    return loaded


def _load(
    splits: Mapping[str, Sequence[Path]], source: str, options: Mapping[str, Any], streaming: bool
) -> DatasetDict:
    from datasets import load_dataset

    names = {split: [literal(file) for file in files] for split, files in splits.items()}
    return load_dataset(source, data_files=names, streaming=streaming, **options)


def _options(files: Sequence[Path]) -> dict[str, Any]:
    """What `datasets` must be told so that text stays the text it is in the file."""
    from datasets.packaged_modules.json.json import JsonConfig

    builder = builder_of(files[0])
    if builder == "csv":
        delimiter = delimiter_of(files[0])
        return {  # an answer may be "None" or "007"
            "sep": delimiter,
            "converters": dict.fromkeys(TEXTS, str),
            "keep_default_na": False,
            "na_values": {name: [""] if name in TEXTS else _MISSING for name in header_of(files[0], delimiter)},
        }
    if builder == "json" and hasattr(JsonConfig, "parse_agent_traces"):
        return {"parse_agent_traces": False}  # which some columns' names would set off
    return {}


def _saved(path: Path) -> DatasetDict:
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(linked(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {innermost(error)}") from error
    return DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded
