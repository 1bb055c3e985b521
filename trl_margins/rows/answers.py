"""The answers to one prompt, with their scores."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, NamedTuple

from .messages import Part, without_notes


class Answer(NamedTuple):
    """One answer to a prompt.

    Attributes:
        response: text or messages.
        score: the higher, the better. A rank is a negative score. None only until such answers are left out.
        model: the name of who answered, if it is known.
        is_cut: it did not end, but was cut (`truncated`).
    """

    response: Any
    score: Any
    model: str | None = None
    is_cut: bool = False


@dataclass(frozen=True)
class ScoredList:
    """The k answers to one prompt.

    Attributes:
        prompt: text or messages.
        answers: [k], whose responses are of the same kind.
        template: further variables of the chat template.
        row: the first row that it is from.
    """

    prompt: Part
    answers: list[Answer]
    template: Mapping[str, Any] = field(default_factory=dict)
    row: int = 0

    @property
    def responses(self) -> list[Part]:
        return [answer.response for answer in self.answers]

    @property
    def scores(self) -> list[float]:
        return [answer.score for answer in self.answers]

    @property
    def models(self) -> list[str | None]:
        return [answer.model for answer in self.answers]

    def distinct(self, by_model: bool = False) -> ScoredList:
        """Each answer once (of each model), at its first place, with the mean of its scores."""
        groups: defaultdict[str, list[Answer]] = defaultdict(list)
        for answer in self.answers:
            groups[digest(without_notes(answer.response), answer.model if by_model else None)].append(answer)
        return replace(
            self,
            answers=[some[0]._replace(score=sum(each.score for each in some) / len(some)) for some in groups.values()],
        )

    def at(self, places: Iterable[int]) -> ScoredList:
        """Some of the answers, in this order."""
        return replace(self, answers=[self.answers[i] for i in places])


def digest(*values: Any) -> str:
    """The same for equal values, on every machine."""
    return blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
