"""A chat template is a program from elsewhere: loops within loops would keep a run waiting without end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 10.0  # of this thread, for one conversation; a template takes less than a thousandth
_LOOK = 0.25


class SlowTemplateError(ValueError):
    """A chat template that does not come to an end. No row is at fault."""


@contextmanager
def limited(seconds: float | None = None) -> Iterator[None]:
    """Stops what is done within the block when it has taken so much of this thread's time, and `SECONDS` by default.

    There is no limit in other threads than the main one, nor on Windows, which have no such signal.

    Raises:
        SlowTemplateError: it was stopped.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    end = time.thread_time() + (SECONDS if seconds is None else seconds)

    def look(number: int, frame: Any) -> None:
        if time.thread_time() > end:
            raise SlowTemplateError(
                f"the chat template takes more than {SECONDS:g} s for a conversation, as with loops within loops, and "
                "was stopped: use another one (trl-margins train has --chat_template FILE)"
            )

    before, timer = signal.signal(signal.SIGALRM, look), signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
