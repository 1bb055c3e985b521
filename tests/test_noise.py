"""Flipped labels: exactly as many as asked, with all that belongs to an answer, and nothing that does not."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
from conftest import preference_rows
from datasets import Dataset, DatasetDict, Value
from said import word_for_word  # noqa: F401 - its messages are held against said/

from trl_margins.data.noise import KINDS, flip_labels, parse_noise
from trl_margins.pairs import IS_FLIPPED
from trl_margins.rows.scores import ScoreColumns, check_scores

N = 40


def said(content: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": content}


def rich_rows(n: int = N, seed: int = 0) -> Dataset:
    """As UltraFeedback has them, with more columns; texts of every length, two models, scores, numbers of words."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        question = said(f"question {i}", "user")
        texts = [f"{side} {i} " + "x" * rng.integers(0, 30) for side in "ab"]
        chosen, rejected = ([question, said(text)] for text in texts)
        rows.append(
            {
                "prompt": question["content"],
                "chosen": chosen,
                "rejected": rejected,
                "messages": chosen if i % 4 else [question],  # which is not the chosen answer
                "score_chosen": float(rng.integers(5, 10)),
                "score_rejected": float(rng.integers(1, 5)),
                "chosen_model": f"m{rng.integers(9)}",
                "rejected_model": f"n{rng.integers(9)}",
                "words-chosen-n": len(texts[0]),
                "words-rejected-n": len(texts[1]),
                "ef_bertscore_precision": rng.random(),
                "ef_bertscore_recall": rng.random(),
                "evaluation_factor": rng.random(),
                "source": f"s{i}",
            }
        )
    return Dataset.from_list(rows)


def flipped_by_hand(row: dict[str, Any]) -> dict[str, Any]:
    new = copy.deepcopy(row)
    for one, other in (
        ("chosen", "rejected"),
        ("chosen_model", "rejected_model"),
        ("words-chosen-n", "words-rejected-n"),
        ("ef_bertscore_precision", "ef_bertscore_recall"),
    ):
        new[one], new[other] = row[other], row[one]
    if row["messages"] == row["chosen"]:
        new["messages"] = row["rejected"]
    return new


@pytest.mark.parametrize("kind", KINDS)
def test_a_flip_swaps_what_belongs_to_an_answer_and_nothing_else(kind):
    rows = rich_rows()
    noisy = flip_labels(rows, 0.3, kind, seed=3)
    assert noisy.column_names == [*rows.column_names, IS_FLIPPED]
    assert noisy.features == {**rows.features, IS_FLIPPED: Value("bool")}
    assert sum(noisy[IS_FLIPPED]) == 12
    for before, after in zip(rows, noisy, strict=True):
        flipped = after.pop(IS_FLIPPED)
        assert after == (flipped_by_hand(before) if flipped else before)
        if flipped and kind == "length":
            assert len(before["chosen"][-1]["content"]) > len(before["rejected"][-1]["content"])


def test_the_scores_stay_in_order():
    rows, columns = rich_rows(), ScoreColumns("score_chosen", "score_rejected")
    assert check_scores(flip_labels(rows, 0.5), columns, "train") == check_scores(rows, columns, "train")
    assert check_scores(rows, columns, "train").n_reversed == 0


@pytest.mark.parametrize(
    ("rate", "n", "flips"), [(0, 7, 0), (0.2, 7, 1), (0.5, 7, 4), (0.99, 7, 7), (0.1, 40, 4), (0.5, 1040, 520)]
)
def test_the_number_is_exact(rate, n, flips, caplog):
    rows = preference_rows(n)
    with caplog.at_level(logging.INFO, "trl_margins"):
        noisy = flip_labels(rows, rate)
    assert sum(noisy[IS_FLIPPED]) == flips
    for before, after in zip(rows, noisy, strict=True):
        assert after["chosen"] == before["rejected" if after[IS_FLIPPED] else "chosen"]
    assert (
        f"flipped {flips} of {n} pairs (random): chosen/rejected swapped, score_chosen/score_rejected" in caplog.text
    )


def test_flipping_twice_is_nothing():
    rows = rich_rows()
    rows = rows.remove_columns("messages").add_column("messages", rows["chosen"][:], feature=rows.features["chosen"])
    once = flip_labels(rows, 0.4, seed=7)
    twice = flip_labels(once.remove_columns(IS_FLIPPED), 0.4, seed=7)
    assert once.remove_columns(IS_FLIPPED).to_list() != rows.to_list()
    assert twice.remove_columns(IS_FLIPPED).to_list() == rows.to_list()


@pytest.mark.parametrize("kind", KINDS)
def test_a_higher_rate_flips_the_same_and_more(kind):
    rows = rich_rows()
    flips = [np.flatnonzero(flip_labels(rows, rate, kind, seed=1)[IS_FLIPPED]) for rate in (0.1, 0.2, 0.35)]
    assert set(flips[0]) < set(flips[1]) < set(flips[2])
    again, other = (flip_labels(rows, 0.1, kind, seed=seed)[IS_FLIPPED] for seed in (1, 2))
    assert np.array_equal(np.flatnonzero(again), flips[0])
    assert not np.array_equal(np.flatnonzero(other), flips[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_draw_is_uniform(kind):
    """Every candidate is drawn in half of 100 draws, give or take five standard deviations."""
    rows = Dataset.from_dict({"prompt": ["q"] * 12, "chosen": ["ab"] * 8 + ["a"] * 4, "rejected": ["b"] * 12})
    candidates, rate = (12, 6 / 12) if kind == "random" else (8, 4 / 12)
    counts = sum(np.array(flip_labels(rows, rate, kind, seed)[IS_FLIPPED], int) for seed in range(100))
    assert ((counts[:candidates] > 25) & (counts[:candidates] < 75)).all()
    assert counts.sum() == 100 * round(12 * rate)
    assert not counts[candidates:].any()


class TestLength:
    """Candidates: rows 0 and 2. Row 1 is of equal length, row 3 has the shorter answer chosen."""

    texts = (("abc", "de"), ("ab", "cd"), ("abcdef", ""), ("a", "bcd"))

    def rows(self, form: str) -> Dataset:
        rows = []
        for i, pair in enumerate(self.texts):
            prompt = [said(f"{i}", "user")]
            sides = dict(zip(("chosen", "rejected"), pair, strict=True))
            if form == "standard":
                rows.append({"prompt": f"{i}", **sides})
            elif form == "conversational":
                rows.append({"prompt": prompt, **{side: [said(text)] for side, text in sides.items()}})
            elif form == "ultrafeedback":
                rows.append({"prompt": f"{i}", **{side: [*prompt, said(text)] for side, text in sides.items()}})
            else:
                rows.append({side: f"{i} question. {text}" for side, text in sides.items()})
        return Dataset.from_list(rows)

    @pytest.mark.parametrize("form", ["standard", "conversational", "ultrafeedback", "implicit"])
    def test_candidates(self, form):
        assert flip_labels(self.rows(form), 0.5, "length")[IS_FLIPPED][:] == [True, False, True, False]

    @pytest.mark.parametrize("form", ["standard", "conversational"])
    def test_too_few(self, form):
        complaint = (
            "length:0.7 flips 3 of 4 pairs, but only 2 have a longer chosen completion: the rate can be 0.5 at most"
        )
        with pytest.raises(ValueError, match=complaint):
            flip_labels(self.rows(form), 0.7, "length")

    @pytest.mark.parametrize("n_long", [1, 13, 333, 666, 999])
    def test_the_rate_it_names_is_possible(self, n_long):
        rows = Dataset.from_dict({"chosen": ["ab"] * n_long + [""] * (1001 - n_long), "rejected": ["c"] * 1001})
        rows = rows.add_column("prompt", ["q"] * 1001)
        with pytest.raises(ValueError, match="rate can be") as error:
            flip_labels(rows, 0.9995, "length")
        rate = float(str(error.value).split("can be ")[1].split()[0])
        assert sum(flip_labels(rows, rate, "length")[IS_FLIPPED]) == n_long

    def test_prompt_and_system_message_in_named_columns(self):
        rows = self.rows("standard").rename_column("prompt", "question").add_column("rules", ["be brief"] * 4)
        with pytest.raises(ValueError, match="name the prompt with prompt_column='question'"):
            flip_labels(rows, 0.5, "length")
        named = flip_labels(rows, 0.5, "length", prompt_column="question", system_column="rules")
        assert named[IS_FLIPPED][:] == [True, False, True, False]
        with pytest.raises(ValueError, match="rulez"):
            flip_labels(rows, 0.5, "length", prompt_column="question", system_column="rulez")

    def test_a_row_without_an_answer(self):
        rows = Dataset.from_dict({"prompt": ["q"] * 3, "chosen": ["a"] * 3, "rejected": ["b", None, "c"]})
        with pytest.raises(ValueError, match="column 'rejected', row 1 of the given data set: the value is None"):
            flip_labels(rows, 0.1, "length")
        assert sum(flip_labels(rows, 0.4)[IS_FLIPPED]) == 1


class TestColumns:
    @staticmethod
    def swapped(rows: Dataset, **options: Any) -> set[str]:
        """Columns that have changed where every second label is flipped."""
        noisy = flip_labels(rows, 0.5, **options)
        return {name for name in rows.column_names if noisy[name][:] != rows[name][:]}

    def rows(self, **columns: list[Any]) -> Dataset:
        sides = {"chosen": ["a", "b"], "rejected": ["c", "d"]}
        return Dataset.from_dict({**sides, **columns})

    def test_a_gap_stays(self):
        rows = self.rows(margin=[1.0, 2.0], n_chosen=[1, 2], n_rejected=[3, 4])
        assert self.swapped(rows) == {"chosen", "rejected", "n_chosen", "n_rejected"}

    def test_only_what_a_trainer_reads_is_a_score(self):
        names = ("score_chosen", "score_rejected", "chosen_reward", "rejected_reward")
        rows = self.rows(**{name: [float(i), i + 0.5] for i, name in enumerate(names)})
        assert self.swapped(rows) == {"chosen", "rejected", *names[2:]}
        assert self.swapped(rows, score_columns=names[2:]) == {"chosen", "rejected", *names[:2]}
        # a gap may be called like one side of a pair
        for gap in names[:2]:
            assert self.swapped(rows, score_columns=[gap]) == {"chosen", "rejected", *names[2:]}

    def test_a_side_alone_stays_and_is_named(self, caplog):
        with caplog.at_level(logging.WARNING):
            flip_labels(rich_rows(), 0.2)
        assert not caplog.text
        with caplog.at_level(logging.WARNING):
            assert self.swapped(self.rows(chosen_model=["x", "y"], noteRejected=["", "z"])) == {"chosen", "rejected"}
        assert "['chosen_model', 'noteRejected']: no column of the other side" in caplog.text

    def test_other_types_cannot_swap(self):
        rows = self.rows(n_chosen=[1, 2], n_rejected=[0.5, 0.25])
        with pytest.raises(ValueError, match=r"'n_chosen' and 'n_rejected' cannot swap.*int64.*float64.*cast_column"):
            flip_labels(rows, 0.5)
        cast = rows.cast_column("n_chosen", Value("float64"))
        assert self.swapped(cast) == {"chosen", "rejected", "n_chosen", "n_rejected"}

    @pytest.mark.parametrize("metric", ["bertscore_precision", "bertscore_recall"])
    def test_half_of_bertscore(self, metric):
        with pytest.raises(
            ValueError, match=rf"column '{metric}'.*flip the labels first, then add evaluation factors"
        ):
            flip_labels(self.rows(**{metric: [0.1, 0.2]}), 0.5)

    @pytest.mark.parametrize("kind", ["numpy", "torch", "arrow"])
    def test_a_format_stays(self, kind):
        rows = rich_rows()
        noisy = flip_labels(rows.with_format(kind, columns=["chosen_model", "score_chosen"]), 0.2)
        assert noisy.format["type"] == kind
        assert sorted(noisy.format["columns"]) == ["chosen_model", IS_FLIPPED, "score_chosen"]
        assert noisy.with_format(None).to_list() == flip_labels(rows, 0.2).to_list()

    def test_a_selection(self):
        """Whose rows are not where the table has them."""
        rows = rich_rows()
        some = rows.select(range(N - 1, 0, -2))
        assert flip_labels(some, 0.4).to_list() == flip_labels(Dataset.from_list(some.to_list()), 0.4).to_list()

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_empty_set(self, kind):
        noisy = flip_labels(preference_rows(3).select([]), 0.5, kind)
        assert len(noisy) == 0
        assert noisy.features[IS_FLIPPED] == Value("bool")


class TestRefused:
    @pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan"), "0.2", None, True])
    def test_rates(self, rate):
        with pytest.raises(ValueError, match="at least 0 and below 1, got"):
            flip_labels(preference_rows(4), rate)

    def test_the_rest(self):
        rows = preference_rows(4)
        with pytest.raises(ValueError, match="unknown kind of noise 'short'; known: random, length"):
            flip_labels(rows, 0.2, "short")
        with pytest.raises(ValueError, match=r"has no column rejected, only \['prompt', 'chosen'"):
            flip_labels(rows.remove_columns("rejected"), 0.2)
        with pytest.raises(ValueError, match="has a column 'is_flipped' already"):
            flip_labels(flip_labels(rows, 0.2), 0.2)
        with pytest.raises(ValueError, match=r"score_columns names \['points'\]"):
            flip_labels(rows, 0.2, score_columns=["points"])
        with pytest.raises(TypeError, match="one split that is not streamed, got DatasetDict"):
            flip_labels(DatasetDict(train=rows), 0.2)
        with pytest.raises(TypeError, match="got IterableDataset"):
            flip_labels(rows.to_iterable_dataset(), 0.2)


class TestParse:
    @pytest.mark.parametrize(
        ("text", "noise"),
        [("random:0.2", ("random", 0.2)), ("length:.4", ("length", 0.4)), ("random:0", ("random", 0))],
    )
    def test_forms(self, text, noise):
        assert parse_noise(text) == noise

    @pytest.mark.parametrize(
        "text", ["", "random", "0.2", "random:", "random:x", "short:0.2", "length:1", "random:nan"]
    )
    def test_other_forms(self, text):
        with pytest.raises(ValueError, match=rf"KIND:RATE, for example random:0.2 or length:0.4, not '{text}': "):
            parse_noise(text)
