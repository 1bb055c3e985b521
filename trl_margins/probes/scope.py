"""Which parameters train, and which of them a probe moves: chosen by their names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from accelerate.utils import is_peft_model
from torch import nn

from ..checks import expression_of
from ..forward.head import causal_model
from ..zero3 import n_elements

logger = logging.getLogger(__name__)

LM_HEAD = "lm-head"
# Feed-forward layers as named in Llama, Qwen, Mistral, Gemma, Phi, GPT-2 and GPT-NeoX ("mlp"), Mixtral, OPT and T5;
# never the norms beside them
MLP = r"(^|\.)(mlp|feed_forward|ffn|block_sparse_moe|DenseReluDense|fc1|fc2)\.(?!.*norm)"


def check_one_choice(train_only: Sequence[str] | None, has_adapter: bool) -> None:
    """
    Raises:
        ValueError: two options say what trains.
    """
    if train_only and has_adapter:
        raise ValueError("train_only and peft_config both choose what trains: give one of them")


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes every parameter whose name matches none of `patterns`, and logs how many train.

    Args:
        model: a model without adapters.
        patterns: regular expressions, searched in the parameters' names; "mlp" stands for the feed-forward layers.

    Raises:
        ValueError: a pattern that matches nothing, or is not a regular expression; or a model with adapters.
    """
    if is_peft_model(model):
        raise ValueError(
            "train_only and the model's adapters both choose what trains: leave train_only out, or merge the adapters "
            "first (model.merge_and_unload())"
        )
    parameters = dict(model.named_parameters())
    trained = _matching(list(parameters), patterns, "train_only")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    sizes = {name: n_elements(p) for name, p in parameters.items()}
    in_training, total = (sum(sizes[name] for name in names) for names in (trained, parameters))
    logger.info(
        "train_only=%s: %d of %d parameters train (%.1f %%), in %d of %d tensors",
        list(patterns),
        in_training,
        total,
        100 * in_training / total,
        len(trained),
        len(parameters),
    )


def parameters_in_scope(model: nn.Module, scope: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The trained parameters that a probe moves, by name.

    Args:
        model: the model, without wrappers.
        scope: "lm-head" and regular expressions searched in the parameters' names; None for all.

    Raises:
        ValueError: nothing in it trains.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if scope is None:
        return trained
    patterns = [pattern for pattern in scope if pattern != LM_HEAD]
    chosen = _matching([name for name, _ in model.named_parameters()], patterns, "anchor_scope")
    if LM_HEAD in scope and (head := causal_model(model).get_output_embeddings()) is not None:
        # by identity: a tied head has the name of its embedding
        of_head = {id(parameter) for parameter in head.parameters()}
        chosen |= {name for name, parameter in trained.items() if id(parameter) in of_head}
    if not chosen & trained.keys():
        names = f"{', '.join(trained):.300}"
        raise ValueError(f"anchor_scope={list(scope)} holds none of the {len(trained)} tensors that train: {names}")
    return {name: parameter for name, parameter in trained.items() if name in chosen}


def _matching(names: Sequence[str], patterns: Sequence[str], option: str) -> set[str]:
    """The names that match one of the patterns; `option` is what an error calls their source."""
    matched: set[str] = set()
    for pattern in patterns:
        expression = expression_of(option, MLP if pattern == "mlp" else pattern)
        found = {name for name in names if expression.search(name)}
        if not found:
            raise ValueError(
                f"{option} pattern {pattern!r} matches none of the {len(names)} parameters; "
                f"their names look like {', '.join(names[:3])}, {names[-1]}"
            )
        matched |= found
    return matched
