"""Files of JSON, CSV and Parquet: what comes back, and what a format has no type for."""

from __future__ import annotations

import csv
import datetime
import json
import logging
from decimal import Decimal
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset, Features, Json, Value

from trl_margins.data.loading import load_splits
from trl_margins.data.saving import check_types, save

DAY = datetime.date(2024, 1, 2)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_values_come_back(suffix, tmp_path, caplog):
    """As pandas and Python read them: no digit and no line break is another."""
    columns: dict[str, list[Any]] = {
        "text": ["a\rb", "", "c\r\nd", 'e "f", g\n'],
        "code": ["00123", "None", "1e5", "NaN"],
        "score": [1 / 3, 1e-13, 123456.789012345, -0.0],
        "n": [1, 2**60 + 1, -(2**63), 0],
        "flag": [True, False, True, True],
    }
    rows, file = Dataset.from_dict(columns), tmp_path / f"rows{suffix}"
    check_types(rows.features, suffix, file.name)
    save(rows, file, suffix)
    if suffix == ".parquet":
        found = pd.read_parquet(file).to_dict("list")
    elif suffix == ".csv":
        with file.open(newline="") as lines:
            header, *lists = csv.reader(lines)
        found = dict(zip(header, map(list, zip(*lists, strict=True)), strict=True))
        found |= {name: list(map(kind, found[name])) for name, kind in {"score": float, "n": int}.items()}
        found["flag"] = [value == "True" for value in found["flag"]]
    else:
        text = file.read_text()
        read = json.loads(text) if suffix == ".json" else list(map(json.loads, text.splitlines()))
        found = {name: [row[name] for row in read] for name in columns}
    assert found.pop("score") == pytest.approx(columns.pop("score"), rel=1e-14, abs=1e-15)
    assert found == columns
    assert not caplog.messages


@pytest.mark.parametrize(
    ("value", "csv_says", "json_says"),
    [
        (b"\x00\xff", "CSV has no bytes, and .*'x'.* have them: use .parquet", "JSON has no bytes, and .*'x'"),
        ([b"a"], "CSV has no lists, and .*'x'", "JSON has no bytes, and .*'x'"),
        ({"y": {"z": b"a"}}, "CSV has no lists", "JSON has no bytes"),
        ([1.0], "CSV has no lists", None),
    ],
)
def test_types_that_a_format_cannot_hold(value, csv_says, json_says):
    features = Dataset.from_dict({"x": [value], "prompt": ["a"]}).features
    check_types(features, ".parquet", "out.parquet")
    with pytest.raises(ValueError, match=f"^out.csv: {csv_says}"):
        check_types(features, ".csv", "out.csv")
    if json_says is None:
        check_types(features, ".jsonl", "out.jsonl")
        return
    with pytest.raises(ValueError, match=f"^out.jsonl.gz: {json_says}"):
        check_types(features, ".jsonl.gz", "out.jsonl.gz")


def test_csv_has_one_type_in_a_column():
    rows = Dataset.from_list(
        [{"x": "p", "y": "a"}, {"x": [{"role": "user"}], "y": "b"}],
        features=Features({"x": Json(), "y": Value("string")}),
    )
    with pytest.raises(ValueError, match=r"^out.csv: in CSV all is text, and \['x'\] have JSON, such as messages"):
        check_types(rows.features, ".csv", "out.csv")
    check_types(rows.features, ".jsonl", "out.jsonl")


@pytest.mark.parametrize("value", [DAY, datetime.datetime(2024, 1, 2, 3), datetime.timedelta(1), [{"at": DAY}]])
def test_times_become_numbers_in_json(value, tmp_path, caplog):
    rows = Dataset.from_dict({"made": [value], "price": [Decimal("1.10")]})
    check_types(rows.features, ".json", "out.json")
    assert caplog.messages == [
        "out.json: JSON has no dates and times: made become milliseconds (of a date, since 1970). Parquet keeps them"
    ]
    save(rows, tmp_path / "out.jsonl", ".jsonl")
    found = json.loads((tmp_path / "out.jsonl").read_text())
    assert found["price"] == "1.10"
    if value == DAY:
        assert found["made"] == 1000 * datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC).timestamp()


def test_numbers_for_which_json_has_no_words(tmp_path, caplog):
    scores = [1.0, float("nan"), float("inf"), None] * 1000  # several batches
    rows = Dataset.from_dict({"score": scores, "other": [0.5] * 4000, "text": ["nan"] * 4000})
    with caplog.at_level(logging.WARNING):
        save(rows, tmp_path / "out.jsonl.gz", ".jsonl.gz")
    assert caplog.messages == [
        "JSON has no NaN and no infinity: 2000 of column score become null. Parquet keeps them",
    ]
    caplog.clear()
    save(rows, tmp_path / "out.csv", ".csv")
    assert caplog.messages == ["CSV has no NaN: 1000 of column score become empty cells. Parquet keeps them"]
    caplog.clear()
    save(rows, tmp_path / "out.parquet", ".parquet")
    assert not caplog.messages


def test_codes_of_a_table_come_back(tmp_path):
    """A number that begins with 0 is none, in any column, and an empty cell stays empty."""
    file = tmp_path / "rows.csv"
    file.write_text(
        "zip,qid,n,x,prompt,chosen,rejected\n00123,7,1,0.5,p,a,b\n04109,007,2,0,q,c,d\n,8,0,1.5,r,e,f\n",
        encoding="utf-8",
    )
    rows = load_splits(str(file))["train"]
    assert rows["zip"][:2] == ["00123", "04109"]
    assert rows["qid"][:] == ["7", "007", "8"]
    assert rows["n"][:] == [1, 2, 0]
    assert rows["x"][:] == [0.5, 0.0, 1.5]
    later = tmp_path / "later"
    later.mkdir()
    (later / "a.csv").write_text("zip,qid,prompt,chosen,rejected\n" + "7,8,p,a,b\n" * 1500 + "007,8,p,a,b\n")
    (later / "b.csv").write_text("zip,qid,prompt,chosen,rejected\n7,08,p,a,b\n")
    both = load_splits(str(later))["train"]
    assert (both["zip"][0], both["zip"][1500], both["qid"][0], both["qid"][1501]) == ("7", "007", "8", "08")
    save(rows, tmp_path / "again.csv", ".csv")
    with (tmp_path / "again.csv").open(newline="") as lines:
        again = list(csv.reader(lines))
    with file.open(newline="") as lines:
        first = list(csv.reader(lines))
    assert [row[:2] for row in again] == [row[:2] for row in first]
