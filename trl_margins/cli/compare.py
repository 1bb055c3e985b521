"""`trl-margins compare`: several methods on the same data, with the same budget, seeds and start; one table."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate.utils.memory import clear_device_cache
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..checks import NUMBERS as TAKEN
from ..checks import check_names
from ..disk import check_writable, write
from ..evaluation.intervals import student_interval
from ..evaluation.tables import MEANING
from ..printable import outlive_readers
from ..recording.pair_log import PAIRS_FILE
from ..registry import get_method
from ..tables import markdown_table
from . import train
from .compare_runs import Run, check_data, facts_of
from .compare_settings import Entry, SharedSettings, Variant, default_of
from .config_file import Settings
from .dry_run import plain
from .options import Options, OptionsParser, joined, option, usage

logger = logging.getLogger(__name__)

RESULTS, TABLE, REPORT = "results.json", "compare.md", "report"
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
    if not is_dry:
        outlive_readers()
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
