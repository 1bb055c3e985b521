"""What an anchor gap is made of, pair by pair, in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback

from ..pairs import CARRIED
from ..terms.anchor import ANCHOR_GAP, ANCHOR_SCORE_GAP
from .direction import Direction, total_norm
from .pair_gradients import pair_gradients
from .probe import ProbedTrainer

FILE = "anchor_diagnostics.jsonl"


class AnchorDiagnostics(TrainerCallback):
    r"""Writes the parts of every pair's anchor gap: :math:`\Gamma_i = \rho\,\|\nabla\Delta_i\|\,\cos\phi_i + rest`.

    One line of JSON a pair: `step`, `anchor_gap`, `first_order` (gradient norm × alignment × ρ), `curvature` (what is
    left), `gradient_norm`, `alignment` (cos φ with the anchor's direction), and the columns that the batch carries.
    It takes each pair's gradient: as much again as a training step.

    Args:
        every: optimizer steps from one look to the next.
        file: where to; `anchor_diagnostics.jsonl` in the output folder, if not given. It is added to.

    Source: GAPO (arXiv 2602.04909), proposition 5.2.
    """

    def __init__(self, every: int = 1, file: str | Path | None = None) -> None:
        self.every, self.file = every, file

    def is_due(self, step: int) -> bool:
        """Whether the window before this step's update is looked at."""
        return step % self.every == 0

    def record(
        self,
        trainer: ProbedTrainer,
        batches: Sequence[Mapping[str, Any]],
        direction: Direction,
        parameters: Mapping[str, nn.Parameter],
        radius: float,
    ) -> None:
        """Looks at a window's pairs, whose columns hold their anchor gaps, on all ranks."""
        rows = [row for batch in batches for row in self._rows(trainer, batch, direction, parameters, radius)]
        rows = gather_object(rows)
        if not trainer.is_world_process_zero():
            return
        file = Path(self.file or Path(trainer.args.output_dir, FILE))
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.writelines(json.dumps({"step": trainer.state.global_step, **row}) + "\n" for row in rows)

    def _rows(
        self,
        trainer: ProbedTrainer,
        batch: Mapping[str, Any],
        direction: Direction,
        parameters: Mapping[str, nn.Parameter],
        radius: float,
    ) -> list[dict[str, float]]:
        columns, parts = batch[CARRIED], []
        for pair in pair_gradients(trainer, batch, parameters, type(self).__name__):
            slope = sum((pair.gradient[name] * along).sum().float() for name, along in direction.vectors.items())
            norm = total_norm(pair.gradient.values())
            parts.append(torch.stack([pair.gap[0].float(), norm, slope * direction.per_unit]))
        gap, norm, slope = torch.stack(parts, dim=1)
        anchor_gap = columns[ANCHOR_GAP] if ANCHOR_GAP in columns else gap - columns[ANCHOR_SCORE_GAP]
        values = {name: value for name, value in columns.items() if name not in (ANCHOR_GAP, ANCHOR_SCORE_GAP)} | {
            "anchor_gap": anchor_gap,
            "first_order": radius * slope,
            "curvature": anchor_gap - radius * slope,
            "gradient_norm": norm,
            "alignment": torch.where(norm > 0, slope / norm, 0.0),
        }
        lists = {name: value.tolist() for name, value in values.items()}
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
