"""Everything in one command: steps, methods, evaluation, tokenization. One table, a JSON file, a plot.

Contenders take turns in processes of their own; medians are reported. On a GPU it trains in bf16.

    python benchmarks/bench.py --dataset pairs.jsonl.gz --out bench
    python benchmarks/bench.py --quick
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from step import FLOOR, OURS, TRL, machine

BASES = [TRL, OURS, FLOOR, "TRL DPOTrainer", "MarginDPOTrainer", "γ-DPO"]
METHODS = [OURS, "GapPO", "GaPO", "γ-PO", "AMaPO", "GAPO", "GradNorm-Reweight", "SimPO-SAM"]
OPTIONS = [OURS, "GAPO", "GAPO, no kept graphs", "GAPO, momentum direction", "GAPO, scope last layers"]
OPTIONS += ["GAPO, per-pair gradients"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--dataset", help="scored pairs; the demo's without one")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 4], help="batch sizes")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of one step of one pair: does it run?")
    parser.add_argument(
        "--out", type=Path, default=Path("bench"), help="folder for bench.json, bench.md and the pictures"
    )
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.steps, args.rounds = [1], 1, 1
    args.out.mkdir(parents=True, exist_ok=True)
    largest = max(args.pairs)
    long = ("--prompts", "long")
    on_adapters = [OURS, "GAPO", "GAPO, per-pair gradients"]
    parts: dict[str, Callable[[], dict[str, dict[str, float]]]] = {
        f"{pairs} pairs a step": partial(steps, args, pairs, BASES) for pairs in args.pairs
    }
    parts |= {
        f"{largest} pairs a step, prompts of 500 tokens": partial(steps, args, largest, BASES, *long),
        f"{largest} pairs a step, checkpointing": partial(steps, args, largest, BASES, "--gradient_checkpointing"),
        f"methods, {largest} pairs a step": partial(steps, args, largest, METHODS),
        f"GAPO's options, {largest} pairs a step": partial(steps, args, largest, OPTIONS),
        "GAPO on adapters": partial(steps, args, largest, on_adapters, "--lora"),
        "evaluation": partial(evaluation, args),
        "ROUGE-L": partial(evaluation_factors, args),
        "tokenization": partial(tokenization, args),
    }
    sections: dict[str, dict[str, dict[str, float]]] = {}
    for title, part in parts.items():
        sections[title] = part()
        result = {"date": datetime.date.today().isoformat(), **machine(), "sections": sections}
        # after each part: an interrupted run leaves what it has measured
        (args.out / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
        (args.out / "bench.md").write_text(markdown(result))
    plot(sections, args.out / "bench")
    print((args.out / "bench.md").read_text())


def steps(args: argparse.Namespace, pairs: int, contenders: list[str], *more: str) -> dict[str, dict[str, float]]:
    """One call of `step.py`."""
    file = args.out / "step.json"
    options = {"model": args.model, "pairs": pairs, "steps": args.steps, "rounds": args.rounds}
    options |= {"max_length": args.max_length, "json": file}
    options |= {"dataset": args.dataset} if args.dataset else {}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    script = str(Path(__file__).with_name("step.py"))
    subprocess.run([sys.executable, script, *flags, *more, "--contenders", *contenders], check=True)
    medians = json.loads(file.read_text())["medians"]
    file.unlink()
    return medians


def taking_turns(rounds: int, **contenders: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Median seconds of each; they take turns, and the first turn is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: {"seconds": median(each[1:])} for name, each in seconds.items()}


def evaluation(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """PWA over pairs, and eight completions of one prompt in one forward pass, with shared prompts and without."""
    import torch

    from trl_margins import MarginCPOConfig, MarginCPOTrainer
    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.demo import make_preference_set
    from trl_margins.data.loading import load_splits, pick_split
    from trl_margins.forward.shared_prompt import shared_token_logps
    from trl_margins.forward.shared_rows import shared_rows
    from trl_margins.forward.standard import fused_token_logps

    n = 8 if args.quick else 24
    rows = pick_split(load_splits(args.dataset), None, args.dataset) if args.dataset else make_preference_set(n)
    rows = rows.select(range(n))
    tokenizer = load_tokenizer(args.model)
    configs = {
        share: MarginCPOConfig(
            output_dir=str(args.out / "evaluation"),
            loss_type="simpo",
            cpo_alpha=0.0,
            max_length=args.max_length,
            share_prompt=share,
            per_device_eval_batch_size=4,
            bf16=torch.accelerator.is_available(),
            report_to="none",
            disable_tqdm=True,
        )
        for share in ("never", "always")
    }
    trainers = {
        share: MarginCPOTrainer(
            load_model(args.model, device_map=None),
            config,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
        )
        for share, config in configs.items()
    }
    pairs = taking_turns(
        args.rounds,
        **{"pairs, standard": trainers["never"].evaluate, "pairs, shared": trainers["always"].evaluate},
    )
    trainer = trainers["always"]
    collate, data = trainer.data_collator.collator, trainer.train_dataset
    layout = trainer.standard_rows()
    batch = collate([data[i] for i in range(4)])
    ids, mask, labels = layout(batch)
    # eight completions of the first prompt: those of the first pairs, behind that prompt
    width = int((labels[0] == -100).sum().item())
    prompt = ids[0, : width - int((mask[0] == 0).sum())]
    completions = [row[label != -100] for row, label in zip(ids, labels, strict=True)]
    k = len(completions)
    full = [torch.cat([prompt, completion]) for completion in completions]
    marked = [torch.cat([torch.full_like(prompt, -100), completion]) for completion in completions]
    ids = torch.nn.utils.rnn.pad_sequence(full, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(marked, batch_first=True, padding_value=-100)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in full], batch_first=True)
    device, model = trainer.accelerator.device, trainer.model.eval()

    @torch.no_grad()
    def standard() -> None:
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        fused_token_logps(model, inputs, labels.to(device))

    @torch.no_grad()
    def shared() -> None:
        rows = {name: value.to(device) for name, value in shared_rows(ids, mask, labels, k).items()}
        shared_token_logps(model, rows)

    return pairs | taking_turns(
        args.rounds, **{f"{k} completions, standard": standard, f"{k} completions, shared": shared}
    )


def evaluation_factors(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """ROUGE-L of the pairs' completions; `evaluation_factors.py` has BERTScore too."""
    from evaluation_factors import ours, rouge_score

    from trl_margins.data.demo import make_preference_set
    from trl_margins.data.evaluation_factors import completion_texts
    from trl_margins.data.loading import load_splits, pick_split
    from trl_margins.rows import open_rows

    rows = pick_split(load_splits(args.dataset), None, args.dataset) if args.dataset else make_preference_set(2000)
    pairs = [completion_texts(row) for row in open_rows(rows.select(range(500)), "pairs")]
    texts = [w for w, _ in pairs], [r for _, r in pairs]
    return taking_turns(
        args.rounds,
        **{"rouge-score, 500 pairs": lambda: rouge_score(*texts), "ours, 500 pairs": lambda: ours(*texts)},
    )


def tokenization(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """How long the trainers' constructors take, which is nearly all tokenization."""
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from trl_margins import MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer
    from trl_margins.cli.setup import load_tokenizer
    from trl_margins.data.demo import make_preference_set
    from trl_margins.data.loading import load_splits, pick_split

    datasets.disable_caching()
    rows = pick_split(load_splits(args.dataset), None, args.dataset) if args.dataset else make_preference_set(2000)
    tokenizer = load_tokenizer(args.model)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model, folder = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)), args.out / "tokenization"
    model.save_pretrained(folder)

    def make(trainer_class: Any, config_class: Any, **options: Any) -> Callable[[], Any]:
        config = config_class(
            output_dir=str(folder),
            **options,
            max_length=args.max_length,
            bf16=torch.accelerator.is_available(),
            report_to="none",
        )
        # DPOTrainer loads its reference as it loads its model
        given = str(folder) if issubclass(trainer_class, DPOTrainer) else model
        return lambda: trainer_class(given, args=config, train_dataset=rows, processing_class=tokenizer)

    simpo = {"loss_type": "simpo"}
    trainers = {
        "TRL CPOTrainer": make(CPOTrainer, CPOConfig, **simpo),
        "TRL DPOTrainer": make(DPOTrainer, DPOConfig),
        "MarginCPOTrainer": make(MarginCPOTrainer, MarginCPOConfig, **simpo),
        "MarginCPOTrainer, tokenization=cpo": make(MarginCPOTrainer, MarginCPOConfig, tokenization="cpo", **simpo),
        "MarginDPOTrainer": make(MarginDPOTrainer, MarginDPOConfig),
    }
    timed = taking_turns(args.rounds, **{f"{name}, {len(rows)} pairs": run for name, run in trainers.items()})
    datasets.enable_caching()
    return timed


def markdown(result: dict[str, Any]) -> str:
    """Every section as a table; speed-ups are over its first row."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['date']}, {result['machine']}, {versions}.", ""]
    for title, rows in result["sections"].items():
        first = next(iter(rows.values()))
        memory = "gigabytes" in first
        extra = [" completion tokens/s | peak GB |", "---:|---:|"] if memory else ["", ""]
        lines += [f"| {title} | s | first ÷ this |{extra[0]}", f"|---|---:|---:|{extra[1]}"]
        for name, row in rows.items():
            cells = [name, f"{row['seconds']:.2f}", f"{first['seconds'] / row['seconds']:.2f}"]
            cells += [f"{row['tokens_per_second']:.0f}", f"{row['gigabytes']:.2f}"] if memory else []
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(sections: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Seconds of every contender, one panel per section: ours in blue, the others in grey."""
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from trl_margins.report import style

    heights = [len(rows) for rows in sections.values()]
    with matplotlib.style.context(style.STYLE):
        size = style.WIDTH, 0.36 * sum(heights) + 0.75 * len(heights)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(sections), 1, height_ratios=heights, squeeze=False)[:, 0]
        for panel, (title, rows) in zip(panels, sections.items(), strict=True):
            names, seconds = list(rows), [row["seconds"] for row in rows.values()]
            others = [name.startswith(("TRL", "plain", "rouge-score")) or "standard" in name for name in names]
            bars = panel.barh(names, seconds, color=[style.GREY if other else style.BLUE for other in others])
            panel.bar_label(bars, labels=[f"{value:.3g} s" for value in seconds], padding=3)
            panel.invert_yaxis()
            panel.set_title(title)
            panel.margins(x=0.12)
            panel.grid(visible=False, axis="y")
        panels[-1].set_xlabel("seconds: shorter is faster")
        style.legend_below(figure, [Patch(color=style.BLUE), Patch(color=style.GREY)], ["trl-margins", "others"])
        style.write_both(figure, file)


if __name__ == "__main__":
    main()
