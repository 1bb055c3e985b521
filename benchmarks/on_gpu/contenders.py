"""Who runs against whom, on which model, over which pairs; and one run."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from . import subjects
from .subjects import THEIRS, Case, Rig, Rows, llama, make_trainer, needs_reference, read_rows, word_pairs

SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
FLOOR = "floor"
TRL_SIMPO, TRL_DPO, OURS = "TRL CPOTrainer(simpo)", "TRL DPOTrainer", "ours, SimPO"
CONTENDERS: dict[str, Case] = {
    TRL_SIMPO: Case("cpo", THEIRS, SIMPO),
    OURS: Case("cpo", None, SIMPO),
    FLOOR: Case("cpo", None, SIMPO),
    TRL_DPO: Case("dpo", THEIRS),
    "GAPO": Case("cpo", "geometric-anchor"),
    "γ-DPO": Case("dpo", "gamma-po", {"reward": "log-ratio"}),
    "GAPO, momentum direction": Case("cpo", "geometric-anchor", {"anchor_direction": "momentum"}),
    f"{OURS}, share_prompt=always": Case("cpo", None, {**SIMPO, "share_prompt": "always"}),
    f"{OURS}, share_prompt=never": Case("cpo", None, {**SIMPO, "share_prompt": "never"}),
    f"{OURS}, flex attention": Case("cpo", None, {**SIMPO, "share_prompt": "always"}, "flex_attention"),
    f"{TRL_SIMPO}, Liger": Case("cpo", THEIRS, {**SIMPO, "use_liger_kernel": True}),
    f"{TRL_DPO}, Liger": Case("dpo", THEIRS, {"use_liger_kernel": True}),
    f"{OURS}, Liger": Case("cpo", None, {**SIMPO, "use_liger_kernel": True}),
    f"{TRL_SIMPO}, flash attention": Case("cpo", THEIRS, SIMPO, "flash_attention_2"),
    f"{TRL_DPO}, flash attention": Case("dpo", THEIRS, {}, "flash_attention_2"),
    f"{OURS}, flash attention": Case("cpo", None, SIMPO, "flash_attention_2"),
}
MAIN = tuple(CONTENDERS)[:7]


def cannot_run(name: str, rig: Rig) -> str | None:
    """Why a contender is left out here."""
    if "Liger" in name and not (find_spec("liger_kernel") and rig.on_cuda):
        return "liger-kernel is not installed here, or finds no CUDA device"
    if "flash" in name and not find_spec("flash_attn"):
        return "flash-attn is not installed here"
    if "flex" in name and rig.tiny:
        return "flex attention compiles: not in the rehearsal"
    return None


@dataclass(frozen=True)
class Shape:
    """A model, and the pairs that it sees."""

    model: str  # SmolLM2-135M, 1B, 3B
    pairs: int  # per step
    lengths: str = "real"  # real pairs; or prompt/answer, in tokens
    max_length: int = 2048
    checkpointing: bool = False

    @property
    def name(self) -> str:
        pairs = "real pairs" if self.lengths == "real" else f"prompts and completions of {self.lengths} tokens"
        return f"{self.model}, {self.pairs} × {pairs}{', checkpointing' if self.checkpointing else ''}"


# layers, hidden, heads, key-value heads, inner, vocabulary; 1B has TinyLlama's layers, 3B is Llama-3.2-3B's shape
RANDOM = {
    "1B": llama(2048, 22, 49152, heads=32, kv_heads=4, inner=5632),
    "3B": llama(3072, 28, 128256, heads=24, kv_heads=8, inner=8192),
    "tiny": llama(128, 1, 1000, heads=2, kv_heads=1, inner=512),
}
SMALL_MODEL = "SmolLM2-135M"


def weights_dtype(shape: Shape) -> torch.dtype:
    """float32 under bf16 autocast, as TRL trains; of 3B, weights and AdamW's states are bf16."""
    return torch.bfloat16 if shape.model == "3B" else torch.float32


def make_model(shape: Shape, rig: Rig, case: Case) -> Any:
    from trl_margins.data.bundled import resolve_model

    torch.manual_seed(0)
    if shape.model == SMALL_MODEL:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(rig.model), dtype=weights_dtype(shape))
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(weights_dtype(shape))
        try:
            with torch.device(rig.device):  # random numbers of a billion weights take a CPU a minute
                model = LlamaForCausalLM(RANDOM[shape.model])
        finally:
            torch.set_default_dtype(before)
    model.set_attn_implementation(case.attention)
    return model.to(rig.device)


def tokenizer_of(rig: Rig) -> Any:
    from trl_margins.data.bundled import resolve_model

    return subjects.word_tokenizer() if rig.tiny else AutoTokenizer.from_pretrained(resolve_model(rig.model))


@cache
def real_rows(rig: Rig) -> Rows:
    if rig.tiny or rig.data is None:
        return word_pairs(64, 12, 18) if rig.tiny else word_pairs(2000, prompt=65, answer=190)
    return read_rows(rig.data / "train.jsonl.gz")


@cache
def rows_of(shape: Shape, rig: Rig, n: int, longest: bool = False) -> tuple[Rows, list[tuple[int, int]]]:
    """n pairs of a shape, and of each how many tokens prompt and completions have. None is cut by `max_length`.

    With `longest`, every step gets the longest that there are.
    """
    tokenizer, rows = tokenizer_of(rig), real_rows(rig)
    if shape.lengths != "real":
        prompt, answer = (int(number) for number in shape.lengths.split("/"))
        rows = list(islice(_of_lengths(rows, tokenizer, prompt, answer), n))
    counted = []
    for row in rows if longest else islice(rows, 2 * n):
        prompt, chosen, rejected = (_length(tokenizer, row[name]) for name in ("prompt", "chosen", "rejected"))
        if prompt + max(chosen, rejected) + 16 <= shape.max_length:
            counted.append((row, (prompt, chosen + rejected)))
    if longest:
        counted.sort(key=lambda pair: -sum(pair[1]))
        counted = counted[: shape.pairs]
    counted = list(islice(cycle(counted), n))
    return [row for row, _ in counted], [lengths for _, lengths in counted]


def _length(tokenizer: Any, messages: list[dict[str, str]]) -> int:
    return len(tokenizer(" ".join(message["content"] for message in messages), add_special_tokens=False)["input_ids"])


def _of_lengths(rows: Rows, tokenizer: Any, prompt: int, answer: int) -> Iterator[dict[str, Any]]:
    """Prompts and completions of about this many tokens, recombined from the rows' own texts."""
    for i in range(10**9):
        row, text = rows[i % len(rows)], ""
        ids: list[int] = []
        for other in islice(cycle(rows), i, i + 10**6):
            ids += tokenizer(text + " " + other["chosen"][-1]["content"], add_special_tokens=False)["input_ids"]
            if len(ids) >= prompt + 2 * answer:
                break
        parts = [ids[:prompt], ids[prompt : prompt + answer], ids[prompt + answer : prompt + 2 * answer - i % 32]]
        names = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        made = {
            name: [{"role": role, "content": tokenizer.decode(part)}]
            for (name, role), part in zip(names.items(), parts, strict=True)
        }
        yield {**made, "score_chosen": row["score_chosen"], "score_rejected": row["score_rejected"]}


class Clock(TrainerCallback):
    """Seconds and peak memory of the steps after the first few. Nothing waits for the device in between."""

    def __init__(self, warmup: int, on_cuda: bool) -> None:
        self.warmup, self.on_cuda, self.seconds, self.steps = warmup, on_cuda, 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended(state.global_step, state.max_steps)

    def ended(self, step: int, last: int) -> None:
        if step not in (self.warmup, last):
            return
        if self.on_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if step == self.warmup:
            self.began = now
            if self.on_cuda:
                torch.cuda.reset_peak_memory_stats()
        else:
            self.seconds, self.steps = now - self.began, step - self.warmup


@dataclass(frozen=True)
class Run:
    """What the steps of a run took."""

    seconds: float  # per step
    gigabytes: float  # the most allocated
    shares: bool | None  # whether prompts were computed once


def run(
    name: str, shape: Shape, rig: Rig, warmup: int, steps: int, longest: bool = False, profiler: Any = None
) -> Run:
    """Some steps of a contender over a shape's first pairs, or over its longest."""
    case = CONTENDERS[name]
    n = shape.pairs * (warmup + steps)
    rows, lengths = rows_of(replace(shape, checkpointing=False), rig, n, longest)
    model, clock = make_model(shape, rig, case), Clock(warmup, rig.on_cuda)
    reference = copy.deepcopy(model) if needs_reference(case) else None
    autocast = rig.on_cuda and weights_dtype(shape) == torch.float32
    if name == FLOOR:
        with contextlib.nullcontext() if profiler is None else profiler:
            _floor(model, shape, rig, lengths, clock, warmup + steps, autocast)
        return Run(clock.seconds / steps, _peak(rig), None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            case,
            rig,
            folder,
            model,
            rows,
            tokenizer_of(rig),
            reference,
            per_device_train_batch_size=shape.pairs,
            max_steps=warmup + steps,
            max_length=shape.max_length,
            bf16=autocast,
            learning_rate=1e-7,
            logging_steps=10**6,
            gradient_checkpointing=shape.checkpointing,
        )
        trainer.add_callback(clock)
        if profiler is not None:
            trainer.add_callback(profiler)
        trainer.train()
    sharing = trainer.__dict__.get("_sharing")
    return Run(clock.seconds / steps, _peak(rig), getattr(sharing, "decided", None))


def _peak(rig: Rig) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if rig.on_cuda else 0.0


def _floor(
    model: Any,
    shape: Shape,
    rig: Rig,
    lengths: list[tuple[int, int]],
    clock: Clock,
    steps: int,
    autocast: bool,
) -> None:
    """Language-model steps over as many tokens as the pairs have, each prompt once, without padding; the head, TRL's
    fused one, on as many positions as the completions have tokens.
    """
    add_fused_lm_head(model)
    model.train()
    if shape.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=rig.on_cuda)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        here = lengths[step * shape.pairs : (step + 1) * shape.pairs]
        width = sum(prompt + completions for prompt, completions in here) // shape.pairs
        scored = sum(completions for _, completions in here) // shape.pairs
        ids = torch.randint(10, 900, (shape.pairs, width), generator=generator).to(rig.device, non_blocking=True)
        labels = ids.clone()
        labels[:, : width - scored] = -100
        with torch.autocast(rig.device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=labels, fused_lm_head=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.ended(step + 1, steps)


def useful_operations(shape: Shape, config: Any, lengths: list[tuple[int, int]]) -> float:
    """Floating-point operations of forward and backward pass over these pairs, each prompt once: nothing is counted
    that a reference model, a second pass, checkpointing or padding adds.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    weights = layers * (hidden * head_dim * (2 * heads + 2 * kv) + 3 * hidden * config.intermediate_size)
    total = 0.0
    for prompt, completions in lengths:
        visible = (
            (prompt + completions / 2) ** 2 / 2 + prompt * completions / 2 + (completions / 2) ** 2 / 2
        )  # a mask's entries
        total += 6 * weights * (prompt + completions) + 6 * hidden * config.vocab_size * completions
        total += 12 * layers * heads * head_dim * visible
    return total


def peak_rate(rig: Rig) -> float:
    """Operations per second of one large matrix product in bf16."""
    size, times = (8192, 20) if rig.on_cuda else (256, 2)
    a, b = (torch.randn(size, size, device=rig.device, dtype=torch.bfloat16) for _ in range(2))
    for i in range(times + 3):
        if i == 3:
            if rig.on_cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
        a @ b
    if rig.on_cuda:
        torch.cuda.synchronize()
    return 2 * size**3 * times / (time.perf_counter() - began)


def config_of(shape: Shape, rig: Rig) -> Any:
    from transformers import AutoConfig

    from trl_margins.data.bundled import resolve_model

    if shape.model == SMALL_MODEL:
        return AutoConfig.from_pretrained(Path(resolve_model(rig.model)))
    return RANDOM[shape.model]
