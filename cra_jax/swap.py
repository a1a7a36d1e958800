"""Swap: the attention of an image on the background of another, for N_cls to classify.

An extension of the paper. The label stays and the background changes, so a background
that often comes with a class is no help. The pass costs training time only.

Points are ``(x, y)`` in the frame of `geometry`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cra_jax import geometry

PLACES = ("neighbour", "own")
BOXES = ("attention", "random")

_SALT = 20260728  # makes the draws independent of those of the initial weights


@dataclasses.dataclass(frozen=True)
class SwapConfig:
    """Options of the swap; `config.swap` has the same keys.

    Raises:
      ValueError: an option is unknown or out of range.
    """

    weight: float = 0.0
    """Weight of the loss L_swap beside those of Eq. (9); 0: no swap."""
    every: int = 2
    """One image in so many gets the attention of its neighbour in the batch."""
    place: str = "neighbour"
    """Where the attention is pasted: "neighbour", over the attention of the image that
    gets it, which covers that object; or "own", where it was, and the attention of the
    image that gets it is filled from beside it, see `geometry.beside`."""
    boxes: str = "attention"
    """What is pasted: the "attention", or "random" boxes of its size, a control."""
    edge: float = 0.0
    """Width of the pasted region's edges, over which both images blend, in the frame of
    `geometry`, where the image is 2 wide; 0: a hard edge."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("place", self.place, PLACES),
            ("boxes", self.boxes, BOXES),
        ):
            if value not in known:
                raise ValueError(
                    f"unknown swap.{name} {value!r}; choose from {', '.join(known)}"
                )
        for name, holds, rule in (
            ("weight", self.weight >= 0, "0 or more"),
            ("every", self.every >= 1, "1 or more"),
            ("edge", self.edge >= 0, "0 or more"),
        ):
            if not holds:
                raise ValueError(f"swap.{name}={getattr(self, name)} must be {rule}")


def neighbours(count: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that get an attention, and the neighbours whose attention they get.

    Returns:
      int ``[p]``: every `every`-th index of a batch of `count` images, and the index of
      the other image of its pair (0, 1), (2, 3), .... The last image of an odd batch
      is its own neighbour.
    """
    target = np.arange(0, count, every)
    return target, np.minimum(target ^ 1, count - 1)


def swap(
    target: Array, target_gamma: Array, source: Array, gamma: Array, config: SwapConfig
) -> Array:
    """Pastes the attention of each source image into its target image.

    With place "neighbour", a point p inside the attention of the target, which is
    centred at c_t, shows the source at ``p - c_t + c_s``, where c_s is the centre of
    the source's attention. With place "own", a point inside the attention of the source
    shows the source at p. There is no rotation and no change of scale.

    Args:
      target: ``[p, H, W, c]``, images that give the background.
      target_gamma: ``[p, 4]``, their restricted attention parameters.
      source: ``[p, H, W, c]``, images that give the object and the label.
      gamma: ``[p, 4]``, their restricted attention parameters.
      config: the options.

    Returns:
      ``[p, H, W, c]``; no gradient reaches the attention parameters.
    """
    target_gamma, gamma = jax.lax.stop_gradient((target_gamma, gamma))
    size = (target.shape[1], target.shape[2])
    if config.place == "neighbour":
        shift = gamma[:, None, None, :2] - target_gamma[:, None, None, :2]
        # A larger attention of the target may reach beyond the source's edge.
        grid = jnp.clip(geometry.regular_grid(size, gamma.dtype) + shift, -1, 1)
        region, background = target_gamma, target
        pasted = geometry.bilinear_sample(source, grid)
    else:
        region, pasted = gamma, source
        grid = geometry.redundancy_grid(target_gamma, size, filled=True)
        background = geometry.bilinear_sample(target, grid)
    weight = _weight(region, size, config.edge).astype(target.dtype)[..., None]
    return weight * pasted + (1 - weight) * background


def _weight(gamma: Array, size: tuple[int, int], edge: float) -> Array:
    """Weight of the pasted image at each pixel: ``[p, H, W]`` in 0..1."""
    if not edge:
        return (geometry.depth_inside(gamma, size) >= 0).all(-1)
    return 1 - geometry.redundancy_weight(gamma, size, softness=edge / 4)


def draw_boxes(seed: int, start: tuple[float, ...], step: Array, index: Array) -> Array:
    """Attention parameters of random boxes inside the image: ``[b, 4]``.

    Args:
      seed: seed of the draws, which depend on (seed, step, index) only.
      start: `ArtConfig.init`, whose scale and angle the boxes have.
      step: number of the step.
      index: int ``[b]``, positions of the images in the split.
    """
    _, _, scale, angle_rad = start
    bound = float(geometry.place_bound(scale, angle_rad))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _SALT), step)

    def draw(index: Array) -> Array:
        centre = jax.random.uniform(
            jax.random.fold_in(key, index), (2,), minval=-bound, maxval=bound
        )
        return jnp.concatenate([centre, jnp.array([scale, angle_rad])])

    return jax.vmap(draw)(index)
