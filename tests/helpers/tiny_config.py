"""The config of a very small run: drawings of 32 px, a ResNet of width 8."""

from pathlib import Path
from typing import Any

from configs.quickstart import get_config
from cra_jax.runtime.run_directory import flatten


def config(cache_dir: Path, **changes: Any) -> Any:
    """Returns a config that trains in seconds; `changes` as {"train.epochs": 3}."""
    tiny = get_config("cra")
    tiny.update_from_flattened_dict(
        {
            "data.short_side_px": 36,
            "data.crop_px": 32,
            "data.train_size": 96,
            "data.test_size": 40,
            "data.cache_dir": str(cache_dir),
            "model.width": 8,
            "art.size_px": 16,
            "optim.warmup_epochs": 0,
            "train.batch_size": 16,
            "train.epochs": 2,
            "train.log_every_steps": 4,
            "train.report": False,
            "eval.batch_size": 16,
            "eval.every_epochs": 1,
            **changes,
        }
    )
    return tiny


def flags(**changes: Any) -> list[str]:
    """The tiny config as flags over the quickstart's; its image cache stays there."""
    tiny, plain = (
        flatten(x.to_dict()) for x in (config(Path("cache"), **changes), get_config())
    )
    return [
        f"--config.{key}={value}"
        for key, value in tiny.items()
        if plain[key] != value and key != "data.cache_dir"
    ]
