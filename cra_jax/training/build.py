"""Builds all parts of a training from a config.

Only this module reads the config keys of training; the functions that it calls take
plain values or frozen dataclasses. `inference/run_options.py` reads the keys that
evaluation shares.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn

from cra_jax import art_module, model, schedule, swap, train_step
from cra_jax.backbones import families
from cra_jax.datasets import sources
from cra_jax.inference import run_options
from cra_jax.input import splits
from cra_jax.input.normalize import normalize
from cra_jax.input.records import Dataset
from cra_jax.runtime import config_rules, devices, progress, run_directory
from cra_jax.swap import SwapConfig
from cra_jax.training import mixing, step_wrappers
from cra_jax.training.optimizer import make_optimizer

# What scores depend on: a run of any version has these keys.
_NEEDED = (
    *("data.source", "data.short_side_px", "data.crop_px", "data.mean", "data.std"),
    *("model.kind", "model.backbone", "model.width", "model.stem"),
)
Config = Any
"""A ConfigDict of `configs/`, whose keys no type checker knows."""


def _key(name: str) -> Any:
    """A field with its config key."""
    return dataclasses.field(metadata={"key": name})


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Options of the training loop: keys of `configs/cub.py`."""

    seed: int = _key("seed")
    epochs: int = _key("train.epochs")
    batch_size: int = _key("train.batch_size")
    flip: bool = _key("data.flip")
    on_device: bool = _key("data.on_device")
    prefetch_batches: int = _key("data.prefetch_batches")
    steps_per_dispatch: int = _key("train.steps_per_dispatch")
    log_every_steps: int = _key("train.log_every_steps")
    skip_bad_steps: int = _key("train.skip_bad_steps")
    report: bool = _key("train.report")
    save_every_epochs: int = _key("checkpoint.every_epochs")
    save_every_steps: int = _key("checkpoint.every_steps")
    keep_latest: int = _key("checkpoint.keep_latest")
    evaluate_every_epochs: int = _key("eval.every_epochs")
    snapshots: int = _key("eval.snapshots")
    mix: str = _key("mix.kind")
    ema_decay: float = _key("optim.ema_decay")
    pretrained: str = _key("model.pretrained")
    swap_boxes: str = _key("swap.boxes")

    @property
    def needs_index(self) -> bool:
        """Whether the step draws numbers by the positions of images in the split."""
        return bool(self.mix) or self.swap_boxes == "random"


@dataclasses.dataclass(frozen=True)
class Training:
    """The compiled parts of the training loop.

    Attributes:
      network: result of `model.create`.
      optimizer: result of `optimizer.make_optimizer`.
      step: ``(state, batch) -> (state, terms)`` on all devices.
      run_steps: the same with a list of batches and a list of terms, see
        `step_wrappers.run_steps`.
    """

    network: nn.Module
    optimizer: Any
    step: Callable
    run_steps: Callable


def config_of_run(
    workdir: Path, defaults: Config, changes: Mapping[str, Any]
) -> Config:
    """Reads the config of a run.

    Keys that this version does not know are logged and ignored.

    Args:
      workdir: the run directory.
      defaults: config of `configs/`, for keys that are newer than the run.
      changes: values by dotted keys, which override the run's.

    Returns:
      The config, locked.

    Raises:
      ValueError: the directory contains no run.
    """
    known = run_directory.flatten(defaults.to_dict())
    path = workdir / "config.json"
    saved = run_directory.flatten(run_directory.read_config(workdir))
    flat = run_directory.flatten(
        run_options.without_side_effects(run_directory.read_config(workdir))
    )
    try:
        config_rules.check_values(flat, needed=_NEEDED)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    unknown = {key: value for key, value in flat.items() if key not in known}
    if unknown:
        named = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        progress.print_line(
            f"{path} has keys that this version does not know and ignores: {named}"
        )
    if saved.get("data.cache_dir") and "data.cache_dir" not in changes:
        progress.print_line(
            f"data.cache_dir={saved['data.cache_dir']!r} of {path} is not used, since "
            "only training writes there: give it as a flag to use its image cache"
        )
    seen = [*_NEEDED, "optim.ema_decay"]
    differences = run_options.describe_differences(
        {key: flat.get(key) for key in seen},
        {key: changes.get(key, flat.get(key)) for key in seen},
    )
    if differences:
        progress.print_line(f"other than in {path}: {differences}")
    defaults.update_from_flattened_dict(
        {key: value for key, value in flat.items() if key in known}
    )
    defaults.update_from_flattened_dict(changes)
    return defaults.lock()


def config_without_hosts(config: Config) -> dict[str, Any]:
    """The config without `hosts`, which does not identify a run."""
    return {key: value for key, value in config.to_dict().items() if key != "hosts"}


def loop_options(config: Config) -> LoopOptions:
    """Reads the options of the training loop.

    Raises:
      ValueError: a value is out of range.
    """
    flat = run_directory.flatten(config.to_dict())
    config_rules.check_values(flat)
    fields = dataclasses.fields(LoopOptions)
    return LoopOptions(**{x.name: flat[x.metadata["key"]] for x in fields})


def load_dataset(config: Config) -> Dataset:
    """Lists the records of the config's dataset; opens no image.

    Raises:
      ValueError: as `sources.load`.
    """
    return sources.load_dataset(run_options.from_config(config).data)


def open_split(config: Config, dataset: Dataset, name: str) -> splits.Split:
    """Opens a split with the options of a config, see `splits.open_split`."""
    return splits.open_split(run_options.from_config(config).data, dataset, name)


def build_backbone(config: Config, num_classes: int) -> nn.Module:
    """Creates the backbone of a stream for training.

    It may compute in bfloat16 and share BatchNorm statistics over devices. Its
    variables have the same tree as those of `RunOptions.create_backbone`.
    """
    extra: dict[str, Any] = {}
    if config.bn.sync:
        extra["all_mean"] = devices.all_mean
        extra["num_replicas"] = devices.device_count()
    return families.create_backbone(
        config.model.backbone,
        num_classes,
        width=config.model.width,
        stem=config.model.stem,
        dtype=devices.compute_dtype(config.model.dtype),
        bn_group_size=config.bn.group_size,
        remat=config.model.remat,
        **extra,
    )


def build_network(config: Config, num_classes: int) -> model.CRACNN:
    """Creates the streams and the ART module of the config's kind."""
    return model.create(
        config.model.kind,
        partial(build_backbone, config, num_classes),
        run_options.art_of(config),
        swap=SwapConfig(**config.swap),
        shared=config.model.shared_weights,
    )


def build_loss(config: Config, network: nn.Module, *, steps_per_epoch: int):
    """Creates Eq. (9) with the config's margins, thresholds and phases."""
    restriction, contrast, loss = config.restriction, config.contrast, config.loss
    options = train_step.LossOptions(
        cls2_weight=loss.cls2,
        res_weight=loss.res,
        cntr_weight=loss.cntr,
        uniform_weight=loss.uniform,
        swap_weight=config.swap.weight,
        expectation=restriction.expectation,
        threshold=restriction.threshold,
        margin=contrast.margin,
        distance=contrast.distance,
        features=contrast.features,
        normalize_features=contrast.normalize,
        pairs=contrast.pairs,
        label_smoothing=loss.label_smoothing,
    )
    return train_step.make_loss(
        network,
        options,
        restriction_weight=partial(
            schedule.restriction_weight,
            steps_per_epoch=steps_per_epoch,
            first_epochs=restriction.first_epochs,
            period_epochs=restriction.period_epochs,
        ),
    )


def build_training(
    config: Config, num_classes: int, *, steps_per_epoch: int
) -> Training:
    """Creates network, optimizer and the step over all devices."""
    options = config.optim
    learning_rate = build_learning_rate(config, steps_per_epoch)
    network = build_network(config, num_classes)
    optimizer = make_optimizer(
        learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        decay_norm_and_bias=options.decay_norm_and_bias,
    )
    step = train_step.make_train_step(
        build_loss(config, network, steps_per_epoch=steps_per_epoch),
        optimizer,
        learning_rate=learning_rate,
        normalize=partial(normalize, mean=config.data.mean, std=config.data.std),
        all_mean=devices.all_mean,
        accumulate=config.train.accumulate,
        mix=build_mix(config, num_classes),
        draw_boxes=build_boxes(config),
    )
    if options.freeze_period_epochs:
        step = step_wrappers.freeze_alternately(
            step,
            partial(
                step_wrappers.is_frozen,
                steps_per_epoch=steps_per_epoch,
                first_epochs=options.freeze_first_epochs,
                period_epochs=options.freeze_period_epochs,
            ),
        )
    if options.ema_decay:
        step = step_wrappers.average_weights(step, options.ema_decay)
    step = step_wrappers.skip_non_finite(step)
    run_steps = devices.train_step(step_wrappers.run_steps(step))
    return Training(network, optimizer, devices.train_step(step), run_steps)


def build_learning_rate(config: Config, steps_per_epoch: int) -> Callable:
    """Creates the schedule of ``optim.schedule``: step -> learning rate."""
    options = config.optim
    at = {
        "steps_per_epoch": steps_per_epoch,
        "base": options.base_lr,
        "warmup_epochs": options.warmup_epochs,
    }
    if options.schedule == "cosine":
        return partial(schedule.cosine_learning_rate, epochs=config.train.epochs, **at)
    return partial(
        schedule.learning_rate,
        first_epochs=options.first_epochs,
        period_epochs=options.period_epochs,
        factor=options.factor,
        **at,
    )


def build_mix(config: Config, num_classes: int) -> mixing.Mix | None:
    """Creates the function that mixes images; None if ``mix.kind`` is empty."""
    if not config.mix.kind:
        return None
    return mixing.make_mix(
        config.mix.kind,
        build_backbone(config, num_classes),
        probability=config.mix.probability,
        alpha=config.mix.alpha,
        seed=config.seed,
    )


def build_boxes(config: Config) -> Callable | None:
    """Creates the function that draws boxes for the swap; None: the attention."""
    if not config.swap.weight or config.swap.boxes == "attention":
        return None
    return partial(swap.draw_boxes, config.seed, tuple(config.art.init))


def trained_head(
    config: Config, params: Mapping[str, Any]
) -> art_module.TrainedHead | None:
    """Selects the attention head of a training state; None if the kind has none."""
    art = run_options.art_of(config)
    return art_module.trained_head(params, art, config.model.kind)
