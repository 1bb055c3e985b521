"""Commands on sets, files and options of random form: each does its work or says why not, within seconds, and never
with another library's traceback.

`FUZZ=1000` tries so many, drawn anew, as in `test_fuzz.py`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, note
from hypothesis import strategies as st
from test_fuzz import BROKEN_SCORES, CELLS, Drawn, answered, asked, fuzzed, numbers, outcome, said_by, sets

from trl_margins.data.loading import load_splits
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.rows.raw import column_names, raw_rows

pytestmark = pytest.mark.rehearsal

SECONDS = 60  # of one command, on a machine with other work

# Sets: pairs and scored lists, some of them broken


@st.composite
def lists(draw: st.DrawFn) -> Drawn:
    """Scored lists, in one of their forms."""
    rows = []
    kind = draw(st.sampled_from(["columns", "structs", "two", "one"]))
    for _ in range(draw(st.integers(1, 5))):
        prompt = draw(asked)
        answers = draw(st.lists(answered, min_size=2, max_size=4))
        scores = [draw(numbers) for _ in answers]
        each = list(zip(answers, scores, strict=True))
        if kind == "columns":
            rows.append({"prompt": prompt, "responses": answers, "scores": list(map(float, scores))})
        elif kind == "structs":
            made = [{"response": answer, "overall_score": float(score)} for answer, score in each]
            rows.append({"instruction": prompt, "completions": made})
        elif kind == "two":
            (one, first), (other, second) = each[:2]
            rows.append(
                {"prompt": prompt, "response_a": one, "response_b": other, "score_a": first, "score_b": second}
            )
        else:
            rows += [{"prompt": prompt, "response": answer, "score": float(score)} for answer, score in each]
    files = ["jsonl", "json", "parquet", "saved", "gz", "splits"]
    return Drawn(rows, [], {}, draw(st.sampled_from(files)))


@st.composite
def maybe_broken(draw: st.DrawFn, command: str) -> tuple[Drawn, bool]:
    """A set, and whether something in it is broken: a cell, a column, or all rows are gone."""
    are_lists = draw(st.sampled_from([command == "pairs"] * 5 + [command != "pairs"]))
    drawn = draw(lists() if are_lists else sets())
    how = draw(st.sampled_from([*["whole"] * 5, "cell", "cell", "score", "no column", "no rows", "renamed"]))
    rows = [dict(row) for row in drawn.rows]
    name = draw(st.sampled_from(list(rows[0])))
    if how in ("cell", "score"):
        rows[draw(st.integers(0, len(rows) - 1))][name] = draw(CELLS if how == "cell" else BROKEN_SCORES)
    elif how == "no column":
        rows = [{key: value for key, value in row.items() if key != name} for row in rows]
    elif how == "renamed":
        rows = [{(f"{key} " if key == name else key): value for key, value in row.items()} for row in rows]
    elif how == "no rows":
        rows = []
    return Drawn(rows, drawn.right, drawn.options, drawn.file), how != "whole"


def written(drawn: Drawn, folder: Path) -> str | None:
    """The file; None where its own format cannot hold the rows."""
    try:
        return drawn.written(folder)
    except Exception:
        return None


# Commands

NAMES = st.sampled_from(["prompt", "chosen", "score_chosen", "source", "nothing", "good", "列"])
MORE: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "inspect": {
        "prompt_column": NAMES,
        "system_column": NAMES,
        "score_columns": NAMES,
        "ef_metrics": st.sampled_from(["rougeL", "all", "jaccard", "nothing"]),
        "max_length": st.integers(-1, 40),
        "json": st.just("OUT/x.json"),
        "dataset_split": st.sampled_from(["train", "a b", "nothing"]),
        "model_name_or_path": st.just("MODEL"),
    },
    "evaluate": {
        "prompt_column": NAMES,
        "score_columns": NAMES,
        "reward": st.sampled_from(["sum", "length-normalized", "log-ratio"]),
        "cases": st.sampled_from(["amapo", "gappo", "gap-aware", "nothing"]),
        "max_length": st.integers(-1, 40),
        "json": st.just("OUT/x.json"),
        "rewards": st.just("OUT/r.jsonl"),
        "markdown": st.just("OUT/x.md"),
        "drift_from": st.just("MODEL"),
        "tokenization": st.sampled_from(["cpo", "chat-template"]),
        "dataset_split": st.sampled_from(["train", "a b", "名"]),
        "batch_size": st.integers(0, 3),
        "eval_min_score_gap": st.sampled_from(["0", "-1", "nan", "1e9"]),
    },
    "score": {
        "prompt_column": NAMES,
        "metric": st.sampled_from(["jaccard", "rouge1", "nothing"]),
        "column": NAMES,
        "overwrite": st.booleans(),
        "dataset_split": st.sampled_from(["train", "a b"]),
        "out": st.sampled_from(["OUT/x.jsonl", "OUT/x.csv", "OUT/x.parquet", "OUT/x.json", "OUT/x", "OUT/x.txt"]),
    },
    "select": {
        "prompt_column": NAMES,
        "score_columns": NAMES,
        "fraction": st.sampled_from(["0.3", "1", "0", "0.01"]),
        "batch_size": st.integers(1, 3),
        "anchor_radius": st.sampled_from(["0", "0.1", "1e9"]),
        "max_length": st.integers(1, 40),
        "dataset_split": st.sampled_from(["train", "a b"]),
    },
    "pairs": {
        "strategy": st.sampled_from(["best-worst", "all", "closest", "nothing"]),
        "k": st.integers(0, 3),
        "min_gap": st.sampled_from(["0", "-1", "1e9"]),
        "score_columns": NAMES,
        "prompt_column": NAMES,
        "as_chat": st.booleans(),
        "out": st.sampled_from(["OUT/x.jsonl", "OUT/x.csv", "OUT/x.parquet", "OUT/x.jsonl.gz", "OUT/x"]),
    },
    "hessian": {"max_pairs": st.integers(0, 2), "max_length": st.integers(1, 40), "json": st.just("OUT/x.json")},
    "train": {
        "prompt_column": NAMES,
        "score_columns": NAMES,
        "noise": st.sampled_from(["random:0.5", "length:0.9", "random:0"]),
        "method": st.sampled_from(["gappo", "gap-aware", "dpo", "none"]),
        "dataset_streaming": st.booleans(),
        "dataset_train_split": st.sampled_from(["train", "a b", "名"]),
        "max_length": st.integers(1, 40),
        "eval_dataset_name": st.just("DATA"),
    },
}
NEEDED = {
    "inspect": "",
    "evaluate": "--model_name_or_path MODEL --bootstrap 5",
    "score": "",
    "select": "--model_name_or_path MODEL --output_dir OUT/select",
    "pairs": "--out OUT/pairs.jsonl",
    "hessian": "--model_name_or_path MODEL --batch_size 2",
    "train": "--model_name_or_path MODEL --output_dir OUT/train --max_steps 1 --use_cpu true --report_to none "
    "--save_strategy no --eval_strategy no --log_pairs false",
}


@pytest.mark.parametrize("command", NEEDED)
@fuzzed(5)
@given(data=st.data())
def test_a_command_works_or_says_why_not(data, command, tiny_model, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("command")
    rows, is_broken = data.draw(maybe_broken(command))
    path = written(rows, folder)
    if path is None:
        return
    out = folder / "out"
    names = data.draw(st.lists(st.sampled_from(list(MORE[command])), max_size=2, unique=True))
    if rows.file in ("splits", "folder") and "dataset_split" in MORE[command]:
        names = list(dict.fromkeys([*names, "dataset_split"]))
    flags = [part for name in names for part in (f"--{name}", str(data.draw(MORE[command][name], label=name)))]
    taken = {"score_columns", "prompt_column", "system_column"} & MORE[command].keys() - set(names)
    for name, value in rows.options.items():
        if name in taken:
            flags += [f"--{name}", *([value] if isinstance(value, str) else value)]
    words = ["--dataset_name", path, *NEEDED[command].split(), *flags]
    places = {"MODEL": tiny_model, "DATA": path}
    words = [places.get(word, word.replace("OUT/", f"{out}/")) for word in words]
    note(f"{command} {words} {rows.rows}")
    began = time.monotonic()
    said = said_by(capsys, command, *words)
    assert time.monotonic() - began < SECONDS
    assert said is None or len(said) < 3000
    if said is None and not is_broken and "x.json" in " ".join(flags) and command in ("inspect", "evaluate"):
        assert json.loads((out / "x.json").read_text())


# Damaged files


@st.composite
def damages(draw: st.DrawFn, size: int) -> list[tuple[str, int, bytes]]:
    """What happens to a file's bytes: where, and what is written there."""
    kinds = st.sampled_from(["cut", "replace", "insert", "remove", "prepend"])
    odd = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"null\n", b"\r", b"\n\n", b'"', b"\\", b"[", b"}", b",", b"\x1f\x8b"]
    more = st.one_of(st.sampled_from(odd), st.binary(min_size=1, max_size=4))
    return draw(st.lists(st.tuples(kinds, st.integers(0, size), more), min_size=1, max_size=2))


def damaged(content: bytes, damage: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, what in damage:
        before, after = content[:at], content[at:]
        content = {
            "cut": before,
            "replace": before + what + after[len(what) :],
            "insert": before + what + after,
            "remove": before + after[len(what) :],
            "prepend": what + content,
        }[kind]
    return content


@fuzzed(25)
@given(drawn=sets(), kind=st.sampled_from(["jsonl", "json", "csv", "tsv", "gz", "parquet"]), data=st.data())
def test_a_damaged_file_is_named(drawn, kind, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    path = written(Drawn(drawn.rows, [], {}, kind), folder)
    if path is None:
        return
    file = Path(path)
    content = file.read_bytes()
    damage = data.draw(damages(len(content)))
    file.write_bytes(damaged(content, damage))
    note(f"{file.read_bytes()!r}")
    for streaming in (False, True):
        began = time.monotonic()
        found = outcome(lambda on=streaming: evaluated(path, on))
        assert time.monotonic() - began < SECONDS
        if isinstance(found, str):
            assert file.name in found or "data set" in found or "column" in found, found


def evaluated(path: str, streaming: bool) -> list[Any]:
    rows = load_splits(path, streaming=streaming)["train"]
    if streaming:
        rows = Dataset.from_list(list(raw_rows(rows, column_names(rows), "train")))
    return evaluation_set(rows, "here").rows
