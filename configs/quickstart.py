"""The embedded birds, from scratch, in minutes on two cores.

    python launch.py
    python launch.py --config configs/quickstart.py:baseline

A small ResNet on few small drawings, 64 of each species, as fine-grained datasets have
few images: the method of `cub.py` in its variant `plus`. Every kind trains for the same
compute, counted in passes over the training images.
"""

from typing import Any

from configs.cub import CHANGES, apply_changes
from configs.cub import get_config as cub
from cra_jax.model import KINDS

PASSES = 160
"""Forward and backward passes over all training images, in images of `crop_px`."""

# Passes in an epoch: N_cls 1; each input of N_ar has a quarter of the pixels; the swap
# of every second image a half.
_PASSES_AN_EPOCH = {"baseline": 1, "stn": 1.25, "cra": 1.5, "plus": 2}


def get_config(variant: str = "") -> Any:
    """A recipe for drawings of 64 px.

    Args:
      variant: as in `cub.py`. Without a kind and without a change it is `plus`; `cra`
        is the paper's CRA-CNN.
    """
    names = variant.split(",")
    if not any(name in KINDS or name in CHANGES for name in names):
        variant = ",".join(filter(None, (variant, "plus")))
    config = cub("resnet10")
    named = cub(variant)  # checks the names, too
    if named.model.backbone != cub().model.backbone:
        config.model.backbone = named.model.backbone
    config.model.kind = named.model.kind
    config.data.source = "synthetic"
    config.data.short_side_px = 72
    config.data.crop_px = 64
    config.data.train_size = 512
    config.data.test_size = 512
    config.model.pretrained = ""
    config.model.width = 16
    config.model.stem = "medium"
    config.art.size_px = 32  # half the crop, as 224 is of 448
    config.train.batch_size = 32
    config.train.log_every_steps = 16
    config.eval.batch_size = 128

    # From scratch: a high rate after a warm-up, and two falls near the end.
    swaps = config.model.kind == "cra" and "plus" in variant.split(",")
    epochs = round(PASSES / _PASSES_AN_EPOCH["plus" if swaps else config.model.kind])
    config.train.epochs = epochs
    config.eval.every_epochs = epochs // 8
    config.optim.base_lr = 0.05
    config.optim.warmup_epochs = 1
    for phases in (config.optim, config.restriction):
        phases.first_epochs = round(0.7 * epochs)
        phases.period_epochs = round(0.2 * epochs)
    apply_changes(config, variant)
    return config
