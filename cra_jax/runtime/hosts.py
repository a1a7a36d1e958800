"""Hosts: several processes that train together, and the values they exchange.

Each host has its own devices. All hosts must make the same calls in the same order: a
host that omits a call blocks in the next one.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def start(coordinator: str = "", *, count: int = 0, index: int = 0) -> None:
    """Joins the hosts that train together; call it before JAX uses a device.

    A second call has no effect.

    Args:
      coordinator: ``HOST:PORT`` of the first host, with a port that is free there;
        "auto": the cluster provides all values (TPU pods, SLURM, Open MPI, Kubernetes,
        or JAX_COORDINATOR_ADDRESS and similar environment variables); empty: one host.
      count: number of hosts; with "auto" the cluster provides it.
      index: number of this host, from 0.

    Raises:
      ValueError: the arguments contradict each other, the hosts do not connect, or this
        is one of several hosts and `coordinator` is empty.
    """
    if not jax.distributed.is_initialized():
        given = f"hosts.coordinator={coordinator!r}, count={count}, index={index}"
        address = re.fullmatch(r"\S+:\d+", coordinator)
        if coordinator in ("", "auto"):
            if count or index:
                raise ValueError(
                    f"{given}: count and index need coordinator=HOST:PORT of the first "
                    "host; leave them out for one host and for auto"
                )
        elif not address or count < 2 or not 0 <= index < count:
            raise ValueError(
                f"{given}: set hosts.coordinator=HOST:PORT of the first host and "
                "hosts.count (2 or more) to the same values on all hosts, and "
                "hosts.index to the number of this host, from 0 to count - 1"
            )
        if coordinator:
            _join(coordinator, count, index, given)
    hosts = jax.process_count()
    if hosts > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"this is one of {hosts} hosts: start the command on all of them with "
            "--config.hosts.coordinator=auto"
        )


def _join(coordinator: str, count: int, index: int, given: str) -> None:
    # JAX's preemption service would catch SIGTERM, which clusters and users send to
    # end a run.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{given}: the hosts could not connect ({error}): start the same "
            "command on all of them within 5 minutes, and check that the others can "
            "reach the port of the first host"
        ) from error


def shard() -> tuple[int, int]:
    """Number of this host, from 0, and of hosts: the `shard` of `TrainBatches`."""
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Whether this is the host that writes files and logs."""
    return jax.process_index() == 0


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that succeeds on all hosts, or fails on all of them.

    If one host failed alone, the others would wait for it. The block must not
    communicate with other hosts.

    Raises:
      ValueError: the block raised one on some host; the message has its number.
    """
    problem = ""
    try:
        yield
    except ValueError as error:
        if jax.process_count() == 1:
            raise
        problem = str(error) or "unknown"
    problems = _gather_texts(problem)
    if any(problems):
        raise ValueError(
            "\n".join(f"host {i}: {text}" for i, text in enumerate(problems) if text)
        )


def check_same(text: str, what: str) -> None:
    """Checks that all hosts have the same text.

    Raises:
      ValueError: they differ; the message has the text of each.
    """
    texts = _gather_texts(text)
    if len(set(texts)) > 1:
        lines = "\n".join(f"  host {i}: {text}" for i, text in enumerate(texts))
        raise ValueError(f"the hosts differ in {what}:\n{lines}")


def is_only_host() -> bool:
    """Whether there is only one host."""
    return jax.process_count() == 1


def max_over_hosts(number: int) -> int:
    """The largest number among all hosts."""
    return max(map(int, _gather_texts(str(number))))


def broadcast_from_first(value: Any) -> Any:
    """The first host's value, on all hosts; any value that JSON can hold."""
    if jax.process_count() == 1:
        return value
    return json.loads(_gather_texts(json.dumps(value if is_first() else None))[0])


def broadcast_arrays(tree: Any) -> Any:
    """The first host's arrays, on all hosts; the trees must have the same shapes."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(jax.device_get(tree))


def sum_over_hosts(tree: Any) -> Any:
    """Sums over hosts of arrays of the same shapes; each must fit into 32 bits."""
    if jax.process_count() == 1:
        return tree
    gathered = multihost_utils.process_allgather(tree)
    return jax.tree.map(lambda x, all_x: all_x.sum(0).astype(x.dtype), tree, gathered)


def wait_for_all() -> None:
    """Returns once every host has made this call."""
    _gather_texts("")


def _gather_texts(text: str) -> list[str]:
    """The text of each host, on all hosts."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)
    lengths = multihost_utils.process_allgather(
        np.array([len(encoded)], np.int32)
    ).ravel()
    padded = np.pad(encoded, (0, int(lengths.max()) + 1 - len(encoded)))
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:n].tobytes().decode(errors="surrogatepass")
        for row, n in zip(rows, lengths.tolist(), strict=True)
    ]
