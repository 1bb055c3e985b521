"""What a method is: a named choice of reward, loss and terms, with its paper and the paper's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any


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


@cache
def cited(key: str) -> Paper:
    """The paper with this key in `papers.bib`."""
    entries = (resources.files(__package__) / "papers.bib").read_text(encoding="utf-8").split("\n\n")
    (citation,) = (entry.strip() for entry in entries if re.match(rf"@\w+{{{key},", entry))
    title, arxiv = (re.search(pattern, citation) for pattern in (r"title +?= {{(.+)}},", r"eprint +?= {(.+)},"))
    if title is None:
        raise ValueError(f"papers.bib: {key} has no title")
    return Paper(title[1], citation, arxiv and arxiv[1])


@dataclass(frozen=True)
class Method:
    """A named choice of reward and terms, with its paper and the paper's settings."""

    id: str
    name: str  # as the paper writes it
    paper: Paper
    formula: str
    reward: str
    defaults: Mapping[str, Any]  # config fields, both bases
    loss: str | None = None  # `loss_type` on both bases; None is the sigmoid with a target margin
    sft: float = 0.0  # λ of the term λ · mean negative log-likelihood of the chosen completions' tokens
    bases: tuple[str, ...] = ("cpo", "dpo")  # that can carry it, its own first
    weight: str | Sequence[str] | None = None  # a term by name, or several, which multiply
    margin: str | Sequence[str] | None = None  # or which add
    keep_best: str | None = None  # evaluation metric whose best checkpoint is kept
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # model of the paper → its own values
    tags: tuple[str, ...] = ()
    baseline: bool = False  # one of the objectives that the papers compare with


# SimPO's general settings, which most papers keep: one epoch, cosine with 10 % warm-up, 128 pairs a step
SIMPO_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 64,
        "max_length": 2048,
    }
)


def names_of(named: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of one term, of several, or of none."""
    if named is None:
        return ()
    return (named,) if isinstance(named, str) else tuple(named)
