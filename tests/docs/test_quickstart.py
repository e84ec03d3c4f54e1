"""The notebook runs from its first cell to its last, and what it shows of a reader's machine is nothing."""

import re

import pytest

from tests.helpers.pages import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
for needed in ("matplotlib", "sklearn"):
    pytest.importorskip(needed)

NOTEBOOK = ROOT / "examples/quickstart.ipynb"
SMALL = {"samples": "64", "epochs": "1"}


def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    parameters = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in SMALL.items():
        parameters.source, found = re.subn(
            rf"^{name} = \w+", f"{name} = {value}", parameters.source, flags=re.M
        )
        assert found == 1
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(ROOT))
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    assert "weight 0, epoch 1: mean loss" in printed
    assert len(re.findall(r"head \{2: \[\d\]\} alone", printed)) == 2


def test_its_outputs_name_no_file_of_a_machine():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        for output in cell.get("outputs", ()):
            text = str({k: v for k, v in output.items() if k != "data"}) + str(
                output.get("data", {}).get("text/plain", "")
            )
            assert not re.search(r"(/(home|root|tmp|usr|work|Users)/|[A-Z]:\\)", text)
            assert output["output_type"] != "error"
