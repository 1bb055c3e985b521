"""Values over all ranks, and parameters that FSDP2 or ZeRO-3 shards over them."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from . import zero3
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


def keep_outputs_of_fsdp(accelerator: Accelerator) -> None:
    """Keeps FSDP2 from rounding what the model returns: a sum of log-probabilities has no digits left in 16 bits.

    accelerate's mixed precision has FSDP2 cast all outputs, those of TRL's fused head included, which are float32.
    transformers' (`fsdp_mixed_precision`) leaves them alone.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.is_fsdp2 and plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


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


_NAMED = 6  # of the settings that differ


def check_alike(accelerator: Accelerator | PartialState, settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the processes of a run were started with other settings; on all of them.
    """
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([dict(settings)])
    for rank, other in enumerate(others, start=1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            differ = "; ".join(f"{name} {first.get(name)!r} and {other.get(name)!r}" for name in names[:_NAMED])
            differ += f" (and {len(names) - _NAMED} more)" if len(names) > _NAMED else ""
            raise ValueError(
                f"process 0 and process {rank} of one run have other settings: {differ}. Start all with the same "
                "command and the same files"
            )


def _sent(error: Exception) -> Exception:
    """The error as another process gets it: others than these may not survive the way."""
    kind = type(error)
    return kind(str(error)) if kind in (ValueError, OSError) else RuntimeError(f"{kind.__name__}: {error}")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only its part of the tensor."""
    return isinstance(tensor, DTensor) or zero3.is_partitioned(tensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of the tensor."""
    if zero3.is_partitioned(tensor):
        return zero3.part(tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_reachable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks that gradients and values of these parameters can be reached outside the training step.

    Raises:
        ValueError: FSDP1, which flattens the parameters; a DeepSpeed whose ZeRO-3 is not known.
    """
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError("FSDP1 keeps no parameters by name, which GAPO and SAM need: set fsdp_version to 2")
    zero3.check_parameters(model, {name: p for name, p in parameters.items() if zero3.is_partitioned(p)})


def shard_index(tensor: Tensor) -> int:
    """The number of this rank's part of the tensor: ranks that hold the same part (replicas) have the same."""
    if zero3.is_partitioned(tensor):
        return zero3.part_index(tensor)
    if not isinstance(tensor, DTensor):
        return 0
    index, mesh = 0, tensor.device_mesh
    for size, at, placement in zip(mesh.shape, mesh.get_coordinate() or (), tensor.placements, strict=True):
        if not placement.is_replicate():
            index = index * size + at
    return index


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP2 shards, outer ones first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module, after_error: bool = False) -> None:
    """Makes FSDP2 or ZeRO-3 gather the parameters again for the next forward pass.

    After a forward pass without gradient they keep some of them gathered. Until they are sharded again they would not
    see that the shards have changed, and the parameters of FSDP2's model would be the gathered ones.

    Args:
        after_error: the forward pass may have ended before its end, after which only a reset shards all of them.
    """
    zero3.release(model)
    modules = fsdp_modules(model)
    if after_error and modules and modules[0]._get_fsdp_state()._is_root:  # which the first forward pass makes it
        getattr(modules[0], "reset_iter_state", modules[0].reshard)()  # since torch 2.13
    for module in modules:
        module.reshard()


def fsdp_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype to which FSDP2 casts parameters for a forward pass, if it does."""
    return next((module._get_fsdp_state()._mp_policy.param_dtype for module in fsdp_modules(model)), None)


def gathered_parameters(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """The tensors in which a graph of this model ends, by the parameters' names: those that FSDP2 gathers for a
    forward pass, and the parameters themselves elsewhere. The gradient that arrives there is of this rank's pairs
    alone; FSDP2 averages it afterwards.

    FSDP2 makes these tensors once, and fills them for each forward pass.

    Raises:
        ValueError: parameters that are sharded in another way, too.
    """
    found: dict[str, nn.Parameter] = {}

    def note() -> None:
        now = model.named_parameters()
        found.update((name, tensor) for name, tensor in now if name in names and not isinstance(tensor, DTensor))

    note()
    for module in fsdp_modules(model):
        module.unshard()
        note()
        module.reshard()
    if missing := next((name for name in names if name not in found), None):
        raise ValueError(
            f"{missing!r} is sharded by more than FSDP2 (tensor parallelism), and no rank has the whole gradient of a "
            "pair: use FSDP2 or DDP alone"
        )
    return found


def most_pairs(accelerator: Accelerator, n_pairs: int) -> int:
    """The largest number of pairs that a rank has in its mini-batch; read on the host where they may differ."""
    if accelerator.num_processes == 1 or accelerator.even_batches:
        return n_pairs
    return int(accelerator.gather(torch.tensor([n_pairs], device=accelerator.device)).max())


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


def counted_pairs(accelerator: Accelerator, n_pairs: int) -> list[int] | None:
    """Of an evaluation batch, how many pairs of each rank count: with `even_batches`, the last batch of a set repeats
    rows, behind the others, to be as long on all ranks. None where all pairs count.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not accelerator.even_batches or not state.end_of_dataloader:
        return None
    if state.remainder <= 0:  # it has no length, or needs no repetition
        return None
    return [min(max(state.remainder - rank * n_pairs, 0), n_pairs) for rank in range(accelerator.num_processes)]


def gather_over_ranks(
    accelerator: Accelerator, n_pairs: int, sizes: list[int] | None = None
) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function that gathers values [B] over all ranks, and the position of this rank's first value in its result.

    With `even_batches`, accelerate's default, every rank has the same number of pairs. Without it the numbers are
    gathered first: one value per rank and batch is read on the host. Of other numbers, `sizes`, a rank with 0 has the
    values of one pair all the same, behind those of the others, which do not see it.
    """
    if sizes is None:
        if accelerator.num_processes == 1 or accelerator.even_batches:
            return accelerator.gather, accelerator.process_index * n_pairs
        sizes = accelerator.gather(torch.tensor([n_pairs], device=accelerator.device)).tolist()
    most, rank = max(sizes), accelerator.process_index

    def gather(values: Tensor) -> Tensor:
        parts = accelerator.gather(F.pad(values, (0, most - len(values)))).split(most)
        counted = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(counted if sizes[rank] else [*counted, values])

    return gather, sum(sizes[:rank])


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
