"""Class activation maps, and the overlap of boxes with activation and attention."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import art_module
from cra_jax.backbones import class_activation, efficientnet, resnet
from cra_jax.inference import localization
from cra_jax.input import center_crop
from tests.oracles import attention

CROP = 64


@pytest.fixture(scope="module")
def network():
    backbone = resnet.create("resnet10", 5, width=8, stem="small")
    init = jax.jit(backbone.init)
    return backbone, init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_class_activation_equals_the_oracle(network):
    backbone, variables = network
    images = jax.random.normal(jax.random.key(1), (3, 32, 40, 3))
    out: Any = jax.jit(backbone.apply)(variables, images)
    classes = jnp.array([4, 0, 2])
    found = class_activation.class_activation(
        backbone, variables, out.features, classes
    )
    fc = variables["params"]["fc"]
    for i, chosen in enumerate([4, 0, 2]):
        expected = attention.class_activation(
            np.asarray(out.features[i]), fc["kernel"], chosen
        )
        assert_allclose(found[i], expected, rtol=1e-4, atol=1e-6)
        # The score is the mean of the map plus the bias.
        score = out.logits[i, chosen] - fc["bias"][chosen]
        assert_allclose(found[i].mean(), score, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size_px", [63, 64])
def test_places_px_are_the_places_of_the_family(size_px):
    cells = -(-size_px // 32)
    for family, name in ((resnet, "resnet18"), (efficientnet, "efficientnet_lite0")):
        backbone = family.create(name, 3)
        rows, columns = class_activation.places_px(backbone, (cells, cells), size_px)
        expected = [backbone.feature_place_px(i, size_px) for i in range(cells)]
        assert_array_equal(rows, expected)
        assert_array_equal(columns, expected)
    assert rows[0] == {63: 30, 64: 31}[size_px]  # "SAME" pads even sizes asymmetrically


def test_peak_px_is_the_place_of_the_strongest_cell():
    activation = np.zeros((2, 3, 4))
    activation[0, 2, 1] = activation[1, 0, 3] = 1
    rows, columns = np.array([1.0, 11, 21]), np.array([2.0, 12, 22, 32])
    found = class_activation.peak_px(activation, rows, columns)
    assert_array_equal(found, [[12, 21], [32, 1]])


boxes = st.tuples(*[st.floats(-0.5, 15.5)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def _places():
    return {"rows_px": np.array([1.0, 7, 12]), "columns_px": np.array([0.0, 5, 9, 15])}


@settings(max_examples=12, deadline=None)
@given(boxes, st.integers(0, 99))
def test_share_inside_a_box_equals_the_oracle(box, seed):
    activation = np.random.default_rng(seed).normal(size=(3, 4))
    activation[0, 0] = 1  # at least one positive value
    found = localization.share_inside(activation, box, crop_px=16, **_places())
    rows, columns = _places().values()
    expected = attention.share_inside(activation, box, rows, columns, 16, fine=8)
    assert found == pytest.approx(expected, abs=0.04)


@given(boxes)
def test_share_of_a_constant_map_is_the_share_of_the_area(box):
    area = (box[2] - box[0]) * (box[3] - box[1]) / 16**2
    found = localization.share_inside(np.ones((3, 4)), box, crop_px=16, **_places())
    assert found == pytest.approx(area, abs=1e-12)


def test_share_of_whole_crop_empty_box_and_negative_map():
    rng = np.random.default_rng(0)
    mixed, negative = rng.normal(size=(3, 4)), -np.ones((3, 4))
    whole, empty = (-0.5, -0.5, 15.5, 15.5), (3.0, 3.0, 3.0, 9.0)
    for activation, box, expected in (
        (mixed, whole, 1),
        (mixed, empty, 0),
        (negative, whole, 0),
    ):
        found = localization.share_inside(activation, box, crop_px=16, **_places())
        assert found == pytest.approx(expected)


def test_share_inside_assigns_points_to_the_nearest_cell():
    activation = np.zeros((3, 4))
    activation[1, 2] = 1  # x from 7 to 12, y from 4 to 9.5
    activation[0, 0] = 2  # x from -0.5 to 2.5, y from -0.5 to 4

    def share(*box):
        return localization.share_inside(activation, box, crop_px=16, **_places())

    inner, corner = 5 * 5.5, 2 * 3 * 4.5
    assert share(7, 4, 12, 9.5) == pytest.approx(inner / (inner + corner))
    assert share(-0.5, -0.5, 2.5, 4) == pytest.approx(corner / (inner + corner))
    assert share(2.5, 4, 7, 9.5) == 0


def test_enlarged_map_has_the_values_of_the_cells_at_their_places():
    activation = np.random.default_rng(0).normal(size=(3, 4))
    rows, columns = _places().values()
    found = class_activation.enlarge(activation, rows, columns, 16)
    assert found.shape == (16, 16)
    assert_allclose(found[np.ix_(rows.astype(int), columns.astype(int))], activation)
    assert_allclose(found[15], found[12])  # constant beyond the last centre
    middle = 0.4 * activation[0, 1] + 0.6 * activation[0, 0]
    assert found[1, 2] == pytest.approx(middle)


matrices = st.tuples(*[st.floats(-1, 1)] * 6).map(lambda m: np.reshape(m, (2, 3)))


def _area(matrix):
    """Returns the determinant; NumPy's function warns of tiny numbers."""
    return matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]


@settings(max_examples=15, deadline=None)
@given(matrices.filter(lambda m: abs(_area(m)) > 0.02), boxes)
def test_iou_equals_the_oracle(matrix, box):
    corners = art_module.corners_px(matrix, 16)
    low = np.minimum(corners.min(0), -0.5) - 0.1
    high = np.maximum(corners.max(0), 15.5) + 0.1
    axes = [np.linspace(a, b, 60) for a, b in zip(low, high, strict=True)]
    lattice = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    expected = attention.iou(matrix, box, 16, lattice)
    assert localization.iou(corners, box) == pytest.approx(expected, abs=0.08)


def test_iou_equals_values_computed_by_hand():
    square = np.array([[0, 0], [10, 0], [10, 10], [0, 10]], float)
    assert localization.iou(square, (0, 0, 10, 10)) == pytest.approx(1)
    assert localization.iou(square[::-1], (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert localization.iou(square, (20, 20, 30, 30)) == 0
    diamond = np.array([[5, -5], [15, 5], [5, 15], [-5, 5]], float)  # area 200
    assert localization.iou(diamond, (0, 0, 10, 10)) == pytest.approx(1 / 2)
    point = np.full((4, 2), 5.0)
    assert localization.iou(point, (0, 0, 10, 10)) == 0
    assert localization.iou(point, (5, 5, 5, 5)) == 0


points = st.tuples(st.floats(-20, 35), st.floats(-20, 35))


@given(matrices.filter(lambda m: abs(_area(m)) > 0.02), points)
def test_contains_equals_the_inverse_of_the_matrix(matrix, point):
    frame = np.array(point) * 2 / 15 - 1
    u, v = np.linalg.solve(matrix[:, :2], frame - matrix[:, 2])
    hypothesis.assume(min(abs(abs(u) - 1), abs(abs(v) - 1)) > 1e-6)
    corners = art_module.corners_px(matrix, 16)
    expected = attention.contains(matrix, point, 16)
    assert localization.contains(corners, point) == expected
    assert localization.contains(corners[::-1], point) == expected


def test_contains_of_known_points_and_of_area_zero():
    diamond = np.array([[5, -5], [15, 5], [5, 15], [-5, 5]], float)
    for point, inside in (((5, 5), True), ((-5, 5), True), ((9.9, 9.9), True)):
        assert localization.contains(diamond, point) == inside
    for point in ((11, 11), (-1, -1), (-6, 5), (15, 6)):  # the first two: in its box
        assert not localization.contains(diamond, point)
    for flat in (np.full((4, 2), 5.0), np.array([[0, 0], [9, 9], [9, 9], [0, 0.0]])):
        for point in ((5, 5), (7, 7), (1, 2)):
            assert not localization.contains(flat, point)


def test_box_in_crop_px_and_in_image_are_inverse():
    # An image of 100 x 80; its crop of 64 starts at (18, 8).
    box = center_crop.box_in_crop_px((0.2, 0.2, 0.5, 0.5), (100, 80), 64)
    assert_allclose(box, (20 - 18 - 0.5, 16 - 8 - 0.5, 50 - 18 - 0.5, 40 - 8 - 0.5))
    back = center_crop.in_image(np.reshape(box, (2, 2)), (100, 80), 64)
    assert_allclose(back, [[0.2, 0.2], [0.5, 0.5]])
    clipped = center_crop.box_in_crop_px((0.0, 0.0, 0.5, 1.0), (100, 80), 64)
    assert_allclose(clipped, (-0.5, -0.5, 31.5, 63.5))
    x_min, _, x_max, _ = center_crop.box_in_crop_px((0, 0, 0.1, 1), (100, 80), 64)
    assert x_min == x_max == -0.5  # outside the crop
    outside = center_crop.in_crop_px(np.array([0.1, 0.5]), (100, 80), 64)
    assert_allclose(outside, [10 - 18 - 0.5, 40 - 8 - 0.5])
