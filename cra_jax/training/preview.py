"""What training would start from: `--mode data` and `--mode weights`."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from cra_jax.datasets import sources, survey
from cra_jax.runtime import run_folder
from cra_jax.training import build, check_config, pretrained


def run(config: run_folder.Config, workdir: Path, *, what: str) -> None:
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
    dataset = sources.load_data(config)
    if what == "data":
        workdir.mkdir(parents=True, exist_ok=True)
        print(survey.describe(dataset, sheet=workdir / "data.png"))
        return
    if not config.model.pretrained:
        raise ValueError(
            "model.pretrained is empty, so training starts from random weights: give "
            "--config.model.pretrained= a name, a file or a run folder"
        )
    print("\n".join(weight_lines(config, dataset.class_names)))


def weight_lines(config: run_folder.Config, class_names: Sequence[str]) -> list[str]:
    """What of ``model.pretrained`` training would start from, line by line.

    Args:
      config: of `configs/`.
      class_names: of the data set.

    Raises:
      ValueError: the weights are not there, or do not fit; says all that is wrong.
    """
    network = build.build_network(config, len(class_names))
    crop_px = config.data.crop_px
    images = jax.ShapeDtypeStruct((2, crop_px, crop_px, 3), jnp.float32)
    abstract = jax.eval_shape(network.init, jax.random.key(0), images)
    return pretrained.preview(
        abstract["params"],
        abstract["batch_stats"],
        pretrained=config.model.pretrained,
        arch=config.model.backbone,
        class_names=class_names,
    )
