"""A progress bar on a terminal, lines in a log."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cra_jax.runtime import progress

ROOT = Path(__file__).resolve().parents[2]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress(2_000_000, "a.tgz", unit="B", done=500_000) as bar:
        bar.advance(500_000)
        bar.back_to(0)
        bar.advance(2_000_000)
    printed = capsys.readouterr().err
    assert "a.tgz:  25%" in printed
    assert "a.tgz: 100%" in printed
    assert "2.00M/2.00M" in printed
    assert "of 2.0 MB" not in printed


def test_progress_in_a_log_is_lines_at_intervals(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    with progress.Progress(4, "start", unit="images") as bar:
        bar.advance()
    monkeypatch.setattr(progress, "LOG_EVERY_S", 1e6)
    with progress.Progress(4, "end", unit="images") as bar:
        bar.advance(3)
        bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"start: 1 of 4 images, .* images/s, \d+ s left", lines[0])
    assert re.fullmatch(r"end: 4 of 4 images, .* images/s, 0 s left", lines[1])
    assert len(lines) == 2


def test_control_characters_are_escaped():
    hostile = "a\x1b]0;taken\x07\x9b2J\r\x7f\u202eb\u2028\0"
    assert progress.escape_controls(hostile) == (
        r"a\x1b]0;taken\x07\x9b2J\r\x7f\u202eb\u2028\x00"
    )
    assert progress.escape_controls("grün\té 鳥\n\\x1b") == "grün\té 鳥\n\\x1b"


def test_print_line_and_titles_are_escaped(monkeypatch, capsys):
    progress.print_line("\x1b[31mred")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress(2, "\x1b[2J.tgz", unit="B") as bar:
        bar.advance()
    assert "\x1b[2J" not in (printed := capsys.readouterr().err)
    assert printed.startswith("\\x1b[31mred\n")
    assert "\\x1b[2J.tgz: " in printed


_PROGRAM = """
import os, sys
from cra_jax.runtime import progress
with progress.protected_output():
    print("gr\\xfcn \\x1b[2J \\udcff " + "x" * 100_000)
    with progress.Progress(1, "bar", unit="B") as bar:
        bar.advance()
    print("done", file=sys.stderr)
    file = open(sys.argv[1], "w")
    os.write(1, b"not into the file"); os.write(2, b"not into the file")
    file.write("its end"); file.close()
"""


@pytest.mark.parametrize(
    ("redirection", "status"),
    [
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ("| head -c 1", 0),
        ("2>&1 | head -c 1", 0),
        ("2>/dev/full", 0),
        (">/dev/full", 1),  # a full disk: what was printed is missing
        (">/dev/full 2>&1", 1),
        (">&1", 0),
    ],
)
def test_work_ends_whatever_becomes_of_its_output(tmp_path, redirection, status):
    command = f"set -o pipefail; '{sys.executable}' -c \"$0\" '{tmp_path}/a'"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}", _PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "a").read_text() == "its end"
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipeError" not in done.stderr
    if redirection == ">&1":
        assert done.stdout.startswith(r"gr\xfcn \x1b[2J \udcff xxx")
    if redirection == ">/dev/full":
        assert "error: standard output cannot be written ([Errno 28]" in done.stderr
