"""What is printed for people to type is typed here, wherever it is printed: `printed.py` finds it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import tokenize
from argparse import Action, ArgumentParser
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import datasets
import pandas
import peft
import printed
import pytest
import torch
import transformers
import trl
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import byte_tokenizer, load, preference_rows, quiet
from printed import GAP, PACKAGE, ROOT, Text, everything
from trl.experimental import cpo

import trl_margins
from trl_margins.cli import COMMANDS, main, train
from trl_margins.cli.options import OptionsParser
from trl_margins.cli.recipes import recipe_path, recipes
from trl_margins.data import evaluation_factors, noise, splits
from trl_margins.methods import METHODS
from trl_margins.terms import Term
from trl_margins.trainers import configs

pytestmark = pytest.mark.usefixtures("few_objects_to_collect", "clean_registry")

FOUND = everything()
FILES = sorted({text.file for text in FOUND})

# what a subcommand cannot do without
NEEDED = {
    "train": "--model_name_or_path m --dataset_name d --output_dir o --use_cpu true",
    "evaluate": "--model_name_or_path m --dataset_name d",
    "select": "--model_name_or_path m --dataset_name d --output_dir o",
    "inspect": "--dataset_name d",
    "score": "--dataset_name d",
    "convert": "file.yaml",
    "report": "out",
}
# what stands for something of the reader's: flag, or the word → what is given instead
INSTEAD = {
    "recipe": "qwen2.5-0.5b-instruct/gappo",
    "config": str(recipe_path("qwen2.5-0.5b-instruct/gappo/mlp")),
    "method": "gamma-po",
    "noise": "random:0.2",
    "length:RATE": "length:0.2",
    "FOLDER": "folder",
    "FILE": "file",
    "NAME": "name",
}
# who can print the strings of a room or of a file in it, beside the commands that the string names
SAID_BY = {
    "rows/scores": ("train", "evaluate", "select", "inspect"),
    "data/loading": ("evaluate", "select", "inspect", "score"),  # `train` names its own flags
    "rows": ("train", "evaluate", "select", "inspect", "score"),
    "data": ("train", "evaluate", "select", "inspect", "score"),
    "trainers": ("train",),
    "probes": ("train",),
}
OPTIONS_OF_OTHERS = vars(launch_command_parser().parse_args(["script.py"])).keys()
# words behind "trl-margins" that are no commands
_PROSE = {"from", "has", "needs"}


class _Built(Exception):
    """Carries a subcommand's parser out of it."""


@cache
def parser_of(command: str, method: str | None = "gappo", base: str = "cpo") -> ArgumentParser:
    if command == "train":
        return train.parser_for(method, base)

    def carried(self: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        raise _Built(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OptionsParser, "parse", carried)
        patch.setattr(ArgumentParser, "parse_args", carried)
        with pytest.raises(_Built) as built:
            importlib.import_module(f"trl_margins.cli.{command}").main([])
    return built.value.args[0]


def action_of(command: str, flag: str) -> Action | None:
    bases = ("cpo", "dpo") if command == "train" else ("",)
    parsers = [parser_of(command, "gappo", base) if base else parser_of(command) for base in bases]
    return next((found for parser in parsers if (found := parser._option_string_actions.get(f"--{flag}"))), None)


def parse(words: list[str]) -> Any:
    """What a subcommand's own parser makes of them, after what it needs."""
    command, *rest = words
    arguments = [*shlex.split(NEEDED.get(command, "")), *rest]
    if command == "train":
        if {"--config", "--recipe"} & {word.partition("=")[0] for word in rest}:
            arguments += ["--dry_run"]
        return train.parse(arguments)
    parser = parser_of(command)
    return parser.parse(arguments) if isinstance(parser, OptionsParser) else parser.parse_args(arguments)


def filled(command: str, flags: list[tuple[str, str | None]]) -> list[str]:
    """Words of a command, with a value for each flag that needs one."""
    words = [command]
    for flag, value in flags:
        action = action_of(command, flag)
        values = [] if value in (None, GAP) else value.split()
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
        own = Path(name).stem if folder == "cli" else ""
        room = SAID_BY.get(f"{folder}/{Path(name).stem}") or SAID_BY.get(folder, ("train",))
        return tuple(named) or ((own,) if own in COMMANDS else room)
    if text.file.startswith("recipes/"):
        return ("train",)
    return ()


def of_file(file: str) -> list[Text]:
    return [text for text in FOUND if text.file == file]


def problems_of(file: str, check: Any) -> list[str]:
    """What a check says of each text."""
    return [f"{text.where}: {problem}" for text in of_file(file) for problem in check(text)]


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
            yield f"trl-margins {command} {' '.join(rest)}: {error!r}"


@pytest.mark.parametrize("file", FILES)
def test_commands(file):
    """Each is known, has the flags, and its parser takes the values."""
    assert problems_of(file, wrong_commands) == []


def wrong_flags(text: Text) -> Iterator[str]:
    flags = [(flag, value) for flag, value in printed.flags(text) if flag not in ("help", "version")]
    if not flags or text.file.startswith("benchmarks/") or text.text.startswith(("make ", "pip ", "accelerate launch")):
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


@pytest.mark.parametrize("file", FILES)
def test_flags(file):
    """Each flag of a message is one of every command that can print it; of a page, of the command it is about."""
    assert problems_of(file, wrong_flags) == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("benchmarks/")])
def test_flags_of_the_benchmarks(file):
    unknown = {name for text in of_file(file) for name, _ in printed.flags(text)} - benchmark_flags()
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
