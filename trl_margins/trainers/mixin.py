"""The one place that knows how TRL calls a trainer. The two bases add their forward pass and their reward."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import is_in_notebook
from trl.trainer.utils import get_config_model_id

from ..checks import default_of, names_a_column
from ..distributed import (
    check_alike,
    check_processes,
    counted_pairs,
    gather_over_ranks,
    keep_outputs_of_fsdp,
    warn_if_unsharded,
)
from ..forward.head import logits_will_do
from ..forward.shared_prompt import shared_token_logps
from ..forward.shared_rows import SharedRows, unpacked, width_step
from ..forward.standard import TokenLogps
from ..methods import Method
from ..objective import Objective, ObjectiveOutput, of_part
from ..pairs import CARRIED, IS_FLIPPED, ROW, SCORE_CHOSEN, SCORE_REJECTED, SCORES, SHARED, PairLogps
from ..probes import window_probes
from ..probes.scope import check_one_choice, train_only
from ..recording.metrics import MetricBuffer
from ..recording.pair_log import PAIRS_FILE, PairLog, RunFolder, flip_metrics
from ..rows import OpenedSet
from ..rows.tokenized import TokenColumns, finish_tokenized
from ..terms import Term
from .arguments import ReadOnce, bound, checked, settings_read
from .beginning import SaysWhatTrains
from .best import BestSoFar, OwnIntervals, choose_metric
from .card import CardMixin
from .checkpoints import CheckpointMixin
from .collator import PairCollator
from .configs import MarginOptions
from .evaluations import EvaluationMixin
from .finite import FiniteSteps, without_neighbours
from .folder import make_folder
from .interrupts import InterruptsMixin
from .learning import TakesSteps, warn_of_negative
from .loaded import whole_weights
from .model_checks import TokenLimits, check_one_device, refusing_what_cannot_write
from .objectives import objective_of
from .preparation import (
    TRAIN,
    PreparedSets,
    as_taken,
    check_later_scores,
    eval_split,
    opened_set,
    prepare_datasets,
    trained_pairs,
    with_checked_columns,
    with_trained,
    without_numbers,
)
from .progress import print_lines
from .prompt_sharing import PromptSharing
from .pushing import PushMixin
from .sampling import SamplingMixin
from .settings import config_options, options_of_every_rank, types_of
from .target_margin import check_target_margin
from .window import WindowMixin

logger = logging.getLogger(__name__)

# config fields that only an objective reads
_OF_THE_OBJECTIVE = ("beta", "loss_type", "loss_weights", "label_smoothing", "reward")


_OF_TRAINER = ("loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos", "num_tokens", "skipped_steps")


def _can_be_logged(name: Any) -> bool:
    """Whether a value can be logged by a name: the trainer logs no other by it, and a CSV file can have it."""
    is_ours = name in _OF_TRAINER or str(name).startswith(("train_", "eval_"))
    return isinstance(name, str) and names_a_column(name) and not is_ours


def _size_of(sets: Any) -> Any:
    """Of data sets, what all processes must agree on before they wait for each other."""
    if isinstance(sets, Mapping):
        return {name: _size_of(each) for name, each in sets.items()}
    return len(sets) if hasattr(sets, "__len__") else sets and type(sets).__name__


class MarginMixin(EvaluationMixin, CardMixin, PushMixin, InterruptsMixin, CheckpointMixin, SamplingMixin, WindowMixin):
    """Gives a TRL preference trainer a weight and a margin per pair. Comes before the TRL class in the bases.

    Args:
        *args, **kwargs: as the TRL trainer takes them. `args` may be TRL's own config: then there is no term.
        weight_term: a weight term from Python, or several; they take the place of those that the config names.
        margin_term: a margin term from Python, or several.
        objective: the whole objective from Python, instead of the config's.
    """

    _method: Method | None = None
    _pair_log: PairLog | None = None
    _logs: Sequence[PairLog] = ()  # it, and what the probes log
    _said_negative = False  # that there is a negative weight
    loads_reference = False  # from where the model is from
    _plain_head_will_do = True
    _takes_images = False
    is_built = False

    beta, loss_weights, label_smoothing, simpo_gamma = ReadOnce(), ReadOnce(), ReadOnce(), ReadOnce()
    loss_type, loss_types, f_divergence_type = ReadOnce(), ReadOnce("loss_type"), ReadOnce()
    cpo_alpha, max_length, truncation_mode = ReadOnce(), ReadOnce(), ReadOnce()
    neftune_noise_alpha, optimizer_cls_and_kwargs = ReadOnce(), ReadOnce("optimizers")

    def __init__(
        self,
        *args: Any,
        weight_term: Term | Sequence[Term] | None = None,
        margin_term: Term | Sequence[Term] | None = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        given = checked(bound(super().__init__, args, kwargs), self._config_class)
        config: Any = given.get("args") or self._default_config(given.get("model"))
        check_processes(config.world_size)
        make_folder(config)
        self.options = config if isinstance(config, MarginOptions) else MarginOptions()
        self._first_observed: list[str] | None = None
        self._check_method(config)
        check_target_margin(config)
        check_one_choice(self.options.train_only, has_adapter=given.get("peft_config") is not None)
        from_python = {"weight_term": weight_term, "margin_term": margin_term, "objective": objective}
        self.from_python = [name for name, value in from_python.items() if value is not None]
        if objective is not None:
            if not isinstance(objective, Objective):
                raise TypeError(f"objective is {objective!r:.80}: give an instance of trl_margins.Objective")
            self.objective = objective
            self._check_objective(config)
        else:
            self._check_terms(config)
            self.objective = objective_of(config, weight_term, margin_term)
        self._check_reference(config)
        self._take_names()
        self._buffers = {"train": MetricBuffer(), "eval": MetricBuffer()}
        self._evaluated: list[Tensor] = []
        self._prefix = "eval"  # of the metrics of the set that is evaluated
        sizes = {name: _size_of(given.get(name)) for name in ("train_dataset", "eval_dataset")}
        alike = {"base": self._config_class._base, **sizes, **options_of_every_rank(config_options(config))}
        alike.pop("output_dir", None)  # of a trainer that only measures, each process may have its own
        check_alike(PartialState(), alike)
        sets = prepare_datasets(
            given.get("train_dataset"),
            given.get("eval_dataset"),
            config,
            self.options,
            self.objective,
            given.get("processing_class"),
            self._takes_images,
        )
        self._own_columns, self.set_facts, self._opened = sets.columns, sets.facts, sets.opened
        self._trained, self._mark = sets.trained, sets.mark
        self._kind_of_rows = type(sets.train)
        with refusing_what_cannot_write(), whole_weights(given.get("model")):
            super().__init__(**self._trl_arguments({**given, "args": config}, sets))
        print_lines(self.callback_handler)
        if self.accelerator.device.type == "cpu":  # PyTorch ignores it there, and warns of it at every data loader
            self.args.dataloader_pin_memory = False
            if self.accelerator.mixed_precision == "fp16":
                logger.warning("no effect of fp16: on a CPU, accelerate has mixed precision in bfloat16 (bf16) alone")
        warn_if_unsharded(self.accelerator)
        keep_outputs_of_fsdp(self.accelerator)
        check_one_device(self.model)
        check_one_device(getattr(self, "ref_model", None), "the reference model")
        if self.options.train_only:
            train_only(self.model, self.options.train_only)
        if is_in_notebook():
            from .notebook import narrow_table  # needs IPython

            narrow_table(self)
        self.is_built, self._settings_read = True, settings_read(self.args)
        self._first_states = copy.deepcopy(self._term_states())
        self._first_types = types_of(self.model)
        self._first_attributes = self._attributes_without_state()
        self._wrap_collator()
        self._probes = window_probes(self, self.objective, self.options)
        self._finite = FiniteSteps(self, skip=self.options.nonfinite_steps == "skip")
        self.add_callback(self._finite)
        self.add_callback(TakesSteps())
        self.add_callback(BestSoFar(self))
        self.callback_handler.callbacks[:0] = [OwnIntervals(), SaysWhatTrains(self)]  # above the progress bar
        logs: list[PairLog] = []
        if self.options.log_pairs:
            log = PairLog(Path(self.args.output_dir, PAIRS_FILE))
            logs = [log, *(probe.log for probe in self._probes if probe.log is not None)]
            self._pair_log, self._logs = (None, ()) if self.runs_trl else (log, logs)
            if self.runs_trl:
                logger.info(
                    "share_prompt='never' without a term: TRL's own method computes the loss. It gives no values per "
                    "pair, so there is no %s",
                    PAIRS_FILE,
                )
        self.add_callback(RunFolder(logs, self.accelerator, lambda: self.settings))

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied, since its callbacks are of this one: make another, of a copy "
            "of the model"
        )

    @cached_property
    def _sharing(self) -> PromptSharing:
        return PromptSharing(self, self.options.share_prompt)

    def _wrap_collator(self) -> None:
        if isinstance(self.data_collator, PairCollator):
            return
        self.data_collator = PairCollator(
            self.data_collator,
            self.options.score_columns,
            strict="score_chosen" in self.objective.columns,
            columns=[name for name in self.objective.columns if name not in SCORES],
            if_there=[IS_FLIPPED, ROW],
            standard_rows=self.standard_rows() if self._sharing.possible else None,
            width_step=width_step(self.accelerator.device),
            limits=TokenLimits.of(self),
        )

    # What the two bases say

    @abstractmethod
    def _check_reference(self, config: Any) -> None:
        """Raises a ValueError where the base does not have the reference model that the objective reads, or where the
        config says something about one that is not read.
        """

    @abstractmethod
    def standard_logps(self, model: nn.Module, batch: Mapping[str, Any], fused: bool, **inputs: Any) -> TokenLogps:
        """`token_logps` with each prompt computed once per completion."""

    def token_logps(self, model: nn.Module, batch: Mapping[str, Any], shared: bool, fused: bool = True) -> TokenLogps:
        """Log-probabilities of the completion tokens.

        Args:
            model: the model, wrapped or not.
            batch: a collated batch on its device.
            shared: compute each prompt once for both completions.
            fused: whether TRL's fused LM head may be used, where the trainer uses it.
        """
        more = self.inputs_beside_tokens
        if not shared:
            return self.standard_logps(model, batch, fused and self._fused, **more)
        rows = unpacked(batch[SHARED])
        fused = fused and self._fuses(rows)
        return shared_token_logps(model, rows, fused, statistics=not self._plain_head_will_do, **more)

    @property
    def inputs_beside_tokens(self) -> dict[str, Any]:
        """What the model's forward takes for the auxiliary loss of a mixture of experts."""
        return {"output_router_logits": True} if self.aux_loss_enabled else {}

    def _fuses(self, rows: SharedRows) -> bool:
        """Whether the LM head is TRL's fused one: it saves memory, and costs a CPU more time than the logits do."""
        return self._fused and not (self._plain_head_will_do and logits_will_do(self.model, rows["label"]))

    @abstractmethod
    def _with_tokens(self, dataset: Any, split: str) -> Any:
        """A data set that the trainer was not built with, tokenized if it is not."""

    @abstractmethod
    def same_completions(self, batch: Mapping[str, Any]) -> Tensor:
        """[B] pairs whose two completions have the same tokens."""

    def is_plain_text(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch is token ids and nothing else that the model takes."""
        return True

    # One batch

    @property
    def runs_trl(self) -> bool:
        """Whether TRL's own method computes the training loss, from the first step to the last: `share_prompt` is
        'never', the objective is TRL's, no term is set, and nothing is measured before the step.
        """
        ours = self.objective.terms or self._probes or not self.objective.is_trls
        return self.options.share_prompt == "never" and not ours

    def pair_loss(
        self, model: nn.Module, batch: Mapping[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(1/B) Σ weight_i · link(gap_i − margin_i) plus TRL's own extra terms, and the metrics of the batch.

        Returns:
            The loss [], and device tensors by name: one value, or one per pair.
        """
        pairs = self.pair_logps(model, batch)
        if train_eval != "train":
            return self._evaluated_loss(without_neighbours(self, batch, pairs), batch, train_eval)
        loss, output = self._loss(pairs, batch, training=True)
        metrics = self._batch_metrics(pairs, output, batch, train_eval)
        self._finite.see(batch, pairs, output, loss)
        observed = self._observed(output, metrics)
        if output.gradient_scale is not None and self._pair_log is not None:
            self._pair_log.add(self.state.global_step + 1, self._pair_values(output, observed))
        return loss, metrics | observed

    def _evaluated_loss(
        self, pairs: PairLogps, batch: Mapping[str, Any], train_eval: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the pairs that count. A rank without any computes one, for what all ranks do together."""
        sizes = counted_pairs(self.accelerator, len(pairs.chosen))
        n = len(pairs.chosen) if sizes is None else sizes[self.accelerator.process_index]
        some, columns = pairs.first(max(n, 1)), batch.get(CARRIED, {})
        of_some = {**batch, CARRIED: {name: values[: max(n, 1)] for name, values in columns.items()}}
        loss, output = self._loss(some, of_some, training=False, evaluation=True, sizes=sizes)
        self._remember(pairs, columns, loss, self.same_completions(batch))
        found = self._batch_metrics(some, output, of_some, train_eval)
        # what is one value for the batch stays: TRL looks for it in each
        return loss, {
            f"eval_{name}": each[:n] if torch.is_tensor(each) and each.dim() else each for name, each in found.items()
        }

    def _loss(
        self,
        pairs: PairLogps,
        batch: Mapping[str, Any],
        training: bool,
        evaluation: bool = False,
        sizes: list[int] | None = None,
    ) -> tuple[Tensor, ObjectiveOutput]:
        gather, first = gather_over_ranks(self.accelerator, len(pairs.chosen), sizes)
        lacks_scores = SCORE_CHOSEN in self.objective.columns and SCORE_CHOSEN not in batch.get(CARRIED, {})
        objective = self.objective.without_scores if lacks_scores and not training else self.objective
        output = objective(pairs, batch.get(CARRIED), gather, first, training, evaluation)
        return output.losses.mean() + self._extra_loss(pairs), output

    def _extra_loss(self, pairs: PairLogps) -> Tensor | float:
        return 0.0

    def _batch_metrics(
        self, pairs: PairLogps, output: ObjectiveOutput, batch: Mapping[str, Any], train_eval: str
    ) -> dict[str, Tensor]:
        """TRL's names first, then ours."""
        metrics = {
            "rewards/chosen": output.chosen_reward,
            "rewards/rejected": output.rejected_reward,
            "rewards/accuracies": (output.chosen_reward > output.rejected_reward).float(),
            "rewards/margins": output.chosen_reward - output.rejected_reward,
            **pairs.token_stats,
        }
        for name, total, by_term in (
            ("weights", output.weight, output.weights),
            ("target_margins", output.margin, output.margins),
        ):
            if total is not None:
                metrics[name] = total
            if len(by_term) > 1:
                metrics |= {f"{name}/{term}": value for term, value in by_term.items()}
        return metrics

    def _observed(self, output: ObjectiveOutput, taken: Collection[str]) -> dict[str, Tensor]:
        """[B] values that the terms computed on their way.

        Raises:
            ValueError: a value of another shape, or under a name that is taken.
        """
        found: dict[str, Tensor] = {}
        for terms, values in ((self.objective.weights, output.weights), (self.objective.margins, output.margins)):
            for term in terms:
                what = f"observed of term {term.name!r}"
                with of_part(what, term):
                    seen = term.observed(output.view, values[term.name])
                if not isinstance(seen, Mapping):
                    raise TypeError(f"{what} returned a {type(seen).__name__}: return a dict, name → values")
                for name, value in seen.items():
                    if getattr(value, "shape", None) != output.chosen_reward.shape:
                        raise ValueError(
                            f"term {term.name!r} observes {name!r}, which must be a tensor of shape "
                            f"{tuple(output.chosen_reward.shape)}"
                        )
                    if name in (*found, *taken) or not _can_be_logged(name):
                        raise ValueError(
                            f"term {term.name!r} observes {name!r}: take a name that nothing else in the logs has, "
                            "without commas, quotation marks and line breaks, which does not begin with train_ or "
                            "eval_"
                        )
                    found[name] = value
        if self._first_observed is None:  # all ranks come here at their first mini-batch
            self._first_observed = [*found]
            check_alike(self.accelerator, {"what observed() of the terms gives": [*found]})
        elif [*found] != self._first_observed:
            raise ValueError(
                f"observed() of the terms gives {[*found]}, and gave {self._first_observed} before: return the same "
                "names, in the same order, for every mini-batch"
            )
        return found

    def _pair_values(self, output: ObjectiveOutput, observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[B] values of the pair log."""
        view = output.view
        gap, columns = output.chosen_reward - output.rejected_reward, view.columns
        values: dict[str, Any] = {
            "reward_gap": gap,
            "weight": torch.ones_like(gap) if output.weight is None else output.weight,
            "margin": torch.full_like(gap, self.objective.gamma) if output.margin is None else output.margin,
            "slope": output.gradient_scale,
            "logp_chosen": view.chosen_mean_logps,
            "logp_rejected": view.rejected_mean_logps,
            "length_chosen": view.chosen_length,
            "length_rejected": view.rejected_length,
        }
        if SCORE_CHOSEN in columns:
            values["score_gap"] = columns[SCORE_CHOSEN] - columns[SCORE_REJECTED]
        values |= {name: columns[name] for name in (IS_FLIPPED, ROW) if name in columns}
        for kind, by_term in (("weight", output.weights), ("margin", output.margins)):
            if len(by_term) > 1:
                values |= {f"{kind}_{name}": value for name, value in by_term.items()}
        for name, value in observed.items():
            if (column := name.replace("/", "_")) in values:
                raise ValueError(f"a term observes {name!r}: {PAIRS_FILE} has a column of that name, so take another")
            values[column] = value
        return values

    # Logging

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def store_metrics(self, metrics: Mapping[str, Tensor | float], train_eval: str = "train") -> None:
        """Caches a batch's metrics on the device until the next log."""
        self._buffers[train_eval].add(metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the means over everything since the last one on all ranks; an evaluation's have the name of
        the set.
        """
        metrics = self._drained_metrics()
        if self._mode == "eval":
            metrics = {f"{self._prefix}_{name.removeprefix('eval_')}": value for name, value in metrics.items()}
        if self.is_complete and "train_runtime" in logs:  # of a resumed run with no step left: nothing was trained
            return
        logs.update(metrics)
        if self._mode == "train":
            self._said_negative = self._said_negative or warn_of_negative(metrics)
        for log in self._logs:
            log.flush(self.accelerator)
            log.drain()
        if self._pair_log is not None:
            logs.update(flip_metrics(self._pair_log.drained, weighted=bool(self.objective.weights)))
        super().log(logs, start_time)

    def _drained_metrics(self) -> dict[str, float]:
        return self._buffers[self._mode].drain(self.accelerator)

    # Weights that are not finite are not saved, and not measured

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._finite.check_weights()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """TRL's.

        Raises:
            FloatingPointError: the last step of training has left NaN or infinity in the weights.
        """
        self._finite.check_weights(alone=True)
        super().save_model(output_dir, _internal_call)

    # Before training

    def _opened_set(self, dataset: Any, name: str) -> tuple[OpenedSet, bool]:
        """How a data set is read, and whether the trainer was built with it: later ones are looked at now.

        Args:
            dataset: the training set, an evaluation set, or one that comes later.
            name: TRL's for it.
        """
        split = eval_split(name)
        for known in (name, split):
            if known in self._opened:
                return replace(self._opened.pop(known), dataset=dataset), True
        takes = self.args, self.options, self.objective, self.processing_class, self._takes_images
        later = opened_set(dataset, split, *takes)
        later = replace(later, dataset=with_checked_columns(later.dataset, split, self.objective))
        scores = self._score_columns(later.dataset)
        check_later_scores(later.dataset, scores, split, self.objective, self.options)
        if scores:
            self._own_columns.update(scores.names)
        marks = trained_pairs(self._trained, later)
        found = with_trained(without_numbers(later.dataset, self.objective), self._mark, marks)
        return replace(later, dataset=found), False

    def _finish_tokens(
        self,
        dataset: Any,
        opened: OpenedSet,
        is_first: bool,
        columns: TokenColumns,
        processing_class: Any,
        **lengths: int | None,
    ) -> Any:
        """A tokenized set without the pairs that training drops, which the model card counts."""
        split = opened.reader.split
        looked_at = processing_class if is_first and split == TRAIN else None
        dataset, dropped = finish_tokenized(dataset, opened, columns, processing_class=looked_at, **lengths)
        if is_first and dropped is not None:
            self.set_facts[split] = replace(self.set_facts[split], dropped=dropped)
        return dataset

    def _default_config(self, model: Any) -> MarginOptions:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return self._config_class(output_dir=f"{name.split('/')[-1]}-{self._name}")

    def _check_method(self, config: Any) -> None:
        """A named trainer runs its method's terms, or says why it cannot."""
        if self._method is None:
            return
        if missing := self.options.missing_term(self._method):
            kind, name = missing
            here = ", ".join(map(repr, self.options.term_names(kind))) or None
            raise ValueError(
                f"{type(self).__name__} has {kind} {name!r}, but its {type(config).__name__} says {here}: give it a "
                f"{self._config_class.__name__}, or take Margin{self._config_class._base.upper()}Trainer for other "
                "terms"
            )

    def _check_terms(self, config: Any) -> None:
        for kind in ("weight", "margin"):
            named = getattr(config, kind, None)
            if f"{kind}_term" in self.from_python and named is not None and self._method is None:
                raise ValueError(
                    f"{kind}={named!r} and a {kind}_term: leave out one, or give {kind}_term several terms, in a list"
                )

    def _check_objective(self, config: Any) -> None:
        """An objective from Python is the whole of it."""
        others = [name for name in self.from_python if name != "objective"]
        others += [kind for kind in ("weight", "margin") if getattr(config, kind, None) is not None]
        if self._method is not None or others:
            what = f"{type(self).__name__}, whose objective is its method's" if self._method else " and ".join(others)
            raise ValueError(f"objective does not go with {what}: the objective has the weight and the margin already")
        defaults = {item.name: default_of(item) for item in fields(config)}
        unread = [name for name in _OF_THE_OBJECTIVE if getattr(config, name, None) != defaults.get(name)]
        # beside a loss, it may be SimPO's
        if "loss_type" not in unread and getattr(config, "gamma_beta_ratio", None) is not None:
            unread.append("gamma_beta_ratio")
        if unread:
            logger.warning("no effect of %s: the trainer was given an objective", ", ".join(unread))

    def _trl_arguments(self, given: Mapping[str, Any], sets: PreparedSets) -> dict[str, Any]:
        """The arguments of TRL's constructor."""
        config = given["args"]
        if sets.eval is not None:
            names = {name: eval_split(name) for name in sets.eval} if isinstance(sets.eval, dict) else {"": "eval"}
            facts = {name: sets.facts[split] for name, split in names.items()}
            has_own_metrics = self._adds_metrics(given)
            choose_metric(config, self.objective, facts, self.options.eval_min_score_gap, has_own_metrics)
        return {**given, "train_dataset": sets.train, "eval_dataset": sets.eval}

    def _adds_metrics(self, given: Mapping[str, Any]) -> bool:
        """Whether a user's code may: a function, a callback, or a trainer's own class."""
        of_users = [
            type(self),
            *(each if isinstance(each, type) else type(each) for each in given.get("callbacks") or ()),
        ]
        is_own = any(not each.__module__.startswith(("trl_margins.", "transformers.", "trl.")) for each in of_users)
        return is_own or given.get("compute_metrics") is not None

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's. Also one that is made before training is none of the user's."""
        self._made_schedule = self._made_schedule or self.lr_scheduler is None
        return super().create_scheduler(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; what its library says of options that it does not take has their names."""
        self._made_optimizer = self._made_optimizer or self.optimizer is None
        try:
            return super().create_optimizer(*args, **kwargs)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            given = {name: getattr(self.args, name) for name in ("optim", "optim_args", "optim_target_modules")}
            said = ", ".join(f"{name}={getattr(value, 'value', value)!r}" for name, value in given.items() if value)
            raise ValueError(f"the optimizer cannot be made of {said}: {error}") from error

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """TRL's; rows that have no tokens yet get them."""
        if not isinstance(test_dataset, Dataset | IterableDataset):
            as_taken(test_dataset, "test", self.args)
        return super().get_test_dataloader(self._with_tokens(test_dataset, "test"))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *sorted(self._own_columns)]))
