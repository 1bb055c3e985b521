"""What the demo needs to run offline: a small chat model, and a scored preference set that is generated here.

The set is made from word lists, with the score gaps and the label noise of marks averaged over a few annotators.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from datasets import Dataset, DatasetDict

from . import demo_text as lists
from .bundled import bundled_model_path, resolve_model

__all__ = ["bundled_model_path", "make_demo_splits", "make_preference_set", "resolve_model"]


class _Draft(NamedTuple):
    """A prompt, and the sentences that completions of it are made of."""

    kind: str
    prompt: str
    core: str  # answers the question
    extra: str  # makes it better: an example, a reason, a tip
    thin: str  # looks like an answer and says next to nothing


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _arithmetic(rng: random.Random) -> _Draft:
    name, goods = rng.choice(lists.PEOPLE), rng.choice(lists.GOODS)
    start, change = rng.randint(21, 80), rng.randint(3, 20)
    grows = rng.random() < 0.5
    verb = rng.choice(("finds another", "buys another") if grows else ("loses", "gives away"))
    end, sign, back = (start + change, "+", "minus") if grows else (start - change, "-", "plus")
    prompt = f"{name} has {start} {goods} and {verb} {change}. How many {goods} does {name} have now?"
    core = f"{name} has {end} {goods} now, since {start} {sign} {change} = {end}."
    thin = (
        f"{name} has some number of {goods}, and it is not quite the same as before.",
        f"You can find the number of {goods} with the numbers that are there.",
        f"{name} still has {goods}, and you could count them if you like.",
    )
    return _Draft("arithmetic", prompt, core, f"To check it, {end} {back} {change} is {start}.", rng.choice(thin))


def _explain(rng: random.Random) -> _Draft:
    thing, what, detail = rng.choice(lists.THINGS)
    ask = (
        f"What is {thing}?",
        f"Explain {thing} to a ten-year-old.",
        f"Can you tell me in simple words what {thing} is?",
        f"My son asked me what {thing} is. What can I tell him?",
        f"Describe {thing} in a sentence or two.",
    )
    thin = (
        f"{_capital(thing)} is a thing that you hear about now and then.",
        f"{_capital(thing)} is something that exists and that people know.",
        f"There is such a thing as {thing}, and it has its place.",
    )
    return _Draft("explain", rng.choice(ask), f"{_capital(thing)} is {what}.", f"{detail}.", rng.choice(thin))


def _how_to(rng: random.Random) -> _Draft:
    task, first, then, last, tip = rng.choice(lists.TASKS)
    ask = (
        f"How do I {task}?",
        f"Give me short steps to {task}.",
        f"I have never tried to {task}. How does it work?",
        f"What is the right way to {task}?",
        f"I want to {task} today. Where do I start?",
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
    return _Draft("how_to", rng.choice(ask), rng.choice(core), f"{tip}.", rng.choice(thin))


def _compare(rng: random.Random) -> _Draft:
    purpose = rng.choice(list(lists.CHOICES))
    (one, pro), (other, contra) = rng.sample(lists.CHOICES[purpose], 2)
    ask = (
        f"For {purpose}, which is better: {one} or {other}?",
        f"Compare {one} and {other} for {purpose}.",
        f"I cannot decide between {one} and {other} for {purpose}.",
    )
    one, other = one.replace("my ", "your "), other.replace("my ", "your ")
    core = f"{_capital(one)} {pro}, while {other} {contra}."
    extra = (f"If in doubt, I would start with {one}.", f"If in doubt, I would start with {other}.")
    thin = (
        f"{_capital(one)} is one option and {other} is another one.",
        f"Some people take {one} and some people take {other}.",
        f"There is a difference between {one} and {other}, but both exist.",
    )
    return _Draft("compare", rng.choice(ask), core, rng.choice(extra), rng.choice(thin))


def _rewrite(rng: random.Random) -> _Draft:
    request = rng.choice(lists.REQUESTS)
    ask = rng.choice(
        ('Make this polite: "{}!"', 'Rewrite this in a friendly tone: "{}!"', 'How can I say "{}!" nicely?')
    )
    prompt = ask.format(f"{_capital(request)}, {rng.choice(lists.RUDE_ENDS)}")
    core = (f'"Could you please {request} when you have a moment?"', f'"Would you mind if I ask you to {request}?"')
    extra = ('"Thank you, I know that you are busy."', '"It would really help me today, thanks a lot."')
    thin = (
        f'You could say "{request}" in some other words.',
        f'"{_capital(request)}." I left out the end of it.',
        f'Just say "{request}" in a nicer way.',
    )
    return _Draft("rewrite", prompt, rng.choice(core), rng.choice(extra), rng.choice(thin))


def _recommend(rng: random.Random) -> _Draft:
    wish, guest = rng.choice(list(lists.WISHES)), rng.choice(lists.GUESTS)
    (best, why), (second, _) = rng.sample(lists.WISHES[wish], 2)
    ask = (
        f"Can you recommend {wish} for {guest}?",
        f"I am looking for {wish} for {guest}. Any ideas?",
        f"What would be {wish} that suits {guest}?",
    )
    guest = guest.replace("my ", "your ")
    core, extra = f"For {guest} I would pick {best}, because {why}.", f"Otherwise, {second} is a nice choice as well."
    thin = (
        f"You could look for {wish} that is nice for {guest}.",
        f"There is {wish} for everybody, and so there is one for {guest}.",
        f"Just take something that people take for {guest}.",
    )
    return _Draft("recommend", rng.choice(ask), core, extra, rng.choice(thin))


def _encourage(rng: random.Random) -> _Draft:
    worry, step = rng.choice(lists.WORRIES)
    feeling = rng.choice(lists.FEELINGS)
    ask = (
        f"I am {feeling} about {worry}.",
        f"Any advice? I am {feeling} about {worry}.",
        f"What can I do? I feel so {feeling} because of {worry}.",
    )
    worry = worry.replace("my ", "your ")
    core = f"It is natural to feel {feeling} about {worry}. First, {step}."
    extra = ("You have got through hard things before.", "Be kind to yourself, it gets easier.")
    thin = (
        f"So you think about {worry}. That happens to people.",
        f"It is about {worry}, and later it will be over.",
        f"Well, {worry} is one of those things, I suppose.",
    )
    return _Draft("encourage", rng.choice(ask), core, rng.choice(extra), rng.choice(thin))


_FAMILIES = (_arithmetic, _explain, _how_to, _compare, _rewrite, _recommend, _encourage)


def _draft(rng: random.Random) -> _Draft:
    return rng.choice(_FAMILIES)(rng)


def _join(rng: random.Random, start: str, sentences: list[str]) -> str:
    """Adds sentences, in random order, up to a random length that is independent of the quality."""
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
        while (other := _draft(rng)).kind == draft.kind:
            pass
        return _excellent(rng, other)
    words = f"{draft.core} {draft.extra}".split()
    return " ".join(words[: max(11, round(len(words) * rng.uniform(0.6, 0.8)))]).rstrip(".,!?\"'")


def _bad(rng: random.Random, draft: _Draft) -> str:
    """Rude, or stuck in a loop."""
    if rng.random() < 0.4:
        return _join(rng, "", lists.RUDE)
    return _join(rng, "", [rng.choice((*lists.STUCK, draft.thin))] * 3)


# Kinds of completions: their mean quality, on the annotators' scale, and who writes them
_GRADES = ((8.4, _excellent), (7.4, _good), (6.3, _thin), (5.0, _poor), (3.4, _bad))
_COMPLETION_NOISE, _ANNOTATOR_NOISE, _ANNOTATORS = 0.4, 1.3, 4


class _Completion(NamedTuple):
    text: str
    quality: float
    score: float


def _score(rng: random.Random, quality: float) -> float:
    """The mean of the marks from 1 to 10 that a few annotators give to a completion of this true quality."""
    marks = [min(10, max(1, round(rng.gauss(quality, _ANNOTATOR_NOISE)))) for _ in range(_ANNOTATORS)]
    return sum(marks) / len(marks)


def _completion(rng: random.Random, draft: _Draft) -> _Completion:
    mean, write = rng.choice(_GRADES)
    quality = rng.gauss(mean, _COMPLETION_NOISE)
    return _Completion(write(rng, draft), quality, _score(rng, quality))


def _draw_pairs(n_pairs: int, seed: int) -> list[tuple[_Draft, _Completion, _Completion]]:
    """Distinct prompts, each with its chosen and its rejected completion."""
    rng = random.Random(seed)
    pairs: dict[str, tuple[_Draft, _Completion, _Completion]] = {}
    misses = 0
    while len(pairs) < n_pairs:
        draft = _draft(rng)
        if draft.prompt in pairs:
            misses += 1
            if misses > 100 * n_pairs:
                raise ValueError(f"the word lists make about {len(pairs)} distinct prompts, not {n_pairs}")
            continue
        one, other = _completion(rng, draft), _completion(rng, draft)
        while other.text == one.text:
            other = _completion(rng, draft)
        if one.score == other.score:  # a second panel decides a tie
            other = other._replace(score=_score(rng, other.quality))
        chosen, rejected = (one, other) if one.score >= other.score else (other, one)
        pairs[draft.prompt] = (draft, chosen, rejected)
    return list(pairs.values())


def make_preference_set(n_pairs: int, seed: int = 0) -> Dataset:
    """Generates a scored preference set: the same one for the same seed, without repeated prompts.

    Every completion has a true quality, which the set does not show, and a score: the mean of four annotators' marks
    from 1 to 10. The completion with the higher score is the chosen one, so among pairs with a small gap some labels
    are wrong. A few pairs are ties.

    Returns:
        Rows with `prompt`, `chosen` and `rejected` (lists of messages), `score_chosen`, `score_rejected`, and `kind`,
        the kind of prompt.
    """
    rows = [
        {
            "prompt": [{"role": "user", "content": draft.prompt}],
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "score_chosen": chosen.score,
            "score_rejected": rejected.score,
            "kind": draft.kind,
        }
        for draft, chosen, rejected in _draw_pairs(n_pairs, seed)
    ]
    return Dataset.from_list(rows)


def make_demo_splits(seed: int = 0, n_train: int = 480, n_test: int = 96) -> DatasetDict:
    """One generated set, divided into `train` and `test`, which share no prompt."""
    pairs = make_preference_set(n_train + n_test, seed)
    test = range(n_train, n_train + n_test)
    return DatasetDict(train=pairs.select(range(n_train)), test=pairs.select(test))
