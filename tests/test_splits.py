"""Generalization splits: every pair in the scenario that its prompt and models make, counted and repeatable."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter, defaultdict
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from conftest import preference_rows
from datasets import Dataset, DatasetDict, List, Value
from said import word_for_word  # noqa: F401 - its messages are held against said/

from trl_margins.data.splits import SPLITS, generalization_splits

MODELS = [f"model-{i}" for i in range(10)]
NAMES = ("train", *SPLITS)


def pair(prompt: Any, one: str, other: str) -> dict[str, Any]:
    question = prompt if isinstance(prompt, str) else prompt[0]["content"]
    sides = dict(zip(("chosen", "rejected"), (one, other), strict=True))
    answers = {side: f"{model} on {question}" for side, model in sides.items()}
    return {"prompt": prompt, **answers, **{f"{side}_model": model for side, model in sides.items()}}


def pair_rows(n_prompts: int = 30, n_pairs: int = 12, seed: int = 0) -> Dataset:
    """n_pairs pairs of ten models for each prompt, in random order, none of them twice."""
    rng = random.Random(seed)
    rows = [
        pair([{"role": "user", "content": f"question {i}"}], *rng.sample(both, 2)) | {"source": f"s{i}"}
        for i in range(n_prompts)
        for both in rng.sample(list(combinations(MODELS, 2)), n_pairs)
    ]
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def key(row: dict[str, Any]) -> str:
    return str(row["prompt"])


def prompts(split: Dataset) -> set[str]:
    return {key(row) for row in split}


def models(split: Dataset) -> set[str]:
    return {*split["chosen_model"], *split["rejected_model"]}


def rows_of(splits: DatasetDict) -> dict[str, list[str]]:
    return {name: sorted(json.dumps(row, sort_keys=True) for row in split) for name, split in splits.items()}


class TestPairs:
    def test_every_pair_is_where_it_belongs(self, caplog):
        """Told from the result who is unseen, the rest follows."""
        rows = pair_rows()
        with caplog.at_level(logging.INFO, "trl_margins"):
            splits = generalization_splits(rows)
        assert tuple(splits) == NAMES
        unseen = models(splits["mutual_ood"])
        new = prompts(splits["prompt_ood"])
        assert len(unseen) == 3
        assert len(new) == 6
        expected = defaultdict(list)
        for row in rows:
            n_unseen = len({row["chosen_model"], row["rejected_model"]} & unseen)
            name = {0: "seen", 1: "mixed", 2: "unseen"}[n_unseen]
            expected[key(row) in new, name].append(json.dumps(row, sort_keys=True))
        found = rows_of(splits)
        assert found["prompt_ood"] == sorted(expected[True, "seen"])
        assert found["mutual_ood"] == sorted(expected[True, "unseen"])
        assert found["response_ood"] == sorted(expected[False, "unseen"])
        assert sorted(found["train"] + found["id"]) == sorted(expected[False, "seen"])
        assert len(found["id"]) == round(0.1 * len(expected[False, "seen"]))
        n_mixed = len(expected[True, "mixed"] + expected[False, "mixed"])
        assert f"dropped {n_mixed} of {len(rows)} pairs, of a seen and an unseen model" in caplog.text
        assert "3 of 10 models are unseen: " + ", ".join(sorted(unseen)) in caplog.text
        assert f"rows: train {len(found['train'])}, id {len(found['id'])}, prompt_ood" in caplog.text
        assert all(split.features == rows.features for split in splits.values())

    @pytest.mark.parametrize("held_out", [0.1, 0.35])
    def test_id_and_response_ood_are_on_prompts_of_training(self, held_out, caplog):
        rows = pair_rows(60, 6)
        with caplog.at_level(logging.INFO, "trl_margins"):
            splits = generalization_splits(rows, unseen_models=0.5, held_out=held_out)
        trained = prompts(splits["train"])
        assert prompts(splits["id"]) <= trained
        assert prompts(splits["response_ood"]) <= trained
        assert not trained & (prompts(splits["prompt_ood"]) | prompts(splits["mutual_ood"]))
        lost = int(re.search(r"dropped (\d+) pairs of response_ood, whose prompts have no training", caplog.text)[1])
        mixed = int(re.search(r"dropped (\d+) of 360 pairs", caplog.text)[1])
        assert lost > 0
        assert sum(map(len, splits.values())) + lost + mixed == len(rows)

    def test_neither_the_order_of_rows_nor_new_calls_matter(self):
        rows = pair_rows()
        first = rows_of(generalization_splits(rows, seed=4))
        assert rows_of(generalization_splits(rows.shuffle(seed=1), seed=4)) == first
        assert rows_of(generalization_splits(rows, seed=5)) != first

    def test_each_draw_has_its_own_number(self):
        """Another share of one leaves the others alone, and a larger share holds the smaller one."""
        rows = pair_rows(60, 20)
        base = generalization_splits(rows)
        more_prompts = generalization_splits(rows, unseen_prompts=0.4)
        more_models = generalization_splits(rows, unseen_models=0.5)
        more_held_out = generalization_splits(rows, held_out=0.3)
        assert prompts(base["prompt_ood"]) < prompts(more_prompts["prompt_ood"])
        assert models(base["mutual_ood"]) == models(more_prompts["mutual_ood"])
        assert models(base["mutual_ood"]) < models(more_models["mutual_ood"])
        assert prompts(base["prompt_ood"]) == prompts(more_models["prompt_ood"])
        assert set(map(str, base["id"])) < set(map(str, more_held_out["id"]))
        assert rows_of(base)["mutual_ood"] == rows_of(more_held_out)["mutual_ood"]

    def test_shares_are_rounded_and_have_defaults(self):
        """A fifth of 23 prompts is 4.6, and three tenths of six models 1.8."""
        rows = pair_rows(23, 20).filter(lambda r: max(r["chosen_model"], r["rejected_model"]) < MODELS[6])
        splits = generalization_splits(rows)
        assert len(prompts(splits["prompt_ood"]) | prompts(splits["mutual_ood"])) == 5
        assert len(models(splits["mutual_ood"])) == 2
        seen = len(splits["train"]) + len(splits["id"])
        assert len(splits["id"]) == round(seen / 10)
        given = generalization_splits(rows, unseen_prompts=0.2, unseen_models=0.3, held_out=0.1, seed=0)
        assert rows_of(splits) == rows_of(given)

    def test_models_by_name(self):
        unseen = MODELS[2:7:2]
        splits = generalization_splits(pair_rows(), unseen_models=unseen)
        assert models(splits["response_ood"]) | models(splits["mutual_ood"]) == set(unseen)
        assert models(splits["train"]) == set(MODELS) - set(unseen)

    def test_columns_by_name(self):
        rows = pair_rows()
        renamed = rows.rename_columns({"chosen_model": "a", "rejected_model": "b"})
        splits = generalization_splits(renamed, columns=["a", "b"])
        back = {
            name: split.rename_columns({"a": "chosen_model", "b": "rejected_model"}) for name, split in splits.items()
        }
        assert rows_of(back) == rows_of(generalization_splits(rows))

    def test_twins_are_not_torn(self):
        """Every pair stands there twice: as it is, or the other way round."""
        once = pair_rows(20, 10).remove_columns("source").to_list()
        again = [pair(row["prompt"], row["rejected_model"], row["chosen_model"]) for row in once[::2]] + once[1::2]
        splits = generalization_splits(Dataset.from_list(once + again), held_out=0.3)

        def pairs(split: Dataset) -> Counter:
            return Counter((key(row), frozenset((row["chosen"], row["rejected"]))) for row in split)

        assert set(pairs(splits["id"]).values()) == {2}
        assert not pairs(splits["id"]).keys() & pairs(splits["train"]).keys()
        assert len(pairs(splits["id"])) == round(0.3 * len(pairs(splits["id"]) | pairs(splits["train"])))

    def test_a_format_stays(self):
        splits = generalization_splits(pair_rows().with_format("numpy", columns=["source"]))
        assert {split.format["type"] for split in splits.values()} == {"numpy"}
        assert splits["id"].format["columns"] == ["source"]


def list_rows(n: int = 40, n_answers: int = 8, levels: int = 100, seed: int = 0) -> list[dict[str, Any]]:
    """Scores are whole numbers below `levels`; the text of an answer says whose it is."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        by = rng.sample(MODELS, n_answers)
        rows.append(
            {
                "prompt": f"question {i}",
                "responses": [f"{model} on {i}" for model in by],
                "scores": [float(rng.randrange(levels)) for _ in by],
                "models": by,
            }
        )
    return rows


class TestLists:
    def test_best_against_worst(self):
        rows = list_rows()
        splits = generalization_splits(Dataset.from_list(rows), unseen_models=0.4, held_out=0.2)
        by_prompt = {row["prompt"]: row for row in rows}
        unseen = models(splits["response_ood"]) | models(splits["mutual_ood"])
        assert len(unseen) == 4
        held_out = prompts(splits["id"])
        assert len(held_out) == round(0.2 * len(splits["train"]))
        assert held_out < prompts(splits["train"])
        assert prompts(splits["response_ood"]) <= prompts(splits["train"])
        assert not prompts(splits["train"]) & (prompts(splits["prompt_ood"]) | prompts(splits["mutual_ood"]))
        assert len(prompts(splits["prompt_ood"]) | prompts(splits["mutual_ood"])) == 8
        for name, split in splits.items():
            assert len(prompts(split)) == len(split)
            for row in split:
                source = by_prompt[row["prompt"]]
                of_unseen = name in ("response_ood", "mutual_ood")
                at = [i for i, model in enumerate(source["models"]) if (model in unseen) == of_unseen]
                scores = np.sort(np.array(source["scores"])[at])
                depth = int(name == "train" and row["prompt"] in held_out)
                assert (row["score_rejected"], row["score_chosen"]) == (scores[depth], scores[-1 - depth])
                assert row["score_chosen"] > row["score_rejected"]
                for side in ("chosen", "rejected"):
                    i = source["models"].index(row[f"{side}_model"])
                    assert i in at
                    assert (row[side], row[f"score_{side}"]) == (source["responses"][i], source["scores"][i])

        def answers(split: Dataset) -> set[str]:
            return {*split["chosen"], *split["rejected"]}

        assert not answers(splits["id"]) & answers(splits["train"])

    def test_prompts_without_a_pair_are_counted(self, caplog):
        rows = list_rows(60, 5, levels=3, seed=1)
        unseen = set(MODELS[:4])
        with caplog.at_level(logging.INFO, "trl_margins"):
            splits = generalization_splits(Dataset.from_list(rows), unseen_models=unseen, held_out=0.05)
        counts: Counter = Counter()
        for row in rows:
            for of_unseen in (False, True):
                scores = [s for s, m in zip(row["scores"], row["models"], strict=True) if (m in unseen) == of_unseen]
                counts["few" if len(scores) < 2 else "tie" if len(set(scores)) == 1 else "pair"] += 1
        few, ties = (
            sum(map(int, re.findall(r" (\d+)", re.search(rf"left out prompts {why}: (.*)", caplog.text)[1])))
            for why in ("with fewer than two completions", "whose best and worst completions are tied")
        )
        lost = int(re.search(r"left out (\d+) prompts of response_ood that have no training", caplog.text)[1])
        assert (few, ties) == (counts["few"], counts["tie"])
        assert few * ties * lost > 0
        n_pairs = sum(len(split) for name, split in splits.items() if name != "id")
        assert n_pairs + lost == counts["pair"]

    def test_the_order_of_rows_and_of_answers_does_not_matter(self):
        rows = list_rows(levels=6)
        first = generalization_splits(Dataset.from_list(rows))
        rng = random.Random(3)
        shuffled = []
        for row in rng.sample(rows, len(rows)):
            order = rng.sample(range(8), 8)
            shuffled.append({"prompt": row["prompt"], **{n: [row[n][i] for i in order] for n in list(row)[1:]}})
        assert rows_of(generalization_splits(Dataset.from_list(shuffled))) == rows_of(first)
        assert rows_of(generalization_splits(Dataset.from_list(rows), seed=1)) != rows_of(first)

    def test_rows_with_equal_prompts_are_one(self, caplog):
        rows = list_rows()
        halves = [
            {"prompt": r["prompt"], **{n: r[n][a:b] for n in list(r)[1:]}} for r in rows for a, b in ((0, 3), (3, 8))
        ]
        with caplog.at_level(logging.INFO, "trl_margins"):
            merged = generalization_splits(Dataset.from_list(halves))
        assert rows_of(merged) == rows_of(generalization_splits(Dataset.from_list(rows)))
        assert "40 of 80 rows have the prompt of another one and were merged" in caplog.text

    def test_other_tools_are_another_list_of_the_same_prompt(self):
        """Both are in the same scenario, so that no prompt of training is unseen."""
        rows = list_rows()
        twice = [{**row, "tools": json.dumps([{"name": name}])} for row in rows for name in "ab"]
        splits = generalization_splits(Dataset.from_list(twice))
        for name in ("prompt_ood", "mutual_ood"):
            assert prompts(splits[name]) == prompts(generalization_splits(Dataset.from_list(rows))[name])
            assert Counter(splits[name]["prompt"]) == dict.fromkeys(prompts(splits[name]), 2)
        assert not prompts(splits["train"]) & prompts(splits["prompt_ood"])

    @pytest.mark.parametrize("why", ["answers", "scores"])
    def test_what_training_had_left_of_a_prompt_must_be_another_pair(self, why):
        """The second best answer says what the best says, or is tied with the second worst."""
        rows = list_rows(20)
        for row in rows:
            if why == "answers":
                row["responses"] = ["yes" if score > np.median(row["scores"]) else "no" for score in row["scores"]]
            else:
                row["scores"] = [1.0, *[5.0] * 6, 9.0]
        complaint = r"held_out=0.1 of \d+ pairs .* is [12], but only 0 can go without their prompt"
        with pytest.raises(ValueError, match=complaint):
            generalization_splits(Dataset.from_list(rows), unseen_models=MODELS[:2])

    def test_what_is_held_out_is_not_what_would_be_unseen_next(self):
        rows = Dataset.from_list(list_rows(60))
        held_out = prompts(generalization_splits(rows)["id"])
        assert held_out - prompts(generalization_splits(rows, unseen_prompts=0.4)["prompt_ood"])

    def test_messages(self):
        """The answers become messages where the prompt is; messages stay as they are."""
        rows = list_rows()
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        told = Dataset.from_list(rows)
        for row in rows:
            row["responses"] = [[{"role": "assistant", "content": text}] for text in row["responses"]]
        both = [rows_of(generalization_splits(each)) for each in (told, Dataset.from_list(rows))]
        assert both[0] == both[1]
        message = List({"role": Value("string"), "content": Value("string")})
        for split in generalization_splits(told).values():
            assert split.features["prompt"] == split.features["chosen"] == split.features["rejected"] == message
            assert split[0]["chosen"] == [
                {
                    "role": "assistant",
                    "content": f"{split[0]['chosen_model']} on {split[0]['prompt'][0]['content'][9:]}",
                }
            ]

    def test_columns(self):
        splits = generalization_splits(Dataset.from_list(list_rows()).with_format("numpy"))
        names = ["prompt", "chosen", "rejected", "score_chosen", "score_rejected", "chosen_model", "rejected_model"]
        for split in splits.values():
            assert split.column_names == names
            assert split.features["score_chosen"] == split.features["score_rejected"] == Value("float64")
            assert split.features["chosen"] == Value("string")

    @pytest.mark.parametrize(
        ("column", "value", "complaint"),
        [
            (
                "scores",
                [1.0, None, 3.0],
                "column 'scores', row 7 of the lists, response 1: the score None is None: drop",
            ),
            (
                "scores",
                [1.0, float("nan"), 3.0],
                "column 'scores', row 7 of the lists, response 1: the score nan is NaN",
            ),
            ("scores", [1.0, 2.0], "row 7 of the lists: 3 responses and 2 scores and 3 models: give each"),
            ("prompt", None, "column 'prompt', row 7 of the lists: the prompt is None: drop the row"),
            ("models", ["model-1", None, "model-2"], "column 'models', row 7: the model None is not a name"),
        ],
    )
    def test_bad_rows(self, column, value, complaint):
        rows = list_rows(12, 3)
        rows[7][column] = value
        with pytest.raises(ValueError, match=complaint):
            generalization_splits(Dataset.from_list(rows))


class TestRefused:
    @pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), True, None])
    @pytest.mark.parametrize("name", ["unseen_prompts", "held_out"])
    def test_shares(self, name, share):
        with pytest.raises(ValueError, match=f"{name} is a share between 0 and 1, got"):
            generalization_splits(pair_rows(), **{name: share})

    @pytest.mark.parametrize("share", [0, 1, float("nan"), True, "model-1", None])
    def test_shares_of_models(self, share):
        with pytest.raises(ValueError, match="unseen_models is a share between 0 and 1, or a list of names, got"):
            generalization_splits(pair_rows(), unseen_models=share)

    def test_unknown_models(self):
        with pytest.raises(ValueError, match=r"names \['gpt-5'\], but the models are \['model-0', 'model-1'"):
            generalization_splits(pair_rows(), unseen_models={"gpt-5", "model-1"})

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"unseen_models": MODELS}, "train is empty: lower unseen_prompts, unseen_models or held_out"),
            ({"held_out": 0.0001}, "id is empty: raise held_out"),
            ({"unseen_prompts": 0.001}, "prompt_ood is empty: raise unseen_prompts"),
            ({"unseen_models": MODELS[:1]}, "response_ood is empty: raise unseen_models"),
        ],
    )
    def test_empty_splits(self, options, complaint):
        with pytest.raises(ValueError, match=f"the split {complaint}"):
            generalization_splits(pair_rows(), **options)

    def test_an_empty_mutual_split(self):
        rows = pair_rows()
        unseen = models(generalization_splits(rows)["mutual_ood"])
        new = prompts(generalization_splits(rows)["prompt_ood"])
        rows = rows.filter(lambda r: key(r) not in new or not unseen & {r["chosen_model"], r["rejected_model"]})
        with pytest.raises(ValueError, match="split mutual_ood is empty: raise unseen_prompts or unseen_models"):
            generalization_splits(rows)

    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_a_few_lists(self, n):
        """Of which the last split is empty."""
        with pytest.raises(ValueError, match=r"the split \w+ is empty"):
            generalization_splits(Dataset.from_list(list_rows(n, 3)))

    def test_an_empty_set(self):
        with pytest.raises(ValueError, match="the split train is empty"):
            generalization_splits(pair_rows().select([]))
        with pytest.raises(ValueError, match="the split train is empty"):
            generalization_splits(Dataset.from_list(list_rows()).select([]))

    def test_more_held_out_than_training_can_spare(self):
        rows = pair_rows(30, 12)
        with pytest.raises(ValueError, match="without their prompt leaving the training set: lower held_out") as error:
            generalization_splits(rows, held_out=0.99)
        most = float(re.search(r"lower held_out to ([\d.]+) or less", str(error.value))[1])
        splits = generalization_splits(rows, held_out=most)
        assert len(splits["train"]) == len(prompts(splits["train"]))

    def test_one_column_of_scores_by_its_name(self):
        rows = Dataset.from_list(list_rows())
        named = [generalization_splits(rows, score_columns=name) for name in ("scores", ["scores"])]
        assert named[0]["train"].to_list() == named[1]["train"].to_list()

    def test_one_pair_a_prompt(self):
        """Then a pair that is held out takes its prompt with it, and would be prompt_ood."""
        with pytest.raises(
            ValueError, match=r"but only 0 can go .* training set: give data with two pairs, or four completions"
        ):
            generalization_splits(pair_rows(200, 1))

    def test_columns(self):
        rows = pair_rows()
        with pytest.raises(
            ValueError, match=r"takes the two columns that hold the models of a pair, got \['source'\]"
        ):
            generalization_splits(rows, columns=["source"])
        with pytest.raises(ValueError, match=r"pairs need the columns \['winner'\], and the data set has only"):
            generalization_splits(rows, columns=["winner", "source"])
        with pytest.raises(ValueError, match=r"pairs need the columns \['prompt'\]"):
            generalization_splits(rows.remove_columns("prompt"))
        with pytest.raises(ValueError, match=r"neither the columns of pairs .* nor those of lists"):
            generalization_splits(preference_rows(4))
        nameless = (
            rows.select(range(3)).remove_columns("rejected_model").add_column("rejected_model", ["a", None, "b"])
        )
        with pytest.raises(ValueError, match="column 'rejected_model', row 1: the model None is not a name"):
            generalization_splits(nameless)
        first = pair("p", *MODELS[:2])
        for prompt in ("", None):
            with pytest.raises(ValueError, match=f"column 'prompt', row 1: the prompt is {prompt!r}: drop the row"):
                generalization_splits(Dataset.from_list([first, first | {"prompt": prompt}]))

    def test_other_sets(self):
        with pytest.raises(TypeError, match="one split that is not streamed, got DatasetDict"):
            generalization_splits(DatasetDict(train=pair_rows()))
