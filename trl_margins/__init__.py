"""Preference trainers for Hugging Face TRL in which every pair has its own weight and its own target margin."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import logging as logging

__version__ = "0.1.0"

# it is the package that imports CPOTrainer, and its users cannot do anything about it
warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'", module=r"trl_margins\.")

# Loaded when first used, so that `import trl_margins` costs next to nothing
_HOMES = {
    "AMaPOConfig": "trainers.configs",
    "AMaPODPOConfig": "trainers.configs",
    "AMaPODPOTrainer": "trainers.named",
    "AMaPOTrainer": "trainers.named",
    "AdaptiveMargin": "terms.adaptive",
    "AnchorMargin": "terms.anchor",
    "ColumnMargin": "terms.column",
    "ColumnWeight": "terms.column",
    "DynamicTargetMargin": "terms.dynamic_target",
    "EvaluationFactorMargin": "terms.evaluation_factor",
    "GammaPOConfig": "trainers.configs",
    "GammaPODPOConfig": "trainers.configs",
    "GammaPODPOTrainer": "trainers.named",
    "GammaPOTrainer": "trainers.named",
    "GapAwarePOConfig": "trainers.configs",
    "GapAwarePODPOConfig": "trainers.configs",
    "GapAwarePODPOTrainer": "trainers.named",
    "GapAwarePOTrainer": "trainers.named",
    "GapPOConfig": "trainers.configs",
    "GapPODPOConfig": "trainers.configs",
    "GapPODPOTrainer": "trainers.named",
    "GapPOTrainer": "trainers.named",
    "GeometricAnchorPOConfig": "trainers.configs",
    "GeometricAnchorPODPOConfig": "trainers.configs",
    "GeometricAnchorPODPOTrainer": "trainers.named",
    "GeometricAnchorPOTrainer": "trainers.named",
    "GradientNormMargin": "terms.anchor",
    "GradientNormPOConfig": "trainers.configs",
    "GradientNormPODPOConfig": "trainers.configs",
    "GradientNormPODPOTrainer": "trainers.named",
    "GradientNormPOTrainer": "trainers.named",
    "LengthNormalizedReward": "rewards",
    "Link": "links",
    "LogRatioReward": "rewards",
    "METHODS": "methods",
    "MarginCPOConfig": "trainers.configs",
    "MarginCPOTrainer": "trainers.cpo",
    "MarginDPOConfig": "trainers.configs",
    "MarginDPOTrainer": "trainers.dpo",
    "MeanLogRatioReward": "rewards",
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
    "SharpnessAwarePODPOTrainer": "trainers.named",
    "SharpnessAwarePOTrainer": "trainers.named",
    "SummedReward": "rewards",
    "Term": "terms",
    "TokenAlphaReward": "rewards",
    "config_class": "trainers.configs",
    "register_link": "registry",
    "register_method": "registry",
    "register_reward": "registry",
    "register_term": "registry",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:  # the same names, exported in the form that type checkers accept
    from .links import Link as Link
    from .methods import METHODS as METHODS
    from .methods import Method as Method
    from .methods import Paper as Paper
    from .objective import Objective as Objective
    from .pairs import PairLogps as PairLogps
    from .pairs import PairView as PairView
    from .recording.histograms import PairHistograms as PairHistograms
    from .registry import register_link as register_link
    from .registry import register_method as register_method
    from .registry import register_reward as register_reward
    from .registry import register_term as register_term
    from .rewards import LengthNormalizedReward as LengthNormalizedReward
    from .rewards import LogRatioReward as LogRatioReward
    from .rewards import MeanLogRatioReward as MeanLogRatioReward
    from .rewards import Reward as Reward
    from .rewards import SummedReward as SummedReward
    from .rewards import TokenAlphaReward as TokenAlphaReward
    from .terms import Term as Term
    from .terms.adaptive import AdaptiveMargin as AdaptiveMargin
    from .terms.anchor import AnchorMargin as AnchorMargin
    from .terms.anchor import GradientNormMargin as GradientNormMargin
    from .terms.column import ColumnMargin as ColumnMargin
    from .terms.column import ColumnWeight as ColumnWeight
    from .terms.dynamic_target import DynamicTargetMargin as DynamicTargetMargin
    from .terms.evaluation_factor import EvaluationFactorMargin as EvaluationFactorMargin
    from .terms.score_gap import ScoreGapWeight as ScoreGapWeight
    from .trainers.configs import AMaPOConfig as AMaPOConfig
    from .trainers.configs import AMaPODPOConfig as AMaPODPOConfig
    from .trainers.configs import GammaPOConfig as GammaPOConfig
    from .trainers.configs import GammaPODPOConfig as GammaPODPOConfig
    from .trainers.configs import GapAwarePOConfig as GapAwarePOConfig
    from .trainers.configs import GapAwarePODPOConfig as GapAwarePODPOConfig
    from .trainers.configs import GapPOConfig as GapPOConfig
    from .trainers.configs import GapPODPOConfig as GapPODPOConfig
    from .trainers.configs import GeometricAnchorPOConfig as GeometricAnchorPOConfig
    from .trainers.configs import GeometricAnchorPODPOConfig as GeometricAnchorPODPOConfig
    from .trainers.configs import GradientNormPOConfig as GradientNormPOConfig
    from .trainers.configs import GradientNormPODPOConfig as GradientNormPODPOConfig
    from .trainers.configs import MarginCPOConfig as MarginCPOConfig
    from .trainers.configs import MarginDPOConfig as MarginDPOConfig
    from .trainers.configs import SharpnessAwarePOConfig as SharpnessAwarePOConfig
    from .trainers.configs import SharpnessAwarePODPOConfig as SharpnessAwarePODPOConfig
    from .trainers.configs import config_class as config_class
    from .trainers.cpo import MarginCPOTrainer as MarginCPOTrainer
    from .trainers.dpo import MarginDPOTrainer as MarginDPOTrainer
    from .trainers.named import AMaPODPOTrainer as AMaPODPOTrainer
    from .trainers.named import AMaPOTrainer as AMaPOTrainer
    from .trainers.named import GammaPODPOTrainer as GammaPODPOTrainer
    from .trainers.named import GammaPOTrainer as GammaPOTrainer
    from .trainers.named import GapAwarePODPOTrainer as GapAwarePODPOTrainer
    from .trainers.named import GapAwarePOTrainer as GapAwarePOTrainer
    from .trainers.named import GapPODPOTrainer as GapPODPOTrainer
    from .trainers.named import GapPOTrainer as GapPOTrainer
    from .trainers.named import GeometricAnchorPODPOTrainer as GeometricAnchorPODPOTrainer
    from .trainers.named import GeometricAnchorPOTrainer as GeometricAnchorPOTrainer
    from .trainers.named import GradientNormPODPOTrainer as GradientNormPODPOTrainer
    from .trainers.named import GradientNormPOTrainer as GradientNormPOTrainer
    from .trainers.named import SharpnessAwarePODPOTrainer as SharpnessAwarePODPOTrainer
    from .trainers.named import SharpnessAwarePOTrainer as SharpnessAwarePOTrainer


if not TYPE_CHECKING:  # where it would stand for every name that there is not

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
