"""One small class per paper."""

from __future__ import annotations

from ..registry import get_method
from .configs import (
    AMaPOConfig,
    GammaPOConfig,
    GapAwarePOConfig,
    GapPOConfig,
    GeometricAnchorPOConfig,
    GradientNormPOConfig,
    MarginCPOConfig,
    SharpnessAwarePOConfig,
)
from .cpo import MarginCPOTrainer
from .dpo import MarginDPOTrainer


class _NamedTrainer(MarginCPOTrainer):
    """Takes its name, paper and tags from its method's row."""

    def __init_subclass__(cls, method: str | None = None, config: type[MarginCPOConfig] | None = None) -> None:
        if method is None:  # a custom subclass of a trainer that has its method
            return
        row = get_method(method)
        cls._method, cls._config_class = row, config
        cls._name, cls._paper = row.name, row.paper.as_trl()
        cls._tag_names = ["trl", "trl-margins", *row.tags]
        _TRAINERS[method] = cls


_TRAINERS: dict[str, type[MarginCPOTrainer]] = {}


class GapPOTrainer(_NamedTrainer, method="gappo", config=GapPOConfig):
    """GapPO: SimPO's loss, each pair weighted by its annotation score gap."""


class GapAwarePOTrainer(_NamedTrainer, method="gap-aware", config=GapAwarePOConfig):
    """GaPO: SimPO's loss, with a margin from how unlike a pair's two answers are."""


class GammaPOTrainer(_NamedTrainer, method="gamma-po", config=GammaPOConfig):
    """γ-PO: SimPO's loss, with a margin from the model's own gaps: larger where it tells a pair apart."""


class AMaPOTrainer(_NamedTrainer, method="amapo", config=AMaPOConfig):
    """AMaPO: SimPO's loss, with a margin from the batch's statistics, for the pairs ranked worse than the mean."""


class GeometricAnchorPOTrainer(_NamedTrainer, method="geometric-anchor", config=GeometricAnchorPOConfig):
    """GAPO: SimPO's loss with each pair's margin at a nearby, worse policy: brittle pairs count less."""


class GradientNormPOTrainer(_NamedTrainer, method="gradient-norm", config=GradientNormPOConfig):
    """GAPO's control: the pair's own gradient norm in the anchor gap's place."""


class SharpnessAwarePOTrainer(_NamedTrainer, method="simpo-sam", config=SharpnessAwarePOConfig):
    """SimPO whose gradient is taken at a nearby policy with a higher loss (SAM)."""


def trainer_class(method_id: str | None, base: str = "cpo") -> type:
    """The trainer of a method on a base: the one that takes any objective, but for the package's methods on CPO."""
    if base == "dpo":
        return MarginDPOTrainer
    return MarginCPOTrainer if method_id is None else _TRAINERS.get(get_method(method_id).id, MarginCPOTrainer)
