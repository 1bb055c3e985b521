"""Secrets stay out of what is written and printed: which keys hold one, and what one looks like in a text."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

# `pad_token` and its kind are no secrets, so a word before `token` has to say that it is one
_NAMES = (
    r"(?:[\w-]*[_-])?(?:passwords?|passwd|passphrase|secrets?|api[_-]?keys?|(?:access|secret|private|account|storage)[_-]?keys?"
    r"|credentials?|authorization|(?:hub|hf|auth|access|api|bearer|refresh|session|secret|sas|wandb|comet|github)[_-]token)"
)
_KEY = re.compile(rf"(?:{_NAMES}|token)", re.IGNORECASE)
_IN_TEXT = (
    (re.compile(r"\b(hf_)[A-Za-z0-9]{20,}"), r"\1…"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE), r"\1…@"),
    (re.compile(rf"([?&](?:{_NAMES}|[\w-]*token|key|sig|[\w-]*signature|auth)=)[^&#\s'\"]+", re.IGNORECASE), r"\1…"),
    # a flag, with its value behind a blank or =; a key and its value in YAML, JSON or Python; `token` only as a key
    (re.compile(rf"(--{_NAMES}(?:=|\s+))(?!-)('[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE), r"\1…"),
    (re.compile(rf"(\b{_NAMES}\\?[\"']?\s*[:=]\s*\\?[\"']?)(?:Bearer\s+)?[^\s\"',}}\]\\]+", re.IGNORECASE), r"\1…"),
    (re.compile(r"([\"']token\\?[\"']\s*:\s*\\?[\"']|\btoken=\\?[\"'])[^\"'\\]+", re.IGNORECASE), r"\1…"),
)


def redacted(value: Any) -> Any:
    """A copy of nested settings in which every secret is None, and left out of every text."""
    if isinstance(value, Mapping):
        return {
            key: None if isinstance(of, str) and isinstance(key, str) and _KEY.fullmatch(key) else redacted(of)
            for key, of in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(map(redacted, value)) if type(value) in (list, tuple) else value
    return redacted_text(value) if type(value) is str else value


def redacted_text(text: str) -> str:
    """The text with … in place of secrets: Hugging Face's tokens, passwords in addresses, values of secret keys."""
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text


class KeepsSecrets:
    """A config that is written, sent to trackers and pickled without its secrets. Copies in a process keep them."""

    def to_dict(self) -> dict[str, Any]:
        """transformers', for trackers and JSON."""
        return redacted(super().to_dict())  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        """For `training_args.bin`, which transformers uploads with a model."""
        return redacted(self.__dict__)

    def __copy__(self) -> KeepsSecrets:
        return self._with(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepsSecrets:
        return self._with(copy.deepcopy(self.__dict__, memo))

    def _with(self, values: Mapping[str, Any]) -> KeepsSecrets:
        new = object.__new__(type(self))
        new.__dict__.update(values)
        return new
