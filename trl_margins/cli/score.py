"""`trl-margins score`: adds an evaluation factor to a preference set and says how it is distributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import Number
from ..data.evaluation_factors import METRICS, add_evaluation_factor, check_evaluation_factors
from ..data.loading import load_splits, pick_split
from ..rows import open_rows
from .options import PROMPT_COLUMN, SYSTEM_COLUMN, OptionsParser, data_first
from .setup import check_writable, log_to_console

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FILES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


@dataclass
class ScoreArguments:
    """What to score, how, and where it goes."""

    dataset_name: str = field(
        metadata={"help": "A file, a saved data set, a folder of files or a Hub id. As DATA, first, it needs no flag."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub set."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; all of them, if not given."})
    prompt_column: str | None = field(default=None, metadata={"help": PROMPT_COLUMN})
    system_column: str | None = field(default=None, metadata={"help": SYSTEM_COLUMN})
    metric: str = field(default="rougeL", metadata={"help": f"One of {', '.join(METRICS)}."})
    encoder: str | None = field(default=None, metadata={"help": "For BERTScore: folder or Hub id of the encoder."})
    num_layers: int | None = field(default=None, metadata={"help": "For BERTScore: embeddings after this layer."})
    batch_size: int | None = field(
        default=None, metadata={"help": "For BERTScore: texts per forward pass; 8 on a CPU, else 64, if not given."}
    )
    device: str | None = field(default=None, metadata={"help": "For BERTScore: CUDA if there is one, else the CPU."})
    column: str = field(default="evaluation_factor", metadata={"help": "Name of the new column."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a column of that name."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes, not for BERTScore."})
    output: str | None = field(
        default=None,
        metadata={"help": f"A file ({', '.join(FILES)}) for one split, else a folder. Without it only the table."},
    )

    def __post_init__(self) -> None:
        for name in ("num_layers", "batch_size", "num_proc"):
            Number(least=1, whole=True, optional=True).check(name, getattr(self, name))


def main(argv: Sequence[str]) -> int:
    """Scores, writes, prints the table."""
    log_to_console()
    parser = OptionsParser(ScoreArguments, prog="trl-margins score", usage="trl-margins score DATA [options]")
    (args,) = parser.parse_args_and_config(data_first(argv))
    splits = load_splits(
        args.dataset_name, args.dataset_config, decoded=None
    )  # as whoever reads the output expects it
    if args.dataset_split is not None or len(splits) == 1:
        name = args.dataset_split or next(iter(splits))
        splits = type(splits)({name: pick_split(splits, name, args.dataset_name)})
    if args.output:
        check_output(args.output, splits)  # before hours of scoring
        check_writable(Path(args.output).parent)
    scored = type(splits)({name: _scored(split, name, args) for name, split in splits.items()})
    if args.output:
        write(args.output, scored)
    print(table({name: split.with_format("numpy")[args.column][:] for name, split in scored.items()}, args.metric))
    return 0


def _scored(dataset: Dataset, split: str, args: ScoreArguments) -> Dataset:
    return add_evaluation_factor(
        dataset,
        args.metric,
        args.column,
        num_proc=args.num_proc,
        encoder=args.encoder,
        num_layers=args.num_layers,
        batch_size=args.batch_size,
        device=args.device,
        overwrite=args.overwrite,
        reader=open_rows(dataset, split, args.prompt_column, args.system_column).reader,
    )


def check_output(output: str, splits: DatasetDict) -> None:
    """
    Raises:
        ValueError: several splits for one file, messages for CSV, or a name that is neither a known file's nor a
            folder's.
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
    if suffix == ".csv" and nested:
        raise ValueError(f"{output}: CSV has no lists, and {nested} are more than text and numbers; use .jsonl")


def write(output: str, splits: DatasetDict) -> None:
    """One split to a file, by its suffix; to a folder all of them, or the one alone."""
    only: Dataset | None = next(iter(splits.values())) if len(splits) == 1 else None
    suffix = _suffix(output)
    if not suffix or only is None:
        (splits if only is None else only).save_to_disk(output)
    elif suffix.startswith(".json"):
        compression = "gzip" if suffix.endswith(".gz") else None
        # pandas writes ten digits unless told
        only.to_json(output, lines=suffix != ".json", compression=compression, double_precision=15)
    else:
        (only.to_csv if suffix == ".csv" else only.to_parquet)(output)


def table(columns: Mapping[str, Any], metric: str) -> str:
    """One row a split: rows, mean, quartiles, and the share of 0 and of 1."""
    width = max(len(metric), *map(len, columns))
    heads = ("mean", "25 %", "median", "75 %", "EF = 0", "EF = 1")
    lines = [f"{metric:<{width}}{'rows':>9}" + "".join(f"{head:>9}" for head in heads)]
    for name, values in columns.items():
        summary = check_evaluation_factors(values, metric, name)
        if not summary.n:
            lines.append(f"{name:<{width}}{0:>9}" + f"{'-':>9}" * len(heads))
            continue
        numbers = (summary.mean, *np.quantile(values, (0.25, 0.5, 0.75)))
        shares = (summary.n_zero / summary.n, summary.n_one / summary.n)
        cells = "".join(f"{number:>9.4f}" for number in numbers) + "".join(f"{share:>9.2%}" for share in shares)
        lines.append(f"{name:<{width}}{summary.n:>9}{cells}")
    return "\n".join(lines)


def _suffix(output: str) -> str:
    name = Path(output).name
    return next((s for s in FILES if name.endswith(s)), Path(output).suffix)
