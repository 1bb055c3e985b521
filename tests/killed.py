"""What the fault tests run: trains, with a checkpoint at every second step, and goes on from the last whole one."""

from __future__ import annotations

from pathlib import Path

from conftest import byte_tokenizer, load, preference_rows, quiet
from faults import Fault

from trl_margins import AMaPOConfig, AMaPOTrainer
from trl_margins.trainers.folder import last_whole_checkpoint


def train(folder: str, out: Path, number: int = 0, how: int = 0) -> int:
    """With a fault at an operation on the run's files; the number of these operations."""
    with Fault(out, number, how) as fault:
        trainer = AMaPOTrainer(
            load(folder),
            args=AMaPOConfig(
                **quiet(
                    output_dir=str(out),
                    per_device_train_batch_size=2,
                    num_train_epochs=1,
                    learning_rate=1e-2,
                    save_strategy="steps",
                    save_steps=2,
                    save_total_limit=1,
                )
            ),
            train_dataset=preference_rows(10, seed=6),
            processing_class=byte_tokenizer(),
        )
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(out))
        trainer.save_model(str(out))
    return fault.seen
