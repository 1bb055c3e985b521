"""What `trl-margins evaluate` measures of one model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..evaluation.listwise import best_and_worst
from ..evaluation.sets import EvaluationSet
from .cases import Target, margins_of
from .evaluate_options import RM_BENCH_LENGTH, EvaluateArguments
from .setup import MAX_LENGTH, adapter_of, base_of, find_model, load_config, load_model, load_tokenizer, trained_with

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..evaluation.scorer import CompletionLogps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How a model is measured, which is known before it is loaded."""

    model: str
    max_length: int  # of an encoder-decoder model the longest completion
    tokenization: str
    target: Target | None  # what the cases are of
    compares: bool  # with a reference model
    reference: str | None  # that model; None: the base of the adapter

    @classmethod
    def of(cls, args: EvaluateArguments, model: str, run: str, target: Target | None) -> Plan:
        """
        Args:
            args: the options.
            model: a folder or Hub id.
            run: the model whose training run says `max_length` and `tokenization`.
            target: what the cases are of.

        Raises:
            ValueError: no such model, or no reference model.
        """
        from ..trainers.fingerprints import moves_base

        config = load_config(model, trust_remote_code=args.trust_remote_code)
        option = "max_completion_length" if config.is_encoder_decoder else "max_length"
        tokenization = args.tokenization or trained_with(run, "tokenization") or "chat-template"
        length = args.max_length
        if length is None:
            limit = getattr(config.get_text_config(), "max_position_embeddings", None)
            length = trained_with(run, option) or limit or MAX_LENGTH
        reference = args.ref_model
        compares = args.reward == "log-ratio" or (target is not None and target.objective.needs_reference)
        adapter = adapter_of(model) if compares else {}
        if compares and reference is None and not adapter:
            if args.reward == "log-ratio":
                raise ValueError("reward 'log-ratio' needs --ref_model: the model that training started from")
            assert target is not None  # else there is nothing to compare
            reference = target.reference
            if reference is None:
                whose = args.cases if target.run is None else f"the training run of {target.run}"
                raise ValueError(
                    f"--cases {args.cases}: the margin of {whose} has a reference model in it: give --ref_model, the "
                    "model that training started from"
                )
        if args.reward == "log-ratio" and reference is None and moves_base(adapter.get("init_lora_weights")):
            reference = base_of(model)  # the model without its adapter is another one
        if reference is not None:
            find_model(reference)
        tokenization = "cpo" if config.is_encoder_decoder else tokenization
        return cls(model, length, tokenization, target, compares, reference)


@dataclass(frozen=True)
class MeasuredSet:
    """A set of N rows, and what a model says of the k completions of each."""

    of: EvaluationSet
    max_length: int
    scored: Sequence[CompletionLogps]
    rewards: Sequence[np.ndarray]  # [N] of [k], without β
    reference: Sequence[CompletionLogps] | None  # of the reference model, where one is read
    kls: Sequence[np.ndarray] | None  # [N] of [k] the drift, where it is asked for

    @property
    def lengths(self) -> list[np.ndarray]:
        """[N] of [k] tokens."""
        return [row.lengths for row in self.scored]

    @property
    def kept(self) -> list[int]:
        """The rows without those whose prompt alone fills the length, as in training."""
        return [i for i, lengths in enumerate(self.lengths) if lengths.any()]

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[M] rows of the pairs, [M, 2] which completion of each is the chosen one and which the rejected one, and [M]
        what each counts; of a list, `best_and_worst`. RM-Bench has no pairs.
        """
        kept = np.array(self.kept if self.of.kind != "rm-bench" else [], int)
        if self.of.kind == "listwise":
            scores = self.of.scores or []
            rows, sides, weights = best_and_worst([scores[i] for i in kept])
            return kept[rows], sides, weights
        return kept, np.tile([0, 1], (len(kept), 1)), np.ones(len(kept))

    @property
    def prompts(self) -> list[str]:
        """[M] of the pairs."""
        return [str(self.of.rows[i].prompt) for i in self.places[0]]

    def of_pairs(self, values: Sequence[Any]) -> np.ndarray:
        """[M, 2] the values of both sides, from [N] of [k]."""
        pairs = [np.asarray(values[i], float)[sides] for i, sides in zip(*self.places[:2], strict=True)]
        return np.array(pairs).reshape(-1, 2)

    def logps_of_pairs(self, reference: bool = False) -> np.ndarray:
        """[M, 2] summed log-probabilities of both sides, in nats."""
        return self.of_pairs([row.logps for row in (self.reference if reference else self.scored) or []])


class Measured(NamedTuple):
    """The numbers of one model."""

    plan: Plan
    sets: Sequence[MeasuredSet]
    reports: Mapping[str, Mapping[str, Any]]  # set → numbers


def measure(
    args: EvaluateArguments,
    plan: Plan,
    load_sets: Callable[[bool], Sequence[EvaluationSet]],
    accelerator: Accelerator,
) -> Measured | None:
    """Scores all sets with a model; None on all processes but the first.

    Args:
        args: the options.
        plan: of the model.
        load_sets: from whether the model has a chat template to the sets.
        accelerator: shares the work.

    Raises:
        ValueError: no pairs to draw or to count, another vocabulary, or rewards that are not finite.
    """
    from ..evaluation.drift import completion_kl
    from ..evaluation.scorer import completion_tokens, logps_of_tokens
    from ..evaluation.vocabularies import check_one_vocabulary, check_reference_vocabulary
    from ..rows.tokens import prepare_tokenizer

    def load(name: str) -> Any:
        return load_model(name, dtype=args.dtype, device_map=None, trust_remote_code=args.trust_remote_code)

    name = plan.model
    tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    sets = load_sets(tokenizer.chat_template is not None)
    for option, use in (("plot", "to draw"), ("cases", "to count cases of")):
        if (given := getattr(args, option)) and all(each.kind == "rm-bench" for each in sets):
            raise ValueError(f"--{option} {given}: RM-Bench has no pairs {use}: name a set of pairs or of lists, too")
    prepare_tokenizer(tokenizer, [each.name for each in sets if any(row.is_conversational for row in each.rows)])
    model, start = load(name), None
    if args.drift_from not in (None, name):
        start = load(args.drift_from)
        start_tokenizer = load_tokenizer(args.drift_from, trust_remote_code=args.trust_remote_code)
        check_one_vocabulary((name, args.drift_from), (tokenizer, start_tokenizer), (model, start))
    if plan.compares and plan.reference is not None:
        try:
            others = load_tokenizer(plan.reference, trust_remote_code=args.trust_remote_code)
        except ValueError:  # it reads the model's ids, and needs none
            logger.warning("%s has no tokenizer: is it one with the tokens of %s?", plan.reference, name)
        else:
            check_reference_vocabulary((name, plan.reference), (tokenizer, others))
    bench = RM_BENCH_LENGTH if args.max_length is None else args.max_length
    longest = {each.name: bench if each.kind == "rm-bench" else plan.max_length for each in sets}
    logger.info("max_length, in tokens: %s", longest)
    tokens = {
        each.name: completion_tokens(model, tokenizer, each.rows, longest[each.name], plan.tokenization, each.name)
        for each in sets
    }

    def score(model: Any, use_adapter: bool = True) -> dict[str, list[CompletionLogps]]:
        return {
            name: logps_of_tokens(model, rows, args.batch_size, accelerator, use_adapter, name)
            for name, rows in tokens.items()
        }

    scored = score(model)
    kls: dict[str, list[np.ndarray]] = {}
    if start is not None:
        for of_set, rows in tokens.items():
            kls[of_set] = completion_kl(model, start, rows, args.batch_size, accelerator, f"{of_set}, drift")
    elif args.drift_from is not None:  # from itself
        kls = {of_set: [np.zeros(len(row.ids)) for row in rows] for of_set, rows in tokens.items()}
    references: dict[str, list[CompletionLogps]] = {}
    if plan.compares:
        references = score(model, use_adapter=False) if plan.reference is None else score(load(plan.reference))
    if not accelerator.is_main_process:
        return None
    found = []
    for each in sets:
        policy, reference = scored[each.name], references.get(each.name)
        rewards = rewards_of(args.reward, policy, reference)
        check_finite(rewards, each.name)
        found.append(MeasuredSet(each, longest[each.name], policy, rewards, reference, kls.get(each.name)))
    return Measured(plan, found, {each.of.name: report_of(each, plan.target, args) for each in found})


def rewards_of(
    reward: str, scored: Sequence[CompletionLogps], reference: Sequence[CompletionLogps] | None = None
) -> list[np.ndarray]:
    """[N] of [k] rewards, without β, which does not change the ranking."""
    from torch import from_numpy

    from ..rewards import length_normalized, log_ratio

    if reward == "length-normalized":
        return [length_normalized(from_numpy(row.logps), from_numpy(row.lengths)).numpy() for row in scored]
    if reward == "log-ratio" and reference is not None:
        pairs = zip(scored, reference, strict=True)
        return [log_ratio(from_numpy(row.logps), from_numpy(ref.logps)).numpy() for row, ref in pairs]
    return [row.logps for row in scored]


def check_finite(rewards: Sequence[np.ndarray], name: str) -> None:
    """
    Raises:
        ValueError: a reward of the set is NaN or infinite; names the first such row.
    """
    if bad := [i for i, row in enumerate(rewards) if not np.isfinite(row).all()]:
        raise ValueError(
            f"{name}: the model gives NaN or infinite rewards in {len(bad)} of {len(rewards)} rows, first in row "
            f"{bad[0]}: look at its texts (with --batch_size 1, since a NaN spreads within a batch) and at the "
            "precision (--dtype float32), or drop the rows"
        )


def report_of(found: MeasuredSet, target: Target | None, args: EvaluateArguments) -> dict[str, Any]:
    """A set's numbers and its `kind`."""
    from ..evaluation.drift import drift_report
    from ..evaluation.listwise import listwise_report
    from ..evaluation.pairs import Pairs, pair_report
    from ..evaluation.rm_bench import rm_bench_report

    each = found.of
    if each.kind == "listwise":
        rewards, scores = ([values[i] for i in found.kept] for values in (found.rewards, each.scores or []))
        report = listwise_report(rewards, scores, args.bootstrap)
    elif each.kind == "rm-bench":
        chosen, rejected = np.split(np.stack(found.rewards), 2, axis=1)
        report = rm_bench_report(chosen, rejected, each.groups, args.bootstrap)
    else:
        columns = [found.rewards, found.lengths, *([] if each.scores is None else [each.scores])]
        subsets = np.array([each.groups[i] for i in found.places[0]]) if each.groups else None
        sides = (side for values in columns for side in found.of_pairs(values).T)
        pairs = Pairs(*sides)._replace(gap_only=each.gap_only, subsets=subsets)
        report = pair_report(pairs, found.prompts, args.eval_min_score_gap, args.bootstrap)
    more = cases_of(target, found, args.bootstrap) if target else {}
    intervals = {**report["intervals"], **more.get("intervals", {})}
    if found.kls is not None:
        prompts = [str(row.prompt) for row in each.rows]
        more["kl_drift"], interval = drift_report(found.kls, found.lengths, prompts, args.bootstrap)
        intervals["kl_drift"] = interval
    return {"kind": each.kind, **report, **more, "intervals": intervals}


def cases_of(target: Target, found: MeasuredSet, n_resamples: int) -> dict[str, Any]:
    """AMaPO's four cases of a set's pairs; empty where it has none."""
    from ..evaluation.cases import case_report, ranking_cases

    each = found.of
    if not found.places[0].size:
        if each.kind != "rm-bench":  # it never has any
            logger.warning("%s has no cases: it has no pair to count", each.name)
        return {}
    reference = None if found.reference is None else found.logps_of_pairs(reference=True)
    scores = None if each.scores is None else found.of_pairs(each.scores)
    gaps = margins_of(target.objective, found.logps_of_pairs(), found.of_pairs(found.lengths), reference, scores)
    if gaps is None:
        logger.warning("%s has no cases: the margin reads scores, and the set has none", each.name)
        return {}
    return case_report(ranking_cases(*gaps), found.prompts, n_resamples, found.places[2])
