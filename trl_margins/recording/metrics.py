"""Logged values stay on the device until the next log: no host sync per step, one transfer per logging interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor

# The log shows the spread of these, not only their mean
SPREAD = ("weights", "target_margins", "anchor/gap", "anchor/weight")
STATISTICS = ("mean", "std", "min", "max", "zero")
TOTALS = ("num_tokens",)  # and the sum of these


class MetricBuffer:
    """Sums and counts by name; `drain` reduces them over all ranks and empties the buffer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # name → [2]: Σ v, number
        self._extremes: dict[str, Tensor] = {}  # name → [2]: greatest −v, greatest v

    def copy(self) -> MetricBuffer:
        """A copy that shares its tensors, which are never changed in place."""
        other = MetricBuffer()
        other._sums, other._extremes = dict(self._sums), dict(self._extremes)
        return other

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Adds values: a scalar counts once, a [B] tensor once per pair."""
        for name, values in metrics.items():
            # float32 loses a small spread around a large mean; MPS has nothing wider
            values = torch.as_tensor(values).detach()
            values = values.to(torch.float32 if values.device.type == "mps" else torch.float64).flatten()
            if not _spreads(name):
                self._add(name, values)
                continue
            self._add(f"{name}/mean", values)
            self._add(f"{name}/std", values.square())  # becomes one in `drain`
            self._add(f"{name}/zero", (values == 0).to(values.dtype))
            lowest = values.new_full((1,), -math.inf)  # all that a rank has whose pairs do not count
            extremes = torch.stack([torch.cat([each, lowest]).max() for each in (-values, values)])
            self._extremes[name] = torch.maximum(self._extremes.get(name, extremes), extremes)

    def _add(self, name: str, values: Tensor) -> None:
        total = values.sum()
        sums = torch.stack([total, torch.full_like(total, values.numel())])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over everything added on all ranks since the last call; for `SPREAD` also std, min, max and share of
        zeros; for `TOTALS` the sum.
        """
        if not self._sums:
            return {}
        names, spread = sorted(self._sums), sorted(self._extremes)
        values = accelerator.reduce(torch.stack([self._sums[name] for name in names])).flatten()
        if spread:
            stacked = torch.stack([self._extremes[name] for name in spread])
            values = torch.cat([values, accelerator.gather(stacked[None]).amax(0).flatten()])
        numbers = iter(values.tolist())  # the only transfer
        self._sums, self._extremes = {}, {}
        logs: dict[str, float] = {}
        for name in names:
            total, count = islice(numbers, 2)
            logs[name] = total if name in TOTALS else total / max(count, 1)
        for name in spread:
            least, greatest = islice(numbers, 2)
            logs[f"{name}/min"], logs[f"{name}/max"] = -least, greatest
            logs[f"{name}/std"] = max(logs[f"{name}/std"] - logs[f"{name}/mean"] ** 2, 0.0) ** 0.5
        return logs


def _spreads(name: str) -> bool:
    name = name.removeprefix("eval_")
    return name in SPREAD or name.startswith(("weights/", "target_margins/"))  # of one term among several
