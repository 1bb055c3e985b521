"""Run by `test_distributed.py` in four ways: the same four pairs a step, the same numbers.

one         a batch of four
accumulate  two mini-batches of two
ddp         under torchrun, two ranks of two
sharded     the same, each with a half of every parameter (FSDP2)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import byte_tokenizer, load, preference_rows, quiet
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

ANCHOR = {"anchor_radius": 0.5}
# case → base, method, and options that make it show
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gappo": ("cpo", "gappo", {}),
    "gappo, normalised": ("cpo", "gappo", {"score_gap_normalize": True}),
    "gap-aware": ("cpo", "gap-aware", {}),
    "gamma-po": ("cpo", "gamma-po", {"gamma_po_tau": 1.0, "gamma_po_estimation_size": 6}),
    "amapo": ("cpo", "amapo", {"amapo_estimation_size": 6}),
    "amapo, log-ratio": ("dpo", "amapo", {"amapo_estimation_size": 6, "reward": "log-ratio"}),
    "geometric-anchor": ("cpo", "geometric-anchor", ANCHOR),
    "geometric-anchor, no graph kept": ("cpo", "geometric-anchor", {**ANCHOR, "anchor_keep_graphs": 0}),
    "geometric-anchor, momentum": ("cpo", "geometric-anchor", {**ANCHOR, "anchor_direction": "momentum"}),
    "geometric-anchor, log-ratio": (
        "dpo",
        "geometric-anchor",
        {"anchor_radius": 0.05, "reward": "log-ratio"},
    ),
    "geometric-anchor, lm-head": ("cpo", "geometric-anchor", {**ANCHOR, "anchor_scope": ["lm-head"]}),
    "geometric-anchor, directional": (
        "cpo",
        "geometric-anchor",
        {"anchor_radius": 0.1, "anchor_estimator": "directional"},
    ),
    "geometric-anchor, per pair": ("cpo", "geometric-anchor", {"anchor_radius": 0.1, "anchor_estimator": "per-pair"}),
    "gradient-norm": ("cpo", "gradient-norm", {}),
    "simpo-sam": ("cpo", "simpo-sam", {"sam_radius": 0.5}),
}


def options_of(case: str, way: str) -> dict[str, Any]:
    options = CASES[case][2]
    if "anchor_radius" in options:  # a window is all that the direction is made of
        options = {**options, "anchor_batch_multiplier": 2 if way == "accumulate" else 1}
    return options


def run(case: str, way: str, folder: str, out: Path) -> dict[str, Any]:
    base, method, _ = CASES[case]
    rows = preference_rows(9, seed=4)
    size = 4 if way == "one" else 2
    config = config_class(method, base)(
        **quiet(
            output_dir=str(out / case),
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            gradient_accumulation_steps=2 if way == "accumulate" else 1,
            learning_rate=1e-2,
            warmup_steps=0,
            lr_scheduler_type="constant",
            max_steps=2,
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
            train_sampling_strategy="sequential",
            **options_of(case, way),
        )
    )
    if way == "sharded":
        sharding = DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=sharding)
    else:
        model = load(folder).double()
    # a reference elsewhere, for gaps that differ from the first step on
    reference = {"ref_model": load(folder, noise=0.02).double()} if options_of(case, way).get("reward") else {}
    trainer = trainer_class(method, base)(
        model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=byte_tokenizer(), **reference
    )
    trainer._fused = False  # TRL's fused head computes in float32, whatever the model does
    try:
        trainer.train()
    except ValueError as error:
        return {"refused": str(error)}
    metrics = trainer.evaluate()
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in weights.items()}
    if trainer.is_world_process_zero():
        save_file(weights, out / case / "weights.safetensors")
    return {"metrics": metrics, "log": trainer.state.log_history}


if __name__ == "__main__":
    folder, out, *ways = sys.argv[1:]
    for way in ways:
        results = {case: run(case, way, folder, Path(out, way)) for case in CASES}
        if os.environ.get("RANK", "0") == "0":
            Path(out, f"{way}.json").write_text(json.dumps(results))
