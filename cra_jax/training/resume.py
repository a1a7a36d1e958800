"""Compares a run that resumes with its newest checkpoint: its data and its schedule."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cra_jax import schedule
from cra_jax.inference import evaluate
from cra_jax.input import splits
from cra_jax.input.records import Dataset
from cra_jax.runtime import run_directory
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build, step_wrappers

Before = dict[str, Any]
"""What a checkpoint knows of its run, in JSON types: its ``meta``, its ``step`` and
``kept``, the content of `images.json`; empty for a new run."""


class CheckedData(NamedTuple):
    """A dataset that may be trained on.

    Attributes:
      dataset: the dataset, with the drawn split of the run.
      listed: its images, for `images.json`.
      warnings: what has changed since the checkpoint.
    """

    dataset: Dataset
    listed: run_directory.TrainedData
    warnings: tuple[str, ...] = ()


def read(checkpoints: Checkpoints, step: int | None, workdir: Path) -> Before:
    """Reads what the checkpoint of a step knows of its run; empty without a step.

    Raises:
      ValueError: `images.json` is damaged.
    """
    if not step:
        return {}
    meta = {k: v for k, v in checkpoints.meta(step).items() if k != "window"}
    kept = run_directory.read_data(workdir)
    return {**meta, "step": step, "kept": kept and kept.to_json()}


def check_data(
    dataset: Dataset, before: Before, workdir: Path, *, allow_change: bool
) -> CheckedData:
    """Compares a dataset with the one that the run was trained on so far.

    Args:
      dataset: the dataset of now.
      before: result of `read`.
      workdir: the run directory, for messages.
      allow_change: whether images may differ. The classes may not, and no image may be
        tested that was trained on.

    Raises:
      ValueError: they differ; names the first difference.
    """
    now = _list(dataset)
    if not before:
        return CheckedData(dataset, run_directory.TrainedData(now))
    evaluate.check_classes(
        dataset.class_names,
        before["class_names"],
        f"restore the data of {workdir}, or train in another --workdir",
    )
    kept = before["kept"] and run_directory.TrainedData.from_json(before["kept"])
    change = _describe_change(before, kept, now)
    if not change:
        earlier = kept.earlier if kept else ()
        return CheckedData(dataset, run_directory.TrainedData(now, earlier))
    what = f"the data has changed since step {before['step']} of {workdir}: {change}"
    if not allow_change:
        raise ValueError(
            f"{what}: restore it, resume on the data as it is with "
            "--allow_data_change, or train in another --workdir"
        )
    if not kept:
        return CheckedData(dataset, run_directory.TrainedData(now), (what,))
    if dataset.drawn:
        dataset = splits.keep_split(dataset, kept.splits)
        now = _list(dataset)
    _check_untrained(kept, now, workdir)
    earlier = kept.trained() - {image.digest for image in now["train"]}
    listed = run_directory.TrainedData(now, tuple(sorted(earlier)))
    return CheckedData(dataset, listed, (what,))


def _list(dataset: Dataset) -> dict[str, tuple[run_directory.ListedImage, ...]]:
    return {x: splits.list_images(records) for x, records in dataset.splits.items()}


def _describe_change(
    before: Before,
    kept: run_directory.TrainedData | None,
    now: Mapping[str, tuple[run_directory.ListedImage, ...]],
) -> str:
    if kept:
        return splits.describe_changes(kept.splits, now)
    for name, digest in before.get("data", {}).items():
        if splits.digest(now.get(name, ())) != digest:
            return f"the images of the split {name!r}"
    return ""


def _check_untrained(
    kept: run_directory.TrainedData,
    now: Mapping[str, tuple[run_directory.ListedImage, ...]],
    workdir: Path,
) -> None:
    """Checks that no image comes into a test split that was trained on."""
    trained = kept.trained()
    for name, images in now.items():
        tested = {image.digest for image in kept.splits.get(name, ())}
        leaked = [x for x in images if x.digest in trained and x.digest not in tested]
        if name != "train" and leaked:
            raise ValueError(
                f"{len(leaked)} images of the split {name!r} were trained on in "
                f"{workdir}, the first {leaked[0].name}: remove them from it, or train "
                "in another --workdir"
            )


def describe_moves(
    before: Before, config: build.Config, *, steps_per_epoch: int, train_size: int
) -> list[str]:
    """Describes what a changed config or dataset moves at the step that resumes.

    Args:
      before: result of `read`; empty: nothing moves.
      config: the config of now.
      steps_per_epoch: of now.
      train_size: number of training images of now.
    """
    if not before:
        return []
    step, old = before["step"], _config_before(before, config)
    old_steps = before.get("steps_per_epoch") or train_size // old.train.batch_size
    moves = []
    if old_steps != steps_per_epoch:
        moves.append(
            f"this was {_place(step, old_steps)} and is now "
            f"{_place(step, steps_per_epoch)}: epochs and phases count from step 0, so "
            "images of an epoch are repeated or left out"
        )
    ends = [
        (x.train.epochs * n) for x, n in ((old, old_steps), (config, steps_per_epoch))
    ]
    if ends[0] != ends[1]:
        moves.append(f"training ends at step {ends[1]} instead of {ends[0]}")
    rates = [
        float(build.build_learning_rate(x, n)(step))
        for x, n in ((old, old_steps), (config, steps_per_epoch))
    ]
    if abs(rates[0] - rates[1]) > 1e-6 * abs(rates[0]):
        moves.append(
            f"the learning rate after step {step} is {rates[1]:.3g} instead of "
            f"{rates[0]:.3g}"
        )
    for what, phases in (("L_res", _restricted), ("the training of N_cls", _trained)):
        was, now = phases(old, old_steps, step), phases(config, steps_per_epoch, step)
        if was != now:
            moves.append(
                f"{what} is {_on(now)} instead of {_on(was)} after step {step}"
            )
    for change in run_directory.config_changes(
        before["config"], build.config_without_hosts(config)
    ):
        moves.append(f"the config has changed: {change}")
    return [f"resumes at step {step}: {move}" for move in moves]


def _config_before(before: Before, config: build.Config) -> build.Config:
    """The config of the checkpoint; keys that it lacks have the values of now."""
    old: Any = ConfigDict(config.to_dict())
    known = run_directory.flatten(old.to_dict())
    saved = run_directory.flatten(run_directory.upgraded(before["config"]))
    old.update_from_flattened_dict({k: v for k, v in saved.items() if k in known})
    return old


def _place(step: int, steps_per_epoch: int) -> str:
    epoch, into = divmod(step, steps_per_epoch)
    if not into:
        return f"the end of epoch {epoch} ({steps_per_epoch} steps each)"
    return f"step {into} of {steps_per_epoch} of epoch {epoch + 1}"


def _restricted(config: build.Config, steps_per_epoch: int, step: int) -> bool:
    if config.model.kind != "cra" or not config.loss.res:
        return False
    weight = partial(
        schedule.restriction_weight,
        first_epochs=config.restriction.first_epochs,
        period_epochs=config.restriction.period_epochs,
    )
    return bool(weight(step, steps_per_epoch=steps_per_epoch))


def _trained(config: build.Config, steps_per_epoch: int, step: int) -> bool:
    if not config.optim.freeze_period_epochs:
        return True
    return not step_wrappers.is_frozen(
        step,
        steps_per_epoch=steps_per_epoch,
        first_epochs=config.optim.freeze_first_epochs,
        period_epochs=config.optim.freeze_period_epochs,
    )


def _on(value: bool) -> str:
    return "on" if value else "off"
