"""What every pair's anchor gap is made of, for the file that `anchor_diagnostics` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import full_tensor
from ..objective import Objective
from ..pairs import CARRIED, IS_FLIPPED, ROW, SCORES, upcast
from ..recording.pair_log import PairLog
from ..terms.anchor import ANCHOR_GAP, ANCHOR_SCORE_GAP
from .direction import Direction, total_norm
from .pair_gradients import pair_gradients
from .probe import Batch, ProbedTrainer

ANCHORS_FILE = "anchor_diagnostics.csv"
_CARRIED = (ROW, IS_FLIPPED, *SCORES)  # where the batch has them


def measures_anchor(objective: Objective) -> bool:
    """Whether a term of the objective asks for anchor gaps."""
    return any({ANCHOR_GAP, ANCHOR_SCORE_GAP} & set(term.probes) for term in objective.terms)


def check_diagnostics(objective: Objective, options: Any) -> None:
    """
    Args:
        options: the config.

    Raises:
        ValueError: `anchor_diagnostics` where no anchor is measured, or where nothing is written.
    """
    if not options.anchor_diagnostics:
        return
    if not measures_anchor(objective):
        terms = ", ".join(term.name for term in objective.terms) or "no term"
        raise ValueError(
            f"anchor_diagnostics={options.anchor_diagnostics} takes anchor gaps apart, and none is measured "
            f"({terms}): leave it out, or set margin to 'geometric-anchor'"
        )
    if not options.log_pairs:
        raise ValueError(
            f"anchor_diagnostics={options.anchor_diagnostics} writes a line for each pair, and log_pairs is off: turn "
            "log_pairs on, or leave anchor_diagnostics out"
        )


def anchors_log(trainer: ProbedTrainer) -> PairLog:
    """The file beside the pair log."""
    return PairLog(Path(trainer.args.output_dir or ".", ANCHORS_FILE))


@torch.no_grad()
def anchor_gap(trainer: ProbedTrainer, batch: Batch) -> Tensor:
    """[B] Γ of a mini-batch that an anchor was measured on."""
    columns = batch[CARRIED]
    if ANCHOR_GAP in columns:
        return upcast(columns[ANCHOR_GAP])
    return upcast(trainer.score_gap(trainer.forward_pairs(batch)) - columns[ANCHOR_SCORE_GAP])


def gap_parts(
    trainer: ProbedTrainer,
    batch: Batch,
    direction: Direction | None,
    parameters: Mapping[str, nn.Parameter],
    radius: float,
) -> dict[str, Tensor]:
    r"""[B] of each: :math:`\Gamma_i = \rho\,\|\nabla\Delta_i\|\,\cos\phi_i + curvature`, and what the batch carries.

    It takes each pair's own gradient, which costs about as much as a training step.

    Args:
        batch: a mini-batch that an anchor was measured on.
        direction: of its group; None where each pair has its own, whose cos φ is 1.

    Source: GAPO (arXiv 2602.04909), proposition 5.2.
    """
    parts = []
    for pair in pair_gradients(trainer, batch, parameters):
        norm = total_norm(pair.gradient.values())
        slope = norm if direction is None else _along(pair.gradient, direction)
        if pair.own:
            parts.append(torch.stack([norm, slope]))
    norm, slope = torch.stack(parts, dim=1)
    gap = anchor_gap(trainer, batch)
    columns = batch[CARRIED]
    return {name: columns[name] for name in _CARRIED if name in columns} | {
        "anchor_gap": gap,
        "gradient_norm": norm,
        "alignment": torch.where(norm > 0, slope / norm, 0.0),
        "first_order": radius * slope,
        "curvature": gap - radius * slope,
    }


def _along(gradient: Mapping[str, Tensor], direction: Direction) -> Tensor:
    """[] the derivative along the direction, which is made a unit vector."""
    products = [
        full_tensor((upcast(gradient[name]) * upcast(along)).sum()) for name, along in direction.vectors.items()
    ]
    return torch.stack(products).sum() * direction.per_unit
