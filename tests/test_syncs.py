"""How often a step waits for the device: once, for whether all of it is finite."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import trl.trainer.utils
from conftest import load, preference_rows, quiet
from syncs import Syncs
from transformers import TrainerCallback
from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_margins.forward import head
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

READS = {
    "float": lambda x: float(x[0]),
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "if any": lambda x: 1 if (x > 0).any() else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "boolean index": lambda x: x[x > 0],
    "boolean index, written": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "int": lambda x: int(x[0]),
    "index": lambda x: [0, 1, 2][x.long()[0]],
    "if": lambda x: 1 if x[0] else 0,
    "format": lambda x: f"{x[0]:.2f}",
    "math": lambda x: math.exp(x[0]),
    "cpu": lambda x: x.cpu(),
    "to NumPy": lambda x: np.asarray(x),
    "equal": lambda x: torch.equal(x, x + 0),
    "allclose": lambda x: torch.allclose(x, x),
    "unique": lambda x: torch.unique(x),
    "unique_consecutive": lambda x: torch.unique_consecutive(x),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor([1, 2, 1])),
    "bincount": lambda x: torch.bincount(x.long().abs()),
    "argwhere": lambda x: torch.argwhere(x > 0),
    "boolean index, of a row": lambda x: x[None][:, x > 0],
    "index_put": lambda x: x.clone().index_put_((x > 0,), torch.tensor(0.0)),
}
FREE = {
    "arithmetic": lambda x: (x * 2).sum(),
    "index": lambda x: x[torch.tensor([0, 1])],
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "size": lambda x: x.numel() + len(x),
    "repeat_interleave": lambda x: x.repeat_interleave(2),
    "index_select": lambda x: x.index_select(0, torch.tensor([0, 1])),
    "scatter": lambda x: torch.zeros(3).scatter(0, torch.tensor([0, 1]), x[:2]),
    "isfinite": lambda x: torch.where(x.isfinite().all(), x, 0.0),
    "topk": lambda x: x.topk(2).indices,
}


@pytest.mark.parametrize("name", READS)
def test_what_waits_is_counted(name: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0])
    with Syncs() as syncs:
        READS[name](x)
    assert len(syncs.found) == 1, syncs.found


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not(name: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0])
    with Syncs() as syncs:
        FREE[name](x)
    assert not syncs.found


def of_each_step(trainer: Any) -> list[list[str]]:
    """What a training's steps waited for, the first left out: there the ways are compared."""
    syncs, starts = Syncs(), []

    class Starts(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            starts.append(len(syncs.found))

    trainer.add_callback(Starts())
    with syncs:
        trainer.train()
    return [syncs.found[begin:end] for begin, end in pairwise(starts[1:])]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through TRL's head, which there looks for the labels that are not −100."""
    monkeypatch.setattr(head, "FEW_LOGITS", 0)
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)


@pytest.mark.parametrize("base", ["cpo", "dpo"])
@pytest.mark.parametrize("method", [None, "gappo", "gappo, normalised", "gap-aware", "gamma-po", "amapo"])
def test_a_step_reads_one_value(method, base, tiny_model, tokenizer, tmp_path, as_on_a_gpu):
    settings = quiet(output_dir=str(tmp_path), logging_steps=100, num_train_epochs=1)
    if method == "gappo, normalised":  # whose mean is over a window of mini-batches
        method = "gappo"
        settings |= {"score_gap_normalize": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_class(method, base)(
        load(tiny_model),
        args=config_class(method, base)(**settings),
        train_dataset=preference_rows(16),
        processing_class=tokenizer,
    )
    steps = of_each_step(trainer)
    assert len(steps) == 2
    for found in steps:
        assert len(found) == 1, found
        assert "finite.py" in found[0]


def test_trl_reads_fourteen(tiny_model, tokenizer, tmp_path):
    """The count counts: TRL's own trainer reads its metrics one by one."""
    config = CPOConfig(**quiet(output_dir=str(tmp_path), logging_steps=100, num_train_epochs=1), loss_type="simpo")
    trainer = CPOTrainer(load(tiny_model), args=config, train_dataset=preference_rows(16), processing_class=tokenizer)
    assert {len(found) for found in of_each_step(trainer)} == {14}


def test_a_filter_that_is_asked_for_stays(tmp_path):
    """Two of the reads are transformers' NaN filter, which `FiniteSteps` makes needless."""
    for base in ("cpo", "dpo"):
        config = config_class(None, base)
        assert config(**quiet(output_dir=str(tmp_path))).logging_nan_inf_filter is False
        assert config(**quiet(output_dir=str(tmp_path), logging_nan_inf_filter=True)).logging_nan_inf_filter is True
        assert config(**quiet(output_dir=str(tmp_path), nonfinite_steps="skip")).logging_nan_inf_filter is True
        explicit = quiet(output_dir=str(tmp_path), nonfinite_steps="skip", logging_nan_inf_filter=False)
        assert config(**explicit).logging_nan_inf_filter is False
