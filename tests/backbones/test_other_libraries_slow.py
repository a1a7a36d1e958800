"""Exchange of weights with torchvision, timm and transformers.

Slow: `make test-slow` runs these tests if the libraries are installed; `INSTALL` is the
command (torchvision in the version that belongs to the installed torch).
"""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import cub
from cra_jax.backbones import resnet, weights
from cra_jax.inference import run_options
from cra_jax.inference.restore import restore
from cra_jax.input import batches, decoding, normalize
from tests.helpers import photographs
from tests.helpers.torch_or_skip import safetensors_torch, torch
from tests.oracles.torch_resnet import TorchResNet, randomize, to_linen

pytestmark = pytest.mark.slow

INSTALL = "pip install --no-deps torchvision timm transformers regex tokenizers"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "prediction.md"
LIBRARIES = ("torchvision", "timm", "transformers")
PAIRS = [
    *[(library, arch) for library in LIBRARIES for arch in ("resnet18", "resnet50")],
    ("torchvision", "resnet34"),
    ("timm", "resnet101"),
]


def import_library(library):
    """Imports the library; skips the test if it is not installed."""
    for name in dict.fromkeys(["torchvision", library]):  # timm needs torchvision
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            pytest.skip(f"SKIPPED, NOT PASSED: {name} is not installed: {INSTALL}")
        if name == "torchvision":
            _load_operators(Path(spec.origin).with_name("_C.so"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(library)


def _load_operators(extension: Path) -> None:
    """Loads torchvision's operators, or declares those that its import needs.

    An extension for CUDA does not load into a torch for CPUs. Classification needs no
    operator, but the import needs the signatures of two detection operators.
    """
    try:
        torch.ops.load_library(extension)
    except OSError:
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", signature)


def create_network(library, arch, num_classes):
    """Creates the library's network with random weights and statistics."""
    module: Any = import_library(library)
    if library == "torchvision":
        net = module.models.get_model(arch, weights=None, num_classes=num_classes)
    elif library == "timm":
        net = module.create_model(arch, pretrained=False, num_classes=num_classes)
    else:
        blocks, bottleneck = resnet.ARCHITECTURES[arch]
        config = module.ResNetConfig(
            depths=list(blocks),
            hidden_sizes=[n * (4 if bottleneck else 1) for n in (64, 128, 256, 512)],
            layer_type="bottleneck" if bottleneck else "basic",
            num_labels=num_classes,
        )
        net = module.ResNetForImageClassification(config)
    return randomize(net, seed=0).eval()


def scores_of(net, images) -> np.ndarray:
    """Returns the scores of a network in torch for images `[b, 3, h, w]`."""
    with torch.no_grad():
        found = net(torch.from_numpy(images))
    return getattr(found, "logits", found).numpy()


def assert_close(actual, expected, name):
    difference = np.abs(np.asarray(actual) - expected).max()
    print(f"{name}: scores of {np.abs(expected).max():.1f} differ by {difference:.1e}")
    assert np.ptp(expected, 0).min() > 1e-2  # the images have different scores
    assert difference < 1e-4 * max(1, np.abs(expected).max())


@pytest.fixture(scope="module")
def crops(shared_data):
    """Returns photographs, uint8 `[4, 224, 224, 3]`."""
    paths = photographs.paths(shared_data, 4)
    decoded = [decoding.read(path, short_side_px=256) for path in paths]
    labels = np.zeros(len(paths), np.int32)
    (batch,) = batches.center_batches(decoded, labels, batch_size=4, crop_px=224)
    return batch["image"]


NORMALIZATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(("library", "arch"), PAIRS)
def test_weights_saved_by_a_library_give_the_same_scores(
    library, arch, crops, tmp_path
):
    net = create_network(library, arch, 7)
    path = tmp_path / "model.safetensors"
    if library == "transformers":
        net.save_pretrained(tmp_path)
    else:
        path = path.with_suffix(".pth")
        torch.save(net.state_dict(), path)
    variables = weights.load_torch(path, arch=arch, num_classes=7)
    flat: Any = flatten_dict(variables)
    arrays = [
        tensor.numpy()
        for name, tensor in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    ]
    assert len(flat) == len(arrays)
    if library != "transformers":  # `to_linen` does not know its names
        expected: Any = flatten_dict(to_linen(net.state_dict().items()))
        assert flat.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(flat[key], array, err_msg=str(key))
    outputs: Any = jax.jit(resnet.create(arch, 7).apply)(
        variables, normalize.normalize(jax.numpy.asarray(crops), **NORMALIZATION)
    )
    expected = scores_of(net, photographs.normalize(crops, NORMALIZATION))
    assert_close(outputs.logits, expected, f"{library}, {arch}")


def snippet(library):
    """Returns the documented code that loads an export with this library."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (block,) = [b for b in blocks if re.search(rf"^import .*\b{library}\b", b, re.M)]
    assert "strict=True" in block
    return block


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_an_export_is_loaded_as_documented_and_scores_alike(
    library, arch, shared_data, tmp_path, monkeypatch
):
    import_library(library)
    state = randomize(TorchResNet(arch, photographs.SPECIES), seed=0).state_dict()
    config = cub.get_config(arch)  # at the size of the paper
    workdir = tmp_path / "runs" / "cub"
    about = photographs.export_run(config, to_linen(state.items()), workdir)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet(library), names)
    net = names["model"]
    assert type(net).__module__.startswith(library)
    assert not net.training

    paths = photographs.paths(shared_data, 4)
    crops = np.stack([photographs.crop(path, about) for path in paths])
    expected = scores_of(net, photographs.normalize(crops, about))
    restored = restore(run_options.from_config(config), workdir)
    data = config.data
    images = normalize.normalize(jax.numpy.asarray(crops), mean=data.mean, std=data.std)
    outputs: Any = jax.jit(restored.backbone.apply)(restored.variables, images)
    assert_close(outputs.logits, expected, f"exported {arch} in {library}")


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_weights_of_transformers_give_the_same_scores_in_torchvisions_layout(
    arch, tmp_path
):
    """All values differ, so that an array in the wrong place changes the scores."""
    net = create_network("transformers", arch, 7)
    net.save_pretrained(tmp_path)
    loaded: Any = flatten_dict(
        weights.load_torch(tmp_path / "model.safetensors", arch=arch)
    )
    weights.save_torch(
        tmp_path / "exported.safetensors",
        weights.load_torch(tmp_path / "model.safetensors", arch=arch),
    )
    copy = TorchResNet(arch, 7)
    copy.load_state_dict(safetensors_torch.load_file(tmp_path / "exported.safetensors"))
    assert len(loaded) == len(flatten_dict(to_linen(copy.state_dict().items())))
    images = np.random.default_rng(0).normal(size=(3, 3, 65, 96)).astype(np.float32)
    np.testing.assert_allclose(
        scores_of(copy.eval(), images), scores_of(net, images), rtol=1e-5, atol=1e-5
    )
