"""GAPO's anchor gaps on real pairs: how well each way of measuring them agrees with plain float32, and its cost.

python benchmarks/anchor.py --dataset pairs.jsonl.gz --pairs 32 --max_length 256
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--dataset", help="scored pairs; the demo's without one")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs per mini-batch")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--radius", type=float, default=0.05)
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    rows = measure(args)
    print(f"\n{'anchor gaps':<44}{'mean':>9}{'of fp32':>9}{'Spearman':>10}{'worst':>9}{'s':>8}")
    for name, row in rows.items():
        print(
            f"{name:<44}{row['mean']:>9.4f}{row['ratio']:>9.3f}{row['spearman']:>10.4f}{row['worst']:>9.4f}"
            f"{row['seconds']:>8.1f}"
        )
    print(f"\n{args.pairs} pairs of {args.dataset or 'the demo'}, max_length {args.max_length}, radius {args.radius}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "rows": rows}, file, indent=2)


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    from scipy.stats import spearmanr

    from trl_margins.probes.anchor import GeometricAnchor
    from trl_margins.probes.direction import Direction, momentum_direction
    from trl_margins.probes.scope import parameters_in_scope

    gaps: dict[str, Any] = {}
    rows: dict[str, dict[str, float]] = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        started = time.perf_counter()
        gaps[name] = run().float().cpu()
        seconds = time.perf_counter() - started
        exact = next(iter(gaps.values()))
        rows[name] = {
            "mean": gaps[name].mean().item(),
            "ratio": (gaps[name].mean() / exact.mean()).item(),
            "spearman": float(spearmanr(gaps[name], exact).statistic),
            "worst": (gaps[name] - exact).abs().max().item(),
            "seconds": seconds,
        }
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)

    for regime in ("float32", "bfloat16", "autocast"):
        with anchored(args, regime) as (trainer, batches):
            started = time.perf_counter()
            direction, _ = GeometricAnchor(trainer, trainer.options)._direction(batches)
            print(f"{regime}: direction in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            note(f"{regime}: difference", partial(gaps_of, trainer, batches, direction))
            if regime != "float32":
                upcast = partial(gaps_of, trainer, batches, direction, anchor_estimator="float32")
                note(f"{regime}: two forward passes in float32", upcast)
                note(f"{regime}: weights rounded to nearest", partial(rounded, trainer, batches, direction, False))
                note(f"{regime}: weights rounded stochastically", partial(rounded, trainer, batches, direction, True))
                continue
            layers = trainer.model.config.num_hidden_layers
            last = rf"layers\.({'|'.join(str(i) for i in range(layers - 3, layers))})\."
            for name, scope in {"LM head": "lm-head", "last three layers": last, "MLP": "mlp"}.items():
                inside = parameters_in_scope(trainer.model, [scope])
                part = Direction.along({name: direction.vectors[name] for name in inside})
                note(f"scope: {name}", partial(gaps_of, trainer, batches, part))
            note("direction: of each mini-batch alone", partial(by_mini_batch, trainer, batches))
            gather_momentum(trainer, batches)
            momentum = momentum_direction(trainer.optimizer, dict(trainer.model.named_parameters()))
            note("direction: momentum of a pass over the pairs", partial(gaps_of, trainer, batches, momentum))
    return rows


@contextmanager
def anchored(args: argparse.Namespace, regime: str) -> Iterator[tuple[Any, list[Any]]]:
    """A GAPO trainer in one precision, and its collated mini-batches."""
    import torch

    from trl_margins import GeometricAnchorPOConfig, GeometricAnchorPOTrainer
    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.demo import make_preference_set
    from trl_margins.data.loading import load_splits, pick_split

    rows = (
        pick_split(load_splits(args.dataset), None, args.dataset) if args.dataset else make_preference_set(args.pairs)
    )
    n = args.pairs // args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        config = GeometricAnchorPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=n,
            anchor_batch_multiplier=n,
            anchor_radius=args.radius,
            max_length=args.max_length,
            bf16=regime == "autocast",
            use_cpu=not torch.accelerator.is_available(),
            gradient_checkpointing=False,
            report_to="none",
        )
        trainer = GeometricAnchorPOTrainer(
            load_model(args.model, dtype="bfloat16" if regime == "bfloat16" else "float32", device_map=None),
            config,
            train_dataset=rows.shuffle(seed=0).select(range(args.pairs)),
            processing_class=load_tokenizer(args.model),
        )
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
        data = trainer.train_dataset
        batches = [
            trainer.before_measuring(trainer.data_collator([data[i] for i in range(s, s + args.batch_size)]))
            for s in range(0, args.pairs, args.batch_size)
        ]
        yield trainer, batches


def gaps_of(trainer: Any, batches: list[Any], direction: Any, **options: Any) -> Any:
    """Γ of every pair along a direction, as the trainer would measure it with these options."""
    import torch

    from trl_margins.probes.anchor import GeometricAnchor

    before = {name: getattr(trainer.options, name) for name in options}
    for name, value in options.items():
        setattr(trainer.options, name, value)
    try:
        measured = GeometricAnchor(trainer, trainer.options).measure(batches, direction)
        return torch.cat(full_gaps(trainer, batches, measured))
    finally:
        for name, value in before.items():
            setattr(trainer.options, name, value)


def gather_momentum(trainer: Any, batches: list[Any]) -> None:
    """An optimizer that has seen every mini-batch's SimPO gradient, and has not moved the weights."""
    import torch.nn.functional as F

    trainer.args.learning_rate = 0.0
    trainer.create_optimizer()
    for batch in batches:
        gap = trainer.score_gap(trainer.forward_pairs(batch))
        (-F.logsigmoid(trainer.beta * gap - trainer.simpo_gamma)).mean().backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def by_mini_batch(trainer: Any, batches: list[Any]) -> Any:
    import torch

    from trl_margins.probes.anchor import GeometricAnchor

    anchor = GeometricAnchor(trainer, trainer.options)
    return torch.cat([gaps_of(trainer, [batch], anchor._direction([batch])[0]) for batch in batches])


def full_gaps(trainer: Any, batches: list[Any], measured: list[dict[str, Any]]) -> list[Any]:
    import torch

    with torch.no_grad():
        return [
            columns["anchor_gap"]
            if "anchor_gap" in columns
            else trainer.score_gap(trainer.forward_pairs(batch)).float() - columns["anchor_score_gap"]
            for batch, columns in zip(batches, measured, strict=True)
        ]


def rounded(trainer: Any, batches: list[Any], direction: Any, stochastic: bool) -> Any:
    """The gaps measured by moving the 16-bit weights themselves, for comparison."""
    import torch

    from trl_margins.probes import perturbation

    step = -trainer.options.anchor_radius * direction.per_unit
    plain = perturbation.stochastic_round
    if not stochastic:
        perturbation.stochastic_round = lambda values, dtype, generator: values.to(dtype)
    try:
        with torch.no_grad():
            here = [trainer.score_gap(trainer.forward_pairs(batch)) for batch in batches]
            with perturbation.perturbed(trainer.model, direction.vectors, step):
                return torch.cat(here) - torch.cat([trainer.score_gap(trainer.forward_pairs(b)) for b in batches])
    finally:
        perturbation.stochastic_round = plain


if __name__ == "__main__":
    main()
