"""Answers through vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .local import Answers
from .sampling import Prompt, Sampling

_PROMPTS = 1024  # between two writes


def load(name: str, dtype: str, trust_remote_code: bool, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """vLLM's model of a folder or a Hub id, and the request for an adapter, if the folder is an adapter's."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "enable_prefix_caching": True}
    adapter, request = Path(name) / "adapter_config.json", None
    if adapter.is_file():
        found = json.loads(adapter.read_text(encoding="utf-8"))
        if found.get("peft_type") != "LORA":
            raise ValueError(
                f"{name} is an adapter of the kind {found.get('peft_type')}, and vLLM takes LORA: merge it into its "
                "model, or use another engine (--engine generate)"
            )
        request = LoRARequest("adapter", 1, name)
        settings |= {"enable_lora": True, "max_lora_rank": found["r"]}
        name = found["base_model_name_or_path"]
    return LLM(model=name, **settings | dict(options)), request


def generate(llm: Any, request: Any, prompts: Sequence[Prompt], sampling: Sampling, stop: Sequence[int]) -> Answers:
    """Answers to a thousand prompts at a time.

    Each answer has its own request, with its own seed: vLLM computes their prompt once.
    """
    from vllm import SamplingParams

    for begin in range(0, len(prompts), _PROMPTS):
        some = range(begin, min(begin + _PROMPTS, len(prompts)))
        params = [
            SamplingParams(
                n=1,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=prompts[i].room,
                seed=sampling.seed_of(prompts[i].ids, k),
                stop_token_ids=list(stop),
                detokenize=False,
            )
            for i in some
            for k in range(sampling.n)
        ]
        inputs = [{"prompt_token_ids": prompts[i].ids} for i in some for _ in range(sampling.n)]
        made = [each.outputs[0] for each in llm.generate(inputs, params, lora_request=request)]
        answers = [_with_end(list(each.token_ids), each, stop) for each in made]
        for place, i in enumerate(some):
            yield i, answers[place * sampling.n : (place + 1) * sampling.n]


def _with_end(ids: list[int], made: Any, stop: Sequence[int]) -> list[int]:
    """With the token that ended the answer, where vLLM leaves it out."""
    if made.finish_reason == "stop" and not (ids and ids[-1] in stop):
        return [*ids, made.stop_reason if made.stop_reason in stop else stop[0]]
    return ids
