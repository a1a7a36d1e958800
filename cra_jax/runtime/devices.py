"""Devices: the only room that names pmap, a device axis or a device count.

State goes in and out of a step without a device axis, batches with one. A step is
written for one device and gets `all_mean` from its caller, so that it runs alone, too.

A training step runs on the devices of all hosts, each of which feeds its own rows of
the batch. An evaluation step runs on the devices of one host and waits for no other, so
that the first host may also predict alone. How hosts find each other and what else they
tell each other is in `runtime/hosts.py`.

From pmap to jit with shardings, the change would be in this room alone:

- `train_step` becomes ``jax.jit(jax.shard_map(step, mesh=..., in_specs=(P(), P(axis)),
  out_specs=P()), donate_argnums=0)`` over a mesh of `jax.devices()`; `all_mean` stays a
  `pmean` over the axis of that name, BatchNorm stays a device's own, and
  `train_step.py` does not change. (jit without shard_map would be another thing: means
  over the whole batch, BatchNorm in step everywhere, and no `all_mean`.)
- `split` gives no device axis but ``jax.make_array_from_process_local_data`` with
  ``NamedSharding(mesh, P(axis))``; `batch_step` and `eval_step` take the same, over
  a mesh of `jax.local_devices()`, and need no reshaping.
- State, which pmap returns on this host's devices, would be on all hosts' devices:
  `on_each_device` takes the mesh of all for it; `jax.device_get`, as checkpoints use
  it, works on replicated arrays either way; evaluation gets `on_each_device` of that.
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

# glibc's malloc.h: M_ARENA_MAX, one pool; M_MMAP_MAX, nothing beside it;
# M_TRIM_THRESHOLD, never given back.
_KEEPING = {-8: 1, -4: 0, -1: -1}

DTYPES = ("auto", "float32", "bfloat16")


def device_count() -> int:
    """How many devices share a batch: those of all hosts."""
    return jax.device_count()


def describe_devices() -> str:
    """For the log: "8 x TPU v5e", "16 x TPU v5e on 2 hosts"."""
    hosts = jax.process_count()
    where = f" on {hosts} hosts" if hosts > 1 else ""
    return f"{device_count()} x {jax.local_devices()[0].device_kind}{where}"


def compute_dtype(name: str) -> Any:
    """What a name of `DTYPES` means here: "auto" is bfloat16 on a GPU or a TPU.

    On a CPU it is float32: there, bfloat16 is float32 with rounding on top.

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
    """Memory that every device can still give.

    As the devices themselves say; where they do not, as on a CPU, each one's equal
    share of what the host has, with one more share left to the host.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in s and "bytes_in_use" in s for s in stats):
        return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return _available_bytes() // (jax.local_device_count() + 1)


def _available_bytes() -> int:
    """What the host can give without swapping; all it has where only that is known."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def on_each_device(tree: Any, *, devices: Sequence[Any] | None = None) -> Any:
    """Copies arrays to every device of this host, laid as steps take what is shared.

    What lies so already, as what a step returns, is not copied.
    """
    mesh = Mesh(np.array(devices or jax.local_devices()), (_AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def keep(folder: Path) -> None:
    """Keeps what is costly to get again; call it before the first use of a device.

    Memory, see `keep_memory`, and compiled programs, in a folder, so that the next run
    starts at once.

    The environment's JAX_COMPILATION_CACHE_DIR has the say where it is set.
    """
    keep_memory()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_memory() -> None:
    """Keeps freed memory in the process; call it before the first use of a device.

    On a CPU a step takes its scratch memory afresh each time, a gigabyte for ResNet-50,
    which Linux clears page by page: an eighth of the step or more. glibc is told to
    give none back, and to serve XLA's threads from the one pool that can grow, which
    takes up to half as much memory again. Elsewhere this does nothing.
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
    """Checks that a batch can be shared by the devices.

    Args:
      batch_size: pictures in a batch.
      setting: the config key it comes from, for the message.
      least: pictures that each device must get. With `parts`, each part must have a
        multiple of them, so that pairs are those of the whole batch.
      parts: into how many equal parts a device's share is cut.
      parts_setting: the config key that they come from, for the message.

    Raises:
      ValueError: it does not divide, or leaves a device fewer than `least` pictures;
        or hosts have different numbers of devices.
    """
    n, hosts = device_count(), jax.process_count()
    if jax.local_device_count() * hosts != n:
        raise ValueError(
            f"this host has {jax.local_device_count()} of {n} devices: all {hosts} "
            "hosts must have equally many"
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
    need = f", {whole} pictures {where} (L_cntr contrasts pairs)" if least > 1 else ""
    raise ValueError(
        f"{setting}={batch_size} cannot be shared evenly by {n} device(s){cut}{need}; "
        f"sizes that can: {', '.join(map(str, near))} (any multiple of {step} from "
        f"{unit} on)"
    )


def round_up(batch_size: int, *, hosts: int = 1) -> int:
    """The next batch size that the devices of so many hosts can share.

    Evaluation pads its batches.
    """
    n = jax.local_device_count() * hosts
    return -(-batch_size // n) * n


def all_mean(tree: Any) -> Any:
    """The mean over devices; only inside a step that this room runs."""
    return jax.lax.pmean(tree, _AXIS)


def train_step(step: Callable, *, devices: Sequence[Any] | None = None) -> Callable:
    """Runs ``(state, batch) -> (state, metrics)`` on all devices of all hosts.

    Or on some devices of this host, to measure them.

    The state, laid by `on_each_device`, is donated: the caller must not use the one it
    passed again. Each host passes its own rows of the batch. What the step returns must
    be the same on all devices (see `all_mean`).
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
        # Gloo, which joins CPUs, locks up where a second step begins before the first
        # has ended.
        return lambda state, batch: jax.block_until_ready(mapped(state, batch))
    return mapped


def eval_step(step: Callable) -> Callable:
    """Runs ``(variables, batch) -> predictions`` on all devices of this host.

    Takes and returns whole batches: the device axis is added and taken off here.
    """
    mapped = _on_this_host(step)

    def run(variables: Any, batch: Batch) -> Any:
        out = mapped(variables, split(batch))
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), out)

    return run


def batch_step(step: Callable) -> Callable:
    """Runs ``(shared, batch) -> batch`` on this host's devices; the result stays there.

    Takes a whole batch and what `on_each_device` gave; what it returns has the device
    axis, so that `train_step` takes it as it is.
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
    """Gives a host's rows an axis of its devices: ``[b, ...] -> [n, b / n, ...]``."""
    n = count or jax.local_device_count()
    return {k: v.reshape(n, v.shape[0] // n, *v.shape[1:]) for k, v in batch.items()}
