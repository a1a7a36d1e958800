"""Measures each kind of convolution of a backbone, here and in PyTorch.

    python -m benchmarks.convolution_speed --batch 8

Forward and backward passes are measured and compared with the speed of a matrix
product. This is the part of `benchmarks.train_step_speed` that depends on XLA and
PyTorch, except 1 x 1 convolutions, which `convolutions.product` computes as products.
"""

import argparse
import collections
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import timing
from cra_jax.backbones import convolutions, families
from cra_jax.runtime import devices


class Kind(NamedTuple):
    """Properties of a convolution: input size, channels, kernel size and stride."""

    in_px: int
    in_channels: int
    out_channels: int
    size: int
    stride: int

    def flop(self, batch: int) -> float:
        """FLOP of the forward pass and the gradients."""
        out_px = -(-self.in_px // self.stride)
        each = 2 * self.size**2 * self.in_channels * self.out_channels
        return (2.0 + self.to_input) * batch * out_px**2 * each

    @property
    def to_input(self) -> bool:
        """Whether a step needs the gradient to the input, which images do not."""
        return self.in_channels > 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compares the speed of convolutions with PyTorch."
    )
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--crop_px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    devices.keep_freed_memory()
    kinds = _count_kinds(options.backbone, options.crop_px)
    rows: list[list[str]] = []
    total: dict[str, float] = collections.defaultdict(float)
    for kind, count in kinds.items():
        times = timing.measure_alternately(
            {"here": _ours(kind, options.batch), "PyTorch": _peer(kind, options.batch)},
            repeats=options.repeats,
        )
        flop = kind.flop(options.batch)
        middle = {side: statistics.median(taken) for side, taken in times.items()}
        for side, taken in middle.items():
            total[side] += count * taken
        total["flop"] += count * flop
        rows.append(
            [
                f"{kind.size} x {kind.size} / {kind.stride}, {kind.in_px} px,"
                f" {kind.in_channels} to {kind.out_channels}",
                str(count),
                *(timing.summary(taken) for taken in times.values()),
                *(f"{flop / taken / 1e6:.0f}" for taken in middle.values()),
            ]
        )
    rows.append(
        [
            "total",
            str(sum(kinds.values())),
            *(f"{total[side]:.0f}" for side in ("here", "PyTorch")),
            *(
                f"{total['flop'] / total[side] / 1e6:.0f}"
                for side in ("here", "PyTorch")
            ),
        ]
    )
    print(timing.machine())
    print(f"{options.backbone}, batch {options.batch}, {options.crop_px} px, float32")
    header = ["convolution", "count", "ms, here", "ms, PyTorch"]
    print(timing.table([*header, "GFLOP/s, here", "GFLOP/s, PyTorch"], rows))
    print(f"for comparison: {timing.peak_flops()[1]}")


def _count_kinds(backbone: str, crop_px: int) -> dict[Kind, int]:
    """Counts the convolutions of each kind in a backbone."""
    counts = collections.Counter()

    def note(call: Callable, args: tuple, kwargs: dict, context: Any):
        if isinstance(context.module, convolutions.Conv):
            conv: Any = context.module
            x = args[0]
            kind = Kind(x.shape[1], x.shape[-1], conv.features, conv.size, conv.stride)
            counts[kind] += 1
        return call(*args, **kwargs)

    network = families.create_backbone(backbone, 200)
    images = jax.ShapeDtypeStruct((1, crop_px, crop_px, 3), jnp.float32)
    with nn.intercept_methods(note):
        jax.eval_shape(network.init, jax.random.key(0), images)
    return counts


def _arrays(kind: Kind, batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, kind.in_px, kind.in_px, kind.in_channels))
    shape = (kind.size, kind.size, kind.in_channels, kind.out_channels)
    return x.astype(np.float32), rng.normal(size=shape).astype(np.float32)


def _ours(kind: Kind, batch: int) -> Callable[[], object]:
    x, kernel = _arrays(kind, batch)
    conv = convolutions.Conv(kind.out_channels, kind.size, kind.stride)

    def apply(kernel: jax.Array, x: jax.Array) -> Any:
        return conv.apply({"params": {"kernel": kernel}}, x)

    @jax.jit
    def step(kernel, x, cotangent):
        y, back = jax.vjp(apply, kernel, x)
        to_kernel, to_input = back(cotangent)
        return y, to_kernel, to_input if kind.to_input else None

    inputs = jax.device_put((kernel, x))
    inputs = (*inputs, jnp.ones_like(apply(*inputs)))
    return lambda: jax.block_until_ready(step(*inputs))


def _peer(kind: Kind, batch: int) -> Callable[[], object]:
    arrays = _arrays(kind, batch)
    images, weight = (torch.tensor(array) for array in arrays)
    images = images.permute(0, 3, 1, 2)  # channels_last
    weight = weight.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    images.requires_grad_(kind.to_input)
    weight.requires_grad_()
    cotangents: list = []

    def action() -> object:
        images.grad = weight.grad = None
        y = torch.nn.functional.conv2d(
            images, weight, stride=kind.stride, padding=kind.size // 2
        )
        if not cotangents:
            cotangents.append(torch.ones_like(y))
        y.backward(cotangents[0])
        return weight.grad

    return action


if __name__ == "__main__":
    main()
