"""The batch of all ranks, also where it is not cut evenly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor


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
