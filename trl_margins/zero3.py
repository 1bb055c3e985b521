"""Parameters that DeepSpeed's ZeRO-3 partitions over the ranks.

DeepSpeed leaves everything that is needed here on the parameters: their parts, the group of ranks that share them, and
the optimizer. Nothing of its training state is touched, and DeepSpeed itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

_OF_PARAMETERS = ("ds_tensor", "ds_numel", "ds_process_group", "_z3_optimizer")
_OF_OPTIMIZERS = ("empty_partition_cache", "get_local_fp32_param", "optimizer")
# settings of "zero_optimization" under which no forward pass computes with the ranks' parts as they are, and the
# largest value that turns them off
_UNSEEN = {"zero_quantized_weights": 0, "zero_hpz_partition_size": 1, "mics_shard_size": 0}


def is_partitioned(tensor: Tensor) -> bool:
    """Whether this parameter is one of ZeRO-3's."""
    return hasattr(tensor, "ds_id")


def n_elements(parameter: Any) -> int:
    """The number of elements of the whole parameter: ZeRO-3 leaves an empty tensor in a partitioned one's place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def part(parameter: Any) -> Tensor:
    """[n] this rank's part of the flattened parameter, padded at the end of the last rank's."""
    return parameter.ds_tensor.data


def part_index(parameter: Any) -> int:
    """The number of this rank's part."""
    return dist.get_rank(parameter.ds_process_group)


def release(model: nn.Module) -> None:
    """Lets go of all gathered parameters: the next forward pass gathers them from what the ranks' parts are then."""
    optimizer = getattr(next(model.parameters(), None), "_z3_optimizer", None)
    if optimizer is not None:
        optimizer.empty_partition_cache()


def zero3_settings(accelerator: Accelerator) -> Mapping[str, Any] | None:
    """DeepSpeed's configuration, if this is a run with ZeRO-3."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    return plugin.deepspeed_config if plugin is not None and plugin.zero_stage == 3 else None


def check_settings(accelerator: Accelerator) -> None:
    """Checks that a step away from the policy is possible with these settings of ZeRO-3.

    Raises:
        ValueError: it is not.
    """
    if (settings := zero3_settings(accelerator)) is None:
        return
    zero = settings.get("zero_optimization", {})
    if (settings.get("torch_autocast") or {}).get("enabled"):
        raise ValueError(
            "DeepSpeed's torch_autocast casts the weights within its own forward pass alone, which GAPO does not "
            'use: leave it out, and set bf16 ("bf16": {"enabled": "auto"})'
        )
    if (settings.get("compile") or {}).get("deepcompile"):
        raise ValueError(
            "DeepCompile gathers the weights in compiled graphs of its own, which GAPO's forward passes are not: set "
            '"compile": {"deepcompile": false} in DeepSpeed\'s configuration'
        )
    if (device := (zero.get("offload_param") or {}).get("device", "none")) != "none":
        raise ValueError(
            f"GAPO moves the weights where they are computed with, and offload_param keeps them on {device!r}: set "
            "its device to 'none' (offload_optimizer may stay)"
        )
    unseen = [name for name, off in _UNSEEN.items() if (zero.get(name) or 0) > off]
    unseen += ["zenflow"] if zero.get("zenflow") else []
    if unseen:
        raise ValueError(
            f"GAPO moves each rank's part of the weights, and {unseen[0]} gathers something else: leave it out of "
            "DeepSpeed's zero_optimization"
        )


def check_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks that DeepSpeed has left on its parameters what is needed here.

    Raises:
        ValueError: a version of DeepSpeed that does not, or modules whose gradients it gathers as one.
    """
    for name, parameter in parameters.items():
        missing = [attribute for attribute in _OF_PARAMETERS if not hasattr(parameter, attribute)]
        optimizer = getattr(parameter, "_z3_optimizer", None)
        missing += [attribute for attribute in _OF_OPTIMIZERS if not hasattr(optimizer, attribute)]
        if missing:
            raise ValueError(
                f"{name!r} is partitioned by a ZeRO-3 without {', '.join(missing)}, which GAPO needs: install "
                "deepspeed 0.19.8, or use ZeRO-2, FSDP2 or DDP"
            )
    leaf = next((name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)), None)
    if leaf is not None:
        raise ValueError(
            f"ZeRO-3 treats {leaf!r} as one, and not every rank has a gradient for all of it: use FSDP2 or DDP for "
            "GAPO. DeepSpeed does so by itself for mixtures of experts that it knows, Mixtral's for example, and "
            "for others where it is told to (deepspeed_moe_layer_cls_names, set_z3_leaf_modules)"
        )


class PartitionedSum:
    """Σ ∇value over everything that is added on any rank, for these parameters: this rank's part of it.

    No rank holds more than one parameter's whole gradient at a time. DeepSpeed's own hooks belong to the accumulation
    into `.grad`, which does not take place here.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = parameters
        self.parts = {name: torch.zeros_like(part(parameter)) for name, parameter in parameters.items()}

    def add(self, value: Tensor, retain_graph: bool = False) -> None:
        """Adds ∇value."""
        with ExitStack() as undo:
            for name, parameter in self.parameters.items():
                undo.callback(parameter.register_hook(partial(self._scatter, name)).remove)
            torch.autograd.grad(value, list(self.parameters.values()), retain_graph=retain_graph, allow_unused=True)

    def _scatter(self, name: str, gradient: Tensor) -> Tensor:
        """Called with a parameter's gradient as soon as that is complete."""
        found, mesh = self.parts[name], _ranks(self.parameters[name])
        padded = F.pad(gradient.reshape(-1), (0, found.numel() * mesh.size() - gradient.numel()))
        found += DTensor.from_local(padded, mesh, [Partial()]).redistribute(placements=[Shard(0)]).to_local()
        return gradient.new_zeros(()).expand_as(gradient)  # in place of the gradient, which is then freed

    def take(self) -> dict[str, Tensor]:
        """The sum over all ranks; this object is empty afterwards."""
        found, self.parts = self.parts, {}
        return {name: _sharded(self.parameters[name], tensor) for name, tensor in found.items()}


def optimizer_state(parameter: Any, keys: Sequence[str]) -> dict[str, Tensor | None]:
    """What the optimizer keeps for a parameter: its own tensors for these keys, and None for others. Empty before the
    first step.
    """
    optimizer = parameter._z3_optimizer
    # DeepSpeed keeps the state of many parameters as one
    known = {key: value for state in optimizer.optimizer.state.values() for key, value in state.items()}
    wanted = {key for key in keys if isinstance(known.get(key), Tensor)}
    return {
        key: _sharded(parameter, optimizer.get_local_fp32_param(parameter, key)) if key in wanted else None
        for key in known
    }


def _sharded(parameter: Any, tensor: Tensor) -> Tensor:
    """This rank's part as one tensor over all ranks, as FSDP2 has them."""
    return DTensor.from_local(tensor, _ranks(parameter), [Shard(0)])


def _ranks(parameter: Any) -> DeviceMesh:
    """Those over which this parameter is partitioned."""
    return DeviceMesh.from_group(parameter.ds_process_group, parameter.ds_tensor.device.type)
