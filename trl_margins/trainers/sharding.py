"""Parameters that are cut up over the ranks: what can be done with them from outside the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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
