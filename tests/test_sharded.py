"""GAPO's anchor, gradient norms and diagnostics where FSDP2 shards the parameters, in 16 bits and at its edges."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import sharded_anchor
from processes import output_of
from scipy.stats import spearmanr
from sharded_anchor import CASES, PAIRS

SCRIPT = str(Path(__file__).with_name("sharded_anchor.py"))


def anchor_gaps(folder: Path) -> np.ndarray:
    with (folder / "pair_log.csv").open() as file:
        rows = {int(row["row_number"]): float(row["anchor_gap"]) for row in csv.DictReader(file)}
    assert sorted(rows) == list(range(PAIRS))
    return np.array([rows[i] for i in range(PAIRS)])


@pytest.fixture(scope="module")
def exact(tiny_model, tmp_path_factory):
    """In float32, by one process."""
    out = tmp_path_factory.mktemp("alone")
    sharded_anchor.make("float32", tiny_model, str(out)).train()
    return anchor_gaps(out)


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    output_of(2, SCRIPT, tiny_model, str(out))
    return out, json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_gaps_in_16_bits_are_float32s(case, runs, exact):
    """Within 10 % in the mean and in nearly its order, though the gather casts what it gathers."""
    out, results = runs
    assert all(found["sharded"] for found in results[case])
    found = anchor_gaps(out / case)
    assert found.mean() == pytest.approx(exact.mean(), rel=0.1)
    assert spearmanr(found, exact).statistic >= 0.97


@pytest.mark.parametrize("case", CASES)
def test_the_gather_casts_the_anchor_exactly_and_the_bytes_come_back(case, runs):
    for found in runs[1][case]:
        at_the_anchor = [each for each in found["passes"] if each["anchor"]]
        assert len(at_the_anchor) == PAIRS // 8
        assert all(each["exact"] for each in at_the_anchor)
        assert {dtype for each in found["passes"] for dtype in each["gathered"]} == {"torch.bfloat16"}
        assert found["back"]


def test_a_pass_that_breaks_off_leaves_nothing_gathered(runs):
    for found in runs[1]["broken"]:
        assert found == {"raised": True, "back": True, "alike": True}


def test_ranks_with_the_same_values_draw_the_same_numbers(runs):
    first, second = runs[1]["draws"]
    assert len(set(first["replicas"])) == 2
    assert first["replicas"] == second["replicas"]
    assert first["shards"] != second["shards"]
