"""Ranks a data set by anchor gap at a checkpoint: which pairs are stable there, and which are not."""

from __future__ import annotations

import logging

import numpy as np
from tqdm.auto import tqdm

from ..pairs import CARRIED, ROW
from ..zero3 import zero3_settings
from .anchor import GeometricAnchor, in_groups
from .diagnostics import anchor_gap
from .probe import ProbedTrainer

logger = logging.getLogger(__name__)


def dataset_anchor_gaps(trainer: ProbedTrainer) -> np.ndarray:
    """Γ of every pair of `trainer.train_dataset`, in its order, under the current weights; nothing is trained.

    That set lacks the pairs that training drops; its column `row_number` gives the row of the given set that each
    value belongs to. Pairs are taken in groups of `anchor_batch_multiplier` mini-batches, each with a direction of its
    own: with `train_sampling_strategy="sequential"` in their order, else at random. Every rank gets all values.
    Where the last mini-batches of several ranks are filled up with pairs of the first, the log says how many.
    """
    if zero3_settings(trainer.accelerator) is not None:
        raise ValueError("DeepSpeed's ZeRO-3 holds a model for its training alone: rank pairs with DDP or one process")
    batches = trainer.get_train_dataloader()
    trainer.model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
    anchor = GeometricAnchor(trainer, trainer.options)
    anchor.log = None  # a training's
    gap_of_row: dict[int, float] = {}
    n_measured = 0
    progress = tqdm(batches, desc="Measuring anchor gaps", disable=not trainer.is_world_process_zero())
    for group in in_groups(progress, trainer.options.anchor_batch_multiplier):
        for measured in anchor(group):
            both = trainer.accelerator.gather((measured[CARRIED][ROW], anchor_gap(trainer, measured).float()))
            for row, gap in zip(*(each.tolist() for each in both), strict=True):
                gap_of_row.setdefault(row, gap)
                n_measured += 1
    if (n_twice := n_measured - len(gap_of_row)) and trainer.is_world_process_zero():
        logger.warning(
            "%d pairs of the first mini-batches fill up the last ones of %d processes, and have a part in their "
            "direction: the gaps there differ from those that one process measures",
            *(n_twice, trainer.accelerator.num_processes),
        )
    gaps = np.array([gap_of_row[row] for row in trainer.train_dataset[ROW]], np.float32)
    if n_broken := int((~np.isfinite(gaps)).sum()):
        raise ValueError(
            f"the anchor gaps of {n_broken} of {len(gaps)} pairs are NaN or infinite: lower anchor_radius, or look at "
            "the model's weights"
        )
    if len(gaps) > 1 and (gaps == gaps[0]).all():
        logger.warning(
            "the anchor gaps of all %d pairs are %g: raise anchor_radius, or look at what trains", len(gaps), gaps[0]
        )
    return gaps


def subsets(anchor_gaps: np.ndarray, fraction: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Row numbers of the stable (lowest Γ), the unstable (highest Γ) and a random subset, each in the set's order.

    With the same seed, a larger fraction takes the rows of a smaller one and more.

    Args:
        anchor_gaps: [n] Γ.
        fraction: share of the rows in each subset, in (0, 1].
        seed: of the random subset.

    Raises:
        ValueError: a fraction outside (0, 1], or one that leaves no row.

    Source: GAPO (arXiv 2602.04909), appendix E.
    """
    n = round(fraction * len(anchor_gaps))
    if not 0 < fraction <= 1 or n == 0:
        raise ValueError(f"fraction must be in (0, 1] and leave a row of {len(anchor_gaps)}, not {fraction}")
    order = np.argsort(anchor_gaps, kind="stable")
    chosen = {
        "stable": order[:n],
        "unstable": order[-n:],
        "random": np.random.default_rng([seed, 1]).permutation(len(anchor_gaps))[:n],  # label noise draws from [seed]
    }
    return {name: np.sort(rows) for name, rows in chosen.items()}
