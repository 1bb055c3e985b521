"""Run by `test_sharded.py` on two ranks: GAPO's anchor on parameters that accelerate's FSDP2 shards, in 16 bits.

Every case is a step at learning rate 0 of a window of eight mini-batches of eight pairs, half of them on each rank.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import fsdp_on_cpu
import torch
from accelerate.utils import gather_object
from conftest import byte_tokenizer, load, preference_rows, quiet
from operators import Operators
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from trl_margins.distributed import full_tensor, leave_process_group, local
from trl_margins.probes import perturbation
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

PAIRS, RADIUS, PART = 64, 0.05, 256
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
# case → options; bf16: fp32 shards, cast for the gather
CASES: dict[str, dict[str, Any]] = {
    "mixed": {"bf16": True},
    "mixed, fused head": {"bf16": True},
    "bf16 shards": {},
    "bf16 shards, checkpointing": {"gradient_checkpointing": True},
}


def make(case: str, folder: str, out: str, **more: Any) -> Any:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = load(folder)
    if case.startswith("bf16 shards"):
        model.bfloat16()
    settings = quiet(
        output_dir=out,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=PAIRS // 8,
        anchor_batch_multiplier=PAIRS // 8,
        anchor_radius=RADIUS,
        train_sampling_strategy="sequential",
        max_steps=1,
        optim="sgd",
        learning_rate=0.0,
        use_cpu=world == 1,
        **{**CASES.get(case, {}), **more},
    )
    trainer = trainer_class("geometric-anchor")(
        model,
        args=config_class("geometric-anchor")(**settings),
        train_dataset=preference_rows(PAIRS, seed=5),
        processing_class=byte_tokenizer(),
    )
    if case.endswith("fused head"):  # which a CPU leaves alone where the logits are few
        trainer._plain_head_will_do = False
    return trainer


class Seen:
    """What the forward passes of a training find, and what becomes of an error in one of them."""

    def __init__(self, trainer: Any, raises: bool = False) -> None:
        self.trainer, self.raises = trainer, raises
        self.before: list[Tensor] = []
        self.passes: list[dict[str, Any]] = []
        layer = trainer.model.get_decoder().layers[1]
        layer.register_forward_pre_hook(self)

    def __call__(self, layer: Any, args: Any) -> None:
        moved = [group.sharded_param for group in self._parameters()]
        now = [local(parameter.data) for parameter in moved]
        if not self.before:
            self.before = [values.clone() for values in now]
        gathered = {str(parameter.dtype) for parameter in layer.parameters()}
        exact = all(torch.equal(values, values.bfloat16().to(values.dtype)) for values in now)
        at_the_anchor = not all(map(torch.equal, self.before, now))
        self.passes.append({"anchor": at_the_anchor, "exact": exact, "gathered": sorted(gathered)})
        if at_the_anchor and self.raises:
            raise InterruptedError

    def _parameters(self) -> list[Any]:
        modules = self.trainer.model.modules()
        states = {id(s): s for m in modules if hasattr(m, "_get_fsdp_state") for s in [m._get_fsdp_state()]}
        return [p for state in states.values() for group in state._fsdp_param_groups for p in group.fsdp_params]


def run(case: str, folder: str, out: Path) -> dict[str, Any]:
    trainer = make(case, folder, str(out / case))
    seen = Seen(trainer)
    trainer.train()
    back, sharded = same_as_at_first(trainer, folder, case), trainer.accelerator.is_fsdp2
    return {"passes": seen.passes, "back": back, "sharded": sharded}


def same_as_at_first(trainer: Any, folder: str, case: str) -> bool:
    first = dict(load(folder).named_parameters())
    return all(
        torch.equal(full_tensor(p.data), first[name].to(p.dtype)) for name, p in trainer.model.named_parameters()
    )


def run_broken(folder: str, out: Path) -> dict[str, Any]:
    """A pass at the anchor that ends in the middle; what the model computes afterwards is what it did before."""
    trainer = make("mixed", folder, str(out / "broken"))
    seen = Seen(trainer, raises=True)
    raised = False
    try:
        trainer.train()
    except InterruptedError:
        raised = True
    seen.raises = False
    ids = torch.arange(12)[None] + 10
    with torch.no_grad():
        after = trainer.model(input_ids=ids).logits
        expected = make("mixed", folder, str(out / "whole"))
        expected.create_optimizer()
        model, _ = expected.accelerator.prepare(expected.model, expected.optimizer)
        before = model(input_ids=ids).logits
    return {"raised": raised, "back": same_as_at_first(trainer, folder, "mixed"), "alike": torch.equal(before, after)}


def run_replicas() -> dict[str, Any]:
    """Two replicas of one shard each draw the same numbers; two shards of one model do not. What is made on the way
    that is not a small part of a tensor.
    """
    found: dict[str, Any] = {}
    perturbation._PART = PART
    for name, shape in {"replicas": (2, 1), "shards": (1, 2)}.items():
        linear = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.constant_(linear.weight, 1.0)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        fully_shard(linear, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        along = {"weight": torch.ones_like(linear.weight)}
        with Operators() as seen, perturbation.perturbed(linear, along, 1e-3, {"weight": torch.bfloat16}):
            pass
        found[f"copies, {name}"] = [made.by for made in seen.made if math.prod(made.shape) > PART]
        with perturbation.perturbed(linear, along, 1e-3, {"weight": torch.bfloat16}):
            found[name] = local(linear.weight.data).flatten()[:256].tolist()
    return found


def main(folder: str, out: str) -> None:
    fsdp_on_cpu.pretend()
    os.environ |= LAUNCHED
    results: dict[str, Any] = {case: run(case, folder, Path(out)) for case in CASES}
    results["broken"] = run_broken(folder, Path(out))
    results["draws"] = run_replicas()
    results = {name: gather_object([found]) for name, found in results.items()}
    if os.environ["RANK"] == "0":
        Path(out, "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_process_group()
