"""Processes of their own that have everything imported when they start: that takes longer than what most tests have
them do.
"""

from __future__ import annotations

import gc
import os
import runpy
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(["conftest", "trl_margins.cli.train", "trl_margins.cli.evaluate"])


def start(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A function in a process of its own."""
    process = _SERVER.Process(target=_run, args=(dict(os.environ), target, *arguments))
    with pytest.MonkeyPatch.context() as patch:  # which the first one's server keeps
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        process.start()
    return process


def _run(environment: dict[str, str], target: Callable[..., Any], *arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # as conftest.py does for the tests
    target(*arguments)


def output_of(ranks: int, *command: str, folder: Path | None = None, timeout: float = 900) -> str:
    """What a command (a script, `-m` and a module, or `-c` and code; arguments) prints, in a folder; by several ranks,
    which find each other as those of torchrun do.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that is free
    joined = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    joined |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    of_ranks = [joined | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as files:
        printed, said = Path(files, "printed"), Path(files, "said")
        running = [
            start(_command, variables if ranks > 1 else {}, folder or Path.cwd(), (printed, said), command)
            for variables in of_ranks
        ]
        until = time.monotonic() + timeout
        # where one has failed, the others would wait for it
        while any(each.is_alive() for each in running) and not any(each.exitcode for each in running):
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        for each in running:
            each.kill()
            each.join()
        codes = [each.exitcode for each in running]
        if any(codes):
            pytest.fail(f"{ranks} ranks ended with {codes}: {shlex.join(command)}\n{said.read_text()[-3000:]}")
        return printed.read_text()


def _command(variables: dict[str, str], folder: Path, files: tuple[Path, Path], command: tuple[str, ...]) -> None:
    os.environ.update(variables)
    os.chdir(folder)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    first, *sys.argv = command
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    if first == "-c":
        exec(sys.argv.pop(0), {"__name__": "__main__"})
    elif first == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv.insert(0, first)
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
