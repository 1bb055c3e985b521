"""Validate option values and the environment. Standard library alone."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Number:
    """The numbers that an option takes: finite, and within its bounds."""

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
            hint = " (got a string; remove the quotes)" if isinstance(value, str) else ""
            raise ValueError(f"{name} must be {self}; it is {value!r}{hint}")

    def _has(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def unknown(what: str, value: Any, known: Iterable[str]) -> ValueError:
    """The error that lists what is known, and names the nearest."""
    names = {name.lower(): name for name in known}
    nearest = get_close_matches(str(value).lower(), names, n=1)
    hint = f"; did you mean {names[nearest[0]]!r}?" if nearest else ""
    return ValueError(f"unknown {what} {value!r}; known: {', '.join(names.values())}{hint}")


_POSITIVE, _NOT_NEGATIVE, _FINITE = Number(above=0), Number(least=0), Number()
_COUNT, _SIZE = Number(least=0, whole=True), Number(least=1, whole=True)
_TOKENS = Number(least=1, whole=True, optional=True)

# Our own, and those of TRL's that the losses read
NUMBERS: Mapping[str, Number] = MappingProxyType(
    {
        "beta": _POSITIVE,
        "simpo_gamma": Number(optional=True),
        "gamma_beta_ratio": Number(optional=True),
        "score_gap_threshold": Number(least=0, optional=True),
        "gap_aware_floor": Number(above=0, below=1),
        "gamma_po_tau": _POSITIVE,
        "gamma_po_steps": _SIZE,
        "gamma_po_estimation_size": _SIZE,
        "gamma_po_queue_size": _COUNT,
        "amapo_estimation_size": _SIZE,
        "anchor_radius": _NOT_NEGATIVE,
        "anchor_batch_multiplier": _SIZE,
        "anchor_keep_graphs": _COUNT,
        "sam_radius": _NOT_NEGATIVE,
        "eval_min_score_gap": _NOT_NEGATIVE,
        "label_smoothing": Number(least=0, most=0.5),
        "cpo_alpha": _NOT_NEGATIVE,
        "alpha": _FINITE,
        "ld_alpha": Number(least=0, most=1, optional=True),
        "f_alpha_divergence_coef": _FINITE,
        "discopop_tau": _POSITIVE,
        "max_length": _TOKENS,
        "max_completion_length": _TOKENS,
    }
)
_NAMES = ("train_only", "score_columns", "anchor_scope")
_CHOSEN = ("tokenization",)  # of a base's config


def check_options(options: Any, own: Collection[str]) -> None:
    """Checks the fields of a config one by one.

    Args:
        options: the config.
        own: names of the fields that both bases share; transformers and TRL check their own.

    Raises:
        ValueError: a value that its field cannot have, with the field's name and what it takes.
    """
    for name, number in NUMBERS.items():
        if hasattr(options, name):
            number.check(name, getattr(options, name))
    for item in fields(options):
        if item.name not in (*own, *_CHOSEN):
            continue
        value, choices = getattr(options, item.name), item.metadata.get("choices")
        if choices and value not in choices and not (value is item.default is None):
            raise unknown(item.name, value, choices)
        if item.type in (bool, bool | None) and not isinstance(value, bool) and not (value is item.default is None):
            raise ValueError(f"{item.name} must be True or False; it is {value!r}")
    for name in _NAMES:
        if getattr(options, name) is not None:
            check_names(name, getattr(options, name))


def default_of(item: Field[Any]) -> Any:
    """The default of a dataclass field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def option_prefix(name: str) -> str:
    """What the config fields of a term or a reward begin with, unless its class says otherwise."""
    return name.replace("-", "_") + "_"


def check_names(option: str, value: Any) -> None:
    """
    Raises:
        ValueError: not a list of strings, or an empty one.
    """
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{option} must be a list of one or more names; it is {value!r}")


def launched_processes() -> tuple[int, str]:
    """How many processes a launcher started, this one included, and the variable that says so."""
    # torchrun's and accelerate's, then those of MPI. Slurm's tasks may be runs of their own.
    names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    sizes = ((os.environ.get(name, ""), name) for name in names)
    return max(((int(size), name) for size, name in sizes if size.isdecimal()), default=(1, ""))
