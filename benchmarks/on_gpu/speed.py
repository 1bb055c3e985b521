"""Speed, side by side: rounds in which every contender takes its turn, all in one process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from . import contenders
from .contenders import CONTENDERS, FLOOR, MAIN, OURS, SMALL_MODEL, TRL_SIMPO, Shape, cannot_run, rows_of
from .ledger import Ledger, Values, table
from .subjects import Rig

WARMUP, STEPS, ROUNDS = 5, 20, 2
SHAPES = (  # as many pairs as TRL's trainers have room for in 80 GB
    Shape(SMALL_MODEL, 32, max_length=768),
    Shape("1B", 8, max_length=768),
    Shape("1B", 8, "1500/150", checkpointing=True),
    Shape("3B", 8, max_length=768, checkpointing=True),
    Shape(SMALL_MODEL, 8, "1500/150"),
    Shape("1B", 16, checkpointing=True),
    Shape("1B", 4, "3000/500", max_length=4096, checkpointing=True),
    Shape(SMALL_MODEL, 32, max_length=768, checkpointing=True),
)
EVERYONE = SHAPES[:3]  # elsewhere only the main contenders run
FIRST = {SMALL_MODEL: 15.0, "1B": 25.0, "3B": 60.0, "tiny": 8.0}  # seconds, until one has been measured


def run(rig: Rig, ledger: Ledger) -> str:
    shapes = (
        [Shape("tiny", 2, max_length=256), Shape("tiny", 2, "60/12", 256, checkpointing=True)] if rig.tiny else SHAPES
    )
    rounds, warmup, steps = (1, 1, 1) if rig.tiny else (ROUNDS, WARMUP, STEPS)
    everyone = shapes[:1] if rig.tiny else EVERYONE
    ledger.do("peak", lambda: {"rate": contenders.peak_rate(rig)}, guess=5)
    out = {name: why for name in CONTENDERS if (why := cannot_run(name, rig))}
    for round_ in range(rounds):
        for shape in shapes:
            for name in CONTENDERS if shape in everyone else MAIN[:3] if rig.tiny else MAIN:
                if name in out or "Liger" in name:
                    continue
                work = partial(_timed, name, shape, rig, warmup, steps)
                ledger.do(f"{shape.name}/{name}/{round_ + 1}", work, f"{shape.name}/{name}", FIRST[shape.model])
        if round_ == 0:
            for shape in shapes[:1] if rig.tiny else shapes[:4]:
                for name in (TRL_SIMPO, OURS, "GAPO", FLOOR):
                    if rig.on_cuda:
                        work = partial(_profiled, name, shape, rig)
                        ledger.do(f"profile/{shape.name}/{name}", work, f"profile/{shape.name}", FIRST[shape.model])
    # Liger's kernels take the place of transformers' for the rest of the process: last
    for round_, shape in product(range(rounds), everyone):
        for name in CONTENDERS:
            if "Liger" in name and name not in out:
                work = partial(_timed, name, shape, rig, warmup, steps)
                key = f"{shape.name}/{name}/{round_ + 1}"
                ledger.do(key, work, f"{shape.name}/Liger", FIRST[shape.model])
    tables = [_table(shape, ledger) for shape in shapes] + [_profiles(ledger)]
    left = f"{len(ledger.left)} runs are left for another call.\n" if ledger.left else ""
    missing = "".join(f"\n* not run: {name}: {why}" for name, why in out.items())
    return left + _said(rig, warmup, steps) + "\n".join(filter(None, tables)) + missing + "\n"


def _said(rig: Rig, warmup: int, steps: int) -> str:
    return (
        f"Medians of rounds in which all take turns; {steps} timed steps a run, after {warmup}. AdamW, clipping; "
        "float32 weights under bf16 autocast (3B: bf16 weights and states). MFU: operations of one pass forward and "
        "back over the pairs' tokens, each prompt once, over those of an 8192³ bf16 matrix product in that time.\n\n"
    )


def _timed(name: str, shape: Shape, rig: Rig, warmup: int, steps: int) -> Values:
    found = contenders.run(name, shape, rig, warmup, steps)
    _, lengths = rows_of(replace(shape, checkpointing=False), rig, shape.pairs * (warmup + steps))
    timed = lengths[shape.pairs * warmup :]
    return {
        "shape": shape.name,
        "name": name,
        "step": found.seconds,
        "gigabytes": found.gigabytes,
        "shares": found.shares,
        "completion_tokens": sum(completions for _, completions in timed) / steps,
        "tokens": sum(map(sum, timed)) / steps,
        "operations": contenders.useful_operations(shape, contenders.config_of(shape, rig), timed) / steps,
    }


def _table(shape: Shape, ledger: Ledger) -> str:
    rate = ledger.items.get("peak", {}).get("rate")
    runs: dict[str, list[Values]] = {}
    failed = {}
    for item in ledger.items.values():
        if item.get("shape") == shape.name:
            runs.setdefault(item["name"], []).append(item)
        elif item["key"].startswith(shape.name + "/") and "error" in item:
            failed[item["key"].split("/")[-2]] = item["error"][:150]
    if not runs:
        return ""
    step = {name: median(item["step"] for item in each) for name, each in runs.items()}
    rows = []
    for name, each in runs.items():
        first, spread = each[0], max(item["step"] for item in each) / min(item["step"] for item in each) - 1
        rows.append(
            [
                name,
                step[name],
                *(step[other] / step[name] if other in step else None for other in (TRL_SIMPO, FLOOR)),
                first["completion_tokens"] / step[name],
                first["operations"] / step[name] / rate if rate else None,
                max(item["gigabytes"] for item in each),
                {True: "yes", False: "no", None: None}[first["shares"]],
                f"{len(each)}, {spread:.0%}",
            ]
        )
    head = [
        "contender",
        "s/step",
        "TRL ÷ this",
        "floor ÷ this",
        "completion tokens/s",
        "MFU",
        "peak GB",
        "shares prompts",
    ]
    lines = f"## {shape.name}\n\n" + table([*head, "rounds, spread"], rows)
    return lines + "".join(f"\n* {name} raised {error}" for name, error in failed.items()) + ("\n" if failed else "")


class Profiler(TrainerCallback):
    """Records the steps after a warm-up by torch's profiler."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=activities)

    def __enter__(self) -> None:
        """For a loop outside a trainer: all of it."""
        self.profile.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            torch.cuda.synchronize()
            self.profile.__enter__()
        elif state.global_step == self.last:
            torch.cuda.synchronize()
            self.profile.__exit__(None, None, None)


def _profiled(name: str, shape: Shape, rig: Rig) -> Values:
    """Where the time of three steps goes."""
    profiler = Profiler(5, 8)
    contenders.run(name, shape, rig, 5, 3, profiler=profiler)
    steps = 8 if name == FLOOR else 3
    events = profiler.profile.key_averages()
    kernels = sorted(events, key=lambda event: -event.self_device_time_total)
    device = [e for e in kernels if e.self_device_time_total and str(e.device_type).endswith("CUDA")]
    busy = sum(event.self_device_time_total for event in device) / 1e3 / steps
    return {
        "profile": name,
        "of": shape.name,
        "busy_ms": busy,
        "launches": sum(event.count for event in device) / steps,
        "kernels": [
            [event.key[:90], event.self_device_time_total / 1e3 / steps, event.count / steps] for event in device[:15]
        ],
        "host": [
            [event.key[:60], event.self_cpu_time_total / 1e3 / steps, event.count / steps]
            for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]
        ],
    }


def _profiles(ledger: Ledger) -> str:
    lines = []
    for item in ledger.items.values():
        if "kernels" in item:
            rows = [[f"`{name}`", ms, n] for name, ms, n in item["kernels"][:8]]
            rows += [[f"host: `{name}`", ms, n] for name, ms, n in item["host"][:4]]
            said = f"{item['busy_ms']:.1f} ms of kernels a step, {item['launches']:.0f} launches"
            lines += [
                f"### {item['of']}: {item['profile']}\n\n{said}\n",
                table(["where", "ms/step", "calls/step"], rows),
            ]
    return "## Where the time goes\n\n" + "\n".join(lines) if lines else ""
