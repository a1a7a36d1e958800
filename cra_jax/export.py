"""The trained network for others: torchvision's weights and what goes with them."""

import json
from pathlib import Path

from cra_jax import experiment, run_folder, weights
from cra_jax.restore import restore


def run(config: experiment.Config, workdir: Path) -> None:
    """Writes `export/model.safetensors` and `export/config.json` of a run.

    The weights have torchvision's names and load strictly into its ResNet. The
    regularization stream and the attention head are nowhere in them.

    Args:
      config: the run's own; ``eval.checkpoint`` says which checkpoint.
      workdir: the run folder.

    Raises:
      ValueError: there is no such checkpoint, or it is of another backbone.
    """
    restored = restore(config, workdir)
    folder = workdir / "export"
    folder.mkdir(exist_ok=True)
    weights.save_torch(folder / "model.safetensors", restored.variables)
    data, model = config.data, config.model
    description = {
        "architecture": model.backbone,
        "width": model.width,
        "stem": model.stem,
        "num_classes": len(restored.class_names),
        "class_names": list(restored.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "resize_short_side_px": data.short_side_px,
        "interpolation": "bicubic, antialiased",
        "crop_px": data.crop_px,
        "checkpoint_step": restored.step,
        "epoch": restored.epoch,
    }
    run_folder.write_atomically(
        folder / "config.json", json.dumps(description, indent=2) + "\n"
    )
    print(f"checkpoint {restored.step} (epoch {restored.epoch}) of {workdir}")
    print(f"exported to {folder}: model.safetensors, config.json")
