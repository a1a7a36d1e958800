"""One exact pass over a split, with the classification stream alone.

Two protocols: "center" (Table 1) scores the centre crop. "full" (Tables 2 and 3) scores
the whole resized picture: the last pooling keeps the window that it had in training and
slides over the feature map by 1, the classifier runs at each place, and its outputs are
averaged.
"""

import collections
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

from cra_jax import attention, experiment, metrics, parallel, pipeline, run_folder
from cra_jax.restore import restore
from cra_jax.steps import normalize


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the network says of a split, in the split's order.

    Attributes:
      logits: ``[n, k]``.
      labels: ``[n]``.
      activation: ``[n, h, w]``, class activation maps of the predicted class; None
        under the protocol "full".
      matrices: ``[n, 2, 3]``, where the attention is; None without attention head.
    """

    logits: np.ndarray
    labels: np.ndarray
    activation: np.ndarray | None = None
    matrices: np.ndarray | None = None


def make_center_step(
    backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]
) -> Callable:
    """The step of the protocol "center", over all devices.

    Returns:
      ``(variables, batch) -> {"logits": [b, k], "activation": [b, h, w]}``. Where the
      variables hold an `attention.Head` under "head", ``matrices [b, 2, 3]`` as well.
    """

    def step(variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        head = variables.get("head")
        variables = {k: v for k, v in variables.items() if k != "head"}
        images = normalize(batch["image"], mean=mean, std=std)
        out: Any = backbone.apply(variables, images)
        found = {
            "logits": out.logits,
            "activation": attention.class_activation(
                backbone, variables, out.features, out.logits.argmax(-1)
            ),
        }
        return found | ({"matrices": head(out.pooled)} if head else {})

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
    return Predictions(labels=labels, **found)


class Evaluator:
    """Scores splits under both protocols; compiles each step once.

    Args:
      backbone: the plain network.
      config: of the run; reads ``data`` and ``eval``.
    """

    def __init__(self, backbone: nn.Module, config: experiment.Config):
        data = config.data
        self._backbone = backbone
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

    def center(
        self,
        variables: Any,
        split: experiment.Split,
        *,
        head: attention.Head | None = None,
    ) -> Predictions:
        """Protocol "center"; with a head, where the attention is, too."""
        batches = pipeline.center_batches(
            split.pictures,
            split.labels,
            batch_size=self._batch_size,
            crop_px=self._crop_px,
        )
        if head:
            variables = {**variables, "head": head}
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

    def predict(
        self,
        variables: Any,
        split: experiment.Split,
        protocol: str,
        *,
        head: attention.Head | None = None,
    ) -> Predictions:
        """Under the protocol of that name; the head is for "center" alone."""
        if protocol == "full":
            return self.full(variables, split)
        return self.center(variables, split, head=head)

    def scores(
        self, found: Predictions, split: experiment.Split, protocol: str
    ) -> dict[str, Any]:
        """Accuracies of a split, and how well the network looks at the object.

        Returns:
          What `metrics.classification_scores` gives, ``loss`` (Eq. 9 without the
          terms of the stream that testing leaves out), ``protocol``, and where records
          have boxes and the protocol is "center", means over the ``box_count`` pictures
          that have one: ``pointing`` (whether the strongest activation of the predicted
          class lies in the box), ``activation_in_box`` (`attention.share_inside`),
          ``box_share`` (of the crop's area, which is what a map of no meaning scores in
          both), and with matrices ``attention_iou`` (`attention.iou`). Of a box counts
          what the crop shows.
        """
        scores: dict[str, Any] = {"protocol": protocol}
        scores |= metrics.classification_scores(found.logits, found.labels)
        scores["loss"] = scores["loss_cls1"]
        if found.activation is not None:
            scores |= self._attention_scores(found, found.activation, split)
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

    def _attention_scores(
        self, found: Predictions, activation: np.ndarray, split: experiment.Split
    ) -> dict[str, Any]:
        crop_px = self._crop_px
        boxes = split.boxes_px(crop_px)
        if not boxes:
            return {}
        rows_px, columns_px = attention.places_px(
            self._backbone, activation.shape[1:], crop_px
        )
        peaks = attention.peak_px(activation, rows_px, columns_px)
        measured = collections.defaultdict(list)
        for i, (x_min, y_min, x_max, y_max) in boxes.items():
            box, (x, y) = boxes[i], peaks[i]
            inside = x_min <= x <= x_max and y_min <= y <= y_max
            measured["pointing"].append(inside)
            measured["activation_in_box"].append(
                attention.share_inside(
                    activation[i],
                    box,
                    rows_px=rows_px,
                    columns_px=columns_px,
                    crop_px=crop_px,
                )
            )
            measured["box_share"].append((x_max - x_min) * (y_max - y_min) / crop_px**2)
            if found.matrices is not None:
                corners = attention.corners_px(found.matrices[i], crop_px)
                measured["attention_iou"].append(attention.iou(corners, box))
        means = {name: float(np.mean(values)) for name, values in measured.items()}
        return means | {"box_count": len(boxes)}


def results(
    found: Predictions, split: experiment.Split, *, step: int
) -> list[run_folder.Result]:
    """What a checkpoint says of each picture, for `run_folder.write_results`."""
    shifted = found.logits - found.logits.max(1, keepdims=True)
    confidence = 1 / np.exp(shifted).sum(1)  # softmax of the highest score
    predicted = found.logits.argmax(1)
    return [
        run_folder.Result(
            index=i,
            name=record.name,
            label=int(found.labels[i]),
            predicted=int(predicted[i]),
            confidence=float(confidence[i]),
            step=step,
        )
        for i, record in enumerate(split.records)
    ]


def run(config: experiment.Config, workdir: Path) -> None:
    """Restores a checkpoint's classification stream, scores the test splits, prints.

    The numbers are added to the run folder's `metrics.jsonl`, and what is said of each
    picture is written to `results/<split>-<protocol>.csv`.

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
    check_classes(dataset.class_names, restored.class_names, workdir)
    evaluator = Evaluator(restored.backbone, config)
    chosen = config.eval.protocol
    step, epoch = restored.step, restored.epoch
    print(f"checkpoint {step} (epoch {epoch}) of {workdir}")
    for name in dataset.splits:
        if name == "train":
            continue
        split = experiment.open_split(config, dataset, name)
        for protocol in ("full", "center") if chosen == "both" else (chosen,):
            found = evaluator.predict(restored.variables, split, protocol)
            scores = evaluator.scores(found, split, protocol)
            run_folder.write_results(
                workdir, name, protocol, results(found, split, step=step)
            )
            print(f"{name}, {protocol}: {run_folder.describe_scores(scores)}")
            line = {"step": step, "epoch": epoch, "split": name, **scores}
            # Training's own line says the same, and of the attention as well.
            known = run_folder.read_metrics(workdir)
            if not any(line.items() <= other.items() for other in known):
                run_folder.append_metrics(workdir, line)


def check_classes(here: Sequence[str], there: Sequence[str], workdir: Path) -> None:
    """Checks that data and checkpoint mean the same by a class number.

    Args:
      here: class names of the data.
      there: class names of the checkpoint.
      workdir: of the checkpoint, for the message.

    Raises:
      ValueError: they do not; the message has the first difference.
    """
    if tuple(here) == tuple(there):
        return
    if len(here) != len(there):
        difference = f"{len(here)} classes, the checkpoint {len(there)}"
    else:
        mine, theirs = next((a, b) for a, b in zip(here, there, strict=True) if a != b)
        difference = f"class {mine!r} where the checkpoint has {theirs!r}"
    raise ValueError(
        f"the data has {difference}: evaluate {workdir} on the classes that it was "
        "trained on (data.source, data.path)"
    )
