"""What an audit warns of, and which methods a split can train."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from ...pairs import IS_FLIPPED, SCORES
from ...rows.scores import why_changed
from ..evaluation_factors import few_words
from .counting import FACTOR, SharedPrompts
from .splits import SplitAudit

# shares of the pairs from which on there is a warning
TIES = 0.01
DUPLICATES = 0.01
TRUNCATED = 0.05
LONGER = 0.65


def find_warnings(splits: Mapping[str, SplitAudit], shared: Sequence[SharedPrompts]) -> Iterator[str]:
    """One sentence each, with the name of the split where there are several."""
    for name, split in splits.items():
        where = f"{name}: " if len(splits) > 1 else ""
        for check in (_of_rows, _of_scores, _of_lengths, _of_texts):
            yield from (where + text for text in check(split))
    for both in shared:
        (first, second), (n_first, n_second) = both.splits, both.n_rows
        yield (
            f"{_counted(both.n_prompts, 'prompt')} {'is' if both.n_prompts == 1 else 'are'} in both {first} "
            f"({_counted(n_first, 'row')}) and {second} ({_counted(n_second, 'row')}), so {second} does not measure "
            "unseen prompts"
        )


def why_not(split: SplitAudit, needs: Collection[str]) -> str | None:
    """Why a method that reads the columns `needs` cannot train on the split; None if it can."""
    missing = [name for name in ("chosen", "rejected") if name not in split.columns]
    if missing:
        return f"no column {' and no column '.join(missing)}"
    if not split.n_rows:
        return "no rows"
    reasons = ["training refuses the rows"] if split.refused else []
    for rows, verb in ((split.unreadable, "read"), (split.untokenizable, "tokenized")):
        if rows is not None:
            reasons.append(f"{_counted(rows.n, 'row')} cannot be {verb}")
    if split.truncation is not None and 0 < split.truncation.n == split.truncation.n_left_empty:
        reasons.append(f"every prompt fills max_length={split.truncation.max_length}")
    elif split.truncation is not None and split.truncation.n_alike and not split.truncation.n_told_apart:
        reasons.append("the completions of every pair have the same tokens")
    if any(name in SCORES for name in needs):
        if split.scores is None:
            reasons.append("needs scores")
        elif split.scores.bad:
            reasons.append(f"column {split.scores.bad[0].column} holds bad scores")
        elif split.scores.n_ties == split.n_rows:
            reasons.append("all pairs are ties")
    if FACTOR in needs and split.factors is not None and split.factors.problem:
        reasons.append(f"column {FACTOR} holds bad values")
    reasons += [f"needs a column {name}" for name in needs if name not in (*SCORES, FACTOR, *split.columns)]
    return "; ".join(reasons) or None


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{part} of {_counted(whole, 'pair')} ({part / whole:.1%})"


def _of_rows(split: SplitAudit) -> Iterator[str]:
    if not split.n_rows:
        yield "there are no rows"
        return
    if split.refused:
        yield split.refused
    for rows, verb in ((split.unreadable, "read"), (split.untokenizable, "tokenized")):
        if rows is not None:
            n = _counted(rows.n, "row")
            yield f"{n} cannot be {verb}, and training stops there; row {rows.first_row}: {rows.example}"
    if split.n_flipped is not None:
        yield f"column {IS_FLIPPED} marks {_share(split.n_flipped, split.n_rows)} as flipped, as in studies of noise"


def _of_scores(split: SplitAudit) -> Iterator[str]:
    scores = split.scores
    if scores is None:
        return
    for bad in scores.bad:
        yield f"column {bad.column} has {bad}: a method that needs scores stops there"
    if scores.gap is None:
        return
    n = scores.gap.n
    if scores.n_changed:
        yield why_changed(scores.n_changed, scores.columns)
    if scores.n_ties > TIES * n:
        yield f"ties: gappo gives {_share(scores.n_ties, n)} weight 0"
    if scores.n_reversed:
        yield (
            f"in {_share(scores.n_reversed, n)} the rejected completion has the higher score: gappo still weighs them "
            "by the size of the gap"
        )
    lowest, highest = scores.gap.minimum, scores.gap.maximum
    if n > 1 and lowest and math.isclose(lowest, highest, rel_tol=1e-9):  # 3.1 − 3 is not 2.1 − 2
        yield f"all score gaps are {lowest:g}: gappo is then SimPO with its loss times {abs(lowest):g}"


def _of_lengths(split: SplitAudit) -> Iterator[str]:
    lengths, truncation = split.lengths, split.truncation
    if lengths is None or lengths.chosen is None:
        return
    n = lengths.chosen.n
    for more, word in ((lengths.n_chosen_longer, "longer"), (lengths.n_chosen_shorter, "shorter")):
        if more > LONGER * n:
            yield (
                f"the chosen completion is the {word} one in {_share(more, n)}: a model can learn the length instead "
                "of what makes a completion better"
            )
    if truncation is None:
        return
    limit = f"max_length={truncation.max_length}"
    if truncation.n_pairs > TRUNCATED * n:
        yield f"{limit} cuts {_share(truncation.n_pairs, n)}: raise it, or filter out the long ones"
    if truncation.n_left_empty:
        yield f"in {_share(truncation.n_left_empty, n)} the prompt alone fills {limit}: training drops the pair"
    if truncation.n_alike:
        yield (
            f"{_share(truncation.n_alike, n)} have the same tokens twice, although their texts differ: the chat "
            f"template, the tokenizer or {limit} removes the difference. They have no gap to learn from"
        )


def _of_texts(split: SplitAudit) -> Iterator[str]:
    yield from split.notes
    if split.empty_prompts is not None:
        rows = _counted(split.empty_prompts.n, "row")
        yield f"{rows} with an empty prompt; the first is row {split.empty_prompts.first_row}"
    duplicates, factors, n = split.duplicates, split.factors, split.n_read
    if duplicates is not None and duplicates.n_identical > DUPLICATES * n:
        yield f"{_share(duplicates.n_identical, n)} repeat another one"
    if duplicates is not None and duplicates.n_contradicting:
        yield f"{_share(duplicates.n_contradicting, n)} contradict another one: the same completions, swapped"
    if factors is not None and factors.problem and n:
        yield factors.problem
    if factors is not None and factors.values is not None:
        said = few_words(factors.values.n, factors.n_zero, factors.n_one)
        yield from filter(None, [said])
