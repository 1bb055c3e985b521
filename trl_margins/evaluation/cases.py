"""AMaPO's four cases: whether pairs are ranked right, and whether they have reached their margin."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .intervals import bootstrap_intervals

CASES = ("case_1", "case_2", "case_3", "case_4")


def ranking_cases(policy_gap: ArrayLike, surplus: ArrayLike) -> np.ndarray:
    r"""[M] the case of each pair, 1 to 4; 0 where a value is NaN.

    ====  =============  ========  ================  ============
    case  ranked         r and γ   gradient          Definition 1
    ====  =============  ========  ================  ============
    1     right (r > 0)  r ≥ γ     small             ideal
    2     right          r < γ     large, wasted     overfitting
    3     wrong (r ≤ 0)  r ≥ γ     small, too small  underfitting
    4     wrong          r < γ     large             ideal
    ====  =============  ========  ================  ============

    :math:`r = h_w(\log \pi_w) - h_l(\log \pi_l)` is of the policy alone. A reference model is a part of the margin:
    DPO's is :math:`\gamma = \beta \log \pi_{ref}(y_w|x) - \beta \log \pi_{ref}(y_l|x)`. So r − γ is what the link is
    applied to, in every method: the reward gap, with the reference in it, less the target margin. The cases are of a
    model, at one moment and under one method's margin; they compare no two models.

    Args:
        policy_gap: [M] r, in any unit: only its sign counts.
        surplus: [M] r − γ.

    Source: AMaPO (arXiv 2511.09385), Table 1, Definition 1 and section 4.1; Table 6 for the margins of other methods.
    """
    right, reached = np.asarray(policy_gap, float), np.asarray(surplus, float)
    case = np.where(right > 0, np.where(reached >= 0, 1, 2), np.where(reached >= 0, 3, 4))
    return np.where(np.isnan(right) | np.isnan(reached), 0, case)


def case_report(
    case: np.ndarray, prompts: Sequence[Hashable], n_resamples: int = 1000, weights: np.ndarray | None = None
) -> dict[str, Any]:
    """How many pairs are in each case.

    Args:
        case: [M] of `ranking_cases`. Pairs of case 0 are left out.
        prompts: [M] identifies each pair's prompt: the bootstrap draws whole prompts.
        n_resamples: of the bootstrap.
        weights: [M] what each pair counts, by default 1.

    Returns:
        `case_1` to `case_4`, the shares (None without pairs); `case_counts`, by the same names; `intervals` (95 %).
    """
    kept = np.flatnonzero(case)
    counts_as = np.ones(len(kept)) if weights is None else weights[kept]
    member = (case[kept, None] == np.arange(1, len(CASES) + 1)) * counts_as[:, None]  # [m, 4]

    def shares(rows: np.ndarray) -> dict[str, float | None]:
        sums, whole = member[rows].sum(0), counts_as[rows].sum()
        return {name: float(n / whole) if len(rows) else None for name, n in zip(CASES, sums, strict=True)}

    intervals = bootstrap_intervals(shares, [prompts[i] for i in kept.tolist()], n_resamples)
    counts = dict(zip(CASES, member.sum(0).tolist(), strict=True))
    return {**shares(np.arange(len(kept))), "case_counts": counts, "intervals": intervals}
