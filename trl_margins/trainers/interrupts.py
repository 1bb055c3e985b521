"""Ctrl-C and SIGTERM: training ends with the optimizer's step, at a checkpoint from which it can be resumed.

transformers has `enable_jit_checkpoint`, for SIGTERM. It waits three seconds, every rank for itself, and saves within
a step: the random state and what the terms remember are then those of a step that the weights have not taken.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .base import MarginTrainer

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TOGETHER = 1.0  # seconds: two signals so near to each other are one wish
_listening = 0  # the process that listens


# The workers of a data loader. Whoever stops a job tells all of its processes, and with a worker the step is gone that
# is to be finished. So a child takes SIGTERM from its parent alone. torch sets a handler that ends it, after any other
# has been set; but a signal that is blocked has no handler.


def _before_fork() -> None:
    if os.getpid() == _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    if os.getpid() == _listening:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _as_child() -> None:
    if os.getppid() == _listening:
        threading.Thread(target=_end_with_parent, args=(_listening,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent == os.getppid():
        pass
    os._exit(128 + signal.SIGTERM)


if hasattr(signal, "sigwaitinfo"):  # not on macOS
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_as_child)


class Interrupts:
    """What signals have asked for. A second one quits at once."""

    signal: int | None = None
    _asked_at = 0.0
    agreed = False  # on all ranks
    ending: str | None = None  # what comes before the end; without it, the first signal quits, too
    of_epoch = False  # whether an epoch has ended since the last step began

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listens within the block; in the main thread, which alone gets signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        global _listening
        _listening = self._process = os.getpid()
        before = {each: signal.getsignal(each) for each in _SIGNALS}
        for each, handler in before.items():
            if handler != signal.SIG_IGN:  # as of a job in the background of a script
                signal.signal(each, self._hear)
        try:
            yield
        finally:
            _listening = 0
            for each, handler in before.items():
                signal.signal(each, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of a data loader, which its parent stops
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.signal is not None:  # SIGTERM after Ctrl-C; or with it, which asks for no more
            if monotonic() - self._asked_at > _TOGETHER:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.signal, self._asked_at = number, monotonic()
        # Python handles SIGINT first, and says of a SIGTERM that waits behind it that it has no handler any more
        for each in {number, signal.SIGINT}:
            if signal.getsignal(each) != signal.SIG_IGN:
                signal.signal(each, signal.SIG_DFL)
        if self.ending is None:
            raise SystemExit(self.status)
        if os.environ.get("RANK", "0") == "0":  # a handler must not print: it may have interrupted someone who does
            os.write(2, f"\n{self.ending}; Ctrl-C again quits at once\n".encode())

    @property
    def status(self) -> int:
        """A shell's status of a program that the signal ends."""
        return 128 + self.signal if self.signal else 0


class _EndsSteps(TrainerCallback):
    """From the first step on there is something to end."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupts.ending is None and self.interrupts.signal is not None:
            raise SystemExit(self.interrupts.status)  # that of the signal was lost: Python drops those of weakref's
        self.interrupts.ending, self.interrupts.of_epoch = "stopping after this step, with a checkpoint", False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interrupts.of_epoch = True


class InterruptsMixin(MarginTrainer):
    """A trainer that signals end, if its caller listens to them."""

    interrupts: Interrupts | None = None
    _saved_at: tuple[int, int] | None = None  # step and number of logs in the last checkpoint

    def listen(self, interrupts: Interrupts) -> None:
        """Lets these signals end training."""
        self.interrupts = interrupts
        self.add_callback(_EndsSteps(interrupts))

    @property
    def asked_to_stop(self) -> bool:
        """Whether a signal has asked this rank."""
        return self.interrupts is not None and self.interrupts.signal is not None

    @property
    def is_interrupted(self) -> bool:
        """Whether all ranks know that training ends here."""
        return self.interrupts is not None and self.interrupts.agreed

    def agree_to_stop(self, n_asked: float) -> None:
        """Ends training with this step where some rank was asked; every rank must be told the same number."""
        if self.interrupts is not None and n_asked:
            self.interrupts.agreed = True
            self.interrupts.signal = self.interrupts.signal or signal.SIGTERM  # that of another rank

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, epoch: float, *args: Any, **kwargs: Any
    ) -> None:
        if self.is_interrupted and self.control.should_training_stop and self._is_saved:
            return  # an epoch that was broken off has no evaluation at its end
        takes_long = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
        if self.interrupts is None:
            return
        if takes_long and not self.is_interrupted:  # or the next step would be taken first
            asked = torch.full((), int(self.asked_to_stop), device=self.accelerator.device)
            self.agree_to_stop(self.accelerator.reduce(asked, "sum").item())
        ends_epoch = self.state.epoch is not None and float(self.state.epoch).is_integer()
        if not self.is_interrupted or (ends_epoch and not self.interrupts.of_epoch):
            return  # what is due at the epoch's end comes first
        self.control.should_training_stop = True
        if not self._is_saved or self.args.save_only_model:
            only_model, self.args.save_only_model = self.args.save_only_model, False
            self._save_checkpoint(model, trial)
            self.args.save_only_model = only_model
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    @property
    def _is_saved(self) -> bool:
        return self._saved_at == (self.state.global_step, len(self.state.log_history))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._saved_at = self.state.global_step, len(self.state.log_history)

    def _load_best_model(self) -> None:
        if not self.is_interrupted:  # else nobody needs it now, and there may be little time
            super()._load_best_model()
