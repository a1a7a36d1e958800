"""How fast training is fed: prepared pictures against a PyTorch DataLoader.

    python -m benchmarks.input --data ../shared/data/cub_10/CUB_200_2011

Both make batches of 64 random crops of 448 out of pictures whose shorter side is 512,
as the training loop receives them. Ours are uint8, to be flipped and normalised on the
device; a row more does that here, too. Every measurement is a process of its own that
holds the libraries of its side alone, on the same cores, and they come by turns. Epochs
follow each other without an end, so that a small set does: its pictures are read again.
"""

import argparse
import importlib.metadata
import itertools
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
"""Pictures in train and test of the whole sets."""

OURS = {
    "ours": "prepared",
    "ours-normalised": "prepared, flipped and normalised on this CPU",
    "ours-on-device": "prepared, `data.on_device=True`",
}
PEER = "peer"
PREPARE = "prepare"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def config_of(data: Path, cache_dir: Path) -> Any:
    """The paper's config, with its defaults of workers and prefetching."""
    from configs.cub import get_config

    config = get_config()
    config.data.path, config.data.cache_dir = str(data), str(cache_dir)
    assert config.train.batch_size == BATCH_SIZE
    assert (config.data.short_side_px, config.data.crop_px) == (SHORT_SIDE_PX, CROP_PX)
    return config


def our_batches(kind: str, data: Path, cache_dir: Path) -> Iterator[Any]:
    """Endless batches, made as `cra_jax.train` makes them."""
    import jax
    import jax.numpy as jnp

    from cra_jax import experiment, parallel, pipeline, resident, steps
    from cra_jax.prefetch import prefetch

    config = config_of(data, cache_dir)
    split = experiment.open_split(config, experiment.load_data(config), "train")
    batches = pipeline.TrainBatches(
        split.pictures, split.labels, batch_size=BATCH_SIZE, crop_px=CROP_PX, seed=0
    )

    def make(step: int) -> Any:
        batch = batches.batch(step)
        return parallel.split({k: batch[k] for k in ("image", "flip", "label")})

    if kind == "ours-on-device":
        pictures: Any = split.pictures
        kept = resident.Resident(pictures, crop_px=CROP_PX, progress=False)

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
    def normalised(batch: Any) -> Any:
        images = batch["image"][0]
        flip = batch["flip"][0][:, None, None, None]
        images = jnp.where(flip, images[:, :, ::-1], images)
        return steps.normalize(images, mean=MEAN, std=STD)

    return (jax.block_until_ready(normalised(batch)) for batch in made)


def photographs(data: Path) -> tuple[list[Path], list[int]]:
    """The training pictures and their classes, from the files that name them."""

    def column(name: str) -> dict[str, str]:
        lines = (data / name).read_text().splitlines()
        return dict(line.split()[:2] for line in lines)

    labels, names = column("image_class_labels.txt"), column("images.txt")
    train = [i for i, flag in column("train_test_split.txt").items() if flag == "1"]
    return [data / "images" / names[i] for i in train], [int(labels[i]) for i in train]


def peer_batches(workers: int, data: Path) -> Iterator[Any]:
    """Endless batches of a DataLoader whose transforms are torchvision's, written out.

    Resize(512, bicubic, antialias), RandomCrop(448), RandomHorizontalFlip, ToTensor,
    Normalize: on Pillow pictures, as is usual.
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


def images_per_second(batches: Iterator[Any], warm_up: int, seconds: float) -> float:
    """The rate at which batches come once they flow, over so many seconds at least."""
    for _ in range(warm_up):
        next(batches)
    start = time.perf_counter()
    # Workers finish at about the same time: whole rounds of them are counted.
    for count in itertools.count(warm_up, warm_up):
        for _ in range(warm_up):
            next(batches)
        passed = time.perf_counter() - start
        if passed >= seconds:
            return count * BATCH_SIZE / passed
    raise AssertionError("unreachable: counting does not end")


def measure(kind: str, data: Path, cache_dir: Path, seconds: float) -> dict[str, float]:
    """What a process of its own does: one figure."""
    if kind == PREPARE:
        from cra_jax import experiment

        config = config_of(data, cache_dir)
        dataset = experiment.load_data(config)
        start = time.perf_counter()
        split = experiment.open_split(config, dataset, "train")
        passed = time.perf_counter() - start
        return {"seconds": passed, "pictures": len(split.labels)}
    if kind in OURS:
        return {
            "rate": images_per_second(our_batches(kind, data, cache_dir), 8, seconds)
        }
    workers = int(kind.removeprefix(PEER))
    batches = peer_batches(workers, data)
    return {"rate": images_per_second(batches, max(2 * workers, 1), seconds)}


class Memory:
    """The most that a process and its children held at once, in MB.

    Pages that several share count once (PSS). Linux tells it; elsewhere it stays 0.

    Attributes:
        own_mb: what they wrote, shared memory included.
        mapped_mb: files mapped into memory: libraries, and our store. The system takes
            these back when it needs them.
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
            for pid in self._family():
                try:
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                except OSError:  # it has just ended, or this is no Linux
                    continue
                pairs = (line.split() for line in lines[1:])
                kb = {words[0]: int(words[1]) for words in pairs}
                own += (kb["Pss_Anon:"] + kb["Pss_Shmem:"]) / 1e3
                mapped += kb["Pss_File:"] / 1e3
            if own + mapped > self.own_mb + self.mapped_mb:
                self.own_mb, self.mapped_mb = own, mapped

    def _family(self) -> set[int]:
        """The process, and what it started."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                after_name = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(stat.parent.name)] = int(after_name[1])
        family, size = {self._pid}, 0
        while len(family) > size:
            size = len(family)
            family |= {pid for pid, parent in parents.items() if parent in family}
        return family


def run_alone(kind: str, options: argparse.Namespace, cache_dir: Path) -> dict:
    """`measure` in a fresh process, and the memory that it took."""
    arguments = ["--data", options.data, "--seconds", options.seconds]
    arguments += ["--measure", kind, "--cache", cache_dir]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.input", *map(str, arguments)],
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
    """Every kind, by turns, so that the machine's moods hit all alike."""
    peers = sorted({0, 1, cores(), 2 * cores()})
    kinds = [PREPARE, *OURS, *(f"{PEER}{n}" for n in peers)]
    found: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for turn in range(1, options.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            for kind in kinds:  # the store that the first makes, the others read
                found[kind].append(run_alone(kind, options, Path(folder)))
                figure = found[kind][-1]
                shown = ", ".join(f"{k} {v:,.1f}" for k, v in figure.items())
                print(f"{turn}/{options.repeats} {kind}: {shown}", file=sys.stderr)
    return found


def describe_machine() -> dict[str, Any]:
    """What the figures hold for."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [
            x.partition(":")[2].strip() for x in lines if x.startswith("model name")
        ]
        model = names[0] if names else model
    packages = ("numpy", "pillow", "jax", "torch")
    return {
        "cpu": model,
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def spread(values: list[float], digits: int = 0) -> str:
    """Median, and in brackets the least and the most."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def tables(found: dict[str, list[dict]], machine: dict[str, Any]) -> str:
    """The figures as Markdown."""

    def of(kind: str, name: str) -> list[float]:
        return [figure[name] for figure in found[kind]]

    peers = [kind for kind in found if kind.startswith(PEER)]
    best = max(peers, key=lambda kind: statistics.median(of(kind, "rate")))
    lines = [
        "| batches of 64 crops | images/s | times the peer | own + mapped memory, MB |",
        "|---|---:|---:|---:|",
    ]
    for kind in (*OURS, *peers):
        name = OURS.get(kind) or f"DataLoader, num_workers={kind.removeprefix(PEER)}"
        # Of the same turn: what slows the machine slows both.
        pairs = zip(of(kind, "rate"), of(best, "rate"), strict=True)
        ratio = spread([ours / peer for ours, peer in pairs], 1)
        memory = " + ".join(
            f"{statistics.median(of(kind, name)):,.0f}"
            for name in ("own_mb", "mapped_mb")
        )
        lines.append(f"| {name} | {spread(of(kind, 'rate'))} | {ratio} | {memory} |")
    pictures = found[PREPARE][0]["pictures"]
    epochs = [pictures / rate for rate in of(best, "rate")]
    prepared = of(PREPARE, "seconds")
    ratios = [a / b for a, b in zip(prepared, epochs, strict=True)]
    own = statistics.median(of(PREPARE, "own_mb"))
    return "\n".join(
        [
            *lines,
            "",
            f"Preparing {pictures} pictures: {spread(prepared, 2)} s, "
            f"{spread(ratios, 2)} of an epoch of the best DataLoader, "
            f"{spread(epochs, 2)} s; it held {own:,.0f} MB.",
            ", ".join(f"{k} {v}" for k, v in machine.items())
            + f"; median (least to most) of {len(prepared)} turns",
        ]
    )


def disk_lines(sets: dict[str, Path]) -> Iterator[str]:
    """What whole sets take once prepared, judged by samples of them."""
    from cra_jax import sources
    from cra_jax.prefetch import prefetch

    yield "| set | MB a picture | pictures | disk, GB | train alone (in memory), GB |"
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
    parser = argparse.ArgumentParser(description="The input path, as tables.")
    parser.add_argument(
        "--data",
        type=Path,
        default=shared / "cub_10" / "CUB_200_2011",
        help="a folder in the layout of CUB_200_2011",
    )
    parser.add_argument("--cars", type=Path, help="Stanford Cars, for its size on disk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--json", type=Path, help="where every single figure goes")
    parser.add_argument("--disk", action="store_true", help="only what sets take")
    # What `run_alone` passes to the process that it starts.
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        data, cache_dir = options.data, options.cache
        print(json.dumps(measure(options.measure, data, cache_dir, options.seconds)))
        return
    if not options.data.is_dir():
        parser.error(f"--data {options.data}: there is no such folder")
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
