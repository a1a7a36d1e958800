"""Hosts: several processes that train together, how they join, and what they agree on.

Each has devices of its own. What one says to the others, all must say, in the same
order: who leaves one call out waits for the others in the next.
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
    """Joins the hosts that train together; before JAX is asked for a device.

    A second call does nothing: a process joins once.

    Args:
      coordinator: ``HOST:PORT`` of the first host, with a port that is free there;
        "auto": the cluster says all (TPU pods, SLURM, Open MPI, Kubernetes, or the
        environment's JAX_COORDINATOR_ADDRESS and its kin); empty: one host.
      count: how many hosts there are; the cluster knows it where asked.
      index: this one's number, from 0.

    Raises:
      ValueError: the settings do not fit each other, the hosts do not find each other,
        or this is one of several hosts and was not told so.
    """
    if not jax.distributed.is_initialized():
        given = f"hosts.coordinator={coordinator!r}, count={count}, index={index}"
        address = re.fullmatch(r"\S+:\d+", coordinator)
        if coordinator in ("", "auto"):
            if count or index:
                raise ValueError(
                    f"{given}: the count and the index go with HOST:PORT of the first "
                    "host, the same on all; leave them out for one host and for auto"
                )
        elif not address or count < 2 or not 0 <= index < count:
            raise ValueError(
                f"{given}: set hosts.coordinator=HOST:PORT of the first host and "
                "hosts.count (2 or more) alike on all, and hosts.index to this one's "
                "number, from 0 to count - 1"
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
    # Its service swallows SIGTERM, by which clusters and people end a run.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{given}: the hosts did not find each other ({error}): start the same "
            "command on all of them within 5 minutes, and see that the first host's "
            "port can be reached from the others"
        ) from error


def shard() -> tuple[int, int]:
    """This host's number, from 0, and how many there are: a `shard` of `pipeline`."""
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Whether this is the host that writes files and speaks to people."""
    return jax.process_index() == 0


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that all hosts get through, or that fails on all of them.

    A host that failed alone would leave the others waiting for it. The block must not
    speak to other hosts itself.

    Raises:
      ValueError: the block raised one on some host; the message names the host.
    """
    problem = ""
    try:
        yield
    except ValueError as error:
        if jax.process_count() == 1:
            raise
        problem = str(error) or "unknown"
    problems = _told_by_all(problem)
    if any(problems):
        raise ValueError(
            "\n".join(f"host {i}: {text}" for i, text in enumerate(problems) if text)
        )


def check_same(text: str, what: str) -> None:
    """Checks that all hosts say the same.

    Raises:
      ValueError: they do not; the message has what each says.
    """
    texts = _told_by_all(text)
    if len(set(texts)) > 1:
        said = "\n".join(f"  host {i}: {text}" for i, text in enumerate(texts))
        raise ValueError(f"the hosts differ in {what}:\n{said}")


def alone() -> bool:
    """Whether there is one host."""
    return jax.process_count() == 1


def largest(number: int) -> int:
    """The largest of the numbers that the hosts have."""
    return max(map(int, _told_by_all(str(number))))


def told_by_first(value: Any) -> Any:
    """What the first host has, on all of them; anything that JSON can hold."""
    if jax.process_count() == 1:
        return value
    return json.loads(_told_by_all(json.dumps(value if is_first() else None))[0])


def arrays_of_first(tree: Any) -> Any:
    """The first host's arrays, on all of them; the trees must have the same shapes."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(jax.device_get(tree))


def sum_over_hosts(tree: Any) -> Any:
    """The sums of arrays of the same shapes; each must fit into 32 bits."""
    if jax.process_count() == 1:
        return tree
    gathered = multihost_utils.process_allgather(tree)
    return jax.tree.map(lambda x, all_x: all_x.sum(0).astype(x.dtype), tree, gathered)


def wait_for_all() -> None:
    """Returns once every host is here."""
    _told_by_all("")


def _told_by_all(text: str) -> list[str]:
    """What each host says."""
    if jax.process_count() == 1:
        return [text]
    said = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(said)], np.int32)).ravel()
    padded = np.pad(said, (0, int(lengths.max()) + 1 - len(said)))
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:n].tobytes().decode()
        for row, n in zip(rows, lengths.tolist(), strict=True)
    ]
