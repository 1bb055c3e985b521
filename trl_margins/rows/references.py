"""Finds completions that are not texts, but say in which other column, or where in a list, the text is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .messages import spelled, texts_in

_LABEL = re.compile(r"(?:[a-z]+[-_ ])?([a-z])|(?:[a-z]+[-_ ]?)?(\d{1,3})", re.IGNORECASE)
_ANSWERS = re.compile(r"respon|answer|completion|generation|output|candidate|option|choice|repl|continuation", re.I)
_NAMES = ("id", "name", "key", "label", "model")  # keys of an answer that tell it from the others
_MOST = 60  # letters of such a completion


def referred(parts: Iterable[Any], others: Mapping[str, Any], prompt: str) -> set[str]:
    """The columns to which the completions of a row refer; empty unless each of them refers to one.

    A letter or a number refers to nothing if the prompt has what it would stand for: that is a multiple choice.

    Args:
        parts: the completions.
        others: the other columns of the row.
        prompt: its text.
    """
    found: set[str] = set()
    for part in parts:
        if not isinstance(part, str) or not 0 < len(part.strip()) <= _MOST:
            return set()
        text = part.strip()
        columns = {name for name in others if may_be_meant(name) and _is_meant(text, name, others[name], prompt)}
        if not columns:
            return set()
        found |= columns
    return found


def may_be_meant(name: str) -> bool:
    """Whether a column's name says that it holds answers or models."""
    return "model" in name.lower() or _ANSWERS.search(name) is not None


def _is_meant(part: str, name: str, value: Any, prompt: str) -> bool:
    if "model" in name.lower():
        return part in texts_in(spelled(value))
    ends = re.split("[-_ ]", name.lower())
    if isinstance(value := spelled(value), list):
        return any(_is_there(each, part, prompt) for each in _chosen(part, value))
    said = re.split("[-_ ]", part.lower())
    return said == ends[-len(said) :] and len(ends) > 1 and _is_there(value, part, prompt)


def _chosen(part: str, answers: list[Any]) -> Iterator[Any]:
    """The answers of a list to which a name, a letter or a number may point, counted from 0 or from 1."""
    if part in texts_in([each for each in answers if not isinstance(each, Mapping)]):
        return  # it is one of them
    for each in answers:
        if isinstance(each, Mapping) and part in (each.get(key) for key in _NAMES):
            yield each
    if len(answers) > 1 and (label := _LABEL.fullmatch(part)):
        letter, number = label.groups()
        place = int(number) if number else ord(letter.lower()) - ord("a")
        if place < len(answers) + bool(number):
            yield answers[min(place, len(answers) - 1)]


def _is_there(answer: Any, part: str, prompt: str) -> bool:
    """Whether it has a text that is neither the completion nor in the prompt."""
    return any(text.strip() != part and text.strip() not in prompt for text in texts_in(answer))
