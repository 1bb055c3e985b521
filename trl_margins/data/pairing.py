"""Pairs from scored lists: which two answers to a prompt a model is trained on."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
from datasets import Dataset, Features, Json, concatenate_datasets
from datasets.utils import tqdm

from ..checks import NUMBERS, unknown
from ..pairs import has_gap
from ..rows.answers import ScoredList, digest
from ..rows.lists import ScoredLists
from ..rows.messages import says, text_of
from ..rows.turns import split_turns
from .formats import one_split
from .media import without_decoding

logger = logging.getLogger(__name__)

PAIR_MODELS = ("chosen_model", "rejected_model")

# Strategy → what sorts the candidates; each is a list of two, the better one first
_Key = Callable[[ScoredList, int], Any]
STRATEGIES: Mapping[str, _Key] = MappingProxyType(
    {
        "best-worst": lambda pair, seed: -_gap(pair),
        "best-random": lambda pair, seed: _drawn(pair, seed),
        "closest": lambda pair, seed: (_gap(pair), _drawn(pair, seed)),
        "all": lambda pair, seed: _drawn(pair, seed),
    }
)
_MOST = 1_000_000  # pairs of one prompt


def make_pairs(
    dataset: Dataset,
    strategy: str = "best-worst",
    k: int | None = None,
    min_gap: float | None = None,
    balance_length: bool = False,
    seed: int = 0,
    *,
    drop_truncated: bool = False,
    as_chat: bool = False,
    score_columns: Sequence[str] | str | None = None,
    prompt_column: str | None = None,
    system_column: str | None = None,
) -> Dataset:
    """Pairs of the answers in scored lists. "Lists" in `docs/data.md` has the forms, the strategies and the options.

    The rows have `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`, `chosen_model` and
    `rejected_model` where models are known, and the other columns of a prompt.

    Args:
        k: the most pairs of one prompt. By default 1, of `all` all.
        min_gap: the smallest difference of two scores; with 0, ties become pairs too. By default any above 0.

    Raises:
        ValueError: an unknown strategy, no lists, a bad row, no pair, or `drop_truncated` without that column.
        TypeError: a stream, or several splits.
    """
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    for name, value in {"k": k, "min_gap": min_gap}.items():
        if value is not None:
            NUMBERS[name].check(name, value)
    score_columns = [score_columns] if isinstance(score_columns, str) else score_columns
    dataset = one_split(dataset, "make_pairs")
    raw = without_decoding(dataset)
    lists = ScoredLists.of(raw, "the lists", score_columns, prompt_column, system_column, as_chat)
    if drop_truncated and "truncated" not in lists.read_columns:
        names = dataset.column_names
        why = "two answers in a row have none" if "truncated" in names else f"there are only {names}"
        raise ValueError(
            "drop_truncated takes lists with a column truncated, which says of each answer whether it was cut; "
            f"{why}: leave the option out"
        )
    counts: Counter[str] = Counter()
    pairs: list[ScoredList] = []
    for answers in tqdm(lists, desc="Pairing", unit="list", delay=2, leave=False):
        counts["lists"] += 1
        if drop_truncated:
            counts["cut"] += sum(answer.is_cut for answer in answers.answers)
            answers = answers.at([i for i, answer in enumerate(answers.answers) if not answer.is_cut])
        pairs += _pairs_of(answers, strategy, 1 if k is None and strategy != "all" else k, min_gap, seed, counts)
    _say(lists, pairs, counts, min_gap)
    found = len(pairs)
    if balance_length:
        pairs = _balanced(pairs, seed)
    if not pairs:
        balanced = [f"balance_length leaves out the {found} pairs of the others"] if found else []
        why = ", ".join([*_left_out(counts, min_gap), *balanced]) or "none has answers with a text and a score"
        lower = "; a lower min_gap takes more" if counts["close"] and min_gap else ""
        raise ValueError(f"no pair is left of {counts['lists']} lists: {why}{lower}")
    return pair_rows(dataset, lists, pairs)


def lists_summary(lists: ScoredLists) -> dict[str, Any]:
    """How many lists there are, of how many answers, and what their scores are."""
    sizes, scores, n_tied, models = [], [], 0, set()
    for each in lists:
        sizes.append(len(each.scores))
        scores += each.scores
        n_tied += len(set(each.scores)) == 1
        models |= {*each.models} - {None}
    counts = {"n_rows": len(lists.dataset), "n_lists": len(sizes), "n_answers": len(scores), "n_tied": n_tied}
    return {**counts, "n_models": len(models), "answers": _span(sizes), "scores": _span(scores)}


def _span(values: Sequence[float]) -> dict[str, float]:
    quantiles = np.quantile(values, (0, 0.5, 1)).tolist() if values else ()
    return dict(zip(("least", "median", "most"), quantiles, strict=False))


def _pairs_of(
    answers: ScoredList, strategy: str, k: int | None, min_gap: float | None, seed: int, counts: Counter[str]
) -> list[ScoredList]:
    there = answers.at([i for i, response in enumerate(answers.responses) if not _is_empty(response)])
    distinct = there.distinct()
    counts["empty"] += len(answers.scores) - len(there.scores)
    counts["same"] += len(there.scores) - len(distinct.scores)
    scores = distinct.scores
    if len(scores) < 2:
        counts["few"] += 1
        return []
    if max(scores) == min(scores) and min_gap != 0:
        counts["tied"] += 1
        return []
    chosen = [scores.index(max(scores))] if strategy.startswith("best") else range(len(scores))
    found = list(_candidates(scores, chosen, min_gap, k if strategy == "closest" else None, distinct.row))
    candidates = {both: distinct.at(both) for both in found}
    counts["close"] += not candidates
    if k is not None and len(candidates) > k:
        first = sorted(candidates, key=lambda both: STRATEGIES[strategy](candidates[both], seed))[:k]
        return [candidates[both] for both in sorted(first)]
    return list(candidates.values())


def _candidates(
    scores: Sequence[float], chosen: Sequence[int], min_gap: float | None, closest: int | None, row: int
) -> Iterator[tuple[int, int]]:
    """The places of two answers that can be a pair, the better one first.

    Args:
        chosen: the places of the better one.
        closest: no pairs but those that are among so many with the smallest gaps, and as close as the last of these.

    Raises:
        ValueError: more pairs of one prompt than anyone can train on, which would take hours to sort.
    """
    values, places = np.asarray(scores), np.arange(len(scores))

    def gaps_of(i: int) -> tuple[np.ndarray, np.ndarray]:
        gaps = values[i] - values
        is_pair = (gaps > 0) & has_gap(values[i], values, min_gap or 0.0)
        if min_gap == 0:
            is_pair |= (gaps == 0) & (places > i)  # of two ties, the first is chosen
        return gaps, is_pair

    most = math.inf
    if closest is not None:
        smallest = np.empty(0)
        for i in chosen:
            gaps, is_pair = gaps_of(i)
            smallest = np.sort(np.concatenate([smallest, gaps[is_pair]]))[:closest]
        most = smallest.max(initial=0.0)
    n = 0
    for i in chosen:
        gaps, is_pair = gaps_of(i)
        found = places[is_pair & (gaps <= most)].tolist()
        n += len(found)
        if n > _MOST:
            raise ValueError(
                f"the {len(scores):,} answers to the prompt of row {row} make more than {_MOST:,} pairs: take another "
                "strategy, such as best-worst, or leave answers out"
            )
        yield from ((i, j) for j in found)


def _gap(pair: ScoredList) -> float:
    return pair.scores[0] - pair.scores[1]


def _drawn(pair: ScoredList, seed: int) -> str:
    """A place in a random order that depends on the seed and on the texts."""
    return digest(seed, pair.prompt, pair.responses)


def _is_empty(response: Any) -> bool:
    calls = not isinstance(response, str) and any(message.get("tool_calls") for message in response)
    return not calls and not text_of(response).strip()


def _left_out(counts: Counter[str], min_gap: float | None) -> list[str]:
    """How many lists give no pair, and why."""
    few = {
        "few": "with fewer than two different answers",
        "tied": "whose answers all have the same score",
        "close": f"without two scores that differ by {min_gap:g}" if min_gap else "without a pair",
    }
    return [f"{counts[name]} {why}" for name, why in few.items() if counts[name]]


def _say(lists: ScoredLists, pairs: Sequence[ScoredList], counts: Counter[str], min_gap: float | None) -> None:
    said = _left_out(counts, min_gap)
    logger.info("%d pairs of %d lists%s", len(pairs), counts["lists"], f"; left out {', '.join(said)}" if said else "")
    if counts["cut"]:
        logger.info("left out %d answers that were cut", counts["cut"])
    if any(cut := [sum(pair.answers[i].is_cut for pair in pairs) for i in (0, 1)]):
        logger.warning(
            "%d chosen and %d rejected answers were cut (truncated), and are trained on as if they ended there: leave "
            "them out with drop_truncated=True (--drop_truncated true), or generate longer ones",
            *cut,
        )
    if counts["empty"]:
        logger.info("left out %d answers without text", counts["empty"])
    if counts["same"]:
        logger.info(
            "left out %d answers that repeat another one to the same prompt; the mean of their scores counts",
            counts["same"],
        )
    if pairs and all(isinstance(pair.prompt, str) for pair in pairs) and not lists.form.is_plain:
        logger.info(
            "prompts and answers are text, with nothing between them: for a model with a chat template make messages "
            "of them, with as_chat=True (--as_chat true)"
        )


def _balanced(pairs: list[ScoredList], seed: int) -> list[ScoredList]:
    """As many pairs whose chosen answer is longer as pairs whose rejected one is."""
    longer: dict[bool, list[int]] = {True: [], False: []}
    for i, pair in enumerate(pairs):
        chosen, rejected = (len(text_of(response)) for response in pair.responses)
        if chosen != rejected:
            longer[chosen > rejected].append(i)
    less, more = sorted(longer.values(), key=len)
    surplus = set(sorted(more, key=lambda i: _drawn(pairs[i], seed))[len(less) :])
    logger.info(
        "the chosen answer is longer in %d pairs and shorter in %d: left out %d, so that both are %d",
        len(longer[True]),
        len(longer[False]),
        len(surplus),
        len(less),
    )
    return [pair for i, pair in enumerate(pairs) if i not in surplus]


def pair_rows(dataset: Dataset, lists: ScoredLists, pairs: Sequence[ScoredList]) -> Dataset:
    """The rows of a preference set, with the data set's other columns; each pair is a list of two, the chosen one
    first.
    """
    are_messages = any(not isinstance(pair.prompt, str) for pair in pairs)
    rows: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for pair in pairs:
        prompt, parts = pair.prompt, pair.responses
        if are_messages and isinstance(prompt, str):
            prompt, answers = split_turns(prompt, [*map(str, parts)])
            parts = [says("assistant", answer) for answer in answers]
        for name, value in zip(rows, (prompt, *parts), strict=True):
            rows[name].append(value)
    rows |= {f"score_{side}": [pair.scores[i] for pair in pairs] for i, side in enumerate(("chosen", "rejected"))}
    if any(model is not None for pair in pairs for model in pair.models):
        rows |= {name: [pair.models[i] for pair in pairs] for i, name in enumerate(PAIR_MODELS)}
    kept = [name for name in lists.of_prompts if name not in rows]
    others = dataset.with_format(None).select_columns(kept).select([pair.row for pair in pairs])
    texts = ("prompt", "chosen", "rejected")
    features: dict[str, Any] = {}
    if are_messages and not all(map(_is_plain, chain.from_iterable(chain(*(rows[name] for name in texts))))):
        with suppress(TypeError):  # of pictures, which JSON has not
            rows |= {name: list(map(json.dumps, rows[name])) for name in texts}
            features = {name: Json() for name in texts}  # objects of one type would all get the same keys
    made = Dataset.from_dict(rows)
    if features:
        made = made.cast(Features({**made.features, **features}))
    return concatenate_datasets([made, *([others] if kept else [])], axis=1)


def _is_plain(message: Any) -> bool:
    return isinstance(message, dict) and message.keys() == {"role", "content"} and isinstance(message["content"], str)
