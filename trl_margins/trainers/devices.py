"""Where a model's parts are."""

from __future__ import annotations

from typing import Any


def check_one_device(model: Any, what: str = "the model") -> None:
    """Whether one device holds a whole model, as our passes expect of each process.

    TRL loads a model that is given by name with `device_map="auto"`, which spreads it over all GPUs that one process
    sees.

    Raises:
        ValueError: its parts are on several devices.
    """
    # not a set: devices are numbers, strings or torch.device
    devices = list(dict.fromkeys(map(str, (getattr(model, "hf_device_map", None) or {}).values())))
    if len(devices) > 1:
        raise ValueError(
            f"{what} is spread over several devices ({', '.join(devices)}), as device_map='auto' does where one "
            "process sees several GPUs. Start the run with `accelerate launch`, which gives every GPU a process with "
            "the whole model (FSDP2 shards one that is too large), or set CUDA_VISIBLE_DEVICES to one GPU"
        )
