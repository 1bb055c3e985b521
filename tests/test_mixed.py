"""Several sets as one: every row keeps the prompt, completions and scores that its own set gives it."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import load, preference_rows, quiet
from datasets import ClassLabel, Dataset, Features, Value

from trl_margins import GapPOConfig, GapPOTrainer
from trl_margins.rows import open_rows
from trl_margins.rows.mixed import mixed
from trl_margins.rows.scores import ScoreError, find_score_columns


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TEXT = [{"prompt": f"-- {i}\n", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(3)]
TRANSCRIPTS = [{"chosen": f"Q: {i} A: yes", "rejected": f"Q: {i} A: no"} for i in range(3)]
CHATS = [
    {"prompt": [says("user", f"q {i}")], "chosen": [says("assistant", "yes")], "rejected": [says("assistant", "no")]}
    for i in range(3)
]
NAMED = [  # messages with a further key, and no prompt column
    {
        "chosen": [says("user", f"n {i}", name="me"), says("assistant", "yes", name=None)],
        "rejected": [says("user", f"n {i}", name="me"), says("assistant", "no", name=None)],
    }
    for i in range(3)
]


def scored(rows: list[dict[str, Any]], names: tuple[str, ...] = ("score_chosen", "score_rejected"), kind: Any = float):
    values = (5, 2) if len(names) == 2 else (3,)
    return Dataset.from_list([{**row, **dict(zip(names, map(kind, values), strict=True))} for row in rows])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (scored(TEXT), scored(TRANSCRIPTS)),
        (scored(TRANSCRIPTS), scored(TEXT)),
        (scored(CHATS), scored(TEXT)),
        (scored(CHATS), scored(NAMED)),
        (scored(CHATS), scored(CHATS, kind=int)),
        (scored(CHATS), scored(CHATS, ("rating_chosen", "rating_rejected"))),
        (scored(CHATS), scored(CHATS, kind=str)),
        (scored(CHATS), scored(CHATS, ("margin",))),
    ],
    ids=["text, transcripts", "transcripts, text", "chats, text", "further keys", "integers", "other names", "as text",
         "a gap"],
)  # fmt: skip
def test_each_row_is_read_by_its_own_set(first, second, tiny_model, tokenizer, tmp_path):
    together = mixed([("first", first), ("second", second)])
    expected = [row for each in (first, second) for row in open_rows(each, "alone")]
    assert list(open_rows(together, "together")) == expected
    columns = find_score_columns(together.column_names)
    gaps = [a - b for a, b in (map(float, columns.read(row)) for row in together)]
    assert gaps == [3.0] * 6
    trainer = GapPOTrainer(
        load(tiny_model),
        GapPOConfig(**quiet(output_dir=str(tmp_path), max_steps=1)),
        train_dataset=together,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[0]["weights/mean"] == 3.0
    assert len(trainer.train_dataset) == 6


def test_sets_with_the_same_columns_are_put_together_as_they_are():
    rows = preference_rows(4)
    together = mixed([("a", rows), ("b", rows)])
    assert together.features == rows.features
    assert together.to_list() == rows.to_list() * 2


@pytest.mark.parametrize("names", [("margin",), ("chosen_rating", "rejected_rating")])
def test_scores_in_the_same_columns_stay_there(names, caplog):
    """There is one place for them, whatever else the sets differ in."""
    given = {name: float(i + 3) for i, name in enumerate(names)}
    sets = [("a", Dataset.from_list([{**row, **given} for row in TEXT]))]
    sets += [("b", Dataset.from_list([{**row, **given, "source": "x"} for row in CHATS]))]
    together = mixed(sets)
    assert {*together.column_names} == {"prompt", "chosen", "rejected", *names}
    assert together.select_columns([*names]).to_list() == [given] * (len(TEXT) + len(CHATS))
    other = {"score_chosen": 2.0, "score_rejected": 1.0}
    together = mixed([*sets, ("c", Dataset.from_list([{**row, **other} for row in TEXT]))])
    assert {*together.column_names} == {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}


def test_what_not_all_sets_have_is_said(caplog):
    caplog.set_level("INFO", "trl_margins")
    other = Dataset.from_list([{**row, "source": "x"} for row in TEXT])
    together = mixed([("with scores", scored(CHATS)), ("without", other)])
    assert set(together.column_names) == {"prompt", "chosen", "rejected"}
    assert "no scores in without, so those of the other sets are left out" in caplog.text
    assert "are left out: source" in caplog.text


def test_a_set_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="column 'chosen', row 1 of the broken data set: the value is None"):
        mixed([("fine", scored(CHATS)), ("broken", Dataset.from_list([TEXT[0], {**TEXT[1], "chosen": None}]))])
    labels = Dataset.from_list(
        [{**row, "score_chosen": 1, "score_rejected": 0} for row in TEXT],
        features=Features(
            {
                **{name: Value("string") for name in TEXT[0]},
                "score_chosen": ClassLabel(names=["bad", "good"]),
                "score_rejected": ClassLabel(names=["bad", "good"]),
            }
        ),
    )
    with pytest.raises(ScoreError, match="column 'score_chosen' of the labelled data set holds class labels"):
        mixed([("fine", scored(CHATS)), ("labelled", labels)])


def test_flags_are_no_scores_beside_those_of_another_set():
    scored = preference_rows(3)
    flagged = Dataset.from_list([{**row, "score_chosen": True} for row in scored])
    with pytest.raises(ScoreError, match="column 'score_chosen', row 0 of the b data set: the score True"):
        mixed([("a", scored), ("b", flagged)])
