"""A run directory with checkpoints of random weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cra_jax.runtime import run_directory
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build
from tests.helpers import tiny_config

# A class name from an untrusted source.
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
CLASSES = ("auk", "boobook", HOSTILE, "dotterel", "egret", "fulmar")


def save(folder: Path, kind: str = "cra", *, seed: int = 0, **changes: Any) -> Any:
    """Saves steps 6 and 7 of a run with `CLASSES`; returns its config.

    Scores and Gamma differ between images and between steps.
    """
    config = tiny_config.config(folder / "cache", **{"model.kind": kind, **changes})
    network = build.build_network(config, len(CLASSES))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    shapes: Any = jax.eval_shape(network.init, jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            scale = np.prod(leaf.shape[:-1]) ** -0.5
            return rng.normal(size=leaf.shape, scale=scale).astype(leaf.dtype)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)

    folder.mkdir(parents=True, exist_ok=True)
    run_directory.keep_config(folder, config.to_dict())
    meta = {"class_names": CLASSES, "epoch": 1, "config": config.to_dict()}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step, top1 in ((6, 0.9), (7, 0.1)):
            state = jax.tree.map_with_path(draw, dict(shapes))
            checkpoints.save(step, state, meta, metric=top1)
    return config
