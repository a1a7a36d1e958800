"""Starts runs by `launch.py`, ends them at chosen moments and compares them."""

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
    """Flags that turn the quickstart config into the tiny config.

    Args:
      home: directory of the image cache.
      **changes: settings by their dotted keys.
    """
    values = flatten(tiny_config.config(home / "images", **changes).to_dict())
    plain = flatten(tiny_config.get_config().to_dict())
    return [
        f"--config={ROOT}/configs/quickstart.py",
        *(f"--config.{k}={v}" for k, v in values.items() if plain[k] != v),
    ]


class Run:
    """A process of `launch.py`, on one CPU device by default.

    Attributes:
      process: the process.
      lines: lines that it has printed on standard error.
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
        """Waits until the condition holds or the process has ended."""
        while self.process.poll() is None and not condition():
            time.sleep(0.002)

    def has_printed(self, text: str) -> Callable[[], bool]:
        """Condition for `wait_for`: a line on standard error contains `text`."""
        return lambda: any(text in line for line in list(self.lines))

    def end(self, signal_number: int | None = None) -> int:
        """Sends a signal, if given, and returns the exit status."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        code = self.process.wait(timeout=1800)  # long enough for a busy machine
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    @property
    def text(self) -> str:
        return "".join(self.lines)


def wait_at_start(run: Run, folder: Path, rng: random.Random) -> None:
    time.sleep(rng.uniform(0, 6))


def wait_for_preparing(run: Run, folder: Path, rng: random.Random) -> None:
    run.wait_for(lambda: list(folder.glob("home/images/*.partial")))
    time.sleep(rng.uniform(0, 0.1))


def wait_for_an_epoch(run: Run, folder: Path, rng: random.Random) -> None:
    run.wait_for(run.has_printed("step "))
    time.sleep(rng.uniform(0, 0.5))


def wait_for_an_evaluation(run: Run, folder: Path, rng: random.Random) -> None:
    run.wait_for(run.has_printed("  test: "))  # the other split follows
    time.sleep(rng.uniform(0, 0.05))


def wait_for_a_save(run: Run, folder: Path, rng: random.Random) -> None:
    saving = "run/checkpoints/*.orbax-checkpoint-tmp"
    run.wait_for(lambda: list(folder.glob(saving)))
    time.sleep(rng.uniform(0, 0.01))


MOMENTS = {
    "while the image cache is prepared": wait_for_preparing,
    "before the first step": wait_at_start,
    "during an epoch": wait_for_an_epoch,
    "during an evaluation": wait_for_an_evaluation,
    "while a checkpoint is saved": wait_for_a_save,
}


def newest_arrays(workdir: Path) -> tuple[int, Any]:
    """Step and arrays of the newest checkpoint."""
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose("latest")
        return step, checkpoints.restore(step, checkpoints.shapes(step))


def metrics_without_times(workdir: Path) -> list[str]:
    """Lines of metrics.jsonl without times and speeds."""
    return [
        json.dumps({k: v for k, v in line.items() if k not in SECONDS})
        for line in run_directory.read_metrics(workdir)
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Checks that checkpoints, metrics and results are bit-identical."""
    (step, arrays), (other_step, others) = map(newest_arrays, (one, other))
    assert step == other_step
    jax.tree.map(assert_array_equal, arrays, others)
    assert metrics_without_times(one) == metrics_without_times(other)
    assert run_directory.read_snapshots(one) == run_directory.read_snapshots(other)
    for split in ("test", "test_shifted"):
        assert run_directory.read_results(one, split, "center") == (
            run_directory.read_results(other, split, "center")
        )
