"""What training would start from: `--mode data` and `--mode weights`."""

from collections.abc import Sequence
from pathlib import Path

from cra_jax.backbones import families
from cra_jax.datasets import survey
from cra_jax.inference import run_options
from cra_jax.training import build, check_config, pretrained


def run(config: build.Config, workdir: Path, *, what: str) -> None:
    """Prints what training would start from; trains nothing.

    Args:
      config: of `configs/`.
      workdir: the run folder.
      what: "data": what the data set holds, with a contact sheet in the run folder; or
        "weights": what of ``model.pretrained`` would be loaded, and what not.

    Raises:
      ValueError: there is something wrong with what would be loaded.
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
            "--config.model.pretrained= a name, a file or a run folder"
        )
    print("\n".join(weight_lines(config, dataset.class_names)))


def weight_lines(config: build.Config, class_names: Sequence[str]) -> list[str]:
    """What of ``model.pretrained`` training would start from, line by line.

    Args:
      config: of `configs/`.
      class_names: of the data set.

    Raises:
      ValueError: the weights are not there, or do not fit; says all that is wrong.
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
