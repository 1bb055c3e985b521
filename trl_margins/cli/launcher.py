"""What a launcher has put into the environment."""

from __future__ import annotations

import os
import re

from ..checks import shown

_COUNTS = re.compile(
    r"((LOCAL_)?(WORLD_SIZE|RANK)|MASTER_PORT|(PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_(LOCAL_)?(SIZE|RANK))$"
)
_SWITCHES = re.compile(r"ACCELERATE_(USE_|DYNAMO_USE_|DEBUG_MODE$|CPU_AFFINITY$)")
_TRUTHS = ("y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0")  # accelerate's


def check_environment() -> None:
    """
    Raises:
        ValueError: a variable has a value that accelerate cannot read, with both.
    """
    choices = {"ACCELERATE_MIXED_PRECISION": ["no", "fp8", "fp16", "bf16"]}
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        from accelerate.utils.dataclasses import DynamoBackend

        choices["ACCELERATE_DYNAMO_BACKEND"] = DynamoBackend.list()
    for name, value in os.environ.items():
        takes = ""
        if _COUNTS.match(name) and not re.fullmatch(r"-?\d+", value, re.ASCII):
            takes = "a whole number"
        elif _SWITCHES.match(name) and value.lower() not in _TRUTHS:
            takes = "true or false"
        elif name in choices and value.lower() not in map(str.lower, choices[name]):
            takes = f"one of {', '.join(choices[name])}"
        if takes:
            raise ValueError(f"environment variable {name} must be {takes}; it is {shown(value)}: correct or unset it")
