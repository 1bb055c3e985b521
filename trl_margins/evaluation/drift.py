"""How far a model has drifted from the one that its training started from: KL divergence, exact at each token."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..forward.head import FEW_LOGITS, StoppedForward
from ..forward.precision import eval_mode
from ..pairs import upcast
from .intervals import bootstrap_intervals
from .scorer import CompletionTokens, by_batch, move, standard_inputs


def completion_kl(
    model: Any,
    start: Any,
    tokens: Sequence[CompletionTokens],
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
    desc: str = "Measuring the drift",
) -> list[np.ndarray]:
    r"""[N] of [k]: :math:`\sum_t KL(\pi_\theta(\cdot|x,y_{<t}) \| \pi_{start}(\cdot|x,y_{<t}))` in nats.

    Each term is over the whole vocabulary, and the prefixes are the completions': nothing is sampled. Logits are built
    for a part of the tokens at a time.

    Args:
        model: π_θ, with or without adapter.
        start: the model that its training started from, with the same vocabulary.
        tokens: [N] rows of `completion_tokens`.
        batch_size: completions per device and forward pass.
        accelerator: where several processes share the work.
        desc: of the progress bar.
    """
    accelerator = accelerator or Accelerator()
    models = model, start
    for each in models:
        move(each, accelerator.device)
    with torch.no_grad(), eval_mode(model), eval_mode(start):
        found = by_batch(models, tokens, partial(_of_rows, models), batch_size, accelerator, desc)
    return [values for (values,) in found]


def drift_report(
    kls: Sequence[np.ndarray], lengths: Sequence[np.ndarray], prompts: Sequence[Hashable], n_resamples: int
) -> tuple[float | None, tuple[float, float] | None]:
    """The mean over all completion tokens, and its 95 % interval by bootstrap over prompts.

    Raises:
        ValueError: it is NaN or infinite.
    """
    sums, tokens = (np.array([each.sum() for each in some], float) for some in (kls, lengths))
    if (bad := np.flatnonzero(~np.isfinite(sums))).size:
        raise ValueError(
            f"the KL divergence is NaN or infinite in {bad.size} of {sums.size} rows, first in row {bad[0]}: look at "
            "the precision (--dtype float32), and at whether the model of --drift_from rules out tokens that the "
            "other allows"
        )

    def mean(rows: np.ndarray) -> dict[str, float | None]:
        total = tokens[rows].sum()
        return {"drift": float(sums[rows].sum() / total) if total else None}

    return mean(np.arange(sums.size))["drift"], bootstrap_intervals(mean, prompts, n_resamples)["drift"]


def _of_rows(models: Sequence[Any], rows: list[CompletionTokens]) -> list[tuple[np.ndarray]]:
    k = max(len(row.ids) for row in rows)
    if k == 0:
        return [(np.empty(0),) for _ in rows]
    device, vocabulary = next(models[0].parameters()).device, models[0].config.get_text_config().vocab_size
    inputs, labels = standard_inputs(models[0], rows, k, device)
    ours, theirs = (StoppedForward(model, inputs, labels) for model in models)
    size = max(FEW_LOGITS // 8 // vocabulary, 1)
    parts = zip(ours.hidden.split(size), theirs.hidden.split(size), strict=True)
    found = torch.cat([_token_kl(ours.logits(here), theirs.logits(there)) for here, there in parts])
    by_token = torch.zeros(ours.is_completion.shape, dtype=torch.float64, device=device)
    by_token[ours.is_completion] = found
    kls = by_token.sum(1).view(k, -1).T.cpu().numpy()
    return [(values[: len(row.ids)],) for values, row in zip(kls, rows, strict=True)]


def _token_kl(logits: Tensor, others: Tensor) -> Tensor:
    """[N] KL divergence of softmax(logits) from softmax(others), each [N, vocabulary]."""
    ours, theirs = (upcast(each).log_softmax(-1) for each in (logits, others))
    # a token that the model rules out adds nothing, whatever the other says
    return (ours.exp() * (ours - theirs)).masked_fill(ours == -torch.inf, 0.0).sum(-1, dtype=torch.float64)
