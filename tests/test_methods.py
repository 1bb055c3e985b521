"""Every method on both bases, every weight with every margin, and what they remember."""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch
from conftest import TRAINED, assert_same_gradients, first_batch, load, loss_and_gradients, preference_rows, quiet
from datasets import Dataset

from trl_margins import (
    AMaPOConfig,
    AMaPOTrainer,
    GammaPOConfig,
    GammaPODPOConfig,
    GammaPOTrainer,
    GapAwarePOConfig,
    GapAwarePOTrainer,
    MarginCPOConfig,
    MarginCPOTrainer,
    MarginDPOConfig,
    MarginDPOTrainer,
)
from trl_margins.methods import MARGINS, METHODS
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

BASES = ("cpo", "dpo")


def build(cls, config_cls, folder, tokenizer, out, rows, evals=None, **settings):
    args = config_cls(**quiet(output_dir=str(out), **settings))
    return cls(load(folder), args=args, train_dataset=rows, eval_dataset=evals, processing_class=tokenizer)


@pytest.mark.parametrize(("method", "base"), TRAINED)
def test_every_method_trains_on_both_bases(method, base, tiny_model, tokenizer, tmp_path):
    rows = preference_rows(12, "conversational")
    settings = {"num_train_epochs": 1, "learning_rate": 1e-2, "warmup_steps": 0}
    trainer = build(
        trainer_class(method, base),
        config_class(method, base),
        tiny_model,
        tokenizer,
        tmp_path,
        rows,
        rows,
        **settings,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    row = METHODS[method]
    kinds = ["weights"] * bool(row.weight) + ["target_margins"] * bool(row.margin)
    for entry in log:
        for kind, part in product(kinds, ("mean", "std", "min", "max", "zero")):
            assert torch.isfinite(torch.tensor(entry[f"{kind}/{part}"])), part
        assert 0 <= entry["rewards/accuracies"] <= 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    metrics = trainer.evaluate()
    assert all(f"eval_{kind}/mean" in metrics for kind in kinds)


MIXED = [
    (weight, margin, base)
    for margin, base in product(MARGINS, BASES)
    if base == "dpo" or not MARGINS[margin].needs_reference
    for weight in ("score-gap", "column")  # those whose value the data say
]


@pytest.mark.rehearsal
@pytest.mark.parametrize(("weight", "margin", "base"), MIXED)
def test_any_weight_with_any_margin(weight, margin, base, tiny_model, tokenizer, tmp_path):
    """The weighted gradient is the weight times that of the margin alone."""
    rows = preference_rows(4, scores=lambda i: (5.0, 2.5))
    rows = rows.add_column("pair_weight", [2.5] * 4).add_column("pair_margin", [0.1, 0.4, -0.2, 0.0])
    cls, config, settings = {
        "cpo": (MarginCPOTrainer, MarginCPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
        "dpo": (MarginDPOTrainer, MarginDPOConfig, {"simpo_gamma": 0.5}),
    }[base]
    columns = {"weight_column": "pair_weight", "margin_column": "pair_margin", "margin_column_unit": "reward"}
    both, alone = (
        build(cls, config, tiny_model, tokenizer, tmp_path, rows, margin=margin, weight=w, **settings, **columns)
        for w in (weight, None)
    )
    _, weighted = loss_and_gradients(both, first_batch(both))
    _, plain = loss_and_gradients(alone, first_batch(alone))
    assert_same_gradients(weighted, {name: 2.5 * gradient for name, gradient in plain.items()})


def test_a_named_trainer_can_be_subclassed():
    class Mine(AMaPOTrainer):
        """Someone's own."""

    assert Mine._method is METHODS["amapo"]
    assert Mine._tag_names == AMaPOTrainer._tag_names
    assert trainer_class("amapo") is AMaPOTrainer


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loss_type": "ipo", "margin": "amapo"}, "margin 'amapo' does not go with loss_type 'ipo'"),
        ({"loss_type": "simpo", "margin": "gamma-po", "simpo_gamma": 0.0}, "gamma0 must be > 0"),
        ({"margin": "adaptive"}, "unknown margin 'adaptive'; known: gap-aware, gamma-po, amapo"),
    ],
)
def test_what_does_not_combine(settings, complaint, tiny_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        build(MarginCPOTrainer, MarginCPOConfig, tiny_model, tokenizer, tmp_path, preference_rows(4), **settings)


def test_a_margin_without_target_says_so(tiny_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="'gamma-po' builds on a target margin: give gamma_beta_ratio or simpo_gamma"):
        build(
            MarginDPOTrainer, MarginDPOConfig, tiny_model, tokenizer, tmp_path, preference_rows(4), margin="gamma-po"
        )


def test_gamma_dpo_is_centered(tiny_model, tmp_path):
    """As the authors' code has it; their equation on request."""
    kinds = {"reward": "log-ratio", "use_cpu": True}
    assert GammaPODPOConfig(str(tmp_path), **kinds).terms("margin")[0].centered
    assert not GammaPODPOConfig(str(tmp_path), **kinds, gamma_po_centered=False).terms("margin")[0].centered
    assert not GammaPODPOConfig(str(tmp_path), use_cpu=True).terms("margin")[0].centered
    assert not GammaPOConfig(str(tmp_path), use_cpu=True).terms("margin")[0].centered


class TestEvaluationFactors:
    def test_a_missing_column_is_computed(self, tiny_model, tokenizer, tmp_path, caplog):
        with caplog.at_level(logging.INFO, "trl_margins"):
            rows = preference_rows(6, "conversational")
            trainer = build(GapAwarePOTrainer, GapAwarePOConfig, tiny_model, tokenizer, tmp_path, rows, {"a": rows})
        assert "no evaluation_factor column, computing rougeL" in caplog.text
        assert "evaluation factor of 6 training pairs" in caplog.text
        assert "evaluation_factor" in trainer.eval_dataset["a"].column_names

    def test_a_given_column_is_used(self, tiny_model, tokenizer, tmp_path):
        """Equal factors: SimPO with the matching fixed margin, gradients included."""
        rows = preference_rows(6).add_column("evaluation_factor", [0.4] * 6)
        ours = build(GapAwarePOTrainer, GapAwarePOConfig, tiny_model, tokenizer, tmp_path, rows, beta=2.0)
        simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "gamma_beta_ratio": 0.3}
        fixed = build(MarginCPOTrainer, MarginCPOConfig, tiny_model, tokenizer, tmp_path, rows, **simpo)
        _, our_gradients = loss_and_gradients(ours, first_batch(ours))
        _, gradients = loss_and_gradients(fixed, first_batch(fixed))
        assert_same_gradients(our_gradients, gradients)

    def test_the_mean_of_training_is_used_at_evaluation(self, tiny_model, tokenizer, tmp_path):
        train = preference_rows(4).add_column("evaluation_factor", [0.2, 0.4, 0.4, 0.8])
        evals = preference_rows(3).add_column("evaluation_factor", [0.5, 0.5, 0.5])
        trainer = build(GapAwarePOTrainer, GapAwarePOConfig, tiny_model, tokenizer, tmp_path, train, evals, beta=1.0)
        mean = -torch.tensor([0.2, 0.4, 0.4, 0.8]).log().mean()
        expected = 0.3 * -torch.tensor(0.5).log() / mean
        assert trainer.evaluate()["eval_target_margins/mean"] == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize(
        ("value", "complaint"), [(1.5, "row 2 of the train.*1.5"), (None, "row 2 of the train.*None")]
    )
    def test_bad_factors_stop_before_training(self, value, complaint, tiny_model, tokenizer, tmp_path):
        rows = preference_rows(4).to_list()
        for row, factor in zip(rows, [0.1, 0.2, value, 0.3], strict=True):
            row["evaluation_factor"] = factor
        with pytest.raises(ValueError, match=complaint):
            build(GapAwarePOTrainer, GapAwarePOConfig, tiny_model, tokenizer, tmp_path, Dataset.from_list(rows))

    def test_a_stream_has_no_mean(self, tiny_model, tokenizer, tmp_path):
        stream = preference_rows(4).to_iterable_dataset()
        with pytest.raises(TypeError, match="load the data set instead of streaming it"):
            build(
                MarginDPOTrainer,
                config_class("gap-aware", "dpo"),
                tiny_model,
                tokenizer,
                tmp_path,
                stream,
                max_steps=1,
            )


@pytest.mark.parametrize(
    ("cls", "config", "options"),
    [
        (GammaPOTrainer, GammaPOConfig, {"gamma_po_tau": 1.0}),
        (AMaPOTrainer, AMaPOConfig, {"amapo_estimation_size": 7}),
        (GapAwarePOTrainer, GapAwarePOConfig, {}),
    ],
)
def test_what_a_term_remembers_is_in_the_checkpoint(cls, config, options, tiny_model, tokenizer, tmp_path):
    """Four steps at once, and two steps, a stop, two more: the same weights bit for bit."""
    rows = preference_rows(16)
    settings = {"learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def run(out, resume=None):
        trainer = build(cls, config, tiny_model, tokenizer, out, rows, **settings, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, mine), theirs in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(whole.objective.terms, resumed.objective.terms, strict=True):
        assert str(mine.state_dict()) == str(theirs.state_dict())


@pytest.mark.parametrize("method", ["dr-dpo", "kto-pair", "beta-dpo"])
@pytest.mark.parametrize("size", [1, 2])
def test_who_compares_pairs_needs_two(method, size, tiny_model, tokenizer, tmp_path, caplog):
    """With one pair in each mini-batch Dr. DPO's weight is 1, and KTO's KL is the pair's own."""
    cls, config = trainer_class(method), config_class(method)
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2}
    build(cls, config, tiny_model, tokenizer, tmp_path, preference_rows(4), **settings)
    warned = "compares the pairs of a mini-batch, and here each has one pair alone" in caplog.text
    assert warned == (size == 1 and method != "beta-dpo")
