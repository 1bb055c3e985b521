"""The methods' trainers, one on each base. Name, paper, tags and config come from the method's row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from ..registry import base_of, get_method
from .configs import MarginOptions, config_class
from .cpo import MarginCPOTrainer
from .dpo import MarginDPOTrainer
from .mixin import MarginMixin

logger = logging.getLogger(__name__)

_TRAINERS: dict[tuple[str | None, str], type[MarginMixin]] = {
    (None, "cpo"): MarginCPOTrainer,
    (None, "dpo"): MarginDPOTrainer,
}
Trainer = TypeVar("Trainer", bound=MarginMixin)


def _trains(method_id: str) -> Callable[[type[Trainer]], type[Trainer]]:
    """Class decorator: the trainer of a method on the base from which the class inherits."""

    def named(cls: type[Trainer]) -> type[Trainer]:
        row, base = get_method(method_id), cls._config_class._base
        cls._method, cls._config_class = row, config_class(method_id, base)
        cls._name, cls._paper = row.name, row.paper.as_trl()
        cls._tag_names = ["trl", base, "trl-margins", *row.tags]
        _TRAINERS[method_id, base] = cls
        return cls

    return named


def trainer_class(method_id: str | None, base: str | None = None) -> type[MarginMixin]:
    """The trainer of a method on a base ("cpo" or "dpo"), by default the method's own; without a method, of a baseline
    and of a registered one, the trainer that takes any objective.

    Raises:
        ValueError: unknown method or base, or a base that cannot carry the method.
    """
    base = base_of(method_id, base)
    return _TRAINERS.get((method_id, base), _TRAINERS[None, base])


def trainer_of(config: MarginOptions) -> type[MarginMixin]:
    """The trainer of a config: that of its method or, with other terms than the method's, the one that takes any."""
    method = None if config._method_id is None else get_method(config._method_id)
    missing = method and config.missing_term(method)
    if method and missing:
        logger.warning("without %s %r this is not %s: the model card names what is trained", *missing, method.name)
    return trainer_class(None if missing else config._method_id, config._base)


@_trains("gappo")
class GapPOTrainer(MarginCPOTrainer):
    """GapPO: SimPO's loss, each pair weighted by its annotation score gap."""


@_trains("gappo")
class GapPODPOTrainer(MarginDPOTrainer):
    """GapPO on `DPOTrainer`."""


@_trains("gap-aware")
class GapAwarePOTrainer(MarginCPOTrainer):
    """GaPO: SimPO's loss, with a margin that grows as a pair's completions become less similar."""


@_trains("gap-aware")
class GapAwarePODPOTrainer(MarginDPOTrainer):
    """GaPO on `DPOTrainer`."""


@_trains("gamma-po")
class GammaPOTrainer(MarginCPOTrainer):
    """γ-PO: SimPO's loss, with a margin from the model's own gaps: larger for pairs that it separates well."""


@_trains("gamma-po")
class GammaPODPOTrainer(MarginDPOTrainer):
    """γ-PO on `DPOTrainer`."""


@_trains("amapo")
class AMaPOTrainer(MarginCPOTrainer):
    """AMaPO: SimPO's loss, with a margin from the batch's statistics for pairs that rank below its mean."""


@_trains("amapo")
class AMaPODPOTrainer(MarginDPOTrainer):
    """AMaPO on `DPOTrainer`."""


@_trains("geometric-anchor")
class GeometricAnchorPOTrainer(MarginCPOTrainer):
    """GAPO: SimPO's loss, with each pair's margin at a nearby, worse policy: brittle pairs count less."""


@_trains("geometric-anchor")
class GeometricAnchorPODPOTrainer(MarginDPOTrainer):
    """GAPO on `DPOTrainer`."""


@_trains("gradient-norm")
class GradientNormPOTrainer(MarginCPOTrainer):
    """GAPO's control: the pair's gradient norm in place of the anchor gap."""


@_trains("gradient-norm")
class GradientNormPODPOTrainer(MarginDPOTrainer):
    """GAPO's control on `DPOTrainer`."""


@_trains("simpo-sam")
class SharpnessAwarePOTrainer(MarginCPOTrainer):
    """SimPO with its gradient taken at a nearby policy with a higher loss (SAM)."""


@_trains("simpo-sam")
class SharpnessAwarePODPOTrainer(MarginDPOTrainer):
    """SimPO with SAM on `DPOTrainer`."""
