"""The optimizer: SGD with momentum as in torch, as one optax chain (Sec. 4.1)."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def make_optimizer(
    learning_rate: Callable,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    decay_norm_and_bias: bool = True,
) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient before the momentum.

    Args:
      learning_rate: step -> rate, from `schedule`.
      momentum: factor of the previous update (Sec. 4.1).
      weight_decay: factor of the parameters (Sec. 4.1).
      decay_norm_and_bias: whether to decay BatchNorm's scales and all biases too.

    Returns:
      An optax chain; `init` takes the whole tree of parameters.
    """
    return optax.chain(
        optax.add_decayed_weights(
            weight_decay, mask=None if decay_norm_and_bias else _is_kernel
        ),
        optax.trace(decay=momentum),
        optax.identity(),  # older checkpoints have an empty third state
        optax.scale_by_learning_rate(learning_rate),
    )


def _is_kernel(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
