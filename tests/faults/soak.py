"""Trains with random kills and checks that memory, open files and disk do not grow.

    python tests/faults/soak.py --minutes 60 --table docs/faults.md

A run is killed and started again until it is complete; then another run starts in the
same directory. Prints a line per minute. Fails if the last third of the measurements
has more than the first: 20 % more memory, or 10 % more open files or disk space.
Otherwise the measurements become the last section of the page.
"""

import argparse
import contextlib
import datetime
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cra_jax.runtime import provenance
from tests.faults import harness

TITLE = "\n## Repeated kills\n"
_SECTION = """
`make soak` trained for {minutes:.0f} minutes on {date} at commit {commit}.
It killed the training process {kills} times at random moments, and completed {done}
runs. The table has medians.

| training process and run directory | first third | last third |
|---|---:|---:|
{rows}"""

ALLOWED = {"memory_mb": 1.2, "open_files": 1.1, "disk_mb": 1.1}


def measure(pid: int, folder: Path) -> dict[str, float]:
    """Measures memory and open files of a process, and its run directory's size."""
    status = Path(f"/proc/{pid}/status").read_text()
    (resident_kb,) = (x.split()[1] for x in status.splitlines() if "VmRSS" in x)
    files = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return {
        "memory_mb": int(resident_kb) / 1e3,
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "disk_mb": sum(files) / 1e6,
    }


def judge(seen: list[dict[str, float]]) -> tuple[bool, str]:
    """Whether no measurement grew, and the rows of the table."""
    third = max(len(seen) // 3, 1)
    flat, rows = bool(seen), ""
    for name, allowed in ALLOWED.items() if seen else ():
        first, last = (
            median(x[name] for x in part) for part in (seen[:third], seen[-third:])
        )
        flat &= last <= allowed * first
        what = name.replace("_mb", ", MB").replace("_", " ")
        rows += f"| {what} | {first:.1f} | {last:.1f} |\n"
    return flat, rows


def soak(
    minutes: float,
    folder: Path,
    *,
    lives_s: tuple[float, float] = (2, 60),
    table: Path | None = None,
) -> bool:
    """Trains with random kills.

    Args:
      minutes: duration.
      folder: directory of the runs.
      lives_s: least and most seconds of training before a kill.
      table: page to write the measurements to, if none grew.

    Returns:
      Whether no measurement grew.
    """
    rng = random.Random(0)
    # Long enough that most runs are killed, because measurements are taken at kills.
    changes = {"train.epochs": 400, "checkpoint.every_steps": 10}
    begun = reported = time.monotonic()
    end = begun + 60 * minutes
    seen: list[dict[str, float]] = []
    kills = done = 0
    while time.monotonic() < end:
        options = harness.options(folder / "home", **changes)
        run = harness.Run(folder, f"--workdir={folder}/run", *options)
        run.wait_for(run.has_printed("step "))
        until = time.monotonic() + rng.uniform(*lives_s)
        while run.process.poll() is None and time.monotonic() < min(until, end):
            time.sleep(min(1, lives_s[0]))
        if run.process.poll() is None:
            # The process may end or remove a file meanwhile.
            with contextlib.suppress(OSError, ValueError):
                seen.append(measure(run.process.pid, folder / "run"))
            run.end(signal.SIGKILL)
            kills += 1
        else:
            if run.end():
                print(run.text)
                return False
            done += 1
            shutil.rmtree(folder / "run")
        if seen and time.monotonic() - reported > 60:
            reported = time.monotonic()
            figures = ", ".join(f"{k} {v:.0f}" for k, v in seen[-1].items())
            passed_min = (reported - begun) / 60
            print(f"{passed_min:.0f} min: {kills} kills, {done} runs, {figures}")
    flat, rows = judge(seen)
    print(rows, end="")
    print(f"{kills} kills, {done} complete runs: {'no growth' if flat else 'GROWTH'}")
    if flat and table:
        section = _SECTION.format(
            minutes=(time.monotonic() - begun) / 60,
            date=datetime.date.today().isoformat(),
            commit=provenance.describe_commit(provenance.describe_code()),
            kills=kills,
            done=done,
            rows=rows,
        )
        page = table.read_text().partition(TITLE)[0] if table.exists() else ""
        table.write_text(page + TITLE + section)
    return flat


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--table", type=Path, help="docs/faults.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        flat = soak(given.minutes, Path(scratch), table=given.table)
    sys.exit(0 if flat else 1)
