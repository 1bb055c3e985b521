"""What training needs of a tokenizer, asked before the slow work."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def tokenizer_of(processing_class: Any) -> Any:
    """Of a processor for images and text, its tokenizer; else the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def prepare_tokenizer(processing_class: Any, conversational: Iterable[str]) -> None:
    """Pads with the end token where there is no padding token, as TRL does, but before its collator asks for one.

    Args:
        processing_class: a tokenizer, or a processor that has one.
        conversational: names of the data sets that hold messages, which need a chat template.

    Raises:
        ValueError: no end token, or messages without a chat template, with the fix.
    """
    tokenizer = tokenizer_of(processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {name} has no end token, so no answer would end: set tokenizer.eos_token to the token "
            "that ends the model's answers"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("the tokenizer %s has no padding token: %r pads", name, tokenizer.eos_token)
    if getattr(processing_class, "chat_template", None):
        return
    for split in conversational:
        raise ValueError(
            f"the {split} data set has messages, and the tokenizer {name} has no chat template to make text of them: "
            "set tokenizer.chat_template (trl-margins train has --chat_template FILE), take the tokenizer of a chat "
            "model, or turn the messages into text"
        )
