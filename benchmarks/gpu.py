"""What only an accelerator can show, in pieces that fit a borrowed one.

    python benchmarks/gpu.py --part correctness --budget 480 --out gpu
    python benchmarks/gpu.py --part speed --data FOLDER --out gpu     # with train.jsonl.gz, real pairs
    python benchmarks/gpu.py --part study --device cpu --size tiny    # the rehearsal

Each part writes OUT/PART.jsonl, a line an item as soon as it is done, and OUT/PART.md, its tables. It starts nothing
that would not end within the budget; called again with the same folder it goes on. It needs no network; the package
may be installed, or lie in the current folder. benchmarks/gpu_wheels.sh collects what such a machine lacks.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

PARTS = ("correctness", "speed", "memory", "study")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, required=True)
    parser.add_argument("--budget", type=float, default=480, help="seconds, for all parts together")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["real", "tiny"], default="real")
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct", help="folder, or a bundled model")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl.gz and the evaluation files")
    parser.add_argument("--retry", action="store_true", help="do the items again that raised, or were not right")
    parser.add_argument("--only", nargs="+", help="the items whose names contain one of these")
    args, rest = parser.parse_known_args()
    if rest and "study" not in args.part:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    began = time.perf_counter()

    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
    sys.path.insert(0, os.getcwd())
    from on_gpu import subjects
    from on_gpu.ledger import Ledger

    subjects.be_quiet()
    rig = subjects.Rig(args.device, args.size == "tiny", args.model, args.data)
    for name in args.part:
        part = importlib.import_module(f"on_gpu.{name}")
        ledger = Ledger(args.out / f"{name}.jsonl", args.budget - (time.perf_counter() - began), args.retry, args.only)
        tables = part.run(rig, ledger, part.options(rest)) if hasattr(part, "options") else part.run(rig, ledger)
        text = f"# {name}\n\n{subjects.machine(rig)}\n\n{tables}"
        (args.out / f"{name}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
