"""Faults of a disk and of a run."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState

from trl_margins.trainers.whole import forget_files


def drop_digests(run: Path) -> None:
    """Makes the checkpoints of a run those of a version that noted none of its files."""
    for file in run.glob("checkpoint-*/trainer_state.json"):
        state = TrainerState.load_from_json(str(file))
        forget_files(state)
        state.save_to_json(str(file))
