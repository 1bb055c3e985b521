"""The audit of a preference set: its numbers, what it takes for bad, what it warns of, and what the command writes."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import load, preference_rows, quiet
from datasets import Dataset, DatasetDict
from said import hear, word_for_word  # noqa: F401 - its messages are held against said/
from test_tokenization import merging_tokenizer

from trl_margins import MarginCPOConfig, MarginCPOTrainer
from trl_margins.cli import main
from trl_margins.cli.inspect import columns_of, compared_metrics, in_tokens_of
from trl_margins.data.audit import Audit, SplitAudit, audit, distribution, nice_edges
from trl_margins.data.audit.counting import shortened
from trl_margins.data.audit.warnings import find_warnings
from trl_margins.data.evaluation_factors import METRICS, compute
from trl_margins.methods import METHODS
from trl_margins.report.audit_text import audit_text
from trl_margins.rows import RowError
from trl_margins.rows.scores import ScoreError

NEEDS = {method.id: columns_of(method) for method in METHODS.values()}


def of(rows: Dataset | list[dict], **options) -> SplitAudit:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return audit({"train": dataset}, methods=NEEDS, **options).splits["train"]


def warnings_of(rows: Dataset | list[dict], **options) -> str:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return "\n".join(audit({"train": dataset}, **options).warnings)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def plain(n: int, **columns) -> list[dict]:
    """n pairs that deserve no warning."""
    rows = [{"prompt": f"say {i}", "chosen": f"good day {i}", "rejected": f"bad day {i}"} for i in range(n)]
    return [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]


def test_the_score_gaps():
    rows = preference_rows(60, scores=lambda i: ((i * 7 % 23) / 4, (i * 5 % 19) / 4))
    gaps = np.array(rows["score_chosen"][:]) - np.array(rows["score_rejected"][:])
    scores = of(rows, min_score_gap=1.5).scores
    assert scores.columns == ["score_chosen", "score_rejected"]
    assert not scores.bad
    assert (scores.gap.n, scores.gap.mean) == (60, pytest.approx(gaps.mean()))
    found = [scores.gap.lower_quartile, scores.gap.median, scores.gap.upper_quartile]
    assert found == pytest.approx(np.percentile(gaps, [25, 50, 75]))
    assert (scores.gap.minimum, scores.gap.maximum) == (gaps.min(), gaps.max())
    counts = (scores.n_ties, scores.n_reversed, scores.n_at_least)
    assert counts == (sum(gaps == 0), sum(gaps < 0), sum(abs(gaps) >= 1.5))
    assert min(counts) > 0


def test_exchanged_sides_turn_the_gaps_around():
    rows = preference_rows(30, scores=lambda i: (i % 7, i % 4))
    exchanged = rows.rename_columns(
        {
            "chosen": "rejected",
            "rejected": "chosen",
            "score_chosen": "score_rejected",
            "score_rejected": "score_chosen",
        }
    )
    one, other = of(rows), of(exchanged)
    assert other.scores.gap.mean == pytest.approx(-one.scores.gap.mean)
    assert other.scores.n_reversed == 30 - one.scores.n_ties - one.scores.n_reversed
    assert other.scores.n_ties == one.scores.n_ties
    assert other.lengths.chosen == one.lengths.rejected
    assert other.lengths.n_chosen_longer == one.lengths.n_chosen_shorter
    assert other.factors.values.mean == pytest.approx(one.factors.values.mean)


def test_bad_scores_are_counted_and_left_out():
    nan, inf = float("nan"), float("inf")
    rows = plain(7, score_chosen=[3.0, None, nan, inf, 5.0, -inf, 2.0], score_rejected=["low"] * 7)
    found = of(rows)
    chosen, rejected = found.scores.bad
    assert (chosen.column, chosen.first_row, chosen.first_value) == ("score_chosen", 1, "None")
    assert chosen.counts == {"None": 1, "NaN": 1, "infinite": 2}
    assert (rejected.column, rejected.first_row, rejected.first_value) == ("score_rejected", 0, "'low'")
    assert rejected.counts == {"not a number": 7}
    assert found.scores.gap is None
    assert found.methods["gappo"] == "column score_chosen holds bad scores"
    assert found.methods["gamma-po"] is None

    some = of(plain(4, score_chosen=[3, None, 5, 6], score_rejected=[1, 1, 1, None]))
    assert [(bad.counts, bad.first_row) for bad in some.scores.bad] == [({"None": 1}, 1), ({"None": 1}, 3)]
    assert (some.scores.gap.n, some.scores.gap.mean) == (2, 3.0)
    with pytest.raises(ScoreError, match=r"names \['a', 'b'\]"):
        of(plain(2), score_columns=["a", "b"])


def test_a_column_of_gaps():
    scores = of(plain(3, margin=[1.0, 0.0, -2.0])).scores
    assert scores.columns == ["margin"]
    assert (scores.n_ties, scores.n_reversed, scores.n_at_least, scores.gap.mean) == (1, 1, 1, pytest.approx(-1 / 3))


def test_lengths_in_words():
    rows = preference_rows(50)
    n_words = {side: np.array([len(text.split()) for text in rows[side]]) for side in ("prompt", "chosen", "rejected")}
    lengths = of(rows).lengths
    assert lengths.unit == "words"
    for side, n in n_words.items():
        found = getattr(lengths, side)
        numbers = (found.mean, found.median, found.percentile_95, found.maximum)
        assert numbers == pytest.approx((n.mean(), np.median(n), np.percentile(n, 95), n.max())), side
    longer = n_words["chosen"] - n_words["rejected"]
    assert lengths.n_chosen_longer == sum(longer > 0)
    assert lengths.n_chosen_shorter == sum(longer < 0)
    assert lengths.n_equal == sum(longer == 0)
    assert lengths.chosen.histogram.edges == lengths.rejected.histogram.edges


def test_the_form_of_the_rows_changes_nothing():
    """String and conversational, and in messages the implicit prompt, say the same."""
    explicit = preference_rows(40, "conversational")
    implicit = explicit.map(
        lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}, remove_columns="prompt"
    )
    texts = [row["prompt"][0]["content"] for row in explicit]
    with_text = implicit.add_column("prompt", texts)  # as UltraFeedback has it
    standard = of(preference_rows(40))
    for rows in (explicit, implicit, with_text):
        found = of(rows)
        assert found.implicit == (rows is implicit)
        for name in ("n_read", "scores", "lengths", "duplicates", "factors", "methods", "empty_prompts"):
            assert getattr(found, name) == getattr(standard, name), name


def test_an_implicit_prompt_of_strings():
    found = of([{"chosen": "Q: two words? A: yes it is", "rejected": "Q: two words? A: no"}])
    assert found.implicit
    assert [getattr(found.lengths, side).mean for side in ("prompt", "chosen", "rejected")] == [4, 3, 1]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": None, "chosen": "a", "rejected": "b"},
        {"prompt": 3, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": None, "rejected": "b"},
        {"prompt": "p", "chosen": ["a", "b"], "rejected": ["b"]},
        {"chosen": "", "rejected": "P: b"},
        {"prompt": [], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("p")], "chosen": [], "rejected": [assistant("b")]},
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": "b"},
        {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"chosen": [assistant("a")], "rejected": [assistant("a")]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "", "rejected": "b"},
        {"chosen": "x", "rejected": "y"},
        {"prompt": "p", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        {"prompt": None, "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        {"prompt": [user("p")], "chosen": "P: a", "rejected": "P: b"},
        {"chosen": "P: a", "rejected": "P: a"},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_what_training_refuses(row, tiny_model, tokenizer, tmp_path):
    dataset = Dataset.from_list([row])
    found = of(dataset)
    refused = pytest.raises(RowError) if found.unreadable else nullcontext()
    with refused as error:
        MarginCPOTrainer(
            load(tiny_model),
            MarginCPOConfig(**quiet(output_dir=str(tmp_path))),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
    if found.unreadable:
        assert found.unreadable.example[:60] == str(error.value)[:60]
        assert set(found.methods.values()) <= {"1 row cannot be read", "1 row cannot be read; needs scores"}
    else:
        assert found.methods["amapo"] is None


def test_unreadable_rows_do_not_stop_the_audit(caplog):
    rows = plain(5)
    rows[1]["chosen"] = None
    rows[3]["rejected"] = None
    rows[4]["chosen"] = " "
    found = of(rows)
    assert "train: 2 of 5 rows cannot be read" in caplog.text
    assert (found.n_rows, found.n_read) == (5, 3)
    assert (found.unreadable.n, found.unreadable.first_row) == (2, 1)
    assert (found.empty_chosen.n, found.empty_chosen.first_row) == (1, 4)
    assert found.empty_rejected is None
    assert found.lengths.rejected.n == 3
    assert set(found.methods.values()) == {"2 rows cannot be read", "2 rows cannot be read; needs scores"}


def test_duplicates():
    rows = plain(4)
    rows += [rows[0], rows[0]]  # repeats
    rows += [{**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}]  # contradicts row 1
    rows += [{**rows[2], "chosen": "same", "rejected": "same"}]
    found = of(rows).duplicates
    assert found.n_identical == 2
    assert found.n_contradicting == 2
    assert found.n_same_completion == 1
    assert (found.n_prompts, found.n_repeated_prompts, found.most_frequent_prompt) == (4, 3, 3)
    assert of(Dataset.from_list(rows).shuffle(seed=1)).duplicates == found
    without_prompts = of([{**row, "prompt": ""} for row in plain(3)])
    assert without_prompts.empty_prompts.n == 3
    assert without_prompts.duplicates.n_prompts == 0


class Bad(str):
    column = "score_chosen"


def some(n: int) -> SimpleNamespace:
    return SimpleNamespace(n=n, first_row=3, example="the value x")


def test_every_warning_in_full():
    """Of a set with all that can be wrong at once, in which one and several are told apart."""
    split = SimpleNamespace(
        columns=["chosen", "rejected"],
        n_rows=20,
        n_read=20,
        refused="training refuses this",
        unreadable=some(1),
        untokenizable=some(2),
        n_flipped=5,
        scores=SimpleNamespace(
            bad=[Bad("2 bad values")],
            gap=SimpleNamespace(n=20, minimum=-0.5, maximum=-0.5),
            n_ties=10,
            n_reversed=19,
            n_changed=2,
            columns=["s", "t"],
        ),
        lengths=SimpleNamespace(chosen=some(20), n_chosen_longer=14, n_chosen_shorter=15),
        truncation=SimpleNamespace(max_length=9, n_pairs=2, n_left_empty=1, n_alike=3),
        notes=["a note"],
        empty_prompts=some(2),
        implicit=False,
        empty_chosen=some(1),
        empty_rejected=some(4),
        duplicates=SimpleNamespace(n_identical=3, n_contradicting=6),
        factors=SimpleNamespace(problem="a bad factor", n_zero=8, n_one=0, values=some(20)),
    )
    longer = "a model can learn the length instead of what makes a completion better"
    expected = [
        "training refuses this",
        "1 row cannot be read, and training stops there; row 3: the value x",
        "2 rows cannot be tokenized, and training stops there; row 3: the value x",
        "column is_flipped marks 5 of 20 pairs (25.0%) as flipped, as in studies of noise",
        "column score_chosen has 2 bad values: a method that needs scores stops there",
        "score gaps: 2 are another by more than 1 % in float32, in which training has the scores (s/t), as these are "
        "large beside them: subtract the same number from both scores of a pair",
        "ties: gappo gives 10 of 20 pairs (50.0%) weight 0",
        "in 19 of 20 pairs (95.0%) the rejected completion has the higher score: gappo still weighs them by the size "
        "of the gap",
        "all score gaps are -0.5: gappo is then SimPO with its loss times 0.5",
        f"the chosen completion is the longer one in 14 of 20 pairs (70.0%): {longer}",
        f"the chosen completion is the shorter one in 15 of 20 pairs (75.0%): {longer}",
        "max_length=9 cuts 2 of 20 pairs (10.0%): raise it, or filter out the long ones",
        "in 1 of 20 pairs (5.0%) the prompt alone fills max_length=9: training drops the pair",
        "3 of 20 pairs (15.0%) have the same tokens twice, although their texts differ: the chat template, the "
        "tokenizer or max_length=9 removes the difference. They have no gap to learn from",
        "a note",
        "2 rows with an empty prompt; the first is row 3",
        "3 of 20 pairs (15.0%) repeat another one",
        "6 of 20 pairs (30.0%) contradict another one: the same completions, swapped",
        "a bad factor",
        "the evaluation factor is 0 in 8 of 20 pairs (40.0%): gap-aware cannot tell apart completions that share no "
        "word made of a–z or 0–9; BERTScore may be the better metric",
    ]
    assert list(find_warnings({"train": split}, [])) == expected
    assert list(find_warnings({"a": split, "b": split}, [])) == [
        f"{name}: {each}" for name in "ab" for each in expected
    ]
    split.empty_prompts = some(1)
    assert "1 row with an empty prompt; the first is row 3" in list(find_warnings({"train": split}, []))


def test_prompts_in_two_splits():
    rows = plain(10)
    splits = {
        "train": Dataset.from_list(rows[:6] + rows[:1]),
        "validation": Dataset.from_list(rows[8:]),
        "test": Dataset.from_list([*rows[5:9], {**rows[0], "chosen": "x"}]),
    }
    found = audit(splits)
    numbers = {both.splits: (both.n_prompts, both.n_rows) for both in found.shared_prompts}
    assert numbers == {("train", "test"): (2, (3, 2)), ("validation", "test"): (1, (1, 1))}
    assert [warning for warning in found.warnings if "unseen" in warning] == [
        "2 prompts are in both train (3 rows) and test (2 rows), so test does not measure unseen prompts",
        "1 prompt is in both validation (1 row) and test (1 row), so test does not measure unseen prompts",
    ]


def test_evaluation_factors_are_those_of_the_trainers():
    rows = preference_rows(50, "implicit")
    everything = of(rows)
    texts = preference_rows(50)
    expected = np.array(compute(texts["chosen"][:], texts["rejected"][:]))
    assert everything.factors.values.n == 50
    assert everything.factors.values.mean == pytest.approx(expected.mean(), abs=0.02)  # answers that begin alike
    direct = of(texts).factors
    assert direct.values.mean == pytest.approx(expected.mean())
    assert (direct.n_zero, direct.n_one) == (sum(expected == 0), sum(expected == 1))
    assert (direct.metric, direct.column) == ("rougeL", None)
    some = [of(texts, ef_sample=10, seed=seed).factors.values for seed in (0, 0, 1)]
    assert [values.n for values in some] == [10, 10, 10]
    assert some[0] == some[1] != some[2]


def test_a_column_of_evaluation_factors():
    factors = of(plain(4, evaluation_factor=[0.0, 0.5, 1.0, 0.5])).factors
    assert (factors.column, factors.values.n, factors.values.mean, factors.n_zero, factors.n_one) == (
        "evaluation_factor",
        4,
        0.5,
        1,
        1,
    )
    assert factors.values.histogram.edges == [i / 10 for i in range(11)]
    assert factors.values.histogram.counts == [1, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    bad = of(plain(6, evaluation_factor=[0.25, None, 50.0, 0.75, 0.0, 1.0]))
    assert (bad.factors.values.n, bad.factors.values.mean) == (4, 0.5)
    assert (bad.factors.n_zero, bad.factors.n_one) == (1, 1)
    assert "row 1 of the train data set" in bad.factors.problem
    assert bad.methods["gap-aware"] == "column evaluation_factor holds bad values"
    assert bad.methods["amapo"] is None


def mass_of(gaps: np.ndarray, **options) -> dict[str, np.ndarray]:
    """Transform → shares, and `edges`."""
    mass = of(plain(len(gaps), margin=[float(gap) for gap in gaps]), **options).gradient_mass
    edges = np.array(mass.sizes.histogram.edges)
    return {name: np.array(shares) for name, shares in mass.shares.items()} | {"edges": edges}


def test_the_gradient_mass_of_every_transform():
    """GapPO's weights written out in NumPy, on gaps between −1 and 5.5; the batches are those of the seed."""
    rng = np.random.default_rng(7)
    gaps = np.round(np.minimum(rng.gamma(1.3, 0.9, 200), 5.5) * rng.choice([1, 1, 1, -1], 200) * 4) / 4
    found, size = mass_of(gaps, score_gap_threshold=1.5, seed=3), np.abs(gaps)
    normalized = np.empty(200)
    for batch in np.array_split(np.random.default_rng(3).permutation(200), np.arange(16, 200, 16)):
        normalized[batch] = size[batch] / size[batch].mean()
    expected = {
        "pairs": np.ones(200),
        "linear": size,
        "quadratic": size**2,
        "exponential": np.exp(size) - 1,
        "hard": (size >= 1.5).astype(float),
        "normalized": normalized,
    }
    assert found.keys() == {*expected, "edges"}
    edges = found["edges"]
    for name, weight in expected.items():
        for i, (low, high) in enumerate(pairwise(edges)):
            inside = (size >= low) & (size < (np.inf if high == edges[-1] else high))
            assert found[name][i] == pytest.approx(weight[inside].sum() / weight.sum(), abs=1e-12), (name, low)


def test_what_the_paper_says_of_gradient_mass():
    """Section 3.1: a pair at 4 has twice the gradient of one at 2; beyond linear, the mass goes to the far tail."""
    even = mass_of(np.array([2.0, 4.0] * 20))
    filled = {name: shares[shares > 0] for name, shares in even.items()}
    np.testing.assert_allclose(filled["pairs"], [1 / 2, 1 / 2])
    np.testing.assert_allclose(filled["linear"], [1 / 3, 2 / 3])
    np.testing.assert_allclose(filled["quadratic"], [1 / 5, 4 / 5])
    assert filled["hard"].tolist() == filled["pairs"].tolist()
    ultra = mass_of(np.minimum(np.random.default_rng(0).exponential(1.2, 2000), 5.5))
    tail = [ultra[name][ultra["edges"][:-1] >= 4].sum() for name in ("pairs", "linear", "quadratic", "exponential")]
    assert tail == sorted(tail)
    assert tail[0] < 0.05 < 0.3 < tail[3]


def test_a_hard_filter_that_keeps_no_pair():
    found = audit({"train": Dataset.from_list(plain(20, margin=[i / 20 for i in range(20)]))})
    lines = audit_text(found).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("Gradient mass"))
    assert lines[head + 1].endswith("1[δ ≥ 1]")
    assert lines[head + 2].endswith("–")
    assert any("no pair reaches the hard filter's threshold (--score_gap_threshold)" in line for line in lines)
    ties = of(plain(3, margin=[0.0] * 3)).gradient_mass
    assert not any(ties.shares["linear"])
    assert of(plain(3)).gradient_mass is None


def test_the_margins_of_all_metrics():
    """Equations 8 to 10 and table 4 in NumPy, on the evaluation factors of `compute`."""
    rows = preference_rows(60)
    column = np.linspace(0, 1, 60)
    found = of(rows.add_column("evaluation_factor", column.tolist()), ef_metrics=["rouge2", "jaccard"])
    assert [each.metric for each in found.factor_margins] == ["rouge2", "jaccard", "column evaluation_factor"]
    assert found.factors.metric is None
    factors = [np.array(compute(rows["chosen"][:], rows["rejected"][:], metric)) for metric in ("rouge2", "jaccard")]
    for each, ef in zip(found.factor_margins, [*factors, column], strict=True):
        assert (each.factors.n, each.n_zero, each.n_one) == (60, sum(ef == 0), sum(ef == 1))
        assert each.factors.mean == pytest.approx(ef.mean())
        floored = np.maximum(ef, 0.01)
        mapped = {
            "log": np.log(1 / floored),
            "linear": 1 - floored,
            "square": 1 - floored**2,
            "sqrt": 1 - np.sqrt(floored),
        }
        for mapping, f in mapped.items():
            margins = {"none": f, "scale": 0.3 * f / f.mean(), "add": f - f.mean() + 0.3}
            assert each.margins[mapping].keys() == margins.keys()
            for name, margin in margins.items():
                got = each.margins[mapping][name]
                quartiles = (got.lower_quartile, got.median, got.upper_quartile)
                assert quartiles == pytest.approx(np.percentile(margin, [25, 50, 75])), (each.metric, mapping, name)
                assert sum(got.histogram.counts) == 60
    text = audit_text(Audit({"train": found}, [], []))
    assert "normalized with γ/β = 0.3: quartiles" in text
    assert f"{np.percentile(np.log(1 / np.maximum(factors[1], 0.01)), 50):.3f}" in text


def test_methods_follow_the_table():
    with_scores, without = of(preference_rows(5)), of(plain(5))
    assert with_scores.methods == dict.fromkeys(METHODS)
    needing = {name for name, needs in NEEDS.items() if "score_chosen" in needs}
    assert "gappo" in needing
    assert {name for name, why in without.methods.items() if why == "needs scores"} == needing
    assert {name for name, why in without.methods.items() if why is None} == set(METHODS) - needing
    assert of(plain(3, margin=[0.0] * 3)).methods["gappo"] == "all pairs are ties"
    listwise = of([{"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 2.0]}])
    assert set(listwise.methods.values()) == {"no column chosen and no column rejected"}
    custom = audit({"train": Dataset.from_list(plain(2))}, methods={"new": ["length_gap"]}).splits["train"]
    assert custom.methods == {"new": "needs a column length_gap"}


def test_no_method_where_training_would_stop(tiny_model, tokenizer, tmp_path):
    """Each prompt fills max_length, which training itself says."""
    rows = Dataset.from_list([{**row, "prompt": "p" * 60} for row in plain(3)])
    with pytest.raises(ValueError, match="the prompt fills max_length=50"):
        MarginCPOTrainer(
            load(tiny_model),
            MarginCPOConfig(**quiet(output_dir=str(tmp_path), max_length=50)),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    measured = {"measure": in_tokens_of(tokenizer)}
    assert set(of(rows, max_length=50, **measured).methods.values()) == {
        "every prompt fills max_length=50",
        "every prompt fills max_length=50; needs scores",
    }
    some = of([*rows, *plain(1)], max_length=50, **measured)
    assert some.methods["amapo"] is None


def test_an_error_is_shown_from_its_beginning():
    long = [{"role": "user", "content": "word " * 200}]
    example = of([{"prompt": "p", "chosen": long, "rejected": long}]).unreadable.example
    assert example.startswith("columns 'chosen' and 'rejected', row 0 of the train data set: [{'content': 'word wo")
    assert len(example) <= 300
    assert shortened("a" * 300) == "a" * 300
    assert shortened("a" * 301) == "a" * 299 + "…"


@pytest.mark.parametrize("form", ["standard", "conversational", "implicit"])
@pytest.mark.parametrize("merges", [False, True])
def test_truncation_is_the_trainers(form, merges, tiny_model, tokenizer, tmp_path):
    tokenizer = merging_tokenizer(tokenizer) if merges else tokenizer
    rows = preference_rows(80, form)
    measure = in_tokens_of(tokenizer)

    def trained_on(max_length: int) -> Dataset:
        options = quiet(output_dir=str(tmp_path), max_length=max_length)
        return MarginCPOTrainer(
            load(tiny_model), MarginCPOConfig(**options), train_dataset=rows, processing_class=tokenizer
        ).train_dataset

    whole = trained_on(1 << 20)
    n_tokens = {side: np.array(list(map(len, whole[f"{side}_input_ids"]))) for side in ("chosen", "rejected")}
    for max_length in np.percentile([*n_tokens["chosen"], *map(len, whole["prompt_input_ids"])], [20, 50, 90]):
        found = of(rows, measure=measure, max_length=int(max_length))
        too_long = {side: n > int(max_length) for side, n in n_tokens.items()}
        assert found.truncation.n_chosen == too_long["chosen"].sum() > 0
        assert found.truncation.n_rejected == too_long["rejected"].sum() > 0
        assert found.truncation.n_pairs == (too_long["chosen"] | too_long["rejected"]).sum()
        assert found.truncation.n_left_empty == len(rows) - len(trained_on(int(max_length)))
    assert found.lengths.unit == "tokens"
    answers = [sum(label >= 0 for label in labels) for labels in whole["chosen_labels"]]
    assert found.lengths.chosen.mean == pytest.approx(np.mean(answers))
    assert found.lengths.prompt.mean == pytest.approx(np.mean(list(map(len, whole["prompt_input_ids"]))))


@pytest.mark.parametrize("max_length", [20, 40, 60, 200])
def test_pairs_that_become_equal_are_those_that_training_counts(max_length, tiny_model, tokenizer, tmp_path, caplog):
    starts = {f"{i} ": "b" * n for i, n in enumerate((10, 18, 30, 50, 50, 90))}
    rows = [{"prompt": q, "chosen": f"{start}c", "rejected": f"{start}d"} for q, start in starts.items()]
    rows += [
        {"prompt": "the same ", "chosen": "b", "rejected": "b"},
        {"prompt": "q" * 30, "chosen": "b", "rejected": "c"},
    ]
    dataset = Dataset.from_list(rows)
    found = of(dataset, measure=in_tokens_of(tokenizer), max_length=max_length)
    options = quiet(output_dir=str(tmp_path), max_length=max_length)
    caplog.clear()
    MarginCPOTrainer(load(tiny_model), MarginCPOConfig(**options), train_dataset=dataset, processing_class=tokenizer)
    counted = [re.match(r"(\d+) of (\d+) train pairs have the same tokens", text) for text in caplog.messages]
    assert [found.truncation.n_alike] == ([int(match[1]) for match in counted if match] or [0])
    assert found.truncation.n_alike == sum(len(q) + len(start) >= max_length for q, start in starts.items())
    assert found.methods["amapo"] is None


def test_a_set_of_pairs_that_become_equal_trains_no_method(tiny_model, tokenizer, tmp_path, caplog):
    rows = preference_rows(3, "conversational").map(lambda row: {"rejected": row["chosen"]})
    rows = rows.map(lambda row: {"rejected": [{**row["rejected"][0], "reasoning_content": "because"}]})
    found = of(rows, measure=in_tokens_of(tokenizer))
    assert "'reasoning_content'" in caplog.text
    assert found.methods["amapo"] == "the completions of every pair have the same tokens"
    assert (found.truncation.n_alike, found.truncation.n_told_apart) == (3, 0)
    with pytest.raises(ValueError, match="the same tokens in every one of the 3 train pairs"):
        MarginCPOTrainer(
            load(tiny_model),
            MarginCPOConfig(**quiet(output_dir=str(tmp_path))),
            train_dataset=rows,
            processing_class=tokenizer,
        )


def test_rows_that_a_chat_template_refuses(tokenizer):
    picky = merging_tokenizer(tokenizer)
    picky.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    picky.chat_template += tokenizer.chat_template
    rows = preference_rows(6, "conversational").to_list()
    rows[2]["prompt"].insert(0, {"role": "system", "content": "be brief"})
    rows[1]["chosen"] = None  # so that rows of the audit and of the tokenizer differ
    rows[5]["prompt"].insert(0, {"role": "system", "content": "be brief"})
    found = of(rows, measure=in_tokens_of(picky))
    assert (found.untokenizable.n, found.untokenizable.first_row) == (2, 2)
    assert "no system role" in found.untokenizable.example
    assert found.lengths.chosen.n == 3
    assert found.methods["amapo"] == "1 row cannot be read; 2 rows cannot be tokenized"


def test_histograms_hold_everything():
    rng = np.random.default_rng(0)
    for values in (
        rng.normal(size=500),
        rng.exponential(300, 500).round(),
        np.r_[rng.normal(size=999), 1e9],
        np.full(9, 2.5),
        np.array([0.1]),
        rng.integers(1, 5, 100),
        -rng.random(50) * 1e-6,
    ):
        found = distribution(values)
        edges, counts = np.array(found.histogram.edges), np.array(found.histogram.counts)
        assert counts.sum() == len(values)
        assert 1 <= len(counts) <= 15
        assert np.diff(edges) == pytest.approx(np.full(len(counts), edges[1] - edges[0]))
        inside = (values >= edges[1]) & (values < edges[-2])
        assert counts[1:-1].sum() == inside.sum()
    assert nice_edges(np.array([1, 2, 3, 4])).tolist() == [1, 2, 3, 4, 5]
    assert len(distribution(np.r_[rng.normal(size=999), 1e9]).histogram.counts) > 5  # no bar for all but one
    assert distribution(np.empty(0)) is None


@pytest.mark.parametrize("raw", [0.0951, 0.11, 0.19, 0.21, 0.49, 0.51, 0.99, 1.05, 1.99, 2.01, 4.99, 5.01, 9.99])
def test_bins_are_the_narrowest_round_ones_that_are_twelve_at_most(raw):
    edges = nice_edges(np.linspace(0.001, 12 * raw + 0.001, 9999))
    steps = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert np.diff(edges[:2]) == pytest.approx(next(step for step in steps if step >= 0.99 * raw))


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        (plain(50, margin=[0.0] + [1.0, 2.0] * 24 + [3.0]), "gappo gives 1 of 50 pairs (2.0%) weight 0"),
        (plain(3, margin=[1.0, -2.0, 3.0]), "in 1 of 3 pairs (33.3%) the rejected completion has the higher score"),
        (plain(3, score_chosen=[3.1, 2.1, 0.3], score_rejected=[3.0, 2.0, 0.2]), "gappo is then SimPO"),
        (plain(3, is_flipped=[True, False, True]), "column is_flipped marks 2 of 3 pairs (66.7%)"),
        (
            plain(3, score_chosen=[1.0, None, 2.0], score_rejected=[0.0] * 3),
            "score_chosen has 1 value that is None, the first in",
        ),
        (
            [{**row, "chosen": row["chosen"] + " yes"} for row in plain(3)],
            "chosen completion is the longer one in 3 of 3",
        ),
        ([{**row, "chosen": "day"} for row in plain(3)], "chosen completion is the shorter one in 3 of 3"),
        (plain(9) + plain(1), "1 of 10 pairs (10.0%) repeat another one"),
        (
            [*plain(2), {"prompt": "say 0", "chosen": "bad day 0", "rejected": "good day 0"}],
            "the same completions, swapped",
        ),
        ([*plain(2), {"prompt": "p", "chosen": "a", "rejected": "a"}], "1 of 3 pairs have the same completion twice"),
        (
            [*plain(2), {"prompt": "p", "chosen": "good day", "rejected": ""}],
            "1 of 3 rejected completions have no text of their own (the first is in row 2)",
        ),
        ([*plain(2), {"prompt": "", "chosen": "good day", "rejected": "bad day"}], "1 row with an empty prompt"),
        ([{"chosen": "good day", "rejected": "bad day"}], "columns 'chosen' and 'rejected', row 0 of the train"),
        ([{"system": "Be kind", **row} for row in plain(2)], "column 'system' is not used"),
        ([{"chosen": f"Q: {i} b", "rejected": f"Q: {i} c", "schema": "t"} for i in "xy"], "there is no prompt column"),
        (
            [{"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]}],
            "columns 'chosen' and 'rejected', row 0 of the train",
        ),
        ([{"prompt": "日", "chosen": "本", "rejected": "語"}], "BERTScore may be the better metric"),
        (
            plain(3, margin=["low", "high", "1"]),
            "margin has 2 values that are not numbers, the first in row 0 ('low')",
        ),
        (
            [{"Prompt": "p", "Chosen": "a", "rejected": "b"}],
            "case-sensitive, so 'Chosen' must be written in lower case",
        ),
        (plain(2, evaluation_factor=[0.5, 2.0]), "the evaluation factor 2.0 is outside [0, 1]"),
        ([{"prompt": "p", "completion": "c", "label": True}], "no column 'chosen' and no column 'rejected'"),
        (
            [{"prompt": "p", "chosen": "c", "reject": "r"}],
            "no column 'rejected', only ['prompt', 'chosen', 'reject']: a",
        ),
        (
            [{"prompt": "p", "responses": ["c", "r"], "scores": [1, 2]}],
            "make pairs of them with trl-margins pairs FILE",
        ),
        (plain(1)[:0] or Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), "there are no rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_warns(rows, warning):
    assert warning in warnings_of(rows)


def test_it_warns_of_truncation_only_where_it_is_common(tokenizer):
    rows = [*plain(40), {"prompt": "p " * 30, "chosen": "good day", "rejected": "bad day"}]
    options = {"measure": in_tokens_of(tokenizer), "max_length": 50}
    assert "in 1 of 41 pairs (2.4%) the prompt alone fills max_length=50" in warnings_of(rows, **options)
    assert "cuts" not in warnings_of(rows, **options)
    assert "max_length=15 cuts 41 of 41 pairs (100.0%)" in warnings_of(rows, **{**options, "max_length": 15})


def longer(of, other, n):
    return [{"prompt": f"p{i}", of: "a b c d", other: f"a {i}"} for i in range(n)]


@pytest.mark.parametrize(
    ("kind", "n", "most", "said"),
    [
        # kind → so many of n pairs are nothing to warn of, one more is
        ("ties", 100, 1, "ties: gappo gives 2 of 100 pairs (2.0%) weight 0"),
        ("duplicates", 100, 1, "2 of 100 pairs (2.0%) repeat another one"),
        ("chosen", 20, 13, "the chosen completion is the longer one in 14 of 20 pairs (70.0%)"),
        ("rejected", 20, 13, "the chosen completion is the shorter one in 14 of 20 pairs (70.0%)"),
        ("truncated", 20, 1, "max_length=60 cuts 2 of 20 pairs (10.0%)"),
        ("without common words", 20, 1, "the evaluation factor is 0 in 2 of 20 pairs (10.0%)"),
    ],
)
def test_it_warns_from_a_share_on(kind, n, most, said, tokenizer):
    for marked in (most, most + 1):
        rows = [{"prompt": f"p{i}", "chosen": f"a b {i}", "rejected": f"a c {i}"} for i in range(n)]
        options = {}
        match kind:
            case "ties":
                rows = [
                    {**row, "score_chosen": 2.0 + (i >= marked), "score_rejected": 2.0} for i, row in enumerate(rows)
                ]
                rows[-1]["score_chosen"] = 4.0
            case "duplicates":
                rows[:marked] = rows[-marked:]
            case "chosen":
                rows[:marked] = longer("chosen", "rejected", marked)
            case "rejected":
                rows[:marked] = longer("rejected", "chosen", marked)
            case "truncated":
                rows[:marked] = [{**row, "rejected": "a" * 80} for row in rows[:marked]]
                options = {"measure": in_tokens_of(tokenizer), "max_length": 60}
            case _:
                rows[:marked] = [{**row, "rejected": "x y z"} for row in rows[:marked]]
        assert (said in warnings_of(rows, **options)) is (marked > most), marked
        assert bool(warnings_of(rows, **options)) is (marked > most)


def test_it_does_not_warn_without_a_reason():
    rows = plain(200, score_chosen=[3.0 + i % 5 for i in range(200)], score_rejected=[2.5] * 200)
    rows[7]["score_chosen"] = 2.5  # one tie in 200
    rows[9] = {**rows[8]}
    found = audit({"train": Dataset.from_list(rows)})
    assert found.warnings == []
    assert "No warnings" in audit_text(found)


def test_the_report_survives_whatever_the_data_lacks():
    empty = Dataset.from_dict({"prompt": [], "chosen": [], "rejected": [], "score_chosen": [], "score_rejected": []})
    unreadable = Dataset.from_list([{"chosen": [1, 2], "rejected": [3, 4], "margin": None}])
    for rows in (empty, unreadable, Dataset.from_list([{"text": "x"}])):
        found = audit({"train": rows}, methods=NEEDS, ef_metrics=["rouge1", "rougeL"])
        assert "Warnings" in audit_text(found)
        assert not found.splits["train"].factor_margins
        assert all(found.splits["train"].methods.values())


def test_marks_that_training_refuses():
    """Text is no mark, whatever it says; a number as text is one."""
    found = audit({"train": Dataset.from_list(plain(3, is_flipped=["false"] * 3))}).splits["train"]
    assert found.n_flipped is None
    assert "column 'is_flipped', row 0 of the train data set: the value 'false' is not a number" in found.refused
    numbers = audit({"train": Dataset.from_list(plain(3, is_flipped=["1", "0", "1.0"]))}).splits["train"]
    assert (numbers.n_flipped, numbers.refused) == (2, None)


@pytest.fixture
def two_splits(tmp_path) -> str:
    splits = DatasetDict({"train": preference_rows(40), "test": Dataset.from_list(plain(3))})
    splits.save_to_disk(tmp_path / "pairs")
    return str(tmp_path / "pairs")


def test_the_command(two_splits, tiny_model, tmp_path, capsys):
    out, figure = tmp_path / "deep" / "numbers.json", tmp_path / "figures" / "audit.svg"
    argv = [two_splits, "--model_name_or_path", tiny_model, "--max_length", "64", "--json", str(out)]
    assert main(["inspect", *argv, "--plot", str(figure), "--eval_min_score_gap", "1"]) == 0
    printed = capsys.readouterr().out
    for text in ("train: 40 rows", "test: 3 rows", "Lengths in tokens", "max_length=64 cuts", "gap ≥ 1", "Warnings"):
        assert text in printed, text
    assert "no (needs scores): gappo" in printed
    numbers = json.loads(out.read_text())
    train = numbers["splits"]["train"]
    gaps = np.subtract(*(preference_rows(40)[name][:] for name in ("score_chosen", "score_rejected")))
    assert train["scores"]["gap"]["median"] == pytest.approx(np.median(gaps))
    assert sum(train["scores"]["gap"]["histogram"]["counts"]) == 40
    assert train["methods"]["gappo"] is None
    assert numbers["splits"]["test"]["scores"] is None
    drawn = figure.read_text()
    assert "<svg" in drawn
    assert "<dc:date>" not in drawn  # the same numbers give the same file


def test_the_length_that_the_model_was_trained_with(two_splits, tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "margin_run.json").write_text(json.dumps({"config": {"max_length": 48}}))
    assert main(["inspect", two_splits, "--model_name_or_path", str(model)]) == 0
    assert "max_length=48 cuts" in capsys.readouterr().out
    assert main(["inspect", two_splits, "--model_name_or_path", str(model), "--max_length", "64"]) == 0
    assert "max_length=64 cuts" in capsys.readouterr().out
    assert main(["inspect", two_splits, "--model_name_or_path", tiny_model]) == 0
    assert "max_length=1024 cuts" in capsys.readouterr().out


def test_one_split_and_the_flag(two_splits, capsys):
    assert main(["inspect", "--dataset_name", two_splits, "--dataset_split", "test"]) == 0
    printed = capsys.readouterr().out
    assert "test: 3 rows" in printed
    assert "train" not in printed
    assert "Lengths in words" in printed
    with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\], not 'dev'"):
        main(["inspect", two_splits, "--dataset_split", "dev"])


def test_bars_are_as_long_as_their_counts():
    lines = audit_text(
        audit({"train": Dataset.from_list(plain(7, margin=[1.0] * 4 + [2.0] * 2 + [4.0]))})
    ).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  1 – 2"))
    bars = [line.count("█") for line in lines[first : first + 4]]
    assert bars == [40, 20, 0, 10]
    assert not lines[first + 4]


def test_figures(two_splits, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"audit.pdf: a figure is one of \.png, \.svg"):
        main(["inspect", two_splits, "--plot", str(tmp_path / "audit.pdf")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-margins\[report\]'"):
        main(["inspect", two_splits, "--plot", str(tmp_path / "audit.png")])


@pytest.mark.rehearsal
def test_the_figures_beside_the_histograms(two_splits, tmp_path, capsys, monkeypatch):
    argv = ["inspect", two_splits, "--ef_metrics", "all", "--plot", str(tmp_path / "audit.png")]
    assert main(argv) == 0
    names = ["audit", "audit-gradient-mass-train", "audit-evaluation-factors-train", "audit-evaluation-factors-test"]
    printed = capsys.readouterr().out
    assert [line.split(": ")[0] for line in printed.splitlines()[-4:]] == [str(tmp_path / f"{n}.png") for n in names]
    assert "A tick marks the median, a dashed line γ/β = 0.3" in printed.splitlines()[-1]
    for metric in ("jaccard", "rouge1", "rouge2", "rougeL"):
        assert f"\n  {metric} " in printed
    for name in names:
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert b"Description" in content
    monkeypatch.setattr("trl_margins.data.evaluation_factors._compute", lambda *_, **__: pytest.fail("not cached"))
    assert main(argv[:4]) == 0


def test_metrics_that_cannot_be_compared(two_splits):
    """An error before anything is read."""
    with pytest.raises(ValueError, match="metric of ef_metrics 'rougeK'"):
        main(["inspect", two_splits, "--ef_metrics", "jaccard", "rougeK"])
    with pytest.raises(
        ValueError, match="bertscore_f1 needs an encoder: name it, for example --encoder roberta-large"
    ):
        main(["inspect", two_splits, "--ef_metrics", "bertscore_f1"])
    with pytest.raises(ValueError, match="compute it with --ef_metrics all, or leave the encoder out"):
        main(["inspect", two_splits, "--ef_metrics", "rouge1", "--encoder", "roberta-large"])
    with pytest.raises(ValueError, match="the encoder is for BERTScore"):
        main(["inspect", two_splits, "--encoder", "roberta-large"])
    with pytest.raises(ValueError, match="score_gap_threshold must be"):
        main(["inspect", two_splits, "--score_gap_threshold", "-1"])
    with pytest.raises(ValueError, match="ef_sample must be"):
        main(["inspect", two_splits, "--ef_sample", "-1"])
    assert compared_metrics(["all"], "roberta-large") == list(METRICS)


def test_the_pictures_show_the_numbers():
    from trl_margins.report.audit_figure import factors_picture, mass_picture

    rows = preference_rows(60, scores=lambda i: ((i * 7 % 23) / 4, (i * 5 % 19) / 4))
    found = of(rows, ef_metrics=["rouge1", "rougeL"])
    mass = found.gradient_mass
    picture = mass_picture(mass)
    left, right = picture.figure.axes
    for line, (_, shares) in zip(right.lines, mass.shares.items(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), shares)
    heights = [[bar.get_height() for bar in bars] for bars in left.containers]
    np.testing.assert_allclose(heights, [mass.shares["pairs"], mass.shares["linear"]])
    assert "of 60 pairs" in picture.caption
    panels = factors_picture(found.factor_margins).figure.axes
    assert len(panels) == 1 + 3 * 4
    medians = [lines.get_segments()[0][0][0] for lines in panels[0].collections]
    assert medians == [each.factors.median for each in found.factor_margins]
    assert [panel.get_xlabel() for panel in panels] == ["EF", *["f(EF)"] * 4, *["margin / β"] * 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = of(plain(3, evaluation_factor=[0.5] * 3), ef_metrics=["rouge1"]).factor_margins[1:]
        assert len(factors_picture(same).figure.axes) == 13
    scaled = panels[1 + 4]
    assert scaled.lines[0].get_xdata()[0] == 0.3
    assert [lines.get_segments()[0][0][0] for lines in scaled.collections] == [
        each.margins["log"]["scale"].median for each in found.factor_margins
    ]


def test_factors_of_0_are_explained_in_their_picture():
    """log(1/0.01) is where they are: the floor of GaPO's mapping."""
    from trl_margins.report.audit_figure import factors_picture

    compared = of(plain(4, evaluation_factor=[0.0, 0.5, 0.25, 0.125]), ef_metrics=["rouge1"]).factor_margins
    found = [each for each in compared if each.n_zero]
    assert found[0].margins["log"]["none"].maximum == pytest.approx(np.log(100))
    *texts, zeros = (text.get_text() for text in factors_picture(found).figure.legends[0].get_texts())
    assert texts == ["pairs, each histogram of the same height", "median", "target margin, γ/β = 0.3"]
    assert zeros == f"EF = 0 counts as 0.01 in f: the bars at the right edge\n({found[0].metric}: 25 %)"


def test_a_figure_has_panels_for_what_there_is():
    from trl_margins.report.audit_figure import audit_figure

    def titles(found: Audit) -> list[str]:
        return [panel.get_title("left") for panel in audit_figure(found).axes]

    scored, unscored = preference_rows(20), Dataset.from_list(plain(3))
    assert titles(audit({"a": scored})) == ["Score gap", "Completion length", "Evaluation factor"]
    assert titles(audit({"a": unscored})) == ["Completion length", "Evaluation factor"]
    assert len(titles(audit({"a": scored, "b": unscored}))) == 6
    assert len(titles(audit({"a": Dataset.from_list([{"text": "x"}])}))) == 1


def test_an_audit_in_full():
    """Two splits with scores, factors, flipped labels, duplicates, empty texts and cut rows; and one without pairs."""
    rows = plain(12, evaluation_factor=[i / 11 for i in range(12)], is_flipped=[i < 3 for i in range(12)])
    rows = [{**row, "score_chosen": float(i % 5), "score_rejected": 2.0} for i, row in enumerate(rows)]
    rows[4] = {**rows[4], "rejected": ""}
    rows += [rows[0], {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}]
    splits = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[10:])}
    hear(audit_text(audit(splits, methods=NEEDS, ef_metrics=["rouge1", "jaccard"])))
    hear(audit_text(audit({"train": Dataset.from_dict({"text": ["a"]})}, methods=NEEDS)))
