"""Through which LM head log-probabilities come: TRL's fused one, or the model's own logits."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

_FEW_LOGITS = 2**28  # 1 GiB in float32


def why_not_fused(model: nn.Module) -> str | None:
    """What keeps TRL's fused LM head from this model; None where nothing does."""
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder:
        return "an encoder-decoder model"
    if head is None:
        return "a model without an LM head of its own"
    if isinstance(head, BaseTunerLayer):
        return "an adapter on the LM head"
    return None


def logits_will_do(model: nn.Module, labels: Tensor) -> bool:
    """Whether the logits of these tokens are few enough to be built: on a CPU, where the fused head costs time."""
    return labels.is_cpu and labels.numel() * model.config.get_text_config().vocab_size <= _FEW_LOGITS
