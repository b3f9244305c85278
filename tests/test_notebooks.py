"""The notebooks run, without a browser, and show what they say."""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="the extra notebook has nbclient")
nbformat = pytest.importorskip("nbformat", reason="the extra notebook has nbformat")
pytest.importorskip("ipykernel", reason="the extra notebook has ipykernel")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "experiments" / "notebooks"
pytestmark = pytest.mark.filterwarnings("ignore")  # they are of Jupyter's libraries


@pytest.mark.parametrize(
    ("name", "pictures", "shown"),
    [
        ("quantisers", 2, ["{-1: 0.", "correlation with the float product: 0.8"]),
        ("evaluation", 1, ["<th>bits per byte</th>", "acc_norm", "McNemar", "hidden_size"]),
    ],
)
def test_notebook(name, pictures, shown, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)  # none are kept in the file
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute(cwd=str(FOLDER))
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    texts = [str(o.get("text", "")) + str(o.get("data", "")) for o in outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == pictures
    for text in shown:
        assert any(text in found for found in texts), text
