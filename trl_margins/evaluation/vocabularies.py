"""Whether a model has the ids of its rows, and whether two models read the same ids as the same tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

_FEW = 0.05  # of the ids: names that a fine-tuned model has given to reserved tokens


def check_ids(model: Any, rows: Iterable[Iterable[Sequence[int]]], name: str) -> None:
    """
    Args:
        model: that is to read them.
        rows: the ids of each, in any number of parts.
        name: of the data set, for the error.

    Raises:
        ValueError: a token that has no row in the model's embedding.
    """
    size, path = model.get_input_embeddings().weight.shape[0], getattr(model.config, "name_or_path", "")
    for i, parts in enumerate(rows):
        if (largest := max((max(ids) for ids in parts if ids), default=0)) >= size:
            raise ValueError(
                f"row {i} of {name} has the token {largest}, and the embedding of {path or 'the model'} has {size} "
                "rows: use its own tokenizer, or give it rows for the tokens that were added "
                "(model.resize_token_embeddings)"
            )


def check_one_vocabulary(names: Sequence[str], tokenizers: Sequence[Any], models: Sequence[Any]) -> None:
    """
    Raises:
        ValueError: the ids of the two models are of different tokens, so that no divergence is defined.
    """
    differing, _ = _differing(tokenizers)
    sizes = [model.get_input_embeddings().weight.shape[0] for model in models]
    if differing:
        why = _in_words(differing[0])
    elif sizes[0] != sizes[1]:
        why = f"the one has {sizes[0]} ids and the other {sizes[1]}"
    else:
        return
    raise ValueError(
        f"{names[0]} cannot have drifted from {names[1]}: {why}. Give --drift_from the model that its training "
        "started from"
    )


def check_reference_vocabulary(names: Sequence[str], tokenizers: Sequence[Any]) -> None:
    """Warns of a few ids of a model that are other tokens to its reference model.

    Raises:
        ValueError: many are, so that the reference model would score other texts.
    """
    differing, n_both = _differing(tokenizers)
    if not differing:
        return
    said = f"{len(differing)} of {n_both} ids of {names[0]} are other tokens to the reference model {names[1]}"
    said += f" ({_in_words(differing[0])})"
    if len(differing) > _FEW * n_both:
        raise ValueError(f"{said}: it would score other texts. Give --ref_model the model that training started from")
    logger.warning("%s: where they occur, it scores other texts", said)


def _differing(tokenizers: Sequence[Any]) -> tuple[list[tuple[int, str, str]], int]:
    """The ids that are other tokens, in order, with both tokens, and how many ids both have."""
    one, other = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in tokenizers)
    both = sorted(one.keys() & other.keys())
    return [(i, one[i], other[i]) for i in both if one[i] != other[i]], len(both)


def _in_words(differing: tuple[int, str, str]) -> str:
    i, one, other = differing
    return f"id {i} is {one!r} in the one and {other!r} in the other"
