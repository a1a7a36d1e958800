"""What the paper's tables take on hardware that this code has not run on, on paper.

    python -m benchmarks.scale                           # print the page
    python -m benchmarks.scale --write docs/scale.md

Arithmetic alone: seconds of a step from its FLOPs and an assumed share of a device's
peak, and of an all-reduce from its bytes and a link's bandwidth. Every input is a
constant here or in `benchmarks.reproduce` and `benchmarks.timing`, with its source;
parameters are counted from the network's shapes.
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

# The paper's, as configs/cub.py has them.
BATCH, CROP_PX, SHORT_SIDE_PX = 64, 448, 512
EVAL_EVERY, BUCKET_PX = 5, 64  # eval.every_epochs, eval.bucket_px

# Assumed: model FLOPs over the data sheet's. 18 % is what ResNet-50 reached at 224 px
# in MLPerf's entries on H100 (about 7,000 images/s); PyTorch with mixed precision gets
# 19 % on an A100 (2,470 images/s); for a v5e there is no such figure here. The others
# are for those who doubt or hope.
SHARE, SHARES = 0.18, (0.30, 0.18, 0.10)
# Assumed: evaluation computes in float32, whose products run at half bfloat16's rate.
EVAL_SPEED = 0.5
# Assumed: what a small all-reduce costs, however small.
LATENCY_S = 20e-6
# Assumed: the share of an all-reduce in a step at which it begins to matter.
MATTERS = 0.10

# Measured: `python -m benchmarks.train_step_speed --batch 8`, 224 px, ResNet-50, 2 CPU
# cores, commit 6370ae9; the last is its share of the cores' own product of matrices.
CPU_STEP_S, CPU_BATCH, CPU_CROP_PX = {"baseline": 2.027, "cra": 3.227}, 8, 224
CPU_SHARE = 0.42
# Measured: `python -m benchmarks.input_speed`, commit cdcc84b: median, lowest, highest.
STORE_RATE, STORE_CORES = (1045, 733, 1810), 2
# Measured: `python -m benchmarks.input_speed --disk`, mean of 294 images of each set;
# then of all of a set, and of what trains.
IMAGE_MB = {"cub": 1.11, "cars": 1.53}
STORE_GB, TRAIN_GB = {"cub": 13.0, "cars": 24.7}, {"cub": 6.6, "cars": 12.4}
# Counted: `python -m benchmarks.memory --dtypes bfloat16`, GB on one device: the state,
# and what the backward pass keeps of 64 images, without and with model.remat.
STATE_GB = {"resnet50": 0.6, "resnet101": 1.1}
KEPT_GB = {"resnet50": (16.8, 6.0), "resnet101": (24.8, 8.6)}
FREE = 0.2  # of a device's memory, for work in progress, as docs/devices.md advises


class Machine(NamedTuple):
    """What one can rent.

    Attributes:
      name: for people.
      kind: of its devices, as `timing.PEAKS` calls it.
      devices: how many share a batch.
      memory_gb: of a device, by its data sheet.
      memory_gbs: how fast that is read or written, GB/s, by the same.
      link_gbs: what a ring of its devices passes on, GB/s one way.
    """

    name: str
    kind: str
    devices: int
    memory_gb: int
    memory_gbs: int
    link_gbs: float

    def flops(self, share: float) -> float:
        """FLOP/s of one device, at this share of its peak."""
        return share * timing.PEAKS[self.kind]


# GB/s one way. From the data sheets: NVLink 4 has 900 both ways together. PCIe 4 x16
# has 32, of which about 25 arrive. A v5e chip has four links of 400 Gbit/s; a ring
# through a slice that is a grid uses two.
NVLINK, PCIE, ICI = 450.0, 25.0, 2 * 400 / 8
NETWORKS_GBIT = (25, 100, 200)  # what hosts are usually joined by
A100 = Machine("1 A100", "A100", 1, 80, 2039, PCIE)
H100 = Machine("1 H100", "H100", 1, 80, 3350, NVLINK)
H100_8 = Machine("8 H100", "H100", 8, 80, 3350, NVLINK)
V5E_8 = Machine("v5e-8", "TPU v5e", 8, 16, 819, ICI)
MACHINES = (A100, H100, H100_8, V5E_8)
SLICE = Machine("v5e-64", "TPU v5e", 64, 16, 819, ICI)


def gflop(backbone: str, kind: str) -> float:
    """Of a training step, for an image."""
    return CRA_GFLOP[backbone] * (1 if kind == "cra" else BASELINE_SHARE)


def steps(data: str) -> int:
    """Of a training: whole batches alone are trained on."""
    return EPOCHS * (TRAIN_IMAGES[data] // BATCH)


def compute_s(gflop: float, images: float, machine: Machine, share: float) -> float:
    """Seconds of a step's arithmetic, with so many images on each device."""
    return 1e9 * gflop * images / machine.flops(share)


def ring_s(size: float, devices: int, gbs: float) -> float:
    """Seconds of an all-reduce over a ring: each device passes 2 (n - 1) / n of it on.

    Args:
      size: bytes.
      devices: n.
      gbs: bandwidth in GB/s, one way.
    """
    return 2 * (devices - 1) / devices * size / (1e9 * gbs)


def matters_from(gflop: float, size: float, machine: Machine, per: int = 1) -> int:
    """From how many devices on an all-reduce takes `MATTERS` of a step.

    All share the paper's batch, so that each has less to compute the more there are.

    Args:
      gflop: of a step, for an image.
      size: bytes of the all-reduce.
      machine: its devices and its link; its own number of devices does not count.
      per: devices at each end of a link: those of a host, for a network.

    Returns:
      A power of two times `per`; 0 where no number up to `BATCH` is enough.
    """
    ends = 2
    while ends * per <= BATCH:
        told = ring_s(size, ends, machine.link_gbs)
        worked = compute_s(gflop, BATCH / (ends * per), machine, SHARE)
        if told >= MATTERS * (told + worked):
            return ends * per
        ends *= 2
    return 0


@functools.cache
def counted(backbone: str, kind: str) -> tuple[int, int]:
    """Bytes that devices tell each other in a step, and layers of BatchNorm.

    The bytes are those of the gradient and of the running statistics. A layer counts
    once for each stream that it is in.
    """
    config = get_config(f"{backbone},{kind}")
    config.model.pretrained = ""
    state = memory.one_device_step(config, num_classes=200).state
    layers = len(jax.tree.leaves(state.batch_stats)) // 2  # mean and variance
    return memory.size(state.params) + memory.size(state.batch_stats), layers


def traffic_s(backbone: str, machine: Machine) -> float:
    """Seconds to write and read once what CRA-CNN's backward pass keeps of a batch."""
    share_gb = KEPT_GB[backbone][0] / machine.devices
    return 2 * share_gb / machine.memory_gbs


def told_s(backbone: str, kind: str, machine: Machine, *, sync: bool = False) -> float:
    """Seconds of a step's all-reduce, as if nothing was computed meanwhile.

    Args:
      backbone: as `model.backbone` calls it.
      kind: as `model.kind` calls it.
      machine: which devices.
      sync: whether BatchNorm's statistics are shared: each layer's mean and variance,
        one after the other, and their gradients.
    """
    if machine.devices == 1:
        return 0.0
    size, layers = counted(backbone, kind)
    gradient = ring_s(size, machine.devices, machine.link_gbs)
    return gradient + (4 * layers * LATENCY_S if sync else 0)


def eval_flop(cell: Cell) -> tuple[float, float]:
    """Of all scoring under "center", while training and after it; and under "full".

    A forward pass is a third of a training step of the baseline. "full" scores whole
    images, whose longer side is padded by half of `BUCKET_PX` on average.
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
    """Of a cell of Table 1, with its scores under both protocols."""
    work = gflop(cell.backbone, cell.kind)
    step = compute_s(work, BATCH / machine.devices, machine, share)
    step += told_s(cell.backbone, cell.kind, machine, sync=sync)
    scoring = sum(eval_flop(cell)) / (
        EVAL_SPEED * machine.flops(share) * machine.devices
    )
    return (steps(cell.data) * step + scoring) / 3600


def fits(backbone: str, machine: Machine, extra_gb: float = 0) -> str:
    """The lightest setting with which CRA-CNN at the paper's batch fits a device.

    Args:
      backbone: as `model.backbone` calls it.
      machine: its devices share the batch.
      extra_gb: what else lies in a device's memory.
    """
    room = (1 - FREE) * machine.memory_gb - STATE_GB[backbone] - extra_gb
    settings = ("as it is", "`model.remat=True`")
    for setting, kept in zip(settings, KEPT_GB[backbone], strict=True):
        if kept / machine.devices <= room:
            return setting
    return "no"


def _p(text: str) -> str:
    """A paragraph, or an item of a list, in lines that an editor shows whole."""
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
            "# Scale, on paper",
            _p(f"""**No GPU and no TPU has run this code: this page is arithmetic.** It
            assumes that a training step reaches {_percent(SHARE)} of a device's peak
            in bfloat16, which is what good ResNets reach on GPUs, and shows
            {_percent(min(SHARES))} and {_percent(max(SHARES))} beside it. What is
            measured so far is a step on 2 CPU cores (ResNet-50, {CPU_CROP_PX} px,
            batches of {CPU_BATCH}): {1000 * CPU_STEP_S["baseline"]:,.0f} ms for the
            baseline and {1000 * CPU_STEP_S["cra"]:,.0f} ms for CRA-CNN, which is
            {rates["baseline"] / 1e9:.0f} and {rates["cra"] / 1e9:.0f} GFLOP/s, about
            {_percent(CPU_SHARE)} of what those cores reach in a product of matrices.
            One CRA-CNN on CUB at {CROP_PX} px would keep them busy for
            {days / 86400:.0f} days."""),
            _p("""`python -m benchmarks.scale --write docs/scale.md` writes this page
            from named constants, each with its source beside it. To put a measurement
            in an assumption's place, run on the machine in question:"""),
            timing.table(
                ["what is assumed", "what measures it"],
                [
                    (
                        "the share of peak",
                        "`python -m benchmarks.train_step_speed --crop_px 448 "
                        "--batch 64`",
                    ),
                    (
                        "what an all-reduce costs, and what of it is hidden",
                        "`python -m benchmarks.device_scaling --crop_px 448 --batch 64 "
                        "--backbone resnet50`",
                    ),
                    (
                        "what a small all-reduce costs",
                        "images/s that a run logs, with `--config.bn.sync=True` less "
                        "without",
                    ),
                    (
                        "images/s from the image cache, by cores",
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
        rows.append((m.name, *totals, synced if m.devices > 1 else "the same"))
    each = [hours(c, V5E_8, s) for s in SHARES for c in CELLS]
    longest = [max(each[i : i + 8]) for i in range(0, len(each), len(CELLS))]
    synced = max(hours(c, V5E_8, sync=True) for c in CELLS)
    rows.append(
        (
            f"{len(CELLS)} x v5e-8, a cell on each",
            *(f"{x:.1f}" for x in longest),
            f"{synced:.1f}",
        )
    )
    head = ["all of Tables 1 to 3, hours"]
    head += [f"at {_percent(s)} of peak" for s in SHARES]
    head += [f"at {_percent(SHARE)}, `bn.sync=True`"]
    trained = sum(steps(c.data) * BATCH * gflop(c.backbone, c.kind) for c in CELLS)
    center, full = (sum(x) for x in zip(*map(eval_flop, CELLS), strict=True))
    return "\n\n".join(
        [
            "## Hours",
            timing.table(head, rows),
            _p(f"""Eight trainings are all there is to train: "ours" of Tables 2 and 3
            are four of them, scored on whole images. Training is {1e9 * trained:.2g}
            FLOP; scoring centre crops every {EVAL_EVERY} epochs {center:.2g}, and whole
            images, once, {full:.2g}. Scores are computed in float32, taken here at
            half of bfloat16's rate. Preparing the image cache, compiling and
            checkpoints are left out. The gradient's all-reduce is in, as if nothing
            was computed meanwhile."""),
            _p("""What to rent: one H100 for an afternoon. Eight of them pay for several
            seeds, and then best with a cell on each (`CUDA_VISIBLE_DEVICES`, and
            `--only` of `benchmarks.reproduce`): runs side by side lose nothing to
            all-reduce, and BatchNorm sees the whole batch without `bn.sync`."""),
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
    head = ["a cell of Table 1, hours", "GFLOP an image", "steps"]
    kinds = dict.fromkeys((c.backbone, c.kind) for c in CELLS)
    times = [
        (
            f"{backbone}, {KINDS[kind]}",
            *(
                " + ".join(
                    f"{1000 * x:.1f}"
                    for x in (
                        compute_s(gflop(backbone, kind), BATCH / m.devices, m, SHARE),
                        told_s(backbone, kind, m),
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
        f"{1000 * traffic:.0f} ms on {m.name} ({_percent(traffic / worked)} of the "
        f"step at {_percent(SHARE)} of peak)"
        for m in (A100, H100, V5E_8)
        for traffic in [traffic_s("resnet50", m)]
        for worked in [compute_s(gflop("resnet50", "cra"), BATCH / m.devices, m, SHARE)]
    )
    return "\n\n".join(
        [
            timing.table([*head, *names], rows),
            timing.table(["a step of 64, ms: arithmetic + all-reduce", *names], times),
            _p(f"""GFLOP of a step for an image, times {BATCH} images, over devices
            times peak times {_percent(SHARE)}. Steps are {EPOCHS} epochs of whole
            batches. A share of peak falls with the images that a device has: 8 on
            each of 8 devices reach less than 64 on one, so read the columns of 8
            devices with the {_percent(min(SHARES))} of the first table in mind."""),
            _p(f"""Memory takes its share: with ResNet-50, CRA-CNN's backward pass
            keeps {KEPT_GB["resnet50"][0]:.0f} GB of a batch, and to write and read that
            once takes {bounds}. What moves beside it, such as gradients of the same
            size and statistics over what was just written, is a few times that."""),
        ]
    )


def _pod_slice() -> str:
    size, _ = counted("resnet50", "cra")
    most, two, four = BATCH // 2, 2 * SLICE.devices, 4 * SLICE.devices
    told = ring_s(size, SLICE.devices, SLICE.link_gbs)
    parts = []
    for batch in (two, four):
        worked = compute_s(
            gflop("resnet50", "cra"), batch / SLICE.devices, SLICE, SHARE
        )
        parts.append(
            f"a batch of {batch} takes {1000 * worked:.1f} ms of arithmetic and "
            f"{1000 * told:.1f} ms of all-reduce, "
            f"{_percent(told / (told + worked))} of the step"
        )
    return "\n\n".join(
        [
            "### A pod slice",
            _p(f"""The paper's batch of {BATCH} is one image a chip on {SLICE.name}.
            CRA-CNN's L_cntr contrasts pairs, so the code refuses that and names the
            batch sizes that can; {most} chips is the most that {BATCH} images can be
            shared by. What a slice is good for is other than one cell of Table 1:"""),
            _p(f"""- Cells or seeds side by side: rent {len(CELLS)} v5e-8 instead of
            one {SLICE.name} and start a cell on each, as in the last row of the first
            table."""),
            _p(f"""- Larger batches, which are another experiment with another learning
            rate. With ResNet-50 on {SLICE.name}, {parts[0]}; {parts[1]}."""),
        ]
    )


def _input() -> str:
    middle, low, high = (rate / STORE_CORES for rate in STORE_RATE)
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
    head = ["ResNet-50, images/s needed", "CRA-CNN", "baseline"]
    head += ["cores for the baseline", "GB/s of the host", "GB/s of a device"]
    return "\n\n".join(
        [
            "## Input",
            timing.table(head, rows),
            _p(f"""The image cache gave {STORE_RATE[0]:,} images/s ({STORE_RATE[1]} to
            {STORE_RATE[2]:,}) on {STORE_CORES} cores that had other work as well:
            {middle:.0f} a core ({low:.0f} to {high:.0f}). A crop is {CROP_PX} x
            {CROP_PX} x 3 bytes of uint8; PCIe 4 carries {PCIE:.0f} GB/s to a device,
            many times what is asked for. The default `data.workers=2` is enough for
            one A100; for one H100 set it to {per} or more. For 8 of them measure
            the image cache first: whether threads go on scaling beyond
            {STORE_CORES} cores is not known. `data.on_device=True` sends a step
            a few numbers for each image instead of its pixels, and ends the question
            wherever it fits. Cells side by side need as much together."""),
            _p("""The first epoch reads the image cache from the disk, later ones
            from the system's memory where that has room for it: see below."""),
        ]
    )


def _all_reduce() -> str:
    backbone, kind = "resnet50", "cra"
    size, layers = counted(backbone, kind)
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
        told = ring_s(size, ends, m.link_gbs)
        worked = compute_s(work, BATCH / m.devices, m, SHARE)
        whole = compute_s(work, BATCH, m, SHARE)
        first = matters_from(work, size, m, per)
        limit = 2 * size / (1e9 * m.link_gbs)
        rows.append(
            (
                name,
                f"{m.link_gbs:g}",
                f"{m.devices} {m.kind.removeprefix('TPU ')}",
                f"{1000 * told:.1f}",
                f"{1000 * worked:.1f}",
                _percent(told / (told + worked)),
                str(first) if first else f"none to {BATCH}",
                _percent(limit / (limit + whole)),
            )
        )
    head = ["link", "GB/s one way", "devices", "all-reduce, ms", "arithmetic, ms"]
    head += [
        "of a step, 64 shared",
        f"{_percent(MATTERS)} from so many on",
        "of a step, 64 a device, any number",
    ]
    synced = 4 * layers * LATENCY_S
    of_8 = compute_s(work, BATCH / 8, H100_8, SHARE)
    deep, _ = counted("resnet101", kind)
    alone, _ = counted(backbone, "baseline")
    return "\n\n".join(
        [
            "## All-reduce",
            timing.table(head, rows),
            _p(f"""CRA-CNN with ResNet-50 tells {size / 1e6:.0f} MB a step: the gradient
            of both streams in float32, and BatchNorm's running statistics; ResNet-101
            {deep / 1e6:.0f} MB, the baseline with ResNet-50 {alone / 1e6:.0f} MB. A
            ring of n passes 2 (n - 1) / n of that over every link; between hosts, n are
            the hosts, and what happens within each comes on top. The last but one
            column is the number of devices, sharing the batch of {BATCH}, from which it
            takes {_percent(MATTERS)} of a step. The last column gives each device
            {BATCH} images of its own, which is a larger batch and another experiment.
            XLA may hide some of this behind the backward pass; none of that is
            counted."""),
            _p(f"""So the batch of {BATCH} belongs into one machine: a second host of 8
            H100 over any of these networks makes a step longer than one host
            alone."""),
            _p(f"""`bn.sync=True` adds {4 * layers} small all-reduces, one after the
            other: mean and variance of {layers} layers (both streams together), and
            their gradients. Bytes do not count there, latency does: at
            {1e6 * LATENCY_S:.0f} µs each, which is assumed, {1000 * synced:.1f} ms a
            step, beside {1000 * of_8:.1f} ms of arithmetic on 8 H100. It buys the same
            update as one device makes. `bn.group_size` gives that too, and asks no
            other device, but its statistics are of fewer images."""),
        ]
    )


def _memory() -> str:
    rate = A100.flops(SHARE) / 1e9 / gflop("resnet50", "cra")
    head = ["CRA-CNN, batch of 64", "GB a device", "ResNet-50", "ResNet-101"]
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
            _p(f"""Counted, not measured: the state ({STATE_GB["resnet50"]} GB with
            ResNet-50, {STATE_GB["resnet101"]} with ResNet-101) and a device's share of
            what the backward pass keeps of {BATCH} images
            ({KEPT_GB["resnet50"][0]:.0f} and {KEPT_GB["resnet101"][0]:.0f} GB; with
            `model.remat` {KEPT_GB["resnet50"][1]} and {KEPT_GB["resnet101"][1]}), in
            {_percent(1 - FREE)} of the memory. `model.remat` computes the forward pass
            again, up to a third more arithmetic, which the hours above leave out.
            `data.on_device` puts the whole
            training set on every device: {TRAIN_GB["cub"]} GB for CUB,
            {TRAIN_GB["cars"]} for Cars."""),
            _p(f"""Of the host: the image cache takes {STORE_GB["cub"]} GB (CUB) and
            {STORE_GB["cars"]} GB (Cars) of disk. Its training part, {TRAIN_GB["cub"]}
            and {TRAIN_GB["cars"]} GB, should fit the system's cache, so a host with 32
            GB of memory has enough for either. Where it does not fit, each epoch reads
            it again: for the {rate:.0f} images/s of an A100, up to
            {rate * IMAGE_MB["cub"] / 1000:.1f} GB/s in random order. Training itself
            owns the batches made ahead, {3 * CROP_PX**2 * BATCH / 1e6:.0f} MB each.
            Cells side by side on one machine share one image cache and one compilation
            cache. Each of several hosts needs the image cache."""),
        ]
    )


def _code() -> str:
    return "\n\n".join(
        [
            "## What the code does about it",
            timing.table(
                ["limit", "what there is"],
                [
                    (
                        "decoding",
                        "once, on all cores, into a memory-mapped image cache "
                        "(`data.prepare`)",
                    ),
                    (
                        "making batches",
                        "threads ahead of the step (`data.workers`, "
                        "`data.prefetch_batches`)",
                    ),
                    (
                        "bytes to the device",
                        "uint8; flipping and normalising are part of the step",
                    ),
                    ("pixels on their way", "`data.on_device=True`: none are sent"),
                    ("several hosts", "each makes its own rows of a batch alone"),
                    (
                        "all-reduce",
                        "one mean of gradient, statistics and numbers a step, after "
                        "`train.accumulate` micro-batches",
                    ),
                    (
                        "BatchNorm over devices",
                        "a device's own, `bn.sync`, or `bn.group_size`",
                    ),
                    (
                        "device memory",
                        "bfloat16, `model.remat`, `train.accumulate`; the state is "
                        "donated",
                    ),
                    (
                        "batches that do not divide",
                        "refused, with the sizes that do",
                    ),
                ],
            ).replace("---:", "---"),
            _p("""What it does not do: ask for more overlap of all-reduce and backward
            pass than XLA gives by itself; send the gradient in fewer bits; divide the
            state, the data set or the model over devices (each holds all of them, which
            at these sizes costs little); copy a batch to
            the devices on a thread of its own (calls return before their work is done,
            so the copy may still overlap with the step before)."""),
        ]
    )


def page() -> str:
    """The page, as Markdown."""
    parts = [_introduction(), _all_cells(), _by_cell(), _pod_slice(), _input()]
    return "\n\n".join([*parts, _all_reduce(), _memory(), _code()]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The paper's tables, on paper.")
    parser.add_argument("--write", type=Path, help="a file, instead of the terminal")
    target = parser.parse_args(argv).write
    if target and not target.parent.is_dir():
        parser.error(f"--write={target}: there is no folder {target.parent}")
    text = page()
    if target:
        files.write_atomically(target, text)
    print(f"written: {target}" if target else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
