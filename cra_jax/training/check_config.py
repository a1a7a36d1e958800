"""Checks a config before any work is done.

`config_rules` checks each key by itself, and most names are checked when they are
looked up. This module checks combinations.
"""

import difflib
from collections.abc import Container
from typing import Any

from cra_jax import schedule
from cra_jax.datasets import tfds_archives
from cra_jax.inference import run_options
from cra_jax.runtime import config_rules, devices, progress, run_directory
from cra_jax.training import build, pretrained

CRA_OPTIONS = {
    "art.head": "pooled",
    "art.rotate": True,
    "art.redundancy": "hard",
    "art.inner_scale": 0.0,
    "contrast.features": "scores",
    "loss.uniform": 0.0,
    "model.shared_weights": False,
    "swap.weight": 0.0,
}
"""Options that only CRA-CNN has, and the values that turn them off."""
_FEW_STEPS = 50  # BatchNorm's running statistics are 0.9**50 = 0.5 % of their start


def check(config: build.Config) -> None:
    """Checks a config by building everything except weights and images.

    Args:
      config: a config of `configs/`.

    Raises:
      ValueError: an option is wrong; names the key, its value and valid values.
    """
    _check_keys(config)
    run_options.from_config(config)
    build.loop_options(config)
    _check_batch(config)
    _check_data(config)
    _check_optim(config)
    _check_kind(config)
    build.build_training(config, 1, steps_per_epoch=1)
    check_normalization(config)


def _check_keys(config: build.Config) -> None:
    """Checks that each key is one of `config_rules.RULES`, and its value."""
    flat, known = run_directory.flatten(config.to_dict()), config_rules.RULES
    config_rules.check_values(flat, needed=known)
    for key in flat:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else "configs/cub.py has them all"
            raise ValueError(
                f"{key}={flat[key]!r}: there is no such config key; {hint}"
            )


def _check_batch(config: build.Config) -> None:
    """Checks that devices, micro-batches and BatchNorm groups divide the batch."""
    train, group_size = config.train, config.bn.group_size
    contrasts = config.model.kind == "cra" and config.loss.cntr > 0
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
    if options.warmup_epochs >= epochs:
        raise ValueError(
            f"optim.warmup_epochs={options.warmup_epochs} leaves no epoch of "
            f"train.epochs={epochs}: lower optim.warmup_epochs"
        )
    first, period = options.freeze_first_epochs, options.freeze_period_epochs
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
    if period and config.model.shared_weights:
        raise ValueError(
            f"optim.freeze_period_epochs={period} freezes N_cls while N_ar trains, but "
            "model.shared_weights=True gives both the same weights: set "
            "model.shared_weights=False, or both optim.freeze_first_epochs and "
            "optim.freeze_period_epochs to 0"
        )


def _check_kind(config: build.Config) -> None:
    """Refuses options that only CRA-CNN has, and those that exclude each other."""
    if config.mix.kind and config.swap.weight:
        raise ValueError(
            f"mix.kind={config.mix.kind!r} gives an image two labels, and the swap of "
            f"swap.weight={config.swap.weight} needs one: set mix.kind='' or "
            "swap.weight=0"
        )
    kind = config.model.kind
    reason = "has no attention"
    if kind == "stn":
        reason = "learns the six parameters of Eq. (2) and has no redundancy"
    for key, value in _cra_options(config).items():
        raise ValueError(
            f"{key}={value!r} changes CRA-CNN, and model.kind={kind!r} {reason}: set "
            f"{key}={CRA_OPTIONS[key]!r}"
        )


def turn_off_cra_options(config: build.Config, chosen: Container[str]) -> None:
    """Turns off what a recipe adds to CRA-CNN, if the config has another kind.

    A recipe such as the quickstart's can then be trained as another kind. What a user
    chose stays, for `check` to refuse.

    Args:
      config: a config of `configs/`, which is changed.
      chosen: keys that the user has set.
    """
    off = [key for key in _cra_options(config) if key not in chosen]
    config.update_from_flattened_dict({key: CRA_OPTIONS[key] for key in off})
    if off:
        progress.print_line(
            f"model.kind={config.model.kind}: options of CRA-CNN are off: "
            f"{', '.join(off)}"
        )


def _cra_options(config: build.Config) -> dict[str, Any]:
    """The keys of `CRA_OPTIONS` that are on in a config of another kind."""
    if config.model.kind == "cra":
        return {}
    flat = run_directory.flatten(config.to_dict())
    return {key: flat[key] for key, off in CRA_OPTIONS.items() if flat[key] != off}


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


def warnings(config: build.Config, *, steps_per_epoch: int) -> list[str]:
    """Describes what makes a training of little use, each with the fix.

    Args:
      config: a checked config.
      steps_per_epoch: number of batches in an epoch.
    """
    options, epochs = config.optim, config.train.epochs
    total_steps, found = epochs * steps_per_epoch, []
    if total_steps < _FEW_STEPS:
        found.append(
            f"the training has only {total_steps} steps ({epochs} epochs of "
            f"{steps_per_epoch}), too few for BatchNorm's running statistics: increase "
            "train.epochs, or lower train.batch_size"
        )
    rate = build.build_learning_rate(config, steps_per_epoch)
    if float(rate(total_steps - 1)) > 0.999 * options.base_lr:
        late = options.first_epochs >= epochs
        found.append(
            f"the learning rate never falls in train.epochs={epochs}: "
            f"optim.first_epochs={options.first_epochs}, "
            f"optim.period_epochs={options.period_epochs}, "
            f"optim.factor={options.factor}; "
            + (
                f"lower optim.first_epochs, to {max(1, epochs * 2 // 3)} for example"
                if late
                else "set optim.period_epochs above 0 and optim.factor below 1"
            )
            + ", or set optim.schedule=cosine"
        )
    return found
