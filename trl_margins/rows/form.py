"""What the columns of a preference set mean: from a row in any known form to a `PreferenceRow`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from reprlib import repr as shortened
from typing import Any

from datasets import Dataset
from trl.data_utils import extract_prompt

from ..checks import odd_letters, why_look_alike
from .list_forms import list_form
from .messages import (
    SHAREGPT,
    Message,
    Part,
    like_messages,
    may_be_messages,
    messages_in,
    part_of,
    pruned,
    say_the_same,
    says,
    shared_turns,
    stored_messages,
    text_of,
)

COMPLETIONS = ("chosen", "rejected")
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
    *("passage", "passages", "document", "documents", "article", "functions", "initial_reason_steps"),
)
_SYSTEM = re.compile(r"sys(tem)?([-_ ]?(prompt|message|msg|instruction|text|content|turn)s?)?", re.IGNORECASE)

# Begins a turn of Anthropic's dialogues, which are text; and what begins one in a dialogue that was written otherwise
DIALOGUE = re.compile(r"(?:\r?\n){2}(?:Human|Assistant):")
# What begins a turn in text, as chat templates write it; in transcripts, what someone asks and someone answers
OF_TEMPLATES = re.compile(
    r"[<\[](?i:[|｜][^<>|｜]*(?:im_start|start[_▁]of|header|turn|user|human|assist|system|bot|prompter)[^<>|｜]*[|｜]>"
    r"|\|(?:start|message)\|>|/?INST\]|</?SYS>>|start_of_turn>|extra_id_\d>"
    r"|\|?(?:user|human|assistant|bot|system)\|?[>\]])"
)
_LIKE_DIALOGUE = re.compile(r"(?:^|[\r\n]|\\n)[ \t]*(?:Human|Assistant)[ \t]*:")
_LINE = r"(?i:(?:^|[\r\n]|\\n|</?s>|###)[-#*_> \t]{0,12}"  # not more: each # of a long line begins a search
ASKS = re.compile(
    r"\b(?:USER|User|HUMAN|Human)[ \t]*:|"
    rf"{_LINE}(?:user|human|customer|client|patient|student|instruct(?:ion)?|question|query|input|q)[*_ \t]*[:：])"
)
ANSWERS = re.compile(
    r"\b(?:ASSISTANT|Assistant|BOT|Bot|AI|GPT)[ \t]*:|"
    rf"{_LINE}(?:assistant|(?:chat)?bot|ai|(?:chat)?gpt|model|agent|doctor|teacher|response|answer|output|a)"
    r"[*_ \t]*[:：])"
)
_NOT_THE_MODEL = ("system", "user")
_BESIDE_THE_MODEL = ("developer", "tool", "function", "ipython")  # between its messages
_SET_BY_THE_TRAINER = {
    *("messages", "conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message"),
    *("return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length"),
    *("tokenizer_kwargs", "self"),
}


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

    @property
    def has_prompts(self) -> bool:
        """Whether a column holds the prompts; one of whole conversations has them only where they are messages."""
        return self.prompt_column not in (None, *SHAREGPT)

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
        if not system and not isinstance(system, int | float):  # a number is none, also 0
            return ""
        return text_of(self._part(str(self.system_column), messages_in(system), where))

    def has_unread_system(self, row: Mapping[str, Any]) -> bool:
        """Whether the system column has messages, written as text, that cannot be read."""
        system = row.get(self.system_column) if self.system_column is not None else None
        return may_be_messages(system) and isinstance(messages_in(system), str)

    def _prompt(self, row: Mapping[str, Any], where: str) -> Part | None:
        """None where the completions begin with it."""
        name = self.prompt_column
        if name is None or (name in SHAREGPT and name not in self.stored and not like_messages(row.get(name))):
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
    alike = [name for known in _LIKE_A_PROMPT for name in columns if name.lower() == known]
    return [*capitals, *alike, *filter(is_system, columns)]


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


def is_empty(dataset: Dataset, name: str) -> bool:
    """Whether no row has anything in a column. Read up to the first image, and without decoding it."""
    parts = dataset.select_columns(name).with_format("arrow").iter(batch_size=8)
    return not any(value for part in parts for value in part[name].to_pylist())


def refuse_images(dataset: Dataset, what: str) -> None:
    """Raises a RowError if there are images, of which text alone says nothing. `what` begins the message."""
    if images := [name for name in IMAGES if name in dataset.column_names and not is_empty(dataset, name)]:
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


def turn_mark(text: str) -> str | None:
    """What begins the first turn of a dialogue in a text; None in a text that is none: a dialogue has two turns."""
    for marks in (_LIKE_DIALOGUE, OF_TEMPLATES):
        found = marks.finditer(text)
        if (first := next(found, None)) and next(found, None):
            return first[0].strip()
    asked = ASKS.search(text)
    return asked[0].strip() if asked and ANSWERS.search(text, asked.end()) else None


def around_prompt(prompt: str, part: str) -> tuple[str, str] | None:
    """What is before the prompt in a completion that repeats it, and behind it; white space around it aside."""
    begin = prompt if part.startswith(prompt) else prompt.lstrip() if prompt.lstrip() in part else prompt.strip()
    before, found, behind = part.partition(begin) if begin else ("", "", "")
    return (before, behind) if found else None


def without_repeated(prompt: str, part: str) -> str:
    """A completion without the prompt with which it begins."""
    before, behind = around_prompt(prompt, part) or ("", part)
    return part if before.strip() else behind


def without_prompt(
    prompt: list[Message], completions: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """A prompt in messages, and completions without the turns of it that they repeat.

    Whole conversations may have a system message that the prompt beside them lacks, or the other way round.
    """

    def repeats(part: list[Message], begin: list[Message]) -> bool:
        return len(part) > len(begin) and say_the_same(part[: len(begin)], begin)

    n = shared_turns(completions)
    shared = completions[0][:n] if completions else []
    more = n - len(prompt)
    if more > 0 and all(m["role"] == "system" for m in shared[:more]) and say_the_same(shared[more:], prompt):
        return shared, [part[n:] for part in completions]
    less = next((i for i, message in enumerate(prompt) if message["role"] != "system"), len(prompt))
    for begin in (prompt, prompt[less:]):
        if begin and any(repeats(part, begin) for part in completions):
            return prompt, [part[len(begin) :] if repeats(part, begin) else part for part in completions]
    return prompt, completions


def _check_answers(chosen: list[Message], rejected: list[Message], where: str) -> None:
    """
    Raises:
        RowError: one of them is only what the other begins with.
    """
    n = min(len(chosen), len(rejected))
    name = "rejected" if len(rejected) == n else "chosen"
    if (
        chosen[n - 1]["role"] in _NOT_THE_MODEL
        and len(chosen) != len(rejected)
        and say_the_same(chosen[:n], rejected[:n])
    ):
        raise RowError(
            f"column {name!r}, {where}: all its messages, {n}, are what the other completion begins with, so no "
            "answer is left of it: add the assistant's, or drop the row"
        )


def _not_json(value: Any) -> Any:
    """The first value inside that JSON does not have, such as a date; None if there is none."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((found for each in value if (found := _not_json(each)) is not None), None)
    return None if value is None or isinstance(value, str | int | float) else value


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
