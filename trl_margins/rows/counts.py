"""What reading the rows of a data set finds, counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html import unescape
from typing import Any
from unicodedata import category, normalize

from datasets import Dataset, IterableDataset

from ..checks import looks_like
from ..pairs import FACTOR, IS_FLIPPED
from .beside import Seen, count_unused, suspects_of, texts_beside
from .form import (
    ANSWERS,
    ASKS,
    COMPLETIONS,
    OF_TEMPLATES,
    TEMPLATE,
    PreferenceRow,
    RowError,
    RowReader,
    around_prompt,
    turn_mark,
)
from .messages import (
    USUAL_ROLES,
    Part,
    is_messages,
    may_be_messages,
    seem_messages,
    spelled,
    text_of,
    without_notes,
)
from .raw import ahead, raw_rows
from .references import may_be_meant, referred

_HUMAN = re.compile(  # begins a turn of the user in text
    r"\n\r?\nHuman:|\[INST\]|<human>:|<extra_id_1>User\b|<reserved_106>"
    r"|[<\[][|｜](?:[Uu]ser|USER|USER_TOKEN|[Hh]uman|prompter)[|｜][>\]]"
    r"|<\|?(?:im_start|im_user|start|start_\w{1,20}|header_start)\|?>(?:user|human)\b"
)
# A label of a turn: behind what may be before it, or the user's within a line
_LABEL = re.compile(
    r"(?:(?P<begin>[\r\n][#*_ \t]{0,8}|[>\]｜|]|###[ \t]{0,3})(?:[A-Z]\w{0,19} ){0,2}|\b(?=USER|User|HUMAN|Human))"
    r"([^\W\d_]\w{0,29}[*_ \t]{0,3}[:：])"
)
# The label of the turn that a prompt asks for, or that a completion begins with
_ASKED_FOR = re.compile(
    r"\b(\w{1,30}[*_ \t]{0,3}[:：])[*_\s]*\Z|\b((?:ASSISTANT|Assistant|Response)[ \t]{0,3}:)[^\r\n:]{0,40}\s*\Z"
)
_ANSWERED = re.compile(r"\W{0,12}((?:ASSISTANT|Assistant|Response)[*_ \t]{0,3}:)")
_ASK = re.compile(r"(?i:instruction|question|q)\W")  # what other text than a dialogue's seldom begins a line with
_TEMPLATES = re.compile(r"[|｜]|INST|turn|SYS")  # in marks that nobody else writes
_OF_USER = re.compile("(?i)user|human|instruction|prompter")
_NO_CHANCE = 16  # characters of a prompt that no answer begins with by chance
_QUOTES = str.maketrans("‘’“”", "''\"\"")
# asks the model for a turn
_TO_ANSWER = re.compile(r"(?:\b(?:ASSISTANT|[Aa]ssistant)|### ?Response)(?:[|｜]>|[ \t]*:)\s*\Z")
_OF_TOOLS = re.compile("tool|function", re.IGNORECASE)
_OF_A_TOOL = {"parameters", "input_schema", "description"}


@dataclass
class RowCounts:
    """What reading the rows of a set found."""

    n: int = 0
    text: Seen = field(default_factory=Seen)
    messages: Seen = field(default_factory=Seen)
    same_rows: set[int] = field(default_factory=set)  # the same completion twice
    blank: dict[str, Seen] = field(default_factory=dict)  # completions without text of their own, by their column
    spelled: dict[str, Seen] = field(default_factory=dict)  # texts that spell messages, by their column
    user_turns: Seen = field(default_factory=Seen)  # within a completion
    user_marks: Seen = field(default_factory=Seen)  # within a completion, what begins a turn of the user in text
    user_mark: str = ""  # the first of them
    prefilled: Seen = field(default_factory=Seen)  # prompts that end with the assistant's turn
    rendered: Seen = field(default_factory=Seen)  # prompts with a message that a chat template has rendered
    rendered_mark: str = ""  # the first of their marks
    asking: Seen = field(default_factory=Seen)  # prompts with a dialogue in a message that asks the model for a turn
    roles: dict[str, Seen] = field(default_factory=dict)  # that chat templates seldom know
    repeated: Seen = field(default_factory=Seen)  # text completions that both begin with their prompt
    repeated_once: Seen = field(default_factory=Seen)  # one of them does
    repeated_alike: Seen = field(default_factory=Seen)  # they begin with it in another spelling
    repeated_within: Seen = field(default_factory=Seen)  # they hold it behind the same text
    dialogues: Seen = field(default_factory=Seen)  # of these, those that mark turns
    seem: Seen = field(default_factory=Seen)  # texts that all seem to be messages, and are not `spelled`
    named: int = 0  # rows whose completions are names of columns, or their ends
    referring: int = 0  # rows whose completions point to other columns
    referred: set[str] = field(default_factory=set)  # these columns
    unused: dict[str, Seen] = field(default_factory=dict)  # columns like a prompt whose text the prompt lacks
    beside: dict[str, Seen] = field(default_factory=dict)  # the same of columns of any other name
    contradicted: Seen = field(default_factory=Seen)  # prompts as text beside conversations that begin otherwise
    unprompted: Seen = field(default_factory=Seen)  # text rows whose prompt is empty
    alike: dict[str, Seen] = field(default_factory=dict)  # columns whose names look like those of others that are read
    prompts: set[int] = field(default_factory=set)  # hashes of prompts
    pairs: list[int] = field(default_factory=list)  # hashes of prompt and completions in any order, of each row

    @property
    def prompted(self) -> int:
        """Text rows whose prompt is not empty."""
        return self.text.n - self.unprompted.n

    @property
    def repeats_prompt(self) -> bool:
        """Whether all text completions begin with their prompt."""
        return 0 < self.repeated.n == self.prompted

    def add(
        self, row: PreferenceRow, raw: Mapping[str, Any], number: int, asked: Any, suspects: Iterable[str]
    ) -> None:
        """Counts a row, given also as the data set has it (`raw`), with the value of its prompt column (`asked`) and
        unread columns that may hold a part of the prompt (`suspects`).
        """
        completions: list[Any] = row.completions
        self.n += 1
        (self.messages if row.is_conversational else self.text).add(number)
        if without_notes(completions[0]) == without_notes(completions[1]):
            self.same_rows.add(number)
        if isinstance(row.prompt, str):
            if not row.prompt:
                self.unprompted.add(number)
            if row.prompt.rstrip().endswith("\nHuman:"):
                self.user_turns.add(number)
            around = [around_prompt(row.prompt, part) for part in completions]
            befores = [each and each[0].strip() for each in around]
            if befores == ["", ""]:
                self.repeated.add(number)
                completions = [behind for _, behind in filter(None, around)]
            elif len(row.prompt) >= _NO_CHANCE and all(_begins_like(part, row.prompt) for part in completions):
                self.repeated_alike.add(number)
            elif "" in befores and row.prompt.strip():
                self.repeated_once.add(number)
            elif befores[0] and befores[0] == befores[1]:
                self.repeated_within.add(number)
                if all(each and _marks_turns(*each) for each in around):
                    self.dialogues.add(number)
        else:
            if any(message["role"] == "user" for part in completions for message in part):
                self.user_turns.add(number)
            if row.prompt[-1]["role"] == "assistant":
                self.prefilled.add(number)
            texts = [text_of([message]) for message in row.prompt]
            if rendered := next(filter(None, map(_rendered_mark, texts)), None):
                self.rendered_mark = self.rendered_mark or rendered
                self.rendered.add(number)
            elif asking := next(filter(None, map(_asking_mark, texts)), None):
                self.rendered_mark = self.rendered_mark or asking
                self.asking.add(number)
            found = {message["role"] for part in (row.prompt, *completions) for message in part}
            for role in found.difference(USUAL_ROLES):
                self.roles.setdefault(role, Seen()).add(number)
        for name, part in zip(COMPLETIONS, completions, strict=True):
            if is_blank(part):
                self.blank.setdefault(name, Seen()).add(number)
        marks = (mark and mark[0].strip() for mark in (_HUMAN.search(text_of(part)) for part in completions))
        if mark := next(filter(None, marks), None) or _asked_again(row):
            self.user_mark = self.user_mark or mark
            self.user_marks.add(number)
        prompt = text_of(row.prompt)
        self.prompts.add(hash(prompt))
        # the same with and without a prompt that the completions repeat, or that is not apart from them
        wholes = (row.prompt + part for part in completions)
        self.pairs.append(hash(frozenset(map(_said, wholes))))
        # the reader compares a prompt in messages
        if row.is_conversational and isinstance(asked, str) and asked.strip() not in prompt:
            self.contradicted.add(number)
        count_unused(self.unused, raw, number, prompt, suspects)


def _rendered_mark(text: str) -> str | None:
    """The first mark of a chat template in a message that one seems to have rendered: it begins with some, and has two
    of turns.
    """
    marks = [mark[0] for mark in OF_TEMPLATES.finditer(text) if _TEMPLATES.search(mark[0])]
    return marks[0] if len(marks) > 1 and text.lstrip()[:1] in ("<", "[") else None


def _asking_mark(text: str) -> str | None:
    """The mark of the user's turn in a message with a dialogue that ends where the model is to answer."""
    mark = turn_mark(text) if _TO_ANSWER.search(text) else None
    return mark if mark and _OF_USER.search(mark) else None


def _asked_again(row: PreferenceRow) -> str | None:
    """The label of the user's turn in a prompt of text that asks for the model's, if a completion goes on with it.

    Other text has labels, too, such as Input: the model's has to follow, unless both are such as only dialogues have.
    """
    prompt = row.prompt if isinstance(row.prompt, str) else ""
    if not prompt.strip():
        return None
    parts = [text_of(part) for part in row.completions]
    if any(prompt.strip() in part for part in parts):
        return None
    found = _ASKED_FOR.search(prompt[-120:]) or next(filter(None, map(_ANSWERED.match, parts)), None)
    if found is None:
        return None
    of_model = next(filter(None, found.groups()))
    labels = {label[2] for label in _LABEL.finditer(f"\n{prompt}")} - {of_model}
    if not labels:
        return None
    asks = ASKS.search(prompt) if ANSWERS.search(f"\n{of_model}") else None
    for part in parts:
        last = part.rfind(of_model)
        for again in _LABEL.finditer(part):
            label, is_begun = again[2], again["begin"] is not None
            alone = label.startswith(("USER", "HUMAN")) or (
                asks is not None
                and is_begun
                and (label.startswith(("User", "Human")) or (_ASK.match(label) and asks[0].endswith(label)))
            )
            if label in labels and (alone or again.end() <= last):
                return label
    return None


def _begins_like(part: str, prompt: str) -> bool:
    """Whether a completion begins with a copy of the prompt, in other line ends or blanks, quotes or capitals."""
    begin, found = map(_spelled_alike, (prompt, part[: 2 * len(prompt) + 20]))
    answer = found.removeprefix(begin)
    # nothing is behind the prompt that is corrected
    return answer != found and any(map(str.isalnum, answer)) and not (begin[-1].isalnum() and answer[0].isalnum())


def _spelled_alike(text: str) -> str:
    return " ".join(normalize("NFKC", unescape(text)).translate(_QUOTES).split()).casefold()


def _said(part: Part) -> str:
    """What tells a part from others, as text or as messages: its words, and calls of tools, which have none."""
    calls = [] if isinstance(part, str) else [each for each in (message.get("tool_calls") for message in part) if each]
    return " ".join(text_of(part).split()) + (repr(calls) if calls else "")


def _marks_turns(before: str, behind: str) -> bool:
    """Whether the text around a prompt marks turns, one of them before it."""
    mark = turn_mark(f"{before}x{behind}")
    return mark is not None and mark in before


def is_blank(part: Part) -> bool:
    """Whether a completion has neither text nor anything else, such as a call of a tool."""
    others = part if isinstance(part, list) else []
    return not any(_is_shown(each) and not each.isspace() for each in text_of(part)) and all(
        message.keys() <= {"role", "content"} and isinstance(message["content"], str) for message in others
    )


def _is_shown(character: str) -> bool:
    return character.isprintable() or category(character) == "Co"  # private use: a font's, or a tokenizer's


def count_rows(
    dataset: Dataset | IterableDataset,
    reader: RowReader,
    on_error: Callable[[RowError, int], None] | None = None,
    on_row: Callable[[PreferenceRow, int], None] | None = None,
) -> RowCounts:
    """Reads every row, or the first few of a stream.

    A row that cannot be read is an error, or is left out and given to `on_error`; `on_row` gets every other row.
    """
    suspects, beside, pointed = suspects_of(reader), texts_beside(dataset, reader), _pointed(dataset, reader)
    counts, prompt = RowCounts(), reader.prompt_column
    has_conversations = "messages" in reader.columns and reader.has_prompts and prompt != "messages"
    conversations = ["messages"] if has_conversations else []
    columns = list(dict.fromkeys([*reader.needed, *suspects, *beside, *conversations, *pointed]))
    alike = [name for name in reader.columns if taken_for(name, reader)]
    of_tools = [] if "tools" in reader.columns else [*filter(_OF_TOOLS.search, reader.columns)]
    of_tools = [name for name in of_tools if name not in (*suspects, prompt, reader.system_column)]
    columns += [name for name in (*alike, *of_tools) if name not in columns]
    ends = {f"_{name}"[i:] for name in reader.columns for i in range(len(name)) if f"_{name}"[i] == "_"}
    texts = [name for name in (prompt, *COMPLETIONS) if name is not None and name not in reader.stored]
    for number, raw in enumerate(ahead(dataset, columns, reader.split)):
        try:
            row = reader(raw, number)
        except RowError as error:
            if on_error is None:
                raise
            on_error(error, number)
            continue
        asked = None if prompt is None or prompt in reader.stored else raw.get(prompt)
        is_read = prompt in suspects and (prompt in reader.stored or is_messages(asked))
        counts.add(row, raw, number, asked, [name for name in suspects if not (is_read and name == prompt)])
        count_unused(counts.beside, raw, number, text_of(row.prompt), beside)
        # beside a prompt, they usually are the prompt and the chosen completion
        whole = "\n".join(map(text_of, (row.prompt, *row.completions))) if conversations else ""
        count_unused(counts.beside, raw, number, whole, conversations)
        if found := referred(row.completions, {name: raw.get(name) for name in pointed}, text_of(row.prompt)):
            counts.referring += 1
            counts.referred |= found
        for name in dict.fromkeys([*alike, *of_tools]):
            if raw.get(name) not in (None, "", [], {}) and (name in alike or _defines_tools(raw[name])):
                counts.alike.setdefault(name, Seen()).add(number)
        counts.named += all(isinstance(part, str) and f"_{part}" in ends for part in row.completions)
        spelled_out = [name for name in texts if may_be_messages(raw.get(name))]
        spelled_out += [str(reader.system_column)] * reader.has_unread_system(raw)
        if not spelled_out and all(isinstance(part, str) and seem_messages(part) for part in row.completions):
            counts.seem.add(number)
        for name in spelled_out:
            counts.spelled.setdefault(name, Seen()).add(number)
        if on_row is not None:
            on_row(row, number)
    return counts


def _pointed(dataset: Dataset | IterableDataset, reader: RowReader) -> list[str]:
    """The columns to which the completions of the first row only point, if they do."""
    others = [name for name in reader.columns if name not in reader.needed and may_be_meant(name)]
    first = next(raw_rows(dataset, [*COMPLETIONS, *others], reader.split), {}) if others else {}
    parts = [first.pop(name, None) for name in COMPLETIONS]
    return sorted(referred(parts, first, ""))


def taken_for(name: str, reader: RowReader) -> str | None:
    """Of the columns that are read where they are there, one that is not, and that a reader takes the name for."""
    known = [each for each in (*TEMPLATE, "system", IS_FLIPPED, FACTOR) if each not in reader.columns]
    if name in (reader.prompt_column, reader.system_column):
        return None
    return name.lower() if name.lower() in known and name.lower() in TEMPLATE else looks_like(name, known)


def _defines_tools(value: Any) -> bool:
    found = spelled(value)
    found = [found] if isinstance(found, Mapping) else found
    is_list = isinstance(found, list) and bool(found) and all(isinstance(each, Mapping) for each in found)
    return is_list and all("function" in each or ("name" in each and {*each} & _OF_A_TOOL) for each in found)
