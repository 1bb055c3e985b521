"""`trl-margins score`: adds an evaluation factor to a preference set and prints how it is distributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.evaluation_factors import METRICS, add_evaluation_factor, check_evaluation_factors
from ..data.loading import load_splits, pick_split
from ..rows import open_rows
from ..tables import aligned
from .options import OptionsParser, RowOptions, data_first, option
from .setup import check_writable

if TYPE_CHECKING:
    from datasets import DatasetDict

FILES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


@dataclass(kw_only=True)
class ScoreArguments(RowOptions):
    """What to score, how, and where to write it."""

    dataset_name: str = option(
        "A file, a saved data set, a folder of files or a Hub id. Needs no flag if it comes first, as DATA."
    )
    dataset_split: str | None = option("Split; all by default.", None)
    metric: str = option(f"One of {', '.join(METRICS)}.", "rougeL")
    encoder: str | None = option("BERTScore: folder or Hub id of the encoder.", None)
    num_layers: int | None = option("BERTScore: takes the embeddings after this layer.", None)
    batch_size: int | None = option("BERTScore: texts per forward pass. Default: 8 on a CPU, else 64.", None)
    device: str | None = option("BERTScore: by default CUDA if available, else the CPU.", None)
    column: str = option("Name of the new column.", "evaluation_factor")
    overwrite: bool = option("Replace a column of that name.", False)
    num_proc: int | None = option("Processes; not for BERTScore.", None)
    output: str | None = option(
        f"A file ({', '.join(FILES)}) for one split, or a folder. Without it, only the table is printed.", None
    )


def main(argv: Sequence[str]) -> int:
    """Scores, writes, prints the table."""
    parser = OptionsParser("score", ScoreArguments, usage="trl-margins score DATA [options]")
    (args,) = parser.parse(data_first(argv))
    # not decoded, so that what is written is what was read
    splits = load_splits(args.dataset_name, args.dataset_config, decoded=None)
    if args.dataset_split is not None or len(splits) == 1:
        name = args.dataset_split or next(iter(splits))
        splits = type(splits)({name: pick_split(splits, name, args.dataset_name)})
    if args.output:
        check_output(args.output, splits)  # before hours of scoring
        check_writable(Path(args.output).parent)
    names = ("num_proc", "encoder", "num_layers", "batch_size", "device", "overwrite")
    options = {name: getattr(args, name) for name in names}
    for name, split in splits.items():
        reader = open_rows(split, name, args.prompt_column, args.system_column).reader
        splits[name] = add_evaluation_factor(split, args.metric, args.column, reader=reader, **options)
    if args.output:
        write(args.output, splits)
    print(table({name: split.with_format("numpy")[args.column][:] for name, split in splits.items()}, args.metric))
    return 0


def check_output(output: str, splits: DatasetDict, check_columns: bool = True) -> None:
    """
    Raises:
        ValueError: several splits for one file, messages for CSV, or a suffix of no known file.
    """
    from datasets import Value

    suffix = _suffix(output)
    if not suffix:
        return
    if suffix not in FILES:
        raise ValueError(f"{output}: a file is one of {', '.join(FILES)}, and a folder's name has no suffix")
    if len(splits) > 1:
        raise ValueError(f"{output} holds one split, not {list(splits)}: name one with --dataset_split, or a folder")
    features = next(iter(splits.values())).features
    nested = [name for name, feature in features.items() if not isinstance(feature, Value)]
    if suffix == ".csv" and nested and check_columns:
        raise ValueError(f"{output}: CSV has no lists, and {nested} are more than text and numbers; use .jsonl")


def write(output: str, splits: DatasetDict) -> None:
    """Writes one split to a file, by its suffix, or any number to a folder."""
    suffix, only = _suffix(output), next(iter(splits.values()))
    if not suffix:
        (only if len(splits) == 1 else splits).save_to_disk(output)
    elif suffix.startswith(".json"):
        compression = "gzip" if suffix.endswith(".gz") else None
        # pandas writes ten digits by default
        only.to_json(output, lines=suffix != ".json", compression=compression, double_precision=15)
    else:
        (only.to_csv if suffix == ".csv" else only.to_parquet)(output)


def table(columns: Mapping[str, Any], metric: str) -> str:
    """One line per split: rows, mean, quartiles, and the shares of 0 and 1."""
    rows = []
    for name, values in columns.items():
        summary = check_evaluation_factors(values, metric, name)
        cells = ["-"] * 6
        if summary.n:
            numbers = (summary.mean, *np.quantile(values, (0.25, 0.5, 0.75)))
            shares = (summary.n_zero / summary.n, summary.n_one / summary.n)
            cells = [*(f"{number:.4f}" for number in numbers), *(f"{share:.2%}" for share in shares)]
        rows.append([name, str(summary.n), *cells])
    headers = [metric, "rows", "mean", "25 %", "median", "75 %", "EF = 0", "EF = 1"]
    return "\n".join(aligned(rows, (False, *[True] * 7), headers))


def _suffix(output: str) -> str:
    name = Path(output).name
    return next((s for s in FILES if name.endswith(s)), Path(output).suffix)
