"""`make gpu` is rehearsed on a CPU: nothing of it runs for the first time on a borrowed accelerator."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import output_of

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))

from on_gpu import study  # noqa: E402
from on_gpu.contenders import Shape, useful_operations  # noqa: E402
from on_gpu.ledger import Ledger, table  # noqa: E402
from on_gpu.memory import _beyond  # noqa: E402
from on_gpu.subjects import Rig, llama  # noqa: E402
from study import Size  # noqa: E402

PARTS = ("correctness", "speed", "memory", "study")


def items(file: Path) -> dict[str, dict]:
    return {item["key"]: item for item in map(json.loads, file.read_text().splitlines())}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder that all parts have written to."""
    out = tmp_path_factory.mktemp("gpu")
    command = [str(SCRIPT), "--device", "cpu", "--size", "tiny", "--budget", "540", "--out", str(out), "--part"]
    output_of(1, *command, *PARTS, folder=out, timeout=580)
    return out


@pytest.mark.rehearsal
@pytest.mark.parametrize("part", PARTS)
def test_nothing_raises_and_nothing_is_left(part, rehearsal):
    found = items(rehearsal / f"{part}.jsonl")
    assert not {key: item["error"] for key, item in found.items() if "error" in item}
    text = (rehearsal / f"{part}.md").read_text()
    assert "torch" in text
    assert "|" in text
    assert "are left" not in text.replace("0 are left", "").replace("0 runs are left", "")


@pytest.mark.rehearsal
def test_steps_on_the_device_are_those_of_float64(rehearsal):
    found = items(rehearsal / "correctness.jsonl")
    wrong = [key for key, item in found.items() if not item["ok"] and not key.startswith("waits")]
    assert not wrong
    assert {key.split("/")[0] for key in found} >= {"ours", "TRL's own", "half and half", "waits"}


@pytest.mark.rehearsal
def test_synchronisations_of_trl_are_found(rehearsal):
    """Its CPO trainer reads a number for each metric that it logs; ours reads none of these."""
    found = items(rehearsal / "correctness.jsonl")
    theirs, ours = (found[f"waits/cpo/{who}"]["reads"] for who in ("TRL's own", "no term"))
    assert sum(n for place, n in theirs.items() if "get_batch_loss_metrics" in place) >= 8
    assert sum(ours.values()) < sum(theirs.values()) / 2


@pytest.mark.rehearsal
def test_the_study_has_all_runs_and_their_differences(rehearsal):
    runs = items(rehearsal / "study.jsonl")
    assert len([run for run in runs.values() if "seed" in run]) == 3
    assert "minus simpo's" in (rehearsal / "study.md").read_text()


def test_what_finds_too_little_memory_is_made_again_alone(tmp_path, monkeypatch):
    running, made = set(), []

    def one(rig, size, spec):
        key = spec["method"], spec.get("trial"), spec.get("seed")
        running.add(key)
        time.sleep(0.02)
        beside = len(running) > 1
        running.discard(key)
        if spec["method"] == "geometric-anchor" and (beside or "seed" in spec):
            return {**spec, "seconds": 0.0, "error": "OutOfMemoryError: CUDA out of memory"}
        made.append(key)
        return {**spec, "seconds": 0.0, "pwa_all": 0.5}

    class Threads(ThreadPoolExecutor):
        _processes = None

        def __init__(self, workers, context, initializer, initargs):
            super().__init__(workers)

    monkeypatch.setattr(study, "_one", one)
    monkeypatch.setattr(study, "ProcessPoolExecutor", Threads)
    options = study.options(["--workers", "3", "--methods", "simpo", "dpo", "geometric-anchor"])
    ledger = Ledger(tmp_path / "study.jsonl", budget=1000)
    size = Size(1, 1, 1, (2e-5, 8e-5), 256, 1, (1,), (None,), ("simpo", "dpo", "geometric-anchor"))
    study._do(Rig("cpu", False, "", None), ledger, size, options)
    assert len(made) == len(set(made)) == 9
    assert {("geometric-anchor", 2e-5, None), ("geometric-anchor", 8e-5, None)} <= set(made)
    assert [key for key, item in ledger.items.items() if "error" in item] == ["geometric-anchor/clean/0"]
    assert len(ledger.items) == 10


def test_tables_leave_out_the_runs_that_raised(tmp_path):
    """And the part still ends."""
    numbers = {"learning_rate": 2e-5, "pwa_all": 0.5, "pwa": 0.5, "spearman": 0.1, "logp_chosen": -1.0}
    ledger = Ledger(tmp_path / "study.jsonl", budget=0)
    for method in ("simpo", "dpo"):
        about = {"method": method, "noise": None}
        ledger.record(f"{method}/learning rate 2e-05", "trial", 1.0, {**about, "trial": 2e-5, **numbers})
        ledger.record(f"{method}/clean/0", "run", 1.0, {**about, "seed": 0, **numbers})
    ledger.record(
        "geometric-anchor/learning rate 2e-05",
        "trial",
        1.0,
        {"method": "geometric-anchor", "trial": 2e-5, "error": "OutOfMemory"},
    )
    ledger.record(
        "geometric-anchor/clean/0",
        "run",
        1.0,
        {"method": "geometric-anchor", "noise": None, "seed": 0, "error": "OutOfMemory"},
    )
    arguments = "--workers 1 --methods simpo dpo --noise clean --seeds 1"
    text = study.run(Rig("cpu", False, "", tmp_path), ledger, study.options(arguments.split()))
    assert "* geometric-anchor/clean/0 raised OutOfMemory" in text
    assert "* dpo, learning rate 2e-05: PWA 0.5000" in text
    assert "| dpo | +0.0000" in text


def test_items_are_written_at_once_and_not_done_again(tmp_path):
    file, done = tmp_path / "part.jsonl", []

    def work(name):
        done.append(name)
        assert len(file.read_text().splitlines() if file.exists() else []) == len(set(done)) - 1
        if name == "bad":
            raise RuntimeError("no such kernel")
        return {"value": 1}

    for _ in range(2):
        ledger = Ledger(file, budget=100)
        for name in ("a", "bad", "c"):
            ledger.do(name, lambda name=name: work(name))
    assert done == ["a", "bad", "c"]
    assert "RuntimeError: no such kernel" in items(file)["bad"]["error"]
    assert "test_gpu_benchmark.py" in items(file)["bad"]["error"]
    ledger = Ledger(file, budget=100, retry=True)
    ledger.do("a", lambda: pytest.fail("it is there"))
    ledger.record("wrong", "", 0.0, {"ok": False})
    assert "wrong" not in Ledger(file, budget=100, retry=True).items
    assert ledger.do("bad", lambda: {"value": 2})["value"] == 2


def test_nothing_starts_that_does_not_fit(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("on_gpu.ledger.time.perf_counter", lambda: clock[0])

    def takes(seconds):
        clock[0] += seconds
        return {}

    ledger = Ledger(tmp_path / "part.jsonl", budget=100)
    assert ledger.do("long", lambda: pytest.fail("200 s were said"), guess=200) is None
    assert ledger.do("first", lambda: takes(50), kind="step", guess=10)["seconds"] == 50
    # the first took longer than was guessed: the second of its kind does not fit
    assert (
        ledger.do("second", lambda: pytest.fail("50 s and a little room are not left"), kind="step", guess=10) is None
    )
    assert ledger.do("quick", lambda: takes(1), guess=1) is not None
    assert ledger.left == ["long", "second"]


def test_what_only_leaves_out_is_left(tmp_path):
    ledger = Ledger(tmp_path / "part.jsonl", budget=100, only=["this"])
    assert ledger.do("that", lambda: pytest.fail("it was not asked for")) is None
    assert ledger.do("just this", dict) is not None
    assert ledger.left == ["that"]


def test_the_edge_of_memory_is_looked_for_along_a_line(monkeypatch):
    import torch

    class Card:
        total_memory = 80e9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    rig = Rig("cuda", False, "", None)
    assert _beyond({4: 10.0}, rig) == 8
    assert _beyond({4: 10.0, 8: 14.0}, rig) == 64  # a GB a pair would go to 71: eight times as many at most
    assert _beyond({8: 30.0, 16: 50.0}, rig) == 16 + int((77.6 - 50) / 2.5)


def test_useful_operations_are_six_a_weight_and_token():
    """Of a model with hardly any attention: PaLM's rule (arXiv 2204.02311, appendix B)."""
    config = llama(64, 2, 100, heads=1, kv_heads=1, inner=128)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    found = useful_operations(Shape("tiny", 1), config, [(10, 0)])
    attention = 12 * 2 * 64 * (10 * 10 / 2)
    assert found == 6 * weights * 10 + attention
    assert useful_operations(Shape("tiny", 1), config, [(0, 1)]) > 6 * 64 * 100


def test_tables_are_markdown():
    assert table(["a", "b"], [["x|y", 0.00123], [None, 12345.6]]) == (
        "| a | b |\n|---|---:|\n| x\\|y | 1.2e-03 |\n| – | 12,346 |\n"
    )


def test_the_wheels_script_says_how_it_is_called(tmp_path):
    done = subprocess.run([ROOT / "benchmarks" / "gpu_wheels.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpu_wheels.sh LIST DIR" in done.stdout
