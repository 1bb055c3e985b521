"""The file of answers: what a stopped run has written is kept, and the next run writes the rest."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disk import naming, written
from ..rows.answers import digest

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz")


def key_of(row: Mapping[str, Any]) -> str:
    """The same for rows with equal prompts and variables of the chat template."""
    return digest(row["prompt"], row.get("tools"), row.get("chat_template_kwargs"))


class Journal:
    """Rows on disk that a stopped run leaves to the next one.

    Rows are in `OUT.partial` as JSON lines, and the settings behind them in `OUT.settings.json`.

    Args:
        out: the file that is to be made.
        settings: what its rows depend on.
        key: tells rows apart.
        made: other files with such rows.

    Raises:
        ValueError: rows that were made with other settings.
    """

    def __init__(
        self,
        out: str | Path,
        settings: Mapping[str, Any],
        key: Callable[[Mapping[str, Any]], str] = key_of,
        made: Sequence[Path] = (),
    ) -> None:
        self.out, self.settings, self.key = Path(out), dict(settings), key
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self.said = self.out.with_name(f"{self.out.name}.settings.json")
        self.rows: dict[str, dict[str, Any]] = {}
        made = [file for file in (*made, self.partial) if file.exists()]
        if made:
            self._check(made)
        for file in made:
            for row in _read(file):
                self.rows[key(row)] = row
        if self.rows:
            logger.info("%s has %d rows already, which are kept", " and ".join(map(str, made)), len(self.rows))

    def _check(self, made: Sequence[Path]) -> None:
        others = " and ".join(map(str, made))
        if not self.said.exists():
            raise ValueError(
                f"{others} is there, and {self.said.name}, which says how it was made, is not: name another file, or "
                f"remove {others}"
            )
        try:
            before = dict(json.loads(self.said.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.said} is damaged ({error}): name another file, or remove {others}") from error
        for name in {**before, **self.settings}:
            if before.get(name) != (now := self.settings.get(name)):
                raise ValueError(
                    f"{others} was made with {name}={before.get(name)!r}, and this run has {now!r}: go back to that, "
                    f"name another file, or remove {others}"
                )

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row to disk."""
        if not self.partial.exists():
            self._say()
        with naming(self.partial), self.partial.open("ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
        self.rows[self.key(row)] = row

    def _say(self) -> None:
        with naming(self.said):
            self.said.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Removes the files, once what they hold is elsewhere."""
        self.partial.unlink(missing_ok=True)
        self.said.unlink(missing_ok=True)


class Store(Journal):
    """A file of JSON lines, one per prompt, which becomes longer where the data set has.

    Its settings stay beside it. Until the last row is made, the rows are in the journal, in any order.

    Args:
        out: a `.jsonl` or `.jsonl.gz` file.
        settings: what the rows depend on.

    Raises:
        ValueError: a file of another kind, or rows that were made with other settings.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any]) -> None:
        if not str(out).endswith(SUFFIXES):
            raise ValueError(f"{out}: the file is one of {', '.join(SUFFIXES)}")
        super().__init__(out, settings, made=[Path(out)])

    def finish(self, order: Sequence[str]) -> list[dict[str, Any]]:
        """Writes the file, with the rows of these keys in this order, and returns them; `check_all_of` them first."""
        rows = [self.rows[key] for key in order]
        with written(self.out) as made:
            with made.open("wb") as raw:
                # neither a name nor a time in its head, so that equal rows are equal files
                packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if self.out.name.endswith(".gz") else raw
                with packed:
                    packed.writelines(map(_line, rows))
            self._say()
        self.partial.unlink(missing_ok=True)
        return rows

    def check_all_of(self, keys: Sequence[str]) -> None:
        """
        Raises:
            ValueError: there are rows of other keys.
        """
        if strange := self.rows.keys() - set(keys):
            raise ValueError(
                f"{self.out} has {len(strange)} prompts that are not among those to answer now: name another file, or "
                "the data set that it was made from, with as many of its prompts"
            )


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """The rows, without a last line that was not written to its end, which is removed."""
    if file.suffix == ".gz":
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            yield from map(json.loads, lines)
        return
    with file.open("rb+") as lines:
        end = 0
        for line in lines:
            if not line.endswith(b"\n"):
                logger.warning("%s: the last line was not written to its end, and is made again", file)
                lines.truncate(end)
                return
            end += len(line)
            yield json.loads(line)
