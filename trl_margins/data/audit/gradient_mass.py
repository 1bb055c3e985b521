"""How GapPO's weights divide the gradient over score gaps, from the data alone: figures 1 and 2 of its paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from ...terms.score_gap import Transform, score_gap_weight
from .counting import Distribution, distribution, nice_edges

BATCH = 16  # pairs that share a mean under `normalized`: the paper's batch
BINS = 8


@dataclass(frozen=True)
class GradientMass:
    """Shares of the summed weights in each bin of |score gap|, all slopes taken as equal.

    The bins are those of the histogram of `sizes`. A transform under which no pair has a weight has zeros.
    """

    sizes: Distribution  # |score gap|
    threshold: float  # of `hard`
    shares: dict[str, list[float]]  # `pairs`, `normalized`, or a transform of GapPO → [bins]


def gradient_mass(gaps: np.ndarray, threshold: float, seed: int) -> GradientMass | None:
    """The shares under every transform of `score_gap_weight`, and under its normalised weights; None without gaps.

    Args:
        gaps: [N] finite score gaps.
        threshold: τ of the hard filter.
        seed: of the order in which the pairs make batches for the normalised weights.
    """
    sizes = distribution(np.abs(gaps), nice_edges(np.abs(gaps), BINS) if len(gaps) else None)
    if sizes is None:
        return None
    chosen, rejected = torch.from_numpy(np.array(gaps, np.float64)), torch.zeros(len(gaps), dtype=torch.float64)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(gaps)))
    normalized = torch.empty_like(chosen)
    for batch in order.split(BATCH):
        normalized[batch] = score_gap_weight(chosen[batch], rejected[batch], normalize=True)
    linear, *others = get_args(Transform)
    weights = {"pairs": torch.ones_like(chosen), linear: score_gap_weight(chosen, rejected), "normalized": normalized}
    for name in others:
        weights[name] = score_gap_weight(chosen, rejected, name, threshold if name == "hard" else None)
    edges = np.array(sizes.histogram.edges)
    inside = np.clip(np.abs(gaps), edges[0], edges[-1])
    masses = {name: np.histogram(inside, edges, weights=weight.numpy())[0] for name, weight in weights.items()}
    return GradientMass(sizes, threshold, {name: (m / (m.sum() or 1.0)).tolist() for name, m in masses.items()})
