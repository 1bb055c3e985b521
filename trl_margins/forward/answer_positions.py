"""The LM head on answer positions only: the other hidden states never reach it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    # not accelerate's `is_peft_model`, which looks for the installed package every time: milliseconds of each pass
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder(model: nn.Module) -> nn.Module:
    """What turns token ids into the hidden states that the LM head projects, fused or not.

    Mostly it is `base_model`, whose output TRL's fused head takes. Models of OPT's kind have a decoder inside that,
    and their own forward calls the decoder directly.
    """
    return causal_model(model).get_decoder()


@contextmanager
def only_positions(model: nn.Module, index: Tensor) -> Iterator[None]:
    """While open, the decoder's `last_hidden_state` [B, S, H] is its rows at `index`, as [1, N, H].

    So `model(...).logits` is [1, N, vocabulary], and TRL's fused head takes `shift_labels` [1, N]. Everything else
    that the decoder returns (router logits, say) stays whole.

    Args:
        model: a causal model, wrapped or not.
        index: [N] positions in the flattened [B · S].
    """

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, index)[None]
        return output

    handle = decoder(model).register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
