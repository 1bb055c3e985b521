"""Configs: TRL's own fields, plus those of the objective. A method's defaults come from `methods.METHODS`."""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from types import new_class
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainingArguments
from trl import DPOConfig
from trl.experimental.cpo import CPOConfig

from ..checks import check_names, check_options, default_of, values_of
from ..data.evaluation_factors import BERTSCORE_METRICS, METRICS
from ..forward.checkpointing import NAMES
from ..links import LINKS, TRLS, Link
from ..methods import MARGINS, WEIGHTS, Method, names_of
from ..objective import refuse_reference
from ..pairs import FACTOR
from ..redaction import KeepsSecrets
from ..registry import (
    OPTIONS,
    RESERVED,
    base_of,
    built,
    get_method,
    load_plugins,
    option_fields,
    own_alpha,
    reward_class,
    term_class,
    usual_reward,
)
from ..rewards import REWARDS, LogRatioReward, MeanLogRatioReward
from ..terms import Term
from ..terms.evaluation_factor import FLOOR
from .target_margin import resolve_target_margin
from .trls_fields import check_for_trl, check_installed, check_optimizer, find_loss, keep_best, naming_backend

logger = logging.getLogger(__name__)

_NAN_FILTER = {
    "help": "transformers reads every loss from the device to keep NaN and infinity out of the logged mean. Off by "
    "default, since `nonfinite_steps` checks a whole step at once; on with nonfinite_steps='skip', whose steps would "
    "be in that mean. By default, the mean loss of an evaluation is always over finite losses."
}
_KEEP_BEST = {
    "help": "Load the best checkpoint at the end of training. On by default where `eval_strategy` is set. Each "
    "evaluation that is the best so far is saved, whatever else `save_strategy` and `save_steps` save."
}
SIMPO_GAMMA = CPOConfig.simpo_gamma  # TRL's default

_KINDS = ("weight", "margin")
OF_FACTOR = ("gap_aware_metric", "gap_aware_encoder")  # read where no column has the factors
TRL_FIELDS = {*CPOConfig.__dataclass_fields__, *DPOConfig.__dataclass_fields__}
# Config fields that are set by the config itself, that SAM reads too, and that are refused where nothing reads them
_READ_ELSEWHERE = ("gamma_po_centered", "anchor_scope", "anchor_diagnostics")
# Fields that, on or off, make another objective of the same reward and loss; and those of them whose 0 does not
SWITCHES = (
    *("alpha", "f_divergence_type", "gamma_beta_ratio", "label_smoothing", "ld_alpha", "sam_radius"),
    "use_weighting",
)
_MAY_BE_0 = ("gamma_beta_ratio", "label_smoothing")


@dataclass
class MarginOptions(KeepsSecrets):
    """The fields that both bases share, beside TRL's. Alone: the options of a trainer that was given TRL's config.

    `class SomeConfig(MarginCPOConfig, method="gappo")`, decorated with `@dataclass`, has the defaults of that method's
    row in `METHODS`.
    """

    _base: ClassVar[str]  # "cpo" or "dpo"
    _method_id: ClassVar[str | None] = None
    _best_metric: ClassVar[str | None] = None
    _default_gamma_beta_ratio: ClassVar[float | None] = None
    filters_evaluation = False  # not a field: whether evaluations filter although `logging_nan_inf_filter` is off

    # in this order transformers' parser makes a flag that takes several names
    weight: list[str] | None | str = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": f"Weight term: {', '.join(WEIGHTS)}, or a registered one. Several multiply. Without one every "
            "pair has weight 1."
        },
    )
    weight_column: str | None = field(
        default=None, metadata={"help": "The column with the weight of each pair, at least 0, for weight='column'."}
    )
    score_gap_transform: str = field(
        default="linear",
        metadata={
            "help": "How the score gap δ becomes a weight: 'linear' δ, 'quadratic' δ², 'exponential' e^δ - 1, "
            "'hard' 1, training on the pairs whose δ reaches `score_gap_threshold` alone.",
            "choices": ["linear", "quadratic", "exponential", "hard"],
        },
    )
    score_gap_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Pairs with a smaller score gap have weight 0; with the 'hard' transform, which needs it, they "
            "are left out of training."
        },
    )
    score_gap_normalize: bool = field(
        default=False,
        metadata={
            "help": "Divide the weights by their mean over the optimizer's batch: the whole accumulation window, all "
            "ranks together."
        },
    )
    margin: list[str] | None | str = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": f"Margin term: {', '.join(MARGINS)}, or a registered one. It takes the place of the target margin "
            "that all pairs share. Several add."
        },
    )
    margin_column: str | None = field(
        default=None, metadata={"help": "The column with the target margin of each pair, for margin='column'."}
    )
    margin_column_unit: str | None = field(
        default=None,
        metadata={
            "help": "What the numbers of `margin_column` are: 'reward' for reward units, as `simpo_gamma`, or "
            "'gamma_beta_ratio' for the same divided by β."
        },
    )
    gap_aware_metric: str = field(
        default="rougeL",
        metadata={
            "help": "Evaluation factor (GaPO): jaccard, rouge1, rouge2, rougeL, bertscore_precision, bertscore_recall "
            "or bertscore_f1. A data set without an `evaluation_factor` column gets one.",
            "choices": list(METRICS),
        },
    )
    gap_aware_encoder: str | None = field(
        default=None, metadata={"help": "Encoder of BERTScore: a folder or a Hub id."}
    )
    gap_aware_mapping: str = field(
        default="log",
        metadata={
            "help": "'log' log(1/EF), 'linear' 1 - EF, 'square' 1 - EF², 'sqrt' 1 - √EF.",
            "choices": ["log", "linear", "square", "sqrt"],
        },
    )
    gap_aware_normalization: str = field(
        default="scale",
        metadata={
            "help": "'scale' β·γ·f/mean(f), 'add' β·(f - mean(f) + γ), 'none' β·f, with γ the gamma_beta_ratio; the "
            "mean is over the training set.",
            "choices": ["scale", "add", "none"],
        },
    )
    gap_aware_floor: float = field(
        default=FLOOR, metadata={"help": "Smaller evaluation factors count as this one: log(1/0) is infinite."}
    )
    gamma_po_tau: float = field(default=10.0, metadata={"help": "γ-PO's τ: large values keep every margin near γ."})
    gamma_po_steps: int = field(
        default=20,
        metadata={
            "help": "γ-PO's steps of mirror descent; each about halves the distance to the optimum. No effect where "
            "γ²·exp(γ/τ) is above 9τ."
        },
    )
    gamma_po_estimation_size: int = field(
        default=256, metadata={"help": "Gaps that γ-PO solves for together: the batch, filled up from its queue."}
    )
    gamma_po_queue_size: int = field(default=2048, metadata={"help": "Past gaps that γ-PO caches."})
    gamma_po_centered: bool | None = field(
        default=None,
        metadata={
            "help": "Subtract γ_i - γ instead of γ_i. By default with the rewards log-ratio and mean-log-ratio, as "
            "the authors' code does."
        },
    )
    amapo_variant: str = field(
        default="code",
        metadata={
            "help": "AMaPO as its authors' 'code' has it, which made the published tables, or as the 'paper' does.",
            "choices": ["code", "paper"],
        },
    )
    amapo_z_normalize: bool = field(default=True, metadata={"help": "AMaPO's z-normalisation (off: Table 5)."})
    amapo_exponential: bool = field(default=True, metadata={"help": "AMaPO's exponential scaling (off: Table 5)."})
    amapo_zero_well_ranked: bool = field(
        default=True, metadata={"help": "AMaPO's margin of 0 for well-ranked pairs (off: Table 5)."}
    )
    amapo_estimation_size: int = field(
        default=32,
        metadata={
            "help": "Pairs behind AMaPO's mean and deviation in training: the batch, filled up with recent ones. 1 "
            "takes the batch alone, as the authors' code does."
        },
    )
    dpop_lambda: float = field(
        default=50.0,
        metadata={"help": "λ of loss_type 'dpop': how much a chosen completion that became less likely counts."},
    )
    focalpo_gamma: float = field(
        default=0.05, metadata={"help": "Exponent of FocalPO's factor σ(x)^g, for loss_type 'focalpo'."}
    )
    reward_aware_eta: float = field(
        default=1.0,
        metadata={"help": "η of loss_type 'reward_aware': how many reward units a score gap of 1 should become."},
    )
    dr_dpo_beta_prime: float = field(
        default=1.0, metadata={"help": "Dr. DPO's β′, for weight='dr-dpo': the larger, the more alike the weights."}
    )
    madpo_c_max: float = field(
        default=2.0,
        metadata={
            "help": "MADPO's c_max, above 1, for weight='madpo': how much pairs with a small reward-model margin gain."
        },
    )
    madpo_c_min: float = field(
        default=0.5, metadata={"help": "MADPO's c_min, in (0, 1): how much pairs with a large margin lose."}
    )
    madpo_steepness: float = field(default=1.0, metadata={"help": "MADPO's λ: how fast the one turns into the other."})
    madpo_tau: float = field(
        default=math.log(999),
        metadata={"help": "MADPO's τ, the margin at which a pair weighs 1. By default the model's belief is 0.999."},
    )
    beta_dpo_a: float = field(
        default=0.6,
        metadata={
            "help": "β-DPO's a, for weight='beta-dpo-kept' with margin='beta-dpo': how much a batch's β follows its "
            "mean gap."
        },
    )
    beta_dpo_keep: float = field(
        default=0.8, metadata={"help": "β-DPO: the share of each batch's pairs that is kept; the others are left out."}
    )
    r_dpo_alpha: float = field(
        default=0.05, metadata={"help": "R-DPO's α, for margin='r-dpo', in reward units per token of difference."}
    )
    odpo_alpha: float = field(
        default=1.0, metadata={"help": "ODPO's α, for margin='odpo': the factor of the score gap's logarithm."}
    )
    alpha_dpo_alpha: float = field(
        default=0.2,
        metadata={
            "help": "α-DPO's α, for margin='alpha-dpo': how much the standardized distance from the reference counts."
        },
    )
    log_pairs: bool = field(
        default=True,
        metadata={
            "help": "Write the per-pair training log (gap, weight, margin, log-probabilities) to pair_log.csv in the "
            "output folder, at every log. `trl-margins report` draws pictures of it."
        },
    )
    push_pair_log: bool = field(
        default=False,
        metadata={"help": "Push pair_log.csv and anchor_diagnostics.csv to the Hub too: numbers of training pairs."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start in an output folder that has an earlier run, and move that run's files into its "
            "`_previous-1` (2, 3, …). Nothing is deleted. From Python they are moved without this."
        },
    )
    nonfinite_steps: str = field(
        default="stop",
        metadata={
            "help": "What to do about NaN or infinity in the model's output, the loss or the gradient: 'stop' "
            "training and save the weights of the step before, or 'skip' the step and count it.",
            "choices": ["stop", "skip"],
        },
    )
    share_prompt: str = field(
        default="auto",
        metadata={
            "help": "Compute a prompt once for both its completions. 'auto' does so where the result matches the "
            "model's own logits and, on an accelerator, is faster on the first batches; 'always' and 'never' do not "
            "check.",
            "choices": ["auto", "always", "never"],
        },
    )
    anchor_radius: float = field(
        default=0.05, metadata={"help": "GAPO's ρ: how far the anchor lies from the policy, over all its parameters."}
    )
    anchor_batch_multiplier: int = field(
        default=8,
        metadata={
            "help": "GAPO's k: each group of k mini-batches in an accumulation window has an anchor of its own. A "
            "rest joins the last group; a window shorter than k is one group."
        },
    )
    anchor_direction: str = field(
        default="gradient",
        metadata={
            "help": "'gradient' of a group's mean gap; the optimizer's 'momentum', which costs no forward pass and no "
            "memory; or every 'pair' its own gradient (instance-wise), which measures one pair at a time.",
            "choices": ["gradient", "momentum", "pair"],
        },
    )
    anchor_estimator: str = field(
        default="difference",
        metadata={
            "help": "How the anchor gaps are measured: as the 'difference' between policy and anchor, in whatever "
            "precision the training has; the same in 'float32'; or 'per-pair', to first order from a gradient for "
            "each pair, which also makes the update, so that GAPO costs no forward pass (for adapters: it keeps one "
            "gradient per pair in memory).",
            "choices": ["difference", "float32", "per-pair"],
        },
    )
    anchor_scope: list[str] | None = field(
        default=None,
        metadata={
            "help": "What the anchor moves: 'lm-head', or regular expressions over parameter names ('mlp' stands for "
            "the feed-forward layers). Everything that trains, if not given."
        },
    )
    anchor_keep_graphs: int = field(
        default=1,
        metadata={
            "help": "Groups of at most this many mini-batches keep their forward passes from the direction to the "
            "update: faster, at the price of their activations."
        },
    )
    anchor_diagnostics: int = field(
        default=0,
        metadata={
            "help": "Every so many optimizer steps, from the first, write what each pair's anchor gap is made of to "
            "anchor_diagnostics.csv in the output folder; `trl-margins report` draws it. Such a step takes a gradient "
            "for each pair. 0 is off."
        },
    )
    sam_radius: float = field(
        default=0.0, metadata={"help": "ρ of sharpness-aware minimisation; 0 is off. The scope is `anchor_scope`."}
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "The column with the prompt, if it is not `prompt`. Without any, the prompt is what chosen and "
            "rejected both begin with."
        },
    )
    system_column: str | None = field(
        default=None,
        metadata={
            "help": "A column with the system message of each row. Text becomes messages: only these can have one."
        },
    )
    score_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "The columns with the scores of the chosen and the rejected completion, or one column with their "
            "gap or with the list of all responses' scores, of which the highest and the lowest count. Found by their "
            "usual names when not given."
        },
    )
    eval_min_score_gap: float = field(
        default=2.0,
        metadata={
            "help": "`eval_pwa` counts the pairs with at least this score gap (GapPO's τ), of either sign. A pair is "
            "right where the chosen completion's mean log-probability per token is the higher one, whatever reward is "
            "trained."
        },
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

    if not TYPE_CHECKING:

        def __new__(cls, *args, **kwargs):
            """An instance with the options of registered terms, rewards and links among its fields."""
            links = {name for table in LINKS.values() for name in table}
            known = {
                "weight": {*WEIGHTS, "none"},
                "margin": {*MARGINS, "none"},
                "reward": REWARDS,
                "loss_type": links,
            }
            named = {kind: kwargs[kind] for kind in known if isinstance(kwargs.get(kind), str | list)}
            new = [name for kind, value in named.items() for name in names_of(value) if name not in known[kind]]
            if new or kwargs.keys() - cls.__dataclass_fields__.keys():
                load_plugins()
            return super().__new__(with_options(cls))

    def __reduce__(self) -> tuple[Any, ...]:
        # the class with the options of registered terms cannot be found by its name
        return _blank, (origin_of(type(self)),), self.__getstate__()

    def __init_subclass__(cls, method: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method is None:
            return
        row = get_method(method)
        cls._method_id = method
        declared: dict[str, tuple[Any, Any]] = {item.name: (item.type, item.metadata) for item in fields(cls)}
        terms = {kind: _one_or_list(getattr(row, kind)) for kind in _KINDS}
        defaults = {**cls._objective_fields(row), **terms, **row.defaults}
        # resolved after the user's own, since the margin has two fields
        cls._default_gamma_beta_ratio = defaults.pop("gamma_beta_ratio", None)
        if row.keep_best:
            cls._best_metric = f"eval_{row.keep_best}"
            declared["load_best_model_at_end"] = bool | None, _KEEP_BEST
            defaults["load_best_model_at_end"] = None
        if unknown_fields := [name for name in defaults if name not in declared]:
            raise ValueError(
                f"the defaults of method {method!r} name {unknown_fields}, which {cls.__name__} does not have"
            )
        for name, value in defaults.items():  # `@dataclass` reads them when this has returned
            kind, metadata = declared[name]
            cls.__annotations__[name] = kind
            if name == "loss_type" and cls._base == "dpo" and isinstance(value, str):
                value = [value]
            # of a list, transformers' parser knows no default but a factory's
            is_list = isinstance(value, list) or (name in _KINDS and value)
            made = {"default_factory": partial(copy, value)} if is_list else {"default": value}
            setattr(cls, name, field(**made, metadata=metadata))
        _CONFIGS[method, cls._base] = cls

    @classmethod
    def _objective_fields(cls, row: Method) -> dict[str, Any]:
        """The config fields that give a method's reward and loss on this base."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for name in ("train_only", "score_columns", "anchor_scope"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        _read_mappings(self)
        check_options(self)
        for kind in _KINDS:
            _check_terms(self, kind)
        _warn_of_unread(self)
        if isinstance(self, TrainingArguments):
            check_for_trl(self)
            check_installed(self)
            check_optimizer(self)
            if self.logging_nan_inf_filter is None:
                self.filters_evaluation, self.logging_nan_inf_filter = True, self.nonfinite_steps == "skip"
            keep_best(self, self._best_metric)
            self._resolve_target_margin()
            # transformers would have saving fall on evaluations; the trainer saves each that is the best so far
            arguments: Any = self
            keeps_best, arguments.load_best_model_at_end = arguments.load_best_model_at_end, False
            # TRL sets the old names, of which transformers would warn for every config
            for end in ("", "_kwargs"):
                new, old = (name + end for name in NAMES)
                if getattr(self, new, old) is None:
                    setattr(self, new, getattr(self, old, None))
            with naming_backend(self):
                super().__post_init__()
            arguments.load_best_model_at_end = keeps_best
            for kind in _KINDS:
                self.terms(kind)  # now, rather than after the model was loaded

    @property
    def method(self) -> Method | None:
        """The method whose config this is, unless the terms are not the method's."""
        row = None if self._method_id is None else get_method(self._method_id)
        if row is None or any(names_of(getattr(row, kind)) != self.term_names(kind) for kind in _KINDS):
            return None
        # the papers' own methods are weights and margins, for any loss; a baseline is its loss
        return None if row.baseline and self.differs_from(row) else row

    def differs_from(self, row: Method) -> list[str]:
        """The fields that make another reward or loss of a method's, whatever its numbers are."""
        found = [name for name, value in self._objective_fields(row).items() if getattr(self, name) != value]
        switches = {name: (is_on(getattr(self, name, None)), is_on(row.defaults.get(name))) for name in SWITCHES}
        # a target margin or a smoothing of 0 is a value like others
        return found + [
            name for name, (mine, its) in switches.items() if mine != its and not (its and name in _MAY_BE_0)
        ]

    def missing_term(self, method: Method) -> tuple[str, str] | None:
        """Kind and name of the first term of a method that is not named: then this is not its objective."""
        wanted = [(kind, name) for kind in _KINDS for name in names_of(getattr(method, kind))]
        return next(((kind, name) for kind, name in wanted if name not in self.term_names(kind)), None)

    def term_names(self, kind: str) -> tuple[str, ...]:
        """The weights or margins that are named."""
        return names_of(getattr(self, kind))

    def terms(self, kind: str) -> tuple[Term, ...]:
        """The weights or margins that the fields describe."""
        classes = self._term_classes(kind)
        for term in classes:
            if kind == "margin" and term.takes_target() and getattr(self, "simpo_gamma", None) is None:
                raise ValueError(
                    f"margin {term.name!r} builds on a target margin: give gamma_beta_ratio or simpo_gamma"
                )
        return tuple(built(term, kind, self) for term in classes)

    def term_options(self, kind: str) -> list[str]:
        """The fields that belong to the weights or margins that are named."""
        return [name for term in self._term_classes(kind) for name in self._options_of(term, kind)]

    def _options_of(self, term: type[Term], kind: str) -> list[str]:
        """The fields of a term: those of its arguments and, for the package's own, all with its prefix."""
        if not term.__module__.startswith(__name__.partition(".")[0] + "."):
            return [*(name for name in option_fields(term, kind).values() if name in OPTIONS), *term.further_options]
        registered = OPTIONS.keys() - option_fields(term, kind).values()  # by others
        others = {*registered, *TRL_FIELDS}
        own = [item.name for item in fields(self) if item.name.startswith(term.option_prefix)]
        return [*(name for name in own if name not in others), *term.further_options]

    def _term_classes(self, kind: str) -> list[type[Term]]:
        return [term_class(kind, name) for name in self.term_names(kind)]

    @property
    def _builds_on_target(self) -> bool:
        return any(term.takes_target() for term in self._term_classes("margin"))

    @property
    def _replaces_target(self) -> bool:
        """Whether the margins are whole without the target margin."""
        return not self._builds_on_target and any(term.holds_target for term in self._term_classes("margin"))

    def _resolve_target_margin(self) -> None:
        """Checks the target margin, for the bases' configs: this class alone has none."""


@dataclass
class MarginCPOConfig(MarginOptions, CPOConfig):
    """TRL's `CPOConfig` with the fields of the objective; without them, the same defaults."""

    _base = "cpo"

    loss_type: str = field(
        default="sigmoid",
        metadata={
            "help": f"Type of loss: {', '.join(LINKS['cpo'])}, or a registered one. 'alphapo' is 'simpo' with "
            "cpo_alpha 0."
        },
    )
    logging_nan_inf_filter: bool | None = field(default=None, metadata=_NAN_FILTER)  # type: ignore[assignment]
    simpo_gamma: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": f"Target margin γ in reward units, for loss_type='simpo'. Defaults to TRL's {SIMPO_GAMMA}, or to "
            "`gamma_beta_ratio` · β."
        },
    )
    reward: str | None = field(
        default=None,
        metadata={
            "help": "Implicit reward: 'length-normalized', 'sum', 'log-odds', 'alphapo-token' or a registered one. By "
            "default that of the loss: 'length-normalized' with loss_type 'simpo', 'ipo', 'robust_simpo', 'rrhf' and "
            "'simper', 'log-odds' with 'orpo', 'sum' otherwise. `alpha` shapes the first, the second and the last as "
            "AlphaPO does: 'alphapo-token' token by token."
        },
    )
    tokenization: str = field(
        default="chat-template",
        metadata={
            "help": "'chat-template': the tokens of the chat template, as TRL's DPOTrainer has them; a completion "
            "begins where prompt, prompt + chosen and prompt + rejected part. 'cpo': those of CPOTrainer, for runs "
            "that go on from old ones.",
            "choices": ["chat-template", "cpo"],
        },
    )

    @classmethod
    def _objective_fields(cls, row: Method) -> dict[str, Any]:
        loss = row.loss or "simpo"
        found = {"loss_type": loss, "cpo_alpha": row.sft}
        return found if row.reward == usual_reward("cpo", loss) else {**found, "reward": row.reward}

    def _resolve_target_margin(self) -> None:
        if not isinstance(self.loss_type, str):
            raise TypeError(
                f"loss_type is {self.loss_type!r}: CPOTrainer has one loss, and DPOTrainer may sum several"
            )
        link, is_trls = find_loss("cpo", self.loss_type), self.loss_type in TRLS["cpo"]
        is_simpo = self.loss_type in ("simpo", "alphapo")
        rewards = [] if self.reward is None else [reward_class(self.reward)]
        refuse_reference([*rewards, *self._term_classes("weight"), *self._term_classes("margin")])
        has_target = is_simpo or (link.takes_margin and not is_trls)
        given = (self.gamma_beta_ratio, self._default_gamma_beta_ratio, self.simpo_gamma)
        if has_target and all(value is None for value in given):
            self.simpo_gamma = SIMPO_GAMMA if is_simpo and not self._replaces_target else 0.0
        # with TRL's other losses its simpo_gamma says nothing: there a ratio that was given is a margin
        if has_target or self._builds_on_target or (link.takes_margin and self.gamma_beta_ratio is not None):
            resolve_target_margin(self, self._default_gamma_beta_ratio)
        elif self.gamma_beta_ratio is not None:
            raise ValueError(
                f"gamma_beta_ratio is a target margin, which loss_type={self.loss_type!r} does not have: leave it out"
            )
        elif self.simpo_gamma is None:
            self.simpo_gamma = SIMPO_GAMMA  # as TRL has it; no other loss reads it


@dataclass
class MarginDPOConfig(MarginOptions, DPOConfig):
    """TRL's `DPOConfig` with the fields of the objective; without them, the same defaults."""

    _base = "dpo"

    logging_nan_inf_filter: bool | None = field(default=None, metadata=_NAN_FILTER)  # type: ignore[assignment]
    reward: str = field(
        default="log-ratio",
        metadata={
            "help": "Implicit reward: 'log-ratio' to the reference model (DPO), or 'mean-log-ratio', the same per "
            "token (γ-DPO); or 'length-normalized' (SimPO), 'sum' (CPO) or 'alphapo-token', for which no reference "
            "model is loaded; or a registered one."
        },
    )
    alpha: float = field(
        default=0.0,
        metadata={
            "help": "AlphaPO's α, for the rewards 'length-normalized', 'sum' and 'alphapo-token': a score p becomes "
            "(1 - p^-α)/α. 0 is the logarithm."
        },
    )
    simpo_gamma: float | None = field(
        default=None,
        metadata={"help": "Target margin γ in reward units, subtracted from every reward gap. None without it."},
    )

    @classmethod
    def _objective_fields(cls, row: Method) -> dict[str, Any]:
        found: dict[str, Any] = {"reward": row.reward, "loss_type": [row.loss or "sigmoid"]}
        if row.sft:
            return {**found, "loss_type": [*found["loss_type"], "sft"], "loss_weights": [1.0, row.sft]}
        return found

    def __post_init__(self) -> None:
        if self.gamma_po_centered is None:
            self.gamma_po_centered = self.reward in (LogRatioReward.name, MeanLogRatioReward.name)
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        check_names("loss_type", self.loss_type)
        own = {item.name: item for item in fields(self)}
        if self.loss_weights == default_of(own["loss_weights"]) and self.loss_type != default_of(own["loss_type"]):
            self.loss_weights = None  # the method's, of its own losses
        if twice := sorted({name for name in self.loss_type if self.loss_type.count(name) > 1}):
            raise ValueError(
                f"loss_type names {twice} more than once: name each once, with the sum of its loss_weights"
            )
        super().__post_init__()

    def _resolve_target_margin(self) -> None:
        links = [find_loss("dpo", name) for name in self.loss_type]
        reward_class(self.reward)
        reads_target = self._builds_on_target or any(link.takes_margin for link in links)
        resolve_target_margin(self, self._default_gamma_beta_ratio if reads_target else None)


def is_on(value: Any) -> bool:
    return value not in (None, 0, False, "reverse_kl")


def _one_or_list(named: str | Sequence[str] | None) -> str | list[str] | None:
    names = names_of(named)
    return list(names) if len(names) > 1 else next(iter(names), None)


def _read_mappings(config: MarginOptions) -> None:
    """Leaves no number or bool as text in a mapping, also of one that a flag gives as JSON, and no older name."""
    for name, value in list(vars(config).items()):
        if isinstance(value, str) and value.startswith("{") and name in getattr(config, "_VALID_DICT_FIELDS", ()):
            with suppress(ValueError):  # transformers says so
                value = json.loads(value)
        if isinstance(value, dict):
            value = values_of(value)
            if name == "model_init_kwargs" and "torch_dtype" in value:  # an older name, which TRL passes over
                older = {"dtype": value.pop("torch_dtype")}
                value = value if older["dtype"] is None else older | value
            setattr(config, name, value)


def _check_terms(config: MarginOptions, kind: str) -> None:
    """Leaves one name, a list of several, or None."""
    value = getattr(config, kind)
    if value is not None and not isinstance(value, str):
        check_names(kind, value)
    names = () if value in ("none", ["none"]) else names_of(value)
    for name in names:
        term_class(kind, name)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{kind} names {twice[0]!r} more than once")
    setattr(config, kind, _one_or_list(names))


def _warn_of_unread(config: MarginOptions) -> None:
    """Names the options of terms that were not chosen, where they are not what they are by default."""
    read = {name for kind in _KINDS for name in config.term_options(kind)}
    if any(FACTOR in term.columns for kind in _KINDS for term in config._term_classes(kind)):
        read.update(OF_FACTOR)
        if config.gap_aware_encoder is not None and config.gap_aware_metric not in BERTSCORE_METRICS:
            logger.warning(
                "no effect of gap_aware_encoder: it is for BERTScore (gap_aware_metric bertscore_f1), and "
                "gap_aware_metric is %s",
                config.gap_aware_metric,
            )
    declared = {item.name: item for item in fields(config)}
    if (alpha := getattr(config, "alpha", 0.0)) and (own := own_alpha(config._term_classes("margin"))):
        logger.warning("alpha=%g is AlphaPO's, for the reward; that of margin=%r is %s", alpha, config.margin, own)
    links, named = _links_with_options(), names_of(getattr(config, "loss_type", ()))
    for name, link in links.items():
        unread = [option for option, default in link.options if getattr(config, option, default) != default]
        if unread and name not in named:
            logger.warning("no effect of %s: for loss_type=%r, and this is %r", ", ".join(unread), name, named)
    for kind, table in {"weight": WEIGHTS, "margin": MARGINS}.items():
        for name, term in table.items():
            unread = [
                option
                for option in config._options_of(term, kind)
                if option not in (*read, *_READ_ELSEWHERE) and getattr(config, option) != default_of(declared[option])
            ]
            if unread:
                here = getattr(config, kind) or "none"
                logger.warning("no effect of %s: for %s=%r, and this is %r", ", ".join(unread), kind, name, here)


def _links_with_options() -> dict[str, Link]:
    return {name: link for table in LINKS.values() for name, link in table.items() if link.options}


# Config classes by method and base, and with the options of registered terms

_SPELLED = str.maketrans({"α": "Alpha", "β": "Beta", "γ": "Gamma"})  # in the names of classes
ConfigClass = type[MarginCPOConfig] | type[MarginDPOConfig]
_CONFIGS: dict[tuple[str | None, str], type[Any]] = {
    (None, "cpo"): MarginCPOConfig,
    (None, "dpo"): MarginDPOConfig,
}
_EXTENDED: dict[tuple[type, tuple[str, ...]], type[Any]] = {}
RESERVED.update(MarginCPOConfig.__dataclass_fields__, MarginDPOConfig.__dataclass_fields__)


def config_class(method_id: str | None, base: str | None = None) -> ConfigClass:
    """The config of a method on a base ("cpo" or "dpo"), by default the method's own; without a method, the base's.

    It has the options of all registered terms and rewards among its fields.

    Raises:
        ValueError: unknown method or base, or a base that cannot carry the method.
    """
    load_plugins()
    base = base_of(method_id, base)
    method = None if method_id is None else get_method(method_id)
    if method is not None and (method_id, base) not in _CONFIGS:
        name = "".join(filter(str.isalnum, method.name.translate(_SPELLED)))
        name += "Config" if base == "cpo" else "DPOConfig"
        body = {
            "__module__": __name__,
            "__doc__": f"{method.name} on TRL's {base.upper()}Trainer.",
            "_origin": (method_id, base),
        }
        dataclass(
            new_class(
                name, (with_options(_CONFIGS[None, base]),), {"method": method_id}, lambda space: space.update(body)
            )
        )
    return with_options(_CONFIGS[method_id, base])


def with_options(cls: type[Any]) -> type[Any]:
    """A config class with a field for each option of the terms and rewards that are registered by now.

    Raises:
        ValueError: an option has the name of another field.
    """
    for name in OPTIONS:
        if name in MarginCPOConfig.__dataclass_fields__ or name in MarginDPOConfig.__dataclass_fields__:
            raise ValueError(
                f"the option {name!r} of a registered term is another field already: change its option_prefix"
            )
    added = tuple(name for name in OPTIONS if name not in cls.__dataclass_fields__)
    if not added:
        return cls
    if (cls, added) not in _EXTENDED:
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_origin": cls}
        _EXTENDED[cls, added] = make_dataclass(
            cls.__name__, [(name, *OPTIONS[name]) for name in added], bases=(cls,), namespace=body
        )
    return _EXTENDED[cls, added]


def origin_of(cls: type[Any]) -> Any:
    """The class that a config class was extended from, or the (method, base) that `config_class` made it for."""
    origin = vars(cls).get("_origin", cls)
    return origin if origin is cls or isinstance(origin, tuple) else origin_of(origin)


def _blank(origin: Any) -> Any:
    load_plugins()  # in a process that only unpickles, their options are not known yet
    cls = config_class(*origin) if isinstance(origin, tuple) else with_options(origin)
    return object.__new__(cls)


# One for each method and base


@dataclass
class GapPOConfig(MarginCPOConfig, method="gappo"):
    """GapPO on `CPOTrainer`: SimPO's loss, each pair weighted by its score gap, with the paper's settings."""


@dataclass
class GapPODPOConfig(MarginDPOConfig, method="gappo"):
    """GapPO on `DPOTrainer`: the same loss; no reference model is loaded."""


@dataclass
class GapAwarePOConfig(MarginCPOConfig, method="gap-aware"):
    """GaPO on `CPOTrainer`: SimPO's loss, with a margin that grows as a pair's completions become less similar."""


@dataclass
class GapAwarePODPOConfig(MarginDPOConfig, method="gap-aware"):
    """GaPO on `DPOTrainer`: the same loss; with `reward="log-ratio"` DPO's."""


@dataclass
class GammaPOConfig(MarginCPOConfig, method="gamma-po"):
    """γ-SimPO on `CPOTrainer`: the target margin is split over the pairs by how well the model separates them."""


@dataclass
class GammaPODPOConfig(MarginDPOConfig, method="gamma-po"):
    """γ-SimPO on `DPOTrainer`; with `reward="log-ratio"` γ-DPO."""


@dataclass
class AMaPOConfig(MarginCPOConfig, method="amapo"):
    """AMaPO on `CPOTrainer`: a margin for pairs that rank below the batch's mean."""


@dataclass
class AMaPODPOConfig(MarginDPOConfig, method="amapo"):
    """AMaPO on `DPOTrainer`: the same loss; with `reward="log-ratio"` DPO's."""


@dataclass
class GeometricAnchorPOConfig(MarginCPOConfig, method="geometric-anchor"):
    """GAPO on `CPOTrainer`: a pair counts less the further its gap falls at a nearby, worse policy."""


@dataclass
class GeometricAnchorPODPOConfig(MarginDPOConfig, method="geometric-anchor"):
    """GAPO on `DPOTrainer`: the same loss; with `reward="log-ratio"` the anchor gap is that of the log-ratios."""


@dataclass
class GradientNormPOConfig(MarginCPOConfig, method="gradient-norm"):
    """GAPO's control on `CPOTrainer`: the pair's gradient norm in place of the anchor gap."""


@dataclass
class GradientNormPODPOConfig(MarginDPOConfig, method="gradient-norm"):
    """GAPO's control on `DPOTrainer`: the same loss."""


@dataclass
class SharpnessAwarePOConfig(MarginCPOConfig, method="simpo-sam"):
    """SimPO with sharpness-aware minimisation on `CPOTrainer`."""


@dataclass
class SharpnessAwarePODPOConfig(MarginDPOConfig, method="simpo-sam"):
    """SimPO with sharpness-aware minimisation on `DPOTrainer`."""
