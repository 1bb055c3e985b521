"""The shared-prompt pass: the k answers to one prompt in one row, so that the prompt is computed once.

Instead of k rows [prompt | answer] there is one row [prompt | answer 1 | … | answer k]. Positions go on from the
prompt's end for every answer, and a mask hides the answers from each other: each token sees what it sees in a row of
its own, so log-probabilities and gradients are those of the standard pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import trl.trainer.utils
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .answer_positions import causal_model, decoder, only_positions
from .shared_rows import SharedRows
from .standard import TokenLogps, logit_scores

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names for kinds of layers
SCORED = {  # of each token: our name, TRL's
    "logps": "log_probs",
    "mean_logit": "mean_logits",
    "entropy": "entropy",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_sq_probs",
}


def attention_masks(model: nn.Module, rows: SharedRows) -> dict[str, Any]:
    """What each kind of layer sees: a bool mask for eager and sdpa, blocks for flex_attention.

    Args:
        model: a causal model.
        rows: on the model's device.
    """
    model = causal_model(model)
    config = model.config.get_text_config()
    attention = config._attn_implementation
    # transformers' own function
    in_format = ALL_MASK_ATTENTION_FUNCTIONS["sdpa" if attention == "eager" else attention]
    batch, size = rows["start"].shape

    def mask(kind: str) -> Any:
        return in_format(
            batch_size=batch,
            q_length=size,
            kv_length=size,
            mask_function=_visible(rows, config.sliding_window if kind == SLIDING else None),
            allow_is_causal_skip=False,
            config=config,
            device=rows["start"].device,
        )

    return {kind: mask(kind) for kind in sorted(layer_kinds(config))}


def _additive(decoder: nn.Module, mask: Any) -> Any:
    """The mask in the type in which the decoder computes. Of a bool mask, or one of another type, sdpa makes such a
    mask in every layer, and keeps each for the way back.
    """
    if not isinstance(mask, Tensor):
        return mask
    kind = mask.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = decoder.get_input_embeddings().weight.dtype
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def layer_kinds(config: Any) -> set[str]:
    """The config's `layer_types`; one kind for all where it has none, as transformers reads it."""
    kinds = getattr(config, "layer_types", None)
    return set(kinds or [FULL if getattr(config, "sliding_window", None) is None else SLIDING])


def _visible(rows: SharedRows, window: int | None) -> Callable[..., Tensor]:
    """Whether a query sees a key: an earlier token of its prompt or of its own answer, inside the window.

    Columns are compared with bounds that each query has, so that nothing wider than a bool has the mask's size.
    Padding sees padding: a query that sees nothing would be NaN in some attention kernels.
    """
    column = torch.arange(rows["start"].size(1), device=rows["start"].device)
    start, first_shared, position = rows["start"], rows["prompt_start"], rows["position_ids"]
    # what comes before an answer's own tokens is shared; before a shared token nothing else is
    end_shared = first_shared + position - (column - start)
    if window is not None:
        # positions restart with every answer: from a shared token to an answer's it is not as far as the columns say
        first_shared = first_shared + (position - window + 1).clamp(min=0)
        start = torch.maximum(start, column - window + 1)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shared = (key >= first_shared[row, query]) & (key < end_shared[row, query])
        return (shared | (key >= start[row, query])) & (key <= query)

    return visible


@contextmanager
def _masked(model: nn.Module, masks: dict[str, Any]) -> Iterator[None]:
    """While open, the decoder attends through `masks`, whatever `attention_mask` the model was called with.

    Past it, a mixture of experts counts tokens by `attention_mask`, for which it has to be [B, S].
    """

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # here, because only within the model is its autocast on
        mask = {kind: _additive(module, mask) for kind, mask in masks.items()}
        return args, {**kwargs, "attention_mask": mask if len(mask) > 1 else next(iter(mask.values()))}

    handle = decoder(model).register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _every_position() -> Iterator[None]:
    """While open, TRL's head scores every position that it is given, as it does on devices without Triton: looking for
    the labels that are not −100 makes a GPU wait four times, and here all are none.
    """
    with patch.object(trl.trainer.utils, "_use_triton", lambda device: False):
        yield


def shared_token_logps(
    model: nn.Module,
    rows: SharedRows,
    fused: bool = True,
    call: Callable[..., Any] | None = None,
    statistics: bool = False,
    **inputs: Any,
) -> TokenLogps:
    """Tokens' log-probabilities, [k·B, A]: what the standard pass gives, without the positions between.

    Args:
        model: a causal model for which `why_not_shared` has nothing to say; with TRL's fused head if `fused`.
        rows: from `shared_rows`, on the model's device.
        fused: through TRL's head; otherwise through the model's own logits, which forward-mode differentiation needs.
        call: calls the model, where it is not to be called directly (`functional_call` with other parameters, say).
        statistics: of the model's own logits too, all that TRL's head gives, not the mean logit alone.
        inputs: what else the model's forward takes, `output_router_logits` for one.
    """
    label, is_answer = rows["label"], rows["is_answer"]
    inputs |= {
        "input_ids": rows["input_ids"],
        "position_ids": rows["position_ids"],
        "attention_mask": rows["count"],  # the load-balancing loss weighs tokens by it
        "use_cache": False,
    }
    if fused:
        inputs |= {"shift_labels": label[None], "fused_lm_head": True}
    with _masked(model, attention_masks(model, rows)), _every_position(), only_positions(model, rows["source"]):
        outputs = (call or model)(**inputs)

    if fused:
        scores = {ours: outputs.get(theirs) for ours, theirs in SCORED.items()}
    else:
        scores = logit_scores(outputs.logits, label[None], statistics)

    def in_rows(values: Tensor | None) -> Tensor | None:
        """[1, N] to [k·B, A]."""
        if values is None:
            return None
        return values.new_zeros(is_answer.shape).index_put((rows["row"], rows["place"]), values[0])

    return TokenLogps(
        **{name: in_rows(values) for name, values in scores.items()},
        is_answer=is_answer,
        aux_loss=outputs.get("aux_loss"),
    )
