"""Images, audio and video that stay as they are stored until somebody needs them."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

IMAGES = ("images", "image")  # the columns that TRL gives to a vision-language model


def without_decoding(dataset: AnyDataset, keep: Collection[str] = ()) -> AnyDataset:
    """The same data set, whose rows have an image, a sound or a film as `{"bytes", "path"}`.

    Reading a row would otherwise open each of its files, or ask the network for it, also where nobody looks at that
    column. No data is rewritten.

    Args:
        keep: columns that are decoded as before.
    """
    from datasets import Dataset, Features
    from datasets.fingerprint import Hasher

    if dataset.features is None:  # a stream that does not know its types decodes nothing
        return dataset
    stored = {name: kind if name in keep else _stored(kind) for name, kind in dataset.features.items()}
    if stored == dict(dataset.features):
        return dataset
    if not isinstance(dataset, Dataset):
        return dataset.cast(Features(stored))
    changed = copy.deepcopy(dataset)  # of its description: the table is shared
    changed.info.features = Features(stored)
    # else `map` finds what it once made of the decoded set, whose columns decode
    changed._fingerprint = Hasher.hash(("without_decoding", dataset._fingerprint, sorted(keep)))
    return changed


def _stored(feature: Any) -> Any:
    import pyarrow as pa

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
