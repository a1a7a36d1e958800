"""Both evaluation protocols, and the scores of activation and attention in boxes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import art_module
from cra_jax.art_module import ArtConfig
from cra_jax.backbones import layers, resnet
from cra_jax.inference import accuracy, evaluate, protocols, run_options
from cra_jax.input import normalize, splits
from cra_jax.input.batches import center_batches, full_batches
from cra_jax.input.records import Record
from cra_jax.runtime import training_log
from tests.helpers import tiny_config
from tests.helpers.echo_backbone import Echo
from tests.oracles import equations

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 32


def _images(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in shapes]


@pytest.fixture(scope="module")
def network():
    """Returns a ResNet, and variables with statistics that differ from initial ones."""
    backbone = resnet.create("resnet10", 5, width=8, stem="small")
    variables: Any = jax.jit(backbone.init)(
        jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    keys = iter(jax.random.split(jax.random.key(1), 100))
    stats = jax.tree.map(
        lambda x: x + jax.random.uniform(next(keys), x.shape), variables["batch_stats"]
    )
    bias = jax.tree.map(lambda x: x + 0.1, variables["params"])
    return backbone, {"params": bias, "batch_stats": stats}


SHAPES = [(36, 36), (36, 47), (61, 36), (36, 40), (36, 63), (37, 50), (36, 36)]


def _full(network, images, *, bucket_px, batch_size=8):
    backbone, variables = network
    step = protocols.make_full_step(
        backbone, mean=MEAN, std=STD, crop_px=CROP, masked=bucket_px > 0
    )
    batches = full_batches(
        images,
        np.zeros(len(images), int),
        batch_size=batch_size,
        bucket_px=bucket_px,
    )
    return evaluate.predict_split(step, variables, batches, len(images)).logits


def test_full_protocol_equals_the_oracle(network):
    backbone, variables = network
    images = _images(SHAPES[1:4])
    found = _full(network, images, bucket_px=32)
    fc = variables["params"]["fc"]
    for image, scores in zip(images, found, strict=True):
        batch = normalize.normalize(jnp.asarray(image[None]), mean=MEAN, std=STD)
        features = backbone.apply(variables, batch, method="extract")[0]
        expected = equations.full_protocol(features, 4, fc["kernel"], fc["bias"])
        assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_bucketed_images_have_the_scores_of_exact_shapes(network):
    images = _images(SHAPES)
    exact = _full(network, images, bucket_px=0)
    for bucket_px in (8, 64):
        assert_allclose(
            _full(network, images, bucket_px=bucket_px), exact, rtol=1e-4, atol=1e-5
        )


def test_both_protocols_are_equal_for_images_of_the_crops_size(network):
    backbone, variables = network
    images = _images([(CROP, CROP)] * 3)
    center = protocols.make_center_step(backbone, mean=MEAN, std=STD)
    batches = center_batches(images, np.zeros(3, int), batch_size=8, crop_px=CROP)
    found = evaluate.predict_split(center, variables, batches, 3)
    assert_allclose(found.logits, _full(network, images, bucket_px=0), atol=1e-5)


@pytest.mark.parametrize("batch_size", [8, 16])
def test_every_image_is_evaluated_once_and_in_order(network, batch_size):
    backbone, variables = network
    images = _images([(36, 40)] * 13)
    labels = np.arange(13) % 5
    center = protocols.make_center_step(backbone, mean=MEAN, std=STD)
    batches = center_batches(images, labels, batch_size=batch_size, crop_px=CROP)
    found = evaluate.predict_split(center, variables, batches, 13)
    assert_array_equal(found.labels, labels)
    for image, scores in zip(images, found.logits, strict=True):
        crop = image[2 : 2 + CROP, 4 : 4 + CROP]
        batch = normalize.normalize(jnp.asarray(crop[None]), mean=MEAN, std=STD)
        alone = backbone.apply(variables, batch).logits[0]
        assert_allclose(scores, alone, rtol=1e-4, atol=1e-5)
    scores = accuracy.classification_scores(found.logits, found.labels)
    assert scores["count"] == 13


def test_pointing_and_activation_in_box_of_a_known_activation(tmp_path):
    """The backbone's class score is the red channel; each image has one red pixel."""

    class Redness(Echo):
        def classify(self, features):
            return jnp.stack([features[..., 0], features[..., 0] * 0 - 9], -1)

        def __call__(self, images, train=False):
            pooled = images.mean((1, 2))
            return layers.Outputs(self.classify(pooled), images, pooled)

        def extract(self, images, *, train=False, extent_px=None):
            return images

        def feature_extent(self, extent_px):
            return extent_px

        def feature_place_px(self, cells, extent_px):
            return cells

    images, boxes = [], []
    points = [(10, 20), (30, 6), (33, 33)]  # x, y in an image of 40 x 36
    for x, y in points:
        image = np.zeros((36, 40, 3), np.uint8)
        image[y, x, 0] = 255
        images.append(image)
        boxes.append((x / 40, y / 36, (x + 1) / 40, (y + 1) / 36))
    boxes[1] = (0.0, 0.0, 0.5, 1.0)  # the peak is outside this box
    records = tuple(
        Record(str(i), 0, lambda side: images[0], "", locate=lambda b=box: b)
        for i, box in enumerate(boxes)
    )
    config = tiny_config.config(
        tmp_path, **{"data.mean": (0.0,) * 3, "data.std": (1.0,) * 3}
    )
    evaluator = evaluate.Evaluator(Redness(), run_options.from_config(config))
    split = splits.Split(images, np.zeros(3, int), records)  # pyright: ignore
    found = evaluator.center({"params": {}, "batch_stats": {}}, split)
    assert found.activation is not None
    assert found.matrices is None
    for i, (x, y) in enumerate(points):
        expected = np.zeros((CROP, CROP))
        expected[y - 2, x - 4] = 1
        assert_allclose(found.activation[i], expected)
    scores = evaluator.scores(found, split, "center")
    assert scores["count"] == scores["box_count"] == 3
    # The only active pixel is in its box twice and outside it once.
    assert scores["pointing"] == pytest.approx(2 / 3)
    assert scores["activation_in_box"] == pytest.approx(2 / 3)
    half = 16 * CROP  # the part of the crop in the second box
    assert scores["box_share"] == pytest.approx((1 + half + 1) / 3 / CROP**2)
    assert "attention_iou" not in scores


def test_attention_iou_of_a_known_attention(network, tmp_path):
    backbone, variables = network
    config = tiny_config.config(tmp_path, **{"data.crop_px": CROP})
    images = _images([(CROP, CROP)] * 3)
    # Attention: the central half of the crop; boxes: the same, half of it, the image.
    params = {
        "kernel": jnp.zeros((backbone.feature_channels, 4)),
        "bias": jnp.array([0.0, 0.0, np.arctanh(0.5), 0.0]),
    }
    bounds = ArtConfig(alpha_s=1.0, inside=False)
    head = art_module.trained_head({"attention_head": params}, bounds, "cra")
    edge = 0.5 * (CROP - 1) / CROP / 2  # the frame ends at the centres of pixels
    boxes = [
        (0.5 - edge, 0.5 - edge, 0.5 + edge, 0.5 + edge),
        (0.5 - edge, 0.5, 0.5 + edge, 0.5 + edge),
        (0.0, 0.0, 1.0, 1.0),  # the whole image: not counted
    ]
    records = tuple(
        Record(f"{i}.jpg", i, lambda side: images[0], "", locate=lambda b=box: b)
        for i, box in enumerate(boxes)
    )
    split = splits.Split(images, np.arange(3), records)  # pyright: ignore
    evaluator = evaluate.Evaluator(backbone, run_options.from_config(config))
    found = evaluator.center(variables, split, head=head)
    scores = evaluator.scores(found, split, "center")
    assert scores["attention_iou"] == pytest.approx((1 + 1 / 2) / 2, abs=1e-6)
    assert scores["box_count"] == 2
    plain = evaluator.center(variables, split)
    assert_allclose(found.logits, plain.logits, atol=1e-6)
    assert plain.matrices is None

    names = [f"class {i}" for i in range(1, 6)]
    rows = evaluate.results(found, split, class_names=names, step=7)
    assert [x.name for x in rows] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [x.label for x in rows] == [0, 1, 2]
    probability = np.asarray(jax.nn.softmax(found.logits))
    assert [x.predicted for x in rows] == probability.argmax(1).tolist()
    assert_allclose([x.confidence for x in rows], probability.max(1), rtol=1e-5)
    assert {x.step for x in rows} == {7}
    assert [x.class_name for x in rows] == names[:3]
    assert [x.predicted_class for x in rows] == [names[x.predicted] for x in rows]


def test_part_scores_count_parts_inside_crop_and_attention(tmp_path):
    """Images of 40 x 36 and 32 x 48; the attention is (8, 8) to (40, 24) of the crop.

    It goes beyond the crop's right edge, where it is padding.
    """
    shapes = [(36, 40), (48, 32), (36, 40), (36, 40)]
    crop_from = [(4, 2), (0, 8), (4, 2), (4, 2)]  # x, y

    def place(i, x_px, y_px):
        (height, width), (left, top) = shapes[i], crop_from[i]
        return (x_px + 0.5 + left) / width, (y_px + 0.5 + top) / height

    images = _images(shapes)
    parts = [
        {"head": place(0, 9, 9), "left eye": place(0, 7, 9)},
        {"head": place(1, 30, 23)},
        {"head": place(2, 33, 20), "left eye": place(2, 20, 16)},  # beyond the crop
        {},
    ]
    records = tuple(
        Record(str(i), 0, lambda side: images[0], "", locate_parts=lambda p=found: p)
        for i, found in enumerate(parts)
    )
    split = splits.Split(images, np.zeros(4, int), records)  # pyright: ignore
    config = tiny_config.config(tmp_path, **{"data.crop_px": CROP})
    backbone = resnet.create("resnet10", 5, width=8, stem="small")
    evaluator = evaluate.Evaluator(backbone, run_options.from_config(config))
    unit = 2 / (CROP - 1)
    matrix = [[16 * unit, 0, 24 * unit - 1], [0, 8 * unit, 16 * unit - 1]]
    found = evaluate.Predictions(
        logits=np.eye(4, 5), labels=np.zeros(4, int), matrices=np.array([matrix] * 4)
    )
    scores = evaluator.scores(found, split, "center")
    assert scores["head_in_attention"] == pytest.approx(2 / 3)
    assert scores["head_count"] == 3
    assert scores["left_eye_in_attention"] == pytest.approx(1 / 2)
    assert scores["left_eye_count"] == 2
    assert "pointing" not in scores
    text = training_log.describe_scores(scores)
    assert "head in the attention 66.7 %" in text
    plain = evaluate.Predictions(logits=np.eye(4, 5), labels=np.zeros(4, int))
    assert "head_in_attention" not in evaluator.scores(plain, split, "center")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_bucketed_real_images_have_the_scores_of_exact_shapes(shared_data, arch):
    from cra_jax.datasets import sources

    dataset = sources.load("cub", str(shared_data / "cub_10"))
    records = dataset.splits["test"][:12]
    images = [r.read(256) for r in records]
    assert len({x.shape for x in images}) > 3
    backbone = resnet.create(arch, 10, width=16)
    variables = jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    scores = []
    for bucket_px in (0, 64):
        step = protocols.make_full_step(
            backbone, mean=MEAN, std=STD, crop_px=224, masked=bucket_px > 0
        )
        batches = full_batches(
            images, np.zeros(12, int), batch_size=8, bucket_px=bucket_px
        )
        scores.append(evaluate.predict_split(step, variables, batches, 12).logits)
    print(f"{arch}: largest difference {np.abs(scores[0] - scores[1]).max():.1e}")
    assert_allclose(scores[1], scores[0], rtol=1e-4, atol=1e-4)
