"""Draws the documentation's pictures again, each for light and dark pages, from numbers that are committed.

    python benchmarks/pictures.py              # docs/study-*.svg, docs/performance-*.svg, docs/readme-*.svg

The study's are in `benchmarks/study-small.jsonl`, the seconds in the tables of `docs/performance.md`; the README's
curves are the package's own functions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bench
import numpy as np
import study
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_margins.report import style

ROOT = Path(__file__).parents[1]

# title of a panel → (how the head of its table begins, the rows that are shown)
SECONDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Training on a CPU: a step of 4 pairs": (
        "| 4 pairs per step, no checkpointing |",
        ("TRL CPOTrainer(simpo)", "MarginCPOTrainer(simpo)", "TRL DPOTrainer", "γ-DPO", "GAPO"),
    ),
    "The same with prompts of 500 tokens": (
        "| 4 pairs per step, prompts ~500 tokens",
        ("TRL CPOTrainer(simpo)", "MarginCPOTrainer(simpo)"),
    ),
    "Training on an H100: a step of 32 pairs": (
        "| | s per step | TRL ÷ this | floor ÷ this |",
        ("TRL CPOTrainer(simpo)", "ours, SimPO", "TRL DPOTrainer", "γ-DPO", "GAPO"),
    ),
    "Tokenization of 4,000 pairs": (
        "| tokenization of 4,000 real pairs",
        ("TRL CPOTrainer", "MarginCPOTrainer", "TRL DPOTrainer", "MarginDPOTrainer"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    out = parser.parse_args().out
    lines = (ROOT / "benchmarks" / "study-small.jsonl").read_text().splitlines()
    runs = [run for run in map(json.loads, lines) if "seed" in run and "error" not in run]
    study.plot(runs, study.SIZES["small"], out / "study")
    bench.plot(seconds((ROOT / "docs" / "performance.md").read_text(encoding="utf-8")), out / "performance")
    style.write_both(five_methods(), out / "readme")


def seconds(page: str) -> dict[str, dict[str, dict[str, float]]]:
    """Panel → row → its seconds, from the page's tables."""
    lines, found = page.splitlines(), {}
    for title, (head, names) in SECONDS.items():
        start = next(i for i, line in enumerate(lines) if line.startswith(head))
        rows = {}
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            name, value, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name] = {"seconds": float(value)}
        found[title] = {name: rows[name] for name in names}
    return found


@style.styled
def five_methods() -> Figure:
    """What each method makes of a pair: its weight or its target margin, by what it looks at."""
    import torch

    from trl_margins.terms.adaptive import adaptive_margin
    from trl_margins.terms.anchor import anchor_weight
    from trl_margins.terms.dynamic_target import dynamic_target_margin
    from trl_margins.terms.evaluation_factor import evaluation_factor_margin
    from trl_margins.terms.score_gap import score_gap_weight

    gap, similarity = torch.linspace(0, 4, 81), torch.linspace(0.05, 1, 96)
    rewards, tokens, fall = torch.linspace(-4, 12, 256), torch.linspace(-0.4, 1.0, 141), torch.linspace(0, 2, 81)
    simpo, target, margin = "as SimPO: 1", "as SimPO: γ", "target margin ÷ γ"
    curves: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        "gappo": (gap, score_gap_weight(gap, torch.zeros_like(gap))),
        "gap-aware": (similarity, evaluation_factor_margin(similarity, 1.0)),
        "gamma-po": (rewards, dynamic_target_margin(rewards, 4.0, 10.0) / 4.0),
        "geometric-anchor": (fall, anchor_weight(fall, 2.5, 0.25) / 2.5),
        "amapo": (tokens, adaptive_margin(tokens, 2.0) / 2.0),
    }
    words_of = {
        "gappo": ("GapPO", "clear pairs count more", "gap of the two scores", "weight", simpo),
        "gap-aware": ("GaPO", "different texts, larger margin", "similarity of the two texts", margin, target),
        "gamma-po": ("γ-PO", "told apart well, larger margin", "reward gap m", margin, target),
        "geometric-anchor": (
            "GAPO",
            "brittle pairs count less",
            "fall of the gap nearby, Γ",
            "weight of gradient",
            None,
        ),
        "amapo": ("AMaPO", "a margin below the mean only", "gap per token, Δ", "target margin ÷ β", None),
    }
    figure, (*axes, words) = style.panels(len(curves) + 1, height=2.7, columns=3)
    for panel, (method, (x, y)) in zip(axes, curves.items(), strict=True):
        name, says, xlabel, ylabel, plain = words_of[method]
        _curve(panel, x.numpy(), y.numpy(), style.METHOD_COLORS[method])
        if plain:
            panel.axhline(1, color=style.GREY, linewidth=1.2, linestyle="--")
            at, side = (0.02, "left") if method == "gamma-po" else (0.98, "right")
            panel.text(at, 1, plain, transform=panel.get_yaxis_transform(), color=style.GREY, ha=side, va="bottom")
        panel.set_title(f"{name}\n", fontsize=13)
        panel.text(0, 1.04, says, transform=panel.transAxes, fontsize=9.5)
        panel.set(xlabel=xlabel, ylabel=ylabel)
        panel.locator_params(nbins=5)
    words.set_axis_off()
    words.text(0, 0.86, "One loss, five answers", transform=words.transAxes, fontsize=13, weight="bold")
    words.text(0, 0.7, "loss = weight × −log σ(m − margin)", transform=words.transAxes, fontsize=10.5)
    about = (
        "m is how much more the model\nrewards the chosen answer than\nthe rejected one. SimPO gives all\npairs "
        "one weight and one margin;\nthese methods give each its own."
    )
    words.text(0, 0.0, about, transform=words.transAxes, linespacing=1.5)
    return figure


def _curve(panel: Axes, x: Any, y: Any, color: str) -> None:
    panel.plot(x, y, color=color, linewidth=2.6)
    panel.fill_between(x, np.zeros_like(y), y, color=color, alpha=0.12, linewidth=0)
    panel.set_ylim(0, 1.12 * max(float(y.max()), 1.0))
    panel.set_xlim(x.min(), x.max())


if __name__ == "__main__":
    main()
