"""The config, unpacked: the only room that reads it.

Everything below takes plain arguments; everything above gets what is built here.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from cra_jax import model, schedule, train_step
from cra_jax.backbones import families
from cra_jax.runtime import devices
from cra_jax.runtime.run_folder import Config
from cra_jax.training import mixing, step_wrappers
from cra_jax.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Training:
    """What the loop runs.

    Attributes:
      network: of `model.create`.
      optimizer: of `optim`.
      step: ``(state, batch) -> (state, terms)`` on all devices.
      several: the same with a list of batches and a list of terms, see
        `step_wrappers.several`.
    """

    network: nn.Module
    optimizer: Any
    step: Callable
    several: Callable


def build_network(config: Config, num_classes: int) -> model.CRACNN:
    """Both streams and the ART module, as the config's kind has them."""
    art = config.art
    return model.create(
        config.model.kind,
        partial(families.backbone, config, num_classes, training=True),
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


def build_loss(config: Config, network: nn.Module, *, steps_per_epoch: int):
    """Eq. (9) with the config's margins, thresholds and phases."""
    restriction, contrast = config.restriction, config.contrast
    return train_step.make_loss(
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
    optimizer = make_optimizer(
        learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        decay_norm_and_bias=options.decay_norm_and_bias,
        attention_lr_scale=options.attention_lr_scale,
    )
    step = train_step.make_train_step(
        build_loss(config, network, steps_per_epoch=steps_per_epoch),
        optimizer,
        learning_rate=learning_rate,
        mean=config.data.mean,
        std=config.data.std,
        all_mean=devices.all_mean,
        accumulate=config.train.accumulate,
        mix=_mix(config, num_classes),
    )
    if options.freeze_period_epochs:
        step = step_wrappers.hold_by_turns(
            step,
            partial(
                step_wrappers.is_held,
                steps_per_epoch=steps_per_epoch,
                first_epochs=options.freeze_first_epochs,
                period_epochs=options.freeze_period_epochs,
            ),
        )
    if options.ema_decay:
        step = step_wrappers.average_weights(step, options.ema_decay)
    step = step_wrappers.keep_good(step)
    several = devices.train_step(step_wrappers.several(step))
    return Training(network, optimizer, devices.train_step(step), several)


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
        families.backbone(config, num_classes, training=True),
        probability=config.mix.probability,
        alpha=config.mix.alpha,
        seed=config.seed,
    )
