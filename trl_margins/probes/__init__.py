"""What a trainer measures on the model before the optimizer's step: chosen by the objective's terms."""

from __future__ import annotations

from ..objective import Objective
from .anchor import GeometricAnchor
from .pair_gradients import GradientNorms
from .probe import Probe, ProbedTrainer, ProbeOptions
from .sharpness import SharpnessAware

MEASURES: tuple[type[Probe], ...] = (GeometricAnchor, GradientNorms)


def window_probes(trainer: ProbedTrainer, objective: Objective, options: ProbeOptions) -> list[Probe]:
    """The probes of an objective, in the order in which they look at an accumulation window.

    Raises:
        ValueError: a term reads a value that no probe measures.
    """
    known = {name for probe in MEASURES for name in probe.columns}
    wanted: set[str] = set()
    for term in objective.terms:
        names = set(term.probes)
        if unknown := names - known:
            raise ValueError(
                f"term {term.name!r} reads {sorted(unknown)}, which no probe measures; known: {sorted(known)}"
            )
        wanted |= names
    probes = [probe(trainer, options) for probe in MEASURES if wanted & set(probe.columns)]
    return [*probes, SharpnessAware(trainer, options)] if options.sam_radius else probes
