"""Tests of the class leak, on networks that read only Gamma or only the pixels."""

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
    """Grey images, brighter with a higher class, sorted by class as in CUB."""
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


def _streams(reads: str, tmp_path: Path) -> class_leak._Streams:
    """N_cls encodes the class in gamma1; N_ar reads it there or from the pixels."""
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

    streams = object.__new__(class_leak._Streams)
    streams._config = config
    streams._predict, streams._classify = predict, classify
    return streams


def test_scores_of_a_network_that_reads_only_gamma(tmp_path):
    streams, split = _streams("gamma", tmp_path), _split()
    found = streams.scores(split, streams.matrices(split))
    full = ("image", "noise", "own_noise", "swapped", "gamma")
    assert {name: found[name] for name in full} == dict.fromkeys(full, 1)
    # The mean of all centres lies between two classes; one of them is predicted.
    assert (found["pixels"], found["mean_gamma"], found["chance"]) == (0, 0.25, 0.25)
    # Centres at -0.3, -0.1, 0.1 and 0.3, with 0.5 to each side: inside the image.
    assert found["padding"] == 0


def test_scores_of_a_network_that_reads_only_pixels(tmp_path):
    streams, split = _streams("pixels", tmp_path), _split()
    found = streams.scores(split, streams.matrices(split))
    full = ("image", "mean_gamma", "own_noise", "pixels", "gamma")
    assert {name: found[name] for name in full} == dict.fromkeys(full, 1)
    # Noise with the same mean for all images has one shade.
    assert found["noise"] < 0.4
    assert found["swapped"] == 0


def test_the_discriminant_scales_by_the_deviation_within_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 7], 200)
    # The first entry is wide and independent of the class. The second is narrow and
    # depends on it. The third is their sum, and the fourth is constant.
    wide = rng.normal(0, 10, 400)
    narrow = np.where(labels == 7, 0.1, -0.1) + rng.normal(0, 0.02, 400)
    entries = np.stack([wide, narrow, wide + narrow, np.ones(400)], 1)
    predicted = class_leak.discriminate(entries[::2], entries[1::2], labels[::2])
    assert (predicted == labels[1::2]).mean() > 0.99
    shuffled = class_leak.discriminate(
        entries[::2], entries[1::2], rng.permutation(200) % 2
    )
    assert (shuffled == labels[1::2] // 4).mean() < 0.6


def test_padding_is_the_share_outside_the_image():
    shares = {0.0: 0.0, 0.75: 0.25, 1.0: 0.5, -1.0: 0.5, 1.6: 1.0}
    for x, share in shares.items():
        matrices = _matrix(x, 0, 0.5)[None]
        assert class_leak.padding(matrices) == pytest.approx(share, abs=0.02)
    assert class_leak.padding(_matrix(1, 1, 0.5)[None]) == pytest.approx(0.75, abs=0.02)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("leak")


@pytest.mark.parametrize("kind", ["cra", "stn"])
def test_a_run_is_measured_on_each_of_its_splits(runs, kind, capsys):
    workdir = runs / kind
    tiny_run.save(workdir, kind)
    found = class_leak.measure(workdir)
    assert list(found) == list(class_leak.COLUMNS)
    assert all(0 <= value <= 1 for value in found.values())
    assert found == class_leak.measure(workdir, "test")  # same images and noise
    assert found != class_leak.measure(workdir, "test_shifted")
    class_leak.main([str(workdir), "--splits", "test"])
    shown = capsys.readouterr().out.splitlines()[2]
    numbers = [float(x) for x in shown.strip("| ").split("|")[2:]]
    assert_array_equal(numbers, [round(100 * x, 1) for x in found.values()])
    with pytest.raises(ValueError, match=r"unknown split 'val'.*test_shifted"):
        class_leak.measure(workdir, "val")


def test_a_baseline_is_refused(runs):
    tiny_run.save(runs / "baseline", "baseline")
    with pytest.raises(ValueError, match="is a baseline, which has no N_ar"):
        class_leak.measure(runs / "baseline")
