"""Runs the notebook and writes what it prints into it: `python .ci/notebook.py examples/gappo.ipynb`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def executed(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, after a run in the folder.

    Raises:
        CellExecutionError: a cell that failed, with its traceback.
    """
    read = nbformat.read(notebook, as_version=4)
    return NotebookClient(read, resources={"metadata": {"path": str(folder)}}, record_timing=False).execute()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        nbformat.write(executed(path, Path(scratch)), path)
