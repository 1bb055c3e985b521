"""What is said: texts and messages, also messages that are written as text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from reprlib import repr as shortened
from typing import Any

from ..checks import RepeatedKeyError, without_repeats

Message = dict[str, Any]
Part = str | list[Message]
SHAREGPT = ("conversations", "conversation")  # hold the prompt's messages where there is no prompt column
USUAL_ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")  # of chat templates
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}  # in upper or lower case
_SHAREGPT_ROLES = {**_ROLES, "model": "assistant", "observation": "tool"}  # of from/value messages
_OF_ROLE = {*USUAL_ROLES, *_ROLES}
_KNOWN_ROLES = tuple(dict.fromkeys((*USUAL_ROLES, *_SHAREGPT_ROLES)))
_BLANK = " \t\r\n\ufeff\u200b\u2060"
_ANY_ROLE = "|".join(_KNOWN_ROLES)
_LIKE_MESSAGES = re.compile(
    r"""(?i)\s*"?((np\.)?array\()?(\{\s*\\*['"“”](messages|conversations?)\\*['"“”]\s*:\s*)?(\[\s*)?\{[^{]*?['"“”„](role|from)"""
    rf"""\\*['"“”]\s*:\s*(?:<[\w.]{{1,30}}:\s*)?(?:\w{{1,30}}\.)?\\*['"“”„]*({_ANY_ROLE})(?![\w@.])"""
)
# How messages begin that Python prints in a class of its own, or that were quoted twice; and what else they have
_PRINTED = (
    rf"(?i)[{_BLANK}]*(?:b?['\"])?(?:[\[(]\s*(?:\[\s*)?(?:\{{|\w*\()|(?:OrderedDict|defaultdict)\()"
    r"[^{}]{0,100}?\{?[^{}]{0,20}?"
)
_ROLE = (
    r"""(?:['"]{1,4}\s*(?:role|from)\s*['"]{1,4}\s*[:,]\s*|(?<=[{,\s])role\s*:\s*|\b(?:role|from)=)"""
    rf"""(?:<[\w.]{{1,30}}:\s*)?b?['"]{{1,4}}(?:{_ANY_ROLE})['"]"""
)
_CONTENT = r"""(?:['"]{1,4}\s*(?:content|value)\s*['"]{1,4}\s*[:,]|(?<=[{,\s])content\s*:|\b(?:content|value)=)"""
_PRINTED_MESSAGES = [
    (re.compile(_PRINTED + first), re.compile(f"(?i){other}"))
    for first, other in ((_ROLE, _CONTENT), (_CONTENT, _ROLE))
]
# Messages of LangChain and others, as Python prints them, and pairs of a role and a text
_OTHERS_PRINTED = re.compile(
    rf"""[{_BLANK}]*(?:\[\s*)?(?:(?:Human|AI|System|Chat|Tool|Function)Message(?:Chunk)?\(\s*content="""
    r"""(?=[\s\S]*(?:additional_kwargs|response_metadata)=)"""
    rf"""|(?:(?<=\[)<\w+ )?role=['"](?:{_ANY_ROLE})['"],? content="""
    r"""|(?<=\[)\(\s*['"](?:system|user|human|assistant|ai)['"]\s*,\s*['"])"""
)
# What begins so is hardly anything else, in all rows of a set: a role and a content, in whatever form
_SEEMS = re.compile(
    rf"(?is)(?=.{{0,80}}?\b(?:role|from)\b\W{{0,4}}?[:=,].{{0,15}}?\b(?:{_ANY_ROLE})\b)"
    r"(?=.{0,200}?\b(?:content|value)\b)"
)
# Keys of messages that are meant for the model, if they have a text, a list or a mapping. All others are notes: when,
# by whom and how well it was written
_FOR_THE_MODEL = re.compile(
    r"(?i)name|tools?(_.*)?|functions?(_.*)?|.*(reasoning|thinking|thoughts?)(_.*)?|think|cot|analysis|rationale|"
    r"scratchpad|text|value|message|body|code|caption|query|plan|images?|audios?|videos?|files?|documents?|"
    r"attachments?|context|channel|recipient|prefix|instructions?"
)
_TEXT_PARTS = ("text", "input_text", "output_text")  # of a message's content, the latter in OpenAI's responses
_OF_A_CALL = {"name", "arguments"}
_CURLY = re.compile(r"[\[{:,]\s*[“”„]")


def part_of(value: Any, keeps_parts: bool = False) -> Part:
    """A prompt or a completion as text, or as messages with role and content.

    Takes ShareGPT's from/value messages, a single message, and content in parts of plain text; anything else is a
    ValueError with the fix. Keys of a message whose value is None are left out, as transformers does.
    """
    if isinstance(value, str):
        return _checked_text(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        fix = "correct it, or drop the row"
        if isinstance(value, datetime):
            fix = "write it as text; of a JSON file with dates alone, load the data set instead of streaming it"
        raise ValueError(
            f"it should be an str or a list of messages, but is of type {type(value).__name__}: {value!r:.200}; {fix}"
        )
    if not value:
        raise ValueError("the value is an empty list of messages: add one, or drop the row")
    messages = []
    for i, message in enumerate(value):
        try:
            messages.append(_message(message, keeps_parts))
        except ValueError as error:
            raise ValueError(f"message {i} {error}") from None
    return messages


def text_of(part: Part) -> str:
    """The text of a prompt or a completion; of messages, one line each."""
    if isinstance(part, str):
        return part
    contents = [message.get("content") or "" for message in part]
    return "\n".join(
        # a list has parts, which only a processor reads
        "".join(each.get("text") or "" for each in content if isinstance(each, Mapping))
        if isinstance(content, list)
        else content
        for content in contents
    )


def texts_in(value: Any) -> Iterator[str]:
    """All texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(each)


def spelled(value: Any) -> Any:
    """What a text spells in JSON or Python, also in JSON twice, if it spells a list or a mapping; else the value."""
    with suppress(RepeatedKeyError):
        return _spelled(value)
    return value


def _spelled(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:2] in ('"[', '"{'):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str) and value.lstrip(_BLANK)[:1] in ("[", "{"):
        text = value.lstrip(_BLANK)
        as_json = partial(json.loads, strict=False, object_pairs_hook=without_repeats)  # with line breaks in texts
        for read in (as_json, ast.literal_eval):
            try:
                return read(text)
            except RepeatedKeyError:
                raise
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
    return value


def messages_in(value: Any) -> Any:
    """The messages that a text spells, or the one; else the value."""
    found = spelled(value)
    found = [found] if isinstance(found, Mapping) else found
    return found if is_messages(found) else value


def is_like_messages(text: str) -> bool:
    """Whether a text begins as messages do that are written as text, in JSON or as Python prints them."""
    if _LIKE_MESSAGES.match(text) or _OTHERS_PRINTED.match(text):
        return True
    begins = ((first.match(text), other) for first, other in _PRINTED_MESSAGES)
    return any(begin is not None and other.search(text, begin.end()) for begin, other in begins)


def may_be_messages(value: Any) -> bool:
    """Whether it is text that spells messages, or looks so and cannot be read."""
    if not isinstance(value, str) or not is_like_messages(value):
        return False
    try:
        return stored_messages(value) is not None
    except ValueError:
        return True


def seem_messages(text: str) -> bool:
    """Whether a text begins as messages might that were written in a form of its own; also a text about messages."""
    return _SEEMS.match(text) is not None


def stored_messages(text: str) -> Any:
    """Messages that a CSV file holds as text, JSON or a Python list; None if the text is something else."""
    try:
        value = _spelled(text)
        why = "is neither JSON nor a Python list" + ", for its quotes are curly" * bool(_CURLY.search(text))
    except RepeatedKeyError as error:
        value, why = text, f"has the key {error.key!r} twice"
    if isinstance(value, list | tuple) and not is_messages(value) and _holds_message(value):
        value, why = text, "not all of it is messages with role and content, in one list"
    if isinstance(value, str):
        raise ValueError(
            f"{shortened(text)} looks like messages stored as text, but {why}: save the set as JSON lines or Parquet"
        )
    if isinstance(value, Mapping):
        key = next((name for name in ("messages", *SHAREGPT) if is_messages(value.get(name))), None)
        if key is not None and len(value) > 1:
            raise ValueError(
                f"{shortened(text)} holds messages beside {sorted(value.keys() - {key})}: save the messages alone, "
                "and the rest in columns of its own"
            )
        value = [value] if key is None else value[key]
    return value if is_messages(value) else None


def is_for_the_model(key: str, value: Any) -> bool:
    """Whether a message has something with this key that a model may have to see, beside role and content."""
    return bool(value) and isinstance(value, str | list | Mapping) and _FOR_THE_MODEL.fullmatch(key) is not None


def without_notes(part: Part) -> Part:
    """What is said, by whom, and what else is for the model: equal for messages that say the same."""
    if isinstance(part, str):
        return part
    said = ("role", "content")
    return [{key: value for key, value in m.items() if key in said or is_for_the_model(key, value)} for m in part]


def say_the_same(some: list[Message], others: list[Message]) -> bool:
    """Whether the messages say the same, whatever other keys they have."""
    keys = ("role", "content", "tool_calls")
    return [[m.get(key) for key in keys] for m in some] == [[m.get(key) for key in keys] for m in others]


def shared_turns(parts: list[list[Message]]) -> int:
    """How many messages all of them begin with; the last message of each is not counted."""
    most = min(map(len, parts), default=1) - 1
    return next(
        (i for i in range(most) if not all(say_the_same(part[i : i + 1], parts[0][i : i + 1]) for part in parts)), most
    )


def _message(message: Any, keeps_parts: bool) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"is {shortened(message)}: a message is a mapping with role and content, in one list, not nested; "
            "correct it, or drop the row"
        )
    there = {key: value for key, value in message.items() if value is not None}
    if "from" in there and "value" in there and "role" not in there:
        role = there.pop("from")
        if role not in _SHAREGPT_ROLES:
            raise ValueError(f"is from {role!r}; known: {', '.join(_SHAREGPT_ROLES)}. Rename it, or drop the row")
        there = {"role": _SHAREGPT_ROLES[role], "content": there.pop("value"), **there}
    missing = [key for key in ("role", "content") if key not in there]
    if missing and not ("role" in there and there.get("tool_calls")):
        raise ValueError(
            f"has no {' and no '.join(missing)}, only {there!r:.200}: add them, under these names, or drop the row"
        )
    content = there.get("content", "")
    if not isinstance(there["role"], str) or not isinstance(content, str | list):
        raise ValueError(f"is {shortened(message)}: role is text, and content is text or a list of parts")
    there["role"] = _ROLES.get(there["role"].lower(), there["role"])
    if isinstance(content, str):
        _checked_text(content)
    elif not keeps_parts:
        there["content"] = _plain(content)
    return there


def _plain(parts: list[Any]) -> str:
    for part in parts:
        is_text = isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS
        if isinstance(part, str) or (is_text and part.get("text") is None):
            raise ValueError(
                f"has the content part {shortened(part)}: a part that is text is {{'type': 'text', 'text': '…'}}, and "
                "content may be text itself; correct it, or drop the row"
            )
        if not is_text or not isinstance(part.get("text"), str):
            raise ValueError(
                f"has a content part that is not text, {shortened(part)}, which a text model cannot read: drop the "
                "row, or train a vision-language model with its processor on DPOTrainer's base"
            )
    return InParts([part["text"] for part in parts]) if parts else ""


class InParts(str):
    """The text of a message whose content is parts of text, which a chat template may read one by one."""

    parts: list[dict[str, str]]

    def __new__(cls, texts: list[str]) -> InParts:
        found = super().__new__(cls, _checked_text("".join(texts)))
        found.parts = [{"type": "text", "text": text} for text in texts]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return InParts, ([part["text"] for part in self.parts],)


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of {text[: error.start + 1][-20:]!r} is half of a surrogate pair, which no "
            "tokenizer takes: clean it, for example with text.encode(errors='replace').decode()"
        ) from None
    return text


def pruned(value: Any, feature: Any) -> Any:
    """Without the keys that Arrow added: it gives all mappings of a column the same keys, with None.

    The arguments of a call may be null, and are so to TRL's trainers, too.
    """
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        kept = _OF_A_CALL if value.keys() >= _OF_A_CALL and "function" not in value else ()
        return {key: pruned(each, feature.get(key)) for key, each in value.items() if each is not None or key in kept}
    if isinstance(value, list) and (within := getattr(feature, "feature", None)) is not None:
        return [pruned(each, within) for each in value]
    return value


def is_list_of(value: Any, kinds: Any) -> bool:
    """Whether it is a list, also an empty one, with nothing but values of these types."""
    return isinstance(value, list) and all(isinstance(each, kinds) for each in value)


def is_messages(value: Any) -> bool:
    """Whether it is a list of messages with known roles."""
    if not like_messages(value):
        return False
    for message in value:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role.lower() not in (_OF_ROLE if "role" in message else _SHAREGPT_ROLES):
            return False
    return True


def _holds_message(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list has a message in it, also within lists, as pairs, or as the message of an answer."""
    return _are_pairs(values) or any(
        _holds_message(each)
        if isinstance(each, list | tuple)
        else _is_message(each) or (isinstance(each, Mapping) and _is_message(each.get("message")))
        for each in values
    )


def _are_pairs(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether they are roles and what each says, as LangChain has them, or the keys and values of one message."""
    if not values or not all(
        isinstance(each, tuple) and is_list_of([*each], str) and len(each) == 2 for each in values
    ):
        return False
    keys = dict(values)
    is_one = keys.get("role", keys.get("from")) in _KNOWN_ROLES and bool({"content", "value"} & keys.keys())
    return is_one or keys.keys() <= {"system", "user", "human", "assistant", "ai"}


def _is_message(value: Any) -> bool:
    """Whether it is one, in whatever case its keys and its role are."""
    if not isinstance(value, Mapping):
        return False
    found = {key.strip().lower(): each for key, each in value.items() if isinstance(key, str)}
    role = found.get("role", found.get("from"))
    role = role.decode(errors="replace") if isinstance(role, bytes) else role
    known = isinstance(role, str) and role.lower() in _KNOWN_ROLES
    return known and bool({"content", "value"} & found.keys())


def like_messages(value: Any) -> bool:
    """Whether it is a list of messages, perhaps with unknown roles."""
    if not is_list_of(value, Mapping) or not value:
        return False
    return all({"content", "value"} & each.keys() and {"role", "from"} & each.keys() for each in value)


def says(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}]
