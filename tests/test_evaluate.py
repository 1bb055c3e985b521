"""Evaluation of a model: metrics against plain references, answers against one pass each, every kind of set."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import byte_tokenizer, load, preference_rows, quiet, sentence
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from said import hear, word_for_word  # noqa: F401 - its messages are held against said/
from scipy import stats
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import ndcg_score
from transformers import AutoConfig, LlamaForCausalLM

from trl_margins import MarginCPOConfig, MarginCPOTrainer
from trl_margins.cli import main
from trl_margins.evaluation import scorer as scorer_module
from trl_margins.evaluation.cases import case_report, ranking_cases
from trl_margins.evaluation.intervals import bootstrap_intervals, student_interval
from trl_margins.evaluation.listwise import listwise_metrics, listwise_report
from trl_margins.evaluation.pairs import Pairs, pair_report
from trl_margins.evaluation.rm_bench import LEVELS, domain_of, levels, rm_bench_report, style_matrix
from trl_margins.evaluation.scorer import completion_logps
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.evaluation.tables import (
    LISTWISE_ROWS,
    PAIR_ROWS,
    markdown_table,
    model_tables,
    pair_table,
    report_tables,
)
from trl_margins.forward import checked
from trl_margins.rows import PreferenceRow

# Listwise numbers


def mean_ranks(values):
    values = np.asarray(values, float)
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def tied_ndcg(scores, rewards, k):
    """Over all orders that ties of rewards allow, the mean DCG; over the best one."""
    k = k or len(scores)
    discount = [1 / math.log2(2 + i) for i in range(k)]

    def dcg(order):
        return sum(scores[i] * d for i, d in zip(order, discount, strict=False))

    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(rewards[a] >= rewards[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean([dcg(order) for order in orders]) / dcg(sorted(range(len(scores)), key=lambda i: -scores[i]))


@pytest.mark.parametrize("seed", range(20))
def test_listwise_metrics(seed):
    """Against enumeration, rank formulas, scipy and scikit-learn, with many ties."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 7))
    rewards, scores = rng.integers(0, 4, k).astype(float), rng.integers(1, 5, k).astype(float)
    found = listwise_metrics(rewards, scores)
    if np.ptp(scores) == 0:
        assert found["ndcg@k"] is None
    else:
        for at in (1, 3, None):
            name = f"ndcg@{at or 'k'}"
            assert found[name] == pytest.approx(ndcg_score([scores], [rewards], k=at))
            assert found[name] == pytest.approx(tied_ndcg(scores, rewards, at))
    if np.ptp(scores) == 0 or np.ptp(rewards) == 0:
        assert found["spearman"] is None
        assert found["kendall"] is None
        return
    assert found["spearman"] == pytest.approx(np.corrcoef(mean_ranks(rewards), mean_ranks(scores))[0, 1])
    assert found["spearman"] == pytest.approx(spearmanr(rewards, scores).statistic)
    signs = [
        (np.sign(rewards[i] - rewards[j]), np.sign(scores[i] - scores[j]))
        for i, j in itertools.combinations(range(k), 2)
    ]
    concordance = sum(a * b for a, b in signs)
    tau = concordance / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    assert found["kendall"] == pytest.approx(tau)
    assert found["kendall"] == pytest.approx(kendalltau(rewards, scores).statistic)


def test_regret():
    found = listwise_metrics([1.0, 3.0, 3.0, 0.0], [9.0, 4.0, 8.0, 1.0])
    assert found["regret"] == pytest.approx(9 - 6)  # two answers share the highest reward
    assert found["regret_random"] == pytest.approx(9 - 5.5)
    assert listwise_metrics([], [])["regret"] is None


def test_listwise_means_leave_out_what_is_undefined(caplog):
    rewards, scores = [[1.0, 2.0], [1.0, 2.0], [0.0]], [[-1.0, 4.0], [2.0, 2.0], [3.0]]
    with caplog.at_level(logging.INFO, "trl_margins"):
        report = listwise_report(rewards, scores, n_resamples=50)
    assert "scores go down to -1" in caplog.text
    assert report["spearman"] == pytest.approx(1.0)
    assert report["n_defined"]["spearman"] == 1
    assert report["n_defined"]["regret"] == report["n_prompts"] == 3
    assert report["n_completions"] == 5
    assert report["ndcg@1"] == 1.0
    # the gain of a score is its distance from zero, or from the lowest of them all below zero
    assert listwise_report([[2.0, 1.0]], [[1.0, 4.0]], n_resamples=2)["ndcg@1"] == pytest.approx(1 / 4)
    assert listwise_report([[2.0, 1.0], []], [[-1.0, 4.0], []], n_resamples=2)["ndcg@1"] == pytest.approx(0)


# Intervals and pairs


def test_interval_of_a_mean_is_as_wide_as_theory_says():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    low, high = bootstrap_intervals(lambda rows: {"mean": values[rows].mean()}, range(400))["mean"]
    expected = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - expected, abs=0.25 * expected)
    assert high == pytest.approx(values.mean() + expected, abs=0.25 * expected)


def test_intervals_draw_whole_prompts():
    """Four copies of a pair are no more evidence than one."""
    values = np.random.default_rng(0).normal(size=50)
    single = bootstrap_intervals(lambda rows: {"mean": values[rows].mean()}, range(50))
    copied = np.repeat(values, 4)
    clustered = bootstrap_intervals(lambda rows: {"mean": copied[rows].mean()}, np.repeat(range(50), 4).tolist())
    assert clustered["mean"] == pytest.approx(single["mean"])
    assert bootstrap_intervals(lambda rows: {"mean": 1.0}, ["one", "one"]) == {"mean": None}
    assert bootstrap_intervals(lambda rows: {"x": None}, range(9)) == {"x": None}


def test_pair_report():
    rng = np.random.default_rng(1)
    n = 60
    chosen, rejected, scores = rng.normal(size=n), rng.normal(size=n), rng.uniform(1, 10, (2, n)).round()
    lengths = rng.integers(1, 20, (2, n))
    report = pair_report(Pairs(chosen, rejected, *lengths, *scores), range(n), n_resamples=200)
    right, gap = chosen > rejected, abs(scores[0] - scores[1])
    assert report["pwa_all"] == pytest.approx(right.mean())
    assert report["pwa"] == pytest.approx(right[gap >= 2].mean())
    assert report["spearman"] == pytest.approx(spearmanr([*chosen, *rejected], [*scores[0], *scores[1]]).statistic)
    assert report["chosen_longer"] == pytest.approx((lengths[0] > lengths[1]).mean())
    longer = np.where(lengths[0] > lengths[1], chosen, rejected) > np.where(lengths[0] > lengths[1], rejected, chosen)
    assert report["prefers_longer"] == pytest.approx(longer[lengths[0] != lengths[1]].mean())
    for bins in (report["by_score_gap"], report["by_length"]):
        assert sum(row["n"] for row in bins) == n
        assert sum(row["n"] * row["accuracy"] for row in bins) == pytest.approx(right.sum())
    shorter = (lengths[0] - lengths[1]) / lengths.max(0) < -0.2
    assert report["by_length"][0]["accuracy"] == pytest.approx(right[shorter].mean())
    for name, interval in report["intervals"].items():
        assert interval[0] <= report[name] <= interval[1], name


def test_pairs_without_scores_or_with_one_gap():
    pairs = Pairs(np.array([1.0, 2.0]), np.array([0.0, 3.0]), np.array([3, 3]), np.array([3, 3]))
    report = pair_report(pairs, range(2), n_resamples=20)
    assert report["pwa_all"] == 0.5
    assert report["prefers_longer"] is None
    assert report["by_score_gap"] == []
    same = pairs._replace(chosen_scores=np.array([4.0, 4.0]), rejected_scores=np.array([1.0, 1.0]))
    assert [row["bin"] for row in pair_report(same, range(2), n_resamples=20)["by_score_gap"]] == ["3"]


def test_no_pairs_have_no_numbers(recwarn):
    """None, and not NaN, which no JSON has."""
    report = pair_report(Pairs(*np.empty((6, 0))), [], n_resamples=20)
    counts = {"n_pairs": 0, "n_pairs_gap": 0}
    numbers = ("pwa", "pwa_all", "spearman", "reward_gap", "chosen_longer", "prefers_longer")
    assert {name: report[name] for name in (*counts, *numbers)} == counts | dict.fromkeys(numbers)
    assert not recwarn


def test_cases_are_told_of_the_sets_that_have_them():
    pairs = Pairs(np.array([1.0, 2.0]), np.array([0.0, 3.0]), np.array([3, 4]), np.array([3, 3]))
    plain = {"kind": "pairs", **pair_report(pairs, range(2), n_resamples=20)}
    cases = case_report(ranking_cases([1.0, 1.0, 0.0, -1.0, np.nan], [0.0, -1.0, 0.0, -0.1, 1.0]), range(5), 20)
    assert cases["case_counts"] == dict.fromkeys(("case_1", "case_2", "case_3", "case_4"), 1)
    with_cases = {**plain, **cases, "intervals": plain["intervals"] | cases["intervals"]}
    text = report_tables({"one": plain, "other": with_cases}, 2.0, "sum", targets={"other": {"case_method": "SimPO"}})
    assert "| AMaPO's cases: ranked right or wrong | other |" in re.sub(" +", " ", text)
    assert ("SimPO" in text, "The other accuracies are of the reward sum" in text) == (True, True)
    assert "AMaPO's cases" not in report_tables({"one": plain}, 2.0, "sum")


def test_counts_are_whole_numbers_in_tables():
    pairs = Pairs(np.array([1.0, 2.0]), np.array([0.0, 3.0]), np.array([3, 4]), np.array([3, 3]))
    table = pair_table({"some": pair_report(pairs, range(2), n_resamples=20)}, 2.0, "nats")
    assert [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| pairs ")] == ["2"]


# RM-Bench


def test_style_matrix_and_levels():
    """Rows are the chosen style, columns the rejected one; ties are wrong."""
    chosen = [[1.0, 5.0, 9.0], [1.0, 1.0, 1.0]]
    rejected = [[0.0, 5.0, 9.5], [0.0, 2.0, 0.5]]
    matrix = style_matrix(chosen, rejected)
    pairs = list(zip(chosen, rejected, strict=True))
    expected = [[np.mean([c[i] > r[j] for c, r in pairs]) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(matrix, expected)
    assert matrix[1, 1] == 0.0
    found = levels(np.array([[0.5, 0.1, 0.2], [0.7, 0.6, 0.3], [0.8, 0.9, 0.7]]))
    assert found["hard"] == pytest.approx(0.2)
    assert found["normal"] == pytest.approx(0.6)
    assert found["easy"] == pytest.approx(0.8)
    assert found["average"] == pytest.approx((0.2 + 0.6 + 0.8) / 3)


def test_rm_bench_total_is_the_mean_over_domains():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(30, 3)), rng.normal(size=(30, 3))
    domains = ["safety"] * 20 + ["chat"] * 10
    report = rm_bench_report(chosen, rejected, domains, n_resamples=50)
    assert list(report["domains"]) == ["chat", "safety"]
    for level in ("hard", "normal", "easy", "average"):
        parts = [levels(style_matrix(chosen[a:b], rejected[a:b]))[level] for a, b in ((0, 20), (20, 30))]
        assert report["total"][level] == pytest.approx(np.mean(parts))
    low, high = report["intervals"]["average"]
    assert low < report["total"]["average"] < high


@pytest.mark.parametrize(
    ("field", "file", "domain"),
    [
        ("math", "x.json", "math"),
        ("safety-refuse", "x.json", "safety"),
        (None, "data/safety-response_filtered.json.gz", "safety"),
        (None, "chat_filtered.json", "chat"),
    ],
)
def test_domains(field, file, domain):
    assert domain_of(field, file) == domain


@pytest.mark.parametrize(("field", "file"), [("aftermath", "x.json"), (None, "data/chat/my-code.json")])
def test_a_domain_is_what_a_name_begins_with(field, file):
    with pytest.raises(ValueError, match="is not one of chat, code, math, safety"):
        domain_of(field, file)


def test_an_unknown_domain():
    with pytest.raises(ValueError, match=r"total\.json: the domain 'poetry' is not one of chat, code, math, safety"):
        domain_of("poetry", "total.json")


# Answers


def lists(n, seed=0, chat=False):
    import random

    rng = random.Random(seed)
    rows = []
    for i in range(n):
        prompt = sentence(rng, 2, 5)
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}] if chat else prompt + " ",
                "responses": [sentence(rng, 1, 6) for _ in range(1 + (i * 3) % 5)],
                "scores": [float(rng.randint(1, 9)) for _ in range(1 + (i * 3) % 5)],
            }
        )
    return Dataset.from_list(rows)


def one_by_one(model, tokenizer, prompt, answer):
    """The answer's log-probability and length, by the shortest way there is."""
    if isinstance(prompt, list):
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    else:
        before, whole = prompt, prompt + answer + tokenizer.eos_token
    start, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, whole))
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    picked = logps[range(len(start) - 1, len(ids) - 1), ids[len(start) :]]
    return picked.sum().item(), len(picked)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_answers_are_scored_as_one_by_one(tiny_model, tokenizer, chat, batch_size):
    each = evaluation_set(lists(6, chat=chat), "lists")
    model = load(tiny_model)
    found = completion_logps(model, tokenizer, each.rows, max_length=256, batch_size=batch_size)
    for row, scored in zip(each.rows, found, strict=True):
        plain = [one_by_one(load(tiny_model), tokenizer, row.prompt, answer) for answer in row.completions]
        np.testing.assert_allclose(scored.logps, [logp for logp, _ in plain], rtol=1e-5)
        assert scored.lengths.tolist() == [length for _, length in plain]


def test_lists_have_cpo_trainers_tokens_where_that_is_asked_for(tiny_model, tokenizer):
    """A begin token before the text, which this tokenizer does not put there by itself."""
    each = evaluation_set(lists(4), "lists")
    rows = [*each.rows, PreferenceRow("nothing to score", [])]
    model = load(tiny_model)
    *found, none = completion_logps(model, tokenizer, rows, max_length=256, tokenization="cpo")
    assert none.logps.shape == none.lengths.shape == (0,)
    for row, scored in zip(each.rows, found, strict=True):
        plain = [one_by_one(model, tokenizer, "<s>" + row.prompt, answer) for answer in row.completions]
        np.testing.assert_allclose(scored.logps, [logp for logp, _ in plain], rtol=1e-5)
        assert scored.lengths.tolist() == [length for _, length in plain]
    with pytest.raises(ValueError, match="unknown tokenization 'CPO'; known: chat-template, cpo; did you mean 'cpo'"):
        completion_logps(model, tokenizer, each.rows, tokenization="CPO")


ROPE = {
    "dynamic": ({"factor": 4.0}, 32),
    "longrope": ({"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 32}, 128),
}


@pytest.mark.parametrize("rope_type", ROPE)
def test_long_rows_do_not_change_the_values_of_others(rope_type, tiny_model, tokenizer, caplog):
    """Models that scale their rotary embedding by the longest row of a batch, beyond 32 tokens; dynamic ones go on
    with it until they see a row of less.
    """
    rope, longest = ROPE[rope_type]
    config = AutoConfig.from_pretrained(
        tiny_model,
        rope_parameters={"rope_type": rope_type, "rope_theta": 1e4, **rope},
        max_position_embeddings=longest,
    )
    model = LlamaForCausalLM.from_pretrained(tiny_model, config=config, dtype=torch.float32).eval()
    lengths = [[20], [31, 18], [32, 19], [33], [60]]  # with the end token
    rows = [PreferenceRow(f"{i} is a text:", ["x" * (length - 13) for length in row]) for i, row in enumerate(lengths)]
    for _ in range(2):  # the second time with a model that has just seen the long ones
        caplog.clear()
        found = completion_logps(model, tokenizer, rows, max_length=128, batch_size=16, desc="here")
        (line,) = [each for each in caplog.messages if "rotary" in each]
        assert line.startswith("here: 2 of 5 rows are longer than the 32 tokens from which on this model scales")
        assert "Please report the model" not in caplog.text
        for row, scored in list(zip(rows, found, strict=True))[:3]:
            plain = [one_by_one(model, tokenizer, row.prompt, answer)[0] for answer in row.completions]
            np.testing.assert_allclose(scored.logps, plain, rtol=1e-5)
        one_by_one(model, tokenizer, rows[4].prompt, rows[4].completions[0])
    caplog.clear()
    completion_logps(model, tokenizer, rows[:3], max_length=128)
    assert "rotary" not in caplog.text


@pytest.mark.parametrize("tokenization", ["chat-template", "cpo"])
def test_prompts_that_fill_max_length_are_counted(tokenization, tiny_model, tokenizer, caplog):
    """One leaves room for a token, one exactly none, one is over; the end token counts."""
    begin = tokenization == "cpo"
    rows = [PreferenceRow("p" * (length - begin), ["", "xy"]) for length in (13, 15, 16, 17)]
    found = completion_logps(load(tiny_model), tokenizer, rows, max_length=16, desc="here", tokenization=tokenization)
    assert "here: 5 of 8 completions are cut to max_length=16; in 2 of 4 rows the prompt alone fills it" in caplog.text
    assert [each.lengths.tolist() for each in found] == [[1, 3], [1, 1], [0, 0], [0, 0]]
    assert all((each.logps == 0).all() for each in found[2:])


def test_the_rows_compared_have_answers(tiny_model, tokenizer, caplog):
    """Most prompts fill max_length: what is said of the comparison is of tokens."""
    caplog.set_level(logging.INFO, "trl_margins")
    rows = [PreferenceRow("p" * length, ["x", "yz"]) for length in (30, 30, 30, 30, 5)]
    completion_logps(load(tiny_model), tokenizer, rows, max_length=16)
    (line,) = [each for each in caplog.messages if "model's own" in each]
    assert "differs by" in line
    assert "differs by 0.0e+00" not in line


def test_the_model_is_left_as_it_was(tiny_model, tokenizer):
    model = load(tiny_model).train()
    each = evaluation_set(lists(3), "lists")
    completion_logps(model, tokenizer, each.rows, max_length=64)
    assert model.training
    assert "forward" not in model.__dict__


def test_a_model_that_cannot_share_prompts(tiny_model, tokenizer, monkeypatch, caplog):
    each = evaluation_set(lists(5), "lists")
    shared = completion_logps(load(tiny_model), tokenizer, each.rows, max_length=64)
    monkeypatch.setattr(scorer_module, "why_not_shared", lambda model: "a reason")
    with caplog.at_level(logging.INFO, "trl_margins"):
        standard = completion_logps(load(tiny_model), tokenizer, each.rows, max_length=64)
    assert "a reason" in caplog.text
    for a, b in zip(shared, standard, strict=True):
        np.testing.assert_allclose(a.logps, b.logps, rtol=1e-5)


def test_passes_that_disagree_fall_back(tiny_model, tokenizer, monkeypatch, caplog):
    each = evaluation_set(lists(5), "lists")
    right = completion_logps(load(tiny_model), tokenizer, each.rows, max_length=64)
    shared = checked.shared_token_logps

    def wrong(*args, **kwargs):
        tokens = shared(*args, **kwargs)
        tokens.logps.mul_(1.1)
        return tokens

    for module in (checked, scorer_module):
        monkeypatch.setattr(module, "shared_token_logps", wrong)
    found = completion_logps(load(tiny_model), tokenizer, each.rows, max_length=64)
    assert "the shared-prompt forward pass differs by" in caplog.text
    for a, b in zip(found, right, strict=True):
        np.testing.assert_allclose(a.logps, b.logps, rtol=1e-5)


def test_encoder_decoder(tiny_encoder_decoder, tokenizer):
    each = evaluation_set(lists(4), "lists")
    model = load(tiny_encoder_decoder)
    found = completion_logps(model, tokenizer, each.rows, max_length=64, batch_size=5)
    for row, scored in zip(each.rows, found, strict=True):
        for answer, logp, length in zip(row.completions, *scored, strict=True):
            inputs, labels = (
                tokenizer(row.prompt, return_tensors="pt"),
                tokenizer(answer, return_tensors="pt").input_ids,
            )
            with torch.no_grad():
                loss = model(**inputs, labels=labels).loss
            assert length == labels.numel()
            assert logp == pytest.approx(-loss.item() * length, rel=1e-4)


def test_without_the_adapter_it_is_the_base(tiny_model, tokenizer):
    each = evaluation_set(lists(3), "lists")
    base = completion_logps(load(tiny_model), tokenizer, each.rows, max_length=64)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=64, init_lora_weights=False)
    adapted = get_peft_model(load(tiny_model), config)
    common = {"rows": each.rows, "max_length": 64, "accelerator": Accelerator()}
    under = completion_logps(adapted, tokenizer, use_adapter=False, **common)
    over = completion_logps(adapted, tokenizer, **common)
    for a, b, c in zip(base, under, over, strict=True):
        np.testing.assert_allclose(a.logps, b.logps, rtol=1e-5)
        assert not np.allclose(a.logps, c.logps, rtol=1e-3)


def test_equal_rewards_and_equal_scores_are_counted():
    """They are ranked wrong, and the report says how many they are; a NaN equals nothing."""
    chosen, rejected = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 1.0, 4.0])
    scores = np.array([5.0, 4.0, math.nan, 3.0]), np.array([5.0, 1.0, math.nan, 2.0])
    lengths = np.full(4, 3), np.full(4, 3)
    report = pair_report(Pairs(chosen, rejected, *lengths, *scores), range(4), n_resamples=5)
    assert (report["n_equal_rewards"], report["n_equal_scores"], report["pwa_all"]) == (2, 1, 0.25)
    table = pair_table({"some": report}, 2.0, "nats")
    assert re.search(r"pairs with equal rewards, counted as wrong *\| *2 \|", table)
    assert re.search(r"pairs with equal scores *\| *1 \|", table)
    none = pair_report(Pairs(chosen + 9, rejected, *lengths), range(4), n_resamples=5)
    assert not {"n_equal_rewards", "n_equal_scores"} & none.keys()


# The command


def rm_bench_rows(n, seed=0, **more):
    import random

    rng = random.Random(seed)
    return [
        {
            "id": i,
            "prompt": sentence(rng, 2, 4),
            **{side: [sentence(rng, 1, 4 + j) for j in range(3)] for side in ("chosen", "rejected")},
            **more,
        }
        for i in range(n)
    ]


@pytest.fixture
def sets(tmp_path):
    preference_rows(10, "conversational").to_json(tmp_path / "pairs.jsonl")
    lists(5, chat=True).to_json(tmp_path / "lists.jsonl")
    (tmp_path / "chat_filtered.json").write_text(json.dumps(rm_bench_rows(4)))
    (tmp_path / "total.json").write_text(json.dumps(rm_bench_rows(3, seed=1, domain="safety-refuse")))
    return tmp_path


def evaluate(*argv):
    assert main(["evaluate", "--max_length", "128", "--bootstrap", "20", *map(str, argv)]) == 0


def test_all_kinds_in_one_command(tiny_model, sets, capsys):
    files = [sets / name for name in ("pairs.jsonl", "lists.jsonl", "chat_filtered.json", "total.json")]
    numbers, text, rewards = sets / "out" / "n.json", sets / "out" / "n.md", sets / "out" / "r.jsonl"
    argv = ["--model_name_or_path", tiny_model, "--json", numbers, "--markdown", text, "--rewards", rewards]
    evaluate("--dataset_name", *files, *argv)
    found = json.loads(numbers.read_text())["sets"]
    assert {name: report["kind"] for name, report in found.items()} == {
        "pairs": "pairs",
        "lists": "listwise",
        "RM-Bench": "rm-bench",
    }
    assert {name: part["n_prompts"] for name, part in found["RM-Bench"]["domains"].items()} == {"chat": 4, "safety": 3}
    for words in (
        "pairs | ",
        "best against worst, accuracy",
        "| RM-Bench ",
        "chat: chosen \\ rejected",
        "In brackets",
    ):
        assert words in text.read_text()
    assert text.read_text().strip() in capsys.readouterr().out
    lines = [json.loads(line) for line in rewards.read_text().splitlines()]
    assert [len(line["rewards"]) for line in lines if line["set"] == "RM-Bench"] == [6] * 7
    pairs = np.array([line["rewards"] for line in lines if line["set"] == "pairs"])
    assert found["pairs"]["pwa_all"] == pytest.approx((pairs[:, 0] > pairs[:, 1]).mean())


def test_numbers_are_those_of_the_trainer(tiny_model, tokenizer, sets):
    """And the same for any batch size."""
    rows = Dataset.from_json(str(sets / "pairs.jsonl"))
    trainer = MarginCPOTrainer(
        load(tiny_model),
        MarginCPOConfig(**quiet(output_dir=str(sets / "x"), loss_type="simpo", beta=1.0, max_length=128)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    for batch_size in (1, 5, 100):
        file = sets / f"{batch_size}.json"
        argv = ["--model_name_or_path", tiny_model, "--dataset_name", sets / "pairs.jsonl", "--json", file]
        evaluate(*argv, "--batch_size", batch_size)
        found = json.loads(file.read_text())["sets"]["pairs"]
        for name in ("pwa", "pwa_all", "spearman", "n_pairs", "n_pairs_gap"):
            assert found[name] == pytest.approx(metrics[f"eval_{name}"]), name
        assert found["reward_gap"] == pytest.approx(metrics["eval_rewards/margins"], abs=1e-5)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("tiny_model", {}, ["max_length=40, with which the model was trained"]),
        ("tiny_model", {"tokenization": "cpo"}, ["tokenization='cpo', with which the model was trained"]),
        (
            "tiny_encoder_decoder",
            {"max_completion_length": 12},
            ["max_completion_length=12, with which", "completions are cut to 12 tokens (max_completion_length)"],
        ),
    ],
    ids=["chat-template", "cpo", "encoder-decoder"],
)
def test_a_run_is_evaluated_on_its_own_tokens(model, options, said, tokenizer, tmp_path, request, caplog):
    """As `margin_run.json` has it: some completions are cut, and the numbers are the trainer's."""
    caplog.set_level(logging.INFO, "trl_margins")
    rows = preference_rows(10)
    rows.to_json(tmp_path / "pairs.jsonl")
    options = {"loss_type": "simpo", "beta": 1.0, "max_length": 40, "max_steps": 1, **options}
    trainer = MarginCPOTrainer(
        load(request.getfixturevalue(model)),
        MarginCPOConfig(**quiet(output_dir=str(tmp_path / "run"), **options)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    files = ["--dataset_name", tmp_path / "pairs.jsonl", "--json", tmp_path / "n", "--rewards", tmp_path / "r"]
    main(["evaluate", "--bootstrap", "20", "--model_name_or_path", *map(str, [tmp_path / "run", *files])])
    found = json.loads((tmp_path / "n").read_text())
    assert found["sets"]["pairs"]["reward_gap"] == pytest.approx(metrics["eval_rewards/margins"], abs=1e-5)
    rewards = np.array([json.loads(line)["rewards"] for line in (tmp_path / "r").read_text().splitlines()])
    assert rewards.mean(0) == pytest.approx([metrics[f"eval_rewards/{side}"] for side in ("chosen", "rejected")])
    for line in said:
        assert line in caplog.text
    limit = options.get("max_completion_length", 40)
    n_cut = int(re.search(r"(\d+) of 20 completions are cut to .*" + str(limit), caplog.text)[1])
    lengths = [json.loads(line)["lengths"] for line in (tmp_path / "r").read_text().splitlines()]
    assert 0 < n_cut < 20
    assert found["tokenization"] == ("chat-template" if said[0].startswith("max_length") else "cpo")
    if limit == 12:
        whole = [len(tokenizer(row[side]).input_ids) for row in rows for side in ("chosen", "rejected")]
        assert n_cut == sum(length > 12 for length in whole)
        assert np.array(lengths).flatten().tolist() == [min(length, 12) for length in whole]


def test_rewards_are_what_they_are_called(tiny_model, sets):
    """Sum = mean × length; the log-ratio of a model to itself is 0."""
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", sets / "lists.jsonl", "--rewards"]
    options = {"length-normalized": [], "sum": [], "log-ratio": ["--ref_model", tiny_model]}
    found = {}
    for reward, more in options.items():
        evaluate(*argv, sets / reward, "--reward", reward, *more)
        found[reward] = [json.loads(line) for line in (sets / reward).read_text().splitlines()]
    for mean, total, ratio in zip(*found.values(), strict=True):
        np.testing.assert_allclose(np.array(mean["rewards"]) * mean["lengths"], total["rewards"], rtol=1e-6)
        np.testing.assert_allclose(ratio["rewards"], 0, atol=1e-4)  # of two sums of some 200 nats


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_took_its_values_out_of_its_base(start, tiny_model, sets, capsys):
    """Its reference is that base all the same, and not what is left of it."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    model = get_peft_model(load(tiny_model), adapter)
    model.save_pretrained(sets / "adapter")
    byte_tokenizer().save_pretrained(sets / "adapter")
    argv = ["--model_name_or_path", sets / "adapter", "--dataset_name", sets / "pairs.jsonl", "--reward", "log-ratio"]
    evaluate(*argv, "--rewards", sets / "own")
    evaluate(*argv, "--rewards", sets / "named", "--ref_model", tiny_model)
    assert (sets / "own").read_text() == (sets / "named").read_text()


def test_an_adapter_against_its_own_base(tiny_model, sets, capsys):
    model = get_peft_model(load(tiny_model), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(sets / "adapter")
    byte_tokenizer().save_pretrained(sets / "adapter")
    argv = ["--dataset_name", sets / "pairs.jsonl", "--reward", "log-ratio", "--rewards", sets / "r"]
    evaluate("--model_name_or_path", sets / "adapter", *argv)
    for line in (sets / "r").read_text().splitlines():  # a fresh adapter does nothing
        np.testing.assert_allclose(json.loads(line)["rewards"], 0, atol=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reward", "log-ratio"], "needs --ref_model"),
        (["--ref_model", "x"], "'length-normalized' uses no reference model"),
    ],
)
def test_reference_models(tiny_model, sets, argv, message):
    with pytest.raises(ValueError, match=message):
        evaluate("--model_name_or_path", tiny_model, "--dataset_name", sets / "pairs.jsonl", *argv)


def test_the_four_splits_come_together(tiny_model, tmp_path):
    rows = preference_rows(4)
    splits = DatasetDict(dict.fromkeys(("train", "id", "prompt_ood", "response_ood", "mutual_ood"), rows))
    splits.save_to_disk(tmp_path / "splits")
    evaluate("--model_name_or_path", tiny_model, "--dataset_name", tmp_path / "splits", "--json", tmp_path / "n")
    assert list(json.loads((tmp_path / "n").read_text())["sets"]) == ["id", "prompt_ood", "response_ood", "mutual_ood"]


def test_scores_of_lists_by_name():
    """Named columns are read where a set has them; of the others of the same call they say nothing."""
    rows = Dataset.from_list([{"prompt": "a ", "responses": ["b", "c"], "scores": [1.0, 2.0], "mine": [4.0, 3.0]}])
    assert evaluation_set(rows, "lists", ["mine"]).scores == [[4.0, 3.0]]
    assert evaluation_set(rows, "lists", ["theirs"]).scores == [[1.0, 2.0]]


@pytest.mark.parametrize("images", [[], None])
def test_text_among_rows_with_images(images):
    """A set with a column of images, of which no row has one, is a set of text, as in training."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "images": images}] * 2
    assert evaluation_set(Dataset.from_list(rows), "here").kind == "pairs"
    rows[1] = {**rows[1], "images": ["x.png"]}
    with pytest.raises(ValueError, match="by their text alone, and there is the column 'images'"):
        evaluation_set(Dataset.from_list(rows), "here")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"text": "a"}], "an evaluation set has chosen and rejected, or prompt, responses, scores"),
        ([{"prompt": "a", "responses": ["x", "y"], "scores": [1.0]}], "row 0 of here: 2 responses and 1 scores"),
        ([{"prompt": "a", "responses": ["x"], "scores": [math.nan]}], "row 0 of here, response 0: the score nan"),
        (
            [{"prompt": "a", "chosen": ["x"], "rejected": ["x"]}],
            "chosen is a list of 1 texts. RM-Bench's rows have lists of 3",
        ),
        ([{"prompt": "a", "chosen": ["x"], "rejected": "x"}], "chosen is a list of 1 texts. RM-Bench's"),
        ([{"prompt": "a", "chosen": ["x"] * 3, "rejected": "xyz"}], "row 0: rejected is 'xyz'. RM-Bench's"),
        (
            [{"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": None}],
            "here: there is nothing to measure: ",
        ),
    ],
)
def test_what_is_no_evaluation_set(rows, message):
    with pytest.raises(ValueError, match=message):
        evaluation_set(Dataset.from_list(rows), "here")


@pytest.mark.parametrize("value", [0.00069, 0.5, 0.123449])
def test_a_printed_interval_holds_its_number(value):
    for width in (0.0001, 0.004, 0.2):
        report = {"kind": "listwise", "kl_drift": value, "intervals": {"kl_drift": (value - width, value + width)}}
        cell = report_tables({"a": report}, 2, "logp").split("KL drift (nats per token)")[1].split("|")[1]
        number, low, high = map(float, re.findall(r"-?\d+\.\d+", cell))
        assert low <= number <= high


def test_a_bar_in_a_cell_does_not_break_the_table():
    lines = markdown_table(["a|b", "n"], [["x", "1"]]).splitlines()
    assert lines[0] == "| a\\|b   |   n |"
    assert {line.replace("\\|", "").count("|") for line in lines} == {3}


def test_a_model_that_gives_nan_is_refused(tiny_model, tokenizer, tmp_path):
    """One text of eight that it cannot read: no table with NaN in it, but the row."""
    model = load(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("#")] = math.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = preference_rows(8, seed=4).to_list()
    rows[3]["chosen"] += "#"
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    arguments = ["evaluate", "--model_name_or_path", str(tmp_path / "model"), "--batch_size", "1", "--bootstrap", "2"]
    with pytest.raises(ValueError, match=r"pairs: the model gives NaN or infinite rewards in 1 of 8 rows, .* row 3:"):
        main([*arguments, "--dataset_name", str(tmp_path / "pairs.jsonl")])


def test_the_interval_is_scipys():
    values = [0.3, 0.5, 0.8, 0.9]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert student_interval(values) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert np.isnan(student_interval([0.3])[1])
    assert student_interval([0.5, 0.5, 0.5]) == (0.5, 0.0)


# The tables


def report_of(kind: str, first: float) -> dict[str, Any]:
    """Made-up numbers, each another one."""
    number = itertools.count(first, 0.01)
    level = {level: next(number) for level in LEVELS}
    spans = dict.fromkeys(LEVELS, (0.25, 0.75))
    names = {"pairs": PAIR_ROWS, "listwise": LISTWISE_ROWS, "rm-bench": {}}[kind]
    report: dict[str, Any] = {"kind": kind, "kl_drift": next(number)}
    report |= {name: 7 if name.startswith("n_") else next(number) for name in names}
    if kind == "rm-bench":
        part = {"n_prompts": 3, **level, "intervals": spans, "matrix": np.arange(9).reshape(3, 3) / 10}
        report |= {"n_prompts": 9, "total": level, "domains": {"chat": part, "code": {**part, "n_prompts": 6}}}
    else:
        report |= {f"case_{i}": next(number) for i in (1, 2, 3, 4)}
    if kind == "pairs":
        rows = [{"bin": f"{i} to {i + 1}", "n": i, "accuracy": next(number), "interval": (0.1, 0.9)} for i in (1, 2)]
        report |= {"by_score_gap": rows, "by_length": rows[:1], "by_subset": None}
    return {**report, "intervals": {**spans, "pwa_all": (0.125, 0.875), "best_worst": None, "kl_drift": (0.0, 1.0)}}


KINDS = {"held out": "pairs", "lists": "listwise", "RM": "rm-bench"}


@pytest.mark.parametrize("reward", ["sum", "length-normalized"])
def test_the_tables_of_one_model_in_full(reward):
    targets = {"held out": {"case_method": "gappo", "case_reward": "Δ", "case_margin": "2"}}
    reports = {name: report_of(kind, 0.1) for name, kind in KINDS.items()}
    hear(report_tables(reports, 1.5, reward, targets=targets))
    hear(report_tables({"a": report_of("pairs", 0.2), "b": report_of("pairs", 0.3)}, 2.0, reward, bins=False))


def test_the_tables_of_two_models_in_full():
    models = {
        model: {name: report_of(kind, first) for name, kind in KINDS.items()}
        for model, first in {"one": 0.1, "two": 0.2}.items()
    }
    hear(model_tables(models, 1.5, "sum", {"one": {"case_method": "gappo"}}))
    hear(model_tables({model: {"a": of["held out"]} for model, of in models.items()}, 1.5, "sum"))


def test_most_scores_reversed_is_said(caplog):
    rows = [
        {"prompt": "q", "chosen": f"a{i}", "rejected": f"b{i}", "score_chosen": 1.0, "score_rejected": i}
        for i in range(6)
    ]
    evaluation_set(Dataset.from_list(rows), "odd")
    assert "in 4 of 6 odd pairs the rejected completion scores higher: check that score_chosen" in caplog.text
    caplog.clear()
    evaluation_set(Dataset.from_list(rows[:3]), "even")
    assert "scores higher" not in caplog.text


def test_lists_beside_pairs_are_said(caplog):
    pairs = {"chosen": "a", "rejected": "b"}
    rows = [{"prompt": "q", "responses": ["a", "b"], "scores": [2.0, 1.0], **pairs}] * 3
    assert evaluation_set(Dataset.from_list(rows), "both").kind == "listwise"
    assert (
        "both: its lists (responses, scores) are measured, and not the pairs (chosen, rejected) beside" in caplog.text
    )
