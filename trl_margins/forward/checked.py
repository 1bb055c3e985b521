"""Compares the faster ways to log-probabilities with the model's own logits, on the completions of one prompt."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..pairs import this_rank
from .head import FEW_LOGITS, causal_model
from .precision import ieee_float32, in_float32, why_not_float32
from .shared_prompt import shared_token_logps
from .shared_rows import SharedRows, shared_rows, width_step
from .standard import IGNORE, TokenLogps, fused_token_logps, logits_token_logps, token_nll

logger = logging.getLogger(__name__)

# By the dtype of the comparison: how far a completion's tokens may be from the model's own, in nats, on average. In 16
# bits correct forward passes differ by 0.01, and a token at a wrong position by 0.02: hence float32 where possible.
TOLERANCE: dict[torch.dtype | None, float] = {None: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
_WITHOUT_FLOAT32 = ("flash", "sage")  # attention kernels of 16 bits

T = TypeVar("T")
Rows = tuple[Tensor, Tensor, Tensor]  # input_ids, attention_mask, labels, [k·B, T] each
_Comparison = tuple[Callable[[], AbstractContextManager[None]], torch.dtype | None, float]


@dataclass(frozen=True)
class Ways:
    """The ways in which a model's log-probabilities are computed, beside its own logits."""

    fused: bool  # through TRL's fused LM head
    shared: bool  # a prompt once for all its completions


@torch.no_grad()
def checked_ways(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    ways: Ways,
    k: int = 2,
    dtype: torch.dtype | None = None,
    max_over_ranks: Callable[[Tensor], Tensor] = this_rank,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Ways:
    """Those of `ways` that give the model's own log-probabilities: `model(input_ids, attention_mask).logits` of each
    row alone, without padding. A warning names the others, with numbers; the model's own logits take their place.

    The k completions of one prompt are compared, in float32 and to 1e-4 nats: a model of 16 bits is upcast for it, one
    layer at a time. Where that is impossible (quantized or sharded weights, flash attention) the comparison is in the
    model's own dtype, which shows only gross errors.

    Args:
        model: a causal model, in evaluation mode; with TRL's fused head, if that is one of the ways.
        input_ids: [k·B, T] standard rows, on any device.
        attention_mask: [k·B, T] 0 where padded.
        labels: [k·B, T] −100 where a token is not part of a completion.
        ways: what the model allows.
        k: completions per prompt.
        dtype: the 16-bit dtype that the model computes in; None for float32.
        max_over_ranks: from this rank's values [n] to the largest ones over all ranks. Every rank calls it equally
            often, also when its own forward passes fail.
        more: what else the model's forward takes in training.
    """
    rows = one_prompt(model, input_ids, attention_mask, labels, k)
    compared, reason = False, ""
    for context, compared_in, tolerance in _comparisons(model, dtype):
        try:
            with context():
                found = differences_from_own(model, rows, ways, tolerance, max_over_ranks, more)
        except OwnFailsError as error:
            reason = f"which fail: {error}"
            continue
        if not found.n_tokens:
            reason = "since the pair has no completion tokens"
            continue
        right = Ways(ways.fused and found.fused <= tolerance, ways.shared and found.shared <= tolerance)
        if right != ways or not compared:
            _report(model, ways, right, found, compared_in or torch.float32, tolerance)
        ways, compared = right, True
    if not compared:
        logger.warning("log-probabilities are not compared with the model's own logits, %s", reason)
    return ways


def _comparisons(model: nn.Module, dtype: torch.dtype | None) -> list[_Comparison]:
    """The contexts to compare in, the dtype that the model computes in there (None: float32), and the tolerance."""
    if dtype is None:
        return [(ieee_float32, None, TOLERANCE[None])]
    attention = causal_model(model).config.get_text_config()._attn_implementation or ""
    if why_not_float32(model) or any(name in attention for name in _WITHOUT_FLOAT32):
        return [(nullcontext, dtype, TOLERANCE[dtype])]
    # then once more as the training computes, where a way must not crash
    return [
        (partial(in_float32, model, layer_by_layer=True), None, TOLERANCE[None]),
        (nullcontext, dtype, sys.float_info.max),
    ]


class OwnFailsError(Exception):
    """The model's own logits cannot be computed."""


@dataclass
class Differences:
    """From the model's own values, in nats per token, the largest over all ranks; infinite for a crash."""

    n_tokens: int = 0  # the number compared; with none, the differences are 0 and mean nothing
    fused: float = 0.0
    shared: float = 0.0
    padded: float = 0.0  # the model's own logits, of rows with padding
    crash: str = ""


def differences_from_own(
    model: nn.Module,
    rows: Rows,
    ways: Ways,
    tolerance: float = TOLERANCE[None],
    max_over_ranks: Callable[[Tensor], Tensor] = this_rank,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Differences:
    """How far these ways are from the model's own logits, on the completions of one prompt. The shared-prompt forward
    pass goes through the fused head only if that is within the tolerance.

    What one forward pass gives decides on the next, and all ranks take part in each one of a sharded model: they agree
    after each.

    Raises:
        OwnFailsError: the model's own logits fail, on this rank or another.
    """
    device = cast("Tensor", causal_model(model).get_input_embeddings().weight).device
    ids, mask, labels = (values.to(device) for values in rows)
    inputs = {"input_ids": ids, "attention_mask": mask, **more}

    def largest(*values: float) -> list[float]:
        return max_over_ranks(torch.tensor(values, device=device)).tolist()

    own, failure = _attempt(lambda: [_own(model, *row) for row in zip(ids, mask, labels, strict=True)])
    fails, n_tokens = largest(own is None, sum(map(len, own or [])))
    if own is None or fails:
        raise OwnFailsError(failure or "on another rank")
    found = Differences(n_tokens=int(n_tokens))

    def compared(own: list[Tensor], *passes: Callable[[], TokenLogps]) -> float:
        difference = 0.0
        for each in passes:
            value, crash = _attempt(partial(_largest, each, own))
            difference = max(difference, math.inf if value is None else value)
            found.crash = found.crash or crash.split("\n")[0]
        return largest(difference)[0]

    if ways.fused:
        found.fused = compared(own, lambda: fused_token_logps(model, inputs, labels))
    fused = ways.fused and found.fused <= tolerance
    if not fused:
        found.padded = compared(own, lambda: logits_token_logps(model, inputs, labels))
    if ways.shared:
        twice = _twice_in_a_row(rows, device)
        # few logits are built even where there is a fused head
        heads = (True, False) if fused else (False,)
        passes = [partial(shared_token_logps, model, twice, fused=head, **more) for head in heads]
        found.shared = compared([values for values in own for _ in range(2)], *passes)
    return found


def _attempt(run: Callable[[], T]) -> tuple[T | None, str]:
    """The result, or None and the error: a model may fail in any way in a forward pass that it was not made for."""
    try:
        return run(), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _twice_in_a_row(rows: Rows, device: torch.device) -> SharedRows:
    """The prompt with its completions, twice in one shared row: the neighbour is what a token must not see."""
    ids, mask, labels = (values.cpu().repeat_interleave(2, dim=0) for values in rows)
    found = shared_rows(ids, mask, labels, len(rows[0]), balance=math.inf, step=width_step(device))
    return cast("SharedRows", send_to_device(found, device))


def _own(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """[A] log-probabilities of one row's completion tokens."""
    real = mask.bool()
    ids, labels = ids[real][None], labels[real][None, 1:]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    # virtual tokens come before the real ones
    return -token_nll(logits[:, -ids.size(1) : -1], labels)[labels != IGNORE]


def _largest(forward: Callable[[], TokenLogps], own: Sequence[Tensor]) -> float:
    """The largest mean difference of a completion's tokens."""
    tokens, largest = forward(), 0.0
    for logps, is_completion, right in zip(tokens.logps, tokens.is_completion, own, strict=True):
        found = logps[is_completion]
        if len(right):
            difference = (found.float() - right.float()).abs()
            # a model that gives NaN or infinity gives it in every way
            difference = difference.masked_fill(~found.isfinite() & ~right.isfinite(), 0.0).mean()
            largest = max(largest, difference.nan_to_num(nan=math.inf).item())
    return largest


def one_prompt(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, k: int) -> Rows:
    """The rows of one prompt: with tokens in as many completions as possible; among those, the longest whose logits
    are cheap, else the shortest.
    """
    rows = tuple(values.view(k, -1, values.size(-1)) for values in (input_ids, attention_mask, labels))
    lengths = (rows[1] != 0).sum(2).amax(0).tolist()
    completions = (rows[2][..., 1:] != IGNORE).any(2).sum(0).tolist()  # the first token of a row has no prediction
    most = FEW_LOGITS // causal_model(model).config.get_text_config().vocab_size
    i = max(range(len(lengths)), key=lambda i: (completions[i], lengths[i] if lengths[i] <= most else -lengths[i]))
    ids, mask, labels = (values[:, i] for values in rows)
    used = (mask != 0).any(0)
    return ids[:, used], mask[:, used], labels[:, used]


def _report(
    model: nn.Module, ways: Ways, right: Ways, found: Differences, compared_in: torch.dtype, tolerance: float
) -> None:
    described: list[str] = []
    instead: list[str] = []
    for way, name, fallback in (
        ("fused", "TRL's fused LM head", "log-probabilities come from the whole logits"),
        ("shared", "the shared-prompt forward pass", "each prompt is computed once per completion"),
    ):
        if getattr(ways, way) and (right == ways or not getattr(right, way)):
            value = getattr(found, way)
            how = "fails" if value == math.inf else f"differs by {value:.1e} nats per token"
            described.append(f"{name} {how}")
            instead.append(fallback)
    differences = " and ".join(described)
    dtype = str(compared_in).removeprefix("torch.")
    if right == ways:
        logger.info("log-probabilities match the model's own logits: on one pair in %s, %s", dtype, differences)
        return
    is_held = tolerance < sys.float_info.max  # else only a crash counts
    notes = [*([f"tolerance {tolerance:.0e}"] if is_held else []), *([found.crash] if found.crash else [])]
    if found.padded > tolerance:
        notes.append(f"padding alone changes the model's own logits by {found.padded:.1e}")
    logger.warning(
        "against the model's own logits, on one pair in %s, %s%s: %s. Please report the model: %s",
        dtype,
        differences,
        f" ({'; '.join(notes)})" if notes else "",
        " and ".join(instead),
        type(model).__name__,
    )
