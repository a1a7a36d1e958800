"""Restores the plain network of a checkpoint, and its attention head for figures.

Prediction reads the classification stream only. This module never builds or loads the
regularization stream or the optimizer.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from cra_jax import art_module
from cra_jax.art_module import ATTENTION_HEAD, CLASSIFICATION_STREAM, TrainedHead
from cra_jax.backbones import families
from cra_jax.inference.run_options import RunOptions, art_of
from cra_jax.runtime import run_directory
from cra_jax.runtime.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Restored:
    """The trained network of a checkpoint.

    Attributes:
      backbone: the plain network.
      variables: its variables, ``{"params", "batch_stats"}``.
      step: step of the checkpoint.
      epoch: epoch of the checkpoint.
      class_names: class names in the order of the scores.
      metric_split: the split on which "best" is chosen.
      config: of the run when the checkpoint was saved.
      data: digest of each split of the run, see `splits.digest`; empty for a checkpoint
        of an older version.
    """

    backbone: nn.Module
    variables: dict[str, Any]
    step: int
    epoch: int
    class_names: tuple[str, ...]
    config: Mapping[str, Any]
    data: Mapping[str, str]
    metric_split: str = "test"


def classification_variables(params: Any, batch_stats: Any) -> dict[str, Any]:
    """Selects the variables of the plain backbone in a training state."""
    return {
        "params": params[CLASSIFICATION_STREAM],
        "batch_stats": batch_stats[CLASSIFICATION_STREAM],
    }


def has_average(checkpoints: Checkpoints, step: int) -> bool:
    """Whether a checkpoint has averaged weights."""
    return "average" in checkpoints.shapes(step)


def check_average(checkpoints: Checkpoints, step: int, *, averaged: bool) -> None:
    """Checks that a checkpoint has averaged weights if the config asks for them.

    Raises:
      ValueError: it has none.
    """
    if averaged and not has_average(checkpoints, step):
        raise ValueError(
            f"optim.ema_decay asks for averaged weights, but checkpoint {step} has "
            "none: set optim.ema_decay=0 to use its newest weights, or train again in "
            "a new --workdir"
        )


def restore_part(
    checkpoints: Checkpoints, step: int, part: Any, *, averaged: bool
) -> Any:
    """Restores a part of a checkpoint's weights, averaged or newest.

    Args:
      checkpoints: checkpoints of a run.
      step: step of the checkpoint.
      part: ``{"params", "batch_stats"}``, trees of abstract arrays.
      averaged: whether to restore averaged weights.

    Raises:
      ValueError: the checkpoint has no averages, or the shapes do not match.
    """
    check_average(checkpoints, step, averaged=averaged)
    if averaged:
        return checkpoints.restore(step, {"average": part})["average"]
    return checkpoints.restore(step, part)


def restore(options: RunOptions, workdir: Path) -> Restored:
    """Restores the checkpoint that ``eval.checkpoint`` names.

    Args:
      options: options of the run, or of a run with the same backbone. If they do not
        ask for averages, the newest weights are read, even if the run has averages.
      workdir: the run directory.

    Raises:
      ValueError: there is no such checkpoint, it is of another backbone, or it lacks
        the averages that the options ask for.
    """
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose(options.evaluation.checkpoint)
        meta = checkpoints.meta(step)
        class_names = tuple(meta["class_names"])
        backbone = options.create_backbone(len(class_names))
        abstract = families.variable_shapes(backbone, options.data.crop_px)
        part = {
            collection: {CLASSIFICATION_STREAM: abstract[collection]}
            for collection in ("params", "batch_stats")
        }
        found = restore_part(checkpoints, step, part, averaged=options.averaged)
    variables = classification_variables(found["params"], found["batch_stats"])
    return Restored(
        backbone,
        variables,
        step,
        meta["epoch"],
        class_names,
        run_directory.upgraded(meta["config"]),
        meta.get("data", {}),
        meta.get("metric_split", "test"),  # absent in older runs
    )


def restore_attention(options: RunOptions, workdir: Path) -> TrainedHead | None:
    """Restores the attention head of the checkpoint that `restore` uses.

    The head has a few small arrays, and only figures and predicted attentions need it.

    Args:
      options: ``eval.checkpoint`` names the checkpoint. The bounds of Eq. (6) are read
        from the checkpoint, not from the options.
      workdir: the run directory.

    Returns:
      The head; None if the kind has no attention.

    Raises:
      ValueError: there is no such checkpoint.
    """
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose(options.evaluation.checkpoint)
        shapes = checkpoints.shapes(step)["params"]
        wanted = {k: v for k, v in shapes.items() if k == ATTENTION_HEAD}
        if not wanted:
            return None
        config = run_directory.upgraded(checkpoints.meta(step)["config"])
        part = {"params": wanted}
        found = restore_part(checkpoints, step, part, averaged=options.averaged)
    return art_module.trained_head(
        found["params"], art_of(config), config["model"]["kind"]
    )
