"""PWA and Spearman: the functions, the `evaluate` metrics, and what `trainer.evaluate()` makes of them."""

from __future__ import annotations

import logging
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, preference_rows, quiet, trainer_of
from said import word_for_word  # noqa: F401 - its messages are held against said/
from scipy.stats import spearmanr

from trl_margins import GapPOConfig, GapPOTrainer, MarginCPOConfig, MarginCPOTrainer
from trl_margins.evaluation.ranking import (
    PairwiseAccuracy,
    PooledSpearman,
    pairwise_accuracy,
    pooled_spearman,
    ranking_metrics,
)
from trl_margins.terms.score_gap import score_gap_weight


def test_pairwise_accuracy():
    chosen, rejected, gaps = [1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0], [2.0, 3.0, 1.9, -2.5]
    assert pairwise_accuracy(chosen, rejected) == (0.5, 4)  # a tie is wrong
    assert pairwise_accuracy(chosen, rejected, gaps, 2.0) == (pytest.approx(2 / 3), 3)
    assert pairwise_accuracy(chosen, rejected, gaps, 9.0) == (None, 0)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_gap_is_that_of_the_decimals(kind):
    """Which binary numbers round: 0.7 - 0.4 is below 0.3, and float32's 7.3 - 5.3 is above 2."""
    tenths = [Decimal(i) / 10 for i in range(101)]
    both = [(one, other) for one in tenths for other in tenths]
    chosen, rejected = (np.array(each, kind) for each in zip(*both, strict=True))
    for least in ("0.1", "0.3", "0.7", "2", "2.1"):
        right = [abs(one - other) >= Decimal(least) for one, other in both]
        kept = score_gap_weight(torch.tensor(chosen), torch.tensor(rejected), "hard", float(least))
        assert kept.tolist() == right
        found = ranking_metrics(right, np.zeros(len(both)), chosen, rejected, min_score_gap=float(least))
        assert (found["pwa"], found["n_pairs_gap"]) == (1.0, sum(right))


def test_spearman_is_the_papers_formula():
    """Eq. 10, for data without ties."""
    rng = np.random.default_rng(0)
    rewards, scores = rng.normal(size=(2, 40)), rng.normal(size=(2, 40))
    ranks = [np.argsort(np.argsort(values.ravel())) for values in (rewards, scores)]
    m = 80
    expected = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (m * (m**2 - 1))
    assert pooled_spearman(*rewards, *scores) == pytest.approx(expected)


def test_undefined_is_none():
    assert pooled_spearman([1.0, 1.0], [1.0, 1.0], [1.0, 2.0], [3.0, 4.0]) is None
    assert pooled_spearman([1.0, 2.0], [3.0, 4.0], [5.0, 5.0], [5.0, 5.0]) is None
    assert pooled_spearman([1.0], [2.0], [3.0], [np.nan]) is None
    assert pooled_spearman([], [], [], []) is None
    assert ranking_metrics([], []) == {"pwa_all": None, "n_pairs": 0}


def test_a_gap_column_has_no_spearman():
    metrics = ranking_metrics([1.0, 0.0], [0.0, 1.0], [3.0, 1.0], [0.0, 0.0], gap_only=True)
    assert metrics == {"pwa_all": 0.5, "n_pairs": 2, "pwa": 1.0, "n_pairs_gap": 1}


@pytest.mark.parametrize("side", [2, 3])
def test_a_pair_with_one_score_has_no_part_in_spearman(side):
    values = np.random.default_rng(0).normal(size=(4, 20))
    whole = ranking_metrics(*values[:, ::2], min_score_gap=0.5)
    values[side, 1::2] = np.nan
    found = ranking_metrics(*values, min_score_gap=0.5)
    assert {name: found[name] for name in ("spearman", "pwa", "n_pairs_gap")} == {
        name: whole[name] for name in ("spearman", "pwa", "n_pairs_gap")
    }
    expected = spearmanr(values[:2, ::2].ravel(), values[2:, ::2].ravel()).statistic
    assert found["spearman"] == pytest.approx(expected)
    assert found["n_pairs"] == 20


def test_as_evaluate_metrics(tmp_path):
    accuracy = PairwiseAccuracy(cache_dir=str(tmp_path))
    assert accuracy.compute(predictions=[1.0, 0.0, 2.0], references=[0.0, 1.0, 1.0])["pwa"] == pytest.approx(2 / 3)
    accuracy.add_batch(predictions=[1.0, 0.0], references=[0.0, 1.0])
    assert accuracy.compute(score_gaps=[3.0, 1.0], min_score_gap=2.0) == {"pwa": 1.0, "n_pairs": 1}
    spearman = PooledSpearman(cache_dir=str(tmp_path))
    assert spearman.compute(predictions=[1.0, 2.0, 3.0], references=[2.0, 4.0, 9.0]) == {"spearman": pytest.approx(1)}


def cpo(folder, tokenizer, out, evals, **settings):
    config = MarginCPOConfig(**quiet(output_dir=str(out), loss_type="simpo", cpo_alpha=0.0, **settings))
    return MarginCPOTrainer(
        load(folder), config, train_dataset=preference_rows(4), eval_dataset=evals, processing_class=tokenizer
    )


def rewards_by_hand(trainer, rows) -> np.ndarray:
    """[2, M] mean log-probability of each answer, one sequence at a time through the plain model."""
    rewards = []
    for side in ("chosen", "rejected"):
        for row in rows:
            ids, labels = torch.tensor([row[f"{side}_input_ids"]]), torch.tensor(row[f"{side}_labels"])[1:]
            with torch.no_grad():
                logps = trainer.model(ids).logits[0, :-1].log_softmax(-1)
            kept = labels != -100
            rewards.append(logps[kept, labels[kept]].mean().item())
    return np.array(rewards).reshape(2, -1)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_over_the_whole_set(batch_size, tiny_model, tokenizer, tmp_path):
    """Not a mean over batches: any batch size gives the same, and it is that of all rewards at once."""
    rows = preference_rows(13, seed=5)
    trainer = cpo(tiny_model, tokenizer, tmp_path, rows, per_device_eval_batch_size=batch_size, beta=3.0)
    metrics = trainer.evaluate()
    rewards = rewards_by_hand(trainer, trainer.eval_dataset)
    expected = ranking_metrics(*rewards, rows["score_chosen"], rows["score_rejected"])
    assert expected["n_pairs_gap"] < expected["n_pairs"] == 13
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value), name


def mean_logps_by_hand(model: Any, rows: Any, tokenizer: Any) -> np.ndarray:
    """[2, M] plain transformers, one text at a time."""
    found = []
    for side in ("chosen", "rejected"):
        for row in rows:
            prompt, answer = (tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", side))
            with torch.no_grad():
                if model.config.is_encoder_decoder:  # CPOTrainer adds no end here
                    logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0]
                else:
                    answer = [*answer, tokenizer.eos_token_id]
                    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1)[range(len(answer)), answer].mean().item())
    return np.array(found).reshape(2, -1)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("cpo", {}),  # the sum
        ("cpo", {"share_prompt": "never"}),  # TRL's own method trains
        ("cpo", {"loss_type": "simpo", "alpha": 0.5, "beta": 3.0}),
        ("cpo", {"weight": "score-gap", "margin": "gamma-po", "loss_type": "simpo"}),
        ("cpo", {"loss_type": "simpo", "margin": "amapo"}),
        ("dpo", {}),  # all pairs tie by the log-ratio to itself
        ("dpo", {"share_prompt": "never", "loss_type": ["ipo"]}),
        ("dpo", {"ld_alpha": 0.2}),
        ("dpo", {"reward": "sum", "weight": "score-gap"}),
        ("encoder-decoder", {}),
    ],
    ids=str,
)
def test_every_reward_is_ranked_by_eq_9(base, options, tiny_model, tokenizer, tmp_path, request):
    """The mean log-probability per token under the policy, so that runs compare; accuracies are TRL's."""
    rows = preference_rows(20, seed=5)
    folder = request.getfixturevalue("tiny_encoder_decoder") if base == "encoder-decoder" else tiny_model
    trainer = trainer_of(base.replace("encoder-decoder", "cpo"), folder, tokenizer, tmp_path, rows, rows, **options)
    metrics = trainer.evaluate()
    means = mean_logps_by_hand(load(folder), rows, tokenizer)
    for name, value in ranking_metrics(*means, rows["score_chosen"], rows["score_rejected"]).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value), name
    if options.get("loss_type") != "simpo":
        assert metrics["eval_rewards/accuracies"] != metrics["eval_pwa_all"], "else this shows nothing"


def test_a_dict_of_sets(tiny_model, tokenizer, tmp_path):
    near = preference_rows(6, scores=lambda i: (3.0, 2.0))
    far = preference_rows(7, seed=2, scores=lambda i: (9.0, 2.0 + i / 10))
    unscored = preference_rows(5, seed=3).remove_columns(["score_chosen", "score_rejected"])
    trainer = cpo(tiny_model, tokenizer, tmp_path, {"near": near, "far": far, "unscored": unscored})
    metrics = trainer.evaluate()
    assert (metrics["eval_near_n_pairs"], metrics["eval_far_n_pairs"], metrics["eval_unscored_n_pairs"]) == (6, 7, 5)
    assert metrics["eval_near_n_pairs_gap"] == 0
    assert "eval_near_pwa" not in metrics
    assert metrics["eval_far_n_pairs_gap"] == 7
    assert "eval_unscored_pwa" not in metrics
    assert 0 <= metrics["eval_unscored_pwa_all"] <= 1


def test_no_pair_reaches_the_threshold(tiny_model, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_margins"):
        cpo(tiny_model, tokenizer, tmp_path, preference_rows(3, scores=lambda i: (3.0, 2.5)))
    assert "no pair of eval has a score gap of 2 or more (the largest is 0.5)" in caplog.text


@pytest.mark.parametrize("sets", ["one", "several"])
def test_the_best_checkpoint_is_kept(sets, tiny_model, tokenizer, tmp_path):
    rows = preference_rows(12, scores=lambda i: (6.0, 1.0 + i / 12))
    evals = rows if sets == "one" else {"first": rows, "second": preference_rows(4, seed=1)}
    settings = quiet(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=1, max_steps=4, learning_rate=0.02)
    settings |= {"save_strategy": "steps", "warmup_steps": 0}
    config = GapPOConfig(**settings)
    trainer = GapPOTrainer(
        load(tiny_model), config, train_dataset=rows, eval_dataset=evals, processing_class=tokenizer
    )
    trainer.train()
    name = "eval_pwa" if sets == "one" else "eval_first_pwa"
    accuracies = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert len(set(accuracies)) > 1, "the run must have something to choose from"
    assert trainer.state.best_metric == max(accuracies)
    best = trainer.evaluate()
    assert best[name] == max(accuracies)
