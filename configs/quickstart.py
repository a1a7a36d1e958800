"""The embedded birds, from scratch, in minutes on two cores.

    python launch.py
    python launch.py --config configs/quickstart.py:baseline

A small ResNet on small drawings; the method is the one of `cub.py`, its phases scaled
down to fit.
"""

from typing import Any

from configs.cub import apply_changes
from configs.cub import get_config as cub


def get_config(variant: str = "") -> Any:
    """A recipe for drawings of 64 px; variants as in `cub.py`."""
    config = cub("resnet10")
    config.data.source = "synthetic"
    config.data.short_side_px = 72
    config.data.crop_px = 64
    config.data.train_size = 2048
    config.data.test_size = 512
    config.model.pretrained = ""
    config.model.width = 16
    config.model.stem = "medium"
    config.art.size_px = 32  # half the crop, as 224 is of 448

    # From scratch: a high rate after a warm-up, and two falls near the end.
    config.optim.base_lr = 0.05
    config.optim.warmup_epochs = 1
    config.optim.first_epochs = 12
    config.optim.period_epochs = 3
    config.restriction.first_epochs = 12
    config.restriction.period_epochs = 3

    config.train.epochs = 18
    config.train.log_every_steps = 8
    config.eval.batch_size = 128
    config.eval.every_epochs = 3
    named = cub(variant)  # checks the names, too
    if named.model.backbone != cub().model.backbone:
        config.model.backbone = named.model.backbone
    config.model.kind = named.model.kind
    apply_changes(config, variant)
    return config
