"""A checkpoint -> the plain network that predicts, and for pictures its attention head.

Prediction reads the classification stream alone. Nothing here builds, loads or needs
the regularization stream or the optimiser.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cra_jax import art_module
from cra_jax.backbones import families
from cra_jax.runtime import run_folder
from cra_jax.runtime.checkpoint import Checkpoints

STREAM = "classification_stream"


@dataclasses.dataclass(frozen=True)
class Restored:
    """The network that a run has trained.

    Attributes:
      backbone: the plain network.
      variables: its own, ``{"params", "batch_stats"}``.
      step: of the checkpoint.
      epoch: of the checkpoint.
      class_names: in the order of the scores.
    """

    backbone: nn.Module
    variables: dict[str, Any]
    step: int
    epoch: int
    class_names: tuple[str, ...]


def classification_variables(params: Any, batch_stats: Any) -> dict[str, Any]:
    """What of a training state prediction needs: variables of the plain backbone."""
    return {"params": params[STREAM], "batch_stats": batch_stats[STREAM]}


def check_average(
    config: run_folder.Config, checkpoints: Checkpoints, step: int
) -> None:
    """Checks that a checkpoint has averaged weights where the config wants them.

    Raises:
      ValueError: it has none.
    """
    decay = _decay(config)
    if decay and "average" not in checkpoints.shapes(step):
        raise ValueError(
            f"optim.ema_decay={decay} asks for averaged weights, and checkpoint {step} "
            "was trained without: set optim.ema_decay=0 to take its newest weights, or "
            "train again in a new --workdir"
        )


def _decay(config: run_folder.Config) -> float:
    return config.optim.get("ema_decay", 0.0)  # older configs know no average


def _restore(
    config: run_folder.Config, checkpoints: Checkpoints, step: int, part: Any
) -> Any:
    """A part of the weights to predict with: averages, where the config takes them."""
    if not _decay(config):
        return checkpoints.restore(step, part)
    check_average(config, checkpoints, step)
    return checkpoints.restore(step, {"average": part})["average"]


def restore(config: run_folder.Config, workdir: Path) -> Restored:
    """Restores the checkpoint that ``config.eval.checkpoint`` names.

    Args:
      config: the run's own, or one of the same backbone; with ``optim.ema_decay`` 0 the
        newest weights are read of a run that has averages, too.
      workdir: the run folder.

    Raises:
      ValueError: there is no such checkpoint, it is of another backbone, or it lacks
        the averages that the config takes.
    """
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose(str(config.eval.checkpoint))
        meta = checkpoints.meta(step)
        class_names = tuple(meta["class_names"])
        backbone = families.backbone(config, len(class_names))
        crop_px = config.data.crop_px
        images = jax.ShapeDtypeStruct((1, crop_px, crop_px, 3), jnp.float32)
        abstract = jax.eval_shape(backbone.init, jax.random.key(0), images)
        part = {name: {STREAM: abstract[name]} for name in ("params", "batch_stats")}
        found = _restore(config, checkpoints, step, part)
    variables = classification_variables(found["params"], found["batch_stats"])
    return Restored(backbone, variables, step, meta["epoch"], class_names)


def restore_attention(
    config: run_folder.Config, workdir: Path
) -> art_module.AttentionHead | None:
    """Restores the attention head of the checkpoint that `restore` takes.

    Only those who want to see the attention need it: two small arrays.

    Args:
      config: ``eval.checkpoint`` says which checkpoint; the bounds of Eq. (6) are those
        that the checkpoint was trained with.
      workdir: the run folder.

    Returns:
      Pooled features -> affine matrices; None where the kind has no attention.

    Raises:
      ValueError: there is no such checkpoint.
    """
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose(str(config.eval.checkpoint))
        shapes = checkpoints.shapes(step)["params"]
        wanted = {k: v for k, v in shapes.items() if k == art_module.ATTENTION_HEAD}
        if not wanted:
            return None
        trained_with = ConfigDict(checkpoints.meta(step)["config"])
        found = _restore(config, checkpoints, step, {"params": wanted})
        params = found["params"]
    return art_module.attention_head(trained_with, params)
