"""Ranks and shards: the batch of all ranks, and parameters that FSDP2 cuts up over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of a tensor that others have the rest of."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, on every rank."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def check_movable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Whether gradients and values of these parameters can be reached from outside the training step.

    Raises:
        ValueError: FSDP1, whose parameters are lost in a flat one; DeepSpeed ZeRO-3, which shows none of them.
    """
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError("FSDP1 keeps no parameters by name, which GAPO and SAM look at: set fsdp_version to 2")
    if name := next((name for name, parameter in parameters.items() if hasattr(parameter, "ds_id")), None):
        raise ValueError(
            f"{name!r} is partitioned by DeepSpeed ZeRO-3, whose parameters cannot be looked at from outside: take "
            "ZeRO-2, FSDP2 or DDP"
        )


def check_whole(parameters: Mapping[str, nn.Parameter], what: str) -> None:
    """Whether each rank sees all of these parameters' gradients, as looking at its own pairs takes.

    Raises:
        ValueError: they are sharded.
    """
    if name := next((name for name, parameter in parameters.items() if is_sharded(parameter)), None):
        raise ValueError(
            f"{what} takes every pair's own gradient, and FSDP2 gives each rank a part of {name!r}'s, summed over all "
            "ranks: take DDP, or adapters beside a model that transformers has sharded (distributed_config)"
        )


def forget_gathered(model: nn.Module) -> None:
    """Has FSDP2 gather the parameters anew for the next pass. Some it keeps after a pass without gradient: then it
    would not see that their shards have moved, and the model's parameters are the gathered ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fsdp_dtype(model: nn.Module) -> torch.dtype | None:
    """The type to which FSDP2 casts parameters for a pass, where it does."""
    states = (module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))
    return next((state._mp_policy.param_dtype for state in states), None)


def of_all_ranks(accelerator: Accelerator, n_pairs: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """How to see the values [B] of all ranks, and where this rank's begin among them.

    With `even_batches`, which is accelerate's default, every rank has as many pairs. Without it, their numbers are
    asked for: one value from each rank to the host, a batch.
    """
    if accelerator.num_processes == 1 or accelerator.even_batches:
        return accelerator.gather, accelerator.process_index * n_pairs
    sizes = accelerator.gather(torch.tensor([n_pairs], device=accelerator.device)).tolist()
    most = max(sizes)

    def gather(values: Tensor) -> Tensor:
        parts = accelerator.gather(F.pad(values, (0, most - n_pairs))).split(most)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather, sum(sizes[: accelerator.process_index])


def check_lockstep(accelerator: Accelerator, dataloader: Any, split: str) -> None:
    """Whether all ranks have as many batches: one that has none would leave the others waiting for it.

    Raises:
        ValueError: they do not.
    """
    if accelerator.num_processes == 1 or accelerator.even_batches or not hasattr(dataloader.dataset, "__len__"):
        return
    numbers = accelerator.gather(torch.tensor([len(dataloader)], device=accelerator.device)).tolist()
    if len(set(numbers)) > 1:
        raise ValueError(
            f"the ranks have {numbers} batches of the {split} data set, and would wait for each other: leave "
            "even_batches of accelerator_config on, which repeats a few rows, or drop rows of the last batch"
        )
