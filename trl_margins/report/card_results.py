"""The numbers of a model, from a trainer's history and from `trl-margins evaluate`, as metadata for the Hub."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.rm_bench import DOMAINS, LEVELS
from ..evaluation.tables import LISTWISE_ROWS, PAIR_ROWS, RANKING
from ..printable import printable

ANY_PAIRS = "preference-pairs"  # where the Hub wants the id of a data set and there is none

_KEY = re.compile(rf"eval_(?:(?P<set>.+)_)?(?P<name>{'|'.join(sorted(RANKING, reverse=True))})", re.DOTALL)
# the metrics that metadata hold, by the Hub's names
_METRIC_TYPES = {
    **dict.fromkeys(("pwa", "pwa_all", "best_worst", *LEVELS), "accuracy"),
    **{"spearman": "spearmanr", "kendall": "kendalltau", "ndcg@1": "ndcg@1", "ndcg@3": "ndcg@3", "ndcg@k": "ndcg@k"},
}


@dataclass(frozen=True)
class Evaluation:
    """The numbers that a trainer logged for one evaluation set."""

    name: str  # "" for a single set
    step: int  # of the model that was evaluated
    numbers: Mapping[str, float]  # by the names of `ranking_metrics`


@dataclass(frozen=True)
class EvaluationReport:
    """The content of a file that `trl-margins evaluate --json` wrote."""

    reward: str
    min_score_gap: float
    sets: Mapping[str, Mapping[str, Any]]  # name → numbers, with their `kind`
    model: str = ""  # as it was named there


def logged_evaluations(log_history: Sequence[Mapping[str, Any]], best_step: int | None) -> list[Evaluation]:
    """The last evaluation of the model on every set.

    Args:
        log_history: of the trainer's state.
        best_step: the step whose checkpoint was loaded at the end of training; None for the last step's model.
            Evaluations after training are then of that step, whatever step the history says.
    """
    end = max((i for i, entry in enumerate(log_history) if "train_runtime" in entry), default=len(log_history))
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
    """Reads a file that `trl-margins evaluate --json` wrote.

    Raises:
        ValueError: another kind of file, or one of several models.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        sets = {name: dict(numbers) for name, numbers in content["sets"].items()}
        if unknown := {numbers["kind"] for numbers in sets.values()} - {"pairs", "listwise", "rm-bench"}:
            raise ValueError(f"unknown kind {sorted(unknown)}")
        if strange := [text for numbers in sets.values() for text in _texts(numbers)]:
            raise ValueError(f"{strange[0]!r} among the numbers")
        return EvaluationReport(
            str(content["reward"]), float(content["min_score_gap"]), sets, str(content.get("model") or "")
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, KeyError) and "models" in content:
            raise ValueError(
                f"{file} has the numbers of {len(content['models'])} models, and a card is of one: evaluate it alone"
            ) from None
        raise ValueError(
            f"{file} was not written by `trl-margins evaluate --json` ({type(error).__name__}: {error}): give the "
            "file of that command"
        ) from error


def _texts(part: Any, key: str = "") -> Iterator[str]:
    """Text where the command writes none. A card would show it unchanged."""
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
    """All numbers, in the form of the Hub's `model-index`.

    `min_score_gap` is τ of the trainer's `pwa`; `hub_id`, `name` and `split` are of the trainer's evaluation set.
    Evaluations of a step before `model_step` say so.
    """
    results: list[EvalResult] = []
    for of in evaluations:
        named = ", ".join(filter(None, (name or "preference pairs", of.name)))
        earlier = f" (at step {of.step} of {model_step})" if of.step < model_step else ""
        results += _results(
            of.numbers, PAIR_ROWS, (hub_id or ANY_PAIRS, named, of.name or split), min_score_gap, earlier
        )
    for report in reports:
        for of_set, numbers in report.sets.items():
            if numbers["kind"] == "rm-bench":
                levels = {level: f"RM-Bench, {level}" for level in numbers["total"]}
                results += _results(numbers["total"], levels, ("rm-bench", of_set, of_set))
            else:
                labels = LISTWISE_ROWS if numbers["kind"] == "listwise" else PAIR_ROWS
                results += _results(numbers, labels, (ANY_PAIRS, of_set, of_set), report.min_score_gap)
    return results


def _results(
    numbers: Mapping[str, Any],
    labels: Mapping[str, str],
    dataset: tuple[str, str, str | None],
    min_score_gap: float = 0.0,
    suffix: str = "",
) -> Iterator[EvalResult]:
    """One result for each number that metadata hold. `dataset` is type, name and split."""
    kind, name = map(printable, dataset[:2])  # YAML would fold what ends a line
    split = dataset[2] and printable(dataset[2])
    for metric, label in labels.items():
        value: Any = numbers.get(metric)
        if metric in _METRIC_TYPES and _is_number(value):
            label = label.format(gap=min_score_gap, unit="") + suffix
            yield EvalResult(
                task_type="text-generation",
                task_name="Preference ranking",
                dataset_type=kind,
                dataset_name=name,
                dataset_split=split,
                metric_type=_METRIC_TYPES[metric],
                metric_name=label[0].upper() + label[1:],
                metric_value=round(float(value), 4),
                metric_args={"min_score_gap": float(min_score_gap)} if metric == "pwa" else None,
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
