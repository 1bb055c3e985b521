"""The precision of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Within the block float32 products are IEEE's; afterwards as before.

    `tf32=True`, which transformers also sets for compiled bf16 runs, rounds their factors to 10 bits: too few where
    two passes are compared, or where the step between them is small.
    """
    backends = torch.backends
    old: dict[str, Any] = {}
    # torch has two sets of switches since 2.9: the old ones set both, and raise when read while the two disagree
    with suppress(RuntimeError):
        old["matmul"] = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        old["cudnn"] = backends.cudnn.allow_tf32
    new = []
    if hasattr(backends, "fp32_precision"):
        kinds = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        new = [(kind, kind.fp32_precision) for kind in kinds]
    try:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        for kind, _ in new:  # the older switch leaves cuDNN what torch.backends.fp32_precision says
            kind.fp32_precision = "ieee"
        yield
    finally:
        if "matmul" in old:
            torch.set_float32_matmul_precision(old["matmul"])
        if "cudnn" in old:
            backends.cudnn.allow_tf32 = old["cudnn"]
        for kind, precision in new:
            kind.fp32_precision = precision


def why_not_float32(model: nn.Module) -> str | None:
    """What keeps this model's passes from being made in float32; None where nothing does."""
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
def float32_layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes in IEEE float32, without autocast. Afterwards its tensors are the very ones
    they were.

    The layers' weights are widened one layer at a time, while it runs; embeddings, LM head and whatever else is no
    layer, for the whole block.

    Args:
        model: one for which `why_not_float32` has nothing to say; only passes without gradient.
    """
    layers = _layers(model)
    of_layers = {id(module) for layer in layers for module in layer.modules()}
    rest = [module for module in model.modules() if id(module) not in of_layers]
    wrapped = model.__dict__.get("forward")  # accelerate puts its autocast here, and keeps what it found
    unwrapped = model.__dict__.get("_original_forward")
    device_type = next(model.parameters()).device.type
    with ExitStack() as stack:
        stack.enter_context(ieee_float32())
        stack.callback(_widen(rest))
        for layer in layers:
            _widened_while_it_runs(layer, stack)
        if unwrapped is not None:
            model.forward = unwrapped
            stack.callback(setattr, model, "forward", wrapped)
        stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _layers(model: nn.Module) -> list[nn.Module]:
    """The members of the model's lists of modules, the outermost ones."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                found.append(child)
            else:
                look(child)

    look(model)
    return found


def _widened_while_it_runs(layer: nn.Module, stack: ExitStack) -> None:
    narrow: list[Callable[[], None]] = []

    def before(module: nn.Module, args: Any) -> None:
        narrow.append(_widen(module.modules()))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        narrow.pop()()

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(layer.register_forward_hook(after, always_call=True).remove)


def _widen(modules: Any) -> Callable[[], None]:
    """Widens what these modules hold themselves; gives what puts it back."""
    before: list[tuple[Tensor, Tensor]] = []
    for module in modules:
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                before.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    def back() -> None:
        for tensor, data in before:
            tensor.data = data

    return back


_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def narrow_dtype(model: nn.Module, mixed_precision: str) -> torch.dtype | None:
    """The 16-bit type in which a trainer's forward pass computes; None where it is float32 or wider."""
    if mixed_precision in _MIXED:
        return _MIXED[mixed_precision]
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize == 2), None)


def widened(tensor: Tensor) -> Tensor:
    """In float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rounds_products() -> bool:
    """Whether float32 matrix products are rounded as the run is set (TF32, say)."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # PyTorch's older and newer switches disagree, and no old one can be read
        return torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Two passes that are compared must not differ by chance."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
