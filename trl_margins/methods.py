"""THE table of methods. Trainers, configs, CLI, model cards and docs read it; nothing repeats it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .terms import Term
from .terms.score_gap import ScoreGapWeight

WEIGHTS: Mapping[str, type[Term]] = MappingProxyType({ScoreGapWeight.name: ScoreGapWeight})


@dataclass(frozen=True)
class Paper:
    """What to cite."""

    title: str
    citation: str
    arxiv: str | None = None

    def as_trl(self) -> dict[str, str]:
        """The form in which TRL's trainers hand their paper to the model card."""
        card = {"title": self.title, "citation": self.citation}
        return card | {"id": self.arxiv} if self.arxiv else card


@dataclass(frozen=True)
class Method:
    """One row: a named choice of reward and terms, with its paper and the paper's settings."""

    id: str
    name: str
    paper: Paper
    formula: str
    reward: str
    defaults: Mapping[str, Any]  # config fields, both bases
    weight: str | None = None
    keep_best: str | None = None  # evaluation metric whose best checkpoint is kept
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # model of the paper → its learning rate
    tags: tuple[str, ...] = ()


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.id: method
        for method in (
            Method(
                id="gappo",
                name="GapPO",
                paper=Paper(
                    title="GapPO: Gradient-Adaptive Pairwise Preference Optimization",
                    citation=textwrap.dedent("""\
                        @misc{gappo,
                            title  = {{GapPO: Gradient-Adaptive Pairwise Preference Optimization}},
                            author = {Anonymous},
                            note   = {Under review},
                        }"""),
                ),
                formula="loss = (1/B) Σ |s_w − s_l| · −log σ(β (Δ − γ)),  Δ = mean log π(y_w) − mean log π(y_l)",
                reward="length-normalized",
                weight="score-gap",
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
                learning_rates=MappingProxyType({"0.5B": 1e-5, "2B": 8e-6, "7B": 5e-6}),
                tags=("gappo", "score-gap"),
            ),
        )
    }
)


def get_method(method_id: str) -> Method:
    """The row of a method's id.

    Raises:
        ValueError: no such row.
    """
    if method_id not in METHODS:
        raise ValueError(f"unknown method {method_id!r}; known: {', '.join(METHODS)}")
    return METHODS[method_id]
