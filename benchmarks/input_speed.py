"""Compares the speed of the input pipeline with a PyTorch DataLoader.

    python -m benchmarks.input_speed --data ../shared/data/cub_10/CUB_200_2011

Both make batches of 64 random crops of 448 px from images whose shorter side is 512 px,
as the training loop receives them. Here the crops are uint8 and are flipped and
normalized on the device; another row does this on the CPU. Each measurement is its own
process with the libraries of its side only, on the same cores, and the measurements
alternate. Epochs repeat without end, so that a small dataset is sufficient.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE, SHORT_SIDE_PX, CROP_PX = 64, 512, 448
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED = {"cub": (5994, 5794), "cars": (8144, 8041)}
"""Numbers of training and test images of the whole datasets."""

PREPARE = "prepare"
OURS = {
    PREPARE: "preparing, once",
    "ours": "prepared",
    "ours-normalised": "prepared, flipped and normalized on this CPU",
    "ours-on-device": "prepared, `data.on_device=True`",
}
PEER = "peer"


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def config_of(data: Path, cache_dir: Path) -> Any:
    """Config of the paper with the default number of workers and prefetched batches."""
    from configs.cub import get_config

    config = get_config()
    config.data.path, config.data.cache_dir = str(data), str(cache_dir)
    assert config.train.batch_size == BATCH_SIZE
    assert (config.data.short_side_px, config.data.crop_px) == (SHORT_SIDE_PX, CROP_PX)
    return config


def our_batches(kind: str, data: Path, cache_dir: Path) -> Iterator[Any]:
    """Yields batches without end, as `cra_jax.training.train` makes them."""
    import jax
    import jax.numpy as jnp

    from cra_jax.input import on_device
    from cra_jax.input.batches import TrainBatches
    from cra_jax.input.normalize import normalize
    from cra_jax.runtime import devices
    from cra_jax.runtime.prefetch import prefetch
    from cra_jax.training import build

    config = config_of(data, cache_dir)
    split = build.open_split(config, build.load_dataset(config), "train")
    batches = TrainBatches(
        split.images, split.labels, batch_size=BATCH_SIZE, crop_px=CROP_PX, seed=0
    )

    def make(step: int) -> Any:
        batch = batches.batch(step)
        return devices.split({k: batch[k] for k in ("image", "flip", "label")})

    if kind == "ours-on-device":
        images: Any = split.images
        kept = on_device.DeviceImages(images, crop_px=CROP_PX, progress=False)

        def make(step: int) -> Any:
            return jax.block_until_ready(kept.batch(batches.plan(step)))

    made = prefetch(
        make,
        0,
        sys.maxsize,
        workers=config.data.workers,
        depth=config.data.prefetch_batches,
    )
    if kind != "ours-normalised":
        return made

    @jax.jit
    def normalized(batch: Any) -> Any:
        images = batch["image"][0]
        flip = batch["flip"][0][:, None, None, None]
        images = jnp.where(flip, images[:, :, ::-1], images)
        return normalize(images, mean=MEAN, std=STD)

    return (jax.block_until_ready(normalized(batch)) for batch in made)


def photographs(data: Path) -> tuple[list[Path], list[int]]:
    """Paths and labels of the training images, from the annotation files."""

    def column(name: str) -> dict[str, str]:
        lines = (data / name).read_text().splitlines()
        return dict(line.split()[:2] for line in lines)

    labels, names = column("image_class_labels.txt"), column("images.txt")
    train = [i for i, flag in column("train_test_split.txt").items() if flag == "1"]
    return [data / "images" / names[i] for i in train], [int(labels[i]) for i in train]


def peer_batches(workers: int, data: Path) -> Iterator[Any]:
    """Yields batches of a DataLoader without end.

    The transforms are those of torchvision on Pillow images: Resize(512, bicubic,
    antialias), RandomCrop(448), RandomHorizontalFlip, ToTensor, Normalize.
    """
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset, Sampler

    paths, labels = photographs(data)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    class Photographs(Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            image = Image.open(paths[i]).convert("RGB")
            scale = SHORT_SIDE_PX / min(image.size)
            size = int(image.width * scale), int(image.height * scale)
            image = image.resize(size, Image.Resampling.BICUBIC)
            left = int(torch.randint(image.width - CROP_PX + 1, ()))
            top = int(torch.randint(image.height - CROP_PX + 1, ()))
            image = image.crop((left, top, left + CROP_PX, top + CROP_PX))
            if torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            pixels = pixels.to(torch.float32).div(255)
            return pixels.sub_(mean).div_(std), labels[i]

    class Endless(Sampler):
        def __iter__(self) -> Iterator[int]:
            while True:
                yield from torch.randperm(len(paths)).tolist()

    torch.set_num_threads(cores())
    return iter(
        DataLoader(
            Photographs(),
            batch_size=BATCH_SIZE,
            sampler=Endless(),
            num_workers=workers,
            drop_last=True,
        )
    )


def rate_of(batches: Iterator[Any], warm_up: int, seconds: float) -> dict[str, float]:
    """Measures images per second and core milliseconds per image, after a warm-up."""
    for _ in range(warm_up):
        next(batches)
    start, used = time.perf_counter(), cpu_seconds(os.getpid())
    # Workers finish at about the same time, so that whole rounds are counted.
    count, passed = 0, 0.0
    while passed < seconds:
        for _ in range(warm_up):
            next(batches)
        count += warm_up * BATCH_SIZE
        passed = time.perf_counter() - start
    used = cpu_seconds(os.getpid()) - used
    return {"rate": count / passed, "cpu_ms": 1000 * used / count}


def measure(kind: str, data: Path, cache_dir: Path, seconds: float) -> dict[str, float]:
    """Measures one kind of input; called in a separate process."""
    if kind == PREPARE:
        from cra_jax.training import build

        config = config_of(data, cache_dir)
        dataset = build.load_dataset(config)
        start, used = time.perf_counter(), cpu_seconds(os.getpid())
        images = len(build.open_split(config, dataset, "train").labels)
        passed = time.perf_counter() - start
        used = cpu_seconds(os.getpid()) - used
        return {"rate": images / passed, "cpu_ms": 1000 * used / images}
    if kind in OURS:
        return rate_of(our_batches(kind, data, cache_dir), 8, seconds)
    workers = int(kind.removeprefix(PEER))
    return rate_of(peer_batches(workers, data), max(2 * workers, 1), seconds)


def descendants(pid: int) -> set[int]:
    """Process ids of a process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            parents[int(stat.parent.name)] = int(after_name(stat)[1])
    found, size = {pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def after_name(stat: Path) -> list[str]:
    """Fields of /proc/PID/stat after the second, which may contain spaces."""
    return stat.read_text().rpartition(")")[2].split()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its descendants, over all cores."""
    ticks = 0
    for member in descendants(pid):
        with contextlib.suppress(OSError):
            user, system = after_name(Path(f"/proc/{member}/stat"))[11:13]
            ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


class Memory:
    """Peak memory of a process and its descendants, in MB.

    Shared pages are counted once (PSS).

    Attributes:
      own_mb: anonymous and shared memory.
      mapped_mb: files mapped into memory: libraries and the image cache. The system
        frees these pages when it needs the memory.
    """

    def __init__(self, pid: int):
        self.own_mb = self.mapped_mb = 0.0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            own = mapped = 0.0
            for pid in descendants(self._pid):
                with contextlib.suppress(OSError):  # the process has ended
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                    pairs = (line.split() for line in text.splitlines()[1:])
                    kb = {words[0]: int(words[1]) for words in pairs}
                    own += (kb["Pss_Anon:"] + kb["Pss_Shmem:"]) / 1e3
                    mapped += kb["Pss_File:"] / 1e3
            if own + mapped > self.own_mb + self.mapped_mb:
                self.own_mb, self.mapped_mb = own, mapped


def run_alone(kind: str, options: argparse.Namespace, cache_dir: Path) -> dict:
    """Runs `measure` in a new process and measures its memory."""
    arguments = ["--data", options.data, "--seconds", options.seconds]
    arguments += ["--measure", kind, "--cache", cache_dir]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.input_speed", *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with Memory(process.pid) as memory:
        output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{kind} failed:\n{errors}")
    found = json.loads(output.splitlines()[-1])
    return found | {"own_mb": memory.own_mb, "mapped_mb": memory.mapped_mb}


def measure_all(options: argparse.Namespace) -> dict[str, list[dict]]:
    """Measures all kinds in alternation, under the same load of the machine."""
    peers = sorted({0, 1, cores(), 2 * cores()})
    kinds = [*OURS, *(f"{PEER}{n}" for n in peers)]
    found: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for turn in range(1, options.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            for kind in kinds:  # the first kind writes the image cache
                found[kind].append(run_alone(kind, options, Path(folder)))
                figure = found[kind][-1]
                shown = ", ".join(f"{k} {v:,.1f}" for k, v in figure.items())
                print(f"{turn}/{options.repeats} {kind}: {shown}", file=sys.stderr)
    return found


def describe_machine() -> dict[str, Any]:
    """Processor, cores, load and versions of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    packages = ("numpy", "pillow", "jax", "torch")
    return {
        "cpu": names[0].strip() if names else platform.machine(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def spread(values: list[float], digits: int = 0) -> str:
    """Median, minimum and maximum: "5 (3 to 9)"."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def tables(found: dict[str, list[dict]], machine: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""

    def of(kind: str, name: str) -> list[float]:
        return [figure[name] for figure in found[kind]]

    def middle(kind: str, name: str) -> float:
        return statistics.median(of(kind, name))

    peers = [kind for kind in found if kind.startswith(PEER)]
    best = max(peers, key=lambda kind: middle(kind, "rate"))
    lines = [
        "| input | images/s | relative to the best DataLoader | core ms per image | "
        "memory, MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind in found:
        name = OURS.get(kind) or f"DataLoader, num_workers={kind.removeprefix(PEER)}"
        # Of the same round, under the same load.
        pairs = zip(of(kind, "rate"), of(best, "rate"), strict=True)
        ratio = spread([ours / peer for ours, peer in pairs], 1)
        lines.append(
            f"| {name} | {spread(of(kind, 'rate'))} | {ratio} | "
            f"{spread(of(kind, 'cpu_ms'), 2)} | "
            f"{middle(kind, 'own_mb'):,.0f} + {middle(kind, 'mapped_mb'):,.0f} |"
        )
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    turns = len(found[PREPARE])
    return "\n".join(
        [
            *lines,
            f"\nMedian (minimum to maximum) of {turns} rounds. Memory: own + mapped "
            f"files, which the system frees when it needs the memory. {about}.",
        ]
    )


def disk_lines(sets: dict[str, Path]) -> Iterator[str]:
    """Rows of a table of the image cache sizes, estimated from samples."""
    from cra_jax.datasets import sources
    from cra_jax.runtime.prefetch import prefetch

    yield "| dataset | MB per image | images | disk, GB | training split, GB |"
    yield "|---|---:|---:|---:|---:|"
    for name, path in sets.items():
        dataset = sources.load(name, path)
        records = [r for split in dataset.splits.values() for r in split]
        records = records[:: -(-len(records) // 300)]

        def size(i: int, records: list = records) -> int:
            return records[i].read(SHORT_SIDE_PX).nbytes

        sizes = list(prefetch(size, 0, len(records), workers=cores()))
        mean = statistics.mean(sizes)
        error = statistics.stdev(sizes) / len(sizes) ** 0.5
        train, test = PUBLISHED[name]
        yield (
            f"| {name} | {mean / 1e6:.2f} ± {error / 1e6:.2f} (of {len(sizes)}) | "
            f"{train + test:,} | {mean * (train + test) / 1e9:.1f} | "
            f"{mean * train / 1e9:.1f} |"
        )


def main() -> None:
    shared = Path("../shared/data")
    parser = argparse.ArgumentParser(
        description="Compares the speed of the input pipeline."
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=shared / "cub_10" / "CUB_200_2011",
        help="directory in the layout of CUB_200_2011",
    )
    parser.add_argument(
        "--cars", type=Path, help="Stanford Cars, to estimate its size on disk"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=5, help="duration of each measurement"
    )
    parser.add_argument("--json", type=Path, help="file for all measurements")
    parser.add_argument(
        "--disk", action="store_true", help="only estimate the sizes on disk"
    )
    # Passed by `run_alone` to the process that it starts.
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        data, cache_dir = options.data, options.cache
        print(json.dumps(measure(options.measure, data, cache_dir, options.seconds)))
        return
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("memory and CPU time are read from /proc: run on Linux")
    if not options.data.is_dir():
        parser.error(f"--data {options.data}: there is no such directory")
    if not options.disk:
        machine, found = describe_machine(), measure_all(options)
        print(tables(found, machine), end="\n\n")
        if options.json:
            figures = {"machine": machine, "found": found}
            options.json.write_text(json.dumps(figures, indent=1))
    sets = {"cub": options.data} | ({"cars": options.cars} if options.cars else {})
    print("\n".join(disk_lines(sets)))


if __name__ == "__main__":
    main()
