"""Tries the package as installed, from a folder of its own: `python -I smoke.py VERSION`.

It runs where nothing but the wheel and what it depends on is installed, so it imports nothing of the tests.
"""

# ruff: noqa: T201 - a script that talks

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any

WORDS = list("abcdefghijklmnop")
GAPS = [0.5, 1.0, 2.5, 4.0]


def rows() -> list[dict[str, Any]]:
    """A pair for every gap of GAPS."""
    return [
        {
            "prompt": f"{WORDS[-1 - i]} ",
            "chosen": " ".join(WORDS[i : i + 5]),
            "rejected": " ".join(WORDS[i + 6 : i + 9]),
            "score_chosen": 3.0 + gap,
            "score_rejected": 3.0,
        }
        for i, gap in enumerate(GAPS)
    ]


def version(expected: str) -> str:
    import trl_margins

    home = Path(trl_margins.__file__).resolve()
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"imported from {home}, not from the fresh environment"
    assert trl_margins.__version__ == metadata.version("trl-margins") == expected
    return f"{expected} in {home.parent.relative_to(Path(sys.prefix).resolve())}"


def typed() -> str:
    assert resources.files("trl_margins").joinpath("py.typed").is_file(), "py.typed is not in the wheel"
    return "py.typed is there"


def public_names() -> str:
    import trl_margins

    for name in trl_margins.__all__:
        getattr(trl_margins, name)
    return f"{len(trl_margins.__all__)} resolve"


def script(*arguments: str) -> str:
    """What the installed `trl-margins` prints."""
    program = shutil.which("trl-margins", path=str(Path(sys.executable).parent))
    assert program, "the wheel has no trl-margins script"
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"trl-margins {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def script_version(expected: str) -> str:
    assert script("--version").strip() == expected
    return expected


def script_help() -> str:
    from trl_margins.cli import COMMANDS

    printed = script("--help")
    assert all(command in printed for command in COMMANDS), printed
    return f"{len(COMMANDS)} commands"


def help_of_every_command() -> str:
    """In this process: each would load the libraries again."""
    from trl_margins.cli import COMMANDS, main

    broken = {}
    for command in COMMANDS:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                main([command, "--help"])
        except SystemExit as ended:
            if ended.code:
                broken[command] = f"ended with {ended.code}"
        except Exception as error:
            broken[command] = repr(error)
        if command not in broken and "usage:" not in printed.getvalue():
            broken[command] = "no usage in what it prints"
    assert not broken, f"--help of {broken}"
    return ", ".join(COMMANDS)


def recipes() -> str:
    printed = script("recipes")
    assert "/gappo/" in printed, printed
    assert str(Path(sys.prefix).resolve()) in printed, f"not those of the wheel:\n{printed}"
    return f"{len(printed.splitlines())} lines"


def inspect(folder: Path) -> str:
    data, numbers = folder / "pairs.jsonl", folder / "numbers.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    printed = script("inspect", str(data), "--json", str(numbers))
    assert json.loads(numbers.read_text()), "no numbers"
    return f"{len(printed.splitlines())} lines, {numbers.stat().st_size} bytes of JSON"


def train(folder: Path) -> str:
    """One step of GapPO: a finite loss, the pairs' own weights in the log, parameters that moved."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from trl_margins import GapPOConfig, GapPOTrainer

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = GapPOConfig(
        str(folder / "out"),
        max_steps=1,
        learning_rate=1e-2,
        warmup_steps=0,
        per_device_train_batch_size=len(GAPS),
        gradient_accumulation_steps=1,
        max_length=32,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = GapPOTrainer(model, config, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer)
    loss = trainer.train().training_loss
    assert math.isfinite(loss), loss
    logged = next(entry for entry in trainer.state.log_history if "weights/mean" in entry)
    assert math.isclose(logged["weights/mean"], sum(GAPS) / len(GAPS), rel_tol=1e-6), logged
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter.detach(), before[name])]
    assert len(moved) == len(before), f"{len(moved)} of {len(before)} parameters moved"
    return f"loss {loss:.4f}, mean weight {logged['weights/mean']:.2f}, {len(moved)} parameters moved"


def libraries() -> str:
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return ", ".join(f"{name} {import_module(name).__version__}" for name in names)


def step(name: str, action: Callable[..., str], *arguments: Any) -> None:
    start = time.perf_counter()
    said = action(*arguments)
    print(f"  {name}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)


def main() -> None:
    expected = sys.argv[1]
    folder = Path.cwd()
    step("import", version, expected)
    step("types", typed)
    step("trl-margins --version", script_version, expected)
    step("trl-margins --help", script_help)
    step("libraries", libraries)
    step("public names", public_names)
    step("--help of every command", help_of_every_command)
    step("trl-margins recipes", recipes)
    step("trl-margins inspect", inspect, folder)
    step("one training step of GapPO", train, folder)


if __name__ == "__main__":
    main()
