"""The shared-prompt pass: the k answers to one prompt in one row, so that the prompt is computed once.

Instead of k rows [prompt | answer] there is one row [prompt | answer 1 | … | answer k]. Positions go on from the
prompt's end for every answer, and a mask hides the answers from each other: each token sees what it sees in a row of
its own, so log-probabilities and gradients are those of the standard pass.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .answer_positions import causal_model, decoder, only_positions
from .standard import IGNORE, TokenLogps

SHARED, PADDING = 0, -1  # segments; answers are 1 … k
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names for kinds of layers
SCORED = {  # of each token: our name, TRL's
    "logps": "log_probs",
    "mean_logit": "mean_logits",
    "entropy": "entropy",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_sq_probs",
}


class SharedRows(TypedDict):
    """B prompts with k answers each, as tensors alone, so that a batch carries it to the device.

    Standard row j·B + i is answer j of prompt i. N is the number of answer tokens that have a prediction; a batch
    without any has N = 1 and the label −100, so that the pass still reaches every parameter.
    """

    input_ids: Tensor  # [B, S] padded on the right
    position_ids: Tensor  # [B, S] place in the standard row without its padding
    segment: Tensor  # [B, S] 0 shared, 1 … k answers, −1 padding
    source: Tensor  # [N] where in the flattened [B · S] the token is predicted
    label: Tensor  # [N] the token
    row: Tensor  # [N] its standard row
    place: Tensor  # [N] its place among the row's answer tokens, from 0
    is_answer: Tensor  # [k·B, A] bool, place < the row's number of answer tokens; A is the largest such number


# The layout: on the CPU, in the collator


def shared_rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, k: int = 2) -> SharedRows:
    """Lays k rows per prompt out as one.

    What the k rows begin with alike is shared, as far as no row has an answer token there. The rest of each row is a
    segment of its own, part of the prompt included where tokens merge with the answer's or truncation cut it.

    Args:
        input_ids: [k·B, T] standard rows, padded on either side.
        attention_mask: [k·B, T] 0 where padded.
        labels: [k·B, T] token ids, −100 where a token is not part of an answer.
        k: answers per prompt.
    """
    rows, width = input_ids.shape
    ids, labels, length = _without_padding(input_ids, attention_mask, labels)
    at = torch.arange(width)

    per_answer = ids.view(k, -1, width), labels.view(k, -1, width), length.view(k, -1)
    shared = _shared_length(*per_answer)
    own = per_answer[2] - shared
    begin = shared + own.cumsum(0) - own  # [k, B] where answer j's segment begins
    total = shared + own.sum(0)

    in_prompt = at < shared[:, None]
    target = torch.where(in_prompt, at, at + (begin - shared)[..., None])  # [k, B, T] column in the shared row
    size = max(int(total.max()), 1)
    target = (target + torch.arange(len(shared))[:, None] * size).view(rows, width)
    real = at < length[:, None]
    segment = torch.arange(1, k + 1)[:, None, None].masked_fill(in_prompt, SHARED).view(rows, width)

    def laid_out(values: Tensor, padding: int) -> Tensor:
        # the k copies of a shared token fall on one another
        flat = values.new_full((len(shared) * size,), padding)
        return flat.index_put_((target[real],), values.expand(rows, width)[real]).view(-1, size)

    # the first token of a row is predicted by nothing, as in the standard pass
    predicted = real & (labels != IGNORE) & (at > 0)
    count = predicted.sum(1)
    row, column = predicted.nonzero(as_tuple=True)
    place = (predicted.cumsum(1) - 1)[row, column]
    source, label = target[row, column - 1], labels[row, column]
    if not len(row):
        row = place = source = torch.zeros(1, dtype=torch.long)
        label = torch.full((1,), IGNORE)
    return SharedRows(
        input_ids=laid_out(ids, 0),
        position_ids=laid_out(at, 0),
        segment=laid_out(segment, PADDING),
        source=source,
        label=label,
        row=row,
        place=place,
        is_answer=torch.arange(max(int(count.max()), 1)) < count[:, None],
    )


def _without_padding(ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows moved to the left edge, and their lengths."""
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), labels.gather(1, order), (mask != 0).sum(1)


def _shared_length(ids: Tensor, labels: Tensor, length: Tensor) -> Tensor:
    """[B] how many tokens the k rows of a prompt begin with alike, before any row's first answer token."""
    alike = (ids == ids[0]).all(0) & (labels == IGNORE).all(0)
    alike &= torch.arange(ids.size(-1)) < length.amin(0)[:, None]
    return alike.long().cumprod(1).sum(1)


# The mask: on the device


def attention_masks(model: nn.Module, segment: Tensor, position_ids: Tensor) -> Any:
    """What the decoder takes as `attention_mask`: a mask in its attention's format, or one per kind of layer.

    Args:
        model: a causal model.
        segment: [B, S]
        position_ids: [B, S]
    """
    model = causal_model(model)
    config = model.config.get_text_config()
    # transformers' own function for this attention: bool for sdpa, additive for eager, blocks for flex_attention
    in_format = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    batch, size = segment.shape

    def mask(kind: str) -> Any:
        return in_format(
            batch_size=batch,
            q_length=size,
            kv_length=size,
            mask_function=_visible(segment, position_ids, config.sliding_window if kind == SLIDING else None),
            allow_is_causal_skip=False,
            dtype=model.get_input_embeddings().weight.dtype,
            config=config,
            device=segment.device,
        )

    masks = {kind: mask(kind) for kind in sorted(_layer_kinds(config))}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _layer_kinds(config: Any) -> set[str]:
    """The config's `layer_types`; one kind for all where it has none, as transformers reads it."""
    kinds = getattr(config, "layer_types", None)
    return set(kinds or [FULL if getattr(config, "sliding_window", None) is None else SLIDING])


def _visible(segment: Tensor, position_ids: Tensor, window: int | None) -> Callable[..., Tensor]:
    """Whether a query sees a key: an earlier token of the prompt or of its own answer, inside the window.

    Padding sees the prompt and padding. A query that sees nothing would be NaN in some attention kernels.
    """

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        theirs = segment[row, key]
        seen = (key <= query) & ((theirs == SHARED) | (theirs == segment[row, query]))
        if window is None:
            return seen
        # positions restart with every answer, so their difference is the distance within prompt and answer
        return seen & (position_ids[row, query] - position_ids[row, key] < window)

    return visible


@contextmanager
def _masked(model: nn.Module, mask: Any) -> Iterator[None]:
    """While open, the decoder attends through `mask`, whatever `attention_mask` the model was called with.

    Past it, a mixture of experts counts tokens by `attention_mask`, for which it has to be [B, S].
    """

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    handle = decoder(model).register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# The pass


def shared_token_logps(
    model: nn.Module, rows: SharedRows, fused: bool = True, call: Callable[..., Any] | None = None, **inputs: Any
) -> TokenLogps:
    """Tokens' log-probabilities, [k·B, A]: what the standard pass gives, without the positions between.

    Args:
        model: a causal model for which `why_not_shared` has nothing to say; with TRL's fused head if `fused`.
        rows: from `shared_rows`, on the model's device.
        fused: through TRL's head; otherwise through the model's own logits, which forward-mode differentiation needs.
        call: calls the model, where it is not to be called directly (`functional_call` with other parameters, say).
        inputs: what else the model's forward takes, `output_router_logits` for one.
    """
    segment, label, is_answer = rows["segment"], rows["label"], rows["is_answer"]
    k = is_answer.size(0) // segment.size(0)
    inputs |= {
        "input_ids": rows["input_ids"],
        "position_ids": rows["position_ids"],
        # how many standard rows have the token: the load-balancing loss weighs tokens by it
        "attention_mask": torch.where(segment == SHARED, k, (segment != PADDING).long()),
        "use_cache": False,
    }
    if fused:
        inputs |= {"shift_labels": label[None], "fused_lm_head": True}
    mask = attention_masks(model, segment, rows["position_ids"])
    with _masked(model, mask), only_positions(model, rows["source"]):
        outputs = (call or model)(**inputs)

    if fused:
        scores = {ours: outputs.get(theirs) for ours, theirs in SCORED.items()}
    else:
        logits = outputs.logits if outputs.logits.dtype.itemsize >= 4 else outputs.logits.float()
        nll = F.cross_entropy(logits[0], label, ignore_index=IGNORE, reduction="none")
        scores = {"logps": -nll[None], "mean_logit": logits.detach().mean(-1) * (label != IGNORE)}

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


# Which models


def why_not_shared(model: nn.Module) -> str | None:
    """What keeps this model from taking several answers in one row; None where nothing does.

    The model has to look where a 4D mask lets it and nowhere else, and to place tokens by `position_ids` alone.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if is_peft_model(model) and any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
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
    if others := _layer_kinds(config) - {FULL, SLIDING}:
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
        name for kind, name in of_masks.items() if kind in _layer_kinds(config) and not hasattr(module, name)
    ]:
        return f"masks of the model's own, not of transformers' {missing[0]}"
    if not all(getattr(part, "is_causal", True) for part in decoder.modules()):
        return "attention to later tokens"
    return None
