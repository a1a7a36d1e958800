"""Tests that docs/faults.md has the rows that the tests of this directory count."""

import ast
import re
from pathlib import Path

from tests.faults import conftest, soak

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "faults.md"


def _pattern(text: ast.expr) -> str | None:
    """Regular expression of a string in the code; None if it is not a string."""
    if isinstance(text, ast.JoinedStr):
        return "".join(_pattern(part) or ".+" for part in text.values)
    return re.escape(str(text.value)) if isinstance(text, ast.Constant) else None


def _faults() -> set[str]:
    """Patterns of the faults that the tests count by `note`."""
    found = set()
    for file in HERE.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="note"), args=[fault, *_]):
                    found.add(_pattern(fault))
                case ast.Assign(targets=[ast.Name(id="fault")], value=fault):
                    found.add(_pattern(fault))
    return {pattern for pattern in found if pattern}


def test_the_page_has_each_fault_and_no_other():
    table = PAGE.read_text().partition(soak.TITLE)[0].partition("|---|---|---|\n")[2]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]
    faults = _faults()
    assert len(faults) > 15
    for fault in faults:
        assert any(re.fullmatch(fault, row) for row in rows), fault
    for row in rows:
        assert any(re.fullmatch(fault, row) for fault in faults), row


def test_the_page_has_the_head_and_the_section_that_the_code_writes():
    text = PAGE.read_text()
    for template in (conftest._HEAD, soak.TITLE + soak._SECTION):
        parts = re.split(r"\{.+?\}", template)
        assert re.search(".+".join(map(re.escape, parts)), text, re.DOTALL), template
