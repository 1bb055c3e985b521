"""The papers' definitions in whole trainers, against NumPy and plain transformers."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    BASES,
    assert_same_gradients,
    first_batch,
    load,
    loss_and_gradients,
    preference_rows,
    quiet,
    trainer_of,
)
from datasets import Dataset
from test_margin_terms import amapo, mirror_descent
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_margins import (
    GammaPODPOConfig,
    GapAwarePOConfig,
    GapPOConfig,
    GapPOTrainer,
    MarginCPOConfig,
    MarginCPOTrainer,
    MarginDPOConfig,
    MarginDPOTrainer,
    Term,
    register_term,
)
from trl_margins.objective import Objective
from trl_margins.pairs import PairView
from trl_margins.rewards import MeanLogRatioReward
from trl_margins.rows.scores import ScoreError
from trl_margins.terms.adaptive import AdaptiveMargin
from trl_margins.trainers.objectives import objective_of


def token_logps(model: Any, row: dict[str, Any], side: str) -> torch.Tensor:
    """Of the completion's tokens, by the model alone, without padding."""
    if f"{side}_labels" in row:
        ids, labels = torch.tensor(row[f"{side}_input_ids"]), torch.tensor(row[f"{side}_labels"])
    else:
        ids = torch.tensor([*row["prompt_ids"], *row[f"{side}_ids"]])
        labels = torch.tensor([-100] * len(row["prompt_ids"]) + list(row[f"{side}_ids"]))
    logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    picked = logps.gather(1, ids[1:, None])[:, 0]
    return picked[labels[1:] != -100]


class Gradients(TrainerCallback):
    """Those of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


# GapPO's normalised weights


def steps_of(folder: str, tokenizer: Any, out: Path, size: int, window: int, **options: Any) -> SimpleNamespace:
    """An epoch of 24 pairs, 16 to a step, at a rate of 0: the second step is short."""
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": window, "learning_rate": 0.0}
    settings |= {"num_train_epochs": 1, "train_sampling_strategy": "sequential", "score_gap_normalize": True}
    config = GapPOConfig(**quiet(output_dir=str(out / f"{size}x{window}"), **{**settings, **options}))
    seen = Gradients()
    trainer = GapPOTrainer(
        load(folder).double(),
        config,
        train_dataset=preference_rows(24, seed=7),
        processing_class=tokenizer,
        callbacks=[seen],
    )
    trainer._fused = False  # TRL's fused head computes in float32
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return SimpleNamespace(trainer=trainer, gradients=seen.steps, losses=losses)


def test_normalised_weights_do_not_depend_on_the_layout(tiny_model, tokenizer, tmp_path):
    """2 × 8, 4 × 4 and 16 × 1 are one step, also the short one: NumPy's weights, each loss by transformers."""
    found = [steps_of(tiny_model, tokenizer, tmp_path, *layout) for layout in ((16, 1), (2, 8), (4, 4), (8, 2))]
    rows = preference_rows(24, seed=7)
    gaps = np.abs(np.array(rows["score_chosen"]) - np.array(rows["score_rejected"]))
    model, tokens = load(tiny_model).double(), found[0].trainer.train_dataset
    for step, window in enumerate((range(16), range(16, 24))):
        weights = gaps[list(window)] / gaps[list(window)].mean()
        loss = torch.zeros((), dtype=torch.float64)
        for weight, i in zip(weights, window, strict=True):
            gap = token_logps(model, tokens[i], "chosen").mean() - token_logps(model, tokens[i], "rejected").mean()
            loss = loss - weight * torch.nn.functional.logsigmoid(gap - 0.5) / len(window)
        model.zero_grad()
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        for each in found:
            assert len(each.gradients) == 2
            norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
            scale = min(1.0, each.trainer.args.max_grad_norm / (norm + 1e-6))  # clipped before the callback
            assert_same_gradients(each.gradients[step], {n: scale * g for n, g in expected.items()}, rtol=1e-6)
            assert each.losses[step] == pytest.approx(loss.item(), rel=1e-4)  # logged with four digits


def test_without_normalisation_no_window_is_measured(tiny_model, tokenizer, tmp_path, monkeypatch):
    rows = preference_rows(4)
    plain, normalised = (
        GapPOTrainer(
            load(tiny_model),
            GapPOConfig(**quiet(output_dir=str(tmp_path), score_gap_normalize=on)),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        for on in (False, True)
    )
    reduced = []
    for trainer in (plain, normalised):
        reduce = trainer.accelerator.reduce
        monkeypatch.setattr(
            trainer.accelerator, "reduce", lambda *a, reduce=reduce, **k: reduced.append(a) or reduce(*a, **k)
        )
        collated = [trainer.data_collator([trainer.train_dataset[i], trainer.train_dataset[i + 1]]) for i in (0, 2)]
        batches, _ = trainer.get_batch_samples(iter(collated), 2, trainer.args.device)
        measured = [name for name in batches[0]["pair_columns"] if name.startswith("mean of")]
        if trainer is plain:
            assert not measured
            assert batches[0] is collated[0]
            assert not reduced
        else:
            assert measured == ["mean of ScoreGapWeight"]
            assert len(reduced) == 1  # one for the whole window


def test_in_evaluation_the_mean_is_the_evaluation_batchs(tiny_model, tokenizer, tmp_path):
    rows = preference_rows(4)
    config = GapPOConfig(**quiet(output_dir=str(tmp_path), score_gap_normalize=True, per_device_eval_batch_size=2))
    trainer = GapPOTrainer(load(tiny_model), config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    gaps = np.abs(np.array(rows["score_chosen"]) - np.array(rows["score_rejected"])).reshape(2, 2)
    model, losses = load(tiny_model), []
    for row in trainer.train_dataset:
        with torch.no_grad():
            gap = token_logps(model, row, "chosen").mean() - token_logps(model, row, "rejected").mean()
        losses.append(np.log1p(np.exp(0.5 - gap.item())))
    weights = (gaps / gaps.mean(1, keepdims=True)).flatten()
    assert trainer.evaluate()["eval_loss"] == pytest.approx((weights * losses).mean(), rel=1e-5)


@pytest.mark.usefixtures("clean_registry")
def test_a_custom_weight_has_the_mean_of_the_window_too(tiny_model, tokenizer, tmp_path):
    class Agreement(Term):
        """How many agreed, over the mean."""

        name = "agreement"
        columns = ("agreement",)

        def averaged(self, columns):
            return columns["agreement"]

        def __call__(self, view: PairView):
            return view["agreement"] / self.batch_mean(view, view["agreement"])

    register_term(Agreement, "weight")
    rows = preference_rows(6).add_column("agreement", [1.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    options = {"weight": "agreement", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, **options, train_sampling_strategy="sequential")
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert weights_of(tmp_path) == pytest.approx([n / 4 for n in (1, 2, 3, 4, 5, 9)])


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("base", ["cpo", "dpo"])
@pytest.mark.parametrize("column", ["chosen_old_logps", "old_logps", "quality_labels", "label", "quality"])
def test_a_column_of_one_s_own_by_any_name(column, base, tiny_model, tokenizer, tmp_path, caplog):
    """Also by one that TRL's collators take for tokens, or for log-probabilities."""

    class Quality(Term):
        name = "quality"
        columns = (column,)

        def __call__(self, view: PairView):
            return view[column]

    register_term(Quality, "weight")
    rows = preference_rows(4).add_column(column, [1.0, 2.0, 3.0, 4.0])
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, rows, weight="quality")
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert sorted(weights_of(tmp_path)) == [1, 2, 3, 4]
    assert "is not read" not in caplog.text


def test_the_mean_of_values_of_another_kind(tiny_model, tokenizer, tmp_path):
    class Listed(Term):
        name = "listed"
        columns = ("agreement",)
        found: Any = [1.0, 2.0]

        def averaged(self, columns):
            of_some = columns["agreement"] if columns["agreement"][0] == 1 else None
            return of_some if self.found is None else self.found

        def __call__(self, view: PairView):
            return torch.ones_like(view.reward_gap)

    rows = preference_rows(2).add_column("agreement", [1.0, 2.0])
    for found, said in (
        ([1.0, 2.0], "averaged of term 'listed' returned a list, expected a tensor"),
        (None, "averaged of term 'listed' returned None for some mini-batches, not for all"),
        (torch.ones(3), r"averaged of term 'listed' returned shape \(3,\), expected \(1,\)"),
    ):
        Listed.found = found
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), **sizes))
        trainer = MarginCPOTrainer(
            load(tiny_model), config, train_dataset=rows, processing_class=tokenizer, weight_term=Listed()
        )
        with pytest.raises((TypeError, ValueError), match=said):
            trainer.train()


def test_a_negative_weight_is_said(tiny_model, tokenizer, tmp_path, caplog):
    class Constant(Term):
        name = "constant"

        def __init__(self, value: float) -> None:
            self.value = value

        def __call__(self, view: PairView):
            return torch.full_like(view.reward_gap, self.value)

    for value in (0.0, -1.0):
        caplog.clear()
        config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), max_steps=3, logging_steps=1))
        trainer = MarginCPOTrainer(
            load(tiny_model),
            config,
            train_dataset=preference_rows(8),
            processing_class=tokenizer,
            weight_term=Constant(value),
        )
        trainer.train()
        said = [line for line in caplog.messages if "a negative weight" in line]
        assert [line.split(" (")[0] for line in said] == (["a pair has the weight -1"] if value < 0 else [])


def pair_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "pair_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights_of(folder: Path) -> list[float]:
    return [float(row["weight"]) for row in pair_log(folder)]


# The hard filter


GAPS = [0.5, 2.0, 1.0, 0.0, 3.0, 0.75, -1.5, 0.25]
KEPT = [1, 2, 4, 6]
HARD = {"weight": "score-gap", "score_gap_transform": "hard", "score_gap_threshold": 1.0}


def gapped() -> Dataset:
    return preference_rows(8, scores=lambda i: (3.0 + GAPS[i], 3.0))


@pytest.mark.parametrize("base", BASES)
def test_the_hard_filter_drops_rows(base, tiny_model, tokenizer, tmp_path, caplog):
    options = {**HARD, "per_device_train_batch_size": 2, "num_train_epochs": 1}
    with caplog.at_level(logging.INFO, "trl_margins"):
        trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, gapped(), gapped(), **options)
    line = "train: the hard filter leaves out 4 of 8 pairs, whose score gap is below 1; 4 are trained on"
    assert caplog.messages.count(line) == 1
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (4, 8)
    assert (trainer.set_facts["train"].pairs, trainer.set_facts["train"].filtered) == (8, 4)
    assert trainer.set_facts["eval"].filtered is None
    trainer.train()
    assert trainer.state.global_step == 2
    logged = pair_log(tmp_path)
    assert sorted(int(row["row_number"]) for row in logged) == KEPT
    assert {float(row["weight"]) for row in logged} == {1.0}
    assert {(e["weights/min"], e["weights/max"]) for e in trainer.state.log_history if "weights/min" in e} == {(1, 1)}
    assert trainer.evaluate()["eval_n_pairs"] == 8


def test_the_filtered_set_trains_as_one_filtered_by_hand(tiny_model, tokenizer, tmp_path):
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 1e-2, "seed": 3}
    ours = trainer_of("cpo", tiny_model, tokenizer, tmp_path / "a", gapped(), **HARD, **options)
    by_hand = trainer_of("cpo", tiny_model, tokenizer, tmp_path / "b", gapped().select(KEPT), **options)
    for trainer in (ours, by_hand):
        trainer.train()
    for one, other in zip(ours.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_stream_is_filtered_row_by_row(tiny_model, tokenizer, tmp_path):
    stream = gapped().to_iterable_dataset()
    trainer = trainer_of("dpo", tiny_model, tokenizer, tmp_path, stream, **HARD)
    assert [row["score_chosen"] - 3.0 for row in trainer.train_dataset] == [GAPS[i] for i in KEPT]


def test_the_filter_beside_other_terms(tiny_model, tokenizer, tmp_path):
    """The other weight counts; GaPO's mean is over the pairs that are trained on."""
    factors = [0.9, 0.2, 0.3, 0.8, 0.4, 0.7, 0.5, 0.6]
    rows = gapped().add_column("evaluation_factor", factors).add_column("mine", [float(i) for i in range(8)])
    options = {**HARD, "weight": ["score-gap", "column"], "weight_column": "mine", "margin": "gap-aware"}
    options |= {"loss_type": "simpo", "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    trainer = trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, **options)
    trainer.train()
    assert weights_of(tmp_path) == [1.0, 2.0, 4.0, 6.0]
    assert trainer.objective.margins[0].mean == pytest.approx(-np.log(np.array(factors)[KEPT]).mean())


def test_a_filter_that_leaves_nothing_is_an_error(tiny_model, tokenizer, tmp_path):
    options = {**HARD, "score_gap_threshold": 4.0}
    said = (
        r"leaves out all 8 train pairs: the largest score gap is 3, and score_gap_threshold=4\. Lower it to at most 3"
    )
    with pytest.raises(ScoreError, match=said):
        trainer_of("cpo", tiny_model, tokenizer, tmp_path, gapped(), **options)
    followed = trainer_of("cpo", tiny_model, tokenizer, tmp_path, gapped(), **{**HARD, "score_gap_threshold": 3.0})
    assert len(followed.train_dataset) == 1


# GaPO's normalisations, all in one unit


@pytest.mark.parametrize(
    ("normalization", "estimated"),
    [
        ("scale", lambda f, gamma: gamma * f / f.mean()),  # eq. 8
        ("add", lambda f, gamma: f - f.mean() + gamma),  # section 4.3
        ("none", lambda f, gamma: f),  # eq. 6
    ],
)
def test_gapos_margin_is_beta_times_the_estimated_gap(normalization, estimated, tmp_path):
    config = GapAwarePOConfig(**quiet(output_dir=str(tmp_path), gap_aware_normalization=normalization))
    assert (config.beta, config.gamma_beta_ratio) == (10.0, 0.3)
    (term,) = objective_of(config).margins
    train, batch = np.array([0.1, 0.4, 0.8, 0.25]), np.array([0.4, 0.1])
    term.fit({"evaluation_factor": torch.tensor(train)})
    everyone = np.log(1 / np.concatenate([batch, train]))
    f = everyone[2:]
    expected = {each: 10 * margin for each, margin in zip(train, estimated(f, 0.3), strict=True)}  # eq. 5: β · margin
    ours = term(PairView.of_gaps(torch.zeros(2), {"evaluation_factor": torch.tensor(batch)}, beta=10.0))
    np.testing.assert_allclose(ours.numpy(), [expected[ef] for ef in batch], rtol=1e-6)


def test_gapos_other_reading(tmp_path):
    """γ in reward units: eq. 9 as it is printed."""
    config = GapAwarePOConfig(**quiet(output_dir=str(tmp_path), simpo_gamma=0.3))
    (term,) = objective_of(config).margins
    ef = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    f = np.log(1 / ef.numpy())
    ours = term(PairView.of_gaps(torch.zeros(3), {"evaluation_factor": ef}))
    np.testing.assert_allclose(ours.numpy(), 0.3 * f / f.mean(), rtol=1e-6)


# γ-DPO and AMaPO on the log-ratio


def on_dpo(folder: str, tokenizer: Any, config: Any, cls: Any = MarginDPOTrainer, **kwargs: Any) -> Any:
    models = {"model": load(folder, noise=0.02), "ref_model": load(folder)}
    return cls(**models, args=config, train_dataset=preference_rows(6), processing_class=tokenizer, **kwargs)


def log_ratio_gaps(folder: str, trainer: Any, n: int = 4, mean: bool = True) -> np.ndarray:
    """[n] by plain transformers, one row at a time."""
    policy, reference, found = load(folder, noise=0.02), load(folder), []
    with torch.no_grad():
        for row in trainer.train_dataset.select(range(n)):
            ratios = [
                token_logps(policy, row, side) - token_logps(reference, row, side) for side in ("chosen", "rejected")
            ]
            found.append(
                float(ratios[0].mean() - ratios[1].mean()) if mean else float(ratios[0].sum() - ratios[1].sum())
            )
    return np.array(found)


def test_mean_log_ratio_is_trls_sigmoid_norm(tiny_model, tokenizer, tmp_path):
    settings = quiet(output_dir=str(tmp_path), beta=2.5)
    ours = on_dpo(tiny_model, tokenizer, MarginDPOConfig(**settings, reward="mean-log-ratio"))
    theirs = on_dpo(tiny_model, tokenizer, DPOConfig(**settings, loss_type=["sigmoid_norm"]), DPOTrainer)
    our_loss, our_gradients = loss_and_gradients(ours, first_batch(ours))
    their_loss, their_gradients = loss_and_gradients(theirs, first_batch(theirs))
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    assert_same_gradients(our_gradients, their_gradients)


def test_gamma_dpo_is_its_authors(tiny_model, tokenizer, tmp_path):
    """xpo_trainer.py with length_norm: γ_i − γ0 from the gaps of mean log-ratios."""
    config = GammaPODPOConfig(**quiet(output_dir=str(tmp_path), reward="mean-log-ratio", gamma_po_tau=0.5))
    assert config.gamma_po_centered
    trainer = on_dpo(tiny_model, tokenizer, config)
    loss, _ = loss_and_gradients(trainer, first_batch(trainer))
    gaps = 10.0 * log_ratio_gaps(tiny_model, trainer)
    margins = mirror_descent(gaps, 4.0, 0.5, 20) - 4.0
    assert np.ptp(margins) > 0.05
    assert loss.item() == pytest.approx(np.log1p(np.exp(margins - gaps)).mean(), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid_norm", "ipo", "aot", "aot_unpaired"])
def test_what_divides_by_the_length_does_not_take_a_mean(loss_type, tmp_path):
    config = MarginDPOConfig(**quiet(output_dir=str(tmp_path), loss_type=[loss_type], reward="mean-log-ratio"))
    if loss_type == "aot_unpaired":  # sorts the scores themselves
        assert isinstance(objective_of(config).reward, MeanLogRatioReward)
        return
    with pytest.raises(ValueError, match=f"'{loss_type}' does not go with reward 'mean-log-ratio'.*'sigmoid' goes"):
        objective_of(config)


def test_options_that_a_reward_does_not_read(tiny_model, tokenizer, tmp_path):
    for option, said in (
        (
            {"ld_alpha": 0.5, "reward": "mean-log-ratio"},
            "ld_alpha=0.5 does not go with reward='mean-log-ratio', which",
        ),
        ({"alpha": 0.5}, "alpha=0.5 .*'log-ratio', which does not read it: .*alphapo-token, length-normalized, sum"),
    ):
        with pytest.raises(ValueError, match=said):
            on_dpo(tiny_model, tokenizer, MarginDPOConfig(**quiet(output_dir=str(tmp_path), **option)))


@pytest.mark.parametrize("reward", ["log-ratio", "sum"])
def test_amapo_is_per_token_under_summed_rewards(reward, tiny_model, tokenizer, tmp_path):
    config = MarginDPOConfig(**quiet(output_dir=str(tmp_path), reward=reward, margin="amapo", beta=2.0))
    if reward == "sum":
        trainer = MarginDPOTrainer(
            load(tiny_model, noise=0.02), args=config, train_dataset=preference_rows(6), processing_class=tokenizer
        )
        policy = load(tiny_model, noise=0.02)
        with torch.no_grad():
            logps = [[token_logps(policy, row, s) for s in ("chosen", "rejected")] for row in trainer.train_dataset]
        means = np.array([float(w.mean() - r.mean()) for w, r in logps[:4]])
        sums = np.array([float(w.sum() - r.sum()) for w, r in logps[:4]])
    else:
        trainer = on_dpo(tiny_model, tokenizer, config)
        means, sums = (log_ratio_gaps(tiny_model, trainer, mean=mean) for mean in (True, False))
    loss, _ = loss_and_gradients(trainer, first_batch(trainer))
    margins = amapo(means, 2.0, "code", z=True, exp=True, zero=True)
    assert (margins > 0).sum() in (1, 2, 3)
    assert loss.item() == pytest.approx(np.logaddexp(0, margins - 2.0 * sums).mean(), rel=1e-5)


def test_amapo_in_evaluation_sees_the_evaluation_batch_alone():
    rng = np.random.default_rng(0)
    trained, batch = torch.tensor(rng.normal(2, 1, 30)), torch.tensor(rng.normal(0.3, 0.5, 8))
    term = AdaptiveMargin(beta=2.0, estimation_size=32)
    term(PairView.of_gaps(2.0 * trained, training=True))
    state = term.history.recent(99).clone()
    ours = term(PairView.of_gaps(2.0 * batch, evaluation=True))
    np.testing.assert_allclose(ours, amapo(batch.numpy(), 2.0, "code", True, True, True), rtol=1e-6)
    assert torch.equal(term.history.recent(99), state)
    in_training = term(PairView.of_gaps(2.0 * batch, training=True))
    assert not torch.allclose(in_training, ours)


def test_amapos_evaluation_does_not_depend_on_the_training(tiny_model, tokenizer, tmp_path):
    """A rate of 0: the same model before and after."""
    rows = preference_rows(8)
    options = {"margin": "amapo", "loss_type": "simpo", "learning_rate": 0.0, "num_train_epochs": 1}
    trainer = trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, rows, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert len(trainer.objective.margins[0].history) == 8
    assert trainer.evaluate()["eval_loss"] == before


def test_amapos_authors_take_the_batch_alone():
    """Their amapo_loss: μ and σ of the gathered batch, whatever came before."""
    rng = np.random.default_rng(2)
    term = AdaptiveMargin(beta=3.0, estimation_size=1)
    for _ in range(5):
        delta = rng.normal(0.2, 0.4, 4)
        ours = term(PairView.of_gaps(torch.tensor(3.0 * delta), training=True))
        np.testing.assert_allclose(ours, amapo(delta, 3.0, "code", True, True, True), rtol=1e-9)


# AlphaPO token by token


@pytest.mark.parametrize("share", ["never", "always"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("alpha", [0.25, -0.5])
def test_alphapo_by_token(base, share, alpha, tiny_model, tokenizer, tmp_path):
    options = {"reward": "alphapo-token", "alpha": alpha, "beta": 2.0, "share_prompt": share}
    options |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5} if base == "cpo" else {"simpo_gamma": 0.5}
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, preference_rows(6), **options)
    model, loss = load(tiny_model), torch.zeros(())
    for row in trainer.train_dataset.select(range(4)):
        rewards = [
            2.0 * ((1 - token_logps(model, row, side).exp() ** -alpha) / alpha).mean()
            for side in ("chosen", "rejected")
        ]
        loss = loss - torch.nn.functional.logsigmoid(rewards[0] - rewards[1] - 0.5) / 4
    loss.backward()
    ours, gradients = loss_and_gradients(trainer, first_batch(trainer))
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-4)


def test_a_small_alpha_is_simpo(tiny_model, tokenizer, tmp_path):
    found = []
    for options in ({"reward": "alphapo-token", "alpha": 1e-6}, {"reward": "alphapo-token"}, {}):
        settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, **options}
        trainer = trainer_of("cpo", tiny_model, tokenizer, tmp_path, preference_rows(6), **settings)
        found.append(loss_and_gradients(trainer, first_batch(trainer)))
    (small, small_gradients), (zero, _), (simpo, simpo_gradients) = found
    assert zero == simpo
    assert small.item() == pytest.approx(simpo.item(), rel=1e-5)
    assert_same_gradients(small_gradients, simpo_gradients, rtol=1e-4)


def test_alphapo_by_token_needs_the_tokens():
    from test_core import random_pairs

    from trl_margins.links import CPO_LINKS
    from trl_margins.rewards import TokenAlphaReward

    with pytest.raises(ValueError, match=r"needs PairLogps\.chosen_score"):
        Objective(TokenAlphaReward(0.5), CPO_LINKS["simpo"], beta=1.0)(random_pairs(0, n=3))


def test_what_the_cpo_base_calls_it(tmp_path):
    config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), loss_type="alphapo", reward="alphapo-token", alpha=0.1))
    assert objective_of(config).reward.name == "alphapo-token"
    assert objective_of(config).reward.alpha == 0.1
