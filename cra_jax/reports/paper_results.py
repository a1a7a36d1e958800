"""The accuracies that the paper (Liu et al., BMVC 2020) reports, with their tables."""

from typing import NamedTuple


class Row(NamedTuple):
    """An accuracy in one of the paper's tables.

    Attributes:
      table: name of the table.
      data: the dataset, a value of `data.source`.
      backbone: a value of `model.backbone`.
      kind: a value of `model.kind`.
      protocol: the evaluation protocol, "center" or "full".
      top1: accuracy as a fraction; the paper gives percent with one decimal.
    """

    table: str
    data: str
    backbone: str
    kind: str
    protocol: str
    top1: float


TEST_IMAGES = {"cub": 5794, "cars": 8041}
"""Number of images in the published test splits."""

NAMES = {"cub": "CUB-200-2011", "cars": "Stanford Cars"}
"""Names of the datasets in Table 1."""

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
# Names of the same datasets in TensorFlow Datasets.
_TFDS = {"caltech_birds2011": "cub", "cars196": "cars"}


def find(
    *, source: str, name: str, backbone: str, kind: str, protocol: str, count: int
) -> Row | None:
    """Finds the paper's accuracy for a dataset, a network and a protocol.

    Args:
      source: `data.source`.
      name: `data.name`, which identifies the dataset if the source is "tfds".
      backbone: `model.backbone`.
      kind: `model.kind`.
      protocol: "center" or "full".
      count: number of evaluated images, which must be that of the whole test split.

    Returns:
      The row of the paper's table; None if the paper has no such row.
    """
    data = _TFDS.get(name, "") if source == "tfds" else source
    if TEST_IMAGES.get(data) != count:
        return None
    wanted = (data, backbone, kind, protocol)
    return next((row for row in ROWS if row[1:5] == wanted), None)
