"""Compares the cost of prediction of CRA-CNN and of the baseline.

    python -m benchmarks.free_at_test_time

Both are saved as in training and restored as in evaluation. The exported weights are
loaded as well. The weights are random, because the cost does not depend on them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from configs.cub import get_config
from cra_jax.backbones import weights
from cra_jax.inference import export, run_options
from cra_jax.inference.restore import restore
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build


class Cost(NamedTuple):
    """Cost of prediction.

    Attributes:
      parameters: number of learned parameters.
      flops: FLOP of the forward pass of one image, as counted by XLA.
      predict: function that runs the forward pass and waits for its result.
    """

    parameters: int
    flops: float
    predict: Any


def save_untrained(config: Any, workdir: Path, class_names: list[str]) -> int:
    """Saves a checkpoint of the config's network; returns its number of parameters."""
    network = build.build_network(config, len(class_names))
    side = config.data.crop_px
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    shapes: Any = jax.eval_shape(network.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return rng.uniform(0.01, 0.02, leaf.shape).astype(leaf.dtype)

    meta = {"class_names": class_names, "epoch": 0, "config": config.to_dict()}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, jax.tree.map(draw, dict(shapes)), meta)
    return count(shapes["params"])


def count(tree: Any) -> int:
    """Number of elements in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def measure_cost(backbone: Any, variables: Any, crop_px: int) -> Cost:
    """Compiles the forward pass of one image and returns its cost."""
    images = jnp.zeros((1, crop_px, crop_px, 3))
    variables = jax.tree.map(jnp.asarray, variables)
    program = (
        jax.jit(lambda v, x: backbone.apply(v, x).logits)
        .lower(variables, images)
        .compile()
    )
    analysis: Any = program.cost_analysis()
    return Cost(
        count(variables["params"]),
        analysis["flops"],
        lambda: jax.block_until_ready(program(variables, images)),
    )


def measure_costs(config: Any, folder: Path, num_classes: int) -> dict[str, Cost]:
    """Costs of the networks, by their names in the table."""
    names = [f"class {i}" for i in range(num_classes)]
    crop_px = config.data.crop_px
    rows: dict[str, Cost] = {}
    for kind in ("baseline", "cra"):
        config.model.kind = kind
        workdir = folder / kind
        parameters = save_untrained(config, workdir, names)
        restored = restore(run_options.from_config(config), workdir)
        about = f"{kind}, restored (in training {parameters:,})"
        rows[about] = measure_cost(restored.backbone, restored.variables, crop_px)
    export.run(run_options.from_config(config), workdir)
    file = workdir / "export" / "model.safetensors"
    loaded = weights.load_torch(file, arch=config.model.backbone)
    rows["cra, exported"] = measure_cost(restored.backbone, loaded, crop_px)
    return rows


def latencies_ms(rows: dict[str, Cost], repeats: int) -> dict[str, list[float]]:
    """Times of single predictions, measured in alternation."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, row in rows.items():
            start = time.perf_counter()
            row.predict()
            if turn:  # the first round is not measured
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the cost of prediction.")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="use 64 px")
    options = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # orbax logs each directory that it opens
    config = get_config(options.backbone)
    config.model.pretrained = ""
    config.data.crop_px = 64 if options.quick else 448
    config.art.size_px = config.data.crop_px // 2
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_costs(config, Path(folder), num_classes=200)
        times = latencies_ms(rows, options.repeats)
    side = config.data.crop_px
    device = jax.local_devices()[0].device_kind
    print(f"\n{options.backbone}, {side} x {side}, one image, on {device}\n")
    print("| network | parameters | GFLOP | latency: median (quartiles), ms |")
    print("|---|---:|---:|---:|")
    for name, row in rows.items():
        low, median, high = statistics.quantiles(times[name], n=4)
        print(
            f"| {name} | {row.parameters:,} | {row.flops / 1e9:.3f} | "
            f"{median:.1f} ({low:.1f} to {high:.1f}) |"
        )


if __name__ == "__main__":
    main()
