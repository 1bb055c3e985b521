"""Run by `test_distributed.py`, on one rank or under torchrun on two: the same pairs, the same numbers."""

from __future__ import annotations

import json
import os
import sys

from conftest import load, preference_rows, quiet

from trl_margins import GapPOConfig, GapPOTrainer


def main(folder: str, out: str, batch_size: int) -> None:
    from conftest import byte_tokenizer

    rows = preference_rows(9, seed=4)
    config = GapPOConfig(
        **quiet(
            output_dir=f"{out}.run",
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            score_gap_normalize=True,
            learning_rate=1e-2,
            warmup_steps=0,
            lr_scheduler_type="constant",
            max_steps=2,
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
            train_sampling_strategy="sequential",
        )
    )
    trainer = GapPOTrainer(
        load(folder), config, train_dataset=rows, eval_dataset=rows, processing_class=byte_tokenizer()
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        norms = {name: p.double().norm().item() for name, p in trainer.model.named_parameters()}
        with open(out, "w") as file:
            json.dump({"metrics": metrics, "log": trainer.state.log_history, "norms": norms}, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
