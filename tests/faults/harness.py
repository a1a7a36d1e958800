"""Runs as users start them, ended at moments that are chosen, and compared."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from numpy.testing import assert_array_equal

from cra_jax.runtime import run_directory
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.runtime.run_directory import flatten
from tests.helpers import tiny_config

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"images_per_second", "eta_seconds"}


def options(home: Path, **changes: Any) -> list[str]:
    """The tiny config, as flags over the quickstart's; its images in `home`."""
    values = flatten(tiny_config.config(home / "images", **changes).to_dict())
    plain = flatten(tiny_config.get_config().to_dict())
    return [
        f"--config={ROOT}/configs/quickstart.py",
        *(f"--config.{k}={v}" for k, v in values.items() if plain[k] != v),
    ]


class Run:
    """`launch.py` as a process of its own, on one CPU device if nothing else is said.

    Attributes:
      process: it.
      lines: what it has said on standard error.
    """

    def __init__(self, compiled: Path, *arguments: object, **environment: str):
        plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XDG_CACHE_HOME": str(compiled)}
        environment = {**plain, **quick, **environment}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)],
            env=environment,
            cwd=compiled,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Returns once it holds, or the process has ended."""
        while self.process.poll() is None and not condition():
            time.sleep(0.002)

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: any(text in line for line in list(self.lines))

    def end(self, signal_number: int | None = None) -> int:
        """Sends a signal, if any; returns the exit status."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        code = self.process.wait(timeout=1800)  # on a busy machine, too
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    @property
    def text(self) -> str:
        return "".join(self.lines)


def at_start(run: Run, folder: Path, rng: random.Random) -> None:
    time.sleep(rng.uniform(0, 6))


def while_preparing(run: Run, folder: Path, rng: random.Random) -> None:
    run.wait_for(lambda: list(folder.glob("home/images/*.partial")))
    time.sleep(rng.uniform(0, 0.1))


def in_an_epoch(run: Run, folder: Path, rng: random.Random) -> None:
    run.wait_for(run.says("step "))
    time.sleep(rng.uniform(0, 0.5))


def in_an_evaluation(run: Run, folder: Path, rng: random.Random) -> None:
    run.wait_for(run.says("  test: "))  # the other split comes next
    time.sleep(rng.uniform(0, 0.05))


def in_a_save(run: Run, folder: Path, rng: random.Random) -> None:
    saving = "run/checkpoints/*.orbax-checkpoint-tmp"
    run.wait_for(lambda: list(folder.glob(saving)))
    time.sleep(rng.uniform(0, 0.01))


MOMENTS = {
    "while images are prepared": while_preparing,
    "before the first step": at_start,
    "in mid-epoch": in_an_epoch,
    "in an evaluation": in_an_evaluation,
    "while a checkpoint is saved": in_a_save,
}


def newest_arrays(workdir: Path) -> tuple[int, Any]:
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose("latest")
        return step, checkpoints.restore(step, checkpoints.shapes(step))


def numbers(workdir: Path) -> list[str]:
    """The lines of metrics.jsonl but for what a clock gave."""
    return [
        json.dumps({k: v for k, v in line.items() if k not in SECONDS})
        for line in run_directory.read_metrics(workdir)
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """All that training leaves is the same, to the bit."""
    (step, arrays), (other_step, others) = map(newest_arrays, (one, other))
    assert step == other_step
    jax.tree.map(assert_array_equal, arrays, others)
    assert numbers(one) == numbers(other)
    assert run_directory.read_snapshots(one) == run_directory.read_snapshots(other)
    for split in ("test", "test_shifted"):
        assert run_directory.read_results(one, split, "center") == (
            run_directory.read_results(other, split, "center")
        )
