"""The notebook, executed from its first cell to its last."""

import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from cra_jax.runtime.run_directory import flatten, read_metrics
from tests.helpers import tiny_config

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "cra_cnn_colab.ipynb"


def _notebook(**parameters):
    """Returns the notebook with other values in its cell of parameters."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    for name, value in parameters.items():
        lines = cell.source.splitlines()
        (index,) = [i for i, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[index] = f"{name} = {value!r}"
        cell.source = "\n".join(lines)
    return notebook


def test_notebook_has_no_saved_outputs():
    notebook = _notebook()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_notebook_runs_without_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("XLA_FLAGS")  # one device, as for a user
    plain = flatten(tiny_config.get_config().to_dict())
    short = flatten(tiny_config.config(tmp_path / "cache").to_dict())
    changes = [f"--config.{k}={v}" for k, v in short.items() if plain[k] != v]
    changes = [text.replace(" ", "") for text in changes]
    notebook = _notebook(
        RUNS=str(tmp_path / "runs"),
        QUICKSTART=" ".join(["--config=configs/quickstart.py", *changes]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of Jupyter's packages
        NotebookClient(
            notebook,
            timeout=500,
            kernel_name="python3",
            resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        ).execute()
    outputs = [o for c in notebook.cells for o in c.get("outputs", ())]
    printed = "".join(o.get("text", "") for o in outputs if o.output_type == "stream")
    assert "strongest activation in the box" in printed
    assert "true class: " in printed
    assert "skipped: set TRAIN_ON_CUB" in printed
    assert "(2, 8) ('" in printed
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    drawn = list((tmp_path / "runs" / "quickstart" / "report").glob("*.png"))
    assert len(drawn) >= 3
    assert len(images) == len(drawn) + 1  # and the predicted image
    for name in ("quickstart", "quickstart-baseline"):
        assert read_metrics(tmp_path / "runs" / name)[-1]["split"] == "test_shifted"


def test_failing_cell_stops_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = _notebook(QUICKSTART="--config=nowhere.py", RUNS=str(tmp_path / "runs"))
    client = NotebookClient(
        notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match="error in the flags"):
            client.execute()
