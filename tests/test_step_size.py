"""Pairs per optimizer step: said before the first step, and as many as the step takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import BASES, load, preference_rows, quiet

from trl_margins import GeometricAnchorPOConfig, GeometricAnchorPOTrainer
from trl_margins.trainers.step_size import factors_of, pairs_per_step

OF_A_METHOD = (GeometricAnchorPOTrainer, GeometricAnchorPOConfig)
SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
DEFAULTS = dict.fromkeys(SIZES)  # leaves out what `quiet` says


def said_by(made: tuple[Any, Any], rows: Any, tiny_model: str, tokenizer: Any, out: Path, **options: Any) -> Any:
    """The trainer of one step; and what it logged of its size."""
    options = {name: value for name, value in quiet(output_dir=str(out), **options).items() if value is not None}
    trainer_class, config_class = made
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("trl_margins.trainers.beginning")
    logger.addHandler(handler)
    try:
        trainer = trainer_class(
            load(tiny_model), args=config_class(**options), train_dataset=rows, processing_class=tokenizer
        )
        assert not records
        trainer.train()
    finally:
        logger.removeHandler(handler)
    lines = [(record.levelname, record.getMessage()) for record in records]
    return trainer, [(level, line.removeprefix("steps   ")) for level, line in lines if line.startswith("steps")]


@pytest.mark.parametrize(
    ("size", "accumulation", "processes", "groups", "gpus", "split", "pairs", "factors"),
    [
        (4, 2, 1, 1, 1, False, 8, "1 process"),
        (4, 2, 2, 2, 1, False, 16, "2 processes"),
        (4, 2, 4, 1, 1, False, 8, "1 group of processes"),  # tensor parallelism: all have the same pairs
        (4, 2, 4, 2, 1, False, 16, "2 groups of processes"),
        (4, 2, 2, 2, 1, True, 8, "1 batch split over 2 processes"),
        (4, 2, 1, 1, 1, True, 8, "1 process"),
        (4, 2, 1, 1, 3, False, 24, "1 process × 3 GPUs of nn.DataParallel"),
    ],
)
def test_the_factors_have_the_product(size, accumulation, processes, groups, gpus, split, pairs, factors):
    """transformers counts a whole batch for each process also where accelerate splits it."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(n_gpu=gpus if gpus > 1 else 0, gradient_accumulation_steps=accumulation),
        accelerator=SimpleNamespace(num_processes=processes, split_batches=split),
        _train_batch_size=size * gpus,
        get_total_train_batch_size=lambda config: size * gpus * accumulation * groups,
    )
    assert pairs_per_step(trainer) == pairs
    sizes = f"per_device_train_batch_size {size} × gradient_accumulation_steps {accumulation}"
    assert factors_of(trainer) == factors_of(trainer, origins=True) == f"{sizes} × {factors}"


@pytest.mark.rehearsal
def test_a_method_s_default_is_said(tiny_model, tokenizer, tmp_path, caplog):
    """128 pairs, which nobody asked for: a warning, which a script shows whose author has set up no logging."""
    rows = preference_rows(130)
    caplog.set_level(logging.WARNING, "trl_margins")  # as Python has it; the command line sets it to INFO
    _, said = said_by(OF_A_METHOD, rows, tiny_model, tokenizer, tmp_path, max_steps=1, max_length=64, **DEFAULTS)
    line = (
        "1, of 128 pairs each: per_device_train_batch_size 2 (GAPO's default) × "
        "gradient_accumulation_steps 64 (GAPO's default) × 1 process"
    )
    assert said == [("WARNING", line)]
    steps = [text.partition(",")[0] for text in (tmp_path / "pair_log.csv").read_text().splitlines()[1:]]
    assert steps == ["1"] * 128
    assert json.loads((tmp_path / "margin_run.json").read_text())["pairs_per_step"] == 128


def test_what_was_asked_for_is_said_once(tiny_model, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trl_margins"):
        trainer, said = said_by(
            BASES["dpo"], preference_rows(8), tiny_model, tokenizer, tmp_path, gradient_accumulation_steps=2
        )
    line = "3, of 8 pairs each: per_device_train_batch_size 4 × gradient_accumulation_steps 2 × 1 process"
    assert said == [("INFO", line)]
    assert trainer.state.global_step == 3  # of three epochs


@pytest.mark.parametrize("base", BASES)
def test_a_set_that_is_smaller_than_a_step(base, tiny_model, tokenizer, tmp_path):
    rows = preference_rows(6)
    trainer, ((level, line),) = said_by(
        BASES[base], rows, tiny_model, tokenizer, tmp_path, gradient_accumulation_steps=64, num_train_epochs=2
    )
    assert level == "WARNING"
    assert line.endswith("× 1 process. The training set has only 6, so every step is a whole epoch")
    assert line.startswith("2, of 256 pairs each")
    assert trainer.state.global_step == 2


def test_a_stream_has_no_size(tiny_model, tokenizer, tmp_path, caplog):
    stream = preference_rows(8).to_iterable_dataset()
    with caplog.at_level(logging.INFO, "trl_margins"):
        _, said = said_by(BASES["cpo"], stream, tiny_model, tokenizer, tmp_path, max_steps=1)
    ((level, line),) = said
    assert (level, line[:20]) == ("INFO", "1, of 4 pairs each: ")
