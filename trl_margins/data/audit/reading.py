"""One pass over the texts of a split: which rows can be read, and what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..evaluation_factors import answer_text, answer_texts, compute
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

    implicit: bool  # no prompt apart from the answers
    rows: list[int] = field(default_factory=list)  # those that could be read, as the next two lists
    keys: list[Key] = field(default_factory=list)
    n_words: list[tuple[int, int, int]] = field(default_factory=list)  # prompt, chosen, rejected
    factors: list[float] = field(default_factory=list)  # of the sample
    found: dict[str, Found] = field(default_factory=dict)  # by what is wrong: a field of SplitAudit

    def note(self, what: str, row: int, example: str = "") -> None:
        found = self.found.get(what, Found(0, row, example))
        self.found[what] = replace(found, n=found.n + 1)


def read_texts(dataset: Dataset, split: str, sample: set[int]) -> Texts:
    """Reads every row; computes evaluation factors in those of the sample."""
    from datasets.utils import tqdm

    columns = [name for name in ("chosen", "rejected", "prompt") if name in dataset.column_names]
    texts = Texts(implicit="prompt" not in columns)
    rows = _rows(dataset.select_columns(columns))
    # a short pass needs no bar
    for number, row in enumerate(tqdm(rows, total=len(dataset), desc=f"Reading {split}", delay=2, leave=False)):
        try:
            prompt, chosen, rejected = pair_texts(row)
        except (ValueError, TypeError, AttributeError) as error:
            texts.note("unreadable", number, shortened(str(error)))
            continue
        texts.rows.append(number)
        texts.keys.append((digest(prompt), digest(row["chosen"]), digest(row["rejected"])))
        texts.n_words.append((len(prompt.split()), len(chosen.split()), len(rejected.split())))
        if number in sample:
            texts.factors += compute([chosen], [rejected])
        if isinstance(row.get("prompt"), list) and isinstance(row["chosen"], str):
            texts.implicit = True
            texts.note("unused_prompts", number)
        # of an implicit prompt and the same answer twice nothing tells where one ends and the other begins
        if not prompt.strip() and row["chosen"] != row["rejected"]:
            texts.note("empty_prompts", number)
        if not chosen.strip():
            texts.note("empty_chosen", number)
        if not rejected.strip():
            texts.note("empty_rejected", number)
    return texts


def pair_texts(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The texts of prompt, chosen and rejected.

    Raises:
        ValueError: no trainer could read the row.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    for name, value in row.items():
        if value == [] or (value is None and name != "prompt"):
            raise ValueError(f"{name} is {value!r}")
    if type(chosen) is not type(rejected):
        raise ValueError("one of chosen and rejected is a string, the other is not")
    texts = answer_texts(chosen, rejected, prompt)
    if isinstance(chosen, str):
        if isinstance(prompt, str):
            return prompt, *texts
        if "prompt" in row and not isinstance(prompt, list):
            raise ValueError(f"prompt is {prompt!r}")
        if not chosen or not rejected:
            raise ValueError("an answer is empty that should begin with the prompt")
        return (chosen[: len(chosen) - len(texts[0])] if chosen != rejected else ""), *texts
    if prompt is not None and not isinstance(prompt, str):
        return _all_said(prompt), *texts
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) - 1 if shared is None else shared
    if not shared:
        raise ValueError("chosen and rejected share no first messages that could be the prompt")
    return _all_said(chosen[:shared]), *texts


def shortened(text: str) -> str:
    """At most 143 characters: an example for a line of a report."""
    return text if len(text) <= 143 else f"{text[:60]} … {text[-80:]}"


def _all_said(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of all messages, whoever speaks."""
    return answer_text([{**message, "role": "assistant"} for message in messages])


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Many times faster than by the dataset's own iterator."""
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
