"""What the kill test runs: trains, with a checkpoint at every step, and goes on from the last whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import byte_tokenizer, load, preference_rows, quiet
from transformers import TrainerCallback

from trl_margins import AMaPOConfig, AMaPOTrainer
from trl_margins.trainers.folder import last_whole_checkpoint


class Progress(TrainerCallback):
    """A line for every start and every step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def _note(self, **values: Any) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps(values) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(**{"from": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(step=state.global_step)


def train(folder: str, out: Path, rows: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    trainer = AMaPOTrainer(
        load(folder),
        args=AMaPOConfig(
            **quiet(
                output_dir=str(out),
                per_device_train_batch_size=2,
                num_train_epochs=2,
                learning_rate=1e-2,
                save_strategy="steps",
                save_steps=1,
                save_total_limit=2,
            )
        ),
        train_dataset=preference_rows(rows, seed=6),
        processing_class=byte_tokenizer(),
        callbacks=[Progress(out / "steps.jsonl")],
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(out))
    trainer.save_model(str(out))
