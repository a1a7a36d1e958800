"""Figures of runs, and their parts."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.patches import Polygon
from PIL import Image

from cra_jax import art_module, train_step
from cra_jax.inference import run_options
from cra_jax.reports import (
    confusions,
    figure_panels,
    figure_style,
    figures,
    training_curves,
)
from cra_jax.runtime import run_directory, training_log
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.runtime.run_directory import Result
from cra_jax.training import build
from tests.helpers import tiny_config


def _save_run(
    directory: Path, cache: Path, kind: str, *, seed: int = 0, **changes: Any
):
    """Writes a run directory like that of a trained network; returns its config."""
    config = tiny_config.config(cache, **{"model.kind": kind, "seed": seed, **changes})
    dataset = build.load_dataset(config)
    names = dataset.class_names
    training = build.build_training(config, len(names), steps_per_epoch=6)
    state = train_step.create_state(
        jax.random.key(seed), training.network, training.optimizer, crop_px=32
    )
    directory.mkdir()
    run_directory.keep_config(directory, config.to_dict())
    meta = {"class_names": names, "epoch": 2, "config": config.to_dict()}
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(12, state, meta, metric=0.5)
    numbers = {"loss_cls1": 2.0, "top1": 0.4, "images_per_second": 1, "eta_seconds": 1}
    tests = {"top1": 0.5, "protocol": "center", "count": 40, "pointing": 0.5}
    with training_log.Log(directory, first_step=0, total_steps=12) as log:
        for epoch in (0, 1, 2):
            if epoch:
                log.train(step=6 * epoch, epoch=epoch, numbers={**numbers, "loss": 3.0})
                log.test(step=6 * epoch, epoch=epoch, split="test", numbers=tests)
            if kind != "baseline":
                matrix = [[0.4, -0.1 * epoch, 0.1], [0.1 * epoch, 0.4, 0]]
                indices = build.open_split(config, dataset, "test").first_of_each_class(
                    4
                )
                log.attention(
                    step=6 * epoch,
                    epoch=epoch,
                    split="test",
                    names={i: str(i) for i in indices},
                    matrices=dict.fromkeys(indices, matrix),
                )
    return config


def _size(png: Path) -> tuple[int, int]:
    with Image.open(png) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert len(colours) > 50, f"{png} is empty"
        return image.size


def test_all_figures_of_a_run_and_its_baseline(tmp_path):
    cache = tmp_path / "cache"
    changes: Any = {"art.head": "spatial"}
    config = _save_run(tmp_path / "ours", cache, "cra", **changes)
    _save_run(tmp_path / "theirs", cache, "baseline", seed=1)
    drawn, notes = figures.draw_all(
        run_options.from_config(config), tmp_path / "ours", baseline=tmp_path / "theirs"
    )
    names = [figure.name for figure in drawn]
    # Both networks have random weights and are correct on some images.
    assert names == ["activation", "attention", "corrected", "curves", "confused"]
    assert notes == []
    for figure in drawn:
        assert figure.png.parent == tmp_path / "ours" / "report"
        assert min(_size(figure.png)) > 300
        assert figure.png.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
        assert figure.caption.endswith(".")
    assert pyplot.get_fignums() == []


def test_missing_figures_of_a_baseline_are_explained(tmp_path, capsys):
    config = _save_run(tmp_path / "run", tmp_path / "cache", "baseline")
    figures.run(run_options.from_config(config), tmp_path / "run")
    printed = capsys.readouterr().out
    for name in ("activation", "curves", "confused"):
        assert f"report/{name}.png and .pdf: " in printed
    assert 'Figure "attention" is missing: the baseline has no attention' in printed
    assert 'Figure "corrected" is missing: it needs a second run' in printed
    files = {x.name for x in (tmp_path / "run" / "report").iterdir()}
    assert files == {
        f"{name}.{suffix}"
        for name in ("activation", "curves", "confused")
        for suffix in ("png", "pdf")
    }


def test_figures_of_an_stn_and_errors_of_different_data(tmp_path):
    cache = tmp_path / "cache"
    config = _save_run(tmp_path / "stn", cache, "stn")
    drawn, _ = figures.draw_all(run_options.from_config(config), tmp_path / "stn")
    assert "attention" in [x.name for x in drawn]
    _save_run(tmp_path / "other", cache, "baseline", **{"data.seed": 5})
    with pytest.raises(
        ValueError, match=r"test images of .*other .* differ from .*stn"
    ):
        figures.draw_all(
            run_options.from_config(config),
            tmp_path / "stn",
            baseline=tmp_path / "other",
        )
    changed = config.copy_and_resolve_references()
    changed.data.num_species = 5
    with pytest.raises(ValueError, match="the data has 5 classes, the checkpoint 8"):
        figures.draw_all(run_options.from_config(changed), tmp_path / "stn")
    (tmp_path / "stn" / run_directory.SNAPSHOTS).unlink()
    _, notes = figures.draw_all(run_options.from_config(config), tmp_path / "stn")
    assert any("has no snapshots" in note for note in notes)


def _results(pairs, confidence=()):
    """Results with (label, predicted) pairs."""
    confidences = confidence or [0.5] * len(pairs)
    return [
        Result(i, f"{i}.jpg", label, predicted, confidences[i], 12)
        for i, (label, predicted) in enumerate(pairs)
    ]


def test_confusions_count_both_directions_and_show_the_most_confident_error():
    pairs = [(0, 1), (0, 1), (1, 0), (0, 0), (2, 3), (3, 3), (1, 2), (1, 1), (2, 4)]
    found = confusions.most_confused_pairs(
        _results(pairs, [0.3, 0.9, 0.5, 0.5, 0.5, 0.8, 0.5, 0.7, 0.5]), max_pairs=2
    )
    assert found == [
        confusions.Pair((0, 1), confused=(2, 1), counts=(3, 3), examples=(1, 2)),
        confusions.Pair((1, 2), confused=(1, 0), counts=(3, 2), examples=(6, 4)),
    ]
    every = confusions.most_confused_pairs(_results(pairs), max_pairs=9)
    # The pair (2, 4) is left out, because class 4 has no test image.
    assert [x.labels for x in every] == [(0, 1), (1, 2), (2, 3)]
    assert confusions.most_confused_pairs(_results([(0, 0), (1, 1)]), max_pairs=9) == []
    # Three confusions in one direction are more than one in each direction.
    one_way = _results([(0, 1), (1, 0), (3, 2), (3, 2), (3, 2), (2, 2)])
    assert [x.labels for x in confusions.most_confused_pairs(one_way, max_pairs=1)] == [
        (2, 3)
    ]


def test_corrected_images_and_other_images_of_a_class():
    before = _results([(0, 1), (0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (2, 1)])
    after = _results([(0, 0), (0, 1), (1, 1), (1, 1), (0, 1), (0, 0), (2, 1)])
    assert confusions.corrected_images(before, after) == [0, 2]
    assert confusions.corrected_images(after, before) == [1]
    runs = {"before": before, "after": after}
    assert confusions.another_image(1, exclude=2, **runs) == 3  # correct in both runs
    assert confusions.another_image(0, exclude=0, **runs) == 5
    assert (
        confusions.another_image(2, exclude=0, **runs) == 6
    )  # none is correct in both runs
    assert confusions.another_image(7, exclude=0, **runs) is None


@pytest.mark.parametrize(
    ("first_epochs", "period_epochs", "off", "drops"),
    [
        (50, 45, [(50, 95)], [50, 95]),  # the paper's
        (60, 30, [(60, 90), (120, 140)], [60, 90, 120]),
        (0, 70, [(0, 70)], [0, 70]),
        (50, 0, [], []),
        (140, 45, [], []),
    ],
)
def test_phases_in_epochs(first_epochs, period_epochs, off, drops):
    options = {"first_epochs": first_epochs, "period_epochs": period_epochs}
    found = training_curves.compute_phases(
        140, restriction=options, rate=options, factor=0.1
    )
    assert found == training_curves.Phases(140, off, drops, 0.1)
    without = training_curves.compute_phases(
        140, restriction=None, rate=options, factor=0.1
    )
    assert without == training_curves.Phases(140, [], drops, 0.1)


def test_training_curves_are_drawn_at_the_logged_epochs():
    lines = [
        {
            "split": "train",
            "step": s,
            "epoch": -(-s // 6),
            "top1": s / 12,
            "loss_cls1": 1,
        }
        for s in (4, 6, 8, 12)
    ]
    lines += [
        {"split": "test", "step": 6 * e, "epoch": e, "top1": 0.5, "protocol": p}
        for e, p in ((1, "center"), (2, "center"), (2, "full"))
    ]
    phases = training_curves.Phases(2, [(1, 2)], [1], 0.1)
    figure = training_curves.draw_training_curves(lines, phases)
    accuracy, losses = figure.axes  # without boxes, there is no third panel
    train, test = accuracy.get_lines()[:2]
    epochs, values = np.array(train.get_data(), float)
    np.testing.assert_allclose(epochs, [4 / 6, 1, 8 / 6, 2])
    np.testing.assert_allclose(values, [100 / 3, 50, 200 / 3, 100])
    np.testing.assert_allclose(np.array(test.get_data(), float), [[1, 2], [50, 50]])
    labels = [x.get_text() for x in losses.get_legend().get_texts()]  # pyright: ignore
    assert labels == ["$L_{cls1}$"]
    above = [x.get_text() for x in accuracy.texts]
    assert above == ["learning rate × 0.1, no $L_{res}$"]


def test_class_names_wrap_into_two_lines():
    assert (
        figure_style.wrap_class_name("001.Black_footed_Albatross")
        == "Black footed\nAlbatross"
    )
    name = "Bentley Continental Supersports Conv. Convertible 2012"
    assert figure_style.wrap_class_name(name, width=12) == "Bentley\nContinental…"
    assert figure_style.wrap_class_name("Llanfairpwllgwyngyllgogerychwyrndrobwll") == (
        "Llanfairpwllgwyn\ngyllgogerychwyr…"
    )
    assert figure_style.wrap_class_name("707.") == "707."


def test_class_names_are_not_parsed_as_math_and_cause_no_font_warnings(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    names = ("a $x^2 bird$", "鳥 of $\\notacommand$")
    pair = figure_panels.Confusion(names, (image, image), (1, 0), (2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figure_panels.draw_confusions([pair])
        first = figure_style.save_figure(figure, tmp_path, "names")
        second = figure_style.save_figure(figure, tmp_path, "again")
    for suffix in (".png", ".pdf"):
        files = [x.with_suffix(suffix).read_bytes() for x in (first, second)]
        assert files[0] == files[1]
    shown = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert "a $x^2 bird$" in shown


def test_the_outline_has_the_corners_of_the_attention():
    image = np.zeros((16, 16, 3), np.uint8)
    corners = art_module.corners_px(np.array([[[0.5, 0, 0], [0, 0.5, 0]]]), 16)
    history = figure_panels.AttentionHistory(
        image, "auk", corners, image[None], None, None
    )
    figure = figure_panels.draw_attention_by_epoch([history], [3], title="STN")
    (outline,) = [p for p in figure.axes[0].patches if isinstance(p, Polygon)]
    np.testing.assert_allclose(outline.get_xy()[:4], corners[0])
    assert next(x.get_text() for x in figure.axes[0].texts) == "epoch 3"
    assert len(figure.axes) == 2  # no redundancy


def test_cam_overlay_is_transparent_at_0_and_lighter_at_larger_values():
    image = np.full((4, 4, 3), 90, np.uint8)
    cam = np.zeros((4, 4))
    cam[0] = (-5, 1, 2, 4)
    shown = figure_style.overlay_cam(image, cam).astype(int)
    assert (shown[1:] == shown[3, 3]).all()
    assert (shown[0, 0] == shown[3, 3]).all()
    assert np.ptp(shown[3, 3]) == 0  # grey
    luminance = shown[0] @ np.array([0.299, 0.587, 0.114])
    assert luminance[3] > luminance[2] > luminance[1]
