"""Which models can take several answers to a prompt in one row."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn

from .answer_positions import causal_model, decoder
from .shared_prompt import FULL, SLIDING, layer_kinds


def why_not_shared(model: nn.Module) -> str | None:
    """What keeps this model from taking several answers in one row; None where nothing does.

    The model has to look where a 4D mask lets it and nowhere else, and to place tokens by `position_ids` alone.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, PeftModel) and any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
        return "an adapter that puts virtual tokens in front of the row"
    model = causal_model(model)
    config = model.config
    if config.is_encoder_decoder:
        return "an encoder-decoder model"
    text = config.get_text_config()
    if text is not config or hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return "a model of more than text, whose positions and masks depend on its other inputs"
    attention = text._attn_implementation
    if attention not in ("eager", "sdpa", "flex_attention"):
        return f"attn_implementation={attention!r}, whose kernels take no such mask: load the model with 'sdpa'"
    inner = decoder(model)
    if inner is model:
        return "no decoder that stands apart from its LM head"
    return _why_not_layers(text) or _why_not_decoder(inner, text)


def _why_not_layers(config: Any) -> str | None:
    if others := layer_kinds(config) - {FULL, SLIDING}:
        return f"layers that a mask does not reach: {', '.join(sorted(others))}"
    if getattr(config, "attention_chunk_size", None):
        return "attention in chunks of absolute positions"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "a window that the model keeps to itself"
    if getattr(config, "alibi", False):
        return "ALiBi, which takes distances from places in the row"
    return None


def _why_not_decoder(decoder: nn.Module, config: Any) -> str | None:
    if getattr(decoder, "_is_stateful", False):
        return "recurrent layers, which read the row from left to right whatever the mask"
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return "a forward without position_ids"
    # a model that builds its masks by transformers' functions takes one that is already built
    of_masks = {FULL: "create_causal_mask", SLIDING: "create_sliding_window_causal_mask"}
    module = sys.modules[type(decoder).__module__]
    if missing := [
        name for kind, name in of_masks.items() if kind in layer_kinds(config) and not hasattr(module, name)
    ]:
        return f"masks of the model's own, not of transformers' {missing[0]}"
    if not all(getattr(part, "is_causal", True) for part in decoder.modules()):
        return "attention to later tokens"
    return None
