"""Training sets that are mixtures: a share of each set, combined, and split where asked."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.loading import is_slice, load_splits, pick_split, sliced
from ..data.local_files import BUILDERS, builder_of, existing, is_saved, kind_of
from ..rows import RowError
from ..rows.form import IMAGES
from ..rows.mixed import NOTHING_NAMED, Named, mixed

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

logger = logging.getLogger(__name__)


def mixture_splits(
    mixture: DatasetMixtureConfig,
    weights: Sequence[float] | None = None,
    seed: int | None = None,
    named: Named = NOTHING_NAMED,
) -> DatasetDict:
    """The mixture as "train", and as "train" and "test" if it has a `test_split_size`.

    Args:
        mixture: TRL's description of it.
        weights: share of each set's rows to take, in [0, 1], in the order of the sets; all rows by default. TRL's
            `fraction` is a set's share of the mixture.
        seed: draws shares and test split at random, and shuffles; without it, a share is a set's first rows.
        named: the columns that the user has named.

    Raises:
        ValueError: as `check_mixture`.
    """
    from datasets import DatasetDict
    from trl.scripts.utils import get_dataset

    check_mixture(mixture, weights, seed)
    if mixture.streaming:
        return get_dataset(replace(mixture, datasets=[*map(_for_trl, mixture.datasets)]))
    read, sets = [_load(part, part.split, named) for part in mixture.datasets], []
    shares = _shares(mixture, weights, [*map(len, read)])
    for part, rows, share in zip(mixture.datasets, read, shares, strict=True):
        taken = int(share)
        level = logging.WARNING if share and not taken else logging.INFO
        logger.log(level, "%s: %d of %d rows", part.path, taken, len(rows))
        if taken < len(rows):
            rows = (rows if seed is None else rows.shuffle(seed=seed)).select(range(taken))
        if taken:
            sets.append((part.path, rows))
    if not sets:
        raise ValueError("mixture_weights: no set gives a row: raise them")
    together = mixed(sets, named)
    if seed is not None:
        together = together.shuffle(seed=seed)
    size = mixture.test_split_size
    if size is None:
        return DatasetDict({"train": together})
    if size == 1:
        raise ValueError("test_split_size: 1 would be a single row: give a share below 1, or 2 rows or more")
    if size > 1 and size != int(size):
        raise ValueError(f"test_split_size: {size:g} is neither a share between 0 and 1 nor a whole number of rows")
    if (size if size >= 1 else math.ceil(size * len(together))) >= len(together):
        raise ValueError(
            f"test_split_size: {size:g} of {len(together)} rows leaves none to train on: give a smaller number, or a "
            "share between 0 and 1"
        )
    # every rank must draw the same rows
    return together.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed or 0)


def check_mixture(mixture: DatasetMixtureConfig, weights: Sequence[float] | None, seed: int | None) -> None:
    """
    Raises:
        ValueError: weights that are not one share per set, or given together with streaming or `fraction`; fractions
            of some sets or of streams; pickles; a kind of file without files.
    """
    if any(part.path == "pandas" for part in mixture.datasets):
        raise ValueError("datasets: path pandas reads pickles, which run code: save the rows as Parquet or JSON lines")
    fractions = [part.fraction for part in mixture.datasets if part.fraction is not None]
    if (fractions or mixture.streaming) and (weights is not None or seed is not None):
        raise ValueError("mixture_weights and mixture_seed do not work with streaming or with TRL's `fraction`")
    if fractions and (len(fractions) < len(mixture.datasets) or mixture.streaming):
        raise ValueError("datasets: TRL takes a fraction of every set or of none, and not of streams")
    if fractions and not (all(0 <= each < math.inf for each in fractions) and any(fractions)):
        raise ValueError(
            f"datasets: the fractions {fractions} must be shares of the mixture: numbers, at least 0, and one of them "
            "above 0"
        )
    if weights is not None and not (
        len(weights) == len(mixture.datasets) and all(0 <= weight <= 1 for weight in weights)
    ):
        names = ", ".join(part.path for part in mixture.datasets)
        raise ValueError(f"mixture_weights: {list(weights)} must be a share in [0, 1] for each of {names}")
    for part in mixture.datasets:
        if mixture.streaming and is_slice(part.split):
            raise ValueError(f"datasets: {part.path}, split {part.split}: a stream has no slices; load the data sets")
        has_files = part.data_files or part.data_dir or Path(part.path).exists()
        if part.path in BUILDERS.values() and not has_files:  # `datasets` would read the working directory
            raise ValueError(
                f"datasets: path {part.path} is a kind of file: name the file as path, or as its data_files"
            )


def _shares(mixture: DatasetMixtureConfig, weights: Sequence[float] | None, sizes: Sequence[int]) -> list[float]:
    """How many rows of each set are taken, before that is rounded down; by `fraction` as TRL has it: as many as no set
    lacks rows for.
    """
    fractions = [part.fraction for part in mixture.datasets if part.fraction is not None]
    if not fractions:
        return [weight * size for weight, size in zip(weights or [1.0] * len(sizes), sizes, strict=True)]
    most = min(size / each for size, each in zip(sizes, fractions, strict=True) if each)
    return [float(min(round(each * most), size)) for each, size in zip(fractions, sizes, strict=True)]


def _for_trl(part: DatasetConfig) -> DatasetConfig:
    """A local file as `datasets` streams it: a builder, and the file, which must be one that `load_splits` reads."""
    path = Path(part.path).expanduser()
    if is_saved(path):
        raise ValueError(
            f"datasets: {part.path} was saved with save_to_disk, which TRL does not mix as a stream: save it as "
            "Parquet, or load it"
        )
    if not path.is_file() or part.data_files is not None:
        return part
    load_splits(part.path, streaming=True)
    return replace(part, path=builder_of(path), data_files=str(path))


def mixture_test_split(mixture: DatasetMixtureConfig, split: str, named: Named = NOTHING_NAMED) -> Dataset:
    """That split of every set, whole, with the columns that the user has named."""
    if mixture.streaming:
        raise ValueError(f"a stream of several sets has no {split!r} split: give eval_dataset_name")
    sets = {(part.path, part.name, part.data_dir, str(part.data_files)): part for part in mixture.datasets}
    return mixed([(part.path, _load(part, split, named)) for part in sets.values()], named)


@contextmanager
def _naming(part: DatasetConfig) -> Iterator[None]:
    """Names the entry in what `datasets` says of it."""
    try:
        yield
    except (MemoryError, RowError):
        raise
    except Exception as error:  # each reader has its own
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        given = {name: getattr(part, name) for name in ("path", "name", "data_dir", "data_files", "split", "columns")}
        entry = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise ValueError(f"the entry of datasets with {entry} cannot be read: {reason}") from error


def _load(part: DatasetConfig, split: str, named: Named) -> Dataset:
    with _naming(part):
        return _rows_of(part, split, named)


def _rows_of(part: DatasetConfig, split: str, named: Named) -> Dataset:
    from datasets import load_dataset

    name = split.partition("[")[0]
    if files := _files_of(part, name):
        sets = [(str(file), load_splits(str(file), decoded=IMAGES)["train"]) for file in files]
        there = {None, *chain(*(rows.column_names for _, rows in sets))}  # other entries may have the others
        prompt, system = (name if name in there else None for name in (named.prompt, named.system))
        rows: Any = mixed(sets, Named(prompt, system, named.scores))
        if split != name:
            rows = sliced({name: rows}, split, part.path)
    elif Path(part.path).expanduser().exists() and part.data_dir is None and part.data_files is None:
        rows = load_splits(part.path, part.name, decoded=IMAGES)
        rows = pick_split(rows, split, part.path, "`split` in its entry of `datasets` (mixture_weights takes a share)")
    else:
        if (found := existing(part.path)) and found.is_file():
            raise ValueError("path is a file: leave data_files and data_dir out")
        rows = load_dataset(part.path, part.name, data_dir=part.data_dir, data_files=part.data_files, split=split)
    return rows if part.columns is None else rows.select_columns(part.columns)


def _files_of(part: DatasetConfig, split: str) -> list[Path]:
    """The local files that a builder of `datasets` would read, none if some are elsewhere or of another kind."""
    if part.path not in BUILDERS.values() or part.data_dir is not None or part.data_files is None:
        return []
    given: Any = part.data_files if isinstance(part.data_files, dict) else {"train": part.data_files}
    given = given.get(split, [])
    names = [os.path.expanduser(name) for name in ([given] if isinstance(given, str) else given)]
    found = [sorted(glob(name, recursive=True)) if has_magic(name) else [name] for name in names]
    files = list(map(Path, chain(*found)))
    return files if all(file.is_file() and BUILDERS.get(kind_of(file)) == part.path for file in files) else []
