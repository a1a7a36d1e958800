"""Predicts classes and attention of any image.

Prediction is the same as in the evaluation protocol "center": the same decoder, resize,
centre crop and normalisation, and the plain network. If the checkpoint has an attention
head, the attention is predicted too.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from cra_jax import art_module
from cra_jax.backbones import class_activation
from cra_jax.inference import trained
from cra_jax.inference.protocols import make_center_step
from cra_jax.input import batches, center_crop, decoding, decoding_process
from cra_jax.runtime import devices
from cra_jax.runtime.prefetch import prefetch

TOP = 5
"""Number of classes in a prediction."""

Image = str | os.PathLike[str] | bytes | np.ndarray
"""An image: a file, the content of a file, or uint8 `[h, w, 3]`, RGB and upright."""


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """Data for an overlay, in pixels of the resized image.

    Attributes:
      image: uint8 ``[h, w, 3]``, the resized image; the ends of very long images are
        cut off, see `decoding.kept_region`.
      activation: ``[crop, crop]``, class activation map of the best class in the crop.
      crop_box_px: ``(x_min, y_min, x_max, y_max)``, box of the crop.
      attention_px: ``[4, 2]``, corners of the attention, or None.
    """

    image: np.ndarray
    activation: np.ndarray
    crop_box_px: tuple[float, float, float, float]
    attention_px: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one image.

    Pixels are those of the upright image (after its EXIF rotation) in its original
    size, points are ``(x, y)``, and (0, 0) is the top left corner of the image.

    Attributes:
      path: path of the image; "" for bytes or pixels.
      size_px: ``(width, height)`` of the upright image.
      classes: the `TOP` most probable classes (or all, if fewer), best first.
      labels: labels of `classes`.
      probabilities: probabilities of `classes`, by softmax over all classes.
      scores: ``[k]``, scores of all classes before softmax.
      crop_box_px: ``(x_min, y_min, x_max, y_max)``, box of the network's input crop.
      attention_px: ``[4, 2]``, corners of the attention's parallelogram, which may lie
        outside the image; None if the checkpoint has no attention head.
      view: data for an overlay, if requested.
    """

    path: str
    size_px: tuple[int, int]
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    probabilities: tuple[float, ...]
    scores: np.ndarray
    crop_box_px: tuple[float, float, float, float]
    attention_px: np.ndarray | None
    view: View | None = None

    @property
    def attention_box_px(self) -> tuple[float, float, float, float] | None:
        """Axis-aligned bounding box of the attention, clipped to the image."""
        if self.attention_px is None:
            return None
        corners = np.clip(self.attention_px, 0, self.size_px)
        return _box(np.stack([corners.min(0), corners.max(0)]))

    def to_json(self) -> dict[str, Any]:
        """A line of `predictions.jsonl`; probabilities are not rounded."""
        top = zip(self.classes, self.labels, self.probabilities, strict=True)
        line: dict[str, Any] = {
            "path": self.path,
            "width_px": self.size_px[0],
            "height_px": self.size_px[1],
            "top": [
                {"class": name, "label": label, "probability": p}
                for name, label, p in top
            ],
        }
        if self.attention_px is not None:
            box = self.attention_box_px or ()
            line["attention"] = {
                "corners_px": np.round(self.attention_px, 2).tolist(),
                "box_px": np.round(box, 2).tolist(),
            }
        return line


@dataclasses.dataclass(frozen=True)
class _Sample:
    """An image before prediction: its crop, its sizes and the resized image."""

    crop: np.ndarray
    size_px: tuple[int, int]
    resized_px: tuple[int, int]
    resized: np.ndarray | None


class Predictor:
    """Predicts images; compiles at first use, once for each batch size.

    It is not thread-safe.

    Attributes:
      network: the trained network.
    """

    def __init__(self, network: trained.TrainedNetwork):
        self.network = network
        self._step = make_center_step(
            network.backbone, mean=network.mean, std=network.std
        )
        variables = dict(network.variables)
        if network.head:
            variables["head"] = network.head
        # Transferred to the device once, and not with every batch.
        self._variables = jax.tree.map(jnp.asarray, variables)
        self._max_batch = devices.round_up(network.batch_size)

    def __call__(self, image: Image | Sequence[Image]) -> Any:
        """Returns the `Prediction` of an image, or a list for a sequence of images.

        Raises:
          ImageError: an image cannot be read; `each` continues with the others.
        """
        if isinstance(image, (str, os.PathLike, bytes, np.ndarray)):
            return self([image])[0]
        answers = []
        for answer in self.each(image):
            if isinstance(answer, Exception):
                raise answer
            answers.append(answer)
        return answers

    def each(
        self,
        several: Sequence[Image],
        *,
        keep: bool = False,
        workers: int | None = None,
        untrusted: bool = False,
    ) -> Iterator[Prediction | decoding.ImageError]:
        """Yields predictions in order; threads read at most a few batches ahead.

        Args:
          several: the images; the network sees the centre crop of each.
          keep: whether predictions have a `View`.
          workers: number of threads that read; None: one per core.
          untrusted: whether images are decoded in processes of their own, see
            `decoding_process`.

        Yields:
          A `Prediction`, or the error of an unreadable image.

        Raises:
          ValueError: the network's scores are not finite.
        """
        # Powers of two, so that only a few batch sizes are compiled.
        size = devices.round_up(1 << max(len(several) - 1, 0).bit_length())
        size = min(size, self._max_batch)
        workers = workers or os.cpu_count() or 1
        read = prefetch(
            lambda i: self._read(several[i], keep, untrusted),
            0,
            len(several),
            workers=workers,
            depth=2 * size + workers,
        )
        with contextlib.closing(read):
            names = (_name(image) for image in several)
            waiting: list[tuple[str, _Sample | decoding.ImageError]] = []
            for item in zip(names, read, strict=True):
                waiting.append(item)
                if len(waiting) == size:
                    yield from self._answers(waiting, size)
                    waiting = []
            if waiting:
                yield from self._answers(waiting, size)

    def warm_up(self) -> None:
        """Compiles the prediction of single images."""
        side = self.network.crop_px
        self(np.zeros((side, side, 3), np.uint8))

    def _read(
        self, image: Image, keep: bool, untrusted: bool
    ) -> _Sample | decoding.ImageError:
        decode = decoding_process.decode if untrusted else decoding.decode
        try:
            if not isinstance(image, np.ndarray):
                image = decode(image, name=_name(image) or None)
            height, width = image.shape[:2]
            image = decoding.cut_bottom(
                image, self.network.cut_bottom_px, name=_name(image) or "this image"
            )
        except decoding.ImageError as error:
            return error
        resized = decoding.resize_short_side(image, self.network.short_side_px)
        # The same crop as in the evaluation.
        (batch,) = batches.center_batches(
            [resized], [0], batch_size=1, crop_px=self.network.crop_px
        )
        return _Sample(
            batch["image"][0],
            (width, height),
            (resized.shape[1], resized.shape[0]),
            resized if keep else None,
        )

    def _answers(
        self, items: Sequence[tuple[str, _Sample | decoding.ImageError]], size: int
    ) -> Iterator[Prediction | decoding.ImageError]:
        side = self.network.crop_px
        images = np.zeros((size, side, side, 3), np.uint8)
        for row, (_, sample) in enumerate(items):
            if isinstance(sample, _Sample):
                images[row] = sample.crop
        found = self._step(self._variables, {"image": images})
        for row, (name, sample) in enumerate(items):
            if isinstance(sample, _Sample):
                yield self._answer(name, sample, {k: v[row] for k, v in found.items()})
            else:
                yield sample

    def _answer(
        self, name: str, sample: _Sample, found: dict[str, np.ndarray]
    ) -> Prediction:
        scores = found["logits"].astype(np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(
                f"the scores of {self.network.about} are not finite, because it is "
                "damaged or the run diverged: choose another one (eval.checkpoint)"
            )
        probabilities = softmax(scores)
        labels = np.argsort(-scores, kind="stable")[:TOP]
        side = self.network.crop_px
        width, height = sample.size_px
        kept = decoding.kept_region(width, height - self.network.cut_bottom_px)
        kept = np.array(kept)
        outline = np.array([[-0.5, -0.5], [side - 0.5, side - 0.5]])
        matrix = found.get("matrices")
        corners = None if matrix is None else art_module.corners_px(matrix, side)

        def place(points: np.ndarray) -> np.ndarray:
            """Pixels of the crop -> pixels of the image."""
            share = center_crop.in_image(points, sample.resized_px, side)
            return kept[:2] + share * (kept[2:] - kept[:2])

        return Prediction(
            path=name,
            size_px=sample.size_px,
            classes=tuple(self.network.class_names[i] for i in labels),
            labels=tuple(labels.tolist()),
            probabilities=tuple(probabilities[labels].tolist()),
            scores=scores,
            crop_box_px=_box(place(outline)),
            attention_px=None if corners is None else place(corners),
            view=self._view(sample, found["activation"], outline, corners),
        )

    def _view(
        self,
        sample: _Sample,
        cells: np.ndarray,
        outline: np.ndarray,
        corners: np.ndarray | None,
    ) -> View | None:
        if sample.resized is None:
            return None
        side = self.network.crop_px
        shift = center_crop.centre_offset_px(sample.resized_px, side) + 0.5
        places = class_activation.places_px(self.network.backbone, cells.shape, side)
        return View(
            image=sample.resized,
            activation=class_activation.enlarge(cells, *places, side),
            crop_box_px=_box(outline + shift),
            attention_px=None if corners is None else corners + shift,
        )


def _name(image: Image) -> str:
    """Path of an image in predictions; "" for bytes or pixels."""
    return "" if isinstance(image, (bytes, np.ndarray)) else os.fspath(image)


def _box(points: np.ndarray) -> tuple[float, float, float, float]:
    """Two corners ``[2, 2]`` as ``(x_min, y_min, x_max, y_max)``."""
    (x_min, y_min), (x_max, y_max) = points.tolist()
    return x_min, y_min, x_max, y_max
