"""What a training step needs of a device's memory, as the compiler reports it.

    python -m benchmarks.memory                              # on this machine's device
    python -m benchmarks.memory --topology v5e:1x1x1         # a TPU that is not here
    python -m benchmarks.memory --backbones resnet101 --batches 8 32 --remat 1

Nothing runs: a step of one device is compiled for arrays that do not exist. What is
counted is what the program holds at its peak: the state and the batch, what it returns
beyond the donated state, and its temporaries. The runtime and the input that waits for
the next step come on top.

A compiler for TPUs comes with `pip install libtpu`; no TPU is needed for it. A CPU's
program is laid out for a CPU, which has no bfloat16 convolutions and fuses less: its
figures are upper bounds of what a GPU needs, no more.
"""

import argparse
import itertools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import timing
from configs.cub import get_config
from cra_jax import experiment, steps


class Memory(NamedTuple):
    """Bytes of a compiled step at its peak, and what they are made of."""

    held: int
    temporaries: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.held + self.temporaries


def one_device_step(config: Any, num_classes: int) -> tuple[Any, Any, Any]:
    """A device's step, without its neighbours, and shapes of its state and batch."""
    training = experiment.build_training(config, num_classes, steps_per_epoch=100)
    step = steps.make_train_step(
        experiment.build_loss(config, training.network, steps_per_epoch=100),
        training.optimizer,
        learning_rate=lambda step: jnp.float32(config.optim.base_lr),
        mean=config.data.mean,
        std=config.data.std,
        accumulate=config.train.accumulate,
    )
    side, b = config.data.crop_px, config.train.batch_size
    state = jax.eval_shape(
        lambda key: steps.create_state(
            key, training.network, training.optimizer, crop_px=side
        ),
        jax.random.key(0),
    )
    batch = {
        "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8),
        "flip": jax.ShapeDtypeStruct((b,), jnp.bool),
        "label": jax.ShapeDtypeStruct((b,), jnp.int32),
    }
    return step, state, batch


def measure(config: Any, num_classes: int, device: Any) -> Memory:
    """Compiles a step for a device, and asks the compiler."""
    step, state, batch = one_device_step(config, num_classes)
    where = NamedSharding(Mesh([device], ("devices",)), PartitionSpec())
    program = (
        jax.jit(step, donate_argnums=0, in_shardings=where, out_shardings=where)
        .lower(state, batch)
        .compile()
    )
    found: Any = program.memory_analysis()
    held = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    return Memory(held, found.temp_size_in_bytes)


def find_device(topology: str) -> Any:
    """This machine's first device, or one of a TPU by name, such as v5e:1x1x1."""
    if not topology:
        return jax.local_devices()[0]
    from jax.experimental import topologies

    # Of one chip on one host; the names are those of Google's machine types.
    return topologies.get_topology_desc(
        topology,
        platform="tpu",
        chips_per_host_bounds=(1, 1, 1),
        num_slices=1,
    ).devices[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a step, as a table.")
    parser.add_argument("--topology", default="", help="a TPU, such as v5e:1x1x1")
    parser.add_argument("--backbones", nargs="+", default=["resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--accumulate", nargs="+", type=int, default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--remat", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--crop_px", type=int, default=448)
    options = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
    device = find_device(options.topology)
    print(
        f"\nCRA-CNN at {options.crop_px} x {options.crop_px}, of one device; GB (1e9)"
    )
    print(
        f"compiled for {device.device_kind} ({device.platform}) on {timing.machine()}"
    )
    columns = ("backbone", "batch", "accumulate", "dtype", "remat")
    print(f"\n| {' | '.join(columns)} | peak | state and batch | temporaries |")
    print("|---|---:|---:|---|---|---:|---:|---:|", flush=True)
    for case in itertools.product(
        options.backbones,
        options.batches,
        options.accumulate,
        options.dtypes,
        options.remat,
    ):
        backbone, batch, accumulate, dtype, remat = case
        config = get_config(backbone)
        config.model.pretrained = ""
        config.data.crop_px = options.crop_px
        config.art.size_px = options.crop_px // 2
        config.train.batch_size, config.train.accumulate = batch, accumulate
        config.model.dtype, config.model.remat = dtype, bool(remat)
        found = measure(config, num_classes=200, device=device)
        sizes = (found.peak, found.held, found.temporaries)
        figures = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
        described = (backbone, batch, accumulate, dtype, "yes" if remat else "no")
        print(f"| {' | '.join(map(str, described))} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
