"""Measurements on the model before the optimizer's step, chosen by the objective's terms."""

from __future__ import annotations

from ..objective import Objective
from .anchor import GeometricAnchor
from .diagnostics import check_diagnostics
from .pair_gradients import GradientNorms
from .probe import Probe, ProbedTrainer, ProbeOptions
from .sharpness import SharpnessAware

MEASURING: tuple[type[Probe], ...] = (GeometricAnchor, GradientNorms)


def window_probes(trainer: ProbedTrainer, objective: Objective, options: ProbeOptions) -> list[Probe]:
    """The probes of an objective, in the order in which they see an accumulation window.

    Raises:
        ValueError: a term asks for a value that no probe measures, or `anchor_diagnostics` has nothing to write.
    """
    check_diagnostics(objective, options)
    known = {name for probe in MEASURING for name in probe.columns}
    wanted: set[str] = set()
    for term in objective.terms:
        names = set(term.probes)
        if unknown := sorted(names - known):
            raise ValueError(
                f"term {term.name!r} asks for {', '.join(unknown)}, which no probe measures; known: "
                f"{', '.join(sorted(known))}"
            )
        wanted |= names
    probes = [probe(trainer, options) for probe in MEASURING if wanted & set(probe.columns)]
    return [*probes, SharpnessAware(trainer, options)] if options.sam_radius else probes
