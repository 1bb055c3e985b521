"""Run by `test_distributed.py`, on one rank or under torchrun on two: the same pairs, the same numbers."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from conftest import byte_tokenizer, load, preference_rows, quiet

from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

# case → method, and options that make it show
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gappo": ("gappo", {"score_gap_normalize": True}),
    "gap-aware": ("gap-aware", {}),
    "gamma-po": ("gamma-po", {"gamma_po_tau": 1.0, "gamma_po_estimation_size": 6}),
    "amapo": ("amapo", {"amapo_estimation_size": 6}),
    "geometric-anchor": ("geometric-anchor", {"anchor_radius": 0.5}),
    "geometric-anchor, no graph kept": ("geometric-anchor", {"anchor_radius": 0.5, "anchor_keep_graphs": 0}),
    "geometric-anchor, momentum": ("geometric-anchor", {"anchor_radius": 0.5, "anchor_direction": "momentum"}),
    "geometric-anchor, per pair": ("geometric-anchor", {"anchor_radius": 0.1, "anchor_estimator": "per-pair"}),
    "gradient-norm": ("gradient-norm", {}),
    "simpo-sam": ("simpo-sam", {"sam_radius": 0.5}),
}


def run(case: str, folder: str, out: str, batch_size: int) -> dict[str, Any] | None:
    method, options = CASES[case]
    rows = preference_rows(9, seed=4)
    config = config_class(method)(
        **quiet(
            output_dir=f"{out}.{case}",
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=1e-2,
            warmup_steps=0,
            lr_scheduler_type="constant",
            max_steps=2,
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
            train_sampling_strategy="sequential",
            **options,
        )
    )
    trainer = trainer_class(method)(
        load(folder), config, train_dataset=rows, eval_dataset=rows, processing_class=byte_tokenizer()
    )
    trainer.train()
    metrics = trainer.evaluate()
    norms = {name: p.detach().double().norm().item() for name, p in trainer.model.named_parameters()}
    return {"metrics": metrics, "log": trainer.state.log_history, "norms": norms}


if __name__ == "__main__":
    folder, out, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    results = {case: run(case, folder, out, batch_size) for case in CASES}
    if os.environ.get("RANK", "0") == "0":
        with open(out, "w") as file:
            json.dump(results, file)
