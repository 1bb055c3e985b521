"""Evaluation reports as Markdown tables, which are readable in a terminal, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..tables import markdown_table
from .rm_bench import LEVELS, STYLES

MEANING = (
    "PWA is the share of held-out pairs whose chosen completion has the higher mean log-probability per token; a tie "
    "counts as wrong. Spearman's ρ compares these means and the annotation scores of all completions in one pool. "
    "Both are the same for every method, whatever reward it trains."
)
RANKING = ("pwa", "pwa_all", "spearman", "n_pairs_gap", "n_pairs")  # by the names in `ranking_metrics`
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
DRIFT_ROWS = {"kl_drift": "KL drift (nats per token)"}
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


def report_tables(
    reports: Mapping[str, Mapping[str, Any]], min_score_gap: float, reward: str, bins: bool = True
) -> str:
    """All tables of `trl-margins evaluate`, those of one kind together.

    Args:
        reports: set → numbers, with their `kind`.
        min_score_gap: of the pairs behind `pwa`.
        reward: its name.
        bins: also the pairwise accuracy by score gap and by length.
    """
    kinds = {
        kind: {k: v for k, v in reports.items() if v["kind"] == kind} for kind in ("pairs", "listwise", "rm-bench")
    }
    unit = "nats per token" if reward == "length-normalized" else "nats"
    parts = [pair_table(kinds["pairs"], min_score_gap, unit)] if kinds["pairs"] else []
    for name, report in kinds["pairs"].items() if bins else ():
        titles = {"by_score_gap": f"{name}, by score gap", "by_length": f"{name}, by length"}
        parts += [_bins_table(report[key], title) for key, title in titles.items() if report[key]]
    parts += [_side_by_side(kinds["listwise"], LISTWISE_ROWS)] if kinds["listwise"] else []
    parts += map(_rm_bench_tables, kinds["rm-bench"].values())
    if any("kl_drift" in report for report in reports.values()):
        parts.append(_side_by_side(reports, DRIFT_ROWS))
    return "\n\n".join([*parts, "In brackets: 95 % intervals, by bootstrap over prompts."])


def pair_table(reports: Mapping[str, Mapping[str, Any]], min_score_gap: float, unit: str) -> str:
    """Sets of pairs side by side; a metric that none of them has is left out."""
    labels = {name: label.format(gap=min_score_gap, unit=unit) for name, label in PAIR_ROWS.items()}
    return _side_by_side(reports, labels)


def _bins_table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Pairwise accuracy by bin."""
    cells = [[row["bin"], str(row["n"]), _cell(row["accuracy"], row["interval"])] for row in rows]
    return markdown_table([title, "pairs", "pairwise accuracy"], cells)


def _rm_bench_tables(report: Mapping[str, Any]) -> str:
    """The levels of every domain and of all, then the style matrix of each domain."""
    total = {"n_prompts": report["n_prompts"], **report["total"], "intervals": report["intervals"]}
    parts = {**report["domains"], "all (mean)": total}
    rows = [
        [name, str(part["n_prompts"]), *(_cell(part[level], part["intervals"][level]) for level in LEVELS)]
        for name, part in parts.items()
    ]
    tables = [markdown_table(["RM-Bench", "prompts", *LEVELS], rows)]
    for name, domain in report["domains"].items():
        rows = [[style, *map(_cell, row)] for style, row in zip(STYLES, domain["matrix"], strict=True)]
        tables.append(markdown_table([f"{name}: chosen \\ rejected", *STYLES], rows))
    return "\n\n".join(tables)


def _side_by_side(reports: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    rows = [
        [label, *(_cell(report.get(name), report.get("intervals", {}).get(name)) for report in reports.values())]
        for name, label in labels.items()
        if any(name in report for report in reports.values())
    ]
    return markdown_table(["", *reports], rows)


def _cell(value: float | int | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if interval is None else f"{value:.4f} ({interval[0]:.3f}–{interval[1]:.3f})"
