"""`trl-margins`: one module per subcommand, imported when the subcommand runs."""

from __future__ import annotations

import logging
import os
import select as pipes  # `select` here is the subcommand's module
import sys
import traceback
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from linecache import getline
from tempfile import gettempdir
from typing import Any

from yaml import YAMLError

from .. import __version__
from ..disk import is_of_the_disk, rooms
from ..logging import Screen, set_verbosity
from ..printable import Plain

GROUPS = {
    "Train": {
        "train": "train with a method on a preference set",
        "compare": "train several methods with the same data, budget and seeds, and compare them in one table",
        "recipes": "list the papers' settings, for train --recipe",
        "convert": "migrate another project's YAML",
        "demo": "train the bundled model on a synthetic set and compare before and after",
    },
    "Data": {
        "inspect": "audit a preference set before training: scores, lengths, truncation, duplicates",
        "pairs": "make a preference set of scored lists: UltraFeedback, Nectar, HelpSteer2, votes",
        "generate": "answer prompts with a model, several times each",
        "score": "add an evaluation factor or a reward model's scores to a data set",
        "select": "rank a preference set by how its pairs hold at a nearby, worse model (GAPO)",
    },
    "Results": {
        "evaluate": "measure how a model ranks completions: pairs, lists, RM-Bench",
        "report": "plot training runs, from the files that the trainer wrote",
        "anchors": "measure the same pairs at several checkpoints: do flipped labels weigh less? (GAPO)",
        "hessian": "measure how sharply a loss curves in the LM head of one or several models (GAPO)",
    },
    "Installation": {
        "env": "print the versions and devices, for a bug report",
        "completion": "print a script that completes commands and options in a shell",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}

_JOINED = ("train", "evaluate", "select", "anchors")  # by accelerate, where a launcher starts several processes

# modules whose errors are meant for users
_VALIDATING = (
    "trl_margins",
    "trl",
    "peft",
    "transformers.trainer",
    "transformers.training_args",
    "transformers.integrations",
)


class _Subcommand(ArgumentParser):
    """Leaves its arguments to the parser of the subcommand's module, which is not imported before."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        return Namespace(arguments=args), []


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status.

    Without `argv`, as on the console, errors about the input are printed as one message.
    """
    if argv is not None:
        with plain_streams():
            return _run(argv)
    _open_streams()
    if not sys.stderr.isatty():  # before the libraries are imported: files are no place for progress bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers', too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    sys.excepthook = _plain_traceback
    try:
        with plain_streams() as printed, _a_reader_may_leave(printed):
            status = _run(argv)
        return status or int(not isinstance(printed.lost, BrokenPipeError | None))
    except KeyboardInterrupt:
        return 128 + 2  # a shell's status of a program that Ctrl-C ends


def _open_streams() -> None:
    """Opens what the shell has closed, as with `>&-`: files would get its number, and what is printed to it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        print("standard output is closed: what is printed there is lost", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _plain_traceback(*error: Any) -> None:
    """A bug's traceback may show a secret, too."""
    with plain_streams():
        traceback.print_exception(*error)


@contextmanager
def plain_streams() -> Iterator[Plain]:
    """What is printed within the block, by whomever, has no control characters and no secrets."""
    printed = Plain(sys.stdout)
    with redirect_stdout(printed), redirect_stderr(Plain(sys.stderr)):  # type: ignore[type-var]
        yield printed


@contextmanager
def _a_reader_may_leave(printed: Plain) -> Iterator[None]:
    """Ends without a word where nobody reads standard output any more, as after `| head`; says what else is lost."""
    try:
        try:
            yield
        finally:
            printed.flush()  # at exit, nobody could catch the error
            if printed.lost is not None:
                print(f"standard output is lost, which cannot be written: {printed.lost.strerror}", file=sys.stderr)
                _to_nowhere(printed)
    except BrokenPipeError:
        reader = pipes.poll()
        reader.register(sys.stdout, 0)  # which asks for errors alone
        if not reader.poll(0):
            raise  # of another pipe
        _to_nowhere(printed)
        sys.exit(128 + 13)  # a shell's status of a program that SIGPIPE ends


def _to_nowhere(printed: Plain) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), printed.fileno())  # for what is still to be flushed at exit


def _run(argv: Sequence[str] | None) -> int:
    parser = top_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        from ..checks import nearest

        near = nearest(words[0], COMMANDS)
        parser.error(f"unknown command {words[0]!r}" + (f" (did you mean {near!r}?)" if near else ""))
    chosen = parser.parse_args(words)
    if chosen.command is None:
        parser.print_help()
        return 0
    logging.basicConfig(
        handlers=[Screen()], format="%(message)s", level=logging.WARNING
    )  # other libraries keep their own level
    if os.environ.get("RANK", "0") == "0":
        set_verbosity(logging.INFO)
    try:
        if chosen.command not in _JOINED:
            _check_alone(chosen.command)
        status = import_module(f".{chosen.command}", __name__).main(chosen.arguments)
        if argv is None and (joined := sys.modules.get("trl_margins.distributed")):  # only who trains imports it
            joined.leave_process_group()
        return status
    except Exception as error:
        if argv is not None or not _is_about_input(error):
            raise
        print(f"trl-margins {chosen.command}: {error}{_room(error)}", file=sys.stderr)
        return getattr(error, "exit_status", 1)  # 2 for what `options.usage` marked


def _room(error: Exception) -> str:
    """What else to know of a full disk whose error names no more than its number."""
    if not isinstance(error, OSError) or error.errno is None or not is_of_the_disk(error):
        return ""
    from datasets.config import HF_DATASETS_CACHE  # where rows and tokens are kept

    places = [os.getcwd(), str(HF_DATASETS_CACHE), gettempdir()]
    if error.filename:  # no other disk is full
        places = [os.path.dirname(os.path.abspath(os.fsdecode(error.filename)))]
    return f". {rooms(*places)}. Make room there"


def top_parser() -> ArgumentParser:
    """The parser of the commands' names."""
    width = max(map(len, COMMANDS))
    told = [
        "\n".join([f"{title}:", *(f"  {name:{width}}  {text}" for name, text in group.items())])
        for title, group in GROUPS.items()
    ]
    parser = ArgumentParser(
        prog="trl-margins",
        usage="%(prog)s COMMAND [options]",
        epilog="\n\n".join([*told, "trl-margins COMMAND --help shows the options of a command."]),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Subcommand, help=SUPPRESS)
    for name in COMMANDS:
        commands.add_parser(name)
    return parser


def _check_alone(command: str) -> None:
    """
    Raises:
        ValueError: a launcher started several processes, which would all write the same files.
    """
    from ..checks import launched_processes

    launched, name = launched_processes()
    if launched > 1:
        raise ValueError(
            f"{command} is the work of one process, and a launcher started {launched} ({name}={launched}): start it "
            f"without a launcher, and without {name} in its environment"
        )


def _is_about_input(error: Exception) -> bool:
    """Whether an error is about the user's input, a file or a missing library; a bug needs its traceback."""
    if isinstance(error, (OSError, ImportError, YAMLError)):
        return not isinstance(error, BrokenPipeError)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    validates = any(module == name or module.startswith(f"{name}.") for name in _VALIDATING)
    on_purpose = getline(frame.f_code.co_filename, line).lstrip().startswith("raise")
    return validates and on_purpose and isinstance(error, (ValueError, TypeError, RuntimeError, ArithmeticError))
