"""Which methods a split can feed."""

from __future__ import annotations

from collections.abc import Collection

from ...pairs import SCORES
from .factors import FACTOR
from .split import SplitAudit
from .warnings import counted


def why_not(split: SplitAudit, needs: Collection[str]) -> str | None:
    """What keeps a method that reads these columns from training on the split; None: nothing."""
    missing = [name for name in ("chosen", "rejected") if name not in split.columns]
    if missing:
        return f"no column {' and no column '.join(missing)}"
    if not split.n_rows:
        return "no rows"
    reasons = ["training refuses the rows"] if split.refused else []
    reasons += [
        f"{counted(rows.n, 'row')} cannot be {what}"
        for rows, what in ((split.unreadable, "read"), (split.untokenizable, "tokenized"))
        if rows is not None
    ]
    truncation = split.truncation
    if truncation is not None and 0 < truncation.n == truncation.n_left_empty:
        reasons.append(f"every prompt fills max_length={truncation.max_length}")
    if any(name in SCORES for name in needs):
        if split.scores is None:
            reasons.append("needs scores")
        elif split.scores.bad:
            reasons.append(f"column {split.scores.bad[0].column} holds bad scores")
        elif split.scores.n_ties == split.n_rows:
            reasons.append("all pairs are ties")
    if FACTOR in needs and split.factors is not None and split.factors.problem:
        reasons.append(f"column {FACTOR} holds bad values")
    unknown = [name for name in needs if name not in (*SCORES, FACTOR, *split.columns)]
    return "; ".join(reasons + [f"needs a column {name}" for name in unknown]) or None
