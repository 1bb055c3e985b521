"""`trl-margins convert`: another project's YAML in today's words, with a comment where a key changed."""

from __future__ import annotations

import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from .dialects import Note, Settings, check_known, translate
from .resolved import as_yaml
from .setup import check_writable, log_to_console
from .yaml_file import read_yaml


def main(argv: Sequence[str]) -> int:
    """Reads theirs, writes ours."""
    log_to_console()
    parser = ArgumentParser(prog="trl-margins convert", description=__doc__)
    parser.add_argument("config", type=Path, metavar="THEIRS.yaml", help="YAML for another project or an older TRL.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Where to write it; to the terminal, if not given.")
    args = parser.parse_args(list(argv))
    from .train import parser_for

    settings, notes = translate(read_yaml(args.config))
    known = parser_for(settings.get("method", "gappo"), settings.get("base", "cpo")).fields
    check_known(settings, known | {"env"}, str(args.config))
    text = converted(settings, notes, args.config.name)
    if args.out is None:
        print(text, end="")
        return 0
    if args.out.exists() and args.out.samefile(args.config):
        raise SystemExit(f"trl-margins convert: {args.out} is the file to read: write to another")
    check_writable(args.out.parent)
    args.out.write_text(text)
    print(args.out)
    return 0


def converted(settings: Settings, notes: Sequence[Note], name: str) -> str:
    """The settings as YAML, each note before the first field that it is about, and last those about none."""
    lines = [f"# From {name}, by trl-margins convert."]
    left = list(notes)
    for key, value in settings.items():
        for note in [note for note in left if key in note.fields]:
            lines.append(_comment(note))
            left.remove(note)
        lines.append(as_yaml({key: value}).rstrip("\n"))
    if left:
        lines += ["", "# Not in this file any more:", *map(_comment, left)]
    return "\n".join(lines) + "\n"


def _comment(note: Note) -> str:
    return textwrap.fill(str(note), 110, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
