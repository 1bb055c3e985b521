"""Votes on two answers: words, columns and strengths become two scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .form import RowError
from .list_forms import BETTER, SAFER, VOTE, ListForm
from .scores import as_number

Scores = tuple[float | None, float | None]

_WINNERS = {
    "model_a": (1.0, 0.0),
    "model_b": (0.0, 1.0),
    "tie": (0.5, 0.5),
    **dict.fromkeys(("tie (bothbad)", "tie (both bad)", "bothbad", "both_bad"), (0.0, 0.0)),
}


def of_winner(row: Mapping[str, Any], form: ListForm, where: str) -> Scores:
    """Of the winner's word, letter, number or model."""
    (column,) = form.scores
    if (given := as_number(row[column])) is None:
        return None, None
    known = {str(row[name]).lower(): _WINNERS[name] for name in form.models}
    for name, side in zip(form.responses, ("model_a", "model_b"), strict=True):
        known |= {said.lower(): _WINNERS[side] for said in (name, name[-1])}
    known |= _WINNERS
    word = f"{given:g}" if isinstance(given, float) else str(given).strip().lower()
    if word not in known:
        one, other = (name[-1] for name in form.responses)
        what = f"is no winner, which are model_a, model_b, tie, tie (bothbad), both_bad, {one} and {other}"
        if form.scores in (BETTER, SAFER):
            what = f"is neither {one} nor {other}, the numbers of the two responses"
        raise RowError(f"column {column!r}, {where}: {given!r} {what}: replace it with dataset.map, or drop the row")
    return known[word]


def of_columns(row: Mapping[str, Any], where: str) -> Scores:
    """Of Kaggle's three columns, one of which is 1."""
    given = [as_number(row[name]) for name in VOTE]
    if given.count(1) == 1 and given.count(0) == 2:
        return [_WINNERS[name] for name in ("model_a", "model_b", "tie")][given.index(1)]
    raise RowError(f"columns {', '.join(VOTE)}, {where}: {given} are not one 1 and two 0: drop the row")


def of_strength(strength: float | None) -> Scores:
    """Of HelpSteer2's strength, which is negative where the first answer is better."""
    return (None, None) if strength is None else (max(-strength, 0.0), max(strength, 0.0))


def check_labels(row: Mapping[str, Any], scores: Scores, where: str) -> None:
    """Raises a RowError if SHP's label, 1 where A is better, contradicts the scores."""
    a, b = scores
    label = row.get("labels")
    if label in (0, 1) and a is not None and b is not None and a != b and label != (a > b):
        raise RowError(
            f"column 'labels', {where}: {label} contradicts the scores {a:g} and {b:g}: 1 is for an A that scores "
            "higher; correct one of them, or drop the row"
        )
