"""Loads a preference set: a file, a saved data set, a folder of files, or one of the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    IterableDataset,
    NamedSplit,
    ReadInstruction,
    concatenate_datasets,
)
from datasets.packaged_modules.json.json import JsonConfig

from ..disk import check_writable
from .broken_files import (
    check_file,
    innermost,
    problem_of,
    rows_as_text,
    rows_inside,
    times_for_text,
    why_unreadable,
)
from .differing_files import TypesOfJsonError, check_columns, check_tables, check_types, joined
from .expansion import check_expansion
from .local_files import (
    BUILDERS,
    builder_of,
    existing,
    files_of,
    has_usual_suffix,
    is_plain,
    is_saved,
    linked,
    literal,
)
from .media import without_decoding
from .mixed_json import as_written, fits, lost_number, python_rows, with_free_parts
from .tables import table_options

_PAGES = r"(?:tree|blob|resolve|raw|viewer|discussions|commits?)(?:[/?#]|$)"
# The Hub's, or a mirror's; without a server it needs both parts, since a folder may be called so
_ADDRESS = re.compile(
    r"(?i:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com))/datasets/"
    rf"([^/?#]+(?:/(?!{_PAGES})[^/?#]+)?)|datasets/([^/]+/(?!{_PAGES})[^/?#]+)"
)
_ALL = 2**31  # more rows than a split has
_OF_A_STREAM = 1000  # rows of each table that are looked at before it is streamed

_OF_ARROW = (pa.ArrowException, TypeError, ValueError, KeyError)  # where its reader fails, not where a script is met


def load_splits(
    name: str, config: str | None = None, streaming: bool = False, decoded: Collection[str] | None = ()
) -> DatasetDict:
    """All splits of a data set; a single file is one split named "train".

    Local files are read without the network, whatever their README.md says.

    Args:
        name: a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow` file (also compressed), a folder written by
            `save_to_disk`, a folder of files, or a Hub id. A file that exists is that file, whatever its name.
        config: the configuration of a Hub set, or of a folder whose README.md has several.
        streaming: read while training instead of before.
        decoded: columns whose images, audio or video are decoded when a row is read; None for all.

    Raises:
        ValueError: a file of another kind; one that cannot be read, with its name and line; or a folder of files that
            do not belong together, with two of them.
        FileNotFoundError: something that looks like a path and is not there.
        OSError: the cache of `datasets` cannot be written to.
    """
    is_there = Path(name).exists()
    address = None if is_there else _ADDRESS.match(name)
    if "://" in name and not (is_there or address):
        raise ValueError(f"{name} is an address: download the file, and name it; of a set on the Hub, give the id")
    path = None if address and address[1] else existing(name)
    if path is None and name in BUILDERS.values():  # `datasets` would read the working directory
        raise ValueError(f"{name} is a kind of file, and no data set: name the file")
    if path is None and address:
        what = "the address of a data set" if address[1] else "no folder; if it is the address of a data set"
        raise ValueError(f"{name} is {what}: give its id, {address[1] or address[2]}")
    try:
        splits = (
            datasets.load_dataset(name.rstrip("/"), config, streaming=streaming)
            if path is None
            else _read(path, config, streaming)
        )
    except Exception as error:
        check_writable(
            datasets.config.HF_DATASETS_CACHE, "set the environment variable HF_DATASETS_CACHE to another folder"
        )
        is_far = isinstance(error, ConnectionError)
        if path is None and (is_far or "Couldn't find cache" in str(error)):  # offline, of one that was there once
            said = f"no file or folder {name} is here, and of the Hub: {' '.join(str(error).split())}"
            raise (ConnectionError if is_far else FileNotFoundError)(said) from error
        raise
    if decoded is None:
        return splits
    return type(splits)({split: without_decoding(rows, keep=decoded) for split, rows in splits.items()})


def chosen_splits(
    name: str, config: str | None, split: str | None, decoded: Collection[str] | None = ()
) -> DatasetDict:
    """The split of that name, or all of them; else as `load_splits`."""
    splits = load_splits(name, config, decoded=decoded)
    return splits if split is None else type(splits)({split: pick_split(splits, split, name)})


def pick_split(
    splits: DatasetDict, split: str | None, name: str, flag: str = "--dataset_split"
) -> Dataset | IterableDataset:
    """One split by name, or the only one there is, or a slice as `datasets` has it (`train[:10%]`); else a ValueError
    lists them. `flag` is the command's option.
    """
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split is not None and is_slice(split, splits):
        return sliced(splits, split, name)
    if split not in splits:
        named = "" if split is None else f", not {split!r}"
        raise ValueError(f"data set {name!r} has the splits {list(splits)}{named}: name one of them with {flag}")
    return splits[split]


def is_slice(split: str, there: Collection[str] = ()) -> bool:
    """Whether it is a slice, or several splits, and not the name of one that is `there`."""
    return split not in there and bool(re.search(r"[\[+]", split))


def names_in(split: str, there: Collection[str] = ()) -> set[str]:
    """The splits of which it is one, a slice, or the sum."""
    return {split} if split in there else {part.partition("[")[0].strip() for part in split.split("+")}


def check_slice(split: str) -> None:
    """
    Raises:
        ValueError: it is no slice of any split.
    """
    try:
        ReadInstruction.from_spec(split).to_absolute(dict.fromkeys(names_in(split), _ALL))
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split {split!r}: {error}") from error


def sliced(splits: Mapping[str, Any], split: str, name: str) -> Dataset:
    """The rows of a slice, `train[:10%]`.

    Raises:
        ValueError: it is none, or has no rows; or a stream, which has no slices.
    """
    what = f"data set {name!r}, split {split!r}"
    if any(isinstance(rows, IterableDataset) for rows in splits.values()):
        raise ValueError(f"{what}: a stream has no slices: load the data set instead of streaming it")
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({each: len(rows) for each, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{what}: {error}") from error
    chosen = [(part.splitname, range(len(splits[part.splitname]))[part.from_ : part.to]) for part in parts]
    found = [splits[each].select(rows) for each, rows in chosen if rows]
    if not found:
        raise ValueError(
            f"{what} has no rows: the splits have {', '.join(f'{each} {len(splits[each])}' for each in splits)}"
        )
    return concatenate_datasets(found, split=NamedSplit(split))


def _read(path: Path, config: str | None, streaming: bool) -> DatasetDict:
    if config not in (None, "default") and (path.is_file() or is_saved(path)):
        raise ValueError(f"dataset_config {config!r}: {path} has no configurations: leave it out")
    options: dict[str, Any]
    if path.is_file():
        splits = {"train": [path]}
        source, options = builder_of(path), {}
    elif not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a directory: write its rows to a file first")
    elif is_saved(path):
        return _saved(path)
    else:
        splits = files_of(path, config)
        # only a plain name can be passed on; with it come the folder's own settings
        plain = (is_plain(path) and all(map(has_usual_suffix, chain(*splits.values())))) or not splits
        source = str(path) if plain else builder_of(next(iter(splits.values()))[0])
        options = {"name": config} if plain else {}
    if not splits:
        try:
            return datasets.load_dataset(str(path), config, streaming=streaming)
        except ImportError:  # says what is missing
            raise
        except Exception as error:
            kinds = ", ".join(BUILDERS)
            why = f"{path} has no file that is data ({kinds}, or images with metadata): {innermost(error)}"
            raise (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError)(why) from error
    files, first = [file for each in splits.values() for file in each], _OF_A_STREAM if streaming else None
    for file in files:
        check_expansion(file, only_first=streaming)
        check_file(file, first)
    apart = False
    if builder_of(files[0]) == "csv":
        of_tables, are_uneven = table_options(files, _texts(), first)
        options |= of_tables
        apart = are_uneven and not streaming
    elif builder_of(files[0]) == "json" and hasattr(JsonConfig, "parse_agent_traces"):
        options["parse_agent_traces"] = False  # some column names would turn it on

    def read(splits: Mapping[str, Sequence[Path]], streaming: bool = streaming) -> DatasetDict:
        names = {split: [literal(file) for file in files] for split, files in splits.items()}
        return datasets.load_dataset(source, data_files=names, streaming=streaming, **options)

    def stream(file: Path) -> IterableDataset:
        return read({"train": [file]}, streaming=True)["train"]

    looked_at = cache(stream)  # by several checks
    check_columns(path, files, looked_at)
    if builder_of(files[0]) != "json":  # which stays as it is written
        check_types(path, files, looked_at, _texts())
    one_by_one = False
    try:
        loaded = joined(path, splits, lambda file: read({"train": [file]})["train"]) if apart else read(splits)
        features = next(iter(loaded.values())).features
        if streaming and builder_of(files[0]) == "json" and features and with_free_parts(features) != features:
            options["features"] = Features(with_free_parts(features))
            loaded = read(splits)
        if streaming:  # else training would be the first to read it
            if builder_of(files[0]) == "csv":
                for of_split in splits.values():
                    check_tables(of_split, looked_at)
            elif features := next(iter(loaded.values())).features:
                options["features"] = features
            for rows in loaded.values() if len(files) == 1 else map(stream, files):
                next(iter(rows.decode(False) if rows.features else rows), None)  # pictures may be elsewhere
    except FileNotFoundError:  # says so itself
        raise
    except Exception as error:  # the libraries have a dozen kinds, which seldom name the file
        if problem := problem_of(files):
            raise ValueError(problem) from error
        if apart:  # says so itself
            raise
        if streaming and len(files) == 1:
            raise ValueError(why_unreadable(files[0], error)) from error
        if streaming:
            reason = " ".join(str(innermost(error)).split())
            raise ValueError(
                f"{path} cannot be streamed: {reason}: load the data set instead of streaming it, or give all files "
                "the same columns and types"
            ) from error
        one_by_one = True
        if len(files) > 1:
            try:
                loaded = joined(path, splits, lambda file: _one(file, read), error)
            except TypesOfJsonError:
                if builder_of(files[0]) != "json":
                    raise
                loaded = DatasetDict({split: python_rows(files) for split, files in splits.items()})
        else:
            loaded = DatasetDict({split: _one(files[0], read) for split in splits})
    if found := rows_inside(loaded):
        raise ValueError(f"{path.name} is one object {found}: write only the rows, one object per line")
    if not streaming and (found := rows_as_text(loaded)):
        raise ValueError(f"{path.name}: {found}")
    if builder_of(files[0]) != "json" or one_by_one:  # each is as it is written
        return loaded
    if streaming:
        if found := times_for_text(loaded, _texts()):
            raise ValueError(f"{path.name}: {found}: load the data set instead of streaming it")
        for rows in loaded.values():
            if rows.features and (lost := lost_number(rows.features, files, _OF_A_STREAM)):
                raise ValueError(lost)
        if any(rows.features and not fits(rows.features, files, only_first=True) for rows in loaded.values()):
            raise ValueError(
                f"{path.name}: later files, or rows beyond the first 10 MB, have other columns, or other types in "
                "them, which a stream would read as text or leave out: load the data set instead of streaming it, or "
                "give all rows one form"
            )
        return loaded
    return as_written(loaded, splits)


def _one(file: Path, read: Callable[[Mapping[str, Sequence[Path]]], DatasetDict]) -> Dataset:
    """A file alone. JSON is read by Python where Arrow's reader fails: it loses a null that a list begins with."""
    try:
        loaded, splits = read({"train": [file]}), {"train": [file]}
        return (as_written(loaded, splits) if builder_of(file) == "json" else loaded)["train"]
    except Exception as error:
        if builder_of(file) == "json" and isinstance(innermost(error), _OF_ARROW):
            with suppress(Exception):
                if len(rows := python_rows([file])):
                    return rows
        raise ValueError(why_unreadable(file, error)) from error


def _texts() -> tuple[str, ...]:
    """The columns of pairs and of lists that hold prompts or answers."""
    from ..rows.list_forms import PROMPTS, RESPONSE, TWO  # with the whole of `rows`, which takes seconds to import

    return ("prompt", "chosen", "rejected", *PROMPTS, *RESPONSE, *chain(*TWO))


def _saved(path: Path) -> DatasetDict:
    splits = {"train": path}
    try:
        if (file := path / "dataset_dict.json").exists():
            splits = {split: path / split for split in json.loads(file.read_text("utf-8"))["splits"]}
        return DatasetDict({split: _saved_split(folder) for split, folder in splits.items()})
    except Exception as error:
        cause = innermost(error)
        said = f"its state has no {cause}" if isinstance(cause, KeyError) else cause
        raise ValueError(f"{path} cannot be read: {said}; save the set again, with save_to_disk") from error


def _saved_split(folder: Path) -> Dataset:
    if json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]:
        return datasets.load_from_disk(linked(folder)).with_format(None)  # whatever format it was saved in
    features = DatasetInfo.from_directory(str(folder)).features  # without rows, whose folder `datasets` does not read
    return Dataset.from_dict({name: [] for name in features or ()}, features=features)
