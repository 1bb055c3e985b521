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
    method: str
    run: str | None = None  # the model whose training run it is of; None: the method's default settings
    reference: str | None = None  # the run's reference model

    def about(self) -> dict[str, Any]:
        """As the JSON file has it; `gamma` is None where a margin term has no target margin."""
        objective, terms = self.objective, self.objective.margins
        has_target = not any(term.holds_target for term in terms) or any(term.takes_target() for term in terms)
        return {
            **{"method": self.method, "run": self.run, "reward": objective.reward.name, "beta": objective.beta},
            "gamma": objective.gamma if has_target else None,
            **{"margin": [term.name for term in terms], "needs_reference": objective.needs_reference},
        }

    def rows(self, run: str | None) -> dict[str, str]:
        """As a column of the table of cases; `run` is how the other model is called whose run this is."""
        objective = self.objective
        of = "defaults" if self.run is None else f"run {run}" if run else ""
        parts = [
            f"{term.name} (γ₀ = {objective.gamma:g})" if term.takes_target() else term.name
            for term in objective.margins
        ]
        if objective.reward.needs_reference:
            parts.insert(0, "reference")
        if objective.shared_margin or not parts:
            parts.append(f"{objective.shared_margin:g}")
        return {
            "case_method": f"{self.method} ({of})" if of else self.method,
            "case_reward": f"{'summed' if objective.reward.summed else 'per token'}, β = {objective.beta:g}",
            "case_margin": " + ".join(parts),
        }


def targets(cases: str, models: Mapping[str, str]) -> dict[str, Target]:
    """Of each model.

    Args:
        cases: `run`, or the id of a method, which has its default settings.
        models: each with the model whose training run it is treated as.

    Raises:
        ValueError: an unknown method, no run, or a margin that held-out pairs do not have.
    """
    from ..trainers.configs import config_class
    from ..trainers.objectives import objective_of, objective_of_run

    if cases != OF_RUN:
        config = config_class(cases)(output_dir=".", use_cpu=True, bf16=False)
        objective = _checked(objective_of(config), vars(config), f"--cases {cases}")
        return dict.fromkeys(models, Target(objective, cases))
    of_runs = {}
    for name in set(models.values()):
        if not (run := run_of(name)):
            raise ValueError(
                f"--cases {OF_RUN}: no margin_run.json says with which margin {name} was trained: name a method, such "
                "as --cases simpo"
            )
        objective = _checked(objective_of_run(run), run["config"], name)
        of_runs[name] = Target(objective, run["method"] or run["trainer"], name, run["reference"])
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
