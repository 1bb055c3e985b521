"""The standard concatenated pass: chosen answers first, rejected answers second, one call of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pairs import PairLogps

IGNORE = -100


@dataclass(frozen=True)
class TokenLogps:
    """Per-token values of 2B rows (B chosen, then B rejected), 0 where a position is no answer token."""

    logps: Tensor  # [2B, T] with gradient
    is_answer: Tensor  # [2B, T] bool
    mean_logit: Tensor | None = None  # [2B, T] mean over the vocabulary
    entropy: Tensor | None = None  # [2B, T]
    is_top1: Tensor | None = None  # [2B, T] bool
    log_sum_sq_probs: Tensor | None = None  # [2B, T] log Σ_v p_v²
    aux_loss: Tensor | None = None  # []


def fused_token_logps(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> TokenLogps:
    """Tokens' log-probabilities through TRL's fused LM head: the [2B, T, vocabulary] logits are never built.

    Args:
        model: a causal model that was given `add_fused_lm_head`.
        inputs: what the model's forward takes.
        labels: [2B, T+1] token ids, −100 where a token is not part of an answer.
    """
    outputs = model(**inputs, labels=labels, fused_lm_head=True, use_cache=False)
    is_answer = labels[:, 1:] != IGNORE

    def aligned(values: Tensor | None) -> Tensor | None:
        # prompt-learning adapters put virtual tokens in front of the real ones
        return None if values is None else values[:, -is_answer.size(1) :]

    return TokenLogps(
        logps=aligned(outputs.log_probs),
        is_answer=is_answer,
        mean_logit=aligned(outputs.mean_logits),
        entropy=aligned(outputs.entropy),
        is_top1=aligned(outputs.is_top1),
        log_sum_sq_probs=aligned(outputs.log_sum_sq_probs),
        aux_loss=outputs.aux_loss,
    )


def logits_token_logps(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, shift: bool = True, statistics: bool = False
) -> TokenLogps:
    """The plain way, through the whole logits: for models whose head TRL cannot fuse.

    Args:
        model: any language model.
        inputs: what the model's forward takes.
        labels: [2B, T] token ids, −100 where a token is not part of an answer.
        shift: whether position t predicts token t+1 (causal models) or token t (decoders fed shifted labels).
        statistics: all that TRL's fused head gives, not the mean logit alone.
    """
    outputs = model(**inputs, use_cache=False)
    logits = outputs.logits
    if shift:
        logits, labels = logits[:, -labels.size(1) : -1], labels[:, 1:]
    return TokenLogps(
        is_answer=labels != IGNORE,
        aux_loss=getattr(outputs, "aux_loss", None),
        **logit_scores(logits, labels, statistics),
    )


def logit_scores(logits: Tensor, labels: Tensor, statistics: bool) -> dict[str, Tensor]:
    """[R, T] each: what `TokenLogps` has of the tokens `labels` of these logits [R, T, vocabulary]."""
    is_answer = labels != IGNORE
    scores = {"logps": -token_nll(logits, labels)}
    with torch.no_grad():
        scores["mean_logit"] = logits.mean(-1) * is_answer
        if statistics:
            logps = logits.float().log_softmax(-1)
            scores["entropy"] = -(logps.exp() * logps).sum(-1) * is_answer
            scores["log_sum_sq_probs"] = (2 * logps).logsumexp(-1) * is_answer
            scores["is_top1"] = (logits.argmax(-1) == labels) & is_answer
    return scores


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[R, T] negative log-likelihoods, 0 where the label is −100, from logits [R, T, vocabulary].

    In float32 at least: a sum of many log-probabilities has no digits left in 16 bits.
    """
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view(labels.shape)


def pair_logps(tokens: TokenLogps, tail_weight: float | None = None, policy_weight: bool = False) -> PairLogps:
    """Sums tokens into `PairLogps`.

    Args:
        tokens: of 2B rows.
        tail_weight: LD-DPO's α (arXiv 2409.06411): weight of the longer answer's tokens past the shorter one's end.
        policy_weight: compute WPO's weight per pair (arXiv 2406.11827, eq. 2).
    """
    is_answer = tokens.is_answer
    lengths = is_answer.sum(1)
    chosen_length, rejected_length = lengths.chunk(2)
    token_weight = is_answer if tail_weight is None else _tail_weights(is_answer, lengths, tail_weight)
    chosen, rejected = (tokens.logps * token_weight).sum(1).chunk(2)
    chosen_tokens = chosen_length.sum()
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        policy_weight=_policy_weight(tokens, lengths) if policy_weight else None,
        sft_loss=-tokens.logps.chunk(2)[0].sum() / chosen_tokens.clamp(min=1),
        aux_loss=tokens.aux_loss,
        token_stats=_token_stats(tokens),
    )


def _tail_weights(is_answer: Tensor, lengths: Tensor, tail_weight: float) -> Tensor:
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    return torch.where(is_answer.cumsum(1) <= shared[:, None], 1.0, tail_weight) * is_answer


@torch.no_grad()
def _policy_weight(tokens: TokenLogps, lengths: Tensor) -> Tensor:
    aligned = ((tokens.logps - tokens.log_sum_sq_probs) * tokens.is_answer).sum(1)
    chosen, rejected = torch.exp(aligned / lengths.clamp(min=1)).chunk(2)
    return chosen * rejected


@torch.no_grad()
def _token_stats(tokens: TokenLogps) -> dict[str, Tensor]:
    def mean(values: Tensor, where: Tensor) -> Tensor:
        return (values * where).sum() / where.sum().clamp(min=1)

    chosen, rejected = tokens.is_answer.chunk(2)
    stats = {}
    if tokens.mean_logit is not None:
        chosen_logit, rejected_logit = tokens.mean_logit.chunk(2)
        stats |= {"logits/chosen": mean(chosen_logit, chosen), "logits/rejected": mean(rejected_logit, rejected)}
    if tokens.entropy is not None:
        stats["entropy"] = mean(tokens.entropy, tokens.is_answer)
    if tokens.is_top1 is not None:
        stats["mean_token_accuracy"] = mean(tokens.is_top1.chunk(2)[0], chosen)
    return stats
