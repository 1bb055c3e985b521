"""Conversations that data sets write in their own ways: as marked text, or as the turns of each side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .form import DIALOGUE, OF_TEMPLATES
from .messages import Message, Part, is_list_of, says

_STEER = re.compile(r"\n?<extra_id_1>(?:User|Assistant)\n")  # HelpSteer2's
_UNSPLIT = re.compile(r"(?:\A[\s#*]*(?:Human|User|USER)|[\r\n][ \t#*]*Assistant)[* \t]*:")


def chat_turns(prompt: str) -> list[Message]:
    """The messages of a prompt in text, which may mark its turns as Nectar or HelpSteer2 do; else one of the user."""
    before = f"\n\n{prompt.lstrip()}"
    if before.startswith("\n\nHuman:"):
        (_, *turns), marks = DIALOGUE.split(before), DIALOGUE.findall(before)
        if not turns[-1].strip():  # the turn to be written
            turns, marks = turns[:-1], marks[:-1]
    elif _STEER.search(prompt):
        turns, marks = _STEER.split(prompt), ["User", *_STEER.findall(prompt)]
    else:
        return says("user", prompt)
    by_model = ["Assistant" in mark for mark in marks]
    if not by_model or by_model != [i % 2 == 1 for i in range(len(marks))] or by_model[-1]:  # not by turns
        return says("user", prompt)
    return [
        m for text, by in zip(turns, by_model, strict=True) for m in says("assistant" if by else "user", text.strip())
    ]


def split_turns(prompt: str, answers: Sequence[Any]) -> tuple[list[Message], list[Any]]:
    """`chat_turns`, and the answers to them. Those in text lose the blanks around them where the prompt's turns do."""
    turns = chat_turns(prompt)
    if turns == says("user", prompt):
        return turns, [*answers]
    return turns, [answer.strip() if isinstance(answer, str) else answer for answer in answers]


def unsplit_mark(prompt: Part) -> str | None:
    """What marks a turn in a message of a prompt; None where nothing does."""
    found = (OF_TEMPLATES.search(m["content"]) or _UNSPLIT.search(m["content"]) for m in prompt if isinstance(m, dict))
    return next((mark[0].strip() for mark in found if mark), None)


def unsplit_note(prompts: Iterable[tuple[Part, int]]) -> str | None:
    """A sentence about prompts of which `chat_turns` left turns together; each with its row."""
    if not (found := [(row, mark) for prompt, row in prompts if (mark := unsplit_mark(prompt))]):
        return None
    row, mark = found[0]
    return (
        f"{len(found)} prompts mark turns (the first is in row {row}, by its {mark!r}) that stay in one message: "
        "only turns with an empty line and 'Human:' or 'Assistant:' before them are split, where they "
        "take turns. If they are dialogues, save them as lists of messages with role and content"
    )


def are_turns(prompt: Any, answers: Sequence[Any]) -> bool:
    """Whether all are lists of as many texts, the user's turns and each model's, as in Kaggle's votes."""
    parts = (prompt, *answers)
    return all(is_list_of(part, str | None) for part in parts) and len({*map(len, parts)}) == 1 and bool(prompt)


def in_turns(asked: Sequence[Any], answered: Sequence[Any]) -> list[Message]:
    """The conversation of the user's turns and the model's."""
    return [m for q, a in zip(asked, answered, strict=True) for m in says("user", q) + says("assistant", a)]


def first_turns(conversation: list[Message], n: int) -> list[Message]:
    """Up to the n-th answer."""
    answers = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    return conversation[: answers[n - 1] + 1] if 0 < n <= len(answers) else conversation


def mended(text: str | None) -> Any:
    """With a question mark for half of a surrogate pair, which no tokenizer takes. Kaggle's votes hold some."""
    return None if text is None else text.encode(errors="replace").decode()
