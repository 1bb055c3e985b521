"""Seconds per optimizer step and peak memory: TRL's CPOTrainer, ours with the same loss, and GapPO.

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

CONTENDERS = ("TRL CPOTrainer(simpo)", "MarginCPOTrainer(simpo)", "GapPOTrainer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--dataset", help="scored pairs; the demo's without one")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a run, after one that is not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for round_ in range(args.rounds):
        for name in CONTENDERS:
            print(f"round {round_ + 1} of {args.rounds}: {name} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
            environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    report(args, runs)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One contender, in this process."""
    import torch
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from trl_margins import GapPOConfig, GapPOTrainer, MarginCPOConfig, MarginCPOTrainer
    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.demo import make_preference_set
    from trl_margins.data.loading import load_splits, pick_split

    wanted = args.pairs * (args.steps + 1)
    rows = pick_split(load_splits(args.dataset), None, args.dataset) if args.dataset else make_preference_set(wanted)
    trainer_cls, config_cls = {
        CONTENDERS[0]: (CPOTrainer, CPOConfig),
        CONTENDERS[1]: (MarginCPOTrainer, MarginCPOConfig),
        CONTENDERS[2]: (GapPOTrainer, GapPOConfig),
    }[args.contender]
    settings: dict[str, Any] = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 1.0}
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
        )
        trainer.add_callback(clock := step_clock())
        trainer.train()
    return {"seconds": median(clock.seconds[1:]), "gigabytes": peak_memory()}


def step_clock() -> Any:
    """A callback that times every optimizer step."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self.seconds.append(time.perf_counter() - self.started)

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
    first = medians[CONTENDERS[0]]
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
