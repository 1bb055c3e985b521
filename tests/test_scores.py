"""Score columns: found by name, refused with column, row, value and fix."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import load, preference_rows, quiet
from datasets import Dataset

from trl_margins import MarginCPOConfig, MarginCPOTrainer, Term
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.pairs import CARRIED, ROW, SHARED
from trl_margins.rows.scores import (
    GAP_COLUMNS,
    LARGEST_FLOAT,
    PAIRED_COLUMNS,
    ScoreColumns,
    ScoreError,
    as_number,
    check_numbers,
    check_scores,
    find_score_columns,
    problem_of,
    report_scores,
    require_score_columns,
    spread,
)
from trl_margins.trainers.collator import PairCollator


@pytest.mark.parametrize("pair", PAIRED_COLUMNS)
def test_known_pairs_are_found(pair):
    assert find_score_columns(["prompt", "chosen", *reversed(pair)]) == ScoreColumns(*pair)


@pytest.mark.parametrize("gap", GAP_COLUMNS)
def test_known_gaps_are_found(gap):
    assert find_score_columns(["prompt", gap]) == ScoreColumns(gap)


def test_the_first_known_pair_wins():
    names = ["margin", "chosen-rating", "rejected-rating", "score_rejected", "score_chosen"]
    assert find_score_columns(names) == ScoreColumns("score_chosen", "score_rejected")
    assert find_score_columns(["chosen_score", "prompt"]) is None


def test_given_columns():
    assert find_score_columns(["a", "b", "margin"], ["b", "a"]) == ScoreColumns("b", "a")
    assert find_score_columns(["a", "b"], ["a"]) == ScoreColumns("a")
    with pytest.raises(ScoreError, match=r"names \['c'\].*only the columns \['a', 'b'\]"):
        find_score_columns(["a", "b"], ["a", "c"])
    with pytest.raises(ScoreError, match="one gap column or two"):
        find_score_columns(["a", "b", "c"], ["a", "b", "c"])
    with pytest.raises(ScoreError, match="'a' twice"):
        find_score_columns(["a", "b"], ["a", "a"])


def test_required_columns_name_what_there_is():
    with pytest.raises(ScoreError, match=r"eval data set has none: its columns are \['text'\].*margin"):
        require_score_columns(["text"], None, "'score-gap'", "eval")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            [1.0, None, 2.0],
            r"column 'score_chosen', row 1 of the train data set: the score None is None: drop the row",
        ),
        ([1.0, 2.0, float("nan")], r"row 2 .* the score nan is NaN: drop the row"),
        ([float("inf"), 2.0, float("-inf")], r"row 0 .* the score inf is infinite.*\(2 such rows in all\)"),
        (["4.5", "3", "high"], r"row 2 .* the score 'high' is not a number: replace such words by numbers"),
        ([True, False, True], r"row 0 .* the score True is not a number"),
    ],
)
def test_bad_scores(values, complaint):
    dataset = Dataset.from_dict({"score_chosen": values, "score_rejected": [0.0] * 3})
    with pytest.raises(ScoreError, match=complaint):
        check_scores(dataset, ScoreColumns("score_chosen", "score_rejected"), "train")


def test_rows_are_counted_as_the_data_set_shows_them():
    """Also after a selection, whose rows are not where the file has them."""
    dataset = Dataset.from_dict({"score_chosen": [1.0, None, 3.0, 5.0], "score_rejected": [1, 2, 4, 1]})
    columns = ScoreColumns("score_chosen", "score_rejected")
    with pytest.raises(ScoreError, match="row 2 of the train"):
        check_scores(dataset.select([3, 2, 1]), columns, "train")
    summary = check_scores(dataset.select([0, 2, 3]), columns, "train", min_score_gap=2.0)
    assert (summary.n_pairs, summary.n_ties, summary.n_reversed, summary.n_at_least) == (3, 1, 1, 1)
    assert summary.max_gap == 4.0


def test_an_empty_set_has_nothing_wrong():
    dataset = Dataset.from_dict({"margin": []})
    assert check_scores(dataset, ScoreColumns("margin"), "train").n_pairs == 0


def test_ties_do_not_matter_without_weights(caplog):
    dataset = Dataset.from_dict({"margin": [0.0, 0.0]})
    summary = check_scores(dataset, ScoreColumns("margin"), "train")
    with caplog.at_level(logging.DEBUG, "trl_margins"):
        report_scores(summary, ScoreColumns("margin"), "train")
    assert "2 ties," in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("reversed_pairs", "ties", "warns"), [(1, 0, False), (2, 0, False), (3, 0, True), (1, 3, True)]
)
def test_most_pairs_reversed(reversed_pairs, ties, warns, caplog):
    """Of four pairs: more than half of those that are no ties."""
    gaps = [-1.0] * reversed_pairs + [0.0] * ties
    gaps += [1.0] * (4 - len(gaps))
    summary = check_scores(Dataset.from_list([{"margin": gap} for gap in gaps]), ScoreColumns("margin"), "train")
    assert (summary.n_ties, summary.n_reversed, summary.max_gap) == (ties, reversed_pairs, 1.0)
    report_scores(summary, ScoreColumns("margin"), "train")
    assert ("the rejected completion scores higher" in caplog.text) == warns


def test_pairs_at_the_least_gap_count():
    rows = Dataset.from_list([{"margin": gap} for gap in (1.999, 2.0, 2.001, -2.0)])
    assert check_scores(rows, ScoreColumns("margin"), "eval", min_score_gap=2.0).n_at_least == 3


def test_the_largest_numbers():
    """A score of a million is one; a number of a term is one up to float32's largest."""
    assert problem_of(1e6) is None
    assert problem_of(-1e6) is None
    assert "too large" in str(problem_of(math.nextafter(1e6, math.inf)))
    check_numbers(Dataset.from_dict({"x": [LARGEST_FLOAT, 0.0]}), "x", "train", least=0.0)
    with pytest.raises(ScoreError, match="is not a float32 number"):
        check_numbers(Dataset.from_dict({"x": [3.5e38]}), "x", "train")
    with pytest.raises(ScoreError, match="is below 0"):
        check_numbers(Dataset.from_dict({"x": [-1e-9]}), "x", "train", least=0.0)


def test_a_list_counts_by_its_extremes():
    columns = ScoreColumns("margin")
    assert columns.read({"margin": [2.0, "5", 1.0, 3.0]}) == (5.0, 1.0)
    assert columns.is_gap([0.0, 0.0])
    assert not columns.is_gap([0.0, 1.0])
    assert not ScoreColumns("a", "b").is_gap([0.0, 0.0])
    summary = check_scores(Dataset.from_dict({"margin": [[2.0, 5.0, 1.0], [1.0, 1.0, 1.0]]}), columns, "train")
    assert (summary.max_gap, summary.n_ties) == (4.0, 1)
    with pytest.raises(ScoreError, match=r"column 'margin', row 1 .* the score \[2.0\] is not a number"):
        check_scores(Dataset.from_dict({"margin": [[2.0, 5.0], [2.0]]}), columns, "train")


def test_gaps_are_counted_in_double_precision():
    rows = Dataset.from_dict({"score_chosen": [1e6], "score_rejected": [1e6 - 1e-3]})
    assert check_scores(rows, ScoreColumns("score_chosen", "score_rejected"), "train").n_ties == 0


@pytest.mark.parametrize("text", ["٣", "1_0", "0x1", "1e", "nan", "inf", "", ".", "1.2.3", "1,5"])
def test_what_only_looks_like_a_number(text):
    assert as_number(text) == text
    assert problem_of(text) is not None


class TestCollator:
    @staticmethod
    def inner(rows):
        return {"n": torch.tensor(len(rows))}

    def test_carries_scores_under_one_key(self):
        rows = [{"chosen-rating": 5, "rejected-rating": 3.5}, {"chosen-rating": 2, "rejected-rating": 4}]
        batch = PairCollator(self.inner)(rows)
        assert batch["n"] == 2
        assert batch[CARRIED]["score_chosen"].tolist() == [5.0, 2.0]
        assert batch[CARRIED]["score_rejected"].tolist() == [3.5, 4.0]

    def test_a_gap_column_is_a_gap(self):
        batch = PairCollator(self.inner)([{"margin": 1.5}])
        assert (batch[CARRIED]["score_chosen"] - batch[CARRIED]["score_rejected"]).tolist() == [1.5]

    def test_rows_without_scores_pass(self):
        assert CARRIED not in PairCollator(self.inner)([{"prompt": "x"}])

    def test_a_stream_is_checked_as_it_comes(self):
        with pytest.raises(ScoreError, match="column 'margin', pair 1 of a batch: the score nan"):
            PairCollator(self.inner)([{"margin": 1.0}, {"margin": float("nan")}])

    def test_the_first_row_says_which_columns_there_are(self):
        with pytest.raises(ScoreError, match=r"'margin', pair 1 of a batch"):
            PairCollator(self.inner)([{"margin": 1.0}, {"prompt": "x"}])
        assert CARRIED not in PairCollator(self.inner)([{"prompt": "x"}, {"margin": 1.0}])

    def test_what_is_no_score_is_nan_where_no_term_reads_it(self):
        """None, words, NaN, infinity, and a number beyond what the check lets through."""
        values = [3.0, None, "good", math.nan, math.inf, 1e6, 1.1e6, True]
        rows = [{"score_chosen": value, "score_rejected": 1.0} for value in values]
        carried = PairCollator(self.inner, strict=False)(rows)[CARRIED]
        chosen = carried["score_chosen"]
        assert chosen.dtype == torch.float32
        assert [None if math.isnan(value) else value for value in chosen.tolist()] == [
            3.0,
            *[None] * 4,
            1e6,
            None,
            None,
        ]
        assert carried["score_rejected"].tolist() == [1.0] * len(values)

    def test_further_columns(self):
        """Numbers as text; row numbers stay whole numbers; a column that only some rows have is left out."""
        rows = [{"margin": "0.5", "weight": 1, ROW: 2**24 + 1, "flag": True}, {"margin": 2.0, "weight": 0, ROW: 7}]
        collator = PairCollator(self.inner, columns=("margin",), if_there=("weight", ROW, "flag", "absent"))
        carried = collator(rows)[CARRIED]
        assert carried.keys() == {"margin", "weight", ROW}  # of the gap columns, the objective reads this one itself
        assert carried["margin"].tolist() == [0.5, 2.0]
        assert carried["weight"].tolist() == [1.0, 0.0]
        assert carried["weight"].dtype == carried["margin"].dtype == torch.float32
        assert (carried[ROW].tolist(), carried[ROW].dtype) == ([2**24 + 1, 7], torch.long)
        named = PairCollator(self.inner, score_columns=("margin",), columns=("margin",))(rows)[CARRIED]
        assert named["score_chosen"].tolist() == [0.5, 2.0]
        with pytest.raises(
            ValueError, match=r"the objective reads \['margin'\], which these rows do not have.*"
        ) as error:
            collator([{"weight": 1.0, "a": 2}, rows[0]])
        assert str(error.value).endswith("or is given as eval_dataset. The rows have ['a', 'weight']")

    def test_what_else_a_batch_gets(self):
        """The model's limits look at it first; the layout of shared prompts comes last."""
        looked = []
        limits = SimpleNamespace(check_batch=lambda batch, rows: looked.append((batch, rows)))
        rows = [{"margin": 1.0}, {"margin": 2.0}]
        batch = PairCollator(self.inner, limits=limits)(rows)
        assert looked == [({"n": torch.tensor(2)}, rows)]
        assert SHARED not in batch
        ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
        standard = ids, torch.ones_like(ids), torch.tensor([[-100, 6, 7], [-100, 6, 8]])
        given = []
        shared = PairCollator(self.inner, standard_rows=lambda batch: given.append(batch) or standard, width_step=8)(
            rows
        )
        assert given[0].keys() == {"n", CARRIED}
        assert list(shared) == ["n", CARRIED, SHARED]
        assert shared[SHARED]["of_rows"].shape == (5, 1, 8)
        narrow = PairCollator(self.inner, standard_rows=lambda batch: standard)(rows)
        assert narrow[SHARED]["of_rows"].shape == (5, 1, 5)  # a shared token, and two of each completion
        assert SHARED not in PairCollator(self.inner, standard_rows=lambda batch: None)(rows)


class Difficulty(Term):
    name, columns = "difficulty", ("difficulty",)

    def __call__(self, view):
        return view["difficulty"]


def test_a_missing_column_of_a_term_of_ones_own(tiny_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"'difficulty' needs the columns \['difficulty'\], and the eval data set"):
        MarginCPOTrainer(
            load(tiny_model),
            MarginCPOConfig(**quiet(output_dir=str(tmp_path), loss_type="simpo")),
            train_dataset=preference_rows(4).add_column("difficulty", [1.0, 2.0, 3.0, 4.0]),
            eval_dataset=preference_rows(4),
            processing_class=tokenizer,
            weight_term=Difficulty(),
        )


def test_a_target_margin_that_amapo_does_not_use_is_named(tmp_path, caplog):
    MarginCPOConfig(**quiet(output_dir=str(tmp_path), loss_type="simpo", margin="amapo", simpo_gamma=0.5))
    assert "margin 'amapo' makes its own margins" in caplog.text


@pytest.mark.parametrize("alone", ["score_chosen", "score_rejected"])
def test_half_of_a_known_pair(alone, caplog):
    """A flag that is given twice leaves its last value; it is said once."""
    with caplog.at_level(logging.WARNING, "trl_margins"):
        dataset = Dataset.from_list([{"prompt": "q ", "chosen": "a", "rejected": "b", alone: 2.0}])
        evaluation_set(dataset, "rows", score_columns=[alone])
        assert not caplog.text
        other = {"score_chosen": "score_rejected", "score_rejected": "score_chosen"}[alone]
        found = evaluation_set(dataset.add_column(other, [1.0]), "rows", score_columns=[alone])
    assert found.scores == [[2.0, 0.0]]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"rows: score_columns names {alone!r} alone, which is read as the gap")
    assert "--score_columns score_chosen score_rejected" in record.getMessage()


def test_gaps_that_float32_changes(caplog):
    """As NumPy has them; of a column of gaps there is nothing to lose."""
    chosen, rejected = [1e6, 1e6, 4.5, 2.0, 1523.00001], [1e6 - 0.01, 1e6 - 5, 4.4, 2.0, 1523.0]
    rows = Dataset.from_dict({"a": chosen, "b": rejected, "margin": [1e-9] * 5})
    columns = ScoreColumns("a", "b")
    summary = check_scores(rows, columns, "train")
    assert (summary.n_changed, summary.n_ties) == (2, 1)
    report_scores(summary, columns, "train")
    assert caplog.messages == [
        "train: score gaps: 2 are another by more than 1 % in float32, in which training has the scores (a/b), as "
        "these are large beside them: subtract the same number from both scores of a pair"
    ]
    assert check_scores(rows, ScoreColumns("margin"), "train").n_changed == 0


def test_a_list_of_scores_with_something_else_in_it():
    """Of a row with several answers; the value is named, and not Python's comparison with it."""
    for bad, said in ((None, "None"), ("good", "'good'"), (float("nan"), "nan")):
        rows = Dataset.from_dict({"margin": [[1.0, 2.0], [1.0, 3.0]]}).to_list()
        assert spread([1.0, 3.0, 2.0]) == 2.0
        assert spread(rows[0]["margin"]) == 1.0
        found = spread([1.0, bad, 3.0])
        assert repr(found) == said
    assert spread([]) is None
