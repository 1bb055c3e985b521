"""Preference rows that TRL's trainers stumble over, as they take them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


def without_extras(dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
    """UltraFeedback binarized's rows: beside `chosen` and `rejected` they have the pair's better answer once more as
    `messages`, and the prompt once more as text. TRL's chat templates refuse both; the prompt is in the answers.
    """
    row = next(iter(dataset), None)
    if row is None or not {"chosen", "rejected"} <= row.keys():
        return dataset
    extras = [name for name in ("messages",) if name in row]
    if isinstance(row.get("prompt"), str) and isinstance(row["chosen"], list):
        extras.append("prompt")
    if extras:
        logger.info("%s: leaving out %s, which chosen and rejected hold as messages", split, " and ".join(extras))
        dataset = dataset.remove_columns(extras)
    return dataset
