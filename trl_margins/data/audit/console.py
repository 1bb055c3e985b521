"""An audit as text for a console."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import pairwise

from .distributions import Distribution
from .factors import Factors
from .lengths import AnswerLengths
from .overall import Audit
from .split import SplitAudit

BAR = 40  # characters of the longest bar
WIDTH = 110  # of a line of prose


def report(found: Audit) -> str:
    """All of it, the warnings last."""
    blocks = []
    for name, split in found.splits.items():
        blocks += ["\n".join(block) for block in _split_blocks(name, split)]
    if found.shared_prompts:
        lines = ["Prompts in two splits"]
        for both in found.shared_prompts:
            rows = " and ".join(f"{n} rows of {split}" for split, n in zip(both.splits, both.n_rows, strict=True))
            lines.append(f"  {both.n_prompts} prompts, in {rows}")
        blocks.append("\n".join(lines))
    lines = [_filled("  * ", warning) for warning in found.warnings]
    blocks.append("\n".join(["Warnings", *lines] if lines else ["No warnings"]))
    text = "\n\n".join(blocks)
    # names are the data's own, and a console obeys escape sequences
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _split_blocks(name: str, split: SplitAudit) -> Iterator[list[str]]:
    title = f"{name}: {split.n_rows} rows"
    yield [title, "─" * len(title), _filled("columns: ", ", ".join(split.columns))]
    if split.n_rows and split.lengths is not None:
        yield list(_score_lines(split))
        if split.lengths.chosen is not None:
            yield list(_length_lines(split, split.lengths))
        yield list(_row_lines(split))
        if split.factors is not None and (split.factors.values is not None or split.factors.problem):
            yield list(_factor_lines(split.factors))
    answers: dict[str, list[str]] = {}
    for method, why in split.methods.items():
        answers.setdefault(f"no ({why})" if why else "yes", []).append(method)
    yield ["Methods that it can feed", *(_filled(f"  {a}: ", ", ".join(m)) for a, m in answers.items())]


def _filled(head: str, text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=head, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _score_lines(split: SplitAudit) -> Iterator[str]:
    scores = split.scores
    if scores is None:
        yield "Scores: no score columns"
        return
    yield f"Score gap, {' − '.join(scores.columns)}"
    yield from (f"  {bad.column}: {bad.kinds()}" for bad in scores.bad)
    gap = scores.gap
    if gap is None:
        return
    yield f"  mean {gap.mean:.4g}, {_quartiles(gap)}, from {gap.minimum:.4g} to {gap.maximum:.4g}"
    counts = {
        "ties": scores.n_ties,
        "reversed (rejected scores higher)": scores.n_reversed,
        f"gap ≥ {scores.min_score_gap:g}": scores.n_at_least,
    }
    yield "  " + ", ".join(f"{what} {_share(n, gap.n)}" for what, n in counts.items())
    yield from _bars(gap)


def _length_lines(split: SplitAudit, lengths: AnswerLengths) -> Iterator[str]:
    yield f"{'Lengths in ' + lengths.unit:<20}" + "".join(f"{head:>9}" for head in ("mean", "median", "95 %", "max"))
    for name in ("prompt", "chosen", "rejected"):
        d: Distribution = getattr(lengths, name)
        implied = " (implicit)" if name == "prompt" and split.implicit else ""
        cells = "".join(f"{cell:>9.0f}" for cell in (d.mean, d.median, d.percentile_95, d.maximum))
        yield f"  {name + implied:<18}{cells}"
    n, truncation = d.n, split.truncation
    counts = {"longer": lengths.n_chosen_longer, "shorter": lengths.n_chosen_shorter, "equal": lengths.n_equal}
    yield "  chosen is " + ", ".join(f"{what} {_share(count, n)}" for what, count in counts.items())
    if truncation is not None:
        counts = {"chosen": truncation.n_chosen, "rejected": truncation.n_rejected, "either": truncation.n_pairs}
        sides = ", ".join(f"{side} {_share(count, n)}" for side, count in counts.items())
        filled = _share(truncation.n_left_empty, n)
        yield f"  max_length={truncation.max_length} cuts {sides}; the prompt alone fills it in {filled}"


def _row_lines(split: SplitAudit) -> Iterator[str]:
    yield "Rows"
    found = {
        "cannot be read": split.unreadable,
        "cannot be tokenized": split.untokenizable,
        "empty prompt": split.empty_prompts,
        "empty chosen": split.empty_chosen,
        "empty rejected": split.empty_rejected,
    }
    for what, rows in found.items():
        if rows is not None:
            example = f": {rows.example}" if rows.example else ""
            yield f"  {what} {_share(rows.n, split.n_rows)}; the first is row {rows.first_row}{example}"
    duplicates = split.duplicates
    assert duplicates is not None
    counts = {
        "repeat another row": duplicates.n_identical,
        "same pair the other way round": duplicates.n_contradicting,
        "chosen = rejected": duplicates.n_same_answer,
    }
    yield "  " + ", ".join(f"{what} {_share(n, split.n_read)}" for what, n in counts.items())
    yield (
        f"  {duplicates.n_prompts} distinct prompts, {duplicates.n_repeated_prompts} of them in several rows, the "
        f"most frequent in {duplicates.most_frequent_prompt}"
    )


def _factor_lines(factors: Factors) -> Iterator[str]:
    values = factors.values
    n = values.n if values else 0
    yield "Evaluation factor, " + (f"column {factors.column}" if factors.column else f"{factors.metric} of {n} pairs")
    if factors.problem:
        yield f"  without the bad values (see the warnings), {n} pairs"
    if values is not None:
        yield f"  {_quartiles(values)}, EF = 0 {_share(factors.n_zero, n)}, EF = 1 {_share(factors.n_one, n)}"
        yield from _bars(values)


def _bars(values: Distribution) -> Iterator[str]:
    edges, counts = values.histogram.edges, values.histogram.counts
    labels = [f"{low:g} – {high:g}" for low, high in pairwise(edges)]
    below, above = values.reaches_beyond
    if below:
        labels[0] = f"< {edges[1]:g}"
    if above:
        labels[-1] = f"≥ {edges[-2]:g}"
    filled = [i for i, count in enumerate(counts) if count]
    shown = slice(filled[0], filled[-1] + 1)
    width = max(map(len, labels[shown]))
    for label, count in zip(labels[shown], counts[shown], strict=True):
        bar = "█" * round(BAR * count / max(counts)) or ("▏" if count else "")
        yield f"  {label:>{width}}  {bar:<{BAR}}  {_share(count, values.n)}"


def _quartiles(values: Distribution) -> str:
    return f"quartiles {values.lower_quartile:.4g}, {values.median:.4g}, {values.upper_quartile:.4g}"


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole and part else str(part)
