"""The options of the subcommands: what several of them say alike, and what is unknown."""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from trl import TrlParser

logger = logging.getLogger(__name__)

PROMPT_COLUMN = "Column with the prompt, if it is not `prompt`."
SYSTEM_COLUMN = "Column with each row's system message."
SCORE_COLUMNS = "Score columns, if not the usual names."
MAX_LENGTH = 1024  # of a model that no run of this package trained
LENGTH = f"Longest prompt and answer, in tokens. If not given, what the model was trained with, or else {MAX_LENGTH}."


class OptionsParser(TrlParser):
    """TRL's parser, which says of an unknown option what it could have been."""

    def parse_args_and_config(self, args: Sequence[str], **kwargs: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """
        Raises:
            ValueError: an option or an argument that the command does not have, also in the YAML file.
        """
        check_options(self, args)  # before argparse asks for a required option that is only misspelled
        *parsed, rest = super().parse_args_and_config(list(args), **kwargs, return_remaining_strings=True)
        if rest:
            check_options(self, rest)
            raise ValueError(f"unexpected argument {rest[0]!r}: write the option it belongs to in front of it")
        return tuple(parsed)


def check_options(parser: ArgumentParser, args: Sequence[str]) -> None:
    """
    Raises:
        ValueError: options that the parser does not have, each with the nearest that it has.
    """
    known = [*parser._option_string_actions, "--config"]
    given = [text.partition("=")[0] for text in args if text.startswith("--") and text != "--"]
    complaints = []
    for option in dict.fromkeys(given):
        if any(name.startswith(option) for name in known):  # argparse takes abbreviations
            continue
        nearest = get_close_matches(option, known, n=1)
        complaints.append(f"unknown option {option}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    if complaints:
        raise ValueError("\n".join(complaints))


def data_first(args: Sequence[str]) -> list[str]:
    """With the data set's flag, where it stands first without one."""
    named = bool(args) and not args[0].startswith("-")
    return [*(["--dataset_name"] if named else []), *args]


def max_length_of(given: int | None, model: str | None) -> int:
    """The `max_length` that is given, or else the one that the model was trained with; with a line about that."""
    from .evaluate import trained_with

    if given is not None:
        return given
    trained = None if model is None else trained_with(model).get("max_length")
    if trained is None:
        return MAX_LENGTH
    logger.info("max_length=%d, with which the model was trained", trained)
    return trained
