"""Writes the parts of every pair's anchor gap to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from ..distributed import full_tensor
from ..pairs import CARRIED, upcast
from ..terms.anchor import ANCHOR_GAP, ANCHOR_SCORE_GAP
from .direction import Direction, total_norm
from .pair_gradients import pair_gradients
from .probe import Batch, ProbedTrainer

FILE = "anchor_diagnostics.jsonl"


class AnchorDiagnostics(TrainerCallback):
    r"""Writes the parts of every pair's anchor gap: :math:`\Gamma_i = \rho\,\|\nabla\Delta_i\|\,\cos\phi_i + rest`.

    One line of JSON per pair: `step`, `anchor_gap`, `first_order` (gradient norm × alignment × ρ), `curvature` (the
    rest), `gradient_norm`, `alignment` (cos φ with the anchor's direction), and the columns that the batch carries.
    It takes each pair's gradient, which costs about as much as a training step.

    Args:
        every: record once per this many optimizer steps.
        file: where to append; by default `anchor_diagnostics.jsonl` in the output folder.

    Source: GAPO (arXiv 2602.04909), proposition 5.2.
    """

    def __init__(self, every: int = 1, file: str | Path | None = None) -> None:
        self.every, self.file = every, file

    def is_due(self, step: int) -> bool:
        """Whether the accumulation window before this step's update is recorded."""
        return step % self.every == 0

    def record(
        self,
        trainer: ProbedTrainer,
        batches: Sequence[Batch],
        direction: Direction | None,
        parameters: Mapping[str, nn.Parameter],
        radius: float,
    ) -> None:
        """Records the pairs of a group of mini-batches, whose columns hold their anchor gaps, over all ranks."""
        rows = [row for batch in batches for row in _rows(trainer, batch, direction, parameters, radius)]
        rows = gather_object(rows)
        if not trainer.is_world_process_zero():
            return
        file = Path(self.file or Path(trainer.args.output_dir or ".", FILE))
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.writelines(json.dumps({"step": trainer.state.global_step, **row}) + "\n" for row in rows)


def _rows(
    trainer: ProbedTrainer,
    batch: Batch,
    direction: Direction | None,
    parameters: Mapping[str, nn.Parameter],
    radius: float,
) -> list[dict[str, float]]:
    parts = []
    for pair in pair_gradients(trainer, batch, parameters):
        norm = total_norm(pair.gradient.values())
        along = norm if direction is None else _along(pair.gradient, direction)
        if pair.own:
            parts.append(torch.stack([upcast(pair.gap[0]), norm, along]))
    gap, norm, derivative = torch.stack(parts, dim=1)
    columns = dict(batch[CARRIED])
    at_the_anchor, anchor_gap = columns.pop(ANCHOR_SCORE_GAP, None), columns.pop(ANCHOR_GAP, None)
    if anchor_gap is None:
        anchor_gap = gap - at_the_anchor
    columns |= {
        "anchor_gap": anchor_gap,
        "first_order": radius * derivative,
        "curvature": anchor_gap - radius * derivative,
        "gradient_norm": norm,
        "alignment": torch.where(norm > 0, derivative / norm, 0.0),
    }
    lists = {name: value.tolist() for name, value in columns.items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _along(gradient: Mapping[str, Tensor], direction: Direction) -> Tensor:
    products = [full_tensor((gradient[name] * vector).sum()) for name, vector in direction.vectors.items()]
    return torch.stack([upcast(product) for product in products]).sum() * direction.per_unit
