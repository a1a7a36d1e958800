"""The soak, in short: the long form is `make soak`."""

import pytest

from tests.faults import soak

FLAT = {"memory_mb": 500.0, "open_files": 60.0, "disk_mb": 9.0}


@pytest.mark.parametrize("name", soak.ALLOWED)
def test_what_grows_is_found(name):
    seen = [{**FLAT, name: FLAT[name] * (1 + i / 10)} for i in range(9)]
    assert soak.judge([FLAT] * 9)[0]
    assert not soak.judge(seen)[0]
    assert not soak.judge([])[0]


def test_a_short_soak_stays_flat_and_is_written_down(tmp_path):
    page = tmp_path / "faults.md"
    page.write_text(f"| a fault |\n{soak.TITLE}\nof another day\n")
    assert soak.soak(0.25, tmp_path, lives_s=(0.5, 1), table=page)
    text = page.read_text()
    assert text.startswith(f"| a fault |\n{soak.TITLE}\nWritten by `make soak`: ")
    assert "another day" not in text
    assert "| memory, MB | " in text
    assert " 0 kills" not in text
