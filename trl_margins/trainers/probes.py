"""What a trainer does with a window's mini-batches before it trains on them: chosen by the objective's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..objective import Objective
from .anchor import GeometricAnchor
from .configs import MarginOptions
from .pair_gradients import GradientNorms
from .sharpness import SharpnessAware

if TYPE_CHECKING:
    from .mixin import MarginMixin

Probe = Callable[[Sequence[Mapping[str, Any]]], list[Mapping[str, Any]]]

_MEASURES: tuple[type, ...] = (GeometricAnchor, GradientNorms)


def window_probes(trainer: MarginMixin, objective: Objective, options: MarginOptions) -> list[Probe]:
    """The probes of an objective, in the order in which they look at a window."""
    wanted = {name for term in objective.terms for name in getattr(term, "probes", ())}
    probes = [probe(trainer, options) for probe in _MEASURES if wanted & set(probe.columns)]
    return [*probes, SharpnessAware(trainer, options)] if options.sam_radius else probes
