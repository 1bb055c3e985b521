"""The tokens of TRL's `CPOTrainer`, many rows at a time: for runs that go on from old ones, and for encoder-decoder
models, of which `DPOTrainer` knows nothing. Its own code runs for each row; the tokenizer's work is done in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from trl.data_utils import maybe_apply_chat_template
from trl.experimental.cpo import CPOTrainer

from .form import PreferenceRow, RowError, RowReader
from .tokens import VERSION, in_columns, read_batch


@dataclass(frozen=True)
class CPOTokenizer:
    """A batch of raw rows, in columns, to CPOTrainer's token columns. As much of a trainer as `tokenize_row` reads."""

    reader: RowReader
    processing_class: Any
    max_length: int | None
    max_completion_length: int | None
    is_encoder_decoder: bool
    version: str = VERSION

    build_tokenized_answer = CPOTrainer.build_tokenized_answer

    def __call__(self, batch: Mapping[str, list[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        return self.columns(read_batch(self.reader, batch, numbers), numbers)

    def columns(self, rows: Sequence[PreferenceRow], numbers: Sequence[int]) -> dict[str, list[Any]]:
        """
        Raises:
            RowError: a row that CPOTrainer cannot tokenize.
        """
        texts = [self._row(self._rendered, row, number) for row, number in zip(rows, numbers, strict=True)]
        trainer = self
        if not self.is_encoder_decoder:
            asked = {text for row in texts for text in (row["prompt"], *_wholes(row))}
            trainer = replace(self, processing_class=_KnownTexts.of(self.processing_class, asked))

        def tokens(row: dict[str, str]) -> dict[str, Any]:
            made = {name: np.asarray(value) for name, value in CPOTrainer.tokenize_row(trainer, row).items()}
            return {"prompt": row["prompt"], **made}  # the text is for `generate_during_eval`

        return in_columns(self._row(tokens, row, number) for row, number in zip(texts, numbers, strict=True))

    def _row(self, step: Any, row: Any, number: int) -> Any:
        try:
            return step(row)
        except Exception as error:  # of the chat template, or of tokenize_row
            raise RowError(f"{self.reader.where(number)}: {error}") from error

    def _rendered(self, row: PreferenceRow) -> dict[str, str]:
        chosen, rejected = row.completions
        variables = {name: value for name, value in row.template.items() if name != "tools"}
        example = {"prompt": row.prompt, "chosen": chosen, "rejected": rejected, "chat_template_kwargs": variables}
        return maybe_apply_chat_template(example, self.processing_class, tools=row.template.get("tools"))


def _wholes(row: Mapping[str, str]) -> tuple[str, str]:
    return row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]


@dataclass(frozen=True)
class _KnownTexts:
    """A tokenizer that has done its work already."""

    bos_token_id: int | None
    eos_token_id: int | None
    known: Mapping[str, dict[str, list[int]]]

    @classmethod
    def of(cls, tokenizer: Any, texts: set[str]) -> _KnownTexts:
        ordered = sorted(texts)
        ids = tokenizer(ordered, add_special_tokens=False)["input_ids"]
        known = {text: {"input_ids": i, "attention_mask": [1] * len(i)} for text, i in zip(ordered, ids, strict=True)}
        return cls(tokenizer.bos_token_id, tokenizer.eos_token_id, known)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return self.known[text]
