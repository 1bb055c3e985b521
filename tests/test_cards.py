"""Model cards: what they say, that the Hub can read them, and that no name in them does anything."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import markdown
import pytest
import torch
from conftest import TRAINED, load, preference_rows, quiet, trainer_of
from datasets import Dataset, concatenate_datasets, load_dataset
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig
from said import hear, word_for_word  # noqa: F401 - its messages are held against said/
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

from trl_margins import (
    MarginCPOConfig,
    MarginCPOTrainer,
    MarginDPOConfig,
    MarginDPOTrainer,
    ScoreGapWeight,
    Term,
    register_term,
    registry,
)
from trl_margins.data.noise import flip_labels
from trl_margins.evaluation.listwise import listwise_report
from trl_margins.evaluation.rm_bench import rm_bench_report
from trl_margins.methods import MARGINS, METHODS, WEIGHTS, names_of
from trl_margins.printable import printable
from trl_margins.registry import get_method
from trl_margins.report.card import CardFacts, Image, SetFacts, completed, hub_id
from trl_margins.report.card_results import Evaluation, EvaluationReport, eval_results, logged_evaluations, read_report
from trl_margins.report.markdown import code, fenced, inline
from trl_margins.report.page import html_page
from trl_margins.report.run_folder import read_runs
from trl_margins.rows import open_rows
from trl_margins.trainers import card as cards
from trl_margins.trainers import configs
from trl_margins.trainers.card import settings
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

NASTY = (
    "a\"b'\n\n---\n\n# h1 | <script>x()</script> `c` *e* _f_ [l](http://e) {{ 7 }} ${t}$ \\| &amp; ~~s~~ <b>\u2028z"
)


def build(method, folder, tokenizer, out, base="cpo", rows=None, evals=None, more=None, model=None, **options):
    return trainer_class(method, base)(
        model or load(folder),
        args=config_class(method, base)(**quiet(output_dir=str(out), learning_rate=1e-3, **options)),
        train_dataset=rows or preference_rows(8, seed=3),
        eval_dataset=evals,
        processing_class=tokenizer,
        **(more or {}),
    )


def card_of(folder) -> ModelCard:
    return ModelCard.load(Path(folder, "README.md"))


def section(text: str, heading: str) -> str:
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def rows_of(text: str) -> dict[str, list[str]]:
    """First cell → the others, of every table."""
    tables = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in tables}


def assert_valid(folder) -> None:
    """What the Hub asks of the metadata, so far as it can be asked here."""
    data = metadata_load(Path(folder, "README.md"))
    card = card_of(folder)
    assert str(ModelCard(card.content)) == card.content
    assert data == card.data.to_dict()
    assert all(isinstance(tag, str) and tag.isprintable() for tag in data["tags"])
    for key in ("base_model", "datasets"):
        assert data.get(key) is None or hub_id(data[key]) == data[key]
    for model in data.get("model-index", ()):
        assert model["name"]
        assert isinstance(model["name"], str)
        for result in model["results"]:
            assert {"task", "dataset", "metrics"} <= result.keys()
            assert isinstance(result["task"]["type"], str)
            assert all(isinstance(result["dataset"][key], str) for key in ("type", "name"))
            assert all(
                isinstance(metric["type"], str) and metric["value"] == metric["value"] for metric in result["metrics"]
            )
        name, results = model_index_to_eval_results(data["model-index"])
        assert eval_results_to_model_index(name, results) == data["model-index"]


class Page(HTMLParser):
    """Tags in their order, and the text."""

    def __init__(self, markdown_text: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(markdown.markdown(markdown_text, extensions=["tables", "fenced_code"]))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(sorted(name for name, _ in attrs))))

    def handle_data(self, data):
        self.text += data


# Text


@pytest.mark.parametrize(
    "text", [NASTY, "plain_name-1.0/x", "`", "``` ```", "|", "_a_", "__a__", "1 < 2 > 0", "a  b", "é~σ"]
)
@pytest.mark.parametrize("put", [inline, code])
def test_text_is_shown_and_does_nothing(put, text):
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    for around in ("see {} there", "| a | b |\n|---|---|\n| {} | 2 |"):
        page, plain = Page(around.format(put(text))), Page(around.format(put("word")))
        assert page.tags == plain.tags
        assert page.text == plain.text.replace("word", shown)


def test_ordinary_names_stay_readable():
    assert inline("HuggingFaceH4/zephyr_7b-beta v1.0") == "HuggingFaceH4/zephyr_7b-beta v1.0"
    assert inline([True, None, 1e-6, 0.1 + 0.2, {"b", "a"}]) == "on, –, 1e-06, 0.3, a, b"
    assert inline([f"p{i}" for i in range(20)]).endswith("p11, … (20 in all)")
    assert inline([f"p{i}" for i in range(12)]).endswith("p10, p11")


@pytest.mark.parametrize("text", ["```\n# out\n```", "````", "a\r\n\x00b\n    c", "~~~\n<b>"])
def test_nothing_ends_a_block_of_code(text):
    page = Page("before\n\n" + fenced(text, "python") + "\n\nafter")
    assert [tag for tag, _ in page.tags] == ["p", "pre", "code", "p"]
    assert text.replace("\r", "").replace("\x00", "") in page.text


def test_what_the_hub_could_know(tmp_path):
    (tmp_path / "here").mkdir()
    assert hub_id("trl-lib/ultrafeedback_binarized") == "trl-lib/ultrafeedback_binarized"
    assert [hub_id(name) for name in (None, str(tmp_path / "here"), "a/b/c", "a b", "../x", NASTY)] == [None] * 6


# Numbers


HISTORY = [
    {"step": 2, "loss": 1.0},
    {"step": 4, "eval_pwa": 0.9, "eval_pwa_all": 0.7, "eval_n_pairs": 10, "eval_loss": 1.0},
    {"step": 8, "eval_pwa": 0.5, "eval_pwa_all": 0.6, "eval_spearman": float("nan")},
    {"step": 9, "train_runtime": 1.0},
]


def test_the_last_evaluation_or_that_of_the_kept_checkpoint():
    assert logged_evaluations(HISTORY, None) == [Evaluation("", 8, {"pwa": 0.5, "pwa_all": 0.6})]
    assert logged_evaluations(HISTORY, 4) == [Evaluation("", 4, {"pwa": 0.9, "pwa_all": 0.7, "n_pairs": 10})]
    after = [*HISTORY, {"step": 9, "eval_pwa": 0.91}]
    assert logged_evaluations(after, None) == [Evaluation("", 9, {"pwa": 0.91})]
    assert logged_evaluations(after, 4) == [Evaluation("", 4, {"pwa": 0.91})]  # of the checkpoint that was loaded
    assert logged_evaluations(HISTORY, 6) == []  # no number is that model's
    assert logged_evaluations([], None) == []


def test_sets_whose_names_look_like_metrics():
    names = ("n_pairs", "x_pwa", "pwa", "all")
    history = [{"step": 1, f"eval_{name}_pwa_all": i, f"eval_{name}_n_pairs_gap": 3} for i, name in enumerate(names)]
    found = logged_evaluations(history, None)
    assert {of.name: of.numbers["pwa_all"] for of in found} == {name: i for i, name in enumerate(names)}
    assert all(of.numbers["n_pairs_gap"] == 3 for of in found)


def test_results_for_the_hub():
    evaluations = [
        Evaluation("easy", 8, {"pwa": 0.51239, "spearman": -0.5, "n_pairs": 7}),
        Evaluation("hard", 4, {"pwa_all": 1}),
    ]
    easy, rho, hard = eval_results(evaluations, [], 2.0, 8, "me/pairs", "me/pairs", None)
    assert easy == EvalResult(
        task_type="text-generation",
        task_name="Preference ranking",
        dataset_type="me/pairs",
        dataset_name="me/pairs, easy",
        dataset_split="easy",
        metric_type="accuracy",
        metric_name="Pairwise accuracy, score gap ≥ 2",
        metric_value=0.5124,
        metric_args={"min_score_gap": 2.0},
    )
    assert (rho.metric_type, rho.metric_name, rho.metric_value) == ("spearmanr", "Spearman ρ, all completions", -0.5)
    assert hard.metric_name == "Pairwise accuracy, all pairs (at step 4 of 8)"
    (index,) = eval_results_to_model_index("m", [easy, rho, hard])
    assert [result["dataset"]["split"] for result in index["results"]] == ["easy", "hard"]
    (alone,) = eval_results([Evaluation("", 1, {"pwa_all": 1.0})], [], 2.0, 1, None, None, None)
    assert (alone.dataset_type, alone.dataset_name, alone.dataset_split) == (
        "preference-pairs",
        "preference pairs",
        None,
    )


def written_report(tmp_path, name="lists | x") -> Path:
    sets = {
        name: {"kind": "listwise", **listwise_report([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[5, 3, 1], [1, 2, 2]], 10)},
        "RM-Bench": {"kind": "rm-bench", **rm_bench_report([[3, 3, 3]], [[1, 2, 4]], ["chat"], 10)},
    }
    file = tmp_path / "numbers.json"
    file.write_text(json.dumps({"reward": "length-normalized", "min_score_gap": 1.0, "sets": sets}))
    return file


def test_numbers_of_the_evaluate_command(tmp_path):
    report = read_report(written_report(tmp_path))
    results = eval_results([], [report], 2.0, 0, None, None, None)
    values = {(of.dataset_name, of.metric_name): of.metric_value for of in results}
    assert values["lists | x", "NDCG@1"] == 1.0
    assert values["lists | x", "Spearman ρ per prompt"] == pytest.approx((1 + 3**0.5 / 2) / 2, abs=1e-4)
    assert values["RM-Bench", "RM-Bench, easy"] == 1.0  # the rejected answer wins in its richest style alone
    assert 0 < values["RM-Bench", "RM-Bench, hard"] < 1
    assert ("lists | x", "Answers") not in values


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"reward": "sum", "min_score_gap": 1, "sets": {"a": {}}}',
        '{"reward": "sum", "min_score_gap": 1, "sets": {"a": {"kind": "x"}}}',
    ],
)
def test_another_file_is_refused(text, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="was not written by `trl-margins evaluate --json`"):
        read_report(file)


# A whole card


@pytest.fixture(scope="module")
def trained(tiny_model, tokenizer, tmp_path_factory, pictures_of_cards):
    """GapPO on data with ties, reversed and flipped pairs and one whose answers are cut off; a step is 4 pairs."""
    out = tmp_path_factory.mktemp("runs") / "tiny-gappo"
    scores = {0: (3.0, 3.0), 1: (1.0, 4.0), 2: (2.0, 3.0)}
    rows = preference_rows(16, scores=lambda i: scores.get(i, (5.0, 1.0 + i % 4)), seed=3)
    rows = rows.map(lambda row, i: {"prompt": row["prompt"] * (30 if i == 7 else 1)}, with_indices=True)
    trainer = build(
        "gappo",
        tiny_model,
        tokenizer,
        out,
        rows=flip_labels(rows, 0.25),
        evals=preference_rows(12, seed=5),
        num_train_epochs=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        max_length=96,
    )
    trainer.train()
    during = card_of(out)
    assert not (out / "figures").exists()
    trainer.create_model_card(dataset_name="me/pairs")
    return trainer, out, during


def test_a_card_is_valid(trained):
    assert_valid(trained[1])


def test_what_trl_writes_is_there_once(trained):
    text = card_of(trained[1]).text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Quick start", "## Evaluation", "## Training procedure", "## Citations"]
    for part in (
        "### Framework versions",
        "- TRL: ",
        "Cite TRL as:",
        "Cite GapPO as:",
        "@misc{gappo,",
        "trained with GapPO.",
    ):
        assert text.count(part) == 1, part
    assert "None" not in text


def test_data_counts(trained):
    trainer, out, _ = trained
    table = rows_of(section(card_of(out).text, "Data"))
    flipped = sum(trainer.train_dataset["is_flipped"])
    assert table["set"] == ["pairs", "scores from", "ties", "reversed", "flipped", "dropped"]
    columns = "`score_chosen`, `score_rejected`"
    assert table["train"] == ["16", columns, "1", "2", str(flipped), "1"]
    assert flipped == 4
    gaps = [row["score_chosen"] - row["score_rejected"] for row in preference_rows(12, seed=5)]
    assert table["eval"] == ["12", columns, str(gaps.count(0)), "0", "–", "0"]


def test_method_and_settings(trained):
    trainer, out, _ = trained
    text = card_of(out).text
    assert get_method("gappo").formula in section(text, "Method")
    table = rows_of(section(text, "Hyperparameters"))
    for name, value in {
        "`beta`": "1",
        "`simpo_gamma`": "0.5 (in reward units, β inside)",
        "`gamma_beta_ratio`": "0.5 (the same, divided by β)",
        "`weight`": "score-gap",
        "`score_gap_transform`": "linear",
        "`learning_rate`": "0.001",
        "`lr_scheduler_type`": "cosine",
        "`warmup_steps`": "0.1 of all steps",
        "`num_train_epochs`": "1",
        "`max_length`": "96",
        "pairs per optimizer step": "4 (per_device_train_batch_size 4 × gradient_accumulation_steps 1 × 1 process)",
        "optimizer steps": "4",
    }.items():
        assert table[name] == [value], name
    total = sum(p.numel() for p in trainer.model.parameters())
    assert table["trained parameters"] == [f"{total:,} of {total:,} (100 %)"]
    assert not [name for name in table if "anchor" in name or "amapo" in name]


@pytest.mark.parametrize(("name", "base"), [("eval", "cpo"), ("eval", "dpo"), ("train", "cpo")])
def test_numbers_of_pairs_that_were_trained_on(name, base, tiny_model, tokenizer, tmp_path, caplog):
    """They are called so, and the metadata have none of them; prompts that two sets share are counted at the start."""
    rows = preference_rows(8)
    others = Dataset.from_list([*rows.select(range(3)), *preference_rows(5, seed=8)])
    evals = {name: rows, "others": others} if name == "train" else rows
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, rows, evals, max_steps=1)
    with caplog.at_level(logging.INFO, "trl_margins"):
        trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    card = card_of(tmp_path)
    table = rows_of(section(card.text, "Evaluation"))
    if name == "eval":
        assert "eval 8 pairs (train has all of them, " in caplog.text
        assert [*table][2:] == ["evaluation pairs, trained on"]
        assert card.data.eval_results is None
        trainer.evaluate(others)  # by the same name
        for i, again in enumerate((trainer.train_dataset, trainer.train_dataset.select([3]), rows.select([5, 2]))):
            trainer.evaluate(again, metric_key_prefix=f"eval_{i}")
        trainer.predict(rows)
        trainer.evaluate(preference_rows(3, seed=9), metric_key_prefix="eval_new")
        trainer.create_model_card()
        card = card_of(tmp_path)
        names = [*rows_of(section(card.text, "Evaluation"))][2:]
        assert names == ["evaluation pairs, 37.5 % trained on", *(f"{i}, trained on" for i in range(3)), "new"]
        assert {each.dataset_split for each in card.data.eval_results} == {"new"}
    else:
        shared = len({*rows["prompt"]} & {*others["prompt"]})
        assert f"others 8 pairs (train has 3 of them, {shared} prompts that train has, too" in caplog.text
        assert [*table][2:] == ["train, trained on", "others, 37.5 % trained on"]
        assert card.data.eval_results is None


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_shares_of_sets_by_other_ways(base, tiny_model, tokenizer, tmp_path):
    """The trainer's own sets, given again; rows of them; predict(); and a column that is called as ours."""
    rows, new = preference_rows(8), preference_rows(4, seed=9)
    numbered = new.add_column("row_number", [*range(4)])
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, rows, {"seen": rows.select([2, 0]), "test": new})
    trainer.evaluate(trainer.eval_dataset)
    trainer.evaluate(trainer.eval_dataset["seen"], metric_key_prefix="eval_seen")
    trainer.evaluate(trainer.eval_dataset["seen"].select([1]), metric_key_prefix="eval_seen")
    trainer.evaluate(numbered, metric_key_prefix="eval_numbered")
    trainer.evaluate(rows, metric_key_prefix="eval_again")
    trainer.predict(new)
    names = {"seen": 1, "test": 0, "numbered": 0, "again": 1}
    assert {name: trainer.trained_on(name) for name in names} == names


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_columns_of_others_and_other_trainers_sets(base, tiny_model, tokenizer, tmp_path):
    rows, new = preference_rows(6), preference_rows(4, seed=9)
    named = new.add_column("row_number", [*"abcd"])
    # the CPO base takes prepared sets as they are: those of a training count as trained on
    one = trainer_of(base, tiny_model, tokenizer, tmp_path / "1", rows, named)
    two = trainer_of(base, tiny_model, tokenizer, tmp_path / "2", new, rows)
    one.evaluate()
    one.evaluate(two.train_dataset, metric_key_prefix="eval_theirs")
    one.evaluate(named, metric_key_prefix="eval_later")
    assert {name: one.trained_on(name) for name in ("", "theirs", "later")} == {
        "": 0,
        "theirs": base == "cpo",
        "later": 0,
    }


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_shares_of_parts_and_of_several_sets(base, tiny_model, tokenizer, tmp_path):
    """A part of a set has its own, whatever it is called; so has each of several that come together, and a mixture."""
    rows, new = preference_rows(8), preference_rows(4, seed=9)
    half = concatenate_datasets([rows.select(range(4)), new])
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, rows, {"half": half, "new": new})
    trainer.evaluate(trainer.eval_dataset["half"], metric_key_prefix="eval_new")
    assert trainer.trained_on("new") == 0.5
    trainer.evaluate(trainer.eval_dataset["half"].select(range(4)), metric_key_prefix="eval_seen")
    trainer.evaluate(trainer.eval_dataset["half"].select(range(4, 8)), metric_key_prefix="eval_other")
    trainer.evaluate({"first": rows.select(range(2)), "second": new, "third": half.select(range(2, 6))})
    trainer.evaluate({"given": trainer.eval_dataset["half"]})
    trainer.evaluate(trainer.eval_dataset)
    both = concatenate_datasets([trainer.train_dataset.select([1]), trainer.eval_dataset["new"].select([0, 2, 3])])
    trainer.evaluate(both, metric_key_prefix="eval_both")
    shares = {"seen": 1, "other": 0, "first": 1, "second": 0, "third": 0.5, "given": 0.5, "half": 0.5, "new": 0}
    shares["both"] = 0.25
    assert {name: trainer.trained_on(name) for name in shares} == shares


def test_pairs_that_were_trained_on_in_another_form(tiny_model, tokenizer, tmp_path):
    """Those that a filter leaves out were not; those whose completions repeat the prompt were; calls differ."""
    rows = preference_rows(8, scores=lambda i: (5.0, 1.0) if i < 4 else (2.0, 1.0))
    hard = {"weight": "score-gap", "score_gap_transform": "hard", "score_gap_threshold": 2.0}
    for evals, share in ((rows, 1 / 2), (rows.select(range(2, 8)), 1 / 3)):
        trainer = trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, evals, **hard)
        assert trainer.trained_on("") == pytest.approx(share)
    whole = rows.map(lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")})
    assert trainer_of("cpo", tiny_model, tokenizer, tmp_path, whole, rows).trained_on("") == 1
    messages = [
        {
            name: [{"role": role, "content": row[name].strip()}]
            for name, role in zip(row, ("user", "assistant", "assistant"), strict=True)
        }
        for row in rows.select_columns(["prompt", "chosen", "rejected"])
    ]
    assert trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, Dataset.from_list(messages)).trained_on("") == 1
    calls = [[{"function": {"name": name, "arguments": "{}"}}] for name in ("book", "cancel", "pay")]
    one, two, three = [[{"role": "assistant", "content": "", "tool_calls": call}] for call in calls]
    pair = {"prompt": [{"role": "user", "content": "q"}], "chosen": one, "rejected": two}
    counts = [open_rows(Dataset.from_list([each]), "dev").counts.pairs for each in (pair, pair | {"rejected": three})]
    assert counts[0] != counts[1]


def test_pairs_that_both_sets_have(tiny_model, tokenizer, tmp_path):
    """In another order, with another column or as messages of another spelling: the pairs are the same."""
    rows, other = preference_rows(8), preference_rows(2, seed=9)
    sets = {
        "moved": rows.select([3, 1, 1]),
        "wider": rows.add_column("id", [*range(8)]).select([0, 7]),
        "swapped": rows.rename_columns({"chosen": "rejected", "rejected": "chosen"}),
        "new": other,
    }
    trainer = trainer_of("dpo", tiny_model, tokenizer, tmp_path, rows, sets)
    assert {name: trainer.trained_on(name) for name in sets} == {"moved": 1, "wider": 1, "swapped": 1, "new": 0}


def test_the_kept_checkpoint_has_its_own_numbers(trained):
    trainer, out, _ = trained
    best = trainer.state.best_global_step
    (entry,) = (e for e in trainer.state.log_history if e["step"] == best and "eval_pwa" in e)
    results = {of.metric_name: of.metric_value for of in card_of(out).data.eval_results}
    assert results["Pairwise accuracy, score gap ≥ 2"] == round(entry["eval_pwa"], 4)
    assert results["Spearman ρ, all completions"] == round(entry["eval_spearman"], 4)
    row = rows_of(section(card_of(out).text, "Evaluation"))["evaluation pairs"]
    assert row[0] == f"{entry['eval_pwa']:.4f}"
    assert row[-3:] == [str(entry["eval_n_pairs_gap"]), "12", str(best)]
    assert f"step {best} of 4, the best by `eval_pwa`" in card_of(out).text


def test_pictures_lie_beside_the_card(trained):
    out = trained[1]
    linked = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card_of(out).text)
    drawn = ("ranking", "cases", "gradient_mass", "flips", "reward_gaps", "logps", "loss", "gradient_norm")
    assert {f"figures/{name}.png" for name in drawn} == set(linked)
    assert sorted(linked) == sorted(f"figures/{file.name}" for file in (out / "figures").iterdir())
    assert all((out / file).read_bytes().startswith(b"\x89PNG") for file in linked)


def test_cards_during_training_have_no_pictures(trained):
    during = trained[2]
    assert "![" not in during.text
    assert get_method("gappo").formula in during.text
    assert during.data.eval_results  # of the model as it was


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_metadata_beside_trls(tiny_model, tmp_path, base):
    """TRL's own card of the same run: its tags are all there, and its placeholder for a license is not."""
    model = shutil.copytree(tiny_model, tmp_path / "base")
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://ai.google\n---\n"
    )
    trainer, theirs = (MarginDPOTrainer, DPOTrainer) if base == "dpo" else (MarginCPOTrainer, CPOTrainer)
    config = trainer._config_class(str(tmp_path / "out"), bf16=False, report_to="none", max_steps=1)
    mine = trainer(str(model), args=config, train_dataset=Dataset.from_list(preference_rows(4)))
    mine.create_model_card()
    data = card_of(tmp_path / "out").data
    assert_valid(tmp_path / "out")
    assert {"generated_from_trainer", *theirs._tag_names} <= set(data.tags)
    assert (data.license, data.license_name, data.license_link) == ("other", "gemma", "https://ai.google")
    assert "licence" not in data.to_dict()
    assert data.pipeline_tag == "text-generation"


def test_license_from_the_hub_only_for_what_is_pushed(tiny_model, tmp_path, monkeypatch):
    asked: list[str] = []

    def info(name, timeout):
        asked.append(name)
        if len(asked) > 1:
            raise ConnectionError("no network")
        return SimpleNamespace(card_data=ModelCardData(license="apache-2.0"))

    monkeypatch.setattr(cards, "model_info", info)
    monkeypatch.setattr(cards, "get_config_model_id", lambda config: "me/base")
    config = MarginCPOConfig(str(tmp_path / "out"), bf16=False, report_to="none")
    trainer = MarginCPOTrainer(tiny_model, config, train_dataset=Dataset.from_list(preference_rows(4)))
    licenses = []
    for pushed_to in (None, "me/mine", "me/mine"):
        trainer.hub_model_id = pushed_to
        trainer.create_model_card()
        licenses.append(card_of(tmp_path / "out").data.license)
    assert licenses == [None, "apache-2.0", None]
    assert asked == ["me/base", "me/base"]


def test_tags_and_links(trained):
    data = card_of(trained[1]).data
    assert data.tags == ["generated_from_trainer", *sorted({*data.tags} - {"generated_from_trainer"})]
    assert {"trl", "trl-margins", "gappo", "score-gap", "preference-optimization"} <= set(data.tags)
    assert {*CPOTrainer._tag_names, "simpo"} <= set(data.tags)  # whoever filters the Hub by TRL's tags finds it
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == "me/pairs"
    assert data.base_model is None  # a folder of this machine
    text = card_of(trained[1]).text
    assert "[me/pairs](https://huggingface.co/datasets/me/pairs)" in text
    assert str(Path(trained[0].model.config._name_or_path).parent) not in text


def test_python_lines_train_the_same(trained, tiny_model, monkeypatch):
    """The lines are run where the model's folder is; the data they cannot name."""
    trainer, out, _ = trained
    lines = section(card_of(out).text, "Reproduce").strip().removeprefix("```python\n").removesuffix("```")
    assert 'load_dataset("me/pairs", split="train")' in lines
    assert "    eval_dataset=eval_dataset,  # as the script made it\n" in lines
    lines = lines.replace('load_dataset("me/pairs", split="train")', "train_dataset")
    monkeypatch.chdir(Path(tiny_model).parent)
    monkeypatch.setattr("trl_margins.trainers.cpo.MarginCPOTrainer.train", lambda self: None)
    found = {"train_dataset": preference_rows(4), "eval_dataset": preference_rows(4)}
    exec(lines.replace("output_dir=", f"use_cpu=True, output_dir='{out}' or "), found)
    ignored = ("optimizer steps", "trained parameters")
    told = [row for row in settings(found["trainer"]) if row[0] not in ignored]
    assert told == [row for row in settings(trainer) if row[0] not in ignored]


def test_python_lines_load_what_was_trained_on(tiny_model, tokenizer, tmp_path):
    """The split of the set, or the slice, and that of the evaluation set where its name is given."""
    rows = preference_rows(6)
    rows.to_json(tmp_path / "rows.jsonl")
    for split, name in (("train[:4]", "me/others"), ("train_prefs", None)):
        read = partial(load_dataset, "json", data_files={split.partition("[")[0]: str(tmp_path / "rows.jsonl")})
        train, evals = read(split=split), read(split=f"{split.partition('[')[0]}[4:]")
        trainer = trainer_of("cpo", tiny_model, tokenizer, tmp_path / "out", train, evals, max_steps=1)
        trainer.create_model_card(dataset_name="me/pairs", eval_dataset_name=name)
        text = card_of(tmp_path / "out").text
        assert f'train_dataset=load_dataset("me/pairs", split="{split}"),' in text
        assert ('eval_dataset=load_dataset("me/others", split="train[4:]"),' in text) == (name is not None)
        assert ("    eval_dataset=eval_dataset,  # as the script made it" in text) == (name is None)
    trainer = trainer_of("cpo", tiny_model, tokenizer, tmp_path / "out", read(split="train_prefs").select([0, 2]))
    trainer.create_model_card(dataset_name="me/pairs")
    assert 'load_dataset("me/pairs", split="train_prefs"),  # 2 rows\n' in card_of(tmp_path / "out").text


def test_numbers_of_another_model(trained, tmp_path, monkeypatch, caplog):
    trainer, out, _ = trained
    monkeypatch.setattr(cards, "pictures", lambda _: [])
    for model, warns in (
        ("else", True),
        (str(out), False),
        (str(out / "checkpoint-2"), False),
        (str(out.parent), True),
        (f"me/{out.name}", False),
        (None, False),
    ):
        file = written_report(tmp_path)
        file.write_text(json.dumps({**json.loads(file.read_text()), "model": model}))
        caplog.clear()
        trainer.create_model_card(evaluation=iter([file]))
        assert (f"has the numbers of the model {model}, and the card is of" in caplog.text) == warns


def test_command_and_numbers_given(trained, tmp_path, monkeypatch):
    trainer, out, _ = trained
    before = (out / "README.md").read_text()
    monkeypatch.setattr(cards, "pictures", lambda _: [])
    command = "trl-margins train --method gappo \\\n    --x '```'"
    trainer.create_model_card(
        reproduce=command, evaluation=str(written_report(tmp_path)), tags="mine", eval_dataset_name=NASTY
    )
    card = card_of(out)
    assert_valid(out)
    assert "mine" in card.data.tags
    assert f"````bash\n{command}\n````" in card.text
    assert "| NDCG@1" in card.text
    assert "lists &#124; x" in card.text
    assert {"NDCG@1", "RM-Bench, hard"} <= {of.metric_name for of in card.data.eval_results}
    trainer.reproduce = "again"
    trainer.create_model_card()
    for tags in ([1], [None], b"x"):
        with pytest.raises(TypeError, match=r"tags is .*: give texts, in a list"):
            trainer.create_model_card(tags=tags)
    with pytest.raises(TypeError, match=r"dataset_name is \['a/b', 'c/d'\]: give one name, as text"):
        trainer.create_model_card(dataset_name=["a/b", "c/d"])
    del trainer.reproduce
    assert "```bash\nagain\n```" in card_of(out).text
    (out / "README.md").write_text(before)


def test_pushing_takes_the_pictures_along(trained, monkeypatch):
    trainer = trained[0]
    pushed = {}
    monkeypatch.setattr(cards, "pictures", lambda _: [Image("figures/ranking.png", "drawn", "before")])

    def upload(self, folder_path, ignore_patterns, **kwargs):
        files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        pushed.update(
            files=[f for f in files if not f.startswith(("_", "checkpoint-"))], text=card_of(folder_path).text
        )

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(trainer, "hub_model_id", "me/tiny-gappo")
    trainer.push_to_hub(dataset_name="me/pairs", reproduce="by hand")
    assert {"README.md", "model.safetensors", "figures/ranking.png", "figures/loss.png"} <= set(pushed["files"])
    assert 'model="me/tiny-gappo"' in pushed["text"]
    assert "by hand" in pushed["text"]


def test_no_matplotlib_no_pictures(trained, monkeypatch, caplog):
    trainer = trained[0]
    monkeypatch.setattr(cards, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "trl_margins"):
        assert cards.pictures(trainer) == []
    assert "trl-margins[report]" in caplog.text


def test_a_broken_run_folder_costs_only_the_pictures(trained, monkeypatch, caplog, tmp_path):
    trainer = trained[0]
    (tmp_path / "margin_run.json").write_text("{")
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    assert cards.pictures(trainer) == []
    assert "no pictures for the model card" in caplog.text


def test_pictures_that_cannot_be_written_leave_those_before(trained, monkeypatch, caplog):
    trainer, out, _ = trained
    before = {file: file.read_bytes() for file in (out / "figures").iterdir()}
    monkeypatch.setattr(cards, "write", Mock(side_effect=OSError(28, "No space left on device")))
    assert cards.pictures(trainer) == []
    assert "the model card has only the first 0 pictures" in caplog.text
    assert {file: file.read_bytes() for file in (out / "figures").iterdir()} == before


# Other trainings


def test_adapters(tiny_model, tokenizer, tmp_path):
    """Names and numbers of an adapter on the DPO base, several evaluation sets; also after it is saved once more."""
    rows = preference_rows(8, "conversational", seed=3)
    model = load(tiny_model)
    model.config._name_or_path = "me/tiny-llama"
    out = tmp_path / "adapter"
    trainer = build(
        "geometric-anchor",
        tiny_model,
        tokenizer,
        out,
        "dpo",
        rows=rows,
        evals=dict.fromkeys(("easy", NASTY), preference_rows(8, "conversational", seed=4)),
        model=model,
        more={
            "peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        },
        reward="log-ratio",
        max_steps=1,
        log_pairs=False,
    )
    trainer.train()
    trainer.evaluate()
    for again in (False, True):
        trainer.save_model()  # PEFT writes into the card, or a card of its own
        trainer.create_model_card()
        assert_valid(out)
        card = card_of(out)
        assert card.data.library_name == "peft"
        assert card.data.pipeline_tag == "text-generation"
        assert card.data.base_model == "me/tiny-llama"
        tags = {"lora", "transformers", "base_model:adapter:me/tiny-llama", "gapo", "dpo", "trl-margins"}
        assert tags <= set(card.data.tags)
        assert card.text.count("- PEFT ") == 1, again
    assert "LoRA adapter for [me/tiny-llama](https://huggingface.co/me/tiny-llama)" in card.text
    assert "[Learning Where It Matters" in card.text
    assert get_method("geometric-anchor").formula in card.text
    assert "π_ref" in section(card.text, "Method")
    table = rows_of(section(card.text, "Hyperparameters"))
    trained, total = trainer.model.get_nb_trainable_parameters()
    assert table["trained parameters"] == [f"{trained:,} of {total:,} ({100 * trained / total:.3g} %)"]
    assert table["`anchor_radius`"] == ["0.05"]
    assert "lora_alpha=8" in table["LoRA adapter"][0]
    assert 'LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8' in card.text
    assert {of.dataset_split for of in card.data.eval_results} == {"easy", printable(NASTY)}
    trainer.save_model()
    assert_valid(out)
    after = card_of(out)
    assert after.text.strip() == card.text.strip()
    assert {"gapo", "geometric-anchor", "trl-margins"} <= set(after.data.tags)


def test_an_adapter_of_a_local_model_names_no_folder(tiny_model, tokenizer, tmp_path):
    more = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    trainer = build("gappo", tiny_model, tokenizer, tmp_path / "x", more=more)
    trainer.create_model_card()
    text = (tmp_path / "x" / "README.md").read_text()
    assert str(Path(tiny_model).parent) not in text
    assert f"LoRA adapter for `{Path(tiny_model).name}`" in text
    assert_valid(tmp_path / "x")


@pytest.mark.parametrize(("method", "base"), TRAINED)
def test_every_method_before_training(method, base, tiny_model, tokenizer, tmp_path):
    method = METHODS[method]
    trainer = build(method.id, tiny_model, tokenizer, tmp_path / "x", base)
    trainer.create_model_card()
    card = card_of(tmp_path / "x")
    assert_valid(tmp_path / "x")
    assert method.formula in card.text
    assert card.text.count(method.paper.citation) == 1
    assert card.text.count("```bibtex") == 2  # the method's and TRL's
    assert method.paper.title in card.text.replace(method.paper.citation, "")
    assert f"trained with {method.name}, using" in card.text
    assert {*method.tags, "trl", "trl-margins"} <= set(card.data.tags)
    assert card.data.eval_results is None
    assert "## Evaluation" not in card.text
    assert set(trainer.model.model_tags) == set(trainer._tag_names)
    table = rows_of(section(card.text, "Hyperparameters"))
    for name, value in method.defaults.items():
        if name.startswith(("gamma_po", "amapo", "anchor", "gap_aware", "score_gap", "sam")):
            assert table[f"`{name}`"] == [inline(value)], name
    compile(section(card.text, "Reproduce").strip().removeprefix("```python").removesuffix("```"), "card", "exec")


@dataclasses.dataclass
class Slack(Term):
    """A weight that a test registers."""

    width: float = 1.0
    name = "slack"

    def __call__(self, view):
        return torch.full_like(view.reward_gap, self.width)


def test_options_of_a_registered_term(tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_TERMS", {"weight": dict(WEIGHTS), "margin": dict(MARGINS)})
    monkeypatch.setattr(registry, "OPTIONS", added := {})
    monkeypatch.setattr(configs, "OPTIONS", added)
    monkeypatch.setattr(cards, "OPTIONS", added)
    register_term(Slack, kind="weight")
    config = MarginCPOConfig(
        **quiet(output_dir=str(tmp_path), loss_type="simpo", weight=["score-gap", "slack"], slack_width=0.25)
    )
    trainer = MarginCPOTrainer(load(tiny_model), config, train_dataset=preference_rows(4), processing_class=tokenizer)
    trainer.train()
    trainer.create_model_card()
    text = card_of(tmp_path).text
    assert "weight_i is `score-gap`, GapPO's · `slack`" in text
    table = rows_of(section(text, "Hyperparameters"))
    assert table["`weight`"] == ["score-gap, slack"]
    assert table["`slack_width`"] == ["0.25"]
    script = section(text, "Reproduce")
    assert f"import {Slack.__module__}  # 'slack'\n" in script
    assert "config = MarginCPOConfig(\n" in script
    assert '    weight=["score-gap", "slack"],\n' in script
    assert "    slack_width=0.25,\n" in script
    assert "slack_width" in html_page(read_runs([tmp_path]), [], {}, "png")


def test_terms_of_two_papers(tiny_model, tokenizer, tmp_path):
    config = MarginCPOConfig(
        **quiet(output_dir=str(tmp_path / "x"), loss_type="simpo", weight="score-gap", margin="amapo", beta=2.0)
    )
    trainer = MarginCPOTrainer(load(tiny_model), config, train_dataset=preference_rows(4), processing_class=tokenizer)
    trainer.create_model_card()
    text = card_of(tmp_path / "x").text
    assert "loss = (1/B) Σ weight_i · −log σ(r_w − r_l − margin_i)" in text
    for method in ("gappo", "amapo"):
        assert text.count(get_method(method).paper.citation) == 1
    assert "weight_i is `score-gap`, GapPO's" in text
    assert "margin_i is `amapo`, AMaPO's" in text
    assert "trained with CPO, using" in text


def test_a_term_from_python(tiny_model, tokenizer, tmp_path):
    term = ScoreGapWeight("hard", threshold=1.5)
    trainer = build("gappo", tiny_model, tokenizer, tmp_path / "x", more={"weight_term": term})
    trainer.create_model_card()
    text = card_of(tmp_path / "x").text
    table = rows_of(section(text, "Hyperparameters"))
    assert table["`weight`"] == ["ScoreGapWeight from Python"]
    assert table["weight: threshold"] == ["1.5"]
    assert "`score_gap_transform`" not in table
    assert "weight_term=weight_term," in text


def facts_of(method, **changed):
    row = get_method(method)
    losses = dict.fromkeys((row.loss and [row.loss]) or ["simpo"], 1.0)
    names = {"weights": names_of(row.weight), "margins": names_of(row.margin)}
    fixed = {"model_name": "m", "model_id": "m", "base_model": None, "dataset_name": None, "version": "1"}
    given = {"trained_with": row.name, "reward": "sum", "losses": losses, "method": row, **names, **changed}
    return CardFacts(**fixed, **given)


@pytest.mark.parametrize(
    ("changed", "formula"),
    [
        ({"losses": {"ipo": 1.0}}, "loss = (1/B) Σ weight_i · ipo(r_w − r_l)"),
        ({"losses": {"hinge": 1.0}, "gamma": 0.5}, "loss = (1/B) Σ weight_i · hinge(r_w − r_l − γ)"),
        (
            {"losses": {"sigmoid": 1.0, "ipo": 0.5}, "margins": ("amapo",)},
            "loss = (1/B) Σ weight_i · [−log σ(r_w − r_l − margin_i) + 0.5 · ipo(r_w − r_l − margin_i)]",
        ),
        ({"weights": ()}, "loss = (1/B) Σ −log σ(r_w − r_l)"),
        ({"weights": (), "margins": ("amapo",)}, "loss = (1/B) Σ −log σ(r_w − r_l − margin_i)"),
        ({"losses": {"sigmoid": 1.0, "sft": 0.1}}, None),
        ({"losses": {"simpo": 1.0}}, None),
    ],
)
def test_a_papers_formula_is_for_its_own_loss_and_terms_alone(changed, formula):
    assert facts_of("gappo", **changed).formula == formula or formula is None
    assert (facts_of("gappo", **changed).formula == get_method("gappo").formula) is (formula is None)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("LlavaForConditionalGeneration", "image-text-to-text"),
        ("Qwen2AudioForConditionalGeneration", "any-to-any"),
        ("BartForConditionalGeneration", None),
    ],
)
def test_the_pipeline_that_loads_a_model(name, task):
    model = type(name, (torch.nn.Module,), {"config": SimpleNamespace(is_encoder_decoder=name.startswith("Bart"))})()
    assert cards.task_of(model) == task


# TRL's
WRITTEN = ModelCard(
    "---\ntags: [trl]\n---\n# None\n## Training procedure\n\n### Framework versions\n\n- x\n\n## Citations\n"
)
WHOLE = {
    "gappo": {
        "dataset_name": "org/pairs",
        "base_model": "org/model",
        "sets": [SetFacts("train", 9, ("a", "b"), ties=1, reversed=2, dropped=3, filtered=4), SetFacts("eval", 5)],
        "evaluations": [
            Evaluation("", 4, {"pwa": 0.5, "pwa_all": 0.75, "n_pairs": 5, "n_pairs_gap": 4, "spearman": 0.25}),
            Evaluation("other", 8, {"pwa_all": 1.0, "n_pairs": 1000}),
        ],
        "settings": [("learning_rate", 1e-6), ("beta", 2.0), ("score_gap_transform", None)],
        "min_score_gap": 1.5,
        **{"last_step": 8, "best_step": 4, "best_by": "eval_pwa", "reproduce": "trl-margins train"},
    },
    "gap-aware": {
        "sets": [SetFacts("train", 9, factor="rougeL", floored=2, flipped=3)],
        "reports": [
            EvaluationReport("sum", 1.0, {"lists": {"kind": "listwise", "n_lists": 3, "ndcg@1": 0.5}}),
        ],
        "losses": {"simpo": 1.0, "sft": 0.5},
        **{"gamma": 0.5, "adapter": "LoRA", "task": "text-to-text", "chat": True, "license": {"license": "mit"}},
    },
    "dpo": {"losses": {"hinge": 1.0}, "task": None, "reproduce": "x = 1", "reproduce_language": "python"},
}


@pytest.mark.parametrize("method", WHOLE)
def test_a_card_in_full(method):
    hear(completed(WRITTEN, dataclasses.replace(facts_of(method), **WHOLE[method])).content)


@pytest.mark.parametrize(
    ("losses", "formula"),
    [
        ({"loss_type": ["sigmoid"]}, "Σ −log σ(r_w − r_l)"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, "Σ −log σ(r_w − r_l) + 0.5 · sft(r_w − r_l)"),
        ({"loss_type": ["hinge"], "simpo_gamma": 0.3}, "Σ hinge(r_w − r_l − γ)"),
    ],
)
def test_plain_losses(losses, formula, tiny_model, tokenizer, tmp_path):
    config = MarginDPOConfig(**quiet(output_dir=str(tmp_path / "x"), **losses))
    MarginDPOTrainer(
        load(tiny_model), args=config, train_dataset=preference_rows(4), processing_class=tokenizer
    ).create_model_card()
    text = card_of(tmp_path / "x").text
    assert f"loss = (1/B) {formula}\n" in text
    assert "trained with DPO, a method introduced in" in text
    assert ("`simpo_gamma`" in text) == ("simpo_gamma" in losses)


def test_someones_own_trainer_keeps_its_name(tiny_model, tokenizer, tmp_path):
    class Mine(MarginDPOTrainer):
        _name, _tag_names, _paper = "Mine", ["mine"], {"title": "T", "citation": "@misc{mine}"}

    config = config_class("gappo", "dpo")(**quiet(output_dir=str(tmp_path / "x")))
    Mine(
        load(tiny_model), args=config, train_dataset=preference_rows(4), processing_class=tokenizer
    ).create_model_card()
    card = card_of(tmp_path / "x")
    assert "trained with Mine, using" in card.text
    assert "mine" in card.data.tags
    assert "@misc{mine}" in card.text


def test_encoder_decoder_stream_and_trls_config(tiny_encoder_decoder, tokenizer, tmp_path):
    from trl.experimental.cpo import CPOConfig

    config = CPOConfig(**quiet(output_dir=str(tmp_path / "x"), max_completion_length=32, max_steps=1))
    rows = preference_rows(4)
    trainer = MarginCPOTrainer(load(tiny_encoder_decoder), config, train_dataset=rows, processing_class=tokenizer)
    trainer.set_facts = {"train": SetFacts("train")}  # as of a stream
    trainer.create_model_card()
    text = card_of(tmp_path / "x").text
    assert "AutoModelForSeq2SeqLM" in section(text, "Quick start")
    assert "### Data" not in text
    assert "−log σ(r_w − r_l)" in text


def test_pairs_that_truncation_dropped(tiny_model, tokenizer, tmp_path):
    rows = preference_rows(6).map(lambda row, i: {"prompt": row["prompt"] * (30 if i < 2 else 1)}, with_indices=True)
    trainer = build("gappo", tiny_model, tokenizer, tmp_path / "x", "dpo", rows=rows, max_length=96)
    assert len(trainer.train_dataset) == 4
    assert trainer.set_facts["train"].dropped == 2
    assert trainer.set_facts["train"].pairs == 6


def test_evaluation_factors_are_counted(tiny_model, tokenizer, tmp_path, caplog):
    rows = preference_rows(4).map(lambda row, i: {"rejected": "qqq" if i == 0 else row["rejected"]}, with_indices=True)
    trainer = build("gap-aware", tiny_model, tokenizer, tmp_path / "x", rows=rows)
    facts = trainer.set_facts["train"]
    assert facts.factor == "rougeL"
    below = sum(factor < trainer.objective.margins[0].floor for factor in trainer.train_dataset["evaluation_factor"])
    assert facts.floored == below >= 1
    with_column = rows.add_column("evaluation_factor", [0.5] * 4)
    trainer = build("gap-aware", tiny_model, tokenizer, tmp_path / "x", rows=with_column)
    assert trainer.set_facts["train"].factor == "column evaluation_factor"
    assert "no effect of gap_aware" not in caplog.text
    trainer = build("gap-aware", tiny_model, tokenizer, tmp_path / "x", rows=with_column, gap_aware_metric="jaccard")
    assert "train: no effect of gap_aware_metric: the data set has the column evaluation_factor" in caplog.text
    assert "gap_aware_mapping" in dict(settings(trainer))
    assert "gap_aware_metric" not in dict(settings(trainer))
    build("gap-aware", tiny_model, tokenizer, tmp_path / "x", rows=rows, gap_aware_encoder="a/b")
    assert "no effect of gap_aware_encoder: it is for BERTScore (gap_aware_metric bertscore_f1)" in caplog.text


# Names


def facts(name: str) -> CardFacts:
    return CardFacts(
        model_name=name,
        model_id=name,
        base_model=name,
        dataset_name=name,
        trained_with=name,
        version="0",
        reward="sum",
        losses={"simpo": 1.0},
        weights=(name,),
        settings=[(name, name), ("train_only", [name, name])],
        sets=[SetFacts(name, 3, (name, name), flipped=1)],
        evaluations=[Evaluation(name, 1, {"pwa": 0.5})],
        reports=[EvaluationReport(name, 1.0, {name: {"kind": "listwise", "ndcg@1": 1.0}})],
        eval_dataset_name=name,
        best_step=1,
        best_by=name,
        adapter=name,
        reproduce=name,
    )


def test_no_name_does_anything():
    nasty, plain = (completed(WRITTEN, facts(name)) for name in (NASTY, "plain words"))
    assert Page(nasty.text).tags == Page(plain.text).tags
    shown = " ".join("".join(c if c.isprintable() else " " for c in NASTY).split())
    assert Page(nasty.text).text.count(shown) >= Page(plain.text).text.count("plain words") - 2  # code, as it came
    again = ModelCard(nasty.content)
    assert again.text == nasty.text
    assert again.data.to_dict() == nasty.data.to_dict()
    assert again.data.model_name == printable(NASTY)
    assert again.data.base_model is again.data.datasets is None


def test_nasty_names_through_a_trainer(tiny_model, tokenizer, tmp_path):
    rows = preference_rows(4)
    pages = {}
    for name in (NASTY, "plain words"):
        model = load(tiny_model)
        model.config._name_or_path = name
        options = {"score_columns": [name, "score_rejected"]}
        renamed = rows.rename_column("score_chosen", name)
        trainer = build("gappo", tiny_model, tokenizer, tmp_path / "x", rows=renamed, model=model, **options)
        trainer.create_model_card(model_name=name, dataset_name=name, tags=[name.split("\n")[0]])
        assert_valid(tmp_path / "x")
        pages[name] = Page(card_of(tmp_path / "x").text)
    assert pages[NASTY].tags == pages["plain words"].tags
