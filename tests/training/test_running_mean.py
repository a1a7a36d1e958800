"""The mean of logged numbers."""

import jax.numpy as jnp

from cra_jax.training import running_mean


def test_mean_continues_from_saved_values():
    whole, first = running_mean.Mean(), running_mean.Mean()
    for value in (0.1, 0.7, 0.4):
        whole.add({"loss": jnp.float32(value)})
    first.add({"loss": jnp.float32(0.1)})
    second = running_mean.Mean()
    for saved in first.fetch():
        second.add(saved)
    for value in (0.7, 0.4):
        second.add({"loss": jnp.float32(value)})
    assert len(second) == 3
    assert second.take() == whole.take()
    assert len(second) == 0
