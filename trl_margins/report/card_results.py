"""A model's numbers, from a trainer's history and from `trl-margins evaluate`: as metadata that the Hub renders."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.rm_bench import DOMAINS
from ..evaluation.tables import LISTWISE_ROWS, PAIR_ROWS

TASK = {"task_type": "text-generation", "task_name": "Preference ranking"}
ANY_PAIRS = "preference-pairs"  # stands where the Hub wants a data set's id and there is none

_LOGGED = ("pwa", "pwa_all", "spearman", "n_pairs_gap", "n_pairs")
_KEY = re.compile(rf"eval_(?:(?P<set>.+)_)?(?P<name>{'|'.join(sorted(_LOGGED, reverse=True))})", re.DOTALL)
_ON_THE_HUB = {"pwa": "accuracy", "pwa_all": "accuracy", "spearman": "spearmanr", "kendall": "kendalltau"}
_TOLD = ("pwa", "pwa_all", "spearman", "kendall", "ndcg@1", "ndcg@3", "ndcg@k")  # what the metadata tells


@dataclass(frozen=True)
class Evaluation:
    """What a trainer logged of one evaluation set."""

    name: str  # "" where there is only one
    step: int  # of the model that was evaluated
    numbers: Mapping[str, float]  # by the names of `ranking_metrics`


@dataclass(frozen=True)
class EvaluationReport:
    """What `trl-margins evaluate --json` wrote."""

    reward: str
    min_score_gap: float
    sets: Mapping[str, Mapping[str, Any]]  # name → numbers, with their `kind`


def logged_evaluations(log_history: Sequence[Mapping[str, Any]], best_step: int | None) -> list[Evaluation]:
    """The evaluation of every set that is the model's own.

    Args:
        log_history: of the trainer's state.
        best_step: the step whose checkpoint was loaded when training ended; None if the last step's model is kept.
            Evaluations after training are then of that step, whatever step the history gives them.
    """
    ends = [i for i, entry in enumerate(log_history) if "train_runtime" in entry]
    end = ends[-1] if ends else len(log_history)
    found: dict[str, Evaluation] = {}
    for i, entry in enumerate(log_history):
        step = entry.get("step", 0)
        if best_step is not None:
            if i < end and step != best_step:
                continue
            step = best_step
        numbers: dict[str, dict[str, float]] = {}
        for key, value in entry.items():
            if (match := _KEY.fullmatch(key)) and _is_number(value):
                numbers.setdefault(match["set"] or "", {})[match["name"]] = value
        found |= {name: Evaluation(name, step, of_set) for name, of_set in numbers.items()}
    return list(found.values())


def read_report(file: str | Path) -> EvaluationReport:
    """Reads what `trl-margins evaluate --json` wrote.

    Raises:
        ValueError: another kind of file.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        sets = {name: dict(numbers) for name, numbers in content["sets"].items()}
        kinds = {numbers["kind"] for numbers in sets.values()}
        if unknown := kinds - {"pairs", "listwise", "rm-bench"}:
            raise ValueError(f"unknown kind {sorted(unknown)}")
        if strange := [text for numbers in sets.values() for text in _texts(numbers)]:
            raise ValueError(f"{strange[0]!r} among the numbers")
        return EvaluationReport(str(content["reward"]), float(content["min_score_gap"]), sets)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is not what `trl-margins evaluate --json` writes ({type(error).__name__}: {error}): give the "
            "file of that command"
        ) from error


def _texts(part: Any, key: str = "") -> Iterator[str]:
    """Texts where the command writes none: a card shows what it finds there as it is."""
    if isinstance(part, Mapping):
        if key == "domains":
            yield from (name for name in part if name not in DOMAINS)
        for name, value in part.items():
            yield from _texts(value, name)
    elif isinstance(part, list):
        for value in part:
            yield from _texts(value, key)
    elif isinstance(part, str) and key not in ("kind", "bin"):
        yield part


def eval_results(
    evaluations: Iterable[Evaluation],
    reports: Iterable[EvaluationReport],
    min_score_gap: float,
    model_step: int,
    hub_id: str | None,
    name: str | None,
    split: str | None,
) -> list[EvalResult]:
    """All numbers, as the Hub's `model-index` has them.

    Args:
        evaluations: the trainer's own.
        reports: of `trl-margins evaluate`; their sets go by their names alone.
        min_score_gap: τ of the trainer's `pwa`.
        model_step: the model's own; an evaluation of an earlier one says so.
        hub_id: the evaluation set's id on the Hub, if it is there.
        name: what to call it.
        split: of the data set, where it is known and there is one evaluation set.
    """
    found = []
    for of in evaluations:
        dataset = {
            "dataset_type": hub_id or ANY_PAIRS,
            "dataset_name": ", ".join(filter(None, (name or "preference pairs", of.name))),
            "dataset_split": of.name or split,
        }
        earlier = f" (at step {of.step} of {model_step})" if of.step < model_step else ""
        found += _pair_results(of.numbers, min_score_gap, dataset, earlier)
    for report in reports:
        for of_set, numbers in report.sets.items():
            dataset = {"dataset_type": ANY_PAIRS, "dataset_name": of_set, "dataset_split": of_set}
            if numbers["kind"] == "pairs":
                found += _pair_results(numbers, report.min_score_gap, dataset)
            elif numbers["kind"] == "listwise":
                found += [
                    _result(metric, numbers[metric], LISTWISE_ROWS[metric], dataset)
                    for metric in _TOLD
                    if _is_number(numbers.get(metric))
                ]
            else:
                dataset["dataset_type"] = "rm-bench"
                found += [
                    _result("accuracy", value, f"RM-Bench, {level}", dataset)
                    for level, value in numbers["total"].items()
                    if _is_number(value)
                ]
    return found


def _pair_results(
    numbers: Mapping[str, Any], min_score_gap: float, dataset: Mapping[str, Any], which: str = ""
) -> list[EvalResult]:
    results = []
    for metric in _TOLD:
        if _is_number(numbers.get(metric)):
            label = PAIR_ROWS[metric].format(gap=min_score_gap)
            arguments = {"min_score_gap": float(min_score_gap)} if metric == "pwa" else None
            results.append(_result(metric, numbers[metric], label + which, dataset, arguments))
    return results


def _result(
    metric: str, value: float, label: str, dataset: Mapping[str, Any], arguments: dict[str, Any] | None = None
) -> EvalResult:
    return EvalResult(
        **TASK,
        **dataset,
        metric_type=_ON_THE_HUB.get(metric, metric),
        metric_name=label[0].upper() + label[1:],
        metric_value=round(float(value), 4),
        metric_args=arguments,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
