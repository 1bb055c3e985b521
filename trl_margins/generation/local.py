"""Answers through transformers' `generate`, which leaves out answers that have ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from .sampling import Prompt, Sampling, only

# what transformers calls the cache, by its version
_NAMES = signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if "cache" in _NAMES else "past_key_values"
_SEGMENT = 32  # tokens between two looks at which rows have finished

# the number of a prompt, and the token ids of its n answers, with the token that ended them
Answers = Iterator[tuple[int, list[list[int]]]]


def generate(
    model: Any, prompts: Sequence[Prompt], sampling: Sampling, stop: Sequence[int], pad: int, batch_size: int
) -> Answers:
    """Answers in batches of about `batch_size`, shortest prompts first.

    `model.generate` does the work, a few tokens at a time. In between, answers that have ended leave the batch. The n
    answers to a prompt share the computation of the prompt.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    size = max(batch_size // sampling.n, 1)
    with plain_settings(model):
        for begin in range(0, len(order), size):
            some = order[begin : begin + size]
            for place, answers in _batch(model, [prompts[i] for i in some], sampling, stop, pad):
                yield some[place], answers


def _batch(model: Any, prompts: Sequence[Prompt], sampling: Sampling, stop: Sequence[int], pad: int) -> Answers:
    device, n, width = model.device, sampling.n, max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p.ids)) + p.ids for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)

    def settings(length: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=True,
            eos_token_id=list(stop) or None,
            pad_token_id=pad,
        )

    cache = None
    if n > 1 and min(len(prompt.ids) for prompt in prompts) > 1:  # a row of padding alone has no logits
        first = model.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], generation_config=settings(1))
        if _can_select(getattr(first, _CACHE)):
            cache = getattr(first, _CACHE)
            cache.batch_repeat_interleave(n)
    ids, mask = ids.repeat_interleave(n, dim=0), mask.repeat_interleave(n, dim=0)
    room = [prompt.room for prompt in prompts for _ in range(n)]
    draws = torch.tensor(
        np.stack([sampling.draws(p.ids, k, sampling.max_new_tokens) for p in prompts for k in range(n)]),
        device=device,
    )
    found: list[list[int]] = [[] for _ in room]
    rows, done = list(range(len(room))), 0
    while rows:
        length = min(min(room[i] for i in rows) - done, _SEGMENT)
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **({} if cache is None else {_CACHE: cache}),
            generation_config=settings(length),
            logits_processor=LogitsProcessorList([_Pick(sampling, draws[:, done:], ids.shape[1])]),
        )
        new = made.sequences[:, ids.shape[1] :]
        for i, tokens in zip(rows, new.tolist(), strict=True):
            found[i] += until_stop(tokens, stop)
        done += new.shape[1]
        left = [j for j, i in enumerate(rows) if found[i][-1] not in stop and done < room[i]]
        before, rows = rows, [rows[j] for j in left]
        for place in sorted({i // n for i in before} - {i // n for i in rows}):
            yield place, found[place * n : (place + 1) * n]
        if not rows:
            break
        kept = torch.tensor(left, device=device)
        ids, draws = made.sequences[kept], draws[kept]
        mask = torch.cat([mask[kept], mask.new_ones(len(left), new.shape[1])], dim=1)
        cache = getattr(made, _CACHE)
        if not _can_select(cache):
            cache = None  # computed again
        elif len(left) < len(new):
            cache.batch_select_indices(kept)


class _Pick(LogitsProcessor):
    """Leaves one token per row, by its draw."""

    def __init__(self, sampling: Sampling, draws: Tensor, width: int) -> None:
        self.sampling, self.draws, self.width = sampling, draws, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        draws = self.draws[:, input_ids.shape[1] - self.width]
        return only(self.sampling.pick(scores, draws), scores)


def until_stop(tokens: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends an answer, with it."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return list(tokens[:end])


def _can_select(cache: Any) -> bool:
    """Whether rows of the cache can be repeated and dropped; not those of layers with two kinds of states."""
    return isinstance(cache, DynamicCache) and all(
        hasattr(layer, "batch_select_indices")
        and not (isinstance(layer, DynamicLayer) and hasattr(layer, "conv_states"))
        for layer in cache.layers
    )


@contextmanager
def plain_settings(model: Any) -> Iterator[None]:
    """Without the model's own settings, such as a repetition penalty, which transformers uses where none is given."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.generation_config = own
