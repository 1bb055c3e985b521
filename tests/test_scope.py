"""`train_only`: which parameters train, in the naming of the common architectures."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import load, preference_rows, quiet
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from trl_margins import GapPOConfig, GapPOTrainer
from trl_margins.probes.scope import train_only

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROTARY = {"max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **ROTARY),
    "qwen2": Qwen2Config(**SHAPE, **ROTARY),
    "qwen3": Qwen3Config(**SHAPE, **ROTARY),
    "mistral": MistralConfig(**SHAPE, **ROTARY),
    "gemma2": Gemma2Config(**SHAPE, **ROTARY),
    "phi": PhiConfig(**SHAPE, **ROTARY),
    "phi3": Phi3Config(**SHAPE, **ROTARY),
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SHAPE, **ROTARY),
    "mixtral": MixtralConfig(**SHAPE, **ROTARY, num_local_experts=2),
    "opt": OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    ),
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_mlp_is_the_feed_forward_layers(architecture):
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture])
    train_only(model, ["mlp"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - trained
    assert not [
        n for n in trained if any(word in n for word in ("attn", "attention", "norm", "embed", "lm_head", "ln_"))
    ]
    assert not [n for n in frozen if any(word in n for word in ("mlp", "fc1", "fc2", "expert"))]
    for layer in range(2):
        assert [name for name in trained if f".{layer}." in name]


def test_patterns_are_regular_expressions():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    train_only(model, [r"layers\.1\.self_attn", "lm_head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkvo"} | {"lm_head.weight"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["mlp", "adapter_7"], "'adapter_7' matches none of the 21 parameters"),
        (["(mlp"], "is not a regular expression"),
    ],
)
def test_bad_patterns(patterns, message):
    with pytest.raises(ValueError, match=message):
        train_only(AutoModelForCausalLM.from_config(CONFIGS["llama"]), patterns)


def test_training_leaves_the_rest_alone(tiny_model, tokenizer, tmp_path, caplog):
    config = GapPOConfig(**quiet(output_dir=str(tmp_path), train_only="mlp", num_train_epochs=1, learning_rate=1e-2))
    with caplog.at_level(logging.INFO, "trl_margins"):
        trainer = GapPOTrainer(load(tiny_model), config, train_dataset=preference_rows(8), processing_class=tokenizer)
    assert "12288 of " in caplog.text  # 2 layers x 3 matrices x 32 x 64
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".mlp." in name}


def test_with_adapters_it_is_an_error(tiny_model, tokenizer, tmp_path):
    config = GapPOConfig(**quiet(output_dir=str(tmp_path), train_only=["mlp"]))
    with pytest.raises(ValueError, match="train_only and peft_config"):
        GapPOTrainer(
            load(tiny_model),
            config,
            train_dataset=preference_rows(4),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )
