"""The objectives that the papers compare with: what each is, and its own numbers.

The budget is SimPO's for all of them, so that they compare. `docs/baselines.md` names the source of each number.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..terms.alpha_dpo import ReferenceMargin
from ..terms.baselines import DrDPOWeight, LengthMargin, MarginAdaptiveWeight, ScoreOffsetMargin
from ..terms.beta_dpo import BatchBetaMargin, KeptWeight
from .row import SIMPO_SETTINGS, Method, cited

# Searched in SimPO's Table 7 and γ-PO's Table 6: β in 0.01, 0.05, 0.1 and the learning rate from 3e-7 to 1e-6
_DPO_SETTINGS: Mapping[str, Any] = MappingProxyType({**SIMPO_SETTINGS, "learning_rate": 5e-7, "beta": 0.1})
_ALPHAPO_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {**SIMPO_SETTINGS, "beta": 2.5, "gamma_beta_ratio": 0.1, "alpha": 0.25, "learning_rate": 7e-7}
)
_REFERENCE = ("dpo",)  # only DPOTrainer has a reference model


def _baseline(
    key: str,
    name: str,
    paper: str,
    formula: str,
    reward: str = "log-ratio",
    settings: Mapping[str, Any] = _DPO_SETTINGS,
    models: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    **row: Any,
) -> Method:
    """A row; `paper` is a key of papers.bib, and `row` also has the config fields in which it differs from `settings`.

    `models` is `Method.settings`.
    """
    row["settings"] = models
    own = {item: row.pop(item) for item in [*row] if item not in Method.__dataclass_fields__}
    bases = row.pop("bases", _REFERENCE if reward == "log-ratio" else ("cpo", "dpo"))
    defaults = MappingProxyType({**settings, **own})
    return Method(
        key, name, cited(paper), f"loss = (1/B) Σ {formula}", reward, defaults, bases=bases, baseline=True, **row
    )


ROWS = (
    _baseline(
        "simpo",
        "SimPO",
        "simpo",
        "−log σ(β (Δ − γ)),  Δ = mean log π(y_w) − mean log π(y_l)",
        reward="length-normalized",
        settings=SIMPO_SETTINGS,
        beta=2.5,
        gamma_beta_ratio=0.55,
        models={  # SimPO's README, released models; lengths from its configurations
            "Llama-3-8B-Instruct": {},
            "Llama-3-8B-Base": {"beta": 2.0, "gamma_beta_ratio": 0.5, "learning_rate": 6e-7},
            "Mistral-7B-Instruct": {"gamma_beta_ratio": 0.1, "learning_rate": 5e-7},
            "Mistral-7B-Base": {"beta": 2.0, "gamma_beta_ratio": 0.8, "learning_rate": 3e-7, "max_length": 1024},
            "Gemma-2-9B": {"beta": 10.0, "gamma_beta_ratio": 0.5, "learning_rate": 8e-7},
        },
    ),
    _baseline(
        "dpo",
        "DPO",
        "dpo",
        "−log σ(x),  x = β (log π/π_ref (y_w) − log π/π_ref (y_l))",
        beta=0.01,  # SimPO's README: the best of the three in all of its settings
        models={
            "Llama-3-8B-Instruct": {"learning_rate": 7e-7},
            "Llama-3-8B-Base": {},
            "Mistral-7B-Instruct": {},
            "Mistral-7B-Base": {"max_length": 1024},
            "Gemma-2-9B": {},
        },
    ),
    _baseline(
        "cpo",
        "CPO",
        "cpo",
        "−log σ(β log π(y_w) − β log π(y_l)) + NLL(y_w)",
        reward="sum",
        settings=SIMPO_SETTINGS,
        beta=0.1,
        loss="sigmoid",
        sft=1.0,
    ),
    _baseline("ipo", "IPO", "ipo", "(mean log-ratio gap − 1/(2β))²", loss="ipo"),
    _baseline("ipo-sum", "IPO", "ipo", "(log-ratio gap − 1/(2β))²", loss="ipo_sum"),
    _baseline(
        "slic-hf",
        "SLiC-HF",
        "slichf",
        "max(0, 1 − β log π(y_w) + β log π(y_l)) + 0.1 · NLL(y_w),  δ = 1/β",
        reward="sum",
        loss="hinge",
        settings=SIMPO_SETTINGS,
        beta=1.0,
        sft=0.1,
    ),
    _baseline(
        "alphapo",
        "AlphaPO",
        "alphapo",
        "−log σ(β (f(p_w) − f(p_l)) − γ),  f(p) = (1 − p^−α)/α, p = exp(mean log π)",
        reward="length-normalized",
        settings=_ALPHAPO_SETTINGS,
    ),
    _baseline(
        "alphapo-token",
        "AlphaPO by token",
        "alphapo",
        "−log σ(β (mean f(π_w,t) − mean f(π_l,t)) − γ),  f(p) = (1 − p^−α)/α",
        reward="alphapo-token",
        settings=_ALPHAPO_SETTINGS,
    ),
    _baseline(
        "robust-dpo",
        "rDPO",
        "rdpo",
        "[−(1−ε) log σ(x) + ε log σ(−x)] / (1 − 2ε)",
        loss="robust",
        label_smoothing=0.1,
    ),
    _baseline(
        "wpo",
        "WPO",
        "wpo",
        "w(y_w) w(y_l) · −log σ(x),  w(y) = exp(mean_t (log π(y_t) − log Σ_v π(v)²))",
        use_weighting=True,
        beta=0.01,
        models={"Llama-3-8B-Instruct": {"learning_rate": 1e-6}},
    ),
    _baseline(
        "orpo",
        "ORPO",
        "orpo",
        "NLL(y_w) + β · −log σ(log odds(y_w) − log odds(y_l)),  odds = p/(1 − p), p = exp(mean log π)",
        reward="log-odds",
        loss="orpo",
        sft=1.0,
        settings=SIMPO_SETTINGS,
        beta=0.1,
        learning_rate=5e-6,
    ),
    _baseline(
        "rrhf",
        "RRHF",
        "rrhf",
        "max(0, mean log π(y_l) − mean log π(y_w)) + NLL(y_w)",
        reward="length-normalized",
        loss="rrhf",
        sft=1.0,
        settings=SIMPO_SETTINGS,
        beta=1.0,
        gamma_beta_ratio=0.0,
    ),
    _baseline(
        "r-dpo",
        "R-DPO",
        "rdpo-length",
        "−log σ(x + α (|y_w| − |y_l|))",
        margin=LengthMargin.name,
        r_dpo_alpha=0.05,
    ),
    _baseline(
        "cdpo",
        "cDPO",
        "cdpo",
        "−(1−ε) log σ(x) − ε log σ(−x)",
        loss="conservative",
        label_smoothing=0.1,
    ),
    _baseline(
        "rsimpo",
        "rSimPO",
        "gammapo",
        "−(1−ε) log σ(m − γ) − ε log σ(−m − γ),  m = βΔ",
        reward="length-normalized",
        loss="robust_simpo",
        settings=SIMPO_SETTINGS,
        beta=10.0,
        gamma_beta_ratio=0.4,
        label_smoothing=0.1,
    ),
    _baseline(
        "alpha-dpo",
        "α-DPO",
        "alphadpo",
        "−log σ(β (Δ − γ − α z_i)),  z = (Δ − Δ_ref) standardized over the run",
        reward="length-normalized",
        margin=ReferenceMargin.name,
        bases=_REFERENCE,
        settings=SIMPO_SETTINGS,
        beta=2.5,
        gamma_beta_ratio=0.6,
        alpha_dpo_alpha=0.2,
        models={  # its repository, training_configs
            "Llama-3-8B-Instruct": {},
            "Mistral-7B-Instruct": {"gamma_beta_ratio": 0.15, "alpha_dpo_alpha": 0.05, "learning_rate": 6e-7},
            "Gemma-2-9B": {"beta": 10.0, "gamma_beta_ratio": 0.4, "alpha_dpo_alpha": 0.05, "learning_rate": 8e-7},
        },
    ),
    _baseline(
        "beta-dpo",
        "β-DPO",
        "betadpo",
        "−log σ(β_b x_i/β) over the kept pairs,  β_b = β (1 + a (mean gap − its running mean))",
        weight=KeptWeight.name,
        margin=BatchBetaMargin.name,
        beta_dpo_a=0.6,
        beta_dpo_keep=0.8,
    ),
    _baseline(
        "beta-simpo",
        "β-SimPO",
        "betadpo",
        "−log σ(β_b Δ − βγ) over the kept pairs,  β_b = β (1 + a (mean Δ − its running mean))",
        reward="length-normalized",
        weight=KeptWeight.name,
        margin=BatchBetaMargin.name,
        settings=SIMPO_SETTINGS,
        beta=2.5,
        gamma_beta_ratio=0.3,
        beta_dpo_a=0.25,  # γ-PO's 0.1, of gaps with β inside
        beta_dpo_keep=0.8,
    ),
    _baseline(
        "dr-dpo",
        "Dr. DPO",
        "drdpo",
        "σ(x_i)^(1/β′) / mean σ(x)^(1/β′) · −log σ(x_i), the gradient of −β′ log mean exp(log σ(x)/β′)",
        weight=DrDPOWeight.name,
        dr_dpo_beta_prime=1.0,
    ),
    _baseline(
        "odpo",
        "ODPO",
        "odpo",
        "−log σ(x − α log(s_w − s_l))",
        margin=ScoreOffsetMargin.name,
        beta=0.5,
        odpo_alpha=1.0,
    ),
    _baseline(
        "madpo",
        "MADPO",
        "madpo",
        "σ(c_i h_i)/σ(h_i) · −log σ(x_i),  h = s_w − s_l",
        weight=MarginAdaptiveWeight.name,
    ),
    _baseline(
        "focalpo",
        "FocalPO",
        "focalpo",
        "−σ(x)^g log σ(x)",
        loss="focalpo",
        focalpo_gamma=0.05,
    ),
    _baseline(
        "kto-pair",
        "KTO on pairs",
        "kto",
        "2 − σ(β (log-ratio(y_w) − KL_l)) − σ(β (KL_w − log-ratio(y_l)))",
        loss="kto_pair",
    ),
    _baseline(
        "dpop",
        "DPOP",
        "dpop",
        "−log σ(x − β λ max(0, −log-ratio(y_w)))",
        loss="dpop",
        beta=0.3,
        dpop_lambda=50.0,
    ),
    _baseline(
        "sppo",
        "SPPO",
        "sppo",
        "(log-ratio(y_w) − 1/(2β))² + (log-ratio(y_l) + 1/(2β))²",
        loss="sppo_hard",
        beta=0.001,
    ),
    _baseline(
        "simper",
        "SimPER",
        "simper",
        "p_l − p_w,  p = exp(mean log π)",
        reward="length-normalized",
        loss="simper",
        settings=SIMPO_SETTINGS,
        beta=1.0,
    ),
    _baseline(
        "reward-aware-po",
        "Reward-aware RPO",
        "nemotron",
        "KL(σ(η (s_w − s_l)) ‖ σ(x)) + 1e-5 · NLL(y_w)",
        loss="reward_aware",
        reward_aware_eta=1.0,
        sft=1e-5,
        learning_rate=3e-7,
    ),
)
