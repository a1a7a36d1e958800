"""Prepares a training without a GPU: downloads, dataset builds and image cache."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cra_jax.datasets import tfds_build
from cra_jax.inference import run_options
from cra_jax.input import image_cache, records, splits
from cra_jax.training import build, check_config, preview
from cra_jax.training.pretrained import open_pretrained

_print = partial(print, flush=True)  # keeps the order with standard error


def run(config: build.Config, workdir: Path) -> None:
    """Fetches, builds and caches what a training needs, and prints where it is.

    That is: the pretrained weights; the dataset, downloaded or built with tfds if
    needed; and the image cache of every split. A second call finds all of it.
    TensorFlow, if needed, runs in a separate process.

    Args:
      config: a config of `configs/`, as for training.
      workdir: the run directory; it stays unchanged.

    Raises:
      ValueError: the config, the data or the weights are wrong or cannot be fetched;
        describes how to get them by hand.
    """
    begun_s = time.time()
    check_config.check(config)
    options, loop = run_options.from_config(config), build.loop_options(config)
    data, made = options.data, []
    if loop.pretrained:
        made.append(_get_weights(loop.pretrained, options.backbone, begun_s))
    if data.source == "tfds":
        built = tfds_build.build(
            data.source_options["name"], data.path, manual_dir=config.data.manual_dir
        )
        dataset = build.load_dataset(config)
        got = _word("built", built)
    elif data.source == "cub" and not data.path:
        dataset = build.load_dataset(config)
        built = dataset.root is not None and _is_new([dataset.root], begun_s)
        got = _word("fetched", built)
    else:
        dataset, built, got = build.load_dataset(config), False, ""
    made.append(built)
    _print_dataset(dataset, got)
    splits.check_fills_batch(dataset, loop.batch_size)
    if loop.pretrained:
        preview.weight_lines(config, dataset.class_names)  # raises if they do not fit
    opened = {}
    for name in dataset.splits:
        opened[name] = build.open_split(config, dataset, name)
        made.append(_open(opened[name], name, begun_s))
    for line in splits.warn_of_duplicates(opened.pop("train"), opened):
        _print(line)
    took_s = time.time() - begun_s
    if any(made):
        _print(f"all is ready, after {took_s:.0f} s")
    else:
        _print(f"all was there already ({took_s:.1f} s)")
    _print("the same command without --mode prepare trains")


def _get_weights(pretrained: str, arch: str, begun_s: float) -> bool:
    """Gets and prints the pretrained weights; returns whether they were fetched now."""
    weights = open_pretrained(pretrained, arch=arch)
    file = Path(weights.place)
    came = file.is_file() and _is_new([file], begun_s)
    size = f", {file.stat().st_size / 1e6:,.1f} MB" if file.is_file() else ""
    _print(f"weights: {pretrained}{size}, {_word('fetched', came)}")
    _print(f"    {weights.place}\n    {weights.about}")
    return came


def _print_dataset(dataset: records.Dataset, got: str) -> None:
    """Prints the dataset, its directory, and whether it was fetched now."""
    parts = dataset.name, f"{len(dataset.class_names)} classes", got
    _print(f"data: {', '.join(filter(None, parts))}")
    for line in filter(None, (dataset.root, *dataset.notes)):
        _print(f"    {line}")


def _open(split: splits.Split, name: str, begun_s: float) -> bool:
    """Prints a split and its image cache; returns whether that was written now."""
    images = split.images
    what = f"{name}: {len(images):,} images of {len(set(split.labels))} classes"
    if images.skipped:
        what += f" ({len(images.skipped)} left out as unreadable)"
    if not isinstance(images, image_cache.ImageCache):
        _print(f"{what}, decoded at each use (data.prepare=False)")
        return False
    files = [images.path, images.path.with_suffix(".json")]
    stored = _is_new(files, begun_s)
    size = sum(file.stat().st_size for file in files)
    _print(f"{what}, {size / 1e6:,.1f} MB, {_word('stored', stored)}")
    _print(f"    {images.path}")
    return stored


def _is_new(files: Iterable[Path], begun_s: float) -> bool:
    """Whether a file was created or renamed since `begun_s`."""
    return any(file.stat().st_ctime >= begun_s for file in files)


def _word(verb: str, now: bool) -> str:
    return f"{verb} now" if now else "there already"
