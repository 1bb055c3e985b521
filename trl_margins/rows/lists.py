"""Scored lists of answers: from a data set in any known form to `ScoredList`s.

`list_forms.py` recognizes a form by its columns. `ScoredLists` reads its rows with `_answer_column` (UltraFeedback,
Nectar, SimPO), `_two_answers` (SHP, votes) or `_one_answer` (HelpSteer2), and merges those with equal prompts.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from reprlib import repr as shortened
from typing import Any

from datasets import ClassLabel, Dataset, List

from ..checks import odd_letters, truth_of
from . import votes
from .answers import Answer, ScoredList, digest
from .beside import Seen, count_unused, refuse_input, suspects_of, unused_notes
from .form import (
    COMPLETIONS,
    TEMPLATE,
    PreferenceRow,
    RowError,
    RowReader,
    refuse_look_alikes,
    with_system,
    without_prompt,
)
from .list_forms import (
    HELPSTEER,
    MODELS,
    NAMES,
    SCORE,
    SCORES,
    STRENGTH,
    VOTE,
    VOTES,
    ListForm,
    is_rank,
    list_form,
    why_no_lists,
)
from .messages import (
    SHAREGPT,
    Part,
    is_list_of,
    is_messages,
    may_be_messages,
    part_of,
    pruned,
    says,
    shared_turns,
    spelled,
    text_of,
    without_notes,
)
from .ratings import ASPECTS, FORGED, OTHER_RATINGS, RATINGS, is_forged, numbers_elsewhere, rating_of
from .raw import raw_rows
from .scores import ScoreColumns, ScoreError, as_number, check_once, problem_of, refuse_class_labels
from .turns import are_turns, first_turns, in_turns, mended, split_turns, unsplit_mark, unsplit_note

logger = logging.getLogger(__name__)

# Keys of an answer that is a mapping; the first that it has counts
RESPONSE_KEYS = ("response", "answer", "completion", "text", "content")

# belongs to a prompt, beside its text
_MEDIA = re.compile(r"(image|img|picture|photo|audio|sound|video)s?([-_](url|path|file|name|id|base64)s?)?")
_UNRATED = {"", "n/a", "na", "nan", "none", "null"}

# What is left out, or deserves a warning
_NO_TEXT = "{n} answers are None, and were left out"
_NO_SCORE = "{n} answers have no score, and were left out"
_NO_ANSWERS = "{n} rows have no answer with a score, and were left out"
_MERGED = "{n} of {rows} rows have the prompt of another one and were merged"
_REPEATED = "{n} answers of merged rows repeat another one; the mean of their scores counts"
_RANKED = "{n} scores are negative ranks: the lowest rank is the best"
_SEVERAL_TURNS = (
    "{n} conversations were left out, whose answers differ before the last turn: what the user said to one of them is "
    "no prompt of the other"
)
_WITHOUT_ANSWER = "{n} conversations were left out that end with a message of the user's: there is no answer to it"
_ODD_TURN = "{n} rows have a turn that is no whole number from 1 on, and are read as a whole"
_TEXT = "{n} rows are text"  # which is not said
_TURNS_BESIDE_TEXT = (
    "{n} of {rows} rows are lists of turns, written as JSON, and the others text: the lists are read as dialogues, "
    "beside which text becomes messages. If they are texts that look like lists, write each as a list of one text"
)
_MESSAGES_BESIDE_TEXT = (
    "{n} of {rows} rows are messages, written as JSON, and the others text, which becomes messages beside them. If "
    "they are texts that look like messages, leave them out"
)
_BROKEN_TEXT = "{n} texts held half of a surrogate pair, which was replaced"
_SPELLED = (
    "{n} prompts, answers or system texts are messages, written as text, and are taken as text: if they are "
    "messages, save them as lists"
)
_WARNINGS = (FORGED, _SPELLED, _ODD_TURN, _TURNS_BESIDE_TEXT, _MESSAGES_BESIDE_TEXT)


@dataclass(frozen=True)
class ScoredLists:
    """The lists of a data set: rows with equal prompts are one. What was left out is logged after the last one.

    Attributes:
        dataset: the data set.
        form: how it holds the lists.
        reader: of prompts and template variables.
        as_chat: make messages of text.
        strict: of `responses` and `scores`, one that is missing is an error; else it is counted.
        scored: if not, the answers need no scores, their scores are None, none may be missing, and each row is a list.
        counts: what was left out so far, by reason.
        unused: columns that may hold a part of the prompt, and are not read.
        unsplit: prompts that mark turns and became one message, and their rows.
        rated_by: of answers that are mappings, the keys whose mean is the score.
        said: warnings that are said once.
        elsewhere: of annotations without a rating, the keys of numbers.
    """

    dataset: Dataset
    form: ListForm
    reader: RowReader
    as_chat: bool = False
    strict: bool = False
    scored: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    unused: dict[str, Seen] = field(default_factory=dict)
    unsplit: list[tuple[Part, int]] = field(default_factory=list)
    rated_by: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

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
        scored: bool = True,
    ) -> ScoredLists:
        """The lists of a data set, recognized by its columns.

        Args:
            dataset: the data set.
            name: in messages.
            score_columns: where the scores are, if not under a usual name: columns, or ratings within UltraFeedback's
                `completions`. Of several, the mean counts.
            prompt_column, system_column: as for `RowReader`.
            as_chat, strict, scored: as above.

        Raises:
            ValueError: other columns, questions in two columns, or scores that are class labels.
        """
        names = dataset.column_names
        for option, column in {"prompt_column": prompt_column, "system_column": system_column}.items():
            if column is not None and column not in names:
                raise RowError(f"{name}: {option} names {column!r}, and there are only the columns {names}")
        check_once(score_columns or ())
        form = list_form(names, score_columns, prompt_column, scored)
        if form is None:
            refuse_look_alikes(names, name, NAMES)
            if several := [column for column in COMPLETIONS if _holds_texts(dataset.features.get(column))]:
                raise RowError(
                    f"{name}: the column {several[0]!r} holds lists of completions: a pair has one chosen and one "
                    "rejected completion, so make a row of each two, with dataset.map"
                )
            raise RowError(why_no_lists(names, name, score_columns, prompt_column))
        if more := form.further(names):
            raise RowError(
                f"{name}: {', '.join(more)} beside {' and '.join(form.responses)}: a row has more than two answers: "
                "make a list of them and one of their scores, responses and scores, with dataset.map"
            )
        reader = RowReader(name, tuple(names), form.prompt, system_column, features=dataset.features)
        lists = cls(dataset, form, reader, as_chat, strict, scored)
        refuse_input(dataset, reader, prompt_column, lists._where)
        lists._warn_of_other_scores(score_columns)
        for column in form.score_columns:
            if not form.is_vote:
                refuse_class_labels(dataset, ScoreColumns(column), name.removeprefix("the "))
        return lists

    def _warn_of_other_scores(self, given: Sequence[str] | None) -> None:
        """Warns of columns that may be other scores of the same answers."""
        used, known = self.form.scores, {"columns": SCORES, "one": SCORE}.get(self.form.kind, ())
        if given is None and used:
            self._warn_of_choice(used, [name for name in known if name in self.reader.columns])

    def _warn_of_choice(self, used: Sequence[str], known: Iterable[str]) -> None:
        """Once, where there are known scores beside those that are used."""
        others = [name for name in known if name not in used]
        if not others or self.said:
            return
        self.said.append(
            f"{self.reader.split}: several columns or keys could be scores ({', '.join((*used, *others))}): "
            f"{' and '.join(used)} are used. Name others with score_columns (--score_columns)"
        )
        logger.warning(self.said[0])

    def __iter__(self) -> Iterator[ScoredList]:
        for state in (self.counts, self.unused, self.unsplit, self.rated_by, self.elsewhere):
            state.clear()
        kind = self.form.kind
        read = {
            "columns": self._answer_column,
            "structs": self._answer_column,
            "two": self._two_answers,
            "one": self._one_answer,
        }[kind]
        groups: defaultdict[str, list[ScoredList]] = defaultdict(list)
        for i, row in self._rows():
            if (parts := read(row, i)) is None:
                continue
            if (found := self._made(row, i, *parts)) is None:
                self.counts[_NO_ANSWERS] += kind != "one"
            elif self.scored:
                groups[self._key(found, row)].append(found)
            else:
                yield found
        if self.scored and self.elsewhere and not groups:
            keys = " and ".join(map(repr, dict.fromkeys(self.elsewhere)))
            raise RowError(
                f"column {self.form.responses[0]!r} of {self.reader.split}: no annotation has a rating, but there are "
                f"numbers as {keys}: rename the right key to rating with dataset.map"
            )
        if kind == "structs" and self.scored and self.counts[_NO_SCORE] and not self.rated_by:
            named = f", {' or '.join(self.form.scores)}," * bool(self.form.scores)
            raise RowError(
                f"column {self.form.responses[0]!r} of {self.reader.split}: no answer has a rating{named} that is a "
                "number: make one with dataset.map, or score the answers first, with trl-margins score FILE "
                "--reward_model MODEL"
            )
        if not self.counts.pop(_TEXT, 0):
            del self.counts[_TURNS_BESIDE_TEXT], self.counts[_MESSAGES_BESIDE_TEXT]
        self.counts[_MERGED] = 0 if kind in ("one", "two") else sum(map(len, groups.values())) - len(groups)
        yield from map(self._merged, groups.values())
        for reason, said in self.reasons.items():
            logger.log(logging.WARNING if reason in _WARNINGS else logging.INFO, f"{self.reader.split}: {said}")
        if note := unsplit_note(self.unsplit):
            logger.warning(f"{self.reader.split}: {note}")
        for note in unused_notes(self.unused, len(self.dataset), self.reader):
            logger.warning(f"{self.reader.split}: {note}")

    @property
    def reasons(self) -> dict[str, str]:
        """What the last reading has left out or changed, in words."""
        return {reason: reason.format(n=n, rows=len(self.dataset)) for reason, n in (+self.counts).items()}

    def _key(self, found: ScoredList, row: Mapping[str, Any]) -> str:
        """The same for what belongs together. A vote tells nothing of the answers of other votes."""
        answers = sorted(map(digest, map(without_notes, found.responses))) if self.form.is_vote else []
        alone = None if found.prompt else found.row  # rows without a prompt have none in common
        media = [row[name] or None for name in self._media]
        return digest(without_notes(found.prompt), found.template, media, answers, alone)

    def _merged(self, some: Sequence[ScoredList]) -> ScoredList:
        if len(some) == 1 and self.form.kind != "two":
            return some[0]
        whole = replace(some[0], answers=[answer for each in some for answer in each.answers])
        merged = whole.distinct(by_model=self.form.kind != "two")
        if self.form.kind in ("one", "two"):  # the order of rows says nothing
            merged.answers.sort(key=lambda answer: digest(answer.response))
        if self.form.kind != "two":
            self.counts[_REPEATED] += len(whole.answers) - len(merged.answers)
        return merged

    @cached_property
    def of_prompts(self) -> list[str]:
        """The columns that say something of the prompts, and nothing of one answer, or of a pair."""
        form, columns = self.form, self.reader.columns
        not_kept = {*self.read_columns, *form.responses, *MODELS, *HELPSTEER} - {*TEMPLATE, *self._media}
        not_kept |= {"evaluation_factor", "is_flipped", "truncated"}
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
        of_key = [str(form.prompt), *(name for name in kept if name in (*TEMPLATE, *self._media))]
        for row in raw_rows(self.dataset, [str(form.prompt), *kept], self.reader.split):
            there = first.setdefault(digest(*(row[name] for name in of_key)), row)
            differing |= {name for name in kept if row[name] != there[name]}
        return [name for name in kept if name not in differing]

    @cached_property
    def _media(self) -> list[str]:
        return [name for name in self.reader.columns if _MEDIA.fullmatch(name)]

    @property
    def read_columns(self) -> list[str]:
        form = self.form
        names = [form.prompt, self.reader.system_column, *form.responses, *form.score_columns, *form.models, *TEMPLATE]
        names += [*self._media, *(("turn", "labels") if form.kind == "two" else ("truncated",))]
        return [name for name in dict.fromkeys(names) if name in self.reader.columns]

    @cached_property
    def _suspects(self) -> list[str]:
        """The columns that are looked at for `unused`."""
        return [name for name in suspects_of(self.reader) if name not in (*self.read_columns, *SHAREGPT)]

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """With the names of class labels, such as a winner's."""
        features = self.reader.features
        labels = {name: features[name] for name in self.read_columns if isinstance(features[name], ClassLabel)}
        for i, row in enumerate(raw_rows(self.dataset, self.read_columns + self._suspects, self.reader.split)):
            for name, label in labels.items():
                row[name] = None if row[name] is None or row[name] < 0 else label.int2str(row[name])
            yield i, row

    @property
    def _is_strict(self) -> bool:
        """Whether an answer without text or score is an error."""
        return not self.scored or (self.strict and self.form.is_plain)

    def _where(self, i: int) -> str:
        return f"row {i} of {self.reader.split}"

    # The kinds of forms: each reads the prompt and the answers of a row

    def _answer_column(self, row: Mapping[str, Any], i: int) -> tuple[Any, list[Answer]]:
        """A column of answers, which may be mappings, beside one of scores."""
        form = self.form
        (column,) = form.responses
        is_structs, what = form.kind == "structs", "answer" if form.kind == "structs" else "response"
        within = getattr(self.reader.features[column], "feature", None)
        given, beside = self._beside(row, i)
        answers = []
        for j, response in enumerate(given):
            which, model = f", {what} {j}", beside["model"][j]
            ratings = {name: beside[name][j] for name in form.score_columns}
            is_plain = not isinstance(response, Mapping) or (not is_structs and is_messages([response]))
            key = None if is_plain else next((key for key in RESPONSE_KEYS if key in response), None)
            if key is not None:
                model = response.get("model", model)
                if is_structs:
                    ratings = self._ratings(response, f"column {column!r}, {self._where(i)}{which}")
                response = response[key]
            elif is_structs and response is not None:
                fix = "rename its keys with dataset.map"
                if isinstance(response, str):
                    fix = "if the scores are in a column of their own, name it with score_columns (--score_columns)"
                raise RowError(
                    f"column {column!r}, {self._where(i)}{which}: {shortened(response)} is no mapping with one of "
                    f"{', '.join(RESPONSE_KEYS)}: {fix}"
                )
            score = self._score(ratings, i, which)
            answers.append(Answer(pruned(response, within), score, model, bool(beside["truncated"][j])))
        return self._asked(row, i), answers

    def _two_answers(self, row: Mapping[str, Any], i: int) -> tuple[Any, list[Answer]] | None:
        """Two answers with their scores, or a vote; None where they are no answers to one prompt."""
        form, where = self.form, self._where(i)
        if (parts := self._two_parts(row, i)) is None:
            return None
        prompt, *responses = parts
        scores: votes.Scores
        if form.scores == STRENGTH:
            scores = votes.of_strength(self._score({STRENGTH[0]: row[STRENGTH[0]]}, i))
        elif form.scores == VOTE:
            scores = votes.of_columns(row, where)
        elif form.is_vote:
            scores = votes.of_winner(row, form, where)
        else:
            a, b = ({each + name[-2:]: row[each + name[-2:]] for each in form.scores} for name in form.responses)
            scores = self._score(a, i), self._score(b, i)
            if form.scores == ("score",):
                votes.check_labels(row, scores, where)
        models = [row[name] for name in form.models] or [None, None]
        return prompt, list(map(Answer, responses, scores, models))

    def _one_answer(self, row: Mapping[str, Any], i: int) -> tuple[Any, list[Answer]]:
        """One answer with its score."""
        form, column = self.form, self.form.responses[0]
        if not row[str(form.prompt)]:
            prompt = f"the prompt is {row[str(form.prompt)]!r}"
            raise RowError(f"column {form.prompt!r}, {self._where(i)}: {prompt}: drop the row")
        response = pruned(row[column], self.reader.features[column])
        score = self._score({name: row[name] for name in form.scores}, i)
        (is_cut,) = self._truths([row.get("truncated")], i)
        model = row[form.models[0]] if form.models else None
        return self._asked(row, i), [Answer(response, score, model, is_cut)]

    # Their parts

    def _beside(self, row: Mapping[str, Any], i: int) -> tuple[list[Any], dict[str, list[Any]]]:
        """The answers, and what there is for each of them. Without a list of their own, they have no scores."""
        form = self.form
        given = self._list(row, form.responses[0], i)
        beside = {name: self._list(row, name, i) for name in form.score_columns}
        if (cut := spelled(row.get("truncated"))) is not None:
            beside["truncated"] = self._truths(cut, i)
        # mappings may name their models, as UltraFeedback's do, whose column has others
        if form.models and row[form.models[0]] and not any(isinstance(g, Mapping) and "model" in g for g in given):
            beside["model"] = self._list(row, form.models[0], i)
        sizes = {form.responses[0]: given} | {name: values for name, values in beside.items() if values}
        if given and len({len(values) for values in sizes.values()}) > 1:
            names = {"model": "".join(form.models)}
            found = " and ".join(f"{len(values)} {names.get(name, name)}" for name, values in sizes.items())
            raise RowError(f"{self._where(i)}: {found}: give each response one")
        nothing = [None] * len(given)
        beside = {name: values or nothing for name, values in beside.items()}
        return given, {"model": nothing, "truncated": nothing, **beside}

    def _truths(self, values: Any, i: int) -> list[bool]:
        """Of each answer of a row, whether it was cut. None says that it was not."""
        where = f"column 'truncated', {self._where(i)}"
        if not isinstance(values, list):
            raise RowError(
                f"{where}: {shortened(values)} is not a list that says of each answer whether it was cut: make one "
                "with dataset.map, or remove the column"
            )
        try:
            return [value is not None and truth_of(value) for value in values]
        except ValueError as error:
            raise RowError(f"{where}: {error}: correct it, or remove the column") from None

    def _ratings(self, answer: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Those that count, also of UltraFeedback's annotations: by default the first known one."""
        annotations = spelled(answer.get("annotations"))
        found = annotations.items() if isinstance(annotations, Mapping) else ()
        ratings = {**answer, **{name: rating_of(each) for name, each in found}}
        known = self.form.scores or next(((name,) for name in RATINGS if name in ratings), ASPECTS)
        names = self.rated_by or [*known]
        numbers = {name for name in ratings if isinstance(as_number(ratings[name]), int | float)}
        for name in {*names} & {*dict(found)} - numbers:
            self.elsewhere.extend(numbers_elsewhere(dict(found)[name]))
        if not {*names} & {*ratings} and not numbers.intersection(RATINGS if self.rated_by else numbers):
            return {}  # this answer is not rated
        if not {*names} & {*ratings} or {*names} - {*ratings, *ASPECTS}:
            odd = next(filter(None, map(odd_letters, ratings)), "")
            raise RowError(
                f"{where}: there is no rating {' or '.join(names)}, only {sorted(numbers)}{odd and f' ({odd})'}: name "
                "one of these with score_columns (--score_columns)"
            )
        if not self.form.scores:
            self._warn_of_choice(names, [name for name in OTHER_RATINGS if name in numbers])
        self.rated_by[:] = names
        self.counts[FORGED] += "overall_score" in names and is_forged(ratings)
        return {name: ratings.get(name) for name in names}

    def _list(self, row: Mapping[str, Any], column: str, i: int) -> list[Any]:
        """Also a list that is written as text, and mappings that Arrow keeps as one mapping of lists."""
        found, where = spelled(row[column]), f"column {column!r}, {self._where(i)}"
        of_answers = isinstance(found, Mapping) and any(isinstance(found.get(key), list) for key in RESPONSE_KEYS)
        value = _in_rows(found, where, of_answers)
        if (value is None or value == []) and not (self._is_strict and self.form.is_plain):
            return []
        if not isinstance(value, list) or not value:
            fix = "save the set as JSON lines or Parquet" if isinstance(value, str) else "make a list of it"
            fix = f"{fix}, or drop the row" if value else "drop the row"
            raise RowError(f"{where}: {shortened(row[column])} is not a list of one or more: {fix}")
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
            found.append(-as_number(value) if is_rank(name) else as_number(value))
            self.counts[_RANKED] += is_rank(name)
        return float(sum(found) / len(found)) if found else None

    def _two_parts(self, row: Mapping[str, Any], i: int) -> list[Any] | None:
        """The prompt and two answers; None for conversations that differ earlier, or end with a question."""
        names = self.form.responses
        values = [self._asked(row, i), *(pruned(row[name], self.reader.features[name]) for name in names)]
        prompt, *answers = (
            found if isinstance(found := _in_rows(spelled(value), self._where(i)), list) else value for value in values
        )
        turns = [len(part) for part in (prompt, *answers) if is_list_of(part, str | None)]
        if len(turns) == 3 and len({*turns}) > 1:
            raise RowError(
                f"{self._where(i)}: {turns[0]} turns of the user, and {turns[1]} and {turns[2]} of the answers, which "
                "must be as many: drop the row"
            )
        if are_turns(prompt, answers):
            asked, *answered = ([self._mended(text) for text in texts] for texts in (prompt, *answers))
            conversations = [in_turns(asked, each) for each in answered]
            self.counts[_TURNS_BESIDE_TEXT] += isinstance(row[names[0]], str)
        elif prompt is None and all(map(is_messages, answers)):
            conversations = [self._part(answer, name, i) for answer, name in zip(answers, names, strict=True)]
        else:
            if self.form.scores == VOTE:
                self._refuse_half_turns(dict(zip((str(self.form.prompt), *names), (prompt, *answers), strict=True)), i)
            self.counts[_TEXT] += not all(is_messages(spelled(value)) for value in values if value is not None)
            return values
        if (n := self._turn(row)) is not None:  # the judges of MT-bench's first turn saw the second one's answer
            conversations = [first_turns(each, n) for each in conversations]
        n = shared_turns(conversations)
        if any(each[-1]["role"] == "user" for each in conversations):
            self.counts[_WITHOUT_ANSWER] += 1
            return None
        if any(len(each) != n + 1 for each in conversations):
            self.counts[_SEVERAL_TURNS] += 1
            return None
        return [conversations[0][:n], *(None if each[n]["content"] is None else each[n:] for each in conversations)]

    def _turn(self, row: Mapping[str, Any]) -> int | None:
        """The turn that a vote is on, also where pandas has made 1.0 of it."""
        if (given := row.get("turn")) is None or given != given:
            return None
        n = as_number(given)
        if not isinstance(n, int | float) or n < 1 or n % 1:
            self.counts[_ODD_TURN] += 1
            return None
        return int(n)

    def _refuse_half_turns(self, parts: Mapping[str, Any], i: int) -> None:
        """Kaggle's votes are on lists of turns; a broken one among them would be read as the text of all."""
        broken = [name for name, part in parts.items() if not is_list_of(part, str | None) or not part]
        lists = [isinstance(part, list) and bool(part) and not is_messages(part) for part in parts.values()]
        among_text = self.counts[_TEXT] and not self.counts[_TURNS_BESIDE_TEXT]
        # one alone may be a text that looks like a list, and among texts so may all
        if broken and lists[0] and any(lists[1:]) and not (among_text and len(broken) == len(parts)):
            raise RowError(
                f"column {broken[0]!r}, {self._where(i)}: {shortened(parts[broken[0]])} is not a list of texts, one a "
                "turn, as its other columns or rows have: correct it, or drop the row"
            )

    def _mended(self, text: str | None) -> Any:
        self.counts[_BROKEN_TEXT] += (clean := mended(text)) != text
        return clean

    def _part(self, value: Any, column: str, i: int) -> Any:
        try:
            return part_of(value)
        except ValueError as error:
            raise RowError(f"column {column!r}, {self._where(i)}: {error}") from None

    def _asked(self, row: Mapping[str, Any], i: int) -> Any:
        """The prompt, as the row has it."""
        if (column := self.form.prompt) is None:
            return None
        prompt = pruned(row[column], self.reader.features[column])
        found = spelled(prompt) if column == "question" else prompt
        if isinstance(found, Mapping) and "full_text" in found:  # WebGPT's
            return found["full_text"]
        if isinstance(prompt, Mapping) and not is_messages([prompt]):
            raise RowError(
                f"column {column!r}, {self._where(i)}: {shortened(prompt)} is neither text nor messages: put the text "
                "of the prompt into a column of its own, with dataset.map or in the file, and name it with "
                "prompt_column (--prompt_column)"
            )
        return prompt

    def _there(self, answers: Sequence[Answer], i: int) -> list[Answer]:
        """The answers that have a text and a score."""
        if self._is_strict:
            for j, answer in enumerate(answers):
                if answer.response is None:
                    raise RowError(
                        f"column {self.form.responses[0]!r}, {self._where(i)}, response {j}: the answer is None: take "
                        "it out of the row's lists, or drop the row"
                    )
            return list(answers)
        with_text = [answer for answer in answers if answer.response is not None]
        found = [answer for answer in with_text if answer.score is not None]
        self.counts[_NO_TEXT] += len(answers) - len(with_text)
        self.counts[_NO_SCORE] += len(with_text) - len(found)
        return found

    def _made(self, row: Mapping[str, Any], i: int, prompt: Any, answers: Sequence[Answer]) -> ScoredList | None:
        """Of the answers that have a text and a score; None if there are none."""
        where, column = self._where(i), self.form.prompt
        if prompt is None:
            what = f"column {column!r}, {where}: the prompt is None"
            if column is None:
                what = f"columns {' and '.join(self.form.responses)}, {where}: there are no two conversations"
                if odd := [name for name in self.form.responses if row[name] and not _is_conversation(row[name])]:
                    raise RowError(
                        f"column {odd[0]!r}, {where}: {shortened(row[odd[0]])} is no conversation, which is a list of "
                        "messages with role (user, assistant, system or tool) and content: make one, with dataset.map"
                    )
            raise RowError(f"{what}: drop the row, for example with dataset.filter")
        answers = self._there(answers, i)
        if not answers and self.scored:
            return None
        responses = [answer.response for answer in answers]
        # beside answers in text, a prompt that is JSON may be just that, as for `RowReader`
        were_text = self.form.kind in ("columns", "structs") and isinstance(row[self.form.responses[0]], str)
        if were_text or not all(isinstance(response, str) for response in responses):
            prompt = found if is_messages(found := spelled(prompt)) else prompt
        texts = [part for part in (prompt, *responses) if isinstance(part, str)]
        are_spelled = [is_messages(spelled(text)) for text in texts]
        are_text = any(isinstance(response, str) for response in responses)
        if all(are_spelled) and responses:  # nothing is just text
            prompt, *responses = map(spelled, (prompt, *responses))
            self.counts[_MESSAGES_BESIDE_TEXT] += are_text
        else:
            self.counts[_SPELLED] += sum(
                known or may_be_messages(text) for known, text in zip(are_spelled, texts, strict=True)
            )
            self.counts[_TEXT] += are_text and self.form.kind != "two"  # of which it is counted already
        if self.as_chat and isinstance(prompt, str):
            prompt, responses = split_turns(prompt, responses)
            if unsplit_mark(prompt):
                self.unsplit.append((prompt, i))
        whole = row_of(prompt, responses, where, self.reader.template(row, where))
        asked, responses = whole.prompt, whole.completions
        if (system := self.reader.system_column) is not None:
            self.counts[_SPELLED] += self.reader.has_unread_system(row)
            asked, responses = with_system(self.reader.system_text(row, where), asked, responses, system, where)
        count_unused(self.unused, row, i, text_of(asked), self._suspects)
        answers = [a._replace(response=response) for a, response in zip(answers, responses, strict=True)]
        return ScoredList(asked, answers, whole.template, i)


def _is_conversation(value: Any) -> bool:
    """Whether it is messages, each of which says something or calls a tool."""
    found = spelled(value)
    return is_messages(found) and all(
        each.get("content", each.get("value")) is not None or each.get("tool_calls") for each in found
    )


def _holds_texts(feature: Any) -> bool:
    """Whether a column's values are lists of texts, or of lists of messages."""
    inner = getattr(feature, "feature", None)
    return isinstance(inner, List) or getattr(inner, "dtype", None) == "string"


def _in_rows(value: Any, where: str, of_answers: bool = False) -> Any:
    """Mappings that Arrow keeps as one mapping of lists; else the value."""
    if not isinstance(value, Mapping):
        return value
    if of_answers or {"role", "content"} <= value.keys():  # a number of turns and the like may be beside them
        inner = {name: _in_rows(each, where, True) if of_answers else each for name, each in value.items()}
        value = {name: each for name, each in inner.items() if isinstance(each, list)} or value
    if not value or not all(isinstance(each, list) for each in value.values()):
        return value
    if len({*map(len, value.values())}) > 1:
        lengths = ", ".join(f"{name} {len(each)}" for name, each in value.items())
        raise RowError(f"{where}: its lists are of different lengths ({lengths}): make them alike, or drop the row")
    return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]


def row_of(prompt: Any, completions: list[Any], where: str, template: Mapping[str, Any]) -> PreferenceRow:
    """If anything is in messages, all text becomes messages; completions lose the prompt that they repeat."""
    parts: list[Any] = []
    for number, part in enumerate((prompt, *completions)):
        try:
            parts.append(part_of(part))
        except ValueError as error:
            raise RowError(f"{where}, {f'answer {number}' if number else 'the prompt'}: {error}") from None
    prompt, *parts = parts
    if any(isinstance(part, list) for part in (prompt, *parts)):
        prompt = says("user", prompt) if isinstance(prompt, str) else prompt
        parts = [says("assistant", part) if isinstance(part, str) else part for part in parts]
        parts = [*without_prompt(prompt, parts)[1]]
    return PreferenceRow(prompt, parts, template)
