"""The import rule holds, and some names stay in one file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "cra_jax").rglob("*.py"))
DEVICES = ROOT / "cra_jax" / "runtime" / "devices.py"


def _named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_contract_of_pyproject_is_kept():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("path", [f for f in FILES if f != DEVICES], ids=_named)
def test_only_one_file_names_pmap_and_devices(path):
    code = ast.unparse(ast.parse(path.read_text()))
    for name in ("pmap(", "pmean", "psum", "axis_name", "jax.devices", "device_count"):
        used = [line for line in code.splitlines() if name in line]
        assert used == [x for x in used if f"devices.{name}" in x], f"{path}: {name}"


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.parent.name == "cra_jax"], ids=_named
)
def test_the_method_imports_no_folder(path):
    method = {f.stem for f in path.parent.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "cra_jax"
        ):
            part = (node.module or "").partition(".")[2]
            parts = {part} if part else {a.name for a in node.names}
            assert parts <= method


def test_the_package_needs_no_tensorflow_or_torch():
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


def test_four_modules_are_reached_from_the_package_itself():
    import cra_jax
    from cra_jax import efficientnet, predict, resnet, weights

    assert predict.__name__ == "cra_jax.inference.predict"
    assert {resnet.create, efficientnet.create, weights.load_torch}
    assert {"predict", "resnet", "weights", "efficientnet"} <= set(dir(cra_jax))
    with pytest.raises(AttributeError, match="no attribute 'images'"):
        cra_jax.images  # noqa: B018
