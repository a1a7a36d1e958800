"""Devices: the only module that uses pmap, a device axis or a device count.

A step takes and returns state without a device axis, and takes batches with one. It is
written for one device and gets `all_mean` from its caller, so that it also runs alone.

A training step runs on the devices of all hosts; each host supplies its own rows of the
batch. An evaluation step runs on the devices of one host and waits for no other, so the
first host can predict alone. `runtime/hosts.py` has the other communication.

A change from pmap to jit with shardings would affect only this module:

- `train_step` becomes ``jax.jit(jax.shard_map(step, mesh=..., in_specs=(P(), P(axis)),
  out_specs=P()), donate_argnums=0)`` over a mesh of `jax.devices()`; `all_mean` stays a
  `pmean` over the axis of that name, BatchNorm stays local to a device, and
  `train_step.py` does not change. (jit without shard_map would differ: means over the
  whole batch, BatchNorm synchronized across devices, and no `all_mean`.)
- `split` calls ``jax.make_array_from_process_local_data`` with
  ``NamedSharding(mesh, P(axis))`` and adds no device axis; `batch_step` and `eval_step`
  do the same over a mesh of `jax.local_devices()`, without reshaping.
- State, which pmap returns on this host's devices, would be on all hosts' devices:
  `on_each_device` takes the mesh of all devices for it; `jax.device_get`, used for
  checkpoints, works on replicated arrays either way; evaluation gets the result of
  `on_each_device` on that.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Batch = Mapping[str, Any]
_AXIS = "devices"

# glibc's malloc.h: M_ARENA_MAX: one arena; M_MMAP_MAX: no mmap;
# M_TRIM_THRESHOLD: memory is never returned to the system.
_KEEPING = {-8: 1, -4: 0, -1: -1}

DTYPES = ("auto", "float32", "bfloat16")


def device_count() -> int:
    """Number of devices of all hosts, which share a batch."""
    return jax.device_count()


def describe_devices() -> str:
    """The devices in words: "8 x TPU v5e", "16 x TPU v5e on 2 hosts"."""
    hosts = jax.process_count()
    where = f" on {hosts} hosts" if hosts > 1 else ""
    return f"{device_count()} x {jax.local_devices()[0].device_kind}{where}"


def compute_dtype(name: str) -> Any:
    """The dtype for a name of `DTYPES`; "auto" is bfloat16 on a GPU or a TPU.

    On a CPU "auto" is float32: there, bfloat16 is computed in float32 and rounded.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in DTYPES:
        raise ValueError(
            f"unknown model.dtype {name!r}; choose from {', '.join(DTYPES)}"
        )
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def free_bytes() -> int:
    """Free memory in bytes of the device that has the least.

    Devices that report no memory, such as CPUs, share the host's free memory equally,
    with one more share left for the host.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in s and "bytes_in_use" in s for s in stats):
        return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return _available_bytes() // (jax.local_device_count() + 1)


def _available_bytes() -> int:
    """Host memory available without swapping; all of it if only that is known."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def on_each_device(tree: Any, *, devices: Sequence[Any] | None = None) -> Any:
    """Copies arrays to every device of this host, in the sharding that steps expect.

    Arrays that already have it, such as those that a step returns, are not copied.
    """
    mesh = Mesh(np.array(devices or jax.local_devices()), (_AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def keep_memory_and_programs(folder: Path) -> None:
    """Keeps freed memory and compiled programs; call it before a device is used.

    Memory: see `keep_freed_memory`. Compiled programs are cached in `folder`, so that
    the next run starts faster. JAX_COMPILATION_CACHE_DIR takes precedence if it is set.
    """
    keep_freed_memory()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_freed_memory() -> None:
    """Keeps freed memory in the process; call it before a device is used.

    On a CPU each step allocates its scratch memory again, a gigabyte for ResNet-50, and
    Linux clears it page by page, which takes an eighth of the step or more. This makes
    glibc return no memory and serve XLA's threads from the one arena that can grow,
    which takes up to 50 % more memory. It has no effect on other systems.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt:
        for option, value in _KEEPING.items():
            mallopt(option, value)


def check_divides(
    batch_size: int,
    *,
    setting: str,
    least: int = 1,
    parts: int = 1,
    parts_setting: str = "",
) -> None:
    """Checks that the devices can share a batch.

    Args:
      batch_size: images in a batch.
      setting: the config key of the batch size, for the message.
      least: images that each device must get. With `parts`, each part must have a
        multiple of them, so that pairs are those of the whole batch.
      parts: number of equal parts of a device's share.
      parts_setting: the config key of `parts`, for the message.

    Raises:
      ValueError: the batch does not divide evenly, a device gets fewer than `least`
        images, or hosts have different numbers of devices.
    """
    n, hosts = device_count(), jax.process_count()
    if jax.local_device_count() * hosts != n:
        raise ValueError(
            f"this host has {jax.local_device_count()} of {n} devices: all {hosts} "
            "hosts must have the same number"
        )
    step = n if parts == 1 else n * parts * least
    if batch_size > 0 and batch_size % step == 0 and batch_size // n >= least:
        return
    unit = max(step, n * least)
    below = batch_size // step * step
    near = sorted({max(unit, below), max(unit, below + step)})
    cut = f", each in {parts} parts ({parts_setting}={parts})" if parts > 1 else ""
    where, whole = (
        ("in each", "an even number of") if cut else ("on each", "at least 2")
    )
    need = f", {whole} images {where} (L_cntr contrasts pairs)" if least > 1 else ""
    raise ValueError(
        f"{setting}={batch_size} cannot be shared evenly by {n} device(s){cut}{need}; "
        f"sizes that can: {', '.join(map(str, near))} (any multiple of {step} from "
        f"{unit} on)"
    )


def round_up(batch_size: int, *, hosts: int = 1) -> int:
    """The next batch size that the devices of `hosts` hosts can share.

    Used for evaluation, which pads its batches.
    """
    n = jax.local_device_count() * hosts
    return -(-batch_size // n) * n


def all_mean(tree: Any) -> Any:
    """The mean over devices; only inside a step that this module runs."""
    return jax.lax.pmean(tree, _AXIS)


def train_step(step: Callable, *, devices: Sequence[Any] | None = None) -> Callable:
    """Runs ``(state, batch) -> (state, metrics)`` on all devices of all hosts.

    `devices` selects some devices of this host instead, for measurements.

    The state, from `on_each_device`, is donated: the caller must not use it again. Each
    host passes its own rows of the batch. The step must return the same values on all
    devices (see `all_mean`).
    """
    mapped = jax.pmap(
        step,
        axis_name=_AXIS,
        in_axes=(None, 0),  # pyright: ignore[reportArgumentType]
        out_axes=None,
        devices=devices,
        donate_argnums=(0,),
    )
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # Gloo, used between CPUs, deadlocks if a second step begins before the first
        # has ended.
        return lambda state, batch: jax.block_until_ready(mapped(state, batch))
    return mapped


def eval_step(step: Callable) -> Callable:
    """Runs ``(variables, batch) -> predictions`` on all devices of this host.

    Takes and returns batches without a device axis, which is added and removed here.
    """
    mapped = _on_this_host(step)

    def run(variables: Any, batch: Batch) -> Any:
        out = mapped(variables, split(batch))
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), out)

    return run


def batch_step(step: Callable) -> Callable:
    """Runs ``(shared, batch) -> batch`` on this host's devices; the result stays there.

    Takes a batch without a device axis and the result of `on_each_device`. Its result
    has the device axis, as `train_step` expects it.
    """
    mapped = _on_this_host(step)
    return lambda shared, batch: mapped(shared, split(batch))


def _on_this_host(step: Callable) -> Callable:
    return jax.pmap(
        step,
        axis_name=_AXIS,
        in_axes=(None, 0),  # pyright: ignore[reportArgumentType]
        devices=jax.local_devices(),
    )


def split(batch: Batch, count: int = 0) -> dict[str, Any]:
    """Adds a device axis to a host's rows: ``[b, ...] -> [n, b / n, ...]``."""
    n = count or jax.local_device_count()
    return {k: v.reshape(n, v.shape[0] // n, *v.shape[1:]) for k, v in batch.items()}
