"""Config migration: settings of other projects' YAML, the same after converting, and two training steps of each."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import types
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, preference_rows
from datasets import Dataset, DatasetDict, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl import DPOConfig
from trl.experimental.cpo import CPOConfig
from trl.scripts.utils import DatasetMixtureConfig, get_dataset

from trl_margins import links
from trl_margins.checks import NUMBERS, Takes, nearest
from trl_margins.cli import main
from trl_margins.cli.config_file import ConfigLoader, check_known
from trl_margins.cli.convert import converted
from trl_margins.cli.migration import Note, migrate
from trl_margins.cli.mixture import mixture_splits, mixture_test_split
from trl_margins.cli.other_keys import DROPPED, FOREIGN, OF_TRL, ONE_BASE, RENAMED, said
from trl_margins.cli.train import TrainArguments, _tokenizer, chat_template, datasets_of, parse, parser_for
from trl_margins.links import LossInputs
from trl_margins.pairs import PairLogps
from trl_margins.trainers.elsewhere import ELSEWHERE
from trl_margins.trainers.objectives import objective_of

# Settings as the papers and the recipes' keys have them; made for these tests
TRAINING = """
bf16: true
do_eval: true
gradient_accumulation_steps: 16
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
hub_model_id: some-exps
log_level: info
logging_steps: 5
lr_scheduler_type: cosine
num_train_epochs: 1
optim: adamw_torch
output_dir: outputs/here
per_device_train_batch_size: 2
per_device_eval_batch_size: 4
push_to_hub: false
report_to:
- wandb
save_strategy: "steps"
save_steps: 1000000
save_total_limit: 20
seed: 42
warmup_ratio: 0.1
"""
OLD = f"""
torch_dtype: null
attn_implementation: flash_attention_2
dataset_mixer:
  some/pairs: 1.0
dataset_splits:
- train_prefs
- test_prefs
preprocessing_num_workers: 12
evaluation_strategy: steps
eval_steps: 400
max_length: 2048
max_prompt_length: 1800
{TRAINING}"""
NEW = f"""
model_name_or_path: some/sft-model
model_revision: v1
torch_dtype: bfloat16
dataset_mixture:
  datasets:
    - id: some/pairs
      config: default
      split: train_prefs
      columns: [chosen, rejected]
      weight: 1.0
    - id: some/pairs
      config: default
      split: test_prefs
      columns: [chosen, rejected]
      weight: 0.5
  test_split_size: 4
  seed: 7
dataset_num_proc: 1
eval_strategy: steps
eval_steps: 100
beta: 0.01
learning_rate: 5.0e-7
max_length: 1024
overwrite_output_dir: true
hub_model_revision: v2
{TRAINING}"""
TEMPLATE = "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}{% endfor %}"
DPO = {"method": "none", "base": "dpo"}
SIMPO = {"method": "none", "base": "cpo", "loss_type": "simpo", "cpo_alpha": 0.0}
# name → (YAML, the settings that it must have)
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "handbook-old": (
        f"model_name_or_path: some/sft\nbeta: 0.01\nlearning_rate: 5.0e-7\n{OLD}",
        {**DPO, "loss_type": ["sigmoid"], "beta": 0.01, "gamma_beta_ratio": None},
    ),
    "handbook-old-loss-type": (
        f"model_name_or_path: some/sft\nbeta: 0.3\nloss_type: ipo\nlearning_rate: 5.0e-7\n{OLD}",
        {**DPO, "loss_type": ["ipo"], "beta": 0.3},
    ),
    "handbook-new": (NEW, {**DPO, "loss_type": ["sigmoid"], "model_revision": "v1", "hub_revision": "v2"}),
    "handbook-new-shares": (
        f"""
model_name_or_path: some/sft-model
dataset_mixture:
  datasets:
    - {{id: some/pairs, config: a, split: no_think, columns: [chosen, rejected, prompt], weight: 0.5}}
    - {{id: some/pairs, config: a, split: think, columns: [chosen, rejected, prompt], weight: 0.25}}
eval_strategy: no
beta: 0.05
loss_type: apo_zero
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_grad_norm: 0.2
learning_rate: 1.0e-6
overwrite_output_dir: true
{TRAINING.replace("cosine", "cosine_with_min_lr")}""",
        {**DPO, "loss_type": ["apo_zero"], "mixture_weights": [0.5, 0.25], "mixture_seed": 0, "eval_strategy": "no"},
    ),
    "handbook-adapter": (
        f"model_name_or_path: some/sft\nbeta: 0.01\nlearning_rate: 5.0e-6\nuse_peft: true\nlora_r: 4\n"
        f"lora_target_modules: [q_proj, v_proj]\n{OLD}",
        {**DPO, "use_peft": True, "lora_r": 4},
    ),
    "simpo": (
        f"model_name_or_path: some/it\nbeta: 10\ngamma_beta_ratio: 0.3\nlearning_rate: 1.0e-6\n"
        f"chat_template: {json.dumps(TEMPLATE)}\n{OLD}",
        {**SIMPO, "beta": 10, "simpo_gamma": 3.0, "chat_template": TEMPLATE},
    ),
    "simpo-early": (
        f"model_name_or_path: some/it\nbeta: 2.0\ngamma: 1.6\nlearning_rate: 3.0e-7\n{OLD}",
        {**SIMPO, "beta": 2.0, "gamma_beta_ratio": 0.8},
    ),
    "gamma-po": (
        f"model_name_or_path: some/it\nbeta: 2.5\ngamma_beta_ratio: 0.15\nlength_norm: true\ntau: 10\n"
        f"trainer_type: simpo\nloss_type: gm-simpo\nlearning_rate: 6.0e-7\n{OLD}",
        {"method": "gamma-po", "base": "cpo", "loss_type": "simpo", "gamma_po_tau": 10, "gamma_beta_ratio": 0.15},
    ),
    "gamma-po-baseline": (
        f"model_name_or_path: some/it\nbeta: 2.5\ngamma_beta_ratio: 0.15\nlength_norm: true\ntau: 10\n"
        f"trainer_type: simpo\nloss_type: simpo\nlearning_rate: 6.0e-7\n{OLD}",
        {**SIMPO, "margin": None, "gamma_beta_ratio": 0.15},
    ),
    "gamma-po-on-dpo": (
        f"model_name_or_path: some/it\nbeta: 0.1\ngamma_beta_ratio: 0.5\nlength_norm: false\ntau: 20\n"
        f"trainer_type: dpo\nloss_type: gm-dpo\nlearning_rate: 6.0e-7\n{OLD}",
        {"method": "gamma-po", "base": "dpo", "reward": "log-ratio", "loss_type": ["sigmoid"], "gamma_po_tau": 20},
    ),
    "gamma-po-on-dpo-means": (
        f"model_name_or_path: some/it\nbeta: 10\ngamma_beta_ratio: 0.5\nlength_norm: true\ntau: 20\n"
        f"trainer_type: dpo\nloss_type: gm-dpo\nlearning_rate: 6.0e-7\n{OLD}",
        {"method": "gamma-po", "base": "dpo", "reward": "mean-log-ratio", "loss_type": ["sigmoid"], "simpo_gamma": 5},
    ),
    "gamma-po-dpo-baseline": (
        f"model_name_or_path: some/it\nbeta: 0.1\ngamma_beta_ratio: 0.5\ntrainer_type: dpo\nloss_type: dpo\n{OLD}",
        {**DPO, "loss_type": ["sigmoid_norm"], "simpo_gamma": None, "gamma_beta_ratio": None},
    ),
    "amapo": (
        f"model_name_or_path: some/it\nbeta: 3.0\nlength_norm: true\nlearning_rate: 1.0e-6\n{OLD}",
        {"method": "amapo", "base": "cpo", "beta": 3.0, "loss_type": "simpo", "amapo_estimation_size": 1},
    ),
    "amapo-summed": (
        f"model_name_or_path: some/it\nbeta: 0.1\nlength_norm: false\nlearning_rate: 1.0e-6\n{OLD}",
        {"method": "amapo", "base": "cpo", "loss_type": "sigmoid", "margin": "amapo"},
    ),
}
OLD_FIELDS = {"dtype": "float32", "dataset_name": "some/pairs", "dataset_train_split": "train_prefs"} | {
    "dataset_test_split": "test_prefs",
    "dataset_num_proc": 12,
    "eval_strategy": "steps",
    "warmup_steps": 0.1,
}


@pytest.fixture(params=FILES)
def recipe(request, tmp_path) -> tuple[str, dict[str, Any]]:
    text, becomes = FILES[request.param]
    path = tmp_path / f"{request.param}.yaml"
    path.write_text(text)
    return str(path), becomes | (OLD_FIELDS if OLD in text else {})


SPLITS = ("train_prefs", "test_prefs")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """A saved set in the form of UltraFeedback binarized: whole conversations, and the prompt as text beside them."""

    def whole(row: dict[str, Any]) -> dict[str, Any]:
        (prompt,) = row["prompt"]
        return {"prompt": prompt["content"], **{side: [prompt, *row[side]] for side in ("chosen", "rejected")}}

    folder = tmp_path_factory.mktemp("pairs")
    rows = {name: preference_rows(8, "conversational", seed=seed) for seed, name in enumerate(SPLITS)}
    DatasetDict({name: part.map(whole) for name, part in rows.items()}).save_to_disk(folder)
    return str(folder)


def arguments(*argv: str) -> dict[str, Any]:
    """All fields that a run with these flags would have."""
    parsed = parse([*argv, "--use_cpu"])
    values = {item.name: getattr(part, item.name) for part in parsed for item in dataclasses.fields(part)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def of_today(text: str, **flags: Any) -> dict[str, Any]:
    return migrate(yaml.safe_load(text), **flags)[0]


def lines(text: str, **flags: Any) -> list[str]:
    return [str(note) for note in migrate(yaml.safe_load(text), **flags)[1]]


def test_every_file_migrates_to_its_settings(recipe):
    path, becomes = recipe
    values = arguments("--config", path)
    assert {name: values[name] for name in becomes} == becomes


@pytest.mark.parametrize(
    "recipe", ["handbook-old", "handbook-new", "simpo", "gamma-po", "gamma-po-on-dpo", "amapo"], indirect=True
)
def test_every_project_trains_two_steps(recipe, tiny_model, pairs, tmp_path):
    path, becomes = recipe
    text = Path(path).read_text().replace("some/pairs", pairs)  # a mixture is no flag
    Path(path).write_text(text)
    argv = ["--config", path, "--model_name_or_path", tiny_model, "--model_revision", "main", "--max_steps", "2"]
    argv += ["--attn_implementation", "eager", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    argv += ["--output_dir", str(tmp_path / "out"), "--gradient_accumulation_steps", "1", "--max_length", "128"]
    argv += ["--eval_steps", "2", "--dtype", "float32", "--logging_steps", "1", "--dataset_num_proc", "none"]
    assert main(["train", *argv, "--log_level", "passive", "--log_pairs", "false"]) == 0
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_loss"] > 0
    assert results["eval_n_pairs"] == (8 if "dataset_name" in becomes else 4)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert saved == becomes.get("chat_template", CHAT_TEMPLATE)


def test_a_converted_file_has_the_same_settings(recipe, tmp_path, capsys):
    path, _ = recipe
    out = tmp_path / "deep" / "converted.yaml"
    assert main(["convert", path, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert arguments("--config", str(out)) == arguments("--config", path)
    written = yaml.safe_load(out.read_text())
    assert migrate(written) == (written, [])  # nothing is left to say
    comments = " ".join(line.strip("# ") for line in out.read_text().splitlines() if line.startswith("#"))
    for note in migrate(yaml.safe_load(Path(path).read_text()))[1]:
        assert " ".join(str(note).split()) in comments


def test_a_dry_run_says_what_a_run_would_have(recipe, tmp_path, capsys):
    """Without model or data, which are not there; its output, read again, says the same again."""
    path, _ = recipe
    assert main(["train", "--config", path, "--dry_run", "--learning_rate", "2e-5"]) == 0
    printed = capsys.readouterr().out
    settings = yaml.safe_load(printed)
    assert list(settings)[:2] == ["method", "base"]
    assert settings["learning_rate"] == 2e-5
    assert settings["lr_scheduler_type"].startswith("cosine")
    (tmp_path / "again.yaml").write_text(printed)
    assert main(["train", "--config", str(tmp_path / "again.yaml"), "--dry_run"]) == 0
    assert capsys.readouterr().out == printed
    # what it leaves out is the default
    whole = arguments("--config", path, "--learning_rate", "2e-5")
    assert arguments("--config", str(tmp_path / "again.yaml")) == whole


@pytest.mark.parametrize(("key", "today"), {**RENAMED, **dict.fromkeys(DROPPED, "")}.items())
def test_an_old_key_names_fields_of_today(key, today):
    known = parser_for("none", "cpo").keys | parser_for("none", "dpo").keys
    fields = set(today.split(", ")) - {""}
    assert fields <= known
    assert key in fields or key not in known or key == "truncation_mode"


@pytest.mark.parametrize(
    ("written", "today"),
    [
        ({"torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": None}, {"dtype": "float32"}),
        ({"torch_dtype": "auto"}, {"dtype": "auto"}),
        ({"warmup_ratio": 0.03}, {"warmup_steps": 0.03}),
        ({"warmup_ratio": 0}, {"warmup_steps": 0}),
        ({"max_seq_length": 77}, {"max_length": 77}),
        ({"max_prompt_length": 77}, {}),
        ({"max_target_length": 9}, {"max_completion_length": 9}),
        ({"preprocessing_num_workers": 3}, {"dataset_num_proc": 3}),
        ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"evaluation_strategy": False}, {"eval_strategy": "no"}),
        ({"eval_strategy": False, "save_strategy": False}, {"eval_strategy": "no", "save_strategy": "no"}),
        ({"use_flash_attention_2": True}, {"attn_implementation": "flash_attention_2"}),
        ({"use_flash_attention_2": False}, {}),
        ({"hub_model_revision": "v2"}, {"hub_revision": "v2"}),
        ({"push_to_hub_revision": True}, {"push_to_hub": True}),
        ({"overwrite_output_dir": True, "save_safetensors": True, "logging_dir": "x"}, {"overwrite_output_dir": True}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"auto_insert_empty_system_msg": False, "decontaminate": True, "text_column": "text"}, {}),
        ({"ref_model_init_kwargs": {"a": 1}, "model_init_kwargs": {"a": 1}}, {"model_init_kwargs": {"a": 1}}),
        ({"label_pad_token_id": -100, "padding_value": None, "truncation_side": "left"}, {}),
        ({"sft_weight": 0.2}, {"cpo_alpha": 0.2}),
        ({"sft_weight": 0.0}, {"cpo_alpha": 0.0}),
        ({"rpo_alpha": None, "reference_free": False, "use_liger_loss": False}, {}),
        ({"use_liger_loss": True}, {"use_liger_kernel": True}),
        ({"half_precision_backend": "auto", "fp16_backend": "auto", "fp16_opt_level": "O1"}, {}),
        ({"base_model_attribute_name": "model"}, {}),
        ({"loss_type": "aot_pair"}, {"loss_type": "aot_unpaired"}),
        ({"loss_type": ["aot_pair", "sft"]}, {"loss_type": ["aot_unpaired", "sft"]}),
        ({"attn_implementation": "sdpa not this"}, {"attn_implementation": "sdpa"}),
        ({"gamma": 1.6}, {"simpo_gamma": 1.6}),
        ({"length_norm": True}, {"loss_type": "simpo"}),
        ({"length_norm": False}, {"loss_type": "sigmoid"}),
        ({"tau": 3}, {}),
        ({"flip": 0.0}, {}),
        ({"truncation_mode": "keep_end"}, {}),
    ],
)
def test_one_key(written, today):
    """Under a method that is named, so that nothing else is said."""
    settings, notes = migrate({"method": "none", **written})
    assert settings == {"method": "none", **today}
    assert {note.key for note in notes} == {key for key in written if key not in today or written[key] != today[key]}


def test_keys_that_depend_on_method_or_base():
    assert migrate({"tau": 3}, "gamma-po")[0] == {"gamma_po_tau": 3}
    assert migrate({"length_norm": True}, "amapo", "dpo")[0] == {"reward": "length-normalized"}
    assert migrate({"length_norm": False}, "amapo", "dpo")[0] == {"reward": "log-ratio"}
    assert migrate({"sft_weight": 0.0}, "none", "dpo")[0] == {}
    assert migrate({"generate_during_eval": False}, "none", "dpo")[0] == {}
    assert migrate({"max_completion_length": 9}, "none", "dpo")[0] == {}
    assert migrate({"max_completion_length": 9}, "none", "cpo") == ({"max_completion_length": 9}, [])
    assert migrate({"generate_during_eval": False}, "none", "cpo") == ({"generate_during_eval": False}, [])
    assert migrate({"truncation_mode": "keep_start"}, "none", "dpo") == ({"truncation_mode": "keep_start"}, [])
    assert "whose prompt fills it is dropped" in str(migrate({"max_prompt_length": 9}, "none", "cpo")[1][0])
    assert "is dropped" in str(migrate({"max_prompt_length": 9}, "none", "dpo")[1][0])


def test_their_defaults():
    """Where the file has no word, SimPO's scripts do not train as ours: 3 epochs, no warm-up, a linear schedule."""
    bare = {"dataset_mixer": {"a/b": 1.0}, "gamma_beta_ratio": 0.5}
    settings, notes = migrate(bare)
    assert settings["beta"] == 2.0
    assert settings["gamma_beta_ratio"] == 0.5
    assert (settings["num_train_epochs"], settings["warmup_steps"], settings["max_length"]) == (3.0, 0, 512)
    assert "max_length: not set → 512, the default of SimPO's code" in map(str, notes)
    assert migrate({"dataset_mixer": {"a/b": 1.0}, "gamma": 1.6})[0].get("gamma_beta_ratio") is None
    silent = {"dataset_mixer": {"a/b": 1.0}, "loss_type": "gm-simpo"}
    assert {"gamma_beta_ratio": 0.25, "gamma_po_tau": 1.0}.items() <= migrate(silent)[0].items()
    assert migrate(bare, "gappo")[0].keys().isdisjoint({"beta", "num_train_epochs", "method"})


@pytest.mark.parametrize(
    ("written", "method"),
    [
        ({"loss_type": "simpo", "simpo_gamma": 0.5}, "none"),
        ({"beta": 0.1, "output_dir": "out/zephyr-dpo"}, None),
        ({"loss_type": "sigmoid", "beta": 0.1}, "none"),
        ({"loss_type": ["sigmoid", "sft"], "beta": 0.1}, "none"),
        ({"method": "amapo", "dataset_mixer": {"a/b": 1.0}}, "amapo"),
        ({"weight": "score-gap", "loss_type": "sigmoid"}, None),
        ({"gamma_beta_ratio": 0.5, "warmup_ratio": 0.1}, None),
        ({"beta": 1.0, "dataset_name": "a/b"}, None),
    ],
)
def test_whose_file_it_is(written, method):
    """Ours, unless it says another objective: nothing else makes a file without a method train something else."""
    assert migrate(written)[0].get("method") == method


# a file for TRL's own trainers: its keys | the config that they are for
OF_TRLS = [
    ("loss_type: alphapo, alpha: 0.25", CPOConfig),
    ("loss_type: alphapo, alpha: 0.25, simpo_gamma: 0.3, max_prompt_length: 9", CPOConfig),
    ("loss_type: simpo", CPOConfig),
    ("loss_type: simpo, max_prompt_length: 9, output_dir: out/llama-simpo", CPOConfig),
    (
        "loss_type: simpo, cpo_alpha: 0.0, simpo_gamma: 1.0, beta: 2.0, run_name: x-dpo, max_prompt_length: 9",
        CPOConfig,
    ),
    ("loss_type: hinge, cpo_alpha: 0.5", CPOConfig),
    ("loss_type: sigmoid, cpo_alpha: 1.0, output_dir: out/dpo, max_prompt_length: 9", CPOConfig),
    ("cpo_alpha: 0.5, preprocessing_num_workers: 2", CPOConfig),
    ("output_dir: dpo/llama-cpo, max_prompt_length: 9", CPOConfig),
    ("loss_type: sigmoid", DPOConfig),
    ("loss_type: sigmoid, run_name: dpo-from-simpo, max_prompt_length: 9", DPOConfig),
    ("loss_type: sigmoid, run_name: from-simpo, max_prompt_length: 9", DPOConfig),
    ("loss_type: sigmoid, hub_model_id: me/llama3-simpo-dpo, dataset_mixer: {a/b: 1.0}", DPOConfig),
    ("output_dir: /home/cpo/out/dpo, max_prompt_length: 9", DPOConfig),
    ("output_dir: /home/simpo/dpo/, max_prompt_length: 9", DPOConfig),
    ("loss_type: sigmoid, output_dir: out/dpo-after-orpo, max_prompt_length: 9", DPOConfig),
    ("loss_type: sigmoid, output_dir: out/after-orpo, max_prompt_length: 9", DPOConfig),
    ("loss_type: sigmoid, output_dir: out/llama-cpo, max_prompt_length: 9", DPOConfig),
    ("output_dir: /home/kto/dpo, max_prompt_length: 9", DPOConfig),
    ("precompute_ref_log_probs: true, beta: 0.2", DPOConfig),
    ("sync_ref_model: false, output_dir: out/after-orpo, max_prompt_length: 9", DPOConfig),
    ("f_divergence_type: js_divergence", DPOConfig),
    ("use_weighting: true, output_dir: out/wpo, max_prompt_length: 9", DPOConfig),
    ("ld_alpha: 0.5, max_prompt_length: 9", DPOConfig),
    ("rpo_alpha: null, beta: 0.1", DPOConfig),
    ("loss_type: ipo, max_completion_length: 128, max_prompt_length: 9", DPOConfig),
]


@pytest.mark.parametrize(("keys", "theirs"), OF_TRLS, ids=[keys for keys, _ in OF_TRLS])
def test_a_file_for_trls_own_trainer_has_trls_settings(keys, theirs, tmp_path):
    """Those that TRL's config has with the same keys, wherever the package has no default of its own."""
    written = {"output_dir": str(tmp_path / "out"), **yaml.safe_load(f"{{{keys}}}")}
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(written))
    values = arguments("--config", str(path))
    assert (values["method"], values["base"]) == ("none", {CPOConfig: "cpo", DPOConfig: "dpo"}[theirs])
    names = {field.name for field in dataclasses.fields(theirs)}
    trls = vars(
        theirs(
            use_cpu=True,
            bf16=False,
            **{
                key: value
                for key, value in written.items()
                if key in names - {"max_completion_length" if theirs is DPOConfig else ""}
            },
        )
    )
    compared = {
        "loss_type",
        "beta",
        "learning_rate",
        "num_train_epochs",
        "label_smoothing",
        "max_length",
        "warmup_steps",
    }
    compared |= {"lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps"}
    compared |= names & {"cpo_alpha", "alpha", *OF_TRL["dpo"]}
    compared |= {"simpo_gamma"} if trls["loss_type"] == "simpo" else set()
    assert {name: values[name] for name in compared} == {name: trls[name] for name in compared}
    assert (values["weight"], values["margin"]) == (None, None)


def test_what_is_of_one_base_alone():
    cpo, dpo = ({field.name for field in dataclasses.fields(config)} for config in (CPOConfig, DPOConfig))
    assert set(OF_TRL["cpo"]) < cpo - dpo
    assert set(OF_TRL["dpo"]) & cpo == set()
    assert dpo - cpo - {"truncation_mode"} <= set(OF_TRL["dpo"])  # which older CPOConfigs had
    ours = {base: parser_for("none", base).keys for base in ("cpo", "dpo")}
    assert {key for key, base in ONE_BASE.items() if base == "cpo"} == ours["cpo"] - ours["dpo"]
    assert {key for key, base in ONE_BASE.items() if base == "dpo"} == ours["dpo"] - ours["cpo"] - {"truncation_mode"}


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ("base: dpo, method: none, cpo_alpha: 1.0", "cpo_alpha is an option of base cpo"),
        (
            "base: cpo, method: none, use_weighting: true, zzz: 1",
            "use_weighting is an option of base dpo; unknown key 'z",
        ),
        ("loss_type: apo_zero, cpo_alpha: 1.0", "cpo_alpha is an option of base cpo"),
        ("cpo_alpha: 1.0, precompute_ref_log_probs: true", "precompute_ref_log_probs is an option of base dpo"),
        ("loss-type: sigmoid", "keys have underscores, not dashes: loss_type"),
        (
            "max-prompt-length: 9, warmup-ratio: 0.1",
            "keys have underscores, not dashes: max_prompt_length, warmup_ratio$",
        ),
        (
            "loss_type: ipo, half_precision_backend: apex",
            "key of an older TRL or transformers: half_precision_backend",
        ),
        ("max_prompt_length: 9, run_name: llama-simpo", "simpo in the name of the run, and neither loss_type nor"),
        ("loss_type: [ipo], gamma_beta_ratio: 1", "beside SimPO's keys"),
        ("loss_type: alphapo, length_norm: true", "beside AMaPO's keys"),
    ],
)
def test_an_error_says_what_to_write(keys, complaint, tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(f"{{{keys}}}")))
    for command in (["train", "--dry_run", "--config", str(path)], ["convert", str(path)]):
        with pytest.raises(ValueError, match=complaint):
            main(command)


def test_what_the_error_about_a_name_says_resolves():
    written = {"max_prompt_length": 9, "run_name": "llama-simpo"}
    with pytest.raises(ValueError, match="simpo in the name") as error:
        migrate(written)
    told = re.findall(r"(gamma_beta_ratio|loss_type): ([\w.]+)", str(error.value))
    found = [migrate({**written, **yaml.safe_load(f"{key}: {value}")})[0] for key, value in told]
    assert [(each["base"], each.get("loss_type"), each.get("beta")) for each in found] == [
        ("cpo", "simpo", 2.0),
        ("cpo", "simpo", None),
        ("dpo", "sigmoid", None),
    ]


def test_cpo_simpo_is_said():
    """TRL's `cpo_alpha` is 1 by default."""
    (line,) = (note for note in migrate({"loss_type": "simpo"})[1] if note.warns)
    assert str(line) == f"cpo_alpha: not set → {CPOConfig.cpo_alpha}, TRL's default: CPO-SimPO, with an SFT loss; " + (
        "cpo_alpha: 0 is SimPO"
    )
    for said_of in ({"cpo_alpha": 0.0}, {"cpo_alpha": 1.0}, {"sft_weight": 0.1}):
        assert not [note for note in migrate({"loss_type": "simpo", **said_of})[1] if note.warns]


def test_aot_pair_of_an_older_trl_is_aot_unpaired():
    """Older TRL: −log σ(β·(sorted log-ratios of the chosen − those of the rejected)), smoothed."""
    rng = np.random.default_rng(0)
    chosen, rejected, chosen_ref, rejected_ref = rng.normal(size=(4, 6))
    beta, epsilon = 0.3, 0.1
    delta = beta * (np.sort(chosen - chosen_ref) - np.sort(rejected - rejected_ref))
    older = (1 - epsilon) * np.log1p(np.exp(-delta)) + epsilon * np.log1p(np.exp(delta))
    scores = torch.from_numpy(chosen - chosen_ref), torch.from_numpy(rejected - rejected_ref)
    inputs = LossInputs(types.SimpleNamespace(), *scores, beta=beta, label_smoothing=epsilon)
    found = links.trls.aot_unpaired(inputs).numpy()
    np.testing.assert_allclose(found, older, rtol=1e-6)


def test_a_file_of_ours_stays_as_it_is():
    written = {"method": "gappo", "beta": 1.0, "eval_strategy": "steps", "warmup_steps": 0.1, "env": {"A": "1"}}
    assert migrate(written) == (written, [])
    written = {"gamma_beta_ratio": None, "loss_type": None, "eval_strategy": None}
    assert migrate(written) == (written, [])
    (note,) = (note for note in migrate({"torch_dtype": "auto"})[1] if note.key == "method")
    assert note.text.endswith("the default")


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"output_dir": "data/zephyr-dpo"}, "dpo"),
        ({"run_name": "llama-orpo"}, "orpo"),
        ({"run_name": "simpo"}, "simpo"),
        ({"run_name": "llama"}, None),
        ({"run_name": "gappo-and-dpo"}, None),
        ({"run_name": "simpo", "score_gap_transform": "hard"}, None),
        ({"output_dir": "o/llama_gamma_po-2"}, "gamma-po"),
        ({"output_dir": "o/llama-beta-dpo"}, "beta-dpo"),
        ({"run_name": "llama-dpo", "method": "gappo"}, None),
    ],
    ids=str,
)
def test_the_default_method_under_the_name_of_another_is_said(own, word):
    """Of a file whose keys are all of today, and for no objective."""
    written = {"model_name_or_path": "m", "dataset_name": "d", "beta": 0.1, **own}
    settings, notes = migrate(written)
    assert settings == written
    said = f"not named: gappo, the default, though the name of the run has {word}. Name it (--method)"
    assert [(note.text, note.warns) for note in notes] == ([(said, True)] if word else [])
    assert migrate(written, method="simpo")[1] == []


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (
            {"trainer_type": "simpo", "loss_type": "orpo"},
            "loss_type: orpo: .*does not have this objective. Its NLL is a mean per completion.*gappo, gap-aware",
        ),
        ({"trainer_type": "dpo", "loss_type": "gm-simpo"}, "trainer_type: dpo with loss_type: gm-simpo"),
        ({"alpha": 0.6}, "alpha: 0.6: several objectives have an α, and nothing says which"),
        ({"alpha": 0.6, "loss_type": "ipo"}, "alpha: 0.6: several"),
        ({"alpha": 0.6, "loss_type": "rrhf"}, "alpha: 0.6: several"),
        ({"alpha": 0.6, "gamma": 1.0, "run_name": "x-alpha-dpo"}, r"but the name of the run \(alpha-dpo\) says"),
        ({"loss_type": "tdpo"}, "loss_type: tdpo: the package does not have this objective"),
        ({"loss_type": "dpo"}, r"trainer_type: simpo \(γ-PO's default\) with loss_type: dpo: the package does not"),
        ({"trainer_type": "other"}, r"trainer_type: other with loss_type: dpo \(γ-PO's default\): the package"),
        ({"trainer_type": "dpo", "loss_type": "b-dpo", "tau": "x"}, "tau: x is not a number"),
        ({"rpo_alpha": 1.0, "loss_type": ["sigmoid", "sft"]}, "rpo_alpha: 1.0 beside loss_weights or loss_type sft"),
        ({"trainer_type": "simpo", "loss_type": "cpo"}, "does not have this objective"),
        (
            {"dataset_mixer": {"a/b": 1.0}, "gamma_beta_ratio": 1, "loss_type": "hinge"},
            "loss_type: hinge beside SimPO's keys",
        ),
        ({"length_norm": True, "loss_type": "hinge"}, "beside AMaPO's keys"),
        ({"warmup_ratio": 0.1, "warmup_steps": 100}, "warmup_ratio: 0.1 and warmup_steps: 100 both set warmup_steps"),
        ({"max_length": 5, "max_seq_length": 6}, "both set max_length"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "torch_dtype: null and dtype: bfloat16 both set dtype"),
        ({"evaluation_strategy": "no", "eval_strategy": "steps"}, "both set eval_strategy"),
        ({"attn_implementation": "eager", "use_flash_attention_2": True}, "both set attn_implementation"),
        (
            {"dataset_mixer": {"a/b": 1}, "dataset_name": "a/b"},
            "dataset_name and dataset_mixer both name the training data",
        ),
        ({"dataset_mixer": {"a/b": 1}, "dataset_mixture": {"datasets": []}}, "dataset_mixer and dataset_mixture both"),
        ({"warmup_ratio": 1.0}, "not a share of all steps"),
        ({"warmup_ratio": True}, "not a share of all steps"),
        ({"dataset_mixer": ["a/b"]}, "not a mapping from data sets to fractions"),
        ({"dataset_mixer": {"a/b": 1.5}}, "dataset_mixer: a/b: 1.5 is not a fraction"),
        ({"dataset_mixer": {"a/b": 1}, "dataset_splits": ["train", "validation"]}, "'validation' has neither"),
        ({"dataset_mixer": {"a/b": 1}, "dataset_splits": ["test"]}, "at least one training split"),
        ({"dataset_mixer": {"a/b": 1}, "dataset_configs": ["x", "y"]}, "2 names for 1 sets"),
        ({"dataset_splits": ["train"]}, "need dataset_mixer"),
        ({"dataset_mixture": {"datasets": [{"config": "x"}]}}, "set 1 has no id"),
        ({"dataset_mixture": {"datasets": []}}, "datasets is not a list of data sets"),
        ({"dataset_mixture": {"datasets": {"id": "x"}}}, "datasets is not a list of data sets"),
        ({"dataset_mixture": {"datasets": [{"id": "x", "wieght": 1}]}}, r"set 1: unknown key 'wieght' .*'weight'"),
        ({"dataset_mixture": {"datasets": [{"id": "x", "weight": -1}]}}, "set 1, weight: -1 is not a fraction"),
        ({"dataset_mixture": ["x"]}, "not a mapping with datasets, seed, test_split_size"),
        (
            {"dataset_mixture": {"datasets": [{"id": "x", "columns": ["a"]}, {"id": "y", "columns": ["b"]}]}},
            "same col",
        ),
        ({"flip": 0.2}, "noise: random:0.2"),
        ({"ref_model_init_kwargs": {"a": 1}}, "remove it"),
    ],
)
def test_what_cannot_be_migrated(written, complaint):
    with pytest.raises(ValueError, match=complaint):
        migrate(written)


def test_the_same_twice_is_no_contradiction():
    assert migrate({"method": "none", "max_length": 5, "max_seq_length": 5})[0]["max_length"] == 5
    assert migrate({"method": "none", "max_length": None, "max_seq_length": 5})[0]["max_length"] == 5


def test_an_unknown_key_names_the_nearest(tmp_path):
    path = tmp_path / "c.yaml"
    for text, complaint in {
        "beta: 1\nlearning_rat: 1\n": r"c\.yaml: unknown key 'learning_rat' \(did you mean 'learning_rate'\?\)",
        "warmup_ration: 0.1\nzzz: 1\n": r"unknown keys 'warmup_ration' \(did you mean 'warmup_ratio'\?\), 'zzz'$",
        "recipe: x\n": "unknown key 'recipe'",
        "- beta\n": "a config is a YAML mapping from keys to values, not a list",
    }.items():
        path.write_text(text)
        for command in (["train", "--config", str(path), "--dry_run"], ["convert", str(path)]):
            with pytest.raises(ValueError, match=complaint):
                main(command)
    check_known(["a"], ["a", "b"], "x")


def test_yaml_is_data_only(tmp_path):
    (tmp_path / "c.yaml").write_text("beta: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(yaml.constructor.ConstructorError):
        main(["convert", str(tmp_path / "c.yaml")])


def test_convert_writes_to_the_terminal_and_not_over_its_source(tmp_path, capsys):
    path = tmp_path / "theirs.yaml"
    path.write_text("method: none\nwarmup_ratio: 0.1\nenv:\n  A: x\nsave_safetensors: true\n")
    assert main(["convert", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed == (
        "# From theirs.yaml, by trl-margins convert.\nmethod: none\n"
        "# warmup_ratio: 0.1 → warmup_steps: 0.1 (below 1 it is a share of all steps)\nwarmup_steps: 0.1\n"
        "env:\n  A: x\n\n# No longer in this file:\n"
        "# save_safetensors: true → dropped: transformers saves nothing else\n"
    )
    with pytest.raises(ValueError, match="is read, and would be lost"):
        main(["convert", str(path), "--out", str(path)])


def test_one_log_line_per_key(tmp_path, caplog):
    path = tmp_path / "c.yaml"
    path.write_text(FILES["gamma-po"][0])
    with caplog.at_level(logging.INFO, "trl_margins"):
        main(["train", "--config", str(path), "--dry_run"])
    logged = [record.getMessage() for record in caplog.records if record.name == "trl_margins.cli.train"]
    keys = [line.partition(":")[0] for line in logged]
    mapped = (
        "torch_dtype dataset_mixer dataset_splits preprocessing_num_workers length_norm tau trainer_type loss_type"
    )
    assert sorted(keys) == sorted(
        ["method", "evaluation_strategy", "max_prompt_length", "warmup_ratio", *mapped.split()]
    )
    assert "tau: 10 → gamma_po_tau: 10" in logged
    assert any(
        "a Mistral model keeps its chat template" in line
        for line in lines(FILES["simpo"][0].replace("some/it", "some/Mistral-7B"))
    )


def test_a_flag_goes_before_the_file(tmp_path, tiny_model):
    path = tmp_path / "c.yaml"
    path.write_text(FILES["simpo"][0])
    values = arguments("--config", str(path), "--method=amapo", "--base", "dpo", "--beta", "1", "--warmup_steps", "5")
    assert (values["method"], values["base"], values["beta"], values["warmup_steps"]) == ("amapo", "dpo", 1.0, 5.0)
    assert values["reward"] == "length-normalized"
    path.write_text(NEW)
    for flag in (["--dataset_name", "x.jsonl"], ["--dataset-name=x.jsonl"]):
        values = arguments(f"--config={path}", *flag)
        assert values["dataset_name"] == "x.jsonl"
        assert (values["datasets"], values["mixture_weights"], values["test_split_size"]) == ([], None, None)


def test_the_environment_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "before")
    (tmp_path / "c.yaml").write_text("env:\n  SOME_VARIABLE: 3\n")
    arguments("--config", str(tmp_path / "c.yaml"))
    assert os.environ["SOME_VARIABLE"] == "3"
    (tmp_path / "c.yaml").write_text("env: 3\n")
    with pytest.raises(ValueError, match="env must be a mapping"):
        arguments("--config", str(tmp_path / "c.yaml"))


def test_a_recipe_is_a_config_by_name(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text("method: amapo\nbeta: 2.5\n")
    module = types.ModuleType("trl_margins.cli.recipes")
    module.recipe_path = {"some/recipe": tmp_path / "r.yaml"}.__getitem__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("trl_margins.cli.recipes", module, raising=False)
    values = arguments("--recipe", "some/recipe", "--beta", "3")
    assert (values["method"], values["margin"], values["beta"]) == ("amapo", "amapo", 3.0)
    assert values["recipe"] == "some/recipe"
    with pytest.raises(SystemExit):
        parse(["--recipe", "some/recipe", "--config", "x"])


def test_a_chat_template_is_text_or_a_file(tmp_path):
    assert chat_template(TEMPLATE) == TEMPLATE
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert chat_template(str(tmp_path / "t.jinja")) == TEMPLATE
    with pytest.raises(ValueError, match=r"'missing\.jinja' is neither a Jinja template nor a file"):
        chat_template("missing.jinja")


def test_a_tokenizer_of_its_own(tiny_model):
    """At its own revision, not the model's."""
    script = TrainArguments(tokenizer_name_or_path=tiny_model, chat_template=TEMPLATE)
    assert _tokenizer(script, "missing/model", "v9", False).chat_template == TEMPLATE


def test_nothing_heavy_is_loaded_for_the_table():
    heavy = "('torch', 'transformers', 'trl', 'datasets')"
    code = f"import sys, trl_margins.cli.migration; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# What is another project's, and cannot be


def refused(folder: Path, text: str, *flags: str) -> str:
    """What train and convert say alike of a file."""
    (folder / "theirs.yaml").write_text(text)
    file, said_by = str(folder / "theirs.yaml"), []
    for command in (["train", "--dry_run", "--config", file, *flags], ["convert", file]):
        with pytest.raises(ValueError, match=r"does not have|^keys? of|remove|on base dpo") as error:
            main(command)
        said_by.append(str(error.value))
    assert said_by[0] == said_by[1]
    return said_by[0]


RECIPE = "model_name_or_path: a/b\ndataset_mixer: {c/d: 1.0}\npreprocessing_num_workers: 2\nmax_prompt_length: 9\n"


@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        (
            "beta: 0.01\nloss_type: rpo",
            "loss_type: rpo: .*reward-aware-po. The nearest here is --method none --base dpo --loss_type sigmoid sft",
        ),
        ("beta: 0.1\nloss_type: rdpo", "loss_type: rdpo: .*method r-dpo. The nearest here is --method robust-dpo"),
        ("beta: 0.1\nloss_type: kto", "loss_type: kto: .*trl.KTOTrainer. The nearest here is --method kto-pair"),
        ("beta: 0.1\ndesirable_weight: 1.0", "desirable_weight: 1.0, a key of KTO"),
        ("beta: 0.1\noutput_dir: o/x-bco", "bco in the name of the run: .*--loss_type bco_pair"),
        ("beta: 0.1\nloss_type: [sigmoid, kto_pair]", "loss_type: kto_pair: the package does not have"),
        (
            "name: dpo\nbeta: 0.1\nmode_loss: DrDPO\nlabel_smoothing: 0.1",
            "mode_loss DrDPO, label_smoothing 0.1: .*--m",
        ),
        ("loss: {name: odpo, beta: 0.1, ratio: true}", "name odpo, ratio True: the package does not have"),
        ("max_seq_length: 2048\nhub_model_id: zephyr-7b-sft-full", ""),
        ("method: none\nbase: dpo\nsft_weight: 0.1", r"sft_weight: on base dpo, loss_type: \[sigmoid, sft\] with"),
    ],
)
def test_an_objective_that_is_not_here_is_never_another(own, complaint, tmp_path):
    text = RECIPE + own + "\n"
    if not complaint:
        text = text.replace("max_prompt_length: 9\n", "")
        complaint = "supervised fine-tuning, by max_seq_length: 2048: .*SFT is in trl.SFTTrainer"
    assert re.search(complaint, refused(tmp_path, text))


@pytest.mark.parametrize("splits", ["dataset_splits: [train_sft, test_sft]", ""])
def test_supervised_fine_tuning_by_its_data(splits, tmp_path):
    mixture = "dataset_mixture: {datasets: [{id: a/b, split: train, columns: [messages]}]}"
    text = f"dataset_mixer: {{a/b: 1.0}}\n{splits}\n" if splits else f"{mixture}\npacking: true\nlog_level: info\n"
    told = refused(tmp_path, text)
    assert re.match("supervised fine-tuning, by (dataset_splits: train_sft|columns: messages): the package", told)


def test_a_method_on_the_command_line_trains_any_of_them(tmp_path):
    """As the error says."""
    path = tmp_path / "theirs.yaml"
    for own in ("output_dir: x-orpo", "loss_type: rpo", "loss_type: [sigmoid, kto_pair]", "loss_type: b-dpo"):
        path.write_text(RECIPE + own)
        values = arguments("--config", str(path), "--method", "amapo", "--base", "cpo")
        assert (values["margin"], values["loss_type"]) == ("amapo", "simpo")
    for each in ELSEWHERE:
        remark, nearest, said = each.instead.partition("The nearest here is ")
        assert (remark.strip(), bool(nearest)) == (each.remark, bool(each.near))
        if flags := said.rstrip(".").split():
            path.write_text(f"{RECIPE}loss_type: {each.losses[0]}")
            values = arguments("--config", str(path), *flags)
            assert values["method"] == flags[1]
            assert values["loss_type"] != ["sigmoid"]


def test_robust_dpo_keeps_its_label_smoothing(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(f"{RECIPE}loss_type: robust\nlabel_smoothing: 0.1\n")
    values = arguments("--config", str(path))
    assert (values["base"], values["loss_type"], values["label_smoothing"]) == ("dpo", ["robust"], 0.1)


def test_an_objective_that_is_guessed_is_a_warning(tmp_path, caplog):
    path = tmp_path / "theirs.yaml"
    levels = {"beta: 0.1": "WARNING", "run_name: zephyr-dpo": "INFO", "loss_type: ipo": "INFO"}
    levels |= {"loss_type: sigmoid\nrun_name: llama-cpo": "WARNING", "loss_type: ipo\nrun_name: after-orpo": "WARNING"}
    levels |= {
        "loss_type: sigmoid\nrun_name: cpo-dpo": "INFO",
        "cpo_alpha: 1.0\nrun_name: x": "INFO",
        "simpo_gamma: 1.0": "WARNING",
    }
    levels |= {"gamma_beta_ratio: 0.5": "WARNING", "gamma_beta_ratio: 0.5\nrun_name: llama-simpo": "INFO"}
    levels |= {"gamma_beta_ratio: 0.5\nalpha: 0.25\nrun_name: llama-simpo": "WARNING"}
    for name in ("llama-beta-dpo", "o/llama_r_dpo", "llama-epsilon-dpo-4xh200", "margin-dpo"):
        levels |= {f"run_name: {name}": "WARNING", f"loss_type: sigmoid\noutput_dir: {name}/": "WARNING"}
        levels |= {f"precompute_ref_log_probs: false\nhub_model_id: {name}": "WARNING"}
    for name in ("llama-7b-dpo", "zephyr-7b-sft-dpo-full", "r-dpo/llama-dpo", "alpaca-dpo"):
        levels |= {f"run_name: {name}": "INFO"}
    levels |= {"loss_type: robust\nlabel_smoothing: 0.1\nrun_name: robust-dpo": "INFO"}
    for own, level in levels.items():
        path.write_text(RECIPE + own)
        caplog.clear()
        with caplog.at_level(logging.INFO, "trl_margins"):
            arguments("--config", str(path))
        assert caplog.records[0].getMessage().startswith("method: not named; ")
        assert caplog.records[0].levelname == level


def test_a_guess_says_by_which_key():
    assert "DPOTrainer by use_weighting, a key of its config alone →" in lines("{use_weighting: true}")[0]
    assert "by its keys, though its name has beta-dpo →" in lines(f"{RECIPE}run_name: x-beta-dpo")[0]
    (half,) = (line for line in lines("{rpo_alpha: 0.5}") if line.startswith("rpo_alpha"))
    assert "TRL before August 2024 multiplied the DPO loss by it instead" in half
    assert "August" not in " ".join(lines("{rpo_alpha: 1.0}"))  # there they are the same


OWN_ALPHA = {"r-dpo": "r_dpo_alpha", "odpo": "odpo_alpha", "alpha-dpo": "alpha_dpo_alpha", "beta-dpo": "beta_dpo_a"}
OWN_ALPHA |= {"alphapo": "alpha"}


@pytest.mark.parametrize(("objective", "own"), OWN_ALPHA.items())
def test_whose_alpha_it_is(objective, own, tmp_path):
    """Each way out that the error names keeps it; another method's leaves nothing of it."""
    path = tmp_path / "theirs.yaml"
    text = f"{RECIPE}beta: 0.1\nalpha: 0.17\noutput_dir: o/llama-beta-dpo\n"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"Set loss_type to .*{objective}.*--method, or remove alpha"):
        arguments("--config", str(path))
    by_flag = arguments("--config", str(path), "--method", objective)
    others = {"dpo": "dpo", "gappo": "cpo", "none": "dpo"}
    left = [arguments("--config", str(path), "--method", other, "--base", base) for other, base in others.items()]
    assert [each["alpha"] for each in left] == [0.0] * 3
    path.write_text(f"{text}loss_type: {objective}\n")
    by_loss = arguments("--config", str(path))
    for values in (by_flag, by_loss):
        assert values[own] == 0.17
        assert own == "alpha" or values["alpha"] == 0.0
    assert arguments("--config", str(path), "--method", "simpo")["alpha"] == 0.0
    path.write_text(text.replace("alpha: 0.17\n", ""))
    assert arguments("--config", str(path))["method"] == "none"


def test_beta_dpos_a(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text("loss_type: beta-dpo\na: 0.3\n")
    assert arguments("--config", str(path))["beta_dpo_a"] == 0.3
    path.write_text("method: alpha-dpo\nalpha: 0.3\n")  # ours
    assert {"alpha": 0.3, "alpha_dpo_alpha": 0.2}.items() <= arguments("--config", str(path)).items()
    path.write_text("a: 0.3\n")
    with pytest.raises(ValueError, match="unknown key 'a'"):
        arguments("--config", str(path))


@pytest.mark.parametrize("method", ["r-dpo", "odpo", "beta-dpo"])
def test_alpha_beside_a_margin_names_that_of_the_margin(method, tmp_path):
    config = parse(["--method", method, "--alpha", "0.05", "--output_dir", str(tmp_path), "--use_cpu"])[1]
    with pytest.raises(ValueError, match=f"0.0 and give that of margin='{method}' as {OWN_ALPHA[method]}, or use"):
        objective_of(config)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ("base_model: a/b, data: {path: c/d}, params: {lr: 3.0e-5}", "key of another project: base_model (here"),
        ("model: {}, dataset: {}, batch_size: 4, optimizer: {}, loss: {}", "keys of another project: model (here"),
        ("model: a/b, dataset: c/d, torch_dtype: bfloat16, lora_rank: 8", "keys of another project: "),
        ("base_model: a/b, rl: dpo", "keys of axolotl: base_model (here model_name_or_path), rl (here"),
    ],
)
def test_keys_that_many_projects_have_are_of_no_one_project(keys, told, tmp_path):
    """autotrain's, torchtune's and ms-swift's are in no table."""
    found = refused(tmp_path, f"{{{keys}}}")
    assert found.startswith(told)
    assert "; key" not in found


# Keys as the projects' examples have them
THEIRS = {
    "LLaMA-Factory": "model_name_or_path: a/b, stage: dpo, do_train: true, finetuning_type: lora, lora_rank: 8, "
    "lora_target: all, pref_beta: 0.1, pref_loss: sigmoid, dataset: dpo_en_demo, template: qwen3, cutoff_len: 2048, "
    "max_samples: 1000, preprocessing_num_workers: 16, plot_loss: true, overwrite_output_dir: true, warmup_ratio: 0.1",
    "axolotl": "base_model: a/b, model_type: LlamaForCausalLM, load_in_8bit: true, rl: dpo, adapter: lora, "
    "lora_r: 32, datasets: [{path: c/d, type: chat_template.default}], sequence_len: 4096, sample_packing: false, "
    "num_epochs: 4, lora_target_linear: true, micro_batch_size: 2, optimizer: adamw_bnb_8bit, bf16: auto",
    "open-instruct": "model_name_or_path: a/b, use_flash_attn: true, tokenizer_name: a/b, use_slow_tokenizer: true, "
    "dataset_mixer: {c/d: 1.0}, max_seq_length: 2048, preprocessing_num_workers: 16, dpo_loss_type: dpo_norm, "
    "dpo_beta: 5, use_lora: true, lora_rank: 8, with_tracking: true, checkpointing_steps: 1000",
    "OpenRLHF": "pretrain: a/b, dataset: c/d, chosen_key: chosen, rejected_key: rejected, max_len: 2048, l2: 0.0, "
    "train_batch_size: 128, micro_train_batch_size: 1, max_epochs: 1, zero_stage: 3, lora_rank: 8, flash_attn: true",
    "HALOs": "loss: {name: dpo, beta: 0.1}, model: {name_or_path: a/b}, lr: 5.0e-7, n_epochs: 1, exp_name: x, "
    "datasets: [hh], eval_every: 1024, trainer: BasicTrainer, batch_size: 32, optimizer: RMSprop",
    "an older TRL": "rpo_alpha: 1.0, reference_free: true, use_liger_loss: true, model_adapter_name: x, "
    "beta_dpo: 0.1, generate_during_eval: false, loss_type: sigmoid",
}


@pytest.mark.parametrize("project", THEIRS)
def test_a_file_of_another_project_is_named_as_theirs(project, tmp_path):
    """One error with every key that is theirs: none is taken for another, or looked for twice."""
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in yaml.safe_load(f"{{{THEIRS[project]}}}").items())
    told = refused(tmp_path, text)
    assert told.startswith(f"keys of {project}")
    assert "did you mean" not in told
    own = parser_for("none", "cpo").keys | set(RENAMED) | set(DROPPED)
    for key in yaml.safe_load(f"{{{THEIRS[project]}}}"):
        assert (f" {key} (here " in told or f" {key} (not here)" in told) != (key in own)


def test_a_flag_of_another_project_is_named_as_theirs():
    argv = [
        "--lora_rank",
        "8",
        "--use_lora",
        "true",
        "--rpo_alpha=1.0",
        "--warmup-ratio",
        "0.1",
        "--lerning_rate",
        "1",
    ]
    with pytest.raises(ValueError, match="options of") as error:
        parse([*argv, "--max_prompt_length", "9"])
    told = str(error.value)
    assert "options of open-instruct: --lora_rank (here --lora_r), --use_lora (here --use_peft true)" in told
    assert "--rpo_alpha (here --loss_type sigmoid sft and --loss_weights 1.0 WEIGHT with --base dpo and" in told
    assert "--warmup_ratio (here --warmup_steps), --max_prompt_length (not here: TRL no longer cuts prompts" in told
    assert told.endswith("unknown option '--lerning_rate' (did you mean '--learning_rate'?)")


def test_what_a_key_is_called_here_is_an_option(tmp_path):
    """Every counterpart in the tables is an option, and where a value is said, it is one that trains."""
    options = parser_for("none", "cpo").keys | parser_for("none", "dpo").keys
    followed = set()
    for table in FOREIGN.values():
        for key, here in table.items():
            names = [part.partition(":")[0] for part in re.split(" and | with | times ", here) if here]
            assert set(names) <= options, key
            if ":" in here and "optim" not in here:
                followed.add(said("", here, as_flag=True).removeprefix("-- (here ").rstrip(")"))
    for flags in followed:
        flags = re.sub(" and | with ", " ", flags).replace("WEIGHT", "0.1")
        flags = re.sub(r"(--router_aux_loss_coef)(?= --)", r"\1 0.1", flags)
        arguments(*flags.split(), *(["--use_peft"] if re.search("lora|dora", flags) else []))
    assert len(followed) > 10


def test_only_a_slip_of_the_pen_has_a_suggestion():
    options = sorted(parser_for("none", "cpo").keys | parser_for("none", "dpo").keys)
    slips = {"lerning_rate": "learning_rate", "seeed": "seed", "loar_r": "lora_r", "use_pefft": "use_peft"}
    slips |= {"learning-rate": "learning_rate", "gama_beta_ratio": "gamma_beta_ratio", "margn": "margin"}
    others = "use_lora lora_rank dpo_alpha orpo_alpha rpo_alpha beta1 tf16 load_in_16bit lora lora_bias max_len"
    for name, meant in {**slips, **dict.fromkeys(others.split())}.items():
        assert nearest(name, options) == meant


def test_no_objective_is_a_slip_of_another():
    losses = [
        "sigmoid",
        "hinge",
        "ipo",
        "simpo",
        "alphapo",
        "exo_pair",
        "apo_zero",
        "sppo_hard",
        "bco_pair",
        "cpo",
        "dpo",
    ]
    for name in ("rpo", "kto", "kto_pair", "orpo", "sppo", "wpo", "simper", "alphadpo", "alpha-dpo", "cdpo", "rdpo"):
        assert nearest(name, losses) is None
    assert nearest("sigmod", losses) == "sigmoid"


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_an_adapter_is_asked_for(base, tmp_path, tiny_model):
    """`lora_r` alone trained the whole model."""
    path, argv = tmp_path / "c.yaml", ["--method", "none", "--base", base]
    alone = {"lora_r": "16", "lora_target_modules": "[q_proj]", "load_in_4bit": "true", "use_dora": "true"}
    for key, value in alone.items():
        path.write_text(f"{key}: {value}\n")
        flags = [f"--{key.replace('_', '-')}={value.strip('[]')}"]
        for said_by in (["--config", str(path)], flags, flags[0].split("=")):
            with pytest.raises(ValueError, match=f"{key} has no effect without an adapter: add use_peft: true"):
                arguments(*argv, *said_by)
            assert arguments(*argv, *said_by, "--use_peft")["use_peft"] is True
            assert arguments(*argv, *said_by, "--use_peft", "false")["use_peft"] is False
    for unsaid in ("load_in_4bit: false", "use_rslora: false", "lora_target_modules: null", "bnb_4bit_quant_storage:"):
        path.write_text(unsaid)
        assert arguments(*argv, "--config", str(path))["use_peft"] is False
    path.write_text("lora_r: 8\nload_in_8bit: true\n")
    with pytest.raises(ValueError, match="lora_r, load_in_8bit have no effect"):
        main(["convert", str(path)])


def test_a_dry_run_with_settings_of_an_unused_adapter_reads_back(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: a/b\ndataset_name: c/d\nlora_r: 8\nuse_peft: false\n")
    for _ in range(2):
        assert main(["train", "--dry_run", "--config", str(path)]) == 0
        path.write_text(capsys.readouterr().out)
        assert yaml.safe_load(path.read_text()) | {"lora_r": 8, "use_peft": False} == yaml.safe_load(path.read_text())


# Whatever it holds, a converted file reads back

NASTY = st.text(st.one_of(st.characters(), st.sampled_from("\n\r\t\x85\u2028\u2029\ufeff\0 :#-'\"{}[]&*!|>%@,?\\")))
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), NASTY)
VALUES |= st.sampled_from(["no", "1e-6", "0x1F", "2024-01-01", "1_000", "~", "null", "=", "1:30", "<<", "flash # no"])
NESTED = st.recursive(VALUES, lambda each: st.lists(each) | st.dictionaries(NASTY, each), max_leaves=6)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NASTY, NESTED, max_size=5), st.lists(st.tuples(NASTY, NASTY), max_size=3), NASTY)
@pytest.mark.rehearsal
def test_convert_writes_no_key_that_its_source_does_not_have(written, notes, name):
    text = converted(written, [Note(key, said_of, tuple(written)) for key, said_of in notes], name)
    assert (yaml.load(text, Loader=ConfigLoader) or {}) == written
    assert (yaml.safe_load(text.encode()) or {}) == written
    read_by_lines = {line for line in text.splitlines() if line[:1] not in ("#", " ", "-", "?", ":", "'", '"', "")}
    absent = tuple(f"{key}:" for key in {"method", "injected"} - written.keys())
    assert not [line for line in read_by_lines if line.startswith(absent)]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\r", "\n", "\x0b", "\x0c"])
def test_a_line_break_in_a_file_cannot_write_a_key(end, tmp_path):
    """In a value that a comment quotes, in the name of a data set, and in the name of the file."""
    injected = f"x{end}trust_remote_code: true"
    theirs = {
        "dataset_mixer": {injected: 0.5},
        "truncation_side": injected,
        "max_prompt_length": injected,
        "beta": 1.0,
    }
    path = tmp_path / ("a.yaml" if end == "\n" else f"a{end}trust_remote_code: true #.yaml")
    path.write_text(yaml.safe_dump(theirs), encoding="utf-8")
    assert main(["convert", str(path), "--out", str(tmp_path / "ours.yaml")]) == 0
    text = (tmp_path / "ours.yaml").read_text(encoding="utf-8")
    expected, _ = migrate(theirs)
    assert yaml.safe_load(text) == expected
    assert not [line for line in text.splitlines() if line.lstrip().startswith("trust_remote_code")]
    assert arguments("--config", str(tmp_path / "ours.yaml")) == arguments("--config", str(path))


# What is published: the 37 preference recipes of eight repositories, by their keys and numbers

UF = "HuggingFaceH4/ultrafeedback_binarized"
ORPO = "method: orpo, base: cpo, loss_type: orpo, reward: null, cpo_alpha: 1.0"
_PART = f"{{id: {UF}, config: default, split: train_prefs, columns: [chosen, rejected], weight: 1.0}}"
WHOLE = (
    f"dataset_mixture: {{datasets: [{_PART}, {_PART.replace('train', 'test')}], test_split_size: 2000, seed: 0}}, "
    "dataset_num_proc: 12, eval_strategy: steps"
)
MIXER = f"dataset_mixer: {{{UF}: 1.0}}, dataset_splits: [train_prefs, test_prefs]"
SIMPO_DATA = "dataset_mixer: {princeton-nlp/some-ultrafeedback: 1.0}, dataset_splits: [train, test]"
ORPO_RUN = "beta: 0.05, lr_scheduler_type: inverse_sqrt, optim: adamw_bnb_8bit, max_length: 2048, warmup_steps: 100"
FLASH = "use_flash_attention_2: true"
GM = "length_norm: true, trainer_type: simpo, loss_type: gm-simpo"
ALPHA = "ln: true, trainer_type: dpo, loss_type: alpha-dpo"
NO_TARGET = "beta: 1.0, gamma_beta_ratio: null"
# repository / recipe | its keys beside the common ones | what it becomes beside the values of keys that stay
PUBLISHED = f"""
handbook/constitutional-ai | {MIXER}, beta: 0.1, learning_rate: 5.0e-7, num_train_epochs: 3, optim: rmsprop |
handbook/pref-align-openhermes | {MIXER}, beta: 0.01, loss_type: sigmoid, hub_model_revision: v1.0, push_to_hub_revision: true | hub_revision: v1.0
handbook/pref-align-zephyr | {MIXER}, beta: 0.01, loss_type: sigmoid, hub_model_revision: dpo-beta-0.01, push_to_hub_revision: true | hub_revision: dpo-beta-0.01
handbook/smollm2 | {WHOLE}, torch_dtype: bfloat16, beta: 0.5, learning_rate: 1.0e-6, num_train_epochs: 3 | test_split_size: 2000, dtype: bfloat16
handbook/smollm2-smol | {MIXER}, torch_dtype: bfloat16, beta: 0.5, eval_strategy: steps, save_strategy: "no" | dtype: bfloat16
handbook/smollm3-apo | {WHOLE}, torch_dtype: bfloat16, eval_strategy: "no", beta: 0.05, loss_type: apo_zero, max_length: 24576, padding_free: true, use_liger_kernel: true, lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {{min_lr_rate: 0.1}}, overwrite_output_dir: true, save_steps: 0.5 | loss_type: [apo_zero]
handbook/starchat2 | {WHOLE}, torch_dtype: bfloat16, beta: 0.05, learning_rate: 5.0e-7, num_train_epochs: 2 | mixture_seed: 0
handbook/zephyr-full | {WHOLE}, beta: 0.01, learning_rate: 5.0e-7 | dtype: float32
handbook/zephyr-qlora | {MIXER}, torch_dtype: float16, use_peft: true, load_in_4bit: true, lora_r: 16, lora_alpha: 16, lora_target_modules: [q_proj, v_proj], beta: 0.01, optim: paged_adamw_32bit | dtype: float16
handbook/zephyr-gemma | {MIXER}, torch_dtype: bfloat16, beta: 0.05, num_train_epochs: 2, hub_model_id: zephyr-7b-gemma-dpo | dtype: bfloat16
handbook/mistral-capybara | dataset_mixer: {{argilla/capybara: 1.0}}, dataset_splits: [train], {FLASH}, {ORPO_RUN}, hub_model_id: orpo-explorers/Mistral-7B-v0.1-ORPO-Capybara-TRL-v1, max_prompt_length: 1792 | {ORPO}
handbook/zephyr-141b | dataset_name: argilla/capybara, dataset_num_proc: 8, {ORPO_RUN}, hub_model_id: zephyr-orpo-141b-A35b, max_prompt_length: 1792 | {ORPO}
simpo/gemma-2-9b-it | {SIMPO_DATA}, attn_implementation: eager, beta: 10, gamma_beta_ratio: 0.5, learning_rate: 8.0e-7 | simpo_gamma: 5.0
simpo/llama-3-8b-base | {MIXER}, {FLASH}, beta: 2.0, gamma_beta_ratio: 0.5, learning_rate: 6.0e-7 | simpo_gamma: 1.0
simpo/llama-3-8b-instruct | {SIMPO_DATA}, {FLASH}, beta: 2.5, gamma_beta_ratio: 0.55, learning_rate: 1.0e-6 | simpo_gamma: 1.375
simpo/llama-3-8b-instruct-v2 | {SIMPO_DATA}, attn_implementation: flash_attention_2, beta: 10, gamma_beta_ratio: 0.3 | simpo_gamma: 3.0
simpo/mistral-7b-base | {MIXER}, {FLASH}, beta: 2.0, gamma: 1.6, learning_rate: 3.0e-7, max_length: 1024 | gamma_beta_ratio: 0.8
simpo/mistral-7b-instruct | {SIMPO_DATA}, {FLASH}, beta: 2.5, gamma: 0.3, learning_rate: 5.0e-7 | gamma_beta_ratio: 0.12
gamma-po/gemma-2-9b-it | {SIMPO_DATA}, {GM}, beta: 10, gamma_beta_ratio: 0.5, tau: 20, learning_rate: 8.0e-7 | gamma_po_tau: 20
gamma-po/llama-3-8b-it | {SIMPO_DATA}, {GM}, beta: 10, gamma_beta_ratio: 0.4, tau: 10, label_smoothing: 0 | gamma_po_tau: 10
gamma-po/mistral-7b-it | {SIMPO_DATA}, {GM}, beta: 2.5, gamma_beta_ratio: 0.15, tau: 10, learning_rate: 6.0e-7 | gamma_po_tau: 10
gamma-po/qwen-2.5-7b-it | {SIMPO_DATA}, {GM}, beta: 10, gamma_beta_ratio: 0.3, tau: 3, learning_rate: 1.0e-6 | gamma_po_tau: 3
amapo/llama-3-8b-base | {MIXER}, attn_implementation: "flash_attention_2\\nData training arguments", beta: 3.0, length_norm: true, learning_rate: 6.0e-7 | attn_implementation: flash_attention_2
amapo/llama-3-8b-instruct | {SIMPO_DATA}, beta: 3.0, length_norm: true, learning_rate: 1.0e-6 | reward: null
amapo/mistral-7b-base | {MIXER}, beta: 2.0, length_norm: true, learning_rate: 4.0e-7, max_length: 1024 | reward: null
amapo/mistral-7b-instruct | {SIMPO_DATA}, beta: 2.0, length_norm: true, learning_rate: 6.0e-7 | reward: null
alpha-dpo/gemma-2-9b-it | {SIMPO_DATA}, {ALPHA}, beta: 10, gamma_beta_ratio: 0.4, alpha: 5.0e-2, learning_rate: 8.0e-7 | alpha_dpo_alpha: 0.05, alpha: 0.0, simpo_gamma: 4.0
alpha-dpo/llama-3-8b-instruct | {SIMPO_DATA}, {ALPHA}, beta: 2.5, gamma_beta_ratio: 0.6, alpha: 0.2, learning_rate: 1.0e-6 | alpha_dpo_alpha: 0.2, alpha: 0.0, simpo_gamma: 1.5
alpha-dpo/llama-3-8b-instruct-v2 | {SIMPO_DATA}, {ALPHA}, beta: 10.0, gamma_beta_ratio: 0.4, alpha: 0.2, learning_rate: 1.0e-6 | alpha_dpo_alpha: 0.2, alpha: 0.0
alpha-dpo/mistral-7b-instruct | {SIMPO_DATA}, {ALPHA}, beta: 2.5, gamma_beta_ratio: 0.15, alpha: 5.0e-2, learning_rate: 6.0e-7 | alpha_dpo_alpha: 0.05, alpha: 0.0
wpo/llama3-instruct | {MIXER}, beta: 0.01, learning_rate: 1.0e-6, num_train_epochs: 2, hub_model_id: llama-8b-instruct-wpo, output_dir: outputs/llama-8b-instruct-wpo | label_smoothing: 0.0
wpo/mistral-base | {MIXER}, beta: 0.01, learning_rate: 5.0e-7, max_length: 1024, hub_model_id: zephyr-7b-wpo, output_dir: outputs/zephyr-7b-wpo | label_smoothing: 0.0
simper/llama-3-8b-base | {MIXER}, beta: 2.0, gamma_beta_ratio: 0.5, learning_rate: 6.0e-7, hub_model_id: simper-exps | {NO_TARGET}
simper/llama-3-8b-instruct | {SIMPO_DATA}, beta: 2.5, gamma_beta_ratio: 0.55, learning_rate: 1.0e-6, run_name: llama-3-8b-instruct-simper | {NO_TARGET}
simper/mistral-7b-base | {MIXER}, beta: 2.0, gamma_beta_ratio: 0.8, learning_rate: 3.0e-7, run_name: mistral-7b-base-simper | {NO_TARGET}
simper/mistral-7b-instruct | {SIMPO_DATA}, beta: 2.5, gamma_beta_ratio: 0.1, learning_rate: 5.0e-7, run_name: mistral-7b-instruct-simper | {NO_TARGET}
sppo/mistral-7b-instruct | dataset_mixer: {{synthetic_data_mistral-7b-instruct-sppo-iter1_score: 1.0}}, dataset_splits: [train, test], beta: 0.01, evaluation_strategy: "no", loss_type: rpo, lr_scheduler_type: linear, num_train_epochs: 6, hub_model_id: mistral-7b-instruct-sppo-iter1 | lr_scheduler_type: linear
"""  # noqa: E501
BECOMES: dict[str, dict[str, Any]] = {
    "handbook": {**DPO, "loss_type": ["sigmoid"]},
    "simpo": SIMPO,
    "gamma-po": {"method": "gamma-po", "base": "cpo", "loss_type": "simpo"},
    "amapo": {"method": "amapo", "base": "cpo", "loss_type": "simpo"},
    "alpha-dpo": {"method": "alpha-dpo", "base": "dpo", "margin": "alpha-dpo", "reward": "length-normalized"},
    "wpo": {"method": "wpo", "base": "dpo", "use_weighting": True},
    "simper": {"method": "simper", "base": "cpo", "loss_type": "simper", "cpo_alpha": 0.0},
    "sppo": {"method": "sppo", "base": "dpo", "loss_type": ["sppo_hard"]},
}
ROWS = [[part.strip() for part in line.split(" |")] for line in PUBLISHED.strip().splitlines()]


def test_there_are_37():
    assert len({name for name, *_ in ROWS}) == 37


@pytest.mark.parametrize(("name", "keys", "becomes"), ROWS, ids=[row[0] for row in ROWS])
def test_what_is_published_resolves(name, keys, becomes, tmp_path):
    own = yaml.safe_load(f"{{{keys}}}")
    common = {"model_name_or_path": "a/b", "torch_dtype": None, "max_prompt_length": 512, **yaml.safe_load(TRAINING)}
    if "dataset_mixer" in own and "eval_strategy" not in own:
        common |= {"evaluation_strategy": "steps", "eval_steps": 400, "preprocessing_num_workers": 12}
    for key, beside in (("warmup_ratio", "warmup_steps"), ("push_to_hub", "push_to_hub_revision")):
        if beside in own:
            del common[key]
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(common | own))
    values = arguments("--config", str(path))
    stays = {key: value for key, value in own.items() if key in values and key not in ("loss_type", "mixture_seed")}
    stays |= BECOMES[name.partition("/")[0]] | yaml.safe_load(f"{{{becomes}}}")
    assert {key: values[key] for key in stays} == stays
    assert main(["convert", str(path), "--out", str(tmp_path / "ours.yaml")]) == 0
    assert arguments("--config", str(tmp_path / "ours.yaml")) == values


# What they train: the formulas of their code in NumPy, on random log-probabilities

RNG = np.random.default_rng(3)
C, L, RC, RL = -RNG.uniform(5, 30, (4, 8))  # summed log-probabilities: chosen, rejected, and the reference's
NC, NL = RNG.integers(5, 40, (2, 8))
SC, SL = RNG.uniform(5, 9, 8), RNG.uniform(0, 4, 8)
X, DELTA, M = C - RC - L + RL, C / NC - L / NL, (C - RC) / NC - (L - RL) / NL
NLL = 1.7
PAIRED, SIMPO_KEYS = "beta: 0.1, max_prompt_length: 9", "beta: 2.5, gamma_beta_ratio: 0.6"
DPO_TRAINER, SIMPO_TRAINER = "trainer_type: dpo", "trainer_type: simpo"


def ls(x: Any) -> Any:
    """log σ."""
    return -np.logaddexp(0, -x)


def s(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def odds(mean: Any) -> Any:
    return mean - np.log1p(-np.exp(mean))


def kto(w: Any, loser: Any, beta: float) -> Any:
    """Older TRL's kto_pair; a pair's two losses together."""
    kl_w, kl_l = max(w.mean(), 0), max(loser.mean(), 0)
    return 2 - s(beta * (w - kl_l)) - s(beta * (kl_w - loser))


def alpha_z(moved: Any) -> Any:
    """α-DPO's z at its first step: running mean and deviation begin at 0 and keep 0.9."""
    return (moved - 0.1 * moved.mean()) / (0.1 * moved.std(ddof=1))


ALPHA_DPO = -ls(2.5 * (DELTA - 0.6 - 0.2 * alpha_z(M)))
SMOOTH, SUMS = "label_smoothing: 0.2", ALPHA.replace("true", "false")
CDPO = -0.8 * ls(0.1 * X) - 0.2 * ls(-0.1 * X)
RDPO = (-0.8 * ls(0.1 * X) + 0.2 * ls(-0.1 * X)) / 0.6
IPO = (X - 1 / 1.2) ** 2
EXO = s(0.1 * X) * (ls(0.1 * X) - np.log(0.999)) + s(-0.1 * X) * (ls(-0.1 * X) - np.log(1e-3))
RSIMPO = -0.9 * ls(2.5 * DELTA - 1.5) - 0.1 * ls(-2.5 * DELTA - 1.5)
# whose file | its objective's keys | its loss, without the SFT term | the SFT term's weight | whether it warns
FORMULAS = [
    ("ORPOConfig", "loss_type: orpo, beta: 0.05", -0.05 * ls(odds(C / NC) - odds(L / NL)), 1.0, True),
    ("ORPO by name", f"{PAIRED}, hub_model_id: x-orpo", -0.1 * ls(odds(C / NC) - odds(L / NL)), 1.0, True),
    ("SimPER", f"{SIMPO_KEYS}, loss_type: SimPER", np.exp(L / NL) - np.exp(C / NC), 0.0, False),
    ("SPPO", f"{PAIRED}, loss_type: sppo", (C - RC - 5) ** 2 + (L - RL + 5) ** 2, 0.0, True),
    ("kto_pair", f"{PAIRED}, loss_type: kto_pair", kto(C - RC, L - RL, 0.1), 0.0, True),
    ("cDPO", f"{PAIRED}, {SMOOTH}", CDPO, 0.0, True),
    ("cDPO + SFT", f"{PAIRED}, {SMOOTH}, rpo_alpha: 0.5", CDPO, 0.5, True),
    ("rpo_alpha", "beta: 0.1, rpo_alpha: 0.5", -ls(0.1 * X), 0.5, False),
    ("rpo_alpha, IPO", "beta: 0.1, loss_type: ipo, rpo_alpha: 1.0", (M - 5) ** 2, 1.0, False),
    ("rDPO", f"{PAIRED}, loss_type: robust, {SMOOTH}", RDPO, 0.0, False),
    ("DPOP", f"{PAIRED}, loss_type: dpop", -ls(0.1 * X - 5 * np.maximum(0, RC - C)), 0.0, False),
    ("RRHF", f"{PAIRED}, loss_type: rrhf", np.maximum(0, -DELTA), 1.0, False),
    ("EXO", f"{PAIRED}, loss_type: exo", EXO, 0.0, False),
    ("α-DPO", f"{SIMPO_KEYS}, {ALPHA}, alpha: 0.2", ALPHA_DPO, 0.0, False),
    ("α-DPO, bare", f"{SIMPO_KEYS}, loss_type: alpha-dpo, alpha: 0.2", ALPHA_DPO, 0.0, False),
    ("α-DPO, sums", f"{SIMPO_KEYS}, {SUMS}, alpha: 0.2", -ls(2.5 * (C - L - 0.6 - 0.2 * alpha_z(X))), 0.0, False),
    ("α-DPO's SimPO", f"{SIMPO_KEYS}, ln: true, loss_type: simpo", -ls(2.5 * (DELTA - 0.6)), 0.0, False),
    ("α-DPO's rDPO", f"{SIMPO_KEYS}, ln: false, loss_type: rDPO", -ls(2.5 * X), 0.0, True),
    ("α-DPO's KTO", f"{SIMPO_KEYS}, ln: true, loss_type: kto", kto((C - RC) / NC, (L - RL) / NL, 2.5), 0.0, True),
    ("γ-PO's rSimPO", f"{SIMPO_KEYS}, {SIMPO_TRAINER}, loss_type: simpo, label_smoothing: 0.1", RSIMPO, 0.0, False),
    ("γ-PO's cDPO", f"{SIMPO_KEYS}, {DPO_TRAINER}, {SMOOTH}", -0.8 * ls(2.5 * M) - 0.2 * ls(-2.5 * M), 0.0, False),
    ("γ-PO's IPO", f"{SIMPO_KEYS}, {DPO_TRAINER}, loss_type: ipo", (M - 1 / 1.2) ** 2, 0.0, False),
    ("γ-PO's IPO, sums", f"gamma_beta_ratio: 0.6, {DPO_TRAINER}, loss_type: ipo, length_norm: false", IPO, 0.0, False),
    ("γ-PO's R-DPO", f"{SIMPO_KEYS}, {DPO_TRAINER}, loss_type: r-dpo", -ls(2.5 * M), 0.0, True),
    ("DPO's fork", f"loss: {{name: dpo, beta: 0.1, mode_loss: mean, {SMOOTH}}}", CDPO, 0.0, False),
    ("R-DPO", f"{PAIRED}, loss_type: r-dpo, alpha: 0.02", -ls(0.1 * X + 0.02 * (NC - NL)), 0.0, True),
    ("ODPO's α", "beta: 0.5, loss_type: odpo, alpha: 2.0", -ls(0.5 * X - 2 * np.log(SC - SL)), 0.0, False),
    ("ODPO", "loss: {name: odpo, beta: 0.5, alpha: 2.0, k: 3}", -ls(0.5 * X - 2 * np.log(SC - SL)), 0.0, False),
]  # fmt: skip


def trained(keys: str, folder: Path) -> tuple[Any, Any, Any]:
    """The config of a file, the chosen completions' log-probabilities and the output of its objective."""
    (folder / "theirs.yaml").write_text(keys if "\n" in keys else f"{{{keys}}}")
    config = parse(["--config", str(folder / "theirs.yaml"), "--use_cpu", "--output_dir", str(folder / "out")])[1]
    chosen, *others = (torch.from_numpy(each) for each in (C, L, NC, NL, RC, RL))
    pairs = PairLogps(chosen.requires_grad_(), *others, sft_loss=torch.tensor(NLL))
    columns = {"score_chosen": torch.from_numpy(SC), "score_rejected": torch.from_numpy(SL)}
    return config, chosen, objective_of(config)(pairs, columns, training=True)


@pytest.mark.parametrize(
    ("keys", "loss", "sft", "warns"), [row[1:] for row in FORMULAS], ids=[row[0] for row in FORMULAS]
)
def test_what_a_file_trains_is_the_formula_of_its_code(keys, loss, sft, warns, tmp_path, caplog):
    config, _, output = trained(keys, tmp_path)
    on_dpo = sft if config._base == "dpo" else 0.0  # CPOTrainer adds its own outside
    np.testing.assert_allclose(output.losses.detach(), loss + on_dpo * NLL, rtol=1e-6)
    assert getattr(config, "cpo_alpha", sft) == sft
    own = [record for record in caplog.records if record.name == "trl_margins.cli.train"]
    assert any(record.levelname == "WARNING" for record in own) is warns
    theirs, ours = (str(tmp_path / name) for name in ("theirs.yaml", "ours.yaml"))
    assert main(["convert", theirs, "--out", ours]) == 0
    assert arguments("--config", ours) == arguments("--config", theirs)


HYDRA = """
seed: 0
exp_name: anthropic_pythia28
batch_size: 64
eval_batch_size: 32
debug: false
datasets: [hh]
wandb: {enabled: true, entity: null, project: x}
local_dirs: [/scr, .cache]
sample_during_eval: false
do_first_eval: true
lr: 5e-7
gradient_accumulation_steps: 2
max_grad_norm: 10.0
max_length: 512
max_prompt_length: 256
n_epochs: 1
n_examples: null
trainer: FSDPTrainer
optimizer: RMSprop
warmup_steps: 150
activation_checkpointing: false
eval_every: 20_000
model: {name_or_path: EleutherAI/pythia-2.8b, archive: null, block_name: GPTNeoXLayer, fsdp_policy_mp: bfloat16}
"""
BETA_DPO = HYDRA + "loss: {name: dpo, beta: 0.1, mode_loss: beta_DPO, mode_weight: 0.2, a: 0.6, label_smoothing: 0}"
DR_DPO = (
    HYDRA + "noise_rate: 0.2\nloss: {name: dpo, beta: 0.1, mode_loss: DrDPO, mode_weight: 1.5, label_smoothing: 0}"
)


def test_beta_dpos_config(tmp_path):
    """Its gradient: that of the mean −log σ(β_b g) over 6 of 8 pairs, with β_b from their mean g."""
    config, chosen, output = trained(BETA_DPO, tmp_path)
    (gradient,) = torch.autograd.grad(output.losses.mean(), chosen)
    kept = gradient.numpy() != 0
    beta = 0.1 * (1 + 0.6 * (X[kept].mean() - 0.1 * X.mean()))
    np.testing.assert_allclose(gradient, np.where(kept, -beta * s(-beta * X) / 6, 0), rtol=1e-6)
    assert kept.sum() == 6
    assert config.method.id == "beta-dpo"
    values = arguments("--config", str(tmp_path / "theirs.yaml"))
    expected = {"learning_rate": 5e-7, "optim": "rmsprop", "warmup_steps": 150, "per_device_train_batch_size": 32}
    expected |= {
        "lr_scheduler_type": "constant_with_warmup",
        "eval_steps": 312,
        "model_revision": "main",
        "bf16": True,
    }
    expected |= {
        "dataset_name": "Anthropic/hh-rlhf",
        "model_name_or_path": "EleutherAI/pythia-2.8b",
        "max_length": 512,
    }
    assert {name: values[name] for name in expected} == expected
    assert main(["convert", str(tmp_path / "theirs.yaml"), "--out", str(tmp_path / "ours.yaml")]) == 0
    assert arguments("--config", str(tmp_path / "ours.yaml")) == values
    flag = arguments("--config", str(tmp_path / "theirs.yaml"), "--method", "orpo")
    assert (flag["loss_type"], flag["learning_rate"], flag["weight"]) == ("orpo", 5e-7, None)
    (tmp_path / "theirs.yaml").write_text(BETA_DPO.replace("archive: null", "archive: x.pt"))
    with pytest.raises(ValueError, match=r"model.archive: x.pt is a state dict: save the model with save_pretrained"):
        main(["convert", str(tmp_path / "theirs.yaml")])


def test_dr_dpos_config(tmp_path):
    """Its gradient: that of −β′ log mean exp(−ℓ/β′)."""
    _, chosen, output = trained(DR_DPO, tmp_path)
    (gradient,) = torch.autograd.grad(output.losses.mean(), chosen)
    share = s(0.1 * X) ** (1 / 1.5)
    np.testing.assert_allclose(gradient, -0.1 * s(-0.1 * X) * share / share.sum(), rtol=1e-6)
    values = arguments("--config", str(tmp_path / "theirs.yaml"))
    assert (values["method"], values["noise"], values["dr_dpo_beta_prime"]) == ("dr-dpo", "random:0.2", 1.5)


@pytest.mark.parametrize(
    ("keys", "a", "gap"),
    [(f"{DPO_TRAINER}, loss_type: b-dpo", 0.5, M), (f"{SIMPO_TRAINER}, loss_type: b-simpo", 0.5, DELTA)],
)
def test_gamma_pos_beta_dpo(keys, a, gap, tmp_path, caplog):
    """Its τ scales gaps with β in them, and it leaves no pair out."""
    config, chosen, output = trained(f"{SIMPO_KEYS}, tau: {a}, {keys}", tmp_path)
    (gradient,) = torch.autograd.grad(output.losses.mean(), chosen)
    gamma = 1.5 if config._base == "cpo" else 0.0
    beta = 2.5 * (1 + a * 2.5 * (gap.mean() - 0.1 * gap.mean()))
    np.testing.assert_allclose(gradient, -beta * s(gamma - beta * gap) / 8 / NC, rtol=1e-6)
    assert any(
        "no pair is left out" in record.getMessage() and record.levelname == "WARNING" for record in caplog.records
    )


@pytest.mark.parametrize(
    ("method", "keys", "expected"),
    [
        ("orpo", "hub_model_id: x-orpo, beta: 0.05", {"loss_type": "orpo", "beta": 0.05, "cpo_alpha": 1.0}),
        ("orpo", "gamma_beta_ratio: 0.5, beta: 2.0, sft_weight: 0.1", {"gamma_beta_ratio": 0.0, "cpo_alpha": 1.0}),
        ("orpo", "loss_type: ipo, rpo_alpha: 0.5", {"loss_type": "orpo", "reward": None, "gamma_beta_ratio": 0.0}),
        ("orpo", "length_norm: true, beta: 3.0", {"loss_type": "orpo", "reward": None, "gamma_beta_ratio": 0.0}),
        (
            "alpha-dpo",
            f"{SIMPO_KEYS}, alpha: 0.1, {ALPHA.replace('true', 'false')}",
            {"alpha_dpo_alpha": 0.1, "reward": "sum"},
        ),
        ("dpo", f"{SIMPO_KEYS}, alpha: 0.1, {ALPHA}", {"reward": "log-ratio", "alpha": 0.0, "gamma_beta_ratio": None}),
        ("simper", SIMPO_KEYS, {"loss_type": "simper", "gamma_beta_ratio": None}),
        (
            "beta-dpo",
            f"{DPO_TRAINER}, loss_type: b-dpo, tau: 0.5, beta: 0.1",
            {"beta_dpo_a": 0.05, "beta_dpo_keep": 1.0},
        ),
    ],
)
def test_a_baseline_on_the_command_line(method, keys, expected, tmp_path):
    """It is trained whole, with what the file says of it; of another objective nothing is left."""
    (tmp_path / "theirs.yaml").write_text(f"{{max_prompt_length: 9, {keys}}}")
    values = arguments("--config", str(tmp_path / "theirs.yaml"), "--method", method)
    assert {name: values[name] for name in expected} == expected


# Mixtures, against the handbook's way spelled out


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory) -> list[str]:
    folders = []
    for number, size in enumerate((10, 7)):
        folder = tmp_path_factory.mktemp("set")
        rows = {
            name: preference_rows(size, seed=10 * number + part).map(lambda row: {"kept": 1, **row})
            for part, name in enumerate(("train", "test"))
        }
        if number:
            rows = {name: part.remove_columns("kept") for name, part in rows.items()}
        DatasetDict(rows).save_to_disk(folder)
        folders.append(str(folder))
    return folders


def mixed(text: str) -> tuple[DatasetMixtureConfig, TrainArguments]:
    settings = of_today(text, method="none")
    mixture = {"datasets", "test_split_size"} & settings.keys()
    script = {item.name for item in dataclasses.fields(TrainArguments)} & settings.keys()
    return (
        DatasetMixtureConfig(**{name: settings[name] for name in mixture}),
        TrainArguments(**{name: settings[name] for name in script}),
    )


def test_a_mixture_is_the_handbooks(two_sets):
    first, second = two_sets
    mixture, script = mixed(
        f"dataset_mixture:\n  seed: 3\n  test_split_size: 4\n  datasets:\n"
        f"    - {{id: {first}, columns: [prompt, chosen, rejected], weight: 0.55}}\n"
        f"    - {{id: {second}, split: train, columns: [prompt, chosen, rejected]}}\n"
    )
    splits = mixture_splits(mixture, script.mixture_weights, script.mixture_seed)
    parts = [
        DatasetDict.load_from_disk(folder)["train"].select_columns(["prompt", "chosen", "rejected"]).shuffle(seed=3)
        for folder in two_sets
    ]
    whole = DatasetDict.load_from_disk(second)["train"].select_columns(["prompt", "chosen", "rejected"])
    theirs = concatenate_datasets([parts[0].select(range(5)), whole]).shuffle(seed=3)
    theirs = theirs.train_test_split(test_size=4, seed=3)
    assert {name: part.to_list() for name, part in splits.items()} == {n: p.to_list() for n, p in theirs.items()}
    assert len(splits["test"]) == 4
    again = mixture_splits(mixture, script.mixture_weights, script.mixture_seed)  # as another rank would
    assert again["test"].to_list() == splits["test"].to_list()


def test_a_mixer_takes_the_first_rows_and_whole_test_splits(two_sets, caplog):
    first, second = two_sets
    text = f"dataset_mixer:\n  {first}: 0.5\n  {second}: 0.29\ndataset_splits: [train, test]\n"
    mixture, script = mixed(text)
    assert (script.mixture_weights, script.mixture_seed, script.dataset_test_split) == ([0.5, 0.29], None, "test")
    with caplog.at_level(logging.INFO, "trl_margins"):
        train = mixture_splits(mixture, script.mixture_weights, script.mixture_seed)["train"]
    sets = [DatasetDict.load_from_disk(folder) for folder in two_sets]
    rows = sets[0]["train"].select(range(5)).remove_columns("kept").to_list() + sets[1]["train"].to_list()[:2]
    assert train.to_list() == rows
    assert f"{first}: 5 of 10 rows" in caplog.text
    assert "columns that not all sets have in one type are left out: kept" in caplog.text
    assert len(mixture_test_split(mixture, script.dataset_test_split)) == 17


def test_the_split_of_another_set_to_evaluate_on(tmp_path):
    """A set of one split is taken whatever the split is called."""
    one, both = tmp_path / "one", tmp_path / "both"
    DatasetDict(mine=Dataset.from_dict({"a": [1]})).save_to_disk(one)
    DatasetDict(mine=Dataset.from_dict({"a": [1]}), test=Dataset.from_dict({"a": [2]})).save_to_disk(both)
    columns = dict.fromkeys(("prompt_column", "system_column", "score_columns"))
    config, none = SimpleNamespace(eval_strategy="steps", eval_on_start=False, **columns), DatasetMixtureConfig()
    for folder, found in ((one, 1), (both, 2)):
        script = TrainArguments(dataset_name=str(both), dataset_train_split="mine", eval_dataset_name=str(folder))
        train, evals = datasets_of(script, config, none)
        assert (train["a"][:], evals["a"][:]) == ([1], [found])


def test_one_whole_set_is_no_mixture():
    mixer = "dataset_mixer: {a/b: 1.0}\ndataset_configs: [c]\ndataset_splits: [train_prefs, test_prefs]"
    one = {"dataset_name": "a/b", "dataset_config": "c", "dataset_train_split": "train_prefs"}
    assert of_today(mixer, method="none") == {**one, "dataset_test_split": "test_prefs"}
    mixture = "dataset_mixture: {datasets: [{id: a/b, config: c, split: train_prefs}], seed: 1}"
    assert of_today(mixture, method="none") == one
    assert "mixture_weights" not in of_today("dataset_mixer: {a/b: 1, c/d: 1.0}", method="none")


def test_trl_mixes_local_files(tmp_path):
    """By `fraction`, each set's share of the mixture, and as a stream."""
    parts = []
    for size in (12, 4):
        rows = preference_rows(size, seed=size)
        rows.to_json(tmp_path / f"{size}.jsonl")
        parts.append({"path": str(tmp_path / f"{size}.jsonl")})
    whole = mixture_splits(DatasetMixtureConfig([dict(part) for part in parts], streaming=True))["train"]
    assert len(list(whole)) == 16
    for fractions in ((0.5, 0.5), (3.0, 1.0), (0.9, 0.1), (1.0, 0.0), (0.33, 0.67)):
        each = [{**part, "fraction": share} for part, share in zip(parts, fractions, strict=True)]
        mine = mixture_splits(DatasetMixtureConfig([dict(part) for part in each]))["train"]
        of_trl = [{**part, "path": "json", "data_files": part["path"]} for part in each]
        assert mine["prompt"][:] == get_dataset(DatasetMixtureConfig(of_trl))["train"]["prompt"][:]


def test_a_share_of_files_that_trl_reads_otherwise(tmp_path):
    """Numbers as text, dates, tabs and capitals are read as without `fraction`, and so are other columns."""
    (tmp_path / "a.tsv").write_text("prompt\tchosen\trejected\n007\t2024-01-01\tNone\n")
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "TRAIN.JSONL").write_text('{"prompt": "q", "chosen": "c", "rejected": "d", "margin": 1}\n')
    parts = [{"path": str(tmp_path / name), "fraction": 0.5} for name in ("a.tsv", "B")]
    rows = mixture_splits(DatasetMixtureConfig(parts))["train"]
    assert [tuple(row[name] for name in ("prompt", "chosen", "rejected")) for row in rows] == [
        ("007", "2024-01-01", "None"),
        ("q", "c", "d"),
    ]


def test_mixtures_that_cannot_be(two_sets):
    part = {"path": two_sets[0], "split": "train"}
    with pytest.raises(ValueError, match="saved with save_to_disk, which TRL does not mix as a stream: save it"):
        mixture_splits(DatasetMixtureConfig([dict(part)], streaming=True))
    with pytest.raises(ValueError, match=r"the fractions \[-1.0, 1.0\] must be shares of the mixture"):
        mixture_splits(DatasetMixtureConfig([{**part, "fraction": each} for each in (-1.0, 1.0)]))
    with pytest.raises(ValueError, match=r"\[0\.5\] must be a share in \[0, 1\] for each of"):
        mixture_splits(DatasetMixtureConfig([dict(part), dict(part)]), [0.5])
    with pytest.raises(ValueError, match="must be a share"):
        mixture_splits(DatasetMixtureConfig([dict(part)]), [1.5])
    with pytest.raises(ValueError, match="TRL's `fraction`"):
        mixture_splits(DatasetMixtureConfig([{**part, "fraction": 1.0}]), [0.5])
    with pytest.raises(ValueError, match="give eval_dataset_name"):
        mixture_test_split(DatasetMixtureConfig([dict(part)], streaming=True), "test")
    share = mixture_splits(DatasetMixtureConfig([dict(part)], test_split_size=0.2))
    assert (len(share["train"]), len(share["test"])) == (8, 2)


GAMMA_PO = {"dataset_mixer": {"d": 1.0}, "max_prompt_length": 20, "beta": 10.0, "gamma_beta_ratio": 0.3}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        # scripts/simpo_trainer.py of γ-PO adds sft_weight · NLL to both of its losses; its gm-simpo has no smoothing
        ({"trainer_type": "simpo", "loss_type": "simpo", "sft_weight": 0.5}, {"method": "none", "cpo_alpha": 0.5}),
        ({"trainer_type": "simpo", "loss_type": "gm-simpo", "sft_weight": 0.5}, {"cpo_alpha": 0.5}),
        ({"trainer_type": "simpo", "loss_type": "gm-simpo", "label_smoothing": 0.1}, {"label_smoothing": None}),
        # nothing but γ-PO's config has both keys; its defaults are those of SimPO's code
        ({"loss_type": "simpo"}, {"method": "none", "cpo_alpha": 0.0, "learning_rate": 5e-5, "max_length": 512}),
    ],
)
def test_gamma_pos_trainer(written, expected):
    found, _ = migrate(GAMMA_PO | written)
    assert {name: found.get(name) for name in expected} == expected
    assert found["base"] == "cpo"


# TrainingArguments' defaults, under SimPO's own
OF_SIMPOS_CODE = {
    **{"max_length": 512, "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0, "bf16": False},
    **{"num_train_epochs": 3.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
}
MIXED = {"dataset_mixer": {"d": 1.0}}
OF_MIXED = {"dataset_name": "d", "dataset_train_split": "train", "dataset_test_split": "test"}
ON_DPO = {
    "method": "gamma-po",
    "base": "dpo",
    "reward": "mean-log-ratio",
    "gamma_po_tau": 1.0,
    "gamma_beta_ratio": 0.3,
}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"margin_norm": True, "loss_type": "sigmoid", "length_norm": True, "beta": 3.0}, {"beta": 3.0}),
        ({"margin_norm": True, "sft_weight": 0.5}, {"beta": 2.0}),
        ({"mode_weight": 1, "length_norm": False}, {"beta": 2.0, "loss_type": "sigmoid"}),
        (
            {"trainer_type": "dpo", "loss_type": "gm-dpo", "label_smoothing": 0.1, **GAMMA_PO},
            {**ON_DPO, "loss_type": ["conservative"], "label_smoothing": 0.1, "beta": 10.0, "gamma_beta_ratio": 0.3},
        ),
        (
            {"trainer_type": "dpo", "loss_type": "gm-dpo", "sft_weight": 0.1, **GAMMA_PO},
            {**ON_DPO, "loss_type": "sigmoid", "beta": 10.0, "gamma_beta_ratio": 0.3},
        ),
        (
            {"ln": True, "trainer_type": "dpo", "loss_type": "alpha-dpo", "sft_weight": 0.1},
            {
                **{"method": "alpha-dpo", "base": "dpo", "reward": "length-normalized", "beta": 2.0},
                **{"alpha_dpo_alpha": 0.0, "gamma_beta_ratio": 0.25},
            },
        ),
    ],
)
def test_the_whole_of_what_a_file_sets(written, expected):
    """Nothing more is kept of it, and what it leaves unsaid is the default of its own code."""
    found, _ = migrate({**MIXED, **written})
    amapo = {} if "method" in expected else {"method": "amapo", "base": "cpo", "amapo_estimation_size": 1}
    assert found == {**OF_MIXED, **OF_SIMPOS_CODE, **amapo, **expected}


@pytest.mark.parametrize(
    ("kinds", "given", "read"),
    [
        *(((bool,), given, True) for given in (True, "yes", "True", "t", "y", "1", 1)),
        *(((bool,), given, False) for given in (False, "no", "FALSE", "f", "n", "0", 0)),
        ((int,), "3", 3),
        ((float,), "1e-6", 1e-6),
        ((float,), 2, 2.0),
        ((str,), "no", "no"),
        ((bool, str), "no", False),
        ((list[str],), "a", ["a"]),
        ((list[float], float), ["1e-3", 2], [1e-3, 2.0]),
        ((str, type(None)), None, None),
        *(((bool,), given, ValueError) for given in ("maybe", 2, None, [True])),
        *(((int,), given, ValueError) for given in (True, "x", 1.5, [1])),
        *(((str,), given, ValueError) for given in (True, 3, "a\0b", None, ["a"])),
        ((list[float],), ["x"], ValueError),
        ((dict,), "x", ValueError),
    ],
)
def test_what_yaml_has_becomes_the_options_type(kinds, given, read):
    takes = Takes("it", kinds, (), None)
    if read is ValueError:
        with pytest.raises(ValueError, match=r"^it must be"):
            takes.read(given)
    else:
        found = takes.read(given)
        assert found == read
        assert type(found) is type(read)


def test_a_number_that_must_be_there():
    with pytest.raises(ValueError, match="beta"):
        Takes("beta", (float,), (), NUMBERS["beta"]).read(None)
    assert Takes("beta", (float, type(None)), (), NUMBERS["beta"]).read(None) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zephyr-orpo", {**OF_SIMPOS_CODE, "method": "orpo", "beta": 0.1, "max_length": 1024, "learning_rate": 1e-6}),
        ("corporate-7b", {"method": "none", "base": "dpo"}),
        ("corporate-dpo-7b", {"method": "none", "base": "dpo"}),
    ],
)
def test_words_of_a_name_are_whole(name, expected):
    found, _ = migrate({**MIXED, "run_name": name})
    assert {**found, "bf16": False} == {"run_name": name, "bf16": False, **OF_MIXED, **expected}


def test_a_loss_that_the_base_does_not_have():
    with pytest.raises(ValueError, match=r"sft_weight: on base dpo, loss_type: \[sigmoid, sft\] with .*\[1.0, 0.1\]"):
        migrate({"method": "gappo", "base": "dpo", "sft_weight": 0.1})
    assert migrate({"method": "gappo", "base": "dpo", "sft_weight": 0.0})[0] == {"method": "gappo", "base": "dpo"}
    for loss in ("gm-simpo", "gm-dpo", "simpo"):  # of a method that is named, only γ-PO's own say nothing more
        kept = {"method": "gappo", "loss_type": loss}
        assert migrate(kept) == (kept, [])
    assert migrate({"method": "gamma-po", "loss_type": "gm-simpo"})[0] == {"method": "gamma-po"}


@pytest.mark.parametrize(
    "written",
    [
        {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
        {"loss_type": "alpha-dpo", "ln": True},
        {"mode_loss": "beta_DPO", "a": 0.6},
        {"loss_type": "SimPER", "gamma_beta_ratio": 0.5},
        {"loss_type": "tdpo"},
        {"dataset_splits": ["train_sft"], "packing": True},
    ],
)
def test_an_objective_that_is_missing_gives_way_to_the_flag(written, tmp_path):
    """As its error says: --method trains the file's model on its data."""
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "m", "dataset_mixer": {"d": 1.0}, "beta": 0.1, **written}))
    for method, base in (("none", "dpo"), ("gappo", "cpo")):
        flags = ["--config", str(file), "--output_dir", "o", "--method", method, "--base", base, "--dry_run"]
        config = parse(flags)[1]
        assert (config._method_id or "none", config._base) == (method, base)
