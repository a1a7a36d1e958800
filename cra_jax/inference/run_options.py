"""Config options of evaluation, prediction and figures, as plain values.

`from_config` reads a config of `configs/` or a run's `config.json`. `training/build.py`
reads the options that only training needs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from cra_jax.art_module import ArtConfig
from cra_jax.backbones import families
from cra_jax.datasets import sources
from cra_jax.input.splits import DataOptions

PROTOCOLS = ("center", "full", "both")


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Options of the evaluation.

    Attributes:
      protocol: one of `PROTOCOLS`, see `protocols.py`.
      batch_size: images per batch; the scores do not depend on it.
      bucket_px: for "full", sizes are rounded up to multiples of it; 0: exact sizes.
      checkpoint: "latest", "best" or a step.

    Raises:
      ValueError: an option is unknown or out of range.
    """

    protocol: str
    batch_size: int
    bucket_px: int
    checkpoint: str

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"unknown eval.protocol {self.protocol!r}; choose from "
                f"{', '.join(PROTOCOLS)}"
            )
        if self.batch_size < 1:
            raise ValueError(f"eval.batch_size={self.batch_size} must be 1 or more")
        if self.bucket_px < 0:
            raise ValueError(f"eval.bucket_px={self.bucket_px} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Config options of evaluation, prediction and figures.

    Attributes:
      kind: one of `model.KINDS`.
      backbone: architecture of N_cls.
      width: number of channels of its first stage.
      stem: kind of its first layers.
      art: options of the ART module.
      averaged: whether prediction uses averaged weights.
      data: options of the dataset and its images.
      evaluation: options of the evaluation.
      hosts: arguments of `hosts.start`.
    """

    kind: str
    backbone: str
    width: int
    stem: str
    art: ArtConfig
    averaged: bool
    data: DataOptions
    evaluation: EvalOptions
    hosts: Mapping[str, Any]

    def create_backbone(self, num_classes: int) -> nn.Module:
        """Creates the network for prediction.

        It always computes in float32, so that scores do not depend on the machine.
        """
        return families.create_backbone(
            self.backbone, num_classes, width=self.width, stem=self.stem
        )

    def at_checkpoint(self, checkpoint: str) -> "RunOptions":
        """The same options with another checkpoint."""
        evaluation = dataclasses.replace(self.evaluation, checkpoint=checkpoint)
        return dataclasses.replace(self, evaluation=evaluation)


def from_config(config: Any) -> RunOptions:
    """Reads the options from a ConfigDict or the content of `config.json`.

    Raises:
      ValueError: an option is unknown or out of range.
    """
    data, model, evaluation = config["data"], config["model"], config["eval"]
    return RunOptions(
        kind=model["kind"],
        backbone=model["backbone"],
        width=model["width"],
        stem=model["stem"],
        art=art_of(config),
        averaged=config["optim"]["ema_decay"] > 0,
        data=DataOptions(
            source_options={
                name: data[name] for name in sources.OPTIONS.get(data["source"], ())
            },
            **{
                field.name: data[field.name]
                for field in dataclasses.fields(DataOptions)
                if field.name != "source_options"
            },
        ),
        evaluation=EvalOptions(
            protocol=evaluation["protocol"],
            batch_size=evaluation["batch_size"],
            bucket_px=evaluation["bucket_px"],
            checkpoint=str(evaluation["checkpoint"]),
        ),
        hosts=dict(config["hosts"]) if "hosts" in config else {},
    )


def art_of(config: Any) -> ArtConfig:
    """Reads the options of the ART module from a config.

    Raises:
      ValueError: an option is unknown or out of range.
    """
    names = [field.name for field in dataclasses.fields(ArtConfig)]
    return ArtConfig(**{name: config["art"][name] for name in names})
