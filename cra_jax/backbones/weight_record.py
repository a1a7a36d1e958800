"""What must be known about published weights to use them rightly."""

from typing import NamedTuple


class WeightRecord(NamedTuple):
    """Published ImageNet weights, as their family's `PUBLISHED` lists them.

    Attributes:
      arch: the architecture.
      file: name of the file with these weights, at `mirror` or in `package`.
      imagenet_top1: percent, as those who trained them give it.
      resize_px: shorter side of the picture when that was measured.
      crop_px: side of the central crop.
      interpolation: of the resizing.
      mean: of the channels, pictures in 0..1.
      std: of the channels.
      licence: its SPDX name.
      source: who trained them.
      mirror: where `file` lies, for those whom the hub does not reach; empty: nowhere.
      package: on PyPI, that holds the file; empty: none does, and the name is the
        hub's.
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
    """What a record says, in one line for the log."""
    if record is None:
        return "no record of it: data.mean and data.std must be what it was trained on"
    return (
        f"{record.arch}, ImageNet top-1 {record.imagenet_top1:.3f} % at "
        f"{record.crop_px} px ({record.interpolation} from {record.resize_px}), mean "
        f"{record.mean}, std {record.std}, {record.licence}, {record.source}"
    )
