"""CutMix and SnapMix compared with NumPy and torch, and in training."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import losses, train_step
from cra_jax.backbones import resnet
from cra_jax.inference import run_options
from cra_jax.inference.restore import restore
from cra_jax.runtime import run_directory, training_log
from cra_jax.training import check_config, mixing, train
from tests.helpers import tiny_config
from tests.helpers.torch_or_skip import torch

SIZE = (24, 20)
BOXES = np.array(  # top, bottom, left, right: small, large, at border, thin, empty
    [[3, 9, 4, 12], [0, 24, 0, 20], [18, 24, 0, 5], [7, 8, 2, 19], [5, 5, 3, 9]]
)
SOURCES = np.array(
    [[0, 24, 0, 20], [10, 13, 2, 4], [2, 20, 1, 3], [7, 8, 6, 7], [0, 9, 0, 9]]
)
PARTNER = np.array([2, 3, 0, 1, 0])


def _images(count=5):
    rng = np.random.default_rng(1)
    return rng.normal(size=(count, *SIZE, 3)).astype(np.float32)


def _resize(images, size):
    """Resizes ``[h, w, c]`` with torch."""
    planes = torch.tensor(images).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        planes, size, mode="bilinear", align_corners=False
    )
    return resized[0].permute(1, 2, 0).numpy()


def _crop(image, box):
    top, bottom, left, right = box
    return image[top:bottom, left:right]


def test_box_of_the_partner_is_resized_and_pasted():
    images = _images()
    got = mixing.paste(jnp.asarray(images), PARTNER, *_boxes())
    for i, (box, source) in enumerate(zip(BOXES, SOURCES, strict=True)):
        want = images[i].copy()
        target = _crop(want, box)
        if target.size:
            target[:] = _resize(_crop(images[PARTNER[i]], source), target.shape[:2])
        assert_allclose(got[i], want, atol=2e-5, err_msg=str(i))


def _boxes():
    return jnp.asarray(BOXES), jnp.asarray(SOURCES)


def test_weights_are_the_shares_of_activation_of_both_images():
    rng = np.random.default_rng(2)
    activation = rng.normal(size=(5, 4, 3)).astype(np.float32)
    activation[3] = 0.7  # constant: uniform weights
    images = jnp.asarray(_images())
    own, other = mixing.weigh(images, PARTNER, *_boxes(), jnp.asarray(activation))
    maps = np.array([_resize(a[:, :, None], SIZE)[:, :, 0] for a in activation])
    maps -= maps.min((1, 2), keepdims=True)
    maps[3] = 1
    maps /= maps.sum((1, 2), keepdims=True)
    for i, (box, source) in enumerate(zip(BOXES, SOURCES, strict=True)):
        assert own[i] == pytest.approx(1 - _crop(maps[i], box).sum(), abs=1e-5)
        pasted = (
            _crop(maps[PARTNER[i]], source).sum() if _crop(maps[i], box).size else 0
        )
        assert other[i] == pytest.approx(pasted, abs=1e-5)
    assert own[1] == pytest.approx(0, abs=1e-5)  # the box covers the whole image
    assert (own[4], other[4]) == (1, 0)


def test_weights_without_activation_are_shares_of_the_area():
    boxes = jnp.asarray(BOXES)
    own, other = mixing.weigh(jnp.asarray(_images()), PARTNER, boxes, boxes, None)
    heights, widths = BOXES[:, 1] - BOXES[:, 0], BOXES[:, 3] - BOXES[:, 2]
    assert_allclose(other, heights * widths / (SIZE[0] * SIZE[1]), atol=1e-5)
    assert_allclose(own + other, 1, atol=1e-5)


def test_partners_are_from_other_contrast_pairs():
    assert mixing.partners(8).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert mixing.partners(6).tolist() == [2, 3, 0, 1, 5, 4]
    assert mixing.partners(7).tolist() == [2, 3, 0, 1, 5, 4, 6]
    assert mixing.partners(1).tolist() == [0]
    m, n = losses.neighbour_pairs(16)
    partner = mixing.partners(16).tolist()
    pairs = zip(m.tolist(), n.tolist(), strict=True)
    groups = [{a, b, partner[a], partner[b]} for a, b in pairs]
    assert {len(group) for group in groups} == {4}
    for share in (4, 8):
        starts = np.arange(0, 16, share)[:, None]
        assert_array_equal((starts + mixing.partners(share)).ravel(), partner)


@pytest.mark.parametrize(("alpha", "spread"), [(1.0, 0.289), (5.0, 0.151)])
def test_boxes_are_drawn_as_in_cutmix(alpha, spread):
    """Compares with a loop over the code of Yun et al. and the same random numbers."""
    height, width = 101, 51
    keys = jax.random.split(jax.random.key(0), 1000)
    boxes = jax.jit(jax.vmap(lambda key: mixing.draw_box(key, (height, width), alpha)))(
        keys
    )

    @jax.jit
    @jax.vmap
    def draws(key):
        share, down, across = jax.random.split(key, 3)
        return (
            jax.random.beta(share, alpha, alpha),
            jax.random.randint(down, (), 0, height),
            jax.random.randint(across, (), 0, width),
        )

    shares, downs, acrosses = map(np.asarray, draws(keys))
    for box, kept_share, y, x in zip(boxes, shares, downs, acrosses, strict=True):
        box_height, box_width = (
            int(n * np.sqrt(np.float32(1) - kept_share)) for n in (height, width)
        )
        want = [
            max(y - box_height // 2, 0),
            min(y + box_height // 2, height),
            max(x - box_width // 2, 0),
            min(x + box_width // 2, width),
        ]
        assert box.tolist() == want
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.std() == pytest.approx(spread, abs=0.02)


KINDS = ("cutmix", "snapmix")


def _network(classes=5):
    return resnet.create("resnet10", classes, width=8, stem="small")


@functools.cache
def _state():
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.jit(_network().init)(jax.random.key(0), images)
    trees = ({"classification_stream": variables[c]} for c in ("params", "batch_stats"))
    return train_step.TrainState(jnp.int32(7), *trees, opt_state=())


@functools.cache
def _mix(kind, **options):
    options = {"probability": 1.0, "alpha": 1.0, "seed": 0} | options
    return jax.jit(mixing.make_mix(kind, _network(), **options))


def _batch(count, size=32):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8),
        "flip": rng.random(count) < 0.5,
        "label": rng.integers(0, 5, count).astype(np.int32),
        "index": rng.permutation(500)[:count].astype(np.int32),
    }


def _mixed(kind, batch, *, state=None, **options):
    images = jnp.asarray(batch["image"] / 255, jnp.float32)
    return images, *_mix(kind, **options)(state or _state(), images, batch)


@pytest.mark.parametrize(
    "kind", ["cutmix", pytest.param("snapmix", marks=pytest.mark.slow)]
)
def test_mix_depends_only_on_seed_step_and_image(kind):
    batch = _batch(8)
    _, mixed, labels = _mixed(kind, batch)
    assert_array_equal(labels.own, batch["label"])
    assert_array_equal(labels.other, batch["label"][mixing.partners(8)])
    assert ((labels.own_weight >= -1e-5) & (labels.own_weight <= 1 + 1e-5)).all()
    assert ((labels.other_weight >= 0) & (labels.other_weight <= 1 + 1e-5)).all()
    assert 0.1 < labels.other_weight.mean() < 0.9
    # Two devices or two micro-batches give the same result.
    for half in (slice(0, 4), slice(4, 8)):
        part = {k: v[half] for k, v in batch.items()}
        _, alone, alone_labels = _mixed(kind, part)
        assert_allclose(alone, mixed[half], atol=1e-5)
        for name in ("own", "other", "own_weight", "other_weight"):
            found, want = (getattr(x, name) for x in (alone_labels, labels))
            assert_allclose(found, want[half], atol=1e-4)
    later = dataclasses.replace(_state(), step=jnp.int32(8))
    for other in (_mixed(kind, batch, state=later), _mixed(kind, batch, seed=1)):
        assert np.abs(other[1] - mixed).max() > 0.1


def test_snapmix_weights_use_the_activation_of_the_images_own_class():
    images, mixed, labels = _mixed("snapmix", _batch(8))
    variables = {
        "params": _state().params["classification_stream"],
        "batch_stats": _state().batch_stats["classification_stream"],
    }
    features: Any = jax.jit(partial(_network().apply, method="extract"))(
        variables, images
    )
    kernel = np.asarray(variables["params"]["fc"]["kernel"])
    changed = np.abs(mixed - images).max(-1) > 0
    for i in range(8):
        rows, columns = np.nonzero(changed[i])  # the box, found by the changed pixels
        box = [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]
        map_ = np.asarray(features[i]) @ kernel[:, labels.own[i]]
        map_ = _resize(map_[:, :, None], (32, 32))[:, :, 0]
        map_ -= map_.min()
        pasted_share = _crop(map_, box).sum() / map_.sum()
        assert labels.own_weight[i] == pytest.approx(1 - pasted_share, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_probability_is_the_share_of_mixed_images(kind):
    images, mixed, labels = _mixed(kind, _batch(8), probability=0.0)
    assert_array_equal(mixed, images)
    assert_array_equal(labels.own_weight, 1)
    assert_array_equal(labels.other_weight, 0)
    if kind == "cutmix":
        many = _batch(400, 8)
        images, mixed, labels = _mixed(kind, many, probability=0.25, alpha=5.0)
        unchanged = (np.asarray(mixed) == images).all((1, 2, 3))
        assert unchanged.mean() == pytest.approx(0.75, abs=0.08)
        assert_array_equal(labels.other_weight[unchanged], 0)


def test_mixed_cross_entropy_weighs_both_labels():
    rng = np.random.default_rng(4)
    logits = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    own, other = rng.integers(0, 5, (2, 6))
    weights = rng.random((2, 6))
    labels = losses.MixedLabels(
        *map(jnp.asarray, (own, other)), *map(jnp.asarray, weights)
    )
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = [
        -weights[0, i] * np.log(probability[i, own[i]])
        - weights[1, i] * np.log(probability[i, other[i]])
        for i in range(6)
    ]
    assert_allclose(losses.mixed_cross_entropy(logits, labels), want, rtol=1e-5)
    heavier = np.where(weights[1] > weights[0], other, own)
    assert_array_equal(labels.heavier(), heavier)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mixup"}, "unknown mix.kind 'mixup'; choose from cutmix, snapmix"),
        ({"probability": 1.5}, r"mix.probability=1.5 must be in \[0, 1\]"),
        ({"alpha": 0.0}, "mix.alpha=0.0 must be above 0"),
    ],
)
def test_wrong_mix_options_are_errors(tmp_path, options, message):
    changes = {f"mix.{k}": v for k, v in ({"kind": "cutmix"} | options).items()}
    with pytest.raises(ValueError, match=message):
        check_config.check(tiny_config.config(tmp_path, **changes))


@pytest.mark.slow
def test_resumed_run_with_all_options_is_bitwise_equal(tmp_path, monkeypatch):
    """8 devices, CutMix, micro-batches and averages; stopped within an epoch."""
    changes = {
        "mix.kind": "cutmix",
        "optim.ema_decay": 0.9,
        "optim.schedule": "cosine",
        "loss.label_smoothing": 0.1,
        "model.kind": "baseline",
        "train.batch_size": 32,
        "train.accumulate": 2,
        "checkpoint.every_steps": 2,
        "data.on_device": True,
    }
    config = tiny_config.config(tmp_path / "cache", **changes)
    scores = train.run(config, tmp_path / "whole")
    advance = training_log.Log.advance
    steps_made = []

    def stop_after_five(log):
        advance(log)
        steps_made.append(log)
        if len(steps_made) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_log.Log, "advance", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "stopped")
    assert train.run(config, tmp_path / "stopped") == scores
    found, want = (
        restore(run_options.from_config(config), tmp_path / x)
        for x in ("stopped", "whole")
    )
    jax.tree.map(assert_array_equal, found.variables, want.variables)
    config.optim.ema_decay = 0.0
    newest = restore(run_options.from_config(config), tmp_path / "whole")
    kernels = (x.variables["params"]["fc"]["kernel"] for x in (newest, want))
    assert np.abs(np.subtract(*kernels)).max() > 0
    lines = run_directory.read_metrics(tmp_path / "whole")
    mixed = [line["mixed"] for line in lines if line["split"] == "train"]
    assert 0.1 < np.mean(mixed) < 0.9
