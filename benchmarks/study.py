"""Does it help? Every method and the plain losses, from one start on the same pairs, clean and with flipped labels.

    python benchmarks/study.py --size small            # a simulation: under an hour on two cores
    python benchmarks/study.py --size real --dataset train.jsonl.gz --test pairs.jsonl.gz [--test_ood other.jsonl.gz]

`small` trains a tiny model as a language model on the demo generator's text, then aligns it on the generator's pairs:
it shows how the methods compare under noise that we control, and nothing about large models. `real` aligns
SmolLM2-135M on pairs that you name, for a GPU. Each method has the learning rate that did best on held-out clean
pairs, out of the same three. A run that is in the results file already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

# name → base, method, config fields. The papers' own β and γ; the plain losses have SimPO's, AlphaPO's and TRL's
METHODS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "SimPO": ("cpo", None, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "gamma_beta_ratio": 0.5}),
    "CPO": ("cpo", None, {"loss_type": "sigmoid", "cpo_alpha": 1.0, "beta": 0.1}),
    "IPO": ("cpo", None, {"loss_type": "ipo", "cpo_alpha": 0.0, "beta": 0.1}),
    "AlphaPO": (
        "cpo",
        None,
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.25},
    ),
    "DPO": ("dpo", None, {"beta": 0.1}),
    "GapPO": ("cpo", "gappo", {}),
    "GaPO": ("cpo", "gap-aware", {}),
    "γ-PO": ("cpo", "gamma-po", {}),
    "AMaPO": ("cpo", "amapo", {}),
    "GAPO": ("cpo", "geometric-anchor", {}),
    "GapPO × AMaPO": ("cpo", "gappo", {"margin": "amapo", "beta": 2.0}),
}
SUMMED = ("CPO", "DPO")  # what these log is a sum over tokens
BASELINE = "SimPO"
NOISE = (None, "random:0.2", "random:0.4", "length:0.2", "length:0.4")
MEASURES = {
    "pwa": "PWA, score gap ≥ 2",
    "pwa_all": "PWA, all pairs",
    "spearman": "Spearman ρ",
    "ood_pwa_all": "PWA, all pairs, unseen prompt families",
    "id_pwa_all": "PWA, best and worst answers, seen prompts and answering models",
    "prompt_ood_pwa_all": "PWA, best and worst answers, unseen prompts",
    "response_ood_pwa_all": "PWA, best and worst completions, unseen models",
    "mutual_ood_pwa_all": "PWA, best and worst answers, unseen prompts and answering models",
}  # those that a study's sets have


@dataclass(frozen=True)
class Size:
    """The budget that every run has."""

    steps: int
    batch_size: int
    seeds: int
    learning_rates: tuple[float, ...]
    max_length: int
    anchor_windows: int  # mini-batches behind GAPO's direction and AMaPO's statistics
    noise: tuple[str | None, ...] = NOISE
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(METHODS))


SIZES = {
    "small": Size(64, 16, 4, (5e-4, 1.5e-3, 5e-3), 256, 4),
    "real": Size(250, 16, 3, (3e-7, 1e-6, 3e-6), 1024, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct", help="start of the real size")
    parser.add_argument("--dataset", help="training pairs of the real size")
    parser.add_argument("--test", help="its test pairs")
    parser.add_argument("--test_ood", help="and pairs from elsewhere")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--noise", nargs="+", help="clean, random:0.2, length:0.4 ...; all of the size without it")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning_rates", type=float, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder: runs.jsonl, study.md, study.png")
    args = parser.parse_args()
    size = SIZES[args.size]
    given = {name: getattr(args, name) for name in ("seeds", "steps") if getattr(args, name)}
    given |= {name: tuple(getattr(args, name)) for name in ("methods", "learning_rates") if getattr(args, name)}
    if args.noise:
        given["noise"] = tuple(None if name == "clean" else name for name in args.noise)
    size = Size(**{**vars(size), **given})
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args, size)
    study.run()
    runs = [run for run in study.done if "seed" in run]
    text = tables(runs, size)
    (args.out / "study.md").write_text(text)
    plot(runs, size, args.out / "study.png")
    print(text)


class Study:
    """All runs of a size; what is done is read from and added to `runs.jsonl`."""

    def __init__(self, args: argparse.Namespace, size: Size) -> None:
        self.args, self.size = args, size
        self.file = args.out / "runs.jsonl"
        self.done = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def run(self) -> None:
        from tqdm.auto import tqdm

        self.model, self.data = (small if self.args.size == "small" else real)(self.args, self.size)
        trials = [
            {"method": method, "trial": rate, "noise": None}
            for method, rate in product(self.size.methods, self.size.learning_rates)
        ]
        for trial in tqdm(trials, desc="Learning rates"):
            self.once(trial, trial["trial"], self.data(seed=-1))
        start = {"method": "start", "noise": None, "seed": 0}
        self.once(start, 0.0, self.data(seed=0))
        runs = [
            {"method": method, "noise": noise, "seed": seed}
            for seed, noise, method in product(range(self.size.seeds), self.size.noise, self.size.methods)
        ]
        for run in tqdm(runs, desc="Runs"):
            self.once(run, self.best_rate(run["method"]), self.data(seed=run["seed"]))

    def best_rate(self, method: str) -> float:
        trials = [run for run in self.done if "trial" in run and run["method"] == method]
        return max(trials, key=lambda run: run["pwa_all"])["trial"]

    def once(self, run: dict[str, Any], rate: float, data: dict[str, Any]) -> None:
        if any(all(done.get(key) == value for key, value in run.items()) for done in self.done):
            return
        started = time.perf_counter()
        numbers = train(self.model, data, run["method"], run["noise"], run.get("seed", 0), rate, self.size)
        self.done.append({**run, "learning_rate": rate, "seconds": time.perf_counter() - started, **numbers})
        with self.file.open("a") as out:
            out.write(json.dumps(self.done[-1]) + "\n")


def train(
    model: str, data: dict[str, Any], method: str, noise: str | None, seed: int, rate: float, size: Size
) -> dict[str, float]:
    """One run; its numbers on test pairs whose labels nobody flipped.

    Args:
        data: "train", and the sets to evaluate on by their names; "test" last.
    """
    import torch
    from transformers import PrinterCallback

    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.noise import flip_labels, parse_noise
    from trl_margins.trainers.configs import config_class
    from trl_margins.trainers.named import trainer_class

    base, name, fields = METHODS[BASELINE if method == "start" else method]
    rows = data["train"].shuffle(seed=seed).select(range(size.steps * size.batch_size))
    if noise:
        kind, share = parse_noise(noise)
        rows = flip_labels(rows, share, kind, seed=seed)
    options = {"anchor_batch_multiplier": size.anchor_windows} if name == "geometric-anchor" else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(name, base)(
            load_model(model, device_map=None) if base == "cpo" else model,
            args=config_class(name, base)(
                output_dir=folder,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                max_steps=max(size.steps, 1),
                per_device_train_batch_size=size.batch_size,
                per_device_eval_batch_size=2 * size.batch_size,
                gradient_accumulation_steps=1,
                max_length=size.max_length,
                seed=seed,
                bf16=torch.accelerator.is_available(),
                gradient_checkpointing=False,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
                logging_steps=max(size.steps // 4, 1),
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                **{**fields, **options},
            ),
            train_dataset=rows,
            eval_dataset={name: pairs for name, pairs in data.items() if name != "train"},
            processing_class=load_tokenizer(model),
        )
        trainer.remove_callback(PrinterCallback)
        if method != "start":
            trainer.train()
        found = trainer.evaluate()
    history = [log for log in trainer.state.log_history if "loss" in log]
    measured = {name.removeprefix("eval_").removeprefix("test_"): value for name, value in found.items()}
    numbers = {name: value for name, value in measured.items() if name.endswith(("pwa", "pwa_all", "spearman"))}
    numbers["logp_chosen"] = found["eval_logps/chosen"]  # TRL names no set here: it is the last one's
    flips = [{key: log[key] for key in log if key.startswith("flips/")} for log in history[-1:]]
    return numbers | (flips[0] if flips else {})


def real(args: argparse.Namespace, size: Size) -> tuple[str, Any]:
    """The named model and pairs."""
    from trl_margins.data.bundled import resolve_model
    from trl_margins.data.loading import load_splits, pick_split

    if not args.dataset or not args.test:
        sys.exit("--size real trains on pairs that you name: --dataset and --test")
    train, test, ood = (
        pick_split(load_splits(name), None, name) for name in (args.dataset, args.test, args.test_ood or args.test)
    )
    held_out = train.shuffle(seed=0).select(range(len(train) // 10))
    rest = train.shuffle(seed=0).select(range(len(train) // 10, len(train)))

    def data(seed: int) -> dict[str, Any]:
        return {"train": rest, "test": held_out if seed < 0 else test, "ood": ood}

    return resolve_model(args.model), data


UNSEEN = ("compare", "rewrite")  # prompt families of the demo that training does not see


def small(args: argparse.Namespace, size: Size) -> tuple[str, Any]:
    """A tiny model that speaks the generator's language, and the generator's pairs: no prompt is in two parts."""
    from datasets import concatenate_datasets

    from trl_margins.data.demo import make_preference_set

    pairs = concatenate_datasets([make_preference_set(1500, seed=seed) for seed in range(1, 5)])
    prompts = sorted({row["content"] for prompt in pairs["prompt"] for row in prompt})
    order = np.random.default_rng(0).permutation(len(prompts))
    share = {prompt: place / len(prompts) for prompt, place in zip(prompts, order, strict=True)}

    def part(low: float, high: float, unseen: bool = False) -> Any:
        return pairs.filter(
            lambda row: low <= share[row["prompt"][0]["content"]] < high and (row["kind"] in UNSEEN) == unseen
        )

    train, held_out, test, ood = part(0, 0.7), part(0.7, 0.8), part(0.8, 1), part(0.7, 1, unseen=True)

    def data(seed: int) -> dict[str, Any]:
        return {"train": train, "test": held_out if seed < 0 else test, "ood": ood}

    folder = args.out / "start"
    if not (folder / "config.json").exists():
        pretrain(make_preference_set(1500, seed=0), folder)
    return str(folder), data


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pretrain(pairs: Any, folder: Path, steps: int = 400, batch_size: int = 32) -> None:
    """A language model of good and bad answers alike, with a tokenizer of their words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>"]
    texts = [message["content"] for row in pairs for side in ("prompt", "chosen", "rejected") for message in row[side]]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|end|>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            tie_word_embeddings=True,
        )
    )
    rows = [tokenizer.apply_chat_template([*row["prompt"], *row[s]]) for row in pairs for s in ("chosen", "rejected")]
    rows = [row if isinstance(row, list) else row["input_ids"] for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step, picked in enumerate(_draws(len(rows), batch_size, steps)):
        batch = tokenizer.pad({"input_ids": [rows[i] for i in picked]}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"language model, step {step}: {loss.item():.3f} nats per token", file=sys.stderr)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _draws(n: int, size: int, steps: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield rng.choice(n, size, replace=False)


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval."""
    from scipy.stats import t

    n = len(values)
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(np.mean(values)), float(half)


def whole_seeds(runs: list[dict[str, Any]], size: Size, noise: str | None) -> list[int]:
    """Those of which every method's run with this noise is there."""
    there = {(run["method"], run["noise"], run["seed"]) for run in runs}
    return [seed for seed in range(size.seeds) if all((method, noise, seed) in there for method in size.methods)]


def tables(runs: list[dict[str, Any]], size: Size) -> str:
    """Every measure by method and noise; differences are paired by seed, which is the same pairs, flips and order."""
    by = {(run["method"], run["noise"], run["seed"]): run for run in runs}
    start = by.get(("start", None, 0), {})
    seeds = {noise: whole_seeds(runs, size, noise) for noise in size.noise}
    noises = [noise for noise in size.noise if seeds[noise]]
    if not noises:
        return "No kind of noise has the runs of all methods yet.\n"

    def row(method: str, value: Callable[[dict[str, Any], dict[str, Any]], float], sign: str = "") -> str:
        """A line: of each run, and SimPO's beside it."""
        cells = [
            _cell([value(by[method, noise, s], by.get((BASELINE, noise, s), {})) for s in seeds[noise]], sign)
            for noise in noises
        ]
        return f"| {method} | {' | '.join(cells)} |"

    def head(title: str, columns: list[str]) -> list[str]:
        return [f"| {title} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]

    names = [noise or "clean" for noise in noises]
    counts = ", ".join(f"{name}: {len(seeds[noise])}" for name, noise in zip(names, noises, strict=True))
    lines = [f"{size.steps} steps of {size.batch_size} pairs; mean ± half a 95 % interval over seeds ({counts}).", ""]
    others = [method for method in size.methods if method != BASELINE and BASELINE in size.methods]
    for measure, title in MEASURES.items():
        if any(measure not in run for run in runs):
            continue
        lines += head(title, names)
        lines.append(f"| before training | {start.get(measure, float('nan')):.4f} |{' |' * (len(names) - 1)}")
        lines += [row(method, lambda run, _, name=measure: run[name]) for method in size.methods]
        lines += ["", *head(f"{title}, minus {BASELINE}'s", names)]
        lines += [row(method, lambda run, simpo, name=measure: run[name] - simpo[name], "+") for method in others]
        lines.append("")
    noisy = [noise for noise in noises if noise]
    if noisy:
        lines += ["Flipped pairs' share of the gradient over their share of the pairs, last quarter of training:", ""]
        lines += head("method", noisy)
        for method in size.methods:
            shares = [
                [run["flips/gradient_share"] / run["flips/rate"] for s in seeds[n] if (run := by[method, n, s])]
                for n in noisy
            ]
            lines.append(f"| {method} | {' | '.join(map(_cell, shares))} |")
        lines.append("")
    lines += head("log-probability of chosen completions, nats per token", names)
    lines.append(f"| before training | {start.get('logp_chosen', float('nan')):.4f} |{' |' * (len(names) - 1)}")
    lines += [row(method, lambda run, _: run["logp_chosen"]) for method in size.methods if method not in SUMMED]
    rates = {method: by[method, noises[0], seeds[noises[0]][0]]["learning_rate"] for method in size.methods}
    lines += ["", "Learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in rates.items()) + "."]
    return "\n".join(lines) + "\n"


def _cell(values: list[float], sign: str = "") -> str:
    mean, half = mean_and_interval(values)
    return f"{mean:{sign}.4f} ± {half:.4f}"


def plot(runs: list[dict[str, Any]], size: Size, file: Path) -> None:
    """PWA against the share of flipped labels, a panel for each kind of noise; and the difference to the baseline."""
    from matplotlib.figure import Figure

    by = {(run["method"], run["noise"], run["seed"]): run for run in runs}
    seeds = {noise: whole_seeds(runs, size, noise) for noise in size.noise}
    kinds = sorted({noise.split(":")[0] for noise in size.noise if noise and seeds[noise]})
    if not kinds or not seeds.get(None):
        return
    figure = Figure(figsize=(6.2 * len(kinds), 9), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False, sharey="row")
    plain = {"SimPO": "black", "CPO": "0.35", "IPO": "0.5", "AlphaPO": "0.65", "DPO": "0.8"}
    ours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
    rest = [method for method in size.methods if method not in plain]
    colours = plain | dict(zip(rest, ours, strict=False))
    for column, kind in enumerate(kinds):
        noises = [None, *(noise for noise in size.noise if noise and noise.startswith(kind) and seeds[noise])]
        rates = [0.0 if noise is None else float(noise.split(":")[1]) for noise in noises]
        for i, method in enumerate(size.methods):
            shift = 0.004 * (i - len(size.methods) / 2)
            for row, reference in enumerate((None, BASELINE)):
                points = [
                    mean_and_interval(
                        [
                            by[method, n, s]["pwa_all"] - (by[reference, n, s]["pwa_all"] if reference else 0.0)
                            for s in seeds[n]
                        ]
                    )
                    for n in noises
                ]
                means, halves = np.array(points).T
                panels[row, column].errorbar(
                    np.array(rates) + shift,
                    means,
                    halves,
                    label=method,
                    color=colours[method],
                    marker="o",
                    markersize=4,
                    linewidth=1.4,
                    capsize=2,
                    linestyle="--" if method in plain else "-",
                )
        for row, label in enumerate(("PWA, all pairs (labels not flipped)", f"PWA minus {BASELINE}'s")):
            panels[row, column].set_xlabel(f"share of training labels flipped ({kind})")
            panels[row, column].set_ylabel(label)
            panels[row, column].spines[["top", "right"]].set_visible(False)
            panels[row, column].set_xticks(rates)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    main()
