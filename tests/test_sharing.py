"""When a trainer shares prompts: the decision, its reasons, and that nothing else changes."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import BASES, first_batch, load, preference_rows, quiet
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, TrainingArguments

from trl_margins import MarginDPOConfig, MarginDPOTrainer
from trl_margins.forward import head, shared_prompt
from trl_margins.forward.shared_rows import unpacked
from trl_margins.pairs import SHARED
from trl_margins.trainers import prompt_sharing

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
    assert caplog.text.count("prompts are computed once for both completions") == 1
    assert (
        caplog.text.count("match the model's own logits: on one pair in float32, TRL's fused LM head differs by") == 1
    )
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
    assert "on one pair in float32, the shared-prompt forward pass differs by" in caplog.text
    assert "nats per token (tolerance 1e-04): each prompt is computed once per completion" in caplog.text
    warnings = [entry.name for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert [name for name in warnings if name.startswith("trl_margins")] == ["trl_margins.forward.checked"]
    torch.testing.assert_close(loss, standard.compute_loss(standard.model, first_batch(standard)))


@pytest.mark.parametrize(("other", "said"), [([1, 0], "come from a custom collator"), ([0, 1], "hold more than text")])
def test_ranks_compare_together_or_not_at_all(
    other, said, tiny_model, tokenizer, tmp_path, caplog, monkeypatch, rows_seen
):
    """Another rank's batch has an image, or no layout: it would not come to the passes of the comparison."""
    caplog.set_level(logging.INFO, "trl_margins")
    trainer = build("cpo", tiny_model, tokenizer, tmp_path)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([own, torch.tensor([other])]))
    batch = first_batch(trainer)
    trainer._sharing.check(trainer, batch)
    assert not rows_seen
    assert trainer._sharing.decided is False
    assert f"not compared with the model's own logits: batches {said}" in caplog.text
    trainer._sharing.check(trainer, batch)
    assert not rows_seen


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
    assert "prompts are computed once per completion: an encoder-decoder model" in caplog.text
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
    mine, theirs = ([entry for entry in log if "loss" in entry] for log, _ in runs)
    assert mine
    for my, their in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logits/rejected", "entropy"):
            assert my[name] == pytest.approx(their[name], rel=1e-3, abs=1e-5), name
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


def test_a_completion_of_one_token(tiny_model, tokenizer, tmp_path):
    """All that truncation leaves of both of a pair."""
    rows = Dataset.from_list(
        [{"prompt": "x" * 63, "chosen": "a", "rejected": "b"}, {"prompt": "y ", "chosen": "c d", "rejected": "e"}]
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
        whole = trainer.pair_logps(trainer.model, batch)
        for i in range(4):
            pair = trainer.pair_logps(trainer.model, trainer.one_pair(batch, i))
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
    monkeypatch.setattr(head, "FEW_LOGITS", 10)
    assert trainer._fuses(unpacked(batch[SHARED]))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), plain)


# Speed


def fake_clock(monkeypatch, shared, standard):
    """As on an accelerator, whose passes take so many seconds each: the first pass of a batch ten times that."""
    log, now, forward = [], [0.0], prompt_sharing._forward_and_backward

    def timed(trainer, batch, way):
        forward(trainer, batch, way)
        first = sum(entry == (way, id(batch)) for entry in log) == 0
        log.append((way, id(batch)))
        now[0] += (shared if way else standard) * (10 if first else 1)

    monkeypatch.setattr(prompt_sharing, "_on_accelerator", lambda trainer: True)
    monkeypatch.setattr(prompt_sharing, "_forward_and_backward", timed)
    monkeypatch.setattr(prompt_sharing, "_clock", lambda device: now[0])
    return log


@pytest.mark.rehearsal
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("shared", "standard"), [(0.25, 0.5), (0.5, 0.25)])
def test_auto_takes_the_faster_way(base, shared, standard, tiny_model, tokenizer, tmp_path, caplog, monkeypatch):
    """Over three batches, of which one window has two; a training that does not time comes to the same weights."""
    log = fake_clock(monkeypatch, shared, standard)
    caplog.set_level(logging.INFO, "trl_margins")
    faster = "always" if shared < standard else "never"
    weights = {}
    for mode in ("auto", faster):
        torch.manual_seed(0)
        model = load(tiny_model)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1  # random numbers that timing must not draw from
        options = {"gradient_accumulation_steps": 2, "num_train_epochs": 1, "learning_rate": 1e-3}
        rows = preference_rows(32)
        trainer = build(
            base,
            tiny_model,
            tokenizer,
            tmp_path / mode,
            rows,
            model,
            share_prompt=mode,
            disable_dropout=False,
            **options,
        )
        trainer.train()
        weights[mode] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        if mode == "auto":
            assert trainer._sharing.decided is (shared < standard)
            assert (trainer.data_collator.standard_rows is not None) is (shared < standard)
    assert len(log) == 3 * 2 * 3  # batches, ways, passes; none of them in the other training
    line = f"batches take {3 * shared:.3f} s with a shared prompt, {3 * standard:.3f} s without"
    assert caplog.text.count(line) == 1
    if shared < standard:
        for name, value in weights["auto"].items():
            assert torch.equal(value, weights[faster][name]), name


def test_a_way_that_does_not_fit_into_memory_is_not_taken(tiny_model, tokenizer, tmp_path, caplog, monkeypatch):
    log = fake_clock(monkeypatch, 0.5, 0.25)
    timed = prompt_sharing._forward_and_backward

    def short_of_memory(trainer, batch, way):
        timed(trainer, batch, way)
        if not way:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(prompt_sharing, "_forward_and_backward", short_of_memory)
    caplog.set_level(logging.INFO, "trl_margins")
    trainer = build("cpo", tiny_model, tokenizer, tmp_path, preference_rows(16), num_train_epochs=1)
    trainer.train()
    assert trainer._sharing.decided is True
    assert "the standard forward pass does not fit into memory" in caplog.text
    assert "take 1.500 s with a shared prompt, inf s without" in caplog.text
    assert log


def test_a_run_that_goes_on_keeps_what_was_timed(tiny_model, tokenizer, tmp_path, monkeypatch):
    """The second time the clock says otherwise."""
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 4}
    fake_clock(monkeypatch, 0.5, 0.25)
    trainer = build("cpo", tiny_model, tokenizer, tmp_path, preference_rows(32), **options)
    trainer.train()
    assert trainer._sharing.decided is False
    log = fake_clock(monkeypatch, 0.25, 0.5)
    again = build("cpo", tiny_model, tokenizer, tmp_path, preference_rows(32), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again._sharing.decided is False
    assert not log


def test_nothing_is_timed_on_a_cpu(tiny_model, tokenizer, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(prompt_sharing, "_forward_and_backward", refuse)
    trainer = build("cpo", tiny_model, tokenizer, tmp_path, num_train_epochs=1)
    trainer.train()
    assert trainer._sharing.decided is True


def test_flash_attention_keeps_the_standard_pass(tiny_model, tokenizer, tmp_path, caplog):
    """Its kernels take no mask of ours: one line says so."""
    caplog.set_level(logging.INFO, "trl_margins")
    model = load(tiny_model)
    model.config._attn_implementation = "flash_attention_2"
    trainer = build("cpo", tiny_model, tokenizer, tmp_path, model=model)
    assert trainer._sharing.decided is False
    assert caplog.text.count("prompts are computed once per completion") == 1
    assert "attn_implementation='flash_attention_2', whose kernels take no such mask" in caplog.text


# The model's own logits


class ScaledLlama(LlamaForCausalLM):
    """Like classes whose own forward does more to the logits than TRL's fused head knows of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 0.9 * output.logits
        return output


class CrashingLlama(LlamaForCausalLM):
    """Like Llama4ForCausalLM, whose `base_model` is the model itself."""

    base_model = property(lambda self: self.model.layers)


@pytest.mark.parametrize("kind", [ScaledLlama, CrashingLlama])
@pytest.mark.parametrize(
    ("base", "options"), [("cpo", {}), ("dpo", {}), ("dpo", {"ld_alpha": 0.3}), ("dpo", {"use_weighting": True})]
)
def test_a_head_that_is_wrong_is_not_used(base, options, kind, tiny_model, tokenizer, tmp_path, caplog):
    """Policy and reference: the values are those of plain transformers, pair by pair."""
    torch.manual_seed(0)
    model = kind.from_pretrained(tiny_model, dtype=torch.float32)
    rows = preference_rows(4)
    with caplog.at_level(logging.WARNING, "trl_margins"):
        trainer = build(base, tiny_model, tokenizer, tmp_path, rows, model, num_train_epochs=1, **options)
        batch = first_batch(trainer)
        trainer.model.eval()
        pairs = trainer.pair_logps(trainer.model, batch)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("trl_margins")]
    assert "TRL's fused LM head" in line
    assert "log-probabilities come from the whole logits" in line
    assert f"Please report the model: {kind.__name__}" in line
    ids, mask, labels = trainer.standard_rows()(batch)
    tail = options.get("ld_alpha")
    shortest = (labels != -100).sum(1).view(2, -1).amin(0).repeat(2)

    def plain(model, i):
        real = mask[i].bool()
        logits = model(input_ids=ids[i][real][None]).logits[0, :-1].log_softmax(-1)
        target = labels[i][real][1:]
        logps = logits.gather(1, target.clamp(min=0)[:, None])[:, 0][target != -100]
        weight = torch.ones(len(logps))
        if tail is not None:
            weight[shortest[i] :] = tail
        return (logps * weight).sum()

    found = [(model, torch.cat([pairs.chosen, pairs.rejected]))]
    if base == "dpo":  # which TRL has loaded as a plain Llama
        found.append((trainer.ref_model, torch.cat([pairs.ref_chosen, pairs.ref_rejected])))
    for one, logps in found:
        torch.testing.assert_close(logps, torch.stack([plain(one, i) for i in range(8)]), rtol=1e-5, atol=1e-4)
    trainer.train()
    for name in ("rewards/margins", "logits/chosen", *(["entropy", "mean_token_accuracy"] if base == "dpo" else [])):
        assert name in trainer.state.log_history[0], name


@pytest.mark.parametrize("has_first_state", [False, True])
def test_the_reference_of_an_adapter(has_first_state, tiny_model):
    """The model without it, or its first state, which TRL names "ref"."""
    lora = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load(tiny_model), lora)
    ids = torch.arange(3, 27).view(4, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": (ids % 6 > 2).int()}
    without = nullcontext
    if has_first_state:
        model.add_adapter("ref", lora)
        model.set_adapter("ref")
    else:
        without = model.disable_adapter
    with without(), torch.no_grad():
        logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = (logps * batch["completion_mask"][:, 1:]).sum(1)
    model.set_adapter("default")
    own = SimpleNamespace(
        model=model,
        ref_model=None,
        args=TrainingArguments(use_cpu=True),
        accelerator=Accelerator(cpu=True),
        ld_alpha=None,
        _fused=False,
        _sharing=lambda *batch: False,
    )
    found = MarginDPOTrainer.compute_ref_log_probs(own, model, batch)
    torch.testing.assert_close(torch.cat(found), expected)
    assert model.active_adapter == "default"
