"""Label noise: pairs whose answers are swapped on purpose, to see what a trainer makes of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..pairs import IS_FLIPPED
from ..rows import RowReader
from ..rows.opened import raw_rows
from ..rows.scores import find_score_columns
from .evaluation_factors import BERTSCORE_METRICS
from .formats import transformed

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

logger = logging.getLogger(__name__)

KINDS = ("random", "length")
_SIDES = (("chosen", "rejected"), ("Chosen", "Rejected"))


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

    `random` flips any pairs. `length` flips only pairs whose chosen answer is the longer one, which teaches that
    shorter is better: the structured noise of GAPO (arXiv 2602.04909), section 6.2. Either draws uniformly; with the
    same seed, a higher rate flips the same pairs and more.

    A flip is an annotator's mistake: the answers swap, and so does all that belongs to an answer, that is, every two
    columns whose names differ only by chosen/rejected, as `chosen_model` and `rejected_model`. So do BERTScore's
    precision and recall of a pair, which are each other with the answers swapped; they are known by their metrics'
    names, so under another name they have to be added after the noise. A `messages` column goes on being the chosen
    answer where it was.

    The scores stay on their side, for they are what the mistaken annotator says: score_chosen ≥ score_rejected goes on
    holding, as it does in data with such mistakes, and |score_chosen − score_rejected| is still that of the pair, so a
    weight made of it gives the wrong label what it gave the right one. Scores are only the columns that a trainer
    would read; others of the kind swap.

    Args:
        dataset: pairs in any form that TRL takes.
        rate: share of all pairs to flip, in [0, 1).
        kind: `random` or `length`. Length is that of the answer's text, in characters, without the prompt.
        seed: of the draw.
        score_columns: where the scores are, as for the trainers; by default known names are looked for.
        prompt_column, system_column: where prompt and system message are, as for the trainers.

    Raises:
        ValueError: an unknown kind, a rate outside [0, 1), fewer pairs to draw from than the rate asks for, columns
            that are missing, flipped already or cannot be swapped, and with `length` a row without answers.
        TypeError: not one data set in memory or on disk: a stream, or several splits.
    """
    import numpy as np
    from datasets import Dataset, Value

    _check(rate, kind)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"flip_labels takes one split that is not streamed, got {type(dataset).__name__}")
    dataset = transformed(dataset)
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
                f"columns {one!r} and {other!r} cannot swap, for they are of the types {dataset.features[one]} and "
                f"{dataset.features[other]}: give one of them the other's, with dataset.cast_column"
            )
    shown, rows = dataset.format, dataset.with_format(None)
    candidates = _longer_chosen(rows, prompt_column, system_column) if kind == "length" else np.arange(len(rows))
    n_flips = round(rate * len(rows))
    if n_flips > len(candidates):
        raise ValueError(
            f"{kind}:{rate:g} flips {n_flips} of {len(rows)} pairs, but only {len(candidates)} have a longer chosen "
            f"answer: the rate can be {len(candidates) / len(rows):.6g} at most"
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
    logger.info(
        "flipped %d of %d pairs (%s): %s swapped, %s stayed",
        n_flips,
        len(rows),
        kind,
        ", ".join("/".join(pair) for pair in pairs),
        "/".join(scores.names) if scores else "no scores, so nothing",
    )
    return noisy.with_format(
        shown["type"], [*shown["columns"], IS_FLIPPED], shown["output_all_columns"], **shown["format_kwargs"]
    )


def parse_noise(text: str) -> tuple[str, float]:
    """(kind, rate) of `random:0.2` or `length:0.4`.

    Raises:
        ValueError: another form, an unknown kind, or a rate outside [0, 1).
    """
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
    pairs = []
    for name in names:
        other = name
        for chosen, rejected in _SIDES:
            other = other.replace(chosen, rejected)
        if other != name and other in names and not {name, other} & set(scores):
            pairs.append((name, other))
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
    sided = {name for name in names if any(side in name for sides in _SIDES for side in sides)}
    if alone := sorted(sided.difference(scores, *pairs)):
        logger.warning("%s: no column of the other side to swap with, so flipped pairs keep what is there", alone)
    return pairs


def _longer_chosen(rows: Dataset, prompt_column: str | None, system_column: str | None) -> np.ndarray:
    """Rows whose chosen completion has more characters than the rejected one."""
    import numpy as np

    reader = RowReader.of(rows.column_names, "given", prompt_column, system_column)
    longer = np.zeros(len(rows), bool)
    for i, raw in enumerate(raw_rows(rows, reader.needed, reader.split)):
        chosen, rejected = reader(raw, i).texts[1]
        longer[i] = len(chosen) > len(rejected)
    return np.flatnonzero(longer)


def _swap(*values_and_rows: list[Any], columns: list[str], copies: list[str], flipped: np.ndarray) -> dict[str, Any]:
    """What `map` calls on a batch; `columns` come two by two, the rows' numbers last."""
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
