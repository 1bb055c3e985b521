"""Weight and margin terms: one file a paper. A term maps a batch of pairs to [B] values without gradient."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..pairs import PairBatch


class Term(Protocol):
    """A weight or a margin.

    `columns` are the batch columns it reads (names of `PairBatch.columns`). A margin with `holds_target = True` has
    the target margin γ in itself; else the objective adds its own. A term that remembers has `state_dict()` and
    `load_state_dict(state)`, which go into the checkpoint.
    """

    name: str
    columns: tuple[str, ...]

    def __call__(self, batch: PairBatch, reward_gap: Tensor) -> Tensor:
        """[B] from the batch and the detached reward gap [B] (β inside)."""
        ...
