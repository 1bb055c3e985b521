"""`trl-margins evaluate`: measures how a model ranks completions: pairs, lists, RM-Bench."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.loading import load_splits, pick_split
from ..data.splits import SPLITS
from ..distributed import check_processes
from ..evaluation.sets import EvaluationSet, evaluation_set
from ..evaluation.tables import report_tables
from ..report.markdown import inline, one_line
from .options import DTYPES, OptionsParser, ScoredRowOptions, option
from .setup import MAX_LENGTH, check_writable, load_model, load_tokenizer, trained_with

if TYPE_CHECKING:
    from ..evaluation.scorer import CompletionLogps

logger = logging.getLogger(__name__)

REWARDS = ("length-normalized", "sum", "log-ratio")
RM_BENCH = "RM-Bench"
RM_BENCH_LENGTH = 2048


@dataclass(kw_only=True)
class EvaluateArguments(ScoredRowOptions):
    """Model and data sets."""

    model_name_or_path: str = option("Folder (also an adapter's), Hub id, or bundled:smollm2-135m-instruct.")
    dataset_name: list[str] = option(
        "One or more files, saved data sets, folders of files or Hub ids: pairs, lists (prompt, responses, scores) "
        "or RM-Bench files, which count as one set."
    )
    dataset_split: list[str] | None = option(
        f"Splits; by default the only one there is, or all of {', '.join(SPLITS)}.", None
    )
    reward: str = option(
        "Mean log-probability per token, as in the trainers' eval_pwa, its sum, or log-ratio to --ref_model.",
        "length-normalized",
        choices=REWARDS,
    )
    ref_model: str | None = option("Reference model of the log-ratio; by default, an adapter's base model.", None)
    drift_from: str | None = option(
        "Model that training started from, with the same vocabulary: also reports the KL divergence from it.", None
    )
    json: str | None = option("File for the numbers, as JSON.", None)
    markdown: str | None = option("File for the tables.", None)
    rewards: str | None = option("File for the reward of each completion, as JSON lines.", None)
    eval_min_score_gap: float = option("Smallest score gap of the pairs behind `pwa`.", 2.0)
    max_length: int | None = option(
        "Longest prompt and completion, in tokens; longest completion of an encoder-decoder model. By default that "
        f"of the model's training run, else the model's limit; for RM-Bench {RM_BENCH_LENGTH}, as its authors set it.",
        None,
    )
    tokenization: str | None = option(
        "As `tokenization` of the trainer. By default that of the model's training run.",
        None,
        choices=["chat-template", "cpo"],
    )
    batch_size: int = option("Completions per device and forward pass. Does not change the numbers.", 16)
    bootstrap: int = option("Resamples for the 95 %% intervals.", 1000)
    dtype: str = option(f"Dtype of the weights: {', '.join(DTYPES)}.", "float32", choices=DTYPES)
    trust_remote_code: bool = option("Run the model's own code.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward != "log-ratio" and self.ref_model is not None:
            raise ValueError(
                f"reward {self.reward!r} uses no reference model: remove --ref_model, or set --reward log-ratio"
            )


def main(argv: Sequence[str]) -> int:
    """Evaluates, prints the tables, writes the files."""
    (args,) = OptionsParser("evaluate", EvaluateArguments).parse(argv)
    for file in filter(None, (args.json, args.markdown, args.rewards)):
        check_writable(Path(file).parent)
    import torch
    from accelerate import Accelerator
    from accelerate.utils import is_peft_model

    from ..evaluation.drift import check_one_vocabulary, completion_kl
    from ..evaluation.scorer import completion_tokens, logps_of_tokens
    from ..rows.tokens import prepare_tokenizer

    def load(name: str) -> Any:
        return load_model(name, dtype=args.dtype, device_map=None, trust_remote_code=args.trust_remote_code)

    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    sets = load_sets(args, as_chat=tokenizer.chat_template is not None)
    prepare_tokenizer(tokenizer, [each.name for each in sets if any(row.is_conversational for row in each.rows)])
    # by itself, accelerate treats several processes on a CPU as single ones
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    check_processes(accelerator.num_processes)
    model = load(args.model_name_or_path)
    if args.reward == "log-ratio" and args.ref_model is None and not is_peft_model(model):
        raise ValueError("reward 'log-ratio' needs --ref_model: the model that training started from")
    start = None if args.drift_from is None else load(args.drift_from)
    if args.drift_from is not None:
        names = args.model_name_or_path, args.drift_from
        check_one_vocabulary(
            names,
            (tokenizer, load_tokenizer(args.drift_from, trust_remote_code=args.trust_remote_code)),
            (model, start),
        )
    tokenization = args.tokenization or trained_with(args.model_name_or_path, "tokenization") or "chat-template"
    if model.config.is_encoder_decoder:
        tokenization = "cpo"
    longest = longest_rows(args, sets, model)

    tokens = {
        each.name: completion_tokens(model, tokenizer, each.rows, longest[each.name], tokenization, each.name)
        for each in sets
    }

    def score(model: Any, use_adapter: bool = True) -> dict[str, list[CompletionLogps]]:
        return {
            name: logps_of_tokens(model, rows, args.batch_size, accelerator, use_adapter, name)
            for name, rows in tokens.items()
        }

    scored = score(model)
    kls = {
        name: completion_kl(model, start, rows, args.batch_size, accelerator, f"{name}, drift")
        for name, rows in (tokens.items() if start is not None else ())
    }
    references: dict[str, list[CompletionLogps]] = {}
    if args.reward == "log-ratio":
        references = score(model, use_adapter=False) if args.ref_model is None else score(load(args.ref_model))
    if not accelerator.is_main_process:
        return 0
    rewards = {name: rewards_of(args.reward, found, references.get(name)) for name, found in scored.items()}
    check_finite(rewards)
    reports = {
        each.name: report_of(each, rewards[each.name], scored[each.name], args, kls.get(each.name)) for each in sets
    }
    print(report_tables(reports, args.eval_min_score_gap, args.reward))
    settings = {
        "model": args.model_name_or_path,
        "reward": args.reward,
        "ref_model": args.ref_model,
        "drift_from": args.drift_from,
        "min_score_gap": args.eval_min_score_gap,
        "max_length": longest,
        "tokenization": tokenization,
        "dtype": args.dtype,
    }
    shown = {inline(name): report for name, report in reports.items()}
    lines = (
        json.dumps({"set": each.name, "row": i, "rewards": row.tolist(), "lengths": logps.lengths.tolist()})
        for each in sets
        for i, (row, logps) in enumerate(zip(rewards[each.name], scored[each.name], strict=True))
    )
    for file, text in (
        (args.json, json.dumps({**settings, "sets": reports}, indent=2)),
        (args.markdown, report_tables(shown, args.eval_min_score_gap, args.reward)),
        (args.rewards, "\n".join(lines)),
    ):
        if file:
            Path(file).write_text(f"{text}\n")
    return 0


def longest_rows(args: EvaluateArguments, sets: Sequence[EvaluationSet], model: Any) -> dict[str, int]:
    """The `max_length` of each set."""
    length = args.max_length
    if length is None:
        name = "max_completion_length" if model.config.is_encoder_decoder else "max_length"
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = trained_with(args.model_name_or_path, name) or limit or MAX_LENGTH
    default = {"rm-bench": RM_BENCH_LENGTH} if args.max_length is None else {}
    found = {each.name: default.get(each.kind, length) for each in sets}
    logger.info("longest rows, in tokens: %s", found)
    return found


def load_sets(args: EvaluateArguments, as_chat: bool) -> list[EvaluationSet]:
    """The sets that the arguments name, with all RM-Bench files as one."""
    found: list[EvaluationSet] = []
    columns = {"prompt_column": args.prompt_column, "system_column": args.system_column}
    for source in args.dataset_name:
        splits = load_splits(source, args.dataset_config)
        names: Sequence[str | None] = args.dataset_split or (SPLITS if set(SPLITS) <= set(splits) else [None])
        for split in names:
            name = one_line(Path(source).name.split(".")[0] if split is None or len(splits) == 1 else split)
            if name in (each.name for each in found):
                name = f"{source}:{split}" if split else source
            dataset = pick_split(splits, split, source)
            found.append(evaluation_set(dataset, name, args.score_columns, as_chat, source, **columns))
    bench = [each for each in found if each.kind == "rm-bench"]
    if not bench:
        return found
    rows = [row for each in bench for row in each.rows]
    domains = [domain for each in bench for domain in each.domains]
    others = [each for each in found if each.kind != "rm-bench"]
    return [*others, replace(bench[0], name=RM_BENCH, rows=rows, domains=domains)]


def rewards_of(
    reward: str, scored: Sequence[CompletionLogps], reference: Sequence[CompletionLogps] | None = None
) -> list[np.ndarray]:
    """[N] of [k] rewards, without β, which does not change the ranking."""
    from torch import from_numpy

    from ..rewards import length_normalized, log_ratio

    if reward == "length-normalized":
        return [length_normalized(from_numpy(row.logps), from_numpy(row.lengths)).numpy() for row in scored]
    if reward == "log-ratio" and reference is not None:
        pairs = zip(scored, reference, strict=True)
        return [log_ratio(from_numpy(row.logps), from_numpy(ref.logps)).numpy() for row, ref in pairs]
    return [row.logps for row in scored]


def check_finite(rewards: Mapping[str, Sequence[np.ndarray]]) -> None:
    """
    Raises:
        ValueError: a reward is NaN or infinite; names the first such row.
    """
    for name, rows in rewards.items():
        if bad := [i for i, row in enumerate(rows) if not np.isfinite(row).all()]:
            raise ValueError(
                f"{name}: the model gives NaN or infinite rewards in {len(bad)} of {len(rows)} rows, first in row "
                f"{bad[0]}: look at its texts (with --batch_size 1, since a NaN spreads within a batch) and at the "
                "precision (--dtype float32), or drop the rows"
            )


def report_of(
    each: EvaluationSet,
    rewards: Sequence[np.ndarray],
    scored: Sequence[CompletionLogps],
    args: EvaluateArguments,
    kls: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """A set's numbers and its `kind`."""
    from ..evaluation.drift import drift_report
    from ..evaluation.listwise import listwise_report
    from ..evaluation.pairs import Pairs, pair_report
    from ..evaluation.rm_bench import rm_bench_report

    if each.kind == "listwise":
        report = listwise_report(rewards, each.scores or [], args.bootstrap)
    elif each.kind == "rm-bench":
        chosen, rejected = np.split(np.stack(rewards), 2, axis=1)
        report = rm_bench_report(chosen, rejected, each.domains, args.bootstrap)
    else:
        columns = [*np.stack(rewards).T, *np.stack([row.lengths for row in scored]).T]
        if each.scores is not None:
            columns += [*np.array(each.scores, float).T]
        pairs = Pairs(*columns)._replace(gap_only=each.gap_only)
        # as the trainers, without the pairs whose prompt alone fills the length
        left = np.flatnonzero(pairs.chosen_lengths + pairs.rejected_lengths)
        prompts = [str(each.rows[i].prompt) for i in left]
        report = pair_report(pairs.take(left), prompts, args.eval_min_score_gap, args.bootstrap)
    if kls is not None:
        lengths, prompts = [row.lengths for row in scored], [str(row.prompt) for row in each.rows]
        drift, interval = drift_report(kls, lengths, prompts, args.bootstrap)
        report |= {"kl_drift": drift, "intervals": {**report["intervals"], "kl_drift": interval}}
    return {"kind": each.kind, **report}
