"""Measures a training step of CRA-CNN and the baseline, here and in PyTorch.

    python -m benchmarks.train_step_speed    # a CPU: 224 px, batch 4
    python -m benchmarks.train_step_speed --crop_px 448 --batch 64    # a GPU
    python -m benchmarks.train_step_speed --profile trace    # with a profile

A step starts with uint8 images on the host and ends with the updated weights. Both
sides have the same images, ResNet, losses and optimizer. On a GPU both compute in
bfloat16. The variant `plus` has no peer in PyTorch.

"utilization" is the model's FLOP, as XLA counts them before optimization, divided by
the FLOP of the device at its peak. "sampler and losses" is a step of CRA-CNN whose
streams are replaced by averages of the pixels: the cost of the method without the
ResNets.
"""

import argparse
import collections
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import timing, torch_baseline
from configs.cub import get_config
from cra_jax import model, schedule, train_step
from cra_jax.backbones import layers
from cra_jax.input.normalize import normalize
from cra_jax.runtime import devices
from cra_jax.training import build

KINDS = ("baseline", "cra")
PLUS = "plus"
ALONE = "sampler and losses, here"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compares the speed of a training step with PyTorch."
    )
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--crop_px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="measure torch.compile as well"
    )
    parser.add_argument(
        "--profile", type=Path, help="directory for a trace of one step"
    )
    options = parser.parse_args()
    devices.keep_freed_memory()
    images, labels = _images(options)
    actions, flops = {}, {}
    for kind in KINDS:
        actions[f"{kind}, here"], flops[kind] = _ours(kind, options, images, labels)
        for compiled in (False, True)[: 1 + options.compile]:
            name = f"{kind}, PyTorch" + ", compiled" * compiled
            actions[name] = _peer(kind, options, images, labels, compiled=compiled)
    actions[f"{PLUS}, here"], flops[PLUS] = _ours(PLUS, options, images, labels)
    actions[ALONE], flops[ALONE.partition(",")[0]] = _ours(
        "cra", options, images, labels, streams=False
    )
    times = timing.measure_alternately(actions, repeats=options.repeats)
    peak, source = timing.peak_flops()
    print(timing.machine())
    print(f"{options.backbone}, batch {options.batch}, {options.crop_px} px")
    rows = []
    for name, taken in times.items():
        kind, _, side = name.partition(", ")
        middle = statistics.median(taken)
        peer = times.get(f"{kind}, PyTorch")
        counts = side == "here" and name != ALONE
        baseline = times[f"baseline, {side}"]
        used = flops[kind] / (middle / 1000) / (peak * jax.device_count())
        rows.append(
            [
                name,
                timing.summary(taken, digits=0),
                f"{1000 * options.batch / middle:.2f}",
                f"{timing.ratio(peer, taken):.2f}" if peer else "",
                f"{timing.ratio(taken, baseline):.2f}",
                f"{100 * used:.1f} %" if counts else "",
            ]
        )
    header = ["step", "ms", "images/s", "speed relative to PyTorch"]
    print(timing.table([*header, "time relative to baseline", "utilization"], rows))
    print(f"utilization: relative to {source}, on {jax.device_count()} device(s)")
    share = timing.ratio(times[ALONE], times["cra, here"])
    print(f"sampler and losses: {100 * share:.1f} % of CRA-CNN's step")
    if options.profile:
        print(_profile(actions["cra, here"], options.profile))


def _profile(action: Callable[[], None], folder: Path, *, most: int = 12) -> str:
    """Traces one call and returns a table of the longest operations.

    Operations are grouped by XLA's name without its number. Times are sums over threads
    and devices. Perfetto, XProf and TensorBoard can open the directory.
    """
    with jax.profiler.trace(str(folder)):
        action()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    found = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name:
                    kind = re.sub(r"[.\d]+$", "", str(name))
                    found[kind] += event.duration_ns / 1e6
    total = sum(found.values())
    rows = [
        [kind, f"{taken:.0f}", f"{100 * taken / total:.0f} %"]
        for kind, taken in found.most_common(most)
    ]
    return timing.table(["operations", "ms", "share"], rows)


def _images(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (options.batch, options.crop_px, options.crop_px, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = rng.integers(0, options.classes, options.batch, dtype=np.int32)
    return images, labels


def _ours(kind: str, options: argparse.Namespace, images, labels, *, streams=True):
    """The step that the training loop runs, and its FLOP.

    Args:
      kind: a variant of `configs/cub.py`.
      options: options of the command line.
      images: uint8 ``[b, h, w, 3]``.
      labels: ``[b]``.
      streams: whether to keep both ResNets; if not, `_Averages` replaces them.
    """
    config = get_config(f"{options.backbone},{kind}")
    config.model.pretrained = ""
    config.data.crop_px = options.crop_px
    config.art.size_px = options.crop_px // 2
    config.train.batch_size = options.batch
    training = build.build_training(config, options.classes, steps_per_epoch=1000)
    network, step = training.network, training.step
    if not streams:
        network = _without_streams(config, options.classes)
        step = devices.train_step(
            train_step.make_train_step(
                build.build_loss(config, network, steps_per_epoch=1000),
                training.optimizer,
                learning_rate=lambda step: schedule.learning_rate(
                    step, steps_per_epoch=1000
                ),
                normalize=partial(
                    normalize, mean=config.data.mean, std=config.data.std
                ),
                all_mean=devices.all_mean,
            )
        )
    state = devices.on_each_device(
        train_step.create_state(
            jax.random.key(0), network, training.optimizer, crop_px=options.crop_px
        )
    )
    batch = {"image": images, "label": labels, "flip": np.zeros(len(labels), bool)}
    shapes = jax.eval_shape(lambda: state)
    counted = step.lower(shapes, devices.split(batch)).cost_analysis()
    # The count is that of one device.
    flops = (counted or {}).get("flops", 0.0) * jax.device_count()
    current = [state]

    def action():
        current[0], terms = step(current[0], devices.split(batch))
        jax.block_until_ready((current[0], terms))

    return action, flops


class _Averages(nn.Module):
    """A stream with little arithmetic: a linear layer on the mean colour."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> layers.Outputs:
        features = images.astype(jnp.float32)
        pooled = features.mean((1, 2))
        del train
        self.variable(
            "batch_stats", "mean", jnp.zeros, (3,)
        )  # training steps expect batch_stats
        logits = nn.Dense(self.num_classes)(pooled)
        return layers.Outputs(logits=logits, features=features, pooled=pooled)


def _without_streams(config: Any, num_classes: int) -> model.CRACNN:
    whole: Any = build.build_network(config, num_classes)
    return whole.clone(
        classification_stream=_Averages(num_classes),
        regularization_stream=_Averages(num_classes),
    )


def _peer(kind: str, options: argparse.Namespace, images, labels, *, compiled: bool):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = torch_baseline.make_step(
        options.backbone,
        options.classes,
        art_px=options.crop_px // 2,
        baseline=kind == "baseline",
        device=device,
        bfloat16=device == "cuda",
        compiled=compiled,
    )
    batch, classes = torch.tensor(images), torch.tensor(labels, dtype=torch.int64)
    return lambda: step(batch, classes).item()


if __name__ == "__main__":
    main()
