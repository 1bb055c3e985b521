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
    "ColumnMargin": "terms.column",
    "ColumnWeight": "terms.column",
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
    "LengthNormalizedReward": "rewards",
    "Link": "links",
    "LogRatioReward": "rewards",
    "METHODS": "methods",
    "MarginCPOConfig": "trainers.configs",
    "MarginCPOTrainer": "trainers.cpo",
    "MarginDPOConfig": "trainers.configs",
    "MarginDPOTrainer": "trainers.dpo",
    "Method": "methods",
    "Objective": "objective",
    "PairHistograms": "recording.histograms",
    "PairLogps": "pairs",
    "PairView": "pairs",
    "Paper": "methods",
    "Reward": "rewards",
    "ScoreGapWeight": "terms.score_gap",
    "SharpnessAwarePOConfig": "trainers.configs",
    "SharpnessAwarePODPOConfig": "trainers.configs",
    "SharpnessAwarePOTrainer": "trainers.named",
    "SummedReward": "rewards",
    "Term": "terms",
    "config_class": "trainers.configs",
    "register_link": "registry",
    "register_method": "registry",
    "register_reward": "registry",
    "register_term": "registry",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .links import Link
    from .methods import METHODS, Method, Paper
    from .objective import Objective
    from .pairs import PairLogps, PairView
    from .recording.histograms import PairHistograms
    from .registry import register_link, register_method, register_reward, register_term
    from .rewards import LengthNormalizedReward, LogRatioReward, Reward, SummedReward
    from .terms import Term
    from .terms.adaptive import AdaptiveMargin
    from .terms.anchor import AnchorMargin, GradientNormMargin
    from .terms.column import ColumnMargin, ColumnWeight
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
        config_class,
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
