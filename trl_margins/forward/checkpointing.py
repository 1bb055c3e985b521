"""Activation checkpointing by the name that transformers gives it: `gradient_checkpointing…` before 5.23, not in 6."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

NAMES = ("activation_checkpointing", "gradient_checkpointing")


def checkpointing_kwargs(args: Any) -> dict[str, Any]:
    """How a config has activations checkpointed; empty where they are not."""
    return next((getattr(args, f"{name}_kwargs") or {} for name in NAMES if getattr(args, name, None)), {})


@contextmanager
def without_checkpointing(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """TRL's `disable_gradient_checkpointing`, by the names that the model has, and with transformers' own options."""
    name = next(name for name in NAMES if hasattr(model, f"is_{name}"))
    if not getattr(model, f"is_{name}"):
        yield
        return
    getattr(model, f"{name}_disable")()
    try:
        yield
    finally:
        # these two are transformers', the others PyTorch's
        layers = {key: kwargs[key] for key in ("every_n_layers", "offload") if key in kwargs}
        others = {key: value for key, value in kwargs.items() if key not in layers}
        getattr(model, f"{name}_enable")(others or None, **layers)
