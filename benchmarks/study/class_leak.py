"""What N_ar knows of the class without the bird: from Gamma, through the cut's shape.

    python -m benchmarks.study.class_leak runs/quickstart runs/other

N_cls could write the class into Gamma, and N_ar read it off the padding, the angle or
the hole that Gamma makes. So Gamma is predicted from the true image, the pixels are
exchanged for noise or for another image's, and N_ar is asked for the class.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from benchmarks import timing
from configs.cub import get_config
from cra_jax import geometry
from cra_jax.art_module import REGULARIZATION_STREAM
from cra_jax.inference import restore, run_options
from cra_jax.input import normalize, splits
from cra_jax.input.batches import center_batches
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build

_MOST = 1024  # images of a split that are looked at

COLUMNS = {
    "chance": "share of the commonest class",
    "image": "N_ar on the attention, as trained",
    "still": "N_ar with the mean Gamma of all images for each",
    "noise": "N_ar on noise that is alike for all images",
    "own_noise": "N_ar on noise with the image's own mean and deviation",
    "swapped": "N_ar on another class's image, which names Gamma's class",
    "pixels": "the same, which names the class of the pixels",
    "gamma": "a linear discriminant that sees Gamma alone, fitted on train",
    "padding": "share of the attention that lies outside the image",
}


def measure(workdir: Path, split: str = "test") -> dict[str, float]:
    """What N_ar of a run's last checkpoint classifies with and without pixels.

    BatchNorm takes its running statistics.

    Args:
      workdir: the run directory.
      split: whose images, at most 1,024 of them; centre crops.

    Returns:
      `COLUMNS`, in 0..1. `gamma` of "train" is measured where it was fitted.

    Raises:
      ValueError: the run has no second stream, or no such split.
    """
    config: Any = build.config_of_run(workdir, get_config(), {})
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose("latest")
        names = tuple(checkpoints.meta(step)["class_names"])
        shapes = checkpoints.shapes(step)
        state = checkpoints.restore(
            step, {name: shapes[name] for name in ("params", "batch_stats")}
        )
    if REGULARIZATION_STREAM not in state["params"]:
        raise ValueError(
            f"{workdir} is a {config.model.kind}, which has no N_ar: name a run of cra "
            "or stn"
        )
    asked = _Asked(config, state, len(names))
    dataset = build.load_dataset(config)
    if split not in dataset.splits:
        raise ValueError(
            f"unknown split {split!r}: {dataset.name} has {', '.join(dataset.splits)}"
        )
    train = asked.matrices(build.open_split(config, dataset, "train"))
    return asked.about(build.open_split(config, dataset, split), train)


class _Asked:
    """Both streams and the head of a checkpoint, and the questions to them."""

    def __init__(self, config: Any, state: Any, num_classes: int):
        self._config = config
        backbone = run_options.from_config(config).create_backbone(num_classes)
        params, batch_stats = state["params"], state["batch_stats"]
        head: Any = build.trained_head(config, params)
        first = restore.classification_variables(params, batch_stats)
        second = {
            "params": params[REGULARIZATION_STREAM],
            "batch_stats": batch_stats[REGULARIZATION_STREAM],
        }

        def predict(images):
            out: Any = backbone.apply(first, images)
            return head(out.pooled)

        def classify(images, matrices):
            size = (config.art.size_px,) * 2
            cut = geometry.bilinear_sample(images, geometry.affine_grid(matrices, size))
            out: Any = backbone.apply(second, cut)
            return out.logits.argmax(-1)

        self._predict: Callable = jax.jit(predict)
        self._classify: Callable = jax.jit(classify)

    def _batches(self, split: splits.Split):
        """Normalised centre crops and labels, in one random order.

        Published sets are sorted by class: neighbours would be of one.
        """
        data = self._config.data
        order = np.random.default_rng(0).permutation(len(split.labels))[:_MOST]
        some = split.take(order.tolist())
        batches = center_batches(
            some.images,
            some.labels,
            batch_size=self._config.eval.batch_size,
            crop_px=data.crop_px,
        )
        for batch in (batches[i] for i in range(len(batches))):
            valid = batch["valid"]
            images = normalize.normalize(
                jnp.asarray(batch["image"][valid]), mean=data.mean, std=data.std
            )
            yield images, np.asarray(batch["label"])[valid]

    def matrices(self, split: splits.Split) -> tuple[np.ndarray, np.ndarray]:
        """Gamma of images as matrices ``[n, 2, 3]``, and their labels."""
        found = [(self._predict(x), labels) for x, labels in self._batches(split)]
        matrices, labels = (np.concatenate(x) for x in zip(*found, strict=True))
        return matrices, labels

    def about(
        self, split: splits.Split, train: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, float]:
        """`COLUMNS` of a split; the discriminant is fitted on `train`."""
        matrices, labels = self.matrices(split)
        still = jnp.asarray(matrices.mean(0, keepdims=True))
        right: dict[str, list] = {}
        key, at = jax.random.key(0), 0
        for images, truth in self._batches(split):
            mine = jnp.asarray(matrices[at : at + len(truth)])
            at += len(truth)
            key, draw = jax.random.split(key)
            noise = jax.random.normal(draw, images.shape)
            alike = images.mean((0, 1, 2)), images.std((0, 1, 2))
            own = images.mean((1, 2), keepdims=True), images.std((1, 2), keepdims=True)
            questions = {
                "image": (images, mine),
                "still": (images, jnp.repeat(still, len(truth), 0)),
                "noise": (noise * alike[1] + alike[0], mine),
                "own_noise": (noise * own[1] + own[0], mine),
            }
            for name, question in questions.items():
                said = np.asarray(self._classify(*question))
                right.setdefault(name, []).extend(said == truth)
            said = np.asarray(self._classify(jnp.roll(images, 1, 0), mine))
            theirs = np.roll(truth, 1)
            differ = theirs != truth
            right.setdefault("swapped", []).extend((said == truth)[differ])
            right.setdefault("pixels", []).extend((said == theirs)[differ])
        found = {name: float(np.mean(values)) for name, values in right.items()}
        found["chance"] = float(np.bincount(labels).max() / len(labels))
        known, asked = (x.reshape(len(x), -1) for x in (train[0], matrices))
        said = discriminate(known, asked, train[1])
        found["gamma"] = float((said == labels).mean())
        found["padding"] = float(padding(matrices))
        return {name: found[name] for name in COLUMNS}


def discriminate(
    known: np.ndarray, asked: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Classes by the nearest mean, in units of the spread within classes.

    Args:
      known: ``[n, d]``.
      asked: ``[m, d]``.
      labels: of `known`, ``[n]``.

    Returns:
      ``[m]``: a linear discriminant's answers.
    """
    classes = np.unique(labels)
    means = np.stack([known[labels == c].mean(0) for c in classes])
    within = known - means[np.searchsorted(classes, labels)]
    # Entries of a matrix depend on each other: directions without spread are left out.
    _, spread, axes = np.linalg.svd(within, full_matrices=False)
    kept = spread > 1e-4 * spread.max(initial=0)
    whiten = axes[kept].T / spread[kept]
    apart = (asked @ whiten)[:, None] - means @ whiten
    return classes[np.square(apart).sum(-1).argmin(1)]


def padding(matrices: np.ndarray) -> np.ndarray:
    """Which share of the attention lies outside its image; a mean over matrices."""
    grid = geometry.affine_grid(jnp.asarray(matrices, jnp.float32), (64, 64))
    return np.asarray((jnp.abs(grid) > 1).any(-1).mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--splits", nargs="+", default=["train", "test"])
    options = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # orbax warns that it opens for reading
    rows = []
    for workdir in options.runs:
        for split in options.splits:
            found = measure(workdir, split)
            shares = [f"{100 * found[name]:.1f}" for name in COLUMNS]
            rows.append([workdir.name, split, *shares])
    print(timing.table(["run, all in %", "split", *COLUMNS], rows))
    print("\n".join(f"{name}: {meaning}" for name, meaning in COLUMNS.items()))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
