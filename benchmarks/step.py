"""Seconds per optimizer step and peak memory: TRL's CPOTrainer, ours with the same loss, and our methods.

Each contender runs in a process of its own, one after the other, several times round: what slows the machine for a
while slows all of them. Medians are reported.

    python benchmarks/step.py --model bundled:smollm2-135m-instruct --pairs 4 --steps 3 --rounds 3
    python benchmarks/step.py --dataset pairs.jsonl.gz --max_length 1024
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

TRL, OURS = "TRL CPOTrainer(simpo)", "MarginCPOTrainer(simpo)"
SIMPO: dict[str, Any] = {"loss_type": "simpo", "cpo_alpha": 0.0}
# name → method ("trl" for TRL's trainer, None for ours without a term) and config fields
CONTENDERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    TRL: ("trl", SIMPO),
    OURS: (None, SIMPO),
    "GapPO": ("gappo", {}),
    "GAPO": ("geometric-anchor", {}),
    "GAPO, no graph kept": ("geometric-anchor", {"anchor_keep_graphs": 0}),
    "GAPO, momentum direction": ("geometric-anchor", {"anchor_direction": "momentum"}),
    "GAPO, scope LM head": ("geometric-anchor", {"anchor_scope": ["lm-head"]}),
    "GAPO, directional": ("geometric-anchor", {"anchor_estimator": "directional"}),
    "GAPO, per-pair gradients": ("geometric-anchor", {"anchor_estimator": "per-pair"}),
    "GradNorm-Reweight": ("gradient-norm", {}),
    "SimPO-SAM": ("simpo-sam", {}),
}
DEFAULT = [TRL, OURS, "GapPO"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--dataset", help="scored pairs; the demo's without one")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a run, after one that is not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--contenders", nargs="+", default=DEFAULT, choices=CONTENDERS)
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
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.demo import make_preference_set
    from trl_margins.data.loading import load_splits, pick_split
    from trl_margins.trainers.configs import config_class
    from trl_margins.trainers.named import trainer_class

    wanted = args.pairs * (args.steps + 1)
    rows = pick_split(load_splits(args.dataset), None, args.dataset) if args.dataset else make_preference_set(wanted)
    method, settings = CONTENDERS[args.contender]
    if method == "trl":
        trainer_cls, config_cls = CPOTrainer, CPOConfig
    else:
        trainer_cls, config_cls = trainer_class(method), config_class(method)
    settings = {**settings, "simpo_gamma": 0.5, "beta": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        config = config_cls(
            output_dir=folder,
            per_device_train_batch_size=args.pairs,
            gradient_accumulation_steps=1,
            max_steps=args.steps + 1,
            max_length=args.max_length,
            bf16=torch.accelerator.is_available(),
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = trainer_cls(
            load_model(args.model, device_map=None),
            config,
            train_dataset=rows.select(range(wanted)),
            processing_class=load_tokenizer(args.model),
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None,
        )
        trainer.add_callback(clock := step_clock())
        trainer.train()
    return {"seconds": median(clock.seconds[1:]), "gigabytes": peak_memory()}


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
    """In GB: of the accelerator where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    import torch
    import transformers
    import trl

    medians = {name: {key: median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}
    first = next(iter(medians.values()))
    print(f"\n{'':<26}{'s/step':>9}{'speed-up':>10}{'peak GB':>9}{'of TRL':>8}")
    for name, values in medians.items():
        speedup, share = first["seconds"] / values["seconds"], values["gigabytes"] / first["gigabytes"]
        print(f"{name:<26}{values['seconds']:>9.2f}{speedup:>9.2f}x{values['gigabytes']:>9.2f}{share:>8.2f}")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    said = f"{args.pairs} pairs a step, max_length {args.max_length}, {args.dataset or 'demo pairs'}"
    print(f"\n{said}; {machine}, Python {platform.python_version()}, {versions}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "machine": machine, "versions": versions, "runs": runs}, file, indent=2)


if __name__ == "__main__":
    main()
