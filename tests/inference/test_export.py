"""An export has only the plain network and runs without this package."""

import errno
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from benchmarks import free_at_test_time
from configs import cub
from cra_jax.backbones import efficientnet, resnet, weights
from cra_jax.inference import export, predict, run_options
from cra_jax.inference.restore import restore
from cra_jax.input import batches, normalize
from cra_jax.input.decoding import read
from cra_jax.runtime import files
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build
from tests.helpers import photographs, tiny_config, tiny_run
from tests.helpers.torch_or_skip import safetensors_torch, torch
from tests.oracles.torch_resnet import TorchResNet, randomize, to_linen

CLASSES = ["auk", "boobook", "crake", "dotterel"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# A server has jax, but not this package; the program blocks its import.
SERVER = """
import sys
sys.modules.update(dict.fromkeys(["cra_jax", "flax", "configs"]))
from pathlib import Path
import jax, jax.export, numpy as np
images, scores, *files = map(Path, sys.argv[1:])
images, found = np.load(images), {}
for i, file in enumerate(files):
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    found[f"one {i}"] = program.call(images[:1])
    found[f"all {i}"] = program.call(images)
np.savez(scores, **found)
"""


def random_like(model, *shape) -> Any:
    """Draws variables that differ from initial ones, without compiling."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes: Any = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            drawn = rng.normal(size=leaf.shape, scale=fan_in**-0.5)
        else:
            drawn = rng.uniform(0.5, 1.5, leaf.shape)
        return drawn.astype(leaf.dtype)

    return jax.tree.map_with_path(draw, dict(shapes))


def random_images(count, side):
    shape = (count, side, side, 3)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def serve(files, images, folder):
    """Returns the scores of programs in a process without this package."""
    np.save(folder / "images.npy", images)
    paths = [folder / "images.npy", folder / "scores.npz", *files]
    done = subprocess.run(
        [sys.executable, "-c", SERVER, *map(str, paths)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "scores.npz")


def backbone_scores(model, variables, images):
    normalized = normalize.normalize(jnp.asarray(images), mean=MEAN, std=STD)
    return jax.jit(model.apply)(variables, normalized).logits


@pytest.mark.usefixtures("tiny_lite0")
def test_exported_program_runs_without_this_package(tmp_path):
    images = random_images(5, 33)
    models = [
        resnet.create("resnet10", 4, width=8, stem="imagenet"),
        resnet.create("resnet10", 4, width=8, stem="medium"),
        efficientnet.create("tiny_lite0", 4),
    ]
    files, expected = [], []
    for i, model in enumerate(models):
        variables = random_like(model, 1, 33, 33, 3)
        program = export.serialize(model, variables, crop_px=33, mean=MEAN, std=STD)
        files.append(tmp_path / f"{i}.stablehlo")
        files[-1].write_bytes(program)
        expected.append(backbone_scores(model, variables, images))
    found = serve(files, images, tmp_path)
    for i, scores in enumerate(expected):
        assert np.ptp(scores) > 0.1  # the images have different scores
        assert found[f"all {i}"].shape == (5, 4)
        limit = 1e-5 * max(1, np.abs(scores).max())
        np.testing.assert_allclose(found[f"all {i}"], scores, rtol=0, atol=limit)
        np.testing.assert_allclose(found[f"one {i}"], scores[:1], rtol=0, atol=limit)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50", "efficientnet_lite0"])
def test_exported_program_of_a_full_network_gives_the_same_scores(arch):
    family = efficientnet if arch in efficientnet.ARCHITECTURES else resnet
    model = family.create(arch, 200)
    variables = random_like(model, 1, 65, 65, 3)
    images = random_images(5, 65)
    data = export.serialize(model, variables, crop_px=65, mean=MEAN, std=STD)
    program = jax.export.deserialize(bytearray(data))
    expected = backbone_scores(model, variables, images)
    limit = 1e-5 * max(1, np.abs(expected).max())
    for count in (1, 5):
        found = program.call(images[:count])
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=limit)


# --- the export of a run -----------------------------------------------------------


def save_run(kind, folder):
    """Saves a run of this model.kind; returns its config and all its variables."""
    config = tiny_config.config(folder, **{"model.kind": kind})
    network = build.build_network(config, len(CLASSES))
    variables = random_like(network, 2, 32, 32, 3)
    meta = {"class_names": CLASSES, "epoch": 2, "config": config.to_dict()}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(6, variables, meta)
    return config, variables


@pytest.fixture
def exported(tmp_path, capsys):
    """Exports a CRA-CNN; returns its config, all its variables and the directory."""
    config, variables = save_run("cra", tmp_path)
    export.run(run_options.from_config(config), tmp_path)
    assert "model.safetensors, model.stablehlo" in capsys.readouterr().out
    return config, variables, tmp_path / "export"


def test_export_has_only_the_classification_stream(exported):
    _, variables, folder = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "model.stablehlo", "config.json"}
    loaded = weights.load_torch(folder / "model.safetensors", arch="resnet10")
    flat: Any = flatten_dict(variables)
    expected: Any = flatten_dict(loaded)
    for (collection, *path), array in expected.items():
        value = flat[(collection, "classification_stream", *path)]
        np.testing.assert_array_equal(array, value)

    def contents(array):
        """Returns the bytes of an array in the orders of linen and torch."""
        in_torch_order = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        return {array.tobytes(), np.ascontiguousarray(in_torch_order).tobytes()}

    arrays = load_file(folder / "model.safetensors").values()
    stored = {array.tobytes() for array in arrays}
    program = (folder / "model.stablehlo").read_bytes()
    seen: dict[str, int] = {}
    for (_, module, *_), array in flat.items():
        in_weights = bool(contents(array) & stored)
        in_program = any(data in program for data in contents(array))
        count = in_weights + in_program
        seen[module] = seen.get(module, 0) + count
    found = sum(key[1] == "classification_stream" for key in flat)
    assert seen.pop("classification_stream") == 2 * found
    assert seen == {"regularization_stream": 0, "attention_head": 0}


def test_export_describes_its_program_and_the_program_gives_the_same_scores(exported):
    config, _, folder = exported
    about = json.loads((folder / "config.json").read_text())
    assert about["class_names"] == CLASSES
    assert about["checkpoint_step"] == 6
    program = jax.export.deserialize(
        bytearray((folder / "model.stablehlo").read_bytes())
    )
    assert about["stablehlo"]["platforms"] == list(program.platforms)
    assert about["stablehlo"]["input"].startswith("uint8 [batch, 32, 32, 3]")
    assert about["stablehlo"]["output"].startswith("float32 [batch, 4]")
    assert [str(x) for x in program.in_avals] == ["uint8[batch,32,32,3]"]
    assert [str(x) for x in program.out_avals] == ["float32[batch,4]"]
    restored = restore(run_options.from_config(config), folder.parent)
    images = random_images(3, 32)
    np.testing.assert_allclose(
        program.call(images),
        backbone_scores(restored.backbone, restored.variables, images),
        atol=1e-5,
    )


def test_export_gives_the_scores_of_an_independent_network_on_photographs(
    shared_data, tmp_path
):
    """Decoding, resizing, weights and network are all independent of the package."""
    net = randomize(TorchResNet("resnet18", photographs.SPECIES), seed=0).eval()
    variables = to_linen(net.state_dict().items())
    config = cub.get_config("resnet18")
    config.data.short_side_px, config.data.crop_px = 160, 128
    about = photographs.export_run(config, variables, tmp_path)
    paths = photographs.paths(shared_data, 6)
    crops = np.stack([photographs.crop(path, about) for path in paths])

    state = safetensors_torch.load_file(tmp_path / "export" / "model.safetensors")
    net = TorchResNet("resnet18", photographs.SPECIES).eval()
    net.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected = net(torch.from_numpy(photographs.normalize(crops, about))).numpy()
    assert np.ptp(expected, 0).min() > 1e-2  # the images have different scores

    decoded = [read(path, short_side_px=160) for path in paths]
    labels = np.zeros(6, np.int32)
    (batch,) = batches.center_batches(decoded, labels, batch_size=6, crop_px=128)
    np.testing.assert_array_equal(batch["image"], crops)
    restored = restore(run_options.from_config(config), tmp_path)
    scores_of_run = backbone_scores(
        restored.backbone, restored.variables, batch["image"]
    )
    program = (tmp_path / "export" / "model.stablehlo").read_bytes()
    scores_of_program = jax.export.deserialize(bytearray(program)).call(crops)
    for scores in (scores_of_run, scores_of_program):
        difference = np.abs(np.asarray(scores) - expected).max()
        print(f"scores differ by {difference:.1e} of {np.abs(expected).max():.1f}")
        assert difference < 1e-4 * max(1, np.abs(expected).max())


def test_cra_cnn_has_the_parameters_and_flops_of_the_baseline(tmp_path):
    config = tiny_config.config(tmp_path)
    rows = free_at_test_time.measure_costs(config, tmp_path, num_classes=4)
    baseline, *others = rows.values()
    backbone = run_options.from_config(config).create_backbone(4)
    params = random_like(backbone, 1, 32, 32, 3)["params"]
    assert baseline.parameters == free_at_test_time.count(params)
    assert baseline.flops > 1e5
    assert [name.split(",")[0] for name in rows] == ["baseline", "cra", "cra"]
    for row in others:
        assert (row.parameters, row.flops) == (baseline.parameters, baseline.flops)
    times = free_at_test_time.latencies_ms(rows, repeats=2)
    assert all(len(t) == 2 and min(t) > 0 for t in times.values())


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_failed_export_keeps_the_earlier_one(tmp_path, monkeypatch):
    """The files of two checkpoints are never mixed without an error."""
    options = run_options.from_config(tiny_run.save(tmp_path))
    export.run(options.at_checkpoint("6"), tmp_path)
    (tmp_path / "export" / "notes.txt").write_text("of the user")
    before = _contents(tmp_path / "export")
    (tmp_path / ".export.new").mkdir()  # of an export that was killed

    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256", fail)
        with pytest.raises(ValueError, match=r"cannot write .*free some space"):
            export.run(options, tmp_path)
    assert _contents(tmp_path / "export") == before

    # Killed between two renames, on a file system that cannot exchange directories.
    replace = os.replace

    def stop(source, target):
        if str(target).endswith("export/model.stablehlo"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange", lambda one, other: False)
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            export.run(options, tmp_path)
    with pytest.raises(ValueError, match=r"not the file that config\.json .*describes"):
        predict.load(tmp_path / "export")
    export.run(options, tmp_path)
    assert "checkpoint 7" in predict.load(tmp_path / "export").network.about
    assert _contents(tmp_path / "export").keys() == before.keys()
    assert not (tmp_path / ".export.new").exists()


def test_export_replaces_all_files_at_once(tmp_path, monkeypatch):
    """Between two system calls of an export, its directory has one checkpoint."""
    options, exchange = run_options.from_config(tiny_run.save(tmp_path)), files.exchange
    export.run(options.at_checkpoint("6"), tmp_path)
    before = _contents(tmp_path / "export")
    (tmp_path / ".export.new").mkdir()
    (tmp_path / ".export.new" / "notes.txt").write_text("of the user")

    def compare_and_exchange(one, other):
        assert _contents(other) == before | {"notes.txt": b"of the user"}
        exchanged = exchange(one, other)
        assert exchanged
        assert {**before, **_contents(other)} != before
        assert _contents(other).keys() == before.keys()
        return exchanged

    monkeypatch.setattr(files, "exchange", compare_and_exchange)
    export.run(options, tmp_path)
    assert _contents(tmp_path / "export").keys() == {*before, "notes.txt"}


def test_export_follows_no_link(tmp_path):
    options = run_options.from_config(tiny_run.save(tmp_path / "run"))
    (tmp_path / "precious").mkdir()
    (tmp_path / "run" / "export").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="export is a link: remove it"):
        export.run(options, tmp_path / "run")
    assert _contents(tmp_path / "precious") == {}
