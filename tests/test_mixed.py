"""Several sets as one: every row keeps the prompt, completions and scores that its own set gives it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import load, preference_rows, quiet
from datasets import ClassLabel, Dataset, Features, Value
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from trl_margins import GapPOConfig, GapPOTrainer
from trl_margins.cli.mixture import mixture_splits
from trl_margins.rows import open_rows
from trl_margins.rows.form import COMPLETIONS
from trl_margins.rows.messages import text_of
from trl_margins.rows.mixed import Named, mixed
from trl_margins.rows.scores import ScoreError, find_score_columns


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
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


# By the columns that are named

WHOLE = {side: [{"role": "user", "content": "u"}, {"role": "assistant", "content": side}] for side in COMPLETIONS}
# the sets of a mixture by the columns that are asked for, and what is read: prompt, system message, gap
MIXTURES: dict[str, tuple[list[dict[str, Any]], Named, list[tuple[str, str | None, float]]]] = {
    "the prompt in a column of its own": (
        [{"question": "q", "margin": 1}, {"question": "p", "margin": 0.5, "more": 1}],
        Named("question"),
        [("q", None, 1.0), ("p", None, 0.5)],
    ),
    "in one set alone": (
        [{"question": "q", "margin": 1}, {"prompt": "p", "margin": 2}, {**WHOLE, "margin": 3}],
        Named("question"),
        [("q", None, 1.0), ("p", None, 2.0), ("u", None, 3.0)],
    ),
    "system messages": (
        [{"prompt": "q", "sys": "s", "margin": 1}, {"prompt": "p", "sys": "t", "margin": 0.5}],
        Named(system="sys"),
        [("q", "s", 1.0), ("p", "t", 0.5)],
    ),
    "system messages of one set": (
        [{"prompt": "q", "sys": "s", "margin": 1}, {"prompt": "p", "margin": 0.5}],
        Named(system="sys"),
        [("q", "s", 1.0), ("p", None, 0.5)],
    ),
    "system messages of two kinds": (
        [{"prompt": "q", "sys": "s"}, {"prompt": "p", "sys": [{"role": "system", "content": "t"}]}],
        Named(system="sys"),
        [("q", "s", 0.0), ("p", "t", 0.0)],
    ),
    "scores of two types": (
        [{"prompt": "q", "w": 3, "l": 1.5}, {"prompt": "p", "w": "3.5", "l": 1}],
        Named(scores=["w", "l"]),
        [("q", None, 1.5), ("p", None, 2.5)],
    ),
    "a gap of two types": (
        [{"prompt": "q", "w": 3}, {"prompt": "p", "w": "3.5"}],
        Named(scores=["w"]),
        [("q", None, 3.0), ("p", None, 3.5)],
    ),
}


def mixture_of(rows: list[dict[str, Any]], named: Named, folder: Path) -> Any:
    """Each row in a file of its own."""
    for i, row in enumerate(rows):
        (folder / f"{i}.jsonl").write_text(json.dumps({"chosen": "good", "rejected": "bad", **row}) + "\n")
    parts = [DatasetConfig(str(folder / f"{i}.jsonl")) for i in range(len(rows))]
    return mixture_splits(DatasetMixtureConfig(datasets=parts), named=named)["train"]


@pytest.mark.parametrize("which", MIXTURES)
def test_a_mixture_is_read_by_the_columns_that_are_named(which, tmp_path, caplog):
    rows, named, right = MIXTURES[which]
    with caplog.at_level(logging.WARNING, "trl_margins"):
        together = mixture_of(rows, named, tmp_path)
        opened = open_rows(together, "train", named.prompt, named.system)
    assert "is not used" not in caplog.text
    columns = find_score_columns(together.column_names, named.scores)
    found = []
    for row, raw in zip(opened, together, strict=True):
        messages = [says("user", row.prompt)] if isinstance(row.prompt, str) else row.prompt
        *system, asked = (message["content"] for message in messages)
        scores = columns.read(raw) if columns else (0.0, 0.0)
        found.append((asked, *(system or [None]), scores[0] - scores[1]))
    assert found == right


def test_a_mixture_keeps_content_in_parts(tmp_path):
    parts = [{"type": "text", "text": text} for text in ("a ", "b")]
    rows = [{"prompt": [says("user", parts)], **{side: [says("assistant", side)] for side in COMPLETIONS}}]
    together = mixture_of([*rows, {"prompt": "p", "margin": 1.0}], Named(), tmp_path)
    content = next(iter(open_rows(together, "train"))).prompt[0]["content"]
    assert (content, content.parts) == ("a b", parts)


@pytest.mark.parametrize(
    ("rows", "named", "said"),
    [
        (
            [{"question": "q"}] * 2,
            Named("questoin"),
            "prompt_column names 'questoin', which no set of the mixture has",
        ),
        ([{"prompt": "q"}] * 2, Named(system="sys"), "system_column names 'sys', which no set of the mixture has"),
        ([{"question": "q"}, {"a": 1}], Named("question"), "prompt_column names 'question', which .*1.jsonl does not"),
        (
            [{"prompt": "q", "w": 1}, {"prompt": "p", "w": "n/a"}],
            Named(scores=["w"]),
            "row 0 of the .*1.jsonl.*'n/a' is",
        ),
        ([{"prompt": "q", "w": 1}, {"prompt": "p"}], Named(scores=["w"]), r"names \['w'\], but .*1.jsonl has only"),
    ],
)
def test_columns_that_a_mixture_does_not_have(rows, named, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        mixture_of(rows, named, tmp_path)


@pytest.mark.parametrize("named", [Named("question"), Named(system="sys")])
def test_a_column_that_the_files_of_one_entry_alone_have(named, tmp_path):
    row = {"chosen": "good", "rejected": "bad"}
    for name, more in {"a": {"prompt": "p"}, "b": {"question": "q", "prompt": "p", "sys": "s"}}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**row, **more}) + "\n")
    parts = [DatasetConfig("json", data_files=str(tmp_path / f"{name}.jsonl")) for name in "ab"]
    together = mixture_splits(DatasetMixtureConfig(datasets=parts), named=named)["train"]
    asked = [text_of(row.prompt) for row in open_rows(together, "train", named.prompt, named.system)]
    assert asked == (["p", "q"] if named.prompt else ["p", "s\np"])
