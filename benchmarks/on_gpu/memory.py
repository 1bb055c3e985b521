"""Memory: the peak of steps over the longest pairs, and the largest batch of them that fits."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial

import torch

from . import contenders
from .contenders import FLOOR, MAIN, OURS, SMALL_MODEL, TRL_SIMPO, Shape
from .ledger import Ledger, Values, table
from .subjects import Rig

SHAPES = (
    Shape(SMALL_MODEL, 8),
    Shape("1B", 4, checkpointing=True),
    Shape(SMALL_MODEL, 8, checkpointing=True),
    Shape("1B", 4),
    Shape("1B", 4, "1500/150", checkpointing=True),
    Shape("3B", 4, checkpointing=True),
    Shape("1B", 2, "3000/500", max_length=4096, checkpointing=True),
)
LARGEST = SHAPES[:2]  # of these the edge is looked for
TRIES = 7
FIRST = {SMALL_MODEL: 10.0, "1B": 15.0, "3B": 30.0, "tiny": 5.0}


def run(rig: Rig, ledger: Ledger) -> str:
    shapes = [Shape("tiny", 2, max_length=256)] if rig.tiny else list(SHAPES)
    names = (TRL_SIMPO, OURS) if rig.tiny else MAIN
    largest = shapes[:1] if rig.tiny else LARGEST
    for shape in shapes:
        for name in names:
            ledger.do(f"peak/{shape.name}/{name}", partial(_peak, name, shape, rig), shape.name, FIRST[shape.model])
        if shape in largest:
            for name in names if rig.tiny else (TRL_SIMPO, OURS, "GAPO", FLOOR):
                work = partial(_largest, name, shape, rig)
                guess = TRIES * FIRST[shape.model]
                ledger.do(f"largest/{shape.name}/{name}", work, f"largest/{shape.name}/{name}", guess)
    left = f"{len(ledger.left)} items are left for another call.\n\n" if ledger.left else ""
    return left + "\n".join(filter(None, [_table(shape, ledger) for shape in shapes]))


def _peak(name: str, shape: Shape, rig: Rig) -> Values:
    found = contenders.run(name, shape, rig, warmup=1, steps=1, longest=True)
    return {"shape": shape.name, "name": name, "gigabytes": found.gigabytes}


def _largest(name: str, shape: Shape, rig: Rig) -> Values:
    """A line through two batch sizes says where the edge should be; from there by halves to within a sixteenth."""
    tried: dict[int, float | None] = {}

    def fits(pairs: int) -> bool:
        tried[pairs] = _memory_of(name, replace(shape, pairs=pairs), rig)
        return tried[pairs] is not None

    low, high = 0, None
    pairs = shape.pairs
    for _ in range(TRIES):
        if fits(pairs):
            low = max(low, pairs)
        else:
            high = pairs if high is None else min(high, pairs)
        if high is not None and high - low <= max(1, low // 16):
            break
        pairs = (low + high) // 2 if high is not None else _beyond(tried, rig)
    return {
        "shape": shape.name,
        "name": name,
        "largest": low,
        "too_many": high,
        "tried": {str(pairs): gigabytes for pairs, gigabytes in tried.items()},
    }


def _beyond(tried: dict[int, float | None], rig: Rig) -> int:
    """Where the line through the two largest batches so far meets the device's memory; at least a little further."""
    known = sorted((pairs, gigabytes) for pairs, gigabytes in tried.items() if gigabytes is not None)
    last, used = known[-1]
    if len(known) == 1 or not rig.on_cuda:
        return 2 * last
    before, less = known[-2]
    room = torch.cuda.get_device_properties(0).total_memory / 1e9 * 0.97 - used
    slope = max((used - less) / (last - before), 1e-3)
    return min(max(last + max(last // 8, 1), last + int(room / slope)), 8 * last)


def _memory_of(name: str, shape: Shape, rig: Rig) -> float | None:
    """GB, or None where memory does not suffice."""
    try:
        if not rig.on_cuda and shape.pairs > 3:
            raise torch.OutOfMemoryError("the rehearsal's device is small")
        found = contenders.run(name, shape, rig, warmup=1, steps=1, longest=True).gigabytes
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):  # cuBLAS has its own
            raise
        found = None
    gc.collect()  # the error's traceback held the tensors of the forward pass
    if rig.on_cuda:
        torch.cuda.empty_cache()
    return found


def _table(shape: Shape, ledger: Ledger) -> str:
    items = [item for item in ledger.items.values() if item.get("shape") == shape.name]
    peak = {item["name"]: item["gigabytes"] for item in items if "gigabytes" in item}
    largest = {item["name"]: item["largest"] for item in items if "largest" in item}
    if not peak:
        return ""
    rows = [
        [
            name,
            used,
            *(used / peak[other] if peak.get(other) else None for other in (TRL_SIMPO, FLOOR)),
            largest.get(name),
        ]
        for name, used in peak.items()
    ]
    head = ["contender", "peak GB", "÷ TRL", "÷ floor", "most pairs that fit"]
    return f"## {shape.name}, its longest\n\n" + table(head, rows)
