"""What a run has seen of its gaps: the same on every rank, on the device, part of the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pairs import upcast


class GapHistory:
    """A first-in-first-out queue of numbers that never reads a value from the device.

    The host knows how many there are, since every push says how many it brings.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._values: Tensor | None = None  # [≤ capacity] oldest first

    def __len__(self) -> int:
        return 0 if self._values is None else self._values.numel()

    def push(self, values: Tensor) -> None:
        """Appends values; the oldest give way."""
        values = upcast(values.detach()).flatten()
        known = values[:0] if self._values is None else self._values.to(values)
        both = torch.cat([known, values])
        self._values = both[max(both.numel() - self.capacity, 0) :]

    def recent(self, n: int) -> Tensor | None:
        """The last n values, or as many as there are; None where there is none."""
        return None if n <= 0 or self._values is None else self._values[-n:]

    def spread(self, n: int) -> Tensor | None:
        """n values evenly spaced over the queue, or all of them; None where there is none."""
        if n <= 0 or self._values is None or not len(self):
            return None
        if n >= len(self):
            return self._values
        return self._values[torch.arange(n, device=self._values.device) * len(self) // n]

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"values": self._values}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self._values = state["values"]


class RunningMoments:
    """Mean and standard deviation over training: averages that begin at 0 and keep 0.9 of themselves at each batch.

    The authors of α-DPO and β-DPO have them so, without a correction for the start. A single value has no deviation:
    it is taken together with the one before it.
    """

    _DECAY = 0.9

    def __init__(self) -> None:
        self._moments: Tensor | None = None  # [2] mean, deviation
        self._last = GapHistory(1)

    def learn(self, values: Tensor) -> None:
        """Takes in a batch: [N] the values of all ranks."""
        values = upcast(values.detach())
        before = self._last.recent(2 - values.numel())
        seen = values if before is None else torch.cat([before.to(values), values])
        self._last.push(values)
        moments = torch.stack([values.mean(), spread(seen)])
        known = torch.zeros_like(moments) if self._moments is None else self._moments.to(moments)
        self._moments = self._DECAY * known + (1 - self._DECAY) * moments

    def deviation(self, values: Tensor) -> Tensor:
        """[N] how far values lie from the mean; 0 before anything was learned."""
        return torch.zeros_like(values) if self._moments is None else values - self._moments[0].to(values)

    def standardized(self, values: Tensor) -> Tensor:
        """[N] the deviation in standard deviations; 0 where there is none to divide by."""
        if self._moments is None:
            return torch.zeros_like(values)
        std = self._moments[1].to(values)
        return torch.where(std > 0, self.deviation(values) / torch.where(std > 0, std, 1.0), 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self._moments, **self._last.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = state["moments"]
        self._last.load_state_dict(state)


def spread(values: Tensor) -> Tensor:
    """Unbiased σ; 0 of a single value, where torch has NaN and a warning."""
    return values.std() if values.numel() > 1 else torch.zeros_like(values.mean())
