"""Training with random kills, for minutes: memory, open files and disk stay flat.

    python tests/faults/soak.py --minutes 60 --table docs/faults.md

A run is killed and started again, over and over; when it is done, another begins in its
place, with the same images. Prints a line a minute, and fails where the last third
needs more than the first: memory by a fifth, open files or disk by a tenth. Where all
stays flat, the figures become the last section of the table's page.
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

TITLE = "\n## Soak\n"
_SECTION = """
Written by `make soak`: {minutes:.0f} minutes of training on {date}, code of commit
{commit}, with {kills} kills at random moments and {done} whole runs.

| of the process that trains, or its run directory | first third | last third |
|---|---:|---:|
{rows}"""

ALLOWED = {"memory_mb": 1.2, "open_files": 1.1, "disk_mb": 1.1}


def measure(pid: int, folder: Path) -> dict[str, float]:
    """What a process and its run directory take."""
    status = Path(f"/proc/{pid}/status").read_text()
    (resident_kb,) = (x.split()[1] for x in status.splitlines() if "VmRSS" in x)
    files = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return {
        "memory_mb": int(resident_kb) / 1e3,
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "disk_mb": sum(files) / 1e6,
    }


def judge(seen: list[dict[str, float]]) -> tuple[bool, str]:
    """Whether all stayed flat, and the rows of the table that show it."""
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
    """Trains and kills.

    Args:
      minutes: for how long.
      folder: where to train.
      lives_s: bounds of how long a run may train before it is killed.
      table: the page to write the figures to, where all stays flat.

    Returns:
      Whether it did.
    """
    rng = random.Random(0)
    # Long enough that most runs are killed: figures are taken at kills.
    changes = {"train.epochs": 400, "checkpoint.every_steps": 10}
    begun = said = time.monotonic()
    end = begun + 60 * minutes
    seen: list[dict[str, float]] = []
    kills = done = 0
    while time.monotonic() < end:
        options = harness.options(folder / "home", **changes)
        run = harness.Run(folder, f"--workdir={folder}/run", *options)
        run.wait_for(run.says("step "))
        until = time.monotonic() + rng.uniform(*lives_s)
        while run.process.poll() is None and time.monotonic() < min(until, end):
            time.sleep(min(1, lives_s[0]))
        if run.process.poll() is None:
            # It may have ended, or removed a file, in between.
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
        if seen and time.monotonic() - said > 60:
            said = time.monotonic()
            figures = ", ".join(f"{k} {v:.0f}" for k, v in seen[-1].items())
            print(
                f"{(said - begun) / 60:.0f} min: {kills} kills, {done} runs, {figures}"
            )
    flat, rows = judge(seen)
    print(rows, end="")
    print(f"{kills} kills, {done} whole runs: {'flat' if flat else 'NOT FLAT'}")
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
