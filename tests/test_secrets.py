"""No secret in anything that is written or printed, whichever option carried it."""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import preference_rows
from datasets import Dataset
from huggingface_hub import HfApi
from trl import DPOConfig

from trl_margins import GapPOConfig, GapPOTrainer, MarginDPOConfig, MarginDPOTrainer, cli
from trl_margins.redaction import redacted, redacted_text

CANARY = "hf_" + "CaNaRy".ljust(34, "x")
PLAIN = "s3cr3t-of-no-known-form"
OPTIONS = {
    "hub_token": PLAIN,
    "model_init_kwargs": {"token": CANARY, "dtype": "float32"},
}


def bytes_below(folder: Path) -> dict[Path, bytes]:
    """Every file, archives unpacked."""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file():
            found[file] = file.read_bytes()
            if zipfile.is_zipfile(file):
                archive = zipfile.ZipFile(file)
                found[file] += b"".join(archive.read(name) for name in archive.namelist())
    return found


def assert_no_secret(folder: Path, printed: str = "") -> None:
    files = bytes_below(folder)
    assert files
    for secret in (CANARY, PLAIN):
        assert secret not in printed
        assert not [file for file, content in files.items() if secret.encode() in content]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("inputs")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, preference_rows(12))))
    return tiny_model, pairs


def flags(inputs, out, **more) -> list[str]:
    given = {
        **OPTIONS,
        "model_name_or_path": inputs[0],
        "dataset_name": inputs[1],
        "output_dir": out,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_length": 128,
        "eval_strategy": "no",
        "report_to": "none",
        **more,
    }
    texts = {name: json.dumps(v) if isinstance(v, dict) else str(v) for name, v in given.items() if v is not None}
    return [text for pair in ((f"--{name}", value) for name, value in texts.items()) for text in pair]


@pytest.mark.parametrize("spelled", ["flags", "yaml"])
def test_train_and_resume_write_and_print_none(inputs, tmp_path, spelled, capfd, caplog, monkeypatch):
    arguments = flags(inputs, tmp_path / "out")
    if spelled == "yaml":
        import yaml

        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**OPTIONS, "env": {"MY_API_KEY": PLAIN}}))
        names = {f"--{name}" for name in OPTIONS}
        kept = [a for i in range(0, len(arguments), 2) if arguments[i] not in names for a in arguments[i : i + 2]]
        arguments = ["--config", str(tmp_path / "mine.yaml"), *kept]
        monkeypatch.delenv("MY_API_KEY", raising=False)
    assert cli.main(["train", *arguments]) == 0
    assert cli.main(["train", *arguments, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr()
    assert_no_secret(tmp_path / "out", printed.out + printed.err + caplog.text)


def test_dry_run_and_compare_write_and_print_none(inputs, tmp_path, capfd, caplog):
    assert cli.main(["train", *flags(inputs, tmp_path / "out"), "--dry_run"]) == 0
    shared = flags(inputs, tmp_path / "out", output_dir=None, eval_dataset_name=inputs[1], eval_strategy="steps")
    shared += ["--dataset_test_split", "train"]
    for _ in range(2):  # the second time nothing is left to do
        assert cli.main(["compare", "--methods", "simpo", "gappo", "--out", str(tmp_path / "out"), *shared]) == 0
    printed = capfd.readouterr()
    assert_no_secret(tmp_path / "out", printed.out + printed.err + caplog.text)


def test_from_python(inputs, tmp_path, capfd):
    config = GapPOConfig(
        str(tmp_path), hub_token=PLAIN, model_init_kwargs={"token": CANARY}, bf16=False, max_steps=1, report_to="none"
    )
    trainer = GapPOTrainer(inputs[0], config, train_dataset=Dataset.from_list(preference_rows(8)))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert trainer.args.hub_token == PLAIN  # what pushes still has it
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (loaded.hub_token, loaded.model_init_kwargs["token"]) == (None, None)
    assert loaded.learning_rate == config.learning_rate
    printed = capfd.readouterr()
    assert_no_secret(tmp_path, printed.out + printed.err)


def test_trls_own_config_in_the_settings(inputs, tmp_path):
    config = DPOConfig(str(tmp_path), model_init_kwargs={"token": CANARY}, bf16=False, report_to="none", max_steps=1)
    trainer = MarginDPOTrainer(inputs[0], args=config, train_dataset=Dataset.from_list(preference_rows(8)))
    trainer.train()
    assert CANARY not in json.dumps(trainer.settings)


def test_copies_in_the_process_keep_them(tmp_path):
    config = MarginDPOConfig(str(tmp_path), hub_token=PLAIN, model_init_kwargs={"token": CANARY}, bf16=False)
    for other in (copy.copy(config), copy.deepcopy(config)):
        assert (other.hub_token, other.model_init_kwargs) == (PLAIN, {"token": CANARY})
        assert vars(other).keys() == vars(config).keys()
    deep = copy.deepcopy(config)
    deep.model_init_kwargs["token"] = "another"
    assert config.model_init_kwargs["token"] == CANARY
    assert pickle.loads(pickle.dumps(config)).hub_token is None


def test_trackers_are_sent_none(tmp_path):
    config = MarginDPOConfig(str(tmp_path), hub_token=PLAIN, model_init_kwargs={"token": CANARY}, bf16=False)
    for sent in (config.to_dict(), config.to_sanitized_dict(), config.to_json_string()):
        assert PLAIN not in str(sent)
        assert CANARY not in str(sent)


def test_an_error_that_names_the_address(tmp_path, capsys):
    out = subprocess_of(["inspect", f"https://me:{PLAIN}@example.invalid/pairs.jsonl"])
    assert out.returncode != 0
    assert PLAIN not in out.stdout + out.stderr


def subprocess_of(arguments: list[str]):
    import subprocess
    import sys

    command = [sys.executable, "-m", "trl_margins.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "text",
    [
        f"--hub_token {PLAIN} --bf16 false",
        f"--hub-token='{PLAIN}'",
        f'--model_init_kwargs \'{{"token": "{PLAIN}"}}\'',
        f"{{'use_auth_token': '{PLAIN}'}}",
        f"https://me:{PLAIN}@example.org/x.json",
        f"https://example.org/x.json?split=a&token={PLAIN}",
        f"https://example.org/x?X-Amz-Signature={PLAIN}&b=1",
        f"WANDB_API_KEY: {PLAIN}",
        f"Authorization: Bearer {PLAIN}",
        f"aws_secret_access_key={PLAIN}",
        f"401 for {CANARY}",
    ],
)
def test_what_a_secret_looks_like(text):
    assert PLAIN not in redacted_text(text)
    assert CANARY not in redacted_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "2.8 nats per token: more than before",
        "pad_token: <s>, eos_token=</s>",
        "hf_transfer/some-data, git@github.com:me/x, me@example.org",
        "https://example.org/x?page=2#token",
        "max_tokens=5 and tokenizer: fast",
    ],
)
def test_what_is_none(text):
    assert redacted_text(text) == text


def test_settings_keep_their_form():
    given = {"hub_token": "x", "token": True, "n": [1, {"password": "y", "eos_token": "</s>"}], "key": ("a", None)}
    assert redacted(given) == {
        "hub_token": None,
        "token": True,
        "n": [1, {"password": None, "eos_token": "</s>"}],
        "key": ("a", None),
    }


def test_the_pair_log_stays_here(inputs, tmp_path, monkeypatch):
    uploaded: list[dict] = []
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: uploaded.append(given))
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *a, **k: type("Url", (), {"repo_id": "me/x"})())
    for asked in (False, True):
        out = tmp_path / str(asked)
        strategy = {"hub_strategy": "all_checkpoints", "save_steps": 1, "push_to_hub": True, "hub_always_push": True}
        config = GapPOConfig(str(out), bf16=False, max_steps=2, report_to="none", push_pair_log=asked, **strategy)
        trainer = GapPOTrainer(inputs[0], config, train_dataset=Dataset.from_list(preference_rows(8)))
        monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
        trainer.push_in_progress = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformers.trainer.PushInProgress", lambda jobs: None)
            trainer.train()
        trainer.push_to_hub()
        assert (out / "pair_log.csv").exists()
        whole = [given["ignore_patterns"] for given in uploaded if Path(given["folder_path"]) == out]
        assert len(whole) >= 2
        assert all(("pair_log.csv" not in patterns) is asked for patterns in whole)
        uploaded.clear()
