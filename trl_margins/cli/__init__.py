"""`trl-margins`: one file a subcommand. Each loads what it needs only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from linecache import getline
from traceback import walk_tb

from yaml import YAMLError

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


# modules whose errors are meant for users
_CHECK_THEIR_INPUT = (
    "trl_margins",
    "trl",
    "peft",
    "transformers.trainer",
    "transformers.training_args",
    "transformers.integrations",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status.

    Without `argv`, as the console calls it, what is wrong with the input is one message instead of an error.
    """
    if argv is not None:
        return _run(list(argv))
    try:
        status = _run(sys.argv[1:])
        _leave_the_other_ranks()
        return status
    except Exception as error:
        if not _says_enough(error):
            raise
        print(f"{' '.join(['trl-margins', *sys.argv[1:2]])}: {error}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
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


def _leave_the_other_ranks() -> None:
    """The threads of a process group that is left open now and then abort the process at its exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _says_enough(error: Exception) -> bool:
    """Whether an error is about what the user gave, or about a file, or a library that is not there.

    All others are somebody's mistake, of which the traceback tells where.
    """
    if isinstance(error, (OSError, ImportError, YAMLError)):
        return True
    *_, (frame, line) = walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    checks = any(module == name or module.startswith(f"{name}.") for name in _CHECK_THEIR_INPUT)
    on_purpose = getline(frame.f_code.co_filename, line).lstrip().startswith("raise")
    return checks and on_purpose and isinstance(error, (ValueError, TypeError, RuntimeError, ArithmeticError))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: trl-margins COMMAND [options]", "", *lines, "", "trl-margins COMMAND --help shows more."]
    )
