"""What the package says while it works: INFO lines on standard error, unless the script has set up logging itself."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .printable import shown

PACKAGE = logging.getLogger(__name__.partition(".")[0])
_DEFAULT = logging.INFO - 1  # shows the same as INFO, and is told apart from a level that somebody asked for


def set_verbosity(level: int | str) -> None:
    """Sets the lowest level that the package shows, for example `"WARNING"`; by default it is INFO."""
    PACKAGE.setLevel(level)


class Screen(logging.Handler):
    """Writes to standard error, above progress bars. An INFO line is its message alone."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno > logging.INFO:
                text = f"{record.levelname} {record.name}: {text}"
            if bars := sys.modules.get("tqdm"):
                bars.tqdm.write(text, file=sys.stderr)
            else:
                sys.stderr.write(f"{text}\n")
        except Exception:
            self.handleError(record)


class _Package(Screen):
    """Shows the package's records where nobody else does, as `logging.lastResort` does from WARNING on."""

    held: list[logging.LogRecord] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if record.levelno < logging.WARNING and _is_of_another_rank():
            return
        _make_plain(record)
        if self.held is not None and record.levelno < logging.WARNING:
            self.held.append(record)
        elif root.handlers:
            if record.levelno >= _asked(record.name):
                for handler in root.handlers:
                    if record.levelno >= handler.level and handler not in PACKAGE.handlers:  # as pytest's is
                        handler.handle(record)
        elif PACKAGE.handlers == [self]:
            super().emit(record)


def _make_plain(record: logging.LogRecord) -> None:
    """Writes out control characters and leaves out secrets, for this handler and those after it."""
    try:
        said = record.getMessage()
    except Exception:  # who formats it says so
        return
    if (plain := shown(said)) != said:
        record.msg, record.args = plain, None


def _is_of_another_rank() -> bool:
    """Whether INFO is left to the first rank, which says the same. Launchers from Python set RANK after the import."""
    return PACKAGE.level == _DEFAULT and os.environ.get("RANK", "0") != "0"


def _asked(name: str) -> int:
    """The level that a script asked for, by the name of a logger or by the root's."""
    logger = logging.getLogger(name)
    while logger.parent and logger.level in (logging.NOTSET, _DEFAULT):
        logger = logger.parent
    return logger.level


def shows(level: int) -> bool:
    """Whether records of this level are shown."""
    asked = not logging.getLogger().handlers or level >= _asked(PACKAGE.name)
    return PACKAGE.isEnabledFor(level) and asked and not (level < logging.WARNING and _is_of_another_rank())


@contextmanager
def holding_info() -> Iterator[None]:
    """Keeps INFO lines back until `first` has let others pass, or to the end of the block."""
    _handler.held = []
    try:
        yield
    finally:
        release_info()


def release_info() -> None:
    """Shows what has been kept back."""
    with first():
        pass


@contextmanager
def first() -> Iterator[None]:
    """What is said in the block comes before what has been kept back."""
    held, _handler.held = _handler.held or [], None
    try:
        yield
    finally:
        for record in held:
            _handler.handle(record)


_handler = _Package()
PACKAGE.addHandler(_handler)
PACKAGE.propagate = False  # the handler passes on to the root what a script wants to see
if PACKAGE.level == logging.NOTSET:
    PACKAGE.setLevel(_DEFAULT)
