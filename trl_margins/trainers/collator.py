"""Adds the columns that the objective reads to the batches of TRL's own collators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..forward.shared_rows import packed, shared_rows
from ..pairs import CARRIED, ROW, SCORES, SHARED
from ..rows.scores import as_number, check_row, find_score_columns, problem_of

if TYPE_CHECKING:
    from .model_checks import TokenLimits

# Columns that TRL's collators take for tensors, whatever they hold; the latter CPOTrainer's alone
TOKENS, LOGPS = ("input_ids", "attention_mask", "labels", "pixel_values"), ("_logps",)
StandardRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # input_ids, attention_mask, labels, each [2B, T]


@dataclass
class PairCollator:
    """Wraps a collator; adds `batch["pair_columns"] = {"score_chosen": [B], "score_rejected": [B]}`, float32.

    Rows without scores are accepted: whether an objective needs them is checked before training. A score that is not
    a number stops training where a term reads it (`strict`); where scores only serve the evaluation it is NaN, and
    the pair is left out there.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    score_columns: Sequence[str] | None = None
    strict: bool = True
    columns: Sequence[str] = ()  # further columns of numbers that the objective reads
    if_there: Sequence[str] = ()  # and columns that are added where the rows have them
    standard_rows: Callable[[Mapping[str, Any]], StandardRows | None] | None = None  # for a batch that shares prompts
    width_step: int = 1  # of the shared rows, for the trainer's device
    limits: TokenLimits | None = None  # the model's

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._collated(rows)
        if self.limits is not None:
            self.limits.check_batch(batch, rows)
        if missing := [name for name in self.columns if name not in rows[0]]:
            raise ValueError(
                f"the objective reads {missing}, which these rows do not have: a set that the trainer was not built "
                f"with brings them itself, or is given as eval_dataset. The rows have {sorted(rows[0])}"
            )
        # rows of a set that was put together from the training set and others have no number
        there = (
            name
            for name in self.if_there
            if all(row.get(name) is not None if name == ROW else name in row for row in rows)
        )
        names = [*self.columns, *there]
        carried = {
            name: torch.tensor(
                [as_number(row[name]) for row in rows], dtype=torch.long if name == ROW else torch.float32
            )
            for name in names
        }
        candidates = rows[0] if self.score_columns else [name for name in rows[0] if name not in self.columns]
        columns = find_score_columns(candidates, self.score_columns, strict=False)
        if columns is not None:
            if self.strict:
                for position, row in enumerate(rows):
                    check_row(row, columns, f"pair {position} of a batch")
            scores = [[math.nan if problem_of(score) else score for score in columns.read(row)] for row in rows]
            carried |= dict(zip(SCORES, torch.tensor(scores, dtype=torch.float32).unbind(1), strict=True))
        if carried:
            batch = {**batch, CARRIED: carried}
        standard = None if self.standard_rows is None else self.standard_rows(batch)
        if standard is not None:
            # last: accelerate takes the size of a batch from its first tensor
            batch = {**batch, SHARED: dict(packed(shared_rows(*standard, step=self.width_step)))}
        return batch

    def _collated(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        is_trls = type(self.collator).__module__.startswith("trl.")
        name = getattr(self.collator, "__name__", type(self.collator).__name__)
        own = [each for each in self.columns if is_trls and each.endswith(TOKENS + LOGPS)]
        seen = [{key: row[key] for key in row if key not in own} for row in rows] if own else rows
        try:
            batch = self.collator(seen)
            found = {} if is_trls else _tokens(batch)
        except Exception as error:  # each has its own
            if is_trls and not isinstance(error, KeyError):  # a column that the other base's has
                raise
            raise ValueError(
                f"data_collator: {name} makes no batch of {len(rows)} rows, which have the columns "
                f"{', '.join(rows[0])} ({' '.join(str(error).split())[:200]}): leave data_collator out, or give one "
                "for pairs"
            ) from error
        for side, of_batch in found.items():
            if len(of_batch) != len(rows):
                raise ValueError(
                    f"data_collator: {name} makes a batch of {len(of_batch)} pairs out of {len(rows)} rows"
                )
            given = [
                [*row.get("prompt_ids", ()), *row.get(f"{side}_ids", row.get(f"{side}_input_ids", ()))] for row in rows
            ]
            if any(_are_others(tokens, i, given) for i, tokens in enumerate(of_batch)):
                raise ValueError(
                    f"data_collator: {name} gives the pairs in another order than their rows, which have their scores "
                    "and weights: leave the order as it is (train_sampling_strategy='group_by_length' batches by "
                    "length)"
                )
        return batch


def _are_others(tokens: list[int], place: int, given: list[list[int]]) -> bool:
    """Whether they are another row's and not those of the row at their place; each may be cut, or have more behind."""

    def alike(row: list[int]) -> bool:
        n = min(len(row), len(tokens))
        return n > 0 and row[:n] == tokens[:n]

    return not alike(given[place]) and any(map(alike, given))


def _tokens(batch: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """Of the chosen and the rejected rows, without padding; none for a batch of another form than TRL's."""
    sides = ("chosen", "rejected")
    if "input_ids" in batch and "attention_mask" in batch:
        halves = [*zip(batch["input_ids"].chunk(2), batch["attention_mask"].chunk(2), strict=True)]
    elif all(f"{side}_{name}" in batch for side in sides for name in ("input_ids", "attention_mask")):
        halves = [(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"]) for side in sides]
    else:
        return {}
    return {
        side: [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        for side, (ids, mask) in zip(sides, halves, strict=False)
    }
