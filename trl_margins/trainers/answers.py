"""Scores answers with a model as the trainers see them: any number of answers to each prompt, nothing is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from trl.trainer.utils import add_fused_lm_head

from ..forward.answer_positions import causal_model
from ..forward.head import logits_will_do, why_not_fused
from ..forward.shareable import why_not_shared
from ..forward.shared_prompt import shared_token_logps
from ..forward.shared_rows import shared_rows
from ..forward.standard import IGNORE, TokenLogps, fused_token_logps, logits_token_logps
from .precision import narrow_dtype
from .sharing import TOLERANCE
from .tokenization import RowsOfABatch

logger = logging.getLogger(__name__)

_ROWS_A_CALL = 250  # of the tokenizer


class AnswerLogps(NamedTuple):
    """Of the k answers to one prompt."""

    logps: np.ndarray  # [k] summed log-probabilities, nats
    lengths: np.ndarray  # [k] number of answer tokens, 0 where truncation left none


class _Tokens(NamedTuple):
    prompt: Tensor  # [P]
    answers: list[Tensor]  # k times [P + A], or [A] for an encoder-decoder model
    labels: list[Tensor]  # k times the same, −100 where a token is not part of the answer

    @property
    def size(self) -> int:
        return sum(map(len, self.answers))


def answer_logps(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    answers: Sequence[Sequence[Any]],
    max_length: int = 1024,
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
    use_adapter: bool = True,
    desc: str = "Scoring answers",
) -> list[AnswerLogps]:
    """Log-probabilities of every answer, on the tokens that `MarginCPOTrainer` trains on.

    The answers to one prompt go through the model in one row, where it can. What is scored together depends on
    `batch_size` alone, not on the number of processes; every process gets all values.

    Args:
        model: a causal or encoder-decoder model, with or without adapter.
        tokenizer: with a chat template where prompts are conversational.
        prompts: [N] texts or lists of messages.
        answers: [N] answers to each, in the prompt's form; their number may differ.
        max_length: longest prompt and answer, in tokens; answers are cut to it.
        batch_size: answers a device and pass.
        accelerator: where several processes share the work.
        use_adapter: score with the adapter, or with the model under it.
        desc: of the progress bar.
    """
    accelerator = accelerator or Accelerator()
    rows = _tokenized(model, tokenizer, prompts, answers, max_length)
    # the longest first: memory runs out at once or never, and rows of a batch are of like length
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].size, i))
    batches = _batches(order, [max(len(row.answers), 1) for row in rows], batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(mine, desc=desc, unit="batch", disable=not accelerator.is_main_process)
    found: list[tuple[int, AnswerLogps]] = []
    with torch.no_grad(), _ready(model, use_adapter):
        passes = _Passes(model, accelerator)
        passes.choose([rows[i] for i in order[len(order) // 2 :][:1]])
        for batch in progress:
            found += zip(batch, passes([rows[i] for i in batch]), strict=True)
    if accelerator.num_processes > 1:
        found = gather_object(found)
    by_row = dict(found)
    return [by_row[i] for i in range(len(rows))]


@contextmanager
def _ready(model: nn.Module, use_adapter: bool) -> Iterator[None]:
    """In evaluation mode and with TRL's fused head where it takes one; afterwards as it was."""
    base = causal_model(model)
    training, forward = model.training, base.__dict__.get("forward")
    if why_not_fused(model) is None:
        add_fused_lm_head(base)
    model.eval()
    try:
        with nullcontext() if use_adapter or not is_peft_model(model) else model.disable_adapter():
            yield
    finally:
        model.train(training)
        if forward is not None:
            base.forward = forward
        else:
            base.__dict__.pop("forward", None)


def _tokenized(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Any], answers: Sequence[Sequence[Any]], max_length: int
) -> list[_Tokens]:
    encoder_decoder = model.config.is_encoder_decoder
    tokens = RowsOfABatch(tokenizer, max_length, max_length if encoder_decoder else None, encoder_decoder)
    rows = []
    for start in tqdm(range(0, len(prompts), _ROWS_A_CALL), desc="Tokenizing", unit="batch", leave=False):
        some = range(start, min(start + _ROWS_A_CALL, len(prompts)))
        flat = [(prompts[i], answer) for i in some for answer in answers[i]]
        # a tokenized pair holds two answers that know nothing of each other: here the same one twice
        columns = {"prompt": [p for p, _ in flat], "chosen": [a for _, a in flat], "rejected": [a for _, a in flat]}
        made = tokens(columns) if flat else {}
        ids = iter(made.get("chosen_labels" if encoder_decoder else "chosen_input_ids", ()))
        labels, prompt_ids = iter(made.get("chosen_labels", ())), iter(made.get("prompt_input_ids", ()))
        for i in some:
            k = range(len(answers[i]))
            prompt = [torch.as_tensor(next(prompt_ids)) for _ in k]
            row_ids, row_labels = [torch.as_tensor(next(ids)) for _ in k], [torch.as_tensor(next(labels)) for _ in k]
            rows.append(_Tokens(prompt[0] if prompt else torch.empty(0, dtype=torch.long), row_ids, row_labels))
    return rows


def _batches(order: Sequence[int], n_answers: Sequence[int], batch_size: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if n_answers[i] > room:
            batches.append([])
            room = max(batch_size, n_answers[i])
        batches[-1].append(i)
        room -= n_answers[i]
    return batches


class _Passes:
    """Scores batches of rows, by the shared-prompt pass where the model can."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.bare, self.device = model, accelerator.device
        self.encoder_decoder = model.config.is_encoder_decoder
        self.fused = why_not_fused(model) is None
        self.model = accelerator.prepare_model(model, evaluation_mode=True)
        reason = why_not_shared(model)
        self.shares = reason is None
        if reason is not None:
            logger.info("prompts are computed once for each answer: %s", reason)

    def choose(self, rows: Sequence[_Tokens]) -> None:
        """Computes rows both ways; where they differ, prompts are not shared."""
        k = max((len(row.answers) for row in rows), default=0)
        if self.shares and k:
            self.shares = self._agrees(*_standard_rows(rows, k), k)

    def __call__(self, rows: Sequence[_Tokens]) -> Iterable[AnswerLogps]:
        k = max(len(row.answers) for row in rows)
        if k == 0:
            return [AnswerLogps(np.empty(0), np.empty(0, int)) for _ in rows]
        if self.encoder_decoder:
            tokens = self._encoder_decoder(rows, k)
        else:
            ids, mask, labels = _standard_rows(rows, k)
            tokens = self._shared(ids, mask, labels, k) if self.shares else self._standard(ids, mask, labels)
        logps = tokens.logps.double().sum(1).view(k, -1).T.cpu().numpy()
        lengths = tokens.is_answer.sum(1).view(k, -1).T.cpu().numpy()
        return [
            AnswerLogps(logp[: len(row.answers)], length[: len(row.answers)])
            for row, logp, length in zip(rows, logps, lengths, strict=True)
        ]

    def _shared(self, ids: Tensor, mask: Tensor, labels: Tensor, k: int) -> TokenLogps:
        laid_out = {name: value.to(self.device) for name, value in shared_rows(ids, mask, labels, k).items()}
        fused = self.fused and not logits_will_do(self.bare, laid_out["label"])
        return shared_token_logps(self.model, laid_out, fused)

    def _standard(self, ids: Tensor, mask: Tensor, labels: Tensor) -> TokenLogps:
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        return (fused_token_logps if self.fused else logits_token_logps)(self.model, inputs, labels.to(self.device))

    def _encoder_decoder(self, rows: Sequence[_Tokens], k: int) -> TokenLogps:
        prompts = [row.prompt for row in rows]
        labels = pad_sequence(
            [_answer(row, j, row.labels)[1] for j in range(k) for row in rows], batch_first=True, padding_value=IGNORE
        ).to(self.device)
        inputs = {
            "input_ids": pad_sequence(prompts, batch_first=True).repeat(k, 1).to(self.device),
            "attention_mask": _ones(prompts).repeat(k, 1).to(self.device),
            "decoder_input_ids": self.bare.prepare_decoder_input_ids_from_labels(labels=labels),
        }
        return logits_token_logps(self.model, inputs, labels, shift=False)

    def _agrees(self, ids: Tensor, mask: Tensor, labels: Tensor, k: int) -> bool:
        shared, standard = self._shared(ids, mask, labels, k), self._standard(ids, mask, labels)
        lengths = standard.is_answer.sum(1).clamp(min=1)
        difference = ((shared.logps.sum(1) - standard.logps.sum(1)) / lengths).abs().max().item()
        dtype = narrow_dtype(self.bare, "no")
        if difference <= TOLERANCE[dtype]:
            return True
        logger.warning(
            "the shared-prompt pass differs from the standard one by %.1e nats per token on one prompt "
            "(tolerance %.0e): prompts are computed once for each answer",
            difference,
            TOLERANCE[dtype],
        )
        return False


def _answer(row: _Tokens, j: int, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and labels of answer j; where a row has fewer, its prompt without an answer."""
    if j < len(row.answers):
        return tokens[j], row.labels[j]
    return row.prompt, torch.full_like(row.prompt, IGNORE)


def _standard_rows(rows: Sequence[_Tokens], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """[k·B, T] each: all first answers, then all second ones."""
    pairs = [_answer(row, j, row.answers) for j in range(k) for row in rows]
    ids, labels = ([pair[side] for pair in pairs] for side in (0, 1))
    return (
        pad_sequence(ids, batch_first=True),
        _ones(ids),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    )


def _ones(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
