"""Estimates the device memory of a training step.

    python -m benchmarks.memory               # counts arrays, in a minute
    python -m benchmarks.memory --compile     # also compiles each step
    python -m benchmarks.memory --compile --topology v5p:1x1x1    # for a TPU

No step runs; all arrays are shapes. The counted arrays are the state with its gradient,
and the activations that automatic differentiation keeps for the backward pass. A
compiler keeps fewer activations if it fuses operations, and adds temporary arrays:
leave 20 % of the memory free.

With --compile, the table has the peak memory of the compiled program: state, batch,
outputs that are not donated, and temporary arrays. On a CPU, convolutions are not
computed in bfloat16, so the values hold for a CPU only. `pip install libtpu` provides a
compiler for TPUs; no TPU is needed.
"""

import argparse
import collections
import itertools
import math
import os
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import timing
from configs.cub import get_config
from cra_jax import train_step
from cra_jax.input.normalize import normalize
from cra_jax.training import build


class Step(NamedTuple):
    """The training step of one device, and the shapes of its inputs."""

    run: Any
    loss: Any
    state: Any
    batch: Any
    accumulate: int


def one_device_step(
    config: Any, num_classes: int, *, all_mean: Any = lambda tree: tree
) -> Step:
    """Builds the step that training runs on each device; by default for one device."""
    training = build.build_training(config, num_classes, steps_per_epoch=100)
    loss = build.build_loss(config, training.network, steps_per_epoch=100)
    accumulate = config.train.accumulate
    run = train_step.make_train_step(
        loss,
        training.optimizer,
        learning_rate=lambda step: jnp.float32(config.optim.base_lr),
        normalize=partial(normalize, mean=config.data.mean, std=config.data.std),
        all_mean=all_mean,
        accumulate=accumulate,
    )
    side, b = config.data.crop_px, config.train.batch_size
    state = jax.eval_shape(
        lambda key: train_step.create_state(
            key, training.network, training.optimizer, crop_px=side
        ),
        jax.random.key(0),
    )
    batch = {
        "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8),
        "flip": jax.ShapeDtypeStruct((b,), jnp.bool),
        "label": jax.ShapeDtypeStruct((b,), jnp.int32),
    }
    return Step(run, loss, state, batch, accumulate)


def size(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def count_state(step: Step) -> int:
    """Bytes of the state, of a batch, and of the gradient.

    With micro-batches there are two gradients, one of which is the sum.
    """
    gradients = 1 if step.accumulate == 1 else 2
    return size(step.state) + gradients * size(step.state.params) + size(step.batch)


def count_kept(step: Step) -> int:
    """Bytes of the activations that are kept for the backward pass of a micro-batch."""
    b, *shape = step.batch["image"].shape
    images = jax.ShapeDtypeStruct((b // step.accumulate, *shape), jnp.float32)
    labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32)

    def forward(state: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            return step.loss(params, state.batch_stats, images, labels, state.step)[0]

        return jax.vjp(loss, state.params)[1]

    # Parameters are kept as well, but they are counted with the state.
    known = collections.Counter(map(_kind, jax.tree.leaves(step.state.params)))
    kept = jax.tree.leaves(jax.eval_shape(forward, step.state, images, labels))
    found = collections.Counter(map(_kind, kept)) - known
    return sum(count * math.prod(k[0]) * k[1].itemsize for k, count in found.items())


def _kind(x: Any) -> tuple[tuple[int, ...], Any]:
    return x.shape, x.dtype


def compile_and_measure(step: Step, device: Any) -> int:
    """Peak memory of the compiled step in bytes."""
    where = place(device)
    found: Any = (
        jax.jit(step.run, donate_argnums=0, in_shardings=where, out_shardings=where)
        .lower(step.state, step.batch)
        .compile()
        .memory_analysis()
    )
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def place(device: Any) -> NamedSharding:
    """Sharding that places all arrays on one device."""
    return NamedSharding(Mesh([device], ("devices",)), PartitionSpec())


def find_device(topology: str) -> Any:
    """First device of this machine, or a device of a TPU topology such as v5p:1x1x1."""
    if not topology:
        return jax.local_devices()[0]
    from jax.experimental import topologies

    # One chip on one host.
    return topologies.get_topology_desc(
        topology, platform="tpu", chips_per_host_bounds=(1, 1, 1), num_slices=1
    ).devices[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimates the memory of a step.")
    parser.add_argument(
        "--compile", action="store_true", help="compile each step as well"
    )
    parser.add_argument(
        "--topology", default="", help="TPU topology, such as v5p:1x1x1"
    )
    parser.add_argument("--backbones", nargs="+", default=["resnet50", "resnet101"])
    parser.add_argument("--variant", default="cra", help="such as plus or baseline")
    parser.add_argument("--batches", nargs="+", type=int, default=[64])
    parser.add_argument("--accumulate", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--remat", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--crop_px", type=int, default=448)
    options = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host
    print(f"\n{options.variant} at {options.crop_px} px, on one device; GB (1e9 bytes)")
    columns = ["backbone", "batch", "accumulate", "dtype", "remat"]
    columns += ["state", "activations", "sum"]
    device = find_device(options.topology) if options.compile else None
    if device is not None:
        print(f"compiler: for {device.device_kind} ({device.platform})")
        columns.append("compiled peak")
    print(timing.machine())
    rule = "---|---:|---:|---|---|" + "---:|" * (len(columns) - 5)
    print(f"\n| {' | '.join(columns)} |\n|{rule}", flush=True)
    for case in itertools.product(
        options.backbones,
        options.batches,
        options.accumulate,
        options.dtypes,
        options.remat,
    ):
        backbone, batch, accumulate, dtype, remat = case
        config = get_config(f"{backbone},{options.variant}")
        config.model.pretrained = ""
        config.data.crop_px = options.crop_px
        config.art.size_px = options.crop_px // 2
        config.train.batch_size, config.train.accumulate = batch, accumulate
        config.model.dtype, config.model.remat = dtype, bool(remat)
        step = one_device_step(config, num_classes=200)
        state, kept = count_state(step), count_kept(step)
        sizes = [state, kept, state + kept]
        if device is not None:
            sizes.append(compile_and_measure(step, device))
        described = (backbone, batch, accumulate, dtype, "yes" if remat else "no")
        figures = " | ".join(f"{size / 1e9:.1f}" for size in sizes)
        print(f"| {' | '.join(map(str, described))} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
