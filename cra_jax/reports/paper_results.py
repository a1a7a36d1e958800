"""The accuracies that the paper (Liu et al., BMVC 2020) reports, with their tables."""

from typing import NamedTuple


class Row(NamedTuple):
    """A figure of the paper's.

    Attributes:
      table: where it stands.
      data: the data set, as `data.source` calls it.
      backbone: as `model.backbone` calls it.
      kind: as `model.kind` calls it.
      protocol: how it was scored.
      top1: accuracy as a fraction; the paper gives percent with one decimal.
    """

    table: str
    data: str
    backbone: str
    kind: str
    protocol: str
    top1: float


TEST_IMAGES = {"cub": 5794, "cars": 8041}
"""In the published test splits."""

NAMES = {"cub": "CUB-200-2011", "cars": "Stanford Cars"}
"""Of the data sets, as Table 1 has them."""

ROWS = (
    Row("Table 1", "cub", "resnet50", "baseline", "center", 0.842),
    Row("Table 1", "cub", "resnet50", "cra", "center", 0.862),
    Row("Table 1", "cub", "resnet101", "baseline", "center", 0.861),
    Row("Table 1", "cub", "resnet101", "cra", "center", 0.876),
    Row("Table 1", "cars", "resnet50", "baseline", "center", 0.900),
    Row("Table 1", "cars", "resnet50", "cra", "center", 0.926),
    Row("Table 1", "cars", "resnet101", "baseline", "center", 0.918),
    Row("Table 1", "cars", "resnet101", "cra", "center", 0.934),
    Row("Table 2", "cub", "resnet50", "cra", "full", 0.867),
    Row("Table 2", "cub", "resnet101", "cra", "full", 0.883),
    Row("Table 3", "cars", "resnet50", "cra", "full", 0.933),
    Row("Table 3", "cars", "resnet101", "cra", "full", 0.948),
)
# The same images under tfds's names.
_TFDS = {"caltech_birds2011": "cub", "cars196": "cars"}


def find(
    *, source: str, name: str, backbone: str, kind: str, protocol: str, count: int
) -> Row | None:
    """The paper's figure of such a run; None where it has none.

    Args:
      source: `data.source`.
      name: `data.name`, which says more where the source is tfds.
      backbone: `model.backbone`.
      kind: `model.kind`.
      protocol: "center" or "full".
      count: test images: a part of the set is another set.
    """
    data = _TFDS.get(name, "") if source == "tfds" else source
    if TEST_IMAGES.get(data) != count:
        return None
    wanted = (data, backbone, kind, protocol)
    return next((row for row in ROWS if row[1:5] == wanted), None)
