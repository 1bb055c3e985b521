"""Preference trainers for Hugging Face TRL in which every pair has its own weight and its own target margin."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded when first used, so that `import trl_margins` costs next to nothing
_HOMES = {
    "AMaPOConfig": "trainers.configs",
    "AMaPODPOConfig": "trainers.configs",
    "AMaPOTrainer": "trainers.named",
    "AdaptiveMargin": "terms.adaptive",
    "AnchorMargin": "terms.anchor",
    "DynamicTargetMargin": "terms.dynamic_target",
    "EvaluationFactorMargin": "terms.evaluation_factor",
    "GammaPOConfig": "trainers.configs",
    "GammaPODPOConfig": "trainers.configs",
    "GammaPOTrainer": "trainers.named",
    "GapAwarePOConfig": "trainers.configs",
    "GapAwarePODPOConfig": "trainers.configs",
    "GapAwarePOTrainer": "trainers.named",
    "GapPOConfig": "trainers.configs",
    "GapPODPOConfig": "trainers.configs",
    "GapPOTrainer": "trainers.named",
    "GeometricAnchorPOConfig": "trainers.configs",
    "GeometricAnchorPODPOConfig": "trainers.configs",
    "GeometricAnchorPOTrainer": "trainers.named",
    "GradientNormMargin": "terms.anchor",
    "GradientNormPOConfig": "trainers.configs",
    "GradientNormPODPOConfig": "trainers.configs",
    "GradientNormPOTrainer": "trainers.named",
    "METHODS": "methods",
    "MarginCPOConfig": "trainers.configs",
    "MarginCPOTrainer": "trainers.cpo",
    "MarginDPOConfig": "trainers.configs",
    "MarginDPOTrainer": "trainers.dpo",
    "Objective": "objective",
    "PairHistograms": "recording.histograms",
    "ScoreGapWeight": "terms.score_gap",
    "SharpnessAwarePOConfig": "trainers.configs",
    "SharpnessAwarePODPOConfig": "trainers.configs",
    "SharpnessAwarePOTrainer": "trainers.named",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .methods import METHODS
    from .objective import Objective
    from .recording.histograms import PairHistograms
    from .terms.adaptive import AdaptiveMargin
    from .terms.anchor import AnchorMargin, GradientNormMargin
    from .terms.dynamic_target import DynamicTargetMargin
    from .terms.evaluation_factor import EvaluationFactorMargin
    from .terms.score_gap import ScoreGapWeight
    from .trainers.configs import (
        AMaPOConfig,
        AMaPODPOConfig,
        GammaPOConfig,
        GammaPODPOConfig,
        GapAwarePOConfig,
        GapAwarePODPOConfig,
        GapPOConfig,
        GapPODPOConfig,
        GeometricAnchorPOConfig,
        GeometricAnchorPODPOConfig,
        GradientNormPOConfig,
        GradientNormPODPOConfig,
        MarginCPOConfig,
        MarginDPOConfig,
        SharpnessAwarePOConfig,
        SharpnessAwarePODPOConfig,
    )
    from .trainers.cpo import MarginCPOTrainer
    from .trainers.dpo import MarginDPOTrainer
    from .trainers.named import (
        AMaPOTrainer,
        GammaPOTrainer,
        GapAwarePOTrainer,
        GapPOTrainer,
        GeometricAnchorPOTrainer,
        GradientNormPOTrainer,
        SharpnessAwarePOTrainer,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
