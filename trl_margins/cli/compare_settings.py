"""What the runs of `trl-margins compare` share, and what each method has for itself."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments
from trl import ModelConfig
from trl.scripts.utils import DatasetMixtureConfig

from ..checks import unknown
from ..data.loading import load_splits, names_in
from ..evaluation.tables import RANKING
from ..redaction import is_secret, redacted_text
from ..registry import base_of, get_method, method_ids
from . import train
from .config_file import Settings, flags_said
from .dry_run import plain, resolved
from .train_options import TrainArguments, check_run

logger = logging.getLogger(__name__)

# What makes a method the method that it is
_OF_A_METHOD = ("weight", "margin", "reward", "loss_type", "loss_weights")
# γ in reward units; the objective's reward; and what follows from the reward
_SAID_OTHERWISE = ("simpo_gamma", "reward", "gamma_po_centered")
# For the methods that have a reference model
_OF_A_REFERENCE = frozenset(
    (
        *("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model", "ref_model_mixup_alpha"),
        "ref_model_sync_steps",
    )
)
# Which checkpoint is the run's: by the first method's rule for all
_OF_THE_BEST = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
# The configs' own fields that are not the objective's: like transformers', they are the same for all methods
_OF_ALL = frozenset(
    (
        *("log_pairs", "nonfinite_steps", "share_prompt", "train_only", "eval_min_score_gap", "dataset_num_proc"),
        *("prompt_column", "system_column", "score_columns", "tokenization", "truncation_mode", "max_length"),
        *("max_completion_length", "is_encoder_decoder", "pad_token", "pad_to_multiple_of", "padding_free"),
        *("model_init_kwargs", "trust_remote_code", "disable_dropout", "generate_during_eval"),
        *("activation_offloading", "precompute_ref_batch_size", "precompute_ref_log_probs", "router_aux_loss_coef"),
        *TrainingArguments.__dataclass_fields__,
    )
)
# What every evaluation has, whatever the method and its base
MEASURED = (
    *("loss", *RANKING, "rewards/accuracies", "rewards/margins"),
    *(f"{of_side}/{side}" for of_side in ("rewards", "logps") for side in ("chosen", "rejected")),
)
_REFUSED = {
    "method": "name the methods with --methods",
    "output_dir": "name the folder of all runs with --out",
    "resume_from_checkpoint": "a stopped comparison resumes when it is started again",
    "overwrite_output_dir": "for a new comparison, name another folder with --out",
    "push_to_hub": "each run would replace the model of the one before",
}
# What no method has for itself, and why
_SHARED = {
    **_REFUSED,
    "dry_run": "--dry_run is for all",
    "seed": "--seeds are for all",
    "model_name_or_path": "all methods have the same start",
    "eval_min_score_gap": "all methods are measured alike",
}
_OF_DATA = frozenset(
    (*DatasetMixtureConfig.__dataclass_fields__, "dataset_name", "dataset_config", "dataset_train_split")
) | {"dataset_test_split", "eval_dataset_name", "config", "recipe"}


@dataclass(frozen=True)
class Variant:
    """What `--methods` names: a method, or one with options of its own, as in `gamma-po:gamma_po_tau=3,beta=2`.

    Raises:
        ValueError: an option without a value, or one that all methods share.
    """

    name: str

    def __post_init__(self) -> None:
        for name, value in self.own.items():
            if (is_secret(name) and value not in ("None", "null")) or redacted_text(value) != value:
                raise ValueError(
                    f"--methods {self.method}: {name} has a secret, and the options of a method name folders: give it "
                    "to all methods as a flag, or in the environment"
                )
        for name in self.own:
            if why := _SHARED.get(name) or ("name data and evaluation once, for all" if name in _OF_DATA else ""):
                raise ValueError(f"--methods {self.name}: {name} cannot be of one method: {why}")

    @property
    def method(self) -> str:
        return self.name.partition(":")[0]

    @property
    def own(self) -> dict[str, str]:
        """Its options by name, as they are written."""
        found: dict[str, str] = {}
        _, colon, options = self.name.partition(":")
        for option in re.split(r",(?=\w+=)", options) if colon else ():
            name, is_set, value = option.partition("=")
            if not is_set or not name or not value or name in found:
                raise ValueError(
                    f"--methods {redacted_text(self.name)}: {redacted_text(option)!r} is no option: write "
                    "METHOD:NAME=VALUE,NAME=VALUE, and each name once"
                )
            found[name] = value
        return found

    @property
    def flags(self) -> list[str]:
        """Its options as flags of `train`; the values of a list have commas between them."""
        words = []
        for name, value in self.own.items():
            is_list = "," in value and not value.startswith(("{", "["))
            words += [f"--{name}", *value.split(",")] if is_list else [f"--{name}={value}"]
        return words


@dataclass(frozen=True, eq=False)
class Entry:
    """A method, and the settings that its runs share."""

    variant: Variant
    run: tuple[TrainArguments, Any, ModelConfig, DatasetMixtureConfig]
    settings: Settings  # for `train --config`
    said: frozenset[str] = frozenset()  # by file or flags

    @property
    def method(self) -> str:
        return self.variant.method

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def config(self) -> Any:
        return self.run[1]

    @property
    def objective(self) -> dict[str, Any]:
        """Base, reward and β, and the fields of the objective that it reads or that the base alone has otherwise."""
        from ..trainers.objectives import objective_of

        config, plainest, objective = self.config, _plainest(None, self.config._base), objective_of(self.config)
        read = {"loss_type", "cpo_alpha", *get_method(self.method).defaults}
        read |= {name for kind in ("weight", "margin") for name in config.term_options(kind)}
        for link in objective.links:
            read |= {name for name, _ in link.options}
        values = {item.name: plain(getattr(config, item.name)) for item in fields(config) if item.init}
        shown = {
            name: value
            for name, value in values.items()
            if name not in (*_OF_ALL, *_SAID_OTHERWISE)
            and (value != plain(getattr(plainest, name)) or (name in read and value is not None))
        }
        return {"base": config._base, "reward": objective.reward.name, "beta": config.beta, **shown}


class SharedSettings:
    """What file and flags say, and what the other methods take from the first.

    Args:
        methods: as `--methods` names them.
        base: the one that is asked for.
        settings: the file's.
        source: the file.
        flags: those of `train`.
    """

    def __init__(
        self, methods: Sequence[str], base: str | None, settings: Settings, source: str, flags: Sequence[str]
    ) -> None:
        self.source, self.flags, self.said = source, flags, flags_said(flags)
        self.variants = [Variant(name) for name in methods]
        self.kinds: dict[Variant, tuple[str, str]] = {}  # id and base of each
        for each in self.variants:
            own = each.own.get("base")
            self.kinds[each] = each.method, base_of(each.method, own) if own else _base_of(each.method, base)
        self.switches = {kind: _switches(*kind) for kind in self.kinds.values()}
        self.borrowed: set[str] = set()
        self.left_out: dict[str, list[str]] = {}  # option → the methods that do not get it
        # TRL's keys alone are for none of the methods, or for all of them
        self.own = None if settings.get("method") == "none" else settings.get("method")
        for where, names in (
            ("--", {**self.said, "method": "method" in self.said}),
            (f"{source}: ", {**settings, "method": None, "output_dir": None}),  # `train` needs them there
        ):
            if refused := [each for each in _REFUSED if str(names.get(each)).lower() not in ("none", "false")]:
                raise ValueError(f"{where}{refused[0]}: {_REFUSED[refused[0]]}")
        self.env = settings.get("env")
        self.settings = {name: value for name, value in settings.items() if name not in (*_REFUSED, "base")}
        of_objective = {name for kind in self.kinds.values() for name in _fields(*kind)} - _OF_ALL
        self.of_own = {
            name: self.settings.pop(name) for name in settings if self.own is not None and name in of_objective
        }
        of_own = self.of_own if self._has_own else {}
        for where, names in (("--", self.said), (f"{source}: ", {**self.settings, **of_own})):
            if found := [name for name in _OF_A_METHOD if name in names]:
                raise ValueError(
                    f"{where}{found[0]} makes another method of one: leave it out, and name methods alone"
                )

    def entries(self) -> list[Entry]:
        """The methods, the first one's settings first."""
        first = self._entry(self.variants[0], {})
        self.shared = self._entry(self.variants[0], {}, with_own=False) if self.variants[0].own else first
        return [first, *(self._entry(other, self._borrow(other)) for other in self.variants[1:])]

    @property
    def _has_own(self) -> bool:
        """Whether the method that the file names is compared."""
        return any(each.method == self.own for each in self.variants)

    def notes(self) -> list[str]:
        """What is not as somebody said, or what nobody said."""
        found = []
        if self.of_own:
            then = "for it alone" if self._has_own else "left out"
            found.append(f"{self.source} is for {self.own}; {then}: {', '.join(self.of_own)}.")
        if self.borrowed:
            names = ", ".join(sorted(self.borrowed))
            found.append(f"Of what nobody set, all have the defaults of {self.variants[0].method}: {names}.")
        if self.left_out:
            names = ", ".join(f"{name} ({', '.join(methods)})" for name, methods in sorted(self.left_out.items()))
            found.append(f"Left out for methods that do not have it: {names}.")
        return found

    def _borrow(self, variant: Variant) -> Settings:
        """What a method has from the first: where nobody says anything, their defaults differ."""
        kind, first = self.kinds[variant], self.shared
        plainest, theirs = _plainest(*kind), _plainest(*self.kinds[first.variant])
        there = [each for each in _fields(*kind) if each in _OF_ALL and hasattr(theirs, each)]
        said = {*self.settings, *self.said}
        found = [each for each in there if each not in said and getattr(plainest, each) != getattr(theirs, each)]
        self.borrowed.update(found)
        best = [each for each in _OF_THE_BEST if each not in self.said]
        return {each: plain(getattr(first.config, each)) for each in (*found, *best)}

    def _entry(self, variant: Variant, borrowed: Settings, with_own: bool = True) -> Entry:
        kind = name, base = self.kinds[variant]
        known = train.parser_for(name, base, "compare")
        others = [train.parser_for(None, each) for each in {each for _, each in self.kinds.values()} - {base}]
        with_reference = [other for other in self.kinds.values() if _needs_reference(*other)]
        # what only another method has is for that one
        elsewhere = {key for other in others for key in other.keys - known.keys}
        elsewhere |= _OF_A_REFERENCE if with_reference and kind not in with_reference else frozenset()
        elsewhere |= {key for each in self.switches.values() for key in each} - self.switches[kind]
        for key in elsewhere & {*self.settings, *self.said} if with_own else ():
            self.left_out.setdefault(key, []).append(variant.name)
        settings = {key: value for key, value in {**self.settings, **borrowed}.items() if key not in elsewhere}
        settings |= self.of_own if name == self.own else {}
        words, keeps = [], True
        for word in self.flags:
            if word.startswith("--"):
                keeps = word.partition("=")[0].removeprefix("--").replace("-", "_") not in elsewhere
            words += [word] * keeps
        own = variant.own if with_own else {}
        words += variant.flags if with_own else []
        try:
            run = train.parse([*words, "--method", name, "--base", base], settings, self.source, "compare")
            if differs := [each for each in run[1].differs_from(get_method(name)) if each not in own]:
                said = {**self.settings, **self.of_own, **self.said}
                if "simpo_gamma" in said:
                    differs = ["simpo_gamma" if each == "gamma_beta_ratio" else each for each in differs]
                raise ValueError(f"{', '.join(differs)} would make another method of it: leave that out")
            check_run(*run)
            if "num_train_epochs" in own and (steps := run[1].max_steps) > 0:
                logger.warning("%s: num_train_epochs has no effect beside max_steps %d", variant.name, steps)
        except ValueError as error:
            raise ValueError(f"method {variant.name!r}: {error}") from error
        script, config, _, mixture = run
        if config.eval_strategy == "no" and script.eval_dataset_name is None:
            raise ValueError(
                "methods are compared on an evaluation set: name one with --eval_dataset_name"
                + _its_own_split(script, mixture)
            )
        if (metric := config.metric_for_best_model) and metric.removeprefix("eval_") not in MEASURED:
            raise unknown("metric_for_best_model", metric, [f"eval_{each}" for each in MEASURED])
        env = {"env": self.env} if self.env else {}
        by_somebody = frozenset((*self.settings, *self.of_own, *self.said, *own))
        return Entry(variant, run, {**env, **yaml.safe_load(resolved(*run))}, by_somebody)


def _its_own_split(script: TrainArguments, mixture: DatasetMixtureConfig) -> str:
    """How to evaluate on a part of the training data, where it has one."""
    name, test = str(script.dataset_name), script.dataset_test_split
    if mixture.datasets:
        return ", or hold some rows out, with --eval_strategy epoch and test_split_size: 0.1"
    if Path(name).expanduser().exists():
        there = load_splits(name, script.dataset_config)
        if test == script.dataset_train_split or not names_in(test, there) <= {*there}:
            others = [each for each in there if each not in names_in(script.dataset_train_split, there)]
            if not others:
                return ""
            test = others[0]
    named = "" if test == TrainArguments.dataset_test_split else f" --dataset_test_split {shlex.quote(test)}"
    return f", or evaluate on a split of the data set, with{named} --eval_strategy epoch"


def set_by_the_first(name: str) -> bool:
    """Whether a setting that nobody set is the first method's: a default in which methods differ."""
    of_methods = {key for method in method_ids() for key in get_method(method).defaults}
    return name in (_OF_ALL & of_methods) or name in _OF_THE_BEST


def _base_of(method: str, wanted: str | None) -> str:
    """The base that is asked for, where the method can be trained on it."""
    bases = get_method(method).bases
    if wanted is None or wanted in bases:
        return wanted or bases[0]
    base_of(None, wanted)  # refuses what is no base
    logger.info("%s is trained on base %s: it has no other", method, bases[0])
    return bases[0]


def _fields(method: str, base: str) -> list[str]:
    from ..trainers.configs import config_class

    return [item.name for item in fields(config_class(method, base)) if item.init]


def _plainest(method: str | None, base: str) -> Any:
    """The config of a method, or of none, of which nobody has said anything."""
    from ..trainers.configs import config_class

    config: Any = config_class(method, base)
    return _untouched(config)


@cache
def _untouched(config: Any) -> Any:
    return config(output_dir=".", use_cpu=True, bf16=False)


def default_of(entry: Entry, name: str) -> Any:
    """What a method has by itself; None for what is no option of its config."""
    return plain(getattr(_plainest(entry.method, entry.config._base), name, None))


def _switches(method: str, base: str) -> set[str]:
    """The options that would make another method of one that does not have them, and which this one has."""
    from ..trainers.configs import SWITCHES, is_on

    config = _plainest(method, base)
    found = {name for name in SWITCHES if is_on(getattr(config, name, None))}
    found |= {"anchor_diagnostics"} & {*config.term_options("margin")}  # which all other methods refuse
    return found | ({"simpo_gamma"} if "gamma_beta_ratio" in found else set())


def _needs_reference(method: str, base: str) -> bool:
    from ..trainers.objectives import objective_of

    return objective_of(_plainest(method, base)).needs_reference
