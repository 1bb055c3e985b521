"""What a person sees of training: the first lines, a line per log, the last lines, and what interrupts leave."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, load, preference_rows, quiet
from processes import output_of, start
from safetensors.torch import load_file

from trl_margins import GapPOConfig, GapPOTrainer
from trl_margins import logging as log
from trl_margins.cli import main
from trl_margins.trainers.interrupts import Interrupts, _EndsSteps
from trl_margins.trainers.progress import line_of
from trl_margins.trainers.whole import is_whole

SETTINGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
SETTINGS |= {"max_length": 64, "learning_rate": 0.01, "logging_steps": 1, "report_to": "none", "use_cpu": True}
FLAGS = [str(part) for name, value in SETTINGS.items() for part in (f"--{name}", value)]
EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "4"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    preference_rows(16).to_json(file)
    return str(file)


def words(model: str, pairs: str, out: Path, *more: str) -> list[str]:
    of_data = ["--dataset_name", pairs, "--eval_dataset_name", pairs]
    return ["train", "--model_name_or_path", model, *of_data, "--output_dir", str(out), *FLAGS, *more]


def on_the_console(command: list[str], folder: Path, hook: Any = None, *arguments: Any) -> tuple[int, str]:
    """Exit status and all that is printed by a command in a process of its own."""
    said = folder / "said.txt"
    process = start(_console, command, str(said), hook, *arguments)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, said.read_text()


def _console(command: list[str], said: str, hook: Any, *arguments: Any) -> None:
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["trl-margins", *command]
    if hook is not None:
        hook(*arguments)
    sys.exit(main())


# The first and the last lines


@pytest.mark.rehearsal
def test_the_first_and_the_last_lines(tiny_model, pairs, tmp_path):
    command = [sys.executable, "-m", "trl_margins.cli", *words(tiny_model, pairs, tmp_path / "out", *EVALUATED)]
    environment = {key: value for key, value in os.environ.items() if key != "TRL_EXPERIMENTAL_SILENCE"}
    environment["PYTHONWARNINGS"] = "ignore::FutureWarning"  # of an option's name, which changes
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    said = done.stdout
    assert done.returncode == 0, said
    n = sum(p.numel() for p in load(tiny_model).parameters())
    first = said.partition("\noutput  ")[0][said.index("model   ") :]
    assert [line.split()[0] for line in first.splitlines()] == ["model", "data", "method", "steps"]
    assert "Warning" not in said
    assert said.startswith("model   ")
    assert f"{Path(tiny_model).name}: {n:,} parameters in float32; all train" in first
    assert (
        f"{pairs}: train 16 pairs (1 tie, 0 reversed); eval 16 pairs (train has all of them, 1 tie, 0 reversed); "
        "scores from score_chosen/" in first
    )
    assert "gappo on CPOTrainer" in first
    assert "weight score-gap, β 1, γ 0.5 (γ/β 0.5)" in first
    assert "8, of 4 pairs each: per_device_train_batch_size 2" in first
    assert f"\noutput  {tmp_path / 'out'}, on cpu\n" in said
    assert "\r" not in said
    lines = said.splitlines()
    assert len([line for line in lines if re.match(r"step +\d/8  loss", line)]) == 8
    assert len([line for line in lines if re.match(r"step +\d/8  eval  loss", line)]) == 4
    assert re.match(r"kept    the model of step \d of 8, the best by eval_pwa: \d", lines[-5])
    assert lines[-4] == f"saved   {tmp_path / 'out'}"
    for line in lines[-3:-1]:
        command = line.removeprefix("next").strip()
        assert on_the_console(shlex.split(command)[1:], tmp_path, draws_nothing)[0] == 0, command
    assert_loads(lines[-1], tmp_path / "out" / "model.safetensors")


def assert_loads(line: str, file: Path) -> None:
    """The line of Python loads these weights."""
    space: dict[str, Any] = {}
    exec(line.removeprefix("python").strip(), space)
    saved, loaded = load_file(file), space["model"].state_dict()
    names = [name.replace(".default", "") for name in loaded]
    assert {*saved} <= {*names}
    assert all(
        torch.equal(saved[name], value) for name, value in zip(names, loaded.values(), strict=True) if name in saved
    )


@pytest.mark.parametrize("kind", ["adapter", "encoder-decoder", "dpo"])
def test_the_last_line_loads_it(kind, tiny_model, tiny_encoder_decoder, pairs, tmp_path, capsys):
    more = {"adapter": ["--use_peft", "--lora_target_modules", "all-linear"], "dpo": ["--base", "dpo"]}.get(kind, [])
    model = tiny_encoder_decoder if kind == "encoder-decoder" else tiny_model
    assert main(words(model, pairs, tmp_path / "out", "--max_steps", "1", *more)) == 0
    *_, following, report, python = capsys.readouterr().out.splitlines()
    name = "adapter_model" if kind == "adapter" else "model"
    assert_loads(python, tmp_path / "out" / f"{name}.safetensors")
    assert main([*shlex.split(following)[2:], "--bootstrap", "2"]) == 0
    assert report.split() == ["trl-margins", "report", str(tmp_path / "out")]


def test_the_evaluation_reads_what_training_read(tiny_model, tmp_path, capsys):
    """Splits, and columns under other names."""
    from datasets import DatasetDict

    rows = preference_rows(8).rename_columns({"prompt": "question", "score_chosen": "a", "score_rejected": "b"})
    DatasetDict({"train": rows, "dev": rows.select(range(5))}).save_to_disk(str(tmp_path / "my pairs"))
    argv = words(tiny_model, str(tmp_path / "my pairs"), tmp_path / "out", "--prompt_column", "question")
    argv += [
        "--score_columns",
        "a",
        "b",
        "--dataset_test_split",
        "dev",
        "--max_steps",
        "1",
        "--eval_strategy",
        "epoch",
    ]
    assert main(argv) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next"))
    assert main([*shlex.split(command)[2:], "--bootstrap", "2"]) == 0
    assert re.search(r"pairs +\| +5 \|", capsys.readouterr().out)


# One line per log


def test_a_line_has_what_is_unknown_too():
    logs = {"loss": 0.51234, "rewards/margins": 1.5, "logits/chosen": 3.0, "mine": 7, "learning_rate": 1e-6}
    assert line_of(logs, 3, 120) == "step   3/120  loss 0.5123  gap 1.5  lr 1e-06  mine 7"
    logs = {"eval_easy_loss": 1.0, "eval_easy_pwa_all": 0.5, "eval_easy_runtime": 3.0, "epoch": 1.0}
    assert line_of(logs, 3, 3) == "step 3/3  eval_easy  loss 1  pwa_all 0.5"
    assert (
        line_of({"train_runtime": 3725.0, "train_loss": 0.5}, 9, 9) == "trained to step 9 in 1 h 2 min, mean loss 0.5"
    )
    logs = {"loss": 1.0, "train_runtime": 3.0, "train_tokens_per_second": 9.0, "num_input_tokens_seen": 5}
    assert line_of(logs, 1, 3) == "step 1/3  loss 1"
    assert line_of({"score": "x" * 300}, 1, 1) == f"step 1/1  score {'x' * 100}"


def test_trackers_get_all(tiny_model, tmp_path, capsys):
    """The history has what the line leaves out, and whoever removes transformers' printer has no lines."""
    from transformers import PrinterCallback

    def trained(printer: bool) -> tuple[Any, str]:
        config = GapPOConfig(**quiet(output_dir=str(tmp_path / str(printer)), max_steps=1))
        rows, tokenizer = preference_rows(4), byte_tokenizer()
        trainer = GapPOTrainer(load(tiny_model), config, train_dataset=rows, processing_class=tokenizer)
        if not printer:
            trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer, capsys.readouterr().out

    trainer, printed = trained(printer=True)
    assert {"logps/chosen", "rewards/chosen", "weights/max"} <= trainer.state.log_history[0].keys()
    assert "logps/chosen" not in printed
    assert printed.startswith("step 1/1  loss ")
    assert trained(printer=False)[1] == ""


# INFO in Python

SCRIPT = """
import logging
{before}
import trl_margins
{after}
logging.getLogger("trl_margins.trainers.x").info("an INFO line")
logging.getLogger("trl_margins.trainers.x").warning("a WARNING line")
"""
INFO, WARNS = "an INFO line", "a WARNING line"
LOGS = {
    "nothing": ("", "", [INFO, f"WARNING trl_margins.trainers.x: {WARNS}"]),
    "basicConfig": ("", "logging.basicConfig()", [f"WARNING:trl_margins.trainers.x:{WARNS}"]),
    "before": ("logging.basicConfig()", "", [f"WARNING:trl_margins.trainers.x:{WARNS}"]),
    "another rank": ("", "import os; os.environ['RANK'] = '1'", [f"WARNING trl_margins.trainers.x: {WARNS}"]),
    "INFO of all": (
        "logging.basicConfig(format='%(message)s', level='INFO')",
        "",
        [INFO, WARNS],
    ),
    "INFO of the package": (
        "",
        "logging.basicConfig(format='%(message)s'); logging.getLogger('trl_margins').setLevel('INFO')",
        [INFO, WARNS],
    ),
    "a handler of the package": (
        "",
        "import sys; logging.getLogger('trl_margins').addHandler(logging.StreamHandler(sys.stderr))",
        [INFO, WARNS],
    ),
    "quiet": ("", "trl_margins.logging.set_verbosity('ERROR')", []),
}


@pytest.mark.parametrize("name", LOGS)
def test_what_a_script_shows(name):
    """INFO without being asked, and otherwise what the script asks for; nothing twice."""
    before, after, expected = LOGS[name]
    script = SCRIPT.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == expected


def test_what_was_held_is_said_after_an_error(monkeypatch):
    handler, said = log._Package(), []
    monkeypatch.setattr(log, "_handler", handler)
    monkeypatch.setattr(handler, "handle", lambda record: said.append(record.msg))
    handler.held = [logging.makeLogRecord({"msg": "held"})]
    with pytest.raises(ZeroDivisionError), log.first():
        raise ZeroDivisionError
    assert said == ["held"]


def test_others_are_warned_of_their_experimental_imports():
    """Before the package has imported it; its own import is silent, as the test above shows."""
    environment = {key: value for key, value in os.environ.items() if key != "TRL_EXPERIMENTAL_SILENCE"}
    code = "import trl_margins; import trl.experimental"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "TRLExperimentalWarning" in done.stderr


# Interrupts


def when_called(cls: type, name: str, number: int, then: Any) -> None:
    """Lets something happen at a call of a method, and at each after it that `then` does not end."""
    called, original = 0, getattr(cls, name)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called += 1
        if called == number:
            then()
        return original(self, *args, **kwargs)

    setattr(cls, name, patched)


def sends(method: str, number: int, which: int) -> None:
    when_called(GapPOTrainer, method, number, lambda: os.kill(os.getpid(), which))


def sends_twice(which: int) -> None:
    sends("training_step", 3, which)
    sends("training_step", 4, which)


def sends_both(number: int, then: int | None) -> None:
    """Ctrl-C, and the SIGTERM that a launcher sends its processes after it; perhaps one more later."""

    def send() -> None:
        for which in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), which)
        if then is not None:
            time.sleep(1.1)
            os.kill(os.getpid(), then)

    when_called(GapPOTrainer, "training_step", number, send)


@pytest.fixture(scope="module")
def whole(tiny_model, pairs, tmp_path_factory) -> dict[str, Path]:
    """Runs that nobody has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for name, more in {"steps": EVALUATED, "epochs": BY_EPOCH}.items():
        assert main(words(tiny_model, pairs, folder / name, *more)) == 0
    return {name: folder / name for name in ("steps", "epochs")}


BY_EPOCH = ["--eval_strategy", "epoch", "--save_strategy", "no", "--load_best_model_at_end", "false"]
MOMENTS = {  # method of the trainer, call, signal; the run's flags; and the step that the checkpoint is of
    "a step": ("training_step", 5, signal.SIGINT, "steps", 3),
    "the end of a step": ("training_step", 6, signal.SIGTERM, "steps", 3),
    "an evaluation": ("prediction_step", 2, signal.SIGTERM, "steps", 2),
    "saving": ("_save_optimizer_and_scheduler", 1, signal.SIGINT, "steps", 2),
    "a step of a run that saves nothing": ("training_step", 3, signal.SIGTERM, "epochs", 2),
    "the last step of an epoch": ("training_step", 8, signal.SIGINT, "epochs", 4),
    "the evaluation of an epoch": ("prediction_step", 1, signal.SIGINT, "epochs", 4),
    "the last step": ("training_step", 16, signal.SIGTERM, "steps", 8),
}


@pytest.mark.rehearsal
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_goes_on_where_a_signal_stopped_it(moment, tiny_model, pairs, whole, tmp_path):
    """With the command that is printed; it ends with the same weights and the same evaluations, bit for bit."""
    method, number, which, kind, step = MOMENTS[moment]
    out, more = tmp_path / "out", {"steps": EVALUATED, "epochs": BY_EPOCH}[kind]
    status, said = on_the_console(words(tiny_model, pairs, out, *more), tmp_path, sends, method, number, which)
    assert status == 128 + which, said
    assert "Traceback" not in said
    assert f"stopped after step {step}: {out}/checkpoint-{step} has all that is needed to go on\n" in said
    assert not (out / "model.safetensors").exists()
    command = re.search(r"^resume  trl-margins (.+)", said, re.MULTILINE)
    assert command is not None
    status, said = on_the_console(shlex.split(command[1]), tmp_path)
    assert status == 0, said
    assert (out / "model.safetensors").read_bytes() == (whole[kind] / "model.safetensors").read_bytes()
    assert evaluations(out) == evaluations(whole[kind])


def evaluations(out: Path) -> list[dict[str, Any]]:
    import json

    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in history
        if "eval_loss" in entry
    ]


def sends_to_all(method: str, number: int, which: int) -> None:
    """To the whole group of processes, the workers of the data loader first, as a launcher or a scheduler does."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # a process of the tests' server has another

    def tell(*processes: int) -> None:
        subprocess.run(["kill", f"-{which}", "--", *map(str, processes)], check=True, start_new_session=True)

    def send() -> None:
        workers = [each.pid or 0 for each in multiprocessing.active_children()]
        assert len(workers) == 2
        tell(*workers)
        time.sleep(0.2)  # until one that the signal ends is gone
        tell(-os.getpgid(0))

    when_called(GapPOTrainer, method, number, send)


def test_a_group_of_processes_is_told(tiny_model, pairs, tmp_path):
    """The workers of the data loader go on until the step is finished."""
    out = tmp_path / "out"
    argv = words(tiny_model, pairs, out, *EVALUATED, "--dataloader_num_workers", "2")
    status, said = on_the_console(argv, tmp_path, sends_to_all, "training_step", 3, signal.SIGTERM)
    assert status == 143, said
    assert "Traceback" not in said
    assert f"stopped after step 2: {out}/checkpoint-2 has all that is needed to go on\nresume  trl-margins " in said
    assert is_whole(out / "checkpoint-2")


def parent_and_child() -> None:
    with Interrupts().heard():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        subprocess.run(["kill", str(child.pid)], check=True)  # by somebody else
        child.join(0.3)
        assert child.is_alive()
        child.terminate()
        child.join(10)
    assert child.exitcode == 143


def test_a_child_ends_at_its_parent_s_word():
    """As of a pool, which is not waited for."""
    process = start(parent_and_child)
    process.join(60)
    assert process.exitcode == 0


def draws_nothing() -> None:
    from trl_margins.report import figures  # and matplotlib, which the others do not need

    figures.PICTURES = ()


@pytest.mark.rehearsal
def test_a_comparison_goes_on_where_it_stopped(tiny_model, pairs, tmp_path):
    """With the same command; a run within it says nothing of what comes next for itself alone."""
    argv = words(tiny_model, pairs, tmp_path, "--eval_strategy", "epoch")
    argv = ["compare", "--methods", "gappo", "simpo", *argv[1:]]
    argv[argv.index("--output_dir")] = "--out"
    status, said = on_the_console(argv, tmp_path, sends, "training_step", 3, signal.SIGINT)
    assert status == 130, said
    assert "Traceback" not in said
    assert said.endswith("has all that is needed to go on\nThe same command goes on from here.\n")
    status, said = on_the_console(argv, tmp_path, draws_nothing)
    assert status == 0, said
    assert "from step 2, on cpu" in said
    assert "trl-margins evaluate" not in said


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step(which, tiny_model, pairs, tmp_path):
    out = tmp_path / "out"
    hooked = (sends, "get_train_dataloader", 1, which)
    status, said = on_the_console(words(tiny_model, pairs, out), tmp_path, *hooked)
    assert status == 128 + which
    assert "Traceback" not in said
    assert said.endswith(
        "stopped before the first step: nothing has been trained, and the same command starts again\n"
    )
    assert on_the_console(words(tiny_model, pairs, out, "--max_steps", "1"), tmp_path)[0] == 0


def test_a_second_one_quits_at_once(tiny_model, pairs, tmp_path):
    status, said = on_the_console(words(tiny_model, pairs, tmp_path / "out"), tmp_path, sends_twice, signal.SIGINT)
    assert status == -signal.SIGINT
    assert said.endswith("stopping after this step, with a checkpoint; Ctrl-C again quits at once\n")


def test_two_that_come_together_are_one(tiny_model, pairs, tmp_path):
    out = tmp_path / "out"
    status, said = on_the_console(words(tiny_model, pairs, out), tmp_path, sends_both, 3, None)
    assert status == 128 + signal.SIGINT, said
    assert f"stopped after step 2: {out}/checkpoint-2 has all that is needed to go on\n" in said


def test_a_third_one_quits_at_once(tiny_model, pairs, tmp_path):
    status, said = on_the_console(words(tiny_model, pairs, tmp_path / "out"), tmp_path, sends_both, 3, signal.SIGTERM)
    assert status == -signal.SIGTERM
    assert said.endswith("stopping after this step, with a checkpoint; Ctrl-C again quits at once\n")


def test_the_model_is_saved_before_the_end(tiny_model, pairs, tmp_path):
    hooked = (sends, "save_model", 1, signal.SIGTERM)
    out = tmp_path / "out"
    status, said = on_the_console(words(tiny_model, pairs, out, "--save_strategy", "no"), tmp_path, *hooked)
    assert status == 143
    assert f"saved   {out}\n" in said
    assert (out / "model.safetensors").exists()


def test_python_keeps_its_keyboard_interrupt(tiny_model, tmp_path):
    """Nothing listens in a notebook: transformers' way to stop stays."""
    config = GapPOConfig(**quiet(output_dir=str(tmp_path), max_steps=2))
    rows, tokenizer = preference_rows(8), byte_tokenizer()
    trainer = GapPOTrainer(load(tiny_model), config, train_dataset=rows, processing_class=tokenizer)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    trainer.training_step = interrupted  # type: ignore[method-assign]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    signal.signal(signal.SIGINT, before)


def of_one_rank(rank: str, command: list[str]) -> None:
    if os.environ["RANK"] == rank:
        sends("training_step", 2, signal.SIGTERM)
    try:
        status = main(command)
    finally:
        os.write(1, f"status {status}\n".encode())  # in one piece: both ranks write into one pipe


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
from test_screen import of_one_rank
of_one_rank("1", {command!r})
"""


def test_all_ranks_stop_where_one_is_told(tiny_model, pairs, tmp_path):
    out = tmp_path / "out"
    script = tmp_path / "ranks.py"
    command = words(tiny_model, pairs, out, *EVALUATED)
    script.write_text(textwrap.dedent(TWO_RANKS).format(tests=str(Path(__file__).parent), command=command))
    said = output_of(2, str(script), folder=tmp_path, timeout=120)
    assert said.count("status 143") == 2
    assert said.count(f"stopped after step 1: {out}/checkpoint-1 has") == 1
    assert "resume  the same command with --resume_from_checkpoint true" in said
    assert (out / "checkpoint-1" / "trainer_state.json").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_within_the_callback_of_a_weak_reference():
    """Python drops what is raised there; the first step ends the run instead."""
    interrupts, thing = Interrupts(), torch.nn.Identity()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with interrupts.heard():
        del thing
        assert reference() is None
        with pytest.raises(SystemExit) as ended:
            _EndsSteps(interrupts).on_step_begin(None, None, None)
    assert ended.value.code == 143


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGINT is in a job that a script has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts = Interrupts()
        with interrupts.heard():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.signal is None
            interrupts.ending = "ends"
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.signal == signal.SIGTERM
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
