"""Pairs from scored lists: the rules of the Hub's sets, strategies by brute force, what is left out, the command."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from conftest import chat_tokenizer, preference_rows, trainer_of
from datasets import Dataset, DatasetDict, Image, load_from_disk
from said import word_for_word  # noqa: F401 - its messages are held against said/
from test_lists import ASPECTS, FORMS, HELPSTEER2, NECTAR, bot, dataset_of, rated, user

from trl_margins.cli import main
from trl_margins.data.loading import load_splits
from trl_margins.data.pairing import STRATEGIES, lists_summary, make_pairs
from trl_margins.data.splits import generalization_splits
from trl_margins.rows import open_rows
from trl_margins.rows.lists import ScoredLists
from trl_margins.rows.references import may_be_meant
from trl_margins.rows.scores import check_scores, find_score_columns

Row = dict[str, Any]


def list_rows(n: int = 40, k: int = 5, levels: int = 30, seed: int = 0) -> list[Row]:
    """The text of an answer says whose it is; its length is at random."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"question {i} ",
            "responses": [f"m{m} on {i}" + "!" * rng.randrange(9) for m in range(k)],
            "scores": [float(rng.randrange(levels)) for _ in range(k)],
            "models": [f"m{m}" for m in range(k)],
            "topic": i % 3,
        }
        for i in range(n)
    ]


def of(rows: list[Row], **options: Any) -> list[Row]:
    return make_pairs(Dataset.from_list(rows), **options).to_list()


def texts(pairs: list[Row]) -> set[tuple[str, str, str]]:
    return {(row["prompt"], row["chosen"], row["rejected"]) for row in pairs}


def test_what_is_said_of_lists():
    """Of three lists one is tied; three models have written."""
    lists = [("ab", [1, 3], "xy"), ("cde", [2, 2, 2], "xyz"), ("fghij", [9, 4, 4, 0, 5], "xxxxy")]
    rows = [{"prompt": r, "responses": [*r], "scores": [*map(float, s)], "models": [*m]} for r, s, m in lists]
    assert lists_summary(ScoredLists.of(Dataset.from_list(rows), "train")) == {
        **{"n_rows": 3, "n_lists": 3, "n_answers": 10, "n_tied": 1, "n_models": 3},
        "answers": {"least": 2, "median": 3, "most": 5},
        "scores": {"least": 0, "median": 2.5, "most": 9},
    }


# The sets on the Hub, by their authors' rules


def ultrafeedback(n: int, seed: int = 0) -> list[Row]:
    """Raw rows with ties, missing ratings, and prompts without completions."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        completions = []
        for m in range(4 if i % 10 else 1 - i // 10 % 2):
            ratings = [rng.choice(["1", "2", "3", "4", "5", "N/A"]) for _ in ASPECTS]
            completions.append(
                rated(f"answer {m} to {i}", ratings, overall_score=rng.randint(1, 8) / 2, model=f"m{m}")
            )
        rows.append({"source": "flan", "instruction": f"question {i}", "completions": completions})
    return rows


def binarized_by_h4(row: Row, rng: random.Random) -> Row | None:
    """As the dataset's `create_dataset.py` describes it: the highest overall_score, and any other completion."""
    completions = row["completions"]
    if len(completions) < 2:
        return None
    best = max(range(len(completions)), key=lambda i: completions[i]["overall_score"])
    other = rng.choice([i for i in range(len(completions)) if i != best])
    asked = {"role": "user", "content": row["instruction"]}
    found: Row = {"prompt": row["instruction"], "prompt_id": hashlib.sha256(row["instruction"].encode()).hexdigest()}
    for side, i in (("chosen", best), ("rejected", other)):
        found[side] = [asked, {"role": "assistant", "content": completions[i]["response"]}]
        found[f"score_{side}"] = completions[i]["overall_score"]
    return {**found, "messages": found["chosen"]}


def test_ultrafeedback_binarized_as_on_the_hub():
    """Training reads the same prompts, chosen answers and scores of both; the rejected ones are drawn alike."""
    raw = ultrafeedback(200)
    theirs = [row for each in raw if (row := binarized_by_h4(each, random.Random(42)))]
    ours = make_pairs(Dataset.from_list(raw), "best-random", min_gap=0, as_chat=True)
    assert len(ours) == len(theirs) == 180
    for a, b in zip(open_rows(ours, "train"), open_rows(Dataset.from_list(theirs), "train"), strict=True):
        assert (a.prompt, a.completions[0]) == (b.prompt, b.completions[0])
    assert ours["score_chosen"][:] == [row["score_chosen"] for row in theirs]
    assert sum(np.equal(ours["score_chosen"][:], ours["score_rejected"][:])) > 0  # they have ties, and so have we
    # each of a prompt's three other answers is rejected as often as under their rule
    some = Dataset.from_list(raw[:60])
    seen: Counter[str] = Counter()
    for seed in range(20):
        seen.update(make_pairs(some, "best-random", min_gap=0, seed=seed)["rejected"][:])
    chosen = {row["chosen"][-1]["content"] for row in theirs}
    assert (
        seen.keys()
        == {a["response"] for row in raw[:60] for a in row["completions"] if len(row["completions"]) > 1} - chosen
    )
    spread = np.array(list(seen.values())) - 20 / 3
    assert abs((spread**2).mean() / (20 * 2 / 9) - 1) < 0.3  # binomial: σ² = n·⅓·⅔


def test_argillas_rule():
    """The mean of the ratings; a random answer below the best; prompts without one are left out."""
    raw = ultrafeedback(100, seed=1)
    ours = {row["prompt"]: row for row in of(raw, strategy="best-random", score_columns=list(ASPECTS))}
    expected = 0
    for row in raw:
        means = {}
        for each in row["completions"]:
            rates = [int(a["Rating"]) for a in each["annotations"].values() if a["Rating"] != "N/A"]
            means |= {each["response"]: sum(rates) / len(rates)} if rates else {}
        if len(set(means.values())) < 2:
            assert row["instruction"] not in ours
            continue
        expected += 1
        found = ours[row["instruction"]]
        assert found["chosen"] == max(means, key=means.__getitem__)
        assert means[found["rejected"]] < means[found["chosen"]] == pytest.approx(found["score_chosen"])
        assert found["score_rejected"] == pytest.approx(means[found["rejected"]])
    assert len(ours) == expected > 80


def test_simpos_rule_for_armorm():
    """NumPy's argmax and argmin of all_rm_scores; the rows are those of princeton-nlp's sets for training."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(60):
        scores = rng.integers(0, 6, 5) / 40 + 0.1
        responses = [f"answer {j} to {i}" for j in range(5)]
        whole = [[user(f"q{i}"), bot(responses[int(place)])] for place in (np.argmax(scores), np.argmin(scores))]
        rows.append(
            {
                "prompt_id": str(i),
                "prompt": f"q{i}",
                "all_generated_responses": responses,
                "all_rm_scores": scores.tolist(),
                "chosen": whole[0],
                "rejected": whole[1],
            }
        )
    theirs = Dataset.from_list(rows)
    ours = make_pairs(theirs, as_chat=True)
    assert list(open_rows(ours, "train")) == list(open_rows(theirs, "train"))
    columns = find_score_columns(theirs.column_names, ["all_rm_scores"])
    assert columns is not None
    for mine, his in zip(ours, theirs, strict=True):
        assert (mine["score_chosen"], mine["score_rejected"]) == columns.read(his)
    assert ours.column_names == ["prompt", "chosen", "rejected", "score_chosen", "score_rejected", "prompt_id"]


def test_zephyrs_scores_train_gappo(tiny_model, tmp_path):
    """What comes out trains without another word."""
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    pairs = make_pairs(Dataset.from_list(ultrafeedback(20)), "best-random", as_chat=True)
    trainer = trainer_of("cpo", tiny_model, chat_tokenizer(template), tmp_path, pairs, weight="score-gap", max_steps=1)
    trainer.train()
    assert len(trainer.train_dataset) == len(pairs)


# Strategies


def allowed(row: Row, least: float | None) -> list[tuple[int, int]]:
    """All pairs of places, by brute force."""
    found = []
    for i, j in combinations(range(len(row["scores"])), 2):
        gap = row["scores"][i] - row["scores"][j]
        if gap < 0:
            i, j, gap = j, i, -gap
        if (gap > 0 and least is None) or (least is not None and gap >= least):
            found.append((i, j))
    return found


def as_text(row: Row, place: tuple[int, int]) -> tuple[str, str, str]:
    return (row["prompt"], *(row["responses"][i] for i in place))


@pytest.mark.parametrize("least", [None, 0, 3, 9])
def test_all_pairs(least):
    rows = list_rows(levels=12)
    expected = {as_text(row, place) for row in rows for place in allowed(row, least)}
    found = of(rows, strategy="all", min_gap=least)
    assert texts(found) == expected
    assert len(found) == len(expected)
    by_text = {
        text: (score, model) for row in rows for text, score, model in zip(*list(row.values())[1:4], strict=True)
    }
    for row in found:
        for side in ("chosen", "rejected"):
            assert (row[f"score_{side}"], row[f"{side}_model"]) == by_text[row[side]]


@pytest.mark.parametrize("k", [1, 2, 7])
def test_k_pairs(k):
    rows = list_rows(levels=8)
    pairs = {row["prompt"]: {as_text(row, place) for place in allowed(row, None)} for row in rows}
    drawn = [texts(of(rows, strategy="all", k=k, seed=seed)) for seed in range(20)]
    for some in drawn:
        per_prompt = Counter(prompt for prompt, *_ in some)
        assert per_prompt == {prompt: min(k, len(each)) for prompt, each in pairs.items()}
        assert some <= set.union(*pairs.values())
    assert set.union(*drawn) > drawn[0] or k == 7
    assert texts(of(rows, strategy="all", k=k, seed=3)) == drawn[3]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("least", [None, 4])
def test_the_best_with_the_worst_and_the_closest(k, least):
    rows = list_rows(levels=20)
    worst, closest = (of(rows, strategy=name, k=k, min_gap=least) for name in ("best-worst", "closest"))
    for row in rows:
        scores = np.array(row["scores"])
        gaps = sorted((scores[i] - scores[j] for i, j in allowed(row, least)))
        found = [pair["score_chosen"] - pair["score_rejected"] for pair in closest if pair["prompt"] == row["prompt"]]
        assert sorted(found) == gaps[:k]
        found = [pair for pair in worst if pair["prompt"] == row["prompt"]]
        below = sorted(score for score in scores if scores.max() - score >= (least or 1e-9))
        assert sorted(pair["score_rejected"] for pair in found) == below[:k]
        assert {pair["chosen"] for pair in found} <= {row["responses"][int(scores.argmax())]}


def test_a_gap_that_floats_miss():
    rows = [{"prompt": "q", "responses": ["a", "b"], "scores": [0.3, 0.1]}]
    assert len(of(rows, min_gap=0.2)) == 1
    said = "no pair is left of 1 lists: 1 without two scores that differ by 0.21; a lower min_gap takes more"
    with pytest.raises(ValueError, match=said):
        of(rows, min_gap=0.21)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_draws_depend_on_the_seed_and_the_texts_alone(strategy):
    """Other rows, and other orders of rows and of answers, change no pair; scores have no ties here."""
    rng = random.Random(5)
    rows = list_rows()
    for row in rows:
        row["scores"] = rng.sample(range(100), 5)
    first = texts(of(rows, strategy=strategy, k=2))
    shuffled = []
    for row in rng.sample(rows, 30):
        order = rng.sample(range(5), 5)
        shuffled.append({name: [v[i] for i in order] if isinstance(v, list) else v for name, v in row.items()})
    kept = {row["prompt"] for row in shuffled}
    assert texts(of(shuffled, strategy=strategy, k=2)) == {pair for pair in first if pair[0] in kept}
    by_seed = [texts(of(rows, strategy=strategy, seed=seed)) for seed in (1, 2)]
    assert (by_seed[0] == by_seed[1]) == (strategy in ("best-worst", "all"))  # scores tie gaps


@pytest.mark.parametrize("strategy", ["best-worst", "all"])
def test_balanced_in_length(strategy, caplog):
    """Where better answers are longer: as many longer as shorter, those of equal length stay."""
    rows = list_rows(60)
    for row in rows:
        row["responses"] = [
            text + "." * (int(score) // 4) for text, score in zip(row["responses"], row["scores"], strict=True)
        ]
    given = of(rows, strategy=strategy)
    caplog.set_level(logging.INFO, "trl_margins")
    found = of(rows, strategy=strategy, balance_length=True)

    def kinds(pairs: list[Row]) -> Counter[int]:
        return Counter(int(np.sign(len(row["chosen"]) - len(row["rejected"]))) for row in pairs)

    before, after = kinds(given), kinds(found)
    assert before[1] > before[-1] > 0
    assert after == {1: before[-1], -1: before[-1], **({0: before[0]} if before[0] else {})}
    assert texts(found) <= texts(given)
    left_out = before[1] - before[-1]
    assert f"longer in {before[1]} pairs and shorter in {before[-1]}: left out {left_out}, so that both" in caplog.text
    other = of(rows, strategy=strategy, balance_length=True, seed=1)
    assert texts(other) != texts(found)


# What is left out


def test_odd_lists_are_counted(caplog):
    rows = [
        {"prompt": "kept ", "responses": ["a", "", "  ", None, "b", "a"], "scores": [4, 9, 9, 9, 1, 2]},
        {"prompt": "one ", "responses": ["a"], "scores": [1]},
        {"prompt": "same ", "responses": ["a", "a"], "scores": [1, 2]},
        {"prompt": "unrated ", "responses": ["a", "b"], "scores": [1, None]},
        {"prompt": "tied ", "responses": ["a", "b", "c"], "scores": [2, 2, 2]},
        {"prompt": "close ", "responses": ["ä", "b"], "scores": [2, 1]},
        {"prompt": "none ", "responses": [], "scores": []},
        {"prompt": "", "responses": ["x", "y"], "scores": [0, 5]},
        {"prompt": "kept ", "responses": ["a", "b"], "scores": [1, 13]},
    ]
    caplog.set_level(logging.INFO, "trl_margins")
    found = of(rows, min_gap=2)
    assert [(row["prompt"], row["chosen"], row["rejected"], row["score_chosen"]) for row in found] == [
        ("kept ", "b", "a", 7.0),  # the mean of 1 and 13
        ("", "y", "x", 5.0),
    ]
    assert found[0]["score_rejected"] == (4 + 2 + 1) / 3
    expected = (
        "2 pairs of 7 lists; left out 3 with fewer than two different answers, 1 whose answers all have the same "
        "score, 1 without two scores that differ by 2"
    )
    for text in (
        expected,
        "left out 2 answers without text",
        "1 of 9 rows have the prompt of another one and were merged",
        "3 answers of merged rows repeat another one; the mean of their scores counts",
        "left out 1 answers that repeat another one to the same prompt",
        "1 answers are None",
        "1 answers have no score",
        "1 rows have no answer with a score",
    ):
        assert text in caplog.text
    with pytest.raises(ValueError, match="no pair is left of 1 lists"):
        of(rows[4:5])
    assert texts(of(rows[4:5], strategy="all", min_gap=0)) == {("tied ", a, b) for a, b in ("ab", "ac", "bc")}


def test_rows_with_equal_prompts_are_one_list():
    """As `cat` of two files of `generate` gives them: the best and the worst are of different files."""
    rows = [
        {"prompt": "P1", "responses": ["a", "b"], "scores": [3, 2]},
        {"prompt": "P2", "responses": ["x", "y"], "scores": [0, 1]},
        {"prompt": "P1", "responses": ["c", "d"], "scores": [1, 9]},
    ]
    assert texts(of(rows)) == {("P1", "d", "c"), ("P2", "y", "x")}
    nectar = [
        {"prompt": row["prompt"], "answers": [{"answer": text, "rank": -score} for text, score in both]}
        for row in rows
        for both in [zip(row["responses"], row["scores"], strict=True)]
    ]
    assert texts(of(nectar)) == {("P1", "d", "c"), ("P2", "y", "x")}


@pytest.mark.parametrize("drop", [False, True])
def test_answers_that_were_cut(drop, tmp_path, caplog):
    """As `generate` marks them."""
    rows = [
        {"prompt": "p", "responses": ["cut", "b", "c"], "scores": [3, 2, 1], "truncated": [True, False, False]},
        {"prompt": "q", "responses": ["a", "b", "cut"], "scores": [3, 2, 1], "truncated": [False, False, True]},
        {"prompt": "r", "responses": ["a", "b"], "scores": [3, 2], "truncated": [False, False]},
    ]
    Dataset.from_list(rows).to_json(tmp_path / "lists.jsonl")
    out = tmp_path / "pairs.jsonl"
    caplog.set_level(logging.INFO, "trl_margins")
    argv = ["pairs", str(tmp_path / "lists.jsonl"), "--out", str(out), "--drop_truncated", str(drop).lower()]
    assert main(argv) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    said = "1 chosen and 1 rejected answers were cut (truncated), and are trained on as if they ended there"
    if drop:
        assert texts(found) == {("p", "b", "c"), ("q", "a", "b"), ("r", "a", "b")}
        assert "left out 2 answers that were cut" in caplog.text
        assert said not in caplog.text
    else:
        assert texts(found) == {("p", "cut", "c"), ("q", "a", "cut"), ("r", "a", "b")}
        assert said in caplog.text
    assert "truncated" not in found[0]
    with pytest.raises(ValueError, match=r"takes lists with a column truncated, .* only .*: leave the option out"):
        of([{name: row[name] for name in ("prompt", "responses", "scores")} for row in rows], drop_truncated=True)


def test_single_answers_that_were_cut(caplog):
    cut: list[Any] = ["True", None, "False"]
    rows = [
        {"prompt": "p", "response": r, "score": s, "truncated": c}
        for r, s, c in zip("abc", (3, 1, 2), cut, strict=True)
    ]
    assert texts(of(rows, drop_truncated=True)) == {("p", "c", "b")}
    assert texts(of(rows)) == {("p", "a", "b")}
    assert "1 chosen and 0 rejected answers were cut (truncated)" in caplog.text
    two = {"prompt": "p", "response_a": "a", "response_b": "b", "score_a": 1, "score_b": 2, "truncated": False}
    with pytest.raises(ValueError, match="two answers in a row have none: leave the option out"):
        of([two], drop_truncated=True)


@pytest.mark.parametrize("column", ["images", "image", "audio", "image_url", "video_paths"])
def test_answers_to_other_media_are_no_pair(column):
    """In lists, and where each answer has a row; each pair keeps its own."""
    given: list[Any] = [["0.png"], ["1.png"]] if column == "images" else ["0", "1"]
    lists = [
        {"prompt": "describe", "responses": [f"{i}a", f"{i}b"], "scores": [i, i + 2], column: each}
        for i, each in enumerate(given)
    ]
    single = [
        {"prompt": "describe", "response": response, "score": score, column: row[column]}
        for row in lists
        for response, score in zip(row["responses"], row["scores"], strict=True)
    ]
    for rows in (lists, single):
        found = of(rows)
        assert texts(found) == {("describe", "0b", "0a"), ("describe", "1b", "1a")}
        assert [row[column] for row in sorted(found, key=lambda row: row["chosen"])] == given
    if column == "images":  # an empty list and None are none
        single = [
            {"prompt": "p", "response": r, "score": s, "images": i} for r, s, i in (("a", 1, None), ("b", 2, []))
        ]
        assert texts(of(single)) == {("p", "b", "a")}


def test_pictures_are_compared_without_being_decoded():
    pictures = [{"bytes": bytes([i]), "path": None} for i in (1, 2)]  # which nothing could decode
    rows = {"prompt": ["p"] * 2, "responses": [["a", "b"], ["c", "d"]], "scores": [[1, 2], [3, 4]], "image": pictures}
    dataset = Dataset.from_dict(rows).cast_column("image", Image())
    pairs = make_pairs(dataset)
    assert pairs.features["image"] == Image()
    assert pairs.cast_column("image", Image(decode=False))["image"][:] == pictures


@pytest.mark.parametrize("as_chat", [False, True])
def test_messages_that_are_written_as_text(as_chat, caplog):
    """They are messages where nothing is just text; else that is said."""
    asked = [user("why")]

    def said(answer):
        return [{"role": "assistant", "content": answer}]

    for prompt in (asked, json.dumps(asked), str(asked)):
        whole = [{"prompt": prompt, "response": json.dumps(said(text)), "score": n} for n, text in enumerate("ab")]
        lists = [{"prompt": prompt, "responses": [json.dumps(said(text)) for text in "ab"], "scores": [0, 1]}]
        for rows in (whole, lists):
            (pair,) = of(rows, as_chat=as_chat)
            assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (asked, said("b"), said("a"))
    assert "written as text" not in caplog.text
    (pair,) = of([{"prompt": json.dumps(asked), "responses": ["a", "b"], "scores": [0, 1]}], as_chat=as_chat)
    assert "1 prompts, answers or system texts are messages, written as text, and are taken as text" in caplog.text
    assert json.dumps(asked) in str(pair["prompt"])
    caplog.clear()
    of([{"prompt": f"[{asked[0]}, None]", "responses": ["a", "[OrderedDict(role='user')]"], "scores": [0, 1]}])
    assert "1 prompts, answers or system texts are messages, written as text" in caplog.text


@pytest.mark.parametrize("min_gap", [None, 0, 0.2, 1])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_closest_by_brute_force(k, min_gap):
    rng = random.Random(k)
    for levels in (4, 1000):
        scores = [rng.randrange(levels) * 3 / levels for _ in range(12)]
        rows = [{"prompt": "p", "responses": [f"r{i}" for i in range(12)], "scores": scores}]
        every = of(rows, strategy="all", min_gap=min_gap)
        gaps = sorted(row["score_chosen"] - row["score_rejected"] for row in every)
        found = of(rows, strategy="closest", k=k, min_gap=min_gap)
        assert sorted(row["score_chosen"] - row["score_rejected"] for row in found) == gaps[:k]
        assert texts(found) <= texts(every)


def test_thousands_of_answers_to_one_prompt():
    """Pairs are not all made before the closest is taken; nobody trains on more than a million of one prompt."""
    rng = random.Random(0)
    scores = [rng.random() for _ in range(3000)]
    rows = [{"prompt": "p", "responses": [f"r{i}" for i in range(3000)], "scores": scores}]
    (pair,) = of(rows, strategy="closest")
    ranked = sorted(scores)
    assert pair["score_chosen"] - pair["score_rejected"] == min(np.diff(ranked))
    (pair,) = of(rows)
    assert (pair["score_chosen"], pair["score_rejected"]) == (ranked[-1], ranked[0])
    with pytest.raises(ValueError, match="the 3,000 answers to the prompt of row 0 make more than 1,000,000 pairs"):
        of(rows, strategy="all")


@pytest.mark.parametrize(
    "cut", [[False, True], [0, 1], [0.0, 1.0], ["false", "True"], [None, "yes"], "[false, true]", "[0, 1]"]
)
def test_answers_that_were_cut_in_other_words(cut):
    none = cut.replace("true", "false").replace("1", "0") if isinstance(cut, str) else cut[:1] * 2
    rows = [{"prompt": "p", "responses": ["c", "cut"], "scores": [1, 3], "truncated": cut}]
    rows += [{"prompt": "q", "responses": ["a", "b"], "scores": [1, 3], "truncated": none}]
    assert texts(of(rows, drop_truncated=True)) == {("q", "b", "a")}


def random_row(rng: random.Random, i: int) -> Row:
    """A list with anything that people have."""
    k = rng.randrange(6)
    words = ["a", "b", "ü ☘", "", " ", "N/A", "[1]", '{"role": "x"}']
    scores: list[Callable[[], Any]] = [
        lambda: str(rng.randrange(4)),
        lambda: None,
        lambda: "N/A",
        lambda: f" {rng.random():.2f} ",
    ]
    return {
        "prompt": rng.choice(["q", f"q{i}", "", "[2]"]),
        "responses": [rng.choice([*words, None]) for _ in range(k)],
        "scores": [rng.choice(scores)() for _ in range(k)],
    }


@pytest.mark.parametrize("seed", range(5))
def test_streams_of_odd_rows(seed):
    """Every pair is one that brute force finds, and each of these is there; equal prompts are one list."""
    rng = random.Random(seed)
    rows = [random_row(rng, i) for i in range(150)]
    expected: Counter[tuple[Any, ...]] = Counter()
    lists: dict[Any, dict[str, list[float]]] = {}
    for i, row in enumerate(rows):
        known = lists.setdefault((row["prompt"], None if row["prompt"] else i), {})
        for text, score in zip(row["responses"], row["scores"], strict=True):
            if text is not None and text.strip() and score not in (None, "N/A"):
                known.setdefault(text, []).append(float(score))
    for (prompt, _), known in lists.items():
        means = {text: sum(some) / len(some) for text, some in known.items()}
        expected.update((prompt, a, b, means[a], means[b]) for a in means for b in means if means[a] > means[b])
    names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    assert Counter(tuple(row[name] for name in names) for row in of(rows, strategy="all")) == expected


def test_text_and_messages_become_messages():
    rows = [
        {"prompt": [user("q"), bot("x"), user("y")], "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": [user("q")], "responses": ["c", "d"], "scores": [1, 2]},
    ]
    found = make_pairs(Dataset.from_list(rows))
    assert found["chosen"][:] == [[bot("b")], [bot("d")]]
    # in a table all are text; a prompt alone that is JSON may be just that, as it is for pairs
    rows.append({"prompt": "plain", "responses": ["e", "f"], "scores": [1, 2]})
    table = [{name: v if isinstance(v, str) else json.dumps(v) for name, v in row.items()} for row in rows]
    found = make_pairs(Dataset.from_list(table))
    assert found["prompt"][:] == [rows[0]["prompt"], rows[1]["prompt"], [user("plain")]]
    assert [row.is_conversational for row in open_rows(found, "train")] == [True] * 3
    alone = make_pairs(Dataset.from_list([{**row, "prompt": json.dumps(row["prompt"])} for row in rows[:2]]))
    assert alone[1]["prompt"] == json.dumps([user("q")])
    assert [row.is_conversational for row in open_rows(alone, "train")] == [False] * 2


def test_text_says_that_nothing_stands_between(caplog):
    caplog.set_level(logging.INFO, "trl_margins")
    of(HELPSTEER2)
    assert "text, with nothing between them: for a model with a chat template make messages" in caplog.text
    assert "as_chat=True (--as_chat true)" in caplog.text
    caplog.clear()
    (row,) = of(HELPSTEER2, as_chat=True)
    assert row["prompt"] == [user("Name a colour."), bot("Which?"), user("Any.")]
    of(list_rows(3))  # which are used as they are everywhere
    assert "nothing between" not in caplog.text


def test_columns_of_the_prompts_stay():
    found = make_pairs(Dataset.from_list(NECTAR), "all")
    assert set(found.column_names) == {
        *("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "chosen_model", "rejected_model"),
        *("turns", "num_responses", "source", "good_natured"),
    }
    assert found["source"][:] == [["sharegpt"]] * 3
    assert (found[0]["score_chosen"], found[0]["score_rejected"]) == (-1.0, -3.0)
    rows = [{**row, "task": "colours", "id": i} for i, row in enumerate(HELPSTEER2)]
    assert make_pairs(Dataset.from_list(rows)).column_names[5:] == ["task"]
    # what was of an earlier pair would be stale
    rows = [{**row, "evaluation_factor": 0.5, "ref_chosen_logps": 1.0, "is_flipped": True} for row in list_rows(3)]
    assert make_pairs(Dataset.from_list(rows)).column_names[7:] == ["topic"]
    tools = [{**row, "tools": "[1]", "prompt": [user(row["prompt"])]} for row in list_rows(3)]
    assert next(iter(open_rows(make_pairs(Dataset.from_list(tools)), "train"))).template == {"tools": [1]}


@pytest.mark.parametrize("name", FORMS)
def test_pairs_of_every_form_can_be_trained_on(name):
    rows, options, expected = FORMS[name]
    pairs = [answers for _, answers in expected if len({score for _, score, _ in answers}) > 1]
    if not pairs:
        with pytest.raises(ValueError, match="no pair is left"):
            make_pairs(dataset_of(name, rows), **options)
        return
    found = make_pairs(dataset_of(name, rows), as_chat=True, **options)
    assert len(list(open_rows(found, "train"))) == len(pairs) == len(found)
    columns = find_score_columns(found.column_names)
    assert columns is not None
    counts = check_scores(found, columns, "train")
    assert (counts.n_ties, counts.n_reversed) == (0, 0)


def test_pairs_go_into_the_splits():
    pairs = make_pairs(Dataset.from_list(list_rows(60, 8)), "all", k=12)
    splits = generalization_splits(pairs, unseen_models=0.4)
    assert set(splits) == {"train", "id", "prompt_ood", "response_ood", "mutual_ood"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": "best_worst"},
            "unknown strategy 'best_worst'; known: best-worst, .*; did you mean 'best-worst'",
        ),
        ({"k": 0}, "k must be a whole number, at least 1; it is 0"),
        ({"k": 1.5}, "k must be a whole number"),
        ({"min_gap": -1}, "min_gap must be a number, at least 0; it is -1"),
        ({"min_gap": float("nan")}, "min_gap must be a number"),
        ({"score_columns": ["x"]}, r"the lists: score_columns names \['x'\], and there are only the columns"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        of(list_rows(2), **options)


def test_streams_are_refused():
    with pytest.raises(TypeError, match="make_pairs takes one split that is not streamed"):
        make_pairs(Dataset.from_list(list_rows(2)).to_iterable_dataset())


# The command


def test_the_command(tmp_path, capsys):
    rows = list_rows()
    lists = str(tmp_path / "lists.jsonl.gz")
    with gzip.open(lists, "wt") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    expected = of(rows, strategy="best-random", k=2, min_gap=2, seed=7, balance_length=True)
    argv = ["pairs", lists, "--strategy", "best-random", "--k", "2", "--min_gap", "2", "--seed", "7"]
    argv += ["--balance_length", "true", "--out"]
    for name in ("pairs.jsonl.gz", "pairs.parquet", "pairs.jsonl", "pairs.csv", "folder"):
        assert main([*argv, str(tmp_path / "out" / name)]) == 0
        printed = capsys.readouterr().out
        gaps = [row["score_chosen"] - row["score_rejected"] for row in expected]
        numbers = [f"{number:.4g}" for number in (np.mean(gaps), np.median(gaps), max(gaps))]
        prompts = len({row["prompt"] for row in expected})
        cells = [str(len(expected)), str(prompts), *numbers]
        assert re.search("train +" + " +".join(map(re.escape, cells)), printed)
        assert printed.endswith(f"written to {tmp_path / 'out' / name}\n")
    assert load_from_disk(str(tmp_path / "out" / "folder")).to_list() == expected
    with gzip.open(tmp_path / "out" / "pairs.jsonl.gz", "rt") as file:
        assert [json.loads(line) for line in file] == expected
    assert Dataset.from_parquet(str(tmp_path / "out" / "pairs.parquet")).to_list() == expected


def test_answers_that_speak_of_a_model_have_their_models():
    lists = {"prompt": "q", "completions": ["the model says", "b"], "scores": [2.0, 1.0], "models": ["one", "two"]}
    (pair,) = make_pairs(Dataset.from_list([lists]))
    assert (pair["chosen_model"], pair["rejected_model"]) == ("one", "two")


def test_scores_that_are_none_of_the_lists():
    vote = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "model_a", "turn": 1}
    with pytest.raises(ValueError, match=r"and \['turn'\] are no scores of these lists, which have their own"):
        make_pairs(Dataset.from_list([vote]), score_columns=["turn"])


def test_a_column_of_models_is_known_by_its_name_in_any_case():
    assert may_be_meant("Model_A")
    assert may_be_meant("model")
    assert not may_be_meant("subset")


def test_one_column_of_scores_by_its_name():
    rows = [{"prompt": "q", "response": f"a{i}", "helpfulness": i, "correctness": 3 - i} for i in range(3)]
    for given in ("correctness", ["correctness"]):
        (pair,) = make_pairs(Dataset.from_list(rows), score_columns=given)
        assert (pair["chosen"], pair["rejected"]) == ("a0", "a2")


def test_the_command_and_several_splits(tmp_path):
    both = DatasetDict({name: Dataset.from_list(list_rows(5, seed=i)) for i, name in enumerate(("train", "test"))})
    both.save_to_disk(tmp_path / "lists")
    argv = ["pairs", str(tmp_path / "lists"), "--out"]
    with pytest.raises(ValueError, match=r"holds one split, not .*: name one with --dataset_split, or a folder"):
        main([*argv, str(tmp_path / "x.jsonl")])
    assert main([*argv, str(tmp_path / "x.jsonl"), "--dataset_split", "test"]) == 0
    assert main([*argv, str(tmp_path / "pairs")]) == 0
    written = load_from_disk(str(tmp_path / "pairs"))
    assert {name: split.to_list() for name, split in written.items()} == {n: of(d.to_list()) for n, d in both.items()}
    with pytest.raises(ValueError, match=r"a file is one of .jsonl, .jsonl.gz"):
        main([*argv, str(tmp_path / "x.txt")])
    with pytest.raises(ValueError, match=r"CSV has no lists, and \['prompt', 'chosen', 'rejected'\] are more"):
        main([*argv, str(tmp_path / "x.csv"), "--dataset_split", "test", "--as_chat", "true"])
    preference_rows(3).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="lists"):
        main(["pairs", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_tool_calls_and_arguments_stay_as_they_are(tmp_path):
    """Objects of one type would get the keys of one another, and 1 beside 1.5 would be 1.0."""

    def calls(arguments: Any) -> dict[str, Any]:
        return {**bot("4"), "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    for one, other in (({"k": 1}, {"z": None}), ({"k": 1}, {"k": 1.5}), ({"k": 1}, {"k": "a"})):
        rows = [
            {"prompt": [user(f"q{i}")], "responses": [calls(arguments), bot("null")], "scores": [2, 1]}
            for i, arguments in enumerate((one, other))
        ]
        found = make_pairs(Dataset.from_list(rows, on_mixed_types="use_json"))
        assert json.dumps(found["chosen"][:]) == json.dumps([[row["responses"][0]] for row in rows])
        (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for file in (tmp_path / "pairs.jsonl", tmp_path / "pairs.parquet"):
            assert main(["pairs", str(tmp_path / "lists.jsonl"), "--out", str(file)]) == 0
            written = load_splits(str(file))["train"]
            assert json.dumps(written["chosen"][:]) == json.dumps([[row["responses"][0]] for row in rows])
            assert written["rejected"][:] == [[bot("null")]] * 2
    plain = [{"prompt": [user("q")], "responses": [bot("4"), bot("b")], "scores": [2, 1]}]
    assert make_pairs(Dataset.from_list(plain)).features["chosen"] == Dataset.from_list(plain).features["responses"]
