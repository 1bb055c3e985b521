"""Two processes are two processes: launched as the docs say, with the accelerate configurations that are shipped."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import preference_rows
from processes import output_of
from safetensors.torch import load_file
from test_distributed import launch

from trl_margins import MarginCPOConfig, MarginCPOTrainer
from trl_margins.cli import main
from trl_margins.cli.recipes import recipe_folder
from trl_margins.distributed import leave_process_group

CLI = ("-m", "trl_margins.cli")
SHARDED = (str(Path(__file__).with_name("fsdp_on_cpu.py")),)
ZERO3 = (str(Path(__file__).with_name("deepspeed_on_cpu.py")),)
NO_DEEPSPEED = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")
PAIRS_PER_STEP = 4
OF_A_RANK = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # where it is, which no configuration says


def command(folder, pairs, out, size):
    flags = "--max_steps 3 --max_length 128 --gradient_accumulation_steps 1 --logging_steps 1 --report_to none"
    flags += " --gradient_checkpointing false --learning_rate 1e-2"
    argv = ["train", "--model_name_or_path", folder, "--dataset_name", pairs, "--output_dir", str(out), *flags.split()]
    return [*argv, "--per_device_train_batch_size", str(size)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    preference_rows(24, seed=4).to_json(file)
    return str(file)


@pytest.fixture(scope="module")
def alone(tiny_model, pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    assert main([*command(tiny_model, pairs, out, PAIRS_PER_STEP), "--use_cpu", "true"]) == 0
    return out


def losses(out):
    state = json.loads((out / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


def launcher(*argv):
    return ("-m", "accelerate.commands.launch", *map(str, argv))


@pytest.mark.rehearsal
@pytest.mark.parametrize(
    ("name", "program", "flags"),
    [
        ("ddp", CLI, ["--use_cpu", "true"]),
        ("fsdp2", SHARDED, []),
        pytest.param("zero3", ZERO3, ["--use_cpu", "true"], marks=NO_DEEPSPEED),
    ],
)
def test_the_shipped_configurations(name, program, flags, tiny_model, pairs, alone, tmp_path, monkeypatch):
    """As they are, but for the number of processes: the losses and the model of one process with the same batch.

    FSDP2's processes are forks, with the variables that accelerate gives to those that it starts.
    """
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    start = launcher("--config_file", recipe_folder() / "accelerate_configs" / f"{name}.yaml")
    start += ("--num_processes", "2", "--main_process_port", "0")
    argv = [*program, *command(tiny_model, pairs, tmp_path / "out", PAIRS_PER_STEP // 2), *flags]
    if name == "fsdp2":
        code = "import json, os; os.write(1, json.dumps(dict(os.environ)).encode() + b'\\n')"  # in one piece
        first, second = map(json.loads, output_of(1, *start, "--no_python", sys.executable, "-c", code).splitlines())
        assert first["WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
        for variable in first.keys() - {"WORLD_SIZE", *OF_A_RANK}:
            monkeypatch.setenv(variable, first[variable])
        assert output_of(2, *argv).count("DistributedType.FSDP") == 2
    else:
        launch(1, *start, *argv)
    assert losses(tmp_path / "out") == pytest.approx(losses(alone), abs=2e-3)
    assert json.loads((tmp_path / "out" / "margin_run.json").read_text())["processes"] == 2
    for key, value in load_file(alone / "model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[key], value, atol=2e-3, rtol=0)


def test_processes_that_nothing_joins_are_refused(tiny_model, pairs, tmp_path):
    """As torchrun starts them: without --use_cpu on a machine without an accelerator; with it, one run."""
    if torch.accelerator.is_available():
        pytest.skip("accelerate joins processes on an accelerator")
    argv = [*CLI, *command(tiny_model, pairs, tmp_path / "out", 2)]
    with pytest.raises(pytest.fail.Exception, match="2 ranks ended with") as refused:
        output_of(2, *argv)
    assert "a launcher started 2 processes (WORLD_SIZE=2), but nothing joins them" in refused.value.msg
    assert "add --use_cpu true" in refused.value.msg
    assert not (tmp_path / "out").exists()
    output_of(2, *argv, "--use_cpu", "true")
    assert json.loads((tmp_path / "out" / "margin_run.json").read_text())["processes"] == 2


def test_no_process_waits_for_one_that_was_refused(tiny_model, pairs, tmp_path):
    """Errors that the main process alone finds: all processes raise them, so that none is left waiting."""
    said = output_of(2, str(Path(__file__).with_name("refused.py")), tiny_model, pairs, str(tmp_path))
    for error in (
        "error: .*of another kind",
        "settings: .*margin_run.json is a folder",
        "checkpoint: .*checkpoint-1 cannot be written",
        r"options: process 0 and process 1 .*: num_train_epochs 1 and 2; data_seed 0 and 1\. Start all",
        r"rows: process 0 and process 1 of one run .*: training set '8 rows \(tokens \w+, .* and '8 rows",
        "sizes: process 0 and process 1 of one run .*: train_dataset 8 and 9. Start all with the same",
        r"sets: process 0 and process 1 of one run .*: eval_dataset \{'a': 2\} and None\. Start",
        r"order: process 0 and process 1 of one run .*: order of evaluation sets \['a', 'b'\] and \['b', 'a'\]",
        r"scores: process 0 and process 1 .*[:;] score columns \['score_chosen', .* and \['chosen_score'",
        "streams: process 0 and process 1 of one run .*: first rows of streams",
        r"observed: process 0 and process 1 .*: what observed\(\) of the terms gives \['one'\] and \['other'\]",
        "bases: process 0 and process 1 of one run .*: base 'cpo' and 'dpo';",
        "roles: process 0 and process 1 of one run .*: weight 'plain' and None; margin None and 'plain'",
        "precomputed: process 0 and process 1 .*: precompute_ref_log_probs False and True",
        "precomputing: process 0 and process 1 .*: precompute_ref_batch_size 1 and 2",
        "used: output_dir .* has files of an earlier run",
        "locked: another run is training in output_dir",
    ):
        assert len(re.findall(f"(?m)^{error}", said)) == 2, said


def test_from_python_too(tiny_model, tmp_path, monkeypatch):
    config = MarginCPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes \(WORLD_SIZE=2\).*use_cpu=True in the config"):
        MarginCPOTrainer(tiny_model, config, train_dataset=preference_rows(4))


def test_accelerate_launches_one_process_on_cpus(monkeypatch):
    """Which the warning says: two are asked for."""
    if torch.accelerator.is_available():
        pytest.skip("accelerate starts several on accelerators")
    code = "import os; print([name in os.environ for name in ('MASTER_ADDR', 'ACCELERATE_MIXED_PRECISION', 'RANK')])"
    monkeypatch.delenv("RANK", raising=False)
    options = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    said = output_of(1, *launcher(*options, "--no_python", sys.executable, "-c", code))
    assert said.splitlines() == ["[True, True, False]"]


@pytest.mark.parametrize("argv", [["score", "pairs.jsonl"], ["inspect", "pairs.jsonl"], ["demo"]])
def test_the_work_of_one_process(argv, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=rf"{argv[0]} is the work of one process.*OMPI_COMM_WORLD_SIZE=3"):
        main(argv)


def test_select_shares_the_work(tiny_model, tmp_path):
    """One set of files, with the gaps that one process measures."""
    preference_rows(8, seed=4).to_json(tmp_path / "pairs.jsonl")
    ranked = {}
    for ranks in (1, 2):
        argv = ["select", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
        argv += ["--batch_size", str(4 // ranks), "--anchor_batch_multiplier", "1", "--max_length", "128"]
        argv += ["--output_dir", str(tmp_path / str(ranks))]
        assert main(argv) == 0 if ranks == 1 else output_of(ranks, *CLI, *argv)
        lines = (tmp_path / str(ranks) / "all.jsonl").read_text().splitlines()
        ranked[ranks] = [json.loads(line)["anchor_gap"] for line in lines]
    assert ranked[2] == pytest.approx(ranked[1], abs=1e-4)
    argv[argv.index("--batch_size") + 1] = "3"
    told = "import sys; sys.stderr = sys.stdout; from trl_margins.cli import main; sys.exit(main(sys.argv))"
    said = output_of(2, "-c", told, *argv)
    assert said.count("4 pairs of the first mini-batches fill up the last ones of 2 processes") == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the names of threads are in /proc on Linux alone")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """One that did aborted a process at its exit, now and then: a cycle around DDP holds the group."""

    def of_gloo():
        return [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())]

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    cycle = [torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))]
    cycle.append(cycle)
    del cycle
    assert of_gloo()
    leave_process_group()
    assert not of_gloo()
