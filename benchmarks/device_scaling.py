"""Measures the training step on 1, 2, 4 and 8 devices.

    python -m benchmarks.device_scaling    # 8 fake devices of a CPU
    python -m benchmarks.device_scaling --crop_px 448 --batch 64 --backbone resnet50

Weak scaling: each device has a batch of the same size. Strong scaling: the devices
share one batch. In both cases the ideal is n times the images/s with n devices. The
time of the all-reduce is the difference from the same step without communication.

Fake devices of a CPU share its cores. Their ideal is the images/s of one device, and
the loss is the cost of dividing the work.
"""

import argparse
import os
import statistics
from typing import Any

BATCHES = ("weak", "strong")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the scaling over devices.")
    parser.add_argument("--backbone", default="resnet10")
    parser.add_argument("--kind", default="cra")
    parser.add_argument("--crop_px", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--most", type=int, default=8, help="largest number of devices")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    # Set before JAX starts; it affects CPUs only.
    fake = f" --xla_force_host_platform_device_count={options.most}"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + fake

    import jax

    from benchmarks import timing

    devices = jax.local_devices()
    counts = [n for n in (1, 2, 4, 8) if n <= min(len(devices), options.most)]
    actions = {}
    for batch in BATCHES:
        for n in counts:
            size = options.batch * (n if batch == "weak" else 1)
            if size < 2 * n:
                raise SystemExit(
                    f"--batch={options.batch} has no pair of images for each of "
                    f"{n} devices: give at least {2 if batch == 'weak' else 2 * n}"
                )
            for reduced in (True, False):
                actions[f"{batch}, {n}, {reduced}"] = _action(
                    options, devices[:n], size, reduced
                )
    times = timing.measure_alternately(actions, repeats=options.repeats)
    print(timing.machine())
    print(
        f"{options.backbone}, {options.kind}, {options.crop_px} px, batch "
        f"{options.batch} on each device (weak) or on all (strong)"
    )
    rows = []
    for batch in BATCHES:
        for n in counts:
            size = options.batch * (n if batch == "weak" else 1)
            taken = times[f"{batch}, {n}, True"]
            unreduced = times[f"{batch}, {n}, False"]
            gain = timing.ratio(times[f"{batch}, 1, True"], taken)
            rows.append(
                [
                    batch,
                    str(n),
                    timing.summary(taken),
                    f"{1000 * size / statistics.median(taken):.1f}",
                    f"{gain * n if batch == 'weak' else gain:.2f}",
                    f"{100 * (1 - timing.ratio(unreduced, taken)):.0f} %",
                ]
            )
    header = ["scaling", "devices", "ms per step", "images/s", "relative to one"]
    print(timing.table([*header, "share of all-reduce"], rows))


def _action(options: argparse.Namespace, devices: Any, size: int, reduced: bool):
    """Returns a function that runs a step on these devices with a batch of `size`."""
    import jax
    import numpy as np

    from benchmarks.memory import one_device_step
    from configs.cub import get_config
    from cra_jax import train_step
    from cra_jax.runtime import devices
    from cra_jax.training import build

    config = get_config(f"{options.backbone},{options.kind}")
    config.model.pretrained = ""
    config.data.crop_px, config.art.size_px = options.crop_px, options.crop_px // 2
    config.train.batch_size = size
    run = one_device_step(
        config, 200, all_mean=devices.all_mean if reduced else lambda tree: tree
    ).run
    training = build.build_training(config, 200, steps_per_epoch=1000)
    step = devices.train_step(run, devices=devices)
    state = train_step.create_state(
        jax.random.key(0), training.network, training.optimizer, crop_px=options.crop_px
    )
    current = [devices.on_each_device(state, devices=devices)]
    rng = np.random.default_rng(0)
    shape = (size, options.crop_px, options.crop_px, 3)
    batch = {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "label": rng.integers(0, 200, size, dtype=np.int32),
        "flip": np.zeros(size, bool),
    }
    batch = devices.split(batch, len(devices))

    def action() -> None:
        current[0], terms = step(current[0], batch)
        jax.block_until_ready((current[0], terms))

    return action


if __name__ == "__main__":
    main()
