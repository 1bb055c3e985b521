"""GAPO's anchor gaps on sharded parameters, against plain float32 on one device: real pairs, several processes.

Each call measures one way and adds its gaps to a file; `--table` prints what the file has.

python benchmarks/anchor_sharded.py --way float32 --dataset pairs.jsonl.gz --out gaps.json
torchrun --nproc_per_node 2 benchmarks/anchor_sharded.py --way "fsdp2, bf16 shards" --dataset pairs.jsonl.gz \\
    --out gaps.json
python benchmarks/anchor_sharded.py --table gaps.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

REFERENCE = "float32"


@dataclass(frozen=True)
class Way:
    """How the model is held, and how its gaps are measured."""

    dtype: str = "float32"  # of the weights
    bf16: bool = False  # mixed precision
    fsdp2: bool = False  # by accelerate
    shards: bool = False  # by transformers, as it loads
    zero3: bool = False
    instead: Callable[[], AbstractContextManager[Any]] = nullcontext  # what not to do, to show why


def _moving(change: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Within the block the weights move in another way."""
    from trl_margins.probes import perturbation

    return patch.object(perturbation, "move", partial(change, perturbation.move))


def _from_float32(move: Any, values: Any, along: Any, radius: Any, seed: int, dtype: Any) -> None:
    """Rounds the sum of the float32 value and the step, not that of its bf16 value and the step."""
    import torch

    from trl_margins.probes.perturbation import stochastic_round

    generator = torch.Generator().manual_seed(seed)
    values.copy_(stochastic_round(values + along * radius, dtype, generator))


def _to_nearest(move: Any, values: Any, along: Any, radius: Any, seed: int, dtype: Any) -> None:
    """Leaves the rounding to the gather."""
    values.add_(along.to(values.dtype) * radius)


WAYS = {
    REFERENCE: Way(),
    "bf16 weights": Way("bfloat16"),
    "bf16 autocast": Way(bf16=True),
    "fsdp2, float32": Way(fsdp2=True),
    "fsdp2, bf16 mixed precision": Way(bf16=True, fsdp2=True),
    "fsdp2, bf16 shards": Way("bfloat16", fsdp2=True),
    "fsdp2, autocast alone": Way(bf16=True, shards=True),
    "fsdp2, bf16 shards, autocast": Way("bfloat16", bf16=True, shards=True),
    "fsdp2, bf16 mixed precision, rounded from float32": Way(
        bf16=True, fsdp2=True, instead=partial(_moving, _from_float32)
    ),
    "fsdp2, bf16 mixed precision, rounded to nearest": Way(
        bf16=True, fsdp2=True, instead=partial(_moving, _to_nearest)
    ),
    "zero3, float32": Way(zero3=True),
    "zero3, bf16": Way(bf16=True, zero3=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--table", help="a file of gaps, to print")
    parser.add_argument("--out", default="gaps.json", help="the file that the gaps are added to")
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--dataset", help="scored pairs; the demo's without one")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=2, help="pairs per mini-batch")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--radius", type=float, default=0.05)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(Path(args.table).read_text())))
        return
    found = measure(args, WAYS[args.way])
    if os.environ.get("RANK", "0") == "0":
        file = Path(args.out)
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, args.way: found}, indent=1))
        print(table({**known, args.way: found}))


def table(found: dict[str, Any]) -> str:
    import numpy as np
    from scipy.stats import spearmanr

    exact = np.array(found[REFERENCE]["gaps"]) if REFERENCE in found else None
    lines = ["| | mean Γ | of float32 | Spearman | worst pair | s |", "|---|---:|---:|---:|---:|---:|"]
    for way, row in found.items():
        gaps = np.array(row["gaps"])
        against = [""] * 3
        if exact is not None:
            numbers = gaps.mean() / exact.mean(), spearmanr(gaps, exact).statistic, abs(gaps - exact).max()
            against = [f"{number:.3f}" for number in numbers]
        lines.append(f"| {way} | {gaps.mean():.4f} | {' | '.join(against)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace, way: Way) -> dict[str, Any]:
    """Γ of every pair, in order, under the direction of all of them; and the seconds of direction and gaps."""
    from accelerate.utils import gather_object
    from anchor import full_gaps

    from trl_margins.distributed import leave_process_group
    from trl_margins.probes.anchor import GeometricAnchor

    world = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepared_trainer(args, way, folder, world)
        data, size = trainer.train_dataset, args.batch_size
        starts = range(trainer.accelerator.process_index * size, args.pairs, world * size)
        collated = [trainer.data_collator([data[i] for i in range(s, s + size)]) for s in starts]
        anchor = GeometricAnchor(trainer, trainer.options)
        batches = anchor.prepared(collated)
        anchor._check_sharded(anchor.parameters)
        started = time.perf_counter()
        direction, _ = anchor._direction(batches)
        with way.instead():
            measured = anchor.measure(batches, direction)
        seconds = time.perf_counter() - started
        gaps = [gap.tolist() for gap in full_gaps(trainer, batches, measured)]
    every = gather_object([gaps]) if world > 1 else [gaps]
    norm = direction.norm.item()
    if world > 1:
        leave_process_group()
    in_order = [gap for turn in zip(*every, strict=True) for part in turn for gap in part]
    return {"gaps": in_order, "norm": norm, "seconds": seconds, "processes": world, "settings": vars(args)}


def prepared_trainer(args: argparse.Namespace, way: Way, folder: str, world: int) -> Any:
    """A GAPO trainer whose model is held as it is in training."""
    import torch

    from trl_margins import GeometricAnchorPOConfig, GeometricAnchorPOTrainer
    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.demo import make_preference_set
    from trl_margins.data.loading import load_splits, pick_split

    cpu = not torch.accelerator.is_available()
    if way.fsdp2 and cpu:
        _take_cpus_for_accelerators()
    split = load_splits(args.dataset) if args.dataset else None
    rows = make_preference_set(args.pairs) if split is None else pick_split(split, None, args.dataset)
    n = args.pairs // args.batch_size // world
    more: dict[str, Any] = {}
    if way.fsdp2:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    if way.zero3:
        more["deepspeed"] = _zero3(cpu) | {"bf16": {"enabled": way.bf16}}
    config = GeometricAnchorPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=n,
        anchor_batch_multiplier=n,
        anchor_radius=args.radius,
        max_length=args.max_length,
        bf16=way.bf16,
        use_cpu=cpu and not way.fsdp2,
        gradient_checkpointing=False,
        ddp_backend="gloo" if cpu and world > 1 else None,
        save_strategy="no",
        report_to="none",
        **more,
    )
    loading: dict[str, Any] = {"dtype": way.dtype, "device_map": None}
    if way.shards:
        from transformers.distributed import DistributedConfig

        loading["distributed_config"] = DistributedConfig(fsdp_size=world)
    trainer = GeometricAnchorPOTrainer(
        load_model(args.model, **loading),
        config,
        train_dataset=rows.shuffle(seed=0).select(range(args.pairs)),
        processing_class=load_tokenizer(args.model),
    )
    if way.fsdp2 or way.zero3:  # which prepare a model together with its optimizer
        trainer.create_optimizer()
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model = trainer.model_wrapped if way.fsdp2 else trainer.model
    else:
        trainer.model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=world > 1)
    return trainer


def _zero3(cpu: bool) -> dict[str, Any]:
    import deepspeed

    if cpu:  # it would first compile an all-reduce of its own
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
    left = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": {"stage": 3}, **dict.fromkeys(left, "auto")}


def _take_cpus_for_accelerators() -> None:
    """accelerate shards on no others."""
    import torch
    import transformers.training_args
    from accelerate.state import DistributedType, PartialState

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))


if __name__ == "__main__":
    main()
