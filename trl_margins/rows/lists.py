"""Scored lists of answers: from a data set in any known form to `ScoredList`s."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from reprlib import repr as shortened
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset

from .form import (
    TEMPLATE,
    Message,
    Part,
    PreferenceRow,
    RowError,
    RowReader,
    is_messages,
    part_of,
    pruned,
    says,
    shared_turns,
    text_of,
    with_system,
    without_prompt,
)
from .list_forms import FORMS, HELPSTEER, MODELS, RESPONSES, STRENGTH, VOTE, VOTES, ListForm, list_form
from .opened import raw_rows
from .scores import ScoreColumns, ScoreError, as_number, problem_of, refuse_class_labels

logger = logging.getLogger(__name__)

# Keys of an answer that is a mapping; the first that it has counts
RESPONSE_KEYS = ("response", "answer", "completion", "text")
RATINGS = ("overall_score", "fine-grained_score", "score", "rating", "reward", "rank")
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")  # of UltraFeedback's annotations

_UNRATED = {"", "n/a", "na", "nan", "none", "null"}
_HUMAN = re.compile(r"\s*\n\nHuman:|\s*\n\nAssistant:")  # Nectar's turns
_STEER = re.compile(r"\n?<extra_id_1>(?:User|Assistant)\n")  # HelpSteer2's
_WINNERS = {
    "model_a": (1.0, 0.0),
    "model_b": (0.0, 1.0),
    "tie": (0.5, 0.5),
    **dict.fromkeys(("tie (bothbad)", "tie (both bad)", "bothbad", "both_bad"), (0.0, 0.0)),
}

# What is left out, or deserves a warning
_NO_TEXT = "{n} answers are None, and were left out"
_NO_SCORE = "{n} answers have no score, and were left out"
_NO_ANSWERS = "{n} rows have no answer with a score, and were left out"
_SEVERAL_TURNS = (
    "{n} conversations were left out, whose answers differ before the last turn: what the user said to one of them is "
    "no prompt of the other"
)
_BROKEN_TEXT = "{n} texts held half of a surrogate pair, which was replaced"
_FORGED = (
    "{n} answers have the overall_score 10 and a mean rating of at most 2: early revisions of UltraFeedback have 10 "
    "where the annotator wrote 1. Load a later revision, or rate by the mean of the annotations: "
    "score_columns=['helpfulness', 'honesty', 'instruction_following', 'truthfulness'] "
    "(--score_columns helpfulness honesty instruction_following truthfulness)"
)


@dataclass(frozen=True)
class ScoredList:
    """The k answers to one prompt.

    Attributes:
        prompt: text or messages.
        responses: [k], of the same kind.
        scores: [k]; the higher, the better. A rank is a negative score.
        models: [k] names of those who answered; None where one is not known.
        template: further variables of the chat template.
        row: the first row that it is from.
    """

    prompt: Part
    responses: list[Part]
    scores: list[float]
    models: list[str | None]
    template: Mapping[str, Any] = field(default_factory=dict)
    row: int = 0

    def distinct(self) -> ScoredList:
        """Each answer once, at its first place, with the mean of its scores."""
        places: defaultdict[str, list[int]] = defaultdict(list)
        for place, response in enumerate(self.responses):
            places[digest(response)].append(place)
        return replace(
            self.at([some[0] for some in places.values()]),
            scores=[sum(self.scores[i] for i in some) / len(some) for some in places.values()],
        )

    def extended(self, other: ScoredList) -> ScoredList:
        """With the answers of another list of the same prompt."""
        responses, scores, models = (
            self.responses + other.responses,
            self.scores + other.scores,
            self.models + other.models,
        )
        return replace(self, responses=responses, scores=scores, models=models)

    def at(self, places: Sequence[int]) -> ScoredList:
        """Some of the answers, in this order."""
        responses, scores = [self.responses[i] for i in places], [self.scores[i] for i in places]
        return replace(self, responses=responses, scores=scores, models=[self.models[i] for i in places])


class _Answer(NamedTuple):
    response: Any
    score: float | None
    model: str | None


def digest(*values: Any) -> str:
    """The same for equal values, on every machine."""
    return blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ScoredLists:
    """The lists of a data set. What was left out is logged after the last one.

    Attributes:
        dataset: the data set.
        form: how it holds the lists.
        reader: of prompts and template variables.
        as_chat: make messages of text.
        strict: of `responses` and `scores`, one that is missing is an error; else it is counted.
        counts: what was left out so far, by reason.
    """

    dataset: Dataset
    form: ListForm
    reader: RowReader
    as_chat: bool = False
    strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        name: str,
        score_columns: Sequence[str] | None = None,
        prompt_column: str | None = None,
        system_column: str | None = None,
        as_chat: bool = False,
        strict: bool = False,
    ) -> ScoredLists:
        """The lists of a data set, recognized by its columns.

        Args:
            dataset: the data set.
            name: in messages.
            score_columns: where the scores are, if not under a usual name: columns, or ratings within UltraFeedback's
                `completions`. Of several, the mean counts.
            prompt_column, system_column: as for `RowReader`.
            as_chat, strict: as above.

        Raises:
            ValueError: other columns, or scores that are class labels.
        """
        names = dataset.column_names
        for option, column in {"prompt_column": prompt_column, "system_column": system_column}.items():
            if column is not None and column not in names:
                raise RowError(f"{name}: {option} names {column!r}, and there are only the columns {names}")
        form = list_form(names, score_columns, prompt_column)
        if form is None:
            raise RowError(_why_no_lists(names, name, score_columns, prompt_column))
        lists = cls(dataset, form, RowReader(name, tuple(names), form.prompt, system_column), as_chat, strict)
        for column in lists._score_columns:
            if not form.is_vote:
                refuse_class_labels(dataset, ScoreColumns(column), name.removeprefix("the "))
        return replace(lists, reader=replace(lists.reader, features=dataset.features))

    def __iter__(self) -> Iterator[ScoredList]:
        self.counts.clear()
        read = {"columns": self._columns, "structs": self._structs, "two": self._two, "one": self._one}
        for found in read[self.form.kind]():
            if found is None:
                self.counts[_NO_ANSWERS] += 1
            else:
                yield found
        for reason, n in (+self.counts).items():
            level = logging.WARNING if reason == _FORGED else logging.INFO
            logger.log(level, f"{self.reader.split}: {reason.format(n=n)}")

    @cached_property
    def of_prompts(self) -> list[str]:
        """The columns that say something of the prompts, and nothing of one answer, or of a pair."""
        form, columns = self.form, self.reader.columns
        not_kept = {
            *self._read,
            *form.responses,
            *MODELS,
            *HELPSTEER,
            "evaluation_factor",
            "is_flipped",
            "truncated",
        } - {*TEMPLATE}
        if form.kind == "two":
            not_kept |= {*chain(*VOTES), "turn", "labels", "score_ratio", "seconds_difference"}
            ends = tuple(name[-2:] for name in form.responses)
            not_kept |= {n for n in columns if n.endswith(ends) or any(each in n for each in form.responses)}
        of_pairs = {name for name in columns if {"chosen", "rejected"} & {*re.split("[-_]", name)}}
        kept = [name for name in columns if name not in not_kept | of_pairs]
        if form.kind != "one" or not kept:
            return kept
        first: dict[str, Mapping[str, Any]] = {}
        differing: set[str] = set()
        for row in raw_rows(self.dataset, [str(form.prompt), *kept], self.reader.split):
            there = first.setdefault(digest(row[str(form.prompt)]), row)
            differing |= {name for name in kept if row[name] != there[name]}
        return [name for name in kept if name not in differing]

    @property
    def _read(self) -> list[str]:
        form = self.form
        names = [
            form.prompt,
            self.reader.system_column,
            *form.responses,
            *self._score_columns,
            *form.models,
            *TEMPLATE,
        ]
        names += ["turn", "labels"] if form.kind == "two" else []
        return [name for name in dict.fromkeys(names) if name in self.reader.columns]

    @property
    def _score_columns(self) -> list[str]:
        if self.form.kind == "structs":
            return []
        if self.form.kind == "two" and not self.form.is_vote:
            return [score + name[-2:] for score in self.form.scores for name in self.form.responses]
        return list(self.form.scores)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """With the names of class labels, such as a winner's."""
        features = self.reader.features
        labels = {name: features[name] for name in self._read if isinstance(features[name], ClassLabel)}
        for i, row in enumerate(raw_rows(self.dataset, self._read, self.reader.split)):
            for name, label in labels.items():
                row[name] = None if row[name] is None or row[name] < 0 else label.int2str(row[name])
            yield i, row

    @property
    def _is_strict(self) -> bool:
        return self.strict and self.form.is_plain

    def _where(self, i: int) -> str:
        return f"row {i} of {self.reader.split}"

    # The kinds of forms

    def _columns(self) -> Iterator[ScoredList | None]:
        form = self.form
        for i, row in self._rows():
            lists = {name: self._list(row, name, i) for name in (*form.responses, *form.scores, *form.models)}
            if len({len(values) for values in lists.values()}) > 1:
                sizes = " and ".join(f"{len(values)} {name}" for name, values in lists.items())
                raise RowError(f"{self._where(i)}: {sizes}: give each response one")
            within = getattr(self.reader.features[form.responses[0]], "feature", None)
            answers = []
            for j, response in enumerate(lists[form.responses[0]]):
                ratings = {name: lists[name][j] for name in form.scores}
                model = lists[form.models[0]][j] if form.models else None
                answers.append(_Answer(pruned(response, within), self._score(ratings, i, f", response {j}"), model))
            yield self._made(row, answers, i)

    def _structs(self) -> Iterator[ScoredList | None]:
        (column,), names = self.form.responses, self.form.scores
        for i, row in self._rows():
            answers = []
            for j, given in enumerate(self._list(row, column, i)):
                where = f"column {column!r}, {self._where(i)}, answer {j}"
                keys = given.keys() if isinstance(given, Mapping) else ()
                if not (response := [key for key in RESPONSE_KEYS if key in keys]):
                    raise RowError(
                        f"{where}: {shortened(given)} is no mapping with one of {', '.join(RESPONSE_KEYS)}: rename "
                        "its keys with dataset.map"
                    )
                ratings = _ratings(given)
                names = names or next(((name,) for name in RATINGS if name in ratings), ASPECTS)
                if not {*names} & {*ratings} or {*names} - {*ratings, *ASPECTS}:
                    known = {name for name in ratings if isinstance(as_number(ratings[name]), int | float)}
                    raise RowError(
                        f"{where}: there is no rating {' or '.join(names)}, only {sorted(known)}: name one of "
                        "these with score_columns (--score_columns)"
                    )
                self.counts[_FORGED] += "overall_score" in names and _is_forged(ratings)
                score = self._score({name: ratings.get(name) for name in names}, i, f", answer {j}")
                answers.append(_Answer(given[response[0]], score, given.get("model")))
            yield self._made(row, answers, i)

    def _two(self) -> Iterator[ScoredList | None]:
        """Scored answers to one prompt are one list. A vote tells nothing of the answers of other votes."""
        groups: dict[str, tuple[int, dict[str, Any], list[_Answer]]] = {}
        for i, row in self._rows():
            if (parts := self._parts(row, i)) is None:
                self.counts[_SEVERAL_TURNS] += 1
                continue
            prompt, *values = parts
            models = [row[name] for name in self.form.models] or [None, None]
            answers = list(map(_Answer, values, self._two_scores(row, i), models))
            one_of = sorted(map(digest, values)) if self.form.is_vote else []
            key = digest(prompt, one_of)
            groups.setdefault(key, (i, row | {"": prompt}, []))[2].extend(answers)
        for i, row, answers in groups.values():
            made = self._made(row, sorted(answers, key=lambda each: digest(each.response)), i, row[""])
            yield None if made is None else made.distinct()

    def _one(self) -> Iterator[ScoredList | None]:
        form = self.form
        groups: dict[str, tuple[int, dict[str, Any], list[_Answer]]] = {}
        for i, row in self._rows():
            if not row[str(form.prompt)]:
                prompt = f"the prompt is {row[str(form.prompt)]!r}"
                raise RowError(f"column {form.prompt!r}, {self._where(i)}: {prompt}: drop the row")
            response = pruned(row[form.responses[0]], self.reader.features[form.responses[0]])
            model = row[form.models[0]] if form.models else None
            answer = _Answer(response, self._score({name: row[name] for name in form.scores}, i), model)
            groups.setdefault(digest(row[str(form.prompt)]), (i, row, []))[2].append(answer)
        for i, row, answers in groups.values():  # the order of rows says nothing
            yield self._made(row, sorted(answers, key=lambda each: digest(each.response)), i)

    # Their parts

    def _list(self, row: Mapping[str, Any], column: str, i: int) -> list[Any]:
        """Also a list that is written as text, and mappings that Arrow keeps as one mapping of lists."""
        value = _read(row[column])
        if isinstance(value, Mapping) and value and all(isinstance(each, list) for each in value.values()):
            value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
        if not isinstance(value, list) or (self._is_strict and not value):
            raise RowError(
                f"column {column!r}, {self._where(i)}: {shortened(row[column])} is not a list of one or more: save "
                "the set as JSON lines or Parquet, or drop the row"
            )
        return value

    def _score(self, ratings: Mapping[str, Any], i: int, which: str = "") -> float | None:
        """The mean of the ratings that there are; None if there are none."""
        found = []
        for name, value in ratings.items():
            is_missing = value is None or value != value
            is_missing |= isinstance(value, str) and value.strip().lower() in _UNRATED
            if is_missing and not self._is_strict:
                continue
            if problem := problem_of(value):
                raise ScoreError(f"column {name!r}, {self._where(i)}{which}: the score {value!r} {problem}")
            found.append(-as_number(value) if name in ("rank", "ranks") else as_number(value))
        return float(sum(found) / len(found)) if found else None

    def _two_scores(self, row: Mapping[str, Any], i: int) -> Sequence[float | None]:
        form = self.form
        if not form.is_vote:
            ends = [name[-2:] for name in form.responses]
            scores = [self._score({each + end: row[each + end] for each in form.scores}, i) for end in ends]
            a, b = scores
            is_a = row.get("labels")  # SHP's: 1 where A is better
            if form.scores == ("score",) and is_a in (0, 1) and None not in scores and a != b and is_a != (a > b):  # type: ignore[operator]
                raise RowError(
                    f"column 'labels', {self._where(i)}: {is_a} contradicts the scores {a:g} and {b:g}: 1 is for an A "
                    "that scores higher; correct one of them, or drop the row"
                )
            return scores
        given = [as_number(row[name]) for name in form.scores]
        if form.scores == VOTE:
            if given.count(1) == 1 and given.count(0) == 2:
                return [_WINNERS[name] for name in ("model_a", "model_b", "tie")][given.index(1)]
            raise RowError(
                f"columns {', '.join(VOTE)}, {self._where(i)}: {given} are not one 1 and two 0: drop the row"
            )
        if given == [None]:
            return None, None
        if form.scores == STRENGTH:
            strength = self._score({form.scores[0]: given[0]}, i)
            return None if strength is None else max(-strength, 0.0), None if strength is None else max(strength, 0.0)
        sides = dict(zip(form.responses, ("model_a", "model_b"), strict=True))
        known = {str(row[name]).lower(): _WINNERS[name] for name in form.models}
        known |= {name[-1].lower(): _WINNERS[side] for name, side in sides.items()} | _WINNERS
        word = f"{given[0]:g}" if isinstance(given[0], float) else str(given[0]).strip().lower()
        if word not in known:
            raise RowError(
                f"column {form.scores[0]!r}, {self._where(i)}: {given[0]!r} is no winner, which are model_a, model_b, "
                "tie, tie (bothbad) and both_bad: replace it with dataset.map, or drop the row"
            )
        return known[word]

    def _parts(self, row: Mapping[str, Any], i: int) -> list[Any] | None:
        """The prompt and two answers; None for conversations that differ before the last turn."""
        names = [self.form.prompt, *self.form.responses]
        values = [None if name is None else pruned(row[name], self.reader.features[name]) for name in names]
        parts: list[Any] = [_read(value) if _is_list_text(value) else value for value in values]
        prompt, answers = parts[0], parts[1:]
        conversations: list[list[Message]]
        if _are_turns(prompt, answers):  # of Kaggle's votes
            conversations = [
                [
                    m
                    for q, a in zip(prompt, said, strict=True)
                    for m in says("user", self._clean(q)) + says("assistant", self._clean(a))
                ]
                for said in answers
            ]
        elif prompt is None and all(is_messages(answer) for answer in answers):
            conversations = [
                self._part(answer, name, i) for answer, name in zip(answers, self.form.responses, strict=True)
            ]
        else:
            return values
        if isinstance(n := row.get("turn"), int):  # the judges of MT-bench's first turn saw the second one's answer
            conversations = [_first_turns(each, n) for each in conversations]
        n = shared_turns(conversations)
        if any(len(each) != n + 1 for each in conversations):
            return None
        return [
            conversations[0][:n],
            *(each[n:] if each[n]["content"] is not None else None for each in conversations),
        ]

    def _clean(self, text: str | None) -> Any:
        clean = None if text is None else text.encode(errors="replace").decode()
        self.counts[_BROKEN_TEXT] += clean != text
        return clean

    def _part(self, value: Any, column: str, i: int) -> Any:
        try:
            return part_of(value)
        except ValueError as error:
            raise RowError(f"column {column!r}, {self._where(i)}: {error}") from None

    def _made(
        self, row: Mapping[str, Any], answers: Sequence[_Answer], i: int, prompt: Any = None
    ) -> ScoredList | None:
        """Of the answers that have a text and a score; None if there are none."""
        where, column = self._where(i), self.form.prompt
        if prompt is None and column is not None:
            prompt = pruned(row[column], self.reader.features[column])
        if prompt is None:
            what = f"column {column!r}, {where}: the prompt is None"
            if column is None:
                what = f"columns {' and '.join(self.form.responses)}, {where}: there are no two conversations"
            raise RowError(f"{what}: drop the row, for example with dataset.filter")
        n_given = len(answers)
        if not self._is_strict:
            answers = [answer for answer in answers if answer.response is not None]
        self.counts[_NO_TEXT] += n_given - len(answers)
        n_given = len(answers)
        answers = [answer for answer in answers if answer.score is not None]
        self.counts[_NO_SCORE] += n_given - len(answers)
        if not answers:
            return None
        # beside answers in text, a prompt that is JSON may be just that, as for `RowReader`
        were_text = self.form.kind in ("columns", "structs") and isinstance(row[self.form.responses[0]], str)
        if were_text or not all(isinstance(answer.response, str) for answer in answers):
            prompt = found if is_messages(found := _read(prompt)) else prompt
        if self.as_chat and isinstance(prompt, str):
            prompt = chat_turns(prompt)
        whole = row_of(prompt, [answer.response for answer in answers], where, self.reader.template(row, where))
        asked, responses = whole.prompt, whole.completions
        if (system := self.reader.system_column) is not None:
            text = text_of(self._part(row[system], system, i)) if row[system] else ""
            asked, responses = with_system(text, asked, responses)
        scores = [answer.score for answer in answers if answer.score is not None]
        return ScoredList(asked, responses, scores, [answer.model for answer in answers], whole.template, i)


def row_of(prompt: Any, completions: list[Any], where: str, template: Mapping[str, Any]) -> PreferenceRow:
    """If anything is in messages, all text becomes messages; completions lose the prompt that they repeat."""
    parts: list[Any]
    try:
        prompt, *parts = (part_of(part) for part in (prompt, *completions))
    except ValueError as error:
        raise RowError(f"{where}: {error}") from None
    if any(isinstance(part, list) for part in (prompt, *parts)):
        prompt = says("user", prompt) if isinstance(prompt, str) else prompt
        parts = [says("assistant", part) if isinstance(part, str) else part for part in parts]
        parts = [*without_prompt(prompt, parts)[1]]
    return PreferenceRow(prompt, parts, template)


def chat_turns(prompt: str) -> list[Message]:
    """The messages of a prompt in text, which may mark its turns as Nectar or HelpSteer2 do; else one of the user."""
    before = f"\n\n{prompt.lstrip()}"
    if before.startswith("\n\nHuman:") and before.rstrip().endswith("\n\nAssistant:"):
        _, *turns, _ = _HUMAN.split(before)
        marks = _HUMAN.findall(before)[:-1]
    elif _STEER.search(prompt):
        turns, marks = _STEER.split(prompt), ["User", *_STEER.findall(prompt)]
    else:
        return says("user", prompt)
    by_model = ["Assistant" in mark for mark in marks]
    if by_model != [i % 2 == 1 for i in range(len(marks))] or by_model[-1]:  # not by turns
        return says("user", prompt)
    return [
        m for text, by in zip(turns, by_model, strict=True) for m in says("assistant" if by else "user", text.strip())
    ]


def _ratings(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer's mapping holds, and the ratings in its annotations."""
    annotations = _read(answer.get("annotations"))
    found = annotations.items() if isinstance(annotations, Mapping) else ()
    return {**answer, **{name: each.get("Rating") for name, each in found if isinstance(each, Mapping)}}


def _is_forged(ratings: Mapping[str, Any]) -> bool:
    rated = [value for name in ASPECTS if isinstance(value := as_number(ratings.get(name)), int | float)]
    return as_number(ratings["overall_score"]) == 10 and bool(rated) and sum(rated) / len(rated) <= 2


def _read(value: Any) -> Any:
    """What a text spells in JSON or Python, if it spells a list or a mapping; else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return value


def _is_list_text(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]")


def _are_turns(prompt: Any, answers: Sequence[Any]) -> bool:
    """Whether all are lists of as many texts."""
    parts = (prompt, *answers)
    lists = all(isinstance(part, list) and all(isinstance(text, str | None) for text in part) for part in parts)
    return lists and len({len(part) for part in parts}) == 1 and bool(prompt)


def _first_turns(conversation: list[Message], n: int) -> list[Message]:
    """Up to the n-th answer."""
    answers = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    return conversation[: answers[n - 1] + 1] if 0 < n <= len(answers) else conversation


def _why_no_lists(
    names: Sequence[str], split: str, score_columns: Sequence[str] | None, prompt_column: str | None
) -> str:
    if score_columns and list_form(names, None, prompt_column):
        return f"{split}: score_columns names {list(score_columns)}, and there are only the columns {list(names)}"
    if {*RESPONSES} & {*names}:
        return (
            f"{split}: there are answers but no scores, only the columns {list(names)}: score the answers "
            "first, with trl-margins score FILE --reward_model MODEL, or name their scores with score_columns "
            "(--score_columns)"
        )
    if {"chosen", "rejected"} <= {*names}:
        return (
            f"{split}: its columns are {list(names)}, so these are pairs already, which can be trained on as they are"
        )
    return (
        f"{split}: its columns are {list(names)}, and lists have {FORMS}; if the prompt has another name, set "
        "prompt_column (--prompt_column)"
    )
