"""A run, a checkpoint or an export -> all that prediction needs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cra_jax import art_module
from cra_jax.backbones import families, weights
from cra_jax.inference.restore import restore, restore_attention
from cra_jax.runtime import run_folder

_LARGEST_PX = 4096  # of what an export may ask for: its description may be a stranger's
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
class Recipe:
    """All that prediction needs of a run or an export.

    Attributes:
      backbone: the plain network.
      variables: its own.
      head: pooled features -> attention; None where there is none.
      class_names: in the order of the scores.
      short_side_px: what a picture's shorter side is resized to.
      crop_px: height and width of what is cut out of its centre.
      mean: of the channels, pictures in 0..1.
      std: of the channels.
      about: where this comes from, in one line.
      batch_size: pictures that are scored at a time, at most.
    """

    backbone: nn.Module
    variables: Any
    head: art_module.AttentionHead | None
    class_names: tuple[str, ...]
    short_side_px: int
    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    about: str
    batch_size: int = 32


def find(path: str | Path, *, checkpoint: str = "latest") -> Recipe:
    """What predicts, of a run folder, one of its checkpoints, or an export.

    Args:
      path: `runs/cub`, `runs/cub/checkpoints/1234` or `runs/cub/export`.
      checkpoint: "latest", "best" or a step, where `path` is a run folder.

    Raises:
      ValueError: it is none of these, or what it holds is damaged.
    """
    folder = home(path)
    if folder != Path(path).expanduser():
        checkpoint = Path(path).name
    if (folder / "checkpoints").is_dir():
        config: Any = ConfigDict(run_folder.read_config(folder))
        config.eval.checkpoint = checkpoint
        return of_run(config, folder)
    if (folder / "model.safetensors").is_file():
        return of_export(folder)
    raise ValueError(
        f"{folder} is neither a run (no checkpoints/ in it) nor an export (no "
        "model.safetensors): name one of those, or a checkpoint in the former"
    )


def home(path: str | Path) -> Path:
    """Where something about `path` is written: itself, or a checkpoint's run folder."""
    folder = Path(path).expanduser()
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        return folder.parent.parent
    return folder


def of_run(config: run_folder.Config, workdir: Path) -> Recipe:
    """What a run has trained; ``eval.checkpoint`` says at which checkpoint.

    Raises:
      ValueError: there is no such checkpoint, or it is of another backbone.
    """
    restored, data = restore(config, workdir), config.data
    return Recipe(
        backbone=restored.backbone,
        variables=restored.variables,
        head=restore_attention(config, workdir),
        class_names=restored.class_names,
        short_side_px=data.short_side_px,
        crop_px=data.crop_px,
        mean=tuple(data.mean),
        std=tuple(data.std),
        about=f"checkpoint {restored.step} (epoch {restored.epoch}) of {workdir}",
        batch_size=config.eval.batch_size,
    )


def of_export(folder: Path) -> Recipe:
    """What `--mode export` wrote: the plain network; it has no attention head.

    Raises:
      ValueError: a file is missing or damaged, or the two do not belong together.
    """
    file = folder / "config.json"
    try:
        about = json.loads(file.read_text())
        arch, width, stem, names, mean, std, short_side_px, crop_px, step = (
            about[key] for key in _EXPORT_KEYS
        )
        class_names = tuple(map(str, names))
        sound = 1 <= crop_px <= short_side_px <= _LARGEST_PX
        normalization = tuple(map(float, mean)), tuple(map(float, std))
        sound = sound and list(map(len, normalization)) == [3, 3] and class_names
        if not sound:
            raise ValueError("sizes, classes or normalisation out of range")
        backbone = families.create_backbone(
            arch, len(class_names), width=width, stem=stem
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} does not describe an export ({error!r}): export the run again"
        ) from error
    variables = weights.load_torch(
        folder / "model.safetensors", arch=arch, num_classes=len(class_names)
    )
    images = jax.ShapeDtypeStruct((1, crop_px, crop_px, 3), jnp.float32)
    wanted = jax.eval_shape(backbone.init, jax.random.key(0), images)
    if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, dict(wanted)):
        raise ValueError(
            f"{folder / 'model.safetensors'} is not the {arch} of width {width} that "
            "config.json beside it describes: export the run again"
        )
    return Recipe(
        backbone=backbone,
        variables=variables,
        head=None,
        class_names=class_names,
        short_side_px=short_side_px,
        crop_px=crop_px,
        mean=normalization[0],
        std=normalization[1],
        about=f"checkpoint {step} of the export {folder}",
    )
