"""The synthetic dataset: its pixels, labels, boxes, masks and habitats."""

import hashlib
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cra_jax.datasets import synthetic
from cra_jax.datasets.synthetic import SPLITS, class_names, contact_sheet, draw
from cra_jax.datasets.synthetic_drawing import Canvas, Stream

PINNED = {
    32: "2dd02036e065f5df023546eca0852a7ea6e7175e4f3430b9e7a20bfea1c210e6",
    64: "138c32ea0328e1da4dfa6ec8b93cbd8d6bcdddeec082fcf14261f11af8d9745c",
    224: "a09e42456050b80afae5706abc65f4a68917d0ee0804cd4b423c3f962554727f",
}


def _plan(split, index, num_species=8, habitat_share=0.85):
    """Returns (label, habitat) without drawing the image."""
    stream = Stream(0, SPLITS.index(split), index)
    return synthetic._plan(stream, split, index, num_species, habitat_share)


def _sha256(size_px: int) -> str:
    """Returns the digest of 16 images of each split."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(16):
            drawing = draw(split, index, seed=3, size_px=size_px, habitat_share=0.5)
            digest.update(drawing.image.tobytes() + drawing.mask.tobytes())
            digest.update(bytes([drawing.label, drawing.habitat]))
    return digest.hexdigest()


@pytest.mark.parametrize("size_px", PINNED)
def test_pixels_have_not_changed(size_px):
    """A change of the pixels changes every figure in the README."""
    assert _sha256(size_px) == PINNED[size_px]


def test_drawing_depends_only_on_its_arguments():
    first = draw("train", 5)
    draw("test", 9)
    numbers: Any = np.array([5, 64, 8])  # NumPy integers, as in an array of indices
    again = draw("train", numbers[0], size_px=numbers[1], num_species=numbers[2])
    assert type(again.label) is type(again.habitat) is int
    np.testing.assert_array_equal(first.image, again.image)
    assert (first.box, first.label, first.habitat) == (
        again.box,
        again.label,
        again.habitat,
    )


def test_seed_split_and_index_change_the_drawing():
    images = [
        draw("train", 8),
        draw("train", 16),
        draw("test", 8),
        draw("test_shifted", 8),
        draw("train", 8, seed=1),
        draw("train", 8, seed=2**64 - 1),
    ]
    boxes = {drawing.box for drawing in images}
    assert len(boxes) == len(images)


def test_drawing_has_the_documented_shapes_and_types():
    drawing = draw("test", 13, size_px=48)
    assert drawing.image.shape == (48, 48, 3)
    assert drawing.image.dtype == drawing.mask.dtype == np.uint8
    assert drawing.image.flags.c_contiguous
    assert drawing.mask.shape == (48, 48)
    names = class_names(8)
    assert len(set(names)) == 8
    assert class_names(3) == names[:3]


@pytest.mark.parametrize("split", SPLITS)
def test_scene_does_not_depend_on_the_image_size(split):
    for index in range(8):
        # With habitat_share=1, the eight images show the eight habitats.
        large, small = (
            draw(split, index, size_px=n, habitat_share=1.0) for n in (128, 64)
        )
        assert large.box == small.box
        assert large.habitat == small.habitat
        pooled = large.image.astype(float).reshape(64, 2, 64, 2, 3).mean((1, 3))
        gap = np.abs(pooled - small.image)
        assert gap.mean() < 1.8, f"image {index}: {gap.mean():.2f} of 255"
        assert np.quantile(gap, 0.99) < 20
        cover = large.mask.astype(float).reshape(64, 2, 64, 2).mean((1, 3))
        assert np.abs(cover - small.mask).mean() < 1


def test_drawing_in_windows_changes_no_pixel(monkeypatch):
    """Shapes are drawn inside windows only for speed."""
    windowed = [draw("train", index, habitat_share=1.0) for index in range(16)]
    everywhere = (slice(None), slice(None))
    monkeypatch.setattr(Canvas, "slices", lambda self, box: everywhere)
    for index, drawing in enumerate(windowed):
        whole = draw("train", index, habitat_share=1.0)
        np.testing.assert_array_equal(drawing.mask, whole.mask)
        np.testing.assert_array_equal(drawing.image, whole.image)


def test_box_encloses_the_mask_tightly(monkeypatch):
    # Without windows: the window of the bird would hide a box that is too small.
    everywhere = (slice(None), slice(None))
    monkeypatch.setattr(Canvas, "slices", lambda self, box: everywhere)
    size = 256
    for index in range(48):
        drawing = draw("train", index, size_px=size)
        rows, columns = np.nonzero(drawing.mask > 127)
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        # The tip of the beak covers less than half of its last pixels.
        np.testing.assert_allclose(np.array(drawing.box) * size, seen, atol=3.0)
        rows, columns = np.nonzero(drawing.mask)
        fringe = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        np.testing.assert_allclose(fringe, np.array(drawing.box) * size, atol=3.0)


def test_head_is_next_to_the_drawn_eye():
    """The eye is the darkest disc of a head, just before the head's middle."""
    size, checked = 256, 0
    rows, columns = np.mgrid[:size, :size] + 0.5
    for index in range(96):
        drawing = draw("train", index, size_px=size)
        if synthetic._SPECIES[drawing.label].crown == synthetic._INK:
            continue  # as dark as the eye
        x, y = (size * share for share in drawing.head)
        near = np.hypot(columns - x, rows - y) < 0.06 * size
        brightness = drawing.image.max(-1)
        dark = near & (drawing.mask == 255) & (brightness < 36)
        assert dark.sum() > 8, index
        apart = np.hypot(columns[dark].mean() - x, rows[dark].mean() - y) / size
        assert 0.01 < apart < 0.035, index
        checked += 1
    assert checked > 50


def test_another_habitat_changes_no_pixel_inside_the_mask():
    """The bird is the same in both drawings."""
    changed = 0
    for index in range(32):
        own_habitat = draw("train", index, habitat_share=1.0)
        other_habitat = draw("train", index, habitat_share=0.0)
        assert own_habitat.habitat != other_habitat.habitat
        np.testing.assert_array_equal(own_habitat.mask, other_habitat.mask)
        inside = own_habitat.mask == 255
        assert inside.sum() > 100
        gap = np.abs(own_habitat.image.astype(int) - other_habitat.image).max(-1)
        assert gap[inside].max() <= 1
        changed += (gap[~inside] > 8).mean()
    assert changed / 32 > 0.7


def test_birds_have_a_margin_to_the_border():
    sides = []
    for index in range(400):
        stream = Stream(0, 0, index)
        pose = synthetic._pose(stream, synthetic._SPECIES[index % 8])
        x_min, y_min, x_max, y_max = pose.box()
        assert min(x_min, y_min) >= 0.07 - 1e-9
        assert max(x_max, y_max) <= 0.93 + 1e-9
        sides.append(max(x_max - x_min, y_max - y_min))
    assert min(sides) > 0.33
    assert max(sides) < 0.64


@pytest.mark.parametrize("num_species", [2, 5, 8])
def test_labels_are_balanced_and_all_habitats_occur(num_species):
    plans = [_plan("test_shifted", i, num_species) for i in range(40 * num_species)]
    labels, habitats = np.transpose(plans)
    assert np.bincount(labels).tolist() == [40] * num_species
    assert labels[: num_species + 1].tolist() == [*range(num_species), 0]
    assert set(habitats) == set(range(num_species))
    for index in range(num_species + 1):
        drawing = draw("test_shifted", index, size_px=32, num_species=num_species)
        assert (drawing.label, drawing.habitat) == plans[index]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("share", [0.0, 0.6, 0.85, 1.0])
def test_habitat_share_is_the_share_of_images_in_the_species_own_habitat(split, share):
    count = 2048
    plans = [_plan(split, index, habitat_share=share) for index in range(count)]
    in_own_habitat = np.mean([label == habitat for label, habitat in plans])
    # Four standard deviations; they are 0 for a share of 0 or 1.
    assert abs(in_own_habitat - share) <= 4 * (share * (1 - share) / count) ** 0.5


def test_shifted_habitats_are_uniform_over_the_other_habitats():
    pairs = np.zeros((8, 8), int)
    for index in range(8000):
        pairs[_plan("test_shifted", index, habitat_share=1.0)] += 1
    assert np.trace(pairs) == 0
    other_habitat = pairs[~np.eye(8, dtype=bool)]
    expected = 8000 / 56
    assert np.abs(other_habitat - expected).max() < 4.5 * expected**0.5


def test_no_single_part_determines_the_species():
    species = synthetic._SPECIES
    for part in ("crown", "bars", "breast", "tail", "ring", "beak", "beak_length"):
        values = [getattr(bird, part) for bird in species]
        assert all(values.count(value) >= 2 for value in values), part
    assert len({(bird.crown, bird.breast) for bird in species}) == len(species)


def test_species_differ_in_few_pixels_at_64_px():
    """Two species are drawn with the same pose and habitat."""
    for label in range(1, 8):
        stream = [Stream(0, 0, 0) for _ in range(2)]
        canvas = [Canvas.blank(64) for _ in range(2)]
        for s, c, species in zip(stream, canvas, (label, label - 1), strict=True):
            c.rgb[:] = 0.5
            synthetic._bird(s, c, synthetic._pose(s, synthetic._SPECIES[species]))
        gap = np.abs(canvas[0].rgb - canvas[1].rgb).max(0)
        assert 8 < (gap > 0.2).sum() < 0.1 * 64 * 64


def test_parts_are_visible_in_most_images():
    """Counts the red crowns over many birds of one species."""
    size, red = 64, []
    for index in range(0, 8 * 150, 8):
        stream = Stream(0, 0, index)
        pose = synthetic._pose(stream, synthetic._SPECIES[0])
        canvas = Canvas.blank(size)
        synthetic._bird(stream, canvas, pose)
        x, y = pose.to_image(0.23, -0.28)
        r, g, b = canvas.rgb[:, int(y * size), int(x * size)]
        red.append(r - max(g, b) > 0.35)
    assert 0.78 < np.mean(red) < 0.96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "'valid': choose one of train, test, test_shifted"),
        ({"index": -1}, "index is -1"),
        ({"index": 2**48}, "index is 281474976710656"),
        ({"index": 1.5}, "index is 1.5: give an integer"),
        ({"seed": -1}, "seed is -1"),
        ({"size_px": 31}, "size_px is 31: give an integer from 32"),
        ({"num_species": 1}, "num_species is 1: give an integer from 2 to 8"),
        ({"num_species": 9}, "num_species is 9"),
        ({"habitat_share": 1.1}, "habitat_share is 1.1: give a share from 0 to 1"),
        ({"habitat_share": float("nan")}, "habitat_share is nan"),
    ],
)
def test_wrong_arguments_of_draw_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**({"split": "train", "index": 0} | arguments))


def test_wrong_argument_of_class_names_is_an_error():
    with pytest.raises(ValueError, match="num_species is 9"):
        class_names(9)


def test_contact_sheet_shows_the_drawings_in_order():
    sheet = contact_sheet(size_px=40, num_species=3, columns=2, gap_px=2)
    assert sheet.shape == (3 * 42 + 2, 4 * 42 + 8, 3)
    own_habitat = draw("train", 4, size_px=40, num_species=3).image
    np.testing.assert_array_equal(sheet[44:84, 44:84], own_habitat)
    other_habitat = draw("test_shifted", 5, size_px=40, num_species=3).image
    np.testing.assert_array_equal(sheet[86:126, 132:172], other_habitat)
    assert (sheet[:, 86:90] == 255).all()


def test_command_line_saves_the_contact_sheet(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert synthetic._main([str(out)]) == 0
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), contact_sheet())
    assert synthetic._main([]) == 2
    assert (
        "usage: python -m cra_jax.datasets.synthetic OUT.png" in capsys.readouterr().err
    )


def test_print_drawing_time(capsys):
    """Prints the time of one drawing; the test asserts no time, as machines differ."""
    start = time.perf_counter()
    drawings = [draw("train", index) for index in range(64)]
    spent = (time.perf_counter() - start) / len(drawings)
    assert all(drawing.image.any() for drawing in drawings)
    with capsys.disabled():
        print(f"\nsynthetic.draw: {1e3 * spent:.2f} ms an image at 64 px")
