"""Measures how much of the class N_ar can read from Gamma instead of the pixels.

    python -m benchmarks.study.class_leak runs/quickstart runs/other

N_cls could encode the class in Gamma, and N_ar could decode it from the padding, the
angle or the covered region. To measure this, Gamma is predicted from an image, the
pixels are replaced by noise or by another image, and N_ar classifies the result.
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
from cra_jax import art_module, geometry
from cra_jax.art_module import REGULARIZATION_STREAM
from cra_jax.inference import restore, run_options
from cra_jax.input import normalize, splits
from cra_jax.input.batches import center_batches
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build

_MAX_IMAGES = 1024  # of a split

COLUMNS = {
    "chance": "share of the most frequent class",
    "image": "accuracy of N_ar on the attention, as in training",
    "mean_gamma": "the same, with the mean Gamma of all images",
    "noise": "accuracy of N_ar on noise with the mean and standard deviation of the "
    "batch",
    "own_noise": "accuracy of N_ar on noise with the mean and standard deviation of "
    "the image",
    "swapped": "share in which N_ar predicts the class of Gamma, on the pixels of an "
    "image of another class",
    "pixels": "share in which it predicts the class of those pixels",
    "gamma": "accuracy of a linear discriminant on Gamma, fitted on the training split",
    "padding": "share of the attention outside the image",
}


def measure(workdir: Path, split: str = "test") -> dict[str, float]:
    """Evaluates N_ar of the last checkpoint of a run with and without the pixels.

    BatchNorm uses its running statistics.

    Args:
      workdir: the run directory.
      split: split whose centre crops are used, at most 1,024 of them.

    Returns:
      `COLUMNS`, in 0..1. For the split "train", `gamma` is measured on the images
      that it was fitted on.

    Raises:
      ValueError: the run has no second stream, or the split is unknown.
    """
    config: Any = build.config_of_run(workdir, get_config(), {})
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose("latest")
        names = tuple(checkpoints.meta(step)["class_names"])
        shapes = checkpoints.shapes(step)
        state = checkpoints.restore(
            step, {name: shapes[name] for name in ("params", "batch_stats")}
        )
    if REGULARIZATION_STREAM not in state["batch_stats"]:
        raise ValueError(
            f"{workdir} is a {config.model.kind}, which has no N_ar: give a run of "
            "kind cra or stn"
        )
    streams = _Streams(config, state, len(names))
    dataset = build.load_dataset(config)
    if split not in dataset.splits:
        raise ValueError(
            f"unknown split {split!r}: {dataset.name} has {', '.join(dataset.splits)}"
        )
    train = streams.matrices(build.open_split(config, dataset, "train"))
    return streams.scores(build.open_split(config, dataset, split), train)


class _Streams:
    """Both streams and the attention head of a checkpoint."""

    def __init__(self, config: Any, state: Any, num_classes: int):
        self._config = config
        backbone = run_options.from_config(config).create_backbone(num_classes)
        params, batch_stats = state["params"], state["batch_stats"]
        head: Any = build.trained_head(config, params)
        first = restore.classification_variables(params, batch_stats)
        second = {
            # N_ar may share the weights of N_cls.
            "params": params.get(REGULARIZATION_STREAM, first["params"]),
            "batch_stats": batch_stats[REGULARIZATION_STREAM],
        }

        def predict(images):
            out: Any = backbone.apply(first, images)
            centres = art_module.cell_centres(backbone, out.features, images)
            return head(out.pooled, out.features, centres)

        def classify(images, matrices):
            size = (config.art.size_px,) * 2
            grid = geometry.affine_grid(matrices, size)
            out: Any = backbone.apply(second, geometry.bilinear_sample(images, grid))
            return out.logits.argmax(-1)

        self._predict: Callable = jax.jit(predict)
        self._classify: Callable = jax.jit(classify)

    def _batches(self, split: splits.Split):
        """Yields normalized centre crops and labels, in one random order.

        Published datasets are sorted by class, so that neighbours share a class.
        """
        data = self._config.data
        order = np.random.default_rng(0).permutation(len(split.labels))[:_MAX_IMAGES]
        sample = split.take(order.tolist())
        batches = center_batches(
            sample.images,
            sample.labels,
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
        """Affine matrices ``[n, 2, 3]`` of the images' Gamma, and the labels."""
        pairs = [(self._predict(x), labels) for x, labels in self._batches(split)]
        matrices, labels = (np.concatenate(x) for x in zip(*pairs, strict=True))
        return matrices, labels

    def scores(
        self, split: splits.Split, train: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, float]:
        """Returns `COLUMNS` of a split; the discriminant is fitted on `train`."""
        matrices, labels = self.matrices(split)
        mean_matrix = jnp.asarray(matrices.mean(0, keepdims=True))
        right: dict[str, list] = {}
        key, start = jax.random.key(0), 0
        for images, truth in self._batches(split):
            of_batch = jnp.asarray(matrices[start : start + len(truth)])
            start += len(truth)
            key, draw = jax.random.split(key)
            noise = jax.random.normal(draw, images.shape)
            batch = images.mean((0, 1, 2)), images.std((0, 1, 2))
            own = images.mean((1, 2), keepdims=True), images.std((1, 2), keepdims=True)
            inputs = {
                "image": (images, of_batch),
                "mean_gamma": (images, jnp.repeat(mean_matrix, len(truth), 0)),
                "noise": (noise * batch[1] + batch[0], of_batch),
                "own_noise": (noise * own[1] + own[0], of_batch),
            }
            for name, pair in inputs.items():
                predicted = np.asarray(self._classify(*pair))
                right.setdefault(name, []).extend(predicted == truth)
            predicted = np.asarray(self._classify(jnp.roll(images, 1, 0), of_batch))
            of_pixels = np.roll(truth, 1)
            differ = of_pixels != truth
            right.setdefault("swapped", []).extend((predicted == truth)[differ])
            right.setdefault("pixels", []).extend((predicted == of_pixels)[differ])
        found = {name: float(np.mean(values)) for name, values in right.items()}
        found["chance"] = float(np.bincount(labels).max() / len(labels))
        fitted, measured = (x.reshape(len(x), -1) for x in (train[0], matrices))
        predicted = discriminate(fitted, measured, train[1])
        found["gamma"] = float((predicted == labels).mean())
        found["padding"] = float(padding(matrices))
        return {name: found[name] for name in COLUMNS}


def discriminate(train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Classifies vectors by a linear discriminant.

    The predicted class is that of the nearest class mean, in units of the standard
    deviation within classes.

    Args:
      train: ``[n, d]``, vectors that the discriminant is fitted on.
      test: ``[m, d]``, vectors to classify.
      labels: ``[n]``, labels of `train`.

    Returns:
      ``[m]``, predicted labels.
    """
    classes = np.unique(labels)
    means = np.stack([train[labels == c].mean(0) for c in classes])
    within = train - means[np.searchsorted(classes, labels)]
    # The entries of a matrix depend on each other: some directions are constant.
    _, spread, axes = np.linalg.svd(within, full_matrices=False)
    kept = spread > 1e-4 * spread.max(initial=0)
    whiten = axes[kept].T / spread[kept]
    offsets = (test @ whiten)[:, None] - means @ whiten
    return classes[np.square(offsets).sum(-1).argmin(1)]


def padding(matrices: np.ndarray) -> np.ndarray:
    """Mean share of the attention outside the image."""
    grid = geometry.affine_grid(jnp.asarray(matrices, jnp.float32), (64, 64))
    return np.asarray((jnp.abs(grid) > 1).any(-1).mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--splits", nargs="+", default=["train", "test"])
    options = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # orbax logs each directory that it opens
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
