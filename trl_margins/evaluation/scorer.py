"""Scores completions with a model as the trainers see them: any number of each prompt, nothing is trained."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from trl.trainer.utils import add_fused_lm_head

from ..checks import unknown
from ..forward.checked import Ways, checked_ways
from ..forward.head import causal_model, logits_will_do, why_not_fused
from ..forward.precision import narrow_dtype
from ..forward.shared_prompt import shared_token_logps, why_not_shared
from ..forward.shared_rows import shared_rows, width_step
from ..forward.standard import IGNORE, TokenLogps, fused_token_logps, logits_token_logps
from ..rows import PreferenceRow, RowReader, RowTokens, tokenize
from ..rows.cpo_tokens import CPOTokenizer

logger = logging.getLogger(__name__)

TOKENIZATIONS = ("chat-template", "cpo")
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

    @property
    def has_answers(self) -> bool:
        """Whether truncation left something of them."""
        return any((each != IGNORE).any() for each in self.labels)

    def cut(self, max_length: int) -> _Tokens:
        return _Tokens(self.prompt[:max_length], *([each[:max_length] for each in some] for some in self[1:]))

    def distinct(self) -> tuple[_Tokens, np.ndarray]:
        """Each different completion once, and which of them each completion is: equal ones get the same value, to
        the last bit.
        """
        places: dict[tuple[int, ...], int] = {}
        at = np.array([places.setdefault(tuple(ids.tolist()), len(places)) for ids in self.answers], int)
        first = [int(np.flatnonzero(at == place)[0]) for place in range(len(places))]
        return _Tokens(self.prompt, [self.answers[i] for i in first], [self.labels[i] for i in first]), at


def answer_logps(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[PreferenceRow],
    max_length: int = 1024,
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
    use_adapter: bool = True,
    desc: str = "Scoring answers",
    tokenization: str = "chat-template",
) -> list[AnswerLogps]:
    """Log-probabilities of every completion, on the tokens that the trainers train on.

    The completions of one prompt go through the model in one row, where it can; equal ones once. What is scored
    together depends on `batch_size` alone, not on the number of processes; every process gets all values.

    Args:
        model: a causal or encoder-decoder model, with or without adapter.
        tokenizer: with a chat template where prompts are conversational.
        rows: [N] prompts with their completions, whose number may differ.
        max_length: longest prompt and completion, in tokens, or completion alone for an encoder-decoder model (the
            `max_completion_length` of its training); what is over is cut, and counted in the log.
        batch_size: answers a device and pass.
        accelerator: where several processes share the work.
        use_adapter: score with the adapter, or with the model under it.
        desc: of the progress bar.
        tokenization: that of the training, "chat-template" or "cpo"; an encoder-decoder model has CPOTrainer's.
    """
    accelerator = accelerator or Accelerator()
    # placed, and not prepared, which would compute in the precision of somebody's training
    if not getattr(model, "is_quantized", False):
        model.to(accelerator.device)
    rows, places = _tokenized(model, tokenizer, rows, max_length, tokenization, desc)
    # the longest first: memory runs out at once or never, and rows of a batch are of like length
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].size, i))
    beyond = _scaled_beyond(model)
    stretched = _stretched(rows, beyond, desc)
    batches = _batches(order, [max(len(row.answers), 1) for row in rows], batch_size, stretched)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(mine, desc=desc, unit="batch", disable=not accelerator.is_main_process)
    found: list[tuple[int, AnswerLogps]] = []
    with torch.no_grad(), _ready(model, use_adapter):
        passes = _Passes(model, accelerator.device)
        # alone, an answer would be scaled in another way than beside a longer one
        comparable = [i for i in order if rows[i].has_answers and not stretched[i]] or order
        for i in comparable[len(comparable) // 2 :][:1]:
            passes.check(rows[i])
        for batch in progress:
            if beyond is not None:
                passes.forget_length()
            found += zip(batch, passes([rows[i] for i in batch]), strict=True)
    if accelerator.num_processes > 1:
        found = gather_object(found)
    by_row = dict(found)
    return [AnswerLogps(*(values[at] for values in by_row[i])) for i, at in enumerate(places)]


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
    model: nn.Module, tokenizer: Any, rows: Sequence[PreferenceRow], max_length: int, tokenization: str, name: str
) -> tuple[list[_Tokens], list[np.ndarray]]:
    """The tokens of each row's different completions, and which of them each completion is."""
    if tokenization not in TOKENIZATIONS:
        raise unknown("tokenization", tokenization, TOKENIZATIONS)
    numbers = range(len(rows))
    if model.config.is_encoder_decoder:
        found = _cpo_tokens(tokenizer, rows, numbers, name, max_length)
        _report_cut_completions(tokenizer, rows, found, max_length, name)
    else:
        whole: list[_Tokens] = []
        for start in tqdm(range(0, len(rows), _ROWS_A_CALL), desc="Tokenizing", unit="batch", leave=False):
            some, its_numbers = (each[start : start + _ROWS_A_CALL] for each in (rows, numbers))
            if tokenization == "cpo":
                whole += _cpo_tokens(tokenizer, some, its_numbers, name)
            else:
                where = [f"row {number} of {name}" for number in its_numbers]
                whole += map(_labelled, tokenize(some, tokenizer, where.__getitem__))
        _report_cut(whole, max_length, name)
        found = [tokens.cut(max_length) for tokens in whole]
    distinct = [row.distinct() for row in found]
    return [tokens for tokens, _ in distinct], [places for _, places in distinct]


def _labelled(tokens: RowTokens) -> _Tokens:
    prompt = torch.tensor(tokens.prompt, dtype=torch.long)
    answers = [torch.tensor(tokens.prompt + ids, dtype=torch.long) for ids in tokens.completions]
    labels = [answer.clone() for answer in answers]
    for each in labels:
        each[: len(prompt)] = IGNORE
    return _Tokens(prompt, answers, labels)


def _cpo_tokens(
    tokenizer: Any,
    rows: Sequence[PreferenceRow],
    numbers: Sequence[int],
    name: str,
    max_completion_length: int | None = None,
) -> list[_Tokens]:
    """CPOTrainer's, whole for a causal model; with `max_completion_length`, for an encoder-decoder one."""
    whose = [i for i, row in enumerate(rows) for _ in row.completions]
    # it knows pairs alone: each completion is one with itself
    pairs = [PreferenceRow(row.prompt, [part, part], row.template) for row in rows for part in row.completions]
    found = [_Tokens(torch.empty(0, dtype=torch.long), [], []) for _ in rows]
    if not pairs:
        return found
    as_cpo = CPOTokenizer(
        RowReader(name, ()), tokenizer, sys.maxsize, max_completion_length, max_completion_length is not None
    )
    made = as_cpo.columns(pairs, [numbers[i] for i in whose])
    answers = made["chosen_labels" if as_cpo.is_encoder_decoder else "chosen_input_ids"]
    for i, *ids in zip(whose, made["prompt_input_ids"], answers, made["chosen_labels"], strict=True):
        prompt, answer, labels = map(torch.as_tensor, ids)
        found[i] = _Tokens(prompt, [*found[i].answers, answer], [*found[i].labels, labels])
    return found


def _report_cut(rows: Sequence[_Tokens], max_length: int, name: str) -> None:
    """Warns of completions that `max_length` cuts, and of prompts that leave nothing of them."""
    cut = sum(len(ids) > max_length for row in rows for ids in row.answers)
    emptied = sum(len(row.prompt) >= max_length for row in rows)
    if cut:
        logger.warning(
            "%s: %d of %d completions are cut to max_length=%d%s",
            name,
            cut,
            sum(len(row.answers) for row in rows),
            max_length,
            f"; in {emptied} of {len(rows)} rows the prompt alone fills it, so that nothing of the completions is "
            "left and all of them have the reward 0"
            if emptied
            else "",
        )


def _report_cut_completions(
    tokenizer: Any, rows: Sequence[PreferenceRow], found: Sequence[_Tokens], most: int, name: str
) -> None:
    """The same for an encoder-decoder model, whose completions the tokenizer cuts."""
    full = [i for i, row in enumerate(found) if any(len(ids) == most for ids in row.answers)]
    longer = _cpo_tokens(tokenizer, [rows[i] for i in full], full, name, most + 1)
    if cut := sum(len(ids) > most for row in longer for ids in row.answers):
        logger.warning(
            "%s: %d of %d completions are cut to %d tokens (max_completion_length)",
            name,
            cut,
            sum(len(row.answers) for row in found),
            most,
        )


def _scaled_beyond(model: nn.Module) -> int | None:
    """The length from which on the model scales its rotary embedding, for a whole batch by its longest row."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return config.max_position_embeddings if rope.get("rope_type") == "dynamic" else None


def _stretched(rows: Sequence[_Tokens], beyond: int | None, name: str) -> list[bool]:
    """Rows for which the model scales its rotary embedding: others must not be in one batch with them."""
    if beyond is None:
        return [False] * len(rows)
    found = [max(map(len, row.answers), default=0) > beyond for row in rows]
    if any(found):
        logger.warning(
            "%s: %d of %d rows are longer than the %d tokens from which on this model scales its rotary embedding by "
            "the longest row of a batch: their values depend on what they are computed with",
            name,
            sum(found),
            len(rows),
            beyond,
        )
    return found


def _batches(
    order: Sequence[int], n_answers: Sequence[int], batch_size: int, stretched: Sequence[bool]
) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if n_answers[i] > room or stretched[i] != stretched[batches[-1][-1]]:
            batches.append([])
            room = max(batch_size, n_answers[i])
        batches[-1].append(i)
        room -= n_answers[i]
    return batches


class _Passes:
    """Scores batches of rows, by the shared-prompt pass where the model can."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.encoder_decoder = model.config.is_encoder_decoder
        self.ways = Ways(fused=why_not_fused(model) is None, shared=False)
        reason = why_not_shared(model)
        if reason is None:
            self.ways = replace(self.ways, shared=True)
        else:
            logger.info("prompts are computed once for each answer: %s", reason)

    def check(self, row: _Tokens) -> None:
        """Compares the ways to log-probabilities with the model's own logits, on one row."""
        if not self.encoder_decoder and row.answers:
            dtype = narrow_dtype(self.model, "no")
            k = len(row.answers)
            self.ways = checked_ways(self.model, *_standard_rows([row], k), self.ways, k, dtype)

    def forget_length(self) -> None:
        """Of long rows, whose scale a dynamic rotary embedding keeps until it sees a short one."""
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device))

    def __call__(self, rows: Sequence[_Tokens]) -> Iterable[AnswerLogps]:
        k = max(len(row.answers) for row in rows)
        if k == 0:
            return [AnswerLogps(np.empty(0), np.empty(0, int)) for _ in rows]
        if self.encoder_decoder:
            tokens = self._encoder_decoder(rows, k)
        else:
            ids, mask, labels = _standard_rows(rows, k)
            tokens = self._shared(ids, mask, labels, k) if self.ways.shared else self._standard(ids, mask, labels)
        logps = tokens.logps.double().sum(1).view(k, -1).T.cpu().numpy()
        lengths = tokens.is_completion.sum(1).view(k, -1).T.cpu().numpy()
        return [
            AnswerLogps(logp[: len(row.answers)], length[: len(row.answers)])
            for row, logp, length in zip(rows, logps, lengths, strict=True)
        ]

    def _shared(self, ids: Tensor, mask: Tensor, labels: Tensor, k: int) -> TokenLogps:
        rows = shared_rows(ids, mask, labels, k, step=width_step(self.device))
        laid_out = {name: value.to(self.device) for name, value in rows.items()}
        fused = self.ways.fused and not logits_will_do(self.model, laid_out["label"])
        return shared_token_logps(self.model, laid_out, fused)

    def _standard(self, ids: Tensor, mask: Tensor, labels: Tensor) -> TokenLogps:
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        return (fused_token_logps if self.ways.fused else logits_token_logps)(
            self.model, inputs, labels.to(self.device)
        )

    def _encoder_decoder(self, rows: Sequence[_Tokens], k: int) -> TokenLogps:
        prompts = [row.prompt for row in rows]
        labels = pad_sequence(
            [_answer(row, j, row.labels)[1] for j in range(k) for row in rows], batch_first=True, padding_value=IGNORE
        ).to(self.device)
        inputs = {
            "input_ids": pad_sequence(prompts, batch_first=True).repeat(k, 1).to(self.device),
            "attention_mask": _ones(prompts).repeat(k, 1).to(self.device),
            "decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels=labels),
        }
        return logits_token_logps(self.model, inputs, labels, shift=False)


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
