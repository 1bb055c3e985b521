"""`trl-margins convert`: migrates another project's YAML, with a comment for each key that changed."""

from __future__ import annotations

import os
import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from ..checks import check_text
from ..disk import write
from .config_file import Settings, as_yaml, read_yaml
from .migration import Note, migrate
from .setup import check_files


def main(argv: Sequence[str]) -> int:
    """Reads the file, writes or prints the migrated one."""
    parser = ArgumentParser(prog="trl-margins convert", description=__doc__)
    parser.add_argument("config", metavar="FILE", help="YAML for another project or an older TRL.")
    parser.add_argument("--out", help="File to write; without it, the result is printed.")
    args = parser.parse_args(list(argv))
    try:
        check_text("config", args.config)
        check_text("out", args.out)
    except ValueError as error:
        parser.error(str(error))
    from .train import parse
    from .train_options import check_run

    settings, notes = migrate(read_yaml(args.config))
    check_run(*parse(["--dry_run"], dict(settings), args.config), whole=False)
    if settings.get("method") is None and not any(note.key == "method" for note in notes):
        notes = [Note("method", "not named: train takes its default, gappo", tuple(settings)[:1]), *notes]
    text = converted(settings, notes, Path(args.config).name)
    if args.out is None:
        print(text, end="")
        return 0
    out = os.path.expanduser(args.out)
    check_files([out], [args.config])
    write(out, text)
    print(out)
    return 0


def converted(settings: Settings, notes: Sequence[Note], name: str) -> str:
    """The settings as YAML: each note before the first key that it sets, notes without a key last."""
    lines = [f"# From {_printable(name)}, by trl-margins convert."]
    left = list(notes)
    for key, value in settings.items():
        for note in [note for note in left if key in note.fields]:
            lines.append(_comment(note))
            left.remove(note)
        lines.append(as_yaml({key: value}).rstrip("\n"))
    if left:
        lines += ["", "# No longer in this file:", *map(_comment, left)]
    return "\n".join(lines) + "\n"


def _comment(note: Note) -> str:
    return textwrap.fill(
        _printable(str(note)), 110, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False
    )


def _printable(text: str) -> str:
    """The text with line breaks of all kinds, which would end a comment, and other control characters as escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
