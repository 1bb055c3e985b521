"""`trl-margins inspect`: audits a preference set before training."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from trl.data_utils import common_prefix_length

from ..checks import Number, unknown
from ..data.audit import Lengths, Measure, audit
from ..data.evaluation_factors import BERTSCORE_METRICS, METRICS
from ..data.loading import chosen_splits
from ..disk import write
from ..report.audit_text import audit_text
from ..rows import PreferenceRow, RowReader
from ..rows.scores import find_score_columns
from ..rows.tokenized import AT_FIRST, log_notes, log_unread
from ..rows.tokens import RowTokens, read_batch, tokenize_or_errors
from .options import LENGTH, OptionsParser, ScoredRowOptions, data_first, option, usage, warn_of_unread
from .pairs import lists_text, summaries_of_lists
from .setup import check_files, check_format, load_tokenizer, max_length_of

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FIGURES = (".png", ".svg")
ALL = "all"
OF_LISTS = (  # the options that scored lists have a use for
    *("dataset_name", "dataset_config", "dataset_split", "json"),
    *("score_columns", "prompt_column", "system_column"),
)


@dataclass(kw_only=True)
class InspectArguments(ScoredRowOptions):
    """What to audit."""

    dataset_name: str = option(
        "A file, a saved data set, a folder of files or a Hub id. Needs no flag if it comes first, as DATA."
    )
    dataset_split: str | None = option("Split; all by default.", None)
    model_name_or_path: str | None = option(
        "Folder, Hub id, or bundled:smollm2-135m-instruct, whose tokenizer measures the lengths. Without it, lengths "
        "are in words.",
        None,
    )
    max_length: int | None = option(LENGTH, None)
    eval_min_score_gap: float = option("Smallest score gap of the pairs behind `pwa`.", 2.0)
    score_gap_threshold: float = option(
        "GapPO's hard filter, in the gradient mass: the least score gap it keeps.", 1.0
    )
    ef_metrics: list[str] | None = option(
        "Evaluation factors to compare, with the margins that GaPO makes from them under each mapping and "
        f"normalization: {', '.join(METRICS)}; or {ALL}: without an encoder, those that need none.",
        None,
    )
    encoder: str | None = option("BERTScore: folder or Hub id of the encoder.", None)
    ef_sample: int = option(
        "Number of rows to compute evaluation factors for: ROUGE-L, unless there is an evaluation_factor column, and "
        "those of ef_metrics.",
        1000,
    )
    seed: int = option("Seed of that sample, and of the order of pairs under GapPO's normalised weights.", 0)
    json: str | None = option("File for all numbers, as JSON.", None)
    plot: str | None = option("File (.png, .svg) for the histograms; further pictures are beside it.", None)
    trust_remote_code: bool = option("Run the tokenizer's own code.", False)


def main(argv: Sequence[str]) -> int:
    """Audits, prints, writes the JSON and the figure."""
    parser = OptionsParser("inspect", InspectArguments, usage="trl-margins inspect DATA [options]")
    (args,) = parser.parse(data_first(argv))
    with usage():
        if args.plot:
            check_figure(args.plot)  # before the work
        metrics = compared_metrics(args.ef_metrics or [], args.encoder)
        Number(least=0).check("score_gap_threshold", args.score_gap_threshold)
        Number(least=0, whole=True).check("ef_sample", args.ef_sample)
        check_files((args.json, args.plot), [args.dataset_name])
        check_format(args.json, "JSON", ".json")
    splits = chosen_splits(args.dataset_name, args.dataset_config, args.dataset_split)
    if lists := summaries_of_lists(splits, args.score_columns, args.prompt_column, args.system_column):
        splits = {name: split for name, split in splits.items() if name not in lists}
        given = [each.name for each in fields(args) if getattr(args, each.name) != each.default]
        if not splits and (unused := [f"--{name}" for name in given if name not in OF_LISTS]):
            out = "pairs.jsonl.gz" if len(lists) == 1 else "pairs"
            raise ValueError(
                f"{args.dataset_name} has scored lists, and these options are for pairs: {', '.join(unused)}. Make "
                f"pairs with trl-margins pairs {args.dataset_name} --out {out}, and inspect {out}"
            )
        print(lists_text(lists))
        if not splits:
            if args.json:
                write(args.json, json.dumps({"lists": lists}, indent=2) + "\n")
            return 0
    of_model = "max_length trust_remote_code", args.model_name_or_path, "a model's tokenizer (--model_name_or_path)"
    scored = (find_score_columns(split.column_names, args.score_columns, strict=False) for split in splits.values())
    warn_of_unread((of_model, ("eval_min_score_gap score_gap_threshold", any(scored), "pairs with scores")), args)
    measure = None
    if args.model_name_or_path:
        measure = in_tokens_of(load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code))
    from ..registry import get_method, method_ids

    found = audit(
        splits,
        score_columns=args.score_columns,
        min_score_gap=args.eval_min_score_gap,
        score_gap_threshold=args.score_gap_threshold,
        measure=measure,
        max_length=max_length_of(args.max_length, args.model_name_or_path),
        ef_sample=args.ef_sample,
        ef_metrics=metrics,
        encoder=args.encoder,
        seed=args.seed,
        methods={method_id: columns_of(get_method(method_id)) for method_id in method_ids()},
        prompt_column=args.prompt_column,
        system_column=args.system_column,
    )
    print(audit_text(found))
    if args.json:
        write(args.json, json.dumps(asdict(found), indent=2) + "\n")
    if args.plot:
        from ..report.audit_figure import write_figures

        for file, caption in write_figures(found, Path(args.plot)).items():
            print(f"{file}: {caption}")
    return 0


def compared_metrics(named: Sequence[str], encoder: str | None) -> list[str]:
    """The evaluation factors that `ef_metrics` names.

    Raises:
        ValueError: an unknown metric, BERTScore without an encoder, or an encoder without BERTScore.
    """
    if wrong := [metric for metric in named if metric not in (*METRICS, ALL)]:
        raise unknown("metric of ef_metrics", wrong[0], (*METRICS, ALL))
    whole = [metric for metric in METRICS if encoder or metric not in BERTSCORE_METRICS]
    metrics = list(dict.fromkeys(each for metric in named for each in (whole if metric == ALL else [metric])))
    semantic = [metric for metric in metrics if metric in BERTSCORE_METRICS]
    if semantic and not encoder:
        raise ValueError(f"{semantic[0]} needs an encoder: name it, for example --encoder roberta-large")
    if encoder and not semantic:
        raise ValueError(f"the encoder is for BERTScore: compute it with --ef_metrics {ALL}, or leave the encoder out")
    return metrics


def columns_of(method: Any) -> list[str]:
    """The columns that a method's terms and its loss read."""
    from ..methods import names_of
    from ..registry import find_link, term_class

    parts: list[Any] = [
        term_class(kind, name) for kind in ("weight", "margin") for name in names_of(getattr(method, kind))
    ]
    parts += [find_link(method.bases[0], name) for name in names_of(method.loss)]
    return [column for part in parts for column in part.columns]


def in_tokens_of(tokenizer: Any) -> Measure:
    """Counts the tokens that training makes of each row."""
    from datasets.utils import tqdm

    def measure(dataset: Dataset, reader: RowReader, readable: list[int]) -> Lengths:
        counts: list[tuple[int, ...]] = []
        problems: dict[int, str] = {}
        rows = dataset.select(readable).select_columns(reader.needed)
        with tqdm(total=len(rows), desc="Counting tokens", unit="pair", delay=2, leave=False) as bar:
            for start in range(0, len(rows), AT_FIRST):
                numbers = readable[start : start + AT_FIRST]
                batch = read_batch(reader, rows[start : start + AT_FIRST], numbers)
                read: list[tuple[int, PreferenceRow, RowTokens]] = []
                found = tokenize_or_errors(batch, tokenizer)
                for number, row, tokens in zip(numbers, batch, found, strict=True):
                    if isinstance(tokens, Exception):
                        problems[number] = f"{reader.where(number)}: {tokens}"
                        continue
                    read.append((number, row, tokens))
                    size, sizes = len(tokens.prompt), [len(completion) for completion in tokens.completions]
                    n_alike = common_prefix_length(*tokens.completions)
                    counts.append((size, *sizes, n_alike, *(size + each for each in sizes)))
                if start == 0 and read:
                    of_rows, kept, theirs = zip(*read, strict=True)
                    log_unread(reader.split, kept, tokenizer, of_rows)
                    log_notes(reader.split, kept, theirs, tokenizer, of_rows)
                bar.update(len(numbers))
        prompt, chosen, rejected, alike, *whole = np.array(counts, int).reshape(-1, 6).T
        return Lengths("tokens", prompt, chosen, rejected, alike, np.array(whole), problems)

    return measure


def check_figure(name: str) -> None:
    """
    Raises:
        ValueError: the file's suffix is not in `FIGURES`.
        ImportError: no matplotlib.
    """
    if Path(name).suffix not in FIGURES:
        raise ValueError(f"{name}: a figure is one of {', '.join(FIGURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--plot needs matplotlib ({error}): pip install 'trl-margins[report]'") from error
