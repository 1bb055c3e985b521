"""Nothing that an option or a model says keeps a run waiting without end."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time

import pytest
from conftest import CHAT_TEMPLATE, chat_tokenizer, preference_rows
from datasets import Dataset

from trl_margins import GammaPOConfig, GapPOConfig
from trl_margins.cli import main
from trl_margins.data.evaluation_factors import completion_texts
from trl_margins.printable import printable
from trl_margins.redaction import redacted_text
from trl_margins.report.markdown import code, fenced, one_line
from trl_margins.rows import PreferenceRow, limited
from trl_margins.rows.messages import may_be_messages
from trl_margins.rows.scores import as_number
from trl_margins.rows.tokens import tokenizer_of
from trl_margins.rows.turns import chat_turns

LOOPS = "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" * 9
SOMETIMES = "{% if messages[0]['content'] == 'slow' %}" + LOOPS + "{% endif %}"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(limited, "SECONDS", 0.5)
    monkeypatch.setattr("trl_margins.rows.tokens.SECONDS", 0.5)


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def conversations(n: int, slow: int | None = None) -> Dataset:
    answer = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    rows = [
        {"prompt": messages("slow" if i == slow else f"question {i}"), "chosen": answer[0], "rejected": answer[1]}
        for i in range(n)
    ]
    return Dataset.from_list([{**row, "score_chosen": 2.0, "score_rejected": 1.0} for row in rows])


@pytest.mark.rehearsal
@pytest.mark.parametrize("template", [LOOPS + CHAT_TEMPLATE, SOMETIMES + CHAT_TEMPLATE], ids=["always", "sometimes"])
@pytest.mark.parametrize("name", ["train", "evaluate", "inspect"])
def test_a_template_without_end(name, template, tiny_model, tmp_path, impatient):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    conversations(20, slow=13).to_json(tmp_path / "rows.jsonl")
    argv = [name, "--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "rows.jsonl")]
    if name == "train":
        argv += ["--output_dir", str(tmp_path / "out"), "--eval_strategy", "no", "--report_to", "none", "--use_cpu"]
    began, before = time.perf_counter(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(
        ValueError, match=r"the chat template takes more than 0.5 s .*loops within loops.*--chat_template"
    ):
        main(argv)
    assert time.perf_counter() - began < 60
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_who_waits_for_something_else_is_not_stopped(impatient):
    """Time of this thread counts: a slow disk or a machine with much to do does not."""
    with limited.limited():
        time.sleep(1)
    with pytest.raises(limited.SlowTemplateError), limited.limited():
        while_away()
    ended = []

    def elsewhere() -> None:  # where there are no signals
        with limited.limited():
            ended.append(len(tokenizer_of(chat_tokenizer(CHAT_TEMPLATE)).apply_chat_template(messages("x"))))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ended


def while_away() -> None:
    while True:
        pass


def test_another_timer_goes_on():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with limited.limited():
            pass
        end = time.perf_counter() + 20
        while not rang and time.perf_counter() < end:
            time.sleep(0.05)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rang


HUGE = ("max_steps", "gradient_accumulation_steps", "dataloader_num_workers", "dataset_num_proc", "gamma_po_steps")
HUGE += ("gamma_po_estimation_size", "gamma_po_queue_size", "per_device_train_batch_size")


@pytest.mark.parametrize("name", HUGE)
def test_numbers_of_which_there_is_no_end(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} must be at most [\d,]+; it is 10000000000000"):
        GammaPOConfig(str(tmp_path), bf16=False, **{name: 10**13})


@pytest.mark.parametrize("name", ["num_train_epochs", "save_steps", "logging_steps", "warmup_steps", "learning_rate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.0])
def test_numbers_that_are_none(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} must be a number"):
        GapPOConfig(str(tmp_path), bf16=False, **{name: value})


@pytest.mark.rehearsal
def test_very_many_columns(tmp_path, capsys):
    """Each is looked at once."""
    others = {f"column_{i}": i for i in range(700)}
    file = tmp_path / "wide.jsonl"
    file.write_text("".join(json.dumps({**row, **others}) + "\n" for row in preference_rows(4)))
    began = time.perf_counter()
    assert main(["inspect", "--dataset_name", str(file)]) == 0
    assert time.perf_counter() - began < 60
    assert len(capsys.readouterr().out) < 10_000


@pytest.mark.parametrize(
    "text",
    [
        " " * 200_000 + "x",
        "\n" * 200_000 + "x",
        "1" * 200_000 + "x",
        "a" * 200_000 + ".",
        "[" * 200_000,
        "- " * 99_999,
        "password:" * 22_000 + "a word",
        '"' * 30_000,
        "\\" * 30_000,
        '"role":"user",' * 3_000,
        '{"role":' + " " * 200_000 + "x",
    ],
    ids=[
        "blanks",
        "lines",
        "digits",
        "letters",
        "brackets",
        "dashes",
        "keys",
        "quotes",
        "backslashes",
        "roles",
        "role",
    ],
)
def test_texts_that_a_pattern_could_try_without_end(text):
    """What looks into texts takes time in proportion to their length."""
    began = time.perf_counter()
    chat_turns(f"\n\nHuman: {text}\n\nAssistant:")
    as_number(text)
    for begin in ("", "[", "({", "[x("):
        may_be_messages(begin + text)
    completion_texts(PreferenceRow(text, [text + "a", text + "b"]), implicit=True)
    printable(redacted_text(text))
    for form in (one_line, code, fenced):
        form(text)
    assert time.perf_counter() - began < 5
