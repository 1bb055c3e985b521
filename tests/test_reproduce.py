"""`docs/reproduce.md`: it has each table and figure of the papers once, its commands parse and train, measure and draw
what the papers have.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pytest
from conftest import preference_rows, quiet
from matplotlib.image import imread
from test_printed import parse

from trl_margins.cli import compare, main, train
from trl_margins.cli.options import data_first
from trl_margins.report import figures
from trl_margins.report.run_folder import INFO

matplotlib.use("Agg")

ROOT = Path(__file__).parents[1]
PAGE, HH = (ROOT / "docs" / name for name in ("reproduce.md", "hh.md"))

# The papers' own numbers. GAPO's Table H, Figure 1 and Figure A follow from those around them.
NUMBERED = {
    "GapPO": {"Table": "1 2", "Figure": "1 2 3 4 5"},
    "GaPO": {"Table": "1 2 3 4", "Figure": "1 2"},
    "GAPO": {"Table": "1 2 3 A B C D E F G H I", "Figure": "1 2 3 4 5 A B C"},
    "γ-PO": {"Table": "1 2 3 4 5 6 7 8 9 10", "Figure": "1 2 3 4 5 6"},
    "AMaPO": {"Table": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", "Figure": "1 2"},
}
JUDGED = {"alpacaeval-2", "arena-hard", "mt-bench"}
PROGRAMS = ("trl-margins", "lm_eval", "alpaca_eval")


@dataclass(frozen=True)
class Line:
    """A line of the page."""

    paper: str
    name: str
    commands: str
    where: str
    status: str

    def __str__(self) -> str:
        return f"{self.paper}, {self.name}"


def lines_of(text: str) -> list[Line]:
    """The lines of the papers' tables; those of the shared steps have no status."""
    found, paper = [], ""
    for line in text.splitlines():
        paper = line.removeprefix("## ") if line.startswith("## ") else paper
        if paper and line.startswith("| ") and not re.match(r"\|\s*(\||what|step)", line):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 5:
                name, _, commands, where, status = cells
                found.append(Line(paper, name, commands, where, status))
            elif len(cells) == 2:
                found.append(Line(paper, re.sub(r"<.*?>", "", cells[0]), cells[1], "", ""))
    return found


LINES = lines_of(PAGE.read_text())
OF_PAPERS = [line for line in LINES if line.status]
FIGURES = [line for line in OF_PAPERS if line.name.startswith("Figure") and line.status in ("yes", "part")]


def typed(line: Line) -> list[str]:
    """The code that is to be typed."""
    starts = (*PROGRAMS, "train ")
    return [code for code in re.findall(r"`([^`]+)`", line.commands) if code.startswith(starts) or " do " in code]


@cache
def commands_of(line: Line) -> list[list[str]]:
    """The words of each command, as bash makes them of loops and of the page's functions."""
    return commands_in(*typed(line))


def commands_in(*code: str) -> list[list[str]]:
    stand_ins = [f'{name}() {{ printf "%q " {name} "$@"; echo; }}' for name in PROGRAMS]
    listed = f'trl-margins() {{ if [ "$1" = recipes ]; then echo {shlex.quote(recipes())}; else printing "$@"; fi; }}'
    renamed = [stand_ins[0].replace("trl-margins()", "printing()"), listed, *stand_ins[1:]]
    (functions,) = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    shell = "\n".join([*renamed, functions, *code])
    said = subprocess.run(["bash", "-ec", shell], capture_output=True, text=True, check=True)
    assert not said.stderr
    return [shlex.split(words) for words in said.stdout.splitlines()]


@cache
def recipes() -> str:
    """What `trl-margins recipes` prints."""
    with redirect_stdout(StringIO()) as said:
        assert main(["recipes"]) == 0
    return said.getvalue()


@cache
def parsed(command: str, *words: str) -> Any:
    """What the subcommand makes of whole commands, on whatever machine."""
    if command == "train":
        return train.parse([*words, "--dry_run"])
    if command == "compare":
        return compare.plan([*words, "--dry_run", "--use_cpu", "true", "--bf16", "false"])
    return parse([command, *(data_first(words) if command in ("inspect", "score", "pairs") else words)])


# The page


def test_every_table_and_figure_is_there_once():
    expected = [
        (paper, f"{kind} {number}")
        for paper, kinds in NUMBERED.items()
        for kind, numbers in kinds.items()
        for number in numbers.split()
    ]
    assert [(line.paper, line.name) for line in OF_PAPERS] == expected


def test_the_counts_are_those_of_the_lines():
    (said,) = re.findall(r"^Of (.*?)\n\n", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    total, *counts = map(int, re.findall(r"\d+", said))
    statuses = re.findall(r"\*\*(\w+)\*\*", said)
    assert statuses == re.findall(r"^\| \*\*(\w+)\*\* \|", PAGE.read_text(), re.MULTILINE)
    assert dict(zip(statuses, counts, strict=True)) == Counter(line.status for line in OF_PAPERS)
    assert total == len(OF_PAPERS)


@pytest.mark.parametrize("line", OF_PAPERS, ids=str)
def test_a_line_says_how(line):
    """By commands or those of another line; a judge is named where there is one, and nowhere else."""
    steps = set(re.findall(r"\]\(#([\w-]+)\)", line.commands))
    assert steps <= set(re.findall(r'<a id="([\w-]+)">', PAGE.read_text()))
    others = {(line.paper, name) for name in re.findall(r"(?:Table|Figure) \w+", line.commands)}
    for first, last in re.findall(r"Tables (\w+) and (\w+)", line.commands):
        others |= {(line.paper, f"Table {first}"), (line.paper, f"Table {last}")}
    assert others - {(line.paper, line.name)} <= {(each.paper, each.name) for each in OF_PAPERS}
    if line.status in ("yes", "judge", "part"):
        assert commands_of(line) or any(
            commands_of(each) for each in OF_PAPERS if (each.paper, each.name) in others and each != line
        )
    assert (line.status == "judge") <= bool(steps & JUDGED)
    assert bool(steps & JUDGED) <= (line.status in ("judge", "part"))
    assert line.where


@pytest.mark.rehearsal
@pytest.mark.parametrize("line", LINES, ids=str)
def test_commands_parse(line, monkeypatch):
    """By the parsers of the subcommands, every turn of a loop."""
    monkeypatch.chdir(ROOT)
    for program, *words in commands_of(line):
        if program == "trl-margins":
            parsed(*words)


# What the papers have


MODELS = {
    "princeton-nlp/Llama-3-Base-8B-SFT": "llama-3-8b-base",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3-8b-instruct",
    "alignment-handbook/zephyr-7b-sft-full": "mistral-7b-base",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral-7b-instruct",
    "google/gemma-2-9b-it": "gemma-2-9b-it",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b-instruct",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b-instruct",
    "google/gemma-2-2b-it": "gemma-2-2b-it",
}
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
# GapPO, GaPO and γ-PO: section 4.1; AMaPO: 5.1; GAPO: B.1. γ-PO's Mistral: its published configuration
DATA = {
    **{("GapPO", model): ULTRAFEEDBACK for model in MODELS.values()},
    ("GaPO", "llama-3-8b-instruct"): "princeton-nlp/llama3-ultrafeedback-armorm",
    **{(paper, "llama-3-8b-base"): ULTRAFEEDBACK for paper in ("GAPO", "AMaPO")},
    ("AMaPO", "mistral-7b-base"): ULTRAFEEDBACK,
    **{(paper, "llama-3-8b-instruct"): "princeton-nlp/llama3-ultrafeedback" for paper in ("GAPO", "AMaPO")},
    **{
        (paper, "mistral-7b-instruct"): "princeton-nlp/mistral-instruct-ultrafeedback"
        for paper in ("GAPO", "γ-PO", "AMaPO")
    },
    **{(paper, "gemma-2-9b-it"): "princeton-nlp/gemma2-ultrafeedback-armorm" for paper in ("GAPO", "γ-PO")},
    ("γ-PO", "llama-3-8b-instruct"): "princeton-nlp/llama3-ultrafeedback-armorm",
    ("γ-PO", "qwen2.5-7b-instruct"): "qwen-pairs.jsonl.gz",
}
_GAPPO = ("cpo ipo-sum simpo alphapo-token gappo", "qwen2.5-0.5b-instruct gemma-2-2b-it mistral-7b-instruct")
_GAPO = "mistral-7b-instruct llama-3-8b-base llama-3-8b-instruct gemma-2-9b-it"
_GAMMA = "llama-3-8b-instruct mistral-7b-instruct gemma-2-9b-it qwen2.5-7b-instruct"
_AMAPO = "mistral-7b-base llama-3-8b-base mistral-7b-instruct llama-3-8b-instruct"
_LLAMAS = "llama-3-8b-base llama-3-8b-instruct"
_AMAPO_2 = "dpo slic-hf ipo kto-pair cpo simpo alpha-dpo amapo"
# Line → its rows and models, copied from the papers; SFT is below
TRAINED = {
    "GapPO, Table 1": _GAPPO,
    "GapPO, Table 2": ("gappo", "gemma-2-2b-it"),
    "GaPO, Table 2": ("rrhf slic-hf dpo ipo cpo kto-pair orpo r-dpo simpo gap-aware", "llama-3-8b-instruct"),
    "GaPO, Table 3": ("dpo simpo gap-aware", "llama-3-8b-instruct"),
    "GaPO, Table 4": ("dpo simpo gap-aware", "llama-3-8b-instruct"),
    "GAPO, Table 1": ("dpo ipo cpo kto-pair orpo r-dpo simpo alpha-dpo geometric-anchor", _GAPO),
    "GAPO, Table 2": ("dpo r-dpo simpo alpha-dpo geometric-anchor", "mistral-7b-instruct llama-3-8b-base"),
    "GAPO, Table 3": ("simpo gradient-norm geometric-anchor", "mistral-7b-instruct"),
    "GAPO, Table C": ("simpo", "llama-3-8b-base"),
    "GAPO, Table D": ("simpo", "llama-3-8b-base"),
    "GAPO, Table E": ("geometric-anchor", "mistral-7b-instruct llama-3-8b-base"),
    "GAPO, Table F": ("geometric-anchor", "mistral-7b-instruct"),
    "GAPO, Table G": ("geometric-anchor", "llama-3-8b-base"),
    "GAPO, Table H": ("simpo simpo-sam geometric-anchor", "mistral-7b-instruct"),
    "GAPO, Figure 5": ("simpo geometric-anchor", "mistral-7b-instruct"),
    "γ-PO, Table 2": ("ipo kto-pair cpo orpo r-dpo robust-dpo dpo beta-dpo simpo gamma-po", _GAMMA),
    "γ-PO, Table 3": ("dpo robust-dpo beta-dpo gamma-dpo simpo rsimpo beta-simpo gamma-po", _GAMMA),
    "γ-PO, Table 4": ("simpo rsimpo beta-simpo gamma-po", "mistral-7b-instruct"),
    "γ-PO, Table 5": ("dpo gamma-dpo simpo gamma-po", _GAMMA),
    "γ-PO, Table 10": ("ipo kto-pair cpo orpo r-dpo dpo beta-dpo simpo gamma-dpo gamma-po", _GAMMA),
    "γ-PO, Figure 2": ("simpo", "mistral-7b-instruct"),
    "γ-PO, Figure 4": ("simpo rsimpo beta-simpo gamma-po", "mistral-7b-instruct"),
    "γ-PO, Figure 6": ("gamma-po", "gemma-2-9b-it"),
    "AMaPO, Table 2": (_AMAPO_2, _AMAPO),
    "AMaPO, Table 5": ("dpo simpo amapo", _LLAMAS),
    "AMaPO, Table 8": ("dpo slic-hf ipo kto-pair cpo simpo amapo", _AMAPO),
    "AMaPO, Table 11": ("amapo", "llama-3-8b-base"),
    "AMaPO, Table 12": ("amapo", _LLAMAS),
    "AMaPO, Table 13": (_AMAPO_2, _AMAPO),
    "AMaPO, Figure 1": ("amapo", "llama-3-8b-base"),
}
# Line → what its commands measure, answer with or draw
READ = {
    "GapPO, Figure 4": (_GAPPO[0], "qwen2.5-0.5b-instruct"),
    "GapPO, Figure 5": (_GAPPO[0], "mistral-7b-instruct"),
    "GAPO, Table D": ("simpo", "llama-3-8b-base"),
    "GAPO, Table I": ("dpo simpo geometric-anchor", "mistral-7b-instruct"),
    "γ-PO, Table 8": ("dpo gamma-po", "gemma-2-9b-it"),
    "γ-PO, Figure 5": ("gamma-po", _GAMMA),
    "AMaPO, Table 3": ("dpo simpo alpha-dpo amapo", _AMAPO),
    "AMaPO, Table 4": ("dpo simpo amapo", _AMAPO),
    "AMaPO, Table 10": ("dpo simpo alpha-dpo amapo", _AMAPO),
    "AMaPO, Table 11": ("amapo", "llama-3-8b-base"),
    "AMaPO, Table 14": ("simpo amapo", "llama-3-8b-instruct"),
    "AMaPO, Table 15": ("simpo amapo", "llama-3-8b-instruct"),
    "AMaPO, Figure 2": ("start dpo simpo", "llama-3-8b-base"),
}
# Line → what its columns are judged by
JUDGES = {
    "GaPO, Table 2": "alpacaeval-2 arena-hard mt-bench",
    "GaPO, Table 3": "alpacaeval-2 mt-bench",
    "GaPO, Table 4": "alpacaeval-2",
    "GAPO, Table 1": "alpacaeval-2 arena-hard",
    "GAPO, Table 2": "alpacaeval-2 lm-eval",
    "GAPO, Table 3": "alpacaeval-2 lm-eval",
    "GAPO, Table C": "alpacaeval-2 lm-eval",
    "GAPO, Table E": "alpacaeval-2",
    "GAPO, Table F": "alpacaeval-2 lm-eval",
    "GAPO, Table G": "alpacaeval-2",
    "GAPO, Table H": "alpacaeval-2 arena-hard lm-eval",
    "γ-PO, Table 2": "alpacaeval-2 arena-hard",
    "γ-PO, Table 3": "alpacaeval-2 arena-hard",
    "γ-PO, Table 4": "alpacaeval-2 arena-hard",
    "γ-PO, Table 10": "mt-bench",
    "γ-PO, Figure 4": "alpacaeval-2 arena-hard",
    "γ-PO, Figure 6": "alpacaeval-2 arena-hard",
    "AMaPO, Table 2": "alpacaeval-2 mt-bench",
    "AMaPO, Table 5": "alpacaeval-2 mt-bench",
    "AMaPO, Table 11": "alpacaeval-2",
    "AMaPO, Table 12": "alpacaeval-2",
    "AMaPO, Table 13": "alpacaeval-2",
}
WITH_SFT = {
    *("GaPO, Table 2", "GaPO, Table 3", "GAPO, Table 1", "γ-PO, Table 2", "γ-PO, Table 10"),
    *("AMaPO, Table 2", "AMaPO, Table 13"),
}
# Line → a setting and its values
SWEPT = {
    "GaPO, Table 3": (
        "gap_aware_metric",
        {"jaccard", "rouge1", "rouge2", "rougeL", "bertscore_precision", "bertscore_recall", "bertscore_f1"},
    ),
    "GaPO, Table 4": ("gap_aware_mapping", {"linear", "square", "sqrt", "log"}),
    "GAPO, Table E": ("anchor_radius", {0.025, 0.05, 0.075, 0.1}),
    "GAPO, Table F": ("anchor_batch_multiplier", {1, 4, 8, 16}),
    "GAPO, Table G": ("anchor_scope", {("lm-head",), None}),
    "GapPO, Table 2": ("score_gap_normalize", {False, True}),
    "γ-PO, Table 4": ("noise", {"random:0.1", "random:0.2"}),
    "AMaPO, Table 11": ("amapo_estimation_size", {16, 32, 64}),
}


class Trained(NamedTuple):
    """A run that a command makes."""

    folder: str
    method: str
    model: str
    settings: dict[str, Any]


@cache
def trained(line: Line) -> list[Trained]:
    """The runs of a line's own commands, but for those that only show their settings."""
    made = []
    for program, *words in commands_of(line):
        if program != "trl-margins" or words[0] not in ("train", "compare") or "--dry_run" in words:
            continue
        found = parsed(*words)
        if words[0] == "compare":
            comparison, _ = found
            (seed,) = comparison.seeds
            each = [
                comparison.run(entry, seed, rate)
                for entry in comparison.entries
                for rate in comparison.rates_of(entry)
            ]
            runs = [(str(run.folder), run.entry.run) for run in each]
        else:
            runs = [(found[1].output_dir, found)]
        for folder, (script, config, model, _) in runs:
            method = "gamma-dpo" if (script.method, script.base) == ("gamma-po", "dpo") else script.method
            name = MODELS.get(model.model_name_or_path, model.model_name_or_path)
            made.append(Trained(folder, method, name, {**vars(config), **vars(script)}))
    return made


def referred(line: Line) -> list[Line]:
    """The line, and those of its paper that its commands refer to."""
    numbers = set(re.findall(r"(?:Table|Figure) \w+", line.commands))
    for first, last in re.findall(r"Tables (\w+) and (\w+)", line.commands):
        numbers |= {f"Table {first}", f"Table {last}"}
    others = [each for each in OF_PAPERS if each.paper == line.paper and each.name in numbers and each != line]
    return [line, *(deeper for each in others for deeper in referred(each))]


def read(line: Line) -> list[str]:
    """The runs and models that a line's commands read."""
    found: list[str] = []
    for program, *words in commands_of(line):
        flags = {"evaluate": "model_name_or_path", "generate": "model_name_or_path", "hessian": "model_name_or_path"}
        flags |= {"anchors": "checkpoints", "report": "report"}
        if program == "trl-margins" and words[0] in flags:
            flag = flags[words[0]]
            start = words.index(f"--{flag}" if flag != "report" else "report") + 1
            end = next((i for i, word in enumerate(words) if i >= start and word.startswith("--")), len(words))
            found += words[start:end]
    return found


def named(table: tuple[str, str]) -> set[tuple[str, str]]:
    methods, models = table
    return {*product(methods.split(), models.split())}


def lines_named(names: Any) -> list[Line]:
    chosen = [line for line in OF_PAPERS if str(line) in names]
    assert len(chosen) == len(names)
    return chosen


@pytest.mark.parametrize("line", lines_named(TRAINED), ids=str)
def test_each_method_of_a_table_is_trained_on_each_model(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = referred(line)
    found = {(run.method, run.model) for each in lines for run in trained(each)}
    assert named(TRAINED[str(line)]) - found == set()
    if lines == [line]:
        assert found == named(TRAINED[str(line)])


def test_all_that_train_are_checked():
    """But for runs at another size, or with a method that is looked into."""
    text = {str(line) for line in OF_PAPERS if line.status == "text"}
    others = {"GapPO, Figure 3", "GAPO, Table B", "GAPO, Figure 3", "GAPO, Figure 4"}
    assert {str(line) for line in OF_PAPERS if trained(line)} - text - others <= set(TRAINED)


@pytest.mark.parametrize("line", [line for line in OF_PAPERS if "train" in line.commands], ids=str)
def test_runs_have_the_papers_data(line):
    own = {
        str(Path("subsets", f"{part}-{size}.jsonl"))
        for part in ("stable", "random", "unstable")
        for size in (30, 50, 70)
    }
    expected = {"GAPO, Table C": own, "GAPO, Table D": own, "γ-PO, Figure 2": {ULTRAFEEDBACK}}
    for run in trained(line):
        if run.model != "data/pythia-2.8b-sft" and str(line) != "γ-PO, Table 5":
            one = {DATA[line.paper, run.model]} if str(line) not in expected else expected[str(line)]
            assert run.settings["dataset_name"] in one, run.folder


@pytest.mark.parametrize("line", lines_named(READ), ids=str)
def test_each_run_is_measured_or_drawn(line):
    made = {
        run.folder: (run.method, run.model) for each in OF_PAPERS if each.paper == line.paper for run in trained(each)
    }
    made |= {name: ("start", model) for name, model in MODELS.items()}
    found = {made[folder] for each in referred(line) for folder in read(each)}
    assert named(READ[str(line)]) - found == set()
    assert {made[folder] for folder in read(line)} <= named(READ[str(line)])


@pytest.mark.parametrize("paper", NUMBERED)
def test_what_is_read_is_made_by_the_same_paper(paper):
    """Runs, and the model before training, which `hh.md` makes of Pythia."""
    lines = [line for line in OF_PAPERS if line.paper == paper]
    made = {run.folder for line in lines for run in trained(line)} | {*MODELS, "data/pythia-2.8b-sft"}
    assert {folder for line in lines for folder in read(line)} - made == set()


def test_no_run_is_another_one():
    """Two commands that train into one folder are the same command, but for its options' order."""
    made: dict[tuple[str, str], Any] = {}
    for line in OF_PAPERS:
        for run in trained(line):
            settings = {name: str(value) for name, value in run.settings.items() if name not in ("recipe", "dry_run")}
            assert made.setdefault((line.paper, run.folder), settings) == settings, f"{line}: {run.folder}"


@pytest.mark.parametrize("line", lines_named(SWEPT), ids=str)
def test_each_value_of_a_table_is_trained(line):
    name, values = SWEPT[str(line)]
    found = [run.settings[name] for run in trained(line)]
    assert {tuple(value) if isinstance(value, list) else value for value in found} == values


@pytest.mark.parametrize("line", lines_named(JUDGES), ids=str)
def test_each_column_of_a_table_has_its_benchmark(line):
    assert set(re.findall(r"\]\(#([\w-]+)\)", line.commands)) - {"sft"} == set(JUDGES[str(line)].split())


def test_rows_of_the_model_before_training():
    assert {str(line) for line in OF_PAPERS if "(#sft)" in line.commands} == WITH_SFT
    (step,) = (line for line in LINES if line.name == "The rows SFT")
    benchmarks = {"alpaca-eval", "arena-hard", "mt-bench"}
    found = {
        (words[words.index("--for") + 1], words[words.index("--model_name_or_path") + 1])
        for words in commands_of(step)
    }
    large = {name for name, model in MODELS.items() if model not in ("qwen2.5-0.5b-instruct", "gemma-2-2b-it")}
    assert found == {*product(benchmarks, large)}


@pytest.mark.parametrize("model", [*_GAPO.split(), "mistral-7b-base"])
def test_a_model_of_another_recipe_has_what_its_own_recipes_have(model):
    """Beside a baseline's own settings: the whole of SimPO's recipe but for β, margin and learning rate."""
    (words,) = commands_in(f"trl-margins train --recipe llama-3-8b-instruct/simpo $(own {model})")
    settings = []
    for each in (words[1:], ["train", "--recipe", f"{model}/simpo"]):
        script, config, model_args, _ = parsed(*each)
        settings.append(
            {name: str(value) for part in (script, config, model_args) for name, value in vars(part).items()}
        )
    differ = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert differ <= {"recipe", "output_dir", "beta", "gamma_beta_ratio", "simpo_gamma", "learning_rate"}


# The pictures


# Line → the files that its commands draw
DRAWN = {
    "GapPO, Figure 1": ["figures-1-2-gradient-mass.png", "figure-1/gradient_mass.png"],
    "GapPO, Figure 2": ["figures-1-2-gradient-mass.png"],
    "GapPO, Figure 3": ["collapse/report/ranking.png"],
    "GapPO, Figure 4": ["figure-4/ranking.png"],
    "GapPO, Figure 5": ["figure-5/mlp/ranking.png", "figure-5/full/ranking.png"],
    "GaPO, Figure 1": ["gapo-figure-1/logps.png"],
    "GaPO, Figure 2": ["gapo-figure-2-evaluation-factors.png"],
    "GAPO, Figure 2": ["figure-2-random.png", "figure-2-length.png"],
    "GAPO, Figure 3": ["gapo-figure-3/anchors.png"],
    "GAPO, Figure 4": ["gapo-figure-4/anchor_ranking.png"],
    "GAPO, Figure B": ["gapo-figure-b/gradient_norm.png", "gapo-figure-b/loss.png"],
    "GAPO, Figure C": ["gapo-figure-c/gradient_norm.png"],
    "γ-PO, Figure 2": ["gamma-figure-2/report/reward_gaps.png"],
    "γ-PO, Figure 5": ["gamma-figure-5/margins.png"],
    "AMaPO, Figure 1": ["amapo-figure-1.png", "amapo-figure-1/setting.png"],
    "AMaPO, Figure 2": ["amapo-figure-2.png"],
}
# What draws, and what is added to it so that it takes a second; the last of two equal flags counts
DRAWS = {
    "report": "",
    "inspect": "",
    "evaluate": "--max_length 128 --bootstrap 10",
    "anchors": "--max_length 128 --batch_size 2 --anchor_batch_multiplier 2",
    "compare": "--max_length 128 --max_steps 2 --eval_steps 1 --per_device_train_batch_size 4 "
    "--gradient_accumulation_steps 1 --bf16 false --gradient_checkpointing false --disable_tqdm true "
    "--model_name_or_path tiny --dataset_name pairs.jsonl --dataset_train_split train --eval_dataset_name pairs.jsonl",
}
# What the page names → what stands in for it: a set, the model before training, a run
INSTEAD = {
    r"(HuggingFaceH4|princeton-nlp)/\S*ultrafeedback\S*|Anthropic/hh-rlhf|subsets/\S+": "pairs.jsonl",
    r"princeton-nlp/Llama-3-Base-8B-SFT|data/pythia-2.8b-sft|amapo-beta-1": "tiny",
    r"data/\S+|noisy|amapo-beta-\d": "run",
}
# A file has no splits, and there is no encoder offline
LEFT_OUT = ("--dataset_split", "--encoder")
RUNS = {
    "gappo": "--eval_strategy steps --eval_steps 1 --eval_dataset_name pairs.jsonl",
    "gamma-po": "",
    "geometric-anchor": "--noise random:0.5 --anchor_diagnostics 1 --save_strategy steps --save_steps 2",
}
OF_PAPER = {"GAPO": "geometric-anchor", "γ-PO": "gamma-po"}  # the others: GapPO's


def test_every_figure_is_drawn():
    assert sorted(DRAWN) == sorted(map(str, FIGURES))


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> Path:
    """A folder with the model, the pairs and a run of each method in `RUNS`."""
    folder = tmp_path_factory.mktemp("reproduce")
    shutil.copytree(tiny_model, folder / "tiny")
    preference_rows(16, "conversational").to_json(folder / "pairs.jsonl")
    common = quiet(max_steps=4, learning_rate=1e-2, model_name_or_path="tiny", dataset_name="pairs.jsonl")
    flags = [str(part) for name, value in common.items() for part in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for method, own in RUNS.items():
            assert main(["train", "--method", method, *flags, *own.split(), "--output_dir", method]) == 0
    return folder


@pytest.mark.rehearsal
@pytest.mark.parametrize("line", FIGURES, ids=str)
def test_a_figure_is_drawn_from_a_tiny_run(line, runs, tmp_path, monkeypatch):
    """Its commands as printed, but for training; of a report, the named pictures alone."""
    files = DRAWN[str(line)]
    (tmp_path / "run").symlink_to(runs / OF_PAPER.get(line.paper, "gappo"))
    for name in ("tiny", "pairs.jsonl"):
        (tmp_path / name).symlink_to(runs / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        figures, "PICTURES", [each for each in figures.PICTURES if f"{each.__name__}.png" in map(name_of, files)]
    )
    if "hh.md" in line.commands:
        draw_hh()
    for program, command, *words in commands_of(line):
        if program == "trl-margins" and command in DRAWS:
            assert main([command, *small(command, words), *shlex.split(DRAWS[command])]) == 0
    for name in files:
        pixels = imread(name)
        assert min(pixels.shape[:2]) > 100
        assert len({tuple(pixel) for row in pixels[::5] for pixel in row[::5]}) > 5, f"{name} is blank"


def name_of(file: str) -> str:
    return Path(file).name


def small(command: str, words: list[str]) -> list[str]:
    """The words with what stands in for sets, models and runs; a report has two of its runs."""
    if command == "report":
        named = words[: words.index("--out") if "--out" in words else None]
        for name in named[:2]:
            shutil.copytree("run", name, ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors"))
            if beta := re.search(r"-beta-(\d)$", name):
                info = json.loads(Path(name, INFO).read_text())
                info["config"]["beta"] = float(beta[1])
                Path(name, INFO).write_text(json.dumps(info))
        return [*named[:2], *words[len(named) :]]
    given: list[str] = []
    for i, word in enumerate(words):
        instead = next((each for pattern, each in INSTEAD.items() if re.fullmatch(pattern, word)), word)
        left_out = word in LEFT_OUT or words[i - 1] in LEFT_OUT
        twice = instead != word and (given[-1:] == [instead] if instead == "pairs.jsonl" else instead in given)
        given += [instead] * (not left_out and not twice)
    return given


def draw_hh() -> None:
    """The page's own code, on numbers of comparisons."""
    for rate in ("random:0", "random:0.2", "length:0.1", "length:0.4"):
        found = [
            {"method": method, "metrics": {"eval_rewards/accuracies": 0.7 - float(rate[7:]) / (2 + i)}}
            for i, method in enumerate(("dpo", "dr-dpo", "geometric-anchor"))
        ]
        Path("table-b", rate).mkdir(parents=True)
        Path("table-b", rate, "results.json").write_text(json.dumps({"runs": found}))
    (*_, code) = re.findall(r"^```python\n(.*?)^```", HH.read_text(), re.MULTILINE | re.DOTALL)
    exec(code, {})
