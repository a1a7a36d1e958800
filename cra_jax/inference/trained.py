"""Loads trained networks from runs, checkpoints and exports."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from cra_jax.art_module import TrainedHead
from cra_jax.backbones import families, weights
from cra_jax.datasets import sources
from cra_jax.inference import run_options
from cra_jax.inference.run_options import RunOptions
from cra_jax.runtime import files

_LARGEST_PX = 4096  # limit of sizes in an export, whose config.json may be untrusted
_EXPORT_KEYS = (
    "architecture",
    "width",
    "stem",
    "class_names",
    "mean",
    "std",
    "resize_short_side_px",
    "crop_px",
    "checkpoint_step",
)


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """A trained network with everything that prediction needs.

    Attributes:
      backbone: the plain network.
      variables: its variables.
      head: features -> attention; None without attention.
      class_names: class names in the order of the scores.
      short_side_px: size of the shorter side of resized images.
      crop_px: height and width of the centre crop.
      mean: mean of the channels of images in 0..1.
      std: standard deviation of the channels.
      about: its origin, in one line.
      batch_size: largest number of images in a batch.
      cut_bottom_px: rows at the bottom of every image that are cropped, as in training.
    """

    backbone: nn.Module
    variables: Any
    head: TrainedHead | None
    class_names: tuple[str, ...]
    short_side_px: int
    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    about: str
    batch_size: int = 32
    cut_bottom_px: int = 0


class Place(NamedTuple):
    """Location of trained weights.

    Attributes:
      folder: the directory of the run or of the export.
      is_run: whether it is a run; otherwise it is an export.
      checkpoint: the step if the path names a checkpoint; else empty.
    """

    folder: Path
    is_run: bool
    checkpoint: str


def locate(path: str | Path) -> Place:
    """Determines whether a path is a run directory, a checkpoint or an export.

    Args:
      path: `runs/cub`, `runs/cub/checkpoints/1234` or `runs/cub/export`.

    Raises:
      ValueError: it is none of these.
    """
    given, folder = Path(path).expanduser(), output_directory(path)
    if (folder / "checkpoints").is_dir():
        return Place(folder, True, given.name if folder != given else "")
    if (folder / "model.safetensors").is_file():
        return Place(folder, False, "")
    raise ValueError(
        f"{folder} is neither a run (no checkpoints/ in it) nor an export (no "
        "model.safetensors): name one of those, or a checkpoint in the former"
    )


def output_directory(path: str | Path) -> Path:
    """The directory for output about `path`: itself, or the run of a checkpoint."""
    folder = Path(path).expanduser()
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        return folder.parent.parent
    return folder


def load_network(path: str | Path, *, checkpoint: str = "latest") -> TrainedNetwork:
    """Loads the network of a run directory, a checkpoint or an export.

    Args:
      path: as for `locate`.
      checkpoint: "latest", "best" or a step, if `path` is a run directory.

    Raises:
      ValueError: the path is none of these, or its files are damaged.
    """
    place = locate(path)
    if not place.is_run:
        return of_export(place.folder)
    options = run_options.options_of_run(place.folder)
    options = options.at_checkpoint(place.checkpoint or checkpoint)
    return of_run(options, place.folder)


def of_run(options: RunOptions, workdir: Path) -> TrainedNetwork:
    """Loads the network of a run; ``eval.checkpoint`` names the checkpoint.

    Raises:
      ValueError: there is no such checkpoint, or it is of another backbone.
    """
    # Here, because exports need no orbax.
    from cra_jax.inference.restore import restore

    restored, data = restore(options, workdir, attention=True), options.data
    return TrainedNetwork(
        backbone=restored.backbone,
        variables=restored.variables,
        head=restored.head,
        class_names=restored.class_names,
        short_side_px=data.short_side_px,
        crop_px=data.crop_px,
        mean=data.mean,
        std=data.std,
        about=f"checkpoint {restored.step} (epoch {restored.epoch}) of {workdir}",
        batch_size=options.evaluation.batch_size,
        cut_bottom_px=sources.cut_bottom_px(data.source),
    )


def of_export(folder: Path) -> TrainedNetwork:
    """Loads the plain network of an export, which has no attention head.

    Raises:
      ValueError: a file is missing or damaged, or weights and `config.json` do not
        match.
    """
    file = folder / "config.json"
    try:
        about = json.loads(file.read_bytes())
        arch, width, stem, names, mean, std, short_side_px, crop_px, step = (
            about[key] for key in _EXPORT_KEYS
        )
        cut_px = about.setdefault("cut_bottom_px", 0)  # exports of before have none
        for key, is_sound in {
            "architecture": type(arch) is str,
            "width": type(width) is int and 1 <= width <= _LARGEST_PX,
            "stem": type(stem) is str,
            "class_names": type(names) is list
            and names
            and all(type(name) is str for name in names),
            "mean": _are_channels(mean),
            "std": _are_channels(std) and min(std) > 0,
            "cut_bottom_px": type(cut_px) is int and 0 <= cut_px <= _LARGEST_PX,
            "resize_short_side_px": type(short_side_px) is int
            and 1 <= short_side_px <= _LARGEST_PX,
            "crop_px": type(crop_px) is int and 1 <= crop_px <= short_side_px,
            "checkpoint_step": type(step) is int,
        }.items():
            if not is_sound:
                raise ValueError(f"{key}={str(about[key])[:80]} is not valid")
        class_names = tuple(names)
        backbone = families.create_backbone(
            arch, len(class_names), width=width, stem=stem
        )
        sha256 = about.get("sha256", {}).get("model.safetensors")
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        *(ArithmeticError, RecursionError),
    ) as error:
        raise ValueError(
            f"{file} does not describe an export ({error!r}): export the run again"
        ) from error
    weight_file = folder / "model.safetensors"
    if sha256 and files.sha256(weight_file) != sha256:
        raise ValueError(
            f"{weight_file} is not the file that config.json next to it describes "
            "(sha256): export the run again"
        )
    variables = weights.load_torch(weight_file, arch=arch, num_classes=len(class_names))
    wanted = families.variable_shapes(backbone, crop_px)
    if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, wanted):
        raise ValueError(
            f"{weight_file} is not the {arch} of width {width} that "
            "config.json next to it describes: export the run again"
        )
    return TrainedNetwork(
        backbone=backbone,
        variables=variables,
        head=None,
        class_names=class_names,
        short_side_px=short_side_px,
        crop_px=crop_px,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        about=f"checkpoint {step} of the export {folder}",
        cut_bottom_px=cut_px,
    )


def _are_channels(values: Any) -> bool:
    """Whether a value is three finite numbers."""
    return (
        type(values) is list
        and len(values) == 3
        and all(type(x) in (int, float) and math.isfinite(x) for x in values)
    )
