"""The command line where accelerate takes CPUs for accelerators: by itself it shards on none but these, and CPUs can
as well. What it says last is what accelerate made of the launch.
"""

from __future__ import annotations

import sys

import torch
import transformers.training_args
from accelerate.state import AcceleratorState, DistributedType, PartialState

from trl_margins.cli import main


def pretend() -> None:
    """For the rest of the process."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


if __name__ == "__main__":
    pretend()
    main(sys.argv[1:])
    sys.stdout.write(f"{AcceleratorState().distributed_type}\n")
