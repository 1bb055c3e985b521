"""Config migration: settings of other projects' YAML, the same after converting, and two training steps of each."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHAT_TEMPLATE, preference_rows
from datasets import DatasetDict, concatenate_datasets
from transformers import AutoTokenizer
from trl.scripts.utils import DatasetMixtureConfig

from trl_margins.cli import main
from trl_margins.cli.config_file import check_known
from trl_margins.cli.migration import DROPPED, RENAMED, migrate
from trl_margins.cli.mixture import mixture_splits, mixture_test_split
from trl_margins.cli.train import TrainArguments, _tokenizer, chat_template, parse, parser_for

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
{TRAINING}""",
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
    path, becomes = recipe
    assert main(["train", "--config", path, "--dry_run", "--learning_rate", "2e-5"]) == 0
    printed = capsys.readouterr().out
    settings = yaml.safe_load(printed)
    assert list(settings)[:2] == ["method", "base"]
    assert settings["learning_rate"] == 2e-5
    assert all(settings[name] == value for name, value in becomes.items() if name in settings)
    assert settings["lr_scheduler_type"] == "cosine"
    (tmp_path / "again.yaml").write_text(printed)
    assert main(["train", "--config", str(tmp_path / "again.yaml"), "--dry_run"]) == 0
    assert capsys.readouterr().out == printed


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
        ({"overwrite_output_dir": True, "save_safetensors": True, "logging_dir": "x"}, {}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"auto_insert_empty_system_msg": False, "decontaminate": True, "text_column": "text"}, {}),
        ({"ref_model_init_kwargs": {"a": 1}, "model_init_kwargs": {"a": 1}}, {"model_init_kwargs": {"a": 1}}),
        ({"label_pad_token_id": -100, "padding_value": None, "truncation_side": "left"}, {}),
        ({"sft_weight": 0.2}, {"cpo_alpha": 0.2}),
        ({"gamma": 1.6}, {"simpo_gamma": 1.6}),
        ({"length_norm": True}, {"loss_type": "simpo"}),
        ({"length_norm": False}, {"loss_type": "sigmoid"}),
        ({"tau": 3}, {}),
        ({"flip": 0.0}, {}),
        ({"truncation_mode": "keep_end"}, {}),
        ({"loss_type": "gm-simpo", "trainer_type": "simpo"}, {}),
    ],
)
def test_one_key(written, today):
    """Under a method that is named, so that nothing else is said."""
    settings, notes = migrate({"method": "none", **written})
    assert settings == {"method": "none", **today}
    assert {note.key for note in notes} == written.keys() - today.keys() - {"model_init_kwargs"} | {
        name for name, value in written.items() if value is False and name in today
    }


def test_keys_that_depend_on_method_or_base():
    assert migrate({"tau": 3}, "gamma-po")[0] == {"gamma_po_tau": 3}
    assert migrate({"length_norm": True}, "amapo", "dpo")[0] == {"reward": "length-normalized"}
    assert migrate({"length_norm": False}, "amapo", "dpo")[0] == {"reward": "log-ratio"}
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


def test_a_file_of_ours_stays_as_it_is():
    written = {"method": "gappo", "beta": 1.0, "eval_strategy": "steps", "warmup_steps": 0.1, "env": {"A": "1"}}
    assert migrate(written) == (written, [])
    written = {"gamma_beta_ratio": None, "loss_type": None, "eval_strategy": None}
    assert migrate(written) == (written, [])
    (note,) = (note for note in migrate({"torch_dtype": "auto"})[1] if note.key == "method")
    assert note.text.endswith("the default")


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (
            {"trainer_type": "simpo", "loss_type": "b-simpo"},
            "loss_type: b-simpo .*does not have this objective.*gappo, gap-aware",
        ),
        ({"trainer_type": "dpo", "loss_type": "b-dpo"}, "trainer_type: dpo with loss_type: b-dpo"),
        ({"trainer_type": "dpo", "loss_type": "r-dpo"}, "loss_type: r-dpo and length_norm: true: the package does"),
        ({"trainer_type": "simpo", "loss_type": "cpo"}, "does not have this objective"),
        ({"loss_type": "orpo"}, "loss_type: orpo .*ORPO is in trl.experimental.orpo"),
        ({"dataset_mixer": {"a/b": 1.0}, "output_dir": "data/zephyr-orpo-141b"}, "an ORPO recipe, by its name"),
        (
            {"dataset_mixer": {"a/b": 1.0}, "gamma_beta_ratio": 1, "loss_type": "hinge"},
            "loss_type: hinge beside SimPO's γ",
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
    path.write_text("method: none\nwarmup_ratio: 0.1\nenv:\n  A: x\noverwrite_output_dir: true\n")
    assert main(["convert", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed == (
        "# From theirs.yaml, by trl-margins convert.\nmethod: none\n"
        "# warmup_ratio: 0.1 → warmup_steps: 0.1 (below 1 it is a share of all steps)\nwarmup_steps: 0.1\n"
        "env:\n  A: x\n\n# No longer in this file:\n"
        "# overwrite_output_dir: true → dropped: a run starts from scratch unless resume_from_checkpoint is set\n"
    )
    with pytest.raises(SystemExit, match="is the input file"):
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


def test_one_whole_set_is_no_mixture():
    mixer = "dataset_mixer: {a/b: 1.0}\ndataset_configs: [c]\ndataset_splits: [train_prefs, test_prefs]"
    one = {"dataset_name": "a/b", "dataset_config": "c", "dataset_train_split": "train_prefs"}
    assert of_today(mixer, method="none") == {**one, "dataset_test_split": "test_prefs"}
    mixture = "dataset_mixture: {datasets: [{id: a/b, config: c, split: train_prefs}], seed: 1}"
    assert of_today(mixture, method="none") == one
    assert "mixture_weights" not in of_today("dataset_mixer: {a/b: 1, c/d: 1.0}", method="none")


def test_mixtures_that_cannot_be(two_sets):
    part = {"path": two_sets[0], "split": "train"}
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
