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
INTERVALS = "In brackets: 95 % intervals, by bootstrap over prompts."
ACCURACIES = ("pwa_all", "best_worst")  # of pairs, and of lists
RANKING = ("pwa", "pwa_all", "spearman", "n_pairs_gap", "n_pairs")  # by the names in `ranking_metrics`
PAIR_ROWS = {
    "pwa": "pairwise accuracy, score gap ≥ {gap:g}",
    "pwa_all": "pairwise accuracy, all pairs",
    "spearman": "Spearman ρ, all completions",
    "reward_gap": "mean reward gap ({unit})",
    "chosen_longer": "chosen completion is longer",
    "prefers_longer": "model prefers the longer one",
    "reward_bench": "RewardBench, mean of the sections",
    "reward_bench_chat": "RewardBench, Chat",
    "reward_bench_chat_hard": "RewardBench, Chat Hard",
    "reward_bench_safety": "RewardBench, Safety",
    "reward_bench_reasoning": "RewardBench, Reasoning",
    "n_pairs_gap": "pairs with score gap ≥ {gap:g}",
    "n_pairs": "pairs",
}
CASE_ROWS = {
    "case_1": "1, ideal: right, r ≥ γ",
    "case_2": "2, overfitting: right, r < γ",
    "case_3": "3, underfitting: wrong, r ≥ γ",
    "case_4": "4, ideal: wrong, r < γ",
}
DRIFT_ROWS = {"kl_drift": "KL drift (nats per token)"}
LISTWISE_ROWS = {
    "best_worst": "best against worst, accuracy",
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
        titles = {f"by_{by.replace(' ', '_')}": f"{name}, by {by}" for by in ("score gap", "length", "subset")}
        parts += [_bins_table(report[key], title) for key, title in titles.items() if report.get(key)]
    parts += [_side_by_side(kinds["listwise"], LISTWISE_ROWS)] if kinds["listwise"] else []
    parts += [_rm_bench_tables(report, name) for name, report in kinds["rm-bench"].items()]
    with_cases = {name: report for name, report in reports.items() if "case_1" in report}
    parts += [_side_by_side(with_cases, CASE_ROWS, "AMaPO's cases: ranked right or wrong")] if with_cases else []
    if any("kl_drift" in report for report in reports.values()):
        parts.append(_side_by_side(reports, DRIFT_ROWS))
    return "\n\n".join([*parts, INTERVALS])


def model_tables(
    models: Mapping[str, Mapping[str, Mapping[str, Any]]], min_score_gap: float, reward: str, bins: bool = True
) -> str:
    """The same of several models: the ranking accuracy of all on all sets, as in AMaPO's Table 4, then the tables of
    each set, with the models side by side.

    Args:
        models: model → set → numbers. Every model has the same sets.
        min_score_gap, reward, bins: as in `report_tables`.
    """
    sets: dict[str, dict[str, Mapping[str, Any]]] = {}
    for model, reports in models.items():
        for name, report in reports.items():
            sets.setdefault(name, {})[model] = report
    ranked = [name for name, of in sets.items() if any(key in ACCURACIES for key in next(iter(of.values())))]
    rows = [[model, *(_accuracy(reports[name]) for name in ranked)] for model, reports in models.items()]
    parts = [markdown_table(["ranking accuracy", *ranked], rows)] if len(ranked) > 1 else []
    for name, of in sets.items():
        tables = report_tables(of, min_score_gap, reward, bins)
        parts.append(f"**{name}**\n\n{tables.removesuffix(INTERVALS).rstrip()}")
    return "\n\n".join([*parts, INTERVALS])


def _accuracy(report: Mapping[str, Any]) -> str:
    name = next(name for name in ACCURACIES if name in report)
    return _cell(report[name], report["intervals"].get(name))


def pair_table(reports: Mapping[str, Mapping[str, Any]], min_score_gap: float, unit: str) -> str:
    """Sets of pairs side by side; a metric that none of them has is left out."""
    labels = {name: label.format(gap=min_score_gap, unit=unit) for name, label in PAIR_ROWS.items()}
    return _side_by_side(reports, labels)


def _bins_table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Pairwise accuracy by bin."""
    cells = [[row["bin"], str(row["n"]), _cell(row["accuracy"], row["interval"])] for row in rows]
    return markdown_table([title, "pairs", "pairwise accuracy"], cells)


def _rm_bench_tables(report: Mapping[str, Any], name: str) -> str:
    """The levels of every domain and of all, then the style matrix of each domain."""
    total = {"n_prompts": report["n_prompts"], **report["total"], "intervals": report["intervals"]}
    parts = {**report["domains"], "all (mean)": total}
    rows = [
        [domain, str(part["n_prompts"]), *(_cell(part[level], part["intervals"][level]) for level in LEVELS)]
        for domain, part in parts.items()
    ]
    tables = [markdown_table([name, "prompts", *LEVELS], rows)]
    for domain, part in report["domains"].items():
        rows = [[style, *map(_cell, row)] for style, row in zip(STYLES, part["matrix"], strict=True)]
        tables.append(markdown_table([f"{name}, {domain}: chosen \\ rejected", *STYLES], rows))
    return "\n\n".join(tables)


def _side_by_side(reports: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], title: str = "") -> str:
    rows = [
        [label, *(_cell(report.get(name), report.get("intervals", {}).get(name)) for report in reports.values())]
        for name, label in labels.items()
        if any(name in report for report in reports.values())
    ]
    return markdown_table([title, *reports], rows)


def _cell(value: float | int | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if interval is None else f"{value:.4f} ({interval[0]:.3f}–{interval[1]:.3f})"
