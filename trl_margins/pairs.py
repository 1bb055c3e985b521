"""The dataclasses that the modules exchange. B is the number of pairs of one batch on this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
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
SCORE_CHOSEN, SCORE_REJECTED = SCORES
FACTOR = "evaluation_factor"  # the similarity of the two completions; computed where the data set has none

_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class PairLogps:
    """What one forward pass says about B pairs.

    Log-probabilities are natural logarithms, summed over the completion's tokens; lengths count those tokens.
    """

    chosen: Tensor  # [B] Σ_t log π(y_w,t | x, y_w,<t), with gradient
    rejected: Tensor  # [B] the same of y_l
    chosen_length: Tensor  # [B] |y_w|, 0 where truncation left nothing
    rejected_length: Tensor  # [B] |y_l|
    ref_chosen: Tensor | None = None  # [B] under the reference model, without gradient
    ref_rejected: Tensor | None = None  # [B]
    unweighted: Tensor | None = None  # [B, 2] `chosen` and `rejected` of equal tokens, where LD-DPO weights them
    chosen_score: Tensor | None = None  # [B] Σ_t f(log π(y_w,t | x, y_w,<t)), where the reward has an f per token
    rejected_score: Tensor | None = None  # [B]
    policy_weight: Tensor | None = None  # [B] how likely the policy itself writes the pair (WPO), without gradient
    sft_loss: Tensor | None = None  # [] mean negative log-likelihood of the chosen completions' tokens
    aux_loss: Tensor | None = None  # [] load-balancing loss of a mixture-of-experts model
    token_stats: Mapping[str, Tensor] = field(default_factory=dict)  # name → [] means over completion tokens, for logs

    def first(self, n: int) -> PairLogps:
        """The first n pairs; what is one value for the batch stays."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        cut = {name: each[:n] for name, each in values.items() if isinstance(each, Tensor) and each.dim()}
        return replace(self, **{**values, **cut})

    @property
    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """[B] log π(y) / |y| of the chosen and the rejected completions, in nats per token, without gradient."""
        chosen, rejected = (self.chosen, self.rejected) if self.unweighted is None else self.unweighted.unbind(1)
        return mean_logps(chosen.detach(), self.chosen_length), mean_logps(rejected.detach(), self.rejected_length)


def mean_logps(logps_sum: Tensor, lengths: Tensor) -> Tensor:
    """[B] mean log-probability per token, in nats; 0 for a completion that truncation left empty."""
    return torch.where(lengths > 0, logps_sum / lengths.clamp(min=1), 0.0)


def has_gap(chosen: Any, rejected: Any, least: float) -> Any:
    """[B] whether scores, in tensors or in arrays, are at least so far apart, but for the rounding of float32, in
    which training has them: 0.7 and 0.4 are 0.3 apart, though 0.7 - 0.4 is less. Equal scores are not apart.
    """
    gap, rounding = abs(chosen - rejected), _EPSILON * (abs(chosen) + abs(rejected))
    return (gap >= least - rounding) & (gap > 0) if least > 0 else gap >= least


def upcast(values: Tensor) -> Tensor:
    """The values in their own dtype, at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def this_rank(values: Tensor) -> Tensor:
    """The values over all ranks, where there is only one."""
    return values


@dataclass(frozen=True)
class PairView:
    """What a term sees of B pairs. Every tensor is detached."""

    reward_gap: Tensor  # [B] m = r_w − r_l, β inside
    unscaled_gap: Tensor  # [B] the same before β; Δ, nats per token, where the reward is length-normalized
    beta: float
    chosen_logps: Tensor  # [B] log π(y_w), summed over tokens, in nats
    rejected_logps: Tensor  # [B] log π(y_l)
    chosen_length: Tensor  # [B] |y_w| in tokens, 0 where truncation left nothing
    rejected_length: Tensor  # [B] |y_l|
    per_token_gap: Tensor | None = None  # [B] unscaled, each score over its length; None unless the reward is a sum
    ref_chosen_logps: Tensor | None = None  # [B] log π_ref(y_w); None without a reference model
    ref_rejected_logps: Tensor | None = None  # [B] log π_ref(y_l)
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # the batch's: name → [B], float32
    gather: Callable[[Tensor], Tensor] = this_rank  # [B] → the values over all ranks, rank by rank
    first: int = 0  # where this rank's pairs begin among the gathered
    training: bool = False  # terms that remember learn from training batches only
    evaluation: bool = False  # of an evaluation set: what training has seen has no part in it

    @classmethod
    def of(
        cls,
        pairs: PairLogps,
        scores: tuple[Tensor, Tensor],
        beta: float,
        columns: Mapping[str, Tensor] | None = None,
        gather: Callable[[Tensor], Tensor] = this_rank,
        first: int = 0,
        training: bool = False,
        evaluation: bool = False,
        summed: bool = False,
    ) -> PairView:
        """The view of pairs with these scores, (chosen, rejected) rewards before β; `summed` over tokens or not."""
        gap = (scores[0] - scores[1]).detach()
        per_token = None
        if summed:
            lengths = pairs.chosen_length, pairs.rejected_length
            chosen, rejected = (mean_logps(each.detach(), n) for each, n in zip(scores, lengths, strict=True))
            per_token = chosen - rejected
        return cls(
            reward_gap=beta * gap,
            unscaled_gap=gap,
            beta=beta,
            chosen_logps=pairs.chosen.detach(),
            rejected_logps=pairs.rejected.detach(),
            chosen_length=pairs.chosen_length,
            rejected_length=pairs.rejected_length,
            per_token_gap=per_token,
            ref_chosen_logps=pairs.ref_chosen,
            ref_rejected_logps=pairs.ref_rejected,
            columns=columns or {},
            gather=gather,
            first=first,
            training=training,
            evaluation=evaluation,
        )

    @classmethod
    def of_gaps(
        cls, reward_gap: Tensor, columns: Mapping[str, Tensor] | None = None, beta: float = 1.0, **view: Any
    ) -> PairView:
        """A view for tests of a term: pairs with these reward gaps, each completion one token long."""
        gap, length = reward_gap.detach() / beta, torch.ones_like(reward_gap, dtype=torch.long)
        logps = gap, torch.zeros_like(gap)
        return cls(reward_gap.detach(), gap, beta, *logps, length, length, columns=columns or {}, **view)

    def __getitem__(self, column: str) -> Tensor:
        """[B] a column of the batch."""
        if column not in self.columns:
            raise KeyError(
                f"the batch has no column {column!r}, only {sorted(self.columns)}: name it in the term's `columns`"
            )
        return self.columns[column]

    @property
    def versions(self) -> list[int]:
        """How often each tensor was changed in place, which costs no look at its values."""
        own = (value for value in vars(self).values() if isinstance(value, Tensor))
        tracked = (tensor for tensor in (*own, *self.columns.values()) if not tensor.is_inference())
        return [tensor._version for tensor in tracked]

    @property
    def chosen_mean_logps(self) -> Tensor:
        """[B] log π(y_w) / |y_w|, in nats per token."""
        return mean_logps(self.chosen_logps, self.chosen_length)

    @property
    def rejected_mean_logps(self) -> Tensor:
        """[B] log π(y_l) / |y_l|, in nats per token."""
        return mean_logps(self.rejected_logps, self.rejected_length)

    @property
    def chosen_log_ratio(self) -> Tensor | None:
        """[B] log π(y_w) − log π_ref(y_w); None without a reference model."""
        return None if self.ref_chosen_logps is None else self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_log_ratio(self) -> Tensor | None:
        """[B] log π(y_l) − log π_ref(y_l); None without a reference model."""
        return None if self.ref_rejected_logps is None else self.rejected_logps - self.ref_rejected_logps


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
