"""What is said before the first step: model, data, method, pairs per step, and where it goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from accelerate.utils import is_peft_model
from transformers import TrainerCallback

from ..logging import first, shows
from ..objective import Objective
from ..report.card import SetFacts, display_name
from .card import adapter_kind, base_model, n_parameters, stored_in
from .preparation import TRAIN
from .step_size import factors_of, pairs_per_step

logger = logging.getLogger(__name__)


class SaysWhatTrains(TrainerCallback):
    """Five lines, above all others."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, begins = self.trainer, f"from step {state.global_step}, " if state.global_step else ""
        with first():
            if not state.is_world_process_zero:
                return
            logger.info("model   %s", _model(trainer))
            logger.info("data    %s", _data(trainer))
            logger.info("method  %s", _method(trainer))
            _say_steps(trainer, state.max_steps)
            logger.info("output  %s, %son %s", args.output_dir, begins, _device(trainer))


def _model(trainer: Any) -> str:
    model = trainer.model
    trained, total = n_parameters(model)
    if is_peft_model(model):
        what = f"the {adapter_kind(model)} adapter with {trained:,} of them trains"
    elif trainer.options.train_only:
        what = f"{', '.join(trainer.options.train_only)} train: {trained:,} ({100 * trained / max(total, 1):.3g} %)"
    else:
        what = "all train" if trained == total else f"{trained:,} train ({100 * trained / max(total, 1):.3g} %)"
    name = display_name(base_model(trainer) or "without a name")
    return f"{name}: {total:,} parameters in {stored_in(trainer)}; {what}"


def _data(trainer: Any) -> str:
    """The sets one after another, with what differs between them."""
    facts = trainer.set_facts.values()
    columns = {each.score_columns for each in facts if each.score_columns}
    scores = f"; scores from {'/'.join(min(columns))}" if len(columns) == 1 else ""
    said = "; ".join(_set(each, trainer, named=len(columns) > 1) for each in facts)
    return f"{trainer.data_name + ': ' if trainer.data_name else ''}{said}{scores}"


def _set(facts: SetFacts, trainer: Any, named: bool) -> str:
    size = f"{facts.pairs:,} pairs" if facts.pairs is not None else "a stream"
    if facts.name == TRAIN and facts.pairs not in (None, used := _length(trainer.train_dataset)):
        size += f", {used:,} of them used"
    counts = {"ties": facts.ties, "reversed": facts.reversed, "flipped": facts.flipped}
    found = []
    if facts.shared_pairs:
        found.append(f"train has {'all' if facts.trained_on == 1 else facts.shared_pairs} of them")
    if (n := facts.shared_prompts) and facts.trained_on < 1:
        found.append(f"{n} prompt{'s' * (n != 1)} that train has, too")
    found += [
        f"{n} {what.removesuffix('s') if n == 1 else what}"
        for what, n in counts.items()
        if n is not None and (n or what != "flipped")
    ]
    found += ["/".join(facts.score_columns)] if named and facts.score_columns else []
    return f"{facts.name} {size}" + (f" ({', '.join(found)})" if found else "")


def _length(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") else None


def _method(trainer: Any) -> str:
    """Method, base and loss, the terms, and the numbers of the objective."""
    method, objective = trainer.options.method, trainer.objective
    name = method and (method.id if method.id == method.name.lower() else f"{method.id} ({method.name})")
    losses = " + ".join(name if share == 1 else f"{share:g} {name}" for name, share in objective.losses.items())
    base = trainer._config_class._base.upper()
    parts = [f"{name or 'none'} on {base}Trainer", f"loss {losses}", f"reward {objective.reward.name}"]
    return ", ".join([*parts, *_terms(objective)])


def _terms(objective: Objective) -> Iterator[str]:
    for kind, terms in (("weight", objective.weights), ("margin", objective.margins)):
        if terms:
            yield f"{kind} {' and '.join(term.name for term in terms)}"
    yield f"β {objective.beta:g}"
    reads_target = any(term.takes_target() for term in objective.margins) or objective.shared_margin
    if reads_target and objective.gamma:
        yield f"γ {objective.gamma:g} (γ/β {objective.gamma / objective.beta:g})"


def _say_steps(trainer: Any, max_steps: int) -> None:
    total, rows = pairs_per_step(trainer), _length(trainer.train_dataset)
    line = f"{max_steps:,}, of {total} pairs each: {factors_of(trainer, origins=True)}"
    # a script that shows warnings alone has said nothing of this number
    level = logging.WARNING if "default)" in line and not shows(logging.INFO) else logging.INFO
    if rows is not None and rows < total:
        line += f". The training set has only {rows}, so every step is a whole epoch"
        level = logging.WARNING
    logger.log(level, "steps   %s", line)


def _device(trainer: Any) -> str:
    n = trainer.accelerator.num_processes
    return f"{trainer.args.device}" if n == 1 else f"{n} processes ({trainer.args.device.type})"
