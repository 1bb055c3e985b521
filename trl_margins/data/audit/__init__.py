"""What a preference set looks like before training: scores, lengths, truncation, duplicates, evaluation factors.

An audit reports all that it finds and never stops: bad scores and unreadable rows are counted, the first of each is
shown, and they are left out of the numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .counting import Distribution, Lengths, Measure, SharedPrompts, distribution, nice_edges, shared_prompts
from .splits import Settings, SplitAudit, audit_split
from .warnings import find_warnings, why_not

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Audit", "Distribution", "Lengths", "Measure", "SplitAudit", "audit", "distribution", "nice_edges"]


@dataclass(frozen=True)
class Audit:
    """The audit of all splits."""

    splits: dict[str, SplitAudit]
    shared_prompts: list[SharedPrompts]
    warnings: list[str]


def audit(
    splits: Mapping[str, Dataset], methods: Mapping[str, Collection[str]] | None = None, **settings: Any
) -> Audit:
    """Looks at every row of every split.

    Args:
        splits: name → rows in any form that TRL takes.
        methods: id → columns that its terms read.
        **settings: the fields of `Settings`.

    Raises:
        ScoreError: `score_columns` names columns that are not there.
    """
    audits, prompts = {}, {}
    for name, dataset in splits.items():
        found, prompts[name] = audit_split(dataset, name, Settings(**settings))
        reasons = {method: why_not(found, needs) for method, needs in (methods or {}).items()}
        audits[name] = replace(found, methods=reasons)
    shared = shared_prompts(prompts)
    return Audit(audits, shared, list(find_warnings(audits, shared)))
