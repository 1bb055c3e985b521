"""CPOTrainer's tokenization, many rows at a time: its own code for each row, all their texts through the tokenizer in
one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.cpo import CPOTrainer
from trl.trainer.utils import global_then_local_main_first


def tokenized(dataset: Dataset, trainer: CPOTrainer, split: str) -> Dataset:
    """The data set with the columns that CPOTrainer would give it.

    Prompt extraction, chat template and tokenization are one cached pass with a progress bar. It takes
    `dataset_num_proc` processes; a fast tokenizer uses all cores in one as well.

    Args:
        dataset: rows in any form that CPOTrainer takes.
        trainer: has the tokenizer and the lengths.
        split: its name in the progress bar.
    """
    rows = RowsOfABatch(
        trainer.processing_class, trainer.max_length, trainer.max_completion_length, trainer.is_encoder_decoder
    )
    if isinstance(dataset, IterableDataset):
        return dataset.map(rows, batched=True, batch_size=_STREAMED_AT_ONCE)
    with global_then_local_main_first():
        return dataset.map(
            rows, batched=True, num_proc=trainer.args.dataset_num_proc, desc=f"Tokenizing {split} dataset"
        )


_STREAMED_AT_ONCE = 64  # rows that a stream reads ahead


@dataclass(frozen=True)
class RowsOfABatch:
    """A batch of rows, in columns, to the same with tokens. As much of a trainer as `tokenize_row` looks at."""

    processing_class: Any
    max_length: int | None
    max_completion_length: int | None
    is_encoder_decoder: bool

    build_tokenized_answer = CPOTrainer.build_tokenized_answer

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        rows = [maybe_apply_chat_template(maybe_extract_prompt(row), self.processing_class) for row in rows]
        trainer = self
        if not self.is_encoder_decoder:
            texts = {text for row in rows for text in self._texts(row)}
            trainer = replace(self, processing_class=_KnownTexts.of(self.processing_class, texts))
        tokens = [CPOTrainer.tokenize_row(trainer, row) for row in rows]
        made = {name: _arrays([row[name] for row in tokens]) for name in tokens[0]}
        # Arrow takes arrays many times faster than lists of numbers
        return {name: [row[name] for row in rows] for name in rows[0]} | made

    @staticmethod
    def _texts(row: Mapping[str, Any]) -> tuple[str, ...]:
        """What `tokenize_row` asks of the tokenizer; what is no text it complains of itself."""
        parts = (row["prompt"], row["chosen"], row["rejected"])
        if not all(isinstance(part, str) for part in parts):
            return ()
        prompt, chosen, rejected = parts
        return prompt, prompt + chosen, prompt + rejected


@dataclass(frozen=True)
class _KnownTexts:
    """A tokenizer that has done its work already."""

    bos_token_id: int | None
    eos_token_id: int | None
    known: Mapping[str, dict[str, list[int]]]

    @classmethod
    def of(cls, tokenizer: Any, texts: set[str]) -> _KnownTexts:
        ordered = sorted(texts)
        ids = _token_ids(tokenizer, ordered)
        known = {text: {"input_ids": i, "attention_mask": [1] * len(i)} for text, i in zip(ordered, ids, strict=True)}
        return cls(tokenizer.bos_token_id, tokenizer.eos_token_id, known)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return self.known[text]


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.padding is None and backend.truncation is None:
        # without offsets, for which there is no use here: a third faster
        ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        if ids[0] == tokenizer(texts[0], add_special_tokens=False)["input_ids"]:
            return ids
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _arrays(values: list[list[int]]) -> list[np.ndarray]:
    return [np.asarray(value, dtype=np.int64) for value in values]
