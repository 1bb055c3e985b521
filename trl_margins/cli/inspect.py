"""`trl-margins inspect`: says what a preference set looks like before anybody trains on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import Number
from ..data.audit import Lengths, Measure, audit
from ..data.loading import load_splits, pick_split
from ..report.audit_text import audit_text
from ..rows import PreferenceRow, RowError, RowReader, tokenize
from ..rows.tokens import read_batch
from .options import LENGTH, PROMPT_COLUMN, SCORE_COLUMNS, SYSTEM_COLUMN, OptionsParser, data_first, max_length_of
from .setup import check_writable, load_tokenizer, log_to_console

if TYPE_CHECKING:
    from datasets import Dataset

FIGURES = (".png", ".svg")


@dataclass
class InspectArguments:
    """What to look at."""

    dataset_name: str = field(
        metadata={"help": "A file, a saved data set, a folder of files or a Hub id. As DATA, first, it needs no flag."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub set."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; all of them, if not given."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder, Hub id, or bundled:smollm2-135m-instruct, whose tokenizer measures the lengths; they are "
            "in words without it."
        },
    )
    max_length: int | None = field(default=None, metadata={"help": LENGTH})
    prompt_column: str | None = field(default=None, metadata={"help": PROMPT_COLUMN})
    system_column: str | None = field(default=None, metadata={"help": SYSTEM_COLUMN})
    score_columns: list[str] | None = field(default=None, metadata={"help": SCORE_COLUMNS})
    eval_min_score_gap: float = field(default=2.0, metadata={"help": "Least score gap of the pairs behind `pwa`."})
    ef_sample: int = field(
        default=1000, metadata={"help": "Rows at most whose ROUGE-L is computed, without an evaluation_factor column."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of that sample."})
    json: str | None = field(default=None, metadata={"help": "File that gets all numbers as JSON."})
    plot: str | None = field(default=None, metadata={"help": "File (.png, .svg) that gets the histograms."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the tokenizer's own code."})

    def __post_init__(self) -> None:
        Number(least=1, whole=True, optional=True).check("max_length", self.max_length)
        Number(least=0).check("eval_min_score_gap", self.eval_min_score_gap)
        Number(least=0, whole=True).check("ef_sample", self.ef_sample)


def main(argv: Sequence[str]) -> int:
    """Audits, prints, writes the JSON and the figure."""
    log_to_console()
    parser = OptionsParser(InspectArguments, prog="trl-margins inspect", usage="trl-margins inspect DATA [options]")
    (args,) = parser.parse_args_and_config(data_first(argv))
    if args.plot:
        check_figure(args.plot)  # before the work
    for file in filter(None, (args.json, args.plot)):
        check_writable(Path(file).parent)
    splits = load_splits(args.dataset_name, args.dataset_config)
    if args.dataset_split is not None:
        splits = {args.dataset_split: pick_split(splits, args.dataset_split, args.dataset_name)}
    measure = None
    if args.model_name_or_path:
        measure = in_tokens_of(load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code))
    from ..methods import METHODS

    found = audit(
        splits,
        score_columns=args.score_columns,
        min_score_gap=args.eval_min_score_gap,
        measure=measure,
        max_length=max_length_of(args.max_length, args.model_name_or_path),
        ef_sample=args.ef_sample,
        seed=args.seed,
        methods={method.id: columns_of(method) for method in METHODS.values()},
        prompt_column=args.prompt_column,
        system_column=args.system_column,
    )
    print(audit_text(found))
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(found), indent=2) + "\n")
    if args.plot:
        from ..report.audit_figure import audit_figure

        audit_figure(found).savefig(args.plot, dpi=120)
    return 0


def columns_of(method: Any) -> list[str]:
    """What a method's terms read of a batch."""
    from ..methods import MARGINS, WEIGHTS

    terms = [table[name] for table, name in ((WEIGHTS, method.weight), (MARGINS, method.margin)) if name]
    return [column for term in terms for column in term.columns]


def in_tokens_of(tokenizer: Any) -> Measure:
    """Counts the tokens that training makes of each row."""
    from datasets.utils import tqdm

    def measure(dataset: Dataset, reader: RowReader, readable: list[int]) -> Lengths:
        counts: list[tuple[int, ...]] = []
        problems: dict[int, str] = {}
        rows = dataset.select(readable).select_columns(reader.needed)
        with tqdm(total=len(rows), desc="Counting tokens", unit="pair", delay=2, leave=False) as bar:
            for start in range(0, len(rows), 256):
                numbers = readable[start : start + 256]
                some = read_batch(reader, rows[start : start + 256], numbers)
                counts += _token_counts(some, numbers, tokenizer, reader, problems)
                bar.update(len(numbers))
        columns = np.array(counts, int).reshape(-1, 5).T
        return Lengths("tokens", *columns[:3], whole=columns[3:], problems=problems)

    return measure


def _token_counts(
    rows: list[PreferenceRow], numbers: list[int], tokenizer: Any, reader: RowReader, problems: dict[int, str]
) -> list[tuple[int, ...]]:
    """Tokens of prompt, chosen, rejected, and of each with its prompt; rows that cannot be tokenized are noted."""
    try:
        tokens = tokenize(rows, tokenizer, lambda i: reader.where(numbers[i]))
    except RowError as error:
        if len(rows) > 1:  # one at a time, to find which
            pairs = zip(rows, numbers, strict=True)
            return [
                one for row, number in pairs for one in _token_counts([row], [number], tokenizer, reader, problems)
            ]
        problems[numbers[0]] = str(error)
        return []
    found = []
    for prompt, completions in tokens:
        sizes = list(map(len, completions))
        found.append((len(prompt), *sizes, *(len(prompt) + size for size in sizes)))
    return found


def check_figure(name: str) -> None:
    """
    Raises:
        ValueError: a kind of file that is none of `FIGURES`.
        ImportError: no matplotlib.
    """
    if Path(name).suffix not in FIGURES:
        raise ValueError(f"{name}: a figure is one of {', '.join(FIGURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--plot needs matplotlib ({error}): pip install matplotlib, or pip install 'trl-margins[report]'"
        ) from error
