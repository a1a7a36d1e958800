"""Estimates the cost of the paper's tables on hardware, by arithmetic alone.

    python -m benchmarks.scale                           # print the page
    python -m benchmarks.scale --write docs/scale.md

The time of a step is computed from its FLOPs and an assumed share of the device's peak,
the time of an all-reduce from its bytes and the bandwidth of a link. Every input is a
constant here or in `benchmarks.reproduce` and `benchmarks.timing`, with its source.
Parameters are counted from the shapes of the network.
"""

import argparse
import functools
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks import memory, timing
from benchmarks.reproduce import (
    BASELINE_SHARE,
    CELLS,
    CRA_GFLOP,
    EPOCHS,
    TRAIN_IMAGES,
    Cell,
)
from configs.cub import get_config
from cra_jax.model import KINDS
from cra_jax.reports import paper_results
from cra_jax.runtime import files

# Settings of the paper, with the values of configs/cub.py.
BATCH, CROP_PX, SHORT_SIDE_PX = 64, 448, 512
EVAL_EVERY, BUCKET_PX = 5, 64  # eval.every_epochs, eval.bucket_px

# Assumed: model FLOPs over the data sheet's. 18 % is what ResNet-50 reached at 224 px
# in MLPerf's entries on H100 (about 7,000 images/s); PyTorch with mixed precision gets
# 19 % on an A100 (2,470 images/s); there is no figure for a v5e. The page shows a lower
# and a higher share as well.
SHARE, SHARES = 0.18, (0.30, 0.18, 0.10)
# Assumed: evaluation computes in float32, at half the rate of bfloat16.
EVAL_SPEED = 0.5
# Assumed: latency of an all-reduce.
LATENCY_S = 20e-6
# Assumed: the share of a step from which the time of an all-reduce is relevant.
MATTERS = 0.10

# Measured: `python -m benchmarks.train_step_speed --batch 8`, 224 px, ResNet-50, 2 CPU
# cores, commit 6370ae9. CPU_SHARE is the share of the cores' matrix product speed.
CPU_STEP_S, CPU_BATCH, CPU_CROP_PX = {"baseline": 2.027, "cra": 3.227}, 8, 224
CPU_SHARE = 0.42
# Measured: `python -m benchmarks.input_speed`, commit cdcc84b: median, lowest, highest.
CACHE_RATE, CACHE_CORES = (1045, 733, 1810), 2
# Measured: `python -m benchmarks.input_speed --disk`, mean of 294 images per dataset;
# then the size of the whole dataset and of its training split.
IMAGE_MB = {"cub": 1.11, "cars": 1.53}
CACHE_GB, TRAIN_GB = {"cub": 13.0, "cars": 24.7}, {"cub": 6.6, "cars": 12.4}
# Counted: `python -m benchmarks.memory --dtypes bfloat16`, GB on one device: the state,
# and the activations kept for the backward pass of 64 images, without and with
# model.remat.
STATE_GB = {"resnet50": 0.6, "resnet101": 1.1}
KEPT_GB = {"resnet50": (16.8, 6.0), "resnet101": (24.8, 8.6)}
FREE = 0.2  # of a device's memory, for temporary arrays; see docs/devices.md


class Machine(NamedTuple):
    """A machine with accelerators.

    Attributes:
      name: name on the page.
      kind: device kind, a key of `timing.PEAKS`.
      devices: number of devices that share a batch.
      memory_gb: memory of a device in GB, from its data sheet.
      memory_gbs: memory bandwidth of a device in GB/s, from its data sheet.
      link_gbs: bandwidth of a ring of its devices in GB/s, one way.
    """

    name: str
    kind: str
    devices: int
    memory_gb: int
    memory_gbs: int
    link_gbs: float

    def flops(self, share: float) -> float:
        """FLOP/s of one device at a share of its peak."""
        return share * timing.PEAKS[self.kind]


# GB/s one way. From the data sheets: NVLink 4 has 900 both ways together. PCIe 4 x16
# has 32, of which about 25 arrive. A v5e chip has four links of 400 Gbit/s; a ring
# through a slice that is a grid uses two.
NVLINK, PCIE, ICI = 450.0, 25.0, 2 * 400 / 8
NETWORKS_GBIT = (25, 100, 200)  # common networks between hosts
A100 = Machine("1 A100", "A100", 1, 80, 2039, PCIE)
H100 = Machine("1 H100", "H100", 1, 80, 3350, NVLINK)
H100_8 = Machine("8 H100", "H100", 8, 80, 3350, NVLINK)
V5E_8 = Machine("v5e-8", "TPU v5e", 8, 16, 819, ICI)
MACHINES = (A100, H100, H100_8, V5E_8)
SLICE = Machine("v5e-64", "TPU v5e", 64, 16, 819, ICI)


def gflop(backbone: str, kind: str) -> float:
    """GFLOP of a training step per image."""
    return CRA_GFLOP[backbone] * (1 if kind == "cra" else BASELINE_SHARE)


def steps(data: str) -> int:
    """Steps of a training. Incomplete batches are dropped."""
    return EPOCHS * (TRAIN_IMAGES[data] // BATCH)


def compute_s(gflop: float, images: float, machine: Machine, share: float) -> float:
    """Seconds of the arithmetic of a step with `images` on each device."""
    return 1e9 * gflop * images / machine.flops(share)


def ring_s(size: float, devices: int, gbs: float) -> float:
    """Seconds of an all-reduce over a ring.

    Each device sends 2 (n - 1) / n of the bytes.

    Args:
      size: bytes of the all-reduce.
      devices: n, the number of devices.
      gbs: bandwidth in GB/s, one way.
    """
    return 2 * (devices - 1) / devices * size / (1e9 * gbs)


def least_devices(gflop: float, size: float, machine: Machine, per: int = 1) -> int:
    """Least number of devices at which an all-reduce takes `MATTERS` of a step.

    The devices share the paper's batch, so that each computes less if there are more.

    Args:
      gflop: GFLOP of a step per image.
      size: bytes of the all-reduce.
      machine: devices and link; its number of devices is ignored.
      per: devices at each end of a link; for a network, the devices of a host.

    Returns:
      A power of two times `per`; 0 if no number up to `BATCH` reaches the share.
    """
    ends = 2
    while ends * per <= BATCH:
        reduce_s = ring_s(size, ends, machine.link_gbs)
        work_s = compute_s(gflop, BATCH / (ends * per), machine, SHARE)
        if reduce_s >= MATTERS * (reduce_s + work_s):
            return ends * per
        ends *= 2
    return 0


@functools.cache
def count_bytes(backbone: str, kind: str) -> tuple[int, int]:
    """Bytes that are all-reduced in a step, and the number of BatchNorm layers.

    The bytes are those of the gradient and of the running statistics. The layers of
    both streams are counted.
    """
    config = get_config(f"{backbone},{kind}")
    config.model.pretrained = ""
    state = memory.one_device_step(config, num_classes=200).state
    layers = len(jax.tree.leaves(state.batch_stats)) // 2  # mean and variance
    return memory.size(state.params) + memory.size(state.batch_stats), layers


def traffic_s(backbone: str, machine: Machine) -> float:
    """Seconds to write and read the activations of CRA-CNN for a batch once."""
    share_gb = KEPT_GB[backbone][0] / machine.devices
    return 2 * share_gb / machine.memory_gbs


def all_reduce_s(
    backbone: str, kind: str, machine: Machine, *, sync: bool = False
) -> float:
    """Seconds of the all-reduce of a step, without overlap with computation.

    Args:
      backbone: value of `model.backbone`.
      kind: value of `model.kind`.
      machine: the devices.
      sync: whether BatchNorm statistics are shared. Mean and variance of each layer and
        their gradients are then all-reduced one after the other.
    """
    if machine.devices == 1:
        return 0.0
    size, layers = count_bytes(backbone, kind)
    gradient = ring_s(size, machine.devices, machine.link_gbs)
    return gradient + (4 * layers * LATENCY_S if sync else 0)


def eval_flop(cell: Cell) -> tuple[float, float]:
    """FLOP of all evaluations under "center", and of one under "full".

    A forward pass takes a third of a training step of the baseline. "full" evaluates
    whole images, whose longer side is padded by half of `BUCKET_PX` on average.
    """
    forward = 1e9 * gflop(cell.backbone, "baseline") / 3
    images = paper_results.TEST_IMAGES[cell.data]
    center = forward * images * (EPOCHS // EVAL_EVERY + 1)
    longer_px = 1e6 * IMAGE_MB[cell.data] / 3 / SHORT_SIDE_PX
    area = SHORT_SIDE_PX * (longer_px + BUCKET_PX / 2) / CROP_PX**2
    return center, forward * images * area


def hours(
    cell: Cell, machine: Machine, share: float = SHARE, *, sync: bool = False
) -> float:
    """Hours of a cell of Table 1, with evaluation under both protocols."""
    work = gflop(cell.backbone, cell.kind)
    step = compute_s(work, BATCH / machine.devices, machine, share)
    step += all_reduce_s(cell.backbone, cell.kind, machine, sync=sync)
    scoring = sum(eval_flop(cell)) / (
        EVAL_SPEED * machine.flops(share) * machine.devices
    )
    return (steps(cell.data) * step + scoring) / 3600


def fits(backbone: str, machine: Machine, extra_gb: float = 0) -> str:
    """Setting with which CRA-CNN at the paper's batch fits into a device's memory.

    Args:
      backbone: value of `model.backbone`.
      machine: devices that share the batch.
      extra_gb: other data in the memory of a device, in GB.

    Returns:
      "default", "`model.remat=True`", or "no".
    """
    available_gb = (1 - FREE) * machine.memory_gb - STATE_GB[backbone] - extra_gb
    settings = ("default", "`model.remat=True`")
    for setting, kept in zip(settings, KEPT_GB[backbone], strict=True):
        if kept / machine.devices <= available_gb:
            return setting
    return "no"


def _paragraph(text: str) -> str:
    """Wraps a paragraph or a list item at 95 columns."""
    return textwrap.fill(
        " ".join(text.split()),
        95,
        break_long_words=False,
        break_on_hyphens=False,
        subsequent_indent="  " if text.lstrip().startswith("- ") else "",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _introduction() -> str:
    rates = {
        kind: 1e9
        * gflop("resnet50", kind)
        * (CPU_CROP_PX / CROP_PX) ** 2
        * CPU_BATCH
        / taken
        for kind, taken in CPU_STEP_S.items()
    }
    cell = Cell("cub", "resnet50", "cra")
    days = steps(cell.data) * BATCH * 1e9 * gflop("resnet50", "cra") / rates["cra"]
    return "\n\n".join(
        [
            "# Scale",
            _paragraph(f"""**These are estimates: no accelerator was used for this
            page.** They assume that a training step reaches {_percent(SHARE)} of a
            device's peak in bfloat16, as good ResNets do on GPUs. Estimates for
            {_percent(min(SHARES))} and {_percent(max(SHARES))} are given as well."""),
            _paragraph(f"""Measured on 2 CPU cores (ResNet-50, {CPU_CROP_PX} px, batches
            of {CPU_BATCH}): a step takes {1000 * CPU_STEP_S["baseline"]:,.0f} ms for
            the baseline and {1000 * CPU_STEP_S["cra"]:,.0f} ms for CRA-CNN. This is
            {rates["baseline"] / 1e9:.0f} and {rates["cra"] / 1e9:.0f} GFLOP/s, about
            {_percent(CPU_SHARE)} of the speed of these cores in a matrix product. At
            this speed, one training of CRA-CNN on CUB at {CROP_PX} px would take
            {days / 86400:.0f} days."""),
            _paragraph("""`python -m benchmarks.scale --write docs/scale.md` writes this
            page from named constants with their sources. To replace an assumption by a
            measurement, run its command on the machine:"""),
            timing.table(
                ["assumption", "measurement"],
                [
                    (
                        "share of the peak",
                        "`python -m benchmarks.train_step_speed --crop_px 448 "
                        "--batch 64`",
                    ),
                    (
                        "time of an all-reduce, and its overlap with computation",
                        "`python -m benchmarks.device_scaling --crop_px 448 --batch 64 "
                        "--backbone resnet50`",
                    ),
                    (
                        "latency of an all-reduce",
                        "images/s in the log of a run, with and without "
                        "`--config.bn.sync=True`",
                    ),
                    (
                        "images/s from the image cache per core",
                        "`python -m benchmarks.input_speed --data CUB_200_2011`",
                    ),
                    (
                        "memory of a device",
                        "`python -m benchmarks.memory --compile --dtypes bfloat16`",
                    ),
                ],
            ).replace("---:", "---"),
        ]
    )


def _all_cells() -> str:
    rows = []
    for m in MACHINES:
        totals = [f"{sum(hours(c, m, s) for c in CELLS):.1f}" for s in SHARES]
        synced = f"{sum(hours(c, m, sync=True) for c in CELLS):.1f}"
        rows.append((m.name, *totals, synced if m.devices > 1 else "same"))
    each = [hours(c, V5E_8, s) for s in SHARES for c in CELLS]
    longest = [max(each[i : i + 8]) for i in range(0, len(each), len(CELLS))]
    synced = max(hours(c, V5E_8, sync=True) for c in CELLS)
    rows.append(
        (
            f"{len(CELLS)} x v5e-8, one cell on each",
            *(f"{x:.1f}" for x in longest),
            f"{synced:.1f}",
        )
    )
    head = ["Tables 1 to 3, hours"]
    head += [f"{_percent(s)} of the peak" for s in SHARES]
    head += [f"{_percent(SHARE)}, `bn.sync=True`"]
    trained = sum(steps(c.data) * BATCH * gflop(c.backbone, c.kind) for c in CELLS)
    center, full = (sum(x) for x in zip(*map(eval_flop, CELLS), strict=True))
    return "\n\n".join(
        [
            "## Hours",
            timing.table(head, rows),
            _paragraph(f"""The tables need {len(CELLS)} trainings: "ours" of Tables 2
            and 3 are four of them, evaluated on whole images. Training takes
            {1e9 * trained:.2g} FLOP, evaluation of centre crops every {EVAL_EVERY}
            epochs {center:.2g}, and one evaluation of whole images {full:.2g}.
            Evaluation computes in float32, which is assumed to run at half the rate of
            bfloat16. The all-reduce of the gradient is included, without overlap.
            Preparing the image cache, compiling and checkpoints are not included."""),
            _paragraph("""One H100 completes all tables in an afternoon. With several
            devices, run one cell on each (`CUDA_VISIBLE_DEVICES`, and `--only` of
            `benchmarks.reproduce`): separate runs need no all-reduce, and BatchNorm
            uses the whole batch without `bn.sync`."""),
        ]
    )


def _by_cell() -> str:
    rows = [
        (
            f"{paper_results.NAMES[c.data]}, {c.backbone}, {KINDS[c.kind]}",
            f"{gflop(c.backbone, c.kind):.0f}",
            f"{steps(c.data):,}",
            *(f"{hours(c, m):.2f}" for m in MACHINES),
        )
        for c in CELLS
    ]
    head = ["cell of Table 1, hours", "GFLOP per image", "steps"]
    kinds = dict.fromkeys((c.backbone, c.kind) for c in CELLS)
    times = [
        (
            f"{backbone}, {KINDS[kind]}",
            *(
                " + ".join(
                    f"{1000 * x:.1f}"
                    for x in (
                        compute_s(gflop(backbone, kind), BATCH / m.devices, m, SHARE),
                        all_reduce_s(backbone, kind, m),
                    )
                    if x
                )
                for m in MACHINES
            ),
        )
        for backbone, kind in kinds
    ]
    names = [m.name for m in MACHINES]
    bounds = ", ".join(
        f"{1000 * traffic:.0f} ms on {m.name} ({_percent(traffic / work_s)} of the "
        f"step at {_percent(SHARE)} of the peak)"
        for m in (A100, H100, V5E_8)
        for traffic in [traffic_s("resnet50", m)]
        for work_s in [compute_s(gflop("resnet50", "cra"), BATCH / m.devices, m, SHARE)]
    )
    return "\n\n".join(
        [
            timing.table([*head, *names], rows),
            timing.table(
                ["step of 64 images, ms: arithmetic + all-reduce", *names], times
            ),
            _paragraph(f"""Arithmetic is the GFLOP of a step per image, times {BATCH}
            images, divided by the number of devices and {_percent(SHARE)} of the peak.
            A training has {EPOCHS} epochs of whole batches. A device with fewer images
            reaches a lower share of its peak: for 8 devices with 8 images each, use the
            {_percent(min(SHARES))} column of the first table."""),
            _paragraph(f"""Memory bandwidth also takes time. With ResNet-50, the
            backward pass of CRA-CNN keeps {KEPT_GB["resnet50"][0]:.0f} GB of
            activations per batch. Writing and reading them once takes {bounds}. Other
            memory traffic, such as the gradients of the activations and the BatchNorm
            statistics, takes a few times as long."""),
        ]
    )


def _pod_slice() -> str:
    size, _ = count_bytes("resnet50", "cra")
    most, two, four = BATCH // 2, 2 * SLICE.devices, 4 * SLICE.devices
    reduce_s = ring_s(size, SLICE.devices, SLICE.link_gbs)
    parts = []
    for batch in (two, four):
        work_s = compute_s(
            gflop("resnet50", "cra"), batch / SLICE.devices, SLICE, SHARE
        )
        parts.append(
            f"a batch of {batch} takes {1000 * work_s:.1f} ms of arithmetic and "
            f"{1000 * reduce_s:.1f} ms of all-reduce, "
            f"{_percent(reduce_s / (reduce_s + work_s))} of the step"
        )
    return "\n\n".join(
        [
            "### A pod slice",
            _paragraph(f"""On {SLICE.name}, the paper's batch of {BATCH} is one image
            per chip. L_cntr needs pairs, so the code reports an error that lists the
            possible batch sizes. At most {most} chips can share {BATCH} images. A slice
            is useful for:"""),
            _paragraph(f"""- Several cells or seeds at a time: rent {len(CELLS)} v5e-8
            instead of one {SLICE.name}, and run one cell on each, as in the last row of
            the first table."""),
            _paragraph(f"""- Larger batches, which need another learning rate. With
            ResNet-50 on {SLICE.name}, {parts[0]}; {parts[1]}."""),
        ]
    )


def _input() -> str:
    middle, low, high = (rate / CACHE_CORES for rate in CACHE_RATE)
    crop = 3 * CROP_PX**2
    rows = []
    for m in MACHINES:
        row = [m.name]
        for kind in ("cra", "baseline"):
            rate = m.devices * m.flops(SHARE) / 1e9 / gflop("resnet50", kind)
            row.append(f"{rate:,.0f}")
        cores = [f"{math.ceil(rate / x)}" for x in (middle, high, low)]
        row.append(f"{cores[0]} ({cores[1]} to {cores[2]})")
        row.append(f"{rate * crop / 1e9:.2f}")
        row.append(f"{rate * crop / 1e9 / m.devices:.2f}")
        rows.append(row)
    per = rows[1][3].partition(" ")[0]
    head = ["ResNet-50, images/s", "CRA-CNN", "baseline"]
    head += ["cores for the baseline", "GB/s per host", "GB/s per device"]
    return "\n\n".join(
        [
            "## Input",
            timing.table(head, rows),
            _paragraph(f"""The image cache delivered {CACHE_RATE[0]:,} images/s
            ({CACHE_RATE[1]} to {CACHE_RATE[2]:,}) on {CACHE_CORES} cores that also ran
            other programs: {middle:.0f} per core ({low:.0f} to {high:.0f}). A crop has
            {CROP_PX} x {CROP_PX} x 3 bytes (uint8). PCIe 4 transfers {PCIE:.0f} GB/s to
            a device, much more than needed. The default `data.workers=2` is enough for
            one A100; for one H100, set it to {per} or more. For 8 H100, measure the
            image cache first: its speed on more than {CACHE_CORES} cores was not
            measured. With `data.on_device=True` the images stay in the device's memory,
            and a step transfers only indices and crop positions. Several cells on one
            host need the sum of their rates."""),
            _paragraph("""The first epoch reads the image cache from disk. Later epochs
            read it from the operating system's page cache, if it fits; see below."""),
        ]
    )


def _all_reduce() -> str:
    backbone, kind = "resnet50", "cra"
    size, layers = count_bytes(backbone, kind)
    work = gflop(backbone, kind)
    links = [
        ("NVLink 4", H100_8, 8, 1),
        ("PCIe 4 x16, no NVLink", A100._replace(devices=8), 8, 1),
        ("ICI of v5e", V5E_8, 8, 1),
    ]
    for gbit in NETWORKS_GBIT:
        network = H100_8._replace(devices=16, link_gbs=gbit / 8)
        links.append((f"{gbit} Gbit/s, 2 hosts of 8 H100", network, 2, 8))
    rows = []
    for name, m, ends, per in links:
        reduce_s = ring_s(size, ends, m.link_gbs)
        work_s = compute_s(work, BATCH / m.devices, m, SHARE)
        whole = compute_s(work, BATCH, m, SHARE)
        first = least_devices(work, size, m, per)
        limit = 2 * size / (1e9 * m.link_gbs)
        rows.append(
            (
                name,
                f"{m.link_gbs:g}",
                f"{m.devices} {m.kind.removeprefix('TPU ')}",
                f"{1000 * reduce_s:.1f}",
                f"{1000 * work_s:.1f}",
                _percent(reduce_s / (reduce_s + work_s)),
                str(first) if first else f"none to {BATCH}",
                _percent(limit / (limit + whole)),
            )
        )
    head = ["link", "GB/s one way", "devices", "all-reduce, ms", "arithmetic, ms"]
    head += [
        f"share of a step, {BATCH} images in total",
        f"devices at {_percent(MATTERS)}",
        f"share of a step, {BATCH} images per device",
    ]
    synced = 4 * layers * LATENCY_S
    of_8 = compute_s(work, BATCH / 8, H100_8, SHARE)
    deep, _ = count_bytes("resnet101", kind)
    alone, _ = count_bytes(backbone, "baseline")
    return "\n\n".join(
        [
            "## All-reduce",
            timing.table(head, rows),
            _paragraph(f"""CRA-CNN with ResNet-50 all-reduces {size / 1e6:.0f} MB per
            step: the gradient of both streams in float32 and the running statistics of
            BatchNorm. It is {deep / 1e6:.0f} MB with ResNet-101, and
            {alone / 1e6:.0f} MB for the baseline with ResNet-50. A ring of n devices
            sends 2 (n - 1) / n of that over every link. Between hosts, n is the number
            of hosts, and the all-reduce within a host is not included."""),
            _paragraph(f""""Devices at {_percent(MATTERS)}" is the least number of
            devices, sharing the batch of {BATCH}, at which the all-reduce takes
            {_percent(MATTERS)} of a step. In the last column, each device has {BATCH}
            images, for any number of devices; this is a larger batch and therefore
            another experiment. XLA may overlap a part of the all-reduce with the
            backward pass, which is not taken into account."""),
            _paragraph(f"""Run the batch of {BATCH} on one host: over any of these
            networks, a step on two hosts of 8 H100 takes longer than on one."""),
            _paragraph(f"""`bn.sync=True` adds {4 * layers} small all-reduces, one after
            the other: mean and variance of {layers} layers of both streams, and their
            gradients. Their time is latency: at an assumed {1e6 * LATENCY_S:.0f} µs
            each, {1000 * synced:.1f} ms per step, compared with {1000 * of_8:.1f} ms of
            arithmetic on 8 H100. The update is then the same as on one device.
            `bn.group_size` also gives the same update on any number of devices, without
            communication, but with statistics over fewer images."""),
        ]
    )


def _memory() -> str:
    rate = A100.flops(SHARE) / 1e9 / gflop("resnet50", "cra")
    head = ["CRA-CNN, batch of 64", "GB per device", "ResNet-50", "ResNet-101"]
    head += [f"ResNet-101, {paper_results.NAMES[k]} `on_device`" for k in TRAIN_GB]
    rows = [
        (
            m.name,
            str(m.memory_gb),
            fits("resnet50", m),
            fits("resnet101", m),
            *(fits("resnet101", m, TRAIN_GB[k]) for k in TRAIN_GB),
        )
        for m in MACHINES
    ]
    return "\n\n".join(
        [
            "## Memory and disk",
            timing.table(head, rows).replace("---:", "---"),
            _paragraph(f"""The table compares {_percent(1 - FREE)} of the memory with
            counted, not measured, sizes: the state ({STATE_GB["resnet50"]} GB with
            ResNet-50, {STATE_GB["resnet101"]} GB with ResNet-101) and a device's share
            of the activations of {BATCH} images ({KEPT_GB["resnet50"][0]:.0f} and
            {KEPT_GB["resnet101"][0]:.0f} GB; with `model.remat`
            {KEPT_GB["resnet50"][1]} and {KEPT_GB["resnet101"][1]} GB). "Default" means
            that no option is needed. `model.remat` computes the forward pass again, up
            to a third more arithmetic, which the hours above do not include.
            `data.on_device` copies the whole training split to every device:
            {TRAIN_GB["cub"]} GB for CUB, {TRAIN_GB["cars"]} GB for Cars."""),
            _paragraph(f"""The image cache takes {CACHE_GB["cub"]} GB (CUB) and
            {CACHE_GB["cars"]} GB (Cars) on disk. Its training split,
            {TRAIN_GB["cub"]} and {TRAIN_GB["cars"]} GB, should fit into the page cache,
            so 32 GB of host memory are enough for either dataset. Otherwise each epoch
            reads it from disk: for the {rate:.0f} images/s of an A100, up to
            {rate * IMAGE_MB["cub"] / 1000:.1f} GB/s in random order. The training
            process itself holds the prefetched batches,
            {3 * CROP_PX**2 * BATCH / 1e6:.0f} MB each. Cells on the same host share one
            image cache and one compilation cache. With several hosts, each needs the
            image cache."""),
        ]
    )


def _code() -> str:
    return "\n\n".join(
        [
            "## What the code does",
            timing.table(
                ["limit", "implementation"],
                [
                    (
                        "decoding",
                        "once, on all cores, into a memory-mapped image cache "
                        "(`data.prepare`)",
                    ),
                    (
                        "batches",
                        "prefetched by threads (`data.workers`, "
                        "`data.prefetch_batches`)",
                    ),
                    (
                        "transfer to the device",
                        "uint8; flipping and normalization are part of the step",
                    ),
                    ("transfer of pixels", "none with `data.on_device=True`"),
                    (
                        "several hosts",
                        "each host prepares only its own rows of a batch",
                    ),
                    (
                        "all-reduce",
                        "one mean of gradient, statistics and metrics per step, after "
                        "`train.accumulate` micro-batches",
                    ),
                    (
                        "BatchNorm on several devices",
                        "statistics per device, `bn.sync`, or `bn.group_size`",
                    ),
                    (
                        "device memory",
                        "bfloat16, `model.remat`, `train.accumulate`; the state is "
                        "donated",
                    ),
                    (
                        "batch size not divisible by the devices",
                        "an error that lists the possible sizes",
                    ),
                ],
            ).replace("---:", "---"),
            _paragraph("""Not implemented: more overlap of all-reduce and backward pass
            than XLA provides; gradient compression; sharding of the state, the dataset
            or the model (each device holds all of them); copying batches to the devices
            on a separate thread (transfers are asynchronous, so a copy may overlap with
            the previous step)."""),
        ]
    )


def page() -> str:
    """Returns the page as Markdown."""
    parts = [_introduction(), _all_cells(), _by_cell(), _pod_slice(), _input()]
    return "\n\n".join([*parts, _all_reduce(), _memory(), _code()]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Estimates the cost of the paper's tables."
    )
    parser.add_argument(
        "--write", type=Path, help="write to this file instead of standard output"
    )
    target = parser.parse_args(argv).write
    if target and not target.parent.is_dir():
        parser.error(f"--write={target}: there is no directory {target.parent}")
    text = page()
    if target:
        files.write_atomically(target, text)
    print(f"written: {target}" if target else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
