"""The two dataclasses that everything passes. B is the number of pairs of one batch on this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# One key for all carried columns: TRL's trainers read meaning into keys that begin with "chosen" or "rejected"
CARRIED = "pair_columns"
SHARED = "shared_rows"  # the batch's pairs, each in one row, as `PackedRows`
CACHED = "cached_pairs"  # the `PairLogps` of a batch whose forward pass has been made already
ROW = "row_number"  # in the training set, as the trainer was given it
IS_FLIPPED = "is_flipped"
SCORES = ("score_chosen", "score_rejected")  # what the terms call them, whatever the data set does


@dataclass(frozen=True)
class PairLogps:
    """What one forward pass says about B pairs.

    Log-probabilities are natural logarithms, summed over the answer's tokens; lengths count those tokens.
    """

    chosen: Tensor  # [B] Σ_t log π(y_w,t | x, y_w,<t), with gradient
    rejected: Tensor  # [B] the same of y_l
    chosen_length: Tensor  # [B] |y_w|, 0 where truncation left nothing
    rejected_length: Tensor  # [B] |y_l|
    ref_chosen: Tensor | None = None  # [B] under the reference model, without gradient
    ref_rejected: Tensor | None = None  # [B]
    policy_weight: Tensor | None = None  # [B] how likely the policy itself writes the pair (WPO), without gradient
    sft_loss: Tensor | None = None  # [] mean negative log-likelihood of the chosen answers' tokens
    aux_loss: Tensor | None = None  # [] load-balancing loss of a mixture-of-experts model
    token_stats: Mapping[str, Tensor] = field(default_factory=dict)  # name → [] means over answer tokens, for the log


def _this_rank(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class PairBatch:
    """What the data set says about the same B pairs, and how to see those of the other ranks."""

    columns: Mapping[str, Tensor] = field(default_factory=dict)  # name → [B], float32
    gather: Callable[[Tensor], Tensor] = _this_rank  # [B] → those of all ranks, rank by rank
    first: int = 0  # where this rank's begin among them
    training: bool = False  # terms that remember learn from training batches only

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]


def with_columns(batch: Mapping[str, Any], columns: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The same batch, carrying further columns [B]."""
    return {**batch, CARRIED: {**batch.get(CARRIED, {}), **columns}}


def one_pair(value: Any, i: int, n_pairs: int) -> Any:
    """Pair i of a collated batch: row i of what has a row per pair; rows i and B + i of what has two."""
    if isinstance(value, Mapping):
        return {key: one_pair(entry, i, n_pairs) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(one_pair(entry, i, n_pairs) for entry in value)
    if isinstance(value, torch.Tensor) and value.ndim:
        if value.size(0) not in (n_pairs, 2 * n_pairs):
            raise ValueError(
                f"a tensor of shape {tuple(value.shape)} in a batch of {n_pairs} pairs cannot be cut into pairs "
                "(patches of images, say), which gradients of single pairs need: anchor_estimator='difference' does "
                "without them"
            )
        return value[i::n_pairs]
    return value[i : i + 1] if isinstance(value, list) and len(value) == n_pairs else value
