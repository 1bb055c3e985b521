"""Does GAPO turn down flipped labels? Trains one epoch on pairs, some of them flipped, and compares the weights.

python benchmarks/anchor_noise.py --dataset pairs.jsonl.gz --pairs 240 --rate 0.2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--dataset", required=True, help="scored pairs")
    parser.add_argument("--pairs", type=int, default=240)
    parser.add_argument("--least_gap", type=float, default=1.0, help="pairs with a smaller score gap are left out")
    parser.add_argument("--rate", type=float, default=0.2, help="share of labels that are flipped")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    numbers = study(args)
    print(f"\n{'':<26}{'clean':>9}{'flipped':>9}{'lowest third':>14}{'highest third':>15}")
    for name, row in numbers["parts"].items():
        print(
            f"{name:<26}{row['clean']:>9.4f}{row['flipped']:>9.4f}{row['lowest']:>13.1%}{row['highest']:>15.1%}"
            f"   ({row['pairs']} pairs)"
        )
    print("\nmean GAPO weight of clean and flipped pairs; share of flipped pairs among the lowest and highest weights")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), **numbers}, file, indent=2)


def study(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from trl_margins import GeometricAnchorPOConfig, GeometricAnchorPOTrainer
    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.loading import load_splits, pick_split
    from trl_margins.probes.selection import dataset_anchor_gaps
    from trl_margins.terms.anchor import anchor_weight

    rows = pick_split(load_splits(args.dataset), None, args.dataset).shuffle(seed=0)
    rows = rows.filter(lambda row: row["score_chosen"] - row["score_rejected"] >= args.least_gap)
    rows = rows.select(range(args.pairs))
    flipped = np.random.default_rng(0).random(args.pairs) < args.rate
    rows = rows.map(lambda row, i: flip(row) if flipped[i] else row, with_indices=True)
    during: list[np.ndarray] = []

    class Noting(GeometricAnchorPOTrainer):
        """Records the anchor gap of every pair as it is trained on."""

        def get_batch_samples(self, *arguments: Any) -> Any:
            batches, number = super().get_batch_samples(*arguments)
            for batch in batches:
                here = self.score_gap(batch["cached_pairs"]).detach()
                during.append((here - batch["pair_columns"]["anchor_score_gap"]).numpy())
            return batches, number

    with tempfile.TemporaryDirectory() as folder:
        config = GeometricAnchorPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=1,
            max_length=args.max_length,
            learning_rate=args.learning_rate,
            train_sampling_strategy="sequential",  # the rows are already shuffled, and the gaps come back in order
            bf16=torch.accelerator.is_available(),
            gradient_checkpointing=False,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        )
        common = {"train_dataset": rows, "processing_class": load_tokenizer(args.model)}
        trainer = Noting(load_model(args.model, device_map=None), config, **common)
        trainer.train()
        config.gradient_accumulation_steps = config.anchor_batch_multiplier
        after = dataset_anchor_gaps(trainer)

    def compare(gaps: np.ndarray, which: np.ndarray) -> dict[str, float]:
        weight = anchor_weight(torch.from_numpy(gaps), config.beta, config.simpo_gamma).numpy()
        order = np.argsort(weight)
        third = len(order) // 3
        return {
            "clean": float(weight[~which].mean()),
            "flipped": float(weight[which].mean()),
            "lowest": float(which[order[:third]].mean()),
            "highest": float(which[order[-third:]].mean()),
            "pairs": len(order),
            "anchor_gap_clean": float(gaps[~which].mean()),
            "anchor_gap_flipped": float(gaps[which].mean()),
        }

    seen = np.concatenate(during)[: args.pairs]
    cuts = np.linspace(0, args.pairs, 4).astype(int)
    parts = {
        f"epoch, {name} third": compare(seen[a:b], flipped[a:b])
        for name, a, b in zip(("first", "second", "last"), cuts, cuts[1:], strict=False)
    }
    parts["all, after the epoch"] = compare(after, flipped)
    print(f"{flipped.sum()} of {args.pairs} flipped", file=sys.stderr)
    return {"parts": parts, "flipped": int(flipped.sum())}


def flip(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "chosen": row["rejected"],
        "rejected": row["chosen"],
        "score_chosen": row["score_rejected"],
        "score_rejected": row["score_chosen"],
    }


if __name__ == "__main__":
    main()
