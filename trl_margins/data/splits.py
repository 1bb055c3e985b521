"""The four generalization scenarios of AMaPO: prompts and completing models that training has seen, or not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from numbers import Real
from typing import Any

from datasets import Dataset, DatasetDict

from ..rows.answers import ScoredList, digest
from ..rows.list_forms import FORMS, list_form
from ..rows.lists import ScoredLists
from .formats import one_split
from .media import without_decoding
from .pairing import PAIR_MODELS, pair_rows

logger = logging.getLogger(__name__)

SPLITS = ("id", "prompt_ood", "response_ood", "mutual_ood")

# (unseen prompt, unseen models) → split
_SCENARIOS = {
    (False, False): "train",
    (True, False): "prompt_ood",
    (False, True): "response_ood",
    (True, True): "mutual_ood",
}
_WITHOUT_MODELS = {
    "train": "lower unseen_prompts or held_out",
    "id": "raise held_out, and give lists of four or more completions with different scores",
    "prompt_ood": "raise unseen_prompts, and give lists of two or more completions with different scores",
}
_REMEDIES = {
    "train": "lower unseen_prompts, unseen_models or held_out",
    "id": "raise held_out, or lower unseen_models so that prompts have more completions by seen models",
    "prompt_ood": "raise unseen_prompts, or lower unseen_models",
    "response_ood": "raise unseen_models, lower unseen_prompts, or give prompts more completions by different models",
    "mutual_ood": "raise unseen_prompts or unseen_models",
}


def generalization_splits(
    dataset: Dataset,
    unseen_prompts: float = 0.2,
    unseen_models: float | Collection[str] = 0.3,
    held_out: float = 0.1,
    seed: int = 0,
    columns: Sequence[str] | None = None,
    score_columns: Sequence[str] | str | None = None,
) -> DatasetDict:
    """`train`, and the four splits of AMaPO (arXiv 2511.09385, appendix D.1) that tell underfitting from overfitting:

    ================ =============== ==============
    split            prompts         completions by
    ================ =============== ==============
    ``id``           of training     seen models
    ``prompt_ood``   not of training seen models
    ``response_ood`` of training     unseen models
    ``mutual_ood``   not of training unseen models
    ================ =============== ==============

    A prompt of training has a pair in `train`: `id` never takes a prompt's last pair, and `response_ood` leaves out
    prompts without one.

    *Pairs* belong to the seen models if both of their models are seen, to the unseen ones if neither is; mixed pairs
    are dropped. `id` is a random share of the pairs on seen prompts by seen models; other pairs of its prompts stay in
    `train`, and may share a completion with it. A pair that occurs twice, also with its sides swapped, is never
    divided.

    *Lists*, in any form that `make_pairs` takes, give the best and the worst completion of each prompt, among the
    models of the scenario. Of the prompts of `id`, `train` has the second best and the second worst, so that the
    completions in `id` have not been trained on; `id` draws among the prompts for which that is possible. Prompts with
    fewer than two completions, or whose best and worst are tied, are left out. Lists that name no model are of the one
    that is trained, as where AMaPO samples its own pairs: they have `train`, `id` and `prompt_ood` alone.

    The draws depend on the seed and on the contents, not on the order of the rows; a larger share includes a smaller.

    Args:
        unseen_prompts: share of the prompts, in (0, 1).
        unseen_models: share of the models, in (0, 1), or their names.
        held_out: share of the pairs on seen prompts by seen models (of lists: one pair per prompt) that `id` gets.
        columns: the two columns of pairs that hold the models, if not `chosen_model` and `rejected_model`.

    Raises:
        ValueError: a share outside (0, 1), unknown models, columns or values that are missing or bad, more held out
            than training prompts can spare, or an empty split, with what to change.
        TypeError: a stream, or several splits.
    """
    score_columns = [score_columns] if isinstance(score_columns, str) else score_columns
    dataset = one_split(dataset, "generalization_splits")
    draw = _Draw(unseen_prompts, unseen_models, held_out, int(seed))
    names, rows = dataset.column_names, dataset.with_format(None)
    if columns is not None and len(columns) != 2:
        raise ValueError(f"columns takes the two columns that hold the models of a pair, got {list(columns)}")
    models = tuple(columns or PAIR_MODELS)
    if columns is not None or set(PAIR_MODELS) <= set(names):
        if missing := [name for name in ("prompt", "chosen", "rejected", *models) if name not in names]:
            raise ValueError(f"pairs need the columns {missing}, and the data set has only {names}")
        splits = {name: dataset.select(indices) for name, indices in _split_pairs(rows, models, draw).items()}
    elif list_form(names, score_columns) is not None:
        lists = ScoredLists.of(without_decoding(rows), "the lists", score_columns, strict=True)
        splits = _split_lists(rows, lists, draw)
    else:
        raise ValueError(
            f"the data set has neither the columns of pairs (prompt, chosen, rejected, {', '.join(PAIR_MODELS)}) nor "
            f"those of lists ({FORMS}), only {names}: name the columns that hold a pair's models with "
            "columns=[chosen, rejected]"
        )
    logger.info("rows: %s", ", ".join(f"{name} {len(split)}" for name, split in splits.items()))
    for name, split in splits.items():
        if not len(split):
            remedies = _REMEDIES if draw.by_models else _WITHOUT_MODELS
            raise ValueError(f"the split {name} is empty: {remedies[name]}")
    return DatasetDict({name: splits[name] for name in ("train", *SPLITS) if name in splits})


class _Draw:
    """Draws what is unseen or held out: the first items in an order by hash, which depends only on item and seed."""

    by_models = True  # whether the rows name the models behind the completions

    def __init__(
        self, unseen_prompts: float, unseen_models: float | Collection[str], held_out: float, seed: int
    ) -> None:
        shares: dict[str, Any] = {"unseen_prompts": unseen_prompts, "held_out": held_out}
        if isinstance(unseen_models, (Real, str)) or not isinstance(unseen_models, Collection):
            shares["unseen_models"] = unseen_models
        for name, share in shares.items():
            is_number = isinstance(share, Real) and not isinstance(share, bool)
            if not is_number or not 0 < share < 1:
                names = ", or a list of names" if name == "unseen_models" else ""
                raise ValueError(f"{name} is a share between 0 and 1{names}, got {share!r}")
        self._unseen_prompts, self._unseen_models = unseen_prompts, unseen_models
        self._held_out, self._seed = held_out, seed

    def order(self, items: Iterable[str], what: str) -> list[str]:
        """The distinct items, shuffled."""
        return sorted(set(items), key=lambda item: digest(self._seed, what, item))

    def unseen_prompts(self, keys: Iterable[str]) -> set[str]:
        keys = self.order(keys, "prompts")
        return set(keys[: round(self._unseen_prompts * len(keys))])

    def unseen_models(self, names: Iterable[str]) -> set[str]:
        names = self.order(names, "models")
        given = self._unseen_models
        unseen = set(given if isinstance(given, Collection) else names[: round(given * len(names))])
        if unknown := unseen.difference(names):
            raise ValueError(f"unseen_models names {sorted(unknown)}, but the models are {sorted(names)}")
        logger.info("%d of %d models are unseen: %s", len(unseen), len(names), ", ".join(sorted(unseen)))
        return unseen

    def held_out(self, n: int, spare: Sequence[str]) -> list[str]:
        """A share of n, among those that training can spare."""
        wanted = round(self._held_out * n)
        if wanted > len(spare):
            most = f"lower held_out to {len(spare) / n:.6g} or less, or " if spare else ""
            remedy = (
                "give data with two pairs, or four completions with different scores, of a prompt by seen models "
                "(a lower unseen_models leaves more of these, and fewer by unseen ones)"
                if self.by_models
                else "give lists of four or more completions with different scores"
            )
            raise ValueError(
                f"held_out={self._held_out:g} of {n} pairs on seen prompts by seen models is {wanted}, but only "
                f"{len(spare)} can go without their prompt leaving the training set: {most}{remedy}"
            )
        return list(spare[:wanted])


def _prompt_key(prompt: Any, row: int) -> str:
    if not prompt:
        raise ValueError(f"column 'prompt', row {row}: the prompt is {prompt!r}: drop the row")
    return digest(prompt)


def _check_model(model: Any, column: str, row: int) -> str:
    if not isinstance(model, str):
        raise ValueError(f"column {column!r}, row {row}: the model {model!r} is not a name: drop the row or name it")
    return model


def _split_pairs(rows: Dataset, columns: Sequence[str], draw: _Draw) -> dict[str, list[int]]:
    """Row numbers of each split."""
    prompts: list[str] = []
    pairs: list[str] = []
    models: list[set[str]] = []
    for i, row in enumerate(rows.select_columns(["prompt", "chosen", "rejected", *columns])):
        prompts.append(_prompt_key(row["prompt"], i))
        pairs.append(digest(row["prompt"], sorted(map(digest, (row["chosen"], row["rejected"])))))
        models.append({_check_model(row[name], name, i) for name in columns})
    unseen_prompts = draw.unseen_prompts(prompts)
    unseen_models = draw.unseen_models(name for both in models for name in both)
    splits: dict[str, list[int]] = {name: [] for name in ("train", *SPLITS)}
    for i, (prompt, both) in enumerate(zip(prompts, models, strict=True)):
        if both <= unseen_models or not both & unseen_models:
            splits[_SCENARIOS[prompt in unseen_prompts, both <= unseen_models]].append(i)
    n_mixed = len(rows) - sum(map(len, splits.values()))
    logger.info("dropped %d of %d pairs, of a seen and an unseen model", n_mixed, len(rows))

    prompt_of = {pairs[i]: prompts[i] for i in splits["train"]}
    trained: set[str] = set()
    spare = []
    for pair in draw.order(prompt_of, "held out"):
        if prompt_of[pair] in trained:
            spare.append(pair)
        trained.add(prompt_of[pair])
    held_out = set(draw.held_out(len(prompt_of), spare))
    splits["id"] = [i for i in splits["train"] if pairs[i] in held_out]
    splits["train"] = [i for i in splits["train"] if pairs[i] not in held_out]
    known = [i for i in splits["response_ood"] if prompts[i] in trained]
    if lost := len(splits["response_ood"]) - len(known):
        logger.info("dropped %d pairs of response_ood, whose prompts have no training pair", lost)
    return splits | {"response_ood": known}


def _split_lists(dataset: Dataset, lists: ScoredLists, draw: _Draw) -> dict[str, Dataset]:
    prompts: dict[str, str] = {}  # of each list
    answers: dict[str, ScoredList] = {}
    found = list(lists)
    draw.by_models = any(model is not None for each in found for model in each.models)
    if not draw.by_models:
        logger.warning("the lists name no models: of the four splits there are only id and prompt_ood")
    for each in found:
        for model in each.models if draw.by_models else ():
            _check_model(model, "models", each.row)
        prompt = _prompt_key(each.prompt, each.row)
        # votes on other answers to the prompt are on another scale, and other tools ask something else
        differing = each.row if lists.form.is_vote else each.template
        key = digest(prompt, differing) if lists.form.is_vote or differing else prompt
        prompts[key] = prompt
        answers[key] = each
    unseen_prompts = draw.unseen_prompts(prompts.values())
    models = (str(model) for each in answers.values() for model in each.models)
    unseen_models = draw.unseen_models(models) if draw.by_models else set[str]()
    names = ("train", *SPLITS) if draw.by_models else ("train", "id", "prompt_ood")
    splits: dict[str, dict[str, ScoredList]] = {name: {} for name in names}
    few: Counter[str] = Counter()
    ties: Counter[str] = Counter()
    for key, each in answers.items():
        order = _worst_first(each)
        for unseen in (False, True) if draw.by_models else (False,):
            name = _SCENARIOS[prompts[key] in unseen_prompts, unseen]
            ranked = each.at([i for i in order if (each.answers[i].model in unseen_models) is unseen])
            if len(ranked.scores) < 2:
                few[name] += 1
            elif ranked.scores[0] == ranked.scores[-1]:
                ties[name] += 1
            else:
                splits[name][key] = ranked
    for counts, why in ((few, "with fewer than two completions"), (ties, "whose best and worst completions are tied")):
        if counts:
            logger.info("left out prompts %s: %s", why, ", ".join(f"{name} {n}" for name, n in counts.items()))

    train = splits["train"]
    spare = [key for key in draw.order(train, "held out") if _has_two_pairs(train[key])]
    for key in draw.held_out(len(train), spare):
        splits["id"][key] = train[key]
        train[key] = train[key].at(range(1, len(train[key].scores) - 1))
    trained = {prompts[key] for key in train}
    unseen_answers = splits.get("response_ood", {})
    for key in (untrained := [key for key in unseen_answers if prompts[key] not in trained]):
        del unseen_answers[key]
    if untrained:
        logger.info("left out %d prompts of response_ood that have no training pair", len(untrained))
    rows = pair_rows(dataset, lists, [ranked.at([-1, 0]) for some in splits.values() for ranked in some.values()])
    ends = accumulate(map(len, splits.values()))
    # `select` refuses an empty range behind the last row, and takes an empty list
    return {name: rows.select([*range(end - len(splits[name]), end)]) for name, end in zip(splits, ends, strict=True)}


def _worst_first(answers: ScoredList) -> list[int]:
    """Places, in an order that does not depend on that of the list."""
    keys = zip(answers.scores, map(str, answers.models), map(digest, answers.responses), strict=True)
    return [i for _, i in sorted((key, i) for i, key in enumerate(keys))]


def _has_two_pairs(ranked: ScoredList) -> bool:
    """Whether the second best and the second worst make a pair that shares no text with the best and the worst."""
    scores, keys = ranked.scores, [digest(response) for response in ranked.responses]
    if len(scores) < 4 or scores[1] == scores[-2]:
        return False
    return not {keys[0], keys[-1]} & {keys[1], keys[-2]}
