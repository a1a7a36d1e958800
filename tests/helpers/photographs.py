"""Real photographs, exports, and independent preprocessing of photographs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cra_jax.inference import export, run_options
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build

SPECIES = 10


def paths(shared_data: Path, count: int) -> list[Path]:
    """Returns paths of bird photographs, in turn from each species."""
    folder = shared_data / "cub_10" / "CUB_200_2011" / "images"
    species = sorted(path for path in folder.iterdir() if path.is_dir())
    assert len(species) == SPECIES
    by_species = [sorted(folder.glob("*.jpg")) for folder in species]
    return [by_species[i % SPECIES][i // SPECIES] for i in range(count)]


def crop(path: Path, about: dict[str, Any]) -> np.ndarray:
    """Returns the crop `[crop_px, crop_px, 3]` described by an export's config.json.

    Uses only Pillow and NumPy, not this package.
    """
    assert about["interpolation"] == "bicubic, antialiased"
    assert about["crop"] == "centre, from (side - crop_px) // 2"
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    short, side = about["resize_short_side_px"], about["crop_px"]
    scale = short / min(image.size)
    width, height = (round(n * scale) for n in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(image)[top : top + side, left : left + side]


def normalize(crops: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """Returns the crops as float32 `[b, 3, h, w]`, for networks in torch."""
    normal = (crops / 255 - about["mean"]) / np.array(about["std"])
    return normal.transpose(0, 3, 1, 2).astype(np.float32)


def export_run(config: Any, variables: Any, workdir: Path) -> dict[str, Any]:
    """Exports a CRA-CNN whose streams have these variables.

    Returns:
      The content of `export/config.json`.
    """
    network = build.build_network(config, SPECIES)
    assert network.regularization_stream is not None
    saved = {
        collection: {"classification_stream": tree, "regularization_stream": tree}
        for collection, tree in variables.items()
    }
    names = [f"species {i}" for i in range(SPECIES)]
    meta = {"class_names": names, "epoch": 1, "config": config.to_dict()}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, saved, meta)
    export.run(run_options.from_config(config), workdir)
    return json.loads((workdir / "export" / "config.json").read_text())
