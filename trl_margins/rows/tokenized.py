"""A whole data set to its tokens, and what the chat template and `max_length` made of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from trl.trainer.utils import global_then_local_main_first

from .cpo_tokens import CPOTokenizer
from .form import PreferenceRow, RowError, text_of
from .opened import OpenedSet
from .tokens import PairTokenizer, RowTokens, cpo_columns, tokenize

logger = logging.getLogger(__name__)

_STREAMED_AT_ONCE = 64  # rows that a stream reads ahead
_COMPARED = 256  # rows at which the two ways of tokenization are compared

TokenColumns = tuple[str, str, str]  # of prompt, chosen, rejected
DPO_COLUMNS: TokenColumns = ("prompt_ids", "chosen_ids", "rejected_ids")
CPO_COLUMNS: TokenColumns = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")


def tokenized(
    opened: OpenedSet, tokenizer: PairTokenizer | CPOTokenizer, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """The set with its token columns: one cached pass with a progress bar.

    Args:
        opened: the set, and how to read it.
        tokenizer: rows to token columns.
        num_proc: processes; a fast tokenizer uses all cores in one as well.
    """
    if isinstance(opened.dataset, IterableDataset):
        listed = partial(_listed, tokenizer)
        return opened.dataset.map(listed, batched=True, batch_size=_STREAMED_AT_ONCE, with_indices=True)
    with global_then_local_main_first():
        return opened.dataset.map(
            tokenizer,
            batched=True,
            with_indices=True,
            num_proc=num_proc,
            desc=f"Tokenizing {opened.reader.split} dataset",
        )


def _listed(tokenizer: Any, batch: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
    """Lists of tokens, as a loaded set gives them to TRL's collators."""
    made = tokenizer(batch, numbers)
    return {name: [np.asarray(row).tolist() for row in column] for name, column in made.items()}


def finish_tokenized(
    dataset: Dataset | IterableDataset,
    opened: OpenedSet,
    columns: TokenColumns,
    *,
    max_length: int | None,
    completion_cut: int | None = None,
    processing_class: Any = None,
    cpo_max_length: int | None = None,
) -> tuple[Dataset | IterableDataset, int | None]:
    """Drop the pairs without completion tokens, then report what the template and the cut made of the rest.

    Args:
        dataset: with tokens.
        opened: the set as it was opened.
        columns: the token columns of prompt, chosen and rejected.
        max_length: pairs whose prompt has this many tokens are dropped; None drops none.
        completion_cut: the `max_length` by which the collator cuts prompt and completion later; None where the columns
            are cut already, or are never cut.
        processing_class: given for the training set only, whose first rows are then looked at.
        cpo_max_length: compare these rows with CPOTrainer's own tokens, cut to this length.

    Returns:
        The pairs that are left, and how many were dropped; None for a stream, which cannot be counted.

    Raises:
        ValueError: no pair is left, or in no pair do the completions differ.
    """
    dataset, left = without_filled(dataset, opened.reader.split, max_length, columns[0])
    if left is not None:
        check_told_apart(dataset, opened, left, columns, completion_cut)
    if processing_class is not None:
        look_at_first_rows(opened, processing_class, cpo_max_length)
    return dataset, None if left is None else opened.counts.n - len(left)


def without_filled(
    dataset: Dataset | IterableDataset, split: str, max_length: int | None, prompt: str
) -> tuple[Dataset | IterableDataset, np.ndarray | None]:
    """Without the pairs whose prompt alone fills `max_length`: nothing is left of their completions.

    Args:
        dataset: with tokens.
        split: its name in messages.
        max_length: tokens of prompt and completion.
        prompt: the column with the prompt's tokens.

    Returns:
        The pairs that are left, and which they were; of a stream nobody knows.

    Raises:
        ValueError: none is left.
    """
    if isinstance(dataset, IterableDataset):
        return dataset if max_length is None else dataset.filter(lambda row: len(row[prompt]) < max_length), None
    if max_length is None:
        return dataset, np.arange(len(dataset))
    lengths = np.concatenate(
        [pc.list_value_length(prompts).to_numpy() for (prompts,) in arrow_columns(dataset, prompt)]
    )
    left = np.flatnonzero(lengths < max_length)
    dropped = len(dataset) - len(left)
    if not len(left):
        raise ValueError(
            f"truncation leaves a completion empty in every one of the {dropped} {split} pairs, because the prompt "
            f"fills max_length={max_length}: raise max_length, or cut the prompts"
        )
    if dropped:
        logger.warning(
            "%d of %d %s pairs were dropped, because the prompt fills max_length=%d: raise it to keep them",
            dropped,
            len(dataset),
            split,
            max_length,
        )
        dataset = dataset.select(left)
    return dataset, left


def check_told_apart(
    dataset: Dataset, opened: OpenedSet, left: np.ndarray, columns: TokenColumns, max_length: int | None
) -> None:
    """Warns of pairs whose completions differ as they are written, and not as tokens.

    Args:
        dataset: with tokens, and without the pairs that were dropped.
        opened: what was counted before.
        left: which of its rows the data set has.
        columns: the token columns of prompt and completions.
        max_length: tokens of prompt and completion that the model sees.

    Raises:
        ValueError: no pair differs.
    """
    alike = sum(_n_alike(*arrays, max_length) for arrays in arrow_columns(dataset, *columns))
    split, n = opened.reader.split, len(dataset)
    same = len(opened.counts.same_rows.intersection(left.tolist()))
    if alike == n > same:
        raise ValueError(
            f"chosen and rejected have the same tokens in every one of the {n} {split} pairs, although their texts "
            "differ: the chat template drops the completions, or max_length cuts them before they differ. Look at "
            "tokenizer.apply_chat_template(prompt + chosen, tokenize=False)"
        )
    if alike > same:
        logger.warning(
            "%d of %d %s pairs have the same tokens twice, although their texts differ: the chat template or "
            "max_length leaves out where they do. They have no gap, and nothing is learned from them",
            alike - same,
            n,
            split,
        )


def _n_alike(prompt: pa.ListArray, chosen: pa.ListArray, rejected: pa.ListArray, max_length: int | None) -> int:
    n_prompt, *lengths = (pc.list_value_length(array).to_numpy() for array in (prompt, chosen, rejected))
    if max_length is not None:
        room = np.maximum(max_length - n_prompt, 0)
        lengths = [np.minimum(each, room) for each in lengths]
    return sum(
        chosen[i].values[: lengths[0][i]].equals(rejected[i].values[: lengths[0][i]])
        for i in np.flatnonzero(lengths[0] == lengths[1]).tolist()
    )


def arrow_columns(dataset: Dataset, *columns: str) -> Iterator[list[pa.Array]]:
    """The columns as Arrow arrays, 2,048 rows at a time: no Python object per token."""
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=2048):
        yield [table[name].combine_chunks() for name in columns]


def look_at_first_rows(opened: OpenedSet, processing_class: Any, cpo_max_length: int | None = None) -> None:
    """Says what the chat template and the tokenizer make of the first rows that a user may not expect.

    Args:
        opened: a set; streams are not read ahead for this.
        processing_class: a tokenizer, or a processor that has one.
        cpo_max_length: where given, CPOTrainer's own tokens are compared, too.
    """
    if isinstance(opened.dataset, IterableDataset) or not PartialState().is_main_process:
        return
    rows = list(islice(opened, _COMPARED))
    tails: list[tuple[int, list[int]]] = []
    ours = tokenize(rows, processing_class, opened.reader.where, lambda i, tail: tails.append((i, tail)))
    _report_tails(opened.reader.split, rows, tails, processing_class)
    bos = getattr(getattr(processing_class, "tokenizer", processing_class), "bos_token_id", None)
    doubled = [i for i, tokens in enumerate(ours) if bos is not None and tokens.prompt[:2] == [bos, bos]]
    if doubled:
        logger.warning(
            "%s: %d of the first %d rows begin with two begin tokens (the first is row %d): the text has one already, "
            "and the tokenizer adds one. Remove it from the text",
            opened.reader.split,
            len(doubled),
            len(rows),
            doubled[0],
        )
    if cpo_max_length is not None:
        _compare_with_cpo(opened, rows, ours, processing_class, cpo_max_length)


def _report_tails(
    split: str, rows: Sequence[PreferenceRow], tails: Sequence[tuple[int, list[int]]], processing_class: Any
) -> None:
    """Prompts whose end is rendered or tokenized otherwise before a completion than alone."""
    if not tails:
        return
    asked = []
    for i, tail in tails:
        last = "" if isinstance(rows[i].prompt, str) else text_of(rows[i].prompt[-1:]).strip()
        if last and last in processing_class.decode(tail):
            asked.append(i)
    first, tail = tails[0]
    logger.log(
        logging.WARNING if asked else logging.INFO,
        "%s: in %d of the first %d rows the prompt alone ends otherwise than before its completion (the first is row "
        "%d, which alone ends with %r): the completion begins where they part%s",
        split,
        len(tails),
        len(rows),
        first,
        processing_class.decode(tail),
        f". In {len(asked)} rows it begins before the last message of the prompt, which is scored, too: take a chat "
        "template that renders a prompt the same way with and without a completion"
        if asked
        else "",
    )


def _compare_with_cpo(
    opened: OpenedSet,
    rows: Sequence[PreferenceRow],
    ours: Sequence[RowTokens],
    processing_class: Any,
    max_length: int,
) -> None:
    """Logs in how many of the rows CPOTrainer's own tokens are others, and how."""
    cpo = CPOTokenizer(opened.reader, processing_class, max_length, None, is_encoder_decoder=False)
    ways: Counter[str] = Counter()
    different = 0
    for theirs, tokens in zip(_by_cpo(cpo, rows), ours, strict=True):
        found = {"CPOTrainer raises an error"}
        if theirs is not None:
            found = _differences(cpo_columns(tokens, max_length), theirs)
        different += bool(found)
        ways.update(found)
    if different:
        logger.info(
            "%s: CPOTrainer's own tokens differ in %d of the first %d rows: %s. tokenization='cpo' gives them",
            opened.reader.split,
            different,
            len(rows),
            "; ".join(f"{way} in {n}" for way, n in ways.most_common()),
        )


def _by_cpo(cpo: CPOTokenizer, rows: Sequence[PreferenceRow]) -> list[dict[str, Any] | None]:
    """Each row's columns; None where CPOTrainer cannot tokenize it."""
    try:
        made = cpo.columns(rows, range(len(rows)))
    except RowError:
        return [each for row in rows for each in _by_cpo(cpo, [row])] if len(rows) > 1 else [None]
    return [{name: column[i] for name, column in made.items()} for i in range(len(rows))]


def _differences(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> set[str]:
    """In words, of one row."""
    found = set()
    for side in ("chosen", "rejected"):
        (mine, my_labels), (its, its_labels) = (
            (row[f"{side}_input_ids"], row[f"{side}_labels"]) for row in (ours, theirs)
        )
        if np.array_equal(mine, its):
            if not np.array_equal(my_labels, its_labels):
                found.add("the completion begins at another token")
        elif len(its) == len(mine) + 1 and np.array_equal(its[:-1], mine):
            found.add("one more end token")
        elif len(its) == len(mine) + 1 and np.array_equal(its[1:], mine):
            found.add("one more begin token")
        elif len(its) == len(mine) + 2 and np.array_equal(its[1:-1], mine):
            found.add("one more begin token and one more end token")
        else:
            found.add("other tokens")
    return found
