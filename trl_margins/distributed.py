"""Values over all ranks, and parameters that FSDP2 shards over them."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from .checks import launched_processes

logger = logging.getLogger(__name__)


def check_processes(joined: int) -> None:
    """Checks that processes which were launched together know of each other.

    Args:
        joined: the number of processes that accelerate has joined.

    Raises:
        ValueError: each would do the whole work alone, and write the same files.
    """
    launched, name = launched_processes()
    if joined == 1 < launched:
        raise ValueError(
            f"a launcher started {launched} processes ({name}={launched}), but nothing joins them, and each would do "
            "the whole work alone: on CPUs add --use_cpu true (from Python: use_cpu=True in the config). For one "
            f"process, start it without a launcher, and without {name} in its environment"
        )
    if joined > 1:
        return
    if {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():  # set for several processes only
        logger.warning(
            "accelerate launch started one process, whatever --num_processes says, as it does on CPUs: torchrun "
            "--nproc_per_node starts several"
        )
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        logger.warning(
            "Slurm started %s tasks, each of which is a run of its own: give each its own output_dir, or have one "
            "task per node start torchrun or accelerate launch",
            os.environ["SLURM_STEP_NUM_TASKS"],
        )


def warn_if_unsharded(accelerator: Accelerator) -> None:
    """Says where FSDP was asked for and the processes hold the whole model: accelerate shards on accelerators only."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.num_processes > 1 and accelerator.distributed_type is not DistributedType.FSDP:
        logger.warning(
            "the launcher asks for FSDP, which accelerate has on accelerators only: on this %s every process holds "
            "the whole model, as with DDP",
            accelerator.device.type,
        )


def wait_before_leaving() -> None:
    """Waits for the other processes on CPUs: gloo aborts some that leave the process group before others."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        with suppress(RuntimeError):  # the main process may be long at an upload
            dist.barrier()


def leave_process_group() -> None:
    """Ends the threads of the process group: left running, they sometimes abort a process at its exit."""
    if dist.is_available() and dist.is_initialized():
        wait_before_leaving()
        gc.collect()  # a wrapped model that only a cycle still holds keeps the group, and its threads, alive
        dist.destroy_process_group()


def agreed(accelerator: Accelerator | PartialState, check: Callable[[], Any]) -> Any:
    """What a check of files gives on the main process, on all of them; its error, too."""
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = check()
        except Exception as caught:  # whatever it is, the others wait
            error = caught
    if accelerator.num_processes > 1:
        result, sent = broadcast_object_list([result, error and _sent(error)])
        error = error or sent
    if error is not None:
        raise error
    return result


def _sent(error: Exception) -> Exception:
    """The error as another process gets it: others than these may not survive the way."""
    kind = type(error)
    return kind(str(error)) if kind in (ValueError, OSError) else RuntimeError(f"{kind.__name__}: {error}")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only its part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_reachable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks that gradients and values of these parameters can be reached outside the training step.

    Raises:
        ValueError: FSDP1, which flattens the parameters; DeepSpeed ZeRO-3, which hides them.
    """
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError("FSDP1 keeps no parameters by name, which GAPO and SAM need: set fsdp_version to 2")
    if name := next((name for name, parameter in parameters.items() if hasattr(parameter, "ds_id")), None):
        raise ValueError(
            f"{name!r} is partitioned by DeepSpeed ZeRO-3, which hides parameters outside its own forward pass: use "
            "ZeRO-2, FSDP2 or DDP"
        )


def check_unsharded(parameters: Mapping[str, nn.Parameter], what: str, will_shard: bool = False) -> None:
    """Checks that each rank has the whole gradient of these parameters, as gradients of its own pairs require.

    Raises:
        ValueError: they are sharded.
    """
    if name := next((name for name, parameter in parameters.items() if will_shard or is_sharded(parameter)), None):
        raise ValueError(
            f"{what} takes every pair's own gradient, and FSDP2 gives each rank a part of {name!r}'s, summed over all "
            "ranks: use DDP, or adapters on a model that transformers has sharded (distributed_config)"
        )


def reshard(model: nn.Module) -> None:
    """Makes FSDP2 gather the parameters again for the next forward pass.

    After a forward pass without gradient it keeps some of them gathered. Until they are sharded again it would not see
    that the shards have changed, and the model's parameters would be the gathered ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fsdp_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype to which FSDP2 casts parameters for a forward pass, if it does."""
    states = (module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))
    return next((state._mp_policy.param_dtype for state in states), None)


def reduce_tensors(
    accelerator: Accelerator, tensors: dict[str, Tensor], how: Literal["sum", "mean"]
) -> dict[str, Tensor]:
    """The sum or the mean of every tensor over all ranks. The dict is emptied of the originals one by one.

    accelerate reduces copies: a single process needs none, and several hold one tensor's copy at a time.
    """
    if accelerator.num_processes > 1:
        for name in list(tensors):
            tensors[name] = accelerator.reduce(tensors[name], how)
    return tensors


def gather_over_ranks(accelerator: Accelerator, n_pairs: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function that gathers values [B] over all ranks, and the position of this rank's first value in its result.

    With `even_batches`, accelerate's default, every rank has the same number of pairs. Without it the numbers are
    gathered first: one value per rank and batch is read on the host.
    """
    if accelerator.num_processes == 1 or accelerator.even_batches:
        return accelerator.gather, accelerator.process_index * n_pairs
    sizes = accelerator.gather(torch.tensor([n_pairs], device=accelerator.device)).tolist()
    most = max(sizes)

    def gather(values: Tensor) -> Tensor:
        parts = accelerator.gather(F.pad(values, (0, most - n_pairs))).split(most)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather, sum(sizes[: accelerator.process_index])


def check_lockstep(accelerator: Accelerator, dataloader: DataLoader, split: str) -> None:
    """Checks that all ranks have the same number of batches: the others would wait forever for a rank without one.

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
