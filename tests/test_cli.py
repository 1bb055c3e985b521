"""The command line: files in, a model and numbers out."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import transformers
import yaml
from conftest import METHODS_AND_BASES, preference_rows, quiet
from datasets import DatasetDict, load_dataset
from transformers import pipeline
from trl import TrlParser

import trl_margins
from trl_margins.cli import main, train
from trl_margins.cli.train import as_argument, loading, parse
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
