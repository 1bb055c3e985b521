"""How many pairs an optimizer step takes, and what the number is made of."""

from __future__ import annotations

from typing import Any

from ..registry import get_method

_FACTORS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def pairs_per_step(trainer: Any) -> int:
    """Pairs of a whole optimizer step, over all devices; the last step of an epoch may take fewer."""
    total = trainer.get_total_train_batch_size(trainer.args)
    # transformers counts a batch for each process, and accelerate cuts one into as many parts
    return total // trainer.accelerator.num_processes if trainer.accelerator.split_batches else total


def factors_of(trainer: Any, origins: bool = False) -> str:
    """What the number is the product of; with `origins`, also which factors are a method's defaults."""
    config, processes = trainer.args, trainer.accelerator.num_processes
    gpus, total = max(1, config.n_gpu), pairs_per_step(trainer)
    values = trainer._train_batch_size // gpus, config.gradient_accumulation_steps  # the first may have been found
    method_id = getattr(config, "_method_id", None) if origins else None
    method = None if method_id is None else get_method(method_id)
    factors = [
        f"{name} {value}" + (f" ({method.name}'s default)" if method and method.defaults.get(name) == value else "")
        for name, value in zip(_FACTORS, values, strict=True)
    ]
    if trainer.accelerator.split_batches and processes > 1:
        factors.append(f"1 batch split over {processes} processes")
    else:
        # with tensor or sequence parallelism, several processes have the same pairs
        groups = total // (values[0] * gpus * values[1])
        noun = ("process", "processes") if groups == processes else ("group of processes", "groups of processes")
        factors.append(f"{groups} {noun[groups != 1]}")
    factors += [f"{gpus} GPUs of nn.DataParallel"] if gpus > 1 else []
    return " × ".join(factors)
