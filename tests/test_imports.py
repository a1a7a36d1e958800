"""The import rules of the package."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cra_jax.inference import export, run_options
from tests.helpers import tiny_run

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "cra_jax").rglob("*.py"))
DEVICES = ROOT / "cra_jax" / "runtime" / "devices.py"


def _named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_import_contract_of_pyproject_is_kept():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("path", [f for f in FILES if f != DEVICES], ids=_named)
def test_only_devices_py_names_pmap_and_device_functions(path):
    code = ast.unparse(ast.parse(path.read_text()))
    for name in ("pmap(", "pmean", "psum", "axis_name", "jax.devices", "device_count"):
        used = [line for line in code.splitlines() if name in line]
        assert used == [x for x in used if f"devices.{name}" in x], f"{path}: {name}"


@pytest.mark.parametrize(
    "path",
    [f for f in FILES if f.parent.name == "cra_jax" and not f.stem.startswith("__")],
    ids=_named,
)
def test_method_files_import_no_subpackage(path):
    method = {f.stem for f in path.parent.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "cra_jax"
        ):
            part = (node.module or "").partition(".")[2]
            parts = {part} if part else {a.name for a in node.names}
            assert parts <= method


def test_no_file_imports_tensorflow_or_torch():
    for path in [*FILES, *(ROOT / "configs").glob("*.py"), ROOT / "launch.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                assert name.split(".")[0] not in ("tensorflow", "torch"), path


def test_package_exposes_four_modules():
    import cra_jax
    from cra_jax import efficientnet, predict, resnet, weights

    assert predict.__name__ == "cra_jax.inference.predict"
    assert {resnet.create, efficientnet.create, weights.load_torch}
    assert {"predict", "resnet", "weights", "efficientnet"} <= set(dir(cra_jax))
    with pytest.raises(AttributeError, match="no attribute 'images'"):
        cra_jax.images  # noqa: B018


TRAINING_ONLY = ("optax", "orbax", "tensorstore", "ml_collections")
NEVER = (
    *("tensorflow", "tensorflow_datasets", "pyarrow", "tensorboardX"),
    *("matplotlib", "jinja2", "torch"),
)


def test_prediction_imports_only_its_own_dependencies(tmp_path):
    """Predicts from an export, from a checkpoint and with the command.

    Only overlays import matplotlib, for its colors.
    """
    config = tiny_run.save(tmp_path)
    export.run(run_options.from_config(config), tmp_path)
    Image.new("RGB", (40, 40), "green").save(tmp_path / "green.png")
    code = (
        "import json, sys; import cra_jax\n"
        f"loaded, run = [], {str(tmp_path)!r}\n"
        "def predict(path):\n"
        "  assert len(cra_jax.load(path)(f'{run}/green.png').classes) == 5\n"
        "predict(f'{run}/export'); loaded.append(list(sys.modules))\n"
        "predict(run); loaded.append(list(sys.modules))\n"
        "sys.argv = ['cra-jax', '--mode=predict', f'--workdir={run}', '--images']\n"
        "sys.argv.append(f'{run}/green.png')\n"
        "from cra_jax.command.main import main\ntry: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "loaded.append(list(sys.modules))\n"
        "print(json.dumps(loaded))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    by_export, by_run, by_command = map(set, json.loads(done.stdout.splitlines()[-1]))
    assert not by_export & {*NEVER, *TRAINING_ONLY}
    assert not by_run & {*NEVER, "cra_jax.training.train"}
    assert not by_command & {*NEVER, "cra_jax.training.train"}
    assert {"jax", "cra_jax.inference.predictor"} <= by_export
    assert "orbax" in by_run  # the assertions above do find imports


def test_package_has_a_version_and_is_imported_without_jax():
    code = (
        "import sys, cra_jax; assert 'jax' not in sys.modules\n"
        "print(cra_jax.__version__, callable(cra_jax.load))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\w* True\n", done.stdout)
