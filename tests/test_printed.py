"""What is printed for people to type is typed here, wherever it is printed: `printed.py` finds it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tokenize
from argparse import Action, ArgumentParser
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import accelerate
import datasets
import evaluate
import pandas
import peft
import printed
import pytest
import torch
import transformers
import trl
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import METHODS_AND_BASES, byte_tokenizer, load, preference_rows, quiet
from printed import GAP, PACKAGE, ROOT, Text, everything
from torch.distributed.run import get_args_parser
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames
from trl.experimental import cpo, orpo

import trl_margins
from trl_margins.cli import COMMANDS, compare, main, train
from trl_margins.cli.options import OptionsParser
from trl_margins.cli.other_keys import FOREIGN
from trl_margins.cli.recipes import recipe_path
from trl_margins.data import evaluation_factors, noise, splits
from trl_margins.forward.shared_prompt import shared_token_logps
from trl_margins.trainers import configs

pytestmark = pytest.mark.usefixtures("clean_registry")

FOUND = everything()


def folder_of(text: Text) -> str:
    return str(Path(text.file).parent)


FOLDERS = {folder: list(texts) for folder, texts in groupby(sorted(FOUND, key=folder_of), folder_of)}

# what a subcommand cannot do without
NEEDED = {
    "train": "--model_name_or_path m --dataset_name d --output_dir o --use_cpu true",
    "compare": "--methods simpo gappo --model_name_or_path m --dataset_name d --eval_dataset_name e --use_cpu true",
    "evaluate": "--model_name_or_path m --dataset_name d",
    "generate": "--model_name_or_path m --dataset_name d --out o.jsonl",
    "select": "--model_name_or_path m --dataset_name d --output_dir o",
    "anchors": "--checkpoints m --dataset_name d --output_dir o",
    "hessian": "--model_name_or_path m --dataset_name d",
    "inspect": "--dataset_name d",
    "score": "--dataset_name d",
    "pairs": "--dataset_name d --out o",
    "convert": "file.yaml",
    "report": "out",
    "completion": "bash",
}
# what stands for something of the reader's: flag, or the word → what is given instead
INSTEAD = {
    "recipe": "qwen2.5-0.5b-instruct/gappo",
    "config": str(recipe_path("qwen2.5-0.5b-instruct/gappo/mlp")),
    "method": "gamma-po",
    "methods": "gappo",
    "noise": "random:0.2",
    "length:RATE": "length:0.2",
    "for": "mt-bench",
    "benchmark": "mt-bench",
    "FOLDER": "folder",
    "FILE": "file",
    "NAME": "name",
}
# who can print the strings of a room or of a file in it, beside the commands that the string names
SAID_BY = {
    **dict.fromkeys(("rows/lists", "rows/list_forms", "rows/ratings"), ("pairs", "evaluate", "inspect")),
    "data/pairing": ("pairs",),
    "rows/scores": ("train", "evaluate", "select", "inspect"),
    **dict.fromkeys(("evaluation/drift", "evaluation/vocabularies"), ("evaluate",)),
    **dict.fromkeys(("cli/cases", "cli/evaluate_options", "cli/measured"), ("evaluate",)),
    "data/loading": ("evaluate", "select", "inspect", "score"),  # `train` names its own flags
    "rows/prompts": ("generate",),
    "rows": ("train", "evaluate", "select", "inspect", "score"),
    "data": ("train", "evaluate", "select", "inspect", "score"),
    "trainers": ("train",),
    "probes": ("train",),
    "generation": ("generate",),
    "generation/reward_model": ("score",),
}
_LAUNCHERS = (launch_command_parser(), get_args_parser())
OPTIONS_OF_OTHERS = {name for launcher in _LAUNCHERS for name in vars(launcher.parse_args(["script.py"]))}
OPTIONS_OF_OTHERS |= {"reference_outputs", "fn_metric", "sort_by", "annotators_config"}  # alpaca_eval's
# words behind "trl-margins" that are no commands
_PROSE = {"from", "has", "needs"}


class _BuiltError(Exception):
    """Carries a subcommand's parser out of it."""


@cache
def parser_of(command: str, method: str | None = "gappo", base: str = "cpo") -> ArgumentParser:
    if command == "train":
        return train.parser_for(method, base)
    if command == "compare":
        return compare.parser()

    def carried(self: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        raise _BuiltError(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OptionsParser, "parse", carried)
        patch.setattr(ArgumentParser, "parse_args", carried)
        with pytest.raises(_BuiltError) as built:
            importlib.import_module(f"trl_margins.cli.{command}").main([])
    return built.value.args[0]


def action_of(command: str, flag: str) -> Action | None:
    bases = ("cpo", "dpo") if command == "train" else ("",)
    parsers = [parser_of(command, "gappo", base) if base else parser_of(command) for base in bases]
    if command == "compare":  # all others are train's
        parsers += [parser_of("train", "gappo", base) for base in ("cpo", "dpo")]
    return next((found for parser in parsers if (found := parser._option_string_actions.get(f"--{flag}"))), None)


def parse(words: list[str]) -> Any:
    """What a subcommand's own parser makes of them, after what it needs."""
    command, *rest = words
    given = {word.partition("=")[0] for word in rest}
    needed = re.split(r" (?=--)", NEEDED.get(command, ""))
    arguments = [*(word for each in needed if each.split(" ")[0] not in given for word in each.split()), *rest]
    if command == "compare":
        return compare.plan(arguments)
    if command == "train":
        if {"--config", "--recipe"} & given:
            arguments += ["--dry_run"]
        return train.parse(arguments)
    parser = parser_of(command)
    return parser.parse(arguments) if isinstance(parser, OptionsParser) else parser.parse_args(arguments)


def filled(command: str, flags: list[tuple[str, str | None]]) -> list[str]:
    """Words of a command, with a value for each flag that needs one."""
    words = [command]
    for flag, value in flags:
        action = action_of(command, flag)
        values = [] if value in (None, GAP) else shlex.split(value)
        if not values and action is not None and action.nargs not in (0, "?"):
            values = [INSTEAD.get(flag, example(action))]
        words += [f"--{flag}", *(INSTEAD.get(flag if word.isupper() else word, word) for word in values)]
    return words


def example(action: Action) -> str:
    """Something that an option takes."""
    if action.choices:
        return str(next(iter(action.choices)))
    return {int: "1", float: "0.5"}.get(action.type, "x")  # type: ignore[call-overload, no-any-return]


def commands_near(text: Text) -> tuple[str, ...]:
    """The commands that a text's flags are for: those of its file, or that it names."""
    folder, _, name = text.file.removeprefix("trl_margins/").partition("/")
    named = [command for command in COMMANDS if re.search(rf"trl-margins {command}\b", text.text)]
    if text.file.startswith("trl_margins/"):
        own = re.sub("_(settings|runs)$", "", Path(name).stem) if folder == "cli" else ""
        room = SAID_BY.get(f"{folder}/{Path(name).stem}") or SAID_BY.get(folder, ("train",))
        return tuple(named) or ((own,) if own in COMMANDS else room)
    if text.file.startswith("recipes/"):
        return ("train",)
    return ()


def problems_in(folder: str, check: Any, files: str = "") -> list[str]:
    """What a check says of each text of a folder, in files whose names match."""
    here = [text for text in FOLDERS[folder] if re.search(files, text.file)]
    return [f"{text.where}: {problem}" for text in here for problem in check(text)]


# Where fields with a value that belong to no config are arguments
CALLED: dict[str, Any] = {
    "device_map": transformers.AutoModelForCausalLM.from_pretrained,
    "columns": splits.generalization_splits,
    "encoder": evaluation_factors.add_evaluation_factor,
    "held_out": splits.generalization_splits,
    "lines": pandas.DataFrame.to_json,
    "orient": pandas.DataFrame.to_json,
    "overwrite": evaluation_factors.add_evaluation_factor,
    "tokenize": transformers.PreTrainedTokenizerBase.apply_chat_template,
    "is_trainable": peft.PeftModel.from_pretrained,
    "errors": str.encode,
    "weights_only": torch.load,
    "optimizers": transformers.Trainer,
    "metadata": dataclasses.field,
    "use_reentrant": torch.utils.checkpoint.checkpoint,
    "dispatch_batches": AcceleratorConfig,
    "even_batches": AcceleratorConfig,
    "seed": noise.flip_labels,
    "statistics": shared_token_logps,
    "split": datasets.load_dataset,
    "per_pair": trl_margins.Link,
    "needs_reference": trl_margins.Link,
    "is_decoder": transformers.BertConfig,
    "method": configs.MarginCPOConfig.__init_subclass__,
    "predictions": evaluate.EvaluationModule.compute,
    "references": evaluate.EvaluationModule.compute,
}
# What a field's value needs beside it
BESIDE: dict[str, dict[str, Any]] = {
    "weight": {"weight_column": "w"},
    "margin": {"margin_column": "m", "margin_column_unit": "reward"},
}
BESIDE_VALUE: dict[Any, dict[str, Any]] = {
    "hard": {"score_gap_threshold": 1},
    "log-ratio": {"base": "dpo"},
    "mean-log-ratio": {"base": "dpo"},
}
SAID_TO_FAIL = {"method: null"}  # the page says that this is an error
REMOVED = {("anchor_estimator", '"directional"'), ("gamma_po_steps", "0")}  # the changelog says that they are
OTHERS_CLASSES = {"SimPOConfig", "SimPOTrainer", "SomeConfig"}  # the page on migration has them, and an example
MODULES = (trl_margins, configs, trl, cpo, orpo, transformers, peft, torch, datasets, accelerate)


# Commands and flags


def wrong_commands(text: Text) -> Iterator[str]:
    for command, *rest in printed.commands(text):
        if command not in COMMANDS:
            if text.is_code or command not in _PROSE:
                yield f"there is no command {command!r}"
            continue
        flags = printed.flags(Text("", 0, " ".join(rest)))
        if unknown := [flag for flag, _ in flags if action_of(command, flag) is None]:
            yield f"trl-margins {command} has no {unknown}"
            continue
        try:
            parse(filled(command, flags))
        except (SystemExit, Exception) as error:
            if error.args != (0,):  # what `--help_all` ends with
                yield f"trl-margins {command} {' '.join(rest)}: {error!r}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_commands(folder):
    """Each is known, has the flags, and its parser takes the values."""
    assert problems_in(folder, wrong_commands) == []


def wrong_flags(text: Text) -> Iterator[str]:
    flags = [(flag, value) for flag, value in printed.flags(text) if flag not in ("help", "version")]
    if (
        not flags
        or text.file.startswith("benchmarks/")
        or text.text.startswith(("make ", "pip ", "accelerate launch"))
    ):
        return
    near = commands_near(text)
    named = [command for command in COMMANDS if re.search(rf"\b{command}\b", text.around)]
    tried = near or (*dict.fromkeys([*named, *COMMANDS]),)
    problems = []
    for command in tried:
        unknown = [flag for flag, _ in flags if action_of(command, flag) is None]
        if unknown:
            problems.append(f"trl-margins {command} has no {unknown}")
            continue
        with_values = [each for each in flags if each[1] is not None]
        together = [flags] if text.is_code and with_values else [[each] for each in with_values]
        try:
            for words in together:
                parse(filled(command, words))
        except (SystemExit, Exception) as error:
            try:  # in prose they are one way, or several
                parse(filled(command, with_values))
            except (SystemExit, Exception):
                problems.append(f"{command}: {error!r}")
                continue
        if not near:  # one command that takes them will do
            return
    others = {flag for flag, _ in flags} - OPTIONS_OF_OTHERS - benchmark_flags()
    if problems and (near or others):
        yield f"{flags}: {problems}"


@cache
def benchmark_flags() -> frozenset[str]:
    sources = "".join(file.read_text() for file in (ROOT / "benchmarks").rglob("*.py"))
    return frozenset(re.findall(r"add_argument\(\s*\"--(\w+)\"", sources))


@pytest.mark.parametrize("folder", FOLDERS)
def test_flags(folder):
    """Each flag of a message is one of every command that can print it; of a page, of the command it is about."""
    assert problems_in(folder, wrong_flags) == []


def test_flags_of_the_benchmarks():
    known = benchmark_flags() | {"nproc_per_node"}  # torchrun's
    texts = [text for text in FOUND if text.file.startswith("benchmarks/")]
    unknown = {name for text in texts for name, _ in printed.flags(text)} - known
    assert {name for name in unknown if not any(action_of(command, name) for command in COMMANDS)} == set()


LAUNCHED = [text for text in FOUND if text.is_code and text.text.startswith("accelerate launch -")]


@pytest.mark.parametrize("text", LAUNCHED, ids=lambda text: text.where)
def test_launches(text, monkeypatch):
    """The launcher's flags are the launcher's, and what it starts has the rest."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(text.text.replace("COMMAND", "train").replace(GAP, ""))
    launch = launch_command_parser().parse_args(words[2:])
    assert (launch.module, launch.training_script) == (True, "trl_margins.cli")
    assert launch.config_file is None or Path(launch.config_file).is_file()
    assert launch.training_script_args[0] in COMMANDS


# Fields with a value, methods, classes


@cache
def config_classes() -> tuple[Any, ...]:
    return tuple(configs.config_class(*each) for each in ((None, "cpo"), (None, "dpo"), *METHODS_AND_BASES))


@cache
def option_fields() -> dict[str, Action]:
    """The fields of all commands, by name."""
    return {action.dest: action for command in COMMANDS for action in parser_of(command)._actions}


def wrong_fields(text: Text) -> Iterator[str]:
    for name, written in printed.fields(text):
        known = [kind for kind in config_classes() if name in kind.__dataclass_fields__]
        if (name, written) in REMOVED or written == f'"{GAP}"':
            continue
        if not known:
            if not (name in option_fields() or is_argument(name, text)):
                yield f"{name}={written}: no config has this field, and nothing that the text names this argument"
            continue
        if GAP in written or (value := literal(written)) is None:
            continue
        errors = []
        for kind in known:
            beside = BESIDE.get(name, {}) if "column" in written else {}
            try:
                kind(**{"output_dir": "o", "bf16": False, "use_cpu": True, **beside, name: value})
                break
            except (ValueError, TypeError) as error:
                errors.append(str(error))
        else:
            if not is_about_the_machine(errors):
                yield f"{name}={written}: {errors[0]}"


def is_argument(name: str, text: Text) -> bool:
    """Of what `CALLED` says."""
    called = CALLED.get(name)
    if called is None:
        return False
    parameters = inspect.signature(called).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def is_about_the_machine(errors: list[str]) -> bool:
    """bf16, fp16 and tf32 are refused without a GPU."""
    return all("GPU" in error or "CUDA" in error or "Ampere" in error for error in errors)


def literal(written: str) -> Any:
    """The value; None for a word that stands for one."""
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return None


@pytest.mark.parametrize("folder", FOLDERS)
def test_fields(folder):
    """Each `name=value` is a field of a config that takes the value, or an argument of something."""
    assert problems_in(folder, wrong_fields, r"(?<!\.jinja)$") == []


@pytest.fixture(scope="module")
def objects(tiny_model, tmp_path_factory) -> dict[str, list[Any]]:
    """What the messages call trainer, model, tokenizer and dataset."""
    rows = preference_rows(4)
    config = trl_margins.GapPOConfig(**quiet(output_dir=str(tmp_path_factory.mktemp("objects"))))
    trainer = trl_margins.GapPOTrainer(load(tiny_model), config, train_dataset=rows, processing_class=byte_tokenizer())
    adapted = peft.get_peft_model(load(tiny_model), peft.LoraConfig(target_modules="all-linear"))
    return {
        "trainer": [trainer],
        "model": [trainer.model, adapted],
        "tokenizer": [byte_tokenizer()],
        "dataset": [rows],
    }


def has(thing: Any, path: str) -> bool:
    for name in path.split(".") if path else ():
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


@pytest.mark.parametrize("folder", FOLDERS)
def test_methods_and_classes(folder, objects):
    """What a text calls of a trainer, a model, a tokenizer or a data set is there; so is every class that it names."""

    def wrong(text: Text) -> Iterator[str]:
        for of, path in printed.methods(text) if text.file != NESTED_KEYS else ():
            if not any(has(each, path) for each in objects[of]):
                yield f"no {of} has {path}"
        for name, path in printed.classes(text) if text.file != "docs/models.md" else ():
            if name not in OTHERS_CLASSES and not any(has(module, f"{name}.{path}".strip(".")) for module in MODULES):
                yield f"there is no {name} {path}"

    assert problems_in(folder, wrong) == []


# Names


@cache
def names_of_the_code() -> frozenset[str]:
    """Every name and every string that is one in the package and in TRL's configs."""
    known: set[str] = {field for kind in (*config_classes(), peft.LoraConfig) for field in kind.__dataclass_fields__}
    known |= inspect.signature(transformers.Trainer).parameters.keys()
    known |= {path.name for path in PACKAGE.rglob("*")} | {path.stem for path in PACKAGE.rglob("*")}
    for file in PACKAGE.rglob("*.py"):
        with open(file, "rb") as source:
            known |= {token.string for token in tokenize.tokenize(source.readline) if token.type == tokenize.NAME}
        known |= {text.text for text in printed.of_strings(file) if text.text.isidentifier()}
    return frozenset(known)


# Names of other libraries' options and methods, of the example of a plug-in, of a published set's column, of a metric
# with another prefix, and of what the changelog says is gone
NESTED_KEYS = "trl_margins/cli/dpo_forks.py"  # of other code
_NAMES = {
    "distributed_config",
    "offload_optimizer",
    "set_z3_leaf_modules",
    "aot_eager",
    "deepspeed_moe_layer_cls_names",
    "fsdp_mixed_precision",
    "fsdp_version",
    "set_transform",
    "trl_margins_focal",
    "all_rm_scores",
    "test_pwa",
}
_NAMES |= {
    *("system_prompt", "system_instruction", "sys_prompt"),  # columns of data sets
    *("chosen_probs", "chosen_probs_win", "chosen_probs_lose"),  # columns of SPPO's code
    "answer_logps",
    "eval_loss",
    *trl.ModelConfig.__dataclass_fields__,
    *transformers.TrainerControl.__dataclass_fields__,
    *(name.value for name in OptimizerNames),
}
_NAMES |= {  # of AlpacaEval, Arena-Hard and lm-evaluation-harness
    *("length_controlled_winrate", "win_rate", "avg_length", "openai_completions", "huggingface_local_completions"),
    *("weighted_alpaca_eval_gpt4_turbo", "alpaca_eval_vllm_llama3_70b_fn", "model_list", "acc_norm", "exact_match"),
    *(f"leaderboard_{task}" for task in ("mmlu_pro", "ifeval", "bbh", "gpqa", "musr", "math_hard")),
    *("arc_challenge", "truthfulqa_mc2", "prompt_level_strict_acc"),
}
_NAMES |= {key for keys in FOREIGN.values() for key in keys}  # which are not those of the code


@pytest.mark.parametrize("folder", FOLDERS)
def test_names(folder):
    """A word with an underscore is the name of something, in a message's prose and as code on a page."""

    def wrong(text: Text) -> Iterator[str]:
        if text.text.isidentifier() if text.is_code else " " in text.text:
            words = set(re.findall(r"(?<![\w/.{-])[a-z]{2,}(?:_[a-z0-9]{2,})+(?![\w/.*])", text.text))
            if unknown := words - names_of_the_code() - _NAMES:
                yield f"{sorted(unknown)} in {text.text[:80]!r}"

    assert problems_in(folder, wrong, r"^trl_margins/.*py$|md$") == []


# Programs


@pytest.mark.parametrize("folder", FOLDERS)
def test_other_programs(folder):
    """`make` has the targets, `hf` the commands, and the package the extras."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    _, _, after = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")
    extras = set(re.findall(r"^(\w+) = ", after.partition("\n[")[0], re.MULTILINE))

    def wrong(text: Text) -> Iterator[str]:
        for target in re.findall(r"^make (\w+)" if text.is_code else r"`make (\w+)", text.text):
            if target not in targets:
                yield f"make has no target {target}"
        for named in re.findall(r"trl-margins\[([\w,]+)\]", text.text):
            if unknown := set(named.split(",")) - extras:
                yield f"no extra {unknown}"
        for words in re.findall(r"\bhf ((?:auth )?[a-z]+)\b", text.text):
            if words not in ("auth login", "download", "upload"):
                yield f"hf {words}: look whether it has this, and add it here"

    assert problems_in(folder, wrong) == []


@pytest.mark.parametrize("words", [["auth", "login"], ["download"]])
def test_the_hub_s_own_commands(words):
    subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", *words, "--help"], check=True, capture_output=True)


# Calls and YAML within the lines of a page

CALLS = [
    text
    for text in FOUND
    if text.is_code and re.match(r"(?:trl_margins\.|config_class\(|[A-Z]\w+Config\()", text.text) and "(" in text.text
]
KEYS = [text for text in FOUND if text.is_code and re.fullmatch(r"[a-z]\w+: \S.*", text.text)]
# keys of accelerate's and of other trainers' configuration
OTHERS_KEYS = {"even_batches": AcceleratorConfig}


@pytest.mark.parametrize("text", CALLS, ids=lambda text: text.where)
def test_calls(text, tmp_path, monkeypatch):
    """Each runs as it stands; so do both that stand for two."""
    monkeypatch.chdir(tmp_path)
    namespace = {name: getattr(trl_margins, name) for name in trl_margins.__all__}
    namespace |= {"trl_margins": trl_margins, "dataset": preference_rows(6), "config_class": configs.config_class}
    source = re.sub(r"(Config\()(?!['\"])", r"\1'o', bf16=False, ", text.text).replace(", bf16=False, bf16", ", bf16")
    assert eval(source, namespace) is not None


@pytest.mark.parametrize("text", KEYS, ids=lambda text: text.where)
def test_keys(text, tmp_path):
    """Each goes through `--config`, in the file of another project if it is one of its keys."""
    (name, value), *_ = yaml.safe_load(text.text).items()
    if name in OTHERS_KEYS:
        assert name in inspect.signature(OTHERS_KEYS[name]).parameters
        return
    beside = BESIDE.get(name, {}) if value == "column" else BESIDE_VALUE.get(str(value), {})
    method = {} if name in ("loss_type", "reward") else {"method": "none" if name == "weight" else "gappo"}
    if name == "metric_for_best_model":
        beside = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"output_dir": "o", "dataset_name": "d", **method, **beside, name: value}))
    with pytest.raises(ValueError, match="must be text") if text.text in SAID_TO_FAIL else nullcontext():
        parse(["train", "--config", str(file)])


# Flags of the pages, in a run

# the folder must hold a checkpoint: test_cli.py resumes
_ELSEWHERE = {"resume_from_checkpoint", "model_name_or_path"}
IN_A_RUN = [
    text
    for text in FOUND
    if text.is_code
    and text.file.endswith(".md")
    and re.match(r"--\w+ \S", text.text)
    and all(action_of("train", flag) and flag not in _ELSEWHERE for flag, _ in printed.flags(text))
]


@pytest.fixture(scope="module")
def rows_with_everything(tmp_path_factory) -> str:
    """The columns that the pages name."""
    rows = preference_rows(8)
    rows = rows.add_column("question", [f"{prompt} please " for prompt in rows["prompt"]])
    for name, values in {
        "system": ["be short"] * 8,
        "mine_w": [float(i % 5) for i in range(8)],
        "mine_l": [1.5] * 8,
        "pair_weight": [0.5 + i % 2 for i in range(8)],
        "pair_margin": [0.1 * i for i in range(8)],
    }.items():
        rows = rows.add_column(name, values)
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows.to_json(file)
    return str(file)


@pytest.mark.parametrize("text", IN_A_RUN, ids=lambda text: f"{text.where} {text.text}")
def test_flags_in_a_run(text, tiny_model, rows_with_everything, tmp_path):
    """One step with what a page prints, after what every run needs."""
    given = {"model_name_or_path": tiny_model, "dataset_name": rows_with_everything, "output_dir": tmp_path}
    given |= {**quiet(), "max_steps": 1, "log_pairs": True}
    words = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    trainer = train.build_trainer(*train.parse([*words, *filled("train", printed.flags(text))[1:]]))
    trainer.train()
    assert trainer.state.global_step == 1


# Cards, and what the demo prints

CARDS = {
    "gappo": [],
    "adapter": ["--base", "dpo", "--method", "amapo", "--use_peft", "true", "--lora_target_modules", "all-linear"],
    "combined": ["--method", "none", "--base", "dpo", "--weight", "score-gap", "--margin", "amapo"],
}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A folder with a trained folder for each of `CARDS`."""
    folder = tmp_path_factory.mktemp("cards")
    preference_rows(8, "conversational").to_json(folder / "pairs.jsonl")
    common = quiet(max_steps=2, learning_rate=1e-2, log_pairs=False)
    flags = [str(part) for name, value in common.items() for part in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, own in CARDS.items():
            given = ["--model_name_or_path", tiny_model, "--dataset_name", str(folder / "pairs.jsonl")]
            assert main(["train", *given, *flags, *own, "--output_dir", name]) == 0
    return folder


def blocks_of(card: Path, language: str) -> list[str]:
    return [found["code"] for found in printed.FENCE.finditer(card.read_text()) if found["language"] == language]


@pytest.mark.parametrize("name", CARDS)
def test_a_card_s_quick_start(name, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    (code,) = blocks_of(trained / name / "README.md", "python")
    exec(code, {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", CARDS)
def test_a_card_s_command_trains_the_same_model(name, trained, tmp_path, monkeypatch):
    """Bit for bit, elsewhere."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks_of(trained / name / "README.md", "bash")
    program, *words = shlex.split(code)
    assert program == "trl-margins"
    assert main(words) == 0
    file = "adapter_model.safetensors" if name == "adapter" else "model.safetensors"
    assert (tmp_path / name / file).read_bytes() == (trained / name / file).read_bytes()


def test_how_to_load_the_demo_s_model(trained):
    (code,) = {found[0] for text in FOUND if (found := re.search(r"transformers\.pipeline\(.+?\)", text.text))}
    generate = eval(code.replace(GAP, str(trained / "gappo")), {"transformers": transformers})
    assert generate("say", max_new_tokens=2)


# The finding itself


def found_in(text: str, name: str, folder: Path) -> list[Text]:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    kinds = {".md": printed.of_page, ".py": printed.of_strings, ".yaml": printed.of_comments}
    return list(kinds[file.suffix](file))


@pytest.mark.parametrize(
    ("name", "text", "check"),
    [
        ("a.md", "Run `trl-margins tarin`.", wrong_commands),
        ("a.md", "Run `trl-margins train --bta 2`.", wrong_commands),
        ("a.md", "    trl-margins train --beta much", wrong_commands),
        ("a.md", "With `--score_gap_transform cubic`, for `train`,\nit is so.", wrong_flags),
        ("a.md", "With `--no_such_flag`.", wrong_flags),
        ("a.py", 'raise ValueError(f"{a}: set it with --no_such_flag 3" + b)', wrong_flags),
        ("a.py", "raise ValueError('name it: '\n  f'{x} (--dtype bf15)')", wrong_flags),
        ("a.py", "raise ValueError(f\"use anchor_estimator='directional'\")", wrong_fields),
        ("a.py", "f'{a if b else \"give share_promt=never\"}'", wrong_fields),
        ("a.yaml", "#   --weight score-gap2  Table 1\nmethod: gappo\n", wrong_flags),
        ("a.yaml", "# accelerate launch -m trl_margins.cli \\\n#     train --recpie x\n", wrong_commands),
    ],
)
def test_what_is_wrong_is_found(name, text, check, tmp_path):
    assert [problem for each in found_in(text, name, tmp_path) for problem in check(each)]


def test_what_is_right_is_not(tmp_path):
    right = (
        "Run `trl-margins train --beta 2`, with `--score_gap_transform hard --score_gap_threshold 1` or `beta=2.0`."
    )
    for check in (wrong_commands, wrong_flags, wrong_fields):
        assert [problem for each in found_in(right, "a.md", tmp_path) for problem in check(each)] == []


def test_all_places_are_looked_at():
    """A place in which nothing is found any more is one that is not looked at."""
    places = {text.file.partition("/")[0] for text in FOUND if printed.commands(text)}
    assert {"README.md", "CHANGELOG.md", "SECURITY.md", "docs", "recipes", "trl_margins", "benchmarks"} <= places
    assert len(LAUNCHED) > 20
    assert len(IN_A_RUN) > 10
