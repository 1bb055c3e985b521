"""The standard forward pass: chosen completions first, rejected completions second, one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pairs import PairLogps, upcast

IGNORE = -100
_FUSED_NAMES = {  # of each token: ours, TRL's
    "logps": "log_probs",
    "mean_logit": "mean_logits",
    "entropy": "entropy",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_sq_probs",
}


@dataclass(frozen=True)
class TokenLogps:
    """Per-token values of 2B rows (B chosen, then B rejected), 0 where a position is not a completion token."""

    logps: Tensor  # [2B, T] with gradient
    is_completion: Tensor  # [2B, T] bool
    mean_logit: Tensor | None = None  # [2B, T] mean over the vocabulary
    entropy: Tensor | None = None  # [2B, T]
    is_top1: Tensor | None = None  # [2B, T] bool
    log_sum_sq_probs: Tensor | None = None  # [2B, T] log Σ_v p_v²
    aux_loss: Tensor | None = None  # []


def fused_token_logps(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> TokenLogps:
    """Tokens' log-probabilities through TRL's fused LM head: the [2B, T, vocabulary] logits are never built.

    Args:
        model: a causal model with `add_fused_lm_head` applied.
        inputs: what the model's forward takes.
        labels: [2B, T+1] token ids, −100 where a token is not part of a completion.
    """
    outputs = model(**inputs, labels=labels, fused_lm_head=True, use_cache=False)
    is_completion = labels[:, 1:] != IGNORE
    # prompt-learning adapters put virtual tokens in front of the real ones
    scores = {name: values[:, -is_completion.size(1) :] for name, values in fused_scores(outputs).items()}
    return TokenLogps(**scores, is_completion=is_completion, aux_loss=outputs.aux_loss)


def fused_scores(outputs: Any) -> dict[str, Tensor]:
    """The per-token fields of `TokenLogps` that TRL's fused head has computed."""
    found = {ours: outputs.get(theirs) for ours, theirs in _FUSED_NAMES.items()}
    return {name: values for name, values in found.items() if values is not None}


def logits_token_logps(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, shift: bool = True, statistics: bool = False
) -> TokenLogps:
    """Tokens' log-probabilities from the model's whole logits, for models whose head TRL cannot fuse.

    Args:
        model: any language model.
        inputs: what the model's forward takes.
        labels: [2B, T] token ids, −100 where a token is not part of a completion.
        shift: whether position t predicts token t+1 (causal models) or token t (decoders fed shifted labels).
        statistics: compute all that TRL's fused head gives, not just the mean logit.
    """
    outputs = model(**inputs, use_cache=False)
    logits = outputs.logits
    if shift:
        logits, labels = logits[:, -labels.size(1) : -1], labels[:, 1:]
    return TokenLogps(
        is_completion=labels != IGNORE,
        aux_loss=getattr(outputs, "aux_loss", None),
        **logit_scores(logits, labels, statistics),
    )


def logit_scores(logits: Tensor, labels: Tensor, statistics: bool) -> dict[str, Tensor]:
    """[R, T] each: the per-token fields of `TokenLogps` for tokens `labels`, from logits [R, T, vocabulary]."""
    is_completion = labels != IGNORE
    scores = {"logps": -token_nll(logits, labels)}
    with torch.no_grad():
        scores["mean_logit"] = logits.mean(-1) * is_completion
        if statistics:
            logps = logits.float().log_softmax(-1)
            scores["entropy"] = -(logps.exp() * logps).sum(-1) * is_completion
            scores["log_sum_sq_probs"] = (2 * logps).logsumexp(-1) * is_completion
            scores["is_top1"] = (logits.argmax(-1) == labels) & is_completion
    return scores


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[R, T] negative log-likelihoods, 0 where the label is −100, from logits [R, T, vocabulary].

    In float32 at least: a sum of many log-probabilities has no digits left in 16 bits.
    """
    nll = F.cross_entropy(upcast(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view(labels.shape)


def pair_logps(
    tokens: TokenLogps,
    tail_weight: float | None = None,
    policy_weight: bool = False,
    of_token: Callable[[Tensor], Tensor] | None = None,
) -> PairLogps:
    """Sums tokens into `PairLogps`.

    Args:
        tokens: of 2B rows.
        tail_weight: LD-DPO's α (arXiv 2409.06411): weight of the longer completion's tokens past the end of the
            shorter one.
        policy_weight: compute WPO's weight per pair (arXiv 2406.11827, eq. 2).
        of_token: the reward's function of each token's log-probability.
    """
    is_completion = tokens.is_completion
    lengths = is_completion.sum(1)
    chosen_length, rejected_length = lengths.chunk(2)
    chosen, rejected = (tokens.logps * is_completion).sum(1).chunk(2)
    unweighted = None
    if tail_weight is not None:
        unweighted = torch.stack([chosen, rejected], dim=1).detach()
        chosen, rejected = (tokens.logps * _tail_weights(is_completion, lengths, tail_weight)).sum(1).chunk(2)
    score = (None, None) if of_token is None else (of_token(tokens.logps) * is_completion).sum(1).chunk(2)
    chosen_tokens = chosen_length.sum()
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        unweighted=unweighted,
        chosen_score=score[0],
        rejected_score=score[1],
        policy_weight=_policy_weight(tokens, lengths) if policy_weight else None,
        sft_loss=-tokens.logps.chunk(2)[0].sum() / chosen_tokens.clamp(min=1),
        aux_loss=tokens.aux_loss,
        token_stats=_token_stats(tokens),
    )


def _tail_weights(is_completion: Tensor, lengths: Tensor, tail_weight: float) -> Tensor:
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    return torch.where(is_completion.cumsum(1) <= shared[:, None], 1.0, tail_weight) * is_completion


@torch.no_grad()
def _policy_weight(tokens: TokenLogps, lengths: Tensor) -> Tensor:
    if tokens.log_sum_sq_probs is None:
        raise ValueError("policy_weight needs log_sum_sq_probs: compute the tokens with statistics=True")
    aligned = ((tokens.logps - tokens.log_sum_sq_probs) * tokens.is_completion).sum(1)
    chosen, rejected = torch.exp(aligned / lengths.clamp(min=1)).chunk(2)
    return chosen * rejected


@torch.no_grad()
def _token_stats(tokens: TokenLogps) -> dict[str, Tensor]:
    """The means over completion tokens that TRL logs, for those fields that the forward pass has given."""
    chosen, rejected = tokens.is_completion.chunk(2)

    def mean(values: Tensor, where: Tensor) -> Tensor:
        return (values * where).sum() / where.sum().clamp(min=1)

    stats: dict[str, Tensor] = {}
    if tokens.mean_logit is not None:
        chosen_logit, rejected_logit = tokens.mean_logit.chunk(2)
        stats |= {"logits/chosen": mean(chosen_logit, chosen), "logits/rejected": mean(rejected_logit, rejected)}
    if tokens.entropy is not None:
        stats["entropy"] = mean(tokens.entropy, tokens.is_completion)
    if tokens.is_top1 is not None:
        stats["mean_token_accuracy"] = mean(tokens.is_top1.chunk(2)[0], chosen)
    return stats
