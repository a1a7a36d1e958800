"""The leak, on networks of which it is known what they read: Gamma, or the pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from benchmarks.study import class_leak
from cra_jax.input import splits
from cra_jax.input.records import Record
from tests.helpers import tiny_config, tiny_run

SIDE, CLASSES, COUNT = 36, 4, 64


def _matrix(x, y, scale):
    return np.array([[scale, 0, x], [0, scale, y]], np.float32)


def _split() -> splits.Split:
    """Grey images, the darker the lower the class, sorted by class as CUB is."""
    labels = np.repeat(np.arange(CLASSES), COUNT // CLASSES).astype(np.int32)
    rng = np.random.default_rng(0)
    images: Any = [
        np.clip(rng.normal(40 + 50 * label, 4, (SIDE, SIDE, 3)), 0, 255).astype(
            np.uint8
        )
        for label in labels
    ]
    records = tuple(
        Record(str(i), int(label), lambda _, i=i: images[i], "")
        for i, label in enumerate(labels)
    )
    return splits.Split(images, labels, records)


def _asked(reads: str, tmp_path: Path) -> class_leak._Asked:
    """N_cls writes the class into the place; N_ar reads it there, or off the pixels."""
    config = tiny_config.config(tmp_path)
    mean, std = (np.array(config.data[key]) for key in ("mean", "std"))
    levels = (40 + 50 * np.arange(CLASSES)) / 255

    def shade(images):
        grey = (np.asarray(images) * std + mean).mean((1, 2, 3))
        return np.abs(grey[:, None] - levels).argmin(1)

    def predict(images):
        return np.stack([_matrix(0.2 * c - 0.3, 0, 0.5) for c in shade(images)])

    def classify(images, matrices):
        if reads == "pixels":
            return shade(images)
        return np.round((np.asarray(matrices)[:, 0, 2] + 0.3) / 0.2)

    asked = object.__new__(class_leak._Asked)
    asked._config, asked._predict, asked._classify = config, predict, classify
    return asked


def test_a_network_that_reads_gamma_needs_no_pixels(tmp_path):
    asked, split = _asked("gamma", tmp_path), _split()
    found = asked.about(split, asked.matrices(split))
    full = ("image", "noise", "own_noise", "swapped", "gamma")
    assert {name: found[name] for name in full} == dict.fromkeys(full, 1)
    # The mean of all places lies between two classes: one of them is named.
    assert (found["pixels"], found["still"], found["chance"]) == (0, 0.25, 0.25)
    # Places of -0.3, -0.1, 0.1 and 0.3, reaching 0.5 to each side: never outside.
    assert found["padding"] == 0


def test_a_network_that_reads_pixels_knows_nothing_of_gamma(tmp_path):
    asked, split = _asked("pixels", tmp_path), _split()
    found = asked.about(split, asked.matrices(split))
    full = ("image", "still", "own_noise", "pixels", "gamma")
    assert {name: found[name] for name in full} == dict.fromkeys(full, 1)
    # Noise alike for all images is of one shade.
    assert found["noise"] < 0.4
    assert found["swapped"] == 0


def test_the_discriminant_measures_in_spreads_within_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 7], 200)
    # The first entry is wide and says nothing; the second is narrow and tells; the
    # third is their sum, the fourth never changes.
    wide = rng.normal(0, 10, 400)
    tells = np.where(labels == 7, 0.1, -0.1) + rng.normal(0, 0.02, 400)
    entries = np.stack([wide, tells, wide + tells, np.ones(400)], 1)
    said = class_leak.discriminate(entries[::2], entries[1::2], labels[::2])
    assert (said == labels[1::2]).mean() > 0.99
    shuffled = class_leak.discriminate(
        entries[::2], entries[1::2], rng.permutation(200) % 2
    )
    assert (shuffled == labels[1::2] // 4).mean() < 0.6


def test_padding_is_what_lies_outside_the_image():
    places = {0.0: 0.0, 0.75: 0.25, 1.0: 0.5, -1.0: 0.5, 1.6: 1.0}
    for x, share in places.items():
        matrices = _matrix(x, 0, 0.5)[None]
        assert class_leak.padding(matrices) == pytest.approx(share, abs=0.02)
    assert class_leak.padding(_matrix(1, 1, 0.5)[None]) == pytest.approx(0.75, abs=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("leak")


@pytest.mark.parametrize("kind", ["cra", "stn"])
def test_a_run_is_measured_on_any_of_its_splits(folder, kind, capsys):
    workdir = folder / kind
    tiny_run.save(workdir, kind)
    found = class_leak.measure(workdir)
    assert list(found) == list(class_leak.COLUMNS)
    assert all(0 <= value <= 1 for value in found.values())
    assert found == class_leak.measure(workdir, "test")  # the same images and noise
    assert found != class_leak.measure(workdir, "test_shifted")
    class_leak.main([str(workdir), "--splits", "test"])
    shown = capsys.readouterr().out.splitlines()[2]
    numbers = [float(x) for x in shown.strip("| ").split("|")[2:]]
    assert_array_equal(numbers, [round(100 * x, 1) for x in found.values()])
    with pytest.raises(ValueError, match=r"unknown split 'val'.*test_shifted"):
        class_leak.measure(workdir, "val")


def test_a_baseline_has_no_leak_to_measure(folder):
    tiny_run.save(folder / "baseline", "baseline")
    with pytest.raises(ValueError, match="is a baseline, which has no N_ar"):
        class_leak.measure(folder / "baseline")
