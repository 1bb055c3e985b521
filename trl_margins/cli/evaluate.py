"""`trl-margins evaluate`: measures how models rank completions: pairs, lists, RM-Bench."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from ..data.loading import is_slice, load_splits, pick_split
from ..data.splits import SPLITS
from ..disk import write
from ..distributed import check_processes
from ..evaluation.sets import EvaluationSet, evaluation_set
from ..evaluation.tables import model_tables, report_tables
from ..report.markdown import inline, one_line
from ..report.run_folder import unique_names
from .cases import targets
from .evaluate_options import EvaluateArguments
from .inspect import check_figure
from .measured import Measured, Plan, measure, rewards_of
from .options import OptionsParser, usage
from .setup import check_files, check_format, find_model, trained_as

logger = logging.getLogger(__name__)

RM_BENCH = "RM-Bench"


def main(argv: Sequence[str]) -> int:
    """Evaluates, prints the tables, writes the files."""
    (args,) = OptionsParser("evaluate", EvaluateArguments).parse(argv)
    with usage():
        if args.plot:
            check_figure(args.plot)
        check_files((args.json, args.markdown, args.rewards, args.plot), args.dataset_name)
        check_format(args.json, "JSON", ".json")
        check_format(args.markdown, "Markdown", ".md")
        check_format(args.rewards, "JSON lines", ".jsonl")
    import torch
    from accelerate import Accelerator
    from accelerate.utils.memory import clear_device_cache

    for name in filter(None, (*args.model_name_or_path, args.drift_from)):
        find_model(name)
    runs = trained_as(args.model_name_or_path)
    of = targets(args.cases, runs) if args.cases else {}
    plans = [Plan.of(args, name, run, of.get(name)) for name, run in runs.items()]
    if args.ref_model is not None and not any(plan.compares for plan in plans):
        raise ValueError(
            f"reward {args.reward!r} uses no reference model: remove --ref_model, or set --reward log-ratio"
        )
    for option, rows in (
        ("max_length", "rows cut at different lengths"),
        ("tokenization", "rows tokenized differently"),
    ):
        found = {plan.model: getattr(plan, option) for plan in plans}
        if len({*found.values()}) > 1:
            logger.warning("the models see %s: give --%s to compare them (now %s)", rows, option, found)
    sets = cache(partial(load_sets, args))  # with messages or without
    # by itself, accelerate treats several processes on a CPU as single ones
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    check_processes(accelerator.num_processes)
    measured: dict[str, Measured] = {}
    for plan in plans:
        if len(plans) > 1:
            logger.info("model %s", plan.model)
        if numbers := measure(args, plan, sets, accelerator):
            measured[plan.model] = numbers
        clear_device_cache(garbage_collection=True)
    if accelerator.is_main_process:
        print(_tables(args, measured, str))
        _write_files(args, measured)
    return 0


def _tables(args: EvaluateArguments, measured: Mapping[str, Measured], shown: Callable[[str], str]) -> str:
    """Those of all models; `shown` writes their names and those of the sets."""
    names = {name: shown(short) for name, short in zip(measured, unique_names(list(measured)), strict=True)}
    reports = {
        names[name]: {shown(each): of for each, of in found.reports.items()} for name, found in measured.items()
    }
    of_models = {
        names[name]: target.rows(names[target.run] if target.run not in (None, name) else None)
        for name, found in measured.items()
        if (target := found.plan.target)
    }
    numbers = args.eval_min_score_gap, args.reward
    if len(reports) > 1:
        return model_tables(reports, *numbers, targets=of_models)
    ((model, of_sets),) = reports.items()
    return report_tables(of_sets, *numbers, targets=dict.fromkeys(of_sets, of_models.get(model, {})))


def _write_files(args: EvaluateArguments, measured: Mapping[str, Measured]) -> None:
    settings = {name: getattr(args, name) for name in ("reward", "ref_model", "drift_from", "cases")}
    settings |= {"min_score_gap": args.eval_min_score_gap, "dtype": args.dtype}
    models = {
        name: {
            "max_length": {each.of.name: each.max_length for each in found.sets},
            "tokenization": found.plan.tokenization,
            **({"cases_of": found.plan.target.about()} if found.plan.target else {}),
            "sets": found.reports,
        }
        for name, found in measured.items()
    }
    lines = [
        {"model": name, "set": each.of.name, "row": i, "rewards": rewards.tolist(), "lengths": lengths.tolist()}
        for name, found in measured.items()
        for each in found.sets
        for i, (rewards, lengths) in enumerate(zip(each.rewards, each.lengths, strict=True))
    ]
    content = {**settings, "models": models}
    if len(models) == 1:  # a model's card reads it
        ((name, numbers),) = models.items()
        content = {"model": name, **settings, **numbers}
        lines = [{key: value for key, value in line.items() if key != "model"} for line in lines]
    for file, text in (
        (args.json, json.dumps(content, indent=2)),
        (args.markdown, _tables(args, measured, inline)),
        (args.rewards, "\n".join(map(json.dumps, lines))),
    ):
        if file:
            write(file, f"{text}\n")
    if args.plot:
        _plot(args.plot, args.reward, measured)


def _plot(file: str, reward: str, measured: Mapping[str, Measured]) -> None:
    """The densities, and what they are, to the console."""
    from ..report.densities import densities
    from ..report.style import render

    sets: dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for model, found in zip(unique_names(list(measured)), measured.values(), strict=True):
        for each in (each for each in found.sets if each.places[0].size):
            chosen = each.of_pairs(rewards_of(reward, each.scored))[:, 0]  # of the model alone
            sets.setdefault(each.of.name, {})[model] = each.of_pairs(each.rewards) @ [1, -1], chosen, each.places[2]
    figure, caption = densities(sets, reward)
    write(file, render(figure, Path(file).suffix[1:]))
    print(f"\n{file}: {caption}")


def load_sets(args: EvaluateArguments, as_chat: bool) -> list[EvaluationSet]:
    """The sets that the arguments name, with all RM-Bench files as one."""
    found: list[EvaluationSet] = []
    there_are: set[str] = set()  # columns
    columns = {"prompt_column": args.prompt_column, "system_column": args.system_column}
    for source in args.dataset_name:
        splits = load_splits(source, args.dataset_config)
        there = [split for split in SPLITS if split in splits]
        names: Sequence[str | None] = args.dataset_split or (there if len(there) > 1 else [None])
        for split in names:
            is_whole = split is None or (len(splits) == 1 and not is_slice(split, splits))
            name = one_line(Path(source).name.split(".")[0] if is_whole else str(split))
            if name in (each.name for each in found):
                name = f"{source}:{split}" if split else source
            dataset = pick_split(splits, split, source)
            there_are.update(dataset.column_names)
            found.append(evaluation_set(dataset, name, args.score_columns, as_chat, source, **columns))
    bench = [each for each in found if each.kind == "rm-bench"]
    for option, column in columns.items():
        if column is not None and (column not in there_are or len(bench) == len(found)):
            raise ValueError(f"{option} names {column!r}, which no set has, or none in which columns can be named")
    if args.score_columns and len(bench) == len(found):
        raise ValueError(f"score_columns names {args.score_columns}, and RM-Bench has no scores: leave it out")
    if args.eval_min_score_gap != 2 and not any(each.kind == "pairs" and each.scores for each in found):
        logger.warning("no effect of eval_min_score_gap: it is for pairs with scores, and there are none")
    if not bench:
        return found
    rows = [row for each in bench for row in each.rows]
    domains = [domain for each in bench for domain in each.groups]
    others = [each for each in found if each.kind != "rm-bench"]
    return [*others, replace(bench[0], name=RM_BENCH, rows=rows, groups=domains)]
