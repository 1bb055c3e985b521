"""`trl-margins score`: adds evaluation factors or a reward model's scores, and prints how they are distributed."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.evaluation_factors import (
    BERTSCORE_METRICS,
    METRICS,
    add_evaluation_factor,
    check_evaluation_factors,
    warn_of_few_words,
)
from ..data.loading import chosen_splits
from ..data.local_files import BUILDERS, is_saved, kind_of
from ..disk import check_writable, naming, written
from ..rows import open_rows
from ..tables import aligned
from .options import DTYPES, OptionsParser, RowOptions, data_first, option, warn_of_unread
from .setup import check_files, find_model, load_tokenizer, weights_of

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

FILES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
_RESULT = re.compile(  # as `inspect`, `evaluate`, its rewards, and `compare` begin
    rb'\{\s*(?:"(?:splits|lists)": \{\s*"[^"]*": \{\s*"n_|(?:"model": "[^"]*",\s*)?"reward": "[^"]*",\s*"ref_model"'
    rb'|(?:"model": "[^"]*", )?"set": "[^"]*", "row": \d+, "rewards"|"table": \[)'
)


@dataclass(kw_only=True)
class ScoreArguments(RowOptions):
    """What to score, how, and where to write it."""

    dataset_name: str = option(
        "A file, a saved data set, a folder of files or a Hub id. Needs no flag if it comes first, as DATA."
    )
    dataset_split: str | None = option("Split; all by default.", None)
    reward_model: str | None = option(
        "Scores the answers with this reward model, a folder (also an adapter's) or a Hub id: lists get `scores`, "
        "pairs `score_chosen` and `score_rejected`.",
        None,
    )
    reward_label: int | None = option("Which label of the reward model is the score, if it has several.", None)
    max_length: int | None = option(
        "Reward model: longest prompt and answer, in tokens. By default what model and tokenizer take.", None
    )
    dtype: str = option(f"Reward model: dtype of the weights: {', '.join(DTYPES)}.", "auto", choices=DTYPES)
    trust_remote_code: bool = option("Run the reward model's own code.", False)
    metric: str | None = option(f"One of {', '.join(METRICS)}. Default: rougeL.", None)
    encoder: str | None = option("BERTScore: folder or Hub id of the encoder.", None)
    num_layers: int | None = option("BERTScore: takes the embeddings after this layer.", None)
    batch_size: int | None = option(
        "Texts per forward pass of BERTScore (default: 8 on a CPU, else 64) or of the reward model (16).", None
    )
    device: str | None = option("BERTScore, reward model: by default the accelerator, else the CPU.", None)
    column: str | None = option("Name of the evaluation factor's column. Default: evaluation_factor.", None)
    overwrite: bool = option("Replace columns of the new names.", False)
    num_proc: int | None = option("Processes; not for BERTScore.", None)
    output: str | None = option(
        f"A file ({', '.join(FILES)}) for one split, or a folder. Without it, only the table is printed.",
        None,
        aliases=["--out"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.column == "":
            raise ValueError("column is empty: give the new column a name, or leave it out")
        of_factors = {"metric": self.metric, "encoder": self.encoder, "num_layers": self.num_layers}
        of_factors |= {"column": self.column, "num_proc": self.num_proc}
        of_rewards = {"reward_label": self.reward_label, "max_length": self.max_length}
        others = of_rewards if self.reward_model is None else of_factors
        if given := [name for name, value in others.items() if value is not None]:
            if self.reward_model is None:
                raise ValueError(f"{given[0]} is for a reward model: name one with --reward_model, or leave it out")
            raise ValueError(f"{given[0]} is for an evaluation factor: leave it out, or leave out --reward_model")
        bertscore = self.metric in BERTSCORE_METRICS
        of_both = bertscore or self.reward_model is not None
        of_encoder = f"BERTScore (--metric {BERTSCORE_METRICS[-1]})"
        unread = (
            ("dtype trust_remote_code", self.reward_model is not None, "a reward model (--reward_model)"),
            ("encoder num_layers", bertscore, of_encoder),
            ("batch_size device", of_both, f"{of_encoder} and reward models"),
            ("num_proc", not bertscore, "other metrics than BERTScore, which takes all rows in one process"),
        )
        warn_of_unread(unread, self)


def main(argv: Sequence[str]) -> int:
    """Scores, writes, prints the table."""
    parser = OptionsParser("score", ScoreArguments, usage="trl-margins score DATA [options]")
    (args,) = parser.parse(data_first(argv))
    # not decoded, so that what is written is what was read
    splits = chosen_splits(args.dataset_name, args.dataset_config, args.dataset_split, decoded=None)
    if args.output:
        check_output(args.output, splits)  # before hours of scoring
        check_place(args.output, args.dataset_name, len(splits))
    if args.reward_model is not None:
        return score_by_model(args, splits)
    metric, column = args.metric or "rougeL", args.column or "evaluation_factor"
    names = ("num_proc", "encoder", "num_layers", "batch_size", "device", "overwrite")
    options = {name: getattr(args, name) for name in names}
    for name, split in splits.items():
        reader = open_rows(split, name, args.prompt_column, args.system_column).reader
        splits[name] = add_evaluation_factor(split, metric, column, reader=reader, **options)
    if args.output:
        write(args.output, splits)
    print(table({name: split.with_format("numpy")[column][:] for name, split in splits.items()}, metric))
    return 0


def score_by_model(args: ScoreArguments, splits: DatasetDict) -> int:
    """Adds a reward model's scores, writes, prints the table. What a stopped run has scored is not scored again."""
    import torch

    from ..evaluation.vocabularies import check_ids
    from ..generation.reward_model import (
        cut_tokens,
        load_reward_model,
        longest_input,
        reward_scores,
        rows_to_score,
        tokens_to_score,
    )
    from ..generation.store import Journal
    from ..rows.answers import digest

    name, code = str(args.reward_model), args.trust_remote_code
    tokenizer = load_tokenizer(name, trust_remote_code=code)
    rows, columns = {}, {}
    for split, dataset in splits.items():
        rows[split], are_lists = rows_to_score(dataset, split, args.prompt_column, args.system_column)
        columns[split] = ["scores"] if are_lists else ["score_chosen", "score_rejected"]
        if there := [each for each in columns[split] if each in dataset.column_names and not args.overwrite]:
            raise ValueError(f"{split} has a column {there[0]!r} already: replace it with overwrite (--overwrite)")
    tokens = {split: tokens_to_score(some, tokenizer, split) for split, some in rows.items()}
    model = load_reward_model(find_model(name), dtype=args.dtype, trust_remote_code=code)
    model.to(args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    longest = longest_input(model, tokenizer, args.max_length)
    settings = {"reward_model": name, "reward_label": args.reward_label, "max_length": longest, "dtype": args.dtype}
    settings |= weights_of(name)
    journal = Journal(args.output, settings, lambda row: row["key"]) if args.output else None
    scored = {}
    for split, uncut in tokens.items():
        some = cut_tokens(uncut, rows[split], tokenizer, longest)
        check_ids(model, [[each["input_ids"] for each in row] for row in some], split)
        keys = [digest(each) for each in some]
        known = {} if journal is None else {key: row["scores"] for key, row in journal.rows.items()}
        todo = [i for i, key in enumerate(keys) if key not in known]
        for i, scores in reward_scores(model, some, args.batch_size or 16, args.reward_label, todo):
            known[keys[i]] = scores
            if journal is not None:
                journal.add({"key": keys[i], "scores": scores})
        scored[split] = [known[key] for key in keys]
        dataset = splits[split].remove_columns([each for each in columns[split] if each in splits[split].column_names])
        made = [scored[split]] if columns[split] == ["scores"] else zip(*scored[split], strict=True)
        for column, values in zip(columns[split], made, strict=True):
            dataset = dataset.add_column(column, list(values))
        splits[split] = dataset
    if args.output and journal is not None:
        write(args.output, splits)
        journal.close()
    print(reward_table(scored))
    return 0


def reward_table(scores: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """One line per split: answers, mean, quartiles, and the mean difference of the best and the worst of a row."""
    rows = []
    for name, lists in scores.items():
        every = [score for some in lists for score in some]
        gaps = [max(some) - min(some) for some in lists if some]
        numbers = (np.mean(every), *np.quantile(every, (0.25, 0.5, 0.75)), np.mean(gaps)) if every else ()
        rows.append([name, str(len(lists)), str(len(every)), *(f"{number:.4f}" for number in numbers)])
    headers = ["rewards", "rows", "answers", "mean", "25 %", "median", "75 %", "best − worst"]
    return aligned(rows, headers)


def check_output(output: str, splits: DatasetDict, check_columns: bool = True) -> None:
    """
    Raises:
        ValueError: several splits for one file, a column that the format cannot hold, or a suffix of no known file.
    """
    from ..data.saving import check_types

    suffix = _suffix(output)
    if not suffix:
        return
    if suffix not in FILES:
        raise ValueError(f"{output}: a file is one of {', '.join(FILES)}, and a folder's name has no suffix")
    if len(splits) > 1:
        raise ValueError(f"{output} holds one split, not {list(splits)}: name one with --dataset_split, or a folder")
    if check_columns:
        check_types(next(iter(splits.values())).features, suffix, output)


def check_place(output: str, source: str, n_splits: int) -> None:
    """Checks that a file, or the files of a data set in a folder, can be written, and would then be read again.

    Raises:
        ValueError: the place of the data itself, a file for a folder, or a saved set of another kind.
        OSError: it cannot be written to.
    """
    folder = Path(output)
    if _suffix(output):
        check_files([output], [source])
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{output} is a file, and a name without one of {', '.join(FILES)} is a folder's")
    if folder.is_dir() and folder.resolve() == Path(source).expanduser().resolve():
        raise ValueError(f"{output} is read, and would be lost: name another folder")
    other = "state.json" if n_splits > 1 else "dataset_dict.json"  # that is read first, or beside
    if (folder / other).exists():
        raise ValueError(f"{output} has another saved data set: name another folder, or remove it")
    if is_saved(folder):
        logger.warning("the data set in %s will be written over", output)
    elif beside := _data_in(folder):
        raise ValueError(f"{output} has {beside}, which nobody reads beside a saved data set: name another folder")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    check_writable(folder)
    with suppress(OSError):  # they are made when it is written: a command that fails leaves nothing
        for each in made:
            each.rmdir()


def _data_in(folder: Path) -> Path | None:
    """A file of data in a folder without a saved data set, or in a folder there for data or a split; results aside."""
    from datasets.data_files import SPLIT_KEYWORDS

    names = ("*", *(f"{each}/*" for each in ("data", *chain(*SPLIT_KEYWORDS.values()))))
    for file in sorted({file for name in names for file in folder.glob(name)}):
        is_data = kind_of(file) in BUILDERS and file.is_file() and not file.name.startswith((".", "_"))
        if is_data and not _is_result(file):
            return file.relative_to(folder)
    return None


def _is_result(file: Path) -> bool:
    """Whether `inspect`, `evaluate`, `compare` or a trainer wrote it, or `datasets` as a cache."""
    if file.suffix not in (".json", ".jsonl"):
        return file.name.startswith("cache-") and file.suffix == ".arrow"
    if file.name.endswith("_results.json"):  # transformers'
        return True
    with file.open("rb") as opened:
        return _RESULT.match(opened.read(4096)) is not None


def write(output: str, splits: DatasetDict) -> None:
    """Writes one split to a file, by its suffix, or any number to a folder."""
    from ..data.saving import save

    suffix, only = _suffix(output), next(iter(splits.values()))
    if not suffix:
        with naming(output):
            (only if len(splits) == 1 else splits).save_to_disk(output)
        return
    with written(output) as file:
        save(only, file, suffix)


def table(columns: Mapping[str, Any], metric: str) -> str:
    """One line per split: rows, mean, quartiles, and the shares of 0 and 1."""
    rows = []
    for name, values in columns.items():
        summary = check_evaluation_factors(values, metric, name)
        warn_of_few_words(summary, metric, name)
        cells = ["-"] * 6
        if summary.n:
            numbers = (summary.mean, *np.quantile(values, (0.25, 0.5, 0.75)))
            shares = (summary.n_zero / summary.n, summary.n_one / summary.n)
            cells = [*(f"{number:.4f}" for number in numbers), *(f"{share:.2%}" for share in shares)]
        rows.append([name, str(summary.n), *cells])
    headers = [metric, "rows", "mean", "25 %", "median", "75 %", "EF = 0", "EF = 1"]
    return aligned(rows, headers)


def _suffix(output: str) -> str:
    name = Path(output).name
    return next((s for s in FILES if name.endswith(s)), Path(output).suffix)
