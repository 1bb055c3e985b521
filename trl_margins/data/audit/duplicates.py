"""Rows that say the same, in one split or in two. They are compared by digests of their texts, which fit in memory
where the texts do not."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

Key = tuple[bytes, bytes, bytes]  # digests of prompt, chosen, rejected


@dataclass(frozen=True)
class Duplicates:
    """Rows that say the same. Empty prompts are no repetition of each other."""

    n_identical: int  # rows beyond the first of their kind
    n_contradicting: int  # rows whose answers stand the other way round in another row
    n_same_answer: int  # chosen is rejected
    n_prompts: int  # distinct ones
    n_repeated_prompts: int  # distinct prompts of several rows
    most_frequent_prompt: int  # rows


@dataclass(frozen=True)
class SharedPrompts:
    """Prompts that stand in two splits."""

    splits: tuple[str, str]
    n_prompts: int
    n_rows: tuple[int, int]  # rows that have them, in each


def digest(value: Any) -> bytes:
    """16 bytes that are the same for the same text or messages."""
    said = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def count_prompts(keys: Iterable[Key]) -> Counter[bytes]:
    """Rows of each prompt that is not empty."""
    prompts = Counter(prompt for prompt, _, _ in keys)
    del prompts[digest("")]
    return prompts


def count_duplicates(keys: Iterable[Key]) -> Duplicates:
    """Within one split."""
    rows, prompts = Counter(keys), count_prompts(keys)
    return Duplicates(
        n_identical=rows.total() - len(rows),
        n_contradicting=sum(n for (p, w, r), n in rows.items() if w != r and (p, r, w) in rows),
        n_same_answer=sum(n for (_, w, r), n in rows.items() if w == r),
        n_prompts=len(prompts),
        n_repeated_prompts=sum(n > 1 for n in prompts.values()),
        most_frequent_prompt=max(prompts.values(), default=0),
    )


def shared_prompts(prompts: Mapping[str, Counter[bytes]]) -> list[SharedPrompts]:
    """Between any two splits; those that share none are left out."""
    return [
        SharedPrompts((a, b), len(both), (sum(prompts[a][p] for p in both), sum(prompts[b][p] for p in both)))
        for a, b in combinations(prompts, 2)
        if (both := prompts[a].keys() & prompts[b].keys())
    ]
