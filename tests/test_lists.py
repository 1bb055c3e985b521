"""Scored lists in the forms of the Hub: what each row says, what is left out, and what is refused."""

from __future__ import annotations

import csv
import json
import logging
import re
from typing import Any

import numpy as np
import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from trl_margins.cli import main
from trl_margins.data.loading import load_splits
from trl_margins.data.splits import generalization_splits
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.rows import RowError, open_rows
from trl_margins.rows.answers import ScoredList
from trl_margins.rows.list_forms import is_rank
from trl_margins.rows.lists import ScoredLists
from trl_margins.rows.prompts import open_prompts
from trl_margins.rows.ratings import ASPECTS
from trl_margins.rows.scores import find_score_columns
from trl_margins.rows.turns import chat_turns
from trl_margins.rows.votes import of_strength


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def rated(text: str | None, ratings: Any, **more: Any) -> dict[str, Any]:
    """An answer of UltraFeedback; ratings in the order of `ASPECTS`."""
    annotations = {
        name: {"Rating": rating, "Rationale": "since", "Type": ["1"], "Rationale For Rating": "so"}
        for name, rating in zip(ASPECTS, ratings, strict=True)
    }
    return {
        "principle": "honesty",
        "custom_system_prompt": "Be honest.",
        "response": text,
        "annotations": annotations,
    } | more


ULTRAFEEDBACK = [
    {
        "source": "flan",
        "instruction": "Name a colour.",
        "models": ["falcon", "gpt", "bard"],
        "completions": [
            rated("Blue.", ["5", "5", "4", "4"], overall_score=8.5, model="falcon", **{"fine-grained_score": 4.5}),
            rated("A dog.", ["1", "N/A", "2", "3"], overall_score=2.0, model="gpt", **{"fine-grained_score": 2.0}),
            rated("Grün ☘", ["N/A"] * 4, overall_score=None, model="bard", **{"fine-grained_score": None}),
        ],
        "correct_answers": ["None"],
    },
    {"source": "x", "instruction": "Nothing?", "models": [], "completions": [], "correct_answers": ["None"]},
]
NECTAR = [
    {
        "prompt": "\n\nHuman: Name a colour. \n\nAssistant: Which? \n\nHuman: Any. \n\nAssistant: ",
        "answers": [
            {"answer": "Blue.", "model": "gpt-4", "rank": 1.0},
            {"answer": "Sky.", "model": "llama-2-7b", "rank": 3.0},
            {"answer": "Red!", "model": "anthropic", "rank": 2.0},
        ],
        "turns": 2,
        "num_responses": 3,
        "source": ["sharegpt"],
        "good_natured": True,
    }
]
MULTI_TURN = "Name a colour.\n<extra_id_1>Assistant\nWhich?\n<extra_id_1>User\nAny."
HELPSTEER2 = [
    {
        "prompt": MULTI_TURN,
        "response": "Blue.",
        "helpfulness": 4,
        "correctness": 4,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 0,
    },
    {
        "prompt": MULTI_TURN,
        "response": "A dog.",
        "helpfulness": 0,
        "correctness": 1,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 1,
    },
]
SHP = [
    {
        "post_id": "p1",
        "domain": "askbaking_train",
        "upvote_ratio": 0.9,
        "history": "Why is my bread flat?",
        "c_root_id_A": a,
        "c_root_id_B": b,
        "created_at_utc_A": 1,
        "created_at_utc_B": 2,
        "score_A": scores[0],
        "score_B": scores[1],
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": int(scores[0] > scores[1]),
        "seconds_difference": 1.0,
        "score_ratio": 2.0,
    }
    for a, b, scores in (("Old yeast.", "Cold water.", (30, 12)), ("No idea.", "Old yeast.", (4, 30)))
]
SIDES = ("conversation_a", "conversation_b")
ARENA = [
    {
        "question_id": str(i),
        "model_a": "vicuna",
        "model_b": "alpaca",
        "winner": winner,
        "judge": f"arena_user_{i}",
        "conversation_a": [user(f"Name a colour {i}."), bot("Blue.")],
        "conversation_b": [user(f"Name a colour {i}."), bot("A dog.")],
        "turn": 1,
        "language": "English",
    }
    for i, winner in enumerate(("model_a", "model_b", "tie", "tie (bothbad)"))
]
KAGGLE = [
    {
        "id": 1,
        "model_a": "gpt-4",
        "model_b": "koala",
        "prompt": '["Name a \\ud83d\\ude00 colour"]',
        "response_a": '["Blue \\ud83d"]',
        "response_b": '["A dog."]',
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    }
]
ARMORM = [
    {
        "prompt_id": "0",
        "prompt": "Name a colour.",
        "all_generated_responses": ["Sky.", "Blue.", "A dog."],
        "all_rm_scores": [0.12, 0.17, 0.05],
        "chosen": [user("Name a colour."), bot("Blue.")],
        "rejected": [user("Name a colour."), bot("A dog.")],
    }
]


def read(rows: Any, **options: Any) -> list[ScoredList]:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return list(ScoredLists.of(dataset, "the lists", **options))


def as_tuples(lists: list[ScoredList]) -> list[tuple[Any, set[tuple[Any, ...]]]]:
    """Prompt and answers with score and model, in any order."""
    return [
        (each.prompt, {(str(r), s, m) for r, s, m in zip(each.responses, each.scores, each.models, strict=True)})
        for each in lists
    ]


FORMS = {
    "openbmb/UltraFeedback": (
        ULTRAFEEDBACK,
        {},
        [("Name a colour.", {("Blue.", 8.5, "falcon"), ("A dog.", 2.0, "gpt")})],
    ),
    "openbmb/UltraFeedback, fine-grained": (
        ULTRAFEEDBACK,
        {"score_columns": ["fine-grained_score"]},
        [("Name a colour.", {("Blue.", 4.5, "falcon"), ("A dog.", 2.0, "gpt")})],
    ),
    "openbmb/UltraFeedback, mean of the aspects": (
        ULTRAFEEDBACK,
        {"score_columns": list(ASPECTS)},
        [("Name a colour.", {("Blue.", 4.5, "falcon"), ("A dog.", 2.0, "gpt")})],
    ),
    "openbmb/UltraFeedback, one aspect": (
        ULTRAFEEDBACK,
        {"score_columns": ["honesty"]},
        [("Name a colour.", {("Blue.", 5.0, "falcon")})],
    ),
    "berkeley-nest/Nectar": (
        NECTAR,
        {},
        [(NECTAR[0]["prompt"], {("Blue.", -1.0, "gpt-4"), ("Red!", -2.0, "anthropic"), ("Sky.", -3.0, "llama-2-7b")})],
    ),
    "nvidia/HelpSteer2": (HELPSTEER2, {}, [(MULTI_TURN, {("Blue.", 4.0, None), ("A dog.", 0.0, None)})]),
    "nvidia/HelpSteer2, mean of two": (
        HELPSTEER2,
        {"score_columns": ["correctness", "verbosity"]},
        [(MULTI_TURN, {("Blue.", 2.0, None), ("A dog.", 1.0, None)})],
    ),
    "stanfordnlp/SHP": (
        SHP,
        {},
        [("Why is my bread flat?", {("Old yeast.", 30, None), ("Cold water.", 12, None), ("No idea.", 4, None)})],
    ),
    "lmsys/chatbot_arena_conversations": (
        ARENA,
        {},
        [
            ([user(f"Name a colour {i}.")], {(str([bot("Blue.")]), a, "vicuna"), (str([bot("A dog.")]), b, "alpaca")})
            for i, (a, b) in enumerate(((1, 0), (0, 1), (0.5, 0.5), (0, 0)))
        ],
    ),
    "lmsys/lmsys-arena-human-preference-55k": (
        KAGGLE,
        {},
        [([user("Name a 😀 colour")], {(str([bot("Blue ?")]), 0, "gpt-4"), (str([bot("A dog.")]), 1, "koala")})],
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        [{"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}],
        {},
        [("q", {("a", 0.0, None), ("b", 1.0, None)})],
    ),
    "PKU-Alignment/PKU-SafeRLHF, the safer": (
        [{"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}],
        {"score_columns": ["safer_response_id"]},
        [("q", {("a", 1.0, None), ("b", 0.0, None)})],
    ),
    "scores beside a safer answer": (
        [{"prompt": "q", "response_0": "a", "response_1": "b", "score_0": 3, "score_1": 7, "safer_response_id": 0}],
        {},
        [("q", {("a", 3.0, None), ("b", 7.0, None)})],
    ),
    "nvidia/HelpSteer2, preferences": (
        [
            {"split": "train", "prompt": f"q{s}", "response_1": "a", "response_2": "b", "preference_strength": s}
            for s in (-2, 0, 3)
        ],
        {},
        [(f"q{s}", {("a", float(max(-s, 0)), None), ("b", float(max(s, 0)), None)}) for s in (-2, 0, 3)],
    ),
    "princeton-nlp/llama3-ultrafeedback-armorm": (
        ARMORM,
        {},
        [("Name a colour.", {("Sky.", 0.12, None), ("Blue.", 0.17, None), ("A dog.", 0.05, None)})],
    ),
    "distilabel's": (
        [{"instruction": "q", "generations": ["a", "b"], "ratings": [4.0, None], "generation_models": ["x", "y"]}],
        {},
        [("q", {("a", 4.0, "x")})],
    ),
    "one answer a row": (
        [
            {"question": "q", "answer": "a", "rating": "3", "model": "x"},
            {"question": "p", "answer": "b", "rating": "1", "model": "x"},
            {"question": "q", "answer": "c", "rating": " 4.5 ", "model": "y"},
            {"question": "q", "answer": "d", "rating": "N/A", "model": "y"},
        ],
        {},
        [("q", {("a", 3.0, "x"), ("c", 4.5, "y")}), ("p", {("b", 1.0, "x")})],
    ),
    "a part of the question again": (
        [{"instruction": "Translate: Hallo", "input": " Hallo", "generations": ["a"], "ratings": [1]}],
        {},
        [("Translate: Hallo", {("a", 1.0, None)})],
    ),
    "other names": (
        [{"ask": "q", "responses": ["a", "b"], "judge": ["2", 1.0]}],
        {"prompt_column": "ask", "score_columns": ["judge"]},
        [("q", {("a", 2.0, None), ("b", 1.0, None)})],
    ),
    "attributes of two answers": (
        [{**row, "helpfulness_A": 1, "helpfulness_B": 0} for row in SHP[:1]],
        {"score_columns": ["helpfulness"]},
        [("Why is my bread flat?", {("Old yeast.", 1.0, None), ("Cold water.", 0.0, None)})],
    ),
}


def dataset_of(name: str, rows: list[dict[str, Any]]) -> Dataset:
    if name == "other names":  # text and numbers in one list
        rows = [{**row, "judge": [str(value) for value in row["judge"]]} for row in rows]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_the_hub(name):
    rows, options, expected = FORMS[name]
    assert as_tuples(read(dataset_of(name, rows), **options)) == expected


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_as_pandas_writes_it(name, suffix, tmp_path):
    """Numpy arrays within rows as Parquet, and lists as text in CSV: all say the same."""
    rows, options, expected = FORMS[name]
    frame = dataset_of(name, rows).to_pandas()
    file = tmp_path / f"lists.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(file)
    elif suffix == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        pandas.DataFrame(rows if name != "other names" else dataset_of(name, rows).to_list()).to_csv(file, index=False)
    assert as_tuples(read(load_splits(str(file))["train"], **options)) == expected


def test_mappings_that_arrow_keeps_as_a_mapping_of_lists():
    """As `datasets` stored a sequence of mappings."""
    answers = NECTAR[0]["answers"]
    turned = [{**NECTAR[0], "answers": {key: [each[key] for each in answers] for key in answers[0]}}]
    assert read(turned) == read(NECTAR)
    turned[0]["answers"]["answer"].pop()
    n = len(answers)
    with pytest.raises(RowError, match=rf"column 'answers', row 0 .*: its lists .* \(answer {n - 1}, .* {n}\b.*drop"):
        read(turned)


def test_ratings_in_lower_case():
    """As some sets that were made from UltraFeedback write them."""
    answers = [
        {**each, "annotations": {name: {"rating": of["Rating"]} for name, of in each["annotations"].items()}}
        for each in ULTRAFEEDBACK[0]["completions"]
    ]
    assert read([{**ULTRAFEEDBACK[0], "completions": answers}]) == read(ULTRAFEEDBACK[:1])


def test_a_name_that_looks_like_another():
    rows = [{"prompt": "a", "re\u0455ponses": ["b", "c"], "scores": [1, 2]}]
    with pytest.raises(RowError, match=r"column 're\\u0455ponses' looks like 'responses', and is not, since"):
        read(rows)
    assert read([{"prompt": "a", "responses": ["b", "c"], "scores": [1, 2], "winner ": "x"}])[0].scores == [1.0, 2.0]


def test_a_mapping_of_lists_with_a_number_beside_them():
    turned = [
        {**row, **{name: {key: [m[key] for m in row[name]] for key in row[name][0]} | {"turns": 2} for name in SIDES}}
        for row in ARENA
    ]
    assert read(turned) == read(ARENA)


@pytest.mark.parametrize("written", [lambda n: {"score": n}, lambda n: {"rating": n}, lambda n: n])
def test_ratings_in_another_form(written):
    """As sets that were made from UltraFeedback have them: the number alone, or by another name."""
    answers = [{"response": text, "annotations": {"helpfulness": written(n)}} for text, n in (("so", 4), ("hm", 2))]
    (found,) = read([{"instruction": "why", "completions": answers}], score_columns=["helpfulness"])
    assert found.scores == [4.0, 2.0]


def test_what_a_message_says_is_the_same_with_other_notes():
    """Its id or its time makes no other prompt and no other answer; tool calls do."""
    asked = [{**user("why"), "id": str(i), "tool_calls": [] if i else None} for i in range(3)]
    rows = [{"prompt": [each], "response": "abc"[i], "score": i} for i, each in enumerate(asked)]
    assert [sorted(each.scores) for each in read(rows)] == [[0.0, 1.0, 2.0]]
    (found,) = read(
        [{"prompt": "why", "responses": [[{**bot("a"), "id": str(i)}] for i in range(2)], "scores": [1, 2]}]
    )
    assert found.distinct().scores == [1.5]
    calls = [[{**bot("a"), "tool_calls": [{"name": name}]}] for name in "fg"]
    (found,) = read([{"prompt": "why", "responses": calls, "scores": [1, 2]}])
    assert found.distinct().scores == [1.0, 2.0]


# Votes


@pytest.mark.parametrize(
    ("broken", "column"),
    [
        ({"response_a": '["Blue'}, "response_a"),  # cut
        ({"response_b": "A dog."}, "response_b"),
        ({"response_a": "[NaN]"}, "response_a"),
        ({"response_a": "[1]", "response_b": "[2]"}, "response_a"),
        ({"prompt": '[["a"]]', "response_a": '[["b"]]', "response_b": '[["c"]]'}, "prompt"),
    ],
)
def test_a_vote_on_what_is_no_list_of_turns(broken, column):
    """It would be read as text, brackets and all."""
    with pytest.raises(
        RowError, match=rf"column '{column}', row 1 of the lists: .* is not a list of texts, one a turn"
    ):
        read([KAGGLE[0], {**KAGGLE[0], **broken}])


@pytest.mark.parametrize("text", ["[1, 2, 3]", '["x"]', "[[1, 2], [3, 4]]", "[1] a source"])
def test_a_vote_on_texts_of_which_one_looks_like_a_list(text):
    plain = {**KAGGLE[0], "prompt": "Sort it.", "response_a": text, "response_b": "No."}
    assert sorted(read([plain])[0].responses) == sorted([text, "No."])


def test_a_line_break_within_the_text_of_a_vote():
    """JSON has none there, and who wrote the file did not escape it."""
    row = {**KAGGLE[0], "response_b": '["A\ndog."]'}
    assert [bot("A\ndog.")] in read([row])[0].responses


def test_the_same_vote_by_several_judges_is_one_list_and_other_pairs_are_others():
    """As in MT-bench: a mean of the votes on two answers; what won against another model is on another scale."""
    rows = [
        {**ARENA[0], "winner": winner, "judge": f"expert_{i}"}
        for i, winner in enumerate(("model_a", "model_a", "tie", "model_b"))
    ]
    swapped = {**ARENA[0], "winner": "model_b"}
    swapped |= {"model_a": "alpaca", "model_b": "vicuna"}
    swapped |= {"conversation_a": ARENA[0]["conversation_b"], "conversation_b": ARENA[0]["conversation_a"]}
    other = {**ARENA[0], "model_b": "koala", "conversation_b": [*ARENA[0]["conversation_b"][:1], bot("Sky.")]}
    lists = read([*rows, swapped, other])
    assert [dict(zip(each.models, each.scores, strict=True)) for each in lists] == [
        {"vicuna": 3.5 / 5, "alpaca": 1.5 / 5},
        {"vicuna": 1.0, "koala": 0.0},
    ]


def test_conversations_of_several_turns(caplog):
    """Judged on the first turn alone; with the first turns as prompt; parted before the last."""
    first = [user("one"), bot("same")]
    rows = [
        {
            **ARENA[0],
            "turn": 2,
            "conversation_a": [*first, user("two"), bot("a")],
            "conversation_b": [*first, user("two"), bot("b")],
        },
        {
            **ARENA[0],
            "turn": 1,
            "conversation_a": [user("one"), bot("a"), user("two"), bot("c")],
            "conversation_b": [user("one"), bot("b"), user("two"), bot("d")],
        },
        {
            **ARENA[0],
            "turn": 2,
            "conversation_a": [user("one"), bot("a"), user("two"), bot("c")],
            "conversation_b": [user("one"), bot("b"), user("two"), bot("d")],
        },
    ]
    caplog.set_level(logging.INFO, "trl_margins")
    lists = read(rows)
    assert [each.prompt for each in lists] == [[*first, user("two")], [user("one")]]
    assert {str(r) for each in lists for r in each.responses} == {str([bot("a")]), str([bot("b")])}
    assert "the lists: 1 conversations were left out, whose answers differ before the last turn" in caplog.text
    unanswered = {f"conversation_{side}": [user("one"), bot(side), user("two")] for side in "ab"}
    assert len(read([{**ARENA[0], "turn": 2, **unanswered}, *rows])) == 2
    assert "1 conversations were left out that end with a message of the user's" in caplog.text
    kaggle = {**KAGGLE[0], "prompt": ["one", "two"], "response_a": ["same", "a"], "response_b": ["same", "b"]}
    (each,) = read([kaggle])
    assert (each.prompt, len(each.responses)) == ([user("one"), bot("same"), user("two")], 2)
    with pytest.raises(RowError, match="row 0 of the lists: 2 turns of the user, and 1 and 2 of the answers, which"):
        read([{**kaggle, "response_a": json.dumps(["same"])}])
    in_arrays = {
        side: {key: [message[key] for message in ARENA[0][side]] for key in ("content", "role")}
        for side in ("conversation_a", "conversation_b")
    }
    assert read([{**ARENA[0], **in_arrays}])[0].responses == read([ARENA[0]])[0].responses


def test_the_newer_arena_has_content_in_parts_and_other_words():
    def parts(text: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": text, "image": None, "mimeType": None}]

    row = {
        "model_a": "x",
        "model_b": "y",
        "winner": "both_bad",
        "conversation_a": [{"role": "user", "content": parts("q")}, {"role": "assistant", "content": parts("a")}],
        "conversation_b": [{"role": "user", "content": parts("q")}, {"role": "assistant", "content": parts("b")}],
    }
    (each,) = read([row])
    assert each.scores == [0.0, 0.0]
    assert sorted(map(str, each.responses)) == [str([bot("a")]), str([bot("b")])]
    text = {**row, **{name: json.dumps([user("q"), bot(name)]) for name in ("conversation_a", "conversation_b")}}
    assert read([text])[0].prompt == [user("q")]


def test_a_winner_that_is_a_class_label_or_a_models_name():
    names = ClassLabel(names=["model_b", "model_a", "tie"])
    rows = Dataset.from_list([{**ARENA[0], "winner": 1}]).cast_column("winner", names)
    named = [{**ARENA[0], "winner": "Vicuna "}]
    assert read(rows) == read(named) == read(ARENA[:1])


# What is left out


def test_what_is_left_out_is_counted(caplog):
    rows = [
        {"prompt": "p", "responses": ["a", None, "c"], "scores": ["1", "2", None]},
        {"prompt": "", "responses": ["é", ""], "scores": ["N/A", "0"]},
        {"prompt": "q", "responses": ["x"], "scores": ["nan"]},
        {"prompt": "r", "responses": [], "scores": []},
    ]
    caplog.set_level(logging.INFO, "trl_margins")
    assert as_tuples(read(rows)) == [("p", {("a", 1.0, None)}), ("", {("", 0.0, None)})]
    assert "the lists: 1 answers are None, and were left out" in caplog.text
    assert "the lists: 3 answers have no score, and were left out" in caplog.text
    assert "the lists: 2 rows have no answer with a score, and were left out" in caplog.text


def test_ultrafeedbacks_tens_that_were_ones(caplog):
    """argilla's finding: a score of 1 was written as 10 where the annotations are low."""
    rows = [
        {
            "instruction": "q",
            "completions": [
                rated("bad", ["1", "1", "2", "N/A"], overall_score=10.0, model="a"),
                rated("good", ["5", "5", "5", "5"], overall_score=10.0, model="b"),
            ],
        }
    ]
    caplog.set_level(logging.INFO, "trl_margins")
    assert read(rows)[0].scores == [10.0, 10.0]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "1 answers have the overall_score 10 and a mean rating of at most 2" in warnings[0]
    # its advice works
    caplog.clear()
    advised = re.search(r"--score_columns ([\w ]+)", warnings[0])[1].split()
    assert read(rows, score_columns=advised)[0].scores == [4 / 3, 5.0]
    assert "overall_score" not in caplog.text


def test_distilabels_rows_without_ratings(caplog):
    """A judge that gave no answer leaves None for a whole list; so does a task that failed."""
    rows = [
        {"instruction": "p", "generations": ["a", "b"], "model_names": ["x", "y"], "ratings": [1, 5]},
        {"instruction": "q", "generations": ["a", "b"], "model_names": ["x", "y"], "ratings": None},
        {"instruction": "r", "generations": ["a", "b"], "model_names": ["x", "y"], "ratings": []},
        {"instruction": "s", "generations": None, "model_names": None, "ratings": [1, 5]},
        {"instruction": "t", "generations": ["a", "b"], "model_names": None, "ratings": [2, 4]},
    ]
    caplog.set_level(logging.INFO, "trl_margins")
    expected = [("p", {("a", 1.0, "x"), ("b", 5.0, "y")}), ("t", {("a", 2.0, None), ("b", 4.0, None)})]
    assert as_tuples(read(rows)) == expected
    assert "the lists: 4 answers have no score, and were left out" in caplog.text
    assert "the lists: 3 rows have no answer with a score, and were left out" in caplog.text


@pytest.mark.parametrize("name", ["rank", "ranks", "rankings", "Ranking", "human_rank", "mean-rank"])
def test_of_ranks_the_lowest_is_the_best(name, caplog):
    """SciPy's ranks of scores sort the answers as the scores do."""
    from scipy.stats import rankdata

    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, (12, 5)).astype(float)
    ranks = rankdata(-scores, axis=1)  # 1 is the best
    rows = [{"prompt": f"q{i}", "responses": list("abcde"), name: each.tolist()} for i, each in enumerate(ranks)]
    caplog.set_level(logging.INFO, "trl_margins")
    found = [each.scores for each in read(rows, score_columns=[name])]
    assert [rankdata(each).tolist() for each in found] == rankdata(scores, axis=1).tolist()
    assert "the lists: 60 scores are negative ranks: the lowest rank is the best" in caplog.text
    two = [
        {
            "prompt": row["prompt"],
            "response_a": "a",
            "response_b": "b",
            f"{name}_a": row[name][0],
            f"{name}_b": row[name][1],
        }
        for row in rows
    ]
    for each, (a, b) in zip(read(two, score_columns=[name]), scores[:, :2], strict=True):
        of = dict(zip(each.responses, each.scores, strict=True))
        assert np.sign(of["a"] - of["b"]) == np.sign(a - b)


@pytest.mark.parametrize("name", ["rank_score", "franking", "frank"])
def test_other_names_are_no_ranks(name):
    rows = [{"prompt": "q", "responses": ["a", "b"], name: [1, 2]}]
    assert read(rows, score_columns=[name])[0].scores == [1.0, 2.0]


def test_webgpts_question_is_a_mapping():
    """As in openai/webgpt_comparisons."""
    rows = [
        {
            "question": {"dataset": "eli5", "id": "1", "full_text": "Why?"},
            "quotes_0": {"title": ["t"], "extract": ["e"]},
            "answer_0": "Since.",
            "tokens_0": {"prefix": [1]},
            "score_0": -0.5,
            "quotes_1": {"title": ["t"], "extract": ["e"]},
            "answer_1": "Because.",
            "tokens_1": {"prefix": [1]},
            "score_1": 0.5,
        }
    ]
    expected = [("Why?", {("Since.", -0.5, None), ("Because.", 0.5, None)})]
    assert as_tuples(read(rows)) == expected
    assert as_tuples(read([{name: v if isinstance(v, float) else str(v) for name, v in rows[0].items()}])) == expected


# Parts of a prompt in other columns


@pytest.mark.parametrize("name", ["system", "system_prompt", "context"])
def test_columns_that_say_more_than_the_prompt(name, caplog):
    """The warning's advice works, and ends it."""
    lists = {"responses": ["a", "b"], "scores": [1, 2]}
    rows = [
        {"prompt": "q", name: None, **lists},
        {"prompt": "p", name: "Be brief.", **lists},
        {"prompt": "Be brief. r", name: "Be brief.", **lists},
    ]
    read(rows)
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith(f"the lists: column {name!r} is not used, and in 1 of 3 rows it holds text that the prompt")
    assert "(the first is row 1)" in said
    if name == "context":
        assert "add it to the prompt column, if it belongs there" in said
        return
    (advised,) = re.findall(r"--system_column (\w+)", said)
    caplog.clear()
    found = read(rows, system_column=advised)
    assert found[1].prompt == [{"role": "system", "content": "Be brief."}, user("p")]
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_alpacas_input_is_refused_unless_it_is_named(caplog):
    rows = [{"instruction": "Translate.", "input": "Hallo", "generations": ["a", "b"], "ratings": [1, 2]}]
    with pytest.raises(ValueError, match=r"prompt_column='instruction' \(--prompt_column instruction\)") as error:
        read(rows)
    (named,) = re.findall(r"--prompt_column (\w+)", str(error.value))
    assert read(rows, prompt_column=named)[0].prompt == "Translate."
    joined = [{**row, "whole": f"{row['instruction']}\n{row['input']}"} for row in rows]
    caplog.clear()
    assert read(joined, prompt_column="whole")[0].prompt == "Translate.\nHallo"
    assert not caplog.records


@pytest.mark.parametrize(
    ("instruction", "given"),
    [
        ("Translate: Hallo", " Hallo\n"),
        ("What is 3 squared?", 3.0),  # an integer, where other rows have none
        ("What is 3 squared?", "3.0"),
        ("What is 3.0 squared?", "3.0"),
        ("Sort 3, 1 and 2.", ["3", "1", "2"]),
        ("Sort 3, 1 and 2.", [3, 1, 2]),
        ("请把你好翻译成英文", "你好"),
        ("Explain the word _cat_.", "cat"),
        ("Category or cat?", "cat"),
        ("Sort 3,1,2.", [3, 1, 2]),
        ([user('Mend: "it\'s\nC:\\new"')], '"it\'s\nC:\\new"'),
        *[("Say hi.", nothing) for nothing in ("", " ", "\n", None, float("nan"), [])],
    ],
)
def test_alpacas_input_may_be_in_the_instruction(instruction, given):
    rows = [{"instruction": instruction, "input": given, "generations": ["a", "b"], "ratings": [1, 2]}]
    assert read(rows)[0].prompt == instruction


# Rows with equal prompts


def test_equal_prompts_are_one_list_for_everybody(tmp_path, capsys):
    """What pandas joins by prompt is what each reader sees."""
    rng = np.random.default_rng(1)
    rows = [
        {
            "prompt": f"q{i % 7}",
            "responses": [f"{i}.{j}" for j in range(3)],
            "scores": rng.normal(size=3).tolist(),
            "models": [f"m{i}"] * 3,
        }
        for i in range(20)
    ]
    frame = pandas.DataFrame(rows)
    joined = frame.groupby("prompt", sort=False)[["responses", "scores", "models"]].sum().reset_index()
    once = joined.to_dict("records")
    assert as_tuples(read(rows)) == as_tuples(read(once))
    two, one = (evaluation_set(Dataset.from_list(each), "here") for each in (rows, once))
    assert (two.rows, two.scores) == (one.rows, one.scores)
    assert len(two.rows) == 7
    Dataset.from_list(rows).to_json(tmp_path / "lists.jsonl")
    assert main(["inspect", str(tmp_path / "lists.jsonl")]) == 0
    assert re.search(r"train +20 +7 +60 ", capsys.readouterr().out)


def test_what_makes_prompts_different():
    """Tools and system messages belong to the question. Rows without a prompt have none in common."""
    lists = {"responses": ["a", "b"], "scores": [1, 2]}
    tools = [{"prompt": [user("q")], "tools": json.dumps([{"name": name}]), **lists} for name in "fgf"]
    assert [each.template["tools"][0]["name"] for each in read(tools)] == ["f", "g"]
    system = [{"prompt": "q", "system": text, **lists} for text in ("x", "y", "x")]
    assert len(read(system, system_column="system")) == 2
    assert len(read([{"prompt": "", **lists}] * 3)) == 3


def test_rows_that_are_there_twice_count_once():
    """As in files of shards that overlap."""
    rows = [{"prompt": f"q{i}", "responses": ["a", "b", "c"], "scores": [i, 2.0, 3.0]} for i in range(4)]
    once, twice = (evaluation_set(Dataset.from_list(each), "here") for each in (rows, rows + rows))
    assert (once.rows, once.scores) == (twice.rows, twice.scores)


# What is refused


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"text": "a"}],
            {},
            r"the lists: its columns are \['text'\], and lists have prompt, responses, scores, Ultra",
        ),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], {}, "so these are pairs already, which can be trained on"),
        ([{"prompt": "q", "responses": ["a"]}], {}, "the lists: there are answers but no scores, only the columns"),
        (
            [
                {"instruction": "Say hi.", "input": "", "generations": ["a"], "ratings": [1]},
                {"instruction": "Translate.", "input": "Hallo", "generations": ["a"], "ratings": [1]},
            ],
            {},
            "column 'input', row 1 of the lists: 'Hallo' is not part of the column 'instruction', which holds",
        ),
        (
            [{"instruction": "Double it.", "input": 4, "generations": ["a"], "ratings": [1]}],
            {},
            "column 'input', row 0 of the lists: 4 is not part of the column 'instruction'",
        ),
        *(
            (
                [{"instruction": "Double it.", "input": nothing, "generations": ["a"], "ratings": [1]}],
                {},
                f"column 'input', row 0 of the lists: {nothing} is not part of the column 'instruction'",
            )
            for nothing in (0, 0.0, False)
        ),
        (
            [{"instruction": "Explain category.", "input": "cat", "generations": ["a"], "ratings": [1]}],
            {},
            "column 'input', row 0 of the lists: 'cat' is not part of the column 'instruction'",
        ),
        *(
            (
                [{"instruction": instruction, "input": part, "generations": ["a"], "ratings": [1]}],
                {},
                f"column 'input', row 0 of the lists: '?{part}'? is not part of the column 'instruction'",
            )
            for instruction, part in (
                *(("catégorie", "cat"), ("größer", "gr"), ("котята", "кот"), ("Add 1.5.", "5"), ("Add 1.5.", "1")),
                ("Add 1.5.", 1),
            )
        ),
        (
            [{"instruction": "Add 3 of the 45.", "input": "4", "generations": ["a"], "ratings": [1]}],
            {},
            "column 'input', row 0 of the lists: '4' is not part of the column 'instruction'",
        ),
        (
            [{"ask": "q", "generations": ["a"], "rating": [1]}],
            {"score_columns": ["rating"]},
            "the lists: there are answers but no prompts, only .* with prompt_column",
        ),
        (
            [{"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "truncated": [True]}],
            {},
            "row 0 of the lists: 2 responses and 2 scores and 1 truncated: give each response one",
        ),
        (
            [{"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "truncated": True}],
            {},
            "column 'truncated', row 0 of the lists: True is not a list that says of each answer whether it was cut",
        ),
        (
            [{"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "truncated": ["no", "length"]}],
            {},
            "column 'truncated', row 0 of the lists: 'length' is neither true nor false: correct it, or remove",
        ),
        (
            [{"question": {"title": "Why?"}, "responses": ["a"], "scores": [1]}],
            {},
            "column 'question', row 0 of the lists: .*'title': 'Why\\?'.* is neither text nor messages: put the text",
        ),
        (ARMORM, {"score_columns": ["x"]}, r"the lists: score_columns names \['x'\], and there are only the columns"),
        (ARMORM, {"score_columns": ["x", "x"]}, "score_columns names 'x' twice: name each column once"),
        (ARMORM, {"prompt_column": "x"}, "prompt_column names 'x', and there are only the columns"),
        (ARMORM, {"system_column": "x"}, "system_column names 'x', and"),
        (
            ULTRAFEEDBACK,
            {"score_columns": ["fun"]},
            r"column 'completions', row 0 of the lists, answer 0: there is no rating fun, only \['fine",
        ),
        (
            [{"prompt": "q", "responses": ["a"], "scores": ["good"]}],
            {},
            "column 'scores', row 0 of the lists, response 0: the score 'good' is not a number",
        ),
        ([{"prompt": "q", "responses": ["a"], "scores": [True]}], {}, "the score True is not a number"),
        ([{"prompt": "q", "responses": ["a"], "scores": [float("inf")]}], {}, "the score inf is infinite"),
        (
            [{"prompt": "q", "responses": ["a", "b"], "scores": [1]}],
            {},
            "row 0 of the lists: 2 responses and 1 scores: give each",
        ),
        (
            [{"prompt": "q", "responses": "a", "scores": [1]}],
            {},
            "column 'responses', row 0 of the lists: 'a' is not a list of one or more: save",
        ),
        (
            [{"prompt": "q", "responses": "['a' 'b']", "scores": "[1. 2.]"}],
            {},
            r"column 'scores', row 0 of the lists: '\[1. 2.\]' is not a list",
        ),
        (
            [{"prompt": None, "responses": ["a"], "scores": [1]}],
            {},
            "column 'prompt', row 0 of the lists: the prompt is None: drop",
        ),
        (
            [{"prompt": "q", "response": "a", "score": 1}, {"prompt": "", "response": "a", "score": 1}],
            {},
            "column 'prompt', row 1 of the lists: the prompt is '': drop",
        ),
        (
            [{"prompt": "q", "responses": [{"x": 1}], "scores": [1]}],
            {},
            "row 0 of the lists, answer 1: message 0 has no role and no content",
        ),
        (
            [{"prompt": "q", "answers": ["a"]}],
            {},
            "column 'answers', row 0 of the lists, answer 0: 'a' is no mapping with one of response, answer",
        ),
        (
            [{"prompt": "q", "completions": ["a", "b"], "reward": [1, 2]}],
            {},
            "'a' is no mapping with .*: if the scores are in a column of their own, name it with score_columns",
        ),
        (
            [{**ARENA[0], "winner": "draw"}],
            {},
            "column 'winner', row 0 of the lists: 'draw' is no winner, which are model_a, model_b, tie",
        ),
        (
            [{**KAGGLE[0], "winner_tie": 1}],
            {},
            r"columns winner_model_a, winner_model_b, winner_tie, row 0 of the lists: \[0, 1, 1\] are not one 1 and",
        ),
        ([SHP[1] | {"labels": 1}], {}, "column 'labels', row 0 of the lists: 1 contradicts the scores 4 and 30"),
        (
            [{**ARENA[0], "conversation_b": None}, ARENA[1]],
            {},
            "columns conversation_a and conversation_b, row 0 of the lists: there are no two conversations: drop",
        ),
        (
            [{**ARENA[0], "conversation_b": [{"role": "bot", "content": "b"}]}],
            {},
            "column 'conversation_b', row 0 of the lists: .*bot.* is no conversation, which is a list of messages",
        ),
        (
            [
                {
                    **ARENA[0],
                    "conversation_b": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}],
                }
            ],
            {},
            "column 'conversation_b', row 0 of the lists: .*None.* is no conversation, which is a list of messages",
        ),
    ],
)
def test_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        read(rows, **options)


def test_scores_that_are_class_labels():
    features = Features(
        {"prompt": Value("string"), "response": Value("string"), "score": ClassLabel(names=["bad", "good"])}
    )
    rows = Dataset.from_list([{"prompt": "q", "response": "a", "score": 1}], features=features)
    with pytest.raises(ValueError, match="column 'score' of the lists data set holds class labels"):
        read(rows)
    features = Features(
        {"prompt": Value("string"), "responses": List(Value("string")), "scores": List(features["score"])}
    )
    rows = Dataset.from_list([{"prompt": "q", "responses": ["a"], "scores": [1]}], features=features)
    with pytest.raises(ValueError, match="column 'scores' of the lists data set holds class labels"):
        read(rows)


# Messages


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("plain, with spaces ", [user("plain, with spaces ")]),
        (NECTAR[0]["prompt"], [user("Name a colour."), bot("Which?"), user("Any.")]),
        (MULTI_TURN, [user("Name a colour."), bot("Which?"), user("Any.")]),
        ("Human: hi\n\nAssistant:", [user("hi")]),
        (
            "How do I end a prompt in\n\nHuman: x\n\nAssistant:",
            [user("How do I end a prompt in\n\nHuman: x\n\nAssistant:")],
        ),
        ("\r\n\r\nHuman: a\r\n\r\nAssistant: b\r\n\r\nHuman: c", [user("a"), bot("b"), user("c")]),
        ("\n\nHuman:", [user("\n\nHuman:")]),
        ("\n\nHuman: who?\n\nHuman: me", [user("\n\nHuman: who?\n\nHuman: me")]),
        ("q\n<extra_id_1>Assistant\na", [user("q\n<extra_id_1>Assistant\na")]),
    ],
)
def test_prompts_as_messages(prompt, turns):
    assert chat_turns(prompt) == turns
    rows = [{"prompt": prompt, "responses": ["a", "b"], "scores": [1, 2]}]
    (each,) = read(rows, as_chat=True)
    assert (each.prompt, each.responses) == (turns, [[bot("a")], [bot("b")]])
    (each,) = read(rows)
    assert (each.prompt, each.responses) == (prompt, ["a", "b"])


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("Human: hi\nAssistant: yo\nHuman: so?", "Assistant:"),
        ("User: hi\nBot: yo\nUser: so?", "User:"),
        ("<|im_start|>user\nhi<|im_end|>", "<|im_start|>"),
        ("\n\nHuman: hi\n\nAssistant: yo\nHuman: so?\nAssistant: no\n\nHuman: oh", "Assistant:"),
        ("Which user: me?", None),
    ],
)
def test_turns_that_stay_together_are_told(prompt, mark, caplog):
    rows = [{"prompt": prompt, "responses": ["a", "b"], "scores": [1, 2]}]
    with caplog.at_level(logging.WARNING, "trl_margins"):
        read(rows, as_chat=True)
    assert (f"1 prompts mark turns (the first is in row 0, by its {mark!r})" in caplog.text) == (mark is not None)
    rows = [{"prompt": prompt} for _ in range(2)]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trl_margins"):
        open_prompts(Dataset.from_list(rows), "asked", as_chat=True)
    assert ("2 prompts mark turns (the first is in row 0" in caplog.text) == (mark is not None)


@pytest.mark.parametrize("unrated", [0, 1])
def test_an_answer_that_has_no_rating_is_left_out(unrated, caplog):
    """The others are rated as they are alone; where none is, that is an error."""
    answers = [{"response": text, "tokens": 3, "score": i} for i, text in enumerate("abc")]
    del answers[unrated]["score"]
    if not unrated:  # a number that is no rating would be asked for
        del answers[unrated]["tokens"]
    caplog.set_level(logging.INFO, "trl_margins")
    (each,) = read([{"prompt": "p", "completions": json.dumps(answers)}])
    assert each.scores == [i for i in range(3) if i != unrated]
    assert "1 answers have no score, and were left out" in caplog.text
    with pytest.raises(RowError, match="column 'completions' of the lists: no answer has a rating that is a number"):
        read([{"prompt": "p", "completions": json.dumps([{"response": "a"}, {"response": "b"}])}])


def test_blank_answers_are_told_of_an_evaluation(caplog):
    rows = [{"prompt": "p", "responses": ["a", " "], "scores": [1, 2]}]
    with caplog.at_level(logging.WARNING, "trl_margins"):
        evaluation_set(Dataset.from_list(rows), "lists")
    assert "lists: 1 answers have no text (the first is in row 0)" in caplog.text


def test_messages_system_and_template():
    row = {
        "prompt": [user("q")],
        "responses": [[user("q"), bot("a")], [bot("b")]],
        "scores": [1, 2],
        "system": "Be brief.",
        "tools": json.dumps([{"name": "f"}]),
    }
    (each,) = read([row], system_column="system")
    assert each.prompt == [{"role": "system", "content": "Be brief."}, user("q")]
    assert each.responses == [[bot("a")], [bot("b")]]
    assert each.template == {"tools": [{"name": "f"}]}


# Who else reads lists


@pytest.mark.parametrize("name", FORMS)
def test_evaluate_reads_them(name):
    """Lists with chosen and rejected are pairs."""
    rows, options, expected = FORMS[name]
    found = evaluation_set(dataset_of(name, rows), "here", as_chat=True, **options)
    if "armorm" in name:
        assert found.kind == "pairs"
        return
    assert found.kind == "listwise"
    assert [sorted(scores) for scores in found.scores] == [sorted(s for _, s, _ in answers) for _, answers in expected]
    assert all(row.is_conversational for row in found.rows) == (name != "other names")


def arena_of(models: list[str], n: int) -> Dataset:
    """Votes on n prompts, each by every two models of which the first one wins."""
    rows = []
    for i in range(n):
        for a in range(len(models)):
            for b in range(a + 1, len(models)):
                one, other = ([user(f"q{i}"), bot(f"{models[j]} on {i}")] for j in (a, b))
                vote = {"model_a": models[a], "model_b": models[b], "winner": "model_a"}
                rows.append({**vote, "conversation_a": one, "conversation_b": other})
    return Dataset.from_list(rows)


def test_splits_of_votes_pair_what_was_compared():
    models = [f"m{i}" for i in range(8)]
    with pytest.raises(ValueError, match=r"held_out=0.1"):  # a vote has no second pair
        generalization_splits(arena_of(models, 12))


def test_splits_of_ultrafeedback():
    rng = np.random.default_rng(0)
    rows = [
        {
            "instruction": f"question {i}",
            "source": f"s{i}",
            "completions": [
                rated(f"m{m} on {i}", ["3"] * 4, overall_score=float(rng.integers(1, 100)), model=f"m{m}")
                for m in range(10)
            ],
        }
        for i in range(30)
    ]
    splits = generalization_splits(Dataset.from_list(rows))
    for split in splits.values():
        for row in split:
            i = row["prompt"].removeprefix("question ")
            assert row["source"] == f"s{i}"
            for side in ("chosen", "rejected"):
                (given,) = (a for a in rows[int(i)]["completions"] if a["response"] == row[side])
                assert (row[f"score_{side}"], row[f"{side}_model"]) == (given["overall_score"], given["model"])
            assert row["score_chosen"] > row["score_rejected"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}}],  # SQuAD's
        [{"prompt": "q", "completions": ["one", "two"], "labels": [True, False]}],  # TRL's stepwise supervision
        [{"prompt": "q", "completion": "a", "label": True}],  # KTO's
    ],
)
def test_other_sets_are_no_lists(rows):
    with pytest.raises(
        ValueError, match=r"only .*: a preference pair is chosen and rejected, .*; rename yours in the"
    ):
        open_rows(Dataset.from_list(rows), "train")
    with pytest.raises(ValueError, match="the lists: "):
        read(rows)


@pytest.mark.parametrize("name", [name for name in FORMS if "armorm" not in name and name != "other names"])
def test_training_on_lists_names_the_command(name):
    with pytest.raises(
        ValueError,
        match=r"no column 'chosen' .* so make pairs of them with trl-margins pairs FILE",
    ):
        open_rows(dataset_of(name, FORMS[name][0]), "train")


def test_training_on_answers_without_scores():
    with pytest.raises(ValueError, match="these are answers without scores: score them, and make pairs of them with"):
        open_rows(Dataset.from_list([{"prompt": "q", "responses": ["a", "b"]}]), "train")


def test_options_for_other_sets_leave_lists_alone():
    """One call of evaluate has one `--score_columns` for pairs and lists."""
    lists = Dataset.from_list([{"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}])
    options = {"score_columns": ["mine_w", "mine_l"], "prompt_column": "question", "system_column": "system"}
    assert evaluation_set(lists, "here", **options).scores == [[1.0, 2.0]]
    judged = lists.add_column("judge", [[5, 3]])
    assert evaluation_set(judged, "here", score_columns=["judge"]).scores == [[5.0, 3.0]]


def test_inspect_says_that_these_are_lists(tmp_path, capsys):
    Dataset.from_list(ULTRAFEEDBACK).to_parquet(tmp_path / "lists.parquet")
    argv = ["inspect", str(tmp_path / "lists.parquet"), "--json", str(tmp_path / "numbers.json")]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert re.search(r"train +2 +1 +2 +2 – 2 +2 – 8.5 +0 +2\n", printed)
    assert "Lists cannot be trained on: make pairs of them with trl-margins pairs FILE --out pairs.jsonl.gz" in printed
    assert json.loads((tmp_path / "numbers.json").read_text())["lists"]["train"]["n_answers"] == 2
    main(["inspect", str(tmp_path / "lists.parquet"), "--score_columns", "honesty"])
    assert re.search(r"train +2 +1 +1 +1 – 1 +5 – 5 +1 +1\n", capsys.readouterr().out)


def test_inspect_refuses_of_lists_what_is_for_pairs(tmp_path, capsys, monkeypatch):
    """Its advice works as printed."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{i}", "responses": ["a b", "a c d"], "scores": [1.0, 3.0]} for i in range(4)]
    Dataset.from_list(rows).to_json("lists.jsonl")
    options = ["--ef_metrics", "all", "--plot", "audit.png"]
    with pytest.raises(ValueError, match=r"these options are for pairs: --ef_metrics, --plot\. Make pairs") as error:
        main(["inspect", "lists.jsonl", *options])
    command = re.search("trl-margins (pairs .*), and inspect (.*)$", str(error.value))
    assert capsys.readouterr().out == ""
    main(command[1].split())
    main(["inspect", command[2], *options])
    assert (tmp_path / "audit.png").is_file()


def test_more_than_two_answers_in_columns_are_refused():
    row = {"prompt": "q", **{f"response_{i}": f"r{i}" for i in (1, 2, 3)}, **{f"score_{i}": i for i in (1, 2, 3)}}
    with pytest.raises(RowError, match="response_3 beside response_1 and response_2: a row has more than two answers"):
        ScoredLists.of(Dataset.from_list([row]), "the lists")
    two = {name: value for name, value in row.items() if not name.endswith("_3")}
    (found,) = ScoredLists.of(Dataset.from_list([two]), "the lists")
    assert dict(zip(found.responses, found.scores, strict=True)) == {"r1": 1, "r2": 2}


def test_answers_in_csv_are_text(tmp_path):
    """As Python's csv module reads them."""
    (tmp_path / "one.csv").write_text("question,response,score\n007,None,1\n007,12,2\n007,NA,3\n")
    (tmp_path / "two.csv").write_text("instruction,response_a,response_b,winner\n1.50,None,012,model_b\n")
    for file, columns in (("one.csv", ["response"]), ("two.csv", ["response_a", "response_b"])):
        with (tmp_path / file).open(newline="") as opened:
            rows = list(csv.DictReader(opened))
        (found,) = ScoredLists.of(load_splits(str(tmp_path / file))["train"], file)
        assert sorted(found.responses) == sorted(row[name] for row in rows for name in columns)
        assert found.prompt == rows[0].get("question", rows[0].get("instruction"))


def test_structs_under_other_names():
    """Stack Exchange's, with the prompt's column named, and messages that carry their score."""
    answers = [{"answer_id": 1, "pm_score": 3, "text": "a"}, {"answer_id": 2, "pm_score": 1, "text": "b"}]
    rows = Dataset.from_list([{"question": "q", "answers": answers}])
    (found,) = ScoredLists.of(rows, "the lists", ["pm_score"], "question")
    assert (found.prompt, found.responses, found.scores) == ("q", ["a", "b"], [3, 1])
    messages = [{"role": "assistant", "content": text, "score": score} for text, score in (("a", 3), ("b", 1))]
    (found,) = ScoredLists.of(Dataset.from_list([{"prompt": "q", "completions": messages}]), "the lists")
    assert (found.responses, found.scores) == (["a", "b"], [3, 1])


def test_a_repeated_answer_is_no_better_than_itself():
    rows = Dataset.from_list([{"prompt": "q", "responses": ["a", "a", "b"], "scores": [9, 1, 4]}])
    found = evaluation_set(rows, "lists")
    assert found.rows[0].completions == ["a", "b"]
    assert found.scores == [[5, 4]]


def test_ranks_of_pairs_are_said_to_be_read_as_scores():
    names = ["prompt", "chosen", "rejected", "rank_chosen", "rank_rejected", "rank_reward"]
    found = find_score_columns(names, ["rank_chosen", "rank_rejected"])
    assert found.names == ("rank_chosen", "rank_rejected")
    (doubt,) = found.doubts(names)
    assert "'rank_chosen' holds ranks: it is read as a score, of which the higher is the better" in doubt
    assert is_rank("rank_a")
    assert not is_rank("rank_reward")


def test_columns_that_say_something_of_the_prompts():
    """And not of one answer, of a pair, or of a vote; of rows with one answer each, where they are a prompt's."""

    def kept(*rows: dict[str, Any]) -> list[str]:
        return ScoredLists.of(Dataset.from_list(list(rows)), "the lists").of_prompts

    of_pairs = {"chosen-rank": 1, "rejected_by": "x", "is_chosen": True, "chosenness": 2}
    dropped = {"truncated": [True, False], "evaluation_factor": 0.5, "is_flipped": False, "models": ["x", "y"]}
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 2.0], "source": "s", "tools": "[]"}
    assert kept({**row, **of_pairs, **dropped}) == ["source", "tools", "chosenness"]
    vote = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "model_a", "model_a": "m", "model_b": "n"}
    more = {"turn": 1, "labels": 1, "score_ratio": 2.0, "seconds_difference": 3, "length_a": 1, "my_response_a_x": 1}
    assert kept({**vote, **more, "language": "en", "winner_tie": 0}) == ["language"]
    one = {"prompt": "p", "response": "a", "score": 1.0, "domain": "x", "writer": "u"}
    assert kept(one, {**one, "response": "b", "writer": "v"}) == ["domain"]
    assert kept(one, {**one, "prompt": "q", "writer": "v", "domain": "y"}) == ["domain", "writer"]


@pytest.mark.parametrize(
    ("word", "scores"),
    [
        *((word, (1.0, 0.0)) for word in ("model_a", "a", " A ", "response_a", "X")),
        *((word, (0.0, 1.0)) for word in ("model_b", "b", "response_b", "y")),
        ("tie", (0.5, 0.5)),
        *((word, (0.0, 0.0)) for word in ("tie (bothbad)", "tie (both bad)", "bothbad", "both_bad")),
    ],
)
def test_what_a_vote_is_worth(word, scores):
    row = {"prompt": "p", "response_a": "one", "response_b": "two", "model_a": "x", "model_b": "y", "winner": word}
    (found,) = read([row])
    assert {answer.response: answer.score for answer in found.answers} == dict(
        zip(("one", "two"), scores, strict=True)
    )


@pytest.mark.parametrize(("strength", "scores"), [(-2, (2.0, 0.0)), (0, (0.0, 0.0)), (1, (0.0, 1.0)), (None, None)])
def test_what_a_strength_is_worth(strength, scores):
    assert of_strength(strength) == (scores or (None, None))


OTHER_SCORES = {
    "columns": {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, 2.0], "ratings": [2.0, 1.0]},
    "answers": {
        "prompt": "q",
        "answers": [{"answer": "a", "score": 1, "rank": 1}, {"answer": "b", "score": 2, "rank": 2}],
    },
    "one a row": {"prompt": "q", "response": "a", "rating": 1.0, "score": 2.0},
}


@pytest.mark.parametrize("kind", OTHER_SCORES)
def test_other_scores_are_said(kind, caplog):
    rows, named = [OTHER_SCORES[kind]] * 2, {"columns": "scores", "answers": "score", "one a row": "score"}[kind]
    [*ScoredLists.of(Dataset.from_list(rows), "train")]
    said = [each for each in caplog.messages if "could be scores" in each]
    assert len(said) == 1
    assert re.search(rf"\({named}, (ratings|rank|rating)\): {named} are used", said[0])
    caplog.clear()
    [*ScoredLists.of(Dataset.from_list(rows), "train", [named])]
    assert "could be scores" not in caplog.text


def test_the_scores_of_ultrafeedback_are_no_others(caplog):
    [*ScoredLists.of(Dataset.from_list(ULTRAFEEDBACK), "train")]
    assert "could be scores" not in caplog.text


@pytest.mark.parametrize(
    ("column", "value", "score_columns", "scores"),
    [
        ("answers", {"answer": ["a", "b"], "rank": [1, 2], "n": 2}, None, [-1.0, -2.0]),
        ("answers", {"answer": ["a", "b"], "rank": [1, 2], "model": None, "meta": {"n": 2}}, None, [-1.0, -2.0]),
        ("completions", {"response": ["a", "b"], "overall_score": [1, 2], "source": "x"}, None, [1.0, 2.0]),
        (
            "completions",
            {"response": ["a", "b"], "annotations": {"helpfulness": {"Rating": ["1", "4"]}}},
            ["helpfulness"],
            [1.0, 4.0],
        ),
        (
            "completions",
            {"response": ["a", "b"], "annotations": {"helpfulness": [{"Rating": "1"}, {"Rating": "4"}]}},
            ["helpfulness"],
            [1.0, 4.0],
        ),
    ],
)
def test_mappings_of_lists_beside_other_values(column, value, score_columns, scores):
    (found,) = ScoredLists.of(Dataset.from_list([{"prompt": "q", column: value}]), "train", score_columns)
    assert (found.responses, found.scores) == (["a", "b"], scores)


@pytest.mark.parametrize("key", ["Rating", "rating", "score", "Score", "RATING"])
def test_a_rating_by_its_usual_names(key):
    answers = [rated(text, [None] * 4) | {"annotations": {"helpfulness": {key: n}}} for n, text in enumerate("ab", 1)]
    lists = ScoredLists.of(Dataset.from_list([{"instruction": "q", "completions": answers}]), "train", ["helpfulness"])
    assert [each.scores for each in lists] == [[1.0, 2.0]]


@pytest.mark.parametrize("key", ["stars", "grade", "Overall", "value"])
def test_a_rating_by_another_name(key):
    answers = [rated("a", [None] * 4) | {"annotations": {"helpfulness": {key: 4, "Rationale": "so"}}}]
    lists = ScoredLists.of(Dataset.from_list([{"instruction": "q", "completions": answers}]), "train", ["helpfulness"])
    with pytest.raises(RowError, match=rf"no annotation has a rating, but there are numbers as '{key}': rename"):
        list(lists)
    assert len([*ScoredLists.of(lists.dataset, "train", scored=False)]) == 1


def test_an_answer_that_nobody_rated():
    """Its annotation may have numbers of another kind. Arrow fills in the keys that only others have."""
    annotations = [{"id": 1}, {"id": 2, "Rating": "3"}, {"id": 3, "score": 2}, {1: 5}]
    answers = [
        rated(str(i), [None] * 4) | {"annotations": str({"helpfulness": each})} for i, each in enumerate(annotations)
    ]
    lists = ScoredLists.of(Dataset.from_list([{"instruction": "q", "completions": answers}]), "train", ["helpfulness"])
    assert [(each.responses, each.scores) for each in lists] == [(["1", "2"], [3.0, 2.0])]


def test_the_key_of_a_rating_that_has_a_value_counts():
    annotations = [{"score": None, "Rating": "4"}, {"score": 1, "Rating": None}, {"score": 1, "Rating": "2"}]
    answers = [
        rated(str(i), [None] * 4) | {"annotations": {"helpfulness": each}} for i, each in enumerate(annotations)
    ]
    lists = ScoredLists.of(Dataset.from_list([{"instruction": "q", "completions": answers}]), "train", ["helpfulness"])
    assert [each.scores for each in lists] == [[4.0, 1.0, 2.0]]


def test_scores_that_are_not_read_are_not_said(caplog):
    rows = Dataset.from_list([OTHER_SCORES["columns"]])
    [*ScoredLists.of(rows, "train", scored=False)]
    assert "could be scores" not in caplog.text


def test_letters_of_another_alphabet_in_a_key():
    rows = [{"prompt": "q", "answers": [{"answer": "a", "r\u0430nk": 1}]}]
    with pytest.raises(RowError, match=r"there is no rating .*, only \['r\u0430nk'\] \('\u0430' is CYRILLIC SMALL"):
        [*ScoredLists.of(Dataset.from_list(rows), "train")]


def test_several_rejected_answers_are_no_pairs():
    """RewardBench 2 has them."""
    rows = Dataset.from_list([{"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]}])
    with pytest.raises(
        RowError, match=r"'chosen' holds lists of completions: a pair has one .* make a row of each two"
    ):
        ScoredLists.of(rows, "train")


def test_lists_of_turns_beside_text_are_said(caplog):
    vote = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    text = {"prompt": "q", "response_a": "a", "response_b": "c", **vote}
    turns = {"prompt": '["z"]', "response_a": '["b"]', "response_b": '["c"]', **vote}
    [*ScoredLists.of(Dataset.from_list([text, text, turns]), "train")]
    assert "1 of 3 rows are lists of turns, written as JSON, and the others text" in caplog.text
    for rows in ([text] * 2, [turns] * 2):
        caplog.clear()
        [*ScoredLists.of(Dataset.from_list(rows), "train")]
        assert "lists of turns" not in caplog.text


def test_texts_that_look_like_lists_of_other_things():
    vote = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    texts = [("q", "a", "b"), ("[1]", "[2]", "[3]")]
    rows = [dict(zip(("prompt", "response_a", "response_b"), each, strict=True)) | vote for each in texts]
    _, found = ScoredLists.of(Dataset.from_list(rows), "train")
    assert (found.prompt, {*found.responses}) == ("[1]", {"[2]", "[3]"})


@pytest.mark.parametrize("turn", [1, 1.0, "1", "1.0"])
def test_the_turn_of_a_vote_may_be_any_number(turn):
    turns = [user("q"), bot("a"), user("r"), bot("b")]
    others = [user("q"), bot("c"), user("r"), bot("d")]
    rows = [{"conversation_a": turns, "conversation_b": others, "winner": "model_a", "turn": turn}]
    (found,) = ScoredLists.of(Dataset.from_list(rows), "train")
    assert sorted(map(str, found.responses)) == sorted(map(str, ([bot("a")], [bot("c")])))


@pytest.mark.parametrize("turn", ["first", -1, 1.5])
def test_a_turn_that_is_none_is_said(turn, caplog):
    turns, others = [user("q"), bot("a")], [user("q"), bot("c")]
    rows = [{"conversation_a": turns, "conversation_b": others, "winner": "model_a", "turn": turn}]
    assert len([*ScoredLists.of(Dataset.from_list(rows), "train")]) == 1
    assert "1 rows have a turn that is no whole number from 1 on" in caplog.text


@pytest.mark.parametrize("options", [{}, {"prompt_column": "prompt"}])
def test_score_columns_that_are_not_there_are_named(options):
    rows = Dataset.from_list([{"prompt": "p", "responses": ["a", "b"], "sc": [1, 2]}])
    with pytest.raises(RowError, match=r"score_columns names \['scx'\], and there are only the columns"):
        ScoredLists.of(rows, "train", ["scx"], **options)
    with pytest.raises(RowError, match=r"score_columns names \['scx'\], and there are only the columns"):
        ScoredLists.of(rows, "train", ["sc", "scx"], **options)


def test_lists_of_messages_are_no_pairs():
    rows = Dataset.from_list([{"prompt": "p", "chosen": [[bot("a")]], "rejected": [[bot("b")], [bot("c")]]}])
    with pytest.raises(RowError, match="'chosen' holds lists of completions"):
        ScoredLists.of(rows, "train")
