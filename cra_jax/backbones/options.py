"""The options of a backbone, the same for every family."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cra_jax.backbones.batch_norm import BatchNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Options of a backbone; a family may accept only some widths and stems.

    Attributes:
      width: channels of the first stage.
      stem: name of the first layers, as the family defines it.
      dtype: compute dtype of convolutions and activations.
      bn_group_size: in training, how many consecutive images share BatchNorm
        statistics; 0: all images of the device.
      all_mean: array -> its mean over all replicas, which share BatchNorm statistics;
        None: each device has its own.
      num_replicas: number of replicas that `all_mean` averages.
      remat: in training, keep only the input of each block and compute the rest again
        in the backward pass: the same numbers, less memory, more time.

    Raises:
      ValueError: an option is out of range, or contradicts another.
    """

    width: int = 64
    stem: str = "imagenet"
    dtype: Any = jnp.float32
    bn_group_size: int = 0
    all_mean: Callable[[jax.Array], jax.Array] | None = None
    num_replicas: int = 1
    remat: bool = False

    def __post_init__(self) -> None:
        for name, least in {"width": 1, "num_replicas": 1, "bn_group_size": 0}.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.bn_group_size and self.all_mean is not None:
            raise ValueError(
                f"bn_group_size={self.bn_group_size} splits a device's batch and "
                "all_mean joins the devices; give only one"
            )
        if self.all_mean is None and self.num_replicas != 1:
            raise ValueError(
                f"num_replicas={self.num_replicas} needs all_mean, which joins them"
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                f"dtype must be floating point, like bfloat16, not {self.dtype}"
            )

    def batch_norm(self, epsilon: float = 1e-5) -> Callable[..., BatchNorm]:
        """The constructor of a `BatchNorm` with these options."""
        return partial(
            BatchNorm,
            self.bn_group_size,
            self.all_mean,
            self.num_replicas,
            epsilon=epsilon,
        )


def check_architecture(
    arch: str, num_classes: int, architectures: Iterable[str]
) -> None:
    """Checks the arguments of `create` that are not options.

    Raises:
      ValueError: `arch` is not one of `architectures`, or `num_classes` is below 1.
    """
    if arch not in architectures:
        raise ValueError(
            f"unknown arch {arch!r}; choose from {', '.join(architectures)}"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
