"""`trl-margins evaluate`: measures how models rank completions: pairs, lists, RM-Bench."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.loading import load_splits, pick_split
from ..data.splits import SPLITS
from ..distributed import check_processes
from ..evaluation.sets import EvaluationSet, evaluation_set
from ..evaluation.tables import model_tables, report_tables
from ..report.markdown import inline, one_line
from ..report.run_folder import unique_names
from .cases import targets
from .evaluate_options import EvaluateArguments
from .inspect import check_figure
from .measured import Measured, measure
from .options import OptionsParser
from .setup import check_writable, find_model, trained_as

logger = logging.getLogger(__name__)

RM_BENCH = "RM-Bench"


def main(argv: Sequence[str]) -> int:
    """Evaluates, prints the tables, writes the files."""
    (args,) = OptionsParser("evaluate", EvaluateArguments).parse(argv)
    for file in filter(None, (args.json, args.markdown, args.rewards, args.plot)):
        check_writable(Path(file).parent)
    if args.plot:
        check_figure(args.plot)
    import torch
    from accelerate import Accelerator
    from accelerate.utils.memory import clear_device_cache

    names = args.model_name_or_path
    for name in names:
        find_model(name)
    runs = trained_as(names)
    of = targets(args.cases, runs) if args.cases else {}
    reads_reference = args.reward == "log-ratio" or any(target.objective.needs_reference for target in of.values())
    if args.ref_model is not None and not reads_reference:
        raise ValueError(
            f"reward {args.reward!r} uses no reference model: remove --ref_model, or set --reward log-ratio"
        )
    sets = cache(partial(load_sets, args))  # with messages or without
    # by itself, accelerate treats several processes on a CPU as single ones
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    check_processes(accelerator.num_processes)
    measured: dict[str, Measured] = {}
    for name in names:
        if len(names) > 1:
            logger.info("model %s", name)
        if found := measure(args, name, runs[name], sets, accelerator, of.get(name)):
            measured[name] = found
        clear_device_cache(garbage_collection=True)
    if accelerator.is_main_process:
        lengths = [found.max_length for found in measured.values()]
        if lengths.count(lengths[0]) < len(lengths):
            logger.warning("the models see rows cut at different lengths: give --max_length to compare them")
        print(_tables(args, measured, str))
        _write_files(args, measured)
    return 0


def _tables(args: EvaluateArguments, measured: Mapping[str, Measured], shown: Callable[[str], str]) -> str:
    """Those of all models; `shown` writes their names and those of the sets."""
    reports = {
        shown(short): {shown(name): report for name, report in found.reports.items()}
        for short, found in zip(unique_names(list(measured)), measured.values(), strict=True)
    }
    if len(reports) == 1:
        (report,) = reports.values()
        return report_tables(report, args.eval_min_score_gap, args.reward)
    return model_tables(reports, args.eval_min_score_gap, args.reward)


def _write_files(args: EvaluateArguments, measured: Mapping[str, Measured]) -> None:
    settings: dict[str, Any] = {
        "reward": args.reward,
        "ref_model": args.ref_model,
        "drift_from": args.drift_from,
        "cases": args.cases,
        "min_score_gap": args.eval_min_score_gap,
        "dtype": args.dtype,
    }
    models = {
        name: {"max_length": found.max_length, "tokenization": found.tokenization, "sets": found.reports}
        for name, found in measured.items()
    }
    lines = [{"model": name, **line} for name, found in measured.items() for line in found.lines()]
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
            Path(file).write_text(f"{text}\n")
    if args.plot:
        _plot(args.plot, args.reward, measured)


def _plot(file: str, reward: str, measured: Mapping[str, Measured]) -> None:
    """The densities, and what they are, to the console."""
    from ..report.densities import densities
    from ..report.page import render

    sets: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for model, found in zip(unique_names(list(measured)), measured.values(), strict=True):
        for name, of in found.gaps_and_logps(reward == "length-normalized").items():
            sets.setdefault(name, {})[model] = of
    if not sets:
        raise ValueError(f"--plot {file}: there is nothing to draw in RM-Bench: name a set of pairs or of lists")
    figure, caption = densities(sets, reward)
    Path(file).write_bytes(render(figure, Path(file).suffix[1:]))
    print(f"\n{file}: {caption}")


def load_sets(args: EvaluateArguments, as_chat: bool) -> list[EvaluationSet]:
    """The sets that the arguments name, with all RM-Bench files as one."""
    found: list[EvaluationSet] = []
    columns = {"prompt_column": args.prompt_column, "system_column": args.system_column}
    for source in args.dataset_name:
        splits = load_splits(source, args.dataset_config)
        there = [split for split in SPLITS if split in splits]
        names: Sequence[str | None] = args.dataset_split or (there if len(there) > 1 else [None])
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
    domains = [domain for each in bench for domain in each.groups]
    others = [each for each in found if each.kind != "rm-bench"]
    return [*others, replace(bench[0], name=RM_BENCH, rows=rows, groups=domains)]
