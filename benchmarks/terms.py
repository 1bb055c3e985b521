"""What each weight and margin costs, as a share of one training step of plain SimPO.

A term's cost is a fraction of a millisecond, a step's noise is more: so the step is timed once in this run, and the
objective on its own, with each term and without, on the same log-probabilities, taking turns.

    python benchmarks/terms.py --model bundled:smollm2-135m-instruct --pairs 4
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not timed")
    parser.add_argument("--calls", type=int, default=200, help="timed calls of every objective")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    numbers = measure(args)
    step = numbers["step"]
    print(f"\n{'':<28}{'ms':>9}{'of a step':>11}")
    print(f"{'SimPO step':<28}{1e3 * step:>9.1f}{'100 %':>11}")
    for name, seconds in numbers["terms"].items():
        print(f"{name:<28}{1e3 * seconds:>9.3f}{seconds / step:>11.3%}")
    print(f"\n{args.pairs} demo pairs a step, {os.cpu_count()} CPU cores, Python {platform.python_version()}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), **numbers}, file, indent=2)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from trl_margins import MarginCPOConfig, MarginCPOTrainer
    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.demo import make_preference_set
    from trl_margins.data.evaluation_factors import add_evaluation_factor
    from trl_margins.methods import METHODS
    from trl_margins.trainers.configs import config_class

    rows = add_evaluation_factor(make_preference_set(args.pairs))
    common = {"report_to": "none", "bf16": torch.accelerator.is_available(), "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        configs = {method: config_class(method)(folder, **common) for method in METHODS}
        config = MarginCPOConfig(folder, loss_type="simpo", cpo_alpha=0.0, **common)
        model, tokenizer = load_model(args.model, device_map=None), load_tokenizer(args.model)
        trainer = MarginCPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))

    def step() -> None:
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        trainer.model.zero_grad()

    seconds = [timed(step) for _ in range(args.steps + 1)][1:]
    with torch.no_grad():
        pairs = trainer.pair_logps(trainer.model, batch)
    scores = batch["pair_columns"] | {"evaluation_factor": torch.tensor(rows["evaluation_factor"][:]).to(pairs.chosen)}
    terms = {method: {kind: c.terms(kind) for kind in ("weight", "margin")} for method, c in configs.items()}
    measured = {  # as the trainer would have; what measuring costs is in `step.py`
        name: torch.zeros_like(pairs.chosen)
        for of_method in terms.values()
        for term in of_method["margin"]
        for name in term.probes[-1:]
    }
    view = {"columns": scores | measured, "gather": trainer.accelerator.gather, "training": True}
    plain = trainer.objective
    objectives = {method: replace(plain, **of_method) for method, of_method in terms.items()}
    objectives["gap-aware"].margins[0].fit({"evaluation_factor": scores["evaluation_factor"]})
    objectives["gappo + amapo"] = replace(plain, weight=terms["gappo"]["weight"], margin=terms["amapo"]["margin"])
    times: dict[str, list[float]] = {name: [] for name in ("plain", *objectives)}
    for _ in range(args.calls):
        for name, objective in {"plain": plain, **objectives}.items():
            times[name].append(timed(lambda o=objective: o(pairs, **view)))
    base = median(times.pop("plain"))
    return {"step": median(seconds), "terms": {name: median(each) - base for name, each in times.items()}}


def timed(call: Callable[[], Any]) -> float:
    import torch

    started = time.perf_counter()
    call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
