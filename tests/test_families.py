"""What every family of backbones owes to the rooms that use it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cra_jax import efficientnet, families, resnet
from cra_jax.efficientnet import Architecture, Stage

pytestmark = pytest.mark.usefixtures("quick_compilation")


# --- where a feature looks ----------------------------------------------------------


@pytest.fixture
def shallow(monkeypatch):
    """Strides as Lite0 does, with both sizes of kernel, and sees 107 px, not 800."""
    stages = tuple(
        Stage(1, size, stride, expansion=1, features=2)
        for size, stride in [(3, 1), (3, 2), (5, 2), (3, 2), (5, 2)]
    )
    architecture = Architecture(2, stages, 2)
    monkeypatch.setitem(efficientnet.ARCHITECTURES, "shallow", architecture)


def seen_rows(net, size_px):
    """Which rows each cell of the feature map reacts to: `[rows, cells]`.

    Row r of picture r is bright, all else is dark, and no kernel has a negative weight:
    a cell is above 0 just where the bright row lies in its receptive field.
    """
    rows = jnp.eye(size_px)[:, :, None, None] * jnp.ones((1, 3))
    shapes = jax.eval_shape(net.init, jax.random.key(0), rows[:1])
    variables = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    variables = jax.tree.map_with_path(
        lambda path, x: x + (path[-1].key in ("kernel", "scale", "var")), variables
    )
    features = jax.jit(net.apply)(variables, rows).features
    return np.asarray(features.max((2, 3)) > 0)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("net", "sizes"),
    [
        (resnet.create("resnet10", 1, width=1), (288, 289)),
        (resnet.create("resnet18", 1, width=1, stem="medium"), (226,)),
        (resnet.create("resnet10", 1, width=1, stem="small"), (96, 99)),
        # Even and odd at each of the five layers that stride: 192 is always even.
        ("shallow", (192, 193, 194, 207, 210, 223)),
    ],
    ids=["imagenet", "medium", "small", "same"],
)
def test_a_feature_looks_where_its_receptive_field_lies(net, sizes):
    if isinstance(net, str):
        net = efficientnet.create(net, 1)
    for size_px in sizes:
        seen = seen_rows(net, size_px)
        cells = np.arange(net.feature_extent(size_px))
        assert seen.shape == (size_px, len(cells))
        first = seen.argmax(0)
        last = size_px - 1 - seen[::-1].argmax(0)
        whole = (first > 0) & (last < size_px - 1)  # not cut by the picture's edge
        assert whole.any()
        places = net.feature_place_px(cells, size_px)
        np.testing.assert_array_equal(places[whole], ((first + last) / 2)[whole])
        # Those at the edge see what is left of as many rows.
        radius = (last - first)[whole].max() / 2
        np.testing.assert_array_equal(first, np.maximum(places - radius, 0))
        np.testing.assert_array_equal(last, np.minimum(places + radius, size_px - 1))


@pytest.mark.parametrize("family", [resnet, efficientnet])
def test_places_of_many_pictures_at_once(family):
    net = family.create(next(iter(family.ARCHITECTURES)), 1)
    sizes = np.array([[224, 225], [448, 480]])
    places = jnp.asarray(net.feature_place_px(jnp.array([3.0, 0.5]), jnp.array(sizes)))
    assert places.shape == (2, 2)
    for (i, j), place in np.ndenumerate(places):
        assert place == net.feature_place_px((3.0, 0.5)[j], int(sizes[i, j]))
    offsets = [[31, 0], [31, 31]] if family is efficientnet else [[0, 0], [0, 0]]
    np.testing.assert_array_equal(places, np.array([96, 16]) + offsets)


def test_an_unknown_backbone_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown backbone 'vgg16'.*resnet50"):
        families.create_backbone("vgg16", 5)
