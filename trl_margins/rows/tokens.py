"""Prompts and completions to token ids, by the rule of TRL's `DPOTrainer`, many rows at a time.

Prompt and completion are rendered (by the chat template, where they are messages) and tokenized together. The
completion starts at the first token that differs from the tokens of the prompt alone."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import _tokenize, common_prefix_length

from .form import PreferenceRow, RowError, RowReader
from .limited import SECONDS, SlowTemplateError, limited
from .messages import InParts, is_for_the_model

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# What tokens depend on besides the data and the tokenizer. Raise the number whenever a token may change
VERSION = f"4, trl {version('trl')}, transformers {version('transformers')}"
# Seconds that tokenizing may take beside the first conversation, hundreds of times what it does
_PER_CONVERSATION, _PER_CHARACTER, _PER_IMAGE = 0.02, 1e-5, 60
_MARK = "part-of-a-message"  # by which it is seen whether a chat template reads parts


class RowTokens(NamedTuple):
    """Token ids of a prompt and its k completions, not truncated."""

    prompt: list[int]
    completions: list[list[int]]
    tail: list[int] = []  # the tokens that the prompt ends with alone, but not before a completion

    def cut(self, max_length: int | None) -> RowTokens:
        """Truncates prompt and completion together to `max_length` tokens, from the end."""
        if max_length is None:
            return self
        room = max(max_length - len(self.prompt), 0)
        return RowTokens(self.prompt[:max_length], [ids[:room] for ids in self.completions], self.tail)


def tokenize(
    rows: Sequence[PreferenceRow], processing_class: Any, where: Callable[[int], str] = "row {}".format
) -> list[RowTokens]:
    """
    Args:
        rows: N rows; the completions of one row share its prompt, up to the first token in which one of them differs.
        processing_class: a tokenizer, or a processor that has one.
        where: names row i in errors.

    Returns:
        [N] token ids.

    Raises:
        RowError: the chat template refuses the messages of a row.
    """
    return without_errors(tokenize_or_errors(rows, processing_class), where)


def tokenize_or_errors(rows: Sequence[PreferenceRow], processing_class: Any) -> list[RowTokens | Exception]:
    """As `tokenize`, with an error, which does not name the row, in place of a row that cannot be tokenized."""
    kinds: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        # templates may render the keys in their order, so the order counts
        kind = json.dumps(row.template, default=repr) if row.is_conversational else ""
        kinds.setdefault(kind, []).append(i)
    found: dict[int, RowTokens | Exception] = {}
    for members in kinds.values():
        made = each_or_error(lambda some: _tokenize_alike(some, processing_class), [rows[i] for i in members])
        for i, each in zip(members, made, strict=True):
            found[i] = _refusal(rows[i], each) if isinstance(each, Exception) else each
    return [found[i] for i in range(len(rows))]


def each_or_error(work: Callable[[list[Item]], Iterable[Result]], items: list[Item]) -> list[Result | Exception]:
    """One result per item, from one call for all; if that fails, from one call per item, or the item's error."""
    try:
        return list(work(items))
    except SlowTemplateError:  # not once for each
        raise
    except Exception as error:  # chat templates raise anything
        return [error] if len(items) == 1 else [each for item in items for each in each_or_error(work, [item])]


def without_errors(found: Iterable[Result | Exception], where: Callable[[int], str]) -> list[Result]:
    """The results of `each_or_error`; the first error among them is raised as a RowError with its row."""
    made: list[Result] = []
    for i, each in enumerate(found):
        if isinstance(each, Exception):
            raise RowError(f"{where(i)}: {each}") from each
        made.append(each)
    return made


def _refusal(row: PreferenceRow, cause: Exception) -> Exception:
    said = f"cannot be tokenized: {cause}"
    if row.is_conversational:
        refused = (row.wholes or [row.prompt])[0]
        given = [name for name in row.template if name != "tools"]
        beside = f" with {', '.join(given)} from the column chat_template_kwargs" if given else ""
        said = f"the chat template refuses {refused!r:.300}{beside}: {str(cause).rstrip('.')}. {_way_on(cause)}"
    error = ValueError(said)
    error.__cause__ = cause
    return error


def _way_on(cause: Exception) -> str:
    if type(cause) is TemplateError:  # of the template's `raise_exception`, about the messages
        return "Change the messages, or drop the row"
    another = "give another template (trl-margins train has --chat_template FILE, Python tokenizer.chat_template)"
    if isinstance(cause, TemplateSyntaxError):
        return f"No row can be read with it: {another}"
    return f"Change the messages or their tools, drop the row, or {another}"


def _tokenize_alike(rows: list[PreferenceRow], processing_class: Any) -> list[RowTokens]:
    """Of rows that are all text, or whose messages are rendered with the same variables."""
    prompts: list[Any] = [row.prompt for row in rows]
    wholes: list[Any] = [whole for row in rows for whole in row.wholes]
    if rows[0].is_conversational:
        prompts = _chat_ids(processing_class, prompts, add_generation_prompt=True, **rows[0].template)
        wholes = _chat_ids(processing_class, wholes, **rows[0].template) if wholes else []
    else:
        prompts = _text_ids(processing_class, prompts)
        wholes = _ended_ids(processing_class, wholes) if wholes else []
    made, remaining = [], iter(wholes)
    for row, prompt in zip(rows, prompts, strict=True):
        full = [next(remaining) for _ in row.completions]
        start = min((_shared(prompt, each) for each in full), default=len(prompt))
        made.append(RowTokens(prompt[:start], [each[start:] for each in full], prompt[start:]))
    return made


def _shared(prompt: list[int], whole: list[int]) -> int:
    # the prompt is nearly always a prefix, and comparing lists is fast
    return len(prompt) if whole[: len(prompt)] == prompt else common_prefix_length(prompt, whole)


def _chat_ids(processing_class: Any, conversations: list[Any], **options: Any) -> list[list[int]]:
    if isinstance(processing_class, ProcessorMixin):  # TRL knows how a processor wants its messages
        with limited(_PER_IMAGE * len(conversations)):
            return [_tokenize(processing_class, each, **options)["input_ids"] for each in conversations]
    conversations = _as_the_template_reads(conversations, processing_class)
    with limited():  # most templates that do not end never do
        processing_class.apply_chat_template(conversations[0], tokenize=False, **options)
    n_characters = sum(len(str(each)) for each in conversations)
    with limited(SECONDS + _PER_CONVERSATION * len(conversations) + _PER_CHARACTER * n_characters):
        made = processing_class.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)
    return list(made["input_ids"])


def _as_the_template_reads(conversations: list[Any], tokenizer: Any) -> list[Any]:
    """The conversations, whose content in parts stays so where the chat template reads parts; others write a list as
    Python does.
    """
    if not any(isinstance(message.get("content"), InParts) for each in conversations for message in each):
        return conversations
    part = {"type": "text", "text": _MARK}
    try:
        with limited():
            written = tokenizer.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False)
    except Exception:  # chat templates raise anything
        return conversations
    if _MARK not in written or repr(part) in written or json.dumps(part) in written:
        return conversations
    return [[in_parts(message) for message in each] for each in conversations]


def in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message, whose content is the parts that it had."""
    content = message.get("content")
    return {**message, "content": content.parts} if isinstance(content, InParts) else message


def _text_ids(processing_class: Any, texts: list[str]) -> list[list[int]]:
    return list(processing_class(text=texts)["input_ids"])


def _ended_ids(processing_class: Any, texts: list[str]) -> list[list[int]]:
    """With exactly one end token, whether the text has it, the tokenizer adds it, or neither."""
    tokenizer = tokenizer_of(processing_class)
    end, end_id = tokenizer.eos_token, tokenizer.eos_token_id
    (added,) = _text_ids(processing_class, [""])
    if added[-1:] == [end_id]:
        return _text_ids(processing_class, [text.removesuffix(end) for text in texts])
    if getattr(tokenizer, "split_special_tokens", False):  # would split the text of the end token, too
        return [[*ids, end_id] for ids in _text_ids(processing_class, [text.removesuffix(end) for text in texts])]
    return _text_ids(processing_class, [text if text.endswith(end) else text + end for text in texts])


@dataclass(frozen=True)
class PairTokenizer:
    """A function for `Dataset.map`: a batch of raw rows, in columns, to the token columns of a trainer."""

    reader: RowReader
    processing_class: Any  # a tokenizer, or a processor that has one
    columns: Callable[[RowTokens], dict[str, Any]]
    version: str = VERSION  # part of the cache key, which does not include this module's code

    def __call__(self, batch: Mapping[str, list[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        rows = read_batch(self.reader, batch, numbers)
        tokens = tokenize(rows, self.processing_class, lambda i: self.reader.where(numbers[i]))
        return in_columns(self.columns(each) for each in tokens)


def read_batch(reader: RowReader, batch: Mapping[str, list[Any]], numbers: Sequence[int]) -> list[PreferenceRow]:
    # only the needed columns: others may be slow to decode, and a stream's rows may lack a column
    columns = {name: batch[name] for name in reader.needed if name in batch}
    raws = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [reader(raw, number) for raw, number in zip(raws, numbers, strict=True)]


def in_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    rows = list(rows)
    return {name: [row[name] for row in rows] for name in rows[0]}


def dpo_columns(tokens: RowTokens) -> dict[str, Any]:
    """The columns of TRL's `DPOTrainer`, whose collator truncates."""
    chosen, rejected = tokens.completions
    return {"prompt_ids": _array(tokens.prompt), "chosen_ids": _array(chosen), "rejected_ids": _array(rejected)}


def cpo_columns(tokens: RowTokens, max_length: int | None) -> dict[str, Any]:
    """The columns of TRL's `CPOTrainer`."""
    prompt, completions, _ = tokens.cut(max_length)
    made: dict[str, Any] = {}
    for side, completion in zip(("chosen", "rejected"), completions, strict=True):
        ids = _array(prompt + completion)
        labels = ids.copy()
        labels[: len(prompt)] = -100
        made |= {f"{side}_input_ids": ids, f"{side}_attention_mask": np.ones_like(ids), f"{side}_labels": labels}
    ids = _array(prompt)
    return made | {"prompt_input_ids": ids, "prompt_attention_mask": np.ones_like(ids)}


def _array(ids: list[int]) -> np.ndarray:
    # Arrow reads arrays many times faster than lists of numbers
    return np.asarray(ids, dtype=np.int64)


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor for images and text; else the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def unread(rows: Sequence[PreferenceRow], processing_class: Any, numbers: Sequence[int]) -> Iterator[str]:
    """What of the rows of these numbers the chat template does not read, one sentence each."""
    of_text = [i for i, row in enumerate(rows) if row.template and not row.is_conversational]
    if of_text:
        names = ", ".join(sorted({repr(name) for i in of_text for name in rows[i].template}))
        yield (
            f"{len(of_text)} rows of text (the first is row {numbers[of_text[0]]}) have {names}, which only a chat "
            "template reads: the model sees nothing of it. Write their prompts and completions as messages"
        )
    given = getattr(processing_class, "chat_template", None) or ""
    template = "\n".join(given.values()) if isinstance(given, Mapping) else str(given)  # one of several by name
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if not row.is_conversational:
            continue
        messages: Iterator[Any] = chain(row.prompt, *row.completions)
        keys = {
            key
            for message in messages
            for key, value in message.items()
            if is_for_the_model(key, value) and value != message.get("content")
        }
        for name in (*row.template, *sorted(keys - {"tool_call_id"})):  # most templates know results by their place
            found.setdefault(name, []).append(i)
    for name, places in found.items():
        is_named = re.search(rf"\b{re.escape(name)}\b", template)
        if not is_named and _is_unread(name, rows[places[0]], processing_class):
            yield (
                f"{name!r} is in {len(places)} rows (the first is row {numbers[places[0]]}), and the chat template "
                "does not read it: the model sees nothing of it. Use a template that does (trl-margins train has "
                "--chat_template FILE), or leave it out"
            )


def _is_unread(name: str, row: PreferenceRow, processing_class: Any) -> bool:
    """Whether a row has the same tokens without this key or variable."""

    def without(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in mapping.items() if key != name}

    parts: Any = (row.prompt, *row.completions)
    parts = [[without(message) for message in part] for part in parts]
    other = PreferenceRow(parts[0], parts[1:], without(row.template))
    one, two = tokenize_or_errors([row, other], processing_class)
    return one == two


def prepare_tokenizer(processing_class: Any, conversational: Iterable[str]) -> None:
    """Uses the end token for padding if there is no padding token, as TRL does, but before its collator needs one.

    Raises a ValueError if there is no end token, or no chat template for data sets with messages (`conversational`).
    """
    tokenizer = tokenizer_of(processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {name} has no end token, so no completion would end: set tokenizer.eos_token to the token "
            "that ends the model's completions"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("the tokenizer %s has no padding token: padding with %r", name, tokenizer.eos_token)
    if getattr(processing_class, "chat_template", None):
        return
    for split in conversational:
        raise ValueError(
            f"the {split} data set has messages, and the tokenizer {name} has no chat template to render them: set "
            "tokenizer.chat_template (trl-margins train has --chat_template FILE), use the tokenizer of a chat "
            "model, or turn the messages into text"
        )
