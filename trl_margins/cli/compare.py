"""`trl-margins compare`: several methods on the same data, with the same budget, seeds and start; one table."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, IterableDataset
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.trainer import TRAINING_ARGS_NAME

from .. import __version__
from ..checks import NUMBERS as TAKEN
from ..checks import check_names
from ..disk import check_writable, write
from ..evaluation.intervals import student_interval
from ..evaluation.tables import MEANING
from ..recording.pair_log import PAIRS_FILE
from ..redaction import redacted
from ..registry import get_method
from ..tables import markdown_table
from ..trainers.folder import earlier_run, last_whole_checkpoint
from . import train
from .compare_settings import Entry, SharedSettings, Variant, default_of, set_by_the_first
from .config_file import Settings, as_yaml, read_yaml
from .dry_run import plain
from .options import Options, OptionsParser, joined, option, usage
from .setup import WEIGHTS, digest_of_files

logger = logging.getLogger(__name__)

# The files of each run: its settings, its other inputs and its results
RUN, FACTS, NUMBERS = "run.yaml", "compared.json", "eval_results.json"
RESULTS, TABLE, REPORT = "results.json", "compare.md", "report"
_OF_A_STREAM = 1000  # rows by which a stream is known again
METRICS = {"eval_pwa": "PWA, score gap ≥ {:g}", "eval_pwa_all": "PWA, all pairs", "eval_spearman": "Spearman ρ"}


@dataclass(kw_only=True)
class CompareArguments(Options):
    """What `compare` has beside the options of `train`."""

    methods: list[str] = option(
        "Methods, as `method` of train has them, each with options of its own where it has some: "
        "`gamma-po:gamma_po_tau=3`. Differences are from the first one."
    )
    seeds: list[int] | None = option("Each method trains once with each of them. Default: `seed` alone.", None)
    learning_rates: list[float] | None = option(
        "Each method tries all of them with the first seed, and keeps the best by `metric_for_best_model`, if that is "
        "eval_pwa, eval_pwa_all or eval_spearman, else by PWA of all pairs.",
        None,
    )
    out: str = option("Folder for a folder of each run, the table and the report.", "compare")


def main(argv: Sequence[str]) -> int:
    """Trains what is not done yet, and writes the table."""
    with usage():
        comparison, is_dry = plan(argv)
    print("\n".join([comparison.preface, *comparison.notes_on_rate]))
    if not is_dry:
        comparison.facts = facts_of(comparison.entries[0])
    comparison.check_folders()
    if is_dry:
        return 0
    comparison.check_data()
    check_writable(comparison.out)
    comparison.train()
    comparison.write()
    for run, error in comparison.failed.items():
        print(f"trl-margins compare: {run} failed: {error}", file=sys.stderr)
    return 1 if comparison.failed else 0


def parser() -> HfArgumentParser:
    """The parser of what `train` does not have."""
    kind: Any = CompareArguments
    return HfArgumentParser(
        kind,
        prog="trl-margins compare",
        usage="%(prog)s --methods METHOD [METHOD ...] [--config FILE | --recipe NAME] [options of train]",
        allow_abbrev=False,
    )


def help_parser() -> OptionsParser:
    """The parser that prints the help: also of what `train` has, but for its method."""
    whole = train.parser_for("gappo", "cpo", "compare", CompareArguments)
    whole.usage = parser().usage
    for actions in (whole._actions, *(group._group_actions for group in whole._action_groups)):
        actions[:] = [action for action in actions if action.dest != "method"]
    return whole


def plan(argv: Sequence[str]) -> tuple[Comparison, bool]:
    """The comparison that the flags describe, and whether it is only to be shown.

    Raises:
        ValueError: settings that a method does not take, or that would make it another one.
    """
    if {"-h", "--help", "--help_all", "--help-all"} & set(argv):
        help_parser().parse(argv)
    parsed: Any = parser().parse_args_into_dataclasses(joined(argv), return_remaining_strings=True)
    args, flags = parsed
    check_names("methods", args.methods)
    for name in ("methods", "seeds", "learning_rates"):
        values = getattr(args, name) or []
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"--{name} has {twice[0]} twice: name each once")
        for value in values if name != "methods" else ():
            TAKEN[name.removesuffix("s")].check(name, value)
    files = ArgumentParser(prog="trl-margins compare", add_help=False, allow_abbrev=False)
    one = files.add_mutually_exclusive_group()
    one.add_argument("--config")
    one.add_argument("--recipe")
    files.add_argument("--base")
    files.add_argument("--dry_run", "--dry-run", nargs="?", const=True, default=False, type=string_to_bool)
    given, flags = files.parse_known_args(flags)
    settings, source = _read_settings(given.config, given.recipe, args.methods)
    shared = SharedSettings(args.methods, given.base or settings.get("base"), settings, source, flags)
    for name in ("seed", "learning_rate"):
        if name in shared.said and getattr(args, f"{name}s"):
            raise ValueError(f"--{name} and --{name}s: name all of them with --{name}s, the one of --{name} too")
    entries = shared.entries()
    for entry, other in combinations(entries, 2):
        if (entry.method, entry.settings) == (other.method, other.settings):
            raise ValueError(f"--methods has {entry.name} and {other.name}, which are the same run: name it once")
    first, out = shared.shared.config, Path(args.out)
    if not (found := next(place for place in (out, *out.absolute().parents) if place.exists())).is_dir():
        raise ValueError(f"--out {out}: {found} is a file: name a folder")
    seeds, rates = args.seeds or [first.seed], args.learning_rates or [first.learning_rate]
    return Comparison(entries, first, seeds, rates, out, shared.notes()), given.dry_run


def _read_settings(config: str | None, recipe: str | None, methods: Sequence[str]) -> tuple[Settings, str]:
    """The file's settings. Where several objectives have an α, `alpha` in it is AlphaPO's, if that is compared."""
    try:
        return train.read_settings(config, recipe)
    except ValueError:
        ids = [Variant(name).method for name in methods]
        if not (with_alpha := [method for method in ids if get_method(method).defaults.get("alpha")]):
            raise
        return train.read_settings(config, recipe, with_alpha[0])


# Runs ----------------------------------------------------------------------------------------------------------------


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
            changed = ", ".join(f"{name} {before.get(name)} → {now.get(name)}" for name in names)
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


@dataclass
class Comparison:
    """Methods, seeds and learning rates, and the results of their runs."""

    entries: Sequence[Entry]
    first: Any  # the first method's config, without options that are its alone
    seeds: Sequence[int]
    rates: Sequence[float]
    out: Path
    notes: Sequence[str] = ()  # on the settings
    facts: Settings = field(default_factory=dict)  # that all runs must have in common; empty if nothing is trained
    done: dict[Run, dict[str, float]] = field(default_factory=dict)
    failed: dict[Run, Exception] = field(default_factory=dict)

    def rates_of(self, entry: Entry) -> Sequence[float]:
        """The learning rates, or a method's own one."""
        return [entry.config.learning_rate] if "learning_rate" in entry.variant.own else self.rates

    def run(self, entry: Entry, seed: int, rate: float) -> Run:
        return Run(entry, seed, rate, self.out)

    def check_folders(self) -> None:
        """
        Raises:
            ValueError: a run in the folder has other settings.
        """
        for entry in self.entries:
            for seed in self.seeds:
                for rate in self.rates_of(entry):
                    self.run(entry, seed, rate).check_folder(self.facts)

    def check_data(self) -> None:
        """
        Raises:
            ValueError: methods that cannot be trained or evaluated on the data.
        """
        problems: dict[str, list[str]] = {}  # and the methods that have them
        for entry in self.entries:
            runs = [self.run(entry, seed, rate) for seed in self.seeds for rate in self.rates_of(entry)]
            if any(run.numbers is not None for run in runs):
                continue  # the data is the same
            try:
                check_data(entry)
            except (ValueError, TypeError) as error:
                problems.setdefault(str(error), []).append(entry.name)
        bad = [method for methods in problems.values() for method in methods]
        good = [entry.name for entry in self.entries if entry.name not in bad]
        if problems and not good and len(problems) == 1:
            raise ValueError(next(iter(problems)))
        if problems:
            why = "; ".join(f"{', '.join(methods)}: {problem}" for problem, methods in problems.items())
            way = f". The data fits these: --methods {' '.join(good)}" if good else ""
            raise ValueError(f"the data does not fit every method. {why}{way}")

    def train(self) -> None:
        """All rates with the first seed, then each method's best with the others."""
        n, place = sum(len(self.rates_of(each)) + len(self.seeds) - 1 for each in self.entries), 0
        for seed in self.seeds:
            rates = [(entry, rate) for entry in self.entries for rate in self.rates_of(entry)]
            if seed != self.seeds[0]:
                rates = [(entry, best) for entry in self.entries if (best := self.best_rate(entry)) is not None]
            for entry, rate in rates:
                place += 1
                self._train(self.run(entry, seed, rate), f"[{place}/{n}]")

    def _train(self, run: Run, place: str) -> None:
        is_done, began = run.numbers is not None, perf_counter()
        print(f"{place} {run}{': done before' if is_done else ' …'}", flush=True)
        try:
            self.done[run] = run.train(self.facts)
        except Exception as error:  # the other methods' runs are not to blame
            logger.exception("%s failed", run)
            self.failed[run] = error
            return
        finally:
            clear_device_cache(garbage_collection=True)
        if not is_done:
            found = self.done[run]
            shown = ", ".join(f"{key} {found[key]:.4f}" if key in found else f"no {key}" for key in METRICS)
            print(f"{place} {run}: {shown}, {perf_counter() - began:.0f} s", flush=True)

    @property
    def chosen_by(self) -> str:
        """The metric that learning rates are chosen by."""
        return self._asked_for if self._asked_for in self.metrics else "eval_pwa_all"

    @property
    def _asked_for(self) -> str:
        return f"eval_{(self.first.metric_for_best_model or 'pwa_all').removeprefix('eval_')}"

    @property
    def _kept_by(self) -> list[str]:
        """The metric that checkpoints were chosen by: that of all pairs where no pair counts for `eval_pwa`."""
        name = self._asked_for
        found = {
            f"{name}_all" if f"{name}_all" in numbers and name not in numbers else name for numbers in self._whole
        }
        return sorted(found) or [name]

    @property
    def _whole(self) -> list[dict[str, float]]:
        """The numbers of the runs that did not diverge."""
        return [numbers for numbers in self.done.values() if "eval_pwa_all" in numbers]

    def best_rate(self, entry: Entry) -> float | None:
        """A method's best learning rate with the first seed; None if all its runs failed. Without the metric, as after
        a divergence, a run is the worst.
        """
        runs = [run for rate in self.rates_of(entry) if (run := self.run(entry, self.seeds[0], rate)) in self.done]
        return max(runs, key=lambda run: self.done[run].get(self.chosen_by, -math.inf)).rate if runs else None

    def by_seed(self, entry: Entry, metric: str) -> dict[int, float]:
        """A method's numbers with its best learning rate."""
        rate = self.best_rate(entry)
        if rate is None:
            return {}
        found = {seed: self.done.get(self.run(entry, seed, rate), {}) for seed in self.seeds}
        return {seed: numbers[metric] for seed, numbers in found.items() if metric in numbers}

    # Words

    @property
    def preface(self) -> str:
        """What each method has for itself, and what all share."""
        first = self.first
        lines = [
            f"* {entry.name}: " + ", ".join(f"{name} {_shown(value)}" for name, value in entry.objective.items())
            for entry in self.entries
        ]
        length = "max_steps" if first.max_steps > 0 else "num_train_epochs"
        same = [
            f"{first.train_batch_size * first.gradient_accumulation_steps} pairs per optimizer step",
            *(f"{name} {_shown(plain(getattr(first, name)))}" for name in (length, "lr_scheduler_type", "max_length")),
            f"learning_rate {_shown(list(self.rates))}",
            f"seed {_shown(list(self.seeds))}",
        ]
        but = ", but for what the names say" if any(entry.variant.own for entry in self.entries) else ""
        lines += ["", f"The same for all{but}: {'; '.join(same)}.", *self.notes]
        return "\n".join(lines)

    @property
    def notes_on_rate(self) -> list[str]:
        """That methods have a learning rate which is not their own, or by what they choose it, if not as asked for."""
        shared = [entry for entry in self.entries if "learning_rate" not in entry.variant.own]
        own = {entry.method: default_of(entry, "learning_rate") for entry in shared}
        (rate, *others) = self.rates
        if others and self._asked_for not in METRICS:
            return [
                f"Learning rates are chosen by eval_pwa_all and not by {self._asked_for}, which each method has on "
                "its own scale."
            ]
        differ = ", ".join(f"{method} {_shown(each)}" for method, each in own.items() if each != rate)
        if others or not differ:
            return []
        return [
            f"All methods have learning rate {_shown(rate)}, which is not the default of each: {differ}. With "
            "--learning_rates, each keeps its best of several."
        ]

    def rows(self) -> list[dict[str, Any]]:
        """For each method its learning rate, its seeds, and each metric's mean and interval, also of the differences
        from the first method.
        """
        rows: list[dict[str, Any]] = []
        for entry in self.entries:
            seeds = self.by_seed(entry, "eval_pwa_all")
            rows.append({"method": entry.name, "learning_rate": self.best_rate(entry), "seeds": [*seeds]})
            for metric in self.metrics:
                ours, theirs = self.by_seed(entry, metric), self.by_seed(self.entries[0], metric)
                rows[-1][metric] = _interval(list(ours.values()))
                if entry is not self.entries[0]:
                    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
                    rows[-1][f"{metric}_difference"] = _interval(differences)
        return rows

    @property
    def metrics(self) -> list[str]:
        return [name for name in METRICS if any(name in numbers for numbers in self.done.values())]

    @property
    def text(self) -> str:
        """The table, and how to read it."""
        heads = ["method", "learning rate", "seeds"]
        for name in self.metrics:
            title = METRICS[name].format(self.first.eval_min_score_gap)
            heads += [title, f"minus {self.entries[0].name}'s"]
        cells = []
        for row in self.rows():
            cells.append([row["method"], _shown(row["learning_rate"]), str(len(row["seeds"]))])
            for name in self.metrics:
                cells[-1] += [_cell(row[name]), _cell(row.get(f"{name}_difference"), "+")]
        return "\n".join([markdown_table(heads, cells), "", *(f"* {note}" for note in self._notes())])

    def _notes(self) -> Iterator[str]:
        seeds, by = ", ".join(map(str, self.seeds)), " or ".join(self._kept_by)
        if len(self.seeds) > 1:
            yield (
                f"Mean ± half of Student's 95 % interval over seeds {seeds}. Differences are by seed. ± is of the "
                "training seeds alone: other evaluation pairs would give other numbers."
            )
        else:
            yield f"One seed ({seeds}): there is no interval, and any difference may be chance. --seeds takes several."
        yield from self._notes_on_pairs()
        if not self.by_seed(self.entries[0], "eval_pwa_all"):
            yield f"{self.entries[0].name} has no numbers, so there are no differences from it."
        chosen = [entry.name for entry in self.entries if len(self.rates_of(entry)) > 1]
        if chosen:
            whose = "" if len(chosen) == len(self.entries) else f" of {', '.join(chosen)}"
            yield (
                f"The learning rate{whose} is the one of {_shown(list(self.rates))} with the best {self.chosen_by} of "
                f"seed {self.seeds[0]}, on this evaluation set: the numbers are too good by what the choice gains."
            )
        best = [entry.name for entry in self.entries if entry.config.load_best_model_at_end]
        if best:
            whose = "Each model" if len(best) == len(self.entries) else f"The model of {', '.join(best)}"
            yield (
                f"{whose} is its run's checkpoint with the best {by}, on this evaluation set: the numbers are too "
                "good by what the choice gains."
            )
        if len(best) < len(self.entries):
            yield f"Each{' other' if best else ''} model is that of its run's last step."
        for run, numbers in self.done.items():
            if missing := [name for name in dict.fromkeys(("eval_pwa_all", *self.metrics)) if name not in numbers]:
                yield f"{run} has no {', '.join(missing)}, as after a divergence: it counts as worst, and in no mean."
        yield from self.notes_on_rate
        yield from (f"{run} failed: {' '.join(str(error).split())}" for run, error in self.failed.items())
        yield MEANING

    def _notes_on_pairs(self) -> Iterator[str]:
        """How many pairs the numbers are of, and how far that alone can move them."""
        counts = sorted({int(numbers["eval_n_pairs"]) for numbers in self._whole})
        clear = sorted({int(numbers["eval_n_pairs_gap"]) for numbers in self._whole if "eval_n_pairs_gap" in numbers})
        if not counts:
            return
        of_gap = f", {_or(clear)} of them with a score gap ≥ {self.first.eval_min_score_gap:g}" if clear else ""
        rows = re.match(r"\d+", str(self.facts.get("evaluation set")))
        left = int(rows[0]) - counts[0] if rows else 0
        left_out = (
            f" {left} of {rows[0]} rows are in no number: their prompts fill max_length, or their log-probabilities "
            "are not finite."
            if rows and left > 0
            else ""
        )
        yield f"The numbers are of {_or(counts)} pairs{of_gap}.{left_out}"
        if len(counts) > 1:
            yield f"The runs were not evaluated on the same pairs: there were {_shown(counts)} of them."
        sizes = ", ".join(f"± {0.98 / n**0.5:.2f} with {n} pairs" for n in dict.fromkeys((*clear, *counts)) if n)
        yield f"The 95 % interval of an accuracy over the pairs themselves is up to {sizes}."

    def write(self) -> None:
        """Writes and prints the table, and writes the numbers and the report."""
        runs = [
            {
                **{"method": run.entry.name, "seed": run.seed, "learning_rate": run.rate, "folder": run.folder.name},
                **{"is_in_table": run.rate == self.best_rate(run.entry), "metrics": numbers},
            }
            for run, numbers in self.done.items()
        ]
        found = {
            "table": self.rows(),
            "runs": runs,
            "failed": {str(run): str(error) for run, error in self.failed.items()},
            "settings": {entry.name: entry.settings for entry in self.entries},
        }
        write(self.out / RESULTS, json.dumps(found, indent=2) + "\n")
        write(self.out / TABLE, f"{self.preface}\n\n{self.text}\n")
        report = self._report()
        print("\n".join(["", self.text, "", *map(str, (self.out / TABLE, self.out / RESULTS, *report))]))

    def _report(self) -> list[Path]:
        """The report's page, where there can be one."""
        if find_spec("matplotlib") is None:
            logger.info("no report without matplotlib: pip install 'trl-margins[report]'")
        elif folders := [
            run.folder
            for run in self.done
            if run.seed == self.seeds[0] and run.rate == self.best_rate(run.entry) and self.first.log_pairs
            if self.done[run] or (run.folder / PAIRS_FILE).is_file()  # else it diverged at once
        ]:
            from ..report.page import write_report
            from ..report.run_folder import read_runs

            return write_report(read_runs(folders), self.out / REPORT)[:1]
        return []


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


def _interval(values: Sequence[float]) -> dict[str, float | None] | None:
    """As JSON has it: nothing that is not a number."""
    if not values:
        return None
    mean, half = student_interval(values)
    return {"mean": mean, "half_width": None if math.isnan(half) else half}


def _cell(interval: Mapping[str, Any] | None, sign: str = "") -> str:
    if interval is None:
        return "–"
    text, half = f"{round(interval['mean'], 4) + 0.0:{sign}.4f}", interval["half_width"]  # no −0
    if half is None:
        return text
    if half < 1e-9:  # which as ± 0 would look certain
        return f"{text}, same in all seeds"
    return f"{text} ± {half:.4f}" if half >= 5e-5 else f"{text} ± {half:.0e}"


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
