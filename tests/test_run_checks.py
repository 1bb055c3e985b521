"""`train`, its `--dry_run` and `convert` refuse the same files, in the same words, before they touch data or model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import preference_rows, quiet
from datasets import DatasetDict, load_from_disk
from said import hear, word_for_word  # noqa: F401 - its messages are held against said/
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_margins.cli import main
from trl_margins.cli.config_file import as_yaml
from trl_margins.cli.recipes import recipe_folder, recipes
from trl_margins.cli.train import parse
from trl_margins.trainers.named import trainer_of

NAMED = {"model_name_or_path": "./no-model", "dataset_name": "./no-rows.jsonl", "output_dir": "out", "use_cpu": True}
GOES_ON = "no data set at ./no-rows.jsonl"  # what training says next
COMMANDS = (["train", "--config"], ["train", "--dry_run", "--config"], ["convert"])


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(*argv: str) -> str | None:
    """What a command refuses its arguments with."""
    try:
        main(list(argv))
    except (Exception, SystemExit) as error:
        return str(error)
    return None


def verdicts(text: str | bytes) -> set[str | None]:
    """What the three commands say of a file; None if they go on."""
    Path("c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    answers = [said(*command, "c.yaml") for command in COMMANDS]
    return {None if answer == GOES_ON else answer for answer in answers}


def refused(text: str | bytes) -> str:
    """The one line in which all three refuse a file."""
    (answer,) = verdicts(text)
    assert answer is not None
    assert len(answer.splitlines()) == 1, answer
    hear(answer)
    return answer


def with_names(text: str) -> str:
    """A config that lacks nothing, but for what is wrong in it."""
    keys = [line.partition(":")[0] for line in text.splitlines()]
    return text + "\n" + as_yaml({key: value for key, value in NAMED.items() if key not in keys})


# Numbers, by their bounds in the code that reads them

EVERY_KIND = ("0", "-1", "1.5", ".nan", ".inf", "true", "ten", "[1]", "{a: 1}", "2026-01-01", "null")
POSITIVE, NOT_NEGATIVE = ("0", "-1"), ("-1", "true")  # what these refuse


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("per_device_train_batch_size", EVERY_KIND),
        ("learning_rate", [value for value in EVERY_KIND if value not in ("0", "1.5")]),
        *((name, POSITIVE) for name in ("per_device_eval_batch_size", "gradient_accumulation_steps", "max_length")),
        *((name, POSITIVE) for name in ("lora_r", "lora_alpha", "num_train_epochs", "beta", "dataset_num_proc")),
        *((name, NOT_NEGATIVE) for name in ("seed", "warmup_steps", "weight_decay", "dataloader_num_workers")),
        *((name, NOT_NEGATIVE) for name in ("max_grad_norm", "adam_epsilon", "logging_steps", "save_steps")),
        *((name, NOT_NEGATIVE) for name in ("eval_steps", "data_seed", "mixture_seed", "noise_seed")),
        *((name, ("null", "[1]")) for name in ("lora_r", "seed", "beta", "logging_steps")),
        *((name, ("-0.1", "1.0")) for name in ("lora_dropout", "adam_beta1")),
        ("max_steps", ("0", "-2", "1.5")),
        ("seed", ("4294967296", "1.5")),
    ],
)
def test_numbers(name, values):
    for value in values:
        assert re.match(rf"c\.yaml: {name} must be a .*number", refused(with_names(f"{name}: {value}"))), value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "learning_rate: 1e-5",
            "learning_rate: '5e-7'",
            "learning_rate: 1",
            "max_steps: -1",
            "max_steps: '3'",
            "seed: 0",
        ),
        *(
            "warmup_steps: 0",
            "warmup_steps: 0.1",
            "max_grad_norm: 0",
            "dataloader_num_workers: 0",
            "save_total_limit: 0",
        ),
        *(
            "max_length: null",
            "dtype: null",
            "torch_dtype: null",
            "attn_implementation: null",
            "load_best_model_at_end: null",
        ),
        *(
            "dtype: bfloat16",
            "attn_implementation: flash_attention_2",
            "attn_implementation: some/kernel",
            "tf32: false",
        ),
        *("optim: adafactor", "lr_scheduler_type: linear", "report_to: [wandb, tensorboard]", "report_to: all"),
        *(
            "gradient_checkpointing: yes",
            "gradient_checkpointing: 'true'",
            "eval_strategy: no",
            "run_name: 2026-01-01",
        ),
        *("weight: none", "weight: null", "method: none", "base: dpo\nloss_type: sigmoid\nreward: log-ratio"),
        *(
            "env: {A: 1, B: }",
            "model_init_kwargs: '{}'",
            "use_peft: true\nlora_target_modules: q_proj",
            "noise: random:0.2",
        ),
        *(
            "chat_template: '{{ messages }}'",
            "base: dpo\npad_to_multiple_of: null",
            "base: dpo\npad_to_multiple_of: 8",
        ),
    ],
)
def test_values_that_are_right(text):
    assert verdicts(with_names(text)) == {None}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dtype: float31", "unknown dtype 'float31'; known: auto, bfloat16, float16, float32"),
        ("optim: adamm", "unknown optim 'adamm'; known: .*adamw_torch"),
        ("lr_scheduler_type: cosin", "unknown lr_scheduler_type 'cosin'; known: .*did you mean 'cosine'"),
        ("eval_strategy: stpes", "unknown eval_strategy 'stpes'; known: no, steps, epoch"),
        ("save_strategy: sometimes", "unknown save_strategy 'sometimes'; known: no, steps, epoch, best"),
        ("logging_strategy: never", "unknown logging_strategy 'never'; known: no, steps, epoch"),
        ("hub_strategy: never", "unknown hub_strategy 'never'"),
        ("report_to: wandbb", "unknown report_to 'wandbb'; known: .*did you mean 'wandb'"),
        ("report_to: [wandb, tensorbord]", "unknown report_to 'tensorbord'.*did you mean 'tensorboard'"),
        ("report_to: null", "unknown report_to None; known: all, none"),
        ("attn_implementation: flash", "unknown attn_implementation 'flash'; known: eager, .*flash_attention_2.*sdpa"),
        ("train_sampling_strategy: shuffled", "unknown train_sampling_strategy 'shuffled'; known: random"),
        ("ddp_backend: ncl", "unknown ddp_backend 'ncl'.*did you mean 'nccl'"),
        ("bnb_4bit_quant_type: nf5", "unknown bnb_4bit_quant_type 'nf5'; known: fp4, nf4"),
        ("base: dpo\ntruncation_mode: keep_middle", "unknown truncation_mode 'keep_middle'"),
        ("base: dpo\nf_divergence_type: kl\nreward: log-ratio", "unknown f_divergence_type 'kl'"),
        ("base: sft", "unknown base 'sft'; known: cpo, dpo"),
        ("base: [cpo]", "unknown base"),
        ("method: null", "method must be text; it is None"),
        ("method: 3", "unknown method 3"),
        ("method: ''", "unknown method ''"),
        ("noise: 0.2", "noise must be text; it is 0.2: put it in quotes"),
        ("noise: typo:0.2", "noise is written KIND:RATE"),
        ("noise: random:2", "the rate is the share of pairs to flip"),
        ("chat_template: missing.jinja", "'missing.jinja' is neither a Jinja template nor a file with one"),
        ("dataset_name: 3", "dataset_name must be text; it is 3: put it in quotes"),
        ("output_dir: 1", "output_dir must be text; it is 1: put it in quotes"),
        ("output_dir: [a]", r"output_dir must be text; it is \['a'\]"),
        ("run_name: 2026", "run_name must be text; it is 2026: put it in quotes"),
        ("run_name: {a: 1}", "run_name must be text; it is {'a': 1}"),
        ('output_dir: "a\\0b"', "output_dir must be text"),
        ("weight: 3", "weight must be text or a list, each text; it is 3"),
        ("report_to: [3]", r"report_to must be text or a list, each text; it is \[3\]"),
        ("bf16: perhaps", "bf16 must be true or false; it is 'perhaps'"),
        ("bf16: [true]", "bf16 must be true or false"),
        ("train_only: {a: 1}", "train_only must be a list, each text"),
        ("model_init_kwargs: 3", "model_init_kwargs must be a mapping or text; it is 3"),
        ("model_init_kwargs: '{bad'", "model_init_kwargs must be a mapping, or one as JSON"),
        ("lr_scheduler_kwargs: nonsense", "lr_scheduler_kwargs must be a mapping, or one as JSON"),
        ("train_sampling_strategy: batch_rebalance", "different numbers of pairs, .*: take 'group_by_length'"),
        (
            "lr_scheduler_kwargs: {min_lr_rate: 0.1}",
            "'cosine' does not go with lr_scheduler_kwargs {'min_lr_rate': 0.1}: .*unexpected keyword.*'min_lr_rate'",
        ),
        ("lr_scheduler_kwargs: {num_cycles: x}", "'cosine' does not go with lr_scheduler_kwargs {'num_cycles': 'x'}"),
        ("lr_scheduler_type: warmup_stable_decay", "'warmup_stable_decay' does not go with lr_scheduler_kwargs {}: "),
        ("model_init_kwargs: {dtype: bfloat17}", "unknown dtype of model_init_kwargs 'bfloat17'; known: auto"),
        ("model_init_kwargs: [dtype]", r"model_init_kwargs must be a mapping or text; it is \['dtype'\]"),
        ("model_init_kwargs: {dtype: 3}", "unknown dtype of model_init_kwargs 3; known: auto, bfloat16, float16"),
        ("accelerator_config: {even_batchs: 1}", "key of accelerator_config 'even_batchs'.*mean 'even_batches'"),
        ("accelerator_config: {split_batches: [1]}", "accelerator_config: split_batches must be true or false"),
        (
            "gradient_checkpointing_kwargs: {use_reentrent: false}",
            "key of gradient_checkpointing_kwargs 'use_reentrent'.*did you mean 'use_reentrant'",
        ),
        ("activation_checkpointing_kwargs: {a: 1}", "unknown key of activation_checkpointing_kwargs 'a'; known: "),
        ("max_length: 1000000000000", "max_length must be at most 1,000,000,000; it is 1000000000000"),
        ("datasets: [{path: a, splt: x}]", "datasets must be .*unknown key 'splt'; known: .*did you mean 'split'"),
        ("datasets: [{split: x}]", "datasets must be .*path is missing"),
        ("datasets: [{path: 3}]", "datasets must be .*path must be text"),
        ("datasets: [{path: a}, {path: b}]\nmixture_weights: [1]", r"mixture_weights: \[1.0\] must be a share"),
        ("datasets: [{path: a}]\nmixture_weights: [2]", r"mixture_weights: \[2.0\] must be a share in \[0, 1\]"),
        ("datasets: [{path: a}]\nmixture_weights: [half]", "mixture_weights must be a list, each a number"),
        ("datasets: [{path: a, fraction: 0.5}, {path: b}]", "a fraction of every set or of none"),
        ("mixture_weights: [1.0]", "mixture_weights: without `datasets`"),
        ("env: 3", "env must be a mapping"),
        ("env: {a=b: 1}", "env must be a mapping .*'a=b' is not"),
        ("env: {A: [1]}", "env must be a mapping"),
        ("save_steps: 0", "save_steps must be a number, above 0, with save_strategy 'steps'; it is 0"),
        (
            "save_strategy: best\nmethod: amapo\neval_strategy: steps",
            "save_strategy 'best' needs metric_for_best_model",
        ),
        ("optim_args: fast", "optim_args must be written NAME=VALUE"),
        ("parallelism_config: 3", "parallelism_config can be set in Python only"),
        (
            "base: dpo\nmethod: none\nloss_type: bco_pair\nf_divergence_type: js_divergence",
            "but with discopop, exo_pair",
        ),
        ("weight: column", "weight 'column' needs weight_column"),
        ("fp16: true\nbf16: true", "fp16 and bf16 are both true"),
        ("load_in_8bit: true\nload_in_4bit: true", "can't use 8 bit and 4 bit precision at the same time"),
        ("use_peft: true\ntrain_only: mlp", "train_only and peft_config both choose what trains"),
        ("use_peft: true\nlora_task_type: ALL", "Invalid task type"),
        ("dataset_streaming: true", "max_steps must be set for a data set that is streamed"),
        (
            "datasets: [{path: a}]\nstreaming: true\nmax_steps: 3\neval_strategy: steps",
            "a stream of several sets has no",
        ),
        ("method: geometric-anchor\nanchor_estimator: per-pair\nsam_radius: 0.1", "set only one of them"),
        ("method: geometric-anchor\nanchor_estimator: per-pair\ncpo_alpha: 1", "'per-pair' makes the update"),
        ("lr_scheduler_type: reduce_lr_on_plateau", "reduce_lr_on_plateau requires an eval strategy"),
        ("dataloader_prefetch_factor: 2", "dataloader_prefetch_factor can only be set"),
        ("base: dpo\nprecompute_ref_log_probs: true", "precompute_ref_log_probs=True does not go with"),
        (
            "method: none\nbase: dpo\nprecompute_ref_log_probs: true\nsync_ref_model: true",
            "sync_ref_model=True changes",
        ),
        (
            "method: none\nbase: dpo\nuse_peft: true\nsync_ref_model: true",
            "sync_ref_model=True does not go with use_peft",
        ),
        (
            "method: none\nbase: dpo\nuse_weighting: true\nloss_type: aot",
            "use_weighting=True does not go with loss_type",
        ),
        ("method: none\nbase: dpo\nloss_type: exo_pair", "label_smoothing of loss_type 'exo_pair' must be"),
        ("method: none\nbase: dpo\nloss_type: [sigmoid, hinge]\nloss_weights: [1]", "Got 1 weights for 2 loss types"),
        ("liger_kernel_config: {fused_linear_cross_entropy: true}", "fused_linear_cross_entropy replaces"),
        ("eval_strategy: steps\nmetric_for_best_model: bleu", "unknown metric_for_best_model 'bleu'; known"),
        ("eval_strategy: steps\nmetric_for_best_model: eval_rewards/margin", "mean 'eval_rewards/margins'"),
        ("eval_strategy: steps\nmetric_for_best_model: eval_entropy", "unknown metric_for_best_model 'eval_entropy'"),
        ("beta: 1.0e+300", r"beta must be at most 1,000,000; it is 1e\+300"),
        ("simpo_gamma: -1.0e+300", r"simpo_gamma must be at least -1e\+30; it is -1e\+300"),
        ("use_peft: true\nlora_target_modules: (", r"lora_target_modules pattern '\(' is not a regular expression"),
        ("use_peft: true\nlora_task_type: SEQ_CLS", "task type is 'SEQ_CLS'.*set lora_task_type to CAUSAL_LM"),
        ("label_smoothing_factor: 0.3", "label_smoothing_factor=0.3 .*no preference loss reads"),
        ("torch_compile_mode: weird", "unknown torch_compile_mode 'weird'; known: default, .*max-autotune"),
        ("torch_compile_backend: inducto", "unknown torch_compile_backend 'inducto'.*mean 'inductor'"),
        ("lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 0.1}", "must be smaller than initial lr"),
        ("recipe: a/b", "unknown key 'recipe'"),
        ("max_length: None", "max_length must be a whole number; it is 'None': YAML writes None as null"),
        ("3: a", "unknown key '3'"),
    ],
)
def test_values_that_are_wrong(text, words):
    answer = refused(with_names(text))
    assert re.search(words, answer), answer


# Losses that there are elsewhere


@pytest.mark.parametrize("base", ["cpo", "dpo"])
@pytest.mark.parametrize(
    ("loss", "instead"),
    [
        ("rpo", "Instead, set method: none, base: dpo, loss_type: [sigmoid, sft], loss_weights: [1.0, 1.0]"),
        ("sppo", "Instead, set method: sppo"),
        ("wpo", "Instead, set method: wpo"),
        ("alpha-dpo", "Instead, set method: alpha-dpo"),
        ("bco", "Instead, set method: none, base: dpo, loss_type: bco_pair"),
        ("exo", "Instead, set method: none, base: dpo, loss_type: exo_pair, label_smoothing: 0.001"),
        ("slic", "Instead, set method: slic-hf"),
        ("kto", "KTO on unpaired completions is in trl.KTOTrainer. Instead, set method: kto-pair"),
        ("nonsense", "known: sigmoid, hinge"),
        ("3", "loss_type must be text|loss_type must be a list"),
    ],
)
def test_losses(loss, instead, base):
    answer = refused(with_names(f"method: none\nbase: {base}\nloss_type: {loss}"))
    assert "loss_type" in answer
    assert re.search(instead.replace("[", r"\[").replace("]", r"\]"), answer), answer
    if "Instead, set " in answer:  # and so it trains
        advice = yaml.safe_load("{" + answer.partition("Instead, set ")[2] + "}")
        assert verdicts(as_yaml(NAMED | advice)) == {None}


@pytest.mark.parametrize(("loss", "base", "other"), [("robust", "cpo", "dpo"), ("simpo", "dpo", "cpo")])
def test_a_loss_of_the_other_base(loss, base, other):
    answer = refused(with_names(f"method: none\nbase: {base}\nloss_type: {loss}"))
    assert answer.endswith(f"Instead, set method: none, base: {other}, loss_type: {loss}")


# Empty values


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_an_empty_value_is_unsaid(base):
    """For every option there is."""
    names = sorted({name for part in parse(["--base", base, "--use_cpu"]) for name in vars(part)})
    known = [
        name for name in names if f"--{name}" in _flags(base) and name not in (*NAMED, "recipe", "dry_run", "base")
    ]
    assert len(known) > 200
    text = f"base: {base}\n" + as_yaml(NAMED)
    assert verdicts(text + "".join(f"{name}:\n" for name in known)) == {None}
    Path("plain.yaml").write_text(text)
    plain, empty = (parse(["--config", file]) for file in ("plain.yaml", "c.yaml"))
    assert [vars(part) for part in plain[::2]] == [vars(part) for part in empty[::2]]
    assert {name: str(value) for name, value in plain[1].to_dict().items()} == {
        name: str(value) for name, value in empty[1].to_dict().items()
    }
    assert type(plain[1]).__name__.startswith("GapPO")  # not TRL's own, which `method: none` is


def _flags(base: str) -> set[str]:
    from trl_margins.cli.train import parser_for

    return set(parser_for("gappo", base)._option_string_actions)


def test_null_is_said():
    Path("c.yaml").write_text(with_names("max_length: null\nweight: null"))
    config = parse(["--config", "c.yaml"])[1]
    assert (config.max_length, config.weight) == (None, None)
    Path("c.yaml").write_text(with_names("max_length:\nweight: # nothing"))
    config = parse(["--config", "c.yaml"])[1]
    assert (config.max_length, config.weight) == (1024, "score-gap")


# Files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nseed: 1\nseed: 2", r"the key 'seed' is there twice, first in line 2, in \"c.yaml\", line 3"),
        ("beta: 1\nrun_name: Gr\xfc\xdfe".encode("latin-1"), r"c\.yaml, line 2: byte 0xfc is not UTF-8"),
        ("beta: 1".encode("utf-16"), r"c\.yaml, line 1: byte 0xff is not UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00\x00", r"in \"c\.yaml\", position 0 \(line 1\)"),
        (b"beta: 1\nx: \x00", r"in \"c\.yaml\", position 11 \(line 2\)"),
        ("a: " + "[" * 3000 + "]" * 3000, r"nested more than 50 levels deep, in \"c\.yaml\", line 1"),
        ("[" * 3000, "nested more than 50 levels deep"),
        ("a: " + "{a: " * 3000 + "1" + "}" * 3000, "nested more than 50 levels deep"),
        ("\n".join("  " * i + "a:" for i in range(300)), "nested more than 50 levels deep"),
        ("- a", r"c\.yaml: a config is a YAML mapping from keys to values, not a list"),
        ("nonsense", r"c\.yaml: a config is a YAML mapping from keys to values, not a str"),
        ("beta: 1\n\tseed: 1", r"found character '\\t' .*in \"c\.yaml\", line 2"),
        ("beta: [1", r"in \"c\.yaml\", line 1"),
        ("a: *b", r"found undefined alias 'b'.*in \"c\.yaml\", line 1"),
        ("a: 1\n---\nb: 1", r"expected a single document.*in \"c\.yaml\", line 2"),
        ("? [a]\n: 1", r"found unhashable key.*in \"c\.yaml\", line 1"),
        ("seed: !!python/object/apply:os.getcwd []", r"python/object/apply:os.getcwd.*line 1"),
        ("seed: !!int 3", r"could not determine a constructor for the tag 'tag:yaml.org,2002:int'.*line 1"),
        ("seed: " + "9" * 5000, r"c\.yaml: "),
        ("seed: =", r"in \"c\.yaml\", line 1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_files_that_are_wrong(text, words):
    answer = refused(text)
    assert re.search(words, answer), answer


def test_a_folder_and_a_file_that_is_not_there():
    Path("folder").mkdir()
    for command in COMMANDS:
        assert said(*command, "folder") == "folder is a folder: name the YAML file in it"
        assert said(*command, "missing.yaml") == "there is no YAML file missing.yaml"


def test_an_empty_file_lacks_model_and_data():
    """A file may leave both to the flags, so `convert` does not ask for them."""
    Path("c.yaml").touch()
    assert said("convert", "c.yaml") is None
    for flags in (["train", "--config"], ["train", "--dry_run", "--config"]):
        assert said(*flags, "c.yaml", "--use_cpu") == "--model_name_or_path is missing"
        named = ["--use_cpu", "--model_name_or_path", "x"]
        assert "--dataset_name is missing" in str(said(*flags, "c.yaml", *named))


# Splits


def test_a_file_has_one_split():
    preference_rows(4).to_json("rows.jsonl")
    for text, words in {
        "eval_strategy: steps": r"has the splits \['train'\], not 'test': .* --dataset_test_split",
        "dataset_train_split: all": r"has the splits \['train'\], not 'all': .* --dataset_train_split",
    }.items():
        assert re.search(words, refused(with_names(f"dataset_name: rows.jsonl\n{text}")))
    for text in ("eval_dataset_name: rows.jsonl", "dataset_test_split: train"):
        Path("c.yaml").write_text(with_names(f"dataset_name: rows.jsonl\neval_strategy: steps\n{text}"))
        assert said("train", "--dry_run", "--config", "c.yaml") is None


def test_a_file_in_place_of_a_recipe_s_data_set():
    """It has neither of UltraFeedback's two splits; one error names both, and what it says works."""
    preference_rows(4).to_json("rows.jsonl")
    given = ("train", "--recipe", "qwen2.5-7b-instruct/gamma-po", "--dataset_name", "rows.jsonl", "--dry_run")
    for found in (said(*given), said(*given[:-1], "--use_cpu", "true")):  # before anything is loaded
        assert str(found) == (
            "data set 'rows.jsonl' has the splits ['train'], not 'train_prefs' and 'test_prefs': name one of them "
            "with --dataset_train_split and --dataset_test_split, or another data set to evaluate on with "
            "--eval_dataset_name; `train` needs none with --eval_strategy no --eval_on_start false"
        )
    found = said(*given, "--eval_strategy", "no", "--eval_on_start", "false")
    assert str(found) == (
        "data set 'rows.jsonl' has the splits ['train'], not 'train_prefs': name one of them with "
        "--dataset_train_split"
    )
    for advice in ("--dataset_test_split train", "--eval_dataset_name rows.jsonl", "--eval_strategy no"):
        assert said(*given, "--dataset_train_split", "train", *advice.split()) is None


def test_a_run_among_its_data(caplog):
    """eval_results.json would be a file of its test split: said where `datasets` looks for data, and only there."""
    rows = preference_rows(4)
    for name in ("data/train", "data/test", "named/a"):
        rows.to_json(f"{name}.jsonl")
    Path("named/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    rows.save_to_disk("saved")
    for text, warns in {
        "dataset_name: data\noutput_dir: data/out": True,
        "dataset_name: rows\neval_dataset_name: data\noutput_dir: data/a/b": True,
        "dataset_name: data\noutput_dir: data-out": False,
        "dataset_name: data\noutput_dir: data/.runs/a": False,
        "dataset_name: named\noutput_dir: named/out": False,
        "dataset_name: saved\noutput_dir: saved/out": False,
    }.items():
        caplog.clear()
        Path("c.yaml").write_text(with_names(text))
        assert said("train", "--dry_run", "--config", "c.yaml") is None
        assert ("lies in a folder of data" in caplog.text) == warns, text


# The settings of another machine


@pytest.mark.parametrize(
    "text", ["tf32: true", "bf16: true", "fp16: true", "deepspeed: zero.json", "tf32: true\nbf16: true"]
)
def test_a_dry_run_looks_at_a_gpu_s_settings_elsewhere(text, capsys):
    """Training says what is missing."""
    Path("c.yaml").write_text(with_names(text).replace("use_cpu: true", "use_cpu: false"))
    assert said("convert", "c.yaml") is None
    capsys.readouterr()
    assert said("train", "--dry_run", "--config", "c.yaml") is None
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {key: value for key, value in yaml.safe_load(text).items() if key in printed} == yaml.safe_load(text)


def test_a_dry_run_keeps_what_the_machine_decides(capsys):
    """Its output is a config: it has the same settings again."""
    Path("c.yaml").write_text(with_names("dataloader_pin_memory: false\ntf32: false"))
    texts = []
    for _ in range(2):
        assert said("train", "--dry_run", "--config", "c.yaml") is None
        texts.append(capsys.readouterr().out)
        Path("c.yaml").write_text(texts[-1])
    assert texts[0] == texts[1]
    assert {"use_cpu: true", "dataloader_pin_memory: false", "tf32: false"} <= set(texts[0].splitlines())


# Flags: the same checks


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed -1", "seed must be a whole number, at least 0 and below 4294967296; it is -1"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size must be a whole number, at least 1; it is 0"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps must be a whole number, at least 1"),
        ("--learning_rate nan", "learning_rate must be a number, at least 0; it is nan"),
        ("--lora_r 0", "lora_r must be a whole number, at least 1; it is 0"),
        ("--use_peft --lora_dropout 1", "lora_dropout must be a number, at least 0 and below 1"),
        ("--max_steps 0", "max_steps must be a whole number, at least 1, or -1; it is 0"),
        ("--report_to wandbb", "unknown report_to 'wandbb'"),
        ("--attn_implementation flash", "unknown attn_implementation 'flash'"),
        ("--noise typo:0.2", "unknown kind of noise 'typo'"),
        ("--loss_type rpo", "unknown loss_type 'rpo'; .*Instead, set method: none, base: dpo"),
        ("--chat_template missing.jinja", "neither a Jinja template nor a file"),
        ("--model_init_kwargs {bad", "model_init_kwargs must be a mapping, or one as JSON"),
        ("--method ''", "unknown method ''"),
    ],
)
def test_flags(flags, words):
    usual = [word for key, value in NAMED.items() for word in (f"--{key}", str(value))]
    answers = {said("train", *dry, *usual, *shlex.split(flags)) for dry in ([], ["--dry_run"])}
    (answer,) = answers
    assert re.search(words, str(answer)), answer


# Recipes

RECIPES = sorted(path for path in recipe_folder().glob("*/*/config_*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_recipe_is_right(path):
    assert len(RECIPES) > 30
    text = re.sub(r"(?m)^dataset_name: .*", "dataset_name: ./no-rows.jsonl", path.read_text())
    assert text.count("./no-rows.jsonl") == 1
    assert verdicts(re.sub(r"(?m)^bf16: true", "bf16: false", text) + "use_cpu: true\n") == {None}
    assert said("convert", str(path)) is None
    assert said("train", "--dry_run", "--config", str(path)) is None


# A method's settings with other terms than the method's


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scored")
    train, test = (preference_rows(8, "conversational", seed=seed) for seed in (0, 1))
    DatasetDict(train=train, train_prefs=train, test=test, test_prefs=test).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes() if recipe.method == "gappo"])
def test_a_gappo_recipe_without_its_weight_is_simpo(name, scored, tiny_model, tmp_path, caplog):
    """The model, the best checkpoint and the card are SimPO's; the losses are those of TRL's own trainer."""
    shared = {
        "model_name_or_path": tiny_model,
        "dataset_name": scored,
        "output_dir": "out",
        "max_steps": 2,
        "max_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_steps": 1,
        "use_peft": False,
        **dict.fromkeys(("use_cpu", "disable_tqdm"), True),
        **dict.fromkeys(("bf16", "gradient_checkpointing"), False),
    }
    argv = ["--recipe", name, "--weight", "none"]
    argv += [word for key, value in shared.items() for word in (f"--{key}", str(value))]
    assert main(["train", *argv, "--dry_run"]) == 0
    assert main(["train", *argv]) == 0
    state = json.loads(Path("out/trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    evaluated = [log for log in state["log_history"] if "eval_loss" in log]
    assert all("eval_pwa" in log and "eval_spearman" in log for log in evaluated)
    assert state["best_metric"] == max(log["eval_pwa"] for log in evaluated)
    assert not any("weights/mean" in log for log in state["log_history"])
    assert "without weight 'score-gap' this is not GapPO" in caplog.text

    card = Path("out/README.md").read_text()
    assert "GapPO:" not in card  # the title of its paper
    assert "s_w" not in card  # nor its formula
    assert "−log σ(r_w − r_l − γ)" in card
    assert f"trl-margins train {shlex.join(argv)}" in card
    assert json.loads(Path("out/margin_run.json").read_text())["method"] is None

    config = parse(argv)[1]
    plain = CPOConfig(
        **quiet(output_dir="plain", max_steps=2, learning_rate=0.01, warmup_steps=0.1, lr_scheduler_type="cosine"),
        **{"loss_type": "simpo", "cpo_alpha": 0.0, "beta": config.beta, "simpo_gamma": config.simpo_gamma},
    )
    if config.train_only is None:
        trainer = CPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_model),
            args=plain,
            train_dataset=load_from_disk(scored)["train_prefs"],
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )
        trainer.train()
        wanted = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "trainer"),
    [
        (["--method", "gappo", "--weight", "none"], "MarginCPOTrainer"),
        (["--method", "gappo", "--weight", "score-gap", "column", "--weight_column", "x"], "GapPOTrainer"),
        (["--method", "gamma-po", "--margin", "amapo", "--base", "dpo"], "MarginDPOTrainer"),
        (["--method", "none", "--weight", "score-gap"], "MarginCPOTrainer"),
        (["--method", "simpo-sam", "--weight", "score-gap"], "SharpnessAwarePOTrainer"),
    ],
)
def test_the_trainer_follows_the_terms(flags, trainer):
    assert trainer_of(parse([*flags, "--use_cpu"])[1]).__name__ == trainer
