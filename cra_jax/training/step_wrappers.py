"""Wrappers of the training step: freezing N_cls, averaging weights, skipping steps."""

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
    """Whether N_cls is frozen: not in the first phase, then in every second phase.

    Args:
      step: steps already taken, from 0.
      steps_per_epoch: batches per epoch.
      first_epochs: length of the first phase, in which N_cls trains.
      period_epochs: length of each later phase; 0: the first phase never ends. N_cls is
        frozen in the second phase, trains in the third, and so on.

    Returns:
      A scalar, True or False.

    Source: the authors' released script; the paper does not freeze N_cls.
    """
    return schedule.phase(step, steps_per_epoch, first_epochs, period_epochs) % 2 == 1


def run_steps(step: Callable) -> Callable:
    """Combines the steps of several consecutive batches in one program.

    Args:
      step: ``(state, batch) -> (state, terms)``.

    Returns:
      ``(state, batches) -> (state, terms)``, where terms is a list with one entry per
      step.
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
    """Makes a step freeze N_cls, except its classifier, in some phases.

    Weights, momentum and running statistics of N_cls and of the attention head are
    frozen. The forward pass does not change: BatchNorm normalises with the statistics
    of the batch, and the classifier learns from the features.

    Args:
      step: result of `train_step.make_train_step`.
      is_frozen: steps taken -> whether N_cls is frozen now.
    """

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        after, terms = step(state, batch)
        frozen = is_frozen(state.step)

        def choose(path: tuple[Any, ...], new: Array, old: Array) -> Array:
            return jnp.where(frozen, old, new) if _can_be_frozen(path) else new

        after = jax.tree_util.tree_map_with_path(choose, after, state)
        return after, {**terms, "stream_frozen": frozen.astype(jnp.float32)}

    return run


def _can_be_frozen(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of a `TrainState` is of N_cls without fc, or of the head."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if names[:1] == [ATTENTION_HEAD]:
        return True
    return names[:1] == [CLASSIFICATION_STREAM] and names[1:2] != ["fc"]


def average_weights(step: Step, decay: float) -> Step:
    """Makes a step update an exponential moving average of the predicting part.

    The average covers weights and BatchNorm statistics of N_cls and the attention head.
    After `t` steps, the next one has weight ``1 - min(decay, (1 + t) / (10 + t))``, so
    that the influence of the initial weights soon vanishes.

    Args:
      step: result of `train_step.make_train_step`.
      decay: in (0, 1); the average spans about ``1 / (1 - decay)`` steps.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by
      averaging", 1992; the growing decay is TensorFlow's `ExponentialMovingAverage`.
      The paper does not average weights.
    """

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        after, terms = step(state, batch)
        new = train_step.prediction_variables(after.params, after.batch_stats)
        weight = 1 - jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(new, state.average, weight)
        return dataclasses.replace(after, average=average), terms

    return run


MUST_BE_FINITE = ("loss", "gradient_norm")


def skip_non_finite(step: Callable) -> Callable:
    """Makes a step skip its update if its numbers are not finite.

    Args:
      step: ``(state, batch) -> (state, terms)``, result of
        `train_step.make_train_step`.

    Returns:
      A function of the same form. If the loss or the norm of the gradient is not
      finite, parameters, statistics and optimizer state stay unchanged, and only the
      step is counted.
    """

    def guarded(state: Any, batch: Any) -> tuple[Any, Any]:
        after, terms = step(state, batch)
        good = jnp.array([jnp.isfinite(terms[name]) for name in MUST_BE_FINITE]).all()
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
        return kept.replace(step=after.step), terms

    return guarded


def is_finite_step(terms: Mapping[str, float]) -> bool:
    """Whether a step with these numbers made its update."""
    return all(np.isfinite(terms[name]) for name in MUST_BE_FINITE)
