from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cra_jax.backbones import batch_norm, convolutions, layers, max_pooling, resnet
from cra_jax.backbones.batch_norm import BatchNorm
from tests.helpers.torch_or_skip import torch
from tests.helpers.torch_parity import (
    assert_stages_equal,
    assert_trees_close,
    flat,
    noise,
    to_numpy,
    to_torch,
)
from tests.oracles.torch_resnet import (
    LAYERS,
    TorchResNet,
    linen_path,
    randomize,
    to_linen,
)

PARAMETER_COUNTS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


@pytest.fixture(autouse=True)
def tiny_bottleneck(monkeypatch):
    """Adds `tiny50`, the smallest network of bottleneck blocks."""
    stages = (1, 1, 1, 1)
    architecture = resnet.Architecture(stages, bottleneck=True)
    monkeypatch.setitem(resnet.ARCHITECTURES, "tiny50", architecture)
    monkeypatch.setitem(LAYERS, "tiny50", ("bottleneck", list(stages)))


def twins(arch, *, num_classes=5, width=8, stem="imagenet", seed=0, **options):
    """Returns a network in torch, the same one in linen, and its variables."""
    torch_model = randomize(TorchResNet(arch, num_classes, width, stem), seed)
    model = resnet.create(arch, num_classes, width=width, stem=stem, **options)
    return torch_model, model, to_linen(torch_model.state_dict().items())


def forward(model, variables, images, **options) -> Any:
    """Returns the outputs and updated collections of a compiled `apply`."""
    options = {"mutable": ["batch_stats"]} | options
    return jax.jit(partial(model.apply, **options))(variables, images)


# --- parity with torchvision --------------------------------------------------------


@pytest.mark.parametrize(("width", "stem"), [(64, "imagenet"), (8, "small")])
@pytest.mark.parametrize("arch", list(LAYERS))
def test_names_shapes_and_counts_equal_torchvision(arch, width, stem):
    with torch.device("meta"):
        state = TorchResNet(arch, 1000, width, stem).state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    expected = {linen_path(name): tuple(state[name].shape) for name in names}
    assert len(expected) == len(names)
    model = resnet.create(arch, 1000, width=width, stem=stem)
    images = jnp.zeros((1, 32, 32, 3))
    leaves = flat(jax.eval_shape(model.init, jax.random.key(0), images))
    orders = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    actual = {
        path: tuple(x.shape[i] for i in orders[x.ndim]) for path, x in leaves.items()
    }
    assert actual == expected
    assert {x.dtype for x in leaves.values()} == {jnp.dtype("float32")}
    if width == 64 and arch in PARAMETER_COUNTS:
        count = sum(x.size for path, x in leaves.items() if path[0] == "params")
        assert count == PARAMETER_COUNTS[arch]


def test_oracle_has_every_architecture():
    assert resnet.ARCHITECTURES.keys() == LAYERS.keys()


SLOW = pytest.mark.slow
EVEN, ODD = (64, 64), (75, 75)


@pytest.mark.parametrize(
    ("arch", "stem", "size", "train"),
    [
        ("resnet18", "imagenet", EVEN, False),
        ("resnet18", "imagenet", EVEN, True),
        ("resnet18", "imagenet", ODD, False),
        ("resnet18", "imagenet", ODD, True),
        ("resnet50", "imagenet", EVEN, False),
        pytest.param("resnet50", "imagenet", EVEN, True, marks=SLOW),
        pytest.param("resnet50", "imagenet", ODD, False, marks=SLOW),
        ("resnet50", "imagenet", ODD, True),
        ("resnet10", "small", (33, 40), False),
        ("tiny50", "small", (33, 40), True),
        ("resnet10", "medium", (45, 64), True),
        ("tiny50", "medium", (64, 45), False),
    ],
)
def test_activations_equal_torch_stage_by_stage(arch, stem, size, train):
    torch_model, model, variables = twins(arch, stem=stem)
    images = noise(2, *size, 3)
    stats, stages = assert_stages_equal(torch_model, model, variables, images, train)
    assert sum(name.startswith("layer") for name in stages) == sum(LAYERS[arch][1])
    after = to_linen(torch_model.state_dict().items())
    assert_trees_close(stats, after["batch_stats"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet10", "tiny50"])
@pytest.mark.usefixtures("x64")
def test_three_float64_sgd_steps_equal_torch(arch):
    """Compares gradients, weights and statistics with 9 digits, beyond float32."""
    torch_model = randomize(TorchResNet(arch, 3, 4, "small"), 1).double().train()
    optimizer = torch.optim.SGD(torch_model.parameters(), lr=0.01)
    model = resnet.create(arch, 3, width=4, stem="small")
    variables = to_linen(torch_model.state_dict().items())

    @jax.jit
    def sgd(variables, images, labels):
        def loss(params):
            outputs, updates = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            log_p = jax.nn.log_softmax(outputs.logits)
            return -jnp.take_along_axis(log_p, labels[:, None], 1).mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], grads)
        return {"params": params, **updates}, grads

    for step in range(3):
        images = noise(3, 17, 24, 3, seed=step, dtype=np.float64)
        labels = np.array([0, 2, 1])
        variables, grads = sgd(variables, images, labels)
        optimizer.zero_grad()
        logits = torch_model(to_torch(images))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        torch_grads = [(n, p.grad) for n, p in torch_model.named_parameters()]
        assert_trees_close(
            {"params": grads}, to_linen(torch_grads), rtol=1e-7, atol=1e-9
        )
        optimizer.step()
    leaves = jax.tree.leaves(variables)
    assert {x.dtype for x in leaves} == {jnp.dtype("float64")}
    expected = to_linen(torch_model.state_dict().items())
    assert_trees_close(variables, expected, rtol=1e-7, atol=1e-9)


def test_initial_weights_follow_torchvision():
    """Convolutions: Kaiming normal, fan-out; `fc`: as `torch.nn.Linear`."""
    conv: Any = convolutions.Conv(96, 3).init(
        jax.random.key(3), jnp.zeros((1, 3, 3, 32))
    )
    kernel = conv["params"]["kernel"]
    std = (2 / (3 * 3 * 96)) ** 0.5
    np.testing.assert_allclose(kernel.std(), std, rtol=0.02)
    assert jnp.abs(kernel).max() > 3 * std  # not a truncated normal

    model = resnet.create("resnet10", 64, width=16)
    pooled = jnp.zeros((1, model.feature_channels))
    head: Any = model.init(jax.random.key(3), pooled, method="classify")
    limit = 128**-0.5
    for value in head["params"]["fc"].values():
        assert 0.9 * limit < jnp.abs(value).max() <= limit
        assert abs(value.mean()) < 0.2 * limit

    norm = BatchNorm().init(jax.random.key(0), jnp.ones((1, 1, 1, 2)), train=False)
    expected = {"scale": 1, "bias": 0, "mean": 0, "var": 1}
    assert {path[-1]: value.tolist() for path, value in flat(norm).items()} == {
        name: [value] * 2 for name, value in expected.items()
    }


# --- BatchNorm ----------------------------------------------------------------------


def norm_variables(channels):
    rng = np.random.default_rng(5)
    params = {
        "scale": rng.uniform(0.5, 1.5, channels),
        "bias": rng.normal(size=channels),
    }
    stats = {"mean": rng.normal(size=channels), "var": rng.uniform(1, 2, channels)}
    tree = {"params": params, "batch_stats": stats}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_norm_groups_are_normalized_separately():
    x = noise(6, 3, 2, 4) * 2 + np.arange(6, dtype=np.float32)[:, None, None, None]
    variables = norm_variables(4)
    y, state = BatchNorm(2).apply(variables, x, train=True, mutable=["batch_stats"])
    alone = [
        BatchNorm().apply(variables, part, train=True, mutable=["batch_stats"])
        for part in (x[:2], x[2:4], x[4:])
    ]
    np.testing.assert_allclose(
        y, np.concatenate([part for part, _ in alone]), rtol=1e-5
    )
    mean_of_groups = jax.tree.map(lambda *s: sum(s) / 3, *[s for _, s in alone])
    assert_trees_close(state, mean_of_groups, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_gradient_of_norm_groups_equals_torch_in_float64():
    """Gradients to images, scale and bias; the statistics contribute none."""
    x = 3 * noise(6, 3, 2, 4, dtype=np.float64) + 1
    cotangent = noise(6, 3, 2, 4, seed=1, dtype=np.float64)
    scale, bias = np.array([0.5, -1.5, 2, 0]), np.array([0.1, -0.3, 0, 2])

    def loss(x, scale, bias):
        groups = x.reshape(3, 2, *x.shape[1:])
        result: Any = batch_norm.normalize(groups, scale, bias, lambda v: v, 1e-5)
        y, mean, var = result
        return (y.reshape(x.shape) * cotangent).sum() + mean.sum() + (var**2).sum()

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias)
    leaves: Any = [torch.tensor(v, requires_grad=True) for v in (x, scale, bias)]
    for group, weights in zip(
        leaves[0].split(2), torch.tensor(cotangent).split(2), strict=True
    ):
        y = torch.nn.functional.batch_norm(
            group.movedim(-1, 1), None, None, leaves[1], leaves[2], training=True
        )
        (y.movedim(1, -1) * weights).sum().backward()
    for grad, leaf in zip(grads, leaves, strict=True):
        np.testing.assert_allclose(grad, leaf.grad, rtol=1e-10, atol=1e-12)


def test_norm_saves_its_input_in_the_inputs_dtype():
    """Between the passes, bfloat16 needs half the memory of float32."""
    x = jnp.asarray(noise(4, 8, 8, 3), jnp.bfloat16)

    def run(x):
        y, _ = BatchNorm().apply(
            norm_variables(3), x, train=True, mutable=["batch_stats"]
        )
        return y

    kept = jax.tree.leaves(jax.vjp(run, x)[1])
    large = [v for v in kept if v.size >= x.size]
    assert [(v.size, v.dtype) for v in large] == [(x.size, jnp.bfloat16)]


@pytest.mark.parametrize("ceiling", [np.inf, 2.0])
def test_relu_has_the_gradient_of_torch_and_saves_only_its_output(ceiling):
    x = np.array([-3, -0.5, 0, 0.5, 1.5, 2, 7], np.float32)
    weights = np.arange(1, 8, dtype=np.float32)
    y, back = jax.vjp(lambda x: layers.relu(x, ceiling), x)
    leaf: Any = torch.tensor(x, requires_grad=True)
    expected = torch.nn.functional.hardtanh(leaf, 0.0, ceiling)
    expected.backward(torch.tensor(weights))
    np.testing.assert_array_equal(y, expected.detach())
    np.testing.assert_array_equal(back(weights)[0], leaf.grad)
    assert [v.shape for v in jax.tree.leaves(back)] == [x.shape]


def test_synchronized_norm_equals_the_norm_of_the_whole_batch():
    """Compares values, statistics and gradients; the replicas' means differ a lot."""
    x = noise(6, 3, 2, 4) + 5 * np.arange(6, dtype=np.float32)[:, None, None, None]
    cotangent = noise(6, 3, 2, 4, seed=1)
    variables = norm_variables(4)

    def run(norm, x, cotangent):
        def loss(x, params):
            y, state = norm.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return (y * cotangent).sum(), (y, state)

        grads, aux = jax.grad(loss, (0, 1), has_aux=True)(x, variables["params"])
        return grads, *aux

    whole = jax.jit(partial(run, BatchNorm()))
    (x_grad, grads), y, state = whole(x, cotangent)

    def all_mean(v):
        return jax.lax.pmean(v, "replica")

    synchronized = BatchNorm(all_mean=all_mean, num_replicas=3)
    shared = jax.jit(jax.vmap(partial(run, synchronized), axis_name="replica"))
    (x_grad_r, grads_r), y_r, state_r = shared(
        x.reshape(3, 2, 3, 2, 4), cotangent.reshape(3, 2, 3, 2, 4)
    )
    np.testing.assert_allclose(y_r.reshape(y.shape), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_grad_r.reshape(y.shape), x_grad, rtol=1e-4, atol=1e-5)
    total = jax.tree.map(lambda g: g.sum(0), grads_r)
    assert_trees_close(total, grads, rtol=1e-4, atol=1e-4)
    for replica in range(3):
        one = jax.tree.map(lambda v, i=replica: v[i], state_r)
        assert_trees_close(one, state, rtol=1e-5)


def test_norm_variance_is_accurate_for_a_large_mean():
    x = noise(4, 8, 8, 1, dtype=np.float64) + 3000
    variables = norm_variables(1)
    y, _ = BatchNorm().apply(
        variables, x.astype(np.float32), train=True, mutable=["batch_stats"]
    )
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    expected = (x - x.mean()) / x.std() * scale + bias
    np.testing.assert_allclose(y, expected, atol=2e-3)


def test_norm_statistics_of_bfloat16_equal_those_of_float32():
    x = jnp.asarray(noise(4, 8, 8, 3) + 20, jnp.bfloat16)
    norm = partial(
        BatchNorm().apply, norm_variables(3), train=True, mutable=["batch_stats"]
    )
    y, state = norm(x)
    exact, exact_state = norm(x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8)
    assert_trees_close(state, exact_state, rtol=1e-6)


def test_bn_group_size_reaches_every_norm():
    images = noise(4, 16, 16, 3)
    _, model, variables = twins("resnet10", stem="small")
    _, grouped, _ = twins("resnet10", stem="small", bn_group_size=2)
    run = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    halves = [run(variables, half)[0].logits for half in (images[:2], images[2:])]
    outputs, _ = forward(grouped, variables, images, train=True)
    np.testing.assert_allclose(outputs.logits, np.concatenate(halves), atol=1e-4)


def test_all_mean_reaches_every_norm():
    calls = []

    def all_mean(x):
        calls.append(x.shape[-1])
        return x

    _, model, variables = twins("tiny50", all_mean=all_mean, num_replicas=2)
    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    jax.eval_shape(apply, variables, np.zeros((2, 32, 32, 3), np.float32))
    norms = [p for p in flat(variables["batch_stats"]) if p[-1] == "mean"]
    widths = [len(flat(variables["batch_stats"])[path]) for path in norms]
    assert sorted(calls) == sorted(2 * widths)


def test_init_in_training_mode_needs_no_replicas_and_updates_no_statistics():
    norm = BatchNorm(all_mean=lambda x: jax.lax.pmean(x, "absent"), num_replicas=2)
    variables: Any = norm.init(jax.random.key(0), jnp.ones((2, 4, 4, 3)), train=True)
    assert (variables["batch_stats"]["mean"] == 0).all()


# --- images of different sizes in one batch ---------------------------------------


@pytest.mark.parametrize(
    ("arch", "stem"),
    [
        ("resnet10", "imagenet"),
        ("resnet10", "medium"),
        ("tiny50", "small"),
        pytest.param("resnet18", "imagenet", marks=SLOW),
        pytest.param("resnet18", "small", marks=SLOW),
        pytest.param("resnet50", "imagenet", marks=SLOW),
        pytest.param("resnet50", "small", marks=SLOW),
    ],
)
def test_padding_beyond_the_extent_changes_no_feature(arch, stem):
    _, model, variables = twins(arch, stem=stem)
    sizes = {
        "imagenet": [(75, 64), (97, 33)],
        "medium": [(39, 64), (49, 17)],
        "small": [(23, 40), (33, 17)],
    }[stem]
    high, wide = np.max(sizes, 0) + 3
    batch = np.full((2, high, wide, 3), 7, np.float32)  # 7 would change features
    singles = [noise(1, *size, 3, seed=i) for i, size in enumerate(sizes)]
    for i, (h, w) in enumerate(sizes):
        batch[i, :h, :w] = singles[i][0]

    @jax.jit
    def extract(images, extent_px=None) -> Any:
        return model.apply(variables, images, extent_px=extent_px, method="extract")

    masked = extract(batch, jnp.array(sizes))
    for i, image in enumerate(singles):
        alone = extract(image)[0]
        h, w = model.feature_extent(np.array(sizes[i]))
        assert alone.shape[:2] == (h, w)
        np.testing.assert_allclose(masked[i, :h, :w], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", resnet.STEMS)
def test_feature_extent_equals_the_shape_of_the_feature_map(stem):
    model = resnet.create("resnet10", 2, width=4, stem=stem)
    assert model.stride_px == {"imagenet": 32, "medium": 16, "small": 8}[stem]
    for size in (1, 7, 8, 9, 31, 32, 33, 65, 448):
        x = jax.ShapeDtypeStruct((1, size, size + 1, 3), jnp.float32)
        outputs, _ = jax.eval_shape(
            lambda x: model.init_with_output(jax.random.key(0), x), x
        )
        extent = model.feature_extent(np.array([[size, size + 1]]))
        assert outputs.features.shape == (1, *extent[0], model.feature_channels)


def test_network_without_extent_has_no_mask():
    _, model, variables = twins("resnet10", stem="small")
    images = jnp.zeros((2, 16, 16, 3))

    def extract(images, extent_px=None):
        return model.apply(variables, images, extent_px=extent_px, method="extract")

    assert "iota" not in str(jax.make_jaxpr(extract)(images))
    extent_px = jnp.full((2, 2), 16)
    assert "iota" in str(jax.make_jaxpr(extract)(images, extent_px))


# --- heads and dtypes ---------------------------------------------------------------


def test_classify_accepts_feature_maps():
    _, model, variables = twins("resnet10", stem="small")
    outputs, _ = forward(model, variables, noise(2, 16, 24, 3))
    scores: Any = model.apply(variables, outputs.features, method="classify")
    assert scores.shape == (2, 2, 3, 5)
    np.testing.assert_allclose(scores.mean((1, 2)), outputs.logits, atol=1e-5)


def test_bfloat16_network_has_float32_statistics_scores_and_weights():
    _, model, variables = twins("resnet10", stem="small")
    _, half, _ = twins("resnet10", stem="small", dtype=jnp.bfloat16)
    images = noise(4, 32, 32, 3)
    exact, _ = forward(model, variables, images)
    outputs, _ = forward(half, variables, images)
    error = jnp.abs(outputs.logits - exact.logits).max()
    assert 0 < error < 0.03 * jnp.abs(exact.logits).max()
    for train in (False, True):
        apply = partial(half.apply, train=train, mutable=["batch_stats"])
        outputs, state = jax.eval_shape(apply, variables, images)
        assert outputs.features.dtype == jnp.bfloat16
        assert outputs.pooled.dtype == outputs.logits.dtype == jnp.float32
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet19"}, "resnet19.*resnet18, resnet34, resnet50"),
        ({"stem": "large"}, "large.*imagenet, medium, small"),
        ({"num_classes": 0}, "num_classes.*0"),
        ({"width": -8}, "width.*-8"),
        ({"bn_group_size": -1}, "bn_group_size.*-1"),
        ({"bn_group_size": 2, "all_mean": abs}, "bn_group_size=2.*all_mean.*only one"),
        ({"num_replicas": 4}, "num_replicas=4 needs all_mean"),
        ({"num_replicas": 0, "all_mean": abs}, "num_replicas.*0"),
        ({"dtype": jnp.int32}, "floating point.*int32"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        resnet.create(**{"arch": "resnet18", "num_classes": 5} | options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        resnet.create("resnet18", 5, widht=8)


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "message"),
    [
        ((16, 16, 3), "float32", {}, r"\[b, height, width, 3\].*\(16, 16, 3\)"),
        ((2, 16, 16, 1), "float32", {}, r"\(2, 16, 16, 1\)"),
        ((2, 16, 16, 3), "uint8", {}, "uint8.*normalize"),
        ((3, 16, 16, 3), "float32", {"train": True}, "bn_group_size=2.*batch of 3"),
        (
            (2, 16, 16, 3),
            "float32",
            {"extent_px": np.full((2, 2), 9), "train": True},
            "extent_px.*testing",
        ),
        (
            (2, 16, 16, 3),
            "float32",
            {"extent_px": np.full((3, 2), 9)},
            r"2 images.*\(3, 2\)",
        ),
    ],
)
def test_wrong_inputs_are_errors(shape, dtype, options, message):
    _, model, variables = twins("resnet10", stem="small", bn_group_size=2)
    images = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match=message):
        model.apply(
            variables, images, method="extract", mutable=["batch_stats"], **options
        )


def test_training_on_one_value_per_channel_is_an_error():
    x = np.zeros((1, 1, 1, 4), np.float32)
    with pytest.raises(ValueError, match=r"one value per channel.*larger"):
        BatchNorm().init(jax.random.key(0), x, train=True)


# --- custom gradients ----------------------------------------------------------------


@pytest.mark.parametrize("sides", [(8, 9), (7, 7), (1, 1), (2, 3)])
def test_max_pool_and_its_gradient_equal_torch_for_equal_values(sides):
    x = np.maximum(noise(2, *sides, 3).round(), 0)
    y, pull_back = jax.vjp(max_pooling.max_pool, x)
    cotangent = noise(*y.shape, seed=1)
    torch_x = to_torch(x).requires_grad_()
    torch_y = torch.nn.functional.max_pool2d(torch_x, 3, 2, 1)
    torch_y.backward(to_torch(cotangent))
    assert torch_x.grad is not None
    np.testing.assert_array_equal(y, to_numpy(torch_y))
    (to_x,) = pull_back(cotangent)
    np.testing.assert_allclose(to_x, to_numpy(torch_x.grad), rtol=1e-6, atol=1e-6)


def test_max_pool_keeps_the_dtype():
    x = noise(1, 6, 6, 2).astype(jnp.bfloat16)
    y, pull_back = jax.vjp(max_pooling.max_pool, x)
    assert y.dtype == pull_back(y)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("batch", [1, 6, 7, 16])
def test_gradient_of_product_equals_the_gradient_of_matmul(batch):
    x, kernel = noise(batch, 3, 4, 5), noise(5, 6)
    y, pull_back = jax.vjp(convolutions.product, x, kernel)
    plain, pull_back_plain = jax.vjp(jnp.matmul, x, kernel)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    cotangent = noise(*y.shape, seed=1)
    pairs = zip(pull_back(cotangent), pull_back_plain(cotangent), strict=True)
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
