"""A training step, varied: N_cls held by turns, weights averaged."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from cra_jax import schedule, train_step
from cra_jax.art_module import ATTENTION_HEAD, CLASSIFICATION_STREAM
from cra_jax.train_step import Batch, Terms, TrainState


def is_frozen(step, *, steps_per_epoch: int, first_epochs: int, period_epochs: int):
    """Whether N_cls is held as it is: not at first, then by turns, beginning with held.

    Args:
      step: steps already taken, from 0.
      steps_per_epoch: batches an epoch.
      first_epochs: length of the first phase, in which N_cls trains.
      period_epochs: length of each later phase; 0: the first never ends.

    Returns:
      A scalar, True or False.

    Source: the authors' released script; the paper has no such thing.
    """
    return schedule.phase(step, steps_per_epoch, first_epochs, period_epochs) % 2 == 1


def run_steps(step: Callable) -> Callable:
    """A step over several batches, one after the other, as one program.

    Args:
      step: ``(state, batch) -> (state, terms)``.

    Returns:
      ``(state, batches) -> (state, terms)``, with the terms of each step in a list.
    """

    def run(state: TrainState, batches: Sequence[Batch]) -> tuple[Any, list[Terms]]:
        if len(batches) == 1:
            state, terms = step(state, batches[0])
            return state, [terms]
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *map(dict, batches))
        state, terms = jax.lax.scan(step, state, stacked)
        return state, [{k: v[i] for k, v in terms.items()} for i in range(len(batches))]

    return run


Step = Callable[[TrainState, Batch], tuple[TrainState, Terms]]


def freeze_alternately(
    step: Step,
    is_frozen: Callable[[Array], Array],
) -> Step:
    """A step that at times leaves N_cls, all but its classifier, as it is.

    Held are its weights, their momentum and its running statistics, and so is the head
    that predicts Gamma. They take part in the step as ever: BatchNorm normalises with
    the batch's own statistics, and the classifier learns from the features.

    Args:
      step: of `train_step.make_train_step`.
      is_frozen: steps taken -> whether N_cls is frozen now.
    """

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        after, terms = step(state, batch)
        frozen = is_frozen(state.step)

        def choose(path: tuple[Any, ...], new: Array, old: Array) -> Array:
            return jnp.where(frozen, old, new) if _can_be_frozen(path) else new

        after = jax.tree_util.tree_map_with_path(choose, after, state)
        return after, {**terms, "held": frozen.astype(jnp.float32)}

    return run


def _can_be_frozen(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of a `TrainState` is N_cls's, but not of its classifier."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if names[:1] == [ATTENTION_HEAD]:
        return True
    return names[:1] == [CLASSIFICATION_STREAM] and names[1:2] != ["fc"]


def average_weights(step: Step, decay: float) -> Step:
    """A step that also keeps an exponential moving average of what it trains.

    Averaged are N_cls and the attention head, which prediction reads, BatchNorm's
    statistics with the weights: they belong to each other. A step weighs
    ``1 - min(decay, (1 + t) / (10 + t))`` after `t` others, so that the average is soon
    rid of the weights that training began with.

    Args:
      step: of `train_step.make_train_step`.
      decay: in (0, 1): it averages over about ``1 / (1 - decay)`` steps.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by
      averaging", 1992; the growing decay is TensorFlow's `ExponentialMovingAverage`.
      The paper has no average.
    """

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        after, terms = step(state, batch)
        new = train_step.predicting_part(after.params, after.batch_stats)
        weight = 1 - jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(new, state.average, weight)
        return dataclasses.replace(after, average=average), terms

    return run


JUDGED_BY = ("loss", "gradient_norm")


def keep_good(step: Callable) -> Callable:
    """A training step that changes nothing but its count where it goes wrong.

    Args:
      step: ``(state, batch) -> (state, terms)`` of `train_step.make_train_step`.

    Returns:
      The same. Where the loss or the norm of the gradient is not finite, parameters,
      statistics and the optimiser stay what they were.
    """

    def guarded(state: Any, batch: Any) -> tuple[Any, Any]:
        after, terms = step(state, batch)
        good = jnp.array([jnp.isfinite(terms[name]) for name in JUDGED_BY]).all()
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
        return kept.replace(step=after.step), terms

    return guarded


def is_good(terms: Mapping[str, float]) -> bool:
    """Whether the update of a step with these numbers was made."""
    return all(np.isfinite(terms[name]) for name in JUDGED_BY)
