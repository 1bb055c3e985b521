"""Items of work, one line of JSON each as soon as it is done, so that no result is lost."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Values = dict[str, Any]
ROOM = 1.15  # an item may take this much longer than the last of its kind
BROKEN = ("CUDA error", "device-side assert", "unspecified launch failure", "illegal memory access")


class Ledger:
    """Does items while they fit into a budget, and remembers them in a file.

    Args:
        file: JSON lines. Items that it holds are not done again.
        budget: seconds for this process.
        retry: do items again that the file says raised, or were not right.
        only: do those items alone whose names contain one of these.
    """

    def __init__(self, file: Path, budget: float, retry: bool = False, only: list[str] | None = None) -> None:
        self.file, self.budget, self.started, self.only = file, budget, time.perf_counter(), only
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        self.items: dict[str, Values] = {}
        for line in lines:
            item = json.loads(line)
            self.items[item["key"]] = item
        if retry:
            self.items = {
                key: item for key, item in self.items.items() if "error" not in item and item.get("ok", True)
            }
        self.left: list[str] = []  # what did not fit, or was not asked for
        self._seconds: dict[str, float] = {item["kind"]: item["seconds"] for item in self.items.values()}

    @property
    def remaining(self) -> float:
        return self.budget - (time.perf_counter() - self.started)

    def fits(self, kind: str, guess: float) -> bool:
        return ROOM * self._seconds.get(kind, guess) <= self.remaining

    def do(self, key: str, work: Callable[[], Values], kind: str = "", guess: float = 10.0) -> Values | None:
        """The item's values: from the file, or from doing it now. None where it does not fit any more.

        Args:
            key: its name in the file.
            work: does it.
            kind: items of a kind take about as long.
            guess: seconds of the first of its kind.
        """
        if key in self.items:
            return self.items[key]
        if self.only and not any(part in key for part in self.only):
            self.left.append(key)
            return None
        kind = kind or key
        if not self.fits(kind, guess):
            self.left.append(key)
            return None
        began = time.perf_counter()
        try:
            values = work()
        except Exception as error:
            values = {"error": last_lines(error)}
            print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        self._seconds[kind] = time.perf_counter() - began
        self.record(key, kind, self._seconds[kind], values)
        free()
        if any(sign in values.get("error", "") for sign in BROKEN):
            self._start_afresh()
        return self.items[key]

    def took(self, kind: str, seconds: float) -> None:
        """For items that others do: how long one of its kind takes."""
        self._seconds[kind] = seconds

    def record(self, key: str, kind: str, seconds: float, values: Values) -> None:
        item = self.items[key] = {"key": key, "kind": kind, "seconds": round(seconds, 3), **values}
        with self.file.open("a") as out:
            out.write(json.dumps(item) + "\n")
        said = values.get("error", "ok" if values.get("ok", True) else "NOT OK")
        print(f"[{self.budget - self.remaining:6.1f} s] {key}: {said}", flush=True)

    def _start_afresh(self) -> None:
        """After some errors a process gets nothing more from its device."""
        if "--budget" in sys.argv:
            budget = sys.argv.index("--budget")
            del sys.argv[budget : budget + 2]
        retry = [argument for argument in sys.argv if argument != "--retry"]
        os.execv(sys.executable, [sys.executable, *retry, "--budget", str(int(self.remaining))])


def last_lines(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(where))
    return f"{type(error).__name__}: {str(error)[-1500:]} [{places}]"


def free() -> None:
    import torch

    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Markdown; names to the left, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)]) + "\n"


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
