"""RM-Bench: three styles of the better completion against three styles of the worse one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .intervals import percentile_interval

STYLES = ("concise", "detailed plain", "detailed markdown")
DOMAINS = ("chat", "code", "math", "safety")
LEVELS = ("hard", "normal", "easy", "average")


def style_matrix(chosen: ArrayLike, rejected: ArrayLike) -> np.ndarray:
    """[3, 3] share of prompts whose chosen completion in style i has a higher reward than the rejected one in style j.

    A tie counts as wrong.

    Args:
        chosen: [N, 3] rewards in the order of `STYLES`.
        rejected: [N, 3].
    """
    return (np.asarray(chosen)[:, :, None] > np.asarray(rejected)[:, None, :]).mean(0)


def levels(matrix: np.ndarray) -> dict[str, float]:
    """Means over the cells of a style matrix.

    ======= ===================================================
    hard    i < j: the worse completion has the richer style
    normal  i = j
    easy    i > j: the better completion has the richer style
    average mean of the three
    ======= ===================================================

    Source: RM-Bench (arXiv 2410.16184), section 4.
    """
    found = {
        "hard": float(matrix[np.triu_indices(len(matrix), 1)].mean()),
        "normal": float(np.diag(matrix).mean()),
        "easy": float(matrix[np.tril_indices(len(matrix), -1)].mean()),
    }
    return found | {"average": float(np.mean(list(found.values())))}


def rm_bench_report(
    chosen: ArrayLike, rejected: ArrayLike, domains: Sequence[str], n_resamples: int = 1000
) -> dict[str, Any]:
    """The levels of each domain, and their means.

    Args:
        chosen, rejected: [N, 3] rewards in the order of `STYLES`.
        domains: [N] of `DOMAINS`.
        n_resamples: of the bootstrap over prompts.

    Returns:
        `n_prompts`; `total`, the means over domains of the four levels, and their `intervals` (95 %); `domains`, by
        name: `n_prompts`, `matrix`, the four levels and their `intervals`.
    """
    chosen, rejected, domain = np.asarray(chosen, float), np.asarray(rejected, float), np.asarray(domains)
    rng = np.random.default_rng(0)
    by_domain, drawn = {}, {}
    for name in DOMAINS:
        if not (rows := np.flatnonzero(domain == name)).size:
            continue
        matrix = style_matrix(chosen[rows], rejected[rows])
        picks = (rng.choice(rows, len(rows)) for _ in range(n_resamples))
        drawn[name] = [levels(style_matrix(chosen[pick], rejected[pick])) for pick in picks]
        by_domain[name] = {
            "n_prompts": len(rows),
            "matrix": matrix.tolist(),
            **levels(matrix),
            "intervals": {level: percentile_interval([each[level] for each in drawn[name]]) for level in LEVELS},
        }
    resamples = list(zip(*drawn.values(), strict=True))  # of each, one draw of every domain
    return {
        "n_prompts": len(domain),
        "total": {level: float(np.mean([each[level] for each in by_domain.values()])) for level in LEVELS},
        "intervals": {
            level: percentile_interval([np.mean([each[level] for each in draw]) for draw in resamples])
            for level in LEVELS
        },
        "domains": by_domain,
    }


def domain_of(row_domain: str | None, source: str) -> str:
    """The domain of a row: from its own field, or from the name of its file (`safety-response_filtered.json`)."""
    for name in (row_domain, Path(source).name):
        found = next((domain for domain in DOMAINS if (name or "").lower().startswith(domain)), None)
        if found:
            return found
    raise ValueError(
        f"{source}: the domain {row_domain!r} is not one of {', '.join(DOMAINS)}, and the file's name does not begin "
        "with one: add a `domain` to the rows, or give the file a name like chat_filtered.json"
    )
