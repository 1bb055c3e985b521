"""The LM head: TRL's fused one or the model's own logits, at completion positions only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .standard import IGNORE

FEW_LOGITS = 2**28  # 1 GiB in float32


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    # not accelerate's `is_peft_model`, which searches for the installed package on every call (milliseconds)
    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def merged(model: Any, name: str) -> Any:
    """The model, with its adapter in its weights if it has one.

    Raises:
        ValueError: an adapter that has no part in the weights.
    """
    if not isinstance(model, PeftModel):
        return model
    if not hasattr(type(model.base_model), "merge_and_unload"):
        kind = model.active_peft_config.peft_type.value
        raise ValueError(
            f"{name} is an adapter of the kind {kind}, which cannot be merged into the weights of its base model, as "
            "is needed here: name another model"
        )
    return model.merge_and_unload()


def decoder(model: nn.Module) -> nn.Module:
    """The module whose hidden states the LM head projects.

    For most models this is `base_model`, which TRL's fused head calls. OPT and its relatives nest a decoder inside
    `base_model`, and their own forward calls that decoder directly.
    """
    return causal_model(model).get_decoder()


@contextmanager
def only_positions(model: nn.Module, index: Tensor) -> Iterator[None]:
    """Within the block, the decoder's `last_hidden_state` [B, S, H] is reduced to its rows at `index`, as [1, N, H].

    `model(...).logits` is then [1, N, vocabulary], and TRL's fused head takes `shift_labels` [1, N]. Everything else
    that the decoder returns (router logits, for example) is unchanged.

    Args:
        model: a causal model, wrapped or not.
        index: [N] positions in the flattened [B · S].
    """

    def select(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, index)[None]
        return output

    with decoder(model).register_forward_hook(select):
        yield


class StoppedForward:
    """A forward pass that stops before the LM head; its completion tokens then get the model's own logits, some at a
    time, with whatever the model does to them.

    Args:
        model: any language model that transformers has.
        inputs: what its forward takes.
        labels: [R, T] token ids, −100 where a token is not part of a completion.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> None:
        self._causal, self._decoder, self._inputs = causal_model(model), decoder(model), inputs

        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            self._output, self.hidden = output, output.last_hidden_state
            output.last_hidden_state = self.hidden[:, :1]
            return output

        with self._decoder.register_forward_hook(keep):
            model(**inputs, use_cache=False)
        # prompt-learning adapters put virtual tokens in front of the real ones
        self.hidden = self.hidden[:, -labels.size(1) :]
        if not self._causal.config.is_encoder_decoder:
            self.hidden, labels = self.hidden[:, :-1], labels[:, 1:]
        self.is_completion = labels != IGNORE  # [R, T]
        self.hidden, self.labels = self.hidden[self.is_completion], labels[self.is_completion]  # [N, H], [N]

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """[N, vocabulary] of hidden states [N, H]; `weight` takes the place of the head's, not of tied embeddings."""
        self._output.last_hidden_state = hidden[None]
        weights = {} if weight is None else {self._weight_name: weight}
        with patch.object(self._decoder, "forward", lambda *args, **kwargs: self._output):
            return functional_call(self._causal, weights, kwargs=dict(self._inputs), tie_weights=False).logits[0]

    @property
    def _weight_name(self) -> str:
        head = self._causal.get_output_embeddings()
        return next(f"{name}.weight" for name, module in self._causal.named_modules() if module is head)


def why_not_fused(model: nn.Module) -> str | None:
    """Why TRL's fused LM head does not work with this model; None if it does."""
    causal = causal_model(model)
    head = causal.get_output_embeddings()
    if causal.config.is_encoder_decoder:
        return "an encoder-decoder model"
    if head is None:
        return "a model without an LM head of its own"
    if isinstance(head, BaseTunerLayer):
        return "an adapter on the LM head"
    return None


def logits_will_do(model: nn.Module, labels: Tensor) -> bool:
    """Whether the logits of these tokens are cheap to build: on a CPU, where the fused head costs time."""
    return labels.is_cpu and labels.numel() * causal_model(model).config.get_text_config().vocab_size <= FEW_LOGITS
