"""A run -> the paper's figures of it (Fig. 1, 3, 4), its curves and its confusions."""

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
from cra_jax.inference.restore import Restored, restore, restore_attention
from cra_jax.inference.run_options import RunOptions
from cra_jax.input import batches, normalize, splits
from cra_jax.model import KINDS
from cra_jax.reports import confusions, figure_panels, figure_style, training_curves
from cra_jax.runtime import run_directory

_MAPS = 8  # images of Fig. 3
_ATTENDED = 3  # images of Fig. 4
_EPOCHS = 6  # and its columns
_CORRECTIONS = 6
_PAIRS = 6


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure in the report's folder.

    Attributes:
      name: "activation" (Fig. 3), "attention" (Fig. 4), "corrected" (Fig. 1), "curves"
        or "confused"; with "-baseline" where it is the other run's.
      png: its path; beside it is the same as a vector PDF.
      caption: what it shows and how to read it.
    """

    name: str
    png: Path
    caption: str


def run(options: RunOptions, workdir: Path, *, baseline: Path | None = None):
    """As `draw_all`; prints where the figures are and what they show."""
    drawn, notes = draw_all(options, workdir, baseline=baseline)
    for figure in drawn:
        print(f"{figure.png} and .pdf: {figure.caption}")
    for note in notes:
        print(note)


def draw_all(
    options: RunOptions, workdir: Path, *, baseline: Path | None = None
) -> tuple[list[Drawn], list[str]]:
    """Draws what can be drawn of a run; each figure as PNG and as vector PDF.

    Args:
      options: the run's; ``eval.checkpoint`` names the checkpoint.
      workdir: the run directory.
      baseline: folder of a run to compare it with, of the same test images.

    Returns:
      The figures, and for each that is not there, a line that says why.

    Raises:
      ValueError: a run has no checkpoint, or the two do not compare.
    """
    ours = _Run(options, workdir)
    theirs = _Run(_options_of(baseline, like=options), baseline) if baseline else None
    if theirs:
        ours.check_same_images(theirs)
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    drawn, notes = [], []
    for name, draw in _drawings(ours, theirs):
        figure, words = draw()
        if figure is None:
            notes.append(f"no figure of {name}: {words}")
        else:
            drawn.append(Drawn(name, figure_style.save(figure, folder, name), words))
    return drawn, notes


def _options_of(workdir: Path, *, like: RunOptions) -> RunOptions:
    """Another run's options."""
    options = run_options.from_config(run_directory.read_config(workdir))
    chosen = like.evaluation.checkpoint  # a step of one run is none of another
    return options.at_checkpoint(chosen if chosen.isalpha() else "latest")


class _Run:
    """A run, restored, and the test images that it is shown with."""

    def __init__(self, options: RunOptions, workdir: Path):
        self.options = options
        self.workdir = workdir
        self.restored: Restored = restore(options, workdir)
        self.head = restore_attention(options, workdir)
        self.crop_px: int = options.data.crop_px
        self.lines = run_directory.read_metrics(workdir)
        self.kind = KINDS[options.kind]
        dataset = sources.load_dataset(options.data)
        names = self.restored.class_names
        evaluate.check_classes(dataset.class_names, names, workdir)
        self.split = splits.open_split(options.data, dataset, "test")
        self.class_names = dataset.class_names
        self._evaluator = evaluate.Evaluator(self.restored.backbone, options)

    def check_same_images(self, other: "_Run") -> None:
        """Checks that a comparison means something.

        Raises:
          ValueError: the runs were tested on other images, or on other crops of them.
        """
        mine, theirs = (
            (
                run.class_names,
                [record.name for record in run.split.records],
                run.split.labels.tolist(),
                run.crop_px,
                run.options.data.short_side_px,
            )
            for run in (self, other)
        )
        few = self.split.first_of_each_class(
            _MAPS
        )  # drawings of another seed have the same names
        if mine != theirs or (self.images(few) != other.images(few)).any():
            raise ValueError(
                f"{other.workdir} was tested on other images than {self.workdir} "
                f"({len(theirs[1])} of {len(theirs[0])} classes, crop {theirs[3]} of "
                f"{theirs[4]} px; here {len(mine[1])} of {len(mine[0])} classes, crop "
                f"{mine[3]} of {mine[4]} px): name a baseline with the same data.*"
            )

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Centre crops, uint8 ``[n, crop, crop, 3]``."""
        few = self.split.take(indices)
        (batch,) = batches.center_batches(
            few.images, few.labels, batch_size=len(indices), crop_px=self.crop_px
        )
        return batch["image"]

    def answers(self, indices: Sequence[int]) -> list[figure_panels.Answer]:
        """What the network makes of some images."""
        found = self._evaluator.center(
            self.restored.variables, self.split.take(indices)
        )
        assert found.activation is not None
        rows_px, columns_px = class_activation.places_px(
            self.restored.backbone, found.activation.shape[1:], self.crop_px
        )
        return [
            figure_panels.Answer(
                class_activation.enlarge(activation, rows_px, columns_px, self.crop_px),
                self.class_names[scores.argmax()],
                right=bool(scores.argmax() == label),
            )
            for activation, scores, label in zip(
                found.activation, found.logits, found.labels, strict=True
            )
        ]

    def results(self) -> list[run_directory.Result]:
        """Of all test images: as the run directory has them, else predicted now."""
        step = self.restored.step
        try:
            known = run_directory.read_results(self.workdir, "test", "center")
        except ValueError:
            known = []
        names = [record.name for record in self.split.records]
        if [x.name for x in known] == names and known[0].step == step:
            return known
        found = self._evaluator.center(self.restored.variables, self.split)
        return evaluate.results(found, self.split, step=step)

    def snapshots(self) -> dict[int, dict[int, np.ndarray]]:
        """Epoch -> index -> matrix, of the watched test images."""
        found: dict[int, dict[int, np.ndarray]] = collections.defaultdict(dict)
        for line in run_directory.read_snapshots(self.workdir):
            found[line["epoch"]][line["index"]] = np.array(line["matrix"])
        return dict(found)


_Drawing = tuple[Figure | None, str]


def _drawings(ours: _Run, theirs: _Run | None) -> Iterable[tuple[str, Callable]]:
    """The figures' names, and what draws each or says why it cannot."""
    yield "activation", partial(_activation, ours, theirs)
    yield "attention", partial(_attention, ours)
    if theirs and theirs.head:
        yield "attention-baseline", partial(_attention, theirs)
    yield "corrected", partial(_corrected, ours, theirs)
    yield "curves", partial(_curves, ours, theirs)
    yield "confused", partial(_confused, ours)


def _activation(ours: _Run, theirs: _Run | None) -> _Drawing:
    """Fig. 3."""
    chosen = ours.split.first_of_each_class(_MAPS)
    boxes = ours.split.boxes_px(ours.crop_px)
    runs = [theirs, ours] if theirs else [ours]
    names = [run.kind for run in runs if run]
    figure = figure_panels.activation_maps(
        list(ours.images(chosen)),
        [ours.class_names[ours.split.labels[i]] for i in chosen],
        {_name(run, names): run.answers(chosen) for run in runs if run},
        boxes=[boxes.get(i) for i in chosen],
    )
    known = "; dashed: the object's box" if boxes else ""
    return figure, (
        "Class activation maps (Zhou et al., 2016) of the class that each network "
        "predicts, each from 0 (clear) to its own maximum, for the first test image "
        f"of the first {len(chosen)} classes{known}. A tick marks a right answer."
    )


def _name(run: _Run, names: Sequence[str]) -> str:
    """The kind of a run, and its folder where that does not tell two runs apart."""
    return run.kind if len(set(names)) == len(names) else run.workdir.name


def _attention(run: _Run) -> _Drawing:
    """Fig. 4."""
    snapshots = run.snapshots()
    if not run.head:
        return None, f"a {run.kind} has no attention"
    if not snapshots:
        return None, (
            f"{run.workdir} has no snapshots of it; a run with eval.snapshots above 0 "
            "keeps them"
        )
    epochs = _evenly(sorted(snapshots), _EPOCHS)
    watched = [
        i for i in snapshots[epochs[0]] if all(i in snapshots[e] for e in epochs)
    ]
    chosen = watched[:_ATTENDED]
    boxes = run.split.boxes_px(run.crop_px)
    attended = []
    for index, image in zip(chosen, run.images(chosen), strict=True):
        matrices = np.stack([snapshots[epoch][index] for epoch in epochs])
        attended.append(
            figure_panels.Attended(
                image,
                run.class_names[run.split.labels[index]],
                art_module.corners_px(matrices, run.crop_px),
                *_sampled(run.options, image, matrices),
                box=boxes.get(index),
            )
        )
    known = ", dashed the object's box" if boxes else ""
    figure = figure_panels.attention_over_epochs(attended, epochs, title=run.kind)
    return figure, (
        f"What the {run.kind} attends to while it trains. On the test image the "
        f"attention is outlined, a dot at its own top left{known}; below it what the "
        "second stream is shown. Uniform colour lies outside the image or was left "
        "out."
    )


def _sampled(
    options: RunOptions, pixels: np.ndarray, matrices: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Attention and redundancy ``[e, s, s, 3]`` of an image in its own colours."""
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

    def colours(view: jnp.ndarray) -> np.ndarray:
        values = 255 * (np.asarray(view) * np.array(data.std) + np.array(data.mean))
        return np.clip(np.round(values), 0, 255).astype(np.uint8)

    redundancy = None if views.redundancy is None else colours(views.redundancy)
    return colours(views.attention), redundancy


def _corrected(ours: _Run, theirs: _Run | None) -> _Drawing:
    """Fig. 1."""
    if not theirs:
        return None, "there is no run to compare with; name one with --baseline"
    before, after = theirs.results(), ours.results()
    mended, spoilt = (
        confusions.put_right(before, after),
        confusions.put_right(after, before),
    )
    other = partial(confusions.alike, before=before, after=after)
    # Index, another of its class, another of the class that it is taken for.
    trios = [
        (i, other(after[i].label, but=i), other(before[i].predicted, but=i))
        for i in mended
    ]
    shown = [trio for trio in trios if None not in trio]
    if not shown:
        return None, (
            f"there is no test image that {theirs.workdir.name} gets wrong and "
            f"{ours.workdir.name} right"
        )
    chosen, truth, taken = zip(*_evenly(shown, _CORRECTIONS), strict=True)
    maps = [theirs.answers(chosen), ours.answers(chosen)]
    names = [theirs.kind, ours.kind]
    figure = figure_panels.corrections(
        [
            figure_panels.Correction(
                image,
                ours.class_names[after[index].label],
                ours.class_names[before[index].predicted],
                like_truth,
                like_taken,
                (wrong.activation, right.activation),
            )
            for index, image, like_truth, like_taken, wrong, right in zip(
                chosen,
                ours.images(chosen),
                ours.images(truth),
                ours.images(taken),
                *maps,
                strict=True,
            )
        ],
        (_name(theirs, names), _name(ours, names)),
    )
    return figure, (
        f"{len(chosen)} of {len(mended)} test images that {_name(theirs, names)} has "
        f"wrong and {_name(ours, names)} right (the other way round: {len(spoilt)}), "
        "beside other test images of the two classes, and both activation maps."
    )


def _curves(ours: _Run, theirs: _Run | None) -> _Drawing:
    names = [run.kind for run in (ours, theirs) if run]
    if not ours.lines:
        return None, f"{ours.workdir} has no numbers"
    settings = run_directory.read_config(ours.workdir)
    restriction, rate = (
        {name: settings[section][name] for name in ("first_epochs", "period_epochs")}
        for section in ("restriction", "optim")
    )
    if settings["optim"]["schedule"] == "cosine":
        rate["period_epochs"] = 0  # it falls all the time, not at an epoch
    phases = training_curves.phases(
        settings["train"]["epochs"],
        restriction=restriction if ours.options.kind == "cra" else None,
        rate=rate,
        factor=settings["optim"]["factor"],
    )
    figure = training_curves.draw(
        ours.lines,
        phases,
        other=theirs.lines if theirs else (),
        other_name=_name(theirs, names) if theirs else "",
    )
    shaded = ", shaded where L_res is off" if phases.restriction_off else ""
    falls = ", dashed lines where the rate falls" if phases.rate_falls else ""
    return figure, f"Training of the {ours.kind}{shaded}{falls}; tests on centre crops."


def _confused(run: _Run) -> _Drawing:
    pairs = confusions.confused_pairs(run.results(), most=_PAIRS)
    if not pairs:
        return None, "no two classes of the test split are taken for each other"
    images = run.images([i for pair in pairs for i in pair.examples])
    found = [
        figure_panels.Confusion(
            (run.class_names[pair.labels[0]], run.class_names[pair.labels[1]]),
            (left, right),
            pair.wrong,
            pair.count,
        )
        for pair, left, right in zip(pairs, images[::2], images[1::2], strict=True)
    ]
    return figure_panels.confusions(found), (
        f"The {len(found)} pairs of classes that the {run.kind} confuses most often, "
        "each with the test image that it is most sure of and wrong about, where "
        "there is one."
    )


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, the first and the last included."""
    if len(items) <= count:
        return list(items)
    places = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[i] for i in places]
