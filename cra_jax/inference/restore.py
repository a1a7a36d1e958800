"""Restores the plain network of a checkpoint, and its attention head for figures.

Prediction reads the classification stream only. This module never builds or loads the
regularization stream or the optimizer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn

from cra_jax import art_module
from cra_jax.art_module import ATTENTION_HEAD, CLASSIFICATION_STREAM, TrainedHead
from cra_jax.backbones import families
from cra_jax.inference.run_options import RunOptions, art_of
from cra_jax.runtime import run_directory
from cra_jax.runtime.checkpoint import Checkpoints, DamagedError

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Restored:
    """The trained network of a checkpoint.

    Attributes:
      backbone: the plain network.
      variables: its variables, ``{"params", "batch_stats"}``.
      step: step of the checkpoint.
      epoch: epoch of the checkpoint.
      class_names: class names in the order of the scores.
      config: of the run when the checkpoint was saved.
      data: digest of each split of the run, see `splits.digest`; empty for a checkpoint
        of an older version.
      metric_split: the split on which "best" is chosen.
      head: the attention head, if it was asked for and the kind has one.
    """

    backbone: nn.Module
    variables: dict[str, Any]
    step: int
    epoch: int
    class_names: tuple[str, ...]
    config: Mapping[str, Any]
    data: Mapping[str, str]
    metric_split: str = "test"
    head: TrainedHead | None = None


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


def restore(options: RunOptions, workdir: Path, *, attention: bool = False) -> Restored:
    """Restores the checkpoint that ``eval.checkpoint`` names.

    A training that continues may remove the latest or the best checkpoint meanwhile.
    The one that is then the latest or the best is read.

    Args:
      options: options of the run, or of a run with the same backbone. If they do not
        ask for averages, the newest weights are read, even if the run has averages.
      workdir: the run directory.
      attention: whether to restore the attention head as well, which has a few small
        arrays. Only figures and predicted attentions need it. The bounds of Eq. (6)
        are read from the checkpoint, not from the options.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, it is of another backbone,
        or it lacks the averages that the options ask for.
    """

    def read(checkpoints: Checkpoints, step: int) -> Restored:
        meta = _checked_meta(checkpoints, step)
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
            _restore_head(options, checkpoints, step, meta) if attention else None,
        )

    return _read(workdir, options.evaluation.checkpoint, read)


def _read(workdir: Path, which: str, read: Callable[[Checkpoints, int], _T]) -> _T:
    """Reads the checkpoint that `which` names, or another one if it is removed."""
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        while True:
            step = checkpoints.choose(which)
            try:
                return read(checkpoints, step)
            except DamagedError:
                if not checkpoints.is_removed(step):
                    raise


def _checked_meta(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """The meta of a step, which may come from a stranger.

    Raises:
      DamagedError: it lacks what training writes.
    """
    meta = checkpoints.meta(step)
    names = meta.get("class_names")
    sound = {
        "class names": isinstance(names, list | tuple)
        and len(names) > 0
        and all(isinstance(name, str) for name in names),
        "epoch": type(meta.get("epoch")) is int,
        "config": isinstance(meta.get("config"), dict),
        "digests of data": isinstance(meta.get("data", {}), dict),
        "metric split": isinstance(meta.get("metric_split", ""), str),
    }
    for what, is_sound in sound.items():
        if not is_sound:
            raise DamagedError(
                f"checkpoint {step} of a run has no valid {what}: choose another one "
                "(eval.checkpoint), or get the run again"
            )
    return meta


def _restore_head(
    options: RunOptions, checkpoints: Checkpoints, step: int, meta: dict[str, Any]
) -> TrainedHead | None:
    """Restores the attention head; None if the kind has no attention."""
    shapes = checkpoints.shapes(step).get("params", {})
    wanted = {k: v for k, v in shapes.items() if k == ATTENTION_HEAD}
    if not wanted:
        return None
    found = restore_part(
        checkpoints, step, {"params": wanted}, averaged=options.averaged
    )
    try:
        config = run_directory.upgraded(meta["config"])
        kind, art = config["model"]["kind"], art_of(config)
        return art_module.trained_head(found["params"], art, kind)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"checkpoint {step} of a run has a config without its attention "
            f"({error!r}): choose another one (eval.checkpoint), or get the run again"
        ) from error
