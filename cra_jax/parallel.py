"""Devices: the only room that names pmap, a device axis or a device count.

State goes in and out of a step without a device axis, batches with one. A step is
written for one device and gets `all_mean` from its caller, so that it runs alone, too.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Batch = Mapping[str, Any]
_AXIS = "devices"

DTYPES = ("auto", "float32", "bfloat16")


def device_count() -> int:
    """How many devices share a batch."""
    return jax.local_device_count()


def host() -> tuple[int, int]:
    """This host's number, from 0, and how many there are: a `shard` of `pipeline`."""
    return jax.process_index(), jax.process_count()


def describe_devices() -> str:
    """For the log: "8 x TPU v5e"."""
    return f"{device_count()} x {jax.local_devices()[0].device_kind}"


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
    return _available_bytes() // (device_count() + 1)


def _available_bytes() -> int:
    """What the host can give without swapping; all it has where only that is known."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def on_each_device(array: np.ndarray) -> jax.Array:
    """Copies an array to every device, laid as `batch_step` takes it: no copy later."""
    mesh = Mesh(np.array(jax.local_devices()), (_AXIS,))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in a folder, so that the next run starts at once.

    The environment's JAX_COMPILATION_CACHE_DIR has the say where it is set.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def check_divides(batch_size: int, *, setting: str, least: int = 1) -> None:
    """Checks that a batch can be shared by the devices.

    Args:
      batch_size: pictures in a batch.
      setting: the config key it comes from, for the message.
      least: pictures that each device must get.

    Raises:
      ValueError: it does not divide, or leaves a device fewer than `least` pictures.
    """
    n = device_count()
    if batch_size > 0 and batch_size % n == 0 and batch_size // n >= least:
        return
    unit = n * least if least > 1 else n
    below = batch_size // n * n
    near = sorted({max(unit, below), max(unit, below + n)})
    need = f", at least {least} pictures on each (L_cntr contrasts pairs)"
    raise ValueError(
        f"{setting}={batch_size} cannot be shared evenly by {n} device(s)"
        f"{need if least > 1 else ''}; sizes that can: "
        f"{', '.join(map(str, near))} (any multiple of {n} from {unit} on)"
    )


def round_up(batch_size: int) -> int:
    """The next batch size that the devices can share; evaluation pads its batches."""
    n = device_count()
    return -(-batch_size // n) * n


def all_mean(tree: Any) -> Any:
    """The mean over devices; only inside a step that this room runs."""
    return jax.lax.pmean(tree, _AXIS)


def train_step(step: Callable) -> Callable:
    """Runs ``(state, batch) -> (state, metrics)`` on all devices.

    The state is donated: the caller must not use the one it passed again. What the
    step returns must be the same on all devices (see `all_mean`).
    """
    return jax.pmap(
        step,
        axis_name=_AXIS,
        in_axes=(None, 0),  # pyright: ignore[reportArgumentType]
        out_axes=None,
        donate_argnums=(0,),
    )


def eval_step(step: Callable) -> Callable:
    """Runs ``(variables, batch) -> predictions`` on all devices.

    Takes and returns whole batches: the device axis is added and taken off here.
    """
    mapped = jax.pmap(step, axis_name=_AXIS, in_axes=(None, 0))  # pyright: ignore[reportArgumentType]

    def run(variables: Any, batch: Batch) -> Any:
        out = mapped(variables, split(batch))
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), out)

    return run


def batch_step(step: Callable) -> Callable:
    """Runs ``(shared, batch) -> batch`` on all devices, and leaves the result there.

    Takes a whole batch and what `on_each_device` gave; what it returns has the device
    axis, so that `train_step` takes it as it is.
    """
    mapped = jax.pmap(step, axis_name=_AXIS, in_axes=(None, 0))  # pyright: ignore[reportArgumentType]
    return lambda shared, batch: mapped(shared, split(batch))


def split(batch: Batch) -> dict[str, Any]:
    """Gives each array of a batch a device axis: ``[b, ...] -> [n, b / n, ...]``."""
    n = device_count()
    return {k: v.reshape(n, v.shape[0] // n, *v.shape[1:]) for k, v in batch.items()}
