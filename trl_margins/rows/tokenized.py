"""A whole data set to its tokens, and warnings about what the chat template and `max_length` made of it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from trl.trainer.utils import global_then_local_main_first

from ..checks import shown
from .cpo_tokens import CPOTokenizer
from .form import PreferenceRow
from .messages import Part, text_of
from .opened import OpenedSet
from .tokens import PairTokenizer, RowTokens, cpo_columns, each_or_error, tokenize, tokenizer_of, unread

logger = logging.getLogger(__name__)

_STREAMED_AT_ONCE = 64  # rows that a stream reads ahead
_IN_A_ROW = 10_000  # pairs of a stream that are dropped before something is said
_WORD = re.compile(r"\w+")
_LAST = 20  # letters by which the end of a completion is known
_NO_END = 10 * _IN_A_ROW  # of them, and there may be no other
AT_FIRST = 256  # rows of a set that are looked at

TokenColumns = tuple[str, str, str]  # of prompt, chosen, rejected
DPO_COLUMNS: TokenColumns = ("prompt_ids", "chosen_ids", "rejected_ids")
CPO_COLUMNS: TokenColumns = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")


def tokenized(
    opened: OpenedSet, tokenizer: PairTokenizer | CPOTokenizer, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """The set with its token columns, cached by `Dataset.map`. A fast tokenizer uses all cores in one process, too."""
    if isinstance(opened.dataset, IterableDataset):
        listed = partial(_listed, tokenizer)
        return opened.dataset.map(listed, batched=True, batch_size=_STREAMED_AT_ONCE, with_indices=True)
    desc = f"Tokenizing {opened.reader.split} dataset"
    with global_then_local_main_first():
        return opened.dataset.map(tokenizer, batched=True, with_indices=True, num_proc=num_proc, desc=desc)


def _listed(tokenizer: Any, batch: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
    """Lists of tokens, which TRL's collators expect."""
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
    """Drops the pairs without completion tokens, then warns of what the template and truncation made of the rest.

    Args:
        dataset: with tokens.
        opened: the set as it was opened.
        columns: the token columns of prompt, chosen and rejected.
        max_length: pairs whose prompt has this many tokens or more are dropped; None drops none.
        completion_cut: the `max_length` to which the collator truncates later; None where the columns are truncated
            already, or are never truncated.
        processing_class: given for the training set only, whose first rows are then looked at.
        cpo_max_length: compare these rows with CPOTrainer's own tokens, truncated to this length.

    Returns:
        The remaining pairs, and how many were dropped; None for a stream, which cannot be counted.

    Raises:
        ValueError: no pair is left, or in no pair do the completions differ.
    """
    dataset, left = _without_filled(dataset, opened.reader.split, max_length, columns[0])
    if left is not None:
        _check_told_apart(dataset, opened, left, columns, completion_cut)
    if processing_class is not None:
        look_at_first_rows(opened, processing_class, cpo_max_length)
    return dataset, None if left is None else opened.counts.n - len(left)


@dataclass
class _Fits:
    """Whether a pair has room for completions; counts those that have none, and says where training waits for one.

    Raises:
        ValueError: it would wait without end.
    """

    split: str
    max_length: int
    prompt: str
    seen: int = 0
    dropped: int = 0
    in_a_row: int = 0

    def __call__(self, row: Mapping[str, Any]) -> bool:
        found = len(row[self.prompt]) < self.max_length
        self.seen += 1
        self.dropped += not found
        self.in_a_row = 0 if found else self.in_a_row + 1
        if not found:
            self._say()
        return found

    def _say(self) -> None:
        why = f"because the prompt fills max_length={self.max_length}"
        if self.dropped == 10 ** (len(str(self.dropped)) - 1):  # 1, 10, 100 ...
            logger.warning(
                f"{self.split}: {self.dropped:,} of the {self.seen:,} pairs that were read from the stream so far "
                f"were dropped, {why}: raise it to keep them"
            )
        if not self.in_a_row % _IN_A_ROW:
            said = f"{self.split}: the last {self.in_a_row:,} pairs of the stream were dropped, {why}"
            if self.in_a_row >= _NO_END:
                raise ValueError(f"{said}: raise max_length, or end the stream before them")
            logger.warning("%s, and training waits for one that is not", said)


def _without_filled(
    dataset: Dataset | IterableDataset, split: str, max_length: int | None, prompt: str
) -> tuple[Dataset | IterableDataset, np.ndarray | None]:
    """Without the pairs whose prompt alone fills `max_length`; and which pairs are left, which a stream cannot say."""
    if isinstance(dataset, IterableDataset):
        first = iter(dataset.take(_IN_A_ROW))
        if (row := next(first, None)) is None:
            raise ValueError(
                f"no pair of the {split} stream is left: a filter leaves out all of them. "
                "score_gap_transform=hard is one, by its score_gap_threshold"
            )
        # training would look for a batch without end
        if max_length is not None and all(len(each[prompt]) >= max_length for each in chain([row], first)):
            raise ValueError(
                f"no pair of the {split} stream is left, among its first {_IN_A_ROW:,}: the prompts fill "
                f"max_length={max_length}: raise it, shorten the prompts, or filter out what comes before the others"
            )
        return dataset if max_length is None else dataset.filter(_Fits(split, max_length, prompt)), None
    if max_length is None:
        return dataset, np.arange(len(dataset))
    lengths = [pc.list_value_length(prompts).to_numpy() for (prompts,) in arrow_columns(dataset, prompt)]
    left = np.flatnonzero(np.concatenate(lengths) < max_length)
    dropped = len(dataset) - len(left)
    if not len(left):
        raise ValueError(
            f"truncation leaves a completion empty in every one of the {dropped} {split} pairs, because the prompt "
            f"fills max_length={max_length}: raise max_length, or shorten the prompts"
        )
    if dropped:
        logger.warning(
            f"{dropped} of {len(dataset)} {split} pairs were dropped, because the prompt fills "
            f"max_length={max_length}: raise it to keep them"
        )
        dataset = dataset.select(left)
    return dataset, left


def _check_told_apart(
    dataset: Dataset, opened: OpenedSet, left: np.ndarray, columns: TokenColumns, max_length: int | None
) -> None:
    """Warns of pairs whose completions differ as text, but not as tokens; an error if that is true of all pairs."""
    alike = sum(_n_alike(arrays, max_length) for arrays in arrow_columns(dataset, *columns))
    split, n = opened.reader.split, len(dataset)
    same = len(opened.counts.same_rows.intersection(left.tolist()))
    if alike == n > same:
        raise ValueError(
            f"chosen and rejected have the same tokens in every one of the {n} {split} pairs, although their texts "
            "differ: the chat template or the tokenizer drops the difference (an end token alone is none: every "
            "completion gets one), or max_length truncates them before they differ. Look at "
            "tokenizer(prompt + chosen), or tokenizer.apply_chat_template(prompt + chosen, tokenize=False)"
        )
    if alike > same:
        logger.warning(
            f"{alike - same} of {n} {split} pairs have the same tokens twice, although their texts differ: the chat "
            "template, the tokenizer or max_length removes the difference. They have no gap to learn from"
        )


def _n_alike(arrays: list[pa.ListArray], max_length: int | None) -> int:
    _, chosen, rejected = arrays
    n_prompt, *lengths = (pc.list_value_length(array).to_numpy() for array in arrays)
    if max_length is not None:
        room = np.maximum(max_length - n_prompt, 0)
        lengths = [np.minimum(each, room) for each in lengths]
    return sum(
        chosen[i].values[: lengths[0][i]].equals(rejected[i].values[: lengths[0][i]])
        for i in np.flatnonzero(lengths[0] == lengths[1]).tolist()
    )


def arrow_columns(dataset: Dataset, *columns: str) -> Iterator[list[pa.Array]]:
    """The columns as Arrow arrays, 2,048 rows at a time: no Python object per token."""
    for table in dataset.with_format("arrow", columns=list(columns)).iter(batch_size=2048):
        yield [table[name].combine_chunks() for name in columns]


def look_at_first_rows(opened: OpenedSet, processing_class: Any, cpo_max_length: int | None = None) -> None:
    """Logs what the chat template and the tokenizer do to the first rows that a user may not expect.

    With `cpo_max_length`, they are also compared with CPOTrainer's own tokens. Streams are not read ahead for this.
    """
    if isinstance(opened.dataset, IterableDataset) or not PartialState().is_main_process:
        return
    rows, split = list(islice(opened, AT_FIRST)), opened.reader.split
    ours = tokenize(rows, processing_class, opened.reader.where)
    log_unread(split, rows, processing_class)
    log_notes(split, rows, ours, processing_class)
    if cpo_max_length is not None:
        cpo = CPOTokenizer(None, processing_class, cpo_max_length, None, is_encoder_decoder=False)
        _compare_with_cpo(split, rows, [cpo_columns(tokens, cpo_max_length) for tokens in ours], cpo)


def log_unread(
    name: str, rows: Sequence[PreferenceRow], processing_class: Any, numbers: Sequence[int] | None = None
) -> None:
    """Logs what the chat template does not read. The arguments are those of `log_notes`."""
    for note in unread(rows, processing_class, range(len(rows)) if numbers is None else numbers):
        logger.warning("%s: %s", name, note)


def log_notes(
    name: str,
    rows: Sequence[PreferenceRow],
    ours: Sequence[RowTokens],
    processing_class: Any,
    numbers: Sequence[int] | None = None,
    only_reads: bool = False,
) -> None:
    """Logs what the tokens of the first rows of a set have that a user may not expect.

    Args:
        name: of the set.
        rows: N of them, which could be read.
        ours: [N] their tokens.
        numbers: [N] their numbers in the set; those from 0 on by default.
        only_reads: the model does not learn completions from them: where they begin and end is not looked at.
    """
    rows, ours = rows[:AT_FIRST], ours[:AT_FIRST]
    numbers = range(len(rows)) if numbers is None else numbers[:AT_FIRST]
    _log_spelling(name, rows, ours, processing_class, numbers)
    if not only_reads:
        _log_tails(name, rows, [tokens.tail for tokens in ours], processing_class, numbers)
        _log_no_ends(name, rows, ours, tokenizer_of(processing_class), numbers)


def _log_spelling(
    name: str, rows: Sequence[PreferenceRow], ours: Sequence[RowTokens], processing_class: Any, numbers: Sequence[int]
) -> None:
    """Warns of texts that are not in the tokens, and of begin and end tokens that are there twice."""
    tokenizer = tokenizer_of(processing_class)
    found = [_unspelled(*each, processing_class) for each in zip(rows, ours, strict=True)]
    if lost := list(filter(None, found)):
        logger.warning(
            f"{name}: in {len(lost)} of the first {len(rows)} rows the tokens do not spell the text, such as "
            f"{lost[0]}: look at the chat template and the tokenizer"
        )
    special = _special(tokenizer)
    ended = (any(_ends_twice(ids, special, tokenizer) for ids in tokens.completions) for tokens in ours)
    if twice := [i for i, is_so in zip(numbers, ended, strict=True) if is_so]:
        logger.warning(
            f"{name}: in {len(twice)} of the first {len(rows)} rows a completion ends with two end tokens (the first "
            f"is row {twice[0]}): the text has one already. Remove it from the text, with what follows it"
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    begun = (bos is not None and tokens.prompt[:2] == [bos, bos] for tokens in ours)
    if doubled := [i for i, is_so in zip(numbers, begun, strict=True) if is_so]:
        logger.warning(
            f"{name}: {len(doubled)} of the first {len(rows)} rows begin with two begin tokens (the first is row "
            f"{doubled[0]}): the text has one already, and the tokenizer adds one. Remove it from the text"
        )


def _special(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}


def _log_no_ends(
    name: str, rows: Sequence[PreferenceRow], ours: Sequence[RowTokens], tokenizer: Any, numbers: Sequence[int]
) -> None:
    """Warns of completions that end with nothing that a model could stop at."""
    special, never = _special(tokenizer), []
    for i, row, tokens in zip(numbers, rows, ours, strict=True):
        sides = zip(row.completions, tokens.completions, strict=True)
        if any(_ends_never(completion, ids, special, tokenizer) for completion, ids in sides):
            never.append(i)
    if never:
        logger.warning(
            f"{name}: in {len(never)} of the first {len(rows)} rows a completion ends without a special token (the "
            f"first is row {never[0]}): a model that learns from them does not stop. Let the chat template end the "
            "assistant's messages with the end token"
        )


def _ends_twice(ids: list[int], special: Collection[int], tokenizer: Any) -> bool:
    """Whether the last two special tokens are the same, with nothing but blanks between them."""
    places = [i for i, id in enumerate(ids) if id in special][-2:]
    if len(places) < 2 or ids[places[0]] != ids[places[1]]:
        return False
    return not tokenizer.decode(ids[places[0] + 1 : places[1]]).strip()


def _ends_never(completion: Part, ids: list[int], special: Collection[int], tokenizer: Any) -> bool:
    """Whether the end of the last message is behind the last special token."""
    last = max((i for i, id in enumerate(ids) if id in special), default=-1)
    said = _letters(text_of(completion if isinstance(completion, str) else completion[-1:]))[-_LAST:]
    return bool(said) and said in _letters(tokenizer.decode(ids[last + 1 :]))


def _unspelled(row: PreferenceRow, tokens: RowTokens, processing_class: Any) -> str | None:
    """What of a prompt or a completion is not in the tokens; None if all of it is."""
    for completion, ids in zip(row.completions, tokens.completions, strict=True):
        decoded = processing_class.decode([*tokens.prompt, *ids])
        letters = _letters(decoded)
        for text, is_verbatim in chain(_texts(row.prompt), _texts(completion)):
            if not all(_letters(each) in letters for each in ([text] if is_verbatim else _WORD.findall(text))):
                return f"{shown(text)}, which became {shown(decoded)}"
    return None


def _texts(part: Part) -> Iterator[tuple[str, bool]]:
    """Each text of a prompt or a completion, and whether templates write it as it is, not as JSON of a tool's.

    Of the model's own earlier turns, what comes after its thoughts, which templates leave out.
    """
    if isinstance(part, str):
        yield part, True
        return
    for i, message in enumerate(part, start=1):
        text, role = text_of([message]), message["role"]
        if role == "assistant" and i < len(part):
            text = text.rpartition("</think>")[2]
        yield text, role in ("system", "user", "assistant")


def _letters(text: str) -> str:
    """Without what tokenizers and templates change at will: blanks, case, and composed characters, which are taken
    apart, as a mark may be in another part than its letter.
    """
    return "".join(normalize("NFKD", text).casefold().split())


def _log_tails(
    name: str,
    rows: Sequence[PreferenceRow],
    tails: Sequence[list[int]],
    processing_class: Any,
    numbers: Sequence[int],
) -> None:
    """Logs prompts whose last tokens are different before a completion."""
    texts = {i: processing_class.decode(tail) for i, tail in enumerate(tails) if tail}
    if not texts:
        return
    last = {i: text_of(rows[i].prompt[-1:]).strip() for i in texts if rows[i].is_conversational}
    asked = sum(bool(last[i]) and last[i] in texts[i] for i in last)
    first = min(texts)
    message = (
        f"{name}: in {len(texts)} of the first {len(rows)} rows the prompt alone ends otherwise than before its "
        f"completion (the first is row {numbers[first]}, which alone ends with {texts[first]!r}): the completion "
        "begins at the first different token"
    )
    if asked:
        message += (
            f". In {asked} rows it begins before the last message of the prompt, which is then scored as well: use a "
            "chat template that renders a prompt the same way with and without a completion"
        )
    logger.log(logging.WARNING if asked else logging.INFO, message)


def _compare_with_cpo(
    split: str, rows: list[PreferenceRow], ours: Sequence[Mapping[str, np.ndarray]], cpo: CPOTokenizer
) -> None:
    """Logs in how many of the rows CPOTrainer's own tokens differ, and how."""
    found = [
        {"CPOTrainer raises an error"} if isinstance(theirs, Exception) else _differences(mine, theirs)
        for mine, theirs in zip(ours, each_or_error(cpo.rows, rows), strict=True)
    ]
    if different := sum(map(bool, found)):
        ways = "; ".join(f"{way} in {n}" for way, n in Counter(way for each in found for way in each).most_common())
        logger.info(
            f"{split}: CPOTrainer's own tokens differ in {different} of the first {len(rows)} rows: {ways}. "
            "tokenization='cpo' gives them"
        )


def _differences(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> set[str]:
    """Describes how the tokens of one row differ."""
    found = set()
    for side in ("chosen", "rejected"):
        mine, its = (row[f"{side}_input_ids"].tolist() for row in (ours, theirs))
        if mine == its:
            if not np.array_equal(ours[f"{side}_labels"], theirs[f"{side}_labels"]):
                found.add("the completion begins at another token")
        elif its[:-1] == mine:
            found.add("one more end token")
        elif its[1:] == mine:
            found.add("one more begin token")
        else:
            found.add("one more begin token and one more end token" if its[1:-1] == mine else "other tokens")
    return found
