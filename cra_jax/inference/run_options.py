"""Config options of evaluation, prediction and figures, as plain values.

`from_config` reads a config of `configs/` or a run's `config.json`. `training/build.py`
reads the options that only training needs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from cra_jax.art_module import ArtConfig
from cra_jax.backbones import families
from cra_jax.datasets import sources
from cra_jax.input.splits import DataOptions
from cra_jax.runtime import config_rules, run_directory

_NEEDED = (
    *(f"art.{field.name}" for field in dataclasses.fields(ArtConfig)),
    *(
        f"data.{field.name}"
        for field in dataclasses.fields(DataOptions)
        if field.name != "source_options"
    ),
    *("eval.protocol", "eval.batch_size", "eval.bucket_px", "eval.checkpoint"),
    *("model.kind", "model.backbone", "model.width", "model.stem", "optim.ema_decay"),
)
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
        if (
            self.checkpoint not in ("latest", "best")
            and not self.checkpoint.isdecimal()
        ):
            raise ValueError(
                f"eval.checkpoint={self.checkpoint!r} must be 'latest', 'best' or "
                "a step"
            )


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

    def settings(self) -> dict[str, Any]:
        """What scores depend on besides weights, data and protocol, by config key."""
        data = self.data
        return {
            "data.short_side_px": data.short_side_px,
            "data.crop_px": data.crop_px,
            "data.mean": tuple(data.mean),
            "data.std": tuple(data.std),
            "model.backbone": self.backbone,
            "model.width": self.width,
            "model.stem": self.stem,
            "optim.ema_decay > 0": self.averaged,
        }

    def data_settings(self) -> dict[str, Any]:
        """Which dataset this is, by config key."""
        data = self.data
        return {
            "data.source": data.source,
            "data.path": data.path,
            "data.seed": data.seed,
            **{f"data.{name}": value for name, value in data.source_options.items()},
        }

    def digest(self) -> str:
        """Hex digest of `settings`."""
        text = json.dumps(self.settings(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def at_checkpoint(self, checkpoint: str) -> "RunOptions":
        """The same options with another checkpoint."""
        evaluation = dataclasses.replace(self.evaluation, checkpoint=checkpoint)
        return dataclasses.replace(self, evaluation=evaluation)


def from_config(config: Any) -> RunOptions:
    """Reads the options from a ConfigDict or the content of `config.json`.

    Raises:
      ValueError: an option is unknown, out of range or missing.
    """
    flat = run_directory.flatten(getattr(config, "to_dict", lambda: config)())
    config_rules.check_values(flat, needed=_NEEDED)
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
                name: data[name]
                for name in sources.OPTIONS.get(data["source"], ())
                if name in data
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


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys whose values differ: "data.crop_px=8 (the run: 16); ..."."""
    return "; ".join(
        f"{key}={now.get(key, '')!r} (the run: {before.get(key, '')!r})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    )


def options_of_run(workdir: Path) -> RunOptions:
    """Reads the options from the config of a run, see `without_side_effects`.

    Raises:
      ValueError: there is no config, or an option is unknown, out of range or missing.
    """
    config = without_side_effects(run_directory.read_config(workdir))
    try:
        return from_config(config)
    except ValueError as error:
        raise ValueError(f"{workdir / 'config.json'}: {error}") from None


def without_side_effects(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without what concerns the machine that trained it.

    A run may come from a stranger, whose config must neither make this machine connect
    to another one nor write outside the run.
    """
    data = config.get("data")
    kept = {key: value for key, value in config.items() if key != "hosts"}
    if isinstance(data, Mapping):
        kept["data"] = {**data, "cache_dir": "", "manual_dir": ""}
    return kept


def art_of(config: Any) -> ArtConfig:
    """Reads the options of the ART module from a config.

    Raises:
      ValueError: an option is unknown or out of range.
    """
    names = [field.name for field in dataclasses.fields(ArtConfig)]
    return ArtConfig(**{name: config["art"][name] for name in names})
