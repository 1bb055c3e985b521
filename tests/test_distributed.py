"""Two ranks with two pairs each are one rank with four, whole or sharded; so are two mini-batches, where a method's
definition allows. Everything in float64, so that nothing hides behind rounding."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_ranks
from conftest import OWN_METHODS, byte_tokenizer, load, preference_rows, saved
from filelock import FileLock
from processes import output_of
from safetensors.torch import load_file
from two_ranks import CASES, DIAGNOSED, GROUPS, STREAMED, UNEVEN, run_uneven

from trl_margins import cli
from trl_margins.methods import METHODS
from trl_margins.terms.adaptive import adaptive_margin
from trl_margins.terms.dynamic_target import dynamic_target_margin

SCRIPT = str(Path(__file__).with_name("two_ranks.py"))
TIMEOUT = 900  # seconds; a launch takes one minute on two free cores, and the suite may keep those busy
# with the number of ranks; those in a row share their processes
WAYS = [
    (1, ("one", "accumulate", "groups")),
    (2, ("ddp", "stream", "uneven", "broken", "groups-ddp")),
    (2, ("sharded", "groups-sharded")),
]
SHARDED, GROUPS_SHARDED = (pytest.param(way, marks=pytest.mark.rehearsal) for way in WAYS[2][1])
# means over the tokens of a mini-batch, as in TRL: other mini-batches have others
OF_A_BATCH = tuple(f"eval_{name}" for name in ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"))
LOGGED = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
SPREAD = ("mean", "std", "min", "max", "zero")

# their statistics are those of the mini-batch: what accumulation gives them instead is stated below
OF_THE_MINI_BATCH = ("gamma-po", "amapo", "amapo, log-ratio")
_STEP = "DeepSpeed takes its step within the backward pass"
REFUSED = {
    # a gradient of every pair at a time, and weights in another precision
    "sharded": {
        "geometric-anchor, float32": "FSDP2 casts the weights itself: use anchor_estimator='difference', or DDP",
        "geometric-anchor, per pair": "anchor_estimator='per-pair' takes every pair's own gradient",
    },
    "zero2": {"simpo-sam": _STEP, "geometric-anchor, momentum": "finds none of the model's parameters in"},
    "zero3": {
        "simpo-sam": _STEP,
        "geometric-anchor, float32": "ZeRO-3 casts the weights itself: use anchor_estimator='difference', or DDP",
        **dict.fromkeys(("geometric-anchor, per pair", "geometric-anchor, adapters"), "ZeRO-3 gives each rank a part"),
    },
}
ZERO = [
    pytest.param(way, marks=pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed"))
    for way in ("zero2", "zero3")
]
SAME = [
    pytest.param(case, way, marks=[pytest.mark.rehearsal] * (way == "sharded"))
    for way in ("accumulate", "ddp", "sharded")
    for case in CASES
    if not (way == "accumulate" and case in OF_THE_MINI_BATCH) and case not in REFUSED.get(way, {})
]


def close(case: str, way: str = "") -> dict[str, float]:
    """Tolerances. The reference of a log-ratio comes from TRL's fused head, which sums 100 to 200 nats in float32;
    DeepSpeed steps in float32.
    """
    if way.startswith("zero"):  # Adam makes much of small differences
        return {"rel": 1e-3 if "log-ratio" in case else 1e-4, "abs": 1e-3}
    return {"rel": 1e-6, "abs": 1e-4 if "log-ratio" in case else 1e-6}


def launch(ranks: int, *command: str, **variables: str) -> str:
    """What a command prints, run by several ranks; they rendezvous at a port that torchrun itself has bound."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    arguments = [sys.executable, *(launcher if ranks > 1 else []), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    # a session of its own: a launcher that is killed alone leaves its ranks behind
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, said = process.communicate(timeout=TIMEOUT)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            printed, said = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            pytest.fail(f"{ranks} ranks took more than {TIMEOUT} s: {shlex.join(arguments)}\n{said[-3000:]}")
    if process.returncode:
        pytest.fail(f"{ranks} ranks ended with {process.returncode}: {shlex.join(arguments)}\n{said[-3000:]}")
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all of pytest-xdist's workers, each of which runs some of these tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    folder.mkdir(exist_ok=True)
    return folder


class Runs(dict[str, Any]):
    """What every way gives, computed by the first worker that asks for it."""

    def __init__(self, model: str, folder: Path) -> None:
        self._model, self._folder = model, folder
        with FileLock(folder / "lock"):
            if not (folder / "reference").exists():
                load(model, noise=0.02).save_pretrained(folder / "reference")

    def __missing__(self, way: str) -> Any:
        (ranks, ways), *_ = ((ranks, ways) for ranks, ways in WAYS if way in ways)
        with FileLock(self._folder / "lock"):
            if not all((self._folder / f"{each}.json").exists() for each in ways):
                arguments = (self._model, str(self._folder), *ways)
                two_ranks.main(*arguments) if ranks == 1 else output_of(ranks, SCRIPT, *arguments)
        self.update({each: json.loads((self._folder / f"{each}.json").read_text()) for each in ways})
        return self[way]

    def folder(self, way: str) -> Path:
        """Where its runs have left their files."""
        self[way]
        return self._folder / way


@pytest.fixture(scope="module")
def runs(tiny_model, folder) -> Runs:
    return Runs(tiny_model, folder)


def pair_log(folder: Path, name: str = "pair_log.csv") -> dict[str, np.ndarray]:
    """By name, in the order of the training set: ranks write theirs one after the other."""
    with (folder / name).open(newline="") as file:
        head, *rows = csv.reader(file)
    columns = dict(zip(head, np.array(rows, float).T, strict=True))
    order = np.lexsort([columns["row_number"], columns["step"]])
    return {name: values[order] for name, values in columns.items()}


def test_every_method_is_there():
    assert {method for _, method, _ in CASES.values()} >= set(OWN_METHODS)


@pytest.mark.parametrize(("case", "way"), [*SAME, *((case, "stream") for case in STREAMED)])
def test_loss_margins_weights_and_gradients_are_the_same(case, way, runs):
    """After two steps also the model, parameter by parameter. Columns of the data set are float32, hence not 1e-12."""
    one, other = runs["one"][case], runs[way][case]
    row = METHODS[CASES[case][1]]
    terms = ["weights"] * bool(row.weight) + ["target_margins"] * bool(row.margin)
    assert len(one["log"]) >= 2
    for step, (mine, theirs) in enumerate(zip(one["log"][:2], other["log"][:2], strict=True)):
        of_the_probe = [name for name in mine if name == "anchor/gradient_norm"]  # a mean over the pairs of all ranks
        for name in [*LOGGED, *of_the_probe, *(f"{term}/{part}" for term in terms for part in SPREAD)]:
            assert theirs[name] == pytest.approx(mine[name], **close(case, way)), (step, name)
    mine, theirs = (load_file(runs.folder(w) / case / "weights.safetensors") for w in ("one", way))
    for name, weight in mine.items():
        difference = (theirs[name].double() - weight).norm() / weight.norm()
        assert difference < close("", way)["abs"], name


@pytest.mark.parametrize(("case", "way"), SAME)
def test_the_pair_log_holds_the_pairs_of_all_ranks(case, way, runs):
    one, other = (pair_log(runs.folder(w) / case) for w in ("one", way))
    assert one.keys() == other.keys()
    assert one["row_number"].tolist() == list(range(8))
    for name, values in one.items():
        assert other[name] == pytest.approx(values, **close(case, way)), name


@pytest.mark.parametrize("way", ["ddp", SHARDED])
@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_over_all_ranks(case, way, runs):
    """Nine pairs do not divide by four: those that fill up the last batch count nowhere, nor in its statistics."""
    if "refused" in runs[way][case]:
        assert case in REFUSED[way]
        return
    one, two = (runs[w][case]["metrics"] for w in ("one", way))
    assert one["eval_n_pairs"] == two["eval_n_pairs"] == 9
    assert two.keys() == one.keys()
    for name in one:
        if not name.endswith(("_runtime", "_per_second")) and name not in OF_A_BATCH:
            assert two[name] == pytest.approx(one[name], **close(case, way)), name


@pytest.mark.rehearsal
@pytest.mark.parametrize("case", REFUSED["sharded"])
def test_what_sharded_parameters_do_not_allow_is_refused(case, runs):
    assert REFUSED["sharded"][case] in runs["sharded"][case]["refused"]


@pytest.mark.parametrize("way", ["accumulate", "ddp", SHARDED])
def test_the_parts_of_an_anchor_gap_are_the_same(way, runs):
    """Of every pair, once: ranks with sharded parameters take part in the passes of each other's pairs."""
    one, other = (pair_log(runs.folder(each) / DIAGNOSED, "anchor_diagnostics.csv") for each in ("one", way))
    assert {"gradient_norm", "alignment", "curvature"} <= one.keys() == other.keys()
    assert one["row_number"].tolist() == list(range(8))
    for name, values in one.items():
        assert other[name] == pytest.approx(values, **close(DIAGNOSED, way)), name


@pytest.mark.parametrize("way", ZERO)
def test_deepspeed(way, runs, tiny_model, folder):
    launch(2, SCRIPT, tiny_model, str(folder), way, DS_ACCELERATOR="cpu")
    runs[way] = json.loads((folder / f"{way}.json").read_text())
    for case, found in runs[way].items():
        if "refused" in found or case in REFUSED[way]:
            assert REFUSED[way][case] in found["refused"]
            continue
        test_loss_margins_weights_and_gradients_are_the_same(case, way, runs)
        test_the_pair_log_holds_the_pairs_of_all_ranks(case, way, runs)
        test_evaluation_is_over_all_ranks(case, way, runs)
    test_the_parts_of_an_anchor_gap_are_the_same(way, runs)


def log_ratio_gaps(tiny_model, folder, rows):
    """Per token, by plain transformers, one completion at a time."""
    tokenizer, gaps = byte_tokenizer(), []
    policy, reference = load(tiny_model).double(), load(str(folder / "reference")).double()
    for row in preference_rows(9, seed=4).select(rows.astype(int)):
        ratios = []
        for side in ("chosen", "rejected"):
            prompt, answer = (tokenizer(text)["input_ids"] for text in (row["prompt"], row[side]))
            ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
            with torch.no_grad():
                logps = [
                    model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                    for model in (policy, reference)
                ]
            ratios.append(float((logps[0] - logps[1])[len(prompt) - 1 :].mean()))
        gaps.append(ratios[0] - ratios[1])
    return gaps


@pytest.mark.parametrize("way", ["groups-ddp", GROUPS_SHARDED])
@pytest.mark.parametrize("case", GROUPS)
def test_gapos_groups(case, way, runs):
    """Over all ranks, whatever DDP reduces on the way back, and whichever forward passes serve twice."""
    if way == "groups-sharded" and case == "pair, cached":
        assert "anchor_estimator='per-pair' takes every pair's own gradient" in runs[way][case]["refused"]
        return
    one, other = runs["groups"][case]["log"], runs[way][case]["log"]
    for mine, theirs in zip(one[:2], other[:2], strict=True):
        for name in (*LOGGED, "anchor/gradient_norm", "anchor/gap/mean", "anchor/gap/std"):
            assert theirs[name] == pytest.approx(mine[name], **close(case)), name
    mine, theirs = (pair_log(runs.folder(each) / case)["anchor_gap"] for each in ("groups", way))
    assert theirs == pytest.approx(mine, **close(case))


@pytest.mark.parametrize("case", OF_THE_MINI_BATCH)
def test_what_accumulation_changes(case, runs, folder, tiny_model):
    """Of the first step, where the model is still the same: each mini-batch has statistics of its own, filled up with
    the gaps of the one before by the methods that remember."""
    whole, halves = (pair_log(runs.folder(way) / case) for way in ("one", "accumulate"))
    assert halves["reward_gap"][:4] == pytest.approx(whole["reward_gap"][:4], **close(case))
    gap = torch.tensor(whole["reward_gap"][:4])
    first, second = gap[:2], gap[2:]
    if case == "gamma-po":
        gamma0 = whole["margin"][:4].mean()  # over the whole batch, the margins' mean is γ0
        parts = dynamic_target_margin(first, gamma0, 1.0), dynamic_target_margin(second, gamma0, 1.0, history=first)
        expected, of_the_whole = torch.cat(parts), dynamic_target_margin(gap, gamma0, 1.0)
    else:
        beta = json.loads((folder / "one" / case / "margin_run.json").read_text())["config"]["beta"]
        delta = gap / beta
        if "log-ratio" in case:  # per token, by transformers
            delta = torch.tensor(log_ratio_gaps(tiny_model, folder, whole["row_number"][:4]))
        parts = [
            adaptive_margin(part, beta, mean=seen.mean(), std=seen.std())
            for part, seen in ((delta[:2], delta[:2]), (delta[2:], delta))
        ]
        expected, of_the_whole = torch.cat(parts), adaptive_margin(delta, beta)
    np.testing.assert_allclose(halves["margin"][:4], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole["margin"][:4], of_the_whole, rtol=1e-4, atol=1e-6)
    assert not np.allclose(expected, of_the_whole, rtol=1e-2)


@pytest.mark.parametrize("case", UNEVEN)
def test_uneven_batches(case, runs, tiny_model, tmp_path):
    """Two pairs on one rank and one on the other: the statistics are those of the three."""
    run_uneven(case, tiny_model, tmp_path)
    one, two = pair_log(tmp_path / case), pair_log(runs.folder("uneven") / case)
    assert two["step"].tolist() == [1] * 4 + [2] * 3
    for name, values in one.items():
        assert two[name] == pytest.approx(values, **close(case)), name


@pytest.mark.parametrize("way", ["one", "accumulate", "ddp", SHARDED, "stream", "uneven"])
def test_pairs_per_step_are_those_that_the_log_has(way, runs):
    """The number that a run says of itself, and the lines of its first step."""
    run = runs.folder(way) / ("split/gappo" if way == "uneven" else "gappo")
    said = json.loads((run / "margin_run.json").read_text())["pairs_per_step"]
    lines = (run / "pair_log.csv").read_text().splitlines()
    assert said == sum(line.startswith("1,") for line in lines) == 4


def test_a_rank_without_a_batch_is_refused(runs):
    """Before training, and on both ranks: it would wait for the other for ever."""
    assert len(runs["uneven"]["nine"]) == 2
    for found in runs["uneven"]["nine"]:
        assert "the ranks have [3, 2] batches of the train data set, and would wait for each other" in found["error"]


def test_nan_on_one_rank_stops_all(runs):
    """With the row by its number in the data set, which the first rank never saw."""
    first, second = runs["broken"]["stop"]
    assert first["rank"] != second["rank"]
    assert first["error"] == second["error"]
    assert first["error"].startswith("step 2: the model's output is NaN or infinite for 1 pair(s): row 6 ('")
    assert first["finite"]
    assert second["finite"]


def test_nan_on_one_rank_is_skipped_by_all(runs):
    first, second = runs["broken"]["skip"]
    assert first["finite"]
    assert first["norm"] == second["norm"]
    assert first["log"][1]["skipped_steps"] == 1
    assert first["log"][3]["step"] == 4


def test_a_weight_broken_on_one_rank_stops_all(runs, folder):
    """With the tensor's name, which the first rank's weights do not show; the checkpoint before it stays."""
    first, second = runs["broken"]["weights"]
    assert first["rank"] != second["rank"]
    assert first["error"] == second["error"]
    assert first["error"].startswith("step 2 broke 1 of the 21 weight tensors that train, model.layers.0.self_attn.v_")
    assert "of BreaksOnTheSecondRank with the learning rate 0.001, or a callback at its end, and not" in first["error"]
    (kept,) = folder.glob("**/weights/checkpoint-*")
    assert f"The last checkpoint before it is {kept}" in first["error"]
    assert kept.name == "checkpoint-1"


def test_evaluate_shares_the_work(tiny_model, tmp_path, capsys):
    """Seven prompts in batches of their own: four for one rank, three for the other; one table."""
    preference_rows(7, seed=4).to_json(tmp_path / "pairs.jsonl")
    start = saved(load(tiny_model, noise=0.02), tmp_path / "start")
    command = ["evaluate", "--model_name_or_path", tiny_model, "--batch_size", "2", "--drift_from", start]
    command += ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--max_length", "128", "--bootstrap", "20"]
    assert cli.main([*command, "--rewards", str(tmp_path / "1")]) == 0
    alone = capsys.readouterr().out
    shared = output_of(2, "-m", "trl_margins.cli", *command, "--rewards", str(tmp_path / "2"))
    tables = [[line for line in text.splitlines() if not line.startswith("[")] for text in (alone, shared)]
    assert tables[0] == tables[1]  # without what DeepSpeed logs
    assert "| KL drift (nats per token) | 0." in alone
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text()
