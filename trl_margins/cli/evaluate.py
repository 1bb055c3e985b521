"""`trl-margins evaluate`: how a model ranks answers: of pairs, of lists, of RM-Bench."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import Number
from ..data.loading import load_splits, pick_split
from ..data.splits import SPLITS
from ..evaluation.sets import EvaluationSet, evaluation_set
from ..evaluation.tables import report_tables
from ..report.markdown import inline, one_line
from ..report.run_folder import INFO
from .options import PROMPT_COLUMN, SCORE_COLUMNS, SYSTEM_COLUMN, OptionsParser
from .setup import DTYPES, check_writable, load_model, load_tokenizer, log_to_console

if TYPE_CHECKING:
    from ..evaluation.scorer import CompletionLogps

logger = logging.getLogger(__name__)

REWARDS = ("length-normalized", "sum", "log-ratio")
RM_BENCH = "RM-Bench"
RM_BENCH_LENGTH = 2048


@dataclass
class EvaluateArguments:
    """What to evaluate on what."""

    model_name_or_path: str = field(
        metadata={"help": "Folder (an adapter's too), Hub id, or bundled:smollm2-135m-instruct."}
    )
    dataset_name: list[str] = field(
        metadata={
            "help": "One or more: files, saved data sets, folders of files, Hub ids; pairs, lists (prompt, responses, "
            "scores) or RM-Bench files, which count together."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub set."})
    dataset_split: list[str] | None = field(
        default=None,
        metadata={"help": f"Splits; if not given, the only one there is, or all of {', '.join(SPLITS)}."},
    )
    reward: str = field(
        default="length-normalized",
        metadata={"help": "Mean log-probability per token, its sum, or log-ratio to --ref_model.", "choices": REWARDS},
    )
    ref_model: str | None = field(
        default=None,
        metadata={"help": "Reference of the log-ratio; of an adapter, the model under it, if not given."},
    )
    json: str | None = field(default=None, metadata={"help": "File that gets the numbers as JSON."})
    markdown: str | None = field(default=None, metadata={"help": "File that gets the tables."})
    rewards: str | None = field(default=None, metadata={"help": "File that gets each answer's reward, as JSON lines."})
    prompt_column: str | None = field(default=None, metadata={"help": PROMPT_COLUMN})
    system_column: str | None = field(default=None, metadata={"help": SYSTEM_COLUMN})
    score_columns: list[str] | None = field(default=None, metadata={"help": SCORE_COLUMNS})
    eval_min_score_gap: float = field(default=2.0, metadata={"help": "Least score gap of the pairs behind `pwa`."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt and completion, in tokens; longest completion of an encoder-decoder model. If not "
            f"given, what the model was trained with, or else what it takes at most; RM-Bench {RM_BENCH_LENGTH}, as "
            "its authors."
        },
    )
    tokenization: str | None = field(
        default=None,
        metadata={
            "help": "As `tokenization` of the trainer. If not given, what the model was trained with.",
            "choices": ["chat-template", "cpo"],
        },
    )
    batch_size: int = field(
        default=16, metadata={"help": "Answers per device and forward pass. Does not change the numbers."}
    )
    bootstrap: int = field(default=1000, metadata={"help": "Resamples behind the 95 %% intervals."})
    dtype: str = field(
        default="float32", metadata={"help": f"Dtype of the weights: {', '.join(DTYPES)}.", "choices": DTYPES}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model's own code."})

    def __post_init__(self) -> None:
        Number(least=1, whole=True, optional=True).check("max_length", self.max_length)
        for name in ("batch_size", "bootstrap"):
            Number(least=1, whole=True).check(name, getattr(self, name))
        Number(least=0).check("eval_min_score_gap", self.eval_min_score_gap)


def main(argv: Sequence[str]) -> int:
    """Evaluates, prints the tables, writes the files."""
    log_to_console()
    (args,) = OptionsParser(EvaluateArguments, prog="trl-margins evaluate").parse_args_and_config(list(argv))
    for file in filter(None, (args.json, args.markdown, args.rewards)):
        check_writable(Path(file).parent)
    import torch
    from accelerate import Accelerator

    from ..rows.tokens import prepare_tokenizer

    loading = {"trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(args.model_name_or_path, **loading)
    sets = load_sets(args, as_chat=tokenizer.chat_template is not None)
    prepare_tokenizer(tokenizer, [each.name for each in sets if any(row.is_conversational for row in each.rows)])
    # left to itself, accelerate takes several processes on a CPU for single ones
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = load_model(args.model_name_or_path, dtype=args.dtype, device_map=None, **loading)
    check_reward(args.reward, args.ref_model, model)
    common = {
        "tokenizer": tokenizer,
        "batch_size": args.batch_size,
        "accelerator": accelerator,
        "tokenization": tokenization_of(args, model),
    }
    longest = {each.name: longest_rows(args, each, model) for each in sets}
    scored = {each.name: score_set(model, each, max_length=longest[each.name], **common) for each in sets}
    references: dict[str, Any] = {}
    if args.reward == "log-ratio":
        if args.ref_model is not None:
            model = load_model(args.ref_model, dtype=args.dtype, device_map=None, **loading)
        use_adapter = args.ref_model is not None
        references = {
            each.name: score_set(model, each, max_length=longest[each.name], use_adapter=use_adapter, **common)
            for each in sets
        }
    if not accelerator.is_main_process:
        return 0
    rewards = {name: reward_of(args.reward, found, references.get(name)) for name, found in scored.items()}
    for name, found in rewards.items():
        check_finite(found, name)
    reports = report_sets(sets, rewards, scored, args.eval_min_score_gap, args.bootstrap)
    print(report_tables(reports, args.eval_min_score_gap, args.reward))
    settings = {
        "model": args.model_name_or_path,
        "reward": args.reward,
        "ref_model": args.ref_model,
        "min_score_gap": args.eval_min_score_gap,
        "max_length": longest,
        "tokenization": common["tokenization"],
        "dtype": args.dtype,
    }
    _write(args.json, json.dumps({**settings, "sets": reports}, indent=2))
    shown = {inline(name): report for name, report in reports.items()}  # a name could be more than a name there
    _write(args.markdown, report_tables(shown, args.eval_min_score_gap, args.reward))
    lines = (
        {"set": each.name, "row": i, "rewards": row.tolist(), "lengths": found.lengths.tolist()}
        for each in sets
        for i, (row, found) in enumerate(zip(rewards[each.name], scored[each.name], strict=True))
    )
    _write(args.rewards, "\n".join(map(json.dumps, lines)))
    return 0


def check_reward(reward: str, ref_model: str | None, model: Any) -> None:
    """Complains of a reference model where none is used, or missing.

    Raises:
        ValueError: with the fix.
    """
    from accelerate.utils import is_peft_model

    if reward != "log-ratio" and ref_model is not None:
        raise ValueError(f"reward {reward!r} uses no reference model: leave --ref_model out, or --reward log-ratio")
    if reward == "log-ratio" and ref_model is None and not is_peft_model(model):
        raise ValueError("reward 'log-ratio' needs --ref_model: the model that training began with")


def longest_rows(args: EvaluateArguments, each: EvaluationSet, model: Any) -> int:
    """The `max_length` of a set, and a line about where it is from."""
    if args.max_length is not None:
        return args.max_length
    name = "max_completion_length" if model.config.is_encoder_decoder else "max_length"
    if each.kind == "rm-bench":
        length, source = RM_BENCH_LENGTH, "as RM-Bench's authors have it"
    elif trained := trained_with(args.model_name_or_path).get(name):
        length, source = trained, "with which the model was trained"
    elif of_model := getattr(model.config.get_text_config(), "max_position_embeddings", None):
        length, source = of_model, "which is as much as the model takes"
    else:
        length, source = 1024, "since the model has no length of its own"
    logger.info("%s: %s=%d, %s", each.name, name, length, source)
    return length


def tokenization_of(args: EvaluateArguments, model: Any) -> str:
    """The way to tokens, and a line about it where a training run says which."""
    if model.config.is_encoder_decoder:
        return "cpo"
    if args.tokenization is not None:
        return args.tokenization
    trained = trained_with(args.model_name_or_path).get("tokenization")
    if trained:
        logger.info("tokenization=%r, with which the model was trained", trained)
    return trained or "chat-template"


def trained_with(model: str) -> Mapping[str, Any]:
    """The config of the run in whose folder the model is, or whose checkpoint it is."""
    folder = Path(model).expanduser()
    for file in (folder / INFO, folder.parent / INFO):
        if file.is_file():
            return json.loads(file.read_text()).get("config") or {}
    return {}


def load_sets(args: EvaluateArguments, as_chat: bool) -> list[EvaluationSet]:
    """All sets that the arguments name, RM-Bench's files as one."""
    found: list[EvaluationSet] = []
    for source in args.dataset_name:
        splits = load_splits(source, args.dataset_config)
        names = args.dataset_split or (SPLITS if set(SPLITS) <= set(splits) else [None])
        for split in names:
            name = one_line(Path(source).name.split(".")[0] if split is None or len(splits) == 1 else split)
            if name in (each.name for each in found):
                name = f"{source}:{split}" if split else source
            dataset = pick_split(splits, split, source)
            columns = {"prompt_column": args.prompt_column, "system_column": args.system_column}
            found.append(evaluation_set(dataset, name, args.score_columns, as_chat, source, **columns))
    files = [each for each in found if each.kind == "rm-bench"]
    others = [each for each in found if each.kind != "rm-bench"]
    if files:
        joined = {name: [value for each in files for value in getattr(each, name)] for name in ("rows", "domains")}
        others.append(replace(files[0], name=RM_BENCH, **joined))
    return others


def score_set(model: Any, each: EvaluationSet, **options: Any) -> list[CompletionLogps]:
    """Log-probabilities of a set's answers."""
    from ..evaluation.scorer import completion_logps

    return completion_logps(model, rows=each.rows, desc=each.name, **options)


def check_finite(rewards: Sequence[np.ndarray], name: str) -> None:
    """
    Raises:
        ValueError: a reward that is NaN or infinite, which no ranking can place; with the first such row.
    """
    if rows := [row for row, found in enumerate(rewards) if not np.isfinite(found).all()]:
        raise ValueError(
            f"{name}: the model gives NaN or infinite rewards in {len(rows)} of {len(rewards)} rows, first in row "
            f"{rows[0]}: look at its texts (--batch_size 1 tells them apart, since texts that are passed together "
            "share a NaN) and at the precision (--dtype float32), or drop the rows"
        )


def reward_of(
    reward: str, scored: Sequence[CompletionLogps], reference: Sequence[CompletionLogps] | None = None
) -> list[np.ndarray]:
    """[N] of [k] rewards, without β, which changes no ranking."""
    from torch import from_numpy

    from ..rewards import length_normalized, log_ratio

    logps = [from_numpy(each.logps) for each in scored]
    if reward == "length-normalized":
        logps = [length_normalized(each, from_numpy(row.lengths)) for each, row in zip(logps, scored, strict=True)]
    elif reward == "log-ratio":
        logps = [log_ratio(each, from_numpy(row.logps)) for each, row in zip(logps, reference, strict=True)]
    return [each.numpy() for each in logps]


def report_sets(
    sets: Sequence[EvaluationSet],
    rewards: Mapping[str, Sequence[np.ndarray]],
    scored: Mapping[str, Sequence[CompletionLogps]],
    min_score_gap: float,
    n_resamples: int,
) -> dict[str, dict[str, Any]]:
    """Each set's numbers, with its `kind`."""
    from ..evaluation.listwise import listwise_report
    from ..evaluation.pairs import Pairs, pair_report
    from ..evaluation.rm_bench import rm_bench_report

    reports: dict[str, dict[str, Any]] = {}
    for each in sets:
        found = rewards[each.name]
        if each.kind == "listwise":
            report = listwise_report(found, each.scores, n_resamples)
        elif each.kind == "rm-bench":
            chosen, rejected = np.split(np.stack(found), 2, axis=1)
            report = rm_bench_report(chosen, rejected, each.domains, n_resamples)
        else:
            lengths = np.stack([row.lengths for row in scored[each.name]]).T
            scores = () if each.scores is None else np.array(each.scores, float).T
            pairs = Pairs(*np.stack(found).T, *lengths, *scores, gap_only=each.gap_only)
            report = pair_report(pairs, [str(row.prompt) for row in each.rows], min_score_gap, n_resamples)
        reports[each.name] = {"kind": each.kind, **report}
    return reports


def _write(file: str | None, text: str) -> None:
    if file:
        Path(file).write_text(text + "\n")
