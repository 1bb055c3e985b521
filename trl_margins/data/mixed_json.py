"""Columns of a JSON file that hold values of several types: texts in them stay the texts that they are.

`datasets` holds such a column as JSON, and takes a text that spells JSON for what it spells: the answer `"4"` would be
a number, and `"yes"` in quotes would lose them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, concatenate_datasets

from .broken_files import python_values


def as_written(rows: Dataset, files: Sequence[Path]) -> Dataset:
    """The rows of these files, with the texts of mixed columns as they are written there."""
    mixed = {name: feature for name, feature in rows.features.items() if _is_mixed(feature)}
    if not mixed:
        return rows
    values = chain.from_iterable(map(python_values, files))
    written = [{name: _encoded(row.get(name), feature) for name, feature in mixed.items()} for row in values]
    columns, found = rows.column_names, Dataset.from_list(written, features=Features(mixed))
    if len(mixed) < len(columns):
        found = concatenate_datasets([rows.remove_columns([*mixed]), found], axis=1)
    return found.select_columns(columns)


def _is_mixed(feature: Any) -> bool:
    if isinstance(feature, List):
        return _is_mixed(feature.feature)
    return isinstance(feature, Json) or (isinstance(feature, dict) and any(map(_is_mixed, feature.values())))


def _encoded(value: Any, feature: Any) -> Any:
    """The value with its mixed parts as JSON, which is kept as it is."""
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.dumps(value)
    if isinstance(feature, List):
        return [_encoded(each, feature.feature) for each in value]
    if isinstance(feature, dict):
        return {name: _encoded(value.get(name), inner) for name, inner in feature.items()}
    return value
