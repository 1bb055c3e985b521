"""Which columns hold scored lists of answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Literal

PROMPTS = ("prompt", "instruction", "question", "history")
RESPONSES = ("responses", "all_generated_responses", "all_responses", "generations", "completions", "answers")
SCORES = ("scores", "all_rm_scores", "ratings", "rewards", "ranks", "rankings")
MODELS = ("models", "generation_models", "model_names", "response_model_names")
STRUCTS = ("completions", "answers")  # lists of mappings: UltraFeedback's and Nectar's
TWO = tuple(  # two answers in one row: their columns
    (base + one, base + other)
    for base, one, other in (
        ("conversation_", "a", "b"),
        ("response_", "a", "b"),
        ("human_ref_", "A", "B"),
        ("response_", "0", "1"),
        ("response_", "1", "2"),
        ("answer_", "0", "1"),
    )
)
WINNER = ("winner",)
BETTER = ("better_response_id",)  # PKU-SafeRLHF's, by helpfulness
SAFER = ("safer_response_id",)  # read only where it is named
STRENGTH = ("preference_strength",)  # HelpSteer2's: negative where the first one is better
VOTE = ("winner_model_a", "winner_model_b", "winner_tie")
VOTES = (WINNER, VOTE, BETTER, STRENGTH, SAFER)
RESPONSE = ("response", "completion", "answer")
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
SCORE = ("score", "rating", "reward", "overall_score", HELPSTEER[0], "rank")
MODEL = ("model", "model_name", "generator")
# All that make a list of a row, without the numbered ones
NAMES = (*PROMPTS, *RESPONSES, *SCORES, *RESPONSE, *SCORE, *chain(*TWO), *chain(*VOTES))
_RANK = re.compile(r"(?:.*[-_ ])?rank(?:s|ing|ings)?(?:[-_ ].*)?", re.IGNORECASE)

FORMS = (
    "prompt, responses, scores, UltraFeedback's completions, Nectar's answers, two answers with scores or a "
    "winner (SHP, arena votes), or one answer a row with a score (HelpSteer2)"
)


@dataclass(frozen=True)
class ListForm:
    """How a data set holds its lists.

    Attributes:
        kind: a column of responses beside one of scores; a column of mappings; two answers in a row; one in a row.
        prompt: its column, or None where the answers are conversations that begin with it.
        responses: one column, or two.
        scores: the columns (of `structs`, keys) whose mean is the score; empty where the rows decide. Of two answers,
            without the suffix of their names, or `winner`, or the three of a Kaggle vote.
        models: the columns with the models' names, as many as responses; empty if there are none.
    """

    kind: Literal["columns", "structs", "two", "one"]
    prompt: str | None
    responses: tuple[str, ...]
    scores: tuple[str, ...]
    models: tuple[str, ...] = ()

    @property
    def is_vote(self) -> bool:
        """Whether the scores are votes, which compare two answers and no others."""
        return self.scores in VOTES

    @property
    def is_plain(self) -> bool:
        """Whether it is this package's own form, whose texts are used as they are."""
        return self.responses == ("responses",)

    @property
    def score_columns(self) -> list[str]:
        """The columns of the scores, if they are not within the answers."""
        if self.kind == "structs":
            return []
        if self.kind == "two" and not self.is_vote:
            return [score + name[-2:] for score in self.scores for name in self.responses]
        return list(self.scores)

    def further(self, columns: Iterable[str]) -> list[str]:
        """Of two answers in a row: columns that look like a third one's."""
        if self.kind != "two":
            return []
        third = re.compile(rf"{self.responses[0][:-1]}(?:\d+|[A-Za-z])")
        return sorted(name for name in columns if third.fullmatch(name) and name not in self.responses)


@cache
def is_rank(name: str) -> bool:
    """Whether a column's name says that its lowest value is the best."""
    return _RANK.fullmatch(name) is not None and not re.search("score|reward", name.lower())


def list_form(
    columns: Iterable[str],
    score_columns: Sequence[str] | None = None,
    prompt_column: str | None = None,
    scored: bool = True,
) -> ListForm | None:
    """The form that a data set's columns have, or None.

    `score_columns` and `prompt_column` name other ones. If not `scored`, there need be no scores, and any are passed
    over.
    """
    names = set(columns)

    def first(known: Iterable[str]) -> str | None:
        return next((name for name in known if name in names), None)

    def are_there(scores: Sequence[str]) -> bool:
        return not scored or (bool(scores) and names.issuperset(scores))

    prompt = prompt_column or first(PROMPTS)
    given = tuple(score_columns or ()) if scored else ()
    responses, scores = first(RESPONSES), given or _one(first(SCORES) if scored else None)
    if prompt and responses and are_there(scores):
        return ListForm("columns", prompt, (responses,), scores, _one(first(MODELS)))
    # not TRL's stepwise supervision, which has labels, nor, unless they are named, questions with right answers
    structs = first(STRUCTS if "prompt" in names or prompt_column else STRUCTS[:1])
    if prompt and structs and "labels" not in names:
        return ListForm("structs", prompt, (structs,), given)
    for pair in TWO:
        asked = prompt_column if pair == TWO[0] else prompt
        if not names.issuperset(pair) or (asked is None and pair != TWO[0]):
            continue
        models = tuple(name for name in ("model_a", "model_b") if name in names)
        models = models if len(models) == 2 else ()
        votes = [each for each in VOTES if (each == given if given else each != SAFER)]
        if vote := next((each for each in votes if names.issuperset(each)), None):
            return ListForm("two", asked, pair, vote, models)
        scores = given or ("score",)
        if are_there([score + name[-2:] for score in scores for name in pair]):
            return ListForm("two", asked, pair, scores, models)
    response, scores = first(RESPONSE), given or _one(first(SCORE) if scored else None)
    if prompt and response and are_there(scores):
        return ListForm("one", prompt, (response,), scores, _one(first(MODEL)))
    return None


def _one(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def why_no_lists(
    names: Sequence[str], split: str, score_columns: Sequence[str] | None, prompt_column: str | None
) -> str:
    """What a set with these columns lacks, and the fix."""
    only = f"only the columns {list(names)}"
    if missing := [each for each in score_columns or () if not any(name.startswith(each) for name in names)]:
        return f"{split}: score_columns names {missing}, and there are {only}"
    if {*RESPONSES} & {*names} and not prompt_column and not {*PROMPTS} & {*names}:
        fix = "name the column of the prompts with prompt_column (--prompt_column)"
        return f"{split}: there are answers but no prompts, {only}: {fix}"
    if {*RESPONSES} & {*names}:
        fix = "name their scores with score_columns (--score_columns)"
        if score_columns:
            fix = "the scores are named, so name the prompts, too, with prompt_column (--prompt_column)"
        otherwise = "score the answers first, with trl-margins score FILE --reward_model MODEL"
        return f"{split}: there are answers but no scores, {only}: {fix}, or {otherwise}"
    if {"chosen", "rejected"} <= {*names}:
        why = "so these are pairs already, which can be trained on as they are"
    elif score_columns and list_form(names, None, prompt_column) is not None:
        why = f"and {score_columns} are no scores of these lists, which have their own: leave score_columns out"
    else:
        why = f"and lists have {FORMS}; if the prompt has another name, set prompt_column (--prompt_column)"
    return f"{split}: its columns are {list(names)}, {why}"
