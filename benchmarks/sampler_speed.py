"""Compares the sampler with torch's `grid_sample` and JAX's `map_coordinates`.

    python -m benchmarks.sampler_speed
    python -m benchmarks.sampler_speed --batch 64 --topology v5p:1x1x1    # compile only

Samples attentions of 224 px from images of 448 px in float32. Measures the forward
pass, and the forward pass with the gradient to the grid, as in a training step.

With --topology, both gather implementations are compiled for a TPU, and the memory of
the programs is printed (`pip install libtpu`; no TPU is needed).
"""

import argparse
import os
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.scipy.ndimage import map_coordinates
from torch.nn.functional import grid_sample

from benchmarks import memory, timing
from cra_jax import geometry


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the speed of the sampler.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image_px", type=int, default=448)
    parser.add_argument("--attention_px", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="measure processor time, for a machine that runs other programs",
    )
    parser.add_argument(
        "--topology", default="", help="TPU topology, such as v5p:1x1x1"
    )
    options = parser.parse_args()
    if options.topology:
        return _compile_and_measure(options)
    actions = {
        f"{peer}, {what}": action
        for peer, make in (
            ("this", _ours),
            ("map_coordinates", _map_coordinates),
            ("grid_sample", _torch),
        )
        for what, action in make(*_inputs(options)).items()
    }
    clock = time.process_time if options.cpu_time else time.perf_counter
    times = timing.measure_alternately(actions, repeats=options.repeats, clock=clock)
    print(timing.machine())
    size = f"{options.batch} x {options.image_px} to {options.attention_px}"
    unit = "ms of the processor" if options.cpu_time else "ms"
    rows = []
    for name, taken in times.items():
        peer = times[f"grid_sample, {name.partition(', ')[2]}"]
        rows.append([name, timing.summary(taken), f"{timing.ratio(taken, peer):.2f}"])
    print(timing.table([size, unit, "relative to grid_sample"], rows))


def _compile_and_measure(options: argparse.Namespace) -> None:
    """Prints memory and traffic of the attention and its gradient in a TPU program."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host
    where = memory.place(memory.find_device(options.topology))
    side = (options.attention_px, options.attention_px)

    def attend(gamma_res, images, kernel):
        """The attention between operations of a training step, which affect layouts."""
        images = (images.astype(jnp.float32) - 120) / 60
        grid = geometry.attention_grid(gamma_res, side)
        attention = geometry.bilinear_sample(images, grid)
        return jax.lax.conv(
            attention.transpose(0, 3, 1, 2), kernel, (2, 2), "SAME"
        ).var()

    image = (options.batch, options.image_px, options.image_px, 3)
    shapes = (
        jax.ShapeDtypeStruct((options.batch, 4), jnp.float32),
        jax.ShapeDtypeStruct(image, jnp.uint8),
        jax.ShapeDtypeStruct((64, 3, 7, 7), jnp.float32),
    )
    rows = []
    for name in ("_gather_from_planes", "_gather_squares"):
        with mock.patch.object(
            geometry, "_gather_from_planes", getattr(geometry, name)
        ):
            step = jax.jit(jax.grad(attend), in_shardings=where, out_shardings=where)
            program = step.lower(*shapes).compile()
        found, cost = program.memory_analysis(), program.cost_analysis() or {}
        sizes = (getattr(found, "temp_size_in_bytes", 0), cost.get("bytes accessed", 0))
        rows.append([name.strip("_"), *(f"{size / 1e9:.1f}" for size in sizes)])
        jax.clear_caches()
    print(timing.machine())
    size = f"{options.batch} x {options.image_px} to {options.attention_px}"
    print(timing.table([size, "temporaries, GB", "traffic, GB"], rows))


def _inputs(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, grids as in training, and the gradient to the samples."""
    rng = np.random.default_rng(0)
    batch, side = options.batch, options.attention_px
    image = rng.normal(size=(batch, options.image_px, options.image_px, 3))
    low, high = (-0.3, -0.3, 0.35, -0.5), (0.3, 0.3, 0.5, 0.5)
    gamma_res = jnp.asarray(rng.uniform(low, high, (batch, 4)), jnp.float32)
    grid = np.asarray(geometry.attention_grid(gamma_res, (side, side)))
    cotangent = rng.normal(size=(batch, side, side, 3))
    return image.astype(np.float32), grid, cotangent.astype(np.float32)


def _both(sample, image, grid, cotangent):
    """Compiles the forward pass, and the forward pass with the gradient to the grid."""
    arrays = [jnp.asarray(x) for x in (image, grid, cotangent)]

    def with_gradient(image, grid, cotangent):
        sampled, backward = jax.vjp(lambda grid: sample(image, grid), grid)
        return sampled, backward(cotangent)

    forward, both = jax.jit(sample), jax.jit(with_gradient)
    return {
        "forward": lambda: jax.block_until_ready(forward(*arrays[:2])),
        "with gradient": lambda: jax.block_until_ready(both(*arrays)),
    }


def _ours(image, grid, cotangent):
    return _both(geometry.bilinear_sample, image, grid, cotangent)


def _map_coordinates(image, grid, cotangent):
    def one_channel(plane, grid):
        height, width = plane.shape
        x = (grid[..., 0] + 1) * (0.5 * (width - 1))
        y = (grid[..., 1] + 1) * (0.5 * (height - 1))
        return map_coordinates(plane, [y, x], order=1)

    channels = jax.vmap(one_channel, in_axes=(-1, None), out_axes=-1)
    return _both(jax.vmap(channels), image, grid, cotangent)


def _torch(image, grid, cotangent):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image, cotangent = (
        torch.tensor(x).permute(0, 3, 1, 2).contiguous().to(device)
        for x in (image, cotangent)
    )
    grid = torch.tensor(grid).to(device)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def forward():
        grid_sample(image, grid, align_corners=True)
        wait()

    def with_gradient():
        points = grid.clone().requires_grad_()
        grid_sample(image, points, align_corners=True).backward(cotangent)
        wait()

    return {"forward": forward, "with gradient": with_gradient}


if __name__ == "__main__":
    main()
