"""Where a step waits for its device."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

PACKAGES = ("trl_margins", "trl", "transformers", "accelerate")  # a place is named in the innermost of these
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2", "_unique2"}


class SynchronisationsOfSteps(TrainerCallback):
    """Counts them from the end of one optimizer step to the end of a later one."""

    def __init__(self, device: str, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last
        self.places: Counter[tuple[str, bool]] = Counter()
        self._open = ExitStack()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            self._open.enter_context(counted(self.device, self.places))
        if state.global_step == self.last:
            self._open.close()

    def per_step(self) -> tuple[dict[str, float], dict[str, float]]:
        """Place → times per step: what is read from the device, and what is copied to it by a call that waits."""
        steps = self.last - self.first
        reads = {place: n / steps for (place, copy), n in self.places.most_common() if not copy}
        copies = {place: n / steps for (place, copy), n in self.places.most_common() if copy}
        return reads, copies


def counted(device: str, places: Counter[tuple[str, bool]]) -> AbstractContextManager:
    """Within the block, records every call that waits for the device; on a CPU, where none does, those that would."""
    return _of_cuda(places) if device == "cuda" else _of_operators(places)


@contextmanager
def _of_cuda(places: Counter[tuple[str, bool]]) -> Iterator[None]:
    def note(message: Any, category: Any, *_: Any) -> None:
        # the mode itself warns once per process: it is a prototype and does not see all "synchronizing operations"
        if "synchronizing" in str(message) and "prototype" not in str(message):
            places[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _of_operators(places: Counter[tuple[str, bool]]) -> Iterator[None]:
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function._schema.name.removeprefix("aten::") in READS and not _in_the_collator():
                places[_place()] += 1
            return function(*args, **(kwargs or {}))

    with Counting():
        yield


def _in_the_collator() -> bool:
    """Works on a CPU's tensors, wherever the model is."""
    return any(Path(frame.filename).name == "fetch.py" for frame in traceback.extract_stack())


def _place() -> tuple[str, bool]:
    """The line that asked for it, and whether it copies something to the device."""
    frames = [frame for frame in traceback.extract_stack() if any(f"/{name}/" in frame.filename for name in PACKAGES)]
    if not frames:
        return "elsewhere", False
    frame = frames[-1]
    package = next(name for name in PACKAGES if f"/{name}/" in frame.filename)
    copies = any(f.name in ("send_to_device", "pin_memory") or ".to(" in (f.line or "") for f in frames[-3:])
    return f"{package}/…/{Path(frame.filename).name}:{frame.lineno} {frame.name}: {(frame.line or '')[:60]}", copies
