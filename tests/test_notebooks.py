"""Every notebook runs from top to bottom in its offline form, and uses public names only."""

import re
import warnings
from pathlib import Path

import nbformat
import pytest

import tflite_export
import updp_tf

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_uses_public_names_and_stores_no_outputs(path):
    notebook = read(path)
    code = code_of(notebook)
    for package in (updp_tf, tflite_export):
        used = set(re.findall(rf"\b{package.__name__}\.(\w+)", code))
        assert used and used <= set(package.__all__)
    assert not re.search(r"from (updp_tf|tflite_export)|import (updp_tf|tflite_export)\.", code)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_offline(path, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        # jupyter_core announces a move of its folders, zmq and tornado their own; the notebook's warnings are its own
        warnings.simplefilter("ignore", DeprecationWarning)
        from nbclient import NotebookClient

        monkeypatch.setenv("UPDP_TF_OFFLINE", "1")
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        notebook = read(path)
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("5 blocks merged" in text for text in texts)
    names = {f"{network}_{precision}.tflite" for network in ("original", "pruned") for precision in ("float32", "int8")}
    assert names | {"small.keras", "quickstart.png"} <= {file.name for file in tmp_path.iterdir()}
