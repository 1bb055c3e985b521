"""Rows, scores and evaluation factors of every data set, before any of the slow work."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from trl.trainer.utils import global_then_local_main_first

from ..data.evaluation_factors import add_evaluation_factor, check_evaluation_factors, warn_of_few_words
from ..data.formats import as_plain
from ..data.media import without_decoding
from ..objective import Objective, kept_pairs, of_part
from ..pairs import FACTOR, IS_FLIPPED, ROW, SCORE_CHOSEN, SCORE_REJECTED, SCORES
from ..report.card import SetFacts
from ..rows import OpenedSet, RowError, open_rows
from ..rows.form import COMPLETIONS, IMAGES, is_empty
from ..rows.raw import column_names
from ..rows.scores import (
    ScoreColumns,
    ScoreError,
    ScoreSummary,
    as_number,
    check_numbers,
    check_row,
    check_scores,
    checked_stream,
    count_flipped,
    find_score_columns,
    known_score_columns,
    refuse_class_labels,
    report_scores,
    require_score_columns,
    warn_of_doubts,
)
from ..rows.tokenized import arrow_columns
from ..rows.tokens import prepare_tokenizer
from ..terms import Term
from ..terms.evaluation_factor import EvaluationFactorMargin
from ..terms.score_gap import ScoreGapWeight
from .collator import LOGPS, TOKENS
from .configs import OF_FACTOR, MarginOptions

logger = logging.getLogger(__name__)

TRAIN = "train"
OF_COLUMN = f"column {FACTOR}"
_MOST = 100_000  # rows of an evaluation stream: an endless one would never be read to its end

# Columns that make TRL take a row with images for one of another task
_OTHER_KINDS = ("messages", "completion", "label")


@dataclass(frozen=True)
class PreparedSets:
    """The sets of a trainer, ready to be tokenized."""

    train: Any
    eval: Any  # one data set, or several by name
    columns: set[str]  # that must reach the collator, by their names in the data
    facts: dict[str, SetFacts]  # what was counted, by split
    opened: dict[str, OpenedSet]  # how each split is read
    trained: frozenset[int]  # hashes of the training set's pairs; none of a stream's
    mark: str  # the column that says of a pair whether it was trained on; "" with a stream


def prepare_datasets(
    train: Any,
    evals: Any,
    config: Any,
    options: MarginOptions,
    objective: Objective,
    processing_class: Any,
    takes_images: bool,
) -> PreparedSets:
    """Reads and checks the training and evaluation sets, and adds what the objective needs.

    Args:
        train: the training set, or None.
        evals: an evaluation set, several by name, or None.
        config: the trainer's config.
        options: its fields of the objective.
        objective: says which columns it reads.
        processing_class: the trainer's.
        takes_images: the trainer takes vision-language models.

    Raises:
        ValueError: rows, scores or factors that cannot be trained on, with column, row, value and fix.
        TypeError: not a data set, or a kind of it that the trainer does not take.
    """
    given = {} if train is None else {TRAIN: train}
    if isinstance(evals, dict):
        given |= {eval_split(name): dataset for name, dataset in evals.items()}
    elif evals is not None:
        given["eval"] = evals
    opened = {
        split: opened_set(dataset, split, config, options, objective, processing_class, takes_images)
        for split, dataset in given.items()
    }
    opened = _read_alike(opened)
    _warn_of_other_forms(opened)
    prepare_tokenizer(processing_class, [split for split, each in opened.items() if each.counts.messages.n])
    sets: dict[str, Any] = {split: each.dataset for split, each in opened.items()}
    facts = {split: _counted(dataset, split) for split, dataset in sets.items()}
    if FACTOR in objective.columns:
        with global_then_local_main_first():  # the others read the cache
            sets = {split: _with_factors(each, options, config, facts) for split, each in opened.items()}
    sets = {split: _with_needed_columns(dataset, split, objective) for split, dataset in sets.items()}
    columns = {IS_FLIPPED, ROW, *(name for name in objective.columns if name not in SCORES)}
    sets = {
        split: _with_checked_scores(dataset, split, objective, options, columns, facts)
        for split, dataset in sets.items()
    }
    mark = ""
    sets = {
        split: dataset if split == TRAIN else without_numbers(dataset, objective) for split, dataset in sets.items()
    }
    if isinstance(numbered := sets.get(TRAIN), Dataset):
        # names the rows, in errors and in the pair log, also when some of them are dropped later
        numbered = _with_column(numbered, ROW, np.arange(len(numbered)))
        mark = f"_is_trained_on_{train._fingerprint[:8]}"  # other trainers' sets say it of other training sets
        columns.add(mark)
        sets[TRAIN] = _with_column(numbered, mark, np.ones(len(numbered), bool))
    if TRAIN in sets:
        sets[TRAIN] = _filtered(sets[TRAIN], objective, options, facts)
        _check_kept(objective, sets[TRAIN], options, facts[TRAIN])
        _fit(objective, sets[TRAIN], options)
        for term in objective.terms:
            if isinstance(term, EvaluationFactorMargin):
                facts[TRAIN] = replace(facts[TRAIN], floored=term.n_floored)
    trained: frozenset[int] = frozenset()
    if isinstance(train, Dataset):
        read = opened[TRAIN].counts.pairs
        trained = frozenset(read[i] for i in sets[TRAIN][ROW])  # without those that a term leaves out
        for split, dataset in given.items():
            if split != TRAIN and isinstance(dataset, Dataset):
                are_same = _has_images(opened[split]) and _same_rows(dataset, train)
                marks = np.ones(len(dataset), bool) if are_same else trained_pairs(trained, opened[split])
                sets[split] = with_trained(sets[split], mark, marks)
                n = None if marks is None else int(marks.sum())
                prompts = _shared_prompts(opened[TRAIN], opened[split])
                facts[split] = replace(facts[split], shared_pairs=n, shared_prompts=prompts)
    by_name = {name: sets[eval_split(name)] for name in evals} if isinstance(evals, dict) else sets.get("eval")
    return PreparedSets(sets.get(TRAIN), by_name, columns, facts, opened, trained, mark)


def _same_rows(one: Dataset, other: Dataset) -> bool:
    """Whether both have the same rows, with their images, too; False where that would take long."""
    if len(one) != len(other):
        return False
    return one._indices is None and other._indices is None and bool(one.data.table.equals(other.data.table))


def trained_pairs(trained: frozenset[int], opened: OpenedSet) -> np.ndarray | None:
    """Which pairs of a set were `trained` on; None of a stream, and where they have images, too."""
    if not isinstance(opened.dataset, Dataset) or _has_images(opened):
        return None
    return np.array([pair in trained for pair in opened.counts.pairs], bool)


def without_numbers(dataset: Any, objective: Objective) -> Any:
    """An evaluation set without a column that is called as the training set's numbers of rows."""
    is_read = ROW in objective.columns or ROW not in column_names(dataset)
    return dataset if is_read else dataset.remove_columns(ROW)


def with_trained(dataset: Any, mark: str, marks: np.ndarray | None) -> Any:
    """An evaluation set that says of its pairs which were trained on, where that is known; so do parts of it."""
    return dataset if marks is None or not mark else _with_column(dataset, mark, marks)


def share_trained_on(dataset: Any, mark: str) -> float:
    """The share of pairs that were trained on; 0 where nobody knows, as of streams."""
    if not isinstance(dataset, Dataset) or not len(dataset):
        return 0.0
    if mark not in dataset.column_names:  # with numbers of rows it is a training set, of a trainer before this one
        return float(ROW in dataset.column_names)
    return sum(pc.sum(marks).as_py() or 0 for (marks,) in arrow_columns(dataset, mark)) / len(dataset)


def _with_column(dataset: Dataset, name: str, values: np.ndarray) -> Dataset:
    """With a column of ours, in the place of one of the same name."""
    return (dataset.remove_columns(name) if name in dataset.column_names else dataset).add_column(name, values)


def _has_images(opened: OpenedSet) -> bool:
    return not {*IMAGES}.isdisjoint(column_names(opened.dataset))


def _shared_prompts(one: OpenedSet, other: OpenedSet) -> int | None:
    """How many prompts both have; None where they have images, too."""
    if _has_images(other):
        return None
    return len(one.counts.prompts & other.counts.prompts - {hash("")})


def opened_set(
    dataset: Any,
    split: str,
    config: Any,
    options: MarginOptions,
    objective: Objective,
    processing_class: Any,
    takes_images: bool,
) -> OpenedSet:
    """A data set, ready to be read.

    Raises:
        ValueError, TypeError: as `prepare_datasets`.
    """
    dataset = _without_tensors(as_taken(dataset, split, config), split, takes_images, objective.columns)
    # TRL loads the processor of a vision-language model later
    keeps_parts = isinstance(processing_class, ProcessorMixin) or any(n in IMAGES for n in column_names(dataset))
    return open_rows(dataset, split, options.prompt_column, options.system_column, keeps_parts, read=objective.columns)


def _read_alike(opened: dict[str, OpenedSet]) -> dict[str, OpenedSet]:
    """Where the training set's text completions repeat the prompt, those of the other sets lose it too."""
    if TRAIN not in opened or not opened[TRAIN].reader.repeats_prompt:
        return opened
    return {
        split: replace(each, reader=replace(each.reader, repeats_prompt=True)) if each.counts.repeated.n else each
        for split, each in opened.items()
    }


def _warn_of_other_forms(opened: dict[str, OpenedSet]) -> None:
    """Of sets of which only one goes through the chat template."""
    forms = {split: _form(each) for split, each in opened.items()}
    for split, form in forms.items():
        if forms.get(TRAIN) and form and form != forms[TRAIN]:
            logger.warning(
                "%s: its rows are %s, and those of the training set are %s: only messages go through the chat "
                "template, so the model is evaluated on another kind of input than it trains on. Give both in one "
                "form",
                *(split, form, forms[TRAIN]),
            )


def _form(opened: OpenedSet) -> str | None:
    """That of all rows, or None."""
    counts = opened.counts
    return "text" if not counts.messages.n else "messages" if not counts.text.n else None


def _without_tensors(dataset: Any, split: str, takes_images: bool, read: Collection[str]) -> Any:
    """Removes columns that TRL's collators would take for tokens, if no term has `read` them; images only where they
    can be trained on.
    """
    names = column_names(dataset)
    images = [name for name in IMAGES if name in names]
    empty = [name for name in images if isinstance(dataset, Dataset) and is_empty(dataset, name)]
    if empty:
        logger.info("%s: leaving out %s, which is empty in all rows", split, " and ".join(empty))
        dataset = dataset.remove_columns(empty)
        images = [name for name in images if name not in empty]
    if images and not takes_images:
        raise ValueError(
            f"the {split} data set has the column {images[0]!r}: vision-language models train on DPOTrainer's base "
            "(MarginDPOTrainer, --base dpo). To train on the text alone, remove the column"
        )
    made = tuple(f"{side}_{kind}" for side in ("prompt", *COMPLETIONS) for kind in TOKENS)
    endings = TOKENS if takes_images else TOKENS + LOGPS  # CPOTrainer's
    extras = [name for name in names if name.endswith(endings) and (name not in read or name in made)]
    extras += [name for name in names if images and name in _OTHER_KINDS]
    if not {*COMPLETIONS} & {*names} and any("input_ids" in name for name in extras):
        raise RowError(
            f"the {split} data set is tokenized already ({', '.join(extras)}), and the trainer tokenizes it: give the "
            "texts or messages, as prompt, chosen and rejected"
        )
    if extras:
        logger.info(f"{split}: leaving out {' and '.join(extras)}, which TRL would misread beside chosen and rejected")
        dataset = dataset.remove_columns(extras)
    return dataset


def eval_split(name: str) -> str:
    """The split's name of an evaluation set: one may have the training set's name."""
    return f"eval {name}" if name == TRAIN else name


def with_checked_columns(dataset: Any, split: str, objective: Objective) -> Any:
    """The same data set, after a check of those columns of the objective that it has. Scores are checked elsewhere."""
    names = {*column_names(dataset)} - {*SCORES}
    for _, part in objective.reading:
        least = part.column_minimum if isinstance(part, Term) else None
        for name in [name for name in dict.fromkeys(part.columns) if name in names]:
            if isinstance(dataset, Dataset):
                check_numbers(dataset, name, split, least)
            else:
                dataset = checked_stream(dataset, name, split, least)
    return dataset


def _with_needed_columns(dataset: Any, split: str, objective: Objective) -> Any:
    """The same data set, which has what the objective reads, checked."""
    names = list(column_names(dataset))
    for kind, part in objective.reading:
        if missing := [name for name in part.columns if name not in (*names, *SCORES)]:
            raise ValueError(
                f"{kind} {part.name!r} needs the columns {missing}, and the {split} data set has only {names}: add "
                "them with dataset.add_column or dataset.rename_column"
            )
    return with_checked_columns(dataset, split, objective)


def _filtered(train: Any, objective: Objective, options: MarginOptions, facts: dict[str, SetFacts]) -> Any:
    """The training set without the pairs that GapPO's hard filter discards."""
    for term in objective.weights:
        if not isinstance(term, ScoreGapWeight) or term.transform != "hard":
            continue
        if not isinstance(train, Dataset):
            columns = require_score_columns(column_names(train), options.score_columns, repr(term.name), TRAIN)
            logger.info(
                f"train: the hard filter leaves out pairs of the stream whose score gap is below {term.threshold:g}"
            )
            return train.filter(_is_kept, fn_kwargs={"term": term, "columns": columns})
        scores = {name: torch.as_tensor(values) for name, values in _numbers(train, SCORES, options).items()}
        kept = term.keeps(scores).nonzero().flatten().tolist()
        n, n_out = len(train), len(train) - len(kept)
        if not kept:
            largest = (scores[SCORE_CHOSEN] - scores[SCORE_REJECTED]).abs().max().item()
            raise ScoreError(
                f"the hard filter leaves out all {n} train pairs: the largest score gap is {largest:g}, and "
                f"score_gap_threshold={term.threshold:g}. Lower it to at most {largest:g}"
            )
        logger.info(
            f"train: the hard filter leaves out {n_out} of {n} pairs, whose score gap is below {term.threshold:g}; "
            f"{len(kept)} are trained on"
        )
        facts[TRAIN] = replace(facts[TRAIN], filtered=n_out)
        train = train.select(kept) if n_out else train
    return train


def _check_kept(objective: Objective, train: Any, options: MarginOptions, facts: SetFacts) -> None:
    """Refuses a training set whose pairs the terms leave no loss, and warns where that is most of them."""
    if not isinstance(train, Dataset):
        return
    n, left = len(train), np.ones(len(train), bool)
    for kind, term in objective.named_terms:
        if type(term).keeps is Term.keeps:
            continue
        numbers = _numbers(train, term.columns, options)
        kept = kept_pairs(kind, term, {name: torch.as_tensor(values) for name, values in numbers.items()})
        if kept is None:
            continue
        left &= kept.cpu().numpy()
        numbers = {name if name in SCORES else f"column {name!r}": values for name, values in numbers.items()}
        if {*SCORES} <= numbers.keys():
            numbers[" − ".join(facts.score_columns or SCORES)] = numbers.pop(SCORE_CHOSEN) - numbers.pop(
                SCORE_REJECTED
            )
        ranges = ", ".join(f"{name} is from {each.min():g} to {each.max():g}" for name, each in numbers.items())
        said = f"{kind} {term.name!r} keeps only {term.keeps_only}; {ranges}"
        if not left.any():
            nothing = "weight 0" if kind == "weight" else "no loss"
            raise ScoreError(f"all {n} train pairs would have {nothing}: {said}. Check what the columns hold")
        if (n_kept := int(kept.sum())) * 2 < n:
            logger.warning(
                f"training sees only {n_kept} of {n} pairs: {said}. If that is not intended, check what the columns "
                "hold"
            )


def _is_kept(row: dict[str, Any], term: ScoreGapWeight, columns: ScoreColumns) -> bool:
    scores = torch.tensor(columns.read(row), dtype=torch.float32).unsqueeze(1)
    return bool(term.keeps(dict(zip(SCORES, scores, strict=True))))


def _fit(objective: Objective, train: Any, options: MarginOptions) -> None:
    """Fits the terms that read the whole training set."""
    for kind, term in objective.named_terms:
        if type(term).fit is Term.fit:
            continue
        if not isinstance(train, Dataset):
            raise TypeError(
                f"{kind} {term.name!r} looks at the whole training set, which a {type(train).__name__} does not show: "
                "load the data set instead of streaming it"
            )
        numbers = _numbers(train, term.columns, options)
        with of_part(f"fit of {kind} {term.name!r}", term):
            term.fit({name: torch.as_tensor(values) for name, values in numbers.items()})


def _numbers(train: Dataset, names: Sequence[str], options: MarginOptions) -> dict[str, np.ndarray]:
    """Columns under the terms' names, float32."""
    found = {name: np.array([*map(as_number, train[name][:])], np.float32) for name in names if name not in SCORES}
    if set(names) & {*SCORES}:
        columns = require_score_columns(column_names(train), options.score_columns, "a term", TRAIN)
        values = train.with_format(None, columns=list(columns.names))[:]
        scores = [columns.read(dict(zip(values, row, strict=True))) for row in zip(*values.values(), strict=True)]
        found |= dict(zip(SCORES, np.array(scores, np.float32).T, strict=True))
    return found


def _counted(dataset: Any, split: str) -> SetFacts:
    if not isinstance(dataset, Dataset):
        return SetFacts(split)
    flipped = None
    if IS_FLIPPED in dataset.column_names:
        flipped = count_flipped(dataset, split)
        logger.info("%s: the labels of %d of %d pairs are marked as flipped", split, flipped, len(dataset))
    return SetFacts(split, pairs=len(dataset), flipped=flipped)


def _with_factors(opened: OpenedSet, options: MarginOptions, config: Any, facts: dict[str, SetFacts]) -> Dataset:
    dataset, split = opened.dataset, opened.reader.split
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{FACTOR} is checked or computed for a whole data set, which a {type(dataset).__name__} does not show: "
            "load the data set instead of streaming it"
        )
    factor = OF_COLUMN
    if FACTOR in dataset.column_names:
        logger.info("%s: %s column found", split, FACTOR)
        if unread := [name for name in OF_FACTOR if getattr(options, name) != getattr(MarginOptions, name)]:
            logger.warning(
                "%s: no effect of %s: the data set has the column %s. Remove the column to compute another",
                *(split, " and ".join(unread), FACTOR),
            )
    else:
        factor = options.gap_aware_metric
        logger.info("%s: no %s column, computing %s of the two completions", split, FACTOR, factor)
        kwargs = {"encoder": options.gap_aware_encoder, "num_proc": config.dataset_num_proc, "reader": opened.reader}
        dataset = add_evaluation_factor(dataset, factor, FACTOR, **kwargs)
    facts[split] = replace(facts[split], factor=factor)
    warn_of_few_words(check_evaluation_factors(dataset[FACTOR], FACTOR, split), factor, split)
    return dataset


def _reading_scores(objective: Objective) -> list[str]:
    return [part.name for _, part in objective.reading if SCORE_CHOSEN in part.columns]


def check_later_scores(
    dataset: Any, columns: ScoreColumns | None, split: str, objective: Objective, options: MarginOptions
) -> None:
    """Of a set that the trainer was not built with.

    Raises:
        ScoreError: something reads the scores, and one is none.
    """
    if columns is None:
        _warn_without_scores(objective, split)
        return
    refuse_class_labels(dataset, columns, split)
    if isinstance(dataset, Dataset):
        _checked_scores(dataset, columns, split, objective, options)


def _warn_without_scores(objective: Objective, split: str) -> None:
    """Says how a data set without scores is evaluated, if something reads scores."""
    if not (reading := _reading_scores(objective)):
        return
    needed_by = " and ".join(map(repr, reading))
    replaced = objective.without_scores.links.keys() - objective.links.keys()
    logger.warning(
        f"the {split} data set has no scores, which {needed_by} need{'s' * (len(reading) == 1)}: its loss is that "
        f"without {needed_by}{', with the sigmoid instead' if replaced else ''}, and it has no pwa, only pwa_all. "
        "Name its score columns with score_columns (--score_columns)"
    )


def _checked_scores(
    dataset: Dataset, columns: ScoreColumns, split: str, objective: Objective, options: MarginOptions
) -> ScoreSummary | None:
    """What the scores of a data set are; None if some are none, and nothing reads them but the evaluation.

    Raises:
        ScoreError: something reads them.
    """
    try:
        return check_scores(dataset, columns, split, options.eval_min_score_gap)
    except ScoreError as error:
        if _reading_scores(objective):
            raise
        logger.warning("%s; pairs without scores count in pwa_all alone", error)
        return None


def _with_checked_scores(
    dataset: Any,
    split: str,
    objective: Objective,
    options: MarginOptions,
    keep: set[str],
    facts: dict[str, SetFacts],
) -> Any:
    """The same data set; bad scores that no term reads are only left out of the evaluation."""
    own = [] if options.score_columns else [name for name in objective.columns if name not in SCORES]
    names = [name for name in column_names(dataset) if name not in own]  # a column of margins is not one of scores
    needed_by = " and ".join(map(repr, _reading_scores(objective)))
    columns = (
        require_score_columns(names, options.score_columns, needed_by, split)
        if needed_by and split == TRAIN
        else find_score_columns(names, options.score_columns, strict=split == TRAIN)
    )
    if columns is None:
        _warn_without_scores(objective, split)
        facts[split] = replace(facts[split], clear=0)
        return dataset
    if options.score_columns is None and len(several := known_score_columns(names)) > 1:
        found = ", ".join("/".join(each.names) for each in several)
        logger.warning(
            f"{split} has several columns that could be scores ({found}): {'/'.join(columns.names)} are used. Name "
            "others with score_columns (--score_columns)"
        )
    warn_of_doubts(columns, names, split)
    refuse_class_labels(dataset, columns, split)
    keep.update(columns.names)
    facts[split] = replace(facts[split], score_columns=columns.names)
    if not isinstance(dataset, Dataset):
        if needed_by:
            kwargs = {"columns": columns, "split": split}
            dataset = dataset.map(_with_score, with_indices=True, fn_kwargs=kwargs, features=dataset.features)
        return dataset
    summary = _checked_scores(dataset, columns, split, objective, options)
    if summary is None:
        return dataset
    report_scores(summary, columns, split)
    facts[split] = replace(facts[split], ties=summary.n_ties, reversed=summary.n_reversed, clear=summary.n_at_least)
    if split != TRAIN and not summary.n_at_least:
        logger.warning(
            f"no pair of {split} has a score gap of {options.eval_min_score_gap:g} or more (the largest is "
            f"{summary.max_gap:g}), so its pwa is undefined: lower eval_min_score_gap"
        )
    return dataset


def _with_score(row: dict[str, Any], number: int, columns: ScoreColumns, split: str) -> dict[str, Any]:
    check_row(row, columns, f"row {number} of the {split} data set")
    return row


def as_taken(dataset: Any, split: str, config: Any) -> Dataset | IterableDataset:
    """The same data set, as Python values, a transform applied; every process reads a stream for itself.

    Raises:
        TypeError: not a data set.
        ValueError: one without rows.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"the {split} data set is a {type(dataset).__name__}, {_instead(dataset)}")
    # Otherwise accelerate would cut each tensor of a batch to the length of the first, which rows that share their
    # prompt do not survive, nor the texts in CPOTrainer's batches.
    if config.accelerator_config.dispatch_batches:
        logger.warning("accelerator_config: dispatch_batches=True is not used: every process reads its own rows")
    config.accelerator_config.dispatch_batches = False
    if not (len(dataset) if isinstance(dataset, Dataset) else next(iter(dataset), None)):
        raise ValueError(f"the {split} data set has no rows: see what it was loaded or filtered from")
    if isinstance(dataset, IterableDataset) and split != TRAIN:
        _check_end(dataset, split)
    with global_then_local_main_first():  # the others read the first one's cache
        plain = as_plain(dataset)
    return without_decoding(plain, keep=IMAGES)


def _check_end(stream: IterableDataset, split: str) -> None:
    """An evaluation reads the whole of a stream, each time, and nothing says where it ends."""
    if sum(1 for _ in stream.take(_MOST + 1)) > _MOST:
        raise ValueError(
            f"the {split} data set is a stream of more than {_MOST:,} rows, if it ends at all, and each evaluation "
            "reads the whole of it: give it an end with eval_dataset.take(1000), or load it instead of streaming it "
            "(trl-margins train: --eval_dataset_name loads one)"
        )


def _instead(given: Any) -> str:
    if isinstance(given, Mapping):
        one = next(iter(given), "train")
        return (
            f"with the keys {list(given)}: give one data set, for example dataset[{one!r}], or use Dataset.from_dict"
        )
    if isinstance(given, (str, Path)):
        return f"{str(given)!r}: load it first, with trl_margins.data.loading.load_splits or datasets.load_dataset"
    return "not a datasets.Dataset: Dataset.from_list makes one of a list of rows, Dataset.from_pandas of a DataFrame"
