"""The archives that tfds builds a dataset from, and messages on how to get them."""

import difflib
import importlib.util
from pathlib import Path
from typing import NamedTuple

READ_MODULES = ("tensorflow_datasets", "importlib_resources")
"""The modules that reading a dataset needs, from the extra `tfds`."""

MODULES = {"tensorflow": "tensorflow", "cv2": "opencv-python-headless"}
"""What building needs, from the extra `tfds-build`: module -> a package that has it."""


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this package, for messages."""
    return f'pip install "cra_jax[{extra}]" (in a checkout: pip install ".[{extra}]")'


INSTALL = f"{how_to_install('tfds-build')}, or pip install {' '.join(MODULES.values())}"

BUILD = (
    "build it once, by the same command with --mode prepare (that needs TensorFlow:"
    f" {INSTALL}; reading does not)"
)
"""How to build a dataset; for messages."""

_MAX_LISTED = 8

UNAVAILABLE = {
    "cars196": """
tfds cannot download cars196: Stanford's links have not worked since 2023. Two ways out:
(1) Without tfds and TensorFlow: --config.data.source=cars --config.data.path=FOLDER
    reads unpacked copies as they are. On Kaggle:
      rickyyyyyyy/torchvision-stanford-cars: as published
      jutrera/stanford-car-dataset-by-classes-folder: class folders
      jessicali9530/stanford-cars-dataset: the images; add devkit/ and
        cars_test_annos_withlabels.mat, see below
(2) With tfds: the archives as published, which none of these copies holds; somebody
    who had the dataset before may have kept them. car_devkit.tgz is attached to
    https://github.com/pytorch/vision/issues/7545, where people also say how to get
    cars_test_annos_withlabels.mat."""
}
"""Datasets that can no longer be downloaded -> what to do instead."""


class Archive(NamedTuple):
    """A file that a dataset is built from."""

    size: int
    """Bytes."""
    sha256: str
    """Hex digest."""
    urls: tuple[str, ...]
    """Addresses from which tfds downloads it."""


def check_installed() -> None:
    """Checks that the package that reads datasets of tfds is installed.

    Raises:
      ValueError: it is not; says how to install it.
    """
    missing = [m for m in READ_MODULES if importlib.util.find_spec(m) is None]
    if missing:
        raise ValueError(
            f"data.source='tfds' needs {' and '.join(missing)}, which this Python does "
            f"not have: {how_to_install('tfds')}"
        )


def dataset_name(name: str) -> str:
    """The dataset in `set/config:1.0.0`, without config and version."""
    return name.split("/")[0].split(":")[0]


def unknown_name_hint(name: str) -> str:
    """A warning if tfds has no code for a dataset of this name; else empty."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if dataset_name(name) in known:
        return ""
    close = difflib.get_close_matches(dataset_name(name), known)
    meant = f"; meant is {' or '.join(close)}?" if close else ""
    return f"tfds has no dataset of that name{meant}"


def archives(name: str) -> dict[str, Archive]:
    """The archives of a dataset that tfds accepts from a folder, by file name.

    Empty if tfds does not list them.
    """
    import tensorflow_datasets as tfds

    try:
        infos = tfds.builder_cls(dataset_name(name)).url_infos or {}
    except tfds.core.DatasetNotFoundError:
        return {}
    found: dict[str, Archive] = {}
    for url, info in infos.items():
        if info.filename:
            others = found[info.filename].urls if info.filename in found else ()
            found[info.filename] = Archive(
                int(info.size), info.checksum, (*others, url)
            )
    return found


def manual_download_help(name: str, manual: Path) -> str:
    """How to provide archives by hand, for messages; may be empty.

    Args:
      name: of the dataset.
      manual: the folder in which tfds finds them.
    """
    known = archives(name)
    if not 0 < len(known) <= _MAX_LISTED:
        return ""
    alternative = UNAVAILABLE.get(dataset_name(name), "")
    lines = [
        f"\n    {file}  {archive.size} bytes\n        sha256 {archive.sha256}"
        + ("" if alternative else f"\n        {archive.urls[0]}")
        for file, archive in known.items()
    ]
    return (
        f"{alternative}\nArchives that tfds takes from {manual} instead of downloading"
        f" them, bytes and sha256 being checked:{''.join(lines)}"
    )
