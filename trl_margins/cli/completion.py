"""`trl-margins completion SHELL`: a script that completes commands and options, made by shtab from their parsers."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from unittest import mock

import shtab

from ..methods import METHODS
from . import COMMANDS
from .recipes import recipes


def main(argv: Sequence[str]) -> int:
    """Prints the script. A completion then starts no Python."""
    parser = ArgumentParser(prog="trl-margins completion", description=__doc__)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    shell = parser.parse_args(argv).shell
    whole = ArgumentParser(prog="trl-margins")
    whole.add_argument("--version", action="store_true")
    commands = whole.add_subparsers()
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
        commands.choices[name] = parser_of(name)
    print(shtab.complete(whole, shell))
    return 0


def parser_of(command: str) -> ArgumentParser:
    """The parser that prints a command's help."""
    found: list[ArgumentParser] = []
    asked = mock.patch.object(ArgumentParser, "print_help", lambda self, file=None: found.append(self))
    with asked, suppress(SystemExit):
        import_module(f".{command}", __package__).main(["--help"])
    for action in found[0]._actions:
        if (names := _NAMED.get((command, action.dest))) is not None:
            action.choices = sorted(names())
        elif not action.choices and action.nargs != 0:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return found[0]


_NAMED = {
    ("train", "method"): lambda: [*METHODS, "none"],
    ("train", "recipe"): lambda: [recipe.name for recipe in recipes()],
    ("compare", "methods"): lambda: METHODS,
}
