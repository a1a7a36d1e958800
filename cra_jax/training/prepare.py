"""All that needs a network, a disk or minutes, done before there is a GPU to wait."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cra_jax.datasets import tfds_build
from cra_jax.inference import run_options
from cra_jax.input import records, splits, store
from cra_jax.training import build, check_config, preview
from cra_jax.training.pretrained import open_pretrained

_tell = partial(print, flush=True)  # in order with what others say on standard error


def run(config: build.Config, workdir: Path) -> None:
    """Fetches, builds and stores what a training needs, and says where it all is.

    That is: a set of tfds, where it is not built yet; the weights to start from; the
    data set, where it is fetched; and every split's pictures, decoded. A second call
    finds it there. TensorFlow, if it is needed, works in a process of its own.

    Args:
      config: of `configs/`, as for training.
      workdir: the run folder; it is left alone.

    Raises:
      ValueError: something is wrong with the config, the data or the weights, or cannot
        be got; says how to get it by hand.
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
    _tell_dataset(dataset, got)
    splits.check_fills_batch(dataset, loop.batch_size)
    if loop.pretrained:
        preview.weight_lines(config, dataset.class_names)  # or says what does not fit
    for name in dataset.splits:
        made.append(_open(build.open_split(config, dataset, name), name, begun_s))
    took_s = time.time() - begun_s
    if any(made):
        _tell(f"all is ready, after {took_s:.0f} s")
    else:
        _tell(f"all was there already ({took_s:.1f} s)")
    _tell("the same command without --mode prepare trains")


def _get_weights(pretrained: str, arch: str, begun_s: float) -> bool:
    """Gets the weights to start from, and says so; returns whether they came now."""
    weights = open_pretrained(pretrained, arch=arch)
    file = Path(weights.place)
    came = file.is_file() and _is_new([file], begun_s)
    size = f", {file.stat().st_size / 1e6:,.1f} MB" if file.is_file() else ""
    _tell(f"weights: {pretrained}{size}, {_word('fetched', came)}")
    _tell(f"    {weights.place}\n    {weights.about}")
    return came


def _tell_dataset(dataset: records.Dataset, got: str) -> None:
    """Says what the data set is, where it lies and how it got there."""
    parts = dataset.name, f"{len(dataset.class_names)} classes", got
    _tell(f"data: {', '.join(filter(None, parts))}")
    for line in filter(None, (dataset.root, *dataset.notes)):
        _tell(f"    {line}")


def _open(split: splits.Split, name: str, begun_s: float) -> bool:
    """Says what a split holds and where it is; returns whether it was stored now."""
    pictures = split.pictures
    what = f"{name}: {len(pictures):,} pictures of {len(set(split.labels))} classes"
    if pictures.skipped:
        what += f" ({len(pictures.skipped)} left out as unreadable)"
    if not isinstance(pictures, store.Store):
        _tell(f"{what}, decoded at each use (data.prepare=False)")
        return False
    files = [pictures.path, pictures.path.with_suffix(".json")]
    stored = _is_new(files, begun_s)
    size = sum(file.stat().st_size for file in files)
    _tell(f"{what}, {size / 1e6:,.1f} MB, {_word('stored', stored)}")
    _tell(f"    {pictures.path}")
    return stored


def _is_new(files: Iterable[Path], begun_s: float) -> bool:
    """Whether files came into being, or got their names, since then."""
    return any(file.stat().st_ctime >= begun_s for file in files)


def _word(verb: str, now: bool) -> str:
    return f"{verb} now" if now else "there already"
