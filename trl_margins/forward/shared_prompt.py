"""The shared-prompt pass: the k answers to one prompt in one row, so that the prompt is computed once.

Instead of k rows [prompt | answer] there is one row [prompt | answer 1 | … | answer k]. Positions go on from the
prompt's end for every answer, and a mask hides the answers from each other: each token sees what it sees in a row of
its own, so log-probabilities and gradients are those of the standard pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .answer_positions import causal_model, decoder, only_positions
from .shared_rows import SHARED, SharedRows
from .standard import IGNORE, TokenLogps, token_nll

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names for kinds of layers
SCORED = {  # of each token: our name, TRL's
    "logps": "log_probs",
    "mean_logit": "mean_logits",
    "entropy": "entropy",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_sq_probs",
}


def attention_masks(model: nn.Module, rows: SharedRows) -> Any:
    """What the decoder takes as `attention_mask`: a mask in its attention's format, or one per kind of layer.

    Args:
        model: a causal model.
        rows: on the model's device.
    """
    model = causal_model(model)
    config = model.config.get_text_config()
    # transformers' own function for this attention: bool for sdpa, additive for eager, blocks for flex_attention
    in_format = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    batch, size = rows["segment"].shape

    def mask(kind: str) -> Any:
        return in_format(
            batch_size=batch,
            q_length=size,
            kv_length=size,
            mask_function=_visible(rows, config.sliding_window if kind == SLIDING else None),
            allow_is_causal_skip=False,
            dtype=model.get_input_embeddings().weight.dtype,
            config=config,
            device=rows["segment"].device,
        )

    masks = {kind: mask(kind) for kind in sorted(layer_kinds(config))}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def layer_kinds(config: Any) -> set[str]:
    """The config's `layer_types`; one kind for all where it has none, as transformers reads it."""
    kinds = getattr(config, "layer_types", None)
    return set(kinds or [FULL if getattr(config, "sliding_window", None) is None else SLIDING])


def _visible(rows: SharedRows, window: int | None) -> Callable[..., Tensor]:
    """Whether a query sees a key: an earlier token of its prompt or of its own answer, inside the window.

    Padding sees padding: a query that sees nothing would be NaN in some attention kernels.
    """
    prompt, segment, position_ids = rows["prompt"], rows["segment"], rows["position_ids"]

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        theirs = segment[row, key]
        seen = (key <= query) & (prompt[row, key] == prompt[row, query])
        seen &= (theirs == SHARED) | (theirs == segment[row, query])
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
    label, is_answer = rows["label"], rows["is_answer"]
    inputs |= {
        "input_ids": rows["input_ids"],
        "position_ids": rows["position_ids"],
        "attention_mask": rows["count"],  # the load-balancing loss weighs tokens by it
        "use_cache": False,
    }
    if fused:
        inputs |= {"shift_labels": label[None], "fused_lm_head": True}
    mask = attention_masks(model, rows)
    with _masked(model, mask), only_positions(model, rows["source"]):
        outputs = (call or model)(**inputs)

    if fused:
        scores = {ours: outputs.get(theirs) for ours, theirs in SCORED.items()}
    else:
        logits = outputs.logits
        mean_logit = logits.detach().mean(-1) * (label != IGNORE)
        scores = {"logps": -token_nll(logits, label[None]), "mean_logit": mean_logit}

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
