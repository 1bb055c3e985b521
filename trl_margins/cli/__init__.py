"""`trl-margins`: one file a subcommand. Each loads what it needs only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": "train with a method on a preference set",
    "recipes": "list the settings of the papers that train --recipe takes",
    "convert": "another project's YAML in today's words",
    "evaluate": "how a model ranks answers: pairs, lists, RM-Bench",
    "report": "pictures of training runs, from what the trainer wrote",
    "select": "rank a preference set by how its pairs hold at a nearby, worse model (GAPO)",
    "inspect": "audit a preference set before training: scores, lengths, truncation, duplicates",
    "score": "add an evaluation factor to a preference set",
    "demo": "train the bundled model on a made-up set, before and after",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    command, *rest = arguments
    if command == "--version":
        from .. import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"trl-margins: unknown command {command!r}\n\n{_help()}", file=sys.stderr)
        return 2
    return import_module(f".{command}", __name__).main(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: trl-margins COMMAND [options]", "", *lines, "", "trl-margins COMMAND --help shows more."]
    )
