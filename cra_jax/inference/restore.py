"""A checkpoint -> the plain network that predicts, and for figures its attention head.

Prediction reads the classification stream alone. Nothing here builds, loads or needs
the regularization stream or the optimiser.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn

from cra_jax import art_module
from cra_jax.art_module import ATTENTION_HEAD, CLASSIFICATION_STREAM, TrainedHead
from cra_jax.backbones import families
from cra_jax.inference.run_options import RunOptions, art_of
from cra_jax.runtime import run_folder
from cra_jax.runtime.checkpoint import Checkpoints


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
    return {
        "params": params[CLASSIFICATION_STREAM],
        "batch_stats": batch_stats[CLASSIFICATION_STREAM],
    }


def has_average(checkpoints: Checkpoints, step: int) -> bool:
    """Whether a checkpoint holds averaged weights."""
    return "average" in checkpoints.shapes(step)


def check_average(checkpoints: Checkpoints, step: int, *, averaged: bool) -> None:
    """Checks that a checkpoint has averaged weights where the config wants them.

    Raises:
      ValueError: it has none.
    """
    if averaged and not has_average(checkpoints, step):
        raise ValueError(
            f"optim.ema_decay asks for averaged weights, and checkpoint {step} was "
            "trained without: set optim.ema_decay=0 to take its newest weights, or "
            "train again in a new --workdir"
        )


def restore_part(
    checkpoints: Checkpoints, step: int, part: Any, *, averaged: bool
) -> Any:
    """A part of the weights to predict with, averaged or the newest ones.

    Args:
      checkpoints: of a run.
      step: of the checkpoint.
      part: ``{"params", "batch_stats"}``, trees of abstract arrays.
      averaged: whether their averages are wanted.

    Raises:
      ValueError: it has no averages, or the weights do not fit.
    """
    check_average(checkpoints, step, averaged=averaged)
    if averaged:
        return checkpoints.restore(step, {"average": part})["average"]
    return checkpoints.restore(step, part)


def restore(options: RunOptions, workdir: Path) -> Restored:
    """Restores the checkpoint that ``eval.checkpoint`` names.

    Args:
      options: the run's own, or of one with the same backbone; where they take no
        averages, the newest weights are read of a run that has averages, too.
      workdir: the run directory.

    Raises:
      ValueError: there is no such checkpoint, it is of another backbone, or it lacks
        the averages that the options take.
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
    return Restored(backbone, variables, step, meta["epoch"], class_names)


def restore_attention(options: RunOptions, workdir: Path) -> TrainedHead | None:
    """Restores the attention head of the checkpoint that `restore` takes.

    Only those who want to see the attention need it: two small arrays.

    Args:
      options: ``eval.checkpoint`` names the checkpoint; the bounds of Eq. (6) are those
        that the checkpoint was trained with.
      workdir: the run directory.

    Returns:
      None where the kind has no attention.

    Raises:
      ValueError: there is no such checkpoint.
    """
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose(options.evaluation.checkpoint)
        shapes = checkpoints.shapes(step)["params"]
        wanted = {k: v for k, v in shapes.items() if k == ATTENTION_HEAD}
        if not wanted:
            return None
        config = run_folder.upgraded(checkpoints.meta(step)["config"])
        part = {"params": wanted}
        found = restore_part(checkpoints, step, part, averaged=options.averaged)
    return art_module.trained_head(
        found["params"], art_of(config), config["model"]["kind"]
    )
