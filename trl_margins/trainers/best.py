"""The best checkpoint: by what it is chosen, that it is saved when it wins, and whose numbers the model's are."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from ..checks import unknown
from ..evaluation.tables import RANKING
from ..objective import Objective
from ..recording.metrics import STATISTICS
from ..report.card import SetFacts
from ..terms import Term
from .base import MarginTrainer
from .folder import settings_before
from .whole import fault_of

logger = logging.getLogger(__name__)

_OF_SCORES = ("pwa", "spearman", "n_pairs_gap")
# what evaluations log, by group
_LOGGED = {
    "": ("loss", *RANKING, "aux_loss"),
    "rewards": ("accuracies", "margins", "chosen", "rejected"),
    "logps": ("chosen", "rejected"),
    "logits": ("chosen", "rejected"),
}
_OF_BASE = {"cpo": ("nll_loss",), "dpo": ("entropy", "mean_token_accuracy", "num_tokens")}
_OF_A_CHOICE = ("greater_is_better", "eval_min_score_gap")
_NO_SET = ("nll_loss", "aux_loss")  # not the loss of a set called "nll"
_OF_TRANSFORMERS = ("runtime", "samples_per_second", "steps_per_second")


def check_metric(config: Any, objective: Objective) -> None:
    """Of a config whose trainer has no metrics but those that trainers log.

    Raises:
        ValueError: no evaluation will have `metric_for_best_model`.
    """
    wanted = config.metric_for_best_model
    if wanted is None or config.eval_strategy == IntervalStrategy.NO:
        return
    logged = _logged(config, objective)
    if not _is_in(logged, wanted.removeprefix("eval_")):
        known = [f"{of}/{each}" if of else each for of, names in logged.items() for each in names]
        raise unknown("metric_for_best_model", wanted, [f"eval_{each}" for each in known])


def _logged(config: Any, objective: Objective) -> dict[str, tuple[str, ...]]:
    """What evaluations log, by group, beside what transformers does."""
    drops = any(type(term).keeps is not Term.keeps for term in objective.margins)  # pairs, which is a weight
    of_terms = ["weights"] * drops
    for kind, terms in (("weights", objective.weights), ("target_margins", objective.margins)):
        of_terms += [kind] * bool(terms) + [f"{kind}/{term.name}" for term in terms if len(terms) > 1]
    return {**_LOGGED, "": (*_LOGGED[""], *_OF_BASE[config._base]), **dict.fromkeys(of_terms, STATISTICS)}


def _is_in(logged: Mapping[str, Sequence[str]], name: str) -> bool:
    group, _, last = name.rpartition("/")
    return last in logged.get(group, ()) or name in _OF_TRANSFORMERS


def choose_metric(
    config: Any, objective: Objective, facts: Mapping[str, SetFacts], min_score_gap: float, has_own_metrics: bool
) -> None:
    """Sees to it, before training, that the evaluations will have `metric_for_best_model`.

    Of several sets, a metric without a set's name is that of the first. `pwa` of a set in which no pair counts becomes
    `pwa_all`.

    Args:
        config: the trainer's.
        objective: its terms.
        facts: of each evaluation set, by its name; that of a single one is "".
        min_score_gap: τ of `pwa`.
        has_own_metrics: whether a user's code may add metrics, of any name.

    Raises:
        ValueError: the metric names a set that does not exist, or needs scores that the set does not have.
    """
    if config.metric_for_best_model is None or not facts:
        return
    wanted = _key(config)
    names = ("loss", *RANKING)
    prefixes = {of_set: f"eval_{of_set}_" if of_set else "eval_" for of_set in facts}
    metrics = {f"{prefix}{name}": (of_set, name) for of_set, prefix in prefixes.items() for name in names}
    plain = wanted.removeprefix("eval_")
    is_of_batches = "/" in plain or plain in (*_NO_SET, *_OF_BASE[config._base])
    names_no_set = not wanted.startswith(tuple(prefixes.values()))
    if wanted not in metrics and (plain in names or (is_of_batches and names_no_set)):
        counted = (of_set for of_set, each in facts.items() if plain not in _OF_SCORES or each.clear != 0)
        wanted = config.metric_for_best_model = f"eval_{next(counted, next(iter(facts)))}_{plain}"
        logger.info("several evaluation sets: the best checkpoint is that of %s", wanted)
    if wanted not in metrics:
        of_set = max((each for each in prefixes.values() if wanted.startswith(each)), key=len, default="eval_")
        name = wanted.removeprefix(of_set)
        scored = any(each.score_columns for name, each in facts.items() if prefixes[name] == of_set)
        logged = _logged(config, objective if scored else objective.without_scores)
        if not (has_own_metrics or config.eval_strategy == IntervalStrategy.NO or _is_in(logged, name)):
            group = name.rpartition("/")[0]
            near = [f"{of_set}{group}/{each}" for each in logged.get(group, ())] if group else metrics
            raise ValueError(
                f"metric_for_best_model={config.metric_for_best_model!r}: no evaluation will have it. These are among "
                f"those that there will be: {', '.join(near or metrics)}"
            )
        return
    of_set, name = metrics[wanted]
    where = f"the evaluation set {of_set!r}" if of_set else "the evaluation set"
    if name == "pwa" and facts[of_set].clear == 0:
        _count_all_pairs(config, wanted, f"{where} has no pair for {wanted}", min_score_gap)
    elif name in _OF_SCORES and not facts[of_set].score_columns:
        raise ValueError(
            f"metric_for_best_model={config.metric_for_best_model!r}: {where} has no scores. Name their columns with "
            f"score_columns (--score_columns CHOSEN REJECTED), or choose by {wanted.removesuffix(name)}pwa_all"
        )


def _count_all_pairs(config: Any, wanted: str, why: str, min_score_gap: float) -> None:
    config.metric_for_best_model = f"{wanted}_all"
    logger.warning(
        "%s, which counts those with a score gap of at least eval_min_score_gap=%g: the best checkpoint is chosen by "
        "%s_all",
        *(why, min_score_gap, wanted),
    )


def _key(config: Any) -> str:
    """`metric_for_best_model` as evaluations spell it."""
    return f"eval_{config.metric_for_best_model.removeprefix('eval_')}"


def _evaluations(state: Any) -> list[dict[str, Any]]:
    return [each for each in state.log_history if any(key.startswith("eval_") for key in each)]


def _is_delayed_past_the_end(args: Any, state: Any) -> bool:
    """Whether no evaluation is due in the whole run: by steps, transformers evaluates the last one otherwise."""
    lengths = {IntervalStrategy.STEPS: state.max_steps, IntervalStrategy.EPOCH: state.num_train_epochs}
    return not args.eval_on_start and args.eval_delay > lengths.get(args.eval_strategy, float("inf"))


def _evaluated_at(state: Any, step: int) -> dict[str, Any]:
    """What the evaluation at a step has logged; empty if there was none."""
    entries = [each for each in _evaluations(state) if each.get("step") == step]
    return {key: value for each in entries for key, value in each.items()}


class BestMixin(MarginTrainer):
    """Saves each evaluation that is the best so far, and knows which model is left after training."""

    @property
    def loaded_step(self) -> int | None:
        """The step whose checkpoint was loaded at the end of training; None where the model is the last step's."""
        state = self.state
        loaded = self.args.load_best_model_at_end and state.best_model_checkpoint and not self.is_in_train
        return state.best_global_step if loaded else None

    @property
    def loaded_metrics(self) -> dict[str, Any]:
        """What was measured of the model during training, at its `step`; empty if nothing was."""
        return _evaluated_at(self.state, self.state.global_step if self.loaded_step is None else self.loaded_step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's. After training, the numbers of the checkpoint that was loaded are logged at its step."""
        state, step = self.state, self.loaded_step
        if step is None:
            return super().evaluate(*args, **kwargs)
        last = state.global_step, state.epoch
        state.global_step, state.epoch = step, self.loaded_metrics.get("epoch", state.epoch)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            state.global_step, state.epoch = last

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """transformers'. What wins is saved now, whenever else checkpoints are saved."""
        if self.args.eval_strategy == IntervalStrategy.NO:  # `EvaluateLast` alone: there is nothing to choose from
            return False
        if self.args.metric_for_best_model is None:
            return super()._determine_best_metric(metrics, trial)
        wanted = _key(self.args)
        if not isinstance(metrics, Mapping):
            name = type(self).__name__
            raise TypeError(f"{name}.evaluate() returned {metrics!r:.80}: return the metrics, a dict")
        if wanted not in metrics and wanted.endswith(RANKING):  # undefined, as of NaN rewards
            logger.warning("the evaluation at step %d has no %s, so it cannot win", self.state.global_step, wanted)
            return False
        value = metrics.get(wanted, 0.0)
        try:
            is_nan = math.isnan(value)
        except TypeError:
            raise TypeError(
                f"metric_for_best_model={wanted!r} is {value!r}, and no number, so none can be better: choose another"
            ) from None
        if wanted in metrics and wanted not in _evaluated_at(self.state, self.state.global_step):
            # of an evaluate() or a callback of one's own, which has not logged it; a resumed run looks for it
            at = {"epoch": self.state.epoch, "step": self.state.global_step}
            self.state.log_history.append({wanted: float(value), **at})
        if is_nan:
            logger.warning("%s of the evaluation at step %d is NaN, so it cannot win", wanted, self.state.global_step)
            return False
        wins = super()._determine_best_metric(metrics, trial)
        if wins and self.args.load_best_model_at_end:
            self.control.should_save = True
        return wins

    def _without_clear_pairs(self, prefix: str, ranking: Mapping[str, Any]) -> None:
        """Chooses by all pairs where the first evaluation shows that none counts, as in a stream."""
        config = self.args
        is_first = self.is_in_train and config.metric_for_best_model is not None and self.state.best_metric is None
        if is_first and _key(config) == f"{prefix}_pwa" and ranking["n_pairs"] and not ranking.get("n_pairs_gap"):
            why = f"the evaluation had no pair for {prefix}_pwa"
            _count_all_pairs(config, f"{prefix}_pwa", why, self.options.eval_min_score_gap)


class BestSoFar(TrainerCallback):
    """A resumed run goes on from its best checkpoint, if that was chosen by the same metric of the same pairs and is
    still there.

    Warns where there is no evaluation to choose by.
    """

    def __init__(self, trainer: MarginTrainer) -> None:
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and not self.trainer.is_interrupted and not _evaluations(state):
            logger.warning(
                "training ended at step %d without an evaluation: the model is that of the last step, not the best",
                state.global_step,
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.best_global_step
        if not args.load_best_model_at_end:
            return
        if not _evaluations(state) and _is_delayed_past_the_end(args, state):
            logger.warning(
                "eval_delay=%g is past the end of training: no evaluation will happen before it ends, and the model "
                "will be that of the last step, not the best. Set eval_delay lower",
                args.eval_delay,
            )
        if not step:
            return
        metrics, key, name = _evaluated_at(state, step), _key(args), f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if key.endswith("_pwa") and key not in metrics and f"{key}_all" in metrics:
            args.metric_for_best_model = key = f"{key}_all"  # as that run found at its first evaluation
        # first in the run's own folder: it may be a copy
        places = [Path(args.output_dir, name), Path(state.best_model_checkpoint or name)]
        faults = {place: fault_of(place) for place in places if place.name == name and place.is_dir()}
        found = next((str(place) for place, fault in faults.items() if fault is None), None)
        why: str | None = "is gone" if not faults else f"is incomplete ({next(iter(faults.values()))})"
        if found:
            chosen = metrics.get(key) == state.best_metric
            why = self._chosen_otherwise(key) if chosen else f"was not chosen by {key}"
        found, why = broadcast_object_list([found, why])  # all ranks must agree on what wins
        if why is None:
            state.best_model_checkpoint = found
            return
        logger.warning(
            "the best checkpoint so far, of step %d, %s: the best will be that of the evaluations to come",
            *(step, why),
        )
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _chosen_otherwise(self, key: str) -> str | None:
        """Why the numbers before the resume cannot be compared with those to come; None if they can."""
        before, now = settings_before(Path(self.trainer._loaded_from or "")), self.trainer.settings
        sets = [found.get("evaluation_sets", {}) for found in (before, now)]
        of_key = max((name for name in chain(*sets) if key.startswith(f"eval_{name}_")), key=len, default="")
        if "evaluation_sets" in before and sets[0].get(of_key) != sets[1].get(of_key):
            return "was chosen by other evaluation rows"
        options = before.get("config", {})
        names = [name for name in _OF_A_CHOICE if name in options and options[name] != now["config"][name]]
        return f"was chosen with {names[0]} {options[names[0]]}" if names else None


class OwnIntervals(TrainerCallback):
    """A resumed run logs, evaluates and saves as often as its config says; transformers goes by the checkpoint's."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class EvaluateLast(TrainerCallback):
    """Evaluates at the last step where nothing else does: later, trackers would open a second run for it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        by_steps = args.eval_strategy == IntervalStrategy.STEPS and not _evaluations(state)
        if state.global_step >= state.max_steps and (by_steps or args.eval_strategy == IntervalStrategy.NO):
            control.should_evaluate = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = args.eval_strategy == IntervalStrategy.EPOCH and state.global_step >= state.max_steps
        if is_last and not _evaluations(state):
            control.should_evaluate = True
