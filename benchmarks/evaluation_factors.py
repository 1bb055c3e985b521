"""Pairs per second of the evaluation factors: ROUGE-L beside rouge-score, BERTScore beside plain calls of bert-score.

All in one process, one contender after the other, several times round; medians are reported. ROUGE-L is timed on
`--pairs` pairs, BERTScore, where an encoder is given, on `--bertscore_pairs`, prompt by prompt, so that they share
answers as all of them do. Beside it are a loop that gives bert-score 1 pair a call, and one that gives it 8, as a
`map` with small batches would. Every one loads the encoder first, which counts.

    python benchmarks/evaluation_factors.py --dataset pairs.jsonl.gz
    python benchmarks/evaluation_factors.py --dataset pairs.jsonl.gz --encoder roberta-large --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median
from typing import Any

Contender = Callable[[list[str], list[str]], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="pairs with the columns chosen and rejected")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs for ROUGE-L; 0 for all")
    parser.add_argument("--bertscore_pairs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoder", help="folder or Hub id; BERTScore only with it")
    parser.add_argument("--device")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()

    chosen, rejected = read(args.dataset)
    n = args.pairs or len(chosen)
    results = [measure("rougeL", {"rouge-score": rouge_score, "ours": ours}, chosen[:n], rejected[:n], args.rounds)]
    if args.encoder:
        n = args.bertscore_pairs
        contenders = {
            "bert-score, 1 pair a call": bert_score(args.encoder, args.device, 1),
            "bert-score, 8 pairs a call": bert_score(args.encoder, args.device, 8),
            "ours": ours_bertscore(args.encoder, args.device),
        }
        results.append(measure("bertscore_f1", contenders, chosen[:n], rejected[:n], args.rounds))
    report(args, results)


def read(name: str) -> tuple[list[str], list[str]]:
    from trl_margins.data.evaluation_factors import completion_texts
    from trl_margins.data.loading import load_splits, pick_split
    from trl_margins.rows import open_rows

    rows = sorted(pick_split(load_splits(name), None, name), key=lambda row: str(row.get("prompt")))
    pairs = [completion_texts(row) for row in open_rows(rows, "pairs")]
    return [w for w, _ in pairs], [r for _, r in pairs]


def measure(
    metric: str, contenders: dict[str, Contender], chosen: list[str], rejected: list[str], rounds: int
) -> dict[str, Any]:
    """Seconds of each contender in each round, and how far its values are from the first one's."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    values: dict[str, list[float]] = {}
    for round_ in range(rounds):
        for name, run in contenders.items():
            print(f"{metric}, round {round_ + 1} of {rounds}: {name} ...", file=sys.stderr, flush=True)
            started = time.perf_counter()
            values[name] = run(chosen, rejected)
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(values.values()))
    difference = {name: max(abs(a - b) for a, b in zip(first, v, strict=True)) for name, v in values.items()}
    distinct = len({*chosen, *rejected})
    return {
        "metric": metric,
        "pairs": len(chosen),
        "distinct_answers": distinct,
        "seconds": seconds,
        "difference": difference,
    }


def rouge_score(chosen: list[str], rejected: list[str]) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [scorer.score(w, r)["rougeL"].fmeasure for w, r in zip(chosen, rejected, strict=True)]


def ours(chosen: list[str], rejected: list[str]) -> list[float]:
    from trl_margins.data.evaluation_factors import compute

    return compute(chosen, rejected, "rougeL")


def ours_bertscore(encoder: str, device: str | None) -> Contender:
    def run(chosen: list[str], rejected: list[str]) -> list[float]:
        from trl_margins.data.evaluation_factors import compute

        return compute(chosen, rejected, "bertscore_f1", encoder=encoder, device=device)

    return run


def bert_score(encoder: str, device: str | None, size: int) -> Contender:
    def run(chosen: list[str], rejected: list[str]) -> list[float]:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoConfig

        layers = model2layers.get(encoder) or AutoConfig.from_pretrained(encoder).num_hidden_layers
        scorer = BERTScorer(encoder, layers, device=device)
        batches = (slice(start, start + size) for start in range(0, len(chosen), size))
        return [f1 for at in batches for f1 in scorer.score(rejected[at], chosen[at])[2].tolist()]

    return run


def report(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    print(f"\n{'':<42}{'pairs/s':>11}{'speed-up':>10}{'largest difference':>20}")
    for result in results:
        base = median(next(iter(result["seconds"].values())))
        for name, seconds in result["seconds"].items():
            rate, gain = result["pairs"] / median(seconds), base / median(seconds)
            label = f"{result['metric']}: {name}"
            print(f"{label:<42}{rate:>11,.1f}{gain:>9.1f}x{result['difference'][name]:>20.1e}")
    said = ", ".join(f"{r['metric']} on {r['pairs']} pairs of {r['distinct_answers']} answers" for r in results)
    packages = ("rapidfuzz", "rouge-score", *(("bert-score", "torch", "transformers") if args.encoder else ()))
    versions = {name: version(name) for name in packages}
    machine = f"{os.cpu_count()} CPU cores"
    if args.encoder and args.device != "cpu":
        import torch

        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    print(f"\n{said}; median of {args.rounds} rounds; {machine}, Python {platform.python_version()}, {versions}")
    if args.json:
        settings = {"machine": machine, "versions": versions, "rounds": args.rounds}
        with open(args.json, "w") as file:
            json.dump({"settings": settings, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
