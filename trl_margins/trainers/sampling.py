"""Training in groups of pairs of like length, in an order that a resumed run has, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..distributed import check_lockstep
from ..rows.scores import check_numbers
from .base import MarginTrainer
from .preparation import TRAIN

_TOKENS = ("input_ids", "ids", "labels")  # CPOTrainer's, DPOTrainer's, and those of encoder-decoders


class LengthGroups(LengthGroupedSampler):
    """transformers' sampler, with an order that depends on the seed and the epoch alone.

    By itself it draws from the global state of random numbers: another order after an evaluation, and where a run is
    resumed within its second epoch, which would train some pairs twice and others never.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, first_epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._first_epoch = seed, first_epoch
        self._epoch: int | None = None  # accelerate's `set_epoch` does not come here from ranks that resume

    def __iter__(self) -> Iterator[Any]:
        self._epoch = self._first_epoch() if self._epoch is None else self._epoch + 1
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return super().__iter__()


class SamplingMixin(MarginTrainer):
    """Finds the lengths of pairs, which transformers does not, and draws their order."""

    _own_columns: set[str]

    def get_train_dataloader(self) -> DataLoader:
        """TRL's; `train_sampling_strategy="group_by_length"` finds the pairs' lengths."""
        if self.args.train_sampling_strategy == "group_by_length":
            self._own_columns.add(self.args.length_column_name)
            self.train_dataset = _with_lengths(self.train_dataset, self.args.length_column_name)
        dataloader = super().get_train_dataloader()
        check_lockstep(self.accelerator, dataloader, "train")
        return dataloader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is not LengthGroupedSampler or sampler.generator is not None:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = list(sampler.lengths[:])  # at once: a column of `datasets` reads each by itself
        return LengthGroups(sampler.batch_size, lengths, seed, lambda: int(self.state.epoch or 0))


def _with_lengths(dataset: Any, column: str) -> Any:
    """The tokenized set with each pair's number of tokens, by which transformers groups rows of similar length."""
    if not isinstance(dataset, Dataset):
        return dataset
    if column in dataset.column_names:
        check_numbers(dataset, column, TRAIN)
        return dataset
    kind = next((each for each in _TOKENS if f"chosen_{each}" in dataset.column_names), None)
    if kind is None:  # images, which the collator processes
        raise ValueError(
            "train_sampling_strategy='group_by_length': how long rows with images are is not known before training. "
            f"Leave it out, or give their lengths in a column {column!r}"
        )
    chosen, rejected = dataset[f"chosen_{kind}"], dataset[f"rejected_{kind}"]
    return dataset.add_column(column, [len(a) + len(b) for a, b in zip(chosen, rejected, strict=True)])
