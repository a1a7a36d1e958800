"""Rooms import only from lower levels, and some names stay in one room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cra_jax"


def _levels() -> dict[str, int]:
    """The table of docs/architecture.md."""
    levels = {}
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].isdecimal():
            levels[cells[1].strip("`").removesuffix(".py")] = int(cells[0])
    return levels


def _imports(path: Path) -> set[str]:
    """The rooms that a room imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "cra_jax":
                found |= {parts[1]} if parts[1:] else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found |= {n[1] for n in names if n[0] == "cra_jax" and n[1:]}
    return found


ROOMS = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def test_every_room_is_in_the_table_and_the_other_way_round():
    assert set(ROOMS) == set(_levels())


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_lower_levels(room):
    levels = _levels()
    for other in _imports(PACKAGE / f"{room}.py"):
        assert levels[other] < levels[room], f"{room} imports {other}"


@pytest.mark.parametrize("room", [r for r in ROOMS if r != "parallel"])
def test_devices_are_named_in_one_room(room):
    text = (PACKAGE / f"{room}.py").read_text()
    code = "\n".join(ast.unparse(node) for node in ast.parse(text).body)
    for name in ("pmap(", "pmean", "psum", "axis_name", "jax.devices", "device_count"):
        used = [line for line in code.splitlines() if name in line]
        allowed = [line for line in used if f"parallel.{name}" in line]
        assert used == allowed, f"{room} uses {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_short(room):
    assert len((PACKAGE / f"{room}.py").read_text().splitlines()) <= 400


def test_launch_is_short_and_the_package_needs_no_tensorflow_or_torch():
    assert len((ROOT / "launch.py").read_text().splitlines()) <= 80
    for path in [*PACKAGE.glob("*.py"), *(ROOT / "configs").glob("*.py")]:
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
