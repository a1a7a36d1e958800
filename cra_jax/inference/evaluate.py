"""Evaluates the classification stream on whole splits, each image exactly once.

There are two protocols, see `protocols.py`: "center" scores the centre crop, "full" the
whole resized image. If several hosts evaluate together, each computes its share of
every batch, and all get all predictions.
"""

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from scipy.special import softmax
from tqdm import tqdm

from cra_jax import art_module
from cra_jax.art_module import TrainedHead
from cra_jax.backbones import class_activation
from cra_jax.datasets import sources
from cra_jax.inference import accuracy, localization, run_options
from cra_jax.inference.protocols import make_center_step, make_full_step
from cra_jax.inference.restore import Restored, restore
from cra_jax.inference.run_options import RunOptions, describe_differences
from cra_jax.input import splits
from cra_jax.input.batches import Batches, center_batches, full_batches
from cra_jax.input.records import Dataset, Record
from cra_jax.input.splits import (
    Split,
    describe_changes,
    describe_data,
    digest,
    list_images,
    open_split,
)
from cra_jax.runtime import (
    devices,
    files,
    hosts,
    prefetch,
    progress,
    run_directory,
    signals,
    training_log,
)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions for a split, in its order.

    Attributes:
      logits: ``[n, k]``, scores.
      labels: ``[n]``, true classes.
      activation: ``[n, h, w]``, class activation maps of the predicted classes; None
        for the protocol "full".
      matrices: ``[n, 2, 3]``, attention matrices; None without an attention head.
    """

    logits: np.ndarray
    labels: np.ndarray
    activation: np.ndarray | None = None
    matrices: np.ndarray | None = None


def predict_split(
    step: Callable,
    variables: Any,
    batches: Batches,
    count: int,
    *,
    workers: int = 2,
    description: str = "",
    shared: bool = False,
    interrupt: signals.StopRequest | None = None,
) -> Predictions:
    """Runs a step over a split, each image exactly once.

    Args:
      step: result of `make_center_step` or `make_full_step`.
      variables: variables of the plain backbone.
      batches: batches of `input.batches`.
      count: number of images in the split.
      workers: number of threads that load batches.
      description: text of the progress bar; empty: no progress bar.
      shared: whether the batches contain this host's share of the rows, and all hosts
        call this function together.
      interrupt: ends it at the next batch after a signal.

    Returns:
      Predictions in the split's order.

    Raises:
      Stopped: after a signal.
    """
    variables = devices.on_each_device(variables)  # once, and not for each batch
    found: dict[str, np.ndarray] = {}
    labels = np.zeros(count, np.int32)
    times_seen = np.zeros(count, int)
    ahead: Iterable = prefetch.prefetch(
        lambda i: batches[i], 0, len(batches), workers=workers
    )
    if description:
        ahead = tqdm(
            ahead,
            total=len(batches),
            desc=description,
            unit="batch",
            leave=False,
            file=progress.bar_file(),
            disable=not (sys.stderr.isatty() and hosts.is_first()),
        )
    for batch in ahead:
        if interrupt:
            raise signals.Stopped(interrupt.number)
        valid, index = batch["valid"], batch["index"][batch["valid"]]
        inputs = {k: batch[k] for k in ("image", "extent_px") if k in batch}
        for name, values in step(variables, inputs).items():
            rows = found.setdefault(name, np.zeros((count, *values.shape[1:])))
            rows[index] = values[valid]
        labels[index] = batch["label"][valid]
        times_seen[index] += 1
    if shared:  # rows of other hosts are 0 here
        found, labels, times_seen = hosts.sum_over_hosts((found, labels, times_seen))
    assert (times_seen == 1).all(), "an image was missed or counted twice"
    return Predictions(labels=labels, **found)


class Evaluator:
    """Scores splits with both protocols; compiles each step once.

    Args:
      backbone: the plain network.
      options: options of the run; ``data`` and ``evaluation`` are used.
      shard: index of this host's share of each batch, and number of shares; by default
        this host evaluates alone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        options: RunOptions,
        *,
        shard: tuple[int, int] = (0, 1),
    ):
        data = options.data
        self._backbone = backbone
        self._crop_px = data.crop_px
        self._settings = options.digest()
        self._workers = data.workers
        self._shard = shard
        self._batch_size = devices.round_up(
            options.evaluation.batch_size, hosts=shard[1]
        )
        self._bucket_px = options.evaluation.bucket_px
        normalization = {"mean": data.mean, "std": data.std}
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
        split: Split,
        head: TrainedHead | None = None,
        *,
        interrupt: signals.StopRequest | None = None,
    ) -> Predictions:
        """Predicts with the protocol "center"; with a head, attention matrices too.

        Raises:
          Stopped: `interrupt` has recorded a signal.
        """
        batches = center_batches(
            split.images,
            split.labels,
            batch_size=self._batch_size,
            crop_px=self._crop_px,
            shard=self._shard,
        )
        if head:
            variables = {**variables, "head": head}
        return self._run(self._center_step, variables, batches, split, interrupt)

    def full(self, variables: Any, split: Split) -> Predictions:
        """Predicts with the protocol "full"."""
        batches = full_batches(
            split.images,
            split.labels,
            batch_size=self._batch_size,
            bucket_px=self._bucket_px,
            shard=self._shard,
        )
        return self._run(self._full_step, variables, batches, split)

    def predict(self, variables: Any, split: Split, protocol: str) -> Predictions:
        """Predicts with the protocol of that name."""
        protocols = {"center": self.center, "full": self.full}
        return protocols[protocol](variables, split)

    def scores(self, found: Predictions, split: Split, protocol: str) -> dict[str, Any]:
        """Computes accuracies of a split, and localization scores if they are known.

        Returns:
          The scores of `accuracy.classification_scores`, ``loss`` (Eq. 9 with the terms
          of the classification stream only), ``protocol``, ``data`` (digest of labels
          and images) and ``settings`` (`RunOptions.digest`). For the protocol "center"
          and records with boxes also means over the ``box_count`` images with a box:
          ``pointing`` (whether the maximum of the class activation map lies in the
          box), ``activation_in_box`` (`localization.share_inside`), ``box_share`` (the
          box's share of the crop, the value of both for an uninformative map) and, with
          matrices, ``attention_iou`` (`localization.iou`). Boxes are clipped to the
          crop. With matrices and records with parts also, for each part such as the
          head, ``head_in_attention``, the share of the ``head_count`` images that show
          it in which it lies inside both crop and attention.
        """
        scores: dict[str, Any] = {"protocol": protocol}
        scores |= accuracy.classification_scores(found.logits, found.labels)
        scores["loss"] = scores["loss_cls1"]
        if found.activation is not None:
            scores |= self._attention_scores(found, found.activation, split)
        if found.matrices is not None:
            scores |= self._part_scores(found.matrices, split)
        scores["data"] = digest(list_images(split.records))
        return scores | {"settings": self._settings}

    def _run(self, step, variables, batches, split, interrupt=None) -> Predictions:
        return predict_split(
            step,
            variables,
            batches,
            len(split.labels),
            workers=self._workers,
            description="evaluate",
            shared=self._shard[1] > 1,
            interrupt=interrupt,
        )

    def _attention_scores(
        self, found: Predictions, activation: np.ndarray, split: Split
    ) -> dict[str, Any]:
        crop_px = self._crop_px
        boxes = split.boxes_px(crop_px)
        if not boxes:
            return {}
        rows_px, columns_px = class_activation.places_px(
            self._backbone, activation.shape[1:], crop_px
        )
        peaks = class_activation.peak_px(activation, rows_px, columns_px)
        measured = collections.defaultdict(list)
        for i, (x_min, y_min, x_max, y_max) in boxes.items():
            box, (x, y) = boxes[i], peaks[i]
            inside = x_min <= x <= x_max and y_min <= y <= y_max
            measured["pointing"].append(inside)
            measured["activation_in_box"].append(
                localization.share_inside(
                    activation[i],
                    box,
                    rows_px=rows_px,
                    columns_px=columns_px,
                    crop_px=crop_px,
                )
            )
            measured["box_share"].append((x_max - x_min) * (y_max - y_min) / crop_px**2)
            if found.matrices is not None:
                corners = art_module.corners_px(found.matrices[i], crop_px)
                measured["attention_iou"].append(localization.iou(corners, box))
        means = {name: float(np.mean(values)) for name, values in measured.items()}
        return means | {"box_count": len(boxes)}

    def _part_scores(self, matrices: np.ndarray, split: Split) -> dict[str, Any]:
        crop_px, scores = self._crop_px, {}
        for part, places in split.parts_px(crop_px).items():
            hits = [
                # Outside the crop the attention is padding.
                np.abs(place - (crop_px - 1) / 2).max() <= crop_px / 2
                and localization.contains(
                    art_module.corners_px(matrices[i], crop_px), place
                )
                for i, place in places.items()
            ]
            name = part.replace(" ", "_")
            scores[f"{name}_in_attention"] = float(np.mean(hits))
            scores[f"{name}_count"] = len(hits)
        return scores


def results(
    found: Predictions,
    split: Split,
    *,
    class_names: Sequence[str],
    step: int,
    settings: str = "",
) -> list[run_directory.Result]:
    """The prediction of each image, for `run_directory.write_results`.

    Args:
      found: of all images.
      split: the images.
      class_names: in the order of the scores.
      step: of the checkpoint.
      settings: `RunOptions.digest`.
    """
    confidence = softmax(found.logits, axis=1).max(1)
    predicted = found.logits.argmax(1)
    return [
        run_directory.Result(
            index=i,
            name=record.name,
            label=int(found.labels[i]),
            predicted=int(predicted[i]),
            confidence=float(confidence[i]),
            step=step,
            class_name=class_names[int(found.labels[i])],
            predicted_class=class_names[int(predicted[i])],
            digest=record.digest,
            settings=settings,
        )
        for i, record in enumerate(split.records)
    ]


def run(options: RunOptions, workdir: Path, *, allow_data_change: bool = False) -> None:
    """Restores a checkpoint's classification stream and scores the test splits.

    Prints the scores, appends them to `metrics.jsonl` of the run directory, and writes
    the prediction of each image to `results/<split>-<protocol>.csv`. An evaluation of
    other data, or with other settings than those of the run, is foreign: it is printed
    as such, its line has the field ``foreign``, and its results are in a directory of
    their own.

    Args:
      options: options of the run, or of other data with the same classes;
        ``eval.checkpoint`` names the checkpoint.
      workdir: the run directory.
      allow_data_change: whether to score data that changed since the training, as a
        foreign evaluation.

    Raises:
      ValueError: there is no such checkpoint, it is of another model, the data has
        changed, or the run directory cannot be written, after all scores are printed.
    """
    hosts.start(**options.hosts)
    with hosts.all_or_none():
        restored = restore(options, workdir)
        dataset = sources.load_dataset(options.data, needs_train=False)
        dataset = sources.with_classes(dataset, restored.class_names)
        check_classes(dataset.class_names, restored.class_names, same_classes(workdir))
        foreign = {
            name: why_foreign(
                options,
                restored,
                workdir,
                name,
                records,
                allow_data_change=allow_data_change,
            )
            for name, records in dataset.splits.items()
            if name != "train"
        }
        test_splits = {
            name: open_split(options.data, dataset, name) for name in foreign
        }
    hosts.check_same(describe_data(test_splits), "their data")
    evaluator = Evaluator(restored.backbone, options, shard=hosts.shard())
    chosen = options.evaluation.protocol
    step, epoch = restored.step, restored.epoch
    if hosts.is_first():
        chosen_on = restored.metric_split
        is_best = options.evaluation.checkpoint == "best"
        best = f", the best on {chosen_on!r}" if is_best else ""
        print(f"checkpoint {step} (epoch {epoch}{best}) of {workdir}")
        if is_best and chosen_on in test_splits:
            print(
                f"note: the score of {chosen_on!r} is too high, since it chose the"
                " checkpoint"
            )
        for note in dataset.notes:
            print(note if note.startswith("warning: ") else f"note: {note}")
        trained = _find_training_split(options.data, dataset, workdir)
        if trained:
            for warning in splits.warn_of_duplicates(trained, test_splits):
                print(warning)
    unwritten: dict[str, OSError] = {}
    for name, split in test_splits.items():
        reason = foreign[name]
        if reason and hosts.is_first():
            print(f"{name}: foreign evaluation, not the run's own: {reason}")
        for protocol in ("full", "center") if chosen == "both" else (chosen,):
            found = evaluator.predict(restored.variables, split, protocol)
            if not hosts.is_first():
                continue
            scores = evaluator.scores(found, split, protocol)
            said = "foreign, " if reason else ""
            # First: the directory may be read-only or full.
            print(
                f"{name}, {protocol}: {said}{training_log.describe_scores(scores)}",
                flush=True,
            )
            if name == "test" and (warning := accuracy.describe_chance(scores)):
                print(f"warning: {warning}", flush=True)
            rows = results(
                found,
                split,
                class_names=restored.class_names,
                step=step,
                settings=options.digest(),
            )
            line = {"step": step, "epoch": epoch, "split": name, **scores}
            kind = ""
            if reason:
                line[run_directory.FOREIGN] = reason
                kind = f"{scores['data'][:8]}-{scores['settings'][:8]}"
            try:
                run_directory.write_results(workdir, name, protocol, rows, foreign=kind)
                # A line of the training may have these numbers and the attention's.
                known = run_directory.read_lines(workdir / run_directory.METRICS)
                if not any(
                    line.items() <= other.items()
                    and (reason or run_directory.FOREIGN not in other)
                    for other in known
                ):
                    run_directory.append_metrics(workdir, line)
            except OSError as error:
                unwritten[f"{name}, {protocol}"] = error
    if unwritten:
        error = next(iter(unwritten.values()))
        raise ValueError(
            f"the scores of {'; '.join(unwritten)} are printed above but not written "
            f"into {workdir} ({error}): {files.advice(error)}, and evaluate again"
        )


def _find_training_split(
    data: splits.DataOptions, dataset: Dataset, workdir: Path
) -> splits.Split | None:
    """The images that a run was trained on; None if they are not there any more.

    Args:
      data: options of the evaluated dataset.
      dataset: the evaluated dataset.
      workdir: the run directory.
    """
    own = run_options.from_config(run_directory.read_config(workdir)).data
    names = "source", "path", "seed", "val_share", "source_options"
    if any(getattr(own, name) != getattr(data, name) for name in names):
        if not own.path:  # it may be large, or have to be downloaded
            return None
        try:
            dataset = sources.load_dataset(own)
        except ValueError:
            return None
    if not dataset.splits.get("train"):
        return None
    return splits.find_split(own, dataset, "train")


def why_foreign(
    options: RunOptions,
    restored: Restored,
    workdir: Path,
    name: str,
    records: Sequence[Record],
    *,
    allow_data_change: bool = False,
) -> str:
    """How data and settings differ from those of the run; empty if they do not.

    Args:
      options: of the evaluation.
      restored: the checkpoint.
      workdir: the run directory.
      name: of the split.
      records: of the split.
      allow_data_change: whether data that has changed in place is no error.

    Raises:
      ValueError: the config names the data of the run, but this has changed.
    """
    own = run_options.from_config(restored.config)
    asked = describe_differences(own.data_settings(), options.data_settings())
    settings = describe_differences(own.settings(), options.settings())
    listed = list_images(records)
    before, changed = restored.data.get(name), asked
    if before:
        changed = ""
        if digest(listed) != before:
            changed = asked or "the data has changed"
    elif restored.data:  # the run has no such split
        changed = asked or f"the run has no split {name!r}"
    if not changed:
        return settings
    kept = run_directory.read_data(workdir)
    if not asked:
        known = kept.splits if kept else {}
        first = describe_changes(
            {name: known.get(name, ())}, {name: listed} if kept else {name: ()}
        )
        if not allow_data_change:
            raise ValueError(
                f"the {name} data of {workdir} has changed since the training"
                f"{': ' if first else ''}{first}: restore it, or score the data as it "
                "is with --allow_data_change, as a foreign evaluation"
            )
        changed += f" ({first})" if first else ""
    if kept:
        trained = kept.trained()
        count = sum(image.digest in trained for image in listed)
        if count:
            changed += f"; {count} of its {len(listed)} images were trained on"
    return "; ".join(filter(None, (changed, settings)))


def check_classes(here: Sequence[str], there: Sequence[str], fix: str) -> None:
    """Checks that data and checkpoint have the same classes in the same order.

    Args:
      here: class names of the data.
      there: class names of the checkpoint.
      fix: what to do if they differ, for the message.

    Raises:
      ValueError: they differ; names the first difference.
    """
    if tuple(here) == tuple(there):
        return
    if len(here) != len(there):
        difference = f"{len(here)} classes, the checkpoint {len(there)}"
    else:
        mine, theirs = next((a, b) for a, b in zip(here, there, strict=True) if a != b)
        difference = f"class {mine!r} where the checkpoint has {theirs!r}"
    changes = [f"new: {name!r}" for name in here if name not in there][:1]
    changes += [f"missing: {name!r}" for name in there if name not in here][:1]
    named = f" ({', '.join(changes)})" if changes else ""
    raise ValueError(f"the data has {difference}{named}: {fix}")


def same_classes(workdir: Path) -> str:
    """What to do if `check_classes` fails for the data of an evaluation."""
    return (
        f"evaluate {workdir} on the classes that it was trained on (data.source, "
        "data.path)"
    )
