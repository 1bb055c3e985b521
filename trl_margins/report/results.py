"""What runs reached on evaluation pairs: in sentences, for a terminal and a page, and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import summaries
from .markdown import one_line
from .run_folder import Run
from .style import percent, signed

ARROW = " → "


@dataclass(frozen=True)
class Reached:
    """A metric of a run on an evaluation set: (step, value) of the first evaluation, the best, and the kept model."""

    run: str
    of_set: str  # "" for a single one
    metric: str  # of `summaries.RANKING`
    measure: str  # in words
    first: tuple[int, float]
    best: tuple[int, float]
    kept: tuple[int, float]

    def shown(self, point: tuple[int, float]) -> str:
        """A value with its step."""
        step, value = point
        text = signed(value, ".3f") if self.metric == "spearman" else f"{100 * value:.1f} %"
        return f"{text} ({f'step {step}' if step else 'before training'})"


def reached(run: Run) -> list[Reached]:
    """All metrics of a run that were logged; nothing where it was trained without evaluation."""
    gap = run.config.get("eval_min_score_gap")
    measures = {
        "pwa": f"accuracy, score gap ≥ {'τ' if gap is None else format(gap, 'g')}",
        "pwa_all": "accuracy, all pairs",
        "spearman": "Spearman's ρ",
    }
    found = []
    for (of_set, metric), curve in sorted(
        summaries.ranking_curves(run).items(), key=lambda each: (each[0][0], [*measures].index(each[0][1]))
    ):
        at = np.flatnonzero(curve.steps == run.best_step)
        points = [(int(curve.steps[i]), float(curve.values[i])) for i in (0, curve.best, at[-1] if at.size else -1)]
        found.append(Reached(run.name, of_set, metric, measures[metric], *points))
    return found


def headline(run: Run) -> str:
    """What was trained, how long, and which step's model was kept."""
    method = one_line(run.info.get("name") or run.info.get("method") or "a run")
    model = run.info.get("model")
    text = method + (f" on {one_line(model)}" if model else "")
    if last := last_step(run):
        size = run.pairs_per_step
        steps = f"{last:,} {'step' if last == 1 else 'steps'}"
        text += f", {last * size:,} pairs in {steps}" if size else f", {steps}"
    if run.best_step is None:
        return f"{text}. Kept: the last step's model."
    by = run.config.get("metric_for_best_model")
    return f"{text}. Kept: step {run.best_step}" + (f", the best by {one_line(by)}." if by else ".")


def ranked(run: Run) -> str:
    """Sentences on what the kept model ranks right, a sentence for each evaluation set."""
    said = []
    for of in reached(run):
        if of.metric == "pwa_all":
            name = f"the pairs of {of.of_set}" if of.of_set else "the evaluation pairs"
            if of.first[0] == of.kept[0] > 0:
                before = "at its first evaluation: eval_on_start says how many before training"
            else:
                when = f"at the first evaluation, step {of.first[0]}" if of.first[0] else "before training"
                before = f"{100 * of.first[1]:.1f} % {when}"
            said.append(f"It ranks {100 * of.kept[1]:.1f} % of {name} right ({before}).")
    return " ".join(said)


def without_evaluation(run: Run) -> list[str]:
    """What a run without evaluations says of its training pairs, and how to get the others."""
    measures: list[tuple[str, str, Callable[[float], str]]] = [
        ("rewards/accuracies", "Training pairs ranked right", percent),
        ("rewards/margins", "Mean reward gap", partial(signed, form=".3g")),
    ]
    said = []
    for key, name, form in measures:
        if (n := (curve := summaries.logged_curve(run, key)).steps.size) == 1:
            said.append(f"{name}: {form(curve.values[0])} (the only log).")
        elif n:
            said.append(f"{name}: {ARROW.join(map(form, curve.values[[0, -1]]))} (first and last log).")
    return ["No evaluations: it was trained without evaluation (--eval_strategy).", *said]


def lines(runs: Sequence[Run]) -> Iterator[str]:
    """For a terminal: first evaluation → kept model."""
    for run in runs:
        yield f"{run.name}: {headline(run)}"
        found = reached(run)
        for of in found:
            name = f"{of.of_set}: {of.measure}" if of.of_set else of.measure
            yield f"  {name:<34} {of.shown(of.first)}{ARROW}{of.shown(of.kept)}"
        yield from (f"  {said}" for said in ([] if found else without_evaluation(run)))


def table(runs: Sequence[Run]) -> dict[str, Any]:
    """A row for each run, evaluation set and metric."""
    found = [of for run in runs for of in reached(run)]
    names = [("run", len(runs) > 1), ("evaluation set", any(of.of_set for of in found))]
    head = [name for name, there in names if there]
    rows = [
        [cell for cell, (_, there) in zip((of.run, of.of_set), names, strict=True) if there]
        + [of.measure, *map(of.shown, (of.first, of.best, of.kept))]
        for of in found
    ]
    return {"head": [*head, "measure", "first evaluation", "best", "kept model"], "rows": rows}


def last_step(run: Run) -> int | None:
    logged = [entry["step"] for entry in run.log_history if "step" in entry]
    trained = run.pairs.get("step", np.empty(0))
    return max([*logged, *(int(step) for step in trained[np.isfinite(trained)][-1:])], default=None)
