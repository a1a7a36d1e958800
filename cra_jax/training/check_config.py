"""Checks a config before any work is done.

Most options are checked when they are built. This module checks combinations.
"""

from cra_jax import schedule
from cra_jax.datasets import tfds_archives
from cra_jax.inference import run_options
from cra_jax.runtime import devices
from cra_jax.training import build, pretrained


def check(config: build.Config) -> None:
    """Checks a config by building everything except weights and images.

    Args:
      config: a config of `configs/`.

    Raises:
      ValueError: an option is wrong; names the key, its value and valid values.
    """
    run_options.from_config(config)
    build.loop_options(config)
    _check_batch(config)
    _check_data(config)
    _check_optim(config)
    build.build_training(config, 1, steps_per_epoch=1)
    check_normalization(config)


def _check_batch(config: build.Config) -> None:
    """Checks that devices, micro-batches and BatchNorm groups divide the batch."""
    train, group_size = config.train, config.bn.group_size
    contrasts = config.model.kind == "cra" and config.loss.cntr > 0
    if train.accumulate < 1:
        raise ValueError(f"train.accumulate={train.accumulate} must be 1 or more")
    devices.check_divides(
        train.batch_size,
        setting="train.batch_size",
        least=2 if contrasts else 1,
        parts=train.accumulate,
        parts_setting="train.accumulate",
    )
    share = train.batch_size // (devices.device_count() * train.accumulate)
    if group_size > 0 and share % group_size:
        raise ValueError(
            f"bn.group_size={group_size} does not divide the {share} images that a "
            "device processes at once (train.batch_size by devices and "
            f"train.accumulate): set it to a divisor of {share}, or to 0"
        )


def _check_data(config: build.Config) -> None:
    if config.data.source == "tfds":
        tfds_archives.check_installed()
    if config.data.on_device and not config.data.prepare:
        raise ValueError(
            "data.on_device=True needs the image cache, and data.prepare=False: set "
            "data.prepare=True or data.on_device=False"
        )


def _check_optim(config: build.Config) -> None:
    options, epochs = config.optim, config.train.epochs
    if options.schedule not in schedule.KINDS:
        raise ValueError(
            f"unknown optim.schedule {options.schedule!r}; choose from "
            f"{', '.join(schedule.KINDS)}"
        )
    if options.schedule == "cosine" and options.warmup_epochs >= epochs:
        raise ValueError(
            f"optim.warmup_epochs={options.warmup_epochs} leaves no epoch of "
            f"train.epochs={epochs} for optim.schedule='cosine': lower "
            "optim.warmup_epochs"
        )
    first, period = options.freeze_first_epochs, options.freeze_period_epochs
    for name, value in (("first", first), ("period", period)):
        if value < 0:
            raise ValueError(f"optim.freeze_{name}_epochs={value} must be 0 or more")
    if bool(first) != bool(period):
        raise ValueError(
            f"optim.freeze_first_epochs={first} and optim.freeze_period_epochs={period}"
            " need each other: set both above 0, or both to 0"
        )
    if period and config.model.kind == "baseline":
        raise ValueError(
            f"optim.freeze_period_epochs={period} freezes N_cls, the only stream of "
            "model.kind='baseline': set both optim.freeze_first_epochs and "
            "optim.freeze_period_epochs to 0"
        )
    if not 0 <= options.ema_decay < 1:
        raise ValueError(
            f"optim.ema_decay={options.ema_decay} must be in [0, 1): 0.999 is usual, 0 "
            "takes no average"
        )


def check_normalization(config: build.Config) -> None:
    """Checks that mean and std are those of the pretrained weights, if known.

    Raises:
      ValueError: they differ.
    """
    data = config.data
    known = pretrained.normalization(config.model.pretrained)
    if known and (tuple(data.mean), tuple(data.std)) != known:
        raise ValueError(
            f"model.pretrained={config.model.pretrained!r} was trained on images "
            f"normalised by mean {known[0]} and std {known[1]}, but data.mean is "
            f"{tuple(data.mean)} and data.std {tuple(data.std)}: use the mean and std "
            "of the weights"
        )
