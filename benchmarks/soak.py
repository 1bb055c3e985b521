"""2,000 steps of every method on a tiny model: does memory grow, or a queue, or a log?

Each contender runs in a process of its own, so that no memory hides behind another's. All log, evaluate and save;
TRL's own trainers do the same beside them, for what grows there already. Fails where something of ours grows.

    python benchmarks/soak.py
    python benchmarks/soak.py --steps 500 --contenders GapPO γ-PO
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step import machine

TRL_CPO, TRL_DPO = "TRL CPOTrainer(simpo)", "TRL DPOTrainer"
ALLOWED = 1.02  # memory at the end over memory at the first look
# name → base, method ("trl" for TRL's own trainer), config fields
CONTENDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    TRL_CPO: ("cpo", "trl", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "GapPO": ("cpo", "gappo", {"gradient_accumulation_steps": 2}),
    "GaPO": ("cpo", "gap-aware", {}),
    "γ-PO": ("cpo", "gamma-po", {}),
    "AMaPO": ("cpo", "amapo", {}),
    "GAPO": ("cpo", "geometric-anchor", {}),
    "GradNorm-Reweight": ("cpo", "gradient-norm", {}),
    "SimPO-SAM": ("cpo", "simpo-sam", {}),
    TRL_DPO: ("dpo", "trl", {}),
    "γ-DPO": ("dpo", "gamma-po", {"reward": "log-ratio"}),
    "GAPO on DPO": ("dpo", "geometric-anchor", {"reward": "log-ratio"}),
}
WORDS = ("red", "blue", "small", "large", "round", "cat", "dog", "bird", "runs", "sings", "over", "near", "the", "a")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="1,100 fill γ-PO's queue by half of them")
    parser.add_argument("--every", type=int, default=100, help="steps from one look to the next")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--out", type=Path, default=Path("soak"), help="folder for soak.json, soak.md, soak.png")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(soaked(args)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, Any]] = {}
    for name in args.contenders:
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
        environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        runs[name] = json.loads(done.stdout.splitlines()[-1])
        result = {"date": datetime.date.today().isoformat(), **machine(), "steps": args.steps, "runs": runs}
        # after each: a soak that is broken off has left what it saw
        (args.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "soak.md").write_text(markdown(result))
    plot(runs, args.out / "soak.png")
    print((args.out / "soak.md").read_text())
    found = {name: grown(run["looks"]) for name, run in runs.items()}
    for name, reasons in found.items():
        for reason in reasons:
            print(f"{name}: {reason}", file=sys.stderr)
    if any(reasons for name, reasons in found.items() if name not in (TRL_CPO, TRL_DPO)):
        raise SystemExit("something grows")


# One contender


def soaked(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import TrainerCallback

    class Looks(TrainerCallback):
        def __init__(self) -> None:
            self.taken: list[dict[str, Any]] = []

        def on_train_begin(self, train_args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            look(trainer)  # what looking itself takes is taken by then

        def on_step_end(self, train_args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            if step % args.every == 0:
                self.taken.append(look(trainer, give_back=step in (args.every, args.steps - args.steps % args.every)))

    with tempfile.TemporaryDirectory() as folder:
        trainer = build(args.contender, folder, args.steps)
        trainer.add_callback(looks := Looks())
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "pairs": trainer.get_total_train_batch_size(trainer.args), "looks": looks.taken}


def build(name: str, folder: str, steps: int, **more: Any) -> Any:
    """A contender's trainer: logs, evaluates and saves before the first look, and keeps on with it."""
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from trl_margins.trainers.configs import config_class
    from trl_margins.trainers.named import trainer_class

    base, method, settings = CONTENDERS[name]
    if method == "trl":
        trainer_cls, config_cls = {"cpo": (CPOTrainer, CPOConfig), "dpo": (DPOTrainer, DPOConfig)}[base]
    else:
        trainer_cls, config_cls = trainer_class(method, base), config_class(method, base)
    usual = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_length": 64,
        "learning_rate": 1e-4,
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 50,
        "load_best_model_at_end": False,
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    model = tiny_model(Path(folder, "model"))
    return trainer_cls(
        model,
        args=config_cls(output_dir=str(Path(folder, "run")), **{**usual, **settings, **more}),
        train_dataset=pairs(400, seed=0),  # an epoch ends at every look: in the middle of one, batches wait
        eval_dataset=pairs(16, seed=1),
        processing_class=tokenizer(),
    )


def tiny_model(folder: Path) -> Any:
    """Two layers; from a folder, since DPO loads its reference model by name."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def tokenizer() -> Any:
    """A token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<s>", "</s>")
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def pairs(n: int, seed: int) -> Any:
    from datasets import Dataset

    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    rows = [{"prompt": words(2, 8) + " ", "chosen": words(1, 12), "rejected": words(1, 12)} for _ in range(n)]
    return Dataset.from_list([{**row, "score_chosen": rng.uniform(3, 6), "score_rejected": 3.0} for row in rows])


# One look


def look(trainer: Any, give_back: bool = False) -> dict[str, Any]:
    """What a run holds now.

    Args:
        trainer: its.
        give_back: also what is left when the C library has given freed memory back to the system. It keeps some, by
            its own rules, more and less by turns; what is left is held by somebody.
    """
    gc.collect()
    memory = {"resident": resident()}
    if give_back:
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        memory["held"] = resident()
    number, total = live_tensors()
    return {
        "step": trainer.state.global_step,
        **memory,
        "tensors": number,
        "tensor_bytes": total,
        "log_history": len(trainer.state.log_history),
        "data_loaders": len(trainer.accelerator._dataloaders),  # accelerate keeps one for each evaluation
        "remembered": remembered(trainer),
        "files": files(Path(trainer.args.output_dir)),
    }


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def live_tensors() -> tuple[int, int]:
    """Number and bytes of the tensors that Python holds."""
    import torch

    # by class: `isinstance` wakes lazily imported modules
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return len(found), sum(each.numel() * each.element_size() for each in found)


def remembered(trainer: Any) -> dict[str, int]:
    """Entries of everything that goes on from one step to the next, by name."""
    import torch

    def entries(state: Any) -> int:
        if isinstance(state, torch.Tensor):
            return state.numel()
        parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, list) else ()
        return sum(map(entries, parts))

    if not hasattr(trainer, "objective"):  # TRL's own
        return {}
    found: dict[str, int] = {}
    for name, state in trainer._term_states().items():
        found[f"{name}'s state"] = entries(state)
    for name, buffer in trainer._buffers.items():
        found[f"metrics, {name}"] = len(buffer._sums) + len(buffer._extremes)
    if (log := trainer._pair_log) is not None:
        found["pairs not written"] = sum(len(values) for _, values in log._waiting)
        found["pairs not logged"] = sum(map(len, log._not_logged))
    return found


def files(folder: Path) -> dict[str, int]:
    """Bytes of a run's folder, by what they are of: those of one kind together."""
    found: dict[str, int] = {}
    for file in folder.rglob("*"):
        if file.is_file():
            found[file.name] = found.get(file.name, 0) + file.stat().st_size
    return found


# All of them

BY_DESIGN = ("pair_log.csv", "trainer_state.json")  # a line a pair; the log's entries


def grown(looks: list[dict[str, Any]]) -> list[str]:
    """What grew that should not have."""
    first, half, last = looks[0], looks[len(looks) // 2], looks[-1]
    found = []
    if "held" in last and (ratio := last["held"] / first["held"]) > ALLOWED:
        found.append(f"memory at the end is {ratio:.4f} of memory at step {first['step']}")
    for name, value in last["remembered"].items():
        if value > half["remembered"].get(name, 0):
            found.append(f"{name}: {half['remembered'].get(name, 0)} at step {half['step']}, {value} at the end")
    if last["tensors"] > half["tensors"]:
        found.append(f"live tensors: {half['tensors']} at step {half['step']}, {last['tensors']} at the end")
    for name, size in last["files"].items():
        if name not in BY_DESIGN and size > 1.05 * half["files"].get(name, 0):  # texts whose numbers become longer
            found.append(f"{name}: {half['files'].get(name, 0)} bytes at step {half['step']}, {size} at the end")
    return found


def markdown(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    first = next(iter(result["runs"].values()))["looks"][0]["step"]
    head = [f"{result['steps']:,} steps of", "ms per step", f"MB held, step {first}", "at the end", "end ÷ first"]
    head += ["most ÷ first", "live tensors", "remembered", "log entries", "pair log, bytes per pair"]
    lines = [f"{result['date']}, {result['machine']}, {versions}.", "", f"| {' | '.join(head)} |"]
    lines.append("|---|" + "---:|" * (len(head) - 1))
    for name, run in result["runs"].items():
        start, end = run["looks"][0], run["looks"][-1]
        tensors = [each["tensors"] for each in (start, end)]
        queues = [sum(n for key, n in each["remembered"].items() if "state" in key) for each in (start, end)]
        size = end["files"].get("pair_log.csv")
        cells = [
            name,
            f"{1e3 * run['seconds'] / end['step']:.0f}",
            *(f"{each['held'] / 1e6:.1f}" for each in (start, end)),
            f"{end['held'] / start['held']:.4f}",
            f"{max(each['resident'] for each in run['looks']) / start['held']:.4f}",
            *(f"{a}" if a == b else f"{a} → {b}" for a, b in (tensors, queues)),
            f"{start['log_history']} → {end['log_history']}",
            "–" if size is None else f"{size / run['pairs'] / end['step']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(runs: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Memory over that at the first look; TRL's own in grey."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: pip install 'trl-margins[report]'", file=sys.stderr)
        return
    figure, panel = plt.subplots(figsize=(8, 3.6))
    for name, run in runs.items():
        looks = run["looks"]
        relative = [each["resident"] / looks[0]["held"] for each in looks]
        style = {"color": "#b0b0b0", "linewidth": 2.5} if name in (TRL_CPO, TRL_DPO) else {"linewidth": 1.2}
        panel.plot([each["step"] for each in looks], relative, label=name, **style)
    panel.axhline(ALLOWED, color="#c44", linestyle=":", linewidth=1)
    panel.set(xlabel="step", ylabel="resident ÷ held at the first look")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
