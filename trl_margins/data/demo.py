"""What the demo needs to run offline: a small chat model, and a scored preference set that is written here.

The set is put together from word lists, with the score gaps and the label noise that marks averaged over a few
annotators have.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from . import demo_text as lists
from .bundled import bundled_model_path, resolve_model

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["bundled_model_path", "make_demo_splits", "make_preference_set", "resolve_model"]


class _Draft(NamedTuple):
    """A prompt and the sentences that answers to it are put together from."""

    kind: str
    prompt: str
    core: str  # answers the question
    extra: str  # makes the answer a better one: an example, a reason, a tip
    thin: str  # looks like an answer and says next to nothing


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _arithmetic(rng: random.Random) -> _Draft:
    name, goods = rng.choice(lists.PEOPLE), rng.choice(lists.GOODS)
    start, change = rng.randint(21, 80), rng.randint(3, 20)
    grows = rng.random() < 0.5
    verb = rng.choice(("finds another", "buys another") if grows else ("loses", "gives away"))
    end, sign, back = (start + change, "+", "minus") if grows else (start - change, "-", "plus")
    thin = (
        f"{name} has some number of {goods}, and it is not quite the same as before.",
        f"You can find the number of {goods} with the numbers that are there.",
        f"{name} still has {goods}, and you could count them if you like.",
    )
    return _Draft(
        kind="arithmetic",
        prompt=f"{name} has {start} {goods} and {verb} {change}. How many {goods} does {name} have now?",
        core=f"{name} has {end} {goods} now, since {start} {sign} {change} = {end}.",
        extra=f"To check it, {end} {back} {change} is {start}.",
        thin=rng.choice(thin),
    )


def _explain(rng: random.Random) -> _Draft:
    thing, what, detail = rng.choice(lists.THINGS)
    ask = (
        "What is {}?",
        "Explain {} to a ten-year-old.",
        "Can you tell me in simple words what {} is?",
        "My son asked me what {} is. What can I tell him?",
        "Describe {} in a sentence or two.",
    )
    thin = (
        f"{_capital(thing)} is a thing that you hear about now and then.",
        f"{_capital(thing)} is something that exists and that people know.",
        f"There is such a thing as {thing}, and it has its place.",
    )
    return _Draft(
        kind="explain",
        prompt=rng.choice(ask).format(thing),
        core=f"{_capital(thing)} is {what}.",
        extra=f"{detail}.",
        thin=rng.choice(thin),
    )


def _how_to(rng: random.Random) -> _Draft:
    task, first, then, last, tip = rng.choice(lists.TASKS)
    ask = (
        "How do I {}?",
        "Give me short steps to {}.",
        "I have never tried to {}. How does it work?",
        "What is the right way to {}?",
        "I want to {} today. Where do I start?",
    )
    core = (
        f"First {first}, then {then}, and {last}.",
        f"1. {_capital(first)}. 2. {_capital(then)}. 3. {_capital(last)}.",
    )
    thin = (
        f"To {task}, you get the things for it and do it step by step.",
        f"You start to {task} and go on until it is done.",
        f"Many people {task}, and it works in the usual way.",
    )
    return _Draft(
        kind="how_to",
        prompt=rng.choice(ask).format(task),
        core=rng.choice(core),
        extra=f"{tip}.",
        thin=rng.choice(thin),
    )


def _compare(rng: random.Random) -> _Draft:
    purpose = rng.choice(list(lists.CHOICES))
    (one, pro), (other, contra) = rng.sample(lists.CHOICES[purpose], 2)
    ask = (
        f"For {purpose}, which is better: {one} or {other}?",
        f"Compare {one} and {other} for {purpose}.",
        f"I cannot decide between {one} and {other} for {purpose}.",
    )
    one, other = one.replace("my ", "your "), other.replace("my ", "your ")
    thin = (
        f"{_capital(one)} is one option and {other} is another one.",
        f"Some people take {one} and some people take {other}.",
        f"There is a difference between {one} and {other}, but both exist.",
    )
    return _Draft(
        kind="compare",
        prompt=rng.choice(ask),
        core=f"{_capital(one)} {pro}, while {other} {contra}.",
        extra=f"If in doubt, I would start with {rng.choice((one, other))}.",
        thin=rng.choice(thin),
    )


def _rewrite(rng: random.Random) -> _Draft:
    request = rng.choice(lists.REQUESTS)
    ask = (
        'Make this polite: "{}!"',
        'Rewrite this in a friendly tone: "{}!"',
        'How can I say "{}!" nicely?',
    )
    core = (
        f'"Could you please {request} when you have a moment?"',
        f'"Would you mind if I ask you to {request}?"',
    )
    thin = (
        f'You could say "{request}" in some other words.',
        f'"{_capital(request)}." I left out the end of it.',
        f'Just say "{request}" in a nicer way.',
    )
    return _Draft(
        kind="rewrite",
        prompt=rng.choice(ask).format(f"{_capital(request)}, {rng.choice(lists.RUDE_ENDS)}"),
        core=rng.choice(core),
        extra=rng.choice(('"Thank you, I know that you are busy."', '"It would really help me today, thanks a lot."')),
        thin=rng.choice(thin),
    )


def _recommend(rng: random.Random) -> _Draft:
    wish, guest = rng.choice(list(lists.WISHES)), rng.choice(lists.GUESTS)
    (best, why), (second, _) = rng.sample(lists.WISHES[wish], 2)
    ask = (
        f"Can you recommend {wish} for {guest}?",
        f"I am looking for {wish} for {guest}. Any ideas?",
        f"What would be {wish} that suits {guest}?",
    )
    guest = guest.replace("my ", "your ")
    thin = (
        f"You could look for {wish} that is nice for {guest}.",
        f"There is {wish} for everybody, and so there is one for {guest}.",
        f"Just take something that people take for {guest}.",
    )
    return _Draft(
        kind="recommend",
        prompt=rng.choice(ask),
        core=f"For {guest} I would pick {best}, because {why}.",
        extra=f"Otherwise, {second} is a nice choice as well.",
        thin=rng.choice(thin),
    )


def _encourage(rng: random.Random) -> _Draft:
    worry, step = rng.choice(lists.WORRIES)
    feeling = rng.choice(lists.FEELINGS)
    ask = (
        f"I am {feeling} about {worry}.",
        f"Any advice? I am {feeling} about {worry}.",
        f"What can I do? I feel so {feeling} because of {worry}.",
    )
    worry = worry.replace("my ", "your ")
    thin = (
        f"So you think about {worry}. That happens to people.",
        f"It is about {worry}, and later it will be over.",
        f"Well, {worry} is one of those things, I suppose.",
    )
    return _Draft(
        kind="encourage",
        prompt=rng.choice(ask),
        core=f"It is natural to feel {feeling} about {worry}. First, {step}.",
        extra=rng.choice(("You have got through hard things before.", "Be kind to yourself, it gets easier.")),
        thin=rng.choice(thin),
    )


_FAMILIES = (_arithmetic, _explain, _how_to, _compare, _rewrite, _recommend, _encourage)


def _draft(rng: random.Random) -> _Draft:
    return rng.choice(_FAMILIES)(rng)


def _join(rng: random.Random, start: str, sentences: list[str]) -> str:
    """Add sentences, in random order, up to a random length that has nothing to do with how good the answer is."""
    words = rng.randint(15, 26)
    for sentence in rng.sample(sentences, len(sentences)):
        if len(start.split()) >= words:
            break
        start = f"{start} {sentence}".lstrip()
    return start


def _excellent(rng: random.Random, draft: _Draft) -> str:
    return f"{draft.core} {draft.extra}"


def _good(rng: random.Random, draft: _Draft) -> str:
    return f"{draft.core} {rng.choice(lists.WARM + lists.PADDING)}"


def _thin(rng: random.Random, draft: _Draft) -> str:
    return _join(rng, draft.thin, lists.PADDING)


def _poor(rng: random.Random, draft: _Draft) -> str:
    """Evasive, off topic or cut off."""
    way = rng.choice(("evasive", "evasive", "evasive", "off topic", "cut off"))
    if way == "evasive":
        return _join(rng, "", lists.EVASIVE)
    if way == "off topic":
        other = _draft(rng)
        while other.kind == draft.kind:
            other = _draft(rng)
        return _excellent(rng, other)
    words = f"{draft.core} {draft.extra}".split()
    return " ".join(words[: max(11, round(len(words) * rng.uniform(0.6, 0.8)))]).rstrip(".,!?\"'")


def _bad(rng: random.Random, draft: _Draft) -> str:
    """Rude, or stuck in a loop."""
    if rng.random() < 0.4:
        return _join(rng, "", lists.RUDE)
    return _join(rng, "", [rng.choice((*lists.STUCK, draft.thin))] * 3)


class _Grade(NamedTuple):
    """A sort of answers: how good they are on average, on the annotators' scale, and who writes them."""

    quality: float
    write: Callable[[random.Random, _Draft], str]


_GRADES = (_Grade(8.4, _excellent), _Grade(7.4, _good), _Grade(6.3, _thin), _Grade(5.0, _poor), _Grade(3.4, _bad))
_ANSWER_NOISE = 0.4
_ANNOTATOR_NOISE = 1.3
_ANNOTATORS = 4


class _Answer(NamedTuple):
    text: str
    quality: float
    score: float


def _score(rng: random.Random, quality: float) -> float:
    """Average the whole marks from 1 to 10 that a few annotators give to an answer of this true quality."""
    marks = [min(10, max(1, round(rng.gauss(quality, _ANNOTATOR_NOISE)))) for _ in range(_ANNOTATORS)]
    return sum(marks) / len(marks)


def _answer(rng: random.Random, draft: _Draft) -> _Answer:
    grade = rng.choice(_GRADES)
    quality = rng.gauss(grade.quality, _ANSWER_NOISE)
    return _Answer(grade.write(rng, draft), quality, _score(rng, quality))


def _draw_pairs(n_pairs: int, seed: int) -> list[tuple[_Draft, _Answer, _Answer]]:
    """Draw prompts, no two alike, each with its chosen and its rejected answer."""
    rng = random.Random(seed)
    pairs: dict[str, tuple[_Draft, _Answer, _Answer]] = {}
    misses = 0
    while len(pairs) < n_pairs:
        draft = _draft(rng)
        if draft.prompt in pairs:
            misses += 1
            if misses > 100 * n_pairs:
                raise ValueError(f"the word lists make about {len(pairs)} distinct prompts, not {n_pairs}")
            continue
        one, other = _answer(rng, draft), _answer(rng, draft)
        while other.text == one.text:
            other = _answer(rng, draft)
        if one.score == other.score:  # a tie goes to a second panel, whose word is final
            other = other._replace(score=_score(rng, other.quality))
        chosen, rejected = (one, other) if one.score >= other.score else (other, one)
        pairs[draft.prompt] = (draft, chosen, rejected)
    return list(pairs.values())


def make_preference_set(n_pairs: int, seed: int = 0) -> Dataset:
    """Write a scored preference set: the same one for the same seed, with no prompt twice.

    Every answer has a true quality, which the set does not show, and a score: the mean of four annotators' marks from
    1 to 10. The answer with the higher score is the chosen one, so that among pairs with a small gap some labels are
    wrong. A few pairs are ties.

    Returns:
        Rows with `prompt`, `chosen` and `rejected` (lists of messages), `score_chosen`, `score_rejected`, and `kind`,
        the family that the prompt belongs to.
    """
    from datasets import Dataset

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    rows: list[dict[str, Any]] = [
        {
            "prompt": message("user", draft.prompt),
            "chosen": message("assistant", chosen.text),
            "rejected": message("assistant", rejected.text),
            "score_chosen": chosen.score,
            "score_rejected": rejected.score,
            "kind": draft.kind,
        }
        for draft, chosen, rejected in _draw_pairs(n_pairs, seed)
    ]
    return Dataset.from_list(rows)


def make_demo_splits(seed: int = 0, n_train: int = 480, n_test: int = 96) -> DatasetDict:
    """Write one preference set and cut it into `train` and `test`, which share no prompt."""
    from datasets import DatasetDict

    pairs = make_preference_set(n_train + n_test, seed)
    test = range(n_train, n_train + n_test)
    return DatasetDict(train=pairs.select(range(n_train)), test=pairs.select(test))
