"""What the demo needs to run offline: a small chat model, and a scored preference set that is generated here.

The set is made from the sentences and words in `demo.yaml`, with the score gaps and the label noise of marks averaged
over a few annotators.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from datasets import Dataset, DatasetDict

from .bundled import bundled_model_path, resolve_model

__all__ = ["bundled_model_path", "make_demo_splits", "make_preference_set", "resolve_model"]


_TEXT = yaml.safe_load(Path(__file__).with_name("demo.yaml").read_text("utf-8"))


class _Draft(NamedTuple):
    """A prompt, and the sentences that completions of it are made of."""

    kind: str
    prompt: str
    core: str  # answers the question
    extra: str  # makes it better: an example, a reason, a tip
    thin: str  # looks like an answer and says next to nothing


def _arithmetic(rng: random.Random) -> dict[str, Any]:
    name, goods = rng.choice(_TEXT["people"]), rng.choice(_TEXT["goods"])
    start, change = rng.randint(21, 80), rng.randint(3, 20)
    grows = rng.random() < 0.5
    verb = rng.choice(("finds another", "buys another") if grows else ("loses", "gives away"))
    end, sign, back = (start + change, "+", "minus") if grows else (start - change, "-", "plus")
    found = {"name": name, "goods": goods, "start": start, "change": change, "verb": verb}
    return found | {"end": end, "sign": sign, "back": back}


def _explain(rng: random.Random) -> dict[str, Any]:
    return dict(zip(("thing", "what", "detail"), rng.choice(_TEXT["things"]).split(" | "), strict=True))


def _how_to(rng: random.Random) -> dict[str, Any]:
    return dict(zip(("task", "first", "then", "last", "tip"), rng.choice(_TEXT["tasks"]).split(" | "), strict=True))


def _compare(rng: random.Random) -> dict[str, Any]:
    purpose = rng.choice(list(_TEXT["choices"]))
    (one, pro), (other, contra) = rng.sample(list(_TEXT["choices"][purpose].items()), 2)
    return {"purpose": purpose, "one": one, "pro": pro, "other": other, "contra": contra}


def _rewrite(rng: random.Random) -> dict[str, Any]:
    request, ask = rng.choice(_TEXT["requests"]), rng.choice(_TEXT["templates"]["rewrite"]["prompt"])
    return {"request": request, "prompt": ask, "end": rng.choice(_TEXT["rude_ends"])}


def _recommend(rng: random.Random) -> dict[str, Any]:
    wish, guest = rng.choice(list(_TEXT["wishes"])), rng.choice(_TEXT["guests"])
    (best, why), (second, _) = rng.sample(list(_TEXT["wishes"][wish].items()), 2)
    return {"wish": wish, "guest": guest, "best": best, "why": why, "second": second}


def _encourage(rng: random.Random) -> dict[str, Any]:
    worry, step = rng.choice(list(_TEXT["worries"].items()))
    return {"worry": worry, "step": step, "feeling": rng.choice(_TEXT["feelings"])}


_KINDS = (_arithmetic, _explain, _how_to, _compare, _rewrite, _recommend, _encourage)


def _draft(rng: random.Random) -> _Draft:
    draw = rng.choice(_KINDS)
    kind = draw.__name__.removeprefix("_")
    fields = draw(rng)
    # as the assistant says it: "your exam" for "my exam"; and at the start of a sentence
    fields |= {f"your_{name}": str(value).replace("my ", "your ") for name, value in fields.items()}
    fields |= {name.capitalize(): str(value)[:1].upper() + str(value)[1:] for name, value in fields.items()}

    def text(part: str) -> str:
        template = fields.get(part) or _TEXT["templates"][kind][part]
        return (template if isinstance(template, str) else rng.choice(template)).format(**fields)

    return _Draft(kind, text("prompt"), text("core"), text("extra"), text("thin"))


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
    return f"{draft.core} {rng.choice(_TEXT['warm'] + _TEXT['padding'])}"


def _thin(rng: random.Random, draft: _Draft) -> str:
    return _join(rng, draft.thin, _TEXT["padding"])


def _poor(rng: random.Random, draft: _Draft) -> str:
    """Evasive, off topic or cut off."""
    way = rng.choice(("evasive", "evasive", "evasive", "off topic", "cut off"))
    if way == "evasive":
        return _join(rng, "", _TEXT["evasive"])
    if way == "off topic":
        while (other := _draft(rng)).kind == draft.kind:
            pass
        return _excellent(rng, other)
    words = f"{draft.core} {draft.extra}".split()
    return " ".join(words[: max(11, round(len(words) * rng.uniform(0.6, 0.8)))]).rstrip(".,!?\"'")


def _bad(rng: random.Random, draft: _Draft) -> str:
    """Rude, or stuck in a loop."""
    if rng.random() < 0.4:
        return _join(rng, "", _TEXT["rude"])
    return _join(rng, "", [rng.choice((*_TEXT["stuck"], draft.thin))] * 3)


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
