"""One pass over the texts of a split: which rows can be read, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...rows import PreferenceRow, RowError, RowReader
from ...rows.opened import RowCounts, count_rows
from ..evaluation_factors import completion_texts, compute
from .duplicates import Key, digest

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Found:
    """Rows that have something in common."""

    n: int
    first_row: int
    example: str = ""


@dataclass
class Texts:
    """What the pass keeps of the texts: never the texts themselves."""

    counts: RowCounts = field(default_factory=RowCounts)
    rows: list[int] = field(default_factory=list)  # those that could be read, as the next two lists
    keys: list[Key] = field(default_factory=list)
    n_words: list[tuple[int, int, int]] = field(default_factory=list)  # prompt, chosen, rejected
    factors: list[float] = field(default_factory=list)  # of the sample
    found: dict[str, Found] = field(default_factory=dict)  # by what is wrong: a field of SplitAudit

    def note(self, what: str, row: int, example: str = "") -> None:
        found = self.found.get(what, Found(0, row, example))
        self.found[what] = replace(found, n=found.n + 1)


def read_texts(dataset: Dataset, reader: RowReader, sample: set[int]) -> Texts:
    """Reads every row as training does; computes evaluation factors in those of the sample."""
    from datasets.utils import tqdm

    texts = Texts()
    implicit = reader.prompt_column is None
    # a short pass needs no bar
    with tqdm(total=len(dataset), desc=f"Reading {reader.split}", delay=2, leave=False) as bar:

        def unreadable(error: RowError, number: int) -> None:
            bar.update()
            texts.note("unreadable", number, shortened(str(error)))

        def read(row: PreferenceRow, number: int) -> None:
            bar.update()
            prompt, (chosen, rejected) = row.texts
            texts.rows.append(number)
            texts.keys.append((digest(prompt), *map(digest, row.completions)))
            texts.n_words.append((len(prompt.split()), len(chosen.split()), len(rejected.split())))
            if number in sample:
                compared = completion_texts(row, implicit)
                texts.factors += compute(compared[:1], compared[1:])
            for what, text in (("prompts", prompt), ("chosen", chosen), ("rejected", rejected)):
                if not text.strip():
                    texts.note(f"empty_{what}", number)

        texts.counts = count_rows(dataset, reader, unreadable, read)
    return texts


def shortened(text: str) -> str:
    """At most 300 characters: an example for a line of a report. What is cut is the end, which repeats the data."""
    return text if len(text) <= 300 else f"{text[:299]}…"
