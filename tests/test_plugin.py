"""The package in examples/plugin, installed and trained with."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import preference_rows
from processes import output_of

pytestmark = pytest.mark.rehearsal

ROOT = Path(__file__).parents[1]
FLAGS = ["--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--max_steps", "2", "--logging_steps", "1"]
# what pip would bring, and what is not looked for online
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PIP_NO_INDEX": "1"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of processes where the plugin is installed; nothing else knows of it."""
    folder = tmp_path_factory.mktemp("installed")
    left_out = shutil.ignore_patterns("build", "*.egg-info")
    shutil.copytree(ROOT / "examples" / "plugin", folder / "source", ignore=left_out)
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)])}
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    new_python(environment, *pip, str(folder / "source"))
    return environment


def new_python(environment: dict[str, str], *argv: str, where: Path | None = None) -> None:
    command = [sys.executable, "-W", "ignore", *argv]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def run(environment, monkeypatch):
    """Runs Python there, in a process that has imported this package before."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return partial(output_of, 1)


@pytest.fixture(scope="module")
def trained(environment, tiny_model, tmp_path_factory) -> Path:
    """The output folder of `--method focal-simpo --focal_gamma 3`, in a new Python."""
    folder = tmp_path_factory.mktemp("trained")
    preference_rows(8).to_json(folder / "pairs.jsonl")
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", "pairs.jsonl", "--output_dir", "out", *FLAGS]
    train = ["-m", "trl_margins.cli", "train", "--method", "focal-simpo", "--focal_gamma", "3", *flags]
    new_python(environment, *train, where=folder)
    return folder / "out"


def cells(card: str) -> dict[str, str]:
    """First cell → second, of every table."""
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in card.splitlines() if line[:1] == "|"]
    return {row[0]: row[1].replace("\\", "") for row in rows}


def test_the_card_and_the_run_have_its_options(trained):
    card = (trained / "README.md").read_text()
    told = cells(card)
    assert (told["weight"], told["focal_gamma"]) == ("focal", "3")
    assert "(1 − σ(m_i))^γ" in card
    assert "Focal Loss for Dense Object Detection" in card
    assert "--method focal-simpo --focal_gamma 3" in card
    run = json.loads((trained / "margin_run.json").read_text())
    assert (run["method"], run["weight"], run["config"]["focal_gamma"]) == ("focal-simpo", "focal", 3.0)
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert 0 < log[0]["weights/mean"] < 1


def test_the_report_has_them(run, trained):
    run("-m", "trl_margins.cli", "report", str(trained), "--out", str(trained / "report"))
    page = next(trained.rglob("*.html")).read_text()
    assert re.search(r"focal_gamma</t[hd]>\s*<td[^>]*>3", page)
    assert "Focal Loss for Dense Object Detection" in page


CALLS = """
import sys
from trl_margins.cli import main

sys.stderr = sys.stdout
for argv in {calls!r}:
    sys.argv = ["trl-margins", *argv]
    try:
        main()
    except SystemExit as stop:
        print(stop.code)
"""


def test_flags_and_yaml_are_checked(run, trained):
    """All in one process."""
    complaints = {
        "method: focal-simpo\nfocal_gama: 1.5\n": "unknown key 'focal_gama' (did you mean 'focal_gamma'?)",
        "method: focal-simpo\nfocal_gamma: high\n": "focal_gamma must be a number; it is 'high'",
        "method: focal\n": "unknown method 'focal'",
    }
    files = [trained / f"{i}.yaml" for i in range(len(complaints) + 1)]
    right = (
        "method: none\nweight: [score-gap, focal]\nfocal_gamma: 1.5\nmax_steps: 1\nbf16: false\n"
        "model_name_or_path: some/model\ndataset_name: some/pairs\n"
    )
    for file, text in zip(files, [right, *complaints], strict=True):
        file.write_text(text)
    calls = [["train", "--config", str(file), "--dry_run"] for file in files]
    shown = run("-c", CALLS.format(calls=[["train", "--method", "focal-simpo", "--help"], *calls]))
    assert "--focal_gamma" in shown
    assert "Focusing parameter" in shown
    assert "focal_gamma: 1.5" in shown
    assert re.search(r"weight:\n\s*- score-gap\n\s*- focal", shown)
    for complaint in complaints.values():
        assert complaint in shown


TRAIN = """
from datasets import load_dataset
from trl_margins import MarginCPOConfig, MarginCPOTrainer

config = MarginCPOConfig(
    {out!r}, loss_type="simpo", cpo_alpha=0.0, weight="focal", focal_gamma=5.0, use_cpu=True, bf16=False,
    report_to="none", max_steps=1, logging_steps=1, learning_rate=1e-3,
)
rows = load_dataset("json", data_files={data!r}, split="train")
trainer = MarginCPOTrainer({model!r}, config, train_dataset=rows)
trainer.train()
trainer.create_model_card("twin")
"""


def test_the_script_in_the_card_trains_the_same_model(run, trained, tiny_model, tmp_path):
    data = str(trained.parent / "pairs.jsonl")
    run("-c", TRAIN.format(out=str(tmp_path / "first"), data=data, model=tiny_model))
    card = (tmp_path / "first" / "README.md").read_text()
    assert cells(card)["focal_gamma"] == "5"
    (script,) = [code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "config = " in code]
    assert "import trl_margins_focal" in script
    assert "focal_gamma=5.0" in script
    load = f"load_dataset('json', data_files={data!r}, split='train')"
    ready = f"from datasets import load_dataset\ntrain_dataset = {load}\n{script}"
    ready = ready.replace("output_dir=", "use_cpu=True, report_to='none', output_dir=")
    ready = re.sub(r"model=[\"'].*?[\"']", f"model={tiny_model!r}", ready)
    run("-c", ready, folder=tmp_path)
    state = json.loads((tmp_path / "twin" / "trainer_state.json").read_text())
    first = json.loads((tmp_path / "first" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["train_loss"] == first["log_history"][-1]["train_loss"]


def test_the_python_of_the_readme(run, tmp_path):
    """A config of the readme's, without the training."""
    text = (ROOT / "examples" / "plugin" / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("options = ", "config = "))]
    code = "from trl_margins import MarginCPOConfig\n" + "\n".join(lines)[:-1] + ", use_cpu=True, bf16=False)\n"
    assert "3.0" in run("-c", code + "print(config.terms('weight')[0].gamma)", folder=tmp_path)
