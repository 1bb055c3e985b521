"""The five papers' methods, and the controls that one of them compares with."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..terms.adaptive import AdaptiveMargin
from ..terms.anchor import AnchorMargin, GradientNormMargin
from ..terms.dynamic_target import DynamicTargetMargin
from ..terms.evaluation_factor import EvaluationFactorMargin
from ..terms.score_gap import ScoreGapWeight
from .row import SIMPO_SETTINGS, Method, cited

# Table A; γ is the paper's, β not in it
_GAPO_SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "Mistral-7B-Instruct": {"beta": 2.5, "gamma_beta_ratio": 0.1, "learning_rate": 5e-7},
        "Llama-3-8B-Base": {"beta": 2.0, "gamma_beta_ratio": 0.5, "learning_rate": 6e-7},
        "Llama-3-8B-Instruct": {"beta": 2.5, "gamma_beta_ratio": 0.55, "learning_rate": 1e-6},
        "Gemma-2-9B": {"beta": 10.0, "gamma_beta_ratio": 0.5, "learning_rate": 8e-7},
    }
)
_MISTRAL_SETTINGS = _GAPO_SETTINGS["Mistral-7B-Instruct"]  # what the paper's ablations and controls keep

ROWS = (
    Method(
        id="gappo",
        name="GapPO",
        paper=cited("gappo"),
        formula="loss = (1/B) Σ |s_w − s_l| · −log σ(β (Δ − γ)),  Δ = mean log π(y_w) − mean log π(y_l)",
        reward="length-normalized",
        weight=ScoreGapWeight.name,
        keep_best="pwa",
        defaults=MappingProxyType(
            {
                "beta": 1.0,
                "gamma_beta_ratio": 0.5,
                "learning_rate": 1e-5,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                "num_train_epochs": 1.0,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 8,
                "max_length": 1024,
            }
        ),
        settings=MappingProxyType(
            {
                "Qwen2.5-0.5B-Instruct": {"learning_rate": 1e-5},
                "Gemma-2-2B": {"learning_rate": 8e-6},
                "Mistral-7B-Instruct": {"learning_rate": 5e-6},
            }
        ),
        tags=("gappo", "score-gap"),
    ),
    Method(
        id="gap-aware",
        name="GaPO",
        paper=cited("gapaware"),
        formula="loss = (1/B) Σ −log σ(βΔ − γ · f / mean f),  f = log(1 / ROUGE-L(y_w, y_l))",
        reward="length-normalized",
        margin=EvaluationFactorMargin.name,
        defaults=MappingProxyType(
            {
                **SIMPO_SETTINGS,
                "beta": 10.0,
                "gamma_beta_ratio": 0.3,
                "gap_aware_metric": "rougeL",
                "gap_aware_mapping": "log",
                "gap_aware_normalization": "scale",
            }
        ),
        settings=MappingProxyType({"Llama-3-8B-Instruct": {}}),
        tags=("gap-aware", "evaluation-factor"),
    ),
    Method(
        id="gamma-po",
        name="γ-PO",
        paper=cited("gammapo"),
        formula="loss = (1/B) Σ −log σ(m_i − γ n p_i),  p = argmin −(1/n) Σ log σ(m_i − γ n p_i) + τ KL(p ‖ uniform)",
        reward="length-normalized",
        margin=DynamicTargetMargin.name,
        defaults=MappingProxyType(
            {
                **SIMPO_SETTINGS,
                "beta": 10.0,
                "gamma_beta_ratio": 0.4,
                "gamma_po_tau": 10.0,
                "gamma_po_steps": 20,
                "gamma_po_estimation_size": 256,
            }
        ),
        settings=MappingProxyType(
            {
                "Llama-3-8B-Instruct": {},
                "Mistral-7B-Instruct": {"beta": 2.5, "gamma_beta_ratio": 0.15, "learning_rate": 6e-7},
                "Gemma-2-9B": {"gamma_beta_ratio": 0.5, "gamma_po_tau": 20.0, "learning_rate": 8e-7},
                "Qwen2.5-7B": {"gamma_beta_ratio": 0.3, "gamma_po_tau": 3.0},
            }
        ),
        tags=("gamma-po", "dynamic-target-margin"),
    ),
    Method(
        id="amapo",
        name="AMaPO",
        paper=cited("amapo"),
        formula="loss = (1/B) Σ −log σ(βΔ_i − margin_i),  margin_i = β exp((μ − Δ_i)/σ · μ) where Δ_i < μ, else 0",
        reward="length-normalized",
        margin=AdaptiveMargin.name,
        defaults=MappingProxyType(
            {**SIMPO_SETTINGS, "beta": 3.0, "gamma_beta_ratio": 0.0, "amapo_estimation_size": 32}
        ),
        settings=MappingProxyType(
            {
                "Llama3-8B-Base": {"learning_rate": 6e-7},
                "Llama3-8B-Instruct": {},
                "Mistral-7B-Base": {"beta": 2.0, "learning_rate": 4e-7, "max_length": 1024},
                "Mistral-7B-Instruct": {"beta": 2.0, "learning_rate": 6e-7},
            }
        ),
        tags=("amapo", "adaptive-margin"),
    ),
    Method(
        id="geometric-anchor",
        name="GAPO",
        paper=cited("gapo"),
        formula="loss = (1/B) Σ −log σ(β (Γ_i − γ)),  Γ_i = Δ_i(θ) − Δ_i(θ − ρ ∇M̄/‖∇M̄‖),  M̄ = mean Δ",
        reward="length-normalized",
        margin=AnchorMargin.name,
        defaults=MappingProxyType(
            {**SIMPO_SETTINGS, **_MISTRAL_SETTINGS, "anchor_radius": 0.05, "anchor_batch_multiplier": 8}
        ),
        settings=_GAPO_SETTINGS,
        tags=("geometric-anchor", "gapo"),
    ),
    Method(
        id="gradient-norm",
        name="GradNorm-Reweight",
        paper=cited("gapo"),
        formula="loss = (1/B) Σ −log σ(β (N_i − γ)),  N_i = ‖∇Δ_i‖ / mean ‖∇Δ‖, without gradient; ∇loss_i ∝ ∇Δ_i",
        reward="length-normalized",
        margin=GradientNormMargin.name,
        defaults=MappingProxyType({**SIMPO_SETTINGS, **_MISTRAL_SETTINGS}),
        settings=MappingProxyType({"Mistral-7B-Instruct": {}}),
        tags=("gradient-norm",),
    ),
    Method(
        id="simpo-sam",
        name="SimPO-SAM",
        paper=cited("sam"),
        formula="loss = (1/B) Σ −log σ(β (Δ − γ)), its gradient taken at θ + ρ ∇loss/‖∇loss‖",
        reward="length-normalized",
        defaults=MappingProxyType({**SIMPO_SETTINGS, **_MISTRAL_SETTINGS, "sam_radius": 0.05}),
        settings=MappingProxyType({"Mistral-7B-Instruct": {}}),
        tags=("simpo", "sharpness-aware"),
    ),
)
