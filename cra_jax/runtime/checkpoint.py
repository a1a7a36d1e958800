"""Checkpoints: a small interface to orbax.

A step is saved as two items: ``state``, a tree of arrays in host memory without a
device axis (so that it restores on any number of devices), and ``meta``, plain JSON.
A rename makes a step visible once it is complete.

``meta`` also holds the SHA-256 of every array, taken from memory before anything is
written, and a checksum of itself. Restored arrays are compared with it: this finds
files that were truncated, changed or lost, which orbax or tensorstore may read without
an error (a missing chunk reads as zeros).
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from cra_jax.runtime import files, run_directory

Tree = Any
_RECORD = {"content", "metric", "arrays", "checksum"}
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_NOT_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
_REMOVAL_S = 10.0  # longest time in which the files of a step disappear


class DamagedError(ValueError):
    """A checkpoint differs from what was saved."""


class _Kept(checkpoint_managers.PreservationPolicy):
    """Keeps the steps that a function selects."""

    def __init__(self, kept: Callable[[Sequence[int]], set[int]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any):
        kept = self._kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run: the latest few, and the best by a metric.

    Args:
      directory: of the checkpoints.
      keep_latest: how many of the newest steps are kept.
      writable: False opens them for reading only, and creates no directory.

    Raises:
      ValueError: opened for reading, and the directory does not exist; or its path
        has names that orbax cannot read.
    """

    def __init__(
        self, directory: str | Path, *, keep_latest: int = 2, writable: bool = True
    ):
        self._directory = Path(directory).absolute()
        run_directory.check_path(self._directory)
        if not writable and not self._directory.is_dir():
            raise ValueError(
                f"there are no checkpoints at {self._directory}: set --workdir to the "
                "run directory of a trained run"
            )
        if writable:
            self._directory.mkdir(parents=True, exist_ok=True)
        self._keep_latest = keep_latest
        self._metrics: dict[int, float] = {}
        absl = logging.getLogger("absl")
        absl.disabled = not writable  # else orbax warns that it is read-only
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_Kept(self._kept),
                    create=False,
                    multiprocessing_options=_this_host_alone(),
                    read_only=not writable,
                ),
            )
        finally:
            absl.disabled = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The saved steps, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest metric (the newest of equals), or None."""
        return _best(self.steps(), self._metric)

    def move_damaged(self, report: Callable[[str], None]) -> int | None:
        """Finds the newest undamaged step, so that training can resume from it.

        Newer, damaged steps are moved to `damaged_checkpoints` next to this directory,
        not removed. Reads every array once.

        Args:
          report: called with one line of text for each damaged step.

        Returns:
          The step; None if nothing is saved.

        Raises:
          ValueError: every checkpoint is damaged; nothing was moved.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                self.verify(step)
                break
            except DamagedError as error:
                damaged[step] = error
        else:
            if damaged:
                reasons = "\n  ".join(map(str, damaged.values()))
                raise ValueError(
                    f"every checkpoint in {self._directory} is damaged:\n  {reasons}\n"
                    "nothing was changed: restore the directory from a copy, or start "
                    "again with another --workdir"
                )
            return None
        aside = self._directory.parent / "damaged_checkpoints"
        for number, error in damaged.items():
            aside.mkdir(exist_ok=True)
            target, again = aside / str(number), 1
            while target.exists():
                target, again = aside / f"{number}-{again}", again + 1
            shutil.move(self._directory / str(number), target)
            report(
                f"warning: {error}; it was moved to {target}, and step {step} is used"
            )
        if damaged:
            self._manager.reload()
        return step

    def verify(self, step: int) -> None:
        """Reads all of a step and compares it with what was saved.

        Raises:
          DamagedError: they differ. A step without checksums, from an older version, is
            only checked for being readable.
        """
        self.restore(step, self.shapes(step))

    def choose(self, which: str) -> int:
        """The step for "latest", "best" or a number.

        Raises:
          ValueError: there is no such checkpoint; the message lists the existing ones.
        """
        steps = self.steps()
        step = {"latest": self.latest_step, "best": self.best_step}.get(
            which, lambda: int(which) if which.isdecimal() else None
        )()
        if step is None or step not in steps:
            raise ValueError(
                f"there is no checkpoint {which!r} in {self._directory}: ask for "
                f"'latest', 'best' or one of {steps or 'none (nothing is saved yet)'}"
            )
        return step

    def save(
        self,
        step: int,
        state: Tree,
        meta: Mapping[str, Any],
        *,
        metric: float | None = None,
    ) -> None:
        """Starts to save; returns once the arrays are copied, before they are written.

        Args:
          step: steps taken; saving a step again replaces it.
          state: tree of arrays; may be donated or overwritten afterwards.
          meta: JSON values that are saved with it.
          metric: determines the best step; None if it was not measured, or is added
            by `add_metric`.
        """
        if step in self._manager.all_steps():
            self._manager.wait_until_finished()
            self._manager.delete(step)
        self._metrics[step] = -math.inf if metric is None else metric
        # A copy: on a CPU, orbax would read in the background the donated buffer that
        # the next step writes to.
        host = {k: np.array(v) for k, v in _flatten(jax.device_get(state)).items()}
        record = {"content": dict(meta), "metric": metric, "arrays": _digests(host)}
        record = json.loads(json.dumps(record))  # as it will be read
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(unflatten_dict(host)),
                meta=ocp.args.JsonSave(record | {"checksum": _checksum(record)}),
            ),
            force=True,  # else orbax silently skips a step older than the newest
        )

    def wait(self) -> None:
        """Returns once everything is written."""
        self._manager.wait_until_finished()

    def add_metric(self, step: int, metric: float) -> None:
        """Adds the metric of a saved step, and removes steps that are no longer kept.

        So a step can be saved before it is evaluated, which takes long.
        """
        self.wait()
        record = {"metric": metric}
        files.write_atomically(
            self._metric_path(step),
            json.dumps(record | {"checksum": _checksum(record)}),
        )
        self._metrics[step] = metric
        for other in set(self.steps()) - self._kept(self.steps()):
            self._manager.delete(other)

    def has_metric(self, step: int) -> bool:
        """Whether a step was saved with a metric, or got one later."""
        return self._metric(step) > -math.inf

    def is_removed(self, step: int) -> bool:
        """Whether the training that wrote a step has removed it, or does so now."""
        # It removes a step after it has saved another one.
        before = set(self.steps())
        self._manager.reload()
        wait_s = _REMOVAL_S if set(self.steps()) - before else _REMOVAL_S / 100
        end_s = time.monotonic() + wait_s
        while (self._directory / str(step)).is_dir():
            if time.monotonic() > end_s:
                return False
            time.sleep(0.02)
        self._manager.reload()
        return True

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON that was saved with a step.

        Raises:
          DamagedError: it differs from what was saved.
        """
        return self._record(step)["content"]

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """The newest few steps, and the best of those with a metric."""
        steps = sorted(steps)
        best = _best(steps, self._metric)
        return {*steps[-self._keep_latest :]} | ({best} if best is not None else set())

    def _metric_path(self, step: int) -> Path:
        return self._directory / str(step) / "metric.json"

    def _record(self, step: int) -> dict[str, Any]:
        """All of ``meta``: content, metric, and each array's type, shape and digest.

        ``arrays`` is None for a step of an older version, which did not save them.

        Raises:
          DamagedError: it is missing, or is not what was saved.
          OSError: it cannot be read, which is no damage.
        """
        path = self._directory / str(step) / "meta" / "metadata"
        try:
            record = json.loads(_read_bytes(path))
            if not _RECORD & record.keys():
                return {"content": record, "metric": self._old_metric(step)} | {
                    "arrays": None
                }
            checksum = record.pop("checksum")
        except (*_MISSING, *_NOT_JSON) as error:
            raise self._damaged(step, f"its meta cannot be read ({error!r})") from error
        if checksum != _checksum(record):
            raise self._damaged(step, "its meta is not what was saved")
        # Anybody can compute the checksum.
        if reason := _why_invalid(record):
            raise self._damaged(step, f"its meta has {reason}")
        return record

    def _old_metric(self, step: int) -> float | None:
        """The metric of a step whose ``meta`` does not have it (older versions)."""
        path = self._directory / str(step) / "metrics" / "metrics"
        return json.loads(_read_bytes(path))["best_metric"] if path.exists() else None

    def _metric(self, step: int) -> float:
        """The metric of a step; minus infinity for a step without one."""
        if step not in self._metrics:
            try:
                value = self._added_metric(step)
                if value is None:
                    value = self._record(step)["metric"]
            except DamagedError:
                return -math.inf
            self._metrics[step] = -math.inf if value is None else value
        return self._metrics[step]

    def _added_metric(self, step: int) -> float | None:
        """What `add_metric` has written, if it is there and undamaged."""
        try:
            record = json.loads(_read_bytes(self._metric_path(step)))
            checksum = record.pop("checksum")
            sound = checksum == _checksum(record) and _is_metric(record["metric"])
            return record["metric"] if sound else None
        except (*_MISSING, *_NOT_JSON):
            return None

    def _damaged(self, step: int, what: str) -> DamagedError:
        others = [s for s in self.steps() if s != step]
        return DamagedError(
            f"checkpoint {self._directory / str(step)} is damaged: {what}"
            + (
                f" (other steps, not checked: eval.checkpoint={others})"
                if others
                else ""
            )
        )

    def restore(self, step: int, target: Tree) -> Tree:
        """Restores a step, or the part of it in `target`, as NumPy arrays.

        Args:
          step: one of `steps()`.
          target: tree of arrays or `jax.ShapeDtypeStruct`. Branches that it omits are
            not read.

        Returns:
          A tree with the structure of `target`.

        Raises:
          DamagedError: an array differs from what was saved, or is missing.
          OSError: a file cannot be read, which is no damage.
          ValueError: arrays of `target` are missing or have another shape; the message
            lists them.
        """
        wanted = _flatten(target)
        self._check(step, wanted)
        saved = self._record(step)["arrays"]
        abstract = unflatten_dict(
            {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in wanted.items()}
        )
        try:
            restored = self._read_arrays(step, abstract)
        except Exception:  # orbax, tensorstore, zstd, JSON: no common class
            # asyncio would report other failed reads, each at length.
            logging.getLogger("asyncio").disabled = True
            self._check_readable(step)
            try:  # again: a network mount can fail for a moment
                restored = self._read_arrays(step, abstract)
            except Exception as error:
                if _is_passing(error):
                    raise
                reason = str(error).partition(" [tensorstore_spec=")[0]
                raise self._damaged(
                    step, f"its arrays cannot be read ({reason})"
                ) from None
        found = {k: np.asarray(v) for k, v in flatten_dict(restored).items()}
        if saved is not None:
            wrong = [k for k, v in _digests(found).items() if saved[k] != v]
            if wrong:
                raise self._damaged(
                    step,
                    f"{len(wrong)} of {len(found)} arrays are not what was saved, the "
                    f"first {wrong[0]}",
                )
        # On top of the target's dict, which has the empty branches.
        whole = flatten_dict(serialization.to_state_dict(target), keep_empty_nodes=True)
        return serialization.from_state_dict(target, unflatten_dict(whole | found))

    def _read_arrays(self, step: int, abstract: Tree) -> Tree:
        """The arrays of a step as they are in its files."""
        return self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=abstract,
                    restore_args=jax.tree.map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract
                    ),
                    partial_restore=True,
                )
            ),
        )["state"]

    def _check_readable(self, step: int) -> None:
        """Reads every file of a step; tensorstore hides some errors of the system.

        Raises:
          OSError: a file exists but cannot be read.
        """
        for path in sorted((self._directory / str(step)).rglob("*")):
            with contextlib.suppress(*_MISSING):
                _read_bytes(path)

    def shapes(self, step: int) -> Tree:
        """The arrays of a step: a tree of dicts of `jax.ShapeDtypeStruct`.

        Raises:
          DamagedError: it cannot be read.
        """
        arrays = self._record(step)["arrays"]
        if arrays is not None:
            return unflatten_dict(
                {
                    tuple(name.split("/")): jax.ShapeDtypeStruct(shape, np.dtype(dtype))
                    for name, (dtype, shape, _) in arrays.items()
                }
            )
        path = epath.Path(self._directory) / str(step) / "state"
        try:
            saved = _flatten(ocp.PyTreeCheckpointHandler().metadata(path).tree)
        except Exception as error:
            self._check_readable(step)
            raise self._damaged(step, f"its arrays cannot be read ({error})") from error
        return unflatten_dict(
            {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in saved.items()}
        )

    def _check(self, step: int, wanted: Mapping[tuple[str, ...], Any]) -> None:
        saved = self.shapes(step)
        found = {key: tuple(leaf.shape) for key, leaf in _flatten(saved).items()}
        wrong = [
            f"{'.'.join(key)}: checkpoint {found.get(key, 'has none')}, "
            f"model {tuple(leaf.shape)}"
            for key, leaf in wanted.items()
            if found.get(key) != tuple(leaf.shape)
        ]
        if wrong:
            shown = "\n  ".join(wrong[:8])
            more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(
                f"checkpoint {self._directory / str(step)} is of another "
                "model (kind, backbone, width or number of classes): use the config "
                "that it was trained with:\n  "
                f"{shown}{more}"
            )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        error.filename = str(path)  # missing if the file could be opened
        raise


def _is_passing(error: Exception) -> bool:
    """Whether an error of reading arrays says nothing about the files themselves."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, _MISSING)
    passing = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EACCES)
    return "RESOURCE_EXHAUSTED" in str(error) or any(
        os.strerror(code) in str(error) for code in passing
    )


def _is_metric(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _why_invalid(record: Mapping[str, Any]) -> str:
    """What training would not have written into ``meta``; "" if there is nothing."""
    if not isinstance(record.get("content"), dict):
        return "no content"
    if not (record.get("metric") is None or _is_metric(record["metric"])):
        return "no number as its metric"
    arrays: Any = record.get("arrays")
    try:
        for dtype, shape, digest in arrays.values():
            np.dtype(dtype)
            if not isinstance(digest, str) or not all(
                type(size) is int and 0 <= size < 2**40 for size in shape
            ):
                return "an array without shape and digest"
    except (AttributeError, TypeError, ValueError):
        return "no list of arrays"
    return ""


def _best(steps: Sequence[int], metric: Callable[[int], float]) -> int | None:
    """The step with the highest metric, the newest of equals; None if there is none."""
    best, step = max(((metric(s), s) for s in steps), default=(-math.inf, None))
    return step if best > -math.inf else None


def _digests(
    arrays: Mapping[tuple[str, ...], np.ndarray],
) -> dict[str, list[Any]]:
    """Type, shape and SHA-256 of each array by its path, in JSON types."""

    def digest(array: np.ndarray) -> list[Any]:
        raw: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        sha256 = hashlib.sha256(raw).hexdigest()
        return [array.dtype.name, list(array.shape), sha256]

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(
            zip(map("/".join, arrays), pool.map(digest, arrays.values()), strict=True)
        )


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _flatten(tree: Tree) -> dict[tuple[str, ...], Any]:
    """The arrays of a tree of dicts, dataclasses and tuples, by their path."""
    flat: Any = flatten_dict(serialization.to_state_dict(tree))
    return flat


def _this_host_alone() -> ocp.options.MultiprocessingOptions:
    """Options for saving on one of several hosts, which broadcasts what it restores."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    host = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix=f"{host}"
    )
