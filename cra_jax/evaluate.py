"""One exact pass over a split, with the classification stream alone.

Two protocols: "center" (Table 1) scores the centre crop. "full" (Tables 2 and 3) scores
the whole resized picture: the last pooling keeps the window that it had in training and
slides over the feature map by 1, the classifier runs at each place, and its outputs are
averaged.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from cra_jax import experiment, metrics, parallel, pipeline, run_folder
from cra_jax.restore import restore
from cra_jax.steps import normalize


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the network says of a split, in the split's order.

    Attributes:
      logits: ``[n, k]``.
      labels: ``[n]``.
      peak_px: ``[n, 2]``, the ``(x, y)`` of the strongest activation of the predicted
        class, in pixels of the crop; None under the protocol "full".
    """

    logits: np.ndarray
    labels: np.ndarray
    peak_px: np.ndarray | None = None


def make_center_step(
    backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]
) -> Callable:
    """The step of the protocol "center", over all devices.

    Returns:
      ``(variables, batch) -> {"logits": [b, k], "peak_px": [b, 2]}``.
    """

    def step(variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        images = normalize(batch["image"], mean=mean, std=std)
        out: Any = backbone.apply(variables, images)
        # Class activation map (Zhou et al., 2016): the classifier at each place.
        scores = backbone.apply(variables, out.features, method="classify")
        assert isinstance(scores, Array)
        predicted = out.logits.argmax(-1)[:, None, None, None]
        activation = jnp.take_along_axis(scores, predicted, -1)[..., 0]
        width = activation.shape[2]
        peak = activation.reshape(len(activation), -1).argmax(-1)
        # Strides start at the first pixel: place i looks at pixels around i * stride.
        stride_px = backbone.stride_px  # pyright: ignore[reportAttributeAccessIssue]
        peak_px = stride_px * jnp.stack([peak % width, peak // width], -1)
        return {"logits": out.logits, "peak_px": peak_px}

    return parallel.eval_step(step)


def make_full_step(
    backbone: nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_px: int,
    masked: bool = True,
) -> Callable:
    """The step of the protocol "full", over all devices.

    Args:
      backbone: the plain network.
      mean: of the channels.
      std: of the channels.
      crop_px: the training crop, whose feature map is the window of the last pooling.
      masked: whether pictures were padded to share a shape; what lies beyond their
        extent is then kept out of every layer. False costs nothing and needs exact
        shapes.

    Returns:
      ``(variables, batch) -> {"logits": [b, k]}``.
    """
    window = -(-crop_px // backbone.stride_px)  # pyright: ignore[reportAttributeAccessIssue]

    def step(variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        images = normalize(batch["image"], mean=mean, std=std)
        extent_px = batch["extent_px"]
        features = backbone.apply(
            variables,
            images,
            extent_px=extent_px if masked else None,
            method="extract",
        )
        assert isinstance(features, Array)
        pooled = nn.avg_pool(features.astype(jnp.float32), (window, window))
        scores = backbone.apply(variables, pooled, method="classify")
        assert isinstance(scores, Array)
        cells = backbone.feature_extent(extent_px)  # pyright: ignore[reportAttributeAccessIssue]
        places = cells - (window - 1)
        rows = jnp.arange(scores.shape[1]) < places[:, :1]
        columns = jnp.arange(scores.shape[2]) < places[:, 1:]
        valid = (rows[:, :, None] & columns[:, None, :])[..., None]
        total = jnp.where(valid, scores, 0).sum((1, 2))
        return {"logits": total / places.prod(-1, keepdims=True)}

    return parallel.eval_step(step)


def predict_split(
    step: Callable,
    variables: Any,
    batches: pipeline.Batches,
    count: int,
    *,
    workers: int = 2,
    description: str = "",
) -> Predictions:
    """Runs a step over a split, each picture exactly once.

    Args:
      step: of `make_center_step` or `make_full_step`.
      variables: of the plain backbone.
      batches: of `pipeline`.
      count: pictures in the split.
      workers: threads that make batches.
      description: of the progress bar; empty: none.

    Returns:
      Predictions in the split's order.
    """
    found: dict[str, np.ndarray] = {}
    labels = np.zeros(count, np.int32)
    times_seen = np.zeros(count, int)
    ahead: Iterable = pipeline.prefetch(
        lambda i: batches[i], 0, len(batches), workers=workers
    )
    if description:
        ahead = tqdm(
            ahead,
            total=len(batches),
            desc=description,
            unit="batch",
            leave=False,
            disable=not sys.stderr.isatty(),
        )
    for batch in ahead:
        valid, index = batch["valid"], batch["index"][batch["valid"]]
        inputs = {k: batch[k] for k in ("image", "extent_px") if k in batch}
        for name, values in step(variables, inputs).items():
            rows = found.setdefault(name, np.zeros((count, *values.shape[1:])))
            rows[index] = values[valid]
        labels[index] = batch["label"][valid]
        times_seen[index] += 1
    assert (times_seen == 1).all(), "a picture was missed or counted twice"
    return Predictions(found["logits"], labels, found.get("peak_px"))


class Evaluator:
    """Scores splits under both protocols; compiles each step once.

    Args:
      backbone: the plain network.
      config: of the run; reads ``data`` and ``eval``.
    """

    def __init__(self, backbone: nn.Module, config: experiment.Config):
        data = config.data
        self._crop_px = data.crop_px
        self._workers = data.workers
        self._batch_size = parallel.round_up(config.eval.batch_size)
        self._bucket_px = config.eval.bucket_px
        normalization = {"mean": tuple(data.mean), "std": tuple(data.std)}
        self._center_step = make_center_step(backbone, **normalization)
        self._full_step = make_full_step(
            backbone,
            crop_px=data.crop_px,
            masked=self._bucket_px > 0,
            **normalization,
        )

    def center(self, variables: Any, split: experiment.Split) -> Predictions:
        """Protocol "center"."""
        batches = pipeline.center_batches(
            split.pictures,
            split.labels,
            batch_size=self._batch_size,
            crop_px=self._crop_px,
        )
        return self._run(self._center_step, variables, batches, split)

    def full(self, variables: Any, split: experiment.Split) -> Predictions:
        """Protocol "full"."""
        batches = pipeline.full_batches(
            split.pictures,
            split.labels,
            batch_size=self._batch_size,
            bucket_px=self._bucket_px,
        )
        return self._run(self._full_step, variables, batches, split)

    def scores(
        self, variables: Any, split: experiment.Split, protocol: str
    ) -> dict[str, Any]:
        """Accuracies of a split, and whether the strongest activation hits the object.

        Returns:
          What `metrics.classification_scores` gives, ``loss`` (Eq. 9 without the
          terms of the stream that testing leaves out), ``protocol``, and where the
          records have boxes and the protocol is "center", ``pointing``.
        """
        predict = self.center if protocol == "center" else self.full
        found = predict(variables, split)
        scores: dict[str, Any] = {"protocol": protocol}
        scores |= metrics.classification_scores(found.logits, found.labels)
        scores["loss"] = scores["loss_cls1"]
        if found.peak_px is not None:
            hits = self._pointing(found.peak_px, split)
            if hits.size:
                scores["pointing"] = float(hits.mean())
        return scores

    def _run(self, step, variables, batches, split) -> Predictions:
        return predict_split(
            step,
            variables,
            batches,
            len(split.labels),
            workers=self._workers,
            description="evaluate",
        )

    def _pointing(self, peak_px: np.ndarray, split: experiment.Split) -> np.ndarray:
        """Whether each peak lies in its record's box, for the records that have one."""
        hits = []
        for i, (point, box) in enumerate(zip(peak_px, split.boxes, strict=True)):
            if box is None or box == (0, 0, 1, 1):  # the whole picture says nothing
                continue
            size_px = np.array(split.pictures[i].shape[1::-1])
            # The centre of the peak's pixel, as a fraction of the whole picture.
            place = ((size_px - self._crop_px) // 2 + point + 0.5) / size_px
            hits.append(bool((box[:2] <= place).all() and (place <= box[2:]).all()))
        return np.array(hits)


def run(config: experiment.Config, workdir: Path) -> None:
    """Restores a checkpoint's classification stream, scores the test splits, prints.

    The numbers are added to the run folder's `metrics.jsonl`.

    Args:
      config: the run's, or one that reads other data with the same classes;
        ``eval.checkpoint`` says which checkpoint.
      workdir: the run folder.

    Raises:
      ValueError: there is no such checkpoint, or it is of another model.
    """
    experiment.check(config)
    restored = restore(config, workdir)
    dataset = experiment.load_data(config)
    if dataset.class_names != restored.class_names:
        difference = _class_difference(dataset.class_names, restored.class_names)
        raise ValueError(
            f"the data has {difference}: evaluate {workdir} on the classes that it was "
            "trained on (data.source, data.path)"
        )
    evaluator = Evaluator(restored.backbone, config)
    chosen = config.eval.protocol
    step, epoch = restored.step, restored.epoch
    print(f"checkpoint {step} (epoch {epoch}) of {workdir}")
    for name in dataset.splits:
        if name == "train":
            continue
        split = experiment.open_split(config, dataset, name)
        for protocol in ("full", "center") if chosen == "both" else (chosen,):
            scores = evaluator.scores(restored.variables, split, protocol)
            print(f"{name}, {protocol}: {run_folder.describe_scores(scores)}")
            line = {"step": step, "epoch": epoch, "split": name, **scores}
            if line not in run_folder.read_metrics(workdir):
                run_folder.append_metrics(workdir, line)


def _class_difference(here: Sequence[str], there: Sequence[str]) -> str:
    if len(here) != len(there):
        return f"{len(here)} classes, the checkpoint {len(there)}"
    mine, theirs = next((a, b) for a, b in zip(here, there, strict=True) if a != b)
    return f"class {mine!r} where the checkpoint has {theirs!r}"
