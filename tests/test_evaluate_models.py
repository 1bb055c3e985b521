"""Several models side by side, AMaPO's four cases, RewardBench, best against worst, and the pictures of them."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer, load, preference_rows, sentence, trainer_of
from datasets import Dataset, DatasetDict
from said import word_for_word  # noqa: F401 - its messages are held against said/

from trl_margins.cli import main
from trl_margins.cli.cases import margins_of, targets
from trl_margins.evaluation.cases import case_report, ranking_cases
from trl_margins.evaluation.listwise import best_and_worst, listwise_metrics
from trl_margins.evaluation.reward_bench import SECTIONS, SUBSETS, section_scores
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.report.card_results import read_report
from trl_margins.report.densities import densities
from trl_margins.report.figures import draw_pictures
from trl_margins.report.ranking_figures import cases as cases_picture
from trl_margins.report.ranking_figures import swept
from trl_margins.report.run_folder import Run, read_run, unique_names
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.objectives import objective_of

pytestmark = pytest.mark.rehearsal


def evaluate(*argv):
    assert main(["evaluate", "--max_length", "128", "--bootstrap", "20", *map(str, argv)]) == 0


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    """The tiny model with noise on its weights: what a training might make of it."""
    folder = tmp_path_factory.mktemp("other") / "trained"
    load(tiny_model, noise=0.05).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pairs(tmp_path):
    preference_rows(12).to_json(tmp_path / "pairs.jsonl")
    return tmp_path / "pairs.jsonl"


def lines_of(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


# The four cases


def test_cases_are_table_1():
    """Its rows by hand; a policy gap of 0 is ranked wrong, a gap at its margin has reached it."""
    r = [2.0, 0.5, -0.5, -2.0, 0.0, 0.0, 1.0, math.nan]
    margin = [1.0, 1.0, -1.0, 1.0, 0.0, 0.1, 1.0, 0.0]
    assert ranking_cases(r, np.subtract(r, margin)).tolist() == [1, 2, 3, 4, 3, 4, 1, 0]


def test_shares_and_intervals_of_cases():
    case = np.array([1, 1, 2, 4, 4, 4, 0, 3])
    found = case_report(case, list("abcdefgh"), n_resamples=200)
    assert [found[f"case_{i}"] for i in (1, 2, 3, 4)] == pytest.approx([2 / 7, 1 / 7, 1 / 7, 3 / 7])
    assert found["case_counts"] == {"case_1": 2, "case_2": 1, "case_3": 1, "case_4": 3}
    low, high = found["intervals"]["case_4"]
    assert low < 3 / 7 < high
    assert case_report(np.zeros(3, int), list("abc"))["case_1"] is None


def log_probabilities(n=400, seed=0):
    """Sums of the policy and the reference [n, 2], lengths [n, 2]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, (n, 2)).astype(float)
    return -lengths * rng.uniform(0.5, 2, (n, 2)), -lengths * rng.uniform(0.5, 2, (n, 2)), lengths


def objective(method, **options):
    return objective_of(config_class(method)(output_dir=".", use_cpu=True, bf16=False, **options))


def test_margins_of_dpo_and_simpo_are_those_of_table_6():
    """r and γ from the table's columns; §4.1: DPO has all four cases, SimPO never underfits."""
    logps, reference, lengths = log_probabilities()
    beta = 0.1
    r = beta * (logps[:, 0] - logps[:, 1])
    gamma = beta * (reference[:, 0] - reference[:, 1])
    policy, surplus = margins_of(objective("dpo", beta=beta), logps, lengths, reference)
    assert np.array_equal(policy > 0, r > 0)
    assert surplus == pytest.approx(r - gamma)
    assert {*ranking_cases(policy, surplus)} == {1, 2, 3, 4}

    beta, gamma = 2.5, 1.0
    r = beta * (logps / lengths) @ [1, -1]
    policy, surplus = margins_of(objective("simpo", beta=beta, simpo_gamma=gamma), logps, lengths)
    assert policy == pytest.approx(r)
    assert surplus == pytest.approx(r - gamma)
    assert {*ranking_cases(policy, surplus)} == {1, 2, 4}


def test_margins_of_amapo_are_of_the_whole_set():
    """Eqs. 9 and 10 in NumPy; no order of the pairs changes them."""
    logps, _, lengths = log_probabilities(50)
    logps[:, 0] *= 0.7  # most are ranked right
    beta = 2.0
    r = beta * (logps / lengths) @ [1, -1]
    exponent = np.maximum((r.mean() - r) / r.std(ddof=1) * r.mean(), 0)
    margin = np.where(exponent > 0, beta * np.exp(exponent), 0)
    of = objective("amapo", beta=beta, amapo_variant="paper")
    policy, surplus = margins_of(of, logps, lengths)
    assert policy == pytest.approx(r)
    assert surplus == pytest.approx(r - margin)
    found = ranking_cases(policy, surplus)
    assert 3 not in found
    back = margins_of(of, logps[::-1].copy(), lengths[::-1].copy())
    assert np.array_equal(ranking_cases(*back)[::-1], found)


def test_a_margin_that_reads_scores():
    logps, reference, lengths = log_probabilities(20)
    scores = np.random.default_rng(1).uniform(1, 10, (20, 2))
    of = objective("odpo", beta=1.0)
    assert margins_of(of, logps, lengths, reference) is None
    _, surplus = margins_of(of, logps, lengths, reference, scores)
    assert np.isfinite(surplus[scores[:, 0] > scores[:, 1]]).all()


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("gap-aware", "margin 'gap-aware' is computed or measured for the pairs of a training"),
        ("geometric-anchor", "margin 'geometric-anchor' is computed or measured"),
        ("alpha-dpo", "margin 'alpha-dpo' depends on what training has seen"),
        ("ipo", "loss_type 'ipo' is no function of the reward gap less a margin"),
        ("alphapo-token", "reward 'alphapo-token' is of single tokens"),
    ],
)
def test_margins_that_held_out_pairs_do_not_have(method, why):
    with pytest.raises(ValueError, match=f"--cases {method} has no cases of held-out pairs: {why}"):
        targets(method, {"any": "any"})


def test_cases_of_a_run_before_and_after(tiny_model, tokenizer, pairs, tmp_path, caplog):
    """AMaPO's margin in NumPy, from the rewards that the command writes; the start model under the same margin."""
    out = tmp_path / "run"
    rows = Dataset.from_json(str(pairs))
    trainer = trainer_of("cpo", tiny_model, tokenizer, out, rows, margin="amapo", beta=3.0, loss_type="simpo")
    trainer.train()
    trainer.save_model()
    argv = ["--model_name_or_path", tiny_model, out, "--dataset_name", pairs, "--cases", "run"]
    with caplog.at_level(logging.INFO, "trl_margins"):
        evaluate(*argv, "--json", tmp_path / "n", "--rewards", tmp_path / "r")
    assert f"{tiny_model}: no training run, treated as {out}" in caplog.text
    found = json.loads((tmp_path / "n").read_text())
    assert [*found["models"]] == [tiny_model, str(out)]
    for name, numbers in found["models"].items():
        rewards = np.array([line["rewards"] for line in lines_of(tmp_path / "r") if line["model"] == name])
        gap = rewards[:, 0] - rewards[:, 1]
        mean, spread = gap.mean(), gap.std(ddof=1)
        margin = np.where(gap < mean, 3 * np.exp((mean - gap) / spread * mean), 0)
        reached = 3 * gap >= margin
        report = numbers["sets"]["pairs"]
        counts = [(gap > 0) & reached, (gap > 0) & ~reached, (gap <= 0) & reached, (gap <= 0) & ~reached]
        assert [*report["case_counts"].values()] == [each.sum() for each in counts]
        assert report["case_1"] + report["case_2"] == pytest.approx(report["pwa_all"])
        assert report["intervals"]["case_1"][0] <= report["case_1"]


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("dpo", {"margin": "amapo", "reward": "log-ratio"}),
        ("dpo", {"margin": "odpo", "reward": "log-ratio"}),
        ("cpo", {"loss_type": "simpo", "simpo_gamma": 1.5}),
    ],
)
def test_gaps_and_margins_are_those_of_the_trainer(base, options, tiny_model, tokenizer, pairs, tmp_path, monkeypatch):
    """What its own evaluation logs, where the whole set is one batch; reference and scores are the run's."""
    from trl_margins.cli import measured

    found = []
    monkeypatch.setattr(measured, "margins_of", lambda *given: found.append(margins_of(*given)) or found[-1])
    rows, out = Dataset.from_json(str(pairs)), tmp_path / "run"
    options |= {"max_steps": 3, "learning_rate": 1e-2, "per_device_eval_batch_size": 12}
    trainer = trainer_of(base, tiny_model, tokenizer, out, rows, rows, **options)
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    evaluate("--model_name_or_path", out, "--dataset_name", pairs, "--cases", "run")
    _, surplus = found[0]
    margin = metrics.get("eval_target_margins/mean", 1.5)
    assert abs(margin) > 0.01
    assert surplus.mean() == pytest.approx(metrics["eval_rewards/margins"] - margin, abs=1e-4)


def cells_of(printed, first):
    """The cells of the first line of a table that begins so."""
    line = next(line for line in printed.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_table_says_what_the_cases_are_of(tiny_model, tokenizer, pairs, tmp_path, capsys):
    """As `margin_run.json` has it; the model without a run has the first run's margin."""
    rows, runs = Dataset.from_json(str(pairs)), {}
    for name, options in {"a": {"simpo_gamma": 1.5}, "b": {"margin": "gamma-po", "simpo_gamma": 0.75}}.items():
        out = tmp_path / name
        options |= {"loss_type": "simpo", "beta": 2.5, "max_steps": 1}
        trainer = trainer_of("cpo", tiny_model, tokenizer, out, rows, **options)
        trainer.train()
        trainer.save_model()
        runs[name] = json.loads((out / "margin_run.json").read_text())
    argv = ["--dataset_name", pairs, "--cases", "run", "--json", tmp_path / "n"]
    evaluate("--model_name_or_path", tiny_model, tmp_path / "a", tmp_path / "b", *argv)
    printed = capsys.readouterr().out
    method = runs["a"]["method"] or runs["a"]["trainer"]
    other = runs["b"]["method"] or runs["b"]["trainer"]
    assert cells_of(printed, "method") == [f"{method} (run a)", method, other]
    assert cells_of(printed, "r") == ["per token, β = 2.5"] * 3
    assert cells_of(printed, "γ") == ["1.5", "1.5", "gamma-po (γ₀ = 0.75)"]
    found = json.loads((tmp_path / "n").read_text())["models"]
    for model, run in ((tiny_model, "a"), (str(tmp_path / "a"), "a"), (str(tmp_path / "b"), "b")):
        of = found[model]["cases_of"]
        assert of["run"] == str(tmp_path / run)
        assert {name: of[name] for name in ("reward", "beta", "gamma")} == {
            name: runs[run][name] for name in ("reward", "beta", "gamma")
        }
        assert ", ".join(of["margin"]) == (runs[run]["margin"] or "")


def test_right_in_the_cases_of_dpo_is_by_summed_log_probabilities(tiny_model, pairs, tmp_path, capsys):
    """The accuracy that `--reward sum` has, and not that above the table, which its note says."""
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--json", tmp_path / "n"]
    evaluate(*argv, "--reward", "sum")
    summed = json.loads((tmp_path / "n").read_text())["sets"]["pairs"]["pwa_all"]
    evaluate(*argv, "--cases", "dpo", "--ref_model", tiny_model)
    found = json.loads((tmp_path / "n").read_text())
    report, printed = found["sets"]["pairs"], capsys.readouterr().out
    assert report["case_1"] + report["case_2"] == pytest.approx(summed)
    assert report["pwa_all"] != pytest.approx(summed)
    assert found["cases_of"]["run"] is None
    assert cells_of(printed, "method") == ["dpo (defaults)"]
    assert cells_of(printed, "r") == ["summed, β = 0.01"]  # SimPO's README has this β
    assert cells_of(printed, "γ") == ["reference"]
    assert "The other accuracies are of the reward length-normalized, so that they can differ" in printed


def test_cases_under_a_reference_model(tiny_model, other_model, pairs, tmp_path, monkeypatch):
    """At the start itself every log-ratio is 0: each pair has just reached its margin, right or wrong."""
    argv = ["--dataset_name", pairs, "--cases", "dpo", "--json", tmp_path / "n"]
    with monkeypatch.context() as patched:
        patched.setattr("trl_margins.cli.measured.load_model", lambda *_, **__: pytest.fail("too late"))
        with pytest.raises(ValueError, match=r"the margin of dpo has a reference model in it: give --ref_model"):
            evaluate("--model_name_or_path", tiny_model, *argv)
    evaluate("--model_name_or_path", tiny_model, other_model, "--ref_model", tiny_model, *argv)
    before, after = (each["sets"]["pairs"] for each in json.loads((tmp_path / "n").read_text())["models"].values())
    assert before["case_2"] == before["case_4"] == 0
    assert after["case_2"] + after["case_4"] > 0


def test_cases_of_a_run_without_a_run(tiny_model, pairs):
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", pairs]
    with pytest.raises(ValueError, match=r"no margin_run\.json says with which margin .* name a method, such as"):
        evaluate(*argv, "--cases", "run")
    evaluate(*argv, "--cases", "simpo")  # as it advises


# Several models


def test_models_side_by_side_have_their_own_numbers(tiny_model, other_model, tmp_path, capsys):
    """Those that each has alone; the first table is models by sets."""
    for seed, name in enumerate(("id", "prompt_ood")):
        preference_rows(8, seed=seed).to_json(tmp_path / f"{name}.jsonl")
    argv = ["--dataset_name", tmp_path / "id.jsonl", tmp_path / "prompt_ood.jsonl"]
    evaluate("--model_name_or_path", tiny_model, other_model, *argv, "--json", tmp_path / "both")
    printed = capsys.readouterr().out
    both = json.loads((tmp_path / "both").read_text())["models"]
    alone = []
    for name in (tiny_model, other_model):
        evaluate("--model_name_or_path", name, *argv, "--json", tmp_path / "one")
        one = json.loads((tmp_path / "one").read_text())
        assert one["model"] == name
        assert one["sets"] == both[name]["sets"]
        alone.append([f"{report['pwa_all']:.4f}" for report in one["sets"].values()])
    head, _, *rows = printed.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["ranking accuracy", "id", "prompt_ood"]
    assert printed.count("pairwise accuracy by length") == 2  # one table of both models for each set
    for row, accuracies in zip(rows, alone, strict=False):
        assert [cell.split()[0] for cell in row.split("|")[2:-1]] == accuracies
    read_report(tmp_path / "one")
    with pytest.raises(ValueError, match="has the numbers of 2 models, and a card is of one: evaluate it alone"):
        read_report(tmp_path / "both")


def test_a_model_before_training_is_cut_as_the_one_after(tiny_model, tokenizer, pairs, tmp_path, caplog):
    rows = Dataset.from_json(str(pairs))
    for length in (40, 50):
        trainer = trainer_of(
            "cpo", tiny_model, tokenizer, tmp_path / str(length), rows, max_steps=1, max_length=length
        )
        trainer.train()
        trainer.save_model()
    argv = ["--dataset_name", pairs, "--json", tmp_path / "n", "--bootstrap", 2]
    main(["evaluate", "--model_name_or_path", tiny_model, *map(str, [tmp_path / "40", *argv])])
    models = json.loads((tmp_path / "n").read_text())["models"].values()
    assert [each["max_length"] for each in models] == [{"pairs": 40}] * 2
    assert "different lengths" not in caplog.text
    main(["evaluate", "--model_name_or_path", *map(str, [tmp_path / "50", tmp_path / "40", *argv])])
    said = caplog.text
    lengths = {str(tmp_path / "50"): 50, str(tmp_path / "40"): 40}
    warning = f"rows cut at different lengths: give --max_length to compare them (now {lengths})"
    assert said.index(warning) < said.rindex(f"model {tmp_path / '50'}")  # before the work


def test_names_of_models_are_short_and_unique():
    assert unique_names(["/a/out", "Qwen/Qwen2.5-0.5B"]) == ["out", "Qwen2.5-0.5B"]
    assert unique_names(["/a/one/out", "/a/two/out"]) == ["one/out", "two/out"]


def test_drift_from_one_of_the_models(tiny_model, other_model, pairs, tmp_path):
    argv = ["--dataset_name", pairs, "--drift_from", tiny_model, "--json", tmp_path / "n"]
    evaluate("--model_name_or_path", tiny_model, other_model, *argv)
    models = json.loads((tmp_path / "n").read_text())["models"]
    drifts = [models[name]["sets"]["pairs"]["kl_drift"] for name in (tiny_model, other_model)]
    assert drifts[0] == 0
    assert drifts[1] > 1e-4


def test_a_model_given_twice(tiny_model, pairs):
    with pytest.raises(ValueError, match="twice: name every model once"):
        evaluate("--model_name_or_path", tiny_model, tiny_model, "--dataset_name", pairs)


# Lists


@pytest.mark.parametrize(
    ("rewards", "scores", "expected"),
    [
        ([0.1, 0.9, 0.5], [1, 3, 2], 1.0),
        ([0.9, 0.1, 0.5], [1, 3, 2], 0.0),
        ([0.5, 0.5, 0.0], [1, 3, 2], 0.0),  # a tie of rewards is wrong
        ([0.9, 0.1, 0.5, 0.2], [3, 3, 1, 2], 0.5),  # one of two best ones beats the worst
        ([0.9, 0.1], [2, 2], None),
        ([0.9], [2], None),
        ([], [], None),
    ],
)
def test_best_against_worst(rewards, scores, expected):
    assert listwise_metrics(rewards, scores)["best_worst"] == expected


def test_the_pair_of_a_list():
    """Of tied ends all pairs, so that the order of answers does not matter."""
    rows, ends, weights = best_and_worst([[1.0, 3.0, 2.0], [2.0, 2.0], [5.0, 1.0, 5.0, 1.0], [4.0]])
    assert rows.tolist() == [0, 2, 2, 2, 2]
    assert ends.tolist() == [[1, 0], [0, 1], [0, 3], [2, 1], [2, 3]]
    assert weights.tolist() == [1, 0.25, 0.25, 0.25, 0.25]
    assert best_and_worst([])[1].shape == (0, 2)


def list_rows(n_prompts=40, k=5, **more):
    return Dataset.from_list(
        [
            {
                "prompt": f"question {i} ",
                "responses": [f"answer {j} of {i}" for j in range(k)],
                "scores": [float((7 * i + 3 * j) % 11) for j in range(k)],
                **{name: make(k) for name, make in more.items()},
            }
            for i in range(n_prompts)
        ]
    )


def test_splits_of_lists_without_models(caplog):
    """As with one model that is seen, and without the two splits of unseen ones."""
    from trl_margins.data.splits import generalization_splits

    splits = generalization_splits(list_rows(), held_out=0.2)
    assert list(splits) == ["train", "id", "prompt_ood"]
    assert "of the four splits there are only id and prompt_ood" in caplog.text
    assert not {"chosen_model", "rejected_model"} & {*splits["train"].column_names}
    asked = {name: {*split["prompt"]} for name, split in splits.items()}
    assert asked["id"] < asked["train"]
    assert not asked["prompt_ood"] & asked["train"]
    assert len(asked["prompt_ood"]) == 8
    assert len(asked["id"]) == round(0.2 * 32)
    by_prompt = {row["prompt"]: row["scores"] for row in list_rows()}
    for name in ("id", "prompt_ood"):
        for row in splits[name]:
            scores = by_prompt[row["prompt"]]
            assert (row["score_chosen"], row["score_rejected"]) == (max(scores), min(scores))
    trained = {(row["prompt"], text) for row in splits["train"] for text in (row["chosen"], row["rejected"])}
    assert not trained & {(row["prompt"], text) for row in splits["id"] for text in (row["chosen"], row["rejected"])}


def test_advice_for_splits_of_lists_without_models():
    from trl_margins.data.splits import generalization_splits

    for rows in (list_rows(k=2), list_rows(k=3)):
        with pytest.raises(ValueError, match="give lists of four or more completions with different scores") as error:
            generalization_splits(rows)
        assert "unseen_models" not in str(error.value)


def test_the_splits_that_there_are_come_together(tiny_model, tmp_path):
    rows = preference_rows(4)
    DatasetDict(dict.fromkeys(("train", "id", "prompt_ood"), rows)).save_to_disk(tmp_path / "splits")
    evaluate("--model_name_or_path", tiny_model, "--dataset_name", tmp_path / "splits", "--json", tmp_path / "n")
    assert list(json.loads((tmp_path / "n").read_text())["sets"]) == ["id", "prompt_ood"]


# RewardBench


def test_sections_are_the_packages():
    """Numbers that `calculate_scores_per_section` of rewardbench 0.1.4 gave, with its constants."""
    accuracies = {subset: (37 * i % 101) / 101 for i, subset in enumerate(sorted(SUBSETS))}
    expected = {
        "Chat": 0.42538304109740577,
        "Chat Hard": 0.44758554802848705,
        "Safety": 0.3564356435643564,
        "Reasoning": 0.5214521452145215,
    }
    mean = sum(expected.values()) / 4
    assert section_scores(accuracies) == pytest.approx(expected | {"score": mean})
    some = {name: value for name, value in accuracies.items() if not name.startswith(("hep", "math", "mt"))}
    expected = {"Chat": 0.36002048480710136, "Chat Hard": 0.4670006380112951, "Safety": 0.3564356435643564}
    found = section_scores(some)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["Reasoning"] is found["score"] is None


def test_constants_are_the_packages():
    constants = pytest.importorskip("rewardbench.constants", reason="rewardbench is not installed")
    assert {name: list(weights) for name, weights in SECTIONS.items()} == constants.SUBSET_MAPPING
    weights = {subset: weight for section in SECTIONS.values() for subset, weight in section.items()}
    assert weights == {subset: constants.EXAMPLE_COUNTS[subset] for subset in weights}


def reward_bench_rows():
    """Its columns, with two rows per subset."""
    import random

    rng = random.Random(5)
    return Dataset.from_list(
        [
            {
                "prompt": sentence(rng, 2, 5),
                "chosen": sentence(rng, 1, 6),
                "rejected": sentence(rng, 1, 6),
                "chosen_model": "a",
                "rejected_model": "b",
                "subset": subset,
                "id": 2 * i + j,
            }
            for i, subset in enumerate(sorted(SUBSETS))
            for j in range(2)
        ]
    )


def test_reward_bench(tiny_model, tmp_path, capsys):
    """Accuracies from the rewards that the command writes; the sections as the package sums them."""
    reward_bench_rows().to_json(tmp_path / "filtered.jsonl")
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", tmp_path / "filtered.jsonl"]
    evaluate(*argv, "--json", tmp_path / "n", "--rewards", tmp_path / "r")
    report = json.loads((tmp_path / "n").read_text())["sets"]["filtered"]
    right: dict[str, list[bool]] = {}
    for row, line in zip(reward_bench_rows(), lines_of(tmp_path / "r"), strict=True):
        right.setdefault(row["subset"], []).append(line["rewards"][0] > line["rewards"][1])
    accuracies = {subset: sum(each) / 2 for subset, each in right.items()}
    assert {bin["bin"]: bin["accuracy"] for bin in report["by_subset"]} == accuracies
    chat = sum(weight * accuracies[subset] for subset, weight in SECTIONS["Chat"].items()) / 358
    assert report["reward_bench_chat"] == pytest.approx(chat)
    assert len(report["intervals"]["reward_bench"]) == 2
    printed = capsys.readouterr().out
    for text in ("RewardBench, Chat Hard", "RewardBench, mean of the sections", "filtered, by subset", "hep-rust"):
        assert text in printed


def test_reward_bench_texts_are_messages_for_a_chat_model():
    rows = reward_bench_rows()
    row, text = (evaluation_set(rows, "x", as_chat=chat).rows[0] for chat in (True, False))
    assert row.prompt == [{"role": "user", "content": rows[0]["prompt"]}]
    assert row.completions[0] == [{"role": "assistant", "content": rows[0]["chosen"]}]
    assert (text.prompt, text.completions[0]) == (rows[0]["prompt"], rows[0]["chosen"])
    others = rows.map(lambda row: {"subset": "mine"})  # pairs of one's own stay what they are
    assert evaluation_set(others, "x", as_chat=True).rows[0].prompt == rows[0]["prompt"]


def test_any_subsets_have_accuracies(tiny_model, tmp_path):
    rows = preference_rows(12).add_column("subset", ["code", "chat", "chat"] * 4)
    rows.to_json(tmp_path / "pairs.jsonl")
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", tmp_path / "pairs.jsonl", "--json", tmp_path / "n"]
    evaluate(*argv, "--rewards", tmp_path / "r")
    report = json.loads((tmp_path / "n").read_text())["sets"]["pairs"]
    rewards = np.array([line["rewards"] for line in lines_of(tmp_path / "r")])
    right = rewards[:, 0] > rewards[:, 1]
    code = np.array(rows["subset"]) == "code"
    assert [(bin["bin"], bin["n"]) for bin in report["by_subset"]] == [("chat", 8), ("code", 4)]
    assert [bin["accuracy"] for bin in report["by_subset"]] == pytest.approx([right[~code].mean(), right[code].mean()])
    assert "reward_bench" not in report


def test_subsets_that_are_none(caplog):
    rows = preference_rows(120).add_column("subset", [str(i) for i in range(120)])
    assert evaluation_set(rows, "x").groups == []
    assert "the column subset has 120 values, too many for an accuracy of each" in caplog.text


def test_reward_bench_2_is_named():
    row = {"prompt": "a", "chosen": ["x"], "rejected": ["y", "z", "w"], "num_correct": 1, "subset": "Math"}
    with pytest.raises(ValueError, match="x: these are the rows of RewardBench 2"):
        evaluation_set(Dataset.from_list([row]), "x")


# Pictures


def test_densities_are_kernel_sums():
    """The curve in the figure against the sum of Gaussians in NumPy, and its area."""
    rng = np.random.default_rng(0)
    gaps, logps = rng.normal(0.3, 1, 60), rng.normal(-1.5, 0.4, 60)
    figure, caption = densities(
        {"held-out": {"before": (gaps, logps, np.ones(60)), "after": (gaps + 1, logps, np.ones(60))}},
        "length-normalized",
    )
    for panel, values in zip(figure.axes, (gaps, logps), strict=True):
        x, y = panel.lines[0].get_data()
        width = values.std(ddof=1) * 60**-0.2
        kernels = np.exp(-0.5 * ((x[:, None] - values) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        assert y == pytest.approx(kernels.mean(1))
        assert y.mean() * np.ptp(x) == pytest.approx(1, abs=1e-2)
        assert panel.lines[1].get_xdata()[0] == pytest.approx(values.mean())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after", "mean"]
    first, _, second, *_ = figure.axes[1].lines  # the same curve twice: the first shows through the second
    assert first.get_linestyle() == "-" != second.get_linestyle()
    assert "over 60 pairs per set and model" in caption


def test_densities_of_one_pair_and_of_equal_ones():
    one = np.array([0.5]), np.array([-1.0]), np.ones(1)
    same = np.full(5, 0.5), np.full(5, -1.0), np.ones(5)
    figure, _ = densities({"one": {"a": one}, "same": {"a": same}}, "sum")
    assert len(figure.axes) == 4  # means alone


def test_tied_lists_count_as_one_pair_each(tiny_model, tmp_path):
    """Cases 1 and 2 are what is ranked right, so they add up to `best_worst`, also with tied scores and in another
    order. A list whose prompt fills the length is in no number.
    """
    words = ["a", "some more", "the longest of them all", "x y"]
    rows = [
        {"prompt": f"question {i} ", "responses": words[i % 3 :] + words[: i % 3], "scores": [3, 1, 3, 1]}
        for i in range(8)
    ]
    turned = [{name: value[::-1] if name != "prompt" else value for name, value in row.items()} for row in rows]
    for name, some in {"rows": rows, "turned": turned}.items():
        long = [{"prompt": "long " * 60, "responses": ["a", "b"], "scores": [1, 2]}]
        Dataset.from_list(some + long).to_json(tmp_path / f"{name}.jsonl")
    files = [tmp_path / "rows.jsonl", tmp_path / "turned.jsonl"]
    report = tmp_path / "report.json"
    options = ["--cases", "simpo", "--max_length", "64", "--json", report]
    evaluate("--model_name_or_path", tiny_model, "--dataset_name", *files, *options)
    found, other = json.loads(report.read_text())["sets"].values()
    assert found["n_prompts"] == 8
    assert found["case_1"] + found["case_2"] == pytest.approx(found["best_worst"])
    assert sum(found["case_counts"].values()) == pytest.approx(8)
    for name in ("best_worst", "case_1", "case_2", "case_3", "case_4"):
        assert other[name] == pytest.approx(found[name])


def test_plot_of_pairs_and_lists(tiny_model, other_model, pairs, tmp_path, capsys):
    list_rows(6).to_json(tmp_path / "lists.jsonl")
    argv = ["--model_name_or_path", tiny_model, other_model, "--dataset_name", pairs, tmp_path / "lists.jsonl"]
    evaluate(*argv, "--plot", tmp_path / "densities.svg")
    assert (tmp_path / "densities.svg").read_text().startswith("<?xml")
    assert "Gaussian kernel densities (Scott's bandwidth) over 6 to 12 pairs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a figure is one of"):
        evaluate(*argv, "--plot", "densities.gif")
    bench = {"prompt": "a", "chosen": ["x", "y", "z"], "rejected": ["u", "v", "w"]}
    (tmp_path / "chat_filtered.json").write_text(json.dumps([bench]))
    alone = [*argv[:3], "--dataset_name", tmp_path / "chat_filtered.json"]
    with pytest.raises(ValueError, match="RM-Bench has no pairs to draw"):
        evaluate(*alone, "--plot", tmp_path / "d.png")
    with pytest.raises(ValueError, match="--cases simpo: RM-Bench has no pairs to count cases of"):
        evaluate(*alone, "--cases", "simpo")


def test_rm_bench_is_in_the_first_table(tiny_model, other_model, pairs, tmp_path, capsys):
    """Its average: the mean of the three levels, which are means over the cells of AMaPO's 3 × 3 matrix, in NumPy."""
    words = ["x", "y longer", "z of all the longest"], ["u", "v and more", "w w w w"]
    bench = [{"prompt": f"question {i}", "chosen": words[i % 2], "rejected": words[1 - i % 2]} for i in range(6)]
    (tmp_path / "chat_filtered.json").write_text(json.dumps(bench))
    argv = ["--dataset_name", pairs, tmp_path / "chat_filtered.json", "--cases", "simpo", "--rewards", tmp_path / "r"]
    evaluate("--model_name_or_path", tiny_model, other_model, *argv)
    printed = capsys.readouterr().out
    assert cells_of(printed, "ranking accuracy") == ["pairs", "RM-Bench"]
    for model in (tiny_model, other_model):
        of = [each for each in lines_of(tmp_path / "r") if each["model"] == model and each["set"] == "RM-Bench"]
        rewards = np.array([each["rewards"] for each in of])
        right = (rewards[:, :3, None] > rewards[:, None, 3:]).mean(0)
        parts = np.triu(right, 1).sum() / 3, np.trace(right) / 3, np.tril(right, -1).sum() / 3
        assert cells_of(printed, Path(model).name)[1].split()[0] == f"{np.mean(parts):.4f}"
    assert "RM-Bench has no pairs, and no cases." in printed


def run(name, **config):
    history = [
        {"step": 1, "eval_pwa_all": config["beta"] / 10 + 0.1},
        {"step": 2, "eval_pwa_all": config["beta"] / 10},
    ]
    info = {"method": "amapo", "config": {"output_dir": name, "learning_rate": 1e-6, "seed": 0, **config}}
    return Run(name, Path(name), info, history, {})


def test_accuracy_over_the_one_number_that_differs():
    """β with the target margin that follows from it, and seeds; points are the last evaluations."""
    runs = [
        run("a", beta=1.0, gamma_beta_ratio=0.5, simpo_gamma=0.5),
        run("b", beta=3.0, gamma_beta_ratio=0.5, simpo_gamma=1.5),
        run("c", beta=3.0, gamma_beta_ratio=0.5, simpo_gamma=1.5, seed=1),
    ]
    assert swept(runs) == "beta"
    (picture,) = (each for each in draw_pictures(runs) if each.name == "setting")
    (panel,) = picture.figure.axes
    assert panel.get_xlabel() == "beta"
    points, line, best = panel.lines
    assert points.get_xdata().tolist() == [1.0, 3.0, 3.0]
    assert points.get_ydata() == pytest.approx([0.1, 0.3, 0.3])
    assert line.get_xdata().tolist() == [1.0, 3.0]
    assert best.get_ydata() == pytest.approx([0.2, 0.4, 0.4])


@pytest.mark.parametrize(
    "runs",
    [
        [{"beta": 1.0}],
        [{"beta": 1.0}, {"beta": 1.0, "seed": 1}],
        [{"beta": 1.0}, {"beta": 2.0, "learning_rate": 1e-5}],
        [{"beta": 1.0, "reward": "sum"}, {"beta": 1.0, "reward": "log-ratio"}],
        [{"beta": 1.0, "use_cpu": True}, {"beta": 1.0, "use_cpu": False}],
    ],
)
def test_runs_that_are_no_sweep(runs):
    assert swept([run(str(i), **config) for i, config in enumerate(runs)]) is None


def test_a_sweep_of_the_target_margin():
    runs = [run(str(g), beta=2.0, gamma_beta_ratio=g, simpo_gamma=2 * g) for g in (0.1, 0.5)]
    assert swept(runs) == "gamma_beta_ratio"


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_cases_over_training(base, tiny_model, tokenizer, pairs, tmp_path):
    """From the CSV by hand: under DPO's reward r is of the policy, and the reference in the margin."""
    options = {"loss_type": "simpo", "simpo_gamma": 0.5} if base == "cpo" else {"reward": "log-ratio"}
    out, rows = tmp_path / "run", Dataset.from_json(str(pairs))
    trainer_of(base, tiny_model, tokenizer, out, rows, learning_rate=1e-2, num_train_epochs=3, **options).train()
    with (out / "pair_log.csv").open(newline="") as file:
        logged = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    counts = np.zeros(4)
    for row in logged:
        r = row["reward_gap"]
        if base == "dpo":
            r = row["logp_chosen"] * row["length_chosen"] - row["logp_rejected"] * row["length_rejected"]
        reached = row["reward_gap"] >= row["margin"]
        counts[{(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[r > 0, reached]] += 1
    picture = cases_picture([read_run(out)])
    (panel,) = picture.figure.axes[:1]
    title = panel.get_title(loc="left") or panel.get_title()
    over, under = (f"{100 * round(counts[i] / len(logged), 3):.3g} %" for i in (1, 2))
    assert f"overfitting {over}, underfitting {under}" in title
    assert counts[1] > 0
    assert (counts[2] > 0) == (base == "dpo")


def test_a_run_without_cases(tiny_model, tokenizer, pairs, tmp_path):
    rows = Dataset.from_json(str(pairs))
    trainer_of("dpo", tiny_model, tokenizer, tmp_path / "run", rows, loss_type="ipo", max_steps=1).train()
    picture = cases_picture([read_run(tmp_path / "run")])
    assert picture.left_out == {"run": "loss_type 'ipo' is no function of the reward gap less a margin"}
