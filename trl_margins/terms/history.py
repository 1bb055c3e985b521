"""The last gaps that a run has seen: the same on every rank, on the device, part of the checkpoint."""

from __future__ import annotations

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
