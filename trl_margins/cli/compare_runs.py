"""The runs of a comparison: each is one of `train`, in a folder of its own, and known again by what it depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from transformers.trainer import TRAINING_ARGS_NAME

from .. import __version__
from ..redaction import redacted
from ..trainers.folder import earlier_run, last_whole_checkpoint
from . import train
from .compare_settings import Entry, default_of, set_by_the_first
from .config_file import Settings, as_yaml, read_yaml
from .setup import WEIGHTS, digest_of_files

logger = logging.getLogger(__name__)

# The files of each run: its settings, its other inputs and its results
RUN, FACTS, NUMBERS = "run.yaml", "compared.json", "eval_results.json"
_OF_A_STREAM = 1000  # rows by which a stream is known again


@dataclass(frozen=True)
class Run:
    """A method's run with a seed and a learning rate, in a folder as `train` makes it."""

    entry: Entry
    seed: int
    rate: float
    out: Path

    @property
    def folder(self) -> Path:
        name = re.sub(r"[^\w.=,+-]", "-", self.entry.name)  # as a file system may want it
        return self.out / f"{name}-lr{self.rate:g}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.entry.name}, seed {self.seed}, learning rate {self.rate:g}"

    @property
    def settings(self) -> Settings:
        own = {"output_dir": str(self.folder), "seed": self.seed, "learning_rate": self.rate}
        if name := self.entry.settings.get("run_name"):
            own["run_name"] = f"{name}-{self.folder.name}"
        return {**self.entry.settings, **own}

    @property
    def numbers(self) -> dict[str, float] | None:
        """The results of the finished run."""
        found = _json_of(self.folder / NUMBERS)
        if found is None:
            return None
        return found if all(isinstance(value, int | float | None) for value in found.values()) else None

    def check_folder(self, facts: Settings) -> None:
        """
        Raises:
            ValueError: the folder is that of a run with other settings, or of no comparison.
        """
        file = self.folder / RUN
        if not file.is_file():
            if earlier_run(self.folder):
                raise ValueError(f"{self.folder} is not of a comparison: name another folder with --out")
            return
        saved = _json_of(self.folder / FACTS) or {}
        try:
            settings = read_yaml(file)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(
                f"{error} This file is compare's own, and is damaged: name another folder with --out, or remove "
                f"{self.folder}"
            ) from error
        before = {**settings, "output_dir": None, **{name: saved.get(name) for name in facts}}
        now = {**redacted(self.settings), "output_dir": None, **redacted(facts)}
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            values = [
                [of[name] if name in of else default_of(self.entry, name) for of in (before, now)] for name in names
            ]
            changed = ", ".join(f"{name} {one} → {other}" for name, (one, other) in zip(names, values, strict=True))
            raise ValueError(
                f"{self.folder} is of another run ({changed}), with which the others would not compare: "
                f"name another folder with --out, or remove this one{self._way_on(names, before)}"
            )

    def _way_on(self, names: Sequence[str], before: Settings) -> str:
        """The flags with which a run is the earlier one again, where only the first method is another one."""
        if "load_best_model_at_end" in names:
            names = [name for name in names if name != "save_strategy"]  # with it, "no" becomes "best"
        if any(name in self.entry.said or not set_by_the_first(name) for name in names):
            return ""
        earlier = {name: before[name] if name in before else default_of(self.entry, name) for name in names}
        flags = " ".join(
            f"--{name} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
            for name, value in earlier.items()
            if value is not None
        )
        return f". Nobody set this: it is the first method's default, and that was another method. To go on: {flags}"

    def train(self, facts: Settings) -> dict[str, float]:
        """Trains, or goes on from the last checkpoint, unless it is done."""
        if (found := self.numbers) is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FACTS).write_text(json.dumps(redacted(facts), indent=2) + "\n")
        (self.folder / RUN).write_text(as_yaml(self.settings), encoding="utf-8")
        flags: list[str] = []
        for name, value in self.settings.items():
            if redacted({name: value}) != {name: value}:  # the file is without it
                flags += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        if earlier_run(self.folder):
            whole = last_whole_checkpoint(self.folder)
            flags += ["--resume_from_checkpoint", "true"] if whole else ["--overwrite_output_dir", "true"]
            # with it, `train` takes the run for one that lacks nothing
            (self.folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        try:
            status = train.main(["--config", str(self.folder / RUN), *flags], is_part=True)
        except FloatingPointError as error:  # a result, too: of a learning rate that is too large
            logger.warning("%s has diverged: %s", self, error)
            (self.folder / NUMBERS).write_text("{}\n")
            status = 0
        if status:
            print("The same command goes on from here.")
            raise SystemExit(status)
        if (found := self.numbers) is None:
            raise ValueError(f"{self.folder} has no {NUMBERS}")
        return found


def check_data(entry: Entry) -> None:
    """What a method's trainer checks of rows, scores and columns, without a model.

    Raises:
        ValueError, TypeError: the data does not fit.
    """
    from ..trainers.best import choose_metric
    from ..trainers.named import trainer_of
    from ..trainers.objectives import objective_of
    from ..trainers.preparation import prepare_datasets

    script, config, model_args, mixture = entry.run
    config = copy(config)
    logging.disable(logging.WARNING)  # training says it again
    try:
        rows, evals, tokenizer = train.inputs_of(script, config, model_args, mixture)
        takes_images = trainer_of(config)._takes_images
        objective = objective_of(config)
        sets = prepare_datasets(rows, evals, config, config, objective, tokenizer, takes_images)
        facts = {"": sets.facts["eval"]}
        choose_metric(config, objective, facts, config.eval_min_score_gap, has_own_metrics=False)
    finally:
        logging.disable(logging.NOTSET)


def facts_of(entry: Entry) -> Settings:
    """What runs depend on that their settings do not show: the version, the rows, and what local files hold."""
    script, config, _, mixture = entry.run
    train_rows, eval_rows = map(_digest_of_rows, train.datasets_of(script, config, mixture))
    found: Settings = {"version": __version__, "training set": train_rows, "evaluation set": eval_rows}
    for name in ("model_name_or_path", "tokenizer_name_or_path", "chat_template", "deepspeed"):
        value = entry.settings.get(name)
        if isinstance(value, str) and os.path.exists(value):  # a template is too long for Path's
            found[f"files of {name}"] = digest_of_files(Path(value), (".json", *WEIGHTS))
    return found


def _digest_of_rows(rows: Dataset | IterableDataset) -> str:
    """Of all rows, or the first ones of a stream."""
    digest, n = hashlib.sha256(), 0
    some = rows.take(_OF_A_STREAM) if isinstance(rows, IterableDataset) else rows
    for batch in some.with_format("arrow").iter(1000):
        n += len(batch)
        digest.update(json.dumps(batch.to_pylist(), default=str).encode())
    first = "first " if some is not rows else ""
    return f"{first}{n} rows ({digest.hexdigest()[:8]})"


def _json_of(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):  # killed before it was written, or meanwhile
        return None
    return found if isinstance(found, dict) else None
