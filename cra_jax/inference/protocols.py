"""The two protocols of testing, each as a step over all devices.

"center" (Table 1) scores the centre crop. "full" (Tables 2 and 3) scores the whole
resized picture: the last pooling keeps the window that it had in training and slides
over the feature map by 1, the classifier runs at each place, and its outputs are
averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from cra_jax.backbones import class_activation
from cra_jax.input.normalize import normalize
from cra_jax.runtime import devices


def make_center_step(
    backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]
) -> Callable:
    """The step of the protocol "center", over all devices.

    Returns:
      ``(variables, batch) -> {"logits": [b, k], "activation": [b, h, w]}``. Where the
      variables hold a `TrainedHead` under "head", ``matrices [b, 2, 3]`` as well.
    """

    def step(variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        head = variables.get("head")
        variables = {k: v for k, v in variables.items() if k != "head"}
        images = normalize(batch["image"], mean=mean, std=std)
        out: Any = backbone.apply(variables, images)
        found = {
            "logits": out.logits,
            "activation": class_activation.class_activation(
                backbone, variables, out.features, out.logits.argmax(-1)
            ),
        }
        return found | ({"matrices": head(out.pooled)} if head else {})

    return devices.eval_step(step)


def make_full_step(
    backbone: nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_px: int,
    masked: bool = True,
) -> Callable:
    """The step of the protocol "full", over all devices.

    Args:
      backbone: the plain network.
      mean: of the channels.
      std: of the channels.
      crop_px: the training crop, whose feature map is the window of the last pooling.
      masked: whether pictures were padded to share a shape; what lies beyond their
        extent is then kept out of every layer. False costs nothing and needs exact
        shapes.

    Returns:
      ``(variables, batch) -> {"logits": [b, k]}``.
    """
    window = -(-crop_px // backbone.stride_px)  # pyright: ignore[reportAttributeAccessIssue]

    def step(variables: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        images = normalize(batch["image"], mean=mean, std=std)
        extent_px = batch["extent_px"]
        features = backbone.apply(
            variables,
            images,
            extent_px=extent_px if masked else None,
            method="extract",
        )
        assert isinstance(features, Array)
        pooled = nn.avg_pool(features.astype(jnp.float32), (window, window))
        scores = backbone.apply(variables, pooled, method="classify")
        assert isinstance(scores, Array)
        cells = backbone.feature_extent(extent_px)  # pyright: ignore[reportAttributeAccessIssue]
        places = cells - (window - 1)
        rows = jnp.arange(scores.shape[1]) < places[:, :1]
        columns = jnp.arange(scores.shape[2]) < places[:, 1:]
        valid = (rows[:, :, None] & columns[:, None, :])[..., None]
        total = jnp.where(valid, scores, 0).sum((1, 2))
        return {"logits": total / places.prod(-1, keepdims=True)}

    return devices.eval_step(step)
