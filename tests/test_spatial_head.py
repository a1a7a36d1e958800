"""The spatial head: its equations, its initial attention, errors, and a whole run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from cra_jax import art_module, model
from cra_jax.art_module import ArtConfig, AttentionHead
from cra_jax.backbones import efficientnet, resnet
from cra_jax.inference import evaluate, run_options, trained
from cra_jax.inference.predictor import Predictor
from cra_jax.inference.restore import restore
from cra_jax.input.batches import center_batches
from cra_jax.input.normalize import normalize
from cra_jax.runtime import run_directory
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build, check_config, train
from tests.helpers import patch_backbone, tiny_config
from tests.helpers.echo_network import make_network
from tests.oracles import attention

ROWS, COLUMNS = (-1.0, -0.1, 0.5), (-0.9, -0.4, 0.3, 0.9)
PLACES = ("place_conv", "place_gain")


def _head(**options: Any) -> AttentionHead:
    return AttentionHead(ArtConfig(head="spatial", size_px=8, **options))


def _params(rng, channels=5):
    return {
        "kernel": rng.normal(size=(channels, 2)),
        "bias": rng.normal(size=4),
        "place_conv": {"kernel": rng.normal(size=(channels, 1))},
        "place_gain": rng.normal(size=2),
    }


def _apply(head, params, features):
    centres = jnp.asarray(ROWS), jnp.asarray(COLUMNS)
    out = head.apply({"params": params}, features.mean((1, 2)), features, centres)
    assert isinstance(out, art_module.Attention)
    return out


@pytest.mark.parametrize("normalized", [True, False])
def test_gamma_of_the_spatial_head_equals_the_oracle(x64, normalized):
    rng = np.random.default_rng(0)
    params, features = _params(rng), rng.normal(size=(3, 3, 4, 5))
    head = _head(normalize_head=normalized)
    found = _apply(head, params, jnp.asarray(features)).gamma
    assert found.dtype == jnp.float64
    for gamma, image in zip(found, features, strict=True):
        expected = attention.spatial_gamma(
            image,
            params["place_conv"]["kernel"][:, 0],
            kernel=params["kernel"],
            bias=params["bias"],
            gain=params["place_gain"],
            rows=ROWS,
            columns=COLUMNS,
            normalized=normalized,
        )
        assert_allclose(gamma, expected, rtol=1e-12)


@pytest.mark.parametrize("normalized", [True, False])
def test_gradients_of_the_spatial_head_are_the_finite_differences(x64, normalized):
    rng = np.random.default_rng(1)
    start = _params(rng), rng.normal(size=(2, 3, 4, 5))
    weights = rng.normal(size=(2, 2, 3))
    # The guard and the clip are off, because they change gradients.
    head = _head(normalize_head=normalized, guard=0.0, gradient_clip=0.0)

    def loss(params, features):
        return (weights * _apply(head, params, features).matrix).sum()

    start = jax.tree.map(jnp.asarray, start)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(*start)
    value = jax.jit(loss)
    for _ in range(6):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), start)
        ahead, behind = (
            value(
                *jax.tree.map(lambda x, d, s=sign: x + s * 1e-6 * d, start, direction)
            )
            for sign in (1, -1)
        )
        slope = sum(
            jax.tree.leaves(
                jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
            )
        )
        assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6)
    for name in PLACES:
        assert all(np.abs(x).min() > 1e-4 for x in jax.tree.leaves(gradient[0][name]))


def test_gamma_of_zero_features_is_the_bias_with_a_finite_gradient():
    features = jnp.zeros((2, 3, 4, 5))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), _params(rng))

    def place(features):
        return _apply(_head(guard=0.0), params, features).gamma[:, :2].sum()

    assert_allclose(_apply(_head(), params, features).gamma, [params["bias"]] * 2)
    assert np.isfinite(jax.grad(place)(features)).all()


BACKBONES = {
    "imagenet": lambda: resnet.create("resnet10", 5, width=8),
    "medium": lambda: resnet.create("resnet10", 5, width=8, stem="medium"),
    "small": lambda: resnet.create("resnet10", 5, width=8, stem="small"),
    "efficientnet": lambda: efficientnet.create("tiny_lite0", 5),
    "patches": lambda: patch_backbone.create("patches_deep", 5, width=8),
}


@pytest.mark.usefixtures("tiny_lite0")
@pytest.mark.parametrize("name", BACKBONES)
def test_initial_position_of_the_spatial_head_is_init_with_a_gradient(name):
    """The position is exactly that of init, although the mean of cells is not 0."""
    init = (0.1, -0.2, 0.45, 0.3)
    config = ArtConfig(head="spatial", init=init, size_px=16, gradient_clip=0.0)
    network = model.create("cra", BACKBONES[name], config)
    images = jax.random.normal(jax.random.key(0), (3, 64, 64, 3))
    variables: Any = jax.jit(network.init)(jax.random.key(1), images)
    out: Any = jax.jit(network.apply)(variables, images)
    # Scale and angle differ slightly between images.
    place = config.place_bound * np.tanh(out.attention.gamma[:, :2])
    assert_allclose(place, [init[:2]] * 3, atol=1e-6)
    assert_allclose(out.attention.gamma_res, [init] * 3, atol=5e-3)
    backbone = BACKBONES[name]()
    stream = {k: variables[k]["classification_stream"] for k in variables}
    features = jax.jit(backbone.apply)(stream, images).features
    middles = [x.mean() for x in art_module.cell_centres(backbone, features, images)]
    assert min(map(abs, middles)) > 0.04

    def position(head):
        params = {**variables["params"], "attention_head": head}
        out: Any = network.apply({**variables, "params": params}, images)
        return out.attention.gamma_res[0, 0]

    gradient = jax.jit(jax.grad(position))(variables["params"]["attention_head"])
    assert np.abs(gradient["place_conv"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("alpha_p", [1.0, 0.8])
def test_initial_gain_does_not_depend_on_the_bound(inside, alpha_p):
    """Near the centre, the position is 2.5 times the mean position of the map."""
    head = _head(inside=inside, alpha_p=alpha_p)
    features = jax.random.normal(jax.random.key(0), (4, 3, 4, 5))
    centres = jnp.asarray(ROWS), jnp.asarray(COLUMNS)
    pooled = features.mean((1, 2))
    params: Any = head.init(jax.random.key(1), pooled, features, centres)["params"]
    weights = 1e-3 * jax.random.normal(jax.random.key(2), (5, 1))
    params = {**params, "place_conv": {"kernel": weights}}
    out: Any = head.apply({"params": params}, pooled, features, centres)
    length = np.linalg.norm(pooled, axis=1)[:, None, None]
    scores = 4 * (features @ weights)[..., 0] / length
    mean = np.asarray(art_module.mean_place(scores, centres))
    assert np.abs(mean).min() > 1e-5
    assert_allclose(out.gamma_res[:, :2], 2.5 * mean, rtol=2e-2)


def test_mean_place_of_a_single_strong_cell_is_the_cell():
    centres = jnp.asarray(ROWS), jnp.asarray(COLUMNS)
    scores = jnp.zeros((2, 3, 4)).at[0, 2, 1].set(60.0)
    middle = np.array([np.mean(COLUMNS), np.mean(ROWS)])
    found = np.asarray(art_module.mean_place(scores, centres))
    assert_allclose(found[0] + middle, [COLUMNS[1], ROWS[2]], atol=1e-6)
    assert_allclose(found[1], [0, 0], atol=1e-7)


def test_cell_centres_of_a_non_square_image():
    backbone = resnet.create(
        "resnet10", 5, width=8, stem="small"
    )  # one cell for every 8 px
    features, images = jnp.zeros((1, 4, 3, 2)), jnp.zeros((1, 33, 24, 3))
    rows, columns = art_module.cell_centres(backbone, features, images)
    assert_allclose(rows, [-1, -0.5, 0, 0.5])
    assert_allclose(columns, 2 * np.array([0, 8, 16]) / 23 - 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "reason"), [("stn", "six parameters"), ("baseline", "has no attention")]
)
def test_spatial_head_of_other_models_is_an_error(kind, reason, tmp_path):
    message = rf"art.head='spatial'.*model.kind='{kind}' .*{reason}.*art.head='pooled'"
    with pytest.raises(ValueError, match=message):
        check_config.check(
            tiny_config.config(tmp_path, **{"model.kind": kind, "art.head": "spatial"})
        )


def test_unknown_head_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"art.head 'conv'; choose from pooled, spatial"
    ):
        make_network(head="conv")


def _last_state(workdir):
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose("latest")
        return step, checkpoints.restore(step, checkpoints.shapes(step))


def test_spatial_run_on_eight_devices_resumes_evaluates_and_predicts(tmp_path):
    assert jax.device_count() == 8
    changes = {"art.head": "spatial", "eval.snapshots": 4, "optim.base_lr": 0.05}
    config = tiny_config.config(tmp_path / "cache", **changes)
    scores = train.run(config, tmp_path / "whole")
    # One epoch, then resumed for the second.
    half = tiny_config.config(tmp_path / "cache", **{**changes, "train.epochs": 1})
    train.run(half, tmp_path / "parts")
    train.run(config, tmp_path / "parts", allow_change=True)
    step, whole = _last_state(tmp_path / "whole")
    resumed_step, resumed = _last_state(tmp_path / "parts")
    assert step == resumed_step == 12
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)

    # Training changes the map and its gain.
    head = whole["params"]["attention_head"]
    start = 2.5 / run_options.art_of(config).place_bound
    assert np.abs(head["place_conv"]["kernel"]).max() > 1e-3
    assert (np.abs(head["place_gain"] - start) > 1e-5).all()

    # Network, log, restored head and predictor have the same attention.
    options = run_options.from_config(config)
    restored = restore(options, tmp_path / "whole", attention=True)
    split = build.open_split(config, build.load_dataset(config), "test")
    evaluator = evaluate.Evaluator(restored.backbone, options)
    found = evaluator.center(restored.variables, split, head=restored.head)
    assert found.matrices is not None
    assert np.ptp(found.matrices[:, 0, 2]) > 1e-3  # the centre is not the same in all
    data = config.data
    batch = center_batches(
        split.images, split.labels, batch_size=8, crop_px=data.crop_px
    )[0]
    images = normalize(jnp.asarray(batch["image"]), mean=data.mean, std=data.std)
    network = build.build_network(config, 8)
    variables = {k: whole[k] for k in ("params", "batch_stats")}
    out: Any = jax.jit(network.apply)(variables, images)
    assert_allclose(found.matrices[:8], out.attention.matrix, atol=1e-5)
    lines = run_directory.read_snapshots(tmp_path / "whole")
    last = [line for line in lines if line["step"] == 12]
    assert len(last) == 4
    for line in last:
        assert_allclose(line["matrix"], found.matrices[line["index"]], atol=2e-6)
    for name in ("attention_iou", "head_in_attention"):
        measured = evaluator.scores(found, split, "center")[name]
        assert measured == pytest.approx(scores["test"][name])
    image = split.images[0]
    prediction = Predictor(trained.load_network(tmp_path / "whole"))(image)
    crop_px = config.data.crop_px
    corners = art_module.corners_px(found.matrices[0], crop_px)
    offset = (np.array(image.shape[1::-1]) - crop_px) // 2 + 0.5
    assert_allclose(prediction.attention_px, corners + offset, atol=1e-3)
