"""Schedules of the learning rate, of L_res and of freezing N_cls (Sec. 4.1).

All are functions of the step only, on Python numbers or traced arrays, so that a
resumed run is in the right phase without extra state.
"""

import jax.numpy as jnp
import optax

KINDS = ("piecewise", "cosine")


def learning_rate(
    step,
    *,
    steps_per_epoch: int,
    base: float = 1e-3,
    first_epochs: int = 50,
    period_epochs: int = 45,
    factor: float = 0.1,
    warmup_epochs: int = 0,
):
    """Learning rate of a step: 1e-3, 1e-4 after 50 epochs, then x 0.1 every 45 epochs.

    Args:
      step: steps already taken, from 0.
      steps_per_epoch: batches per epoch.
      base: rate of the first phase.
      first_epochs: length of the first phase.
      period_epochs: length of each later phase; 0: the first phase never ends.
      factor: factor of the rate from one phase to the next.
      warmup_epochs: epochs over which the rate first rises linearly. The paper has no
        warm-up; training from scratch at a high rate needs a few epochs.

    Returns:
      A scalar.

    Source: Sec. 4.1.
    """
    number = phase(step, steps_per_epoch, first_epochs, period_epochs)
    rate = base * jnp.power(factor, number.astype(jnp.float32))
    return _warmed(rate, step, steps_per_epoch, warmup_epochs)


def cosine_learning_rate(
    step,
    *,
    steps_per_epoch: int,
    epochs: int,
    base: float = 1e-3,
    warmup_epochs: int = 0,
):
    """Learning rate of a step: half a cosine that reaches 0 at the end of training.

    Args:
      step: steps already taken, from 0.
      steps_per_epoch: batches per epoch.
      epochs: length of the training; afterwards the rate is 0.
      base: rate at the start, or after the warm-up.
      warmup_epochs: as for `learning_rate`; the cosine starts after them.

    Returns:
      A scalar.

    Source: Loshchilov and Hutter, "SGDR", 2017, Eq. (5), without restarts. The paper
      uses `learning_rate`.
    """
    warm = warmup_epochs * steps_per_epoch
    fall = optax.cosine_decay_schedule(base, epochs * steps_per_epoch - warm)
    after = jnp.maximum(0, jnp.asarray(step, jnp.int32) - warm)
    return _warmed(fall(after), step, steps_per_epoch, warmup_epochs)


def restriction_weight(
    step, *, steps_per_epoch: int, first_epochs: int = 50, period_epochs: int = 45
):
    """Switch of L_res: on for 50 epochs, off for 45, on for 45, and so on.

    Args:
      step: steps already taken, from 0.
      steps_per_epoch: batches per epoch.
      first_epochs: length of the first phase, in which L_res is on.
      period_epochs: length of each later phase; 0: the first phase never ends.

    Returns:
      A scalar, 0. or 1.

    Source: Sec. 4.1.
    """
    number = phase(step, steps_per_epoch, first_epochs, period_epochs)
    return jnp.where(number % 2 == 0, 1.0, 0.0)


def _warmed(rate, step, steps_per_epoch: int, warmup_epochs: int):
    """Multiplies a rate by a linear warm-up."""
    if not warmup_epochs:
        return rate
    return rate * jnp.minimum(1.0, (step + 1) / (warmup_epochs * steps_per_epoch))


def phase(step, steps_per_epoch: int, first_epochs: int, period_epochs: int):
    """Number of the phase, from 0; exact, since it is computed in integers."""
    step = jnp.asarray(step, jnp.int32)
    if not period_epochs:
        return jnp.zeros_like(step)
    after = step - first_epochs * steps_per_epoch
    return jnp.maximum(0, 1 + after // (period_epochs * steps_per_epoch))
