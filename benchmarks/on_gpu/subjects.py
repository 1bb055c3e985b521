"""What is measured: models, pairs, and a trainer's steps with their results."""

from __future__ import annotations

import gzip
import json
import logging
import os
import platform
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
THEIRS = "trl"  # as a method: TRL's own trainer
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Rig:
    """Where the parts run, and on what."""

    device: str  # cuda or cpu
    tiny: bool
    model: str  # folder, or bundled:NAME
    data: Path | None  # folder with train.jsonl.gz and the evaluation files

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"


def word_tokenizer(n_words: int = 1000) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *(f"w{i}" for i in range(n_words - len(SPECIAL)))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE, model_max_length=8192
    )


def word_pairs(n: int, prompt: int, answer: int, seed: int = 0, n_words: int = 900) -> Rows:
    """Scored pairs of made-up words: prompts and completions of half to one and a half times the tokens asked for."""
    rng = random.Random(seed)

    def text(about: int) -> str:
        return " ".join(f"w{rng.randrange(n_words)}" for _ in range(rng.randint(about // 2, 3 * about // 2)))

    return [
        {
            "prompt": [{"role": "user", "content": text(prompt)}],
            "chosen": [{"role": "assistant", "content": text(answer)}],
            "rejected": [{"role": "assistant", "content": text(answer)}],
            "score_chosen": 5 + 5 * rng.random(),
            "score_rejected": 5 * rng.random(),
        }
        for _ in range(n)
    ]


def short_pairs(rig: Rig, n: int) -> Rows:
    """A few hundred tokens per mini-batch; fewer in the rehearsal."""
    return word_pairs(n, *((12, 18) if rig.tiny else (40, 60)))


def llama(
    hidden: int, layers: int, vocabulary: int, *, heads: int, kv_heads: int, inner: int, spread: float = 0.02
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        initializer_range=spread,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=hidden < 3000,
    )


def tiny_llama(rig: Rig, dtype: torch.dtype, noise: float = 0.0, attention: str = "sdpa") -> LlamaForCausalLM:
    """Real attention shapes (heads of 64), few of them. Noise makes a policy that has left its reference."""
    torch.manual_seed(0)
    hidden, layers = (128, 2) if rig.tiny else (256, 4)
    config = llama(hidden, layers, 1000, heads=hidden // 64, kv_heads=hidden // 128, inner=512, spread=0.06)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    model.set_attn_implementation(attention)
    return model.to(dtype)


@contextmanager
def one_process(rig: Rig) -> Iterator[None]:
    """A process group of one, as FSDP2 needs."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if rig.on_cuda else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def shard(model: LlamaForCausalLM, rig: Rig, mixed: bool) -> None:
    """FSDP2 over one process: it gathers, casts and reshards as it does over several.

    Args:
        mixed: cast the parameters to bf16 for a forward pass.
    """
    model.to(rig.device)
    mesh = init_device_mesh(rig.device, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())


def read_rows(file: Path, n: int | None = None) -> Rows:
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return rows[:n]


@dataclass(frozen=True)
class Case:
    """A trainer's settings, by name, and how its model is made."""

    base: str  # cpo or dpo
    method: str | None = None  # None: ours without a term
    fields: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    logits: bool = False  # without the fused LM head

    def classes(self) -> tuple[type, type]:
        if self.method == THEIRS:
            return {"cpo": (CPOTrainer, CPOConfig), "dpo": (DPOTrainer, DPOConfig)}[self.base]
        return trainer_class(self.method, self.base), config_class(self.method, self.base)


def make_trainer(
    case: Case, rig: Rig, folder: str, model: Any, rows: Rows, tokenizer: Any, reference: Any = None, **fields: Any
) -> Any:
    """A quiet trainer that takes its rows in order."""
    trainer_cls, config_cls = case.classes()
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": not rig.on_cuda,
        "bf16": False,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "remove_unused_columns": False,  # which TRL's CPO collator asks for, in a warning
        "report_to": "none",
        "disable_tqdm": True,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        **case.fields,
        **fields,
    }
    given = {"ref_model": reference} if reference is not None else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_cls(
            model,
            args=config_cls(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **given,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def needs_reference(case: Case) -> bool:
    return case.base == "dpo" and (case.method in (None, THEIRS) or case.fields.get("reward") == "log-ratio")


@dataclass(frozen=True)
class Outcome:
    """The results of some steps."""

    loss: list[float]
    gap: list[float]  # of the rewards, without β
    gradient_norm: list[float]
    update: torch.Tensor  # all parameters, after minus before, float64 on the CPU
    gigabytes: float


def steps_of(
    case: Case,
    rig: Rig,
    dtype: torch.dtype,
    *,
    autocast: bool = False,
    steps: int = 2,
    pairs: int = 4,
    windows: int = 2,
    rows: Rows | None = None,
    callback: TrainerCallback | None = None,
    **fields: Any,
) -> Outcome:
    """Trains the tiny model for some steps by plain gradient descent, whose update is the gradient's own size."""
    model = tiny_llama(rig, dtype, noise=0.01, attention=case.attention)
    reference = tiny_llama(rig, dtype, attention=case.attention) if needs_reference(case) else None
    rows = rows or short_pairs(rig, steps * windows * pairs)
    settings = {
        "per_device_train_batch_size": pairs,
        "gradient_accumulation_steps": windows,
        "max_steps": steps,
        "optim": "sgd",
        "learning_rate": 0.3,
        "bf16": autocast,
        "logging_steps": 1,
        "max_length": 512,
        **fields,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, rig, folder, model, rows, word_tokenizer(), reference, **settings)
        if case.logits:
            trainer._fused = False
        if callback is not None:
            trainer.add_callback(callback)
        before = flat(trainer.model)
        if rig.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return Outcome(
            [entry["loss"] for entry in logs],
            [entry["rewards/margins"] / trainer.args.beta for entry in logs],
            [entry["grad_norm"] for entry in logs],
            flat(trainer.model) - before,
            torch.cuda.max_memory_allocated() / 1e9 if rig.on_cuda else 0.0,
        )


def flat(model: torch.nn.Module) -> torch.Tensor:
    parts = [p.detach().flatten() for p in model.parameters()]
    return torch.cat(parts).cpu().double()


def be_quiet() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def machine(rig: Rig) -> str:
    """Date, card and versions behind a table's numbers."""
    card = torch.cuda.get_device_name() if rig.on_cuda else f"{os.cpu_count()} CPU cores"
    names = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "liger-kernel", "flash-attn")
    versions = []
    for name in names:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    return f"{date.today()}, {card}, python {platform.python_version()}, {', '.join(versions)}."
