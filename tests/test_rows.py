"""Row formats, model kinds and adapters that TRL's trainers take, ours take."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import assert_same_gradients, first_batch, load, loss_and_gradients, preference_rows, quiet
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_margins import GapPOConfig, GapPODPOConfig, GapPOTrainer, MarginCPOConfig, MarginCPOTrainer, MarginDPOTrainer


def train(base, folder, tokenizer, out, rows, config=None, **kwargs):
    config = {"num_train_epochs": 1, **(config or {})}
    cls, config_cls = {"cpo": (GapPOTrainer, GapPOConfig), "dpo": (MarginDPOTrainer, GapPODPOConfig)}[base]
    trainer = cls(
        load(folder),
        args=config_cls(**quiet(output_dir=str(out), **config)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        **kwargs,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    return trainer, changed


@pytest.mark.parametrize("form", ["standard", "conversational", "implicit"])
@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_row_formats(base, form, tiny_model, tokenizer, tmp_path):
    trainer, _ = train(base, tiny_model, tokenizer, tmp_path, preference_rows(6, form))
    assert trainer.evaluate()["eval_n_pairs"] == 6


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_ultrafeedback_rows(base, tiny_model, tokenizer, tmp_path):
    """UltraFeedback binarized as it is on the Hub: the prompt as text, beside answers that repeat it as a message."""
    rows = preference_rows(6, "conversational").to_list()
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side] = row["prompt"] + row[side]
        row["messages"], row["prompt"] = row["chosen"], row["prompt"][0]["content"]
    plain = preference_rows(6, "conversational")
    hub, _ = train(base, tiny_model, tokenizer, tmp_path, Dataset.from_list(rows))
    usual, _ = train(base, tiny_model, tokenizer, tmp_path, plain)
    for name in {"cpo": ("chosen_input_ids", "rejected_labels"), "dpo": ("prompt_ids", "chosen_ids")}[base]:
        assert hub.train_dataset[name][:] == usual.train_dataset[name][:]


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_checkpointing_and_accumulation(base, tiny_model, tokenizer, tmp_path):
    train(
        base,
        tiny_model,
        tokenizer,
        tmp_path,
        preference_rows(6),
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    )


def test_a_stream_trains_on_the_dpo_base(tiny_model, tokenizer, tmp_path):
    stream = preference_rows(8).to_iterable_dataset()
    config = GapPODPOConfig(**quiet(output_dir=str(tmp_path), max_steps=2))
    trainer = MarginDPOTrainer(load(tiny_model), args=config, train_dataset=stream, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["weights/max"] > 0


def test_encoder_decoder(tiny_encoder_decoder, tokenizer, tmp_path):
    config = {"max_completion_length": 64}
    trainer, _ = train("cpo", tiny_encoder_decoder, tokenizer, tmp_path, preference_rows(6), config)
    assert not trainer._fused
    rows = preference_rows(6)
    settings = quiet(output_dir=str(tmp_path), loss_type="simpo", max_completion_length=64)
    ours = MarginCPOTrainer(
        load(tiny_encoder_decoder), MarginCPOConfig(**settings), train_dataset=rows, processing_class=tokenizer
    )
    theirs = CPOTrainer(
        load(tiny_encoder_decoder), CPOConfig(**settings), train_dataset=rows, processing_class=tokenizer
    )
    our_loss, our_gradients = loss_and_gradients(ours, first_batch(ours))
    their_loss, their_gradients = loss_and_gradients(theirs, first_batch(theirs))
    assert torch.isclose(our_loss, their_loss, rtol=1e-5)
    assert_same_gradients(our_gradients, their_gradients)


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_lora_trains_and_saves(base, tiny_model, tokenizer, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    rows = preference_rows(6)
    trainer, changed = train(base, tiny_model, tokenizer, tmp_path, rows, {"learning_rate": 1e-2}, peft_config=lora)
    assert all("lora" in name for name in changed)
    trainer.save_model(str(tmp_path))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)


def test_an_adapter_on_the_head_is_trained_through_the_logits(tiny_model, tokenizer, tmp_path, caplog):
    lora = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with caplog.at_level(logging.INFO, "trl_margins"):
        _, changed = train(
            "cpo", tiny_model, tokenizer, tmp_path, preference_rows(6), {"learning_rate": 1e-2}, peft_config=lora
        )
    assert any("lm_head" in name for name in changed)
    assert "an adapter on the LM head" in caplog.text


def with_long_prompts(n_long: int, n: int) -> Dataset:
    rows = preference_rows(n).to_list()
    for row in rows[:n_long]:
        row["prompt"] = "word " * 60
    return Dataset.from_list(rows)


def test_pairs_truncated_to_nothing(tiny_model, tokenizer, tmp_path, caplog):
    """TRL's CPOTrainer turns them into NaN gradients and a loss of 0; here they are dropped, as by DPOTrainer."""
    rows = with_long_prompts(2, 8)
    with caplog.at_level(logging.WARNING, "trl_margins"):
        trainer, _ = train("cpo", tiny_model, tokenizer, tmp_path, rows, {"max_length": 100})
    assert "2 of 8 train pairs were dropped, because the prompt fills max_length=100" in caplog.text
    assert "2 of 8 eval pairs were dropped" in caplog.text
    assert len(trainer.train_dataset) == 6
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor([entry["loss"], entry["grad_norm"]])).all() for entry in logged)

    settings = quiet(output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=0.0, max_length=100)
    theirs = CPOTrainer(load(tiny_model), CPOConfig(**settings), train_dataset=rows, processing_class=tokenizer)
    _, gradients = loss_and_gradients(theirs, first_batch(theirs))
    assert any(gradient.isnan().any() for gradient in gradients.values()), "TRL has mended it: say so in the docs"


def test_dropped_pairs_are_counted(tiny_model, tokenizer, tmp_path, caplog):
    """DPOTrainer drops such pairs instead."""
    with caplog.at_level(logging.WARNING, "trl_margins"):
        train("dpo", tiny_model, tokenizer, tmp_path, with_long_prompts(3, 8), {"max_length": 100})
    assert "3 of 8 train pairs were dropped" in caplog.text


def test_compute_metrics(tiny_model, tokenizer, tmp_path):
    """It still gets what each base's TRL trainer gives it."""
    seen = {}
    for base in ("cpo", "dpo"):
        train(
            base,
            tiny_model,
            tokenizer,
            tmp_path,
            preference_rows(6),
            {"eval_strategy": "epoch", "load_best_model_at_end": False},
            compute_metrics=lambda p, base=base: seen.setdefault(base, p) and {"mine": 1.0},
        )
    assert seen["cpo"].predictions.shape == (4,)  # two numbers a batch
    assert seen["dpo"].predictions.ndim == 3
