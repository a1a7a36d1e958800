"""The two evaluation protocols, each as a step over all devices.

"center" (Table 1) scores the centre crop. "full" (Tables 2 and 3) scores the whole
resized image: the last pooling keeps its window of the training and slides over the
feature map with stride 1, the classifier is applied at each position, and its outputs
are averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from cra_jax import art_module
from cra_jax.backbones import class_activation
from cra_jax.input.normalize import normalize
from cra_jax.runtime import devices


def make_center_step(
    backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]
) -> Callable:
    """Creates the step of the protocol "center", over all devices.

    Returns:
      ``(variables, batch) -> {"logits": [b, k], "activation": [b, h, w]}``. If the
      variables have a `TrainedHead` as "head", also ``matrices [b, 2, 3]``.
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
        if head:
            centres = art_module.cell_centres(backbone, out.features, images)
            found["matrices"] = head(out.pooled, out.features, centres)
        return found

    return devices.eval_step(step)


def make_full_step(
    backbone: nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_px: int,
    masked: bool = True,
) -> Callable:
    """Creates the step of the protocol "full", over all devices.

    Args:
      backbone: the plain network.
      mean: mean of the channels.
      std: standard deviation of the channels.
      crop_px: size of the training crop; the last pooling has the size of its feature
        map.
      masked: whether images are padded to a common shape. Padding is then masked in
        every layer. False has no overhead and needs exact shapes.

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
