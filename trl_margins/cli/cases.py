"""AMaPO's four cases of a model's pairs, under the margin of its training run or of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .setup import run_of

if TYPE_CHECKING:
    from ..objective import Objective

OF_RUN = "run"


@dataclass(frozen=True)
class Target:
    """What the pairs of a model are measured against."""

    objective: Objective
    reference: str | None = None  # the run's reference model


def targets(cases: str, models: Mapping[str, str]) -> dict[str, Target]:
    """Of each model.

    Args:
        cases: `run`, or the id of a method, which has its default settings.
        models: each with the model whose training run it is treated as.

    Raises:
        ValueError: an unknown method, no run, or a margin that held-out pairs do not have.
    """
    from ..trainers.configs import config_class, objective_of, objective_of_run

    if cases != OF_RUN:
        config = config_class(cases)(output_dir=".", use_cpu=True, bf16=False)
        return dict.fromkeys(models, Target(_checked(objective_of(config), vars(config), f"--cases {cases}")))
    of_runs = {}
    for name in set(models.values()):
        if not (run := run_of(name)):
            raise ValueError(
                f"--cases {OF_RUN}: no margin_run.json says with which margin {name} was trained: name a method, such "
                "as --cases simpo"
            )
        of_runs[name] = Target(_checked(objective_of_run(run), run["config"], name), run["reference"])
    return {name: of_runs[run] for name, run in models.items()}


def _checked(objective: Objective, config: Mapping[str, Any], source: str) -> Objective:
    """The objective without its weights, which have no part in the cases.

    Raises:
        ValueError: it gives a held-out pair no margin.
    """
    from ..pairs import SCORES
    from ..terms import Term
    from ..terms.history import RunningMoments

    why = None
    for link in objective.links:
        if not (link.takes_margin or link.of_batch):
            why = f"loss_type {link.name!r} is no function of the reward gap less a margin"
    if objective.reward.of_token is not None:
        why = f"reward {objective.reward.name!r} is of single tokens"
    if config.get("ld_alpha") is not None:
        why = "ld_alpha weights the tokens"
    for term in objective.margins:
        if term.probes or type(term).fit is not Term.fit or not {*SCORES}.issuperset(term.columns):
            why = f"margin {term.name!r} is computed or measured for the pairs of a training"
        if isinstance(getattr(term, "moments", None), RunningMoments):
            why = f"margin {term.name!r} depends on what training has seen"
    if why is not None:
        raise ValueError(
            f"{source} has no cases of held-out pairs: {why}. A run's report has the cases of its training pairs, and "
            "--cases simpo measures held-out pairs against another method's margin"
        )
    return replace(objective, weight=None)


def margins_of(
    objective: Objective,
    logps: np.ndarray,
    lengths: np.ndarray,
    ref_logps: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray] | None:
    """[M] r of the policy alone and [M] r − γ, of M pairs. They are one batch to the margin: neither their order nor a
    batch size counts. None where the margin reads scores that the pairs do not have.

    Args:
        objective: of a `Target`.
        logps: [M, 2] summed log-probabilities of the chosen and the rejected completions, in nats.
        lengths: [M, 2] tokens.
        ref_logps: [M, 2] those of the reference model, where the objective has one.
        scores: [M, 2] of the annotators.
    """
    from torch import from_numpy

    from ..pairs import SCORES, PairLogps, mean_logps

    sums, tokens = from_numpy(logps), from_numpy(lengths)
    reference = (None, None) if ref_logps is None else from_numpy(ref_logps).unbind(1)
    columns = {} if scores is None else dict(zip(SCORES, from_numpy(scores).unbind(1), strict=True))
    if not columns.keys() >= {*objective.columns}:
        return None
    (chosen, rejected), (chosen_length, rejected_length) = sums.unbind(1), tokens.unbind(1)
    pairs = PairLogps(chosen, rejected, chosen_length, rejected_length, *reference)
    output = objective(pairs, columns, evaluation=True)
    gap = output.chosen_reward - output.rejected_reward
    surplus = gap - (objective.gamma if output.margin is None else output.margin)
    if objective.reward.needs_reference:
        chosen, rejected = (sums if objective.reward.summed else mean_logps(sums, tokens)).unbind(1)
        gap = chosen - rejected
    return gap.numpy(), surplus.numpy()
