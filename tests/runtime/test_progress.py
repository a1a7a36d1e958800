"""A progress bar on a terminal, lines in a log."""

import re
import sys

from cra_jax.runtime import progress


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
