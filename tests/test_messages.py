"""What is said where no other test of the suite looks at the words. `said/test_messages.txt` has them, all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_tokenizer
from datasets import Dataset
from said import hear, written
from said import word_for_word as word_for_word
from trl import DatasetMixtureConfig

from trl_margins import MarginCPOConfig
from trl_margins.cli import main
from trl_margins.cli.config_file import read_yaml
from trl_margins.cli.dpo_forks import flattened
from trl_margins.cli.mixture import check_mixture
from trl_margins.data.loading import load_splits, pick_split
from trl_margins.disk import is_of_the_disk, where
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.generation.answers import Answering, answer
from trl_margins.generation.benchmarks import Question, decoding_of
from trl_margins.generation.sampling import Sampling
from trl_margins.generation.store import Store
from trl_margins.registry import base_of
from trl_margins.report.run_folder import read_run
from trl_margins.rows import PreferenceRow
from trl_margins.trainers.checkpoints import _readable
from trl_margins.trainers.finite import FiniteSteps
from trl_margins.trainers.folder import check_links, replace_links
from trl_margins.trainers.learning import Idle, why_no_gradient
from trl_margins.trainers.model_checks import check_one_device

HEARS = "INFO"
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def file(text: str, name: str = "f") -> str:
    Path(name).write_text(text, newline="")
    return name


def config(text: str) -> Callable[[], Any]:
    return lambda: read_yaml(file(text, "c.yaml"))


def command(*words: str) -> Callable[[], Any]:
    return lambda: main(list(words))


def run(**files: str) -> Callable[[], Any]:
    """A run's folder with these files."""

    def read() -> None:
        Path("run").mkdir()
        for name, text in {"margin_run.json": "{}", **files}.items():
            file(text, f"run/{name}")
        read_run("run")

    return read


def pipe() -> None:
    os.mkfifo("pair_log.csv")
    check_links(Path())


def link() -> None:
    os.symlink(file(""), "pair_log.csv")
    os.symlink("/dev/null", "README.md")  # nothing is lost there
    with suppress(ValueError):
        check_links(Path())
    replace_links(Path())
    hear(str(sorted(os.listdir())))


def neither() -> None:
    os.mkfifo("x.jsonl")
    load_splits("x.jsonl")


def damaged(error: Exception) -> Callable[[], Any]:
    def read() -> None:
        with _readable(Path("checkpoint-2/margin_terms.safetensors")):
            raise error

    return read


def kept() -> None:
    """Rows of a run that was stopped, in the middle of a line."""
    store = Store("a.jsonl", {"seed": 1})
    for prompt in ("p", "q"):
        store.add({"prompt": prompt, "responses": []})
    store.partial.write_bytes(store.partial.read_bytes()[:-3])
    hear(str(list(Store("a.jsonl", {"seed": 1}).rows)))
    Store("a.jsonl", {"seed": 2})


def strange() -> None:
    store = Store("a.jsonl", {})
    store.add({"prompt": "p", "responses": []})
    store.check_all_of([])


def unsaid() -> None:
    store = Store("a.jsonl", {})
    store.add({"prompt": "p", "responses": []})
    store.said.unlink()
    Store("a.jsonl", {})


def answers(*prompts: str, limit: int | None = None) -> Callable[[], Any]:
    def engine(prompts: Any, **asked: Any) -> Any:
        return ((i, [[5, 2]]) for i in range(len(prompts)))

    def ask() -> None:
        model, rows = (
            Answering("m", byte_tokenizer(), engine, limit=limit),
            [PreferenceRow(each, []) for each in prompts],
        )
        hear(str(answer(rows, model, Sampling(1), Store("a.jsonl", {}), "dev")))

    return ask


def full(error: Exception, *files: str) -> Callable[[], Any]:
    """What is said where a disk is full, but for the room that is left."""

    def say() -> None:
        for i, name in enumerate(files):
            os.utime(file("", name), (i, i))
        hear(f"{is_of_the_disk(error)}: {where(error, Path()).rpartition(', ')[0]}")

    return say


def mixture(*fractions: float | None, weights: Any = None, path: str = "json", **options: Any) -> Callable[[], Any]:
    sets: Any = [{"path": path, "fraction": each} for each in fractions]
    return lambda: check_mixture(DatasetMixtureConfig(datasets=sets, **options), weights, None)


def idle() -> None:
    """The first step, the tenth and the hundredth in a row; and not again after a step with a gradient."""
    steps = Idle()
    for step in (*range(1, 12), *range(20, 140)):
        steps.gradient(step, step != 20, step == 1, iter([f"at {step}"]))


def still(dtype: Any, *last: bool) -> Callable[[], Any]:
    def step() -> None:
        steps = Idle()
        for i, is_last in enumerate(last, 1):
            steps.weights(i, "AdamW", 1e-9, dtype)
            if is_last:
                steps.say()

    return step


def on(**parts: Any) -> Any:
    return SimpleNamespace(hf_device_map=parts)


YAML = {
    "no character": "beta: \x01",
    "twice": "beta: 1\nseed: 2\nbeta: 3",
    "a tag": "beta: !!python/name:os.system",
    "deep": "a: " + "[" * 200,
    "itself": "a: &a [*a]",
    "a list": "- a",
    "a colon": "a: b: c",
}
PAIRS = "step,weight\n1,2\n"

# What cannot go on, and what is said on the way
CASES: dict[str, Callable[[], Any]] = {
    **{f"yaml {name}": config(text) for name, text in YAML.items()},
    "yaml aliases": config(
        "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
    ),
    "yaml bytes": lambda: (Path("c.yaml").write_bytes(b"a: 1\n\nb: \xff"), read_yaml("c.yaml")),
    "pipe": pipe,
    "link": link,
    "neither file nor folder": neither,
    "split": lambda: pick_split({"a": 1, "b": 2}, "c", "set"),  # type: ignore[arg-type]
    "no split": lambda: pick_split({"a": 1, "b": 2}, None, "set", "--flag"),  # type: ignore[arg-type]
    "damaged": damaged(KeyError("plain")),
    "damaged value": damaged(ValueError("bad")),
    "kept": kept,
    "strange": strange,
    "unsaid": unsaid,
    "kind of file": lambda: Store("a.json", {}),
    "answers": answers("p ", "q ", "p "),
    "no room": answers("p ", "ppppp", "qqqqqq", limit=5),
    "no tokens": answers("p ", ""),
    "full disk": full(OSError(ENOSPC, "No space left on device", "model.bin")),
    "full disk, safetensors": full(type("SafetensorError", (Exception,), {})("I/O error: os error 28")),
    "full disk, torch": full(RuntimeError("PytorchStreamWriter failed writing file"), "before", "last"),
    "another error": full(OSError(2, "No such file or directory", "x")),
    "another error of a library": full(ValueError("os error 281"), "one"),
    "pickles": mixture(None, path="pandas"),
    "one fraction": mixture(0.5, None),
    "fractions of streams": mixture(0.5, 0.5, streaming=True),
    "weights and fractions": mixture(0.5, 0.5, weights=[1.0, 1.0]),
    "weights of one": mixture(None, None, weights=[1.0]),
    "weight above 1": mixture(None, None, weights=[1.0, 1.01]),
    "idle": idle,
    "not idle at the second": lambda: Idle().gradient(2, True, False, iter(["never"])),
    "still, 16 bits": still(torch.bfloat16, *[False] * 12),
    "still, 32 bits": still(torch.float32, False, True),
    "not still for long": still(torch.float32, *[False] * 9),
    "devices": lambda: (check_one_device(on(a=0, b=0)), check_one_device(on(a=0, b="cpu"), "the reference")),
    "skip": lambda: FiniteSteps(SimpleNamespace(is_deepspeed_enabled=True), True),  # type: ignore[arg-type]
    "base": lambda: base_of("dpo", "cpo"),
    "base of one": lambda: base_of("simper", "dpo"),
    "nul": lambda: main(["train", "--config", file('dataset_name: "a\\0b"', "c.yaml"), "--dry_run"]),
    "no run": lambda: read_run(file("")),
    "no info": lambda: read_run("."),
    "neither": run(),
    "no numbers": run(**{"pair_log.csv": PAIRS}),
    "no pairs": run(**{"trainer_state.json": "{}"}),
    "no object": run(**{"trainer_state.json": "[1]"}),
    "no json": run(**{"trainer_state.json": "{"}),
    "no step": run(**{"pair_log.csv": "weight\n1\n"}),
    "line": run(**{"pair_log.csv": PAIRS + "2\n3,4\n"}),
    "last line": run(**{"pair_log.csv": PAIRS + "2"}),
    "cell": run(**{"pair_log.csv": PAIRS + "2,x\n"}),
    "order": run(**{"pair_log.csv": PAIRS + "3,1\n2,1\n"}),
    "no prompts": lambda: evaluation_set(Dataset.from_dict({"chosen": []}), "dev"),
    "no set": lambda: evaluation_set(Dataset.from_dict({"text": ["a"]}), "dev"),
    "three styles": lambda: evaluation_set(
        Dataset.from_list([{"prompt": "p", "chosen": ["a"] * 3, "rejected": ["b"] * 2}]), "dev"
    ),
    "reward bench 2": lambda: evaluation_set(
        Dataset.from_list([{"chosen": ["a"], "rejected": ["b"], "num_correct": 1}]), "dev"
    ),
    "many subsets": lambda: evaluation_set(Dataset.from_list([{**PAIR, "subset": str(i)} for i in range(101)]), "dev"),
    "subsets": lambda: evaluation_set(Dataset.from_list([{**PAIR, "subset": str(i)} for i in range(100)]), "dev"),
    "decoding": lambda: decoding_of("alpaca-eval", [Question(None, ("q",), {})], None, temperature=1.0),
    "decodings": lambda: decoding_of(
        "mt-bench", [Question(i, ("q",), {"category": each}) for i, each in enumerate(("math", "stem", "math"))], None
    ),
    "family": lambda: decoding_of("alpaca-eval", [Question(None, ("q",), {})], "llama-3-9b-base"),
    "alpha": lambda: MarginCPOConfig(margin="alpha-dpo", alpha=0.5),
    "compare twice": command("compare", "--methods", "simpo", "gappo", "simpo"),
    "compare into a file": lambda: main(
        [
            "compare",
            "--methods",
            "simpo",
            "--model_name_or_path",
            "m",
            "--dataset_name",
            "d",
            "--out",
            f"{file('')}/below",
        ]
    ),
    "two keys": lambda: flattened(
        {"loss": {"name": "odpo"}, "mode_loss": "DrDPO", "lr": 1e-6, "learning_rate": 1e-5}, None
    ),
    "same completions": lambda: hear(next(why_no_gradient(3, torch.ones(3), {}, None, None))),
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "trl_margins")


@pytest.mark.parametrize("case", CASES)
def test_what_is_said(case):
    try:
        CASES[case]()
        hear("goes on")
    except (ValueError, OSError, SystemExit, yaml.YAMLError) as error:
        hear(f"{type(error).__name__}: {error}")


def test_every_case_is_written():
    assert {f"test_what_is_said[{case}]" for case in CASES} == written("test_messages").keys()
