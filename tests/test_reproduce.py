"""`docs/reproduce.md`: it has each table and figure of the papers once, its commands parse, its pictures are drawn."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest
from conftest import preference_rows, quiet
from matplotlib.image import imread
from test_printed import parse

from trl_margins.cli import main
from trl_margins.cli.options import data_first
from trl_margins.report import figures
from trl_margins.report.run_folder import INFO
from trl_margins.trainers import card

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
    return [code for code in re.findall(r"`([^`]+)`", line.commands) if code.startswith(PROGRAMS) or " do " in code]


def commands_of(line: Line) -> list[list[str]]:
    """The words of each command, as bash makes them of loops."""
    shell = [*(f'{name}() {{ printf "%q " {name} "$@"; echo; }}' for name in PROGRAMS), *typed(line)]
    said = subprocess.run(["bash", "-ec", "\n".join(shell)], capture_output=True, text=True, check=True).stdout
    return [shlex.split(words) for words in said.splitlines()]


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


@pytest.mark.parametrize("line", LINES, ids=str)
def test_commands_parse(line, monkeypatch):
    """By the parsers of the subcommands, every turn of a loop."""
    monkeypatch.chdir(ROOT)
    for program, *words in commands_of(line):
        if program == "trl-margins":
            command, *rest = words
            parse([command, *(data_first(rest) if command in ("inspect", "score", "pairs") else rest)])


# The pictures


# Line → the files that its commands draw
DRAWN = {
    "GapPO, Figure 1": ["figures-1-2-gradient-mass.png", "figure-1/gradient_mass.png"],
    "GapPO, Figure 2": ["figures-1-2-gradient-mass.png"],
    "GapPO, Figure 3": ["collapse/report/ranking.png"],
    "GapPO, Figure 4": ["figure-4/ranking.png"],
    "GapPO, Figure 5": ["figure-5/ranking.png"],
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
    r"(HuggingFaceH4|princeton-nlp)/\S*ultrafeedback\S*|Anthropic/hh-rlhf": "pairs.jsonl",
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
        patch.setattr(card, "pictures", lambda trainer: [])
        for method, own in RUNS.items():
            assert main(["train", "--method", method, *flags, *own.split(), "--output_dir", method]) == 0
    return folder


@pytest.mark.parametrize("line", FIGURES, ids=str)
def test_a_figure_is_drawn_from_a_tiny_run(line, runs, tmp_path, monkeypatch, no_pictures):
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
        given += [instead] * (not left_out and (instead == word or instead == "pairs.jsonl" or instead not in given))
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
