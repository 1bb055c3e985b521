"""Whether quicker ways to log-probabilities give what the model's own logits give: tried on a prompt's answers."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .precision import float32_layer_by_layer, ieee_float32, why_not_float32
from .shared_prompt import shared_token_logps
from .shared_rows import shared_rows, width_step
from .standard import IGNORE, TokenLogps, fused_token_logps, logits_token_logps, token_nll

logger = logging.getLogger(__name__)

# By the type that the passes are compared in: how far an answer's tokens may be from the model's own, in nats, on
# average. In 16 bits healthy passes differ by 0.01, and a token at a wrong position by 0.02: those are compared in
# float32 wherever that can be done.
TOLERANCE = {None: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
_MOST_LOGITS = 2**28  # of one row: 1 GiB in float32
_WITHOUT_FLOAT32 = ("flash", "sage")  # attention kernels of 16 bits


@dataclass(frozen=True)
class Ways:
    """How log-probabilities of a model may be computed: each is as good as the model's own logits."""

    fused: bool  # through TRL's fused LM head
    shared: bool  # a prompt once for all its answers


@torch.no_grad()
def checked_ways(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    ways: Ways,
    k: int = 2,
    dtype: torch.dtype | None = None,
    of_all_ranks: Callable[[Tensor], Tensor] = lambda values: values,
) -> Ways:
    """Those of `ways` that give the model's own log-probabilities: `model(input_ids, attention_mask).logits` of each
    row alone, without padding. What is left out is said in a warning, with the numbers; the model's own way remains.

    The k answers to one prompt are compared. In float32, to 1e-4 nats: a model of 16 bits is widened for it, one layer
    at a time. Where that cannot be (quantized or sharded weights, flash attention), in the model's own type, in which
    only gross errors show.

    Args:
        model: a causal model, in evaluation mode; with TRL's fused head, where that is one of the ways.
        input_ids: [k·B, T] standard rows, on any device.
        attention_mask: [k·B, T] 0 where padded.
        labels: [k·B, T] −100 where a token is not part of an answer.
        ways: what is possible.
        k: answers per prompt.
        dtype: the 16-bit type that the model computes in; None for float32.
        of_all_ranks: from this rank's values [n] to the largest ones of all ranks. Every rank calls it equally often,
            whatever becomes of its own passes.
    """
    rows = one_prompt(model, input_ids, attention_mask, labels, k)
    compared, unknown = False, ""
    for precision, of_type, tolerance in _rounds(model, dtype):
        try:
            with precision():
                differences = differences_from_own(model, rows, ways, tolerance, of_all_ranks)
        except OwnFailsError as error:
            unknown = f"which fail: {error}"
            continue
        if not differences.n_tokens:
            unknown = "since the pair has no completion tokens"
            continue
        right = Ways(ways.fused and differences.fused <= tolerance, ways.shared and differences.shared <= tolerance)
        if right != ways or not compared:
            _tell(model, ways, right, differences, of_type, tolerance)
        ways, compared = right, True
    if not compared:
        logger.warning("log-probabilities are not compared with the model's own logits, %s", unknown)
    return ways


def _rounds(
    model: nn.Module, dtype: torch.dtype | None
) -> list[tuple[Callable[[], AbstractContextManager], torch.dtype | None, float]]:
    """Contexts to compare in, the types that passes then have (None for float32), and what differences are allowed."""
    if dtype is None:
        return [(ieee_float32, None, TOLERANCE[None])]
    attention = model.config.get_text_config()._attn_implementation or ""
    if why_not_float32(model) or any(name in attention for name in _WITHOUT_FLOAT32):
        return [(nullcontext, dtype, TOLERANCE[dtype])]
    # then as it will compute: that it does
    return [
        (lambda: float32_layer_by_layer(model), None, TOLERANCE[None]),
        (nullcontext, dtype, sys.float_info.max),
    ]


class OwnFailsError(Exception):
    """The model's own logits cannot be computed."""


@dataclass
class Differences:
    """From the model's own values, in nats per token, the largest of all ranks; infinite for a crash."""

    n_tokens: int = 0  # that are compared; with none of them, the differences are 0 and say nothing
    fused: float = 0.0
    shared: float = 0.0
    padded: float = 0.0  # the model's own logits, of rows with padding
    crash: str = ""


def differences_from_own(
    model: nn.Module,
    rows: tuple[Tensor, Tensor, Tensor],
    ways: Ways,
    tolerance: float = TOLERANCE[None],
    of_all_ranks: Callable[[Tensor], Tensor] = lambda values: values,
) -> Differences:
    """How far these ways are from the model's own logits, on the answers to one prompt. The shared pass goes through
    the fused head only where that is within the tolerance.

    What one pass gives decides on the next, and a pass of a sharded model is of all ranks: they agree after each.

    Raises:
        OwnFailsError: the model's own logits fail, on this rank or another.
    """
    ids, mask, labels = rows
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def largest(*values: float) -> list[float]:
        return of_all_ranks(torch.tensor(values, device=device)).tolist()

    own: list[Tensor] = []
    failure = None
    try:
        own = [_own(model, *(values[i].to(device) for values in rows)) for i in range(len(ids))]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure = error
    fails, n_tokens = largest(failure is not None, sum(map(len, own)))
    if fails:
        raise OwnFailsError(f"{type(failure).__name__}: {failure}" if failure else "on another rank") from failure
    found = Differences(n_tokens=int(n_tokens))

    def compared(*passes: Callable[[], TokenLogps]) -> float:
        difference = 0.0
        for each in passes:
            try:
                difference = max(difference, _largest(each(), own))
            except torch.OutOfMemoryError:
                raise
            # whatever a class of models does to a pass that it was not made for: it is not used
            except Exception as error:
                found.crash = found.crash or f"{type(error).__name__}: {error}".split("\n")[0]
                difference = math.inf
        return largest(difference)[0]

    if ways.fused:
        found.fused = compared(lambda: fused_token_logps(model, inputs, labels.to(device)))
    fused = ways.fused and found.fused <= tolerance
    if not fused:
        found.padded = compared(lambda: logits_token_logps(model, inputs, labels.to(device)))
    if ways.shared:
        # the prompt twice in one row: what it must not see is there
        twice = shared_rows(
            *(values.cpu().repeat_interleave(2, dim=0) for values in rows),
            k=len(ids),
            balance=math.inf,
            step=width_step(device),
        )
        twice = {name: value.to(device) for name, value in twice.items()}
        own = [values for values in own for _ in range(2)]
        # few logits are built even where there is a fused head
        heads = (True, False) if fused else (False,)
        found.shared = compared(*(partial(shared_token_logps, model, twice, fused=head) for head in heads))
    return found


def _own(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """[A] log-probabilities of one row's answer tokens."""
    real = mask.bool()
    ids, labels = ids[real][None], labels[real][None, 1:]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    # virtual tokens come before the real ones
    return -token_nll(logits[:, -ids.size(1) : -1], labels)[labels != IGNORE]


def _largest(tokens: TokenLogps, own: list[Tensor]) -> float:
    largest = 0.0
    for logps, is_answer, right in zip(tokens.logps, tokens.is_answer, own, strict=True):
        found = logps[is_answer]
        if len(right):
            difference = (found.float() - right.float()).abs()
            # a model that gives no numbers gives none in any way
            difference = difference.masked_fill(~found.isfinite() & ~right.isfinite(), 0.0).mean()
            largest = max(largest, difference.nan_to_num(nan=math.inf).item())
    return largest


def one_prompt(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the prompt most of whose answers have tokens; of those, the longest whose logits are no burden, else
    the shortest.
    """
    rows = tuple(values.view(k, -1, values.size(-1)) for values in (input_ids, attention_mask, labels))
    lengths = (rows[1] != 0).sum(2).amax(0).tolist()
    answers = (rows[2][..., 1:] != IGNORE).any(2).sum(0).tolist()  # the first token of a row has no prediction
    most = _MOST_LOGITS // model.config.get_text_config().vocab_size
    i = max(range(len(lengths)), key=lambda i: (answers[i], lengths[i] if lengths[i] <= most else -lengths[i]))
    ids, mask, labels = (values[:, i] for values in rows)
    used = (mask != 0).any(0)
    return ids[:, used], mask[:, used], labels[:, used]


def _tell(
    model: nn.Module,
    ways: Ways,
    right: Ways,
    differences: Differences,
    compared: torch.dtype | None,
    tolerance: float,
) -> None:
    names = {
        "TRL's fused LM head": ("fused", differences.fused),
        "the shared-prompt pass": ("shared", differences.shared),
    }
    tried = {name: value for name, (way, value) in names.items() if getattr(ways, way)}
    wrong = {name: value for name, value in tried.items() if not getattr(right, names[name][0])}
    compared_in = str(compared or torch.float32).removeprefix("torch.")
    if not wrong:
        logger.info("log-probabilities are the model's own: on one pair in %s %s", compared_in, _said(tried))
        return
    instead = []
    if ways.fused and not right.fused:
        instead.append("log-probabilities come from the whole logits")
    if ways.shared and not right.shared:
        instead.append("prompts are computed once for each answer")
    notes = [f"tolerance {tolerance:.0e}"]
    if differences.crash:
        notes.append(differences.crash)
    if differences.padded > tolerance:
        notes.append(f"padding alone changes the model's own logits by {differences.padded:.1e}")
    logger.warning(
        "against the model's own logits, on one pair in %s, %s (%s): %s. Please report the model: %s",
        compared_in,
        _said(wrong),
        "; ".join(notes),
        " and ".join(instead),
        type(model).__name__,
    )


def _said(differences: dict[str, float]) -> str:
    each = [
        f"{name} fails" if value == math.inf else f"{name} differs by {value:.1e} nats per token"
        for name, value in differences.items()
    ]
    return " and ".join(each)
