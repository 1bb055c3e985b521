"""What a trainer is called with: another kind of thing is named, with what to give instead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, load, preference_rows, quiet
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments
from trl import DPOConfig

from trl_margins import GapPOConfig, GapPOTrainer, MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer

TRAINERS = {"cpo": (MarginCPOTrainer, MarginCPOConfig), "dpo": (MarginDPOTrainer, MarginDPOConfig)}


def build(base, model, out, **arguments):
    trainer, config = TRAINERS[base]
    options = {"args": config(**quiet(output_dir=str(out), max_steps=1)), "processing_class": byte_tokenizer()}
    return trainer(model, **{**options, "train_dataset": preference_rows(4), **arguments})


@pytest.mark.parametrize(
    ("base", "arguments", "said"),
    [
        ("dpo", {"model": AutoModelForCausalLM}, r"model has the class AutoModelForCausalLM .*from_pretrained"),
        ("cpo", {"model": None}, "model has a NoneType where it needs a name"),
        ("cpo", {"model": "config"}, r"model has a LlamaConfig .*from_config\(config\)"),
        ("cpo", {"model": "compiled"}, "model has an OptimizedModule .*torch_compile=True"),
        ("dpo", {"args": {"beta": 1}}, r"args has a dict .*MarginDPOConfig\(\*\*args\)"),
        ("dpo", {"args": MarginDPOConfig}, r"args has the class MarginDPOConfig .*MarginDPOConfig\('out'\)"),
        ("cpo", {"args": DPOConfig}, "args has a DPOConfig where it needs a MarginCPOConfig, or TRL's CPOConfig"),
        ("dpo", {"args": GapPOConfig}, "args has a GapPOConfig .*trainer of its base"),
        ("dpo", {"args": TrainingArguments}, "args has a TrainingArguments"),
        ("dpo", {"ref_model": "a/model"}, "ref_model has a str .*from_pretrained"),
        ("cpo", {"processing_class": "a/model"}, "processing_class has a str .*AutoTokenizer"),
        ("cpo", {"peft_config": {"r": 4}}, "peft_config has a dict .*LoraConfig"),
        ("cpo", {"callbacks": TrainerCallback()}, "callbacks has a TrainerCallback .*a list"),
        ("cpo", {"callbacks": [print]}, "callbacks has a builtin_function_or_method"),
        ("cpo", {"optimizers": torch.optim.SGD}, r"optimizers has the class SGD .*\(optimizer, None\)"),
        ("cpo", {"optimizers": (torch.optim.SGD, None)}, "optimizers has the class SGD .*of the model's parameters"),
        ("cpo", {"optimizers": (None, 3)}, "optimizers has an int .*a schedule"),
        ("cpo", {"tokenizer": None}, "processing_class"),
        ("cpo", {"train_datasets": None}, "'train_datasets': did you mean 'train_dataset'"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else part,
)
def test_an_argument_of_another_kind(base, arguments, said, tiny_model, tmp_path):
    arguments = dict(arguments)
    model, args = arguments.pop("model", load(tiny_model)), arguments.get("args")
    if args in (DPOConfig, GapPOConfig, TrainingArguments):
        arguments["args"] = args(output_dir=str(tmp_path), use_cpu=True)
    if isinstance(model, str):
        model = AutoConfig.from_pretrained(tiny_model) if model == "config" else torch.compile(load(tiny_model))
    with pytest.raises(TypeError, match=said):
        build(base, model, tmp_path, **arguments)


def test_a_path_and_numbers_of_numpy(tiny_model, tmp_path):
    """They are as good as text and Python's numbers; a checkpoint and its settings are JSON."""
    options = {"max_steps": np.int64(1), "learning_rate": np.float32(1e-4), "save_strategy": "steps", "save_steps": 1}
    args = GapPOConfig(**quiet(output_dir=str(tmp_path), **options))
    trainer = GapPOTrainer(Path(tiny_model), args=args, train_dataset=preference_rows(4))
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


@pytest.mark.parametrize("name", ["beta", "loss_types"])
def test_what_the_objective_has_read_is_not_set_later(name, tiny_model, tmp_path):
    trainer = build("dpo", load(tiny_model), tmp_path, ref_model=load(tiny_model))
    value = getattr(trainer, name)
    with pytest.raises(ValueError, match=rf"trainer\.{name} cannot be set any more: .*new trainer"):
        setattr(trainer, name, 30.0 if name == "beta" else ["hinge"])
    assert getattr(trainer, name) == value
    assert not hasattr(trainer, "simpo_gamma")  # CPOTrainer's
