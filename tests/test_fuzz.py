"""Rows of random form, columns, types and sizes: training, evaluation and inspection read what was meant, or refuse
the rows in the same words. A row is drawn as a meaning first and written in some form then, so what is right is known
without reading it back.

`FUZZ=1000` tries so many sets, drawn anew, instead of the few that are the same in every run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import load, quiet
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from test_schemas import Right, Row, bot, chat, plain_logps, seen_by_trainer, user

from trl_margins import GapPOConfig, GapPODPOConfig, GapPOTrainer, MarginDPOTrainer
from trl_margins.cli import _is_about_input, main
from trl_margins.cli.inspect import in_tokens_of
from trl_margins.cli.train_options import TrainArguments
from trl_margins.data.audit import SplitAudit, audit
from trl_margins.data.loading import load_splits
from trl_margins.evaluation.scorer import completion_logps
from trl_margins.evaluation.sets import evaluation_set

N = int(os.environ.get("FUZZ", "25"))
fuzzed = settings(
    max_examples=N,
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    print_blob=True,
    phases=[Phase.reuse, Phase.generate],  # rows are small: they can be read as drawn, and a smaller set takes minutes
    suppress_health_check=list(HealthCheck),
)

LONGEST = 512  # tokens, the tiny models' positions: no set that is drawn here comes near it

# What rows mean

# letters of several scripts, what templates and formats give a meaning to, but no blanks at the ends: in text rows, a
# blank between prompt and answer belongs to either, by the tokenizer
letters = st.sampled_from([*"abcxyz019 äß漢字🙂{}[]<>%\"'`\\/,;:.|#-_\n\t", "Human", "user", "None", "nan", "{{ x }}"])
said = st.lists(letters, min_size=1, max_size=12).map("".join)
asked = said.map("q{}?".format)
answered = st.one_of(said.map("a{}.".format), st.sampled_from(["a", "", "a</s>b", "a<s>", "a" * 90]))
# an answer that repeats its prompt means less
numbers = st.one_of(st.integers(-3, 10), st.floats(-1e3, 1e3, width=32), st.sampled_from([0, 1, 0.5]))


@dataclass(frozen=True)
class Meaning:
    """Of one row: the turns before the answers, user first; the answers, and their scores."""

    system: str
    turns: list[str]
    chosen: str
    rejected: str
    scores: tuple[float, float]


def meanings(n_turns: int, with_system: bool) -> st.SearchStrategy[Meaning]:
    return st.builds(
        Meaning,
        system=asked if with_system else st.just(""),
        turns=st.lists(asked, min_size=n_turns, max_size=n_turns),
        chosen=answered,
        rejected=answered,
        scores=st.tuples(numbers, numbers),
    )


def before(row: Meaning) -> list[Row]:
    """The messages before the answers."""
    said = [(user if i % 2 == 0 else bot)(text) for i, text in enumerate(row.turns)]
    return [*([{"role": "system", "content": row.system}] if row.system else []), *said]


def right_chat(row: Meaning) -> tuple[str, str, str]:
    """By the tests' template, written by hand."""
    said = "".join(f"<s>{message['role']}:{message['content']}</s>" for message in before(row)[:-1])
    prompt, chosen, rejected = chat(row.turns[-1], row.chosen, row.rejected)
    return said + prompt, chosen, rejected


def right_text(row: Meaning) -> tuple[str, str, str]:
    return row.turns[-1], f"{row.chosen}</s>", f"{row.rejected}</s>"


# Forms


@dataclass(frozen=True)
class Form:
    """How rows are written: their columns, and what the tokens are."""

    write: Callable[[Meaning], Row]
    right: Callable[[Meaning], tuple[str, str, str]] = right_chat
    options: Mapping[str, str] | None = None
    one_turn: bool = False
    system: bool = True


def _parts(message: Row) -> Row:
    return {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}


def _sharegpt(message: Row) -> Row:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"from": names[message["role"]], "value": message["content"]}


def _more_keys(message: Row) -> Row:
    return {**message, "name": None, "tool_calls": None}


def _pairs(wrap: Callable[[list[Row]], Any] = list, each: Callable[[Row], Row] = dict) -> Callable[[Meaning], Row]:
    """Messages, the prompt apart."""

    def write(row: Meaning) -> Row:
        parts = {"prompt": before(row), "chosen": [bot(row.chosen)], "rejected": [bot(row.rejected)]}
        return {name: wrap([each(message) for message in messages]) for name, messages in parts.items()}

    return write


def _whole(wrap: Callable[[list[Row]], Any] = list, each: Callable[[Row], Row] = dict) -> Callable[[Meaning], Row]:
    """Whole conversations, no prompt column."""

    def write(row: Meaning) -> Row:
        return {
            side: wrap([each(message) for message in [*before(row), bot(answer)]])
            for side, answer in (("chosen", row.chosen), ("rejected", row.rejected))
        }

    return write


def _plain(row: Meaning) -> Row:
    return {"prompt": row.turns[-1], "chosen": row.chosen, "rejected": row.rejected}


FORMS = {
    "messages": Form(_pairs()),
    "messages with more keys": Form(_pairs(each=_more_keys)),
    "messages as JSON": Form(_pairs(json.dumps)),
    "messages as Python": Form(_pairs(str)),
    "content in parts": Form(_pairs(each=_parts)),
    "from and value": Form(_pairs(each=_sharegpt)),
    "conversations": Form(_whole()),
    "conversations as JSON": Form(_whole(json.dumps)),
    "conversations, from and value": Form(_whole(each=_sharegpt)),
    "conversations beside the prompt": Form(
        lambda row: {"prompt": row.turns[-1], **_whole()(row)}, one_turn=True, system=False
    ),
    "single messages": Form(
        lambda row: {"prompt": before(row), "chosen": bot(row.chosen), "rejected": bot(row.rejected)}
    ),
    "text answers to messages": Form(
        lambda row: {"prompt": before(row), "chosen": row.chosen, "rejected": row.rejected}
    ),
    "question and system": Form(
        lambda row: {"system": row.system, "question": row.turns[-1], "chosen": row.chosen, "rejected": row.rejected},
        options={"prompt_column": "question", "system_column": "system"},
        one_turn=True,
    ),
    "text": Form(_plain, right_text, one_turn=True, system=False),
    "a dialogue as text": Form(
        lambda row: {
            side: f"\n\nHuman: {row.turns[0]}\n\nAssistant: {answer}"
            for side, answer in (("chosen", row.chosen), ("rejected", row.rejected))
        },
        lambda row: (
            f"\n\nHuman: {row.turns[0]}\n\nAssistant:",  # TRL leaves the space before the answers to them
            f" {row.chosen}</s>",
            f" {row.rejected}</s>",
        ),
        one_turn=True,
        system=False,
    ),
    "text, prompt named": Form(
        lambda row: {"my prompt": row.turns[-1], "chosen": row.chosen, "rejected": row.rejected},
        right_text,
        {"prompt_column": "my prompt"},
        one_turn=True,
        system=False,
    ),
}

# Scores: their columns, the option that names them, and how a number is written
SCORES: dict[str, tuple[tuple[str, str], list[str] | None, Callable[[float], Any]]] = {
    "usual": (("score_chosen", "score_rejected"), None, lambda score: score),
    "ratings": (("chosen-rating", "rejected-rating"), None, lambda score: score),
    "named": (("good", "bad"), ["good", "bad"], lambda score: score),
    "text": (("score_chosen", "score_rejected"), None, repr),
    "floats": (("chosen_score", "rejected_score"), None, float),
    "decimals": (("score_chosen", "score_rejected"), None, lambda score: Decimal(repr(score))),
}
MORE: dict[str, Callable[[int], Any]] = {
    "id": str,
    "source": lambda i: "web",
    "Score": lambda i: i,
    "messages": lambda i: [user("another")],
    "images_count": lambda i: None,
    "index": lambda i: i,
    "tools": lambda i: None,
    "label": lambda i: i % 2 == 0,
}


# Files


def _as_csv(rows: list[Row], file: Path) -> None:
    pd.DataFrame(rows).to_csv(file, index=False)


def _as_lines(rows: list[Row], file: Path) -> None:
    file.write_text("".join(json.dumps(row, default=float, ensure_ascii=False) + "\n" for row in rows))


def _as_array(rows: list[Row], file: Path) -> None:
    file.write_text(json.dumps(rows, default=float))


FILES: dict[str, tuple[str, Callable[[list[Row], Path], Any]]] = {
    "jsonl": ("x.jsonl", _as_lines),
    "json": ("x.json", _as_array),
    "csv": ("x.csv", _as_csv),
    "parquet": ("x.parquet", lambda rows, file: Dataset.from_list(rows).to_parquet(str(file))),
    "saved": ("x", lambda rows, file: Dataset.from_list(rows).save_to_disk(str(file))),
}


@dataclass(frozen=True)
class Drawn:
    rows: list[Row]
    right: list[Right]
    options: dict[str, Any]
    file: str

    def written(self, folder: Path) -> str:
        name, write = FILES[self.file]
        write(self.rows, folder / name)
        return str(folder / name)


@st.composite
def sets(draw: st.DrawFn) -> Drawn:
    form = FORMS[draw(st.sampled_from(list(FORMS)))]
    columns, score_columns, written = SCORES[draw(st.sampled_from(list(SCORES)))]
    n_turns = 1 if form.one_turn else draw(st.sampled_from([1, 3]))
    meant = draw(st.lists(meanings(n_turns, form.system and draw(st.booleans())), min_size=1, max_size=7))
    more = draw(st.lists(st.sampled_from(list(MORE)), max_size=2, unique=True))
    rows = [
        {
            **form.write(row),
            **dict(zip(columns, map(written, row.scores), strict=True)),
            **{name: MORE[name](i) for name in more},
        }
        for i, row in enumerate(meant)
    ]
    names = draw(st.permutations(list(rows[0])))
    rows = [{name: row[name] for name in names} for row in rows]
    nested = any(isinstance(value, (list, dict)) for value in rows[0].values())
    # a CSV file has no lists, and does not tell an empty text from none
    files = [file for file in FILES if file != "csv" or not (nested or any("" in row.values() for row in rows))]
    options: dict[str, Any] = dict(form.options or {})
    if score_columns:
        options["score_columns"] = score_columns
    right = [(*form.right(row), *map(float, row.scores)) for row in meant]
    return Drawn(rows, right, options, draw(st.sampled_from(files)))


# What each command reads

Outcome = list[Right] | str  # or why not


def outcome(read: Callable[[], list[Right]]) -> Outcome:
    """What is read, or the error. One that the command line would show as a traceback fails the test."""
    try:
        return read()
    except Exception as error:
        if not _is_about_input(error):
            raise
        return str(error)


def trainer_of(base: str, folder: str, tokenizer: Any, out: Path, rows: Any, options: Mapping[str, Any]) -> Any:
    cls, config_cls = {"cpo": (GapPOTrainer, GapPOConfig), "dpo": (MarginDPOTrainer, GapPODPOConfig)}[base]
    more = {"max_steps": 1} if isinstance(rows, IterableDataset) else {}
    config = config_cls(**quiet(output_dir=str(out), max_length=LONGEST, **options, **more))
    return cls(load(folder), args=config, train_dataset=rows, processing_class=tokenizer)


def inspected(rows: Dataset, tokenizer: Any, options: Mapping[str, Any]) -> SplitAudit:
    return audit({"train": rows}, measure=in_tokens_of(tokenizer), **options).splits["train"]


def assert_evaluated(
    rows: Dataset, model: Any, tokenizer: Any, options: Mapping[str, Any], right: list[Right]
) -> None:
    """The log-probabilities are those of plain transformers on the right tokens, a row at a time."""
    found = evaluation_set(rows, "here", **options)
    assert [tuple(pair) for pair in found.scores] == [pytest.approx(row[3:], rel=1e-6) for row in right]
    scored = completion_logps(model, tokenizer, found.rows, max_length=LONGEST)
    for expected, each in zip(right, scored, strict=True):
        assert each.logps.tolist() == pytest.approx(plain_logps(model, tokenizer, expected), rel=1e-4, abs=1e-4)


def assert_inspected(found: SplitAudit, tokenizer: Any, right: list[Right]) -> None:
    assert (found.n_read, found.refused, found.unreadable, found.untokenizable) == (len(right), None, None, None)
    assert found.scores.n_ties == sum(row[3] == row[4] for row in right)
    lengths = [[len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in row[:3]] for row in right]
    for part, column in zip(("prompt", "chosen", "rejected"), zip(*lengths, strict=True), strict=True):
        assert getattr(found.lengths, part).mean == pytest.approx(sum(column) / len(right))


@fuzzed
@given(drawn=sets(), base=st.sampled_from(["cpo", "dpo"]), streamed=st.booleans())
def test_all_commands_read_what_was_meant(drawn, base, streamed, tiny_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    note(f"{drawn}")
    path = drawn.written(folder)
    rows = load_splits(path)["train"]
    given_rows = load_splits(path, streaming=True)["train"] if streamed and drawn.file != "saved" else rows
    right = [(*row[:3], *map(float, row[3:])) for row in drawn.right]
    tied = all(row[3] <= row[4] for row in right)  # GapPO has nothing to learn from ties alone
    trainer = outcome(lambda: trainer_of(base, tiny_model, tokenizer, folder / "out", given_rows, drawn.options))
    if isinstance(trainer, str):
        assert tied, trainer
        assert "would have weight 0" in trainer
    else:
        seen = seen_by_trainer(base, trainer)
        assert [row[:3] for row in seen] == [row[:3] for row in right]
        assert [row[3:] for row in seen] == [pytest.approx(row[3:], rel=1e-6) for row in right]
    assert_evaluated(rows, load(tiny_model), tokenizer, drawn.options, right)
    assert_inspected(inspected(rows, tokenizer, drawn.options), tokenizer, right)


# Broken cells

CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(
        ["", " ", "None", "nan", "[]", "{}", "[{", '[{"role": "user"}]', "\ud800".encode("utf-8", "replace")]
    ),
    st.sampled_from([[], {}, [None], [[]], [{}], ["a", "b"], [user("x")], [bot("")], [{"role": "x", "content": "y"}]]),
    st.sampled_from([bot(None), {"content": "y"}, {"role": "assistant"}, [user("x"), None], b"bytes"]),
)
READ = ("prompt", "chosen", "rejected", "question", "system", "my prompt")


@fuzzed
@given(drawn=sets(), cell=CELLS, data=st.data(), base=st.sampled_from(["cpo", "dpo"]))
def test_a_broken_cell_is_the_same_to_all(drawn, cell, data, base, tiny_model, tokenizer, tmp_path_factory, caplog):
    """Training and evaluation read the same pairs or give the same reason, and inspection has it, too."""
    folder = tmp_path_factory.mktemp("broken")
    name = data.draw(st.sampled_from([name for name in drawn.rows[0] if name in READ or "." in name]))
    number = data.draw(st.integers(0, len(drawn.rows) - 1))
    rows = [dict(row) for row in drawn.rows]
    rows[number][name] = cell
    try:
        path = Drawn(rows, drawn.right, drawn.options, drawn.file).written(folder)
    except Exception:  # what the file's own format cannot hold
        return
    note(f"{drawn.file} {rows} {drawn.options}")
    loaded = outcome(lambda: load_splits(path)["train"])
    if isinstance(loaded, str):
        assert Path(path).name in loaded
        return

    def trained() -> list[Right]:
        trainer = trainer_of(base, tiny_model, tokenizer, folder / "out", loaded, drawn.options)
        return seen_by_trainer(base, trainer)

    def evaluated() -> list[Any]:
        found = evaluation_set(loaded, "train", **drawn.options)
        scored = completion_logps(load(tiny_model), tokenizer, found.rows, max_length=LONGEST)
        return [each.logps.tolist() for each in scored]

    seen, scored = outcome(trained), outcome(evaluated)
    found = inspected(loaded, tokenizer, drawn.options)
    if isinstance(seen, str) and "would have weight 0" in seen:
        return
    assert isinstance(seen, str) == isinstance(scored, str), (seen, scored)
    counted = found.refused or (found.unreadable or found.untokenizable)
    assert bool(counted) == isinstance(seen, str), (seen, counted)
    if isinstance(seen, str):
        assert without_set(seen) == without_set(scored)
        assert name in seen or f"row {number}" in seen
        return
    for expected, each in zip(seen, scored, strict=True):
        assert each == pytest.approx(plain_logps(load(tiny_model), tokenizer, expected), rel=1e-4, abs=1e-4)


def without_set(message: str) -> str:
    """A message without the name of the set, which each command has its own for."""
    return re.sub(r"the train data set|train", "", message)


# Configurations

# what reaches out of the process, names where things lie, or can be judged only beside the model
NOT_DRAWN = re.compile(
    "train_only|anchor_scope|push|hub|deepspeed|fsdp|report_to|_dir$|resume|^env$|^debug$|local_rank|ddp|compile|cpu|ipex|mps|jit|neptune|tpu|"
    "trackio|run_name|project|liger|vllm|^config$|^method$|^base$|dataset|data_files|model|ref_|trust|overwrite|"
    "peft|lora|load_in|bnb|quant|attn|dtype|tf32|bf16|fp16|precision|accelerator|backend|dry_run|tokenizer|chat_template|"
    "stop_after|auto_find|torch_empty|dataloader|workers|streaming|offload|memory|kernels|profil|neftune|optim"
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([10**12, 10**30, -(10**12)]),
    st.floats(allow_nan=True),
    st.sampled_from(
        ["", " ", "no", "yes", "none", "null", "1", "0.5", "1e-4", "1_000", "٣", "-", "auto", "steps", "epoch"]
    ),
    st.sampled_from(["sigmoid", "score-gap", "amapo", "simpo", "linear", "log-ratio", "x" * 300, "a: b", "{}", "[1]"]),
    st.lists(st.one_of(st.integers(-1, 2), st.sampled_from(["a", "sigmoid", None])), max_size=2),
    st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 1), max_size=1),
    st.dates(),
)


def fields_of(base: str) -> list[str]:
    classes = (TrainArguments, {"cpo": GapPOConfig, "dpo": GapPODPOConfig}[base])
    return sorted({f.name for cls in classes for f in fields(cls) if f.init and not NOT_DRAWN.search(f.name)})


FIELDS = {base: fields_of(base) for base in ("cpo", "dpo")}


def said_by(capsys: pytest.CaptureFixture[str], *argv: str) -> str | None:
    """The error of a command, or None. One that the command line would show as a traceback fails the test."""
    capsys.readouterr()
    try:
        status = main(list(argv))
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        return stop.code if isinstance(stop.code, str) else capsys.readouterr().err
    except Exception as error:
        if not _is_about_input(error):
            raise
        return str(error)
    return None if status == 0 else f"status {status}"


@fuzzed
@given(data=st.data(), base=st.sampled_from(["cpo", "dpo"]))
def test_a_configuration_is_the_same_to_all(data, base, tiny_model, tmp_path_factory, capsys):
    """A dry run, `convert` and training take it or refuse it, in the same words."""
    folder = tmp_path_factory.mktemp("config")
    names = data.draw(st.lists(st.sampled_from(FIELDS[base]), min_size=1, max_size=2, unique=True))
    drawn = {name: data.draw(VALUES, label=name) for name in names}
    rows = [
        {"prompt": "q ", "chosen": f"a{i}", "rejected": f"b{i}", "score_chosen": 3, "score_rejected": i}
        for i in (1, 2)
    ]
    Dataset.from_list(rows).to_json(folder / "pairs.jsonl")
    settings = {
        **{"model_name_or_path": tiny_model, "dataset_name": str(folder / "pairs.jsonl"), "base": base},
        **{
            "output_dir": str(folder / "out"),
            "bf16": False,
            "report_to": "none",
            "max_steps": 1,
            "save_strategy": "no",
        },
        **{"eval_strategy": "no", "max_length": 64, "use_cpu": True},
        **drawn,
    }
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(settings, allow_unicode=True))
    dry = said_by(capsys, "train", "--config", str(file), "--dry_run")
    converted = said_by(capsys, "convert", str(file))
    assert (dry is None) == (converted is None), (dry, converted)
    trained = said_by(capsys, "train", "--config", str(file))
    if trained and re.search("data set|train pairs", trained):  # a dry run reads no rows
        trained = None
    assert (dry is None) == (trained is None), (drawn, dry, trained)
    if dry is not None:
        assert dry == trained
        assert any(name in dry for name in names), dry
