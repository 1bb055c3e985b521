"""Evaluation reports as Markdown tables, which are readable in a terminal, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .rm_bench import LEVELS, STYLES

PAIR_ROWS = {
    "pwa": "pairwise accuracy, score gap ≥ {gap:g}",
    "pwa_all": "pairwise accuracy, all pairs",
    "spearman": "Spearman ρ, all completions",
    "reward_gap": "mean reward gap ({unit})",
    "chosen_longer": "chosen completion is longer",
    "prefers_longer": "model prefers the longer one",
    "n_pairs_gap": "pairs with score gap ≥ {gap:g}",
    "n_pairs": "pairs",
}
LISTWISE_ROWS = {
    "spearman": "Spearman ρ per prompt",
    "kendall": "Kendall τ-b per prompt",
    "ndcg@1": "NDCG@1",
    "ndcg@3": "NDCG@3",
    "ndcg@k": "NDCG, all completions",
    "regret": "best-of-n regret (score)",
    "regret_random": "regret of a random pick",
    "n_prompts": "prompts",
    "n_completions": "completions",
}


def pair_table(reports: Mapping[str, Mapping[str, Any]], min_score_gap: float, unit: str) -> str:
    """Sets of pairs side by side; a metric that none of them has is left out."""
    labels = {name: label.format(gap=min_score_gap, unit=unit) for name, label in PAIR_ROWS.items()}
    return _side_by_side(reports, labels)


def listwise_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Sets of lists side by side."""
    return _side_by_side(reports, LISTWISE_ROWS)


def bins_table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Pairwise accuracy by bin."""
    cells = [[row["bin"], str(row["n"]), _cell(row["accuracy"], row["interval"])] for row in rows]
    return markdown_table([title, "pairs", "pairwise accuracy"], cells)


def rm_bench_table(report: Mapping[str, Any]) -> str:
    """The levels of each domain and their means, then each domain's style matrix."""
    parts = {**report["domains"], "all (mean)": {"n_prompts": report["n_prompts"], **report["total"]}}
    parts["all (mean)"]["intervals"] = report["intervals"]
    levels = markdown_table(
        ["RM-Bench", "prompts", *LEVELS],
        [
            [name, str(part["n_prompts"]), *(_cell(part[level], part["intervals"][level]) for level in LEVELS)]
            for name, part in parts.items()
        ],
    )
    matrices = [
        markdown_table(
            [f"{name}: chosen \\ rejected", *STYLES],
            [[style, *(f"{cell:.4f}" for cell in row)] for style, row in zip(STYLES, domain["matrix"], strict=True)],
        )
        for name, domain in report["domains"].items()
    ]
    return "\n\n".join([levels, *matrices])


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is left-aligned, the others right-aligned."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([lines[0], f"{rule}|", *lines[1:]])


def _side_by_side(reports: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    return markdown_table(
        ["", *reports],
        [
            [label, *(_cell(report.get(name), report.get("intervals", {}).get(name)) for report in reports.values())]
            for name, label in labels.items()
            if any(name in report for report in reports.values())
        ],
    )


def _cell(value: float | int | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if interval is None else f"{value:.4f} ({interval[0]:.3f}–{interval[1]:.3f})"
