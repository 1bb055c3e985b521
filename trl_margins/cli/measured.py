"""What `trl-margins evaluate` measures of one model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..evaluation.listwise import best_and_worst
from ..evaluation.sets import EvaluationSet
from .cases import Target, margins_of
from .evaluate_options import RM_BENCH_LENGTH, EvaluateArguments
from .setup import MAX_LENGTH, find_model, load_config, load_model, load_tokenizer, trained_with

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..evaluation.scorer import CompletionLogps

logger = logging.getLogger(__name__)

Scored = Mapping[str, Sequence["CompletionLogps"]]  # set → one for each row


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
        config = load_config(model, trust_remote_code=args.trust_remote_code)
        option = "max_completion_length" if config.is_encoder_decoder else "max_length"
        tokenization = args.tokenization or trained_with(run, "tokenization") or "chat-template"
        length = args.max_length
        if length is None:
            limit = getattr(config.get_text_config(), "max_position_embeddings", None)
            length = trained_with(run, option) or limit or MAX_LENGTH
        reference = args.ref_model
        compares = args.reward == "log-ratio" or (target is not None and target.objective.needs_reference)
        if compares and reference is None and not (Path(find_model(model)) / "adapter_config.json").is_file():
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
        if reference is not None:
            find_model(reference)
        tokenization = "cpo" if config.is_encoder_decoder else tokenization
        return cls(model, length, tokenization, target, compares, reference)


@dataclass(frozen=True)
class Measured:
    """The numbers of one model."""

    plan: Plan
    sets: Sequence[EvaluationSet]
    scored: Scored
    rewards: Mapping[str, Sequence[np.ndarray]]  # set → [N] of [k], without β
    reports: Mapping[str, Mapping[str, Any]]  # set → numbers
    max_length: Mapping[str, int]  # by set

    def lines(self) -> Iterator[dict[str, Any]]:
        """The rewards and the lengths of each row."""
        for each in self.sets:
            found = zip(self.rewards[each.name], self.scored[each.name], strict=True)
            for i, (rewards, logps) in enumerate(found):
                yield {"set": each.name, "row": i, "rewards": rewards.tolist(), "lengths": logps.lengths.tolist()}

    def gaps_and_logps(self, per_token: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each set with pairs: [M] reward gaps, and [M] log-probabilities of the chosen completions."""
        found = {}
        for each in self.sets:
            scored = self.scored[each.name]
            pairs = PairPlaces.of(each, scored)
            if pairs.rows.size:
                rewards, logps, lengths = map(
                    pairs.take,
                    (self.rewards[each.name], [row.logps for row in scored], [row.lengths for row in scored]),
                )
                chosen = logps[:, 0] / lengths[:, 0].clip(1) if per_token else logps[:, 0]
                found[each.name] = rewards[:, 0] - rewards[:, 1], chosen
        return found


class PairPlaces(NamedTuple):
    """Where the pairs of a set are; of a list, its best against its worst completion."""

    rows: np.ndarray  # [M]
    sides: np.ndarray  # [M, 2] which completion of the row is the chosen one, and which the rejected one

    @classmethod
    def of(cls, each: EvaluationSet, scored: Sequence[CompletionLogps]) -> PairPlaces:
        """Without the pairs whose prompt alone fills the length, as in training. RM-Bench has none."""
        if each.kind == "listwise":
            return cls(*best_and_worst(each.scores or []))
        rows = [i for i, (_, lengths) in enumerate(scored) if each.kind == "pairs" and lengths.any()]
        return cls(np.array(rows, int), np.tile([0, 1], (len(rows), 1)))

    def take(self, values: Sequence[Any]) -> np.ndarray:
        """[M, 2] the values of both sides, from [N] of [k]."""
        pairs = [np.asarray(values[i], float)[sides] for i, sides in zip(self.rows, self.sides, strict=True)]
        return np.array(pairs).reshape(-1, 2)


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
    from ..evaluation.drift import check_one_vocabulary, completion_kl
    from ..evaluation.scorer import completion_tokens, logps_of_tokens
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
    bench = RM_BENCH_LENGTH if args.max_length is None else args.max_length
    longest = {each.name: bench if each.kind == "rm-bench" else plan.max_length for each in sets}
    logger.info("longest rows, in tokens: %s", longest)
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
    rewards = {name: rewards_of(args.reward, found, references.get(name)) for name, found in scored.items()}
    check_finite(rewards)
    reports = {}
    for each in sets:
        found = scored[each.name]
        report = report_of(each, rewards[each.name], found, args, kls.get(each.name))
        if plan.target is not None:
            cases = cases_of(plan.target, each, found, references.get(each.name), args.bootstrap)
            report |= {**cases, "intervals": {**report["intervals"], **cases.get("intervals", {})}}
        reports[each.name] = report
    return Measured(plan, sets, scored, rewards, reports, longest)


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


def check_finite(rewards: Mapping[str, Sequence[np.ndarray]]) -> None:
    """
    Raises:
        ValueError: a reward is NaN or infinite; names the first such row.
    """
    for name, rows in rewards.items():
        if bad := [i for i, row in enumerate(rows) if not np.isfinite(row).all()]:
            raise ValueError(
                f"{name}: the model gives NaN or infinite rewards in {len(bad)} of {len(rows)} rows, first in row "
                f"{bad[0]}: look at its texts (with --batch_size 1, since a NaN spreads within a batch) and at the "
                "precision (--dtype float32), or drop the rows"
            )


def report_of(
    each: EvaluationSet,
    rewards: Sequence[np.ndarray],
    scored: Sequence[CompletionLogps],
    args: EvaluateArguments,
    kls: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """A set's numbers and its `kind`."""
    from ..evaluation.drift import drift_report
    from ..evaluation.listwise import listwise_report
    from ..evaluation.pairs import Pairs, pair_report
    from ..evaluation.rm_bench import rm_bench_report

    if each.kind == "listwise":
        report = listwise_report(rewards, each.scores or [], args.bootstrap)
    elif each.kind == "rm-bench":
        chosen, rejected = np.split(np.stack(rewards), 2, axis=1)
        report = rm_bench_report(chosen, rejected, each.groups, args.bootstrap)
    else:
        places = PairPlaces.of(each, scored)
        columns = [*places.take(rewards).T, *places.take([row.lengths for row in scored]).T]
        if each.scores is not None:
            columns += [*places.take(each.scores).T]
        subsets = np.array([each.groups[i] for i in places.rows]) if each.groups else None
        pairs = Pairs(*columns)._replace(gap_only=each.gap_only, subsets=subsets)
        prompts = [str(each.rows[i].prompt) for i in places.rows]
        report = pair_report(pairs, prompts, args.eval_min_score_gap, args.bootstrap)
    if kls is not None:
        lengths, prompts = [row.lengths for row in scored], [str(row.prompt) for row in each.rows]
        drift, interval = drift_report(kls, lengths, prompts, args.bootstrap)
        report |= {"kl_drift": drift, "intervals": {**report["intervals"], "kl_drift": interval}}
    return {"kind": each.kind, **report}


def cases_of(
    target: Target,
    each: EvaluationSet,
    scored: Sequence[CompletionLogps],
    reference: Sequence[CompletionLogps] | None,
    n_resamples: int,
) -> dict[str, Any]:
    """AMaPO's four cases of a set's pairs; empty where it has none."""
    from ..evaluation.cases import case_report, ranking_cases

    places = PairPlaces.of(each, scored)
    if not places.rows.size:
        if each.kind != "rm-bench":  # it never has any
            logger.warning("%s has no cases: it has no pair to count", each.name)
        return {}
    logps, lengths = places.take([row.logps for row in scored]), places.take([row.lengths for row in scored])
    of_reference = None if reference is None else places.take([row.logps for row in reference])
    scores = None if each.scores is None else places.take(each.scores)
    gaps = margins_of(target.objective, logps, lengths, of_reference, scores)
    if gaps is None:
        logger.warning("%s has no cases: the margin reads scores, and the set has none", each.name)
        return {}
    return case_report(ranking_cases(*gaps), [str(each.rows[i].prompt) for i in places.rows], n_resamples)
