"""The command line: files in, a model and numbers out."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import transformers
import yaml
from conftest import METHODS_AND_BASES, preference_rows, quiet
from datasets import DatasetDict, load_dataset
from said import hear, word_for_word  # noqa: F401 - its messages are held against said/
from transformers import TrainerCallback, pipeline
from transformers.integrations import INTEGRATION_TO_CALLBACK
from trl import TrlParser
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

import trl_margins
from trl_margins import cli
from trl_margins.cli import completion, env, main, options, train
from trl_margins.cli.mixture import check_mixture, mixture_splits
from trl_margins.cli.train import as_argument, datasets_of, loading, parse
from trl_margins.cli.train_options import check_run
from trl_margins.data.demo import make_demo_splits
from trl_margins.data.loading import load_splits, pick_split
from trl_margins.methods import METHODS, names_of
from trl_margins.trainers.configs import GapPOConfig, GapPODPOConfig, MarginCPOConfig

SMALL = [
    "--max_length",
    "128",
    "--report_to",
    "none",
    "--per_device_train_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "1",
]
DRY = ["--recipe", "qwen2.5-0.5b-instruct/gappo", "--dry_run"]


@pytest.fixture
def pairs_file(tmp_path) -> str:
    path = tmp_path / "pairs.jsonl.gz"
    preference_rows(12, "conversational").to_json(path, compression="gzip")
    return str(path)


@pytest.mark.parametrize(
    "name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json", "pairs.csv", "pairs.parquet", "saved"]
)
def test_every_kind_of_file(name, tmp_path):
    rows, path = preference_rows(5), tmp_path / name
    if name == "saved":
        rows.save_to_disk(path)
    elif "json" in name:
        rows.to_json(path, compression="gzip" if name.endswith("gz") else None)
    else:
        getattr(rows, f"to_{path.suffix[1:]}")(path)
    loaded = pick_split(load_splits(str(path)), "train", name)
    assert loaded.to_list() == rows.to_list()


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "pairs.xlsx").touch()
    with pytest.raises(ValueError, match=r"pairs.xlsx: a data file is one of \.jsonl"):
        load_splits(str(tmp_path / "pairs.xlsx"))
    with pytest.raises(FileNotFoundError, match=r"no data set at missing\.jsonl"):
        load_splits("missing.jsonl")
    preference_rows(2).to_json(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"has the splits \['train'\], not 'test'"):
        pick_split(load_splits(str(tmp_path / "a.jsonl")), "test", "a.jsonl")


def test_train_then_evaluate(tiny_model, pairs_file, tmp_path, capsys):
    out = tmp_path / "out"
    config = {
        "method": "gappo",
        "model_name_or_path": tiny_model,
        "dataset_name": pairs_file,
        "eval_dataset_name": pairs_file,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 0.01,
        "train_only": "mlp",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    argv = ["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(out), "--max_steps", "3", *SMALL]
    assert main(argv) == 0
    trained = json.loads((out / "eval_results.json").read_text())
    card = (out / "README.md").read_text()
    assert "GapPO" in card
    assert "Gradient-Adaptive Pairwise Preference Optimization" in card
    assert f"--config {tmp_path / 'run.yaml'} --output_dir" in card  # how to make it again
    again = ["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(out), "--max_steps", "4", *SMALL]
    assert main([*again, "--save_strategy", "steps", "--save_steps", "2", "--overwrite_output_dir"]) == 0
    assert (out / "_previous-1" / "README.md").read_text() == card
    assert "overwrite_output_dir" not in (out / "README.md").read_text()  # there is nothing to overwrite elsewhere
    assert main([*again, "--max_steps", "6", "--resume_from_checkpoint", "true"]) == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 6
    argv = ["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(out), "--max_steps", "3", *SMALL]
    assert main([*argv, "--overwrite_output_dir", "true"]) == 0

    numbers = tmp_path / "deep" / "numbers.json"
    argv = ["evaluate", "--model_name_or_path", str(out), "--dataset_name", pairs_file, "--json", str(numbers)]
    capsys.readouterr()
    assert main([*argv, "--max_length", "128"]) == 0
    table = capsys.readouterr().out
    written = json.loads(numbers.read_text())["sets"]["pairs"]
    for name in ("pwa", "pwa_all", "spearman", "n_pairs", "n_pairs_gap"):
        assert written[name] == pytest.approx(trained[f"eval_{name}"]), name
    assert "pairwise accuracy, score gap ≥ 2" in table
    assert f"{written['pwa']:.4f}" in table
    assert pipeline("text-generation", str(out))("small dog", max_new_tokens=2)[0]["generated_text"]


def test_the_split_of_an_evaluation_set(tiny_model, tmp_path, caplog):
    """The test split where there is one, else the only one."""
    splits = DatasetDict({"train": preference_rows(8), "test": preference_rows(6, seed=1)})
    splits.save_to_disk(tmp_path / "pairs")
    preference_rows(5, seed=2).to_json(tmp_path / "more.jsonl")
    argv = ["train", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs"), *SMALL]
    argv += ["--overwrite_output_dir", "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    argv += ["--eval_dataset_name"]
    for name, n in {"pairs": 6, "more.jsonl": 5}.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "trl_margins"):
            assert main([*argv, str(tmp_path / name)]) == 0
        assert f"; eval {n} pairs (" in caplog.text
    for flag in ("--dataset_test_split", "--dataset_train_split"):
        with pytest.raises(ValueError, match=rf"\['train', 'test'\], not 'dev': name one of them with {flag}"):
            main([*argv, str(tmp_path / "pairs"), flag, "dev"])
    with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\]: name one of them with --dataset_split"):
        main(["select", *argv[1:5], "--output_dir", str(tmp_path / "ranked")])


def test_noise_by_length_reads_the_named_prompt(tiny_model, tmp_path, caplog):
    preference_rows(8).rename_column("prompt", "question").to_json(tmp_path / "pairs.jsonl")
    argv = ["train", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl"), *SMALL]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--prompt_column", "question"]
    with caplog.at_level(logging.INFO, "trl_margins"):
        assert main([*argv, "--noise", "length:0.25"]) == 0
    assert "flipped 2 of 8 pairs (length)" in caplog.text


def test_dpo_base_and_adapter(tiny_model, pairs_file, tmp_path):
    out = tmp_path / "out"
    argv = ["train", "--base", "dpo", "--model_name_or_path", tiny_model, "--dataset_name", pairs_file]
    argv += [
        "--output_dir",
        str(out),
        "--max_steps",
        "2",
        "--use_peft",
        "--lora_target_modules",
        "q_proj",
        *SMALL,
    ]
    assert main(argv) == 0
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    argv = ["evaluate", "--model_name_or_path", str(out), "--dataset_name", pairs_file, "--max_length", "128"]
    assert main([*argv, "--json", str(tmp_path / "n.json")]) == 0
    assert json.loads((tmp_path / "n.json").read_text())["sets"]["pairs"]["n_pairs"] == 12


def test_plain_dpo_with_a_weight(tiny_model, pairs_file, tmp_path, caplog):
    """Any term on any base: the reference model is loaded as TRL does."""
    argv = ["train", "--method", "none", "--base=dpo", "--weight", "score-gap", "--model_name_or_path", tiny_model]
    argv += ["--dataset_name", pairs_file, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", *SMALL]
    with caplog.at_level(logging.INFO, "trl_margins"):
        assert main(argv) == 0
    assert f"{pairs_file}: train 12 pairs (" in caplog.text


@pytest.mark.parametrize(
    ("argv", "config"),
    [
        ([], GapPOConfig),
        (["--base", "dpo"], GapPODPOConfig),
        (["--method=none"], MarginCPOConfig),
        (["--method", "none", "--base", "cpo"], MarginCPOConfig),
    ],
)
def test_the_config_follows_method_and_base(argv, config):
    assert type(parse([*argv, "--use_cpu"])[1]) is config


@pytest.mark.parametrize(("method", "base"), METHODS_AND_BASES)
def test_a_parser_keeps_the_terms_of_a_method(method, base):
    """Also TRL's own parser, in a custom script."""
    config = parse(["--method", method, "--base", base, "--use_cpu"])[1]
    (plain,) = TrlParser(type(config)).parse_args_and_config(["--use_cpu", "--bf16", "false"])
    for kind in ("weight", "margin"):
        assert config.term_names(kind) == plain.term_names(kind) == names_of(getattr(METHODS[method], kind))


def test_a_flag_goes_before_the_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("method: none\nbase: dpo\nbeta: 3.0\noutput_dir: x\n")
    argv = ["--config", str(tmp_path / "c.yaml"), "--method", "gappo", "--beta", "2.0"]
    config = parse([*argv, "--use_cpu"])[1]
    assert type(config) is GapPODPOConfig
    assert config.beta == 2.0


def test_fp32_on_a_cpu_unless_asked(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--use_cpu"]
    assert not parse(argv)[1].bf16
    assert parse([*argv, "--bf16", "true"])[1].bf16


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        ([], 0, "train with a method on a preference set"),
        (["--help"], 0, "usage: trl-margins COMMAND [options]"),
        (["--version"], 0, "0."),
        (["tune"], 2, "unknown command 'tune'"),
        (["evalute"], 2, "(did you mean 'evaluate'?)"),
        (["env", "--help"], 0, "usage: trl-margins env [-h]"),
        (["completion", "dos"], 2, "invalid choice: 'dos'"),
        (["train", "--help"], 0, "usage: trl-margins train [--config FILE | --recipe NAME] [options]"),
        (["inspect", "-h"], 0, "usage: trl-margins inspect DATA [options]"),
        (["convert", "--help"], 0, "usage: trl-margins convert [-h] [--out OUT] FILE"),
    ],
)
def test_usage(argv, status, text, capsys):
    try:
        ended = main(argv)
    except SystemExit as stop:
        ended = stop.code
    assert ended == status
    printed = capsys.readouterr()
    assert text in printed.out + printed.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--learning_rat", "1"], "did you mean '--learning_rate'?"),
        (["train", "--max_steps", "many"], "max_steps"),
        (["train", "--method", "gappp"], "unknown method 'gappp'"),
        (["train", "--config", "mine.yaml"], "learning_rat"),
        (["train", "--dry_run"], "--model_name_or_path is missing"),
        (["evaluate", "--json", "x"], "--model_name_or_path"),
        (["inspect", "pairs.jsonl", "--ef_metrics", "rouge9"], "rouge9"),
        (["compare", "--methods", "gappp"], "unknown method 'gappp'"),
        (["pairs"], "--out"),
    ],
)
def test_a_usage_error_ends_with_2(argv, said, tmp_path, monkeypatch, capsys):
    """As the console calls it, in this process."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("output_dir: x\nlearning_rat: 1\n")
    monkeypatch.setattr(sys, "argv", ["trl-margins", *argv])
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_the_process_ends_with_that_status(tmp_path):
    """Of commands that load nothing heavy."""
    for status, argv in {2: ["recipes", "--tabel"], 1: ["report", str(tmp_path / "missing")]}.items():
        command = [sys.executable, "-W", "ignore", "-m", "trl_margins.cli", *argv]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ended.returncode, "Traceback" in ended.stderr) == (status, False), ended.stderr


def test_help_begins_with_the_method_and_leaves_nothing_out(capsys):
    for argv in (["train", "--help"], ["train", "--method", "gamma-po", "--help_all"]):
        with pytest.raises(SystemExit):
            main(argv)
    short, _, whole = capsys.readouterr().out.partition("usage: trl-margins train")[2].partition("usage: ")
    assert re.findall(r"^(\S.*):$", short, re.MULTILINE) == [
        *("options", "Method", "Model", "Data", "Training", "All methods")
    ]
    flags = re.findall(r"^  (--\w+)", short, re.MULTILINE)
    assert flags.index("--method") < flags.index("--model_name_or_path") < flags.index("--output_dir")
    assert "--score_gap_transform" in flags
    assert "--gamma_po_tau" not in flags  # another method's
    everything = set(re.findall(r"^  (--\w+)", whole, re.MULTILINE))
    assert everything - {"--help_all"} == {
        action.option_strings[0] for action in train.parser_for("gamma-po", "cpo")._actions if action.dest != "help"
    } - {"--help_all"}
    assert re.search(r"\d+ more options of TRL and transformers: trl-margins train --help_all", short)


def test_the_help_of_compare_has_what_train_has(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    places = [
        printed.index(text) for text in ("\nCompare:", "  --methods ", "\nMethod:", "  --learning_rate ", "\nData:")
    ]
    assert places == sorted(places)
    assert "--method " not in printed
    assert "trl-margins compare --help_all" in printed


def test_env_has_versions_and_no_paths(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"- trl-margins: {trl_margins.__version__}\n" in printed
    assert f"- Transformers version: {transformers.__version__}\n" in printed
    assert "hf_xxx" not in printed
    assert str(Path.home()) + "/" not in printed


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_in_bash(tmp_path, capsys):
    """bash itself completes with the script, and starts no Python for it."""
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    tried = {
        "ev": "evaluate",
        "train --score_gap_t": "--score_gap_threshold --score_gap_transform",
        "train --base c": "cpo",
    }
    for words, completed in tried.items():
        code = rf"""
            source {tmp_path / "script"}
            COMP_WORDS=(trl-margins {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            completes=$(complete -p trl-margins | sed 's/.*-F \([^ ]*\).*/\1/')
            PATH=
            $completes
            echo "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert sorted(done.stdout.split()) == completed.split(), done.stderr


def test_the_demo_trains_with_its_options(tmp_path, monkeypatch):
    """On another model: what it gives to the trainer."""
    given: dict[str, Any] = {}

    def trainer(model: Any, args: Any, **sets: Any) -> None:
        given.update(vars(args), model=model, **sets)
        raise RuntimeError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_margins.GapPOTrainer", trainer)
    monkeypatch.setattr("trl_margins.cli.demo.bundled_model_path", lambda name: Path(name))
    monkeypatch.setattr("trl_margins.cli.demo.load_model", lambda name, **options: (name, options))
    monkeypatch.setattr("trl_margins.cli.demo.load_tokenizer", lambda name: f"tokenizer of {name}")
    options = {"output_dir": "out", "max_steps": 3, "batch_size": 5, "learning_rate": 0.5, "seed": 7}
    with pytest.raises(RuntimeError, match="enough"):
        main(["demo", *(str(part) for name, value in options.items() for part in (f"--{name}", value))])
    size = options.pop("batch_size")
    options |= {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}
    options |= {"gradient_accumulation_steps": 1, "max_length": 256, "train_only": ["mlp"], "bf16": False}
    options |= {"gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 5, "report_to": []}
    assert {name: given[name] for name in options} == options
    assert given["model"] == ("smollm2-135m-instruct", {"device_map": None})
    assert given["processing_class"] == "tokenizer of smollm2-135m-instruct"
    made = make_demo_splits(seed=7)
    assert [given[f"{name}_dataset"][:] for name in ("train", "eval")] == [made["train"][:], made["test"][:]]


def test_the_demos_pairs_as_files(tmp_path, monkeypatch, capsys):
    """A recipe's comment names the folder that the recipe reads."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--data-only", "demo-pairs"]) == 0
    assert "480 pairs in demo-pairs/train.jsonl" in capsys.readouterr().out
    written = load_dataset("json", data_files={s: f"demo-pairs/{s}.jsonl" for s in ("train", "test")})
    made = make_demo_splits(seed=0)
    assert {split: rows.to_list() for split, rows in written.items()} == {s: r.to_list() for s, r in made.items()}
    assert not Path("gappo-demo").exists()


def test_histograms_by_a_flag(tiny_model, tmp_path, monkeypatch):
    added = []
    monkeypatch.setattr(
        "trl_margins.recording.histograms.PairHistograms.on_log", lambda self, *a, **k: added.append(1)
    )
    monkeypatch.setattr("trl_margins.recording.histograms.PairHistograms.on_train_begin", lambda self, *a, **k: None)
    preference_rows(4).to_json(tmp_path / "pairs.jsonl")
    given = {
        "model_name_or_path": tiny_model,
        "dataset_name": tmp_path / "pairs.jsonl",
        "output_dir": tmp_path / "out",
    }
    given |= {**quiet(max_steps=1), "log_pairs": True, "logging_steps": 1}
    flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    assert main(["train", *flags]) == 0
    assert not added
    assert main(["train", *flags, "--overwrite_output_dir", "--log_histograms"]) == 0
    assert not added  # without a tracker
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "own", TrainerCallback)
    assert main(["train", *flags, "--overwrite_output_dir", "--log_histograms", "--report_to", "own"]) == 0
    assert added


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["tune"], ["recipes"], ["convert", "--help"]])
def test_a_light_command_loads_nothing_heavy(argv):
    """A subcommand is imported when it runs."""
    code = f"""if True:
        import contextlib, sys
        from trl_margins.cli import main
        with contextlib.suppress(SystemExit):
            main({argv})
        print([name for name in ("torch", "transformers", "trl", "datasets", "numpy") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_missing_arguments_are_named(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="--dataset_name is missing"):
        main(["train", "--model_name_or_path", tiny_model, "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="unknown method 'gappp'; known: gappo, "):
        main(["train", "--method", "gappp"])


def test_unknown_yaml_key_is_an_error(tmp_path):
    (tmp_path / "c.yaml").write_text("output_dir: x\nlearning_rat: 1\n")
    with pytest.raises(ValueError, match="learning_rat"):
        main(["train", "--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["recipes"], *(["train", *more] for more in (["--help"], DRY))])
def test_a_reader_that_leaves(arguments, monkeypatch):
    """Whatever prints: `| head` ends it without a traceback."""
    read, write = os.pipe()
    os.close(read)
    with suppress(BrokenPipeError), open(write, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        monkeypatch.setattr(sys, "argv", ["trl-margins", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code in (0, 141)  # argparse itself sees to a long help


def test_the_name_of_the_program_says_nothing(tmp_path, monkeypatch):
    """It is empty in an interactive Python; TRL's parser reads options from a file that is named after it."""
    (tmp_path / "run.args").write_text("--no_such_option 1")
    for name in ("", str(tmp_path / "run.py")):
        monkeypatch.setattr(sys, "argv", [name])
        assert main(["train", *DRY, "--output_dir", str(tmp_path / "o")]) == 0


def test_a_reader_that_leaves_training(tiny_model, pairs_file, tmp_path, monkeypatch, capfd):
    """The run goes on, and its model is there; that what it prints is lost is said once."""
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", str(tmp_path / "o")]
    flags += ["--max_steps", "2", "--bf16", "false", "--use_cpu", "--report_to", "none", "--logging_steps", "1"]
    read, write = os.pipe()
    os.close(read)
    with suppress(BrokenPipeError), open(write, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        monkeypatch.setattr(sys, "argv", ["trl-margins", "train", *flags])
        assert main() == 0
    assert (tmp_path / "o/model.safetensors").is_file()
    assert json.loads((tmp_path / "o/trainer_state.json").read_text())["global_step"] == 2
    assert capfd.readouterr().err.count("standard output is lost, which cannot be written: Broken pipe") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_full_disk_behind_standard_output(monkeypatch, capfd):
    """The work is done, whatever happens to what it prints; that this is lost is said once."""
    done = []

    def works(argv):
        for _ in range(3):
            sys.stdout.write("a line\n")
            sys.stdout.flush()
        done.append(argv)
        return 0

    monkeypatch.setattr("trl_margins.cli.recipes.main", works)
    monkeypatch.setattr(sys, "argv", ["trl-margins", "recipes"])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main() == 1
    assert done
    assert capfd.readouterr().err == "standard output is lost, which cannot be written: No space left on device\n"


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdin", "stdout", "stderr"]])
def test_closed_streams(closed, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["trl-margins", "recipes"])
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert main() == 0
    out, err = capfd.readouterr()
    assert bool(out) == ("stdout" not in closed)
    assert ("standard output is closed" in err) == (closed == ["stdout"])


def test_a_stream_of_an_old_locale(monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr(sys, "argv", ["trl-margins", "recipes"])
    with open(write, "w", encoding="ascii") as ascii_only:
        monkeypatch.setattr(sys, "stdout", ascii_only)
        assert main() == 0
    with open(read) as printed:
        assert "\\u03b3-DPO" in printed.read()


def test_another_broken_pipe_is_a_bug(monkeypatch, capfd):
    def breaks(argv):
        raise BrokenPipeError("a tracker's")

    monkeypatch.setattr("trl_margins.cli.recipes.main", breaks)
    monkeypatch.setattr(sys, "stdout", open(os.dup(1), "w"))  # noqa: SIM115
    monkeypatch.setattr(sys, "argv", ["trl-margins", "recipes"])
    with pytest.raises(BrokenPipeError, match="a tracker's"):
        main()


def test_head_sees_the_first_lines():
    command = f"{sys.executable} -m trl_margins.cli recipes | head -n 1"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("name ")
    assert ran.stderr == ""


def test_a_name_with_a_dash_in_front():
    assert [as_argument(name) for name in ("-dash", "--x/y", "a-b", "/x")] == ["./-dash", "./--x/y", "a-b", "/x"]


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        (None, "Seq2SeqLM"),
        ("text-generation", "CausalLM"),
        ("image-text-to-text", "ImageTextToText"),
        ("any-to-any", "MultimodalLM"),
    ],
)
def test_how_a_model_is_loaded_again(task, kind, monkeypatch):
    monkeypatch.setattr("trl_margins.trainers.card.task_of", lambda model: task)
    for adapted in (False, True):
        monkeypatch.setattr("trl_margins.cli.train.is_peft_model", lambda model, adapted=adapted: adapted)
        with_adapter = adapted and kind in ("Seq2SeqLM", "CausalLM")
        library, loader = ("peft", "AutoPeftModelFor") if with_adapter else ("transformers", "AutoModelFor")
        made = f"from {library} import {loader}{kind}; model = {loader}{kind}.from_pretrained('out'"
        assert loading(None, "out") == f"{made})"
        assert loading(None, "out", trust_remote_code=True) == f"{made}, trust_remote_code=True)"


# Word for word: what `train` prints of a run, and of its settings

OF_RUNS = {
    "flags": "--model_name_or_path m --dataset_name d --output_dir o --noise random:0.2 --report_to none",
    "reference": "--method dpo --model_name_or_path m --dataset_name d --precompute_ref_log_probs --dtype bfloat16",
    "adapter": "--model_name_or_path m --dataset_name d --use_peft --lora_r 4 --lora_target_modules q_proj v_proj",
    "others": "--method none --base dpo --weight score-gap --loss_type sigmoid sft --loss_weights 1 0.5 --optim sgd "
    "--model_name_or_path m --dataset_name d --eval_strategy steps --eval_steps 5 --lr_scheduler_type constant",
    "a secret": '--model_name_or_path m --dataset_name d --hub_token x --model_init_kwargs {"a":[1,null]}',
    "quantized": "--model_name_or_path m --dataset_name d --use_peft --load_in_4bit --tf32 true --deepspeed d.json",
}


@pytest.mark.parametrize("case", OF_RUNS)
def test_the_settings_of_a_dry_run(case, capsys):
    """All of them; and the same again from the file."""
    assert main(["train", "--bf16", "false", *OF_RUNS[case].split(), "--dry_run"]) == 0
    hear(capsys.readouterr().out)


@pytest.mark.parametrize("named", ["one", "list", "pattern", "splits"])
def test_the_files_of_a_mixture_are_read_as_files(named, tmp_path):
    """And not by the builder that is their path, which takes dates for times and `true` for 1.0."""
    rows = [
        {"prompt": "q", "chosen": "2026-01-01", "rejected": "no", "tools": [{"name": "f", "default": default}]}
        for default in (None, 1)
    ]
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for file in files:
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data_files = {
        "one": files[0],
        "list": files,
        "pattern": str(tmp_path / "[ab].jsonl"),
        "splits": {"train": files[0]},
    }
    part = DatasetConfig("json", data_files=data_files[named])
    found = list(mixture_splits(DatasetMixtureConfig(datasets=[part]))["train"])
    assert found == rows * (1 + (named in ("list", "pattern")))
    sliced = replace(part, split="train[1:]")
    assert list(mixture_splits(DatasetMixtureConfig(datasets=[sliced]))["train"]) == found[1:]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"columns": ["prompt", "nope"]}, r"columns \['prompt', 'nope'\] cannot be read: .*nope"),
        ({"split": "train[2:9%]x"}, "split train.* cannot be read: "),
        ({"path": "text", "data_files": "none*.txt"}, "path text, data_files none.*txt, split train cannot be read: "),
        (
            {"path": "parquet", "data_files": "rows.jsonl"},
            "path parquet, data_files rows.jsonl, split train cannot be read: Parquet ",
        ),
        ({"path": "nope.jsonl"}, "path nope.jsonl, split train cannot be read: no data set at nope.jsonl"),
        (
            {"data_files": "rows.jsonl"},
            "cannot be read: path is a file: leave data_files and data_dir out",
        ),
        ({"path": "csv", "data_dir": "mixed"}, "path csv, data_dir mixed, split train cannot be read: .*line 3"),
    ],
)
def test_an_entry_of_a_mixture_that_cannot_be_read(entry, said, tmp_path, monkeypatch):
    """It is named in what `datasets` says."""
    monkeypatch.chdir(tmp_path)
    preference_rows(3).to_json("rows.jsonl")
    Path("mixed").mkdir()
    preference_rows(3).to_parquet("mixed/rows.parquet")
    Path("mixed", "rows.csv").write_text("a,b\n1\n2,3,4\n")
    parts = [DatasetConfig("rows.jsonl"), DatasetConfig(**{"path": "rows.jsonl", **entry})]
    with pytest.raises(ValueError, match=f"^the entry of datasets with .*{said}"):
        mixture_splits(DatasetMixtureConfig(datasets=parts))


def test_a_test_split_of_all_rows(tmp_path):
    preference_rows(3).to_json(tmp_path / "rows.jsonl")
    parts = [DatasetConfig(str(tmp_path / "rows.jsonl"))]
    with pytest.raises(ValueError, match=r"^test_split_size: 1 would be a single row"):
        mixture_splits(DatasetMixtureConfig(datasets=parts, test_split_size=1.0))
    with pytest.raises(ValueError, match=r"^test_split_size: 3 of 3 rows leaves none to train on: give a smaller"):
        mixture_splits(DatasetMixtureConfig(datasets=parts, test_split_size=3))
    assert len(mixture_splits(DatasetMixtureConfig(datasets=parts, test_split_size=2))["train"]) == 1
    with pytest.raises(ValueError, match=r"^test_split_size: 0.99 of 3 rows leaves none to train on"):
        mixture_splits(DatasetMixtureConfig(datasets=parts, test_split_size=0.99))
    with pytest.raises(ValueError, match=r"^test_split_size: 1.5 is neither a share between 0 and 1 nor a whole"):
        mixture_splits(DatasetMixtureConfig(datasets=parts, test_split_size=1.5))


def test_shares_of_a_mixture_that_give_no_row(tmp_path, caplog):
    preference_rows(3).to_json(tmp_path / "rows.jsonl")
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(str(tmp_path / "rows.jsonl"))] * 2)
    with pytest.raises(ValueError, match=r"^mixture_weights: no set gives a row: raise them"):
        mixture_splits(mixture, [0.01, 0])
    with caplog.at_level(logging.WARNING, "trl_margins"):
        assert len(mixture_splits(mixture, [0.01, 1])["train"]) == 3
    assert "rows.jsonl: 0 of 3 rows" in caplog.text


@pytest.mark.parametrize("given", [{}, {"data_files": []}])
def test_a_kind_of_file_is_no_data_set(given, tmp_path, monkeypatch):
    """`datasets` would read whatever lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    preference_rows(3).to_json("other.jsonl")
    with pytest.raises(ValueError, match="datasets: path json is a kind of file: name the file as path, or as its"):
        mixture_splits(DatasetMixtureConfig(datasets=[DatasetConfig("json", **given)]))
    with pytest.raises(ValueError, match="json is a kind of file, and no data set: name the file"):
        load_splits("json")


@pytest.mark.parametrize(
    "place", ["https://huggingface.co/", "https://hf.co/", "https://hf-mirror.com/", "hf.co/", ""]
)
@pytest.mark.parametrize("behind", ["", "/", "/tree/main", "/blob/main/a.jsonl", "?row=1"])
@pytest.mark.parametrize("name", ["some/set", "set"])
def test_an_address_is_no_id(name, place, behind):
    said = rf"is {'' if place else 'no folder; if it is '}the address of a data set: give its id, {name}$"
    is_told = place or ("/" in name and ".jsonl" not in behind)  # without a server it may be a file
    with pytest.raises(ValueError, match=said) if is_told else pytest.raises(Exception, match="set"):
        load_splits(f"{place}datasets/{name}{behind}")


def test_slices_of_splits(tmp_path):
    """As `datasets` has them, also of a folder in a mixture, where TRL's get_dataset takes them."""
    for name, n in {"train": 20, "test": 3}.items():
        preference_rows(n, seed=n).to_json(tmp_path / f"{name}.jsonl")
    splits = load_splits(str(tmp_path))
    for spec in ("train[:5]", "train[-2:]", "train[:10%]+test", "test+train[18:]"):
        expected = datasets.load_dataset(str(tmp_path), split=spec).to_list()
        assert pick_split(splits, spec, "pairs").to_list() == expected
    wrong = {
        "nope[:3]": ": Unknown split",
        "train[a]": ": Unrecognized instr",
        "train[20:]": " has no rows: the splits",
    }
    for spec, said in wrong.items():
        with pytest.raises(ValueError, match=rf"^data set 'pairs', split '{re.escape(spec)}'{said}"):
            pick_split(splits, spec, "pairs")
    with pytest.raises(ValueError, match="a stream has no slices: load the data set instead"):
        pick_split(load_splits(str(tmp_path), streaming=True), "train[:5]", "pairs")
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(str(tmp_path), split="train[:5]")])
    assert len(mixture_splits(mixture)["train"]) == 5
    with pytest.raises(ValueError, match=r"split train\[:5\]: a stream has no slices; load the data sets"):
        check_mixture(replace(mixture, streaming=True), None, None)


@pytest.mark.parametrize("name", ["helpful+harmless", "en[short]"])
def test_a_split_whose_name_is_like_a_slice(name, tmp_path):
    """It comes first."""
    saved = DatasetDict({"train": preference_rows(3), name: preference_rows(2, seed=1)})
    saved.save_to_disk(tmp_path / "saved")
    assert len(pick_split(load_splits(str(tmp_path / "saved")), name, "saved")) == 2
    given = ["--dataset_name", str(tmp_path / "saved"), "--output_dir", "o", "--model_name_or_path", "m"]
    run = parse([*given, "--dataset_train_split", name, "--bf16", "false"])
    check_run(*run)
    assert len(datasets_of(run[0], run[1], run[3])[0]) == 2


@pytest.mark.parametrize("split", ["train[10%]", "train[::2]", "train[:110%]", "train[:3]x"])
def test_a_slice_that_is_none_is_refused_before_the_data_is_loaded(split):
    for flag in ("--dataset_train_split", "--dataset_test_split"):
        run = parse(f"--model_name_or_path m --dataset_name d/e --output_dir o --bf16 false {flag} {split}".split())
        with pytest.raises(ValueError, match=rf"^split '{re.escape(split)}': [PU]"):
            check_run(*run)


def test_a_slice_of_a_stream_is_refused_before_the_data_is_loaded():
    given = "--model_name_or_path m --dataset_name d/e --output_dir o --max_steps 1 --dataset_streaming true"
    with pytest.raises(ValueError, match=r"^split 'train\[:3\]': a stream has no slices"):
        check_run(*parse([*given.split(), "--dataset_train_split", "train[:3]"]))


def test_a_name_that_is_neither_here_nor_in_the_cache(tmp_path, monkeypatch):
    """Offline, of a folder elsewhere that `datasets` has read once."""
    preference_rows(3).to_json(tmp_path / "once/here/train.jsonl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "once")
    load_splits("here")
    monkeypatch.chdir(tmp_path)
    for name, error in {"here": FileNotFoundError, "nowhere": ConnectionError}.items():
        with pytest.raises(error, match=f"^no file or folder {name} is here, and of the Hub: Couldn't [^\n]*$"):
            load_splits(name)


def test_epochs_beside_steps(tmp_path, caplog):
    given = ["--model_name_or_path", "m", "--dataset_name", "d/e", "--output_dir", "o", "--num_train_epochs", "3"]
    for steps in ("-1", "5"):
        caplog.clear()
        parse([*given, "--max_steps", steps])
        assert ("no effect of num_train_epochs: the run has max_steps 5" in caplog.messages) == (steps == "5")
    file = tmp_path / "own.yaml"
    file.write_text("num_train_epochs: 1\nmax_steps: 5\n")
    for flags in ([], ["--max_steps", "7"]):  # which cuts the file's run short
        caplog.clear()
        parse([*given[:-2], "--config", str(file), *flags])
        assert ("no effect of num_train_epochs: the run has max_steps 5" in caplog.messages) == (not flags)


def test_what_a_recipe_says_for_runs_of_another_kind(caplog):
    """It is nobody's mistake that its settings of evaluations are not read in a run without; one's own are named."""
    given = ["--recipe", "llama-3-8b-instruct/gamma-po", "--dataset_name", "d/e", "--eval_strategy", "no"]
    for more in ([], ["--eval_steps", "7"]):
        caplog.clear()
        check_run(*parse([*given, *more]))
        found = [message for message in caplog.messages if "no effect" in message]
        assert found == ["no effect of eval_steps: it is for eval_strategy 'steps'"] * bool(more)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--dataset_train_split train[:90%] --dataset_test_split train[90%:] --eval_strategy epoch", "train[90%:]"),
        ("--dataset_train_split train[:90%]", "train[:90%]"),
        ("--dataset_train_split train", None),
        ("--eval_dataset_name {} --dataset_test_split train[:2]", "train[:2]"),
        ("--eval_dataset_name {}", None),
    ],
)
def test_the_next_command_has_the_slice(flags, expected, tmp_path):
    file = str(tmp_path / "pairs.jsonl")
    preference_rows(20).to_json(file)
    given = ["--dataset_name", file, "--output_dir", "o", "--model_name_or_path", "m", "--bf16", "false"]
    script, config, _, _ = parse([*given, *flags.format(file).split()])
    evaluates = config.eval_strategy != "no" or script.eval_dataset_name
    trainer = of_run(tmp_path, eval_dataset=1 if evaluates else None)
    words = shlex.split(next(train.next_steps(trainer, script)))
    assert (words[words.index("--dataset_split") + 1] if "--dataset_split" in words else None) == expected


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("--dataset_train_split train[:5] --dataset_test_split train[5:9]", (5, 4)),
        (
            "--dataset_train_split train[-50%:] --eval_dataset_name {}/more/test.jsonl --dataset_test_split x",
            (10, 3),
        ),
        ("--eval_dataset_name {}/more/test.jsonl --dataset_test_split train[:2]", (20, 2)),
        ("--eval_dataset_name {}/more", (20, 3)),
        (
            "--eval_dataset_name {}/more --dataset_test_split nope",
            "more' has the splits .'test'., not 'nope'",
        ),
        ("--dataset_train_split nope[:3]", "has the splits .'train'., not 'nope.:3.'"),
    ],
)
def test_slices_to_train_on_and_to_evaluate_on(flags, sizes, tmp_path):
    (tmp_path / "more").mkdir()
    preference_rows(20).to_json(tmp_path / "pairs.jsonl")
    preference_rows(3).to_json(tmp_path / "more/test.jsonl")
    given = ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "o")]
    given += f"--model_name_or_path m --eval_strategy epoch --bf16 false {flags.format(tmp_path)}".split()
    with nullcontext() if isinstance(sizes, tuple) else pytest.raises(ValueError, match=sizes):
        script, config, _, mixture = parse(given)
        assert tuple(map(len, datasets_of(script, config, mixture))) == sizes


@pytest.mark.parametrize("name", ["https://www.kaggle.com/datasets/a/b", "s3://b/a.jsonl", "https://hf.co/a/b"])
def test_an_address_elsewhere(name):
    with pytest.raises(
        ValueError, match="is an address: download the file, and name it; of a set on the Hub, give th"
    ):
        load_splits(name)


@pytest.mark.parametrize("signal", [None, 15])
def test_an_exit_that_no_signal_asked_for_is_no_stop(signal, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preference_rows(4).to_json("rows.jsonl")

    def ends(trainer: Any, resume: Any) -> None:
        trainer.interrupts.signal = signal
        raise SystemExit(3)

    monkeypatch.setattr(train, "_train", ends)
    flags = ["--dataset_name", "rows.jsonl", "--method", "gappo", "--use_cpu", "true", "--max_steps", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model_name_or_path", str(tiny_model), "--output_dir", "out", "--report_to", "none", *flags])
    assert ended.value.code == 3
    assert ("stopped" in capsys.readouterr().out) == (signal is not None)


def test_the_settings_of_a_mixture(tmp_path, capsys):
    sets = [{"path": "a", "split": "train"}, {"path": "b", "name": "c"}]
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": "m", "datasets": sets, "test_split_size": 0.1, "mixture_seed": 3})
    )
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--dry_run", "--bf16", "false"]) == 0
    hear(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["gappo", "simpo", "gamma-po", "dpo", "geometric-anchor", "none"])
def test_the_groups_of_the_help(method):
    """Which options are in them, and in which order."""
    base = METHODS[method].bases[0] if method != "none" else "dpo"
    for group in train.parser_for(method, base)._action_groups[2:-1]:
        hear(f"{group.title}: {' '.join(action.dest for action in group._group_actions)}")


def test_the_help_of_an_option(capsys, monkeypatch):
    """One spelling, with its default where it has one that says something."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    hear(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["completion", "--help"])
    hear(capsys.readouterr().out)


def of_run(tmp_path: Path, **changed: Any) -> Any:
    """A trainer that has trained, as `train` sees it."""
    args = {"output_dir": "-out", "prompt_column": None, "system_column": None, "score_columns": None}
    args |= {"log_pairs": True, "trust_remote_code": False, "metric_for_best_model": None, "world_size": 1}
    args |= {key: changed.pop(key) for key in [*changed] if key in args}
    trainer = {"loaded_step": None, "state": SimpleNamespace(global_step=7, best_metric=0.81234)}
    trainer |= {"is_world_process_zero": lambda: True}
    trainer |= {"train_dataset": preference_rows(2), "eval_dataset": None, "model": None}
    trainer |= {"accelerator": SimpleNamespace(unwrap_model=lambda model: model), **changed}
    return SimpleNamespace(**trainer, args=SimpleNamespace(**args))


def test_which_model_was_kept(tmp_path):
    both, loss = {"eval_loss": 0.5, "eval_pwa_all": 0.25}, {"eval_loss": 0.5}
    hear(train._kept(of_run(tmp_path, loaded_step=3, metric_for_best_model="eval_pwa"), both))
    hear(train._kept(of_run(tmp_path, loaded_step=0, metric_for_best_model="eval_pwa"), both))
    for metrics in ({**both, "eval_pwa": 0.75, "eval_mine": 2}, both, loss, {}):
        for by in (None, "eval_mine"):
            hear(train._kept(of_run(tmp_path, metric_for_best_model=by), metrics))


def test_what_to_do_next(tmp_path, monkeypatch):
    """With each data set, and what of the run a command has to be told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_margins.trainers.card.task_of", lambda model: "text-generation")
    monkeypatch.setattr(train, "is_peft_model", lambda model: False)
    preference_rows(2).to_json("pairs.jsonl")
    DatasetDict(train=preference_rows(2), test=preference_rows(2)).save_to_disk("both")
    DatasetDict(train=preference_rows(2)).save_to_disk("one")
    told = {"prompt_column": "q", "system_column": "s", "score_columns": ["a", "b c"], "trust_remote_code": True}
    images = preference_rows(2).add_column("images", [None, None])
    for trainer in (
        of_run(tmp_path),
        of_run(tmp_path, eval_dataset=1, **told),
        of_run(tmp_path, train_dataset=images),
    ):
        for name, own in (
            ("pairs.jsonl", None),
            ("both", None),
            ("pairs.jsonl", "both"),
            ("both", "one"),
            (None, None),
        ):
            for config in ("c", None):
                script = SimpleNamespace(dataset_name=name, eval_dataset_name=own, dataset_config=config)
                script.dataset_train_split, script.dataset_test_split = "train", "test"
                hear("\n".join(train.next_steps(trainer, script)))
    hear("\n".join(train.next_steps(of_run(tmp_path, log_pairs=False), script)))


def test_what_a_stopped_run_says(tmp_path, monkeypatch):
    for last in (None, "out/checkpoint-5"):
        monkeypatch.setattr(train, "last_whole_checkpoint", lambda folder, last=last: last)
        for step in (0, 1, 6):
            for command, ranks in (("trl-margins train", 1), ("", 1), ("trl-margins train", 2)):
                config = SimpleNamespace(output_dir="out", world_size=ranks)
                hear(train._stopped(config, step, command))


@pytest.mark.parametrize(
    "given", ["--resume_from_checkpoint true", "--resume-from-checkpoint=out/a", "--overwrite_output_dir"]
)
def test_a_command_for_another_folder_has_no_flags_about_this_one(given):
    for before, after in (("", ""), (" --beta 2", " --max_steps 3"), ("", " --max_steps 3"), (" --beta 2", "")):
        assert train._ONCE.sub("", f"train{before} {given}{after}") == f"train{before}{after}"


@pytest.mark.parametrize("resume", [None, True, "out/checkpoint-1", "elsewhere/checkpoint-1"])
@pytest.mark.parametrize("overwrites", [False, True])
def test_a_folder_is_entered(resume, overwrites, tmp_path, monkeypatch):
    """It is to be empty, or its own run's, and the data in it is to stay."""
    looked = []
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    monkeypatch.setattr(train, "checkpoint_to_resume", lambda folder, resume: Path(resume))
    monkeypatch.setattr(train, "check_unused", lambda folder: looked.append(("unused", folder)))
    monkeypatch.setattr(train, "check_stays", lambda folder, data: looked.append((data, folder)))
    with ExitStack() as held:
        config = SimpleNamespace(output_dir="out", overwrite_output_dir=overwrites)
        train._enter_folder(held, config, resume, ["d", None, "e"])
    goes_on = resume in (True, "out/checkpoint-1")
    expected = [("unused", Path("out"))] * (not overwrites) + [(["d", "e"], Path("out"))]
    assert looked == ([] if goes_on else expected)


def test_where_training_stopped(tmp_path, monkeypatch, caplog):
    """With the traceback, unless it is about a file, which says all."""
    for error in (ValueError("wrong"), OSError("full")):
        for step, last in ((0, None), (4, None), (4, "out/checkpoint-4")):
            monkeypatch.setattr(train, "last_whole_checkpoint", lambda folder, last=last: last)
            trainer = of_run(tmp_path, state=SimpleNamespace(global_step=step))
            trainer.train = lambda resume_from_checkpoint, error=error: (_ for _ in ()).throw(error)
            caplog.clear()
            with pytest.raises(type(error)):
                train._train(trainer, None)
            assert [bool(record.exc_info) for record in caplog.records] == [isinstance(error, ValueError)] * (step > 0)


def test_bars_are_for_what_takes_its_time():
    with train.short_bars_hidden():
        from transformers.utils import logging as of_transformers

        hook = of_transformers.set_tqdm_hook(None)
    assert hook(lambda *args, **options: (args, options), (1,), {"total": 3, "leave": True}) == (
        (1,),
        {"total": 3, "leave": False, "delay": 1, "disable": None},
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_a_run(fails, tmp_path, monkeypatch):
    """What is saved, evaluated and pushed, and under which names the card is written."""
    monkeypatch.setattr(train, "next_steps", lambda trainer, script: ["next"])
    monkeypatch.setattr(train, "holds_model", lambda folder: True)
    for own, loaded, pushes, is_part in (
        (False, None, False, False),
        (True, None, True, False),
        (True, {"eval_pwa": 0.5}, False, True),
    ):
        done = []

        def note(name, found=None, done=done):
            return lambda *args, **options: (done.append(f"{name} {args} {options}"), found)[1]

        trainer = of_run(tmp_path, eval_dataset=1 if own else None, is_complete=fails, loaded_metrics=loaded)
        for name in ("save_model", "save_metrics", "create_model_card"):
            setattr(trainer, name, note(name))
        trainer.evaluate = note("evaluate", {"eval_loss": 0.5})
        trainer.push_to_hub = note("push_to_hub", SimpleNamespace(repo_url="hub/x") if own else "url")
        trainer.accelerator.print = note("print")
        config = SimpleNamespace(output_dir="out", push_to_hub=pushes)
        script = SimpleNamespace(dataset_name="org/set" if own else str(tmp_path), eval_dataset_name="e")
        if fails:
            with pytest.raises(ValueError, match="nothing was trained"):
                train._deliver(trainer, script, config, is_part)
        else:
            train._deliver(trainer, script, config, is_part)
        hear("\n".join(done))


# Other commands


def test_env_line_by_line(monkeypatch, capsys):
    plugins = [SimpleNamespace(dist=dist) for dist in (SimpleNamespace(name="b", version="2"), None)]
    plugins += [SimpleNamespace(dist=SimpleNamespace(name="a", version="1"))] * 2
    needs = [
        'x; extra == "report"',
        'gone>2; extra == "demo"',
        'y>=1; extra == "dev"',
        "torch",
        'z; extra == "bertscore"',
    ]
    monkeypatch.setattr("trl.scripts.env.print_env", lambda: sys.stdout.write("of TRL\n"))
    for found, required in ((plugins, needs), ([], None)):
        monkeypatch.setattr(env, "entry_points", lambda group, found=found: found if group == env.GROUP else [])
        monkeypatch.setattr(env, "requires", lambda name, required=required: required)
        monkeypatch.setattr(env, "version", lambda name: f"{name}.0" if name != "gone" else not_there())
        monkeypatch.setattr(env, "__version__", "1.2")
        assert env.main([]) == 0
        hear(capsys.readouterr().out)


def not_there() -> str:
    raise env.PackageNotFoundError


@pytest.mark.parametrize("command", ["train", "compare", "inspect", "recipes", "completion", "env", "demo"])
def test_what_completes_a_value(command):
    """Choices, a name that the package knows, or a file; a flag without a value has nothing."""
    for action in completion.parser_of(command)._actions:
        named = completion._NAMED.get((command, action.dest))
        files = getattr(action, "complete", None)
        if named is not None:
            assert action.choices == sorted(named())
        assert (files is not None) == (action.nargs != 0 and not action.choices), action.dest
        assert files in (None, completion.shtab.FILE)
    assert {command for command, _ in completion._NAMED} == {"train", "compare"}
    assert [*completion._NAMED["train", "method"]()][-1] == "none"


def test_numbers_that_look_like_options():
    said = {
        "--a -1e-6 --b 2": "--a=-1e-6 --b 2",
        "--a -.5E3": "--a=-.5E3",
        "--a -inf -nan": "--a=-inf -nan",
        "--a=1 -1e-6": "--a=1 -1e-6",
        "-1e-6 --a": "-1e-6 --a",
        "x -1e5": "x -1e5",
        "--a -1": "--a -1",
        "--a -Infinity": "--a=-Infinity",
    }
    for given, made in said.items():
        assert options.joined(given.split()) == made.split()


def test_a_data_set_in_front():
    assert options.data_first([]) == []
    assert options.data_first(["--a", "b"]) == ["--a", "b"]
    assert options.data_first(["d", "--a", "b"]) == ["--dataset_name", "d", "--a", "b"]
    for flag in ("--dataset_name", "--dataset-name", "--dataset_name=x"):
        with pytest.raises(ValueError, match="both name the data set") as error:
            options.data_first(["d", flag, "x"])
        assert error.value.exit_status == 2


def test_options_that_are_there_twice(caplog):
    parser = train.parser_for("gappo", "cpo")
    for words in ("--beta 1 --beta=1", "--use_cpu --use-cpu true", "--seed 1"):
        parser._check_once(words.split())
    assert not caplog.messages
    parser._check_once(["--beta", "1", "--beta=2", "--use_cpu", "--use_cpu", "false", "--seed=3", "--seed=4"])
    for words in ("--score_columns a --score_columns a", "--config a --config b"):
        with pytest.raises(ValueError, match="is there twice"):
            parser._check_once(words.split())


def test_whose_errors_are_about_the_input(monkeypatch):
    """A sentence for those that a module of this kind raises on purpose; the rest have a traceback."""

    def raised_in(module: str, line: str) -> BaseException:
        code = compile(f"def f():\n    {line}\n", "made up", "exec")
        space: dict[str, Any] = {"__name__": module}
        exec(code, space)
        monkeypatch.setattr(cli, "getline", lambda file, number: f"    {line}" if file == "made up" else "")
        try:
            space["f"]()
        except Exception as error:
            return error
        raise AssertionError

    found = {
        (module, line): cli._is_about_input(raised_in(module, line))
        for module in (
            "trl_margins",
            "trl_margins.x",
            "trl_marginsx",
            "trl.x",
            "peft",
            "transformers.trainer",
            "torch",
        )
        for line in ("raise ValueError", "raise KeyError", "raise ZeroDivisionError", "int('x')", "raise TypeError")
    }
    hear("\n".join(" ".join(key) for key, is_input in found.items() if is_input))
    for line, is_input in (("open('/no')", True), ("raise BrokenPipeError", False), ("import nowhere", True)):
        assert cli._is_about_input(raised_in("other", line)) == is_input
    hear(cli.top_parser().format_help())


def test_room_is_said_of_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_margins.disk.free", lambda folder: "1 MB")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "cache")
    monkeypatch.setattr(cli, "gettempdir", lambda: "tmp")
    for error in (
        OSError(28, "full"),
        OSError(28, "full", "a/b"),
        OSError(13, "no"),
        OSError("full"),
        ValueError("x"),
    ):
        hear(cli._room(error))


@pytest.mark.parametrize("terminal", [False, True])
def test_the_console_s_own_ways(terminal, monkeypatch, capsys):
    """Bars and lines are for a terminal and for the first process; Ctrl-C ends as a shell has it."""
    monkeypatch.setattr(sys, "argv", ["trl-margins", "recipes"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    levels = []
    monkeypatch.setattr(cli, "set_verbosity", levels.append)

    def stops(argv: list[str]) -> int:
        raise KeyboardInterrupt

    for rank, set_to in (("0", [logging.INFO]), ("1", []), (None, [logging.INFO])):
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK")
        levels.clear()
        monkeypatch.setattr("trl_margins.cli.recipes.main", lambda argv: 3)
        assert main() == 3
        assert levels == set_to
    assert [os.environ.get(name) for name in names] == ([None, None] if terminal else ["1", "1"])
    assert sys.excepthook is cli._plain_traceback
    monkeypatch.setattr("trl_margins.cli.recipes.main", stops)
    assert main() == 130
    monkeypatch.setattr("trl_margins.cli.recipes.main", lambda argv: left.append(argv) or 0)
    left: list[Any] = []
    monkeypatch.setattr("trl_margins.distributed.leave_process_group", lambda: left.append("group"))
    assert main() == 0
    assert main(["recipes", "x"]) == 0
    assert left == [[], "group", ["x"]]
    for name in names:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("key", ["dry_run", "recipe", "config", "help", "help_all"])
def test_flags_that_a_file_cannot_have(key, tmp_path):
    """Else a recipe would train nothing, or name another."""
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: m\ndataset_name: d\n{key}: true\n")
    with pytest.raises(ValueError, match=rf"run\.yaml.*{key}"):
        main(["train", "--config", str(file), "--dry_run"])
