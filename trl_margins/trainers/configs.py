"""Configs: TRL's own fields, plus those of the objective. A method's defaults come from `methods.METHODS`."""

import dataclasses
import math
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig
from trl.experimental.cpo import CPOConfig

from ..methods import WEIGHTS, get_method
from ..terms import Term

SIMPO_GAMMA = CPOConfig.simpo_gamma  # TRL's default


@dataclass
class MarginOptions:
    """The fields that both bases share, beside TRL's. Alone: the options of a trainer that was given TRL's config."""

    _default_gamma_beta_ratio: ClassVar[float | None] = None

    weight: str | None = field(
        default=None,
        metadata={"help": f"Weight term: {', '.join(WEIGHTS)}. Without one every pair weighs 1."},
    )
    score_gap_transform: str = field(
        default="linear",
        metadata={
            "help": "How the score gap δ becomes a weight: 'linear' δ, 'quadratic' δ², 'exponential' e^δ - 1, "
            "'hard' 1 where δ reaches `score_gap_threshold`.",
            "choices": ["linear", "quadratic", "exponential", "hard"],
        },
    )
    score_gap_threshold: float | None = field(
        default=None, metadata={"help": "Pairs with a smaller score gap weigh 0. The 'hard' transform needs it."}
    )
    score_gap_normalize: bool = field(
        default=False, metadata={"help": "Divide the weights by their mean over the batch, all ranks together."}
    )
    score_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "The columns with the scores of the chosen and the rejected answer, or one column with their gap. "
            "Found by their usual names when not given."
        },
    )
    eval_min_score_gap: float = field(
        default=2.0, metadata={"help": "`eval_pwa` counts the pairs with at least this score gap (GapPO's τ)."}
    )
    gamma_beta_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Target margin γ as SimPO's code gives it, divided by β. Give this or `simpo_gamma` (in reward "
            "units), not both."
        },
    )
    train_only: list[str] | None = field(
        default=None,
        metadata={
            "help": "Train only the parameters whose names match one of these regular expressions; 'mlp' stands for "
            "the feed-forward layers of all common architectures. Everything else is frozen."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.train_only, str):
            self.train_only = [self.train_only]
        if isinstance(self.score_columns, str):
            self.score_columns = [self.score_columns]
        if self.weight == "none":
            self.weight = None
        if self.weight is not None and self.weight not in WEIGHTS:
            raise ValueError(f"unknown weight {self.weight!r}; known: {', '.join(WEIGHTS)}")
        if isinstance(self, TrainingArguments):
            self._resolve_target_margin()
            super().__post_init__()

    def weight_term(self) -> Term | None:
        """The weight term that the fields describe: its options are the fields that begin with its name."""
        if self.weight is None:
            return None
        term = WEIGHTS[self.weight]
        prefix = self.weight.replace("-", "_")
        return term(**{f.name: getattr(self, f"{prefix}_{f.name}") for f in dataclasses.fields(term)})

    def _resolve_target_margin(self) -> None:
        """Leaves both fields with the same margin, each in its unit."""
        if self.gamma_beta_ratio is None and self.simpo_gamma is None:
            self.gamma_beta_ratio = self._default_gamma_beta_ratio
        if self.gamma_beta_ratio is None:
            self.gamma_beta_ratio = None if self.simpo_gamma is None else self.simpo_gamma / self.beta
            return
        gamma = self.gamma_beta_ratio * self.beta
        if self.simpo_gamma is not None and not math.isclose(self.simpo_gamma, gamma):
            raise ValueError(
                f"gamma_beta_ratio={self.gamma_beta_ratio:g} and simpo_gamma={self.simpo_gamma:g} both set the target "
                f"margin and differ: with beta={self.beta:g} the ratio means simpo_gamma={gamma:g}. Give one of them "
                "and leave the other None."
            )
        self.simpo_gamma = gamma


@dataclass
class MarginCPOConfig(MarginOptions, CPOConfig):
    """TRL's `CPOConfig` with the fields of the objective; without them, the same defaults."""

    simpo_gamma: float | None = field(
        default=None,
        metadata={
            "help": f"Target margin γ in reward units, for loss_type='simpo'. Defaults to TRL's {SIMPO_GAMMA}, or to "
            "`gamma_beta_ratio` · β."
        },
    )

    def _resolve_target_margin(self) -> None:
        if self.loss_type in ("simpo", "alphapo"):
            if self.gamma_beta_ratio is None and self._default_gamma_beta_ratio is None and self.simpo_gamma is None:
                self.simpo_gamma = SIMPO_GAMMA
            super()._resolve_target_margin()
        elif self.gamma_beta_ratio is not None:
            raise ValueError(
                f"gamma_beta_ratio goes with loss_type='simpo'; loss_type={self.loss_type!r} has no target margin"
            )
        elif self.simpo_gamma is None:
            self.simpo_gamma = SIMPO_GAMMA  # as TRL has it; no other loss reads it


@dataclass
class MarginDPOConfig(MarginOptions, DPOConfig):
    """TRL's `DPOConfig` with the fields of the objective; without them, the same defaults."""

    reward: str = field(
        default="log-ratio",
        metadata={
            "help": "Implicit reward: 'log-ratio' to the reference model (DPO), or 'length-normalized' (SimPO), for "
            "which no reference model is loaded.",
            "choices": ["log-ratio", "length-normalized"],
        },
    )
    simpo_gamma: float | None = field(
        default=None,
        metadata={"help": "Target margin γ in reward units, subtracted from every reward gap. None without it."},
    )


@dataclass
class KeepsBest:
    """For methods that keep the checkpoint of their best evaluation."""

    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={
            "help": "Load the best checkpoint at the end of training. On by default where `eval_strategy` is set; "
            "where saving does not fall on evaluations, checkpoints are then saved as often as evaluated."
        },
    )

    def __post_init__(self) -> None:
        evaluates = IntervalStrategy(self.eval_strategy) != IntervalStrategy.NO
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = evaluates
            if evaluates:
                self.metric_for_best_model = self.metric_for_best_model or self._best_metric
                self._save_on_evaluations()
        super().__post_init__()

    def _save_on_evaluations(self) -> None:
        eval_steps = self.eval_steps or self.logging_steps
        if self.save_strategy not in ("best", self.eval_strategy) or self.save_steps % eval_steps:
            self.save_strategy, self.save_steps = self.eval_strategy, eval_steps


# What a method's reward means on each base, in the base's own fields
_REWARD_FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "cpo": {"length-normalized": {"loss_type": "simpo", "cpo_alpha": 0.0}},
    "dpo": {"length-normalized": {"reward": "length-normalized"}},
}
_CONFIGS: dict[tuple[str | None, str], type] = {(None, "cpo"): MarginCPOConfig, (None, "dpo"): MarginDPOConfig}

Config = TypeVar("Config", bound=MarginOptions)


def method_config(method_id: str) -> Callable[[type[Config]], type[Config]]:
    """Class decorator: a dataclass with the defaults of the method's row in `METHODS`."""

    def decorate(cls: type[Config]) -> type[Config]:
        method = get_method(method_id)
        base = "cpo" if issubclass(cls, CPOConfig) else "dpo"
        declared = dict(ChainMap(*(vars(parent).get("__dataclass_fields__", {}) for parent in cls.__mro__)))
        defaults = {**_REWARD_FIELDS[base][method.reward], "weight": method.weight, **method.defaults}
        # resolved after the user's own, since the margin has two fields
        cls._default_gamma_beta_ratio = defaults.pop("gamma_beta_ratio", None)
        cls._best_metric = f"eval_{method.keep_best}"
        for name, value in defaults.items():
            cls.__annotations__[name] = declared[name].type
            setattr(cls, name, field(default=value, metadata=declared[name].metadata))
        _CONFIGS[method_id, base] = dataclass(cls)
        return cls

    return decorate


def config_class(method_id: str | None, base: str = "cpo") -> type[MarginOptions]:
    """The config of a method on a base ("cpo" or "dpo"); without a method, the base's own.

    Raises:
        ValueError: unknown method or base.
    """
    if base not in ("cpo", "dpo"):
        raise ValueError(f"unknown base {base!r}; known: cpo, dpo")
    if method_id is not None:
        get_method(method_id)
    return _CONFIGS[method_id, base]


@method_config("gappo")
class GapPOConfig(KeepsBest, MarginCPOConfig):
    """GapPO on `CPOTrainer`: SimPO's loss, each pair weighted by its score gap, with the paper's settings."""


@method_config("gappo")
class GapPODPOConfig(KeepsBest, MarginDPOConfig):
    """GapPO on `DPOTrainer`: the same loss; no reference model is loaded."""
