"""Requirements on every family of backbones."""

import ast
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

import cra_jax
from configs import cub
from cra_jax.backbones import efficientnet, families, hub, resnet, weights
from cra_jax.backbones.efficientnet import Architecture, Stage
from cra_jax.inference import export, run_options
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build, check_config, pretrained
from tests.helpers import patch_backbone, tiny_config

# --- centres of receptive fields ------------------------------------------------------


@pytest.fixture
def shallow(monkeypatch):
    """Adds `shallow`: Lite0's strides and kernels, receptive field 107 px (not 800)."""
    stages = tuple(
        Stage(1, size, stride, expansion=1, features=2)
        for size, stride in [(3, 1), (3, 2), (5, 2), (3, 2), (5, 2)]
    )
    architecture = Architecture(2, stages, 2)
    monkeypatch.setitem(efficientnet.ARCHITECTURES, "shallow", architecture)


def rows_in_receptive_fields(net, size_px):
    """Returns which rows lie in the receptive field of each cell: `[rows, cells]`.

    Row r of image r is 1, all other rows are 0, and no weight is negative: a cell is
    above 0 exactly if the row lies in its receptive field.
    """
    rows = jnp.eye(size_px)[:, :, None, None] * jnp.ones((1, 3))
    shapes = families.variable_shapes(net, size_px)
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
        # Even and odd inputs at each layer of stride 2; with 192 px, all are even.
        ("shallow", (192, 193, 194, 207, 210, 223)),
    ],
    ids=["imagenet", "medium", "small", "same"],
)
def test_feature_place_px_is_the_centre_of_the_receptive_field(net, sizes):
    if isinstance(net, str):
        net = efficientnet.create(net, 1)
    for size_px in sizes:
        seen = rows_in_receptive_fields(net, size_px)
        cells = np.arange(net.feature_extent(size_px))
        assert seen.shape == (size_px, len(cells))
        first = seen.argmax(0)
        last = size_px - 1 - seen[::-1].argmax(0)
        whole = (first > 0) & (last < size_px - 1)  # inside the image
        assert whole.any()
        places = net.feature_place_px(cells, size_px)
        np.testing.assert_array_equal(places[whole], ((first + last) / 2)[whole])
        # At the border, the receptive field is clipped to the image.
        radius = (last - first)[whole].max() / 2
        np.testing.assert_array_equal(first, np.maximum(places - radius, 0))
        np.testing.assert_array_equal(last, np.minimum(places + radius, size_px - 1))


@pytest.mark.parametrize("family", [resnet, efficientnet])
def test_feature_place_px_accepts_arrays(family):
    net = family.create(next(iter(family.ARCHITECTURES)), 1)
    sizes = np.array([[224, 225], [448, 480]])
    places = jnp.asarray(net.feature_place_px(jnp.array([3.0, 0.5]), jnp.array(sizes)))
    assert places.shape == (2, 2)
    for (i, j), place in np.ndenumerate(places):
        assert place == net.feature_place_px((3.0, 0.5)[j], int(sizes[i, j]))
    offsets = [[31, 0], [31, 31]] if family is efficientnet else [[0, 0], [0, 0]]
    np.testing.assert_array_equal(places, np.array([96, 16]) + offsets)


def test_unknown_backbone_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown backbone 'vgg16'.*resnet50"):
        families.create_backbone("vgg16", 5)


# --- a third family: one module and one entry in `FAMILIES` -------------------------

PATCHES: families.Family = patch_backbone  # the type checker checks the protocol
CLASSES = ["auk", "crake", "dotterel"]
NORMALIZATION = {"data.mean": (0.25, 0.5, 0.75), "data.std": (0.5, 0.5, 0.25)}


@pytest.fixture
def third_family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, PATCHES))


def random_variables(net, seed=0) -> Any:
    """Draws variables that differ from initial ones."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype),
        families.variable_shapes(net, 32),
    )


def assert_same(actual, expected):
    """Checks that two trees are bitwise equal."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_only_families_py_imports_the_families():
    """No other file imports the modules in `FAMILIES`."""
    modules = {family.__name__.split(".")[-1] for family in families.FAMILIES}  # pyright: ignore[reportAttributeAccessIssue]
    assert modules == {"resnet", "efficientnet"}
    package, configs = Path(cra_jax.__file__).parent, Path(cub.__file__).parent
    importers = set()
    for path in [*package.rglob("*.py"), *configs.glob("*.py")]:
        imported = {
            alias.name.split(".")[-1]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in [*node.names, ast.alias(getattr(node, "module", None) or "")]
        }
        if imported & modules:
            importers.add(path)
    assert importers == {Path(families.__file__)}


@pytest.mark.usefixtures("third_family")
def test_third_family_is_known_to_configs_weights_and_networks():
    assert families.backbones()[-2:] == ("patches", "patches_deep")
    assert hub.record_of("example/patches") == hub.record_of("/x/patches-1234.pth")
    assert hub.default_for("patches") == "example/patches"
    assert hub.default_for("patches_deep") == ""
    assert pretrained.normalization("example/patches") == tuple(NORMALIZATION.values())
    config = cub.get_config("patches,baseline")
    assert config.model.backbone == "patches"
    assert config.model.pretrained == "example/patches"
    assert (config.data.mean, config.data.std) == tuple(NORMALIZATION.values())
    assert isinstance(build.build_backbone(config, 3), patch_backbone.Patches)
    with pytest.raises(ValueError, match=r"resnet50.*efficientnet_lite0, patches"):
        families.create_backbone("vgg16", 3)


@pytest.mark.usefixtures("third_family")
def test_weights_of_a_third_family_are_saved_and_loaded(tmp_path):
    variables = random_variables(patch_backbone.create("patches", 3, width=6))
    file = tmp_path / "model.safetensors"
    weights.save_torch(file, variables)
    arrays = load_file(file)
    assert arrays["model.cuts.1.weight"].shape == (6, 6, 3, 3)
    assert arrays["model.norms.0.num_batches_tracked"] == 0
    assert all(name.startswith("model.") for name in arrays)
    assert_same(weights.load_torch(file, arch="patches"), variables)
    # The error names the architecture of the file.
    with pytest.raises(
        ValueError, match=r"not fit resnet18 \(it looks like a patches\)"
    ):
        weights.load_torch(file, arch="resnet18")
    with pytest.raises(ValueError, match=r"\(it looks like a patches\)") as error:
        weights.load_torch(file, arch="patches_deep")
    assert "missing: model.cuts.2.weight" in str(error.value)
    weights.save_torch(file, random_variables(resnet.create("resnet10", 3, width=2)))
    with pytest.raises(ValueError, match=r"patches \(it looks like a resnet10\)"):
        weights.load_torch(file, arch="patches")
    with pytest.raises(ValueError, match=r"not the variables of one of .*patches_deep"):
        weights.save_torch(file, {"params": {"fc": variables["params"]["fc"]}})


@pytest.mark.usefixtures("third_family")
def test_runs_of_a_third_family_are_exported_and_used_as_pretrained_weights(
    tmp_path, capsys
):
    about = {"model.backbone": "patches", "model.stem": "imagenet"} | NORMALIZATION
    config = tiny_config.config(tmp_path, **about)
    network = build.build_network(config, len(CLASSES))
    saved, initial = random_variables(network), random_variables(network, seed=1)
    meta = {"class_names": CLASSES, "epoch": 2, "config": config.to_dict()}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(6, saved, meta)
    export.run(run_options.from_config(config), tmp_path)
    capsys.readouterr()
    exported = tmp_path / "export"
    assert json.loads((exported / "config.json").read_text())["width"] == 8
    program = (exported / "model.stablehlo").read_bytes()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    scores = jax.export.deserialize(bytearray(program)).call(images)

    for origin in (tmp_path, exported):
        config.model.pretrained = str(origin)
        check_config.check(config)
        state = initial["params"], initial["batch_stats"]
        options: Any = {"arch": "patches", "class_names": CLASSES}
        preview = pretrained.preview(*state, pretrained=origin, **options)
        params, stats, lines = pretrained.start_from(
            *state, pretrained=origin, **options
        )
        assert preview[: len(lines)] == lines
        assert "patches, width 8, stem imagenet, 3 classes" in lines[1]
        for stream in pretrained.STREAMS:
            assert_same(params[stream], saved["params"]["classification_stream"])
            assert_same(stats[stream], saved["batch_stats"]["classification_stream"])
        assert_same(params["attention_head"], initial["params"]["attention_head"])
    variables = {"params": params[stream], "batch_stats": stats[stream]}
    normalized = (images / 255 - config.data.mean) / np.array(config.data.std)
    plain: Any = build.build_backbone(config, 3).apply(variables, jnp.array(normalized))
    np.testing.assert_allclose(scores, plain.logits, rtol=1e-5)
    assert len(flatten_dict(saved["params"])) == 2 * 8 + 2
