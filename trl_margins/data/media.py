"""Images, audio and video that are not decoded before they are needed."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features
from datasets.fingerprint import Hasher

from .formats import AnyDataset


def without_decoding(dataset: AnyDataset, keep: Collection[str] = ()) -> AnyDataset:
    """The same data set, whose rows have images, audio and video as `{"bytes", "path"}`.

    Otherwise reading a row would open each of its files, or download it, even if the column is never used. No data is
    rewritten. The columns in `keep` are decoded as before.
    """
    if dataset.features is None:  # a stream without known types decodes nothing
        return dataset
    stored = {name: kind if name in keep else _stored(kind) for name, kind in dataset.features.items()}
    if stored == dict(dataset.features):
        return dataset
    if not isinstance(dataset, Dataset):
        return dataset.cast(Features(stored))
    changed = copy.deepcopy(dataset)  # copies the description; the table is shared
    changed.info.features = Features(stored)
    # otherwise `map` would find the cached result of the decoded set, whose columns decode
    changed._fingerprint = Hasher.hash(("without_decoding", dataset._fingerprint, sorted(keep)))
    return changed


def _stored(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _stored(part) for name, part in feature.items()}
    if isinstance(feature, list):
        return [_stored(part) for part in feature]
    if getattr(feature, "decode", False) and pa.types.is_struct(feature.pa_type):  # not Json, which is text
        feature = copy.copy(feature)
        feature.decode = False
    elif hasattr(feature, "feature"):  # of a list
        feature = copy.copy(feature)
        feature.feature = _stored(feature.feature)
    return feature
