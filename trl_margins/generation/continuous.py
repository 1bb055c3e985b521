"""Answers through transformers' continuous batching: an answer that has ended makes room for the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from .local import Answers, plain_settings, until_stop
from .sampling import Prompt, Sampling, only


def is_fast(device: torch.device) -> bool:
    """Whether it is faster than `generate`: without flash attention, every answer attends to all others, masked."""
    return device.type == "cuda" and (is_flash_attn_2_available() or is_flash_attn_3_available())


def generate(
    model: Any, prompts: Sequence[Prompt], sampling: Sampling, stop: Sequence[int], options: Mapping[str, Any]
) -> Answers:
    """Answers as they are finished, longest prompts first.

    `options` are those of `ContinuousBatchingConfig`.

    Raises:
        RuntimeError: the engine has stopped, or cannot compute an answer.
    """
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=list(stop) or None
    )
    waiting = {
        f"{i}/{k}": (i, k)
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        for k in range(sampling.n)
    }
    found: dict[int, list[list[int]]] = {i: [[] for _ in range(sampling.n)] for i in range(len(prompts))}
    # on a CPU the default, most of the memory, is everyone's
    share = {"max_memory_percent": 0.25} if model.device.type == "cpu" else {}
    config = ContinuousBatchingConfig(**share | dict(options))
    with plain_settings(model):
        manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=config)
        pick = _Pick(sampling, prompts, waiting)
        _sample(manager.logit_processor, pick)
        manager.start()
        try:
            for name, (i, _) in waiting.items():
                manager.add_request(prompts[i].ids, request_id=name, max_new_tokens=prompts[i].room)
            while waiting:
                made = manager.get_result(timeout=1)
                if made is None and manager.is_running():
                    continue
                if made is None or made.error:
                    why = manager.background_thread_status.fatal_error if made is None else made.error
                    raise RuntimeError(
                        f"continuous batching has stopped: {why}. Use another engine (--engine generate), or give it "
                        "other settings (--engine_options)"
                    )
                i, k = waiting.pop(made.request_id)
                pick.draws.pop(made.request_id, None)
                found[i][k] = until_stop(made.generated_tokens, stop)
                if all(found[i]):
                    yield i, found.pop(i)
        finally:
            manager.stop(block=True, hard_stop=bool(waiting))
            manager.destroy()


def _sample(processors: Any, pick: _Pick) -> None:
    """Lets the engine draw tokens as `Sampling` does; its own draws depend on which answers share a batch."""
    processors.logits_processor.append(pick)
    processors.tensors_required += 1
    processors.do_processing = True


class _Pick(ContinuousBatchingLogitsProcessor):
    """Leaves one token per row, by its draw."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, sampling: Sampling, prompts: Sequence[Prompt], requests: Mapping[str, tuple[int, int]]) -> None:
        self.sampling, self.prompts, self.requests = sampling, prompts, dict(requests)
        self.draws: dict[str, np.ndarray] = {}

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Any) -> Tensor:
        draws = [self._draw(request.state) for request in requests_with_new_token]
        return torch.tensor(draws, dtype=torch.float32).view(dtype=torch.int32)

    def _draw(self, state: Any) -> float:
        if state.request_id not in self.requests:  # of the warm-up
            return 0.0
        i, k = self.requests[state.request_id]
        prompt = self.prompts[i]
        if state.request_id not in self.draws:
            self.draws[state.request_id] = self.sampling.draws(prompt.ids, k, self.sampling.max_new_tokens)
        # by the tokens in the cache: the last results may not be back yet, so that a step may come after the last one
        place = min(state.position_offset - len(prompt.ids), self.sampling.max_new_tokens - 1)
        return float(self.draws[state.request_id][place])

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        draws = tensor_arg[: scores.size(0)].view(dtype=torch.float32)
        return only(self.sampling.pick(scores, draws), scores)
