"""Seconds per optimizer step and peak memory: TRL's CPOTrainer, ours with the same loss, and our methods.

Each contender runs in a process of its own, one after the other, several times round: whatever slows the machine for
a while slows all of them. Medians are reported.

    python benchmarks/step.py --model bundled:smollm2-135m-instruct --pairs 4 --steps 3 --rounds 3
    python benchmarks/step.py --dataset pairs.jsonl.gz --max_length 1024
    python benchmarks/step.py --pairs 2 --accumulate 8 --contenders "MarginCPOTrainer(simpo)" "GAPO, kept graphs"
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

TRL, OURS, FLOOR = "TRL CPOTrainer(simpo)", "MarginCPOTrainer(simpo)", "plain language model"
SIMPO: dict[str, Any] = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 1.0}
GAPO = "geometric-anchor"
# name → base, method ("trl" for TRL's own trainer, None for ours without a term), config fields
CONTENDERS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    TRL: ("cpo", "trl", SIMPO),
    OURS: ("cpo", None, SIMPO),
    "the same, share_prompt=never": ("cpo", None, {**SIMPO, "share_prompt": "never"}),
    FLOOR: ("cpo", None, SIMPO),
    "TRL DPOTrainer": ("dpo", "trl", {}),
    "MarginDPOTrainer": ("dpo", None, {}),
    "γ-DPO": ("dpo", "gamma-po", {"reward": "log-ratio"}),
    "GapPO": ("cpo", "gappo", {}),
    "GaPO": ("cpo", "gap-aware", {}),
    "γ-PO": ("cpo", "gamma-po", {}),
    "AMaPO": ("cpo", "amapo", {}),
    "GAPO": ("cpo", GAPO, {}),
    "GAPO, no kept graphs": ("cpo", GAPO, {"anchor_keep_graphs": 0}),
    "GAPO, kept graphs": ("cpo", GAPO, {"anchor_keep_graphs": 8}),
    "GAPO, momentum direction": ("cpo", GAPO, {"anchor_direction": "momentum"}),
    "GAPO, scope last layers": ("cpo", GAPO, {"anchor_scope": [r"layers\.(2[6-9])\."]}),
    "GAPO, every pair its own direction": ("cpo", GAPO, {"anchor_direction": "pair"}),
    "GAPO, per-pair gradients": ("cpo", GAPO, {"anchor_estimator": "per-pair"}),
    "GradNorm-Reweight": ("cpo", "gradient-norm", {}),
    "SimPO-SAM": ("cpo", "simpo-sam", {}),
}
DEFAULT = [TRL, OURS, FLOOR]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--dataset", help="scored pairs; the demo's without one")
    parser.add_argument("--pairs", type=int, default=4, help="pairs per mini-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="mini-batches per step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per run, after one that is not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, choices=CONTENDERS)
    parser.add_argument("--prompts", choices=["as they are", "long"], default="as they are")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="as TRL trains by default")
    parser.add_argument("--lora", action="store_true", help="adapters on all linear layers instead of all weights")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.contenders}
    for round_ in range(args.rounds):
        for name in args.contenders:
            print(f"round {round_ + 1} of {args.rounds}: {name} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
            environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    report(args, runs)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One contender, in this process."""
    import torch
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.bundled import resolve_model
    from trl_margins.data.demo import make_preference_set
    from trl_margins.data.loading import load_splits, pick_split
    from trl_margins.trainers.configs import config_class
    from trl_margins.trainers.named import trainer_class

    step_size = args.pairs * args.accumulate
    wanted = step_size * (args.steps + 1)
    if args.dataset:
        rows = pick_split(load_splits(args.dataset), None, args.dataset)
    else:  # the surplus fills long prompts
        rows = make_preference_set(wanted + 200)
    rows = rows.shuffle(seed=0)
    tokenizer = load_tokenizer(args.model)
    if args.prompts == "long":
        rows = long_prompts(rows, tokenizer, wanted)
    base, method, settings = CONTENDERS[args.contender]
    if method == "trl":
        trainer_cls, config_cls = {"cpo": (CPOTrainer, CPOConfig), "dpo": (DPOTrainer, DPOConfig)}[base]
    else:
        trainer_cls, config_cls = trainer_class(method, base), config_class(method, base)
    with tempfile.TemporaryDirectory() as folder:
        config = config_cls(
            output_dir=folder,
            per_device_train_batch_size=args.pairs,
            gradient_accumulation_steps=args.accumulate,
            max_steps=args.steps + 1,
            max_length=args.max_length,
            bf16=torch.accelerator.is_available(),
            gradient_checkpointing=args.gradient_checkpointing,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        path = resolve_model(args.model)
        trainer = trainer_cls(
            path if base == "dpo" else load_model(path, device_map=None),
            args=config,
            train_dataset=rows.select(range(wanted)),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None,
        )
        if args.contender == FLOOR:
            seconds = floor(trainer, args.pairs, args.accumulate, args.steps + 1)
        else:
            trainer.add_callback(clock := step_clock())
            trainer.train()
            seconds = clock.seconds
    tokens = count_completion_tokens(trainer, wanted - step_size, base)
    total = sum(seconds[1:])
    return {"seconds": total / args.steps, "tokens_per_second": tokens / total, "gigabytes": peak_memory()}


def long_prompts(rows: Any, tokenizer: Any, n: int) -> Any:
    """Prompts of about 500 tokens, completions of at most 150, recombined from the data set's own texts."""

    def cut(text: str, tokens: int) -> str:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])

    def text(row: Any, name: str) -> str:
        return row[name] if isinstance(row[name], str) else row[name][-1]["content"]

    filler = "\n\n".join(text(row, "chosen") for row in rows.select(range(n, min(n + 200, len(rows)))))
    words, made = filler.split(" "), []
    for i in range(n):
        row = rows[i]
        prompt = cut(" ".join(words[i * 50 % len(words) :] + words), 480) + "\n\n" + cut(text(row, "prompt"), 20)
        made.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                **{s: [{"role": "assistant", "content": cut(text(row, s), 150)}] for s in ("chosen", "rejected")},
                "score_chosen": row["score_chosen"],
                "score_rejected": row["score_rejected"],
            }
        )
    return type(rows).from_list(made)


def count_completion_tokens(trainer: Any, n: int, base: str) -> int:
    """Completion tokens of the last n pairs: those that were timed."""
    rows = trainer.train_dataset.select(range(len(trainer.train_dataset) - n, len(trainer.train_dataset)))
    if base == "dpo":
        return sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    return sum(token != -100 for row in rows for side in ("chosen", "rejected") for token in row[f"{side}_labels"])


def floor(trainer: Any, pairs: int, accumulate: int, steps: int) -> list[float]:
    """A plain language-model step over as many tokens as the pairs have, prompts counted once, without padding."""
    import torch

    from trl_margins.forward.shared_rows import unpacked

    model, seconds = trainer.model.train(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    device = trainer.accelerator.device
    for step in range(steps):
        window = []
        for first in range(step * accumulate * pairs, (step + 1) * accumulate * pairs, pairs):
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(first, first + pairs)])
            tokens = int((unpacked(batch["shared_rows"])["count"] > 0).sum()) // pairs
            window.append(torch.randint(100, 1000, (pairs, tokens), device=device))
        started = time.perf_counter()
        for ids in window:
            with torch.autocast(device.type, torch.bfloat16, enabled=trainer.args.bf16):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def step_clock() -> Any:
    """A callback that times every optimizer step, from the end of one to the end of the next: what a method does
    before its first forward pass counts.
    """
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

    return Clock()


def peak_memory() -> float:
    """In GB: of the accelerator if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    medians = {name: {key: median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}
    first = next(iter(medians.values()))
    print(f"\n{'':<30}{'s/step':>9}{'speed-up':>10}{'completion tokens/s':>21}{'peak GB':>9}{'share':>8}")
    for name, values in medians.items():
        speedup, share = first["seconds"] / values["seconds"], values["gigabytes"] / first["gigabytes"]
        print(
            f"{name:<30}{values['seconds']:>9.2f}{speedup:>9.2f}x{values['tokens_per_second']:>21.1f}"
            f"{values['gigabytes']:>9.2f}{share:>8.2f}"
        )
    step = f"{args.pairs * args.accumulate} pairs per step in {args.accumulate} mini-batches"
    said = f"{step}, max_length {args.max_length}, prompts {args.prompts}"
    print(f"\n{said}, {args.dataset or 'demo pairs'}; {machine()}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), **machine(), "runs": runs, "medians": medians}, file, indent=2)


def machine() -> dict[str, Any]:
    """The machine and the versions behind the numbers."""
    import torch
    import transformers
    import trl

    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }


if __name__ == "__main__":
    main()
