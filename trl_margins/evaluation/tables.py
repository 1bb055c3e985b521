"""Evaluation reports as Markdown tables, which are readable in a terminal, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..tables import markdown_table
from .rm_bench import LEVELS, STYLES

MEANING = (
    "PWA is the share of pairs whose chosen completion has the higher mean log-probability per token; a tie "
    "counts as wrong. Spearman's ρ compares these means and the annotation scores of all completions in one pool. "
    "Both are the same for every method, whatever reward it trains."
)
INTERVALS = "In brackets: 95 % intervals, by bootstrap over prompts."
ABOUT_CASES = (
    "AMaPO's cases: r is the gap of the policy's own log-probabilities, summed or per token as in the method's "
    "reward, and γ is what the method compares it with. The other accuracies are of the reward {reward}, so that they "
    "can differ from the share of pairs ranked right by r. RM-Bench has no pairs, and no cases."
)
ACCURACIES = {"pairs": "pwa_all", "listwise": "best_worst", "rm-bench": "average"}  # by `kind`
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
    "n_equal_rewards": "pairs with equal rewards, counted as wrong",
    "n_equal_scores": "pairs with equal scores",
}
TARGET_ROWS = {"case_method": "method", "case_reward": "r", "case_margin": "γ"}
CASE_ROWS = {
    "case_1": "1, ideal: right, r ≥ γ",
    "case_2": "2, overfitting: right, r < γ",
    "case_3": "3, underfitting: wrong, r ≥ γ",
    "case_4": "4, ideal: wrong, r < γ",
}
_NARROW = 0.01  # an interval
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
    reports: Mapping[str, Mapping[str, Any]],
    min_score_gap: float,
    reward: str,
    bins: bool = True,
    targets: Mapping[str, Mapping[str, str]] | None = None,
    notes: bool = True,
) -> str:
    """All tables of `trl-margins evaluate`, those of one kind together.

    Args:
        reports: set → numbers, with their `kind`.
        min_score_gap: of the pairs behind `pwa`.
        reward: its name.
        bins: also the pairwise accuracy by score gap and by length.
        targets: set → what its cases are of, by the names in `TARGET_ROWS`.
        notes: also what the tables do not say themselves.
    """
    kinds = {
        kind: {k: v for k, v in reports.items() if v["kind"] == kind} for kind in ("pairs", "listwise", "rm-bench")
    }
    unit = "nats per token" if reward == "length-normalized" else "nats"
    parts = [pair_table(kinds["pairs"], min_score_gap, unit)] if kinds["pairs"] else []
    for by in ("score gap", "length", "subset") if bins else ():
        rows = {name: report.get(f"by_{by.replace(' ', '_')}") for name, report in kinds["pairs"].items()}
        parts += _bins_tables({name: found for name, found in rows.items() if found}, by)
    parts += [_side_by_side(kinds["listwise"], LISTWISE_ROWS)] if kinds["listwise"] else []
    parts += [_rm_bench_tables(report, name) for name, report in kinds["rm-bench"].items()]
    with_cases = {name: {**(targets or {}).get(name, {}), **of} for name, of in reports.items() if "case_1" in of}
    if with_cases:
        parts.append(_side_by_side(with_cases, TARGET_ROWS | CASE_ROWS, "AMaPO's cases: ranked right or wrong"))
    if any("kl_drift" in report for report in reports.values()):
        parts.append(_side_by_side(reports, DRIFT_ROWS))
    return "\n\n".join([*parts, *(_notes([reports], reward) if notes else [])])


def _notes(reports: Iterable[Mapping[str, Mapping[str, Any]]], reward: str) -> list[str]:
    has_cases = any("case_1" in report for of in reports for report in of.values())
    return [*([ABOUT_CASES.format(reward=reward)] if has_cases else []), INTERVALS]


def model_tables(
    models: Mapping[str, Mapping[str, Mapping[str, Any]]],
    min_score_gap: float,
    reward: str,
    targets: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """The same of several models: the ranking accuracy of all on all sets, as in AMaPO's Table 4, then the tables of
    each set, with the models side by side.

    Args:
        models: model → set → numbers. Every model has the same sets.
        min_score_gap, reward: as in `report_tables`.
        targets: the same of each model.
    """
    sets: dict[str, dict[str, Mapping[str, Any]]] = {}
    for model, reports in models.items():
        for name, report in reports.items():
            sets.setdefault(name, {})[model] = report
    rows = [[model, *map(_accuracy, reports.values())] for model, reports in models.items()]
    parts = [markdown_table(["ranking accuracy", *sets], rows)] if len(sets) > 1 else []
    for name, of in sets.items():
        parts += [f"**{name}**", report_tables(of, min_score_gap, reward, targets=targets, notes=False)]
    return "\n\n".join([*parts, *_notes(sets.values(), reward)])


def _accuracy(report: Mapping[str, Any]) -> str:
    name = ACCURACIES[report["kind"]]
    return _cell(report.get("total", report)[name], report["intervals"].get(name))


def pair_table(reports: Mapping[str, Mapping[str, Any]], min_score_gap: float, unit: str) -> str:
    """Sets of pairs side by side; a metric that none of them has is left out."""
    labels = {name: label.format(gap=min_score_gap, unit=unit) for name, label in PAIR_ROWS.items()}
    return _side_by_side(reports, labels)


def _bins_tables(reports: Mapping[str, Sequence[Mapping[str, Any]]], by: str) -> list[str]:
    """Pairwise accuracy by bin: in one table where all have the same pairs, as several models do."""
    groups: dict[tuple[Any, ...], dict[str, Sequence[Mapping[str, Any]]]] = {}
    for name, rows in reports.items():
        groups.setdefault(tuple((row["bin"], row["n"]) for row in rows), {})[name] = rows
    tables = []
    for bins, of in groups.items():
        heads = ["pairwise accuracy"] if len(of) == 1 else list(of)
        title = f"{next(iter(of))}, by {by}" if len(of) == 1 else f"pairwise accuracy by {by}"
        columns = [[_cell(row["accuracy"], row["interval"]) for row in rows] for rows in of.values()]
        cells = [
            [str(each) for each in (*row, *values)]
            for row, values in zip(bins, zip(*columns, strict=True), strict=True)
        ]
        tables.append(markdown_table([title, "pairs", *heads], cells))
    return tables


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


def _cell(value: float | int | str | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int | str):
        return str(value)
    if interval is None:
        return f"{value:.4f}"
    low, high = interval
    digits = 3 if high - low >= _NARROW else 4  # else the number may lie outside what is printed
    return f"{value:.4f} ({low:.{digits}f}–{high:.{digits}f})"
