"""What a launcher has put into the environment."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

from ..checks import shown

_COUNTS = re.compile(
    r"((LOCAL_)?(WORLD_SIZE|RANK)|MASTER_PORT|(PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_(LOCAL_)?(SIZE|RANK))$"
)
_SWITCHES = re.compile(r"ACCELERATE_(USE_|DYNAMO_USE_|DEBUG_MODE$|CPU_AFFINITY$)")
_YES, NO = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")  # accelerate's


_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # from which accelerate takes what is missing
# what some values need
_NEEDS = {
    "ACCELERATE_MIXED_PRECISION": ("fp8", ("transformer_engine", "msamp", "torchao"), "set it to bf16"),
    "ACCELERATE_USE_DEEPSPEED": (True, ("deepspeed",), "unset it"),
    "ACCELERATE_USE_MEGATRON_LM": (True, ("megatron",), "unset it"),
}


def check_environment(on_cpu: bool = False) -> None:
    """
    Args:
        on_cpu: whether the command's flags or file say so.

    Raises:
        ValueError: a variable has a value that accelerate cannot read, with both; or it needs what is not there.
    """
    _check_values()
    for name, (value, packages, instead) in _NEEDS.items():
        given = os.environ.get(name, "").lower()
        if (given in _YES if value is True else given == value) and not any(map(find_spec, packages)):
            raise ValueError(
                f"environment variable {name}={os.environ[name]} needs the package {' or '.join(packages)}, which is "
                f"not installed: install it, or {instead}"
            )
    _check_device(os.environ.get("ACCELERATE_TORCH_DEVICE"), on_cpu)
    _check_launch()


def _check_device(device: str | None, on_cpu: bool) -> None:
    if device is None or device.startswith("cpu"):
        return
    name = f"environment variable ACCELERATE_TORCH_DEVICE={device}"
    if on_cpu:
        raise ValueError(f"{name} and use_cpu contradict each other: unset the variable, or leave use_cpu out")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"{name} is no device of this machine ({said}): correct or unset it") from error


def _check_launch() -> None:
    """What only a launcher sets, all of it or nothing."""
    counts = {name: int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", -1), ("WORLD_SIZE", 1))}
    set_by = next((name for name, least in (("LOCAL_RANK", 0), ("WORLD_SIZE", 2)) if counts[name] >= least), None)
    if set_by is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() in _YES:
        set_by = "ACCELERATE_USE_PARALLELISM_CONFIG"
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if set_by and missing and not any(name in os.environ for name in _OF_MPI):
        raise ValueError(
            f"environment variable {set_by}={os.environ[set_by]} is a launcher's, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: start with accelerate launch or torchrun, or unset it"
        )
    rank, size = int(os.environ.get("RANK", 0)), counts["WORLD_SIZE"]
    if set_by and "WORLD_SIZE" in os.environ and not 0 <= rank < size:  # it would wait for others
        raise ValueError(
            f"environment variables RANK={rank} and WORLD_SIZE={size}: ranks are from 0 to WORLD_SIZE - 1. Correct or "
            "unset them"
        )


def _check_values() -> None:
    choices = {"ACCELERATE_MIXED_PRECISION": ["no", "fp8", "fp16", "bf16"]}
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        from accelerate.utils.dataclasses import DynamoBackend

        choices["ACCELERATE_DYNAMO_BACKEND"] = DynamoBackend.list()
    for name, value in os.environ.items():
        takes = ""
        if _COUNTS.match(name) and not re.fullmatch(r"-?\d+", value, re.ASCII):
            takes = "a whole number"
        elif _SWITCHES.match(name) and value.lower() not in (*_YES, *NO):
            takes = "true or false"
        elif name in choices and value.lower() not in map(str.lower, choices[name]):
            takes = f"one of {', '.join(choices[name])}"
        if takes:
            raise ValueError(f"environment variable {name} must be {takes}; it is {shown(value)}: correct or unset it")
