"""What is wrong with a config, found before any work is done."""

from typing import Any

from cra_jax import schedule
from cra_jax.backbones import families
from cra_jax.runtime import devices
from cra_jax.runtime.run_folder import Config
from cra_jax.training import build, pretrained


def check(config: Config) -> None:
    """Finds what is wrong with a config before any work is done.

    Raises:
      ValueError: with the key, its value, and what to set it to.
    """
    check_settings(config)
    # What only the rooms themselves know to be wrong.
    families.backbone(config, num_classes=1)
    build.build_training(config, 1, steps_per_epoch=1)


PROTOCOLS = ("center", "full", "both")


def check_settings(config: Any) -> None:
    """Checks the settings that no other room checks when it is given them.

    Args:
      config: see `configs/`.

    Raises:
      ValueError: with the key, its value, and what to set it to.
    """
    data, train, evaluation = config.data, config.train, config.eval
    contrasts = config.model.kind == "cra" and config.loss.cntr > 0
    if train.steps_per_dispatch < 1:
        raise ValueError(
            f"train.steps_per_dispatch={train.steps_per_dispatch} must be 1 or more"
        )
    if train.accumulate < 1:
        raise ValueError(f"train.accumulate={train.accumulate} must be 1 or more")
    devices.check_divides(
        train.batch_size,
        setting="train.batch_size",
        least=2 if contrasts else 1,
        parts=train.accumulate,
        parts_setting="train.accumulate",
    )
    if data.crop_px > data.short_side_px:
        raise ValueError(
            f"data.crop_px={data.crop_px} does not fit into pictures whose shorter "
            f"side is data.short_side_px={data.short_side_px}: raise the latter"
        )
    if data.on_device and not data.prepare:
        raise ValueError(
            "data.on_device=True keeps prepared pictures in device memory: set "
            "data.prepare=True, or data.on_device=False"
        )
    if evaluation.protocol not in PROTOCOLS:
        raise ValueError(
            f"unknown eval.protocol {evaluation.protocol!r}; choose from "
            f"{', '.join(PROTOCOLS)}"
        )
    at_least_one = {
        "train.epochs": train.epochs,
        "train.log_every_steps": train.log_every_steps,
        "checkpoint.every_epochs": config.checkpoint.every_epochs,
        "checkpoint.keep_latest": config.checkpoint.keep_latest,
        "eval.every_epochs": evaluation.every_epochs,
        "eval.batch_size": evaluation.batch_size,
        "data.workers": data.workers,
        "data.prefetch_batches": data.prefetch_batches,
    }
    share = train.batch_size // (devices.device_count() * train.accumulate)
    if config.bn.group_size > 0 and share % config.bn.group_size:
        raise ValueError(
            f"bn.group_size={config.bn.group_size} does not divide the {share} "
            "pictures that a device has at a time (train.batch_size by devices and "
            "train.accumulate): set it to a divisor of them, or to 0"
        )
    for key, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{key}={value} must be 1 or more")
    at_least_none = {
        "eval.snapshots": evaluation.snapshots,
        "train.skip_bad_steps": train.skip_bad_steps,
        "optim.freeze_first_epochs": config.optim.freeze_first_epochs,
        "optim.freeze_period_epochs": config.optim.freeze_period_epochs,
    }
    for key, value in at_least_none.items():
        if value < 0:
            raise ValueError(f"{key}={value} must be 0 or more")
    options = config.optim
    if options.schedule not in schedule.KINDS:
        raise ValueError(
            f"unknown optim.schedule {options.schedule!r}; choose from "
            f"{', '.join(schedule.KINDS)}"
        )
    if options.schedule == "cosine" and options.warmup_epochs >= train.epochs:
        raise ValueError(
            f"optim.warmup_epochs={options.warmup_epochs} leaves nothing of "
            f"train.epochs={train.epochs} for optim.schedule='cosine' to fall in: "
            "make the former smaller"
        )
    turns = options.freeze_first_epochs, options.freeze_period_epochs
    if bool(turns[0]) != bool(turns[1]):
        raise ValueError(
            f"optim.freeze_first_epochs={turns[0]} and optim.freeze_period_epochs="
            f"{turns[1]} go together: both above 0, or both 0"
        )
    if turns[1] and config.model.kind == "baseline":
        raise ValueError(
            f"optim.freeze_period_epochs={turns[1]} holds N_cls so that the other "
            "stream trains alone, and model.kind='baseline' has no other: set both "
            "optim.freeze_first_epochs and optim.freeze_period_epochs to 0"
        )
    if not 0 <= options.ema_decay < 1:
        raise ValueError(
            f"optim.ema_decay={options.ema_decay} must be in [0, 1): 0.999 is usual, 0 "
            "takes no average"
        )
    known = pretrained.normalization(config.model.pretrained)
    if known and (tuple(data.mean), tuple(data.std)) != known:
        raise ValueError(
            f"model.pretrained={config.model.pretrained!r} was trained on pictures "
            f"normalised by mean {known[0]} and std {known[1]}, but data.mean is "
            f"{tuple(data.mean)} and data.std {tuple(data.std)}: set them to the former"
        )
