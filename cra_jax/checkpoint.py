"""Checkpoints: orbax behind a narrow door.

A step is saved as two items: ``state``, a tree of arrays in host memory without a
device axis (so that it restores on any number of devices), and ``meta``, plain JSON.
A step becomes visible only when it is whole: orbax writes under a temporary name and
renames.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

Tree = Any
_BEST = "best_metric"


class Checkpoints:
    """The checkpoints of one run: the latest few, and the best by a metric.

    Args:
      directory: where they are or will be.
      keep_latest: how many of the newest to keep.
      writable: False opens them for reading only, and makes no folder.

    Raises:
      ValueError: opened for reading, and there is no such folder.
    """

    def __init__(
        self, directory: str | Path, *, keep_latest: int = 2, writable: bool = True
    ):
        self._directory = Path(directory).absolute()
        if not writable and not self._directory.is_dir():
            raise ValueError(
                f"there are no checkpoints at {self._directory}: name the run folder "
                "of a run that was trained, with --workdir"
            )
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_latest),
                checkpoint_managers.BestN(
                    get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=_metric,
                create=writable,
                read_only=not writable,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that are there, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest metric (the newest of equals), or None."""
        scored = [(_metric(self._manager.metrics(s)), s) for s in self.steps()]
        best, step = max(scored, default=(-math.inf, None))
        return step if best > -math.inf else None

    def choose(self, which: str) -> int:
        """The step that "latest", "best" or a number names.

        Raises:
          ValueError: there is no such checkpoint; the message lists those there are.
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
        """Starts to save; returns once the arrays are copied, not once written.

        Args:
          step: steps taken; saving a step again replaces it.
          state: tree of arrays; may be donated or overwritten afterwards.
          meta: JSON values that travel with it.
          metric: what "best" is judged by, where it was measured.
        """
        if step in self._manager.all_steps():
            self._manager.wait_until_finished()
            self._manager.delete(step)
        # A copy of our own: on a CPU the array orbax would read in the background is
        # the very buffer that the next step, donated, writes into.
        host = {k: np.array(v) for k, v in _flatten(jax.device_get(state)).items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(unflatten_dict(host)),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
            metrics={_BEST: metric},
        )

    def wait(self) -> None:
        """Returns once everything is written."""
        self._manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON that was saved beside a step."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )
        return restored["meta"]

    def restore(self, step: int, target: Tree) -> Tree:
        """Restores a step, or the part of it that `target` names, as NumPy arrays.

        Args:
          step: one of `steps()`.
          target: tree of arrays or `jax.ShapeDtypeStruct`. It may leave out whole
            branches of what was saved: those are not read.

        Returns:
          A tree of `target`'s structure.

        Raises:
          ValueError: the checkpoint lacks an array of `target` or has it in another
            shape; all of them are named.
        """
        wanted = _flatten(target)
        self._check(step, wanted)
        abstract = unflatten_dict(
            {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in wanted.items()}
        )
        restored = self._manager.restore(
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
        # Over the target's own dict, which knows its empty branches.
        whole = flatten_dict(serialization.to_state_dict(target), keep_empty_nodes=True)
        whole |= {k: np.asarray(v) for k, v in flatten_dict(restored).items()}
        return serialization.from_state_dict(target, unflatten_dict(whole))

    def shapes(self, step: int) -> Tree:
        """What a step holds: a tree of dicts of `jax.ShapeDtypeStruct`."""
        path = epath.Path(self._directory) / str(step) / "state"
        saved = _flatten(ocp.PyTreeCheckpointHandler().metadata(path).tree)
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
                "model (kind, backbone, width or number of classes); use the config "
                "that it was trained with:\n  "
                f"{shown}{more}"
            )


def _metric(metrics: Mapping[str, float | None] | None) -> float:
    """What "best" goes by; a step saved in mid-epoch was not measured."""
    value = metrics[_BEST] if metrics else None
    return -math.inf if value is None else value


def _flatten(tree: Tree) -> dict[tuple[str, ...], Any]:
    """The arrays of a tree of dicts, dataclasses and tuples, by their path."""
    flat: Any = flatten_dict(serialization.to_state_dict(tree))
    return flat
