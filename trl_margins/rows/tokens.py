"""Prompts and completions to token ids, by the rule of TRL's `DPOTrainer`, many rows at a time.

The tokens of a sequence are those of prompt and completion, rendered and tokenized together, by the chat template
where they are messages. The completion begins where the tokens of the prompt alone and those of both part."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import _tokenize, common_prefix_length

from .form import PreferenceRow, RowError, RowReader

logger = logging.getLogger(__name__)

# What tokens depend on beside the data and the tokenizer. Raise the number whenever a token may change
VERSION = f"1, trl {version('trl')}, transformers {version('transformers')}"


class RowTokens(NamedTuple):
    """Token ids of a prompt and its k completions, whole."""

    prompt: list[int]
    completions: list[list[int]]

    def cut(self, max_length: int | None) -> RowTokens:
        """Prompt and completion together at most `max_length` long: what is over is cut from the end."""
        if max_length is None:
            return self
        room = max(max_length - len(self.prompt), 0)
        return RowTokens(self.prompt[:max_length], [ids[:room] for ids in self.completions])


def tokenize(
    rows: Sequence[PreferenceRow],
    processing_class: Any,
    where: Callable[[int], str] = "row {}".format,
    on_tail: Callable[[int, list[int]], None] | None = None,
) -> list[RowTokens]:
    """
    Args:
        rows: N rows; the completions of one row share its prompt, up to where the tokens of the first of them part.
        processing_class: a tokenizer, or a processor that has one.
        where: names row i in errors.
        on_tail: is told of row i whose prompt alone ends with tokens that it does not have before a completion.

    Returns:
        [N] token ids.

    Raises:
        RowError: the chat template refuses a row's messages.
    """
    kinds: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        # the order of keys is part of what a template renders
        kind = json.dumps(row.template, default=repr) if row.is_conversational else ""
        kinds.setdefault(kind, []).append(i)
    found: dict[int, RowTokens] = {}
    for members in kinds.values():
        some = [rows[i] for i in members]
        made = _alike(some, processing_class, lambda j, m=members: where(m[j]))
        for i, (tokens, tail) in zip(members, made, strict=True):
            found[i] = tokens
            if tail and on_tail is not None:
                on_tail(i, tail)
    return [found[i] for i in range(len(rows))]


def _alike(
    rows: list[PreferenceRow], processing_class: Any, where: Callable[[int], str]
) -> list[tuple[RowTokens, list[int]]]:
    """Of rows that are all text, or that give the chat template the same; with what each prompt alone ends with."""
    try:
        if rows[0].is_conversational:
            ids = partial(_chat_ids, processing_class, template=rows[0].template)
            prompts = ids([row.prompt for row in rows], add_generation_prompt=True)
            wholes = ids([row.prompt + part for row in rows for part in row.completions])
        else:
            prompts = _text_ids(processing_class, [row.prompt for row in rows])
            wholes = _ended_ids(processing_class, [row.prompt + part for row in rows for part in row.completions])
    except Exception as error:  # chat templates raise whatever they like
        if len(rows) > 1:  # one of them at a time, to find which
            return [_alike([row], processing_class, lambda _, i=i: where(i))[0] for i, row in enumerate(rows)]
        said = f"the chat template refuses {rows[0].prompt + rows[0].completions[0]!r:.300}"
        raise RowError(
            f"{where(0)}: {said if rows[0].is_conversational else 'cannot be tokenized'}: {error}"
        ) from error
    made, end_of = [], 0
    for row, prompt in zip(rows, prompts, strict=True):
        begin, end_of = end_of, end_of + len(row.completions)
        full = wholes[begin:end_of]
        start = min((_shared(prompt, each) for each in full), default=len(prompt))
        made.append((RowTokens(prompt[:start], [each[start:] for each in full]), prompt[start:]))
    return made


def _shared(prompt: list[int], whole: list[int]) -> int:
    # nearly always the prompt is a prefix, which the comparison of lists sees at once
    return len(prompt) if whole[: len(prompt)] == prompt else common_prefix_length(prompt, whole)


def _chat_ids(
    processing_class: Any, conversations: list[Any], template: Mapping[str, Any], **options: Any
) -> list[list[int]]:
    if isinstance(processing_class, ProcessorMixin):  # TRL knows how a processor wants its messages
        return [_tokenize(processing_class, each, **options, **template)["input_ids"] for each in conversations]
    return processing_class.apply_chat_template(conversations, tokenize=True, return_dict=True, **options, **template)[
        "input_ids"
    ]


def _text_ids(processing_class: Any, texts: list[str]) -> list[list[int]]:
    return processing_class(text=texts)["input_ids"]


def _ended_ids(processing_class: Any, texts: list[str]) -> list[list[int]]:
    """With one end token, whether the text has it, the tokenizer adds it, or neither."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    end, end_id = tokenizer.eos_token, tokenizer.eos_token_id
    (added,) = _text_ids(processing_class, [""])
    if added[-1:] == [end_id]:
        return _text_ids(processing_class, [text.removesuffix(end) for text in texts])
    if getattr(tokenizer, "split_special_tokens", False):  # the end token's text would be split, too
        return [[*ids, end_id] for ids in _text_ids(processing_class, [text.removesuffix(end) for text in texts])]
    return _text_ids(processing_class, [text if text.endswith(end) else text + end for text in texts])


@dataclass(frozen=True)
class PairTokenizer:
    """A batch of raw rows, in columns, to the token columns of a trainer: a function for `Dataset.map`.

    Args:
        reader: knows what the columns mean.
        processing_class: a tokenizer, or a processor that has one.
        columns: the token columns of one row.
        version: part of the cache's key, for the code is none.
    """

    reader: RowReader
    processing_class: Any
    columns: Callable[[RowTokens], dict[str, Any]]
    version: str = VERSION

    def __call__(self, batch: Mapping[str, list[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        rows = read_batch(self.reader, batch, numbers)
        tokens = tokenize(rows, self.processing_class, lambda i: self.reader.where(numbers[i]))
        return in_columns(self.columns(each) for each in tokens)


def read_batch(reader: RowReader, batch: Mapping[str, list[Any]], numbers: Sequence[int]) -> list[PreferenceRow]:
    # others may be slow to decode, and of a stream's rows some may have none of a column
    columns = {name: batch[name] for name in reader.needed if name in batch}
    raws = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [reader(raw, number) for raw, number in zip(raws, numbers, strict=True)]


def in_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    rows = list(rows)
    return {name: [row[name] for row in rows] for name in rows[0]}


def dpo_columns(tokens: RowTokens) -> dict[str, Any]:
    """Of TRL's `DPOTrainer`, whose collator cuts."""
    chosen, rejected = tokens.completions
    return {"prompt_ids": _array(tokens.prompt), "chosen_ids": _array(chosen), "rejected_ids": _array(rejected)}


def cpo_columns(tokens: RowTokens, max_length: int | None) -> dict[str, Any]:
    """Of TRL's `CPOTrainer`."""
    prompt, completions = tokens.cut(max_length)
    made: dict[str, Any] = {}
    for side, completion in zip(("chosen", "rejected"), completions, strict=True):
        ids = _array(prompt + completion)
        labels = ids.copy()
        labels[: len(prompt)] = -100
        made |= {f"{side}_input_ids": ids, f"{side}_attention_mask": np.ones_like(ids), f"{side}_labels": labels}
    ids = _array(prompt)
    return made | {"prompt_input_ids": ids, "prompt_attention_mask": np.ones_like(ids)}


def _array(ids: list[int]) -> np.ndarray:
    # Arrow takes arrays many times faster than lists of numbers
    return np.asarray(ids, dtype=np.int64)


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
