"""Does it help? Every method, from one start on the same pairs, with clean and with flipped labels.

    python benchmarks/study.py --size small            # a simulation: seven seconds a run, on one core
    python benchmarks/study.py --size real --dataset train.jsonl.gz --test pairs.jsonl.gz [--test_ood other.jsonl.gz]

`small` trains a tiny model as a language model on the demo generator's text, then aligns it on the generator's pairs:
it shows how the methods compare under noise that we control, and nothing about large models. `real` aligns
SmolLM2-135M on pairs that you name, for a GPU. Each method has the learning rate that did best on held-out clean
pairs, out of the same three; GAPO has the number of mini-batches that share an anchor chosen with it. A run that is in
the results file already is not made again. Start the command once for each core (with OMP_NUM_THREADS=1): the
processes share out the runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from trl_margins.evaluation.intervals import student_interval
from trl_margins.methods import METHODS as ROWS

Key = tuple[str, str | None, int | str]

# name → method, and the fields in which it differs from the method's settings
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ROWS},
    "gappo+amapo": ("gappo", {"margin": "amapo", "beta": 2.0}),
    "geometric-anchor, pair": ("geometric-anchor", {"anchor_direction": "pair"}),
    "geometric-anchor, momentum": ("geometric-anchor", {"anchor_direction": "momentum"}),
    "geometric-anchor, radius 0": ("geometric-anchor", {"anchor_radius": 0.0}),  # weighs all pairs alike
}
BASELINE = "simpo"
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
    mini_batches: int  # of a step, where GAPO is tuned over how many of them share an anchor
    anchor_groups: tuple[int, ...]
    noise: tuple[str | None, ...] = NOISE
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(METHODS))


SIZES = {
    "small": Size(64, 16, 8, (5e-4, 1.5e-3, 5e-3), 256, 4, (1, 2, 4)),
    "real": Size(250, 16, 3, (3e-7, 1e-6, 3e-6), 1024, 8, (1, 4, 8)),
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
    parser.add_argument(
        "--out", type=Path, default=Path("study"), help="folder: runs.jsonl, study.md, study-light.svg, study-dark.svg"
    )
    args = parser.parse_args()
    size = SIZES[args.size]
    given = {name: getattr(args, name) for name in ("seeds", "steps") if getattr(args, name)}
    given |= {name: tuple(getattr(args, name)) for name in ("methods", "learning_rates") if getattr(args, name)}
    if args.noise:
        given["noise"] = tuple(None if name == "clean" else name for name in args.noise)
    size = Size(**{**vars(size), **given})
    (args.out / "locks").mkdir(parents=True, exist_ok=True)
    study = Study(args, size)
    study.run()
    runs = [run for run in study.runs.values() if "seed" in run and "error" not in run]
    text = tables(runs, size)
    (args.out / "study.md").write_text(text)
    plot(runs, size, args.out / "study")
    print(text)


class Study:
    """All runs of a size; what is done is read from and added to `runs.jsonl`, which several processes may share."""

    def __init__(self, args: argparse.Namespace, size: Size) -> None:
        self.args, self.size = args, size
        self.file = args.out / "runs.jsonl"
        self.runs: dict[Key, dict[str, Any]] = {}
        self._read = 0
        self.update()
        self.runs = {key: run for key, run in self.runs.items() if "error" not in run}  # these are tried again

    def update(self) -> None:
        """Reads what has been added to the file."""
        if not self.file.exists():
            return
        with self.file.open() as lines:
            lines.seek(self._read)
            for line in iter(lines.readline, ""):
                if line.endswith("\n"):  # else another process is writing it
                    self._read += len(line.encode())
                    run = json.loads(line)
                    self.runs[key_of(run)] = run

    def run(self) -> None:
        from filelock import FileLock
        from tqdm.auto import tqdm

        with FileLock(self.args.out / "start.lock"):
            self.model, self.data = (small if self.args.size == "small" else real)(self.args, self.size)
        gc.freeze()  # transformers collects garbage at every start, over all that is imported
        size = self.size
        wanted: list[dict[str, Any]] = [{"method": "start", "noise": None, "seed": 0}]
        wanted += [trial for method in size.methods for trial in trials(method, size)]
        wanted += [
            {"method": method, "noise": noise, "seed": seed}
            for seed, noise, method in product(range(size.seeds), size.noise, size.methods)
        ]
        bar = tqdm(wanted, desc="Runs")
        while left := [run for run in wanted if key_of(run) not in self.runs]:
            bar.update(len(wanted) - len(left) - bar.n)
            if not any(map(self.once, left)):
                time.sleep(1)  # others are at what is left, or at its learning rates
            self.update()

    def setting_of(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """Learning rate and group size: its own, or those that did best on held-out pairs; None while these are not
        known.
        """
        if "trial" in run or run["method"] == "start":
            best = run
        else:
            keys = [key_of(trial) for trial in trials(run["method"], self.size)]
            if any(key not in self.runs for key in keys):
                return None
            best = max((self.runs[key] for key in keys), key=lambda trial: trial.get("pwa_all", -1.0))
        return {"learning_rate": best.get("trial", 0.0), **({"k": best["k"]} if "k" in best else {})}

    def once(self, run: dict[str, Any]) -> bool:
        """Makes a run, unless it has to wait or another process is at it; whether it has."""
        from filelock import FileLock, Timeout

        setting = self.setting_of(run)
        if setting is None:
            return False
        name = "-".join(map(str, key_of(run))).replace(":", "")
        try:
            with FileLock(self.args.out / "locks" / name, timeout=0):
                self.update()
                if key_of(run) in self.runs:  # meanwhile
                    return True
                started, numbers = time.perf_counter(), {}
                try:
                    data = self.data(seed=run.get("seed", -1))
                    at = (run["noise"], run.get("seed", 0), setting["learning_rate"], setting.get("k"))
                    numbers = train(self.model, data, run["method"], *at, self.size)
                except Exception as error:  # the others go on, and another call tries it again
                    traceback.print_exc()
                    numbers = {"error": f"{type(error).__name__}: {error}"}
                made = {**run, **setting, "seconds": time.perf_counter() - started, **numbers}
                with self.file.open("a") as out:
                    out.write(json.dumps(made) + "\n")
        except Timeout:
            return False
        return True


def key_of(run: dict[str, Any]) -> Key:
    """What a run is."""
    if "trial" not in run:
        return run["method"], run["noise"], run["seed"]
    return run["method"], run["noise"], f"lr{run['trial']:g}" + (f"-k{run['k']}" if "k" in run else "")


def trials(method: str, size: Size) -> list[dict[str, Any]]:
    """What a method's setting is chosen from."""
    runs: list[dict[str, Any]] = [{"method": method, "noise": None, "trial": rate} for rate in size.learning_rates]
    return [{**run, "k": k} for run in runs for k in size.anchor_groups] if method == "geometric-anchor" else runs


def train(
    model: str,
    data: dict[str, Any],
    method: str,
    noise: str | None,
    seed: int,
    rate: float,
    k: int | None,
    size: Size,
) -> dict[str, float]:
    """One run; its numbers on test pairs whose labels nobody flipped.

    Args:
        data: "train", and the sets to evaluate on by their names; "test" has no name in the numbers.
        k: mini-batches that share an anchor, of `size.mini_batches` in a step; None for one mini-batch in a step.
    """
    import torch
    from transformers import PrinterCallback

    from trl_margins.cli.setup import load_model, load_tokenizer
    from trl_margins.data.noise import flip_labels, parse_noise
    from trl_margins.registry import base_of
    from trl_margins.trainers.configs import config_class
    from trl_margins.trainers.named import trainer_of
    from trl_margins.trainers.objectives import objective_of

    tokenizer = load_tokenizer(model)
    if method == "start":
        return measured(load_model(model, device_map=None), tokenizer, data, size)
    name, fields = METHODS[method]
    base = base_of(name)
    rows = data["train"].shuffle(seed=seed).select(range(size.steps * size.batch_size))
    if noise:
        kind, share = parse_noise(noise)
        rows = flip_labels(rows, share, kind, seed=seed)
    n = 1 if k is None else size.mini_batches
    options = {} if k is None else {"anchor_batch_multiplier": k}
    with tempfile.TemporaryDirectory() as folder:
        config: Any = config_class(name, base)(
            output_dir=folder,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            max_steps=max(size.steps, 1),
            per_device_train_batch_size=size.batch_size // n,
            gradient_accumulation_steps=n,
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
        )
        if objective_of(config).needs_reference:  # cached: once for all methods with the same pairs
            config.precompute_ref_log_probs = True
        trainer = trainer_of(config)(
            load_model(model, device_map=None) if base == "cpo" else model,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        if not getattr(config, "use_weighting", False):  # else nobody reads DPOTrainer's statistics of the logits
            trainer._plain_head_will_do = True
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    numbers = measured(trainer.model, tokenizer, data, size)
    history = [log for log in trainer.state.log_history if "loss" in log]
    flips = [{key: log[key] for key in log if key.startswith("flips/")} for log in history[-1:]]
    return numbers | (flips[0] if flips else {})


_tokenized: dict[tuple[str, int], tuple[Any, Any]] = {}  # a set's scores and tokens


def measured(model: Any, tokenizer: Any, data: dict[str, Any], size: Size) -> dict[str, float]:
    """What the trainers' evaluations report, of sets that are tokenized once for all runs and need no reference."""
    import torch

    from trl_margins.evaluation.ranking import ranking_metrics
    from trl_margins.evaluation.scorer import completion_tokens, logps_of_tokens
    from trl_margins.evaluation.sets import evaluation_set

    found: dict[str, float] = {}
    for name, pairs in data.items():
        if name == "train":
            continue
        key = pairs._fingerprint, size.max_length
        if key not in _tokenized:
            opened = evaluation_set(pairs, name)
            _tokenized[key] = opened.scores, completion_tokens(model, tokenizer, opened.rows, size.max_length)
        scores, tokens = _tokenized[key]
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            scored = logps_of_tokens(model, tokens, batch_size=4 * size.batch_size, desc=name)
        left = [i for i, each in enumerate(scored) if each.lengths.all()]  # a long prompt leaves no completion
        rewards = np.array([scored[i].logps / scored[i].lengths for i in left])
        numbers = ranking_metrics(*rewards.T, *(np.array(scores)[left].T if scores else ()))
        prefix = "" if name == "test" else f"{name}_"
        found |= {
            f"{prefix}{key}": numbers[key] for key in ("pwa", "pwa_all", "spearman") if numbers.get(key) is not None
        }
        found[f"{prefix}logp_chosen"] = float(rewards[:, 0].mean())
    return found


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
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    from trl_margins.data.demo import make_preference_set

    pairs = concatenate_datasets([make_preference_set(1500, seed=seed) for seed in range(1, 5)])
    prompts = sorted({row["content"] for prompt in pairs["prompt"] for row in prompt})
    order = np.random.default_rng(0).permutation(len(prompts))
    share = {prompt: place / len(prompts) for prompt, place in zip(prompts, order, strict=True)}

    def part(low: float, high: float, unseen: bool = False) -> Any:
        return pairs.filter(
            lambda row: low <= share[row["prompt"][0]["content"]] < high and (row["kind"] in UNSEEN) == unseen
        )

    parts = {"train": (0, 0.7), "held_out": (0.7, 0.8), "test": (0.8, 1), "ood": (0.7, 1, True)}
    files = args.out / "pairs"  # tokens and the reference's log-probabilities are cached beside them
    if not files.exists():
        DatasetDict({name: part(*bounds) for name, bounds in parts.items()}).save_to_disk(files)
    sets = load_from_disk(files)

    def data(seed: int) -> dict[str, Any]:
        if seed < 0:
            return {"train": sets["train"], "test": sets["held_out"]}
        return {name: sets[name] for name in ("train", "test", "ood")}

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


def present(runs: list[dict[str, Any]], size: Size) -> list[str]:
    """The methods that have runs with every kind of noise that any method has."""
    there = {(run["method"], run["noise"]) for run in runs}
    noises = {noise for method, noise in there if method in size.methods}
    return [method for method in size.methods if all((method, noise) in there for noise in noises) and noises]


def whole_seeds(runs: list[dict[str, Any]], methods: list[str], size: Size, noise: str | None) -> list[int]:
    """Those of which every method's run with this noise is there."""
    there = {(run["method"], run["noise"], run["seed"]) for run in runs}
    return [s for s in range(size.seeds) if methods and all((method, noise, s) in there for method in methods)]


def tables(runs: list[dict[str, Any]], size: Size) -> str:
    """Every measure by method and noise; differences are paired by seed, which is the same pairs, flips and order."""
    by = {(run["method"], run["noise"], run["seed"]): run for run in runs}
    start = by.get(("start", None, 0), {})
    methods = present(runs, size)
    seeds = {noise: whole_seeds(runs, methods, size, noise) for noise in size.noise}
    noises = [noise for noise in size.noise if seeds[noise]]
    if not noises:
        return "No kind of noise has the runs of all methods yet.\n"

    def row(method: str, value: Callable[[dict[str, Any], dict[str, Any]], float], sign: str = "") -> str:
        """A line: of each run, and the baseline's beside it."""
        cells = [
            _cell([value(by[method, noise, s], by.get((BASELINE, noise, s), {})) for s in seeds[noise]], sign)
            for noise in noises
        ]
        return f"| {method} | {' | '.join(cells)} |"

    def head(title: str, columns: list[str]) -> list[str]:
        return [f"| {title} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]

    names = [noise or "clean" for noise in noises]
    counts = ", ".join(f"{name}: {len(seeds[noise])}" for name, noise in zip(names, noises, strict=True))
    left_out = [method for method in size.methods if method not in methods]
    lines = [f"{size.steps} steps of {size.batch_size} pairs; mean ± half a 95 % interval over seeds ({counts}).", ""]
    if left_out:
        lines += [f"Without {', '.join(left_out)}, of which runs are missing.", ""]
    others = [method for method in methods if method != BASELINE and BASELINE in methods]
    for measure, title in MEASURES.items():
        if any(measure not in run for run in runs):
            continue
        lines += head(title, names)
        lines.append(f"| before training | {start.get(measure, float('nan')):.4f} |{' |' * (len(names) - 1)}")
        lines += [row(method, lambda run, _, name=measure: run[name]) for method in methods]
        lines += ["", *head(f"{title}, minus {BASELINE}'s", names)]
        lines += [row(method, lambda run, base, name=measure: run[name] - base[name], "+") for method in others]
        lines.append("")
    noisy = [noise for noise in noises if noise]
    if noisy:
        lines += ["Flipped pairs' share of the gradient over their share of the pairs, last quarter of training:", ""]
        lines += head("method", noisy)
        for method in methods:
            shares = [
                [run["flips/gradient_share"] / run["flips/rate"] for run in group if "flips/gradient_share" in run]
                for group in ([by[method, n, s] for s in seeds[n]] for n in noisy)
            ]  # a loss that pulls gaps back, as IPO's, may have no share
            lines.append(f"| {method} | {' | '.join(map(_cell, shares))} |")
        lines.append("")
    lines += head("log-probability of chosen completions, nats per token", names)
    lines.append(f"| before training | {start.get('logp_chosen', float('nan')):.4f} |{' |' * (len(names) - 1)}")
    lines += [row(method, lambda run, _: run["logp_chosen"]) for method in methods]
    one_each = {method: by[method, noises[0], seeds[noises[0]][0]] for method in methods}
    rates = ", ".join(f"{method} {run['learning_rate']:g}" for method, run in one_each.items())
    groups = "".join(f" {method}: k = {run['k']}." for method, run in one_each.items() if "k" in run)
    lines += ["", f"Learning rates: {rates}.{groups}"]
    return "\n".join(lines) + "\n"


def _cell(values: list[float], sign: str = "") -> str:
    if not values:
        return "–"
    mean, half = student_interval(values)
    return f"{mean:{sign}.4f} ± {half:.4f}"


SHOWN = ("gappo", "gap-aware", "gamma-po", "geometric-anchor", "amapo", "dpo", "alpha-dpo", "robust-dpo")


def plot(runs: list[dict[str, Any]], size: Size, file: Path) -> None:
    """PWA less the baseline's against the share of flipped labels: a panel for each method, and in it a line for each
    kind of noise, with the lines of the other methods in grey behind it.
    """
    import matplotlib.style

    from trl_margins.report import style

    by = {(run["method"], run["noise"], run["seed"]): run for run in runs}
    methods = [method for method in present(runs, size) if method in SHOWN]
    seeds = {(m, noise): whole_seeds(runs, [m, BASELINE], size, noise) for m in methods for noise in size.noise}
    noises = [noise for noise in size.noise if all(seeds[method, noise] for method in methods)]
    kinds = sorted({noise.split(":")[0] for noise in noises if noise})
    if not kinds or None not in noises or not methods:
        return

    def curve(method: str, kind: str) -> tuple[list[float], np.ndarray]:
        """Shares of flipped labels, and [n, 3] mean, low and high of the difference in points."""
        there = [noise for noise in noises if noise is None or noise.startswith(kind)]
        rows = []
        for n in there:
            gains = [100 * (by[method, n, s]["pwa_all"] - by[BASELINE, n, s]["pwa_all"]) for s in seeds[method, n]]
            mean, half = student_interval(gains)
            rows.append((mean, mean - half, mean + half))
        return [0.0 if n is None else float(n.split(":")[1]) for n in there], np.array(rows)

    with matplotlib.style.context(style.STYLE):
        columns = min(4, len(methods))
        figure, axes = style.panels(len(methods), height=2.5, columns=columns)
        looks = dict(zip(kinds, style.LOOKS, strict=False))
        for i, (panel, method) in enumerate(zip(axes, methods, strict=True)):
            for other, kind in product(methods, kinds):
                if other != method:
                    rates, rows = curve(other, kind)
                    panel.plot(rates, rows[:, 0], color=style.GREY, alpha=0.45, linewidth=0.8)
            for kind, look in looks.items():
                rates, rows = curve(method, kind)
                style.band(panel, np.array(rates), rows, **look)
            panel.axhline(0, color=style.INK, linewidth=1, linestyle="--")
            panel.set_title(ROWS[METHODS[method][0]].name)
            panel.set_xticks(rates)
            panel.xaxis.set_major_formatter(style.percent)
            panel.yaxis.set_major_formatter(lambda value, _: style.signed(value, ".0f") if value else "0")
            panel.set(ylim=(-26, 17), xlabel="labels flipped" if i >= len(methods) - columns else "")
            panel.set_ylabel(f"points above {ROWS[METHODS[BASELINE][0]].name}" if i % columns == 0 else "")
        others = {"color": style.GREY, "alpha": 0.6, "linewidth": 0.8}
        names = [f"flipped {'at random' if kind == 'random' else 'where the chosen is longer'}" for kind in kinds]
        figure.suptitle("Held-out accuracy, all pairs, by share of flipped training labels", x=0.01, ha="left")
        style.legend_below(figure, [*looks.values(), others], [*names, "the other methods"])
        style.write_both(figure, file)


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    main()
