"""Scores completions with a model, on the tokens of training: any number of them per prompt, nothing is trained."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
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

from ..checks import unknown
from ..forward.checked import Ways, checked_ways
from ..forward.head import causal_model, logits_will_do, why_not_fused
from ..forward.positions import positions_of, trained_positions
from ..forward.precision import narrow_dtype
from ..forward.shared_prompt import shared_token_logps, why_not_shared
from ..forward.shared_rows import shared_rows, width_step
from ..forward.standard import IGNORE, TokenLogps, fused_token_logps, logits_token_logps
from ..rows import PreferenceRow, tokenize
from ..rows.cpo_tokens import CPOTokenizer
from ..rows.tokenized import log_notes, log_unread
from ..rows.tokens import each_or_error, without_errors
from .vocabularies import check_ids

logger = logging.getLogger(__name__)

TOKENIZATIONS = ("chat-template", "cpo")


class CompletionLogps(NamedTuple):
    """For the k completions of one prompt."""

    logps: np.ndarray  # [k] summed log-probabilities, nats
    lengths: np.ndarray  # [k] completion tokens, 0 where truncation left none


class CompletionTokens(NamedTuple):
    """One prompt and its k completions."""

    prompt: list[int]
    ids: list[list[int]]  # k times prompt and completion; the completion alone for an encoder-decoder model
    labels: list[list[int]]  # k times the same, −100 where a token is not part of the completion

    @property
    def size(self) -> int:
        return sum(map(len, self.ids))

    @property
    def has_completions(self) -> bool:
        """Whether truncation left any completion tokens."""
        return any(label != IGNORE for labels in self.labels for label in labels)

    def cut(self, max_length: int) -> CompletionTokens:
        return CompletionTokens(self.prompt[:max_length], *([each[:max_length] for each in some] for some in self[1:]))

    def distinct(self) -> tuple[CompletionTokens, np.ndarray]:
        """Without repeated completions, and the index of each completion among the distinct ones.

        Equal completions so get the same value, to the last bit.
        """
        first: dict[tuple[int, ...], int] = {}
        for i, ids in enumerate(self.ids):
            first.setdefault(tuple(ids), i)
        places = {ids: place for place, ids in enumerate(first)}
        kept = CompletionTokens(self.prompt, *([some[i] for i in first.values()] for some in self[1:]))
        return kept, np.array([places[tuple(ids)] for ids in self.ids], int)


def completion_logps(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[PreferenceRow],
    max_length: int = 1024,
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
    use_adapter: bool = True,
    desc: str = "Scoring completions",
    tokenization: str = "chat-template",
) -> list[CompletionLogps]:
    """Log-probabilities of every completion, on the tokens that the trainers train on.

    The completions of one prompt share a row of the forward pass, where the model can; equal ones are computed once.
    Batches depend only on `batch_size`, not on the number of processes; every process gets all values.

    Args:
        model: a causal or encoder-decoder model, with or without adapter.
        tokenizer: with a chat template where prompts are conversational.
        rows: [N] prompts with their completions, whose number may differ.
        max_length: longest prompt and completion, in tokens, or completion alone for an encoder-decoder model (the
            `max_completion_length` of its training); longer ones are truncated, and counted in the log.
        batch_size: completions per device and forward pass.
        accelerator: where several processes share the work.
        use_adapter: score with the adapter, or with the base model.
        desc: of the progress bar.
        tokenization: that of the training, "chat-template" or "cpo"; an encoder-decoder model has CPOTrainer's.
    """
    tokens = completion_tokens(model, tokenizer, rows, max_length, tokenization, desc)
    return logps_of_tokens(model, tokens, batch_size, accelerator, use_adapter, desc)


def logps_of_tokens(
    model: nn.Module,
    tokens: Sequence[CompletionTokens],
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
    use_adapter: bool = True,
    desc: str = "Scoring completions",
) -> list[CompletionLogps]:
    """`completion_logps` of rows that are tokenized already, as for several models with one tokenizer.

    Raises:
        ValueError: a token that has no row in the model's embedding.
    """
    check_ids(model, [[row.prompt, *row.ids] for row in tokens], desc)
    accelerator = accelerator or Accelerator()
    move(model, accelerator.device)
    with torch.no_grad(), _ready(model, use_adapter):
        forward = _Forward(model, accelerator.device)
        found = by_batch([model], tokens, forward, batch_size, accelerator, desc, forward.check)
    return [CompletionLogps(*values) for values in found]


def move(model: Any, device: torch.device) -> None:
    """To the device; not by `accelerator.prepare`, which would compute in the precision of the training."""
    if not getattr(model, "is_quantized", False):
        model.to(device)


def by_batch(
    models: Sequence[Any],
    tokens: Sequence[CompletionTokens],
    compute: Callable[[list[CompletionTokens]], Sequence[Sequence[np.ndarray]]],
    batch_size: int,
    accelerator: Accelerator,
    desc: str,
    check: Callable[[CompletionTokens], None] | None = None,
) -> list[list[np.ndarray]]:
    """What `compute` gives for the rows of a batch: [k] arrays for each. Every process gets those of all rows.

    Args:
        models: those that compute.
        tokens: [N] rows; of equal completions in one, a batch has the first.
        compute: from a batch to its values.
        batch_size: completions per batch.
        accelerator: where several processes share the work.
        desc: of the progress bar.
        check: called with a row of middle size before the first batch.
    """
    distinct, places = zip(*(row.distinct() for row in tokens), strict=True) if tokens else ((), ())
    # the longest first: memory runs out at once or never, and a batch has rows of similar length
    order = sorted(range(len(distinct)), key=lambda i: (-distinct[i].size, i))
    scaling = [model for model in models if _scaled_beyond(model) is not None]
    stretched = _stretched(distinct, _scaled_beyond(models[0]), desc)
    batches = _batches(order, [max(len(row.ids), 1) for row in distinct], batch_size, stretched)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, Sequence[np.ndarray]]] = []
    if check is not None and order:
        # a stretched row would be scaled differently alone than in its batch
        comparable = [i for i in order if distinct[i].has_completions and not stretched[i]] or order
        check(distinct[comparable[len(comparable) // 2]])
    for batch in tqdm(mine, desc=desc, unit="batch", disable=not accelerator.is_main_process):
        for model in scaling:  # its rotary embedding keeps the scale of long rows until it sees a short one
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=accelerator.device))
        found += zip(batch, compute([distinct[i] for i in batch]), strict=True)
    by_row = dict(gather_object(found) if accelerator.num_processes > 1 else found)
    return [[values[at] for values in by_row[i]] for i, at in enumerate(places)]


@contextmanager
def _ready(model: Any, use_adapter: bool) -> Iterator[None]:
    """In evaluation mode, and with TRL's fused head if the model takes one; restored afterwards."""
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


def completion_tokens(
    model: Any,
    tokenizer: Any,
    rows: Sequence[PreferenceRow],
    max_length: int = 1024,
    tokenization: str = "chat-template",
    name: str = "the data set",
) -> list[CompletionTokens]:
    """The tokens of each row, truncated; logs how many completions are. The arguments are `completion_logps`'s."""
    if tokenization not in TOKENIZATIONS:
        raise unknown("tokenization", tokenization, TOKENIZATIONS)

    def where(i: int) -> str:
        return f"row {i} of {name}"

    log_unread(name, rows, tokenizer)
    limit, emptied = f"max_length={max_length}", ""
    if model.config.is_encoder_decoder:
        found = _cpo_tokens(tokenizer, rows, where, max_length)
        # the tokenizer truncated: see which completions are longer than what is left of them
        full = [i for i, row in enumerate(found) if any(len(ids) == max_length for ids in row.ids)]
        longer = _cpo_tokens(tokenizer, [rows[i] for i in full], where, max_length + 1)
        n_cut = sum(len(ids) > max_length for row in longer for ids in row.ids)
        limit = f"{max_length} tokens (max_completion_length)"
    else:
        if tokenization == "cpo":
            whole = _cpo_tokens(tokenizer, rows, where)
        else:
            tokenized = tokenize(rows, tokenizer, where)
            log_notes(name, rows, tokenized, tokenizer)
            whole = [
                CompletionTokens(
                    prompt, [prompt + ids for ids in many], [[IGNORE] * len(prompt) + ids for ids in many]
                )
                for prompt, many, _ in tokenized
            ]
        found = [row.cut(max_length) for row in whole]
        n_cut = sum(len(ids) > max_length for row in whole for ids in row.ids)
        if n_emptied := sum(len(row.prompt) >= max_length for row in whole):
            emptied = (
                f"; in {n_emptied} of {len(rows)} rows the prompt alone fills it, so nothing is left of the "
                "completions: pairs and lists are left out, those of RM-Bench have the reward 0"
            )
    if not model.config.is_encoder_decoder:
        _check_positions(model, found, name)
    if n_cut:
        total = sum(len(row.ids) for row in found)
        logger.warning(f"{name}: {n_cut} of {total} completions are cut to {limit}{emptied}")
    return found


def _check_positions(model: Any, tokens: Sequence[CompletionTokens], name: str) -> None:
    lengths = [max(map(len, row.ids), default=0) for row in tokens]
    table, made_for = positions_of(model), trained_positions(model)
    if table is not None and max(lengths, default=0) > table:
        raise ValueError(
            f"row {lengths.index(max(lengths))} of {name} has {max(lengths)} tokens, and the model has {table} "
            f"positions: set max_length={table} or less"
        )
    if made_for is not None and (n_long := sum(length > made_for for length in lengths)):
        logger.warning(
            "%s: %d of %d rows are longer than the %d positions that the model was made for (the longest has %d "
            "tokens): max_length=%d would cut them",
            *(name, n_long, len(tokens), made_for, max(lengths), made_for),
        )


def _cpo_tokens(
    tokenizer: Any,
    rows: Sequence[PreferenceRow],
    where: Callable[[int], str],
    max_completion_length: int | None = None,
) -> list[CompletionTokens]:
    """CPOTrainer's, not truncated for a causal model; with `max_completion_length`, for an encoder-decoder one."""
    encoder_decoder = max_completion_length is not None
    as_cpo = CPOTokenizer(None, tokenizer, sys.maxsize, max_completion_length, encoder_decoder)
    of = [i for i, row in enumerate(rows) for _ in row.completions]
    # CPOTrainer tokenizes pairs: here each completion twice
    pairs = [PreferenceRow(row.prompt, [part, part], row.template) for row in rows for part in row.completions]
    made = without_errors(each_or_error(as_cpo.rows, pairs), lambda pair: where(of[pair]))
    found = [CompletionTokens([], [], []) for _ in rows]
    for i, columns in zip(of, made, strict=True):
        prompt, ids, labels = (
            columns[name].tolist()
            for name in (
                "prompt_input_ids",
                "chosen_labels" if encoder_decoder else "chosen_input_ids",
                "chosen_labels",
            )
        )
        found[i] = CompletionTokens(prompt, [*found[i].ids, ids], [*found[i].labels, labels])
    return found


def _scaled_beyond(model: Any) -> int | None:
    """The length beyond which the model scales its rotary embedding, for a whole batch by its longest row."""
    config: Any = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return config.max_position_embeddings if rope.get("rope_type") == "dynamic" else None


def _stretched(rows: Sequence[CompletionTokens], beyond: int | None, name: str) -> list[bool]:
    """Rows for which the model scales its rotary embedding: no batch may mix them with others."""
    found = [beyond is not None and max(map(len, row.ids), default=0) > beyond for row in rows]
    if any(found):
        logger.warning(
            f"{name}: {sum(found)} of {len(rows)} rows are longer than the {beyond} tokens from which on this model "
            "scales its rotary embedding by the longest row of a batch: their values depend on what they are computed "
            "with"
        )
    return found


def _batches(
    order: Sequence[int], sizes: Sequence[int], batch_size: int, stretched: Sequence[bool]
) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if sizes[i] > room or stretched[i] != stretched[batches[-1][-1]]:
            batches.append([])
            room = max(batch_size, sizes[i])
        batches[-1].append(i)
        room -= sizes[i]
    return batches


class _Forward:
    """Forward passes over batches of rows, with each prompt computed once where the model can."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.encoder_decoder = model.config.is_encoder_decoder
        reason = why_not_shared(model)
        self.ways = Ways(fused=why_not_fused(model) is None, shared=reason is None)
        if reason is not None:
            logger.info("prompts are computed once per completion: %s", reason)

    def check(self, row: CompletionTokens) -> None:
        """Compares the ways to compute log-probabilities with the model's own logits, on one row."""
        if not self.encoder_decoder and row.ids:
            k, dtype = len(row.ids), narrow_dtype(self.model, "no")
            self.ways = checked_ways(self.model, *_standard_rows([row], k), self.ways, k, dtype)

    def __call__(self, rows: Sequence[CompletionTokens]) -> list[CompletionLogps]:
        k = max(len(row.ids) for row in rows)
        if k == 0:
            return [CompletionLogps(np.empty(0), np.empty(0, int)) for _ in rows]
        tokens = self._token_logps(rows, k)
        logps = tokens.logps.double().sum(1).view(k, -1).T.cpu().numpy()
        lengths = tokens.is_completion.sum(1).view(k, -1).T.cpu().numpy()
        return [
            CompletionLogps(logp[: len(row.ids)], length[: len(row.ids)])
            for row, logp, length in zip(rows, logps, lengths, strict=True)
        ]

    def _token_logps(self, rows: Sequence[CompletionTokens], k: int) -> TokenLogps:
        """[k·B, T]: all first completions, then all second ones, and so on."""
        if self.ways.shared:
            rows_on_cpu: Any = shared_rows(*_standard_rows(rows, k), k, step=width_step(self.device))
            laid_out: Any = {name: value.to(self.device) for name, value in rows_on_cpu.items()}
            fused = self.ways.fused and not logits_will_do(self.model, laid_out["label"])
            return shared_token_logps(self.model, laid_out, fused)
        inputs, labels = standard_inputs(self.model, rows, k, self.device)
        if self.encoder_decoder:
            return logits_token_logps(self.model, inputs, labels, shift=False)
        return (fused_token_logps if self.ways.fused else logits_token_logps)(self.model, inputs, labels)


def standard_inputs(
    model: Any, rows: Sequence[CompletionTokens], k: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """What the model's forward takes, and the labels, [k·B, T] each: all first completions, then all second ones."""
    ids, mask, labels = _standard_rows(rows, k)
    labels, inputs = labels.to(device), {}
    if model.config.is_encoder_decoder:
        ids, mask = _padded([row.prompt for row in rows] * k)
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return {**inputs, "input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels


def _standard_rows(rows: Sequence[CompletionTokens], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels, [k·B, T] each. Where a row has fewer completions, its prompt fills the place."""
    pairs = [
        (row.ids[j], row.labels[j]) if j < len(row.ids) else (row.prompt, [IGNORE] * len(row.prompt))
        for j in range(k)
        for row in rows
    ]
    return *_padded([ids for ids, _ in pairs]), _padded([labels for _, labels in pairs], IGNORE)[0]


def _padded(rows: Sequence[list[int]], padding: int = 0) -> tuple[Tensor, Tensor]:
    """The rows padded at their ends, and the mask of what is not padding."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    return pad_sequence(tensors, batch_first=True, padding_value=padding), mask
