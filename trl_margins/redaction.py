"""Secrets stay out of what is written and printed: which keys hold one, and what one looks like in a text."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

# `pad_token` and its kind are no secrets, so a word before `token` has to say that it is one
_NAME = (
    r"(?:pass(?:words?|wd|phrase|code)|secrets?|api[_-]?keys?|(?:access|secret|private|account|storage)[_-]?keys?"
    r"|credentials?|authorization"
    r"|(?:hub|hf|auth|access|api|bearer|refresh|session|secret|sas|wandb|comet|github|huggingface)[_-]?tokens?"
    r")(?:[_-]?\d+)?"
)
_CAMEL = r"(?-i:(?<=[a-z])(?=[A-Z]))"
_KEY = re.compile(rf"(?:^|[_\W]|{_CAMEL}){_NAME}$|^tokens?$", re.IGNORECASE)
_FLAG = re.compile(r"--([\w-]+)(=?)(.*)", re.DOTALL)
# What looks like a secret wherever it is: tokens of Hugging Face and others, signed ones, credentials of a request
_ANYWHERE = tuple(
    (re.compile(pattern, re.IGNORECASE), instead)
    for pattern, instead in {
        r"\b(hf_|api_org_|gh[a-z]_|sk-)[a-z0-9]{20,}": r"\1…",
        r"\b(github_pat_|glpat-|sk-(?:proj|ant|or|svcacct)-)[\w-]{16,}": r"\1…",
        r"\b(hf_(?:jwt|oauth|app)_)[\w.~+/-]+": r"\1…",
        r"\b(xox[a-z]-|AIza|AKIA|ASIA)[\w-]{12,}": r"\1…",
        r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----)[^-]{0,20000}": r"\1…",
        r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*": "…",
        r"\b((?:Basic|Bearer)\s+)(?=[^\s\"']*[\d=])[^\s\"'\\,;]{6,}": r"\1…",
        # user:password@ in an address, where a password may have a slash, but not after a port, and the address may
        # have lost one; and a token alone
        r"\b([a-z][a-z0-9+.]{1,20}:/{1,3})(?![^\s/@:'\"]{0,300}:\d{1,5}/)[^\s/@:'\"]{0,2000}:[^\s'\"]{0,2000}@": (
            r"\1…@"
        ),
        r"\b(?!hf:/)([a-z][a-z0-9+.]{1,20}:/{1,3})(?!git@)[^/\s@'\"]{1,2000}@": r"\1…@",
        r"([?&#;](?:[\w-]{0,40}(?:token|signature)|key|sig|auth|code)=)[^&#\s'\"]+": r"\1…",
    }.items()
)
_IN_TEXT = re.compile(
    rf"(?:(?<![A-Za-z0-9])|{_CAMEL})(?:{_NAME}|(?<![\w-])(?:(?<!\w )|(?=tokens?=\S))(?P<token>tokens?))(?![\w-])"
    r"(?P<quote>\\*[\"']\]?)?(?P<sign>\s*=>?\s*|\s*:\s*|(?P<blank>\s+))",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(r"(?:None|null|True|False|true|false|~|…|<\w+>)(?![^\s,;)}\]\"'])|[,;)}\]]|$")
_SCHEME = re.compile(r"(?:Basic|Bearer|Digest|Token|Negotiate|ApiKey|AWS4-[\w-]+)[ \t]+", re.IGNORECASE)
# an unquoted value ends before a blank, a quote, or a comma and the next key
_BARE = re.compile(r"(?:(?![\s\"'])(?!,\s*[\"'\w-]+\s*[=:]).)+")
_LINE = re.compile(r"[^\r\n\"']*")
_FLAG_BEGINS = re.compile(r"(?:^|[\s'\"`])--[\w-]*$")
_GOES_ON = re.compile(r"[ \t]+\w")
_COUNT = re.compile(r"\d*(?![^\s,;)}\]\"'])")
_QUOTE = re.compile(r"\\*[\"']")
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_SHORT = 200  # characters


def is_secret(key: Any) -> bool:
    """Whether what a setting of this name holds is a secret."""
    return isinstance(key, str) and _KEY.search(key.strip()) is not None


def redacted(value: Any) -> Any:
    """A copy of nested settings in which every secret is None, and left out of every text."""
    if isinstance(value, Mapping):
        return {
            redacted(key): None if is_secret(key) and not isinstance(of, bool) else redacted(of)
            for key, of in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        parts = list(map(redacted, value))
        if parts == list(value):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, str):
        text = _redacted_setting(value) if len(value) < _SHORT else redacted_text(value)
        return value if text == value else text
    return value


def redacted_text(text: str) -> str:
    """The text with … in place of secrets: tokens of known forms, passwords in addresses, values of secret keys."""
    for pattern, instead in _ANYWHERE:
        text = pattern.sub(instead, text)
    return "".join(_without_values(text))


_redacted_setting = lru_cache(maxsize=4096)(redacted_text)  # names and values of settings, which come again and again


def redacted_command(words: Sequence[str]) -> str:
    """A command line in which secrets are … in place of a value, and null in JSON."""
    shown: list[str] = []
    secret = False  # whether the words from here to the next flag are
    for word in words:
        if flag := _FLAG.fullmatch(word):
            name, equals, value = flag.groups()
            secret = is_secret(name)
            shown.append(f"--{name}{equals}{'…' if secret and value else _value(value)}")
        else:
            shown.append("…" if secret else _value(word))
    return shlex.join(shown)


def _value(word: str) -> str:
    """Of a flag: text, or JSON."""
    if not word.lstrip().startswith(("{", "[")):
        return redacted_text(word)
    try:
        found = json.loads(word)
    except ValueError:
        return redacted_text(word)
    without = redacted(found)
    return word if without == found else json.dumps(without)


def _without_values(text: str) -> Iterator[str]:
    done = prose = 0
    for match in _IN_TEXT.finditer(text):
        if match.start() < done or not _names_a_value(match):
            continue
        if match.start() < prose and ":" in match["sign"]:  # of a run that has been looked at
            continue
        end = _end(text, match)
        if end is None and ":" in match["sign"] and (bare := _BARE.match(text, match.end())):
            prose = bare.end()
        if end is not None:
            yield text[done : match.end()]
            start = match.end()
            if (scheme := _SCHEME.match(text, start)) and scheme.end() < end:
                yield scheme[0]
            quote = _QUOTE.match(text, start)
            yield f"{quote[0]}…{quote[0]}" if quote else "…"
            done = end
    yield text[done:]


def _names_a_value(match: re.Match[str]) -> bool:
    """A flag takes its value after a blank. `token` alone is a key in quotes, has its value in them, or has it right
    behind the sign.
    """
    if match["blank"]:
        return _FLAG_BEGINS.search(match.string[max(0, match.start() - 60) : match.start()]) is not None
    if not match["token"] or match["quote"] or match.string[match.end() : match.end() + 1] in {*"\"'"}:
        return True
    return match["sign"] == "=" and not _COUNT.match(match.string, match.end())


def _end(text: str, match: re.Match[str]) -> int | None:
    """Where the value ends that begins behind a key; None if there is none, or the text goes on as prose."""
    start = match.end()
    if _NO_SECRET.match(text, start) or (match["blank"] and text.startswith("-", start)):
        return None
    if quote := _QUOTE.match(text, start):
        return _end_of_quoted(text, quote.end(), quote[0])
    if text[start] in _CLOSING:
        return _end_of_nested(text, start)
    if scheme := _SCHEME.match(text, start):
        line = _LINE.match(text, scheme.end())
        return line.end() if line else None
    bare = _BARE.match(text, start)
    if bare is None:
        return None
    end = start + len(bare[0].rstrip(",;)}]"))
    is_prose = _GOES_ON.match(text, end) and not re.search(r"\d", bare[0])
    return None if ":" in match["sign"] and not match["quote"] and is_prose else end


def _end_of_quoted(text: str, start: int, quote: str) -> int:
    """Behind the closing quote, which is as often escaped as the opening one."""
    end = start
    while (end := text.find(quote, end)) >= 0:
        before = end
        while text[before - 1] == "\\":  # in front of the value is a quote
            before -= 1
        if (end - before) % 2 == 0:
            return end + len(quote)
        end += len(quote)
    return len(text)


def _end_of_nested(text: str, start: int) -> int:
    """Behind the bracket that closes what opens at `start`."""
    expected: list[str] = []
    at = start
    while at < len(text):
        if quote := _QUOTE.match(text, at):
            at = _end_of_quoted(text, quote.end(), quote[0])
            continue
        if text[at] in _CLOSING:
            expected.append(_CLOSING[text[at]])
        elif expected and text[at] == expected[-1]:
            expected.pop()
            if not expected:
                return at + 1
        at += 1
    return len(text)


class KeepsSecrets:
    """A config that is written, shown and sent to trackers without its secrets. Copies and pickles of it keep them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # else `@dataclass` writes one
            cls.__repr__ = KeepsSecrets.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        values = redacted({item.name: getattr(self, item.name) for item in fields(self)})  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    __str__ = __repr__

    def to_dict(self) -> dict[str, Any]:
        """transformers', for trackers and JSON."""
        return redacted(super().to_dict())  # type: ignore[misc]
