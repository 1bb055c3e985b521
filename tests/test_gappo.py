"""GapPO's trainers: what they reduce to, on both bases, and what they refuse."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import assert_same_gradients, first_batch, load, loss_and_gradients, preference_rows, quiet
from datasets import Dataset
from syncs import Syncs
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_margins import (
    GapPOConfig,
    GapPODPOConfig,
    GapPOTrainer,
    MarginCPOConfig,
    MarginCPOTrainer,
    MarginDPOConfig,
    MarginDPOTrainer,
    Term,
)
from trl_margins.rows.scores import ScoreError
from trl_margins.trainers.objectives import objective_of


def constant_gap(gap: float):
    return lambda i: (2.0 + gap, 2.0)


def gappo(folder: str, tokenizer, out, rows, **settings) -> GapPOTrainer:
    config = GapPOConfig(**quiet(output_dir=str(out), **settings))
    return GapPOTrainer(load(folder), config, train_dataset=rows, processing_class=tokenizer)


def test_weights_of_one_are_trl_simpo(tiny_model, tokenizer, tmp_path):
    rows = preference_rows(6, scores=constant_gap(1.0))
    ours = gappo(tiny_model, tokenizer, tmp_path, rows, beta=2.0, simpo_gamma=1.1, tokenization="cpo")
    config = CPOConfig(**quiet(output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.1))
    theirs = CPOTrainer(load(tiny_model), config, train_dataset=rows, processing_class=tokenizer)
    our_loss, our_gradients = loss_and_gradients(ours, first_batch(ours))
    their_loss, their_gradients = loss_and_gradients(theirs, first_batch(theirs))
    assert torch.isclose(our_loss, their_loss, rtol=1e-5)
    assert_same_gradients(our_gradients, their_gradients)


def test_weights_of_one_are_trl_dpo(tiny_model, tokenizer, tmp_path):
    rows = preference_rows(6, scores=constant_gap(1.0))
    settings = quiet(output_dir=str(tmp_path))

    def build(cls, config):
        models = {"model": load(tiny_model, noise=0.02), "ref_model": load(tiny_model)}
        return cls(**models, args=config, train_dataset=rows, processing_class=tokenizer)

    ours = build(MarginDPOTrainer, MarginDPOConfig(**settings, weight="score-gap"))
    theirs = build(DPOTrainer, DPOConfig(**settings))
    our_loss, our_gradients = loss_and_gradients(ours, first_batch(ours))
    their_loss, their_gradients = loss_and_gradients(theirs, first_batch(theirs))
    assert torch.isclose(our_loss, their_loss, rtol=1e-5)
    assert_same_gradients(our_gradients, their_gradients)


@pytest.mark.parametrize("gap", [0.25, 3.5])
def test_equal_gaps_scale_the_gradient(gap, tiny_model, tokenizer, tmp_path):
    """Section 3.1: with all δ equal to c, GapPO is SimPO, c times as steep."""
    _, one = loss_and_gradients(
        t := gappo(tiny_model, tokenizer, tmp_path, preference_rows(6, scores=constant_gap(1.0))), first_batch(t)
    )
    _, many = loss_and_gradients(
        t := gappo(tiny_model, tokenizer, tmp_path, preference_rows(6, scores=constant_gap(gap))), first_batch(t)
    )
    assert_same_gradients(many, {name: gap * gradient for name, gradient in one.items()})


def test_ties_give_no_gradient(tiny_model, tokenizer, tmp_path):
    """The gradient is that of the only pair with a gap, though the mean is over all pairs."""
    mixed = preference_rows(4, scores=lambda i: (5.0, 3.0) if i == 2 else (4.0, 4.0))
    trainer = gappo(tiny_model, tokenizer, tmp_path, mixed)
    _, all_four = loss_and_gradients(trainer, first_batch(trainer))
    alone = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[2]]))
    _, one = loss_and_gradients(trainer, alone)
    assert_same_gradients(all_four, {name: gradient / 4 for name, gradient in one.items()}, rtol=1e-4)


def test_both_bases_agree(tiny_model, tokenizer, tmp_path):
    """GapPO on CPOTrainer and on DPOTrainer is one method: same loss where both tokenize alike."""
    rows = preference_rows(6)
    settings = quiet(output_dir=str(tmp_path))
    tokenizer.bos_token, bos = None, tokenizer.bos_token  # CPOTrainer puts one in front, DPOTrainer does not
    try:
        cpo = GapPOTrainer(load(tiny_model), GapPOConfig(**settings), train_dataset=rows, processing_class=tokenizer)
        dpo = MarginDPOTrainer(
            load(tiny_model), args=GapPODPOConfig(**settings), train_dataset=rows, processing_class=tokenizer
        )
    finally:
        tokenizer.bos_token = bos
    assert dpo.ref_model is None
    cpo_loss, cpo_gradients = loss_and_gradients(cpo, first_batch(cpo))
    dpo_loss, dpo_gradients = loss_and_gradients(dpo, first_batch(dpo))
    assert torch.isclose(cpo_loss, dpo_loss, rtol=1e-5)
    assert_same_gradients(cpo_gradients, dpo_gradients)


def test_no_reference_model_is_ever_loaded(tiny_model, tokenizer, tmp_path, monkeypatch):
    import trl.trainer.dpo_trainer as module

    loads = []
    load_model = module.create_model_from_path
    monkeypatch.setattr(module, "create_model_from_path", lambda *a, **k: loads.append(a) or load_model(*a, **k))
    rows = preference_rows(6)
    args = MarginDPOConfig(**quiet(output_dir=str(tmp_path), reward="length-normalized", num_train_epochs=1))
    trainer = MarginDPOTrainer(tiny_model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert len(loads) == 1  # the policy
    assert trainer.ref_model is None


@pytest.mark.parametrize(
    "option",
    [
        {"f_divergence_type": "forward_kl"},
        {"precompute_ref_log_probs": True},
        {"sync_ref_model": True},
        {"ld_alpha": 0.5},
    ],
)
def test_reference_options_without_reference_are_an_error(option, tiny_model, tokenizer, tmp_path):
    args = MarginDPOConfig(**quiet(output_dir=str(tmp_path), reward="length-normalized", **option))
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.*length-normalized"):
        MarginDPOTrainer(tiny_model, args=args, train_dataset=preference_rows(4), processing_class=tokenizer)


def test_logged_weights(tiny_model, tokenizer, tmp_path):
    rows = preference_rows(8, scores=lambda i: (2.0 + i, 2.0))
    trainer = gappo(tiny_model, tokenizer, tmp_path, rows, num_train_epochs=1, logging_steps=2)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "weights/mean" in entry)
    assert logged["weights/mean"] == pytest.approx(3.5)
    assert logged["weights/std"] == pytest.approx(5.25**0.5, rel=1e-5)
    assert (logged["weights/min"], logged["weights/max"]) == (0.0, 7.0)


def test_no_host_sync_in_the_step(tiny_model, tokenizer, tmp_path):
    """Nothing reads a tensor's value between two logs, forward and backward; tests/test_syncs.py has whole steps."""
    trainer = gappo(tiny_model, tokenizer, tmp_path, preference_rows(6), score_gap_normalize=True)
    batch = first_batch(trainer)
    with Syncs() as syncs:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    assert not syncs.found
    assert torch.isfinite(loss)


class TestConfig:
    def test_paper_settings(self, tmp_path):
        config = GapPOConfig(str(tmp_path), use_cpu=True)
        assert (config.beta, config.gamma_beta_ratio, config.simpo_gamma) == (1.0, 0.5, 0.5)
        assert (config.loss_type, config.cpo_alpha, config.weight) == ("simpo", 0.0, "score-gap")
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
        assert (config.lr_scheduler_type, config.warmup_steps, config.learning_rate) == ("cosine", 0.1, 1e-5)

    def test_ratio_and_gamma(self, tmp_path):
        assert GapPOConfig(str(tmp_path), use_cpu=True, beta=4.0).simpo_gamma == 2.0
        config = GapPOConfig(str(tmp_path), use_cpu=True, beta=4.0, simpo_gamma=1.0)
        assert (config.simpo_gamma, config.gamma_beta_ratio) == (1.0, 0.25)
        with pytest.raises(ValueError, match=r"gamma_beta_ratio=0\.5 and simpo_gamma=0\.7 both"):
            GapPOConfig(str(tmp_path), use_cpu=True, gamma_beta_ratio=0.5, simpo_gamma=0.7)
        with pytest.raises(ValueError, match="gamma_beta_ratio is a target margin, which loss_type='ipo' does not"):
            MarginCPOConfig(str(tmp_path), use_cpu=True, gamma_beta_ratio=0.5, loss_type="ipo")
        for loss in ("sigmoid", "hinge"):  # TRL's simpo_gamma says nothing there
            plain = MarginCPOConfig(str(tmp_path), use_cpu=True, loss_type=loss, simpo_gamma=0.3)
            assert objective_of(plain).gamma == 0.0
            ratio = MarginCPOConfig(str(tmp_path), use_cpu=True, loss_type=loss, beta=0.1, gamma_beta_ratio=0.5)
            assert objective_of(ratio).gamma == ratio.simpo_gamma == 0.05

    def test_copies_stay_the_same(self, tmp_path):
        import dataclasses
        import pickle

        config = GapPOConfig(str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=7)
        for copy in (pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
            assert copy.to_dict() == config.to_dict()

    def test_keeps_the_best(self, tmp_path):
        config = GapPOConfig(str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=30)
        assert config.load_best_model_at_end
        assert (config.metric_for_best_model, config.greater_is_better) == ("eval_pwa", True)
        assert config.save_steps == 500  # the user's; what wins is saved besides (tests/test_best.py)
        assert not GapPOConfig(str(tmp_path), use_cpu=True).load_best_model_at_end
        off = GapPOConfig(str(tmp_path), use_cpu=True, eval_strategy="epoch", load_best_model_at_end=False)
        assert not off.load_best_model_at_end
        kept = GapPOConfig(str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=10, save_steps=40)
        assert kept.save_steps == 40

    def test_bad_terms(self, tmp_path):
        with pytest.raises(ValueError, match="unknown weight 'gap'; known: score-gap"):
            MarginCPOConfig(str(tmp_path), use_cpu=True, weight="gap")


def test_gappo_with_another_config_is_an_error(tiny_model, tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match="GapPOTrainer has weight 'score-gap', but its CPOConfig says None: give it a GapPO"
    ):
        GapPOTrainer(
            load(tiny_model),
            CPOConfig(**quiet(output_dir=str(tmp_path))),
            train_dataset=preference_rows(4),
            processing_class=tokenizer,
        )


def test_without_scores_it_lists_the_columns(tiny_model, tokenizer, tmp_path):
    rows = preference_rows(4).remove_columns(["score_chosen", "score_rejected"])
    with pytest.raises(ScoreError, match=r"'score-gap' needs annotation scores.*\['prompt', 'chosen', 'rejected'\]"):
        gappo(tiny_model, tokenizer, tmp_path, rows)


def test_bad_scores_only_matter_where_a_term_reads_them(tiny_model, tokenizer, tmp_path, caplog):
    rows = preference_rows(5).to_list()
    rows[3]["score_chosen"] = None
    rows = Dataset.from_list(rows)
    with pytest.raises(ScoreError, match="column 'score_chosen', row 3 of the train data set"):
        gappo(tiny_model, tokenizer, tmp_path, rows)
    with caplog.at_level(logging.WARNING, "trl_margins"):
        config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), num_train_epochs=1, eval_min_score_gap=0.0))
        trainer = MarginCPOTrainer(
            load(tiny_model), config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )
        trainer.train()
    assert "row 3 of the train data set: the score None is None" in caplog.text
    metrics = trainer.evaluate()
    assert (metrics["eval_n_pairs"], metrics["eval_n_pairs_gap"]) == (5, 4)
    assert -1 <= metrics["eval_spearman"] <= 1


def test_mostly_ties_warn(tiny_model, tokenizer, tmp_path, caplog):
    rows = preference_rows(5, scores=lambda i: (4.0, 4.0) if i else (5.0, 4.0))
    with caplog.at_level(logging.DEBUG, "trl_margins"):
        gappo(tiny_model, tokenizer, tmp_path, rows)
    assert "5 pairs, 4 ties, 0 whose rejected completion scores higher" in caplog.text
    assert (
        "training sees only 1 of 5 pairs: weight 'score-gap' keeps only pairs with a score gap other than"
        in caplog.text
    )


def test_terms_from_python(tiny_model, tokenizer, tmp_path):
    """A margin of one's own, on a base without any term in its config."""

    class Half(Term):
        name = "half"

        def __call__(self, view):
            return torch.full_like(view.reward_gap, 0.5)

    rows = preference_rows(6)
    settings = quiet(output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=0.0)
    common = {"train_dataset": rows, "processing_class": tokenizer}
    with_term = MarginCPOTrainer(
        load(tiny_model), MarginCPOConfig(**settings, simpo_gamma=0.0), margin_term=Half(), **common
    )
    fixed = MarginCPOTrainer(load(tiny_model), MarginCPOConfig(**settings, simpo_gamma=0.5), **common)
    batch = first_batch(fixed)
    assert torch.isclose(loss_and_gradients(with_term, batch)[0], loss_and_gradients(fixed, batch)[0])
