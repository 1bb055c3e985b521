"""Run by `test_zero3.py` on two ranks: GAPO's steps away from the policy under DeepSpeed ZeRO-3, in float32 and bf16,
and what they leave of DeepSpeed's own state.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import deepspeed
import torch
from conftest import byte_tokenizer, load, preference_rows, quiet
from peft import LoraConfig
from safetensors.torch import save_file
from two_ranks import deepspeed_config

from trl_margins.distributed import full_tensor, leave_process_group
from trl_margins.probes.direction import gradient_direction, own_gradients
from trl_margins.probes.perturbation import perturbed
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class
from trl_margins.zero3 import PartitionedSum

RADIUS = 0.05
GROUP, WINDOW = 2, 4  # mini-batches
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
GAPO = {"anchor_radius": RADIUS, "anchor_batch_multiplier": GROUP}
# matrices are gathered for each use, and norms stay gathered between two
KEPT = {"stage3_param_persistence_threshold": 20}


def trained(
    method: str, folder: str, out: Path, bf16: bool = False, look: Any = None, adapter: Any = None, **options: Any
) -> Any:
    """A trainer after three windows; `look` sees each of them before it is trained on."""
    zero3 = deepspeed_config(3)
    zero3["zero_optimization"] |= KEPT
    settings = quiet(
        output_dir=str(out),
        bf16=bf16,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=WINDOW,
        learning_rate=1e-2,
        warmup_steps=0,
        max_steps=3,
        train_sampling_strategy="sequential",
        deepspeed=zero3 | {"bf16": {"enabled": bf16}},
        **options,
    )
    config = config_class(method)(**settings)  # from now on models are loaded in parts
    trainer = trainer_class(method)(
        load(folder),
        args=config,
        train_dataset=preference_rows(24, seed=4),
        processing_class=byte_tokenizer(),
        peft_config=adapter,
    )
    take = trainer.get_batch_samples

    def seen(*args: Any) -> Any:
        batches, number = take(*args)
        if look is not None:
            look(trainer, [trainer.before_measuring(batch) for batch in batches])
        return batches, number

    trainer.get_batch_samples = seen
    trainer.train()
    return trainer


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole of them, on every rank."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def whole(trainer: Any, sharded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parameters = dict(trainer.model.named_parameters())
    flat = {name: full_tensor(tensor)[: parameters[name].ds_numel] for name, tensor in sharded.items()}
    return {name: tensor.view(parameters[name].ds_shape).clone() for name, tensor in flat.items()}


class Looks:
    """Each group of a window has a direction, and a step along it that ends within a forward pass."""

    def __init__(self) -> None:
        self.saved: dict[str, dict[str, torch.Tensor]] = {}
        self.alive = 0  # whole gradients at one time

    def __call__(self, trainer: Any, batches: list[Any]) -> None:
        before, parameters = deepspeeds(trainer), dict(trainer.model.named_parameters())
        for start in range(0, len(batches), GROUP):
            with own_gradients(trainer.accelerator, trainer.model, parameters) as gradients:
                for batch in batches[start : start + GROUP]:
                    gradients.add(trainer.score_gap(trainer.forward_pairs(batch)).sum())
                direction = gradient_direction(trainer.accelerator, gradients.take())
            with suppress(KeyboardInterrupt), torch.no_grad(), ExitStack() as undo:
                step = -RADIUS * direction.per_unit
                undo.enter_context(perturbed(trainer.model, direction.vectors, step))
                moved = trainer.score_gap(trainer.forward_pairs(batches[start]))
                there = weights(trainer.model)
                undo.callback(trainer.model.model.layers[1].register_forward_pre_hook(interrupt).remove)
                trainer.forward_pairs(batches[start])
            if not self.saved:
                mine = trainer.accelerator.gather(moved)
                self.saved = {"gradient": whole(trainer, direction.vectors), "there": there, "gaps": {"gaps": mine}}
        after = deepspeeds(trainer)
        assert before.keys() == after.keys()
        assert [name for name in before if not same(before[name], after[name])] == []


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def deepspeeds(trainer: Any) -> dict[str, Any]:
    """What DeepSpeed knows of the training."""
    engine, optimizer = trainer.deepspeed, trainer.deepspeed.optimizer
    private = {name.removeprefix("_DeepSpeedZeroOptimizer_Stage3"): value for name, value in vars(optimizer).items()}
    of_parameters = {}
    for name, parameter in trainer.model.named_parameters():
        of_parameters |= {f"{name} part": parameter.ds_tensor.clone(), f"{name} grad": parameter.grad}
        of_parameters[f"{name} hooks"] = len(parameter._backward_hooks or {})
    return of_parameters | {
        "micro_steps": engine.micro_steps,
        "global_steps": engine.global_steps,
        "boundary": engine.is_gradient_accumulation_boundary(),
        "micro_step_id": optimizer.micro_step_id,
        "backward": dict(vars(optimizer._backward_hook_state), _grad_acc_post_hooks=None),
        "buckets": [(bucket.elements, len(bucket.params)) for bucket in optimizer.ipg_buckets.values()],
        "partitions": {key: value.clone() for key, value in private["__param_id_to_grad_partition"].items()},
        "averaged": {key: [g.clone() for g in value] for key, value in optimizer.averaged_gradients.items() if value},
        "master": [flat.detach().clone() for flat in optimizer.fp32_partitioned_groups_flat],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def count_whole_gradients(looks: Looks) -> None:
    """How many of them live at the same time, noted whenever one has come."""
    scatter, seen = PartitionedSum._scatter, []

    def noting(self: Any, name: str, gradient: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(gradient))
        looks.alive = max(looks.alive, sum(each() is not None for each in seen))
        return scatter(self, name, gradient)

    PartitionedSum._scatter = noting


def main(folder: str, out: Path) -> None:
    found: dict[str, Any] = {}
    for precision in ("float32", "bfloat16"):
        bf16, there = precision == "bfloat16", out / precision
        # checkpointed layers are gathered once more, within the backward pass
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        options = options if bf16 else {}
        plain = weights(trained("simpo", folder, there / "plain", bf16, **options).model)
        looks = Looks()
        count_whole_gradients(looks)
        trainer = trained("simpo", folder, there / "looked", bf16, looks, **options)
        gapo = trained("geometric-anchor", folder, there / "gapo", bf16, **GAPO, **options)
        found[precision] = {"same": same(plain, weights(trainer.model)), "alive": looks.alive}
        found[precision]["log"] = gapo.state.log_history
        gathered = weights(gapo.model)
        if trainer.is_world_process_zero():
            for name, tensors in {**looks.saved, "weights": gathered}.items():
                save_file(tensors, there / f"{name}.safetensors")
    found["adapters"] = {"log": trained("geometric-anchor", folder, out, adapter=LORA, **GAPO).state.log_history}
    if trainer.is_world_process_zero():
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    gc.freeze()
    main(sys.argv[1], Path(sys.argv[2]))
    leave_process_group()
