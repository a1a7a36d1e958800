"""Alternating time measurements, and a description of the machine."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# FLOP/s of one device in bfloat16 without sparsity, by its device kind in JAX. From
# the data sheets of the manufacturers.
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "T4": 65e12,  # float16; a T4 has no bfloat16
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}
PACKAGES = ("jax", "jaxlib", "flax", "torch", "numpy", "pillow")


def measure_alternately(
    actions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Measures the milliseconds of each action, in alternation.

    Alternation exposes all actions to the same load of the machine.

    Args:
      actions: functions that run once and wait for the result.
      repeats: measured rounds. Two rounds before them are not measured, because a step
        whose result is its next input compiles twice.
      clock: returns seconds; `time.process_time` excludes other programs.

    Returns:
      A list of `repeats` times for each action.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats + 2):
        for name, action in actions.items():
            start = clock()
            action()
            if turn > 1:
                times[name].append(1000 * (clock() - start))
    return times


def summary(values: Sequence[float], *, digits: int = 1) -> str:
    """Median and quartiles: "9.1 (8.8 to 9.9)"."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratio(values: Sequence[float], of: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two times."""
    return statistics.median(a / b for a, b in zip(values, of, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with text in the first column and numbers in the others."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def machine() -> str:
    """Devices, processor, cores, versions and commit in one line."""
    import jax

    device = jax.devices()[0]
    devices = f"{len(jax.devices())} x {device.device_kind}, {device.platform}"
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"
    return (
        f"{devices}; {_processor()}, {cores} cores; Python "
        f"{platform.python_version()}, {', '.join(versions)}; commit {_commit()}"
    )


def peak_flops() -> tuple[float, str]:
    """Peak FLOP/s of one device, and the source of that number.

    For a device kind that is not in `PEAKS`, such as a CPU, the peak is measured by a
    product of two float32 matrices of size 2,048.
    """
    import jax
    import jax.numpy as jnp

    kind = jax.devices()[0].device_kind
    for name, peak in PEAKS.items():
        if name in kind:
            return peak, f"{name}'s data sheet, {peak / 1e12:.0f} TFLOP/s in bfloat16"
    side = 2048
    matrix = jnp.ones((side, side))
    product = jax.jit(jnp.matmul)

    def once() -> None:
        product(matrix, matrix).block_until_ready()

    taken = measure_alternately({"product": once}, repeats=7)["product"]
    peak = 2 * side**3 / (min(taken) / 1000)
    return peak, f"a matrix product of size {side}, {peak / 1e9:.0f} GFLOP/s in float32"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Commit of the code, with a + if the working tree has changes."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
