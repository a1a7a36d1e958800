"""The config, unpacked: the only room that reads it.

Everything below takes plain arguments; everything above gets what is built here.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from cra_jax import (
    archives,
    attention,
    families,
    mixing,
    model,
    optim,
    parallel,
    run_folder,
    schedule,
    settings,
    sources,
    steps,
    store,
    variations,
    watch,
)

Config = Any
"""An ml_collections ConfigDict, whose keys no type checker knows: see `configs/`."""

ATTENTION_HEAD = "attention_head"


@dataclasses.dataclass(frozen=True)
class Split:
    """A split, ready to be read.

    Attributes:
      pictures: of `store`.
      labels: ``[n]``.
      records: of `sources`, one a picture.
    """

    pictures: store.Store | store.Streamed
    labels: np.ndarray
    records: tuple[sources.Record, ...]

    @functools.cached_property
    def boxes(self) -> tuple[sources.Box | None, ...]:
        """Where the object is in each picture, found at first use."""
        return tuple(record.box for record in self.records)

    @functools.cached_property
    def _sizes_px(self) -> list[tuple[int, int]]:
        """Width and height of each picture, found at first use."""
        pictures = self.pictures
        shapes = (
            pictures.shapes[:, :2].tolist()
            if isinstance(pictures, store.Store)
            else [picture.shape[:2] for picture in pictures]
        )
        return [(width, height) for height, width in shapes]

    def boxes_px(self, crop_px: int) -> dict[int, sources.Box]:
        """What the centre crop shows of each object's box, in pixels of the crop.

        Returns:
          Index -> box, for the pictures that have one; a box of the whole picture says
          nothing, and is left out.
        """
        if not any(self.boxes):
            return {}
        return {
            i: attention.box_in_crop_px(box, self._sizes_px[i], crop_px)
            for i, box in enumerate(self.boxes)
            if box is not None and tuple(box) != (0, 0, 1, 1)
        }

    def firsts(self, count: int) -> list[int]:
        """The first picture of each of the first `count` classes, as indices."""
        return np.unique(self.labels, return_index=True)[1][:count].tolist()

    def take(self, indices: Sequence[int]) -> "Split":
        """Some of its pictures, in the order of `indices`."""
        return Split(
            [self.pictures[i] for i in indices],  # pyright: ignore[reportArgumentType]
            self.labels[list(indices)],
            tuple(self.records[i] for i in indices),
        )


@dataclasses.dataclass(frozen=True)
class Training:
    """What the loop runs.

    Attributes:
      network: of `model.create`.
      optimizer: of `optim`.
      step: ``(state, batch) -> (state, terms)`` on all devices.
      several: the same with a list of batches and a list of terms, see `steps.several`.
    """

    network: nn.Module
    optimizer: Any
    step: Callable
    several: Callable


def check(config: Config) -> None:
    """Finds what is wrong with a config before any work is done.

    Raises:
      ValueError: with the key, its value, and what to set it to.
    """
    settings.check(config)
    # What only the rooms themselves know to be wrong.
    backbone(config, num_classes=1)
    build_training(config, 1, steps_per_epoch=1)


def kept(config: Config) -> dict[str, Any]:
    """What of a config makes a run what it is: all but which hosts work on it."""
    return {key: value for key, value in config.to_dict().items() if key != "hosts"}


def load_data(config: Config) -> sources.Dataset:
    """Lists the records of the config's data set; opens no picture.

    CUB-200-2011 is fetched where no path is given: it is the one set that can be.
    """
    data = config.data
    path = data.path
    if data.source == "cub" and not path:
        path = archives.cub_200_2011(store.default_cache_dir(None) / "datasets")
    options = {key: data[key] for key in sources.OPTIONS.get(data.source, ())}
    return sources.load(data.source, path, seed=data.seed, **options)


def of_run(
    workdir: Path, defaults: Config, changes: Mapping[str, Any], *, must: bool = True
) -> Config | None:
    """The config that a run was made with.

    Args:
      workdir: the run folder.
      defaults: of `configs/`, for keys that are younger than the run.
      changes: values by their dotted keys, laid over it.
      must: whether the folder must be a run's.

    Returns:
      The config, locked; None where the folder is no run's and need not be.

    Raises:
      ValueError: it is no run's, and must be.
    """
    if not must and not (workdir / "checkpoints").is_dir():
        return None
    defaults.update(run_folder.read_config(workdir))
    defaults.update_from_flattened_dict(changes)
    return defaults.lock()


def describe_data(splits: Mapping[str, Split]) -> str:
    """What splits hold, so that two hosts can see whether they read the same."""
    said = []
    for name, split in splits.items():
        listed = [(record.name, record.label) for record in split.records]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        said.append(f"{name} of {len(listed)} pictures (names and labels {digest[:8]})")
    return ", ".join(said)


def check_count(config: Config, dataset: sources.Dataset) -> None:
    """Checks that the training pictures fill a batch.

    Raises:
      ValueError: they do not.
    """
    count, batch_size = len(dataset.splits["train"]), config.train.batch_size
    if count < batch_size:
        raise ValueError(
            f"{count} training pictures do not fill one batch of {batch_size}: set "
            f"train.batch_size to {count} or less"
        )


def open_split(config: Config, dataset: sources.Dataset, name: str) -> Split:
    """Opens a split, preparing its store where the config wants one."""
    data = config.data
    records = dataset.splits[name]
    if data.prepare:
        cache_dir = (
            Path(data.cache_dir).expanduser()
            if data.cache_dir
            else store.default_cache_dir(dataset.root)
        )
        pictures = store.prepare(
            records,
            short_side_px=data.short_side_px,
            cache_dir=cache_dir,
            name=f"{dataset.name}-{name}",
            skip_unreadable=data.skip_unreadable,
        )
    else:
        pictures = store.Streamed(records, data.short_side_px)
    labels = np.array([record.label for record in pictures.records], np.int32)
    return Split(pictures, labels, pictures.records)


def backbone(config: Config, num_classes: int, *, training: bool = False) -> nn.Module:
    """The network that predicts, or in training its twin of the same variables.

    Training may compute in bfloat16 and share BatchNorm statistics. Prediction computes
    in float32 everywhere: a score must not depend on where it is taken.
    """
    extra: dict[str, Any] = {}
    if training:
        extra["dtype"] = parallel.compute_dtype(config.model.dtype)
        extra["bn_group_size"] = config.bn.group_size
        extra["remat"] = config.model.remat
        if config.bn.sync:
            extra["all_mean"] = parallel.all_mean
            extra["num_replicas"] = parallel.device_count()
    return families.create_backbone(
        config.model.backbone,
        num_classes,
        width=config.model.width,
        stem=config.model.stem,
        **extra,
    )


def build_network(config: Config, num_classes: int) -> model.CRACNN:
    """Both streams and the ART module, as the config's kind has them."""
    art = config.art
    return model.create(
        config.model.kind,
        partial(backbone, config, num_classes, training=True),
        art_size_px=art.size_px,
        alpha_p=art.alpha_p,
        alpha_s=art.alpha_s,
        init=art.init,
        redundancy=art.redundancy,
        softness=art.softness,
        gradient_clip=art.gradient_clip,
        gradient_share=art.gradient_share,
        normalize_head=art.normalize_head,
        inside=art.inside,
        guard=art.guard,
        ar_passes=config.model.ar_passes,
        inner_scale=art.inner_scale,
    )


def attention_head(config: Config, params: Mapping[str, Any]) -> attention.Head | None:
    """What turns pooled features into attention; None where the kind has no such thing.

    Args:
      config: that the parameters were trained with.
      params: of `build_network`, or of them the attention head's alone.
    """
    if ATTENTION_HEAD not in params:
        return None
    head = params[ATTENTION_HEAD]
    art = config.art
    return attention.Head(
        kernel=head["kernel"],
        bias=head["bias"],
        alpha_p=art.alpha_p,
        alpha_s=art.alpha_s,
        normalize=art.normalize_head,
        inside=art.get("inside", False),  # older checkpoints know Eq. 6 alone
    )


def build_loss(config: Config, network: nn.Module, *, steps_per_epoch: int):
    """Eq. (9) with the config's margins, thresholds and phases."""
    restriction, contrast = config.restriction, config.contrast
    return steps.make_loss(
        network,
        restriction_weight=partial(
            schedule.restriction_weight,
            steps_per_epoch=steps_per_epoch,
            first_epochs=restriction.first_epochs,
            period_epochs=restriction.period_epochs,
        ),
        expectation=restriction.expectation,
        threshold=restriction.threshold,
        margin=contrast.margin,
        normalize_features=contrast.normalize,
        distance=contrast.distance,
        pairs=contrast.pairs,
        weights={name: config.loss[name] for name in ("cls2", "res", "cntr")},
        label_smoothing=config.loss.label_smoothing,
    )


def build_training(
    config: Config, num_classes: int, *, steps_per_epoch: int
) -> Training:
    """Network, optimiser and the step over all devices."""
    options = config.optim
    learning_rate = _learning_rate(config, steps_per_epoch)
    network = build_network(config, num_classes)
    optimizer = optim.make_optimizer(
        learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        decay_norm_and_bias=options.decay_norm_and_bias,
        attention_lr_scale=options.attention_lr_scale,
    )
    step = steps.make_train_step(
        build_loss(config, network, steps_per_epoch=steps_per_epoch),
        optimizer,
        learning_rate=learning_rate,
        mean=config.data.mean,
        std=config.data.std,
        all_mean=parallel.all_mean,
        accumulate=config.train.accumulate,
        mix=_mix(config, num_classes),
    )
    if options.freeze_period_epochs:
        step = variations.hold_by_turns(
            step,
            partial(
                schedule.is_held,
                steps_per_epoch=steps_per_epoch,
                first_epochs=options.freeze_first_epochs,
                period_epochs=options.freeze_period_epochs,
            ),
        )
    if options.ema_decay:
        step = variations.average_weights(step, options.ema_decay)
    step = watch.keep_good(step)
    several = parallel.train_step(steps.several(step))
    return Training(network, optimizer, parallel.train_step(step), several)


def _learning_rate(config: Config, steps_per_epoch: int) -> Callable:
    """Step -> learning rate, as ``optim.schedule`` says."""
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


def _mix(config: Config, num_classes: int) -> mixing.Mix | None:
    """What mixes pictures, where ``mix.kind`` names something."""
    if not config.mix.kind:
        return None
    return mixing.make_mix(
        config.mix.kind,
        backbone(config, num_classes, training=True),
        probability=config.mix.probability,
        alpha=config.mix.alpha,
        seed=config.seed,
    )
