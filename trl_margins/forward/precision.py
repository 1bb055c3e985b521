"""The precision in which a model computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # accelerate's name → dtype


def narrow_dtype(model: nn.Module, mixed_precision: str) -> torch.dtype | None:
    """The 16-bit dtype in which a trainer's forward pass computes; None for float32 or wider."""
    if mixed_precision in AUTOCAST:
        return AUTOCAST[mixed_precision]
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize == 2), None)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode; afterwards each module has its own mode again."""
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        yield


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass in training mode drops anything: in a module of its own, or in a function that a module
    gives its probability to.
    """
    for module in model.modules():
        of_functions = (value for name, value in vars(module).items() if "drop" in name and isinstance(value, float))
        own = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0
        if own > 0 or any(value > 0 for value in of_functions):
            return True
    return False


def rounds_products() -> bool:
    """Whether float32 matrix products are rounded under the current settings (TF32, for example)."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # PyTorch's older and newer switches disagree, and the older ones cannot be read
        return torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Within the block float32 products follow IEEE; afterwards the switches are as before.

    `tf32=True`, which transformers also sets for compiled bf16 runs, rounds their factors to 10 bits: not enough to
    compare two forward passes, or to resolve a small step between them.
    """
    backends: Any = torch.backends
    newer: tuple[Any, ...] = ()
    if hasattr(backends, "fp32_precision"):
        newer = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    with ExitStack() as undo:
        for kind in newer:
            undo.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
        # torch has two sets of switches since 2.9: the older ones set both, and raise when read while the two disagree
        with suppress(RuntimeError):
            undo.callback(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32)
        with suppress(RuntimeError):
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        for kind in newer:  # the older switch leaves cuDNN at torch.backends.fp32_precision
            kind.fp32_precision = "ieee"
        yield


def why_not_float32(model: nn.Module) -> str | None:
    """Why this model cannot compute in float32; None if it can."""
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return "FSDP, which casts the weights itself"
    for name, weight in model.named_parameters():
        if hasattr(weight, "ds_id"):
            return "DeepSpeed ZeRO-3, which casts the weights itself"
        if weight.is_meta:
            return "weights that are elsewhere until they are used"
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            return f"quantized weights ({name})"
    return None


@contextmanager
def in_float32(model: nn.Module, layer_by_layer: bool = False) -> Iterator[None]:
    """Within the block the model computes in IEEE float32, without autocast. Afterwards it has the very tensors that
    it had before.

    Memory: a float32 copy of the 16-bit weights; with `layer_by_layer` a copy of one layer at a time, and of the
    embeddings, the LM head and whatever else is not a layer.

    Args:
        model: any; quantized weights stay as they are. For forward passes without gradient only.
        layer_by_layer: upcast each layer only while it runs.
    """
    layers = _layers(model) if layer_by_layer else []
    of_layers = {id(module) for layer in layers for module in layer.modules()}
    with ExitStack() as undo:
        undo.enter_context(ieee_float32())
        _upcast_weights((module for module in model.modules() if id(module) not in of_layers), undo)
        for layer in layers:
            _upcast_while_running(layer, undo)
        original = model.__dict__.get("_original_forward")  # accelerate has put its autocast into `forward`
        if original is not None:
            undo.enter_context(patch.object(model, "forward", original))
        undo.enter_context(torch.autocast(next(model.parameters()).device.type, enabled=False))
        yield


def _layers(module: nn.Module) -> list[nn.Module]:
    """The members of the model's outermost lists of modules."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _layers(child)]


def _upcast_while_running(layer: nn.Module, undo: ExitStack) -> None:
    running = undo.enter_context(ExitStack())

    def before(layer: nn.Module, args: object) -> None:
        _upcast_weights(layer.modules(), running)

    def after(layer: nn.Module, args: object, output: object) -> None:
        running.close()

    undo.enter_context(layer.register_forward_pre_hook(before))
    undo.enter_context(layer.register_forward_hook(after, always_call=True))


def _upcast_weights(modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Makes the modules' own parameters and buffers float32 or wider, until `undo` is closed."""
    for module in modules:
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                undo.callback(setattr, tensor, "data", tensor.data)
                tensor.data = tensor.data.float()
