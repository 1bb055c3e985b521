"""The two dataclasses that everything passes. B is the number of pairs of one batch on this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


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
