"""Run by `test_distributed.py` in several ways: the same four pairs a step, the same numbers.

one         a batch of four
accumulate  two mini-batches of two
ddp         under torchrun, two ranks of two
stream      the same, from a data set that is read row by row
sharded     the same, each with a half of every parameter (FSDP2)
zero2       the same by DeepSpeed, each with a half of the gradients and of the optimizer's state
zero3       and of the parameters
groups      GAPO's groups of mini-batches, in one process, under DDP or sharded

And what they do with batches that are not as large on both (uneven), and with a model that gives NaN (broken).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed_on_cpu
import torch
from accelerate.utils import gather_object
from conftest import byte_tokenizer, load, preference_rows, quiet
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_margins.distributed import leave_process_group
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

GRADIENTS = ("geometric-anchor", "gradient-norm", "simpo-sam")  # methods that look at them
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
    "geometric-anchor, no cached graphs": ("cpo", "geometric-anchor", {**ANCHOR, "anchor_keep_graphs": 0}),
    "geometric-anchor, momentum": ("cpo", "geometric-anchor", {**ANCHOR, "anchor_direction": "momentum"}),
    "geometric-anchor, log-ratio": (
        "dpo",
        "geometric-anchor",
        {"anchor_radius": 0.05, "reward": "log-ratio"},
    ),
    "geometric-anchor, lm-head": ("cpo", "geometric-anchor", {**ANCHOR, "anchor_scope": ["lm-head"]}),
    "geometric-anchor, float32": ("cpo", "geometric-anchor", {"anchor_radius": 0.1, "anchor_estimator": "float32"}),
    "geometric-anchor, per pair": ("cpo", "geometric-anchor", {"anchor_radius": 0.1, "anchor_estimator": "per-pair"}),
    "geometric-anchor, adapters": ("cpo", "geometric-anchor", {"anchor_radius": 0.1, "anchor_estimator": "per-pair"}),
    "gradient-norm": ("cpo", "gradient-norm", {}),
    "simpo-sam": ("cpo", "simpo-sam", {"sam_radius": 0.5}),
}


def options_of(case: str, way: str) -> dict[str, Any]:
    options = CASES[case][2]
    if case == DIAGNOSED:
        options = {**options, "anchor_diagnostics": 1}
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
            deepspeed=deepspeed_config(int(way[-1])) if way.startswith("zero") else None,
            **options_of(case, way),
        )
    )
    model = sharded_model(folder) if way == "sharded" else load(folder).double()
    # a reference elsewhere, for gaps that differ from the first step on
    extra: dict[str, Any] = {}
    if "log-ratio" in case:
        extra["ref_model"] = load(str(out.parent / "reference")).double()
    if "adapters" in case:
        extra["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    if case == "gappo":  # TRL looks at what each batch has logged
        extra["compute_metrics"] = lambda found: {"asked": float(len(found.predictions) > 0)}
    try:
        trainer = trainer_class(method, base)(
            model,
            args=config,
            train_dataset=rows.to_iterable_dataset() if way == "stream" else rows,
            eval_dataset=rows,
            processing_class=byte_tokenizer(),
            **extra,
        )
        trainer._fused = False  # TRL's fused head computes in float32, whatever the model does
        trainer.train()
    except ValueError as error:
        return {"refused": str(error)}
    metrics = trainer.evaluate()
    with whole_parameters(trainer.model):
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in weights.items()}
    if trainer.is_world_process_zero():
        save_file(weights, out / case / "weights.safetensors")
    return {"metrics": metrics, "log": trainer.state.log_history}


def sharded_model(folder: str) -> torch.nn.Module:
    sharding = DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=sharding)


def deepspeed_config(stage: int) -> dict[str, Any]:
    import deepspeed

    deepspeed_on_cpu.without_compiler()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo")
    left_to_the_trainer = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    left = dict.fromkeys((*left_to_the_trainer, "gradient_clipping"), "auto")
    return {"zero_optimization": {"stage": stage}, **left}


def whole_parameters(model: torch.nn.Module) -> AbstractContextManager:
    parameters = list(model.parameters())
    if not hasattr(parameters[0], "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


DIAGNOSED = "geometric-anchor"
# GAPO's windows of three mini-batches of two pairs, over all ranks: in groups of k, with forward passes kept or not
GROUPS: dict[str, dict[str, Any]] = {
    "k=1": {"anchor_batch_multiplier": 1},
    "k=1, nothing kept": {"anchor_batch_multiplier": 1, "anchor_keep_graphs": 0},
    "k=2, kept": {"anchor_batch_multiplier": 2, "anchor_keep_graphs": 3},
    "k=3, kept": {"anchor_batch_multiplier": 3, "anchor_keep_graphs": 3},
    "pair": {"anchor_direction": "pair"},
    "pair, cached": {"anchor_direction": "pair", "anchor_estimator": "per-pair"},
}


def run_groups(case: str, folder: str, out: Path, sharded: bool) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = quiet(
        output_dir=str(out / case),
        per_device_train_batch_size=2 // world,
        gradient_accumulation_steps=3,
        learning_rate=1e-2,
        warmup_steps=0,
        max_steps=2,
        ddp_backend="gloo" if world > 1 else None,
        train_sampling_strategy="sequential",
        anchor_radius=0.1,
        **GROUPS[case],
    )
    try:
        trainer = trainer_class("geometric-anchor")(
            sharded_model(folder) if sharded else load(folder).double(),
            args=config_class("geometric-anchor")(**settings),
            train_dataset=preference_rows(12, seed=4),
            processing_class=byte_tokenizer(),
        )
        trainer._fused = False
        trainer.train()
    except ValueError as error:
        return {"refused": str(error)}
    return {"log": trainer.state.log_history}


STREAMED = ("gappo", "amapo, log-ratio")
# methods that compute with log-probabilities alone see nothing of DeepSpeed
DEEPSPEED = (
    "gappo, normalised",
    "amapo, log-ratio",
    *(case for case, (_, method, _) in CASES.items() if method in GRADIENTS),
)
UNEVEN = ("gappo, normalised", "gamma-po", "amapo", "gradient-norm")  # the last on sharded parameters
BROKEN = "#"


def run_uneven(case: str, folder: str, out: Path, n: int = 7, split: bool = False) -> dict[str, Any]:
    """Seven pairs: in the second step one rank has two and the other one. Nine: one rank has no batch for it.

    `split`: the ranks share one batch, instead of having one each.
    """
    _, method, options = CASES[case]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = quiet(
        output_dir=str(out / case),
        per_device_train_batch_size=4 if split else 4 // world,
        warmup_steps=0,
        max_steps=2,
        ddp_backend="gloo" if world > 1 else None,
        accelerator_config={"even_batches": False, "split_batches": split},
        train_sampling_strategy="sequential",
        **options,
    )
    trainer = trainer_class(method)(
        sharded_model(folder) if world > 1 and case == UNEVEN[-1] else load(folder).double(),
        args=config_class(method)(**settings),
        train_dataset=preference_rows(n, seed=4),
        processing_class=byte_tokenizer(),
    )
    return outcome(trainer)


class BreaksOnTheSecondRank(torch.optim.SGD):
    """Its second step leaves a NaN in a weight there, as memory that fails does."""

    steps = 0

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.steps += 1
        if self.steps == 2 and os.environ.get("RANK") == "1":
            self.param_groups[0]["params"][3].data[0, 0] = torch.nan


def run_broken(folder: str, out: Path, optimizer: Any = None, **options: Any) -> dict[str, Any]:
    """Sixteen pairs; the model cannot read the sixth, which is the second rank's in the second step. With an optimizer
    it can.
    """
    rows = preference_rows(16, seed=4).to_list()
    rows[6]["chosen"] += "" if optimizer else BROKEN
    model, tokenizer = load(folder), byte_tokenizer()
    broken = tokenizer.convert_tokens_to_ids(BROKEN)
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == broken)[..., None], torch.nan)
    )
    settings = quiet(
        output_dir=str(out), per_device_train_batch_size=2, ddp_backend="gloo", warmup_steps=0, max_steps=4, **options
    )
    trainer = trainer_class("gamma-po")(
        model,
        args=config_class("gamma-po")(**settings, train_sampling_strategy="sequential"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **({"optimizers": (optimizer(model.parameters(), lr=1e-3), None)} if optimizer else {}),
    )
    found = outcome(trainer)
    others = torch.cat([p.detach().flatten() for n, p in trainer.model.named_parameters() if "embed_tokens" not in n])
    return found | {"finite": bool(others.isfinite().all()), "norm": others.norm().item()}


def outcome(trainer: Any) -> dict[str, Any]:
    try:
        trainer.train()
    except (ValueError, FloatingPointError) as error:
        return {"error": str(error), "rank": trainer.accelerator.process_index}
    return {"log": trainer.state.log_history}


def on_all_ranks(found: dict[str, Any]) -> list[dict[str, Any]]:
    return gather_object([found])


def main(folder: str, out: str, *ways: str) -> None:
    """Each way's results in a file of its name, which the first rank writes."""
    for way in ways:
        there = Path(out, way)
        if way == "uneven":
            results = {case: on_all_ranks(run_uneven(case, folder, there)) for case in UNEVEN}
            results["split"] = on_all_ranks(run_uneven("gappo", folder, there / "split", n=8, split=True))
            results["nine"] = on_all_ranks(run_uneven("gappo", folder, there, n=9))
        elif way == "broken":
            skipped = run_broken(folder, there, nonfinite_steps="skip")
            results = {"stop": on_all_ranks(run_broken(folder, there)), "skip": on_all_ranks(skipped)}
            save = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "lr_scheduler_type": "constant"}
            results["weights"] = on_all_ranks(run_broken(folder, there / "weights", BreaksOnTheSecondRank, **save))
        elif way.startswith("groups"):
            results = {case: run_groups(case, folder, there, "sharded" in way) for case in GROUPS}
        else:
            cases = {"stream": STREAMED, "zero2": DEEPSPEED, "zero3": DEEPSPEED}.get(way, CASES)
            results = {case: run(case, way, folder, there) for case in cases}
        if os.environ.get("RANK", "0") == "0":
            Path(out, f"{way}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    gc.freeze()  # as conftest.py does for the tests
    main(*sys.argv[1:])
    leave_process_group()
