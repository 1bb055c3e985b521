"""Two ranks with two pairs each are one rank with four."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import preference_rows
from two_ranks import CASES

from trl_margins.methods import METHODS

SCRIPT = str(Path(__file__).with_name("two_ranks.py"))
RANKING = ("pwa", "pwa_all", "spearman", "n_pairs", "n_pairs_gap")
LOGGED = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
SPREAD = ("mean", "std", "min", "max", "zero")


def launch(ranks: int, *command: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    whole = [sys.executable, *(launcher if ranks > 1 else []), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(ranks: int, folder: str, out: Path) -> dict:
    launch(ranks, SCRIPT, folder, str(out), str(4 // ranks))
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runs(tiny_model, folder):
    return [run(ranks, tiny_model, folder / f"{ranks}.json") for ranks in (1, 2)]


@pytest.mark.parametrize("case", CASES)
def test_the_pair_log_holds_the_pairs_of_all_ranks(case, runs, folder):
    """Rank by rank within a step, so sorted before they are compared."""
    one, two = (sorted(read(folder / f"{ranks}.json.{case}" / "pair_log.csv")) for ranks in (1, 2))
    assert len(one) == len(two) == 8
    for mine, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(mine, rel=2e-4, abs=1e-5)


def test_evaluate_shares_the_work(tiny_model, tmp_path):
    """Seven prompts in batches of their own: four for one rank, three for the other; one table."""
    preference_rows(7, seed=4).to_json(tmp_path / "pairs.jsonl")
    command = ["-m", "trl_margins.cli", "evaluate", "--model_name_or_path", tiny_model, "--batch_size", "2"]
    command += ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--max_length", "128", "--bootstrap", "20"]
    said = [launch(ranks, *command, "--rewards", str(tmp_path / str(ranks))) for ranks in (1, 2)]
    assert said[0] == said[1]
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text()


def read(file: Path) -> list[list[float]]:
    return [[float(cell) for cell in line.split(",")] for line in file.read_text().splitlines()[1:]]


def test_every_method_is_there():
    assert {method for method, _ in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_over_all_ranks(case, runs):
    """Nine pairs do not divide by four: the pairs that pad the last batch are not counted twice."""
    one, two = (r[case]["metrics"] for r in runs)
    assert one["eval_n_pairs"] == two["eval_n_pairs"] == 9
    for name in RANKING:
        assert two[f"eval_{name}"] == pytest.approx(one[f"eval_{name}"], rel=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same(case, runs):
    """Whatever a method computes of the batch, it computes of all ranks: loss, gradient, terms and model agree."""
    one, two = (r[case] for r in runs)
    row = METHODS[CASES[case][0]]
    terms = ["weights"] * bool(row.weight) + ["margins"] * bool(row.margin)
    for step, (mine, theirs) in enumerate(zip(one["log"][:2], two["log"][:2], strict=True)):
        for name in [*LOGGED, *(f"{term}/{part}" for term in terms for part in SPREAD)]:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), (step, name)
    for name, norm in one["norms"].items():
        assert two["norms"][name] == pytest.approx(norm, rel=1e-5), name
