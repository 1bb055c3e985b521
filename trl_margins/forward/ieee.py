"""float32 products with all their 23 bits, whatever the run has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


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
