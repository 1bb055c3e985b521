"""Does it help at a real model's size? benchmarks/study.py's runs, several at a time on one card.

A run trains on all pairs of train.jsonl.gz and is evaluated on five sets beside it. The runs come in an order in which
a study that was broken off still compares: all methods on clean labels, then each share of flips, seed by seed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import study
from datasets import Dataset
from study import Size

from . import subjects
from .ledger import Ledger, Values, free, last_lines
from .subjects import Rig, read_rows, word_pairs

METHODS = ("simpo", "dpo", "gappo", "gap-aware", "gamma-po", "amapo", "geometric-anchor")
NOISE = (None, "random:0.2", "random:0.4")
SETS = {"id": "eval_id", "prompt_ood": "eval_prompt_ood", "response_ood": "eval_response_ood",
        "mutual_ood": "eval_mutual_ood", "test": "eval_pairs"}  # fmt: skip
HELD_OUT = 10  # one prompt in this many is held out to choose the learning rate
GIGABYTES = 20.0  # of a run: SmolLM2-135M, 16 pairs of 512 tokens, its CUDA context
# how a run fails with too little memory; the second is cuDNN's
TOO_LITTLE_MEMORY = ("OutOfMemoryError", "mha_graph.execute", "ALLOC_FAILED")

Spec = dict[str, Any]


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.py --part study", description=__doc__)
    parser.add_argument("--workers", type=int, help="runs at the same time; as many as fit into memory without it")
    parser.add_argument("--methods", nargs="+", choices=study.METHODS, default=METHODS)
    parser.add_argument("--noise", nargs="+", default=[noise or "clean" for noise in NOISE])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250, help="of 16 pairs")
    parser.add_argument("--trial_steps", type=int, default=100, help="of the runs that choose a learning rate")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-5, 8e-5])
    parser.add_argument("--max_length", type=int, default=512)
    return parser.parse_args(arguments)


def run(rig: Rig, ledger: Ledger, options: argparse.Namespace) -> str:
    if rig.tiny:
        vars(options).update(workers=1, methods=["simpo", "geometric-anchor"], noise=["random:0.4"], seeds=1, steps=1)
        vars(options).update(trial_steps=1, learning_rates=[1e-4], max_length=256)
    elif rig.data is None:
        raise SystemExit(
            "the study trains on real pairs: --data, a folder with train.jsonl.gz and the evaluation files"
        )
    if options.workers is None:
        options.workers = _that_fit(rig, options)
    noise = tuple(None if name == "clean" else name for name in options.noise)
    rates, methods = tuple(options.learning_rates), tuple(options.methods)
    batch, groups = (4, (2, (1, 2))) if rig.tiny else (16, (4, (1, 4)))
    size = Size(options.steps, batch, options.seeds, rates, options.max_length, *groups, noise, methods)
    if rig.tiny:
        _save_tiny(rig, ledger.file.parent / "start")
        rig = Rig(rig.device, True, str(ledger.file.parent / "start"), None)
    _do(rig, ledger, size, options)
    runs = [item for item in ledger.items.values() if "seed" in item and "error" not in item]
    text = study.tables(runs, size)
    study.plot(runs, size, ledger.file.with_suffix(""))
    trials = [item for item in ledger.items.values() if "trial" in item and "error" not in item]
    chosen = "".join(
        f"* {item['method']}, learning rate {item['trial']:g}{_groups(item)}: PWA {item['pwa_all']:.4f} on held-out "
        "pairs\n"
        for item in trials
    )
    failed = [f"* {key} raised {item['error']}\n" for key, item in ledger.items.items() if "error" in item]
    return "".join([f"{len(ledger.left)} runs are left for another call.\n\n", text, "\n", chosen, *failed])


def _do(rig: Rig, ledger: Ledger, size: Size, options: argparse.Namespace) -> None:
    """All runs that fit, as many at a time as there are workers."""
    waiting = [(key, spec) for key, spec in _specs(size, options) if key not in ledger.items]
    if ledger.only:
        ledger.left += [key for key, _ in waiting if not any(part in key for part in ledger.only)]
        waiting = [(key, spec) for key, spec in waiting if any(part in key for part in ledger.only)]
    busy: dict[Future[Values], tuple[str, str, Spec]] = {}
    alone: set[str] = set()  # those that had too little memory beside the others
    threads = max((os.cpu_count() or 2) // options.workers, 1)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.workers, context, initializer=_begin, initargs=(threads,))
    try:
        while waiting or busy:
            ready = [pair for pair in waiting if _setting(pair[1], ledger, size) is not None]
            ready.sort(key=lambda pair: pair[0] in alone)  # these at the end
            room = (
                1 if alone & ({key for key, *_ in busy.values()} | {key for key, _ in ready[:1]}) else options.workers
            )
            if ready and len(busy) < room:
                key, spec = ready[0]
                waiting.remove(ready[0])
                kind = "trial" if "trial" in spec else "run"
                if ledger.fits(kind, 60):
                    busy[pool.submit(_one, rig, size, spec | {"setting": _setting(spec, ledger, size)})] = (
                        key,
                        kind,
                        spec,
                    )
                else:
                    ledger.left.append(key)
                continue
            if not busy:  # the rest waits for learning rates that do not come
                ledger.left += [key for key, _ in waiting]
                break
            done, _ = wait(busy, timeout=max(ledger.remaining, 1), return_when=FIRST_COMPLETED)
            for future in done:
                key, kind, spec = busy.pop(future)
                values = future.result()
                if key not in alone and any(sign in values.get("error", "") for sign in TOO_LITTLE_MEMORY):
                    print(f"{key} found too little memory beside other runs: it is made again, alone", flush=True)
                    alone.add(key)
                    waiting.append((key, spec))
                    continue
                ledger.took(kind, values["seconds"])
                ledger.record(key, kind, values.pop("seconds"), values)
            if not done:
                ledger.left += [key for key, *_ in busy.values()] + [key for key, _ in waiting]
                break
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def _that_fit(rig: Rig, options: argparse.Namespace) -> int:
    if not rig.on_cuda:
        return 1
    import torch

    each = GIGABYTES * options.max_length / 512
    return max(int(0.9 * torch.cuda.get_device_properties(0).total_memory / 1e9 / each), 1)


def _specs(size: Size, options: argparse.Namespace) -> Iterator[tuple[str, Spec]]:
    for rate, method in product(size.learning_rates, size.methods):
        for trial in study.trials(method, size):
            if trial["trial"] == rate:
                yield _key(trial), trial | {"steps": options.trial_steps}
    yield "before training", {"method": "start", "noise": None, "seed": 0}
    for seed, noise, method in product(range(size.seeds), size.noise, size.methods):
        yield f"{method}/{noise or 'clean'}/{seed}", {"method": method, "noise": noise, "seed": seed}


def _key(trial: Spec) -> str:
    return f"{trial['method']}/learning rate {trial['trial']:g}{_groups(trial)}"


def _groups(run: Spec) -> str:
    return f", k = {run['k']}" if "k" in run else ""


def _setting(spec: Spec, ledger: Ledger, size: Size) -> tuple[float, int | None] | None:
    """Learning rate and group size: its own, or those that did best on held-out pairs; None while these are not known,
    or there are none.
    """
    if "trial" in spec or spec["method"] == "start":
        return spec.get("trial", 0.0), spec.get("k")
    keys = [_key(trial) for trial in study.trials(spec["method"], size)]
    known = [ledger.items[key] for key in keys if "pwa_all" in ledger.items.get(key, {})]
    if not known or any(key not in ledger.items for key in keys):
        return None
    best = max(known, key=lambda item: item["pwa_all"])
    return best["trial"], best.get("k")


# In a worker


def _begin(threads: int) -> None:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # several processes share the card's memory
    import torch

    torch.set_num_threads(threads)
    subjects.be_quiet()


def _one(rig: Rig, size: Size, spec: Spec) -> Values:
    """A run's numbers, or its error."""
    from dataclasses import replace

    from trl_margins.data.bundled import resolve_model

    began = time.perf_counter()
    trial, (rate, k) = "trial" in spec, spec.pop("setting")
    train, held_out, sets = _data(rig)
    data = {"train": train, "test": held_out} if trial else {"train": _joined(train, held_out), **sets}
    here = replace(size, steps=min(spec.pop("steps", size.steps), len(data["train"]) // size.batch_size))
    try:
        noise, seed = spec["noise"], spec.get("seed", 0)
        numbers = study.train(resolve_model(rig.model), data, spec["method"], noise, seed, rate, k, here)
    except Exception as error:
        numbers = {"error": last_lines(error)}
    free()  # for the runs beside
    chosen = {} if k is None else {"k": k}
    return {**spec, "learning_rate": rate, **chosen, "seconds": time.perf_counter() - began, **numbers}


def _joined(*parts: Dataset) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets(list(parts))


@cache
def _data(rig: Rig) -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    """Pairs to train on, those of other prompts that are held out, and the sets to evaluate on."""
    keep = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")

    def rows(name: str, n: int) -> list[dict[str, Any]]:
        if rig.tiny or rig.data is None:
            return word_pairs(n, prompt=10, answer=15, seed=n)
        return [{column: row[column] for column in keep} for row in read_rows(rig.data / f"{name}.jsonl.gz")]

    train = rows("train", 20)
    prompts = {str(row["prompt"]): i for i, row in enumerate(train)}
    held_out = {prompt for i, prompt in enumerate(prompts) if i % HELD_OUT == 0}
    parts = [[row for row in train if (str(row["prompt"]) in held_out) == wanted] for wanted in (False, True)]
    sets = {name: Dataset.from_list(rows(file, 8 + i)) for i, (name, file) in enumerate(SETS.items())}
    if rig.tiny:
        sets = {name: sets[name] for name in ("id", "test")}
    return Dataset.from_list(parts[0]), Dataset.from_list(parts[1]), sets


def _save_tiny(rig: Rig, folder: Path) -> None:
    import torch

    if not (folder / "config.json").exists():
        subjects.tiny_llama(rig, torch.float32).save_pretrained(folder)
        subjects.word_tokenizer().save_pretrained(folder)
