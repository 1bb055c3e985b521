"""Checkpoints: no pickle, whole or not taken, and the same weights at the end however often a run is killed."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import math
import os
import random
import re
import shutil
import signal
from array import array
from collections import UserList, UserString, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from ipaddress import ip_address
from itertools import product
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import killed
import numpy as np
import pandas as pd
import processes
import pyarrow as pa
import pytest
import torch
from conftest import METHODS_AND_BASES, OWN_METHODS, bases_of, load, preference_rows, quiet, rest_rehearsed
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ConstantLR,
    CyclicLR,
    LambdaLR,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.optimization import Adafactor, AdafactorSchedule
from transformers.trainer_callback import ExportableState
from trl import BEMACallback

from trl_margins.distributed import check_alike
from trl_margins.links import CPO_LINKS, Link
from trl_margins.methods import MARGINS, METHODS, WEIGHTS, names_of
from trl_margins.objective import Objective
from trl_margins.pairs import PairView
from trl_margins.rewards import LengthNormalizedReward
from trl_margins.terms import Term
from trl_margins.trainers.checkpoints import load_states, save_states
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.fingerprints import of_arguments, of_objects
from trl_margins.trainers.folder import differences, last_whole_checkpoint
from trl_margins.trainers.loaded_optimizers import as_values
from trl_margins.trainers.named import trainer_class
from trl_margins.trainers.settings import of_every_rank, run_settings
from trl_margins.trainers.whole import is_whole


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # as torchrun's processes have it
def test_states_come_back_as_they_were(device, tmp_path):
    states = {
        "a": {
            "queue": torch.randn(3, dtype=torch.float64),
            "mean": 0.1,
            "none": None,
            "seen": [1, 2],
            "of": {"x": "y"},
        },
        "b": {"flags": torch.tensor([True, False]), "empty": torch.empty(0)},
        "c": {},
    }
    save_states(states, tmp_path / "s.safetensors")
    found = load_states(tmp_path / "s.safetensors", torch.device(device))
    assert found.keys() == states.keys()
    for term, state in states.items():
        assert found[term].keys() == state.keys()
        for name, value in state.items():
            same = torch.equal(found[term][name], value) if torch.is_tensor(value) else found[term][name] == value
            assert same, (term, name)


def test_a_state_that_no_file_can_hold(tmp_path):
    with pytest.raises(TypeError, match="state 'rng' of term 'mine' is a Random"):
        save_states({"mine": {"rng": random.Random(0)}}, tmp_path / "s.safetensors")


def test_only_whole_checkpoints_are_taken(tmp_path, caplog):
    assert last_whole_checkpoint(tmp_path) is None
    wholes = {step: f'{{"global_step": {step}}}' for step in (2, 10)}
    for step, text in {**wholes, 12: '{"epoch": 1.', 13: "{}", 14: None, 15: "[]", 16: wholes[10]}.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-14 is incomplete" in caplog.text
    assert not is_whole(tmp_path / "checkpoint-12")


def remembers(row):
    tables = {"weight": WEIGHTS, "margin": MARGINS}
    terms = [table[name] for kind, table in tables.items() for name in names_of(getattr(row, kind))]
    return any(term.state_dict is not Term.state_dict for term in terms)


def build(method, base, folder, tokenizer, out, ref_model=None, objective=None, **options):
    model = load(folder)
    made = {"ref_model": ref_model, "objective": objective}
    given = {name: value for name, value in made.items() if value is not None}
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0 if options.get("disable_dropout", True) else 0.3
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    return trainer_class(method, base)(
        model,
        args=config_class(method, base)(**quiet(output_dir=str(out), **settings | options)),
        train_dataset=preference_rows(12, seed=5),
        eval_dataset=preference_rows(4, seed=6),
        processing_class=tokenizer,
        **given,
    )


# baselines whose terms have no state resume as TRL does
RESUMED = [*OWN_METHODS, *(id for id, row in METHODS.items() if id not in OWN_METHODS and remembers(row))]
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
RUNS = [
    *((method, base, {}) for method, base in METHODS_AND_BASES if method in RESUMED),
    *((method, "dpo", {"reward": "log-ratio"}) for method in ("gamma-po", "amapo", "geometric-anchor")),
    *(pytest.param(method, bases_of(method)[0], ACCUMULATED, marks=pytest.mark.rehearsal) for method in RESUMED),
    ("geometric-anchor", "cpo", {"anchor_direction": "momentum"}),
    ("gamma-po", "cpo", {"eval_strategy": "steps", "eval_steps": 1}),  # which must not be in the queue
    ("amapo", "cpo", {"disable_dropout": False}),
    ("geometric-anchor", "cpo", {"disable_dropout": False}),  # whose looks draw too
    ("gradient-norm", "dpo", {"disable_dropout": False}),
    ("simpo-sam", "cpo", {"disable_dropout": False, **ACCUMULATED}),
]


@pytest.mark.parametrize(("method", "base", "options"), RUNS)
def test_half_and_half_is_a_whole(method, base, options, tiny_model, tokenizer, tmp_path):
    """Six shuffled steps, and the same stopped after the fourth: the same weights, bit for bit."""
    options = {"num_train_epochs": 1, "seed": 3, **options}
    whole = build(method, base, tiny_model, tokenizer, tmp_path, **options)
    whole.train()
    for file in (tmp_path / "checkpoint-6").iterdir():  # as if it had been killed before
        file.unlink()
    resumed = build(method, base, tiny_model, tokenizer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    first = next(log for log in resumed.state.log_history if "loss" in log and log["step"] == 5)
    assert first["loss"] == next(log for log in whole.state.log_history if log["step"] == 5)["loss"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    ours = {file.name for file in (tmp_path / "checkpoint-4").iterdir()} & {"margin_terms.safetensors"}
    assert bool(ours) == bool(whole._term_states())


def test_a_checkpoint_that_is_cut_off_is_refused(tiny_model, tokenizer, tmp_path):
    trainer = build("amapo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=4)
    trainer.train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint-4 is not a complete checkpoint.*checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_one_that_is_written_again_is_not_whole_meanwhile(tiny_model, tokenizer, tmp_path):
    """What says that a checkpoint is complete goes first, and comes back last."""
    trainer, folder = build("amapo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2), tmp_path / "checkpoint-2"
    trainer.train()
    assert is_whole(folder)

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer._save_optimizer_and_scheduler = fails
    with pytest.raises(OSError, match="No space left"):
        trainer._save_checkpoint(trainer.model, trial=None)
    assert not is_whole(folder)


STOPPING = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_steps": 2}
STOPPING |= {"metric_for_best_model": "eval_loss", "greater_is_better": False, "learning_rate": 0.0, "max_steps": 12}


class Patient(EarlyStoppingCallback):
    """Of a user's own."""


OF_CALLBACKS = {"one": [EarlyStoppingCallback], "two": [EarlyStoppingCallback] * 2, "of one's own": [Patient]}
OF_CALLBACKS["of both kinds"] = [EarlyStoppingCallback, Patient]


@pytest.mark.parametrize("callbacks", rest_rehearsed(OF_CALLBACKS, 1))
def test_an_early_stop_comes_where_it_would_have_come(callbacks, tiny_model, tokenizer, tmp_path, caplog):
    """A resumed run counts on; one that has stopped is complete, until it is to be more patient."""

    def stopping(tiny_model, tokenizer, folder, patience: int = 2) -> Any:
        """A run that gets no better: rate 0."""
        trainer = build("gappo", "cpo", tiny_model, tokenizer, folder, **STOPPING)
        *others, last = OF_CALLBACKS[callbacks]
        for each in others:
            trainer.add_callback(each(early_stopping_patience=9))
        trainer.add_callback(last(early_stopping_patience=patience))
        return trainer

    stopping(tiny_model, tokenizer, tmp_path).train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = stopping(tiny_model, tokenizer, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    again = stopping(tiny_model, tokenizer, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, again.is_complete) == (6, True)
    assert (
        "early stopping ended it after 6 of 12 steps. A larger early_stopping_patience goes on with it" in caplog.text
    )
    patient = stopping(tiny_model, tokenizer, tmp_path, patience=4)
    patient.train(resume_from_checkpoint=True)
    assert patient.state.global_step == 10
    patient.args.overwrite_output_dir = True
    patient.train()  # a new run, which counts from the beginning
    assert patient.state.global_step == 10


class Decays(LambdaLR):
    """A schedule that turns the weight decay."""

    def __init__(self, made: Any, factor: Any) -> None:
        self.first = made.param_groups[0]["weight_decay"]
        super().__init__(made, factor)

    def step(self, *args: Any) -> None:
        super().step(*args)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.first + 0.01 * self.last_epoch


def constant(step: int) -> float:
    return 1.0


SCHEDULES = {
    "one cycle": lambda made: OneCycleLR(made, max_lr=0.1, total_steps=6),
    "cycles": lambda made: CyclicLR(made, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "one cycle, then a constant": lambda made: SequentialLR(
        made, [OneCycleLR(made, max_lr=0.1, total_steps=9), LambdaLR(made, constant)], milestones=[8]
    ),
    "weight decay": lambda made: Decays(made, constant),
}


@pytest.mark.parametrize("schedule", rest_rehearsed(SCHEDULES, 2))
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_a_schedule_that_turns_more_than_the_rate(optimizer, schedule, tiny_model, tokenizer, tmp_path, caplog):
    """It is at another value where a run is resumed; another first value is still refused."""
    options = {"momentum": 0.9} if optimizer is SGD else {}

    def run(weight_decay: float = 0.0) -> Any:
        model = load(tiny_model)
        rate = torch.tensor(0.01) if schedule == "weight decay" else 0.01
        made = optimizer(model.parameters(), lr=rate, weight_decay=weight_decay, **options)
        args = config_class("gappo", "cpo")(
            **quiet(output_dir=str(tmp_path), max_steps=6, save_strategy="steps", save_steps=2)
        )
        given = {"train_dataset": preference_rows(12, seed=5), "processing_class": tokenizer}
        return trainer_class("gappo", "cpo")(model, args, optimizers=(made, SCHEDULES[schedule](made)), **given)

    whole = run()
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = run()
    caplog.clear()
    resumed.train(resume_from_checkpoint=True)
    assert "with other settings" not in caplog.text
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"other settings: weight_decay 0.0 → 0.5\. Resume"):
        run(weight_decay=0.5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


class Counts(TrainerCallback, ExportableState):
    """Stops at its number of steps, counted by itself."""

    def __init__(self, most: int = 1) -> None:
        self.most, self.seen = most, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seen += 1
        control.should_training_stop |= self.seen >= self.most

    def state(self) -> dict[str, Any]:
        return {"args": {"most": self.most}, "attributes": {"seen": self.seen}}


@pytest.mark.parametrize("restores", [False, True])
def test_two_callbacks_of_one_class_count_on(restores, tiny_model, tokenizer, tmp_path):
    def run(most: int) -> Any:
        settings = {"max_steps": 8, "restore_callback_states_from_checkpoint": restores}
        trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, num_train_epochs=2, **settings)
        for each in (Counts(most), Counts(20)):
            trainer.add_callback(each)
        trainer.train(resume_from_checkpoint=True if (tmp_path / "checkpoint-2").exists() else None)
        return trainer

    run(5)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert run(5).state.global_step == 5


@pytest.mark.parametrize("kept", [torch.ones(2), {1: 2}, {"a": [{2: 3}]}])
def test_a_callbacks_state_that_no_checkpoint_gives_back(kept, tiny_model, tokenizer, tmp_path, caplog):
    class Keeps(Counts):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"kept": kept}}

    trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2)
    trainer.add_callback(Keeps(9))
    if isinstance(kept, torch.Tensor):
        with pytest.raises(TypeError, match=r"the state of the callback Keeps cannot be saved .*: a checkpoint holds"):
            trainer.train()
    else:
        trainer.train()
        assert "the state of the callback Keeps has keys that come back from a checkpoint as text" in caplog.text


OWN = {
    "nesterov False → True": [
        lambda p: SGD(p, 1e-3, momentum=0.9),
        lambda p: SGD(p, 1e-3, momentum=0.9, nesterov=True),
    ],
    "amsgrad False → True": [lambda p: AdamW(p, 1e-3), lambda p: AdamW(p, 1e-3, amsgrad=True)],
}


@pytest.mark.parametrize("said", OWN)
def test_an_option_of_ones_own_optimizer_that_is_another(said, tiny_model, tokenizer, tmp_path):
    def run(make: Any) -> Any:
        trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3)
        trainer.optimizer = make(trainer.model.parameters())
        return trainer

    first, other = OWN[said]
    run(first).train()
    with pytest.raises(ValueError, match=f"checkpoint-2 is of a run with other settings: {said}. Resume with its"):
        run(other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run(first).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_rate_in_a_tensor_is_the_number_that_it_was():
    assert as_values({"lr": torch.tensor(0.01), "betas": [0.9, 0.99]}) == {"lr": 0.01, "betas": (0.9, 0.99)}


def halves(step: int) -> float:
    return 0.5


def later(step: int) -> float:
    return 1.0 if step < 7 else 0.5


def then(made: Any, function: Any = constant, milestone: int = 4) -> Any:
    return SequentialLR(made, [ConstantLR(made, 0.5), MultiplicativeLR(made, function)], [milestone])


class Clips(SGD):
    def __init__(self, parameters: Any, rate: float, clip: float = 1.0) -> None:
        self.clip = clip
        super().__init__(parameters, rate, momentum=0.9)


CYCLES = partial(CyclicLR, base_lr=0.01, max_lr=0.1, cycle_momentum=False)
PLATEAUS = partial(ReduceLROnPlateau, mode="max")

# made as at first and otherwise, and what is said
SCHEDULED: dict[str, tuple[Any, Any]] = {
    "schedule's part 2's function 1 1, 1, 1.* → 0.5, 0.5, 0.5": (then, partial(then, function=halves)),
    "schedule's part 2's function 1 1, 1, 1, 1, 1, 1 .* → 1, 1, 1, 1, 0.5, 0.5": (then, partial(then, function=later)),
    r"schedule's milestones \[4\] → \[3\]": (then, partial(then, milestone=3)),
    r"schedule's max_lr \[0.1\] → \[0.2\]": (
        partial(CYCLES, max_lr=0.1),
        partial(CYCLES, max_lr=0.2),
    ),
    "schedule's total_size 6.* → 4": (
        partial(CYCLES, step_size_up=3),
        partial(CYCLES, step_size_up=2),
    ),
    r"schedule's min_lr \[0\] → \[0.001\]": (PLATEAUS, partial(PLATEAUS, min_lr=0.001)),
}


@pytest.mark.parametrize("said", rest_rehearsed(SCHEDULED, 3))
def test_a_schedule_of_ones_own_that_is_another(said, tiny_model, tokenizer, tmp_path):
    """Where no state has what differs, and where a loaded state would hide it."""

    def run(make: Any, clip: float = 1.0) -> Any:
        trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3, eval_strategy="epoch")
        trainer.optimizer = Clips(trainer.model.parameters(), 1e-2, clip)
        trainer.lr_scheduler = make(trainer.optimizer)
        return trainer

    first, other = SCHEDULED[said]
    trainer = run(first)
    trainer.train()
    trainer.train(resume_from_checkpoint=True)  # nothing is another there, though it has gone on
    at = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=f"checkpoint-2 is of a run with other settings: the {said}"):
        run(other).train(resume_from_checkpoint=at)
    with pytest.raises(ValueError, match=r"other settings: the optimizer's clip 1.0 → 2.0\. "):
        run(first, clip=2.0).train(resume_from_checkpoint=at)
    run(first).train(resume_from_checkpoint=at)


class Level(Enum):
    LOW = "low"
    HIGH = "high"


@dataclass
class Fixed:
    power: float


class Counting:
    """Which training changes."""

    def __init__(self, calls: int) -> None:
        self.calls = calls


def layer(value: float) -> Any:
    made = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(made.weight, value)
    return made


class Focus(Term):
    name = "focus"

    def __init__(self, power: Any) -> None:
        self.power = power

    def __call__(self, view: PairView) -> Tensor:
        return torch.ones_like(view.reward_gap)


# an argument of a term, and another
ARGUMENTS: dict[str, Any] = {
    "NumPy's float": (lambda: np.float32(2), lambda: np.float32(3)),
    "NumPy's integer": (lambda: np.int64(2), lambda: np.int64(3)),
    "list of them": (lambda: [np.float32(2)], lambda: [np.float32(3)]),
    "decimal": (lambda: Decimal(2), lambda: Decimal(3)),
    "fraction": (lambda: Fraction(1, 2), lambda: Fraction(1, 3)),
    "complex": (lambda: 2 + 0j, lambda: 3 + 0j),
    "bytes": (lambda: b"2", lambda: b"3"),
    "range": (lambda: range(2), lambda: range(3)),
    "duration": (lambda: timedelta(2), lambda: timedelta(3)),
    "queue": (lambda: deque([2.0]), lambda: deque([3.0])),
    "UUID": (lambda: UUID(int=2), lambda: UUID(int=3)),
    "type of numbers": (lambda: torch.float32, lambda: torch.bfloat16),
    "device": (lambda: torch.device("cpu"), lambda: torch.device("meta")),
    "bytearray": (lambda: bytearray(b"2"), lambda: bytearray(b"3")),
    "slice": (lambda: slice(2), lambda: slice(3)),
    "array of the library": (lambda: array("d", [2.0]), lambda: array("d", [3.0])),
    "view of memory": (lambda: memoryview(b"2"), lambda: memoryview(b"3")),
    "list of ones own": (lambda: UserList([2.0]), lambda: UserList([3.0])),
    "text of ones own": (lambda: UserString("a"), lambda: UserString("b")),
    "pattern": (lambda: re.compile("a"), lambda: re.compile("a", re.IGNORECASE)),
    "pattern of bytes": (lambda: re.compile(b"a"), lambda: re.compile(b"b")),
    "distributions": (
        lambda: torch.distributions.Normal(torch.zeros(3), 1.0),
        lambda: torch.distributions.Normal(torch.ones(3), 1.0),
    ),
    "library": (lambda: math, lambda: json),
    "generator": (lambda: torch.Generator().manual_seed(2), lambda: torch.Generator().manual_seed(3)),
    "distribution": (lambda: torch.distributions.Normal(0.0, 2.0), lambda: torch.distributions.Normal(0.0, 3.0)),
    "sparse tensor": (lambda: torch.eye(2).to_sparse(), lambda: (2 * torch.eye(2)).to_sparse()),
    "series": (lambda: pd.Series([2.0]), lambda: pd.Series([3.0])),
    "path": (lambda: Path("a"), lambda: Path("b")),
    "enum": (lambda: Level.LOW, lambda: Level.HIGH),
    "set": (lambda: {"a", "b", "c"}, lambda: {"a", "b"}),
    "dict of tensors": (lambda: {"a": torch.tensor(2.0)}, lambda: {"a": torch.tensor(3.0)}),
    "keys that are numbers": (lambda: {(1, 2): 0}, lambda: {(1, 3): 0}),
    "partial": (lambda: partial(float, 2), lambda: partial(float, 3)),
    "namespace": (lambda: SimpleNamespace(power=2.0), lambda: SimpleNamespace(power=3.0)),
    "list of many": (lambda: [1.0] * 20_000, lambda: [2.0] * 20_000),
    "dataclass": (lambda: Fixed(2.0), lambda: Fixed(3.0)),
    "array of many": (lambda: np.zeros(20_000), lambda: np.ones(20_000)),
    "module": (lambda: layer(2.0), lambda: layer(3.0)),
    "module without weights": (lambda: torch.nn.Softplus(2), lambda: torch.nn.Softplus(3)),
    "queue that is full": (lambda: deque([1], 2), lambda: deque([1], 3)),
    "function": (lambda: halves, lambda: later),
    "NaN": (lambda: math.nan, lambda: 0.0),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_an_argument_of_ones_own_term_that_is_another(kind):
    """What was saved as JSON equals what is made again, and not what is made otherwise."""
    first, other = ARGUMENTS[kind]
    saved = json.loads(json.dumps(of_arguments(Focus(first()))))
    assert of_arguments(Focus(first())) == saved
    assert of_arguments(Focus(other())) != saved


class Odd(torch.nn.Module):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None: ...


class Learned(Focus):
    def state_dict(self) -> dict[str, Any]:
        return self.power.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.power.load_state_dict(state)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (Focus(Counting(1)), Focus(Counting(2))),
        (Focus([torch.nn.Parameter(torch.zeros(1))]), Focus([torch.nn.Parameter(torch.ones(1))])),
        (Learned(layer(1.0)), Learned(layer(2.0))),
        (Focus(Odd()), Focus(Odd())),
        (Focus([torch.zeros(2, device="meta")]), Focus([torch.zeros(2, device="meta")])),
        (Focus([{"a": object()}] * 20_000), Focus([{"a": object()}] * 20_000)),
        (Focus({halves: 1}), Focus({halves: 1})),
    ],
)
def test_what_training_changes_is_no_other_argument(first, other):
    """Nor what cannot be looked at."""
    assert of_arguments(first) == of_arguments(other)
    json.dumps(of_arguments(first))


# an argument of which `of_arguments` shows the class alone, and another
OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "of ones own class": (lambda: Counting(1), lambda: Counting(2)),
    "of one within another": (lambda: Counting([Counting(1)]), lambda: Counting([Counting(2)])),
    "parameter": (lambda: torch.nn.Parameter(torch.zeros(1)), lambda: torch.nn.Parameter(torch.ones(1))),
    "NumPy's generator": (lambda: np.random.default_rng(2), lambda: np.random.default_rng(3)),
    "number of C": (lambda: ctypes.c_double(2), lambda: ctypes.c_double(3)),
    "bytes in memory": (lambda: io.BytesIO(b"2"), lambda: io.BytesIO(b"3")),
    "getter": (lambda: itemgetter(2), lambda: itemgetter(3)),
    "address": (lambda: ip_address("10.0.0.2"), lambda: ip_address("10.0.0.3")),
    "Arrow's table": (lambda: pa.table({"a": [2]}), lambda: pa.table({"a": [3]})),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_that_is_another_is_only_named(kind, tmp_path):
    """A run that goes on in the same session has in it what training changed."""
    first, other = OBJECTS[kind]
    saved = json.loads(json.dumps(of_objects(Focus(first()))))
    assert of_objects(Focus(first())) == saved != of_objects(Focus(other()))
    assert of_arguments(Focus(first())) == of_arguments(Focus(other()))
    made = {"term_options": [], "reward_options": [], "config": {}, "adapter": None}
    digests = [of_objects(Focus(each()))["power"] for each in (first, other)]
    before, now = ({**made, "objects": {"focus.power": digest}} for digest in digests)
    config = SimpleNamespace(ignore_data_skip=False, auto_find_batch_size=False)
    assert differences(before, now, config) == ([], [f"what is in focus.power {digests[0]} → {digests[1]}"])


class Restoring(Focus):
    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.power.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.power.calls = state["calls"]


def test_objects_are_only_looked_at():
    """Not those that a term restores; an array of objects is its values."""
    assert of_objects(Restoring(Counting(1))) == {}
    assert of_objects(Focus(random.Random(1))) != of_objects(Focus(random.Random(2)))
    first, again = (Focus(np.array([Counting(1), "a"], dtype=object)) for _ in range(2))
    assert of_arguments(first) == of_arguments(again)
    assert of_objects(first) == of_objects(again) != {}


def test_settings_that_say_the_same_otherwise():
    made = {"term_options": [], "reward_options": [], "adapter": None, "config": {}}
    config = SimpleNamespace(ignore_data_skip=False, auto_find_batch_size=False)

    def wrong(before: Any, now: Any) -> Any:
        return differences({**made, **before}, {**made, **now}, config)[0]

    nothing: list[Any] = [None, "", {}, []]
    for before, now in product(nothing, nothing):
        assert not wrong({"lr_scheduler_kwargs": before}, {"lr_scheduler_kwargs": now})
    assert wrong({"lr_scheduler_kwargs": None}, {"lr_scheduler_kwargs": {"a": 1}})
    assert wrong({"seed": None}, {"seed": 0})
    assert not wrong({"train_only": ["a", "b", "a"]}, {"train_only": ["b", "a"]})
    assert wrong({"train_only": ["a", "b"]}, {"train_only": ["a"]})
    assert not wrong({"optim_args": "a=0.90,b=x"}, {"optim_args": "b=x, a=9e-1"})
    assert wrong({"optim_args": "a=0.9"}, {"optim_args": "a=0.9,b=1"})
    assert wrong({"optim_args": "a=0.9"}, {"optim_args": "a=0.8"})
    assert not wrong({"adapter": {"r": 8, "modules_to_save": ["a", "b"], "bias": []}},
                     {"adapter": {"r": 8, "modules_to_save": ["b", "a"]}})  # fmt: skip
    assert wrong({"adapter": {"r": 8}}, {"adapter": {"r": 8, "modules_to_save": ["a"]}})
    assert wrong(
        {"adapter": {"layer_replication": [[0, 2], [1, 2]]}}, {"adapter": {"layer_replication": [[1, 2], [0, 2]]}}
    )
    assert not wrong({"loss_type": "sigmoid", "discopop_tau": 0.1}, {"loss_type": "sigmoid", "discopop_tau": 0.05})
    assert wrong({"loss_type": "discopop", "discopop_tau": 0.1}, {"loss_type": "discopop", "discopop_tau": 0.05})


def test_an_object_with_too_much_in_it_is_not_looked_at():
    around = Counting([Counting(i) for i in range(500)])
    assert of_objects(Focus(around)) == {}


def test_an_argument_that_holds_itself():
    endless: list[Any] = []
    endless.append(endless)
    assert "list" in json.dumps(of_arguments(Focus(endless)))


QUADRATIC = Link("quadratic", lambda x: (x.options["pull"] * x.reward_gap - 1) ** 2, options=(("pull", 1.0),))

# an objective of one's own, and what is said of another
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "label_smoothing 0.1 → 0.0": ({"label_smoothing": 0.1}, {}),
    "length-normalized.alpha 0.5 → 0.25": (
        {"reward": LengthNormalizedReward(alpha=0.5)},
        {"reward": LengthNormalizedReward(alpha=0.25)},
    ),
    "quadratic.pull 1.0 → 2.0": ({"link": QUADRATIC}, {"link": QUADRATIC, "link_options": {"pull": 2.0}}),
}


@pytest.mark.parametrize("said", OBJECTIVES)
def test_an_objective_of_ones_own_that_is_another(said, tiny_model, tokenizer, tmp_path):
    def run(options: dict[str, Any]) -> Any:
        whole = {"reward": LengthNormalizedReward(), "link": CPO_LINKS["sigmoid"], "beta": 1.0, **options}
        return build(None, "cpo", tiny_model, tokenizer, tmp_path, max_steps=3, objective=Objective(**whole))

    first, other = OBJECTIVES[said]
    run(first).train()
    at = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=f"checkpoint-2 is of a run with other settings: {re.escape(said)}. Resume"):
        run(other).train(resume_from_checkpoint=at)
    run(first).train(resume_from_checkpoint=at)


def test_an_optimizer_of_another_class_from_a_trainer_of_ones_own(tiny_model, tokenizer, tmp_path):
    build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3).train()
    trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3)

    def create_optimizer(*_: Any) -> Any:
        decayed = {*trainer.get_decay_parameter_names(trainer.model)}
        named = [*trainer.model.named_parameters()]
        groups = [{"params": [each for name, each in named if (name in decayed) is of]} for of in (True, False)]
        trainer.optimizer = SGD(groups, 1e-3, momentum=0.9)
        return trainer.optimizer

    trainer.create_optimizer = create_optimizer
    with pytest.raises(ValueError, match=r"\(it is of another class of optimizer, which has no momentum\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_rate_of_an_optimizer_of_ones_own_that_is_another(tiny_model, tokenizer, tmp_path):
    """The checkpoint's would take its place."""

    def run(rate: float) -> Any:
        trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3)

        def create_optimizer(*_: Any) -> Any:
            trainer.optimizer = SGD(trainer.model.parameters(), rate)
            return trainer.optimizer

        trainer.create_optimizer = create_optimizer
        return trainer

    run(0.1).train()
    at = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"other settings: learning_rate 0.1 → 0.2\. Resume"):
        run(0.2).train(resume_from_checkpoint=at)
    run(0.1).train(resume_from_checkpoint=at)


@pytest.mark.parametrize("name", ["use_seedable_sampler", "even_batches"])
def test_rows_in_another_order(name, tiny_model, tokenizer, tmp_path):
    build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2).train()
    other = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3, accelerator_config={name: False})
    with pytest.raises(ValueError, match=f"other settings: {name} True → False. Resume"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_a_term_that_cannot_take_back_its_state(method):
    half = type("Half", (Focus,), {method: lambda self, *state: {}})(2)
    other = {"state_dict": "load_state_dict"}.get(method, "state_dict")
    with pytest.raises(TypeError, match=f"the weight 'focus' has {method} and no {other}: a resumed run would begin"):
        Objective(LengthNormalizedReward(), CPO_LINKS["sigmoid"], 1.0, weight=half)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: setattr(model.config, "rms_norm_eps", 0.1), "the model's rms_norm_eps .* → 0.1"),
        (lambda model: setattr(model.config, "hidden_act", "relu"), "the model's hidden_act silu → relu"),
        (lambda model: setattr(model.config, "use_cache", False), None),
    ],
)
def test_a_model_that_computes_otherwise(change, said, tiny_model, tokenizer, tmp_path):
    """Its weights are the checkpoint's; what they are in, and what is done with them, is not."""
    build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2).train()
    trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3)
    change(trainer.model)
    if said is None:
        assert trainer.train(resume_from_checkpoint=True).global_step == 3
        return
    with pytest.raises(ValueError, match=f"other settings: {said}"):
        trainer.train(resume_from_checkpoint=True)


def test_weights_of_another_type_are_said(tiny_model, tokenizer, tmp_path, caplog):
    """As any other precision."""
    build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2).train()
    trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3)
    trainer.model.bfloat16()
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
    assert re.search("checkpoint-2 with other settings: .*weight_types float32 → bfloat16", caplog.text)


def test_an_optimizer_that_the_trainer_made_before_is_its_own(tiny_model, tokenizer, tmp_path):
    first = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=4)
    first.train()
    again = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=4)
    again.create_optimizer_and_scheduler(4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_another_way_to_attend_is_said(tiny_model, tokenizer, tmp_path, caplog):
    build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2).train()
    trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3)
    trainer.model.set_attn_implementation("eager")
    trainer.train(resume_from_checkpoint=True)
    assert re.search("checkpoint-2 with other settings: .*attention sdpa → eager", caplog.text)


def test_a_reference_model_that_computes_otherwise(tiny_model, tokenizer, tmp_path, caplog):
    def run(change: Any = lambda _: None, **options: Any) -> Any:
        reference = load(tiny_model, noise=0.01)
        change(reference)
        options = {"reward": "log-ratio", "max_steps": 3, **options}
        return build("gappo", "dpo", tiny_model, tokenizer, tmp_path, ref_model=reference, **options)

    run(max_steps=2).train()
    with pytest.raises(ValueError, match="other settings: the reference model's hidden_act silu → relu"):
        run(lambda model: setattr(model.config, "hidden_act", "relu")).train(resume_from_checkpoint=True)
    run(lambda model: model.bfloat16()).train(resume_from_checkpoint=True)
    assert re.search("with other settings: .*reference_types float32 → bfloat16", caplog.text)


@pytest.mark.parametrize("precomputes", [False, True])
def test_a_reference_model_has_no_dropout(precomputes, tiny_model, tokenizer, tmp_path):
    """Whether it is given in training or not."""
    losses = []
    for training in (False, True):
        reference = load(tiny_model, noise=0.01)
        reference.config.attention_dropout = 0.5
        for layer in reference.model.layers:
            layer.self_attn.attention_dropout = 0.5
        reference.train(training)
        options = {"reward": "log-ratio", "max_steps": 1, "precompute_ref_log_probs": precomputes}
        trainer = build("gappo", "dpo", tiny_model, tokenizer, tmp_path, ref_model=reference, **options)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


def test_a_schedule_that_ends_too_early(tiny_model, tokenizer, tmp_path):
    """PyTorch fails at its last step, after hours."""
    trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3)
    trainer.optimizer = AdamW(trainer.model.parameters(), 1e-3)
    trainer.lr_scheduler = OneCycleLR(trainer.optimizer, 1e-3, total_steps=2)
    with pytest.raises(ValueError, match="OneCycleLR ends after 2 steps, and the run has 3: make it with as many"):
        trainer.train()
    trainer.lr_scheduler = OneCycleLR(trainer.optimizer, 1e-3, total_steps=3)
    assert trainer.train().global_step == 3


def test_adafactors_own_schedule_goes_on(tiny_model, tokenizer, tmp_path):
    """Whose rate is that of the optimizer's last step."""

    def run() -> Any:
        trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3)
        trainer.optimizer = Adafactor(trainer.model.parameters(), relative_step=True, warmup_init=True)
        trainer.lr_scheduler = AdafactorSchedule(trainer.optimizer)
        return trainer

    first = run()
    first.train()
    again = run()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_averages_that_begin_again_are_said(tiny_model, tokenizer, tmp_path, caplog):
    """Those of BEMA, which no checkpoint has."""

    def run(resume: bool) -> None:
        trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=4 if resume else 2)
        trainer.add_callback(BEMACallback(update_after=0))
        trainer.train(resume_from_checkpoint=resume)

    run(resume=False)
    assert "BEMACallback" not in caplog.text
    run(resume=True)
    assert "checkpoint-2 does not have the averages of BEMACallback, which begins again" in caplog.text


def test_another_evaluation_set_is_said(tiny_model, tokenizer, tmp_path, caplog):
    """By which the best checkpoint may have been chosen."""
    build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2).train()
    trainer = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=3)
    trainer.eval_dataset = trainer.eval_dataset.select([0])
    trainer.train(resume_from_checkpoint=True)
    assert "evaluation_sets {'': '4 rows (" in caplog.text


def test_a_stream_that_had_begun_again_is_not_resumed(tiny_model, tokenizer, tmp_path):
    def run(checkpoint: int | None = None, **options: Any) -> Any:
        """Six batches are a pass."""
        trainer = trainer_class("gappo", "cpo")(
            load(tiny_model),
            args=config_class("gappo")(
                **quiet(output_dir=str(tmp_path), max_steps=10, save_strategy="steps", save_steps=2)
                | {"per_device_train_batch_size": 2, **options}
            ),
            train_dataset=preference_rows(12).to_iterable_dataset(),
            processing_class=tokenizer,
        )
        resumed = checkpoint and str(tmp_path / f"checkpoint-{checkpoint}")
        return trainer.train(resume_from_checkpoint=resumed).global_step

    run()
    with pytest.raises(ValueError, match="checkpoint-8 cannot be resumed where it was: the stream had begun again"):
        run(8)
    assert run(8, ignore_data_skip=True) == 10
    assert run(6) == 10


@pytest.mark.rehearsal
def test_what_all_processes_share(tiny_model, tokenizer, tmp_path, monkeypatch):
    """The settings of a process that a script made otherwise: each is named."""

    def settings(change: Any = None, base: str = "cpo", **options: Any) -> dict[str, Any]:
        trainer = build("amapo", base, tiny_model, tokenizer, tmp_path, **options)
        trainer.optimizer = AdamW(trainer.model.parameters(), 1e-3)
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: 1.0)
        trainer.add_callback(EarlyStoppingCallback(2))
        if change:
            change(trainer)
        return of_every_rank(trainer, run_settings(trainer))

    def scaled(trainer: Any) -> None:
        trainer.ref_model.lm_head.weight.data *= 1.5

    def faster(trainer: Any) -> None:
        trainer.optimizer.param_groups[0]["lr"] = 0.5

    def turned(trainer: Any) -> None:
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: 0.5)

    def steeper(trainer: Any) -> None:
        trainer.lr_scheduler = StepLR(trainer.optimizer, 1, 0.5)

    def patient(trainer: Any) -> None:
        trainer.pop_callback(EarlyStoppingCallback)
        trainer.add_callback(EarlyStoppingCallback(3))

    def plain(trainer: Any) -> None:
        trainer.optimizer = SGD(trainer.model.parameters(), 1e-3)

    changes = {
        lambda trainer: setattr(trainer, "eval_dataset", trainer.eval_dataset.select([0])): "evaluation_sets",
        lambda trainer: setattr(trainer, "eval_dataset", trainer.eval_dataset.select([1, 0, 2, 3])): "evaluation_sets",
        lambda trainer: setattr(trainer, "eval_dataset", {"a": trainer.eval_dataset}): "evaluation_sets",
        lambda trainer: setattr(trainer, "compute_metrics", print): "compute_metrics",
        lambda trainer: trainer.model.bfloat16(): "weight_types",
        lambda trainer: trainer.model.lm_head.requires_grad_(False): "trained_parameters",
        faster: "optimizer's lr",
        turned: "schedule_arguments",
        steeper: "schedule_arguments",
        patient: "callbacks",
        plain: "optimizer",
    }
    same = settings()
    assert settings() == same
    for change, name in changes.items():
        other = settings(change)
        assert name in {each for each in same if same[each] != other.get(each)}
    of_dpo = {"base": "dpo", "reward": "log-ratio"}
    assert settings(scaled, **of_dpo)["fixed_weights"] != settings(**of_dpo)["fixed_weights"]
    several = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("trl_margins.distributed.gather_object", lambda mine: [*mine, {**same, "optimizer's lr": [1]}])
    with pytest.raises(
        ValueError, match=r"process 0 and process 1 .* other settings: optimizer's lr \[.*\] and \[1\]\. "
    ):
        check_alike(several, same)
    check_alike(SimpleNamespace(num_processes=1), same)


def test_another_runs_checkpoint(tiny_model, tokenizer, tmp_path):
    build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=2).train()
    other = build("gappo", "cpo", tiny_model, tokenizer, tmp_path, max_steps=4, train_only=["mlp"])
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is of a run with other settings: .*train_only None → \['mlp'\]"
    ):
        other.train(resume_from_checkpoint=True)


# Faults at any operation on a run's files

FAULTS = int(os.environ.get("FUZZ", "6"))


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory):
    """What a run leaves, and the number of its operations on files."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    operations = killed.train(tiny_model, out)
    assert operations > 40
    return left_by(out), operations


def left_by(out: Path) -> tuple[Any, ...]:
    """Weights, optimizer, pairs and logs."""
    (checkpoint,) = out.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = {key: {name: value.tolist() for name, value in of.items()} for key, of in moments.items()}
    return (out / "model.safetensors").read_bytes(), moments, (out / "pair_log.csv").read_text(), state


def numbers(operations: int, seed: int, n: int) -> list[int]:
    """One in each n-th part of the operations."""
    rng = random.Random(seed)
    return [1 + int((i + rng.random()) / n * operations) for i in range(n)]


def test_a_kill_at_any_operation_changes_nothing(tiny_model, undisturbed, tmp_path):
    """And a second one in the run that goes on."""
    whole, operations = undisturbed
    rng = random.Random(2)
    for number in numbers(operations, 1, FAULTS // 2):
        out = tmp_path / str(number)
        for at in (number, rng.randint(1, operations)):
            process = processes.start(killed.train, tiny_model, out, at, signal.SIGKILL)
            process.join()
            assert process.exitcode in (-signal.SIGKILL, 0), (number, at)  # the second may come after the end
        killed.train(tiny_model, out)
        assert left_by(out) == whole, (number, at)
        shutil.rmtree(out)


def test_a_full_disk_at_any_operation(tiny_model, undisturbed, tmp_path):
    """A warning, or an error that names a file of the run; and the run goes on where there is room again."""
    whole, operations = undisturbed
    for number in numbers(operations, 3, FAULTS):
        out = tmp_path / str(number)
        how = random.Random(number).choice([errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
        said = ""
        try:
            killed.train(tiny_model, out, number, how)
        except OSError as error:
            said = str(error)
        assert not said or (str(out) in said and os.strerror(how) in said), (number, said)
        killed.train(tiny_model, out)
        assert left_by(out)[:2] == whole[:2], number
        assert left_by(out)[3] == whole[3], number  # the pair log may lack what it could not write
        shutil.rmtree(out)
