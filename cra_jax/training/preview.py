"""Describes dataset and pretrained weights: `--mode data` and `--mode weights`."""

from collections.abc import Sequence
from pathlib import Path

from cra_jax.backbones import families
from cra_jax.datasets import survey
from cra_jax.inference import run_options
from cra_jax.training import build, check_config, pretrained


def run(config: build.Config, workdir: Path, *, what: str) -> None:
    """Prints a description of the dataset or of the pretrained weights.

    Args:
      config: a config of `configs/`.
      workdir: the run directory.
      what: "data": the dataset, with a contact sheet in the run directory; or
        "weights": which arrays of ``model.pretrained`` training would load.

    Raises:
      ValueError: the config, the dataset or the weights are wrong.
    """
    check_config.check(config)
    dataset = build.load_dataset(config)
    if what == "data":
        workdir.mkdir(parents=True, exist_ok=True)
        print(survey.describe(dataset, sheet=workdir / "data.png"))
        return
    if not build.loop_options(config).pretrained:
        raise ValueError(
            "model.pretrained is empty, so training starts from random weights: give "
            "--config.model.pretrained= a name, a file or a run directory"
        )
    print("\n".join(weight_lines(config, dataset.class_names)))


def weight_lines(config: build.Config, class_names: Sequence[str]) -> list[str]:
    """Describes in lines which arrays of ``model.pretrained`` training would load.

    Args:
      config: a config of `configs/`.
      class_names: classes of the dataset.

    Raises:
      ValueError: the weights are missing or do not fit; names all differences.
    """
    options = run_options.from_config(config)
    network = build.build_network(config, len(class_names))
    abstract = families.variable_shapes(network, options.data.crop_px)
    return pretrained.preview(
        abstract["params"],
        abstract["batch_stats"],
        pretrained=build.loop_options(config).pretrained,
        arch=options.backbone,
        class_names=class_names,
    )
