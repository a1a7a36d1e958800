"""Figures of a run: the paper's (Fig. 1, 3, 4), training curves, confused classes."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from cra_jax import art_module
from cra_jax.backbones import class_activation
from cra_jax.datasets import sources
from cra_jax.inference import evaluate, run_options
from cra_jax.inference.restore import Restored, restore
from cra_jax.inference.run_options import RunOptions
from cra_jax.input import batches, normalize, splits
from cra_jax.model import KINDS
from cra_jax.reports import (
    confusions,
    figure_panels,
    figure_style,
    run_summary,
    training_curves,
)
from cra_jax.runtime import run_directory

_CAM_IMAGES = 8  # Fig. 3
_ATTENTION_IMAGES = 3  # Fig. 4
_ATTENTION_EPOCHS = 6  # Fig. 4
_CORRECTIONS = 6  # Fig. 1
_CONFUSED_PAIRS = 6


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure in the `report` directory of a run.

    Attributes:
      name: "activation" (Fig. 3), "attention" (Fig. 4), "corrected" (Fig. 1), "curves"
        or "confused"; with the suffix "-baseline" if it shows the baseline run.
      png: path of the PNG file; a vector PDF with the same name is in the same
        directory.
      caption: explains the figure.
    """

    name: str
    png: Path
    caption: str


def run(options: RunOptions, workdir: Path, *, baseline: Path | None = None) -> None:
    """Draws all figures of a run; prints their paths and captions.

    Args:
      options: as for `draw_all`.
      workdir: as for `draw_all`.
      baseline: as for `draw_all`.

    Raises:
      ValueError: as for `draw_all`.
    """
    drawn, notes = draw_all(options, workdir, baseline=baseline)
    for figure in drawn:
        print(f"{figure.png} and .pdf: {figure.caption}")
    for note in notes:
        print(note)


def draw_all(
    options: RunOptions, workdir: Path, *, baseline: Path | None = None
) -> tuple[list[Drawn], list[str]]:
    """Draws all figures that a run has data for, as PNG and as vector PDF.

    Args:
      options: of the run; ``eval.checkpoint`` selects the checkpoint.
      workdir: the run directory.
      baseline: run directory of a baseline that has the same test images.

    Returns:
      The figures, the notes of loading the dataset, and a sentence for each figure that
      is missing.

    Raises:
      ValueError: a run has no checkpoint, or the two runs have different test images.
    """
    ours = _Run(options, workdir)
    theirs = None
    if baseline:
        theirs = _Run(_baseline_options(baseline, options), baseline)
    if theirs:
        ours.check_same_images(theirs)
    directory = workdir / "report"
    directory.mkdir(exist_ok=True)
    drawn, notes = [], list(ours.notes)
    for name, draw in _drawings(ours, theirs):
        figure, text = draw()
        if figure is None:
            notes.append(f'Figure "{name}" is missing: {text}.')
        else:
            if ours.foreign and name != "curves":
                text += f" Foreign evaluation, not of the run's own: {ours.foreign}."
            png = figure_style.save_figure(figure, directory, name)
            drawn.append(Drawn(name, png, text))
    return drawn, notes


def _baseline_options(workdir: Path, options: RunOptions) -> RunOptions:
    """Options of the baseline run, with the same checkpoint choice ("latest", "best").

    If `options` selects a checkpoint by its step, the latest one of the baseline is
    selected, because the baseline may not have that step.
    """
    checkpoint = options.evaluation.checkpoint
    return run_options.options_of_run(workdir).at_checkpoint(
        checkpoint if checkpoint.isalpha() else "latest"
    )


class _Run:
    """A restored run and its test split."""

    def __init__(self, options: RunOptions, workdir: Path):
        self.options = options
        self.workdir = workdir
        self.restored: Restored = restore(options, workdir, attention=True)
        self.head = self.restored.head
        self.crop_px: int = options.data.crop_px
        self.lines = run_directory.read_metrics(workdir)
        self.network_name = KINDS[options.kind]
        names = self.restored.class_names
        dataset = sources.load_dataset(options.data, needs_train=False)
        dataset = sources.with_classes(dataset, names)
        evaluate.check_classes(
            dataset.class_names, names, evaluate.same_classes(workdir)
        )
        self.notes = dataset.notes
        # How these images or settings differ from those of the run; empty: not at all.
        self.foreign = evaluate.why_foreign(
            options, self.restored, workdir, "test", dataset.splits["test"]
        )
        self.split = splits.open_split(options.data, dataset, "test")
        self.class_names = dataset.class_names
        self._evaluator = evaluate.Evaluator(self.restored.backbone, options)

    def check_same_images(self, other: "_Run") -> None:
        """Checks that two runs have the same test images and crops.

        Raises:
          ValueError: the test images, their labels or their crops differ.
        """
        mine, theirs = (
            (
                run.class_names,
                [record.digest for record in run.split.records],
                run.split.labels.tolist(),
                run.crop_px,
                run.options.data.short_side_px,
            )
            for run in (self, other)
        )
        if mine != theirs:
            raise ValueError(
                f"the test images of {other.workdir} ({len(theirs[1])} images of "
                f"{len(theirs[0])} classes, crop {theirs[3]} of {theirs[4]} px) differ "
                f"from those of {self.workdir} ({len(mine[1])} images of "
                f"{len(mine[0])} classes, crop {mine[3]} of {mine[4]} px): give a "
                "baseline with the same config keys data.*"
            )

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Centre crops, uint8 ``[n, crop, crop, 3]``."""
        few = self.split.take(indices)
        (batch,) = batches.center_batches(
            few.images, few.labels, batch_size=len(indices), crop_px=self.crop_px
        )
        return batch["image"]

    def predictions(self, indices: Sequence[int]) -> list[figure_panels.Prediction]:
        """Predictions and class activation maps of some test images."""
        outputs = self._evaluator.center(
            self.restored.variables, self.split.take(indices)
        )
        assert outputs.activation is not None
        rows_px, columns_px = class_activation.places_px(
            self.restored.backbone, outputs.activation.shape[1:], self.crop_px
        )
        return [
            figure_panels.Prediction(
                class_activation.enlarge(activation, rows_px, columns_px, self.crop_px),
                self.class_names[scores.argmax()],
                correct=bool(scores.argmax() == label),
            )
            for activation, scores, label in zip(
                outputs.activation, outputs.logits, outputs.labels, strict=True
            )
        ]

    def results(self) -> list[run_directory.Result]:
        """Results of all test images, from the run directory or computed now."""
        step = self.restored.step
        try:
            saved = run_directory.read_results(self.workdir, "test", "center")
        except ValueError:
            saved = []
        settings = self.options.digest()
        images = [(record.name, record.digest) for record in self.split.records]
        same = [(x.name, x.digest) for x in saved] == images
        if same and (saved[0].step, saved[0].settings) == (step, settings):
            return saved
        outputs = self._evaluator.center(self.restored.variables, self.split)
        return evaluate.results(
            outputs,
            self.split,
            class_names=self.class_names,
            step=step,
            settings=settings,
        )

    def snapshots(self) -> dict[int, dict[int, np.ndarray]]:
        """Epoch -> index of a test image -> matrix of its attention."""
        snapshots: dict[int, dict[int, np.ndarray]] = collections.defaultdict(dict)
        for line in run_directory.read_snapshots(self.workdir):
            snapshots[line["epoch"]][line["index"]] = np.array(line["matrix"])
        return dict(snapshots)


_Drawing = tuple[Figure | None, str]


def _drawings(ours: _Run, theirs: _Run | None) -> Iterable[tuple[str, Callable]]:
    """Name of each figure, and a function that draws it or explains why it cannot."""
    yield "activation", partial(_draw_cams, ours, theirs)
    yield "attention", partial(_draw_attention, ours)
    if theirs and theirs.head:
        yield "attention-baseline", partial(_draw_attention, theirs)
    yield "corrected", partial(_draw_corrections, ours, theirs)
    yield "curves", partial(_draw_curves, ours, theirs)
    yield "confused", partial(_draw_confusions, ours)


def _draw_cams(ours: _Run, theirs: _Run | None) -> _Drawing:
    """Fig. 3."""
    chosen = ours.split.first_of_each_class(_CAM_IMAGES)
    boxes = ours.split.boxes_px(ours.crop_px)
    runs = [theirs, ours] if theirs else [ours]
    figure = figure_panels.draw_cams(
        list(ours.images(chosen)),
        [ours.class_names[ours.split.labels[i]] for i in chosen],
        {_name(run, runs): run.predictions(chosen) for run in runs},
        boxes=[boxes.get(i) for i in chosen],
    )
    dashed = " The dashed box is the box of the object." if boxes else ""
    return figure, (
        "Class activation maps (CAM; Zhou et al., 2016) of the class that each network "
        f"predicts, for the first test image of the first {len(chosen)} classes. Each "
        "map is scaled to its own maximum; activations of 0 and less are transparent."
        f"{dashed} A tick marks a correct prediction."
    )


def _name(run: _Run, runs: Sequence[_Run]) -> str:
    """Printed name of a run's network; its directory name if two have the same."""
    names = [x.network_name for x in runs]
    return run.workdir.name if len(set(names)) < len(names) else run.network_name


def _draw_attention(run: _Run) -> _Drawing:
    """Fig. 4."""
    snapshots = run.snapshots()
    if not run.head:
        return None, f"the {run.network_name} has no attention"
    if not snapshots:
        return None, (
            f"{run.workdir} has no snapshots of the attention; train with "
            "eval.snapshots above 0 to save them"
        )
    epochs = _evenly_spaced(sorted(snapshots), _ATTENTION_EPOCHS)
    complete = [
        i for i in snapshots[epochs[0]] if all(i in snapshots[e] for e in epochs)
    ]
    chosen = complete[:_ATTENTION_IMAGES]
    boxes = run.split.boxes_px(run.crop_px)
    histories = []
    for index, image in zip(chosen, run.images(chosen), strict=True):
        matrices = np.stack([snapshots[epoch][index] for epoch in epochs])
        histories.append(
            figure_panels.AttentionHistory(
                image,
                run.class_names[run.split.labels[index]],
                art_module.corners_px(matrices, run.crop_px),
                *_sample(run.options, image, matrices),
                box=boxes.get(index),
            )
        )
    figure = figure_panels.draw_attention_by_epoch(
        histories, epochs, title=run.network_name
    )
    inputs, removed = "attention", ""
    if histories[0].redundancy is not None:
        inputs, removed = "attention and redundancy", " or removed from it"
    dashed = " The dashed box is the box of the object." if boxes else ""
    return figure, (
        f"Attention of the {run.network_name} at several epochs. The orange outline on "
        f"each test image is the attention; the dot marks its top left corner.{dashed} "
        f"The rows below show the input of the second stream: {inputs}. Areas of "
        f"uniform colour are outside the image{removed}."
    )


def _sample(
    options: RunOptions, pixels: np.ndarray, matrices: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Attention and redundancy of an image at each epoch: uint8 ``[e, s, s, 3]``."""
    data = options.data
    image = normalize.normalize(jnp.asarray(pixels)[None], mean=data.mean, std=data.std)
    gamma_res = None
    if options.kind == "cra":
        gamma_res = jnp.asarray(art_module.gamma_of(matrices), jnp.float32)
    matrix = jnp.asarray(matrices, jnp.float32)
    views = art_module.views(
        jnp.tile(image, (len(matrices), 1, 1, 1)),
        art_module.Attention(matrix, gamma_res, matrix),
        options.art,
    )

    def denormalize(view: jnp.ndarray) -> np.ndarray:
        values = 255 * (np.asarray(view) * np.array(data.std) + np.array(data.mean))
        return np.clip(np.round(values), 0, 255).astype(np.uint8)

    redundancy = None if views.redundancy is None else denormalize(views.redundancy)
    return denormalize(views.attention), redundancy


def _draw_corrections(ours: _Run, theirs: _Run | None) -> _Drawing:
    """Fig. 1."""
    if not theirs:
        return None, "it needs a second run; give one with --baseline"
    before, after = theirs.results(), ours.results()
    corrected = confusions.corrected_images(before, after)
    worsened = confusions.corrected_images(after, before)
    another = partial(confusions.another_image, before=before, after=after)
    # An image, another image of its class, an image of the class predicted before.
    trios = [
        (i, another(after[i].label, exclude=i), another(before[i].predicted, exclude=i))
        for i in corrected
    ]
    shown = [trio for trio in trios if None not in trio]
    if not shown:
        return None, (
            f"there is no test image that {theirs.workdir.name} misclassifies and "
            f"{ours.workdir.name} classifies correctly"
        )
    chosen, of_true_class, of_wrong_class = zip(
        *_evenly_spaced(shown, _CORRECTIONS), strict=True
    )
    first, second = (_name(run, (theirs, ours)) for run in (theirs, ours))
    columns = (
        ours.images(chosen),
        ours.images(of_true_class),
        ours.images(of_wrong_class),
        [prediction.cam for prediction in theirs.predictions(chosen)],
        [prediction.cam for prediction in ours.predictions(chosen)],
    )
    rows = [
        figure_panels.Correction(
            image,
            ours.class_names[after[index].label],
            ours.class_names[before[index].predicted],
            true_class_image,
            wrong_class_image,
            (cams[0], cams[1]),
        )
        for index, image, true_class_image, wrong_class_image, *cams in zip(
            chosen, *columns, strict=True
        )
    ]
    figure = figure_panels.draw_corrections(rows, (first, second))
    return figure, (
        f"Test images that {first} misclassifies and {second} classifies correctly: "
        f"{len(chosen)} of {len(corrected)}. The reverse holds for {len(worsened)} "
        "test images. Each test image is between examples of the two predicted "
        "classes. Each class activation map (CAM) is that of the class that the "
        "network predicts."
    )


def _draw_curves(ours: _Run, theirs: _Run | None) -> _Drawing:
    """Training curves."""
    if not ours.lines:
        return None, f"{ours.workdir} has no metrics"
    config = run_summary.read_config(ours.workdir)
    restriction, rate = (
        {name: config[section][name] for name in ("first_epochs", "period_epochs")}
        for section in ("restriction", "optim")
    )
    if config["optim"]["schedule"] == "cosine":
        rate["period_epochs"] = 0  # no drops: it decreases in every step
    phases = training_curves.compute_phases(
        config["train"]["epochs"],
        restriction=restriction if ours.options.kind == "cra" else None,
        rate=rate,
        factor=config["optim"]["factor"],
    )
    figure = training_curves.draw_training_curves(
        ours.lines,
        phases,
        other=theirs.lines if theirs else (),
        other_name=_name(theirs, (ours, theirs)) if theirs else "",
    )
    caption = (
        f"Accuracy and losses of the {ours.network_name} during training. Test splits "
        "are evaluated on centre crops."
    )
    if phases.restriction_off:
        caption += " L_res is off in the shaded epochs."
    if phases.rate_drops:
        caption += " The learning rate drops at the dashed lines."
    return figure, caption


def _draw_confusions(run: _Run) -> _Drawing:
    """Confused pairs of classes."""
    pairs = confusions.most_confused_pairs(run.results(), max_pairs=_CONFUSED_PAIRS)
    if not pairs:
        return None, "the network confuses no two classes of the test split"
    images = run.images([i for pair in pairs for i in pair.examples])
    confused = [
        figure_panels.Confusion(
            (run.class_names[pair.labels[0]], run.class_names[pair.labels[1]]),
            (left, right),
            pair.confused,
            pair.counts,
        )
        for pair, left, right in zip(pairs, images[::2], images[1::2], strict=True)
    ]
    pair_text = "pair" if len(confused) == 1 else f"{len(confused)} pairs"
    return figure_panels.draw_confusions(confused), (
        f"The {pair_text} of classes that the {run.network_name} confuses most often. "
        "Each class is shown by the test image that the network predicts as the other "
        "class with the highest confidence, or by its first test image if the network "
        "predicts none of them as the other class."
    )


def _evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    indices = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[i] for i in indices]
