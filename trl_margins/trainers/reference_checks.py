"""The reference model of DPO's reward: is it the model as it was, and does it stay so?"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers.utils.generic import flatten_dict

from ..forward.head import causal_model
from .base import MarginTrainer
from .fingerprints import is_part, moves_base, place_of, some_of
from .model_checks import check_weights, embedding_rows
from .settings import config_of

logger = logging.getLogger(__name__)

_COMPARED = 2048  # values of a weight tensor
_ANOTHER_VOCABULARY = 1.1  # times as many rows: more than padding to a round number, or a few added tokens
_OF_ITS_ROWS = "vocab_size"
_COPY = "pass ref_model=copy.deepcopy(model)"


def check_reference(trainer: MarginTrainer) -> None:
    """Looks at the reference model, if there is one.

    Raises:
        ValueError: it has other tokens, weights that are not finite, or weights of the model that trains.
    """
    reference = getattr(trainer, "ref_model", None)
    if reference is None:
        _warn_of_moved_base(trainer)
        return
    _check_rows(trainer, reference)
    check_weights(reference, "the reference model")
    if trainer.loads_reference:
        _warn_of_another(*map(causal_model, (trainer.model, reference)))
    held = {place_of(weight) for weight in reference.parameters()} - {0}
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    if shared := [name for name, weight in trained.items() if place_of(weight) in held]:
        raise ValueError(
            f"the reference model has {len(shared)} of the {len(trained)} weight tensors that train, {shared[0]} "
            "among them, and would change with the model: give it weights of its own (copy.deepcopy(model)), or "
            "leave ref_model out"
        )


def _warn_of_moved_base(trainer: MarginTrainer) -> None:
    """Where the reference model is the model without its adapter, and that is not the model as it was."""
    if not trainer.objective.needs_reference or not is_peft_model(trainer.model):
        return
    adapters = trainer.model.peft_config
    if "ref" in adapters:  # TRL's copy of an adapter that has been trained already
        return
    for start in filter(moves_base, {getattr(config, "init_lora_weights", True) for config in adapters.values()}):
        logger.warning(
            "init_lora_weights=%r takes the adapter's first values out of the model under it, and what is left is the "
            "reference model, as in TRL: it is not the model that training starts from. For that one, give the "
            "trainer a ref_model, from Python",
            start,
        )


def _check_rows(trainer: MarginTrainer, reference: Any) -> None:
    ours, theirs = (embedding_rows(causal_model(each)) for each in (trainer.model, reference))
    if ours and theirs and max(ours, theirs) > _ANOTHER_VOCABULARY * min(ours, theirs):
        fix = (
            f"It was loaded from {trainer.model.config.name_or_path}, and the model has changed since: {_COPY}"
            if trainer.loads_reference
            else "Use a reference model with the model's tokenizer, or leave ref_model out: it is then loaded from "
            "where the model is from"
        )
        raise ValueError(
            f"the model's vocabulary has {ours} tokens, and the reference model's {theirs}: the same numbers mean "
            f"other texts to it. {fix}"
        )
    if ours != theirs:
        logger.warning(
            "the model's embedding has %s rows, and the reference model's %s: is it a model with the same tokens? It "
            "is given the numbers of the model's",
            *(ours, theirs),
        )


def _warn_of_another(model: Any, reference: nn.Module) -> None:
    """Where TRL has loaded the reference model from a folder, and the model has changed since it came from there."""
    theirs, ours = dict(reference.named_parameters()), dict(model.named_parameters())
    pairs = {name: (each, theirs[name]) for name, each in ours.items() if name in theirs}
    if not pairs or any(is_part(each) or each.is_meta for pair in pairs.values() for each in pair):
        return
    changed = [
        name
        for name, (one, other) in pairs.items()
        if one.shape == other.shape
        and not torch.equal(*(some_of(each, _COMPARED).float().cpu() for each in (one, other)))
    ]
    changed += [name for name in {**ours, **theirs} if name not in pairs]
    if changed:
        logger.warning(
            "the reference model was loaded from %s, and in %d of %d weight tensors it is not the model, which has "
            "changed since (%s is one): to compare with the model as it is, " + _COPY,
            *(model.config.name_or_path, len(changed), len({**ours, **theirs}), changed[0]),
        )
    before, now = (flatten_dict(config_of(each)) for each in (reference, model))
    names = [
        name for name in {**before, **now} if before.get(name) != now.get(name) and not name.endswith(_OF_ITS_ROWS)
    ]
    if names and not changed:
        logger.warning(
            "the reference model was loaded from %s with another config: %s. To compare with the model as it is, %s",
            model.config.name_or_path,
            "; ".join(f"{name} {before.get(name)}, and the model's {now.get(name)}" for name in names),
            _COPY,
        )
