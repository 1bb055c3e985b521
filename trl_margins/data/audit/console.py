"""An audit as text for a console."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from itertools import pairwise

from ...tables import aligned
from . import Audit, Distribution, SplitAudit
from .counting import Factors, PairLengths

BAR = 40  # characters of the longest bar
WIDTH = 110  # characters of a line of prose


def report(found: Audit) -> str:
    """The whole audit, the warnings last."""
    blocks = [block for name, split in found.splits.items() for block in _split_blocks(name, split)]
    if found.shared_prompts:
        blocks.append(["Prompts in two splits"])
        for both in found.shared_prompts:
            rows = " and ".join(f"{n} rows of {split}" for split, n in zip(both.splits, both.n_rows, strict=True))
            blocks[-1].append(f"  {both.n_prompts} prompts, in {rows}")
    warnings = [_filled("  * ", warning) for warning in found.warnings]
    blocks.append(["Warnings", *warnings] if warnings else ["No warnings"])
    text = "\n\n".join("\n".join(block) for block in blocks)
    # names come from the data, and a console obeys escape sequences
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
    verdicts: dict[str, list[str]] = {}
    for method, why in split.methods.items():
        verdicts.setdefault(f"no ({why})" if why else "yes", []).append(method)
    yield ["Usable methods", *(_filled(f"  {v}: ", ", ".join(m)) for v, m in verdicts.items())]


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
    yield from (f"  {bad.column}: {bad}" for bad in scores.bad)
    gap = scores.gap
    if gap is None:
        return
    yield f"  mean {gap.mean:.4g}, {_quartiles(gap)}, from {gap.minimum:.4g} to {gap.maximum:.4g}"
    counts = {
        "ties": scores.n_ties,
        "reversed (rejected scores higher)": scores.n_reversed,
        f"gap ≥ {scores.min_score_gap:g}": scores.n_at_least,
    }
    yield f"  {_shares(counts, gap.n)}"
    yield from _bars(gap)


def _length_lines(split: SplitAudit, lengths: PairLengths) -> Iterator[str]:
    rows = [(f"Lengths in {lengths.unit}", "mean", "median", "95 %", "max")]
    for name in ("prompt", "chosen", "rejected"):
        d: Distribution = getattr(lengths, name)
        implied = " (implicit)" if name == "prompt" and split.implicit else ""
        cells = (f"{cell:.0f}" for cell in (d.mean, d.median, d.percentile_95, d.maximum))
        rows.append((f"  {name}{implied}", *cells))
    yield from aligned(rows, right=(False, True, True, True, True))
    n, truncation = d.n, split.truncation
    counts = {"longer": lengths.n_chosen_longer, "shorter": lengths.n_chosen_shorter, "equal": lengths.n_equal}
    yield f"  chosen is {_shares(counts, n)}"
    if truncation is not None:
        cut = {"chosen": truncation.n_chosen, "rejected": truncation.n_rejected, "either": truncation.n_pairs}
        filled = _share(truncation.n_left_empty, n)
        yield f"  max_length={truncation.max_length} cuts {_shares(cut, n)}; the prompt alone fills it in {filled}"


def _row_lines(split: SplitAudit) -> Iterator[str]:
    yield "Rows"
    found = {
        "cannot be read": split.unreadable,
        "cannot be tokenized": split.untokenizable,
        "empty prompt": split.empty_prompts,
        "empty chosen": split.empty_chosen,
        "empty rejected": split.empty_rejected,
    }
    for problem, rows in found.items():
        if rows is not None:
            example = f": {rows.example}" if rows.example else ""
            yield f"  {problem} {_share(rows.n, split.n_rows)}; the first is row {rows.first_row}{example}"
    duplicates = split.duplicates
    assert duplicates is not None
    counts = {
        "repeat another row": duplicates.n_identical,
        "same pair, swapped": duplicates.n_contradicting,
        "chosen = rejected": duplicates.n_same_completion,
    }
    yield f"  {_shares(counts, split.n_read)}"
    yield (
        f"  {duplicates.n_prompts} distinct prompts, {duplicates.n_repeated_prompts} of them in several rows, the "
        f"most frequent in {duplicates.most_frequent_prompt}"
    )


def _factor_lines(factors: Factors) -> Iterator[str]:
    values = factors.values
    n = values.n if values else 0
    yield "Evaluation factor, " + (f"column {factors.column}" if factors.column else f"{factors.metric} of {n} pairs")
    if factors.problem:
        yield f"  {n} pairs, without the bad values (see the warnings)"
    if values is not None:
        yield f"  {_quartiles(values)}, {_shares({'EF = 0': factors.n_zero, 'EF = 1': factors.n_one}, n)}"
        yield from _bars(values)


def _bars(values: Distribution) -> list[str]:
    edges, counts = values.histogram.edges, values.histogram.counts
    labels = [f"{low:g} – {high:g}" for low, high in pairwise(edges)]
    below, above = values.reaches_beyond
    if below:
        labels[0] = f"< {edges[1]:g}"
    if above:
        labels[-1] = f"≥ {edges[-2]:g}"
    bars = ["█" * round(BAR * count / max(counts)) or ("▏" if count else "") for count in counts]
    filled = [i for i, count in enumerate(counts) if count]
    rows = [(labels[i], f"{bars[i]:<{BAR}}", _share(counts[i], values.n)) for i in range(filled[0], filled[-1] + 1)]
    return [f"  {line}" for line in aligned(rows, right=(True, False, False))]


def _quartiles(values: Distribution) -> str:
    return f"quartiles {values.lower_quartile:.4g}, {values.median:.4g}, {values.upper_quartile:.4g}"


def _shares(counts: Mapping[str, int], whole: int) -> str:
    return ", ".join(f"{what} {_share(n, whole)}" for what, n in counts.items())


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole and part else str(part)
