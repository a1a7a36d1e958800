"""Tests of `soak.py`; `make soak` runs it for longer."""

import pytest

from tests.faults import soak

FLAT = {"memory_mb": 500.0, "open_files": 60.0, "disk_mb": 9.0}


@pytest.mark.parametrize("name", soak.ALLOWED)
def test_growth_is_detected(name):
    seen = [{**FLAT, name: FLAT[name] * (1 + i / 10)} for i in range(9)]
    assert soak.judge([FLAT] * 9)[0]
    assert not soak.judge(seen)[0]
    assert not soak.judge([])[0]


def test_a_short_soak_does_not_grow_and_is_written_to_the_page(tmp_path):
    page = tmp_path / "faults.md"
    page.write_text(f"| a fault |\n{soak.TITLE}\nof another day\n")
    assert soak.soak(0.25, tmp_path, lives_s=(0.5, 1), table=page)
    text = page.read_text()
    assert text.startswith(f"| a fault |\n{soak.TITLE}\n`make soak` trained for ")
    assert "another day" not in text
    assert "| memory, MB | " in text
    assert "process 0 times" not in text
