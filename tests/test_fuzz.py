"""Rows of random form, columns, types and sizes: training, evaluation and inspection read what was meant, or refuse
the rows in the same words. A row is drawn as a meaning first and written in some form then, so what is right is known
without reading it back.

`FUZZ=1000` tries so many sets, drawn anew, instead of the few that are the same in every run.
"""

from __future__ import annotations

import datetime
import gzip
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import METHODS_AND_BASES, load, quiet
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from test_schemas import Right, Row, bot, chat, plain_logps, seen_by_trainer, user

from trl_margins import GapPOConfig, GapPODPOConfig, GapPOTrainer, MarginDPOTrainer
from trl_margins.cli import _is_about_input, main
from trl_margins.cli.inspect import in_tokens_of
from trl_margins.data.audit import SplitAudit, audit
from trl_margins.data.loading import load_splits
from trl_margins.evaluation.scorer import completion_logps
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.rows import open_rows, tokenize
from trl_margins.rows.mixed import mixed
from trl_margins.rows.scores import find_score_columns
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class


def fuzzed(n: int) -> settings:
    """So many examples, or as many as `FUZZ` says. One that fails is printed, with what runs it again."""
    return settings(
        max_examples=int(os.environ.get("FUZZ", n)),
        deadline=None,
        derandomize="FUZZ" not in os.environ,
        print_blob=True,
        phases=[Phase.generate],  # rows are small: they can be read as drawn, and a smaller set takes minutes
        suppress_health_check=list(HealthCheck),
    )


pytestmark = pytest.mark.rehearsal

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
        lambda row: {"质问 of mine": row.turns[-1], "chosen": row.chosen, "rejected": row.rejected},
        right_text,
        {"prompt_column": "质问 of mine"},
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
# Further columns, some by names that TRL, transformers or this package have a use for
MORE: dict[str, Callable[[int], Any]] = {
    "id": str,
    "source": lambda i: "web",
    "Score": lambda i: i,
    "messages": lambda i: [user("another")],
    "images_count": lambda i: None,
    "index": lambda i: i,
    "tools": lambda i: None,
    "label": lambda i: i % 2 == 0,
    "labels": lambda i: [i, -100],
    "input_ids": lambda i: [1, 2],
    "chosen_input_ids": lambda i: "x",
    "prompt_ids": lambda i: [1] * i,
    "rejected_labels": lambda i: None,
    "completion": lambda i: "c",
    "margin": lambda i: -i,
    "row_number": lambda i: 9 - i,
    "chosen_model": lambda i: "m",
    "__index_level_0__": lambda i: i,
    "列": lambda i: "é",
    "": lambda i: "no name",
    "meta": lambda i: {"a": {"b": None}, "c": [], "d": [[{"e": [None, i]}]]},
    "empty": lambda i: [],
    "all None": lambda i: None,
}


# Files


def _as_csv(rows: list[Row], file: Path) -> None:
    pd.DataFrame(rows).to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")


def _as_lines(rows: list[Row], file: Path) -> None:
    file.write_text("".join(json.dumps(row, default=float, ensure_ascii=False) + "\n" for row in rows))


def _as_packed_lines(rows: list[Row], file: Path) -> None:
    _as_lines(rows, file)
    file.write_bytes(gzip.compress(file.read_bytes()))


def _as_splits(rows: list[Row], folder: Path) -> None:
    """One of them has no rows."""
    every = Dataset.from_list(rows)
    DatasetDict({"a b": every.select([]), "train": every, "名": every}).save_to_disk(str(folder))


def _as_folder(rows: list[Row], folder: Path) -> None:
    folder.mkdir()
    Dataset.from_list(rows).to_parquet(str(folder / "train-0.parquet"))
    Dataset.from_list(rows[:1]).to_parquet(str(folder / "test-0.parquet"))


def _as_array(rows: list[Row], file: Path) -> None:
    file.write_text(json.dumps(rows, default=float))


FILES: dict[str, tuple[str, Callable[[list[Row], Path], Any]]] = {
    "jsonl": ("x.jsonl", _as_lines),
    "json": ("x.json", _as_array),
    "csv": ("x.csv", _as_csv),
    "tsv": ("x.tsv", _as_csv),
    "gz": ("x.jsonl.gz", _as_packed_lines),
    "splits": ("x", _as_splits),
    "folder": ("x", _as_folder),
    "parquet": ("x.parquet", lambda rows, file: Dataset.from_list(rows).to_parquet(str(file))),
    "saved": ("x", lambda rows, file: Dataset.from_list(rows).save_to_disk(str(file))),
}


OF_SCORES = {name for columns, *_ in SCORES.values() for name in columns}


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
    is_table = not (nested or any("" in row.values() for row in rows))
    files = [file for file in FILES if file not in ("csv", "tsv") or is_table]
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


@fuzzed(25)
@given(drawn=sets(), base=st.sampled_from(["cpo", "dpo"]), streamed=st.booleans())
def test_all_commands_read_what_was_meant(drawn, base, streamed, tiny_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    note(f"{drawn}")
    path = drawn.written(folder)
    rows = load_splits(path)["train"]
    given_rows = (
        load_splits(path, streaming=True)["train"] if streamed and drawn.file not in ("saved", "splits") else rows
    )
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
READ = ("prompt", "chosen", "rejected", "question", "system", "质问 of mine")


@fuzzed(25)
@given(drawn=sets(), cell=CELLS, data=st.data(), base=st.sampled_from(["cpo", "dpo"]))
def test_a_broken_cell_is_the_same_to_all(drawn, cell, data, base, tiny_model, tokenizer, tmp_path_factory, caplog):
    """Training and evaluation read the same pairs or give the same reason, and inspection has it, too."""
    folder = tmp_path_factory.mktemp("broken")
    name = data.draw(st.sampled_from([name for name in drawn.rows[0] if name in READ or "." in name]))
    number = data.draw(st.integers(0, len(drawn.rows) - 1))
    loaded = with_cell(drawn, name, number, cell, folder)
    if loaded is None:
        return
    seen = agree(loaded, base, tiny_model, tokenizer, folder / "out", drawn.options)
    if isinstance(seen, str):
        assert name in seen or f"row {number}" in seen


def with_cell(drawn: Drawn, name: str, number: int, cell: Any, folder: Path) -> Dataset | None:
    """The rows with another cell, from a file; None where that cannot hold it, or is refused by its name."""
    rows = [dict(row) for row in drawn.rows]
    rows[number][name] = cell
    try:
        path = Drawn(rows, drawn.right, drawn.options, drawn.file).written(folder)
    except Exception:  # what the file's own format cannot hold
        return None
    note(f"{drawn.file} {rows} {drawn.options}")
    loaded = outcome(lambda: load_splits(path)["train"])
    if isinstance(loaded, str):
        assert Path(path).name in loaded
        return None
    return loaded


def agree(rows: Dataset, base: str, folder: str, tokenizer: Any, out: Path, options: Mapping[str, Any]) -> Outcome:
    """What training sees of the rows, of which the commands must say the same, or its error, which is also theirs."""

    def trained() -> list[Right]:
        return seen_by_trainer(base, trainer_of(base, folder, tokenizer, out, rows, options))

    def evaluated() -> list[Any]:
        found = evaluation_set(rows, "train", **options)
        scored = completion_logps(load(folder), tokenizer, found.rows, max_length=LONGEST)
        return [each.logps.tolist() for each in scored]

    seen, scored = outcome(trained), outcome(evaluated)
    found = inspected(rows, tokenizer, options)
    if isinstance(seen, str) and "would have weight 0" in seen:
        return []
    assert isinstance(seen, str) == isinstance(scored, str), (seen, scored)
    counted = found.refused or (found.unreadable or found.untokenizable)
    assert bool(counted) == isinstance(seen, str), (seen, counted)
    if isinstance(seen, str):
        assert without_set(seen) == without_set(str(scored))
        return seen
    for expected, each in zip(seen, scored, strict=True):
        assert each == pytest.approx(plain_logps(load(folder), tokenizer, expected), rel=1e-4, abs=1e-4)
    return seen


def without_set(message: str) -> str:
    """A message without the name of the set, which each command has its own for."""
    return re.sub(r"the train data set|train", "", message)


# Broken scores

BROKEN_SCORES = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(10**9), 10**9),
    st.sampled_from([10**30, -(10**400), 1e308, 1e6, 1000001, Decimal("NaN"), Decimal("1E+400"), Decimal("0.5")]),
    st.sampled_from(["", " ", "high", "4.5", " 7 ", "1e3", "nan", "inf", "1_000", "٣", "0x10", "5/10", "True", "-"]),
    st.sampled_from([[], [1], [2.0, None], {"a": 1}, b"5", datetime.date(2024, 1, 2), datetime.datetime(2024, 1, 2)]),
)


@fuzzed(25)
@given(drawn=sets(), cell=BROKEN_SCORES, data=st.data(), base=st.sampled_from(["cpo", "dpo"]))
def test_a_broken_score_is_the_same_to_all(drawn, cell, data, base, tiny_model, tokenizer, tmp_path_factory, caplog):
    """Training stops at it, evaluation leaves it out, inspection counts it: the same row, for the same reason."""
    folder = tmp_path_factory.mktemp("scores")
    name = data.draw(st.sampled_from([name for name in drawn.rows[0] if name in OF_SCORES]))
    number = data.draw(st.integers(0, len(drawn.rows) - 1))
    loaded = with_cell(drawn, name, number, cell, folder)
    if loaded is None:
        return

    def trained() -> list[Right]:
        trainer = trainer_of(base, tiny_model, tokenizer, folder / "out", loaded, drawn.options)
        return seen_by_trainer(base, trainer)

    seen = outcome(trained)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trl_margins"):
        scored = outcome(lambda: evaluation_set(loaded, "train", **drawn.options).scores)
    found = inspected(loaded, tokenizer, drawn.options)
    if isinstance(seen, str) and "would have weight 0" not in seen:
        assert name in seen
        first = re.search(r"row (\d+)", seen)
        if isinstance(scored, str):  # of the whole column
            assert without_set(scored) == without_set(seen)
            return
        assert without_set(seen) in without_set(caplog.text)
        assert first is not None
        assert math.isnan(sum(scored[int(first[1])]))
        assert found.scores.bad
        assert found.scores.bad[0].first_row == int(first[1])
        return
    assert not found.scores.bad
    assert found.scores.n_ties == sum(chosen == rejected for chosen, rejected in scored)
    if not isinstance(seen, str):
        assert [row[3:] for row in seen] == [pytest.approx(pair, rel=1e-6) for pair in scored]


# Rows of two forms


@fuzzed(15)
@given(data=st.data(), base=st.sampled_from(["cpo", "dpo"]))
def test_rows_of_two_forms_are_the_same_to_all(data, base, tiny_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    meant = data.draw(st.lists(meanings(1, with_system=False), min_size=2, max_size=4))
    forms = data.draw(st.lists(st.sampled_from([each for each in FORMS.values() if not each.options]), min_size=2))
    rows = [
        {**forms[i % len(forms)].write(row), "score_chosen": 2, "score_rejected": i} for i, row in enumerate(meant)
    ]
    note(f"{rows}")
    path = Drawn(rows, [], {}, data.draw(st.sampled_from(["jsonl", "json", "gz"]))).written(folder)
    loaded = outcome(lambda: load_splits(path)["train"])
    if isinstance(loaded, str):
        assert Path(path).name in loaded
        return
    agree(loaded, base, tiny_model, tokenizer, folder / "out", {})


# Methods


@fuzzed(8)
@given(drawn=sets(), which=st.sampled_from(METHODS_AND_BASES), batch=st.integers(1, 3))
def test_every_method_trains_what_was_meant(drawn, which, batch, tiny_model, tokenizer, tmp_path_factory):
    """Each method sees the same pairs and takes a finite step, or says why it has nothing to learn."""
    method, base = which
    folder = tmp_path_factory.mktemp("method")
    note(f"{drawn}")
    rows = load_splits(drawn.written(folder))["train"]
    options = {"max_length": LONGEST, "max_steps": 1, "per_device_train_batch_size": batch, "log_pairs": False}
    config = config_class(method, base)(**quiet(output_dir=str(folder / "out"), **options, **drawn.options))
    trainer = outcome(
        lambda: trainer_class(method, base)(
            load(tiny_model), args=config, train_dataset=rows, processing_class=tokenizer
        )
    )
    if isinstance(trainer, str):
        assert re.search("would have (weight 0|no loss)", trainer), trainer
        return
    names = ("prompt_ids", "chosen_ids", "rejected_ids") if base == "dpo" else ("prompt_input_ids",)
    for row, right in zip(trainer.train_dataset, drawn.right, strict=True):
        assert [tokenizer.decode(row[name]) for name in names] == list(right[: len(names)])
    trained = outcome(lambda: trainer.train().training_loss)
    assert isinstance(trained, float), trained
    assert math.isfinite(trained)


# Mixtures


@fuzzed(15)
@given(drawn=st.lists(sets().filter(lambda each: not each.options), min_size=2, max_size=3))
def test_a_mixture_has_the_rows_of_each(drawn, tokenizer, tmp_path_factory):
    note(f"{drawn}")
    parts = [
        (str(i), load_splits(each.written(tmp_path_factory.mktemp("mixed")))["train"]) for i, each in enumerate(drawn)
    ]
    together = mixed(parts)
    right = [row for each in drawn for row in each.right]
    tokens = tokenize(list(open_rows(together, "together")), tokenizer)
    found = [tuple(map(tokenizer.decode, (row.prompt, *row.completions))) for row in tokens]
    assert found == [row[:3] for row in right]
    columns = find_score_columns(together.column_names)
    scores = [columns.read(row) for row in together.select_columns(list(columns.names))]
    assert scores == [pytest.approx(row[3:], rel=1e-6) for row in right]


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
