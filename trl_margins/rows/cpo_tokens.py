"""The tokens of TRL's `CPOTrainer`, many rows at a time: to continue old runs, and for encoder-decoder models, which
`DPOTrainer` does not support. CPOTrainer's own code runs for each row; the tokenizer runs once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from trl.data_utils import maybe_apply_chat_template
from trl.experimental.cpo import CPOTrainer

from .form import PreferenceRow, RowReader
from .limited import limited
from .tokens import VERSION, each_or_error, in_columns, read_batch, without_errors


@dataclass(frozen=True)
class CPOTokenizer:
    """A function for `Dataset.map`: a batch of raw rows, in columns, to CPOTrainer's token columns.

    It has the attributes of a trainer that `CPOTrainer.tokenize_row` reads. `reader` may be None where rows have been
    read already.
    """

    reader: RowReader | None
    processing_class: Any
    max_length: int | None
    max_completion_length: int | None
    is_encoder_decoder: bool
    version: str = VERSION

    build_tokenized_answer = CPOTrainer.build_tokenized_answer

    def __call__(self, batch: Mapping[str, list[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        reader = self.reader
        assert reader is not None
        found = each_or_error(self.rows, read_batch(reader, batch, numbers))
        return in_columns(without_errors(found, lambda i: reader.where(numbers[i])))

    def rows(self, rows: Sequence[PreferenceRow]) -> list[dict[str, Any]]:
        """The token columns of each row. Raises whatever the chat template and `tokenize_row` raise."""
        texts = [self._rendered(row) for row in rows]
        trainer: Any = self
        if not self.is_encoder_decoder:
            wholes = {row["prompt"] + row[side] for row in texts for side in ("chosen", "rejected")}
            known = _KnownTexts(self.processing_class, sorted(wholes | {row["prompt"] for row in texts}))
            trainer = replace(self, processing_class=known)
        made = [CPOTrainer.tokenize_row(trainer, row) for row in texts]
        return [
            # `generate_during_eval` reads the text of the prompt
            {"prompt": row["prompt"], **{name: np.asarray(value, np.int64) for name, value in each.items()}}
            for row, each in zip(texts, made, strict=True)
        ]

    def _rendered(self, row: PreferenceRow) -> dict[str, str]:
        chosen, rejected = row.completions
        variables = {name: value for name, value in row.template.items() if name != "tools"}
        example: Any = {
            "prompt": row.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chat_template_kwargs": variables,
        }
        with limited():
            return maybe_apply_chat_template(example, self.processing_class, tools=row.template.get("tools"))


class _KnownTexts:
    """A stand-in for the tokenizer that has tokenized all texts before."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.known = dict(zip(texts, ids, strict=True))

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = self.known[text]
        return {"input_ids": list(ids), "attention_mask": [1] * len(ids)}
