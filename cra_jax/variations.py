"""A training step, varied: N_cls held by turns, weights averaged."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cra_jax import steps
from cra_jax.steps import Batch, Terms, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Terms]]


def hold_by_turns(
    step: Step,
    is_held: Callable[[Array], Array],
) -> Step:
    """A step that at times leaves N_cls, all but its classifier, as it is.

    Held are its weights, their momentum and its running statistics, and so is the head
    that predicts Gamma. They take part in the step as ever: BatchNorm normalises with
    the batch's own statistics, and the classifier learns from the features.

    Args:
      step: of `steps.make_train_step`.
      is_held: steps taken -> whether N_cls is held now, from `schedule`.
    """

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        after, terms = step(state, batch)
        held = is_held(state.step)

        def choose(path: tuple[Any, ...], new: Array, old: Array) -> Array:
            return jnp.where(held, old, new) if _can_be_held(path) else new

        after = jax.tree_util.tree_map_with_path(choose, after, state)
        return after, {**terms, "held": held.astype(jnp.float32)}

    return run


def _can_be_held(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of a `TrainState` is N_cls's, but not of its classifier."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if names[:1] == ["attention_head"]:
        return True
    return names[:1] == ["classification_stream"] and names[1:2] != ["fc"]


def average_weights(step: Step, decay: float) -> Step:
    """A step that also keeps an exponential moving average of what it trains.

    Averaged are N_cls and the attention head, which prediction reads, BatchNorm's
    statistics with the weights: they belong to each other. A step weighs
    ``1 - min(decay, (1 + t) / (10 + t))`` after `t` others, so that the average is soon
    rid of the weights that training began with.

    Args:
      step: of `steps.make_train_step`.
      decay: in (0, 1): it averages over about ``1 / (1 - decay)`` steps.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by
      averaging", 1992; the growing decay is TensorFlow's `ExponentialMovingAverage`.
      The paper has no average.
    """

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        after, terms = step(state, batch)
        new = steps.predicting_part(after.params, after.batch_stats)
        weight = 1 - jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(
            lambda mean, x: mean + weight * (x - mean), state.average, new
        )
        return dataclasses.replace(after, average=average), terms

    return run
