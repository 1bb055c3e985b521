"""The shared-prompt forward pass: the k completions of one prompt in one row, so that the prompt is computed once.

Instead of k rows [prompt | completion] there is one row [prompt | completion 1 | … | completion k]. Positions go on
from the prompt's end for every completion, and a mask hides the completions from each other: each token sees what it
sees in a row of its own, so log-probabilities and gradients are those of the standard forward pass.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
import trl.trainer.utils
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .head import causal_model, decoder, only_positions
from .shared_rows import SharedRows
from .standard import TokenLogps, fused_scores, logit_scores

_FULL, _SLIDING = "full_attention", "sliding_attention"  # transformers' names for kinds of layers


def shared_token_logps(
    model: nn.Module, rows: SharedRows, fused: bool = True, statistics: bool = False, **inputs: Any
) -> TokenLogps:
    """Tokens' log-probabilities [k·B, A]: those of the standard forward pass, without the positions in between.

    Args:
        model: a causal model for which `why_not_shared` returns None; with TRL's fused head if `fused`.
        rows: from `shared_rows`, on the model's device.
        fused: use TRL's fused head rather than the model's own logits.
        statistics: with the model's own logits, compute all that TRL's head gives, not just the mean logit.
        inputs: whatever else the model's forward takes, `output_router_logits` for example.
    """
    label, is_completion = rows["label"], rows["is_completion"]
    inputs |= {
        "input_ids": rows["input_ids"],
        "position_ids": rows["position_ids"],
        "attention_mask": rows["count"],  # the load-balancing loss weighs tokens by it
        "use_cache": False,
    }
    if fused:
        inputs |= {"shift_labels": label[None], "fused_lm_head": True}
    # with Triton, TRL's head would look for labels of −100, of which there are none, and make a GPU wait four times
    scores_all = patch.object(trl.trainer.utils, "_use_triton", lambda device: False)
    with _masked(model, attention_masks(model, rows)), scores_all, only_positions(model, rows["source"]):
        outputs = model(**inputs)
    scores = fused_scores(outputs) if fused else logit_scores(outputs.logits, label[None], statistics)
    place = rows["row"], rows["place"]
    return TokenLogps(
        **{name: values.new_zeros(is_completion.shape).index_put(place, values[0]) for name, values in scores.items()},
        is_completion=is_completion,
        aux_loss=outputs.get("aux_loss"),
    )


def attention_masks(model: nn.Module, rows: SharedRows) -> dict[str, Any]:
    """What each kind of layer sees: a bool mask for eager and sdpa, blocks for flex_attention.

    Args:
        model: a causal model.
        rows: on the model's device.
    """
    config = causal_model(model).config.get_text_config()
    attention = config._attn_implementation
    make = ALL_MASK_ATTENTION_FUNCTIONS["sdpa" if attention == "eager" else attention]
    batch, size = rows["start"].shape
    return {
        kind: make(
            batch_size=batch,
            q_length=size,
            kv_length=size,
            mask_function=_visible(rows, config.sliding_window if kind == _SLIDING else None),
            allow_is_causal_skip=False,
            config=config,
            device=rows["start"].device,
        )
        for kind in sorted(_layer_kinds(config))
    }


def _visible(rows: SharedRows, sliding_window: int | None) -> Callable[..., Tensor]:
    """Whether a query sees a key: an earlier token of its prompt or of its own completion, inside the sliding window.

    Columns are compared with bounds that each query has, so that nothing wider than a bool has the mask's size.
    Padding sees padding: a query that sees nothing would be NaN in some attention kernels.
    """
    column = torch.arange(rows["start"].size(1), device=rows["start"].device)
    start, first_shared, position = rows["start"], rows["prompt_start"], rows["position_ids"]
    # everything before a completion's own tokens is shared; before a shared token there is nothing else
    end_shared = first_shared + position - (column - start)
    if sliding_window is not None:
        # positions restart with every completion: the distance from it to a shared token is less than the columns say
        first_shared = first_shared + (position - sliding_window + 1).clamp(min=0)
        start = torch.maximum(start, column - sliding_window + 1)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shared = (key >= first_shared[row, query]) & (key < end_shared[row, query])
        return (shared | (key >= start[row, query])) & (key <= query)

    return visible


@contextmanager
def _masked(model: nn.Module, masks: Mapping[str, Any]) -> Iterator[None]:
    """Within the block the decoder attends through `masks`, whatever `attention_mask` the model was called with.

    A mixture of experts still counts tokens by that `attention_mask`, which has to be [B, S] for it.
    """

    def give(module: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # here, because only within the model is its autocast on
        mask = {kind: _additive(module, mask) for kind, mask in masks.items()}
        return args, {**kwargs, "attention_mask": mask if len(mask) > 1 else next(iter(mask.values()))}

    with decoder(model).register_forward_pre_hook(give, with_kwargs=True):
        yield


def _additive(decoder: PreTrainedModel, mask: Any) -> Any:
    """The mask in the dtype in which the decoder computes. Given a bool mask, or another dtype, sdpa makes such a mask
    in every layer, and keeps each for the backward pass.
    """
    if not isinstance(mask, Tensor):
        return mask
    kind = mask.device.type
    # asking first whether the device has autocast would break dynamo's graph here before torch 2.13
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = cast("Tensor", decoder.get_input_embeddings().weight).dtype
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def why_not_shared(model: nn.Module) -> str | None:
    """Why this model cannot take several completions in one row; None if it can.

    The model has to attend where a 4D mask lets it and nowhere else, and to place tokens by `position_ids` alone.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, PeftModel) and any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
        return "an adapter that puts virtual tokens in front of the row"
    causal = causal_model(model)
    config = causal.config
    if config.is_encoder_decoder:
        return "an encoder-decoder model"
    text = config.get_text_config()
    if text is not config or hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return "a model of more than text, whose positions and masks depend on its other inputs"
    attention = text._attn_implementation
    if attention not in ("eager", "sdpa", "flex_attention"):
        return f"attn_implementation={attention!r}, whose kernels take no such mask: load the model with 'sdpa'"
    inner = causal.get_decoder()
    if inner is causal:
        return "no decoder apart from its LM head"
    return _why_not_layers(text) or _why_not_decoder(inner, text)


def _why_not_layers(config: PreTrainedConfig) -> str | None:
    if others := _layer_kinds(config) - {_FULL, _SLIDING}:
        return f"layers that a mask does not reach: {', '.join(sorted(others))}"
    if getattr(config, "attention_chunk_size", None):
        return "attention in chunks of absolute positions"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "a sliding window that its config does not show"
    if getattr(config, "alibi", False):
        return "ALiBi, which takes distances from places in the row"
    return None


def _why_not_decoder(decoder: nn.Module, config: PreTrainedConfig) -> str | None:
    if getattr(decoder, "_is_stateful", False):
        return "recurrent layers, which read the row from left to right whatever the mask"
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return "a forward without position_ids"
    # a model that builds its masks with transformers' functions also takes a mask that is already built
    builders = {_FULL: "create_causal_mask", _SLIDING: "create_sliding_window_causal_mask"}
    module = sys.modules[type(decoder).__module__]
    if missing := [builders[kind] for kind in sorted(_layer_kinds(config)) if not hasattr(module, builders[kind])]:
        return f"masks of the model's own, not of transformers' {missing[0]}"
    if not all(getattr(part, "is_causal", True) for part in decoder.modules()):
        return "attention to later tokens"
    return None


def _layer_kinds(config: PreTrainedConfig) -> set[str]:
    """The config's `layer_types`; one kind for all layers if it has none, as transformers reads it."""
    kinds = getattr(config, "layer_types", None)
    return set(kinds or [_FULL if getattr(config, "sliding_window", None) is None else _SLIDING])
