"""What the columns of a preference set mean: from a row in any known form to a `PreferenceRow`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from reprlib import repr as shortened
from typing import Any

from trl.data_utils import extract_prompt

from ..checks import RepeatedKeyError, odd_letters, why_look_alike, without_repeats
from .list_forms import list_form

Message = dict[str, Any]
Part = str | list[Message]

COMPLETIONS = ("chosen", "rejected")
SHAREGPT = ("conversations", "conversation")  # hold the prompt's messages where there is no prompt column
TEMPLATE = ("tools", "chat_template_kwargs")  # variables of the chat template
IMAGES = ("images", "image")  # the columns that TRL gives to a vision-language model

# Columns that often hold the prompt or a part of it, in data sets that do not call it "prompt"
_LIKE_A_PROMPT = (
    *("question", "instruction", "query", "input", "prompts", "trajectory", *SHAREGPT),
    *("context", "history", "schema", "problem"),
)
# Columns that often hold what belongs to the prompt beside it
BESIDE_A_PROMPT = (
    *("chat_history", "conversation_history", "dialogue_history", "previous_messages", "contexts"),
    *("passage", "passages", "document", "documents", "article", "functions"),
)
_SYSTEM = re.compile(r"sys(tem)?([-_ ]?(prompt|message|msg|instruction|text|content|turn)s?)?", re.IGNORECASE)

USUAL_ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")  # of chat templates
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}  # in upper or lower case
_SHAREGPT_ROLES = {**_ROLES, "model": "assistant", "observation": "tool"}  # of from/value messages
_BLANK = " \t\r\n\ufeff"
_SAYS = re.compile(rf"[{_BLANK}b'\"]*(?:[\[({{]|\w+\()")  # begins a list or an object, in text
_QUOTE, _END = r"""\\*['"“„]+""", r"""\\*['"”]+"""
_SAID = re.compile(
    rf"(?i)(?:{_QUOTE}(?:role|from){_END}\s*[:,]\s*|\b(?:role|from)=)"
    rf"{_QUOTE}(?:{'|'.join(dict.fromkeys((*USUAL_ROLES, *_SHAREGPT_ROLES)))}){_END}"
)
_CONTENT = re.compile(r"(?i)\b(?:content|value)\b")
# Begins a turn of Anthropic's dialogues, which are text; and what begins one in a dialogue that was written otherwise
DIALOGUE = re.compile(r"(?:\r?\n){2}(?:Human|Assistant):")
# What begins a turn in text, as chat templates write it; in transcripts, what someone asks and someone answers
OF_TEMPLATES = re.compile(
    r"[<\[](?i:[|｜][^<>|｜]*(?:im_start|start[_▁]of|header|turn|user|human|assist|system|bot|prompter)[^<>|｜]*[|｜]>"
    r"|\|(?:start|message)\|>|/?INST\]|</?SYS>>|start_of_turn>|extra_id_\d>"
    r"|\|?(?:user|human|assistant|bot|system)\|?[>\]])"
)
_LIKE_DIALOGUE = re.compile(r"(?:^|[\r\n]|\\n)[ \t]*(?:Human|Assistant)[ \t]*:")
_LINE = r"(?i:(?:^|[\r\n]|\\n|</?s>|###)[-#*_> \t]*"
_ASKS = re.compile(
    r"\b(?:USER|User|HUMAN|Human)[ \t]*:|"
    rf"{_LINE}(?:user|human|customer|client|patient|student|instruct(?:ion)?|question|query|input|q)[*_ \t]*[:：])"
)
_ANSWERS = re.compile(
    r"\b(?:ASSISTANT|Assistant|BOT|Bot|AI|GPT)[ \t]*:|"
    rf"{_LINE}(?:assistant|(?:chat)?bot|ai|(?:chat)?gpt|model|agent|doctor|teacher|response|answer|output|a)"
    r"[*_ \t]*[:：])"
)
# Keys of messages that are meant for the model, if they have a text, a list or a mapping. All others are notes: when,
# by whom and how well it was written
_FOR_THE_MODEL = re.compile(
    r"(?i)name|tools?(_.*)?|functions?(_.*)?|.*(reasoning|thinking|thoughts?)(_.*)?|think|cot|analysis|rationale|"
    r"scratchpad|text|value|message|body|code|caption|query|plan|images?|audios?|videos?|files?|documents?|"
    r"attachments?|context|channel|recipient|prefix|instructions?"
)
_NOT_THE_MODEL = ("system", "user")
_BESIDE_THE_MODEL = ("developer", "tool", "function", "ipython")  # between its messages
_TEXT_PARTS = ("text", "input_text", "output_text")  # of a message's content, the latter in OpenAI's responses
_OF_A_CALL = {"name", "arguments"}
_CURLY = re.compile(r"[\[{:,]\s*[“”„]")
_SET_BY_THE_TRAINER = {"add_generation_prompt", "tokenize", "return_dict"}


class RowError(ValueError):
    """A row that cannot be used. The message names the column, the row, the value and the fix."""


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt and k completions, the chosen one first: all of them text, or all of them messages.

    Attributes:
        prompt: text (empty if there is none) or a list of messages.
        completions: k times the same.
        template: further variables of the chat template: `tools`, and those in `chat_template_kwargs`.
    """

    prompt: Part
    completions: list[Part]
    template: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def wholes(self) -> list[Any]:
        """The prompt together with each completion."""
        prompt: Any = self.prompt  # of the same type as the completions
        return [prompt + part for part in self.completions]

    @property
    def texts(self) -> tuple[str, list[str]]:
        """The text of the prompt and of each completion, for comparisons and word counts."""
        return text_of(self.prompt), [text_of(part) for part in self.completions]


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one data set.

    Args:
        split: name of the set in errors.
        columns: the columns it has.
        prompt_column: the column with the prompt, or None where the completions begin with it.
        system_column: a column whose text becomes the system message of the prompt.
        repeats_prompt: the text completions begin with their prompt, which is then removed from them.
        keeps_parts: messages may hold images and the like, for a processor; else they must be text.
        stored: columns that hold messages as JSON or Python text, as pandas writes them to CSV.
        features: of the columns, if known: they tell a None that Arrow filled in from one that was there.
    """

    split: str
    columns: tuple[str, ...]
    prompt_column: str | None = None
    system_column: str | None = None
    repeats_prompt: bool = False
    keeps_parts: bool = False
    stored: frozenset[str] = frozenset()
    features: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = dict.fromkeys(COMPLETIONS, "a completion") | dict.fromkeys(TEMPLATE, "a variable of the chat template")
        for option, name in {"prompt_column": self.prompt_column, "system_column": self.system_column}.items():
            if name in roles:
                raise RowError(
                    f"{option} names {name!r}, which the {self.split} data set holds {roles[name]} in: name the "
                    "column with nothing else in it, or leave it out"
                )
            roles |= {} if name is None else {name: "the prompt"}

    @classmethod
    def of(
        cls,
        columns: Iterable[str],
        split: str,
        prompt_column: str | None = None,
        system_column: str | None = None,
        keeps_parts: bool = False,
        features: Mapping[str, Any] | None = None,
    ) -> RowReader:
        """A reader for a set with these columns; a RowError names one that is missing."""
        names = tuple(columns)
        read = COMPLETIONS if prompt_column else ("prompt", *COMPLETIONS)
        unnamed = [name for name in names if name not in (prompt_column, system_column)]
        refuse_look_alikes(unnamed, f"the {split} data set", read)
        require_columns(names, split)
        require_named(names, split, prompt_column, system_column)
        if prompt_column is None:
            prompt_column = next((name for name in ("prompt", *SHAREGPT) if name in names), None)
        reader = cls(split, names, prompt_column, system_column, keeps_parts=keeps_parts)
        return replace(reader, features={name: (features or {}).get(name) for name in reader.needed})

    @property
    def needed(self) -> list[str]:
        """The columns it reads."""
        names = (self.prompt_column, self.system_column, *COMPLETIONS, *TEMPLATE)
        return [name for name in dict.fromkeys(names) if name in self.columns]

    def where(self, number: int) -> str:
        return f"row {number} of the {self.split} data set"

    def __call__(self, row: Mapping[str, Any], number: int) -> PreferenceRow:
        """Reads a row; a RowError says what cannot be read, and the fix."""
        where = self.where(number)
        if all(row.get(name) == name for name in COMPLETIONS):
            raise RowError(f"{where} repeats the names of the columns, as a header does: remove it")
        chosen, rejected = (self._part(name, row.get(name), where) for name in COMPLETIONS)
        if isinstance(chosen, str) != isinstance(rejected, str):
            kinds = ("a list of messages", "text")
            raise RowError(
                f"column 'rejected', {where}: {shortened(rejected)} is {kinds[isinstance(rejected, str)]}, but chosen "
                f"is {kinds[isinstance(chosen, str)]}: give both in one form"
            )
        prompt, chosen, rejected = self._split(self._prompt(row, where), chosen, rejected, where)
        prompt, (chosen, rejected) = self._with_system(row, prompt, [chosen, rejected], where)
        for name, part in zip(COMPLETIONS, (chosen, rejected), strict=True):
            if isinstance(part, list) and part[0]["role"] == "system":
                raise RowError(
                    f"column {name!r}, {where}: the completion begins with a system message, "
                    f"{shortened(part[0].get('content'))}: put it in front of the prompt's messages, or into a column "
                    "of its own, and name it with system_column (--system_column NAME)"
                )
            if isinstance(part, list) and part[-1]["role"] in (*_NOT_THE_MODEL, *_BESIDE_THE_MODEL):
                raise RowError(
                    f"column {name!r}, {where}: the last message, {shortened(part[-1].get('content'))}, is of the "
                    f"role {part[-1]['role']!r}: a completion ends with the assistant's; remove what follows it, or "
                    "drop the row"
                )
        return PreferenceRow(prompt, [chosen, rejected], self.template(row, where))

    def prompt_of(self, row: Mapping[str, Any], number: int) -> PreferenceRow:
        """Reads the prompt column alone, which must be there, with the system message and the template's variables."""
        where = self.where(number)
        prompt = self._part(str(self.prompt_column), row.get(str(self.prompt_column)), where)
        prompt, _ = self._with_system(row, prompt, [], where)
        return PreferenceRow(prompt, [], self.template(row, where))

    def _with_system(
        self, row: Mapping[str, Any], prompt: Part, completions: list[Any], where: str
    ) -> tuple[Part, list[Part]]:
        if self.system_column is None:
            return prompt, completions
        return with_system(self.system_text(row, where), prompt, completions, self.system_column, where)

    def system_text(self, row: Mapping[str, Any], where: str) -> str:
        """What the system column has, which may be a message, or its text; "" where there is nothing, or no column."""
        system = row.get(self.system_column) if self.system_column is not None else None
        return text_of(self._part(str(self.system_column), messages_in(system), where)) if system else ""

    def _prompt(self, row: Mapping[str, Any], where: str) -> Part | None:
        """None where the completions begin with it."""
        name = self.prompt_column
        if name is None or (name in SHAREGPT and name not in self.stored and not _looks_said(row.get(name))):
            return None
        return self._part(name, row.get(name), where)

    def _part(self, name: str, value: Any, where: str) -> Part:
        if value is None:
            end = ", or the column if the completions begin with their prompts" if name == self.prompt_column else ""
            raise RowError(
                f"column {name!r}, {where}: the value is None: drop the row, for example with dataset.filter{end}"
            )
        try:
            if name in self.stored and isinstance(value, str):
                value = stored_messages(value)
            return part_of(pruned(value, self.features.get(name)), self.keeps_parts)
        except ValueError as error:
            raise RowError(f"column {name!r}, {where}: {error}") from None

    def _split(self, prompt: Part | None, chosen: Any, rejected: Any, where: str) -> tuple[Part, Part, Part]:
        """Prompt and completions in one form, with no message or character in two of them."""
        if isinstance(chosen, str):
            if prompt is None:
                return self._extracted(chosen, rejected, where)
            if isinstance(prompt, list):  # text that completes a conversation
                return prompt, says("assistant", chosen), says("assistant", rejected)
            if self.repeats_prompt:
                chosen, rejected = (without_repeated(prompt, part) for part in (chosen, rejected))
            return prompt, chosen, rejected
        if isinstance(prompt, list):
            prompt, (chosen, rejected) = without_prompt(prompt, [chosen, rejected])
            return prompt, chosen, rejected
        if prompt and not any(part[0]["role"] in _NOT_THE_MODEL for part in (chosen, rejected)):
            return says("user", prompt), chosen, rejected
        # a text prompt beside whole conversations repeats their beginning
        found: tuple[Any, Part, Part] = self._extracted(chosen, rejected, where)
        if prompt and all(message["role"] == "system" for message in found[0]):
            raise RowError(
                f"columns 'chosen' and 'rejected', {where}: they begin with a system message, and not with the prompt "
                f"{shortened(prompt)}, which would be lost: put the system message into a column of its own, and name "
                "it with system_column (--system_column NAME)"
            )
        return found

    def _extracted(self, chosen: Any, rejected: Any, where: str) -> tuple[Part, Part, Part]:
        """By TRL's rule: the common beginning is the prompt, and something must be left of each completion.

        In a dialogue as text, the prompt ends with the last turn marker that both share. Else the words with which
        both answers begin would be the prompt's.
        """
        text = isinstance(chosen, str)
        turns = [match.end() for match in DIALOGUE.finditer(chosen)] if text else []
        if shared := [end for end in turns if rejected.startswith(chosen[:end])]:
            return chosen[: shared[-1]], chosen[shared[-1] :], rejected[shared[-1] :]
        if text and (mark := turn_mark(chosen)) and turn_mark(rejected):
            raise RowError(
                f"columns 'chosen' and 'rejected', {where}: {shortened(chosen)} and {shortened(rejected)} look like "
                f"dialogues, by their {mark!r}, and no turn that both share begins with an empty line and "
                "'Human:' or 'Assistant:', so where the prompt ends would be a guess: save them as lists of messages "
                "with role and content, write the turns so, or add a prompt column"
            )
        if not text:
            _check_answers(chosen, rejected, where)
        if not text and (n := shared_turns([chosen, rejected])):
            return chosen[:n], chosen[n:], rejected[n:]
        if not text and self.prompt_column is not None:
            raise RowError(
                f"columns 'chosen' and 'rejected', {where}: {shortened(chosen)} and {shortened(rejected)} have no "
                f"turn in common before their last, and column {self.prompt_column!r} has no messages to put before "
                "them: let both begin with the same turns, or leave only the assistant's in them, and the rest to the "
                "prompt"
            )
        if not text or min(len(chosen), len(rejected)) < 2 or chosen[0] != rejected[0]:
            what = "characters" if text else "messages"
            raise RowError(
                f"columns 'chosen' and 'rejected', {where}: there is no prompt beside them, and the {what} that both "
                f"begin with, which would be it, are none: {shortened(chosen)} and {shortened(rejected)}. Add a "
                "prompt column" + (", with '' where there is no prompt" if text else "") + self._candidates()
            )
        if text and self.system_column is not None:
            raise RowError(
                f"columns 'chosen' and 'rejected', {where}: system_column={self.system_column!r} makes messages of "
                "the row, and there is no prompt beside them: the letters that both begin with, which may cut a word, "
                f" would be the user's: {shortened(chosen)} and {shortened(rejected)}. Add a prompt column"
            )
        found: dict[str, Any] = extract_prompt({"chosen": chosen, "rejected": rejected})
        return found["prompt"], found["chosen"], found["rejected"]

    def template(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Variables of the chat template: a list of tools and a mapping of variables, or the JSON of one."""
        found = {}
        for name, kind in zip(TEMPLATE, (list, Mapping), strict=True):
            value = row.get(name)
            try:
                value = json.loads(value.strip() or "null") if isinstance(value, str) else value
            except (ValueError, RecursionError) as error:
                raise RowError(f"column {name!r}, {where}: the text is not JSON: {error}") from None
            if value is not None and not isinstance(value, kind):
                raise RowError(
                    f"column {name!r}, {where}: {shortened(value)} is neither a {kind.__name__.lower()} nor the JSON "
                    "of one: correct it, or drop the column"
                )
            if (other := _not_json(value)) is not None:
                raise RowError(
                    f"column {name!r}, {where}: {other!r} is a {type(other).__name__}, which a chat template cannot "
                    "write: make it the text that it is to see, with dataset.map"
                )
            found[name] = pruned(value, self.features.get(name))
        tools, variables = found.values()
        if ours := _SET_BY_THE_TRAINER & set(variables or {}):
            raise RowError(
                f"column 'chat_template_kwargs', {where}: {sorted(ours)} are set by the trainer: leave them out"
            )
        return ({"tools": tools} if tools else {}) | dict(variables or {})

    def _candidates(self) -> str:
        names = like_a_prompt(self.columns)
        if not names:
            return ""
        first = {is_system(name): name for name in reversed(names)}
        options = {"prompt_column": first.get(False), "system_column": first.get(True)}
        how = [f"{option}={name!r} (--{option} {name})" for option, name in options.items() if name]
        return f"; there are the columns {names}: name the prompt with {' and '.join(how)}"


def is_system(name: str) -> bool:
    """Whether a column's name says that it holds system messages."""
    return _SYSTEM.fullmatch(name) is not None


def like_a_prompt(columns: Sequence[str]) -> list[str]:
    """Those of the columns whose names say that they hold a prompt or a part of it."""
    capitals = [name for name in columns if name != "prompt" and name.lower() == "prompt"]
    return [*capitals, *(name for name in _LIKE_A_PROMPT if name in columns), *filter(is_system, columns)]


def require_columns(names: Sequence[str], split: str) -> None:
    """Raises a RowError if there are no chosen or no rejected completions."""
    if missing := [name for name in COMPLETIONS if name not in names]:
        fix = "rename yours in the file, or with dataset.rename_column"
        if otherwise := [name for name in names if name.lower() in missing]:
            fix = f"names are case-sensitive, so {' and '.join(map(repr, otherwise))} must be written in lower case"
        elif list_form(names) is not None:
            fix = (
                "these are scored lists, so make pairs of them with trl-margins pairs FILE --out pairs.jsonl.gz, or "
                "in Python with make_pairs"
            )
        elif "responses" in names:
            fix = (
                "these are answers without scores: score them, and make pairs of them with trl-margins pairs FILE "
                "--out pairs.jsonl.gz"
            )
        if odd := next(filter(None, map(odd_letters, names)), ""):
            fix = f"look at its names, in which {odd}"
        raise RowError(
            f"the {split} data set has no column {' and no column '.join(map(repr, missing))}, only {list(names)}: a "
            f"preference pair is chosen and rejected, and usually prompt; {fix}"
        )


def refuse_look_alikes(names: Sequence[str], where: str, read: Iterable[str]) -> None:
    """Raises a RowError if a column's name looks like one of those that are read, and is another."""
    if why := why_look_alike(names, read):
        raise RowError(f"{where}: {why}")


def refuse_images(names: Sequence[str], what: str) -> None:
    """Raises a RowError if there are images, of which text alone says nothing. `what` begins the message."""
    if images := [name for name in IMAGES if name in names]:
        raise RowError(
            f"{what} by their text alone, and there is the column {images[0]!r}: to leave the images out, remove the "
            "column"
        )


def require_named(
    names: Sequence[str], split: str, prompt_column: str | None = None, system_column: str | None = None
) -> None:
    """Raises a RowError if an option names a column that is not there."""
    for option, name in {"prompt_column": prompt_column, "system_column": system_column}.items():
        if name is not None and name not in names:
            raise RowError(f"{option} names {name!r}, but the {split} data set has only the columns {list(names)}")


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


def turn_mark(text: str) -> str | None:
    """What begins the first turn of a dialogue in a text; None in a text that is none: a dialogue has two turns."""
    for marks in (_LIKE_DIALOGUE, OF_TEMPLATES):
        found = marks.finditer(text)
        if (first := next(found, None)) and next(found, None):
            return first[0].strip()
    asked = _ASKS.search(text)
    return asked[0].strip() if asked and _ANSWERS.search(text, asked.end()) else None


def around_prompt(prompt: str, part: str) -> tuple[str, str] | None:
    """What is before the prompt in a completion that repeats it, and behind it; white space around it aside."""
    begin = prompt if part.startswith(prompt) else prompt.lstrip() if prompt.lstrip() in part else prompt.strip()
    before, found, behind = part.partition(begin) if begin else ("", "", "")
    return (before, behind) if found else None


def without_repeated(prompt: str, part: str) -> str:
    """A completion without the prompt with which it begins."""
    before, behind = around_prompt(prompt, part) or ("", part)
    return part if before.strip() else behind


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
        value = value.lstrip(_BLANK)
        as_json = partial(json.loads, strict=False, object_pairs_hook=without_repeats)  # with line breaks in texts
        for read in (as_json, ast.literal_eval):
            try:
                return read(value)
            except RepeatedKeyError:
                raise
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return value


def messages_in(value: Any) -> Any:
    """The messages that a text spells, or the one; else the value."""
    found = spelled(value)
    found = [found] if isinstance(found, Mapping) else found
    return found if is_messages(found) else value


def looks_said(text: str) -> bool:
    """Whether a text begins as a list of messages does when it is printed: in JSON, or by Python in whatever class."""
    return _SAYS.match(text) is not None and _SAID.search(text) is not None and _CONTENT.search(text) is not None


def stored_messages(text: str) -> Any:
    """Messages that a CSV file holds as text, JSON or a Python list; None if the text is something else."""
    try:
        value = _spelled(text)
        why = "is neither JSON nor a Python list" + ", for its quotes are curly" * bool(_CURLY.search(text))
    except RepeatedKeyError as error:
        value, why = text, f"has the key {error.key!r} twice"
    if isinstance(value, list | tuple) and not is_messages(value) and looks_said(text):
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


def without_prompt(
    prompt: list[Message], completions: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """A prompt in messages, and completions without the turns of it that they repeat.

    Whole conversations may have a system message that the prompt beside them lacks, or the other way round.
    """

    def repeats(part: list[Message], begin: list[Message]) -> bool:
        return len(part) > len(begin) and _same(part[: len(begin)], begin)

    n = shared_turns(completions)
    shared = completions[0][:n] if completions else []
    more = n - len(prompt)
    if more > 0 and all(m["role"] == "system" for m in shared[:more]) and _same(shared[more:], prompt):
        return shared, [part[n:] for part in completions]
    less = next((i for i, message in enumerate(prompt) if message["role"] != "system"), len(prompt))
    for begin in (prompt, prompt[less:]):
        if begin and any(repeats(part, begin) for part in completions):
            return prompt, [part[len(begin) :] if repeats(part, begin) else part for part in completions]
    return prompt, completions


def is_for_the_model(key: str, value: Any) -> bool:
    """Whether a message has something with this key that a model may have to see, beside role and content."""
    return bool(value) and isinstance(value, str | list | Mapping) and _FOR_THE_MODEL.fullmatch(key) is not None


def without_notes(part: Part) -> Part:
    """What is said, by whom, and what else is for the model: equal for messages that say the same."""
    if isinstance(part, str):
        return part
    said = ("role", "content")
    return [{key: value for key, value in m.items() if key in said or is_for_the_model(key, value)} for m in part]


def _same(some: list[Message], others: list[Message]) -> bool:
    """Whether the messages say the same, whatever other keys they have."""
    keys = ("role", "content", "tool_calls")
    return [[m.get(key) for key in keys] for m in some] == [[m.get(key) for key in keys] for m in others]


def shared_turns(parts: list[list[Message]]) -> int:
    """How many messages all of them begin with; the last message of each is not counted."""
    most = min(map(len, parts), default=1) - 1
    return next(
        (i for i in range(most) if not all(_same(part[i : i + 1], parts[0][i : i + 1]) for part in parts)), most
    )


def _check_answers(chosen: list[Message], rejected: list[Message], where: str) -> None:
    """
    Raises:
        RowError: one of them is only what the other begins with.
    """
    n = min(len(chosen), len(rejected))
    name = "rejected" if len(rejected) == n else "chosen"
    if chosen[n - 1]["role"] in _NOT_THE_MODEL and len(chosen) != len(rejected) and _same(chosen[:n], rejected[:n]):
        raise RowError(
            f"column {name!r}, {where}: all its messages, {n}, are what the other completion begins with, so no "
            "answer is left of it: add the assistant's, or drop the row"
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
    """Without the keys that Arrow added: it gives all mappings of a column the same keys, with None."""
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        kept = _OF_A_CALL if value.keys() == _OF_A_CALL else ()  # a call's may be null, and some templates write so
        return {key: pruned(each, feature.get(key)) for key, each in value.items() if each is not None or key in kept}
    if isinstance(value, list) and (within := getattr(feature, "feature", None)) is not None:
        return [pruned(each, within) for each in value]
    return value


def is_list_of(value: Any, kinds: Any) -> bool:
    """Whether it is a list, also an empty one, with nothing but values of these types."""
    return isinstance(value, list) and all(isinstance(each, kinds) for each in value)


def is_messages(value: Any) -> bool:
    """Whether it is a list of messages with known roles."""
    if not _looks_said(value):
        return False
    for message in value:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role.lower() not in (_ROLES if "role" in message else _SHAREGPT_ROLES):
            return False
    return True


def _not_json(value: Any) -> Any:
    """The first value inside that JSON does not have, such as a date; None if there is none."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((found for each in value if (found := _not_json(each)) is not None), None)
    return None if value is None or isinstance(value, str | int | float) else value


def _looks_said(value: Any) -> bool:
    """Whether it is a list of messages, perhaps with unknown roles."""
    if not is_list_of(value, Mapping) or not value:
        return False
    return all({"content", "value"} & each.keys() and {"role", "from"} & each.keys() for each in value)


def with_system(
    system: str, prompt: Part, completions: list[Any], column: str, where: str
) -> tuple[list[Message], list[Part]]:
    """With a system message in front; text becomes messages, since only they can have one.

    Raises a RowError for a dialogue in text, and for a prompt that has another system message than that of `column`.
    """
    if isinstance(prompt, str):
        dialogue = prompt.strip()
        if dialogue.startswith("Human:") and dialogue.endswith("\nAssistant:"):
            raise RowError(
                f"{where}: {shortened(dialogue)} marks turns, and system_column={column!r} makes messages of the row, "
                "one of which would hold them all: save it as lists of messages with role and content"
            )
        prompt, completions = says("user", prompt), [says("assistant", part) for part in completions]
    has_own = prompt[0]["role"] == "system"
    own = text_of(prompt[:1]).strip() if has_own else ""
    if system and not own:
        prompt = says("system", system) + prompt[has_own:]
    elif system and own != system.strip():
        raise RowError(
            f"column {column!r}, {where}: {shortened(system)} is another system message than the prompt's own, "
            f"{shortened(own)}: leave system_column out, or one of the two"
        )
    return prompt, completions


def says(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}]
