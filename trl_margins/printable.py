"""Text from data, configs and files as it may be shown: characters that a terminal would obey are written out."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .redaction import redacted_text

# All control characters but a line break and a tab; what turns the direction of text or ends a line or a file; halves
# of surrogate pairs, which cannot be written in UTF-8; and tags, which nobody sees
_ORDERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)
# What tqdm writes to move its bars: back to the line's beginning, up and down
_MOVES = re.compile(r"(?:\r?\n|\x1b\[A)*\r?")


def printable(text: str) -> str:
    r"""The text with `\x1b` and the like in place of control characters."""
    return _ORDERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(text: str) -> str:
    """The text without control characters and secrets."""
    return printable(redacted_text(text))


class Plain:
    """A stream to a terminal or a file that shows no control character and no secret. Progress bars still move.

    What it cannot take, as on a full disk, is lost, and no work ends for it: `lost` is the first such error. A pipe
    that nobody reads any more is an error as ever, unless `outlives_readers`.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        self.outlives_readers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """All of the text, as it may be shown."""
        moves = _MOVES.match(text)
        start = moves.end() if moves else 0
        plain = text[:start] + shown(text[start:])
        with self._losing():
            try:
                self._stream.write(plain)
            except UnicodeEncodeError as error:  # an old locale's
                self._stream.write(plain.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, BrokenPipeError) and not self.outlives_readers:
                raise
            self.lost = self.lost or error


def outlive_readers() -> None:
    """From here on, a pipe that nobody reads ends no work either."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Plain):
            stream.outlives_readers = True
