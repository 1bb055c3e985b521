"""All splits of a set, what they share, and what of it deserves a warning."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .duplicates import SharedPrompts, shared_prompts
from .lengths import Measure
from .methods import why_not
from .split import SplitAudit, audit_split
from .warnings import find_warnings

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Audit:
    """Of all splits."""

    splits: dict[str, SplitAudit]
    shared_prompts: list[SharedPrompts]
    warnings: list[str]


def audit(
    splits: Mapping[str, Dataset],
    *,
    score_columns: Sequence[str] | None = None,
    min_score_gap: float = 2.0,
    measure: Measure | None = None,
    max_length: int = 1024,
    ef_sample: int = 1000,
    seed: int = 0,
    methods: Mapping[str, Collection[str]] | None = None,
    prompt_column: str | None = None,
    system_column: str | None = None,
) -> Audit:
    """Looks at every row of every split.

    Args:
        splits: name → rows in any form that TRL takes.
        score_columns: as for `find_score_columns`.
        min_score_gap: the evaluation's threshold.
        measure: counts tokens in rows that could be read; words without it.
        max_length: tokens of prompt and answer. Without `measure` nothing is known of truncation.
        ef_sample: rows at most for which evaluation factors are computed, where there is no column of them.
        seed: of that sample.
        methods: id → columns that its terms read.
        prompt_column, system_column: as for `RowReader`.

    Raises:
        ScoreError: `score_columns` names columns that are not there.
    """
    audits, prompts = {}, {}
    for name, dataset in splits.items():
        found, prompts[name] = audit_split(
            dataset,
            name,
            score_columns=score_columns,
            min_score_gap=min_score_gap,
            measure=measure,
            max_length=max_length,
            ef_sample=ef_sample,
            seed=seed,
            prompt_column=prompt_column,
            system_column=system_column,
        )
        reasons = {method: why_not(found, needs) for method, needs in (methods or {}).items()}
        audits[name] = replace(found, methods=reasons)
    shared = shared_prompts(prompts)
    return Audit(audits, shared, list(find_warnings(audits, shared)))
