"""When a trainer shares prompts: the decision, its reasons, and that nothing else changes."""

from __future__ import annotations

import logging
from functools import wraps

import pytest
import torch
from conftest import first_batch, load, preference_rows, quiet
from datasets import Dataset

from trl_margins import MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer
from trl_margins.forward import head, shared_prompt
from trl_margins.forward.shared_rows import unpacked
from trl_margins.trainers.collator import SHARED, for_the_model

BASES = {"cpo": (MarginCPOTrainer, MarginCPOConfig), "dpo": (MarginDPOTrainer, MarginDPOConfig)}
SIMPO = {"cpo": {"loss_type": "simpo", "cpo_alpha": 0.0}, "dpo": {}}


def build(base, folder, tokenizer, out, rows=None, model=None, **options):
    trainer, config = BASES[base]
    return trainer(
        model or load(folder),
        args=config(**quiet(output_dir=str(out), **{**SIMPO[base], **options})),
        train_dataset=rows or preference_rows(8),
        eval_dataset=rows or preference_rows(6, seed=1),
        processing_class=tokenizer,
    )


@pytest.fixture
def rows_seen(monkeypatch):
    """Numbers of rows that the model is called with."""
    from transformers import LlamaModel

    seen, forward = [], LlamaModel.forward

    @wraps(forward)
    def noting(self, *args, **kwargs):
        seen.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", noting)
    return seen


@pytest.mark.parametrize("base", BASES)
def test_auto_compares_once_and_shares_from_then_on(base, tiny_model, tokenizer, tmp_path, caplog, rows_seen):
    caplog.set_level(logging.INFO, "trl_margins")
    trainer = build(base, tiny_model, tokenizer, tmp_path, num_train_epochs=1)
    trainer.train()
    assert caplog.text.count("prompts are computed once for both answers") == 1
    assert caplog.text.count("are the model's own: on one pair in float32 TRL's fused LM head differs by") == 1
    assert rows_seen[:3] == [1, 1, 2]  # each answer of a pair alone, and both by the fused head
    assert max(rows_seen) <= 4  # four pairs, at most four rows, policy and reference alike
    seen = len(rows_seen)
    trainer.evaluate()
    assert len(rows_seen[seen:]) == (2 if base == "cpo" else 4)  # nothing is compared again


@pytest.mark.parametrize("base", BASES)
def test_never_is_the_standard_pass(base, tiny_model, tokenizer, tmp_path, rows_seen):
    trainer = build(base, tiny_model, tokenizer, tmp_path, share_prompt="never", num_train_epochs=1)
    assert SHARED not in first_batch(trainer)
    trainer.train()
    assert rows_seen[:3] == [1, 1, 2]  # the LM head is compared all the same
    assert set(rows_seen[3:]) == {8}


@pytest.mark.parametrize("base", BASES)
def test_a_pass_that_differs_is_not_used(base, tiny_model, tokenizer, tmp_path, caplog, monkeypatch):
    """A mask that lets the answers see each other: the warning has the numbers."""
    monkeypatch.setattr(shared_prompt, "_visible", lambda *a: lambda row, head, query, key: key <= query)
    shared, standard = (build(base, tiny_model, tokenizer, tmp_path, share_prompt=mode) for mode in ("auto", "never"))
    batch = first_batch(shared)
    with caplog.at_level(logging.WARNING, "trl_margins"):
        loss = shared.compute_loss(shared.model, batch)
    assert "on one pair in float32, the shared-prompt pass differs by" in caplog.text
    assert "nats per token (tolerance 1e-04): prompts are computed once for each answer" in caplog.text
    assert caplog.text.count("trl_margins") == caplog.text.count("trl_margins.forward.checked") == 1
    torch.testing.assert_close(loss, standard.compute_loss(standard.model, first_batch(standard)))


@pytest.mark.parametrize("base", BASES)
def test_dropout_does_not_disturb_the_comparison(base, tiny_model, tokenizer, tmp_path):
    model = load(tiny_model)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = build(base, tiny_model, tokenizer, tmp_path, model=model, disable_dropout=False)
    trainer.model.train()
    trainer.compute_loss(trainer.model, first_batch(trainer))
    assert trainer._sharing.decided is True
    assert all(module.training for module in trainer.model.modules())


def test_a_model_that_cannot_share_says_why(tiny_encoder_decoder, tokenizer, tmp_path, caplog):
    caplog.set_level(logging.INFO, "trl_margins")
    options = {"max_completion_length": 32}
    trainer = build("cpo", tiny_encoder_decoder, tokenizer, tmp_path, **options)
    assert "prompts are computed once for each answer: an encoder-decoder model" in caplog.text
    assert SHARED not in first_batch(trainer)
    with pytest.raises(ValueError, match="share_prompt='always' does not go with an encoder-decoder model"):
        build("cpo", tiny_encoder_decoder, tokenizer, tmp_path, share_prompt="always", **options)
    with pytest.raises(ValueError, match="unknown share_prompt 'maybe'; known: auto, always, never"):
        build("cpo", tiny_encoder_decoder, tokenizer, tmp_path, share_prompt="maybe", **options)


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"ld_alpha": 0.3}], ids=str)
def test_dpo_training_is_the_same(options, tiny_model, tokenizer, tmp_path):
    """Policy, reference, precomputed reference, and the weight of the longer answer's tail."""
    runs = []
    for mode in ("always", "never"):
        settings = {"share_prompt": mode, "learning_rate": 1e-3, "num_train_epochs": 1, **options}
        trainer = build("dpo", tiny_model, tokenizer, tmp_path / mode, **settings)
        trainer.train()
        runs.append((trainer.state.log_history, trainer.evaluate()))
    for mine, theirs in zip(runs[0][0], runs[1][0], strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logits/rejected", "entropy"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    for name, value in runs[1][1].items():
        if "time" not in name and "per_second" not in name:
            assert runs[0][1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_equal_models_have_no_log_ratio(tiny_model, tokenizer, tmp_path):
    """Policy and reference are summed alike: before the first step every reward is exactly 0."""
    trainer = build("dpo", tiny_model, tokenizer, tmp_path, share_prompt="always")
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/chosen"] == metrics["eval_rewards/rejected"] == 0.0


def test_implicit_prompts_share_what_they_have_in_common(tiny_model, tokenizer, tmp_path):
    """Transcripts without a prompt column, whose common part TRL finds."""
    rows = preference_rows(8, "implicit")
    losses = [
        t.compute_loss(t.model, first_batch(t))
        for t in (build("cpo", tiny_model, tokenizer, tmp_path, rows, share_prompt=m) for m in ("always", "never"))
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_answers_that_truncation_left_empty(tiny_model, tokenizer, tmp_path):
    rows = Dataset.from_list(
        [{"prompt": "x" * 200, "chosen": "a", "rejected": "b"}, {"prompt": "y ", "chosen": "c d", "rejected": "e"}]
    )
    losses = [
        t.compute_loss(t.model, first_batch(t, 2))
        for t in (
            build("cpo", tiny_model, tokenizer, tmp_path, rows, share_prompt=m, max_length=64)
            for m in ("always", "never")
        )
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert torch.isfinite(losses[0])


def test_adapters_share_too(tiny_model, tokenizer, tmp_path):
    from peft import LoraConfig

    trainer = MarginDPOTrainer(
        tiny_model,
        args=MarginDPOConfig(**quiet(output_dir=str(tmp_path), num_train_epochs=1, learning_rate=1e-2)),
        train_dataset=preference_rows(8),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert trainer._sharing.decided is True
    assert trainer.state.log_history[0]["rewards/chosen"] == 0.0  # the reference is the model without adapters


def test_one_pair_of_a_batch_is_laid_out_anew(tiny_model, tokenizer, tmp_path):
    for base in BASES:
        trainer = build(base, tiny_model, tokenizer, tmp_path, share_prompt="always")
        batch = trainer.before_measuring(first_batch(trainer))
        whole = trainer.concatenated_forward(trainer.model, for_the_model(batch))
        for i in range(4):
            pair = trainer.concatenated_forward(trainer.model, for_the_model(trainer.one_pair(batch, i)))
            torch.testing.assert_close(pair.chosen[0], whole.chosen[i])
            torch.testing.assert_close(pair.rejected[0], whole.rejected[i])


@pytest.mark.parametrize("base", BASES)
def test_a_batch_of_ones_own_is_left_as_it_is(base, tiny_model, tokenizer, tmp_path):
    trainer = build(base, tiny_model, tokenizer, tmp_path)
    trainer.data_collator.collator = lambda rows: {"mine": torch.zeros(len(rows))}
    assert trainer.data_collator([trainer.train_dataset[0]]).keys() == {"mine", "pair_columns"}


def test_many_logits_go_through_the_fused_head(tiny_model, tokenizer, tmp_path, monkeypatch):
    trainer = build("cpo", tiny_model, tokenizer, tmp_path, share_prompt="always")
    batch = first_batch(trainer)
    plain = trainer.compute_loss(trainer.model, batch)
    assert not trainer._fuses(unpacked(batch[SHARED]))
    monkeypatch.setattr(head, "_FEW_LOGITS", 10)
    assert trainer._fuses(unpacked(batch[SHARED]))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), plain)
