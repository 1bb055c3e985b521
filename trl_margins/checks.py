"""Is a value one that an option can have? If not, an error that says which it can. Standard library alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Number:
    """The numbers that an option takes: never NaN or infinite, and within bounds where there are any."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False
    optional: bool = False  # None is one of the values

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.least, "at most": self.most, "below": self.below}
        said = " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)
        kind = "a whole number" if self.whole else "a number" if said else "a finite number"
        return kind + (f", {said}" if said else "") + (", or None" if self.optional else "")

    def check(self, name: str, value: Any) -> None:
        """
        Raises:
            ValueError: another value, with the option's name and what it takes.
        """
        if not (self._has(value) or (self.optional and value is None)):
            hint = " (a text: leave the quotes out)" if isinstance(value, str) else ""
            raise ValueError(f"{name} must be {self}; it is {value!r}{hint}")

    def _has(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def unknown(what: str, value: Any, known: Iterable[str]) -> ValueError:
    """The error that lists what is known, and names what is most like the value."""
    names = {name.lower(): name for name in known}
    nearest = get_close_matches(str(value).lower(), names, n=1)
    hint = f"; did you mean {names[nearest[0]]!r}?" if nearest else ""
    return ValueError(f"unknown {what} {value!r}; known: {', '.join(names.values())}{hint}")
