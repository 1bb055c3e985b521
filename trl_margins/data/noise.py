"""Label noise: pairs whose completions are swapped on purpose, to test a trainer's robustness."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from datasets import Dataset, Value

from ..pairs import IS_FLIPPED
from ..rows import RowReader
from ..rows.raw import raw_rows
from ..rows.scores import find_score_columns
from .evaluation_factors import BERTSCORE_METRICS
from .formats import one_split, with_format_of

logger = logging.getLogger(__name__)

KINDS = ("random", "length")


def flip_labels(
    dataset: Dataset,
    rate: float,
    kind: str = "random",
    seed: int = 0,
    score_columns: Sequence[str] | None = None,
    *,
    prompt_column: str | None = None,
    system_column: str | None = None,
) -> Dataset:
    """The data set with round(rate · n) of its n pairs flipped, and a bool column `is_flipped`.

    `random` flips any pairs. `length` flips only pairs whose chosen completion is longer, which teaches that shorter
    is better: the structured noise of GAPO (arXiv 2602.04909), section 6.2. Both draw uniformly; with the same seed, a
    higher rate flips the same pairs and more.

    A flip is an annotator's mistake: the completions swap, and so do all columns that belong to them, that is, every
    two whose names differ only by chosen/rejected, such as `chosen_model` and `rejected_model`. So do BERTScore's
    precision and recall, each of which becomes the other; they are recognized by their metrics' names, so under
    another name they have to be added after the noise. A `messages` column with the chosen completion follows it.

    The scores stay on their side, since they are what the mistaken annotator says: score_chosen ≥ score_rejected still
    holds, as in data with such mistakes, and so does |score_chosen − score_rejected|, so a weight made of it gives the
    wrong label what it gave the right one. Only the columns that a trainer would read are scores; others like them
    swap.

    Args:
        dataset: pairs in any form that TRL takes.
        rate: share of all pairs to flip, in [0, 1).
        kind: `random` or `length`. Length is that of the completion's text, in characters, without the prompt.
        seed: of the draw.
        score_columns: the score columns, as for the trainers; by default, known names are looked for.
        prompt_column, system_column: the columns of prompt and system message, as for the trainers.

    Raises:
        ValueError: an unknown kind, a rate outside [0, 1), fewer pairs to draw from than the rate asks for, columns
            that are missing, flipped already or cannot be swapped, and with `length` a row without completions.
        TypeError: a stream, or several splits.
    """
    _check(rate, kind)
    dataset = one_split(dataset, "flip_labels")
    names = dataset.column_names
    if missing := {"chosen", "rejected"} - set(names):
        raise ValueError(f"the data set has no column {' and no column '.join(sorted(missing))}, only {names}")
    if IS_FLIPPED in names:
        raise ValueError(f"the data set has a column {IS_FLIPPED!r} already: flip the labels of the original")
    scores = find_score_columns(names, score_columns)
    pairs = _pairs(names, scores.names if scores else ())
    for one, other in pairs:
        if dataset.features[one] != dataset.features[other]:
            raise ValueError(
                f"columns {one!r} and {other!r} cannot swap, since their types are {dataset.features[one]} and "
                f"{dataset.features[other]}: give one of them the other's, with dataset.cast_column"
            )
    rows = dataset.with_format(None)
    candidates = _longer_chosen(rows, prompt_column, system_column) if kind == "length" else np.arange(len(rows))
    n_flips = round(rate * len(rows))
    if n_flips > len(candidates):
        raise ValueError(
            f"{kind}:{rate:g} flips {n_flips} of {len(rows)} pairs, but only {len(candidates)} have a longer chosen "
            f"completion: the rate can be {len(candidates) / len(rows):.6g} at most"
        )
    flipped = np.zeros(len(rows), bool)
    flipped[np.random.default_rng(seed).permutation(candidates)[:n_flips]] = True
    columns = [name for pair in pairs for name in pair]
    copies = [name for name in ("messages",) if name in names]
    noisy = rows.map(
        _swap,
        batched=True,
        with_indices=True,
        input_columns=[*columns, *copies],
        fn_kwargs={"columns": columns, "copies": copies, "flipped": flipped},
        features=dataset.features,
        desc="Flipping labels",
    ).add_column(IS_FLIPPED, flipped, feature=Value("bool"))
    swapped, stayed = ", ".join("/".join(pair) for pair in pairs), "/".join(scores.names) if scores else "nothing"
    logger.info(f"flipped {n_flips} of {len(rows)} pairs ({kind}): {swapped} swapped, {stayed} stayed")
    return with_format_of(noisy, dataset, IS_FLIPPED)


def parse_noise(text: str) -> tuple[str, float]:
    """(kind, rate) of `random:0.2` or `length:0.4`; a ValueError for anything else."""
    kind, _, number = text.partition(":")
    try:
        rate = float(number)
        _check(rate, kind)
    except ValueError as error:
        form = "noise is written KIND:RATE, for example random:0.2 or length:0.4"
        raise ValueError(f"{form}, not {text!r}: {error}") from None
    return kind, rate


def _check(rate: float, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of noise {kind!r}; known: {', '.join(KINDS)}")
    if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 <= rate < 1:
        raise ValueError(f"the rate is the share of pairs to flip, at least 0 and below 1, got {rate!r}")


def _pairs(names: Sequence[str], scores: Sequence[str]) -> list[tuple[str, str]]:
    """Columns that swap under a flip."""
    others = {name: name.replace("chosen", "rejected").replace("Chosen", "Rejected") for name in names}
    pairs = [
        (name, other)
        for name, other in others.items()
        if other != name and other in names and not {name, other} & set(scores)
    ]
    precision, recall = BERTSCORE_METRICS[:2]
    for name in names:
        other = name.replace(precision, recall) if precision in name else name.replace(recall, precision)
        if other not in names:
            raise ValueError(
                f"column {name!r}: a flip turns {precision} and {recall} into each other, and there is no column "
                f"{other!r} to swap it with; flip the labels first, then add evaluation factors"
            )
        if precision in name:
            pairs.append((name, other))
    sided = {name for name in names if "chosen" in name.lower() or "rejected" in name.lower()}
    if alone := sorted(sided.difference(scores, *pairs)):
        logger.warning("%s: no column of the other side to swap with, so flipped pairs keep their values", alone)
    return pairs


def _longer_chosen(rows: Dataset, prompt_column: str | None, system_column: str | None) -> np.ndarray:
    """Rows whose chosen completion has more characters than the rejected one."""
    reader = RowReader.of(rows.column_names, "given", prompt_column, system_column)
    texts = (reader(raw, i).texts[1] for i, raw in enumerate(raw_rows(rows, reader.needed, reader.split)))
    return np.flatnonzero([len(chosen) > len(rejected) for chosen, rejected in texts])


def _swap(*values_and_rows: list[Any], columns: list[str], copies: list[str], flipped: np.ndarray) -> dict[str, Any]:
    """A function for `Dataset.map`; `columns` has the pairs one after the other, and the row numbers come last."""
    *values, rows = values_and_rows
    batch = {name: list(column) for name, column in zip([*columns, *copies], values, strict=True)}
    for i, row in enumerate(rows):
        if not flipped[row]:
            continue
        for name in copies:
            if batch[name][i] == batch["chosen"][i]:
                batch[name][i] = batch["rejected"][i]
        for one, other in zip(columns[::2], columns[1::2], strict=True):
            batch[one][i], batch[other][i] = batch[other][i], batch[one][i]
    return batch
