import argparse
import json
import os
import pickle
import re
import struct
import sys
import time
import tracemalloc
import types
import zipfile
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.torch import save_file

from configs.quickstart import get_config
from cra_jax.backbones import families, hub, resnet, torch_files, weights
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import check_config, pretrained
from tests.helpers.torch_or_skip import safetensors_torch, torch
from tests.helpers.torch_parity import flat
from tests.oracles.torch_resnet import TorchResNet, randomize, to_linen

FORMATS = ("zip.pth", "legacy.pth", "safetensors")


def network(arch="resnet10", classes=5, width=4, stem="imagenet", seed=0):
    return randomize(TorchResNet(arch, classes, width, stem), seed).eval()


def save(state: Any, folder, file_format):
    """Saves a state_dict as users of torch do; returns the path."""
    path = folder / f"weights.{file_format}"
    if file_format == "safetensors":
        safetensors_torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=file_format == "zip.pth")
    return path


def assert_same(actual, expected):
    """Checks that two trees are bitwise equal."""
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert actual[path].dtype == np.float32, path
        np.testing.assert_array_equal(actual[path], value, err_msg="/".join(path))


def transformers_name(name):
    """Returns the name in transformers' ResNetForImageClassification."""
    parts = name.split(".")
    layers = {"bn": "normalization", "co": "convolution"}
    if parts[0] == "fc":
        return f"classifier.1.{parts[1]}"
    if parts[0] in ("conv1", "bn1"):
        return f"resnet.embedder.embedder.{layers[parts[0][:2]]}.{parts[1]}"
    block = f"resnet.encoder.stages.{int(parts[0][5:]) - 1}.layers.{parts[1]}"
    if parts[2] == "downsample":
        layer = ("convolution", "normalization")[int(parts[3])]
        return f"{block}.shortcut.{layer}.{parts[4]}"
    return f"{block}.layer.{int(parts[2][-1]) - 1}.{layers[parts[2][:2]]}.{parts[3]}"


# --- load and save ------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("file_format", FORMATS)
def test_loaded_weights_equal_the_saved_state(arch, file_format, tmp_path):
    model = network(arch)
    path = save(model.state_dict(), tmp_path, file_format)
    for classes in (None, 5):
        loaded = weights.load_torch(path, arch=arch, num_classes=classes)
        assert_same(loaded, to_linen(model.state_dict().items()))


@pytest.mark.parametrize(
    ("arch", "stem"),
    [("resnet18", "imagenet"), ("resnet50", "imagenet"), ("resnet10", "medium")],
)
def test_loaded_and_exported_weights_give_the_same_scores(arch, stem, tmp_path):
    torch_model = network(arch, stem=stem)
    path = save(torch_model.state_dict(), tmp_path, "zip.pth")
    variables = weights.load_torch(path, arch=arch)
    linen_model = resnet.create(arch, 5, width=4, stem=stem)
    images = np.random.default_rng(0).normal(size=(2, 64, 75, 3)).astype(np.float32)
    nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        expected = torch_model(nchw).numpy()
    outputs: Any = jax.jit(linen_model.apply)(variables, images)
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(outputs.logits, expected, rtol=0, atol=1e-4 * scale)

    exported = tmp_path / "new folder" / "model.safetensors"
    weights.save_torch(exported, jax.tree.map(jnp.asarray, variables))
    state = safetensors_torch.load_file(exported)
    for name, tensor in torch_model.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(state[name], tensor), name
    copy = network(arch, stem=stem, seed=1)
    copy.load_state_dict(state, strict=True)
    with torch.no_grad():
        np.testing.assert_array_equal(copy(nchw).numpy(), expected)
    assert [p.name for p in exported.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize("prefix", ["resnet.", ""])
def test_weights_with_names_of_transformers_are_loaded(prefix, width, tmp_path):
    model = network("resnet50" if width == 4 else "resnet10", width=width)
    state = {transformers_name(k): v for k, v in model.state_dict().items()}
    assert "resnet.encoder.stages.0.layers.0.shortcut.convolution.weight" in state or (
        width == 64
    )
    state = {re.sub(r"^resnet\.", prefix, k): v for k, v in state.items()}
    path = save(state, tmp_path, "safetensors")
    arch = "resnet50" if width == 4 else "resnet10"
    assert_same(
        weights.load_torch(path, arch=arch), to_linen(model.state_dict().items())
    )


def test_weights_without_counters_are_loaded(tmp_path):
    model = network()
    state = {k: v for k, v in model.state_dict().items() if "tracked" not in k}
    loaded = weights.load_torch(save(state, tmp_path, "legacy.pth"), arch="resnet10")
    assert_same(loaded, to_linen(model.state_dict().items()))


# --- wrong weights: one error lists all problems ------------------------------------


def changed(state, **changes):
    """Returns a copy with arrays replaced or, for None, removed."""
    state = dict(state)
    for name, value in changes.items():
        state.pop(name)
        if value is not None:
            state[name] = value
    return state


BN = "layer2.0.bn1.weight"
CONV = "layer1.0.conv1.weight"
DAMAGE = {
    "missing": (lambda s: changed(s, **{BN: None}), [f"1 missing: {BN}"]),
    "extra": (lambda s: s | {"fc2.bias": s[BN].clone()}, ["1 unknown: fc2.bias"]),
    "stray counter": (
        lambda s: s | {"bn9.num_batches_tracked": torch.tensor(0)},
        ["1 unknown: bn9.num_batches_tracked"],
    ),
    "shape": (
        lambda s: changed(s, **{CONV: s[CONV][:, :3].clone()}),
        [f"1 of another shape: {CONV} (4, 3, 3, 3), not (4, 4, 3, 3)"],
    ),
    "rank": (
        lambda s: changed(s, **{CONV: s[CONV].flatten()}),
        [f"1 of another shape: {CONV} (144,), not (4, 4, 3, 3)"],
    ),
    "NaN": (
        lambda s: changed(s, **{BN: s[BN] * float("nan")}),
        [f"1 not finite: {BN}"],
    ),
    "infinity": (
        lambda s: changed(s, **{"bn1.running_var": s["bn1.running_var"] / 0}),
        ["1 not finite: bn1.running_var"],
    ),
    "integers": (
        lambda s: changed(s, **{BN: s[BN].long()}),
        [f"1 not float32: {BN} int64"],
    ),
    "float64 too large": (
        lambda s: changed(s, **{BN: s[BN].double() + 1e300}),
        [f"1 not finite: {BN}"],
    ),
    "everything": (
        lambda s: (
            changed(
                s, **{BN: None, CONV: s[CONV][:2].clone(), "fc.bias": s["fc.bias"] / 0}
            )
            | {"x": s[BN].clone()}
        ),
        ["1 missing", "1 unknown: x", "1 of another shape", "1 not finite: fc.bias"],
    ),
}


@pytest.mark.parametrize("file_format", ["safetensors", "zip.pth"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_arrays_are_errors_that_name_them(damage, file_format, tmp_path):
    change, messages = DAMAGE[damage]
    path = save(change(dict(network().state_dict())), tmp_path, file_format)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        weights.load_torch(path, arch="resnet10")
    for message in messages:
        assert message in str(error.value)


ORIGINS = {
    **{
        prefix: (
            lambda s, p=prefix: {p + k: v for k, v in s.items()},
            f"the prefix {prefix} was removed",
        )
        for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model.backbone.")
    },
    "detector": (
        lambda s: (
            {"backbone." + k: v for k, v in s.items()} | {"neck.w": s[BN].clone()}
        ),
        "1 left in the file: neck.w",
    ),
    "dropout before the classifier": (
        lambda s: {k.replace("fc.", "fc.1."): v for k, v in s.items()},
        "",
    ),
    "float16": (
        lambda s: changed(s, **{BN: s[BN].half()}),
        "stored as float16 with fewer digits, converted to float32",
    ),
    "bfloat16": (
        lambda s: {k: v.bfloat16() if v.ndim else v for k, v in s.items()},
        "stored as bfloat16 with fewer digits, converted to float32",
    ),
    "float64": (
        lambda s: {k: v.double() if v.ndim else v for k, v in s.items()},
        "stored as float64, converted to float32",
    ),
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_weights_of_other_origins_are_loaded(origin, file_format, tmp_path, capsys):
    change, note = ORIGINS[origin]
    state = dict(network().state_dict())
    path = save(change(state), tmp_path, file_format)
    found = weights.load_torch(path, arch="resnet10")
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(origin)
    if half:
        wanted = {k: v.to(half).float() if v.ndim else v for k, v in state.items()}
        state = wanted if origin == "bfloat16" else state | {BN: wanted[BN]}
    assert_same(found, to_linen(state.items()))
    errors = capsys.readouterr().err
    assert note in errors
    assert bool(note) == bool(errors)
    params, stats = training_state()
    *_, lines = pretrained.start_from(params, stats, pretrained=path, arch="resnet10")
    assert note in "\n".join(lines)


def test_several_networks_in_a_file_are_an_error(tmp_path):
    state = network().state_dict()
    twice = {f"module.{s}.{k}": v.clone() for s in ("q", "k") for k, v in state.items()}
    path = save(twice, tmp_path, "safetensors")
    with pytest.raises(
        ValueError, match=r"networks, below module\.k\., module\.q\.; s"
    ):
        weights.load_torch(path, arch="resnet10")


CHECKPOINTS = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": OPTIMIZER},
    "model": lambda s: {"model": s, "args": argparse.Namespace(lr=np.float64(0.1))},
    "ema": lambda s: {"state_dict": s, "state_dict_ema": {**s, BN: s[BN] + 1}},
    "own name": lambda s: {"my_network": s, "best": 0.5},
    "flat": lambda s: {**s, "epoch": 3},
}
OPTIMIZER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}},
    "param_groups": [{"lr": 0.1, "params": [0]}],
}


@pytest.mark.parametrize("file_format", ["zip.pth", "legacy.pth"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_weights_in_a_checkpoint_are_loaded(kind, file_format, tmp_path, capsys):
    state = network().state_dict()
    path = save(CHECKPOINTS[kind](state), tmp_path, file_format)
    found = weights.load_torch(path, arch="resnet10")
    assert_same(found, to_linen(state.items()))
    assert "left in the file: '" in capsys.readouterr().err


def test_sharded_weights_are_loaded_by_index_and_directory(tmp_path, capsys):
    state = dict(network().state_dict())
    names = sorted(state)
    shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in shards.items():
        save_file({k: state[k].contiguous() for k in part}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    places = {k: file for file, part in shards.items() for k in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (index, tmp_path):
        found = weights.load_torch(path, arch="resnet10")
        assert_same(found, to_linen(state.items()))
        *_, lines = pretrained.start_from(
            *training_state(), pretrained=path, arch="resnet10"
        )
        assert "60 arrays start" in lines[2]
    for change, message in (
        ({"weight_map": {**places, "x": "../x.safetensors"}}, "outside its directory"),
        ({"weight_map": {**places, "x": next(iter(shards))}}, "1 arrays, such as x"),
        ([], "not an index of weights"),
    ):
        index.write_text(json.dumps(change))
        with pytest.raises(ValueError, match=message):
            weights.load_torch(index, arch="resnet10")
    with pytest.raises(ValueError, match=r"shard 2 of 2: give the index"):
        weights.load_torch(tmp_path / list(shards)[1], arch="resnet10")


def test_weights_of_another_architecture_are_an_error_that_names_it(tmp_path):
    path = save(network("resnet18").state_dict(), tmp_path, "safetensors")
    with pytest.raises(ValueError, match=r"does not fit resnet50.*like a resnet18.*"):
        weights.load_torch(path, arch="resnet50")
    with pytest.raises(ValueError, match=r"resnet19.*choose from"):
        weights.load_torch(path, arch="resnet19")


def test_weights_of_another_number_of_classes_are_an_error(tmp_path):
    path = save(network(classes=1000).state_dict(), tmp_path, "safetensors")
    with pytest.raises(ValueError, match=r"1000 classes, not 200.*num_classes=1000"):
        weights.load_torch(path, arch="resnet10", num_classes=200)


def test_two_names_for_one_array_are_an_error(tmp_path):
    state = dict(network().state_dict())
    state["classifier.1.bias"] = state["fc.bias"].clone()
    with pytest.raises(ValueError, match=r"stand for fc\.bias: class.* and fc\.bias"):
        weights.load_torch(save(state, tmp_path, "safetensors"), arch="resnet10")


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0, 1e-4, 0.02, 0.3, 0.9, 0.999, -1])
def test_truncated_weights_file_is_an_error(file_format, share, tmp_path):
    path = save(network().state_dict(), tmp_path, file_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: -1 if share < 0 else int(share * len(whole))])
    with pytest.raises(ValueError, match="damaged, incomplete") as error:
        weights.load_torch(path, arch="resnet10")
    assert str(path) in str(error.value)


def test_flipped_bit_in_a_zip_file_is_an_error(tmp_path):
    path = save(network().state_dict(), tmp_path, "zip.pth")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Bad CRC"):
        weights.load_torch(path, arch="resnet10")


def test_flipped_bit_in_a_header_is_an_error_or_changes_nothing(tmp_path):
    """`.safetensors` has no checksum; still, no array may get a wrong name silently."""
    model = network(width=2)
    path = save(model.state_dict(), tmp_path, "safetensors")
    expected = to_linen(model.state_dict().items())
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    errors = []
    for position in range(0, header, header // 20):
        content = bytearray(whole)
        content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            loaded = weights.load_torch(path, arch="resnet10")
        except ValueError as error:
            errors.append(str(path) in str(error))
        else:
            assert_same(loaded, expected)
    assert all(errors)
    assert len(errors) > 15


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Not Found", "DOCTYPE"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (pickle.dumps([1, 2], protocol=2), "none of torch's"),
        (pickle.dumps({"a": 1}, protocol=5), "not a .safetensors or .pth"),
    ],
)
def test_files_of_other_formats_are_errors(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        weights.load_torch(path, arch="resnet10")


def test_missing_file_and_other_zip_file_are_errors(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match=r"there is no weights file .*weights\.pth"):
        weights.load_torch(path, arch="resnet10")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"without torch's data\.pkl"):
        weights.load_torch(path, arch="resnet10")


# --- no code in a file is executed --------------------------------------------------


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("file_format", ["zip.pth", "legacy.pth"])
def test_malicious_pickle_is_an_error_and_not_executed(file_format, tmp_path):
    trace = tmp_path / "trace"
    malicious = Malicious(f"touch {trace}")
    pickle.loads(pickle.dumps(malicious))
    assert trace.exists()  # pickle itself does execute it
    trace.unlink()
    path = save(
        {**network().state_dict(), "malicious": malicious}, tmp_path, file_format
    )
    with pytest.raises(ValueError, match=rf"asks to run {os.name}\.system.*nothing"):
        weights.load_torch(path, arch="resnet10")
    assert not trace.exists()
    # The same holds for the first pickle of a legacy file.
    path.write_bytes(pickle.dumps(malicious, protocol=2))
    with pytest.raises(ValueError, match=r"asks to run \w+\.system"):
        weights.load_torch(path, arch="resnet10")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch._utils.x"])
def test_unknown_name_in_a_pickle_is_an_error(name, tmp_path):
    module, _, function = name.rpartition(".")
    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x80\x02c" + f"{module}\n{function}\n".encode() + b".")
    with pytest.raises(ValueError, match=re.escape(f"asks to run {name}")):
        torch_files.read(path)


def test_saved_model_or_checkpoint_is_an_error_that_names_state_dict(tmp_path):
    path = save(network(), tmp_path, "zip.pth")
    with pytest.raises(ValueError, match=r"TorchResNet.*model\.state_dict\(\)"):
        torch_files.read(path)
    state = network().state_dict()
    for saved, message in (
        ({"epoch": 3}, r"holds 'epoch'\); save what model\.state_dict\(\)"),
        ([state], r"it holds list\)"),
        (
            {"student": state, "teacher": state},
            "several dicts of arrays .'student', 't",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            torch_files.read(save(saved, tmp_path, "zip.pth"))


# --- time and memory are a small multiple of the size of the file -------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


NESTED = b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # x -> (x, x)
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"J\0\0\4\0tQ"
TENSOR += b"K\0J\0\0\4\0\x85K\x01\x85\x89}tR"
MANY = b"(" + b"K\x01" * 20_000  # a mark and numbers
HOSTILE_PICKLES = {
    "nested key": b"}" + NESTED + b"K\1s.",
    "nested keys": b"}(" + NESTED + b"K\1u.",
    "nested key of an OrderedDict": b"ccollections\nOrderedDict\n](" + NESTED
    + b"K\1\x86e\x85R.",
    "nested reference": b"(" + NESTED + b"K\1K\1K\1K\1tQ.",
    "nested key of a storage": STORAGE.replace(text("0"), NESTED) + b"K\1tQ.",
    "nested value": b"}" + text("a") + NESTED + b"s.",
    "nested root": NESTED + b".",
    "nested shape": b"}" + text("a")
    + TENSOR.replace(b"\x85K\x01\x85", b"\x85" + NESTED) + b"s.",
    "nested in a set": b"\x8f(" + NESTED + b"\x90.",
    "long bytes": b"\x96" + b"\xff" * 7 + b"\0.",
    "many arguments": b"ctorch\nSize\nq\1" + MANY + b"tq\0"
    + b"h\1h\0R" * 20_000 + b".",
    "many pairs": b"ccollections\nOrderedDict\nq\1](" + b"K\1K\1\x86" * 20_000
    + b"e\x85q\0" + b"h\1h\0R" * 20_000 + b".",
    "many attributes": b"}(" + b"K\1K\1" * 20_000 + b"uq\0}" + b"h\0b" * 100_000 + b".",
    "long reference": MANY + b"tq\0" + b"h\0Q" * 20_000 + b".",
    "many dicts": b"}q\0(" + b"".join(text(str(i)) + b"K\1" for i in range(20_000))
    + b"u}(" + b"".join(b"J" + struct.pack("<i", i) + b"h\0" for i in range(20_000))
    + b"u.",
    "repeated list": b"}" + text("a") + TENSOR.replace(
        b"J\0\0\4\0\x85K\x01\x85", b"J\xff\xff\xff\x7f](K\1e\x86(K\1K\1t"
    ) + b"s.",
    "shared storage": b"}("
    + b"".join(text(str(i)) + TENSOR for i in range(300)) + b"u.",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pickle_is_an_error_at_once(case, tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\2" + HOSTILE_PICKLES[case])
        archive.writestr("a/data/0", bytes(4 << 18))
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(ValueError, match=re.escape(str(path))):
            torch_files.read(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * path.stat().st_size
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun < 5


def test_zip_entries_that_are_larger_than_the_file_are_errors(tmp_path):
    path = tmp_path / "weights.pth"
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\2}" + text("a") + TENSOR + b"s.")
            archive.writestr("a/data/0", bytes(4 << 18))
            archive.writestr("a/byteorder", bytes(30_000_000), kind)
        if kind == zipfile.ZIP_STORED:  # a directory that claims it for an entry
            data = path.read_bytes()
            path.write_bytes(data.replace(bytes(29_000_000), b""))
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=re.escape(str(path))):
                torch_files.read(path)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "view",
    [
        (0, (9,), (1,)),  # longer than its storage
        (5, (4,), (1,)),  # starts too late
        (-4, (4,), (1,)),
        (7, (3,), (-4,)),
        (0, (3, 3), (0, 0)),  # repeats values: a larger one could fill the memory
        (0, (2, 2), (1,)),
    ],
)
def test_tensor_outside_its_storage_is_an_error(view, tmp_path):
    path = save({"a": torch.arange(8.0)}, tmp_path, "zip.pth")
    outside = tmp_path / "outside.pth"
    from torch._utils import _rebuild_tensor_v2

    class Tensor:
        def __reduce__(self):
            return _rebuild_tensor_v2, (Reference(), *view, False, {})

    class Reference:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            storage = ("storage", torch.FloatStorage, "0", "cpu", 8)
            return storage if isinstance(obj, Reference) else None

    with zipfile.ZipFile(path) as source, zipfile.ZipFile(outside, "w") as target:
        for info in source.infolist():
            if not info.filename.endswith("data.pkl"):
                target.writestr(info.filename, source.read(info))
        with target.open("weights.zip/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump({"a": Tensor()})
    with pytest.raises(
        ValueError, match=r"does not fit a storage of 8|is shorter than"
    ):
        torch_files.read(outside)


@pytest.mark.parametrize(
    ("entry", "content", "compression", "message"),
    [
        ("byteorder", b"big", zipfile.ZIP_STORED, "big-endian"),
        ("data/0", bytes(32), zipfile.ZIP_DEFLATED, "data/0 is compressed"),
        ("data/0", bytes(28), zipfile.ZIP_STORED, "buffer is smaller"),
    ],
)
def test_unsupported_zip_files_are_errors(
    entry, content, compression, message, tmp_path
):
    path = save({"a": torch.arange(8.0)}, tmp_path, "zip.pth")
    changed = tmp_path / "changed.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
        for info in source.infolist():
            if not info.filename.endswith(f"/{entry}"):
                target.writestr(info.filename, source.read(info))
        folder = source.namelist()[0].split("/")[0]
        target.writestr(f"{folder}/{entry}", content, compression)
    with pytest.raises(ValueError, match=message):
        torch_files.read(changed)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            (8).to_bytes(8, "little"),
            (7).to_bytes(8, "little"),
            r"storage \d+ has another length",
        ),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "big-endian"),
    ],
)
def test_unsupported_legacy_files_are_errors(old, new, message, tmp_path):
    path = save({"a": torch.arange(8.0)}, tmp_path, "legacy.pth")
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=message):
        torch_files.read(path)


@pytest.mark.parametrize("file_format", ["zip.pth", "legacy.pth"])
def test_views_parameters_and_all_dtypes_are_read(file_format, tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "transposed": base.T,
        "strided": base[1:, ::2],
        "scalar": base[2, 3],
        "empty": base[:0],
        "empty storage": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base + 1),
        "expanded once": torch.ones(1).expand(1, 1),
    }
    whole = (torch.float64, torch.float16, torch.int64, torch.int32, torch.int16)
    for dtype in (*whole, torch.int8, torch.uint8, torch.bool):
        tensors[str(dtype)] = base.to(dtype)
    read = torch_files.read(save(tensors, tmp_path, file_format))
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        expected = tensor.detach().numpy()
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name], expected)
    half = torch_files.read(save({"a": base.bfloat16()}, tmp_path, file_format))["a"]
    np.testing.assert_array_equal(half.astype(np.float32), base.numpy())


# --- save: only complete and finite weights -----------------------------------------


def test_variables_that_are_no_finite_resnet_are_not_saved(tmp_path):
    good = to_linen(network().state_dict().items())
    path = tmp_path / "model.safetensors"
    weights.save_torch(path, good)
    before = path.read_bytes()

    def without(*key):
        return unflatten_dict({k: v for k, v in flat(good).items() if k != key})

    def changed(value, *key):
        return unflatten_dict(flat(good) | {key: value})

    head = ("params", "attention_head", "kernel")
    kernel, scale = ("params", "conv1", "kernel"), ("params", "bn1", "scale")
    for wrong, message in [
        (without(*kernel), "1 missing: conv1.weight"),
        (changed(np.ones(3, np.float32), *head), "1 unknown: attention_head.weight"),
        (changed(np.full(4, np.nan, np.float32), *scale), "1 not finite: bn1.weight"),
        (changed(jnp.ones(4, jnp.bfloat16), *scale), "bn1.weight bfloat16"),
        (changed(np.ones(5, np.float32), *scale), r"bn1.weight \(5,\), not \(4,\)"),
        (
            {"params": good["params"]},
            r"give them all(.|\n)*24 missing: bn1.running_mean",
        ),
        ({"params": {"classification_stream": good["params"]}}, "not the variables of"),
    ]:
        with pytest.raises(ValueError, match=message):
            weights.save_torch(path, wrong)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    good = to_linen(network().state_dict().items())
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older")

    def full_disk(one, two):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        weights.save_torch(path, good)
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == [path.name]


def test_mode_of_a_saved_weights_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        weights.save_torch(
            tmp_path / "w.safetensors", to_linen(network().state_dict().items())
        )
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640


# --- names and records of published weights -----------------------------------------


def test_weight_records_match_their_names():
    for name, record in resnet.PUBLISHED.items():
        arch = re.fullmatch(r"timm/(resnet\d+)\.tv2?_in1k", name)
        assert arch is not None
        assert arch[1] == record.arch
        assert record.arch in resnet.ARCHITECTURES
        assert re.fullmatch(rf"{record.arch}-[0-9a-f]{{8}}\.pth", record.file)
        assert record.resize_px == (232 if ".tv2_" in name else 256)
        assert 60 < record.imagenet_top1 < 90
        assert hub.record_of(name) == hub.record_of(f"/x/{record.file}") == record
    known = hub.known()
    assert known.items() >= resnet.PUBLISHED.items()
    assert len({record.file for record in known.values()}) == len(known)
    assert hub.record_of("someone/else") is None


@pytest.fixture
def client(monkeypatch):
    """A mock of `huggingface_hub` that records calls; it raises `error` if set."""
    module: Any = types.ModuleType("huggingface_hub")
    module.calls, module.error = [], None

    def hf_hub_download(repo_id, filename):
        module.calls.append((repo_id, filename))
        if module.error:
            raise module.error
        return "/cache/model.safetensors"

    module.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_fetch_returns_a_local_file_or_downloads_a_name(client, tmp_path):
    path = tmp_path / "a.pth"
    path.touch()
    assert hub.fetch(path) == hub.fetch(str(path)) == path
    assert client.calls == []
    assert str(hub.fetch("someone/net.x")) == "/cache/model.safetensors"
    assert client.calls == [("someone/net.x", "model.safetensors")]


def test_failed_download_is_an_error_that_names_the_urls(client):
    client.error = OSError("offline mode\nlong story")
    with pytest.raises(ValueError, match="cannot download") as error:
        hub.fetch("timm/resnet50.tv_in1k")
    for part in (
        "OSError: offline mode)",
        "https://huggingface.co/timm/resnet50.tv_in1k/resolve/main/model.safetensors",
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "--config.model.pretrained=/path/to/that/file",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/missing.safetensors", "no weights file"),
        ("weights/missing.pth", "no weights file"),
        ("resnet50", r"no weights file 'resnet50'.*timm/resnet50\.tv_in1k"),
        ("/nowhere/at/all", "no weights file"),
    ],
)
def test_missing_file_is_an_error_without_a_download(name, message, client):
    with pytest.raises(ValueError, match=message):
        hub.fetch(name)
    assert client.calls == []


def test_directory_without_weights_is_an_error(client, tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        hub.fetch(tmp_path)


# --- training from pretrained weights -----------------------------------------------


def training_state(streams=pretrained.STREAMS) -> Any:
    """Draws different parameters and statistics for each stream, without compiling."""
    shapes = families.variable_shapes(resnet.create("resnet10", 7, width=4), 32)
    rng = np.random.default_rng(0)
    params, stats = (
        {
            stream: jax.tree.map(
                lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes[part]
            )
            for stream in streams
        }
        for part in ("params", "batch_stats")
    )
    params["attention_head"] = {"kernel": jnp.ones((32, 4)), "bias": jnp.ones(4)}
    return params, stats


def test_both_streams_start_from_a_weights_file_without_its_classifier(tmp_path):
    model = network(classes=1000)
    path = save(model.state_dict(), tmp_path, "safetensors")
    params, stats = training_state()
    before = jax.tree.map(np.array, (params, stats))
    new_params, new_stats, lines = pretrained.start_from(
        params, stats, pretrained=str(path), arch="resnet10"
    )
    jax.tree.map(np.testing.assert_array_equal, before, (params, stats))
    assert jax.tree.structure((new_params, new_stats)) == jax.tree.structure(before)
    expected = to_linen(model.state_dict().items())
    for stream in pretrained.STREAMS:
        initial = new_params[stream].pop("fc")
        jax.tree.map(np.testing.assert_array_equal, initial, params[stream]["fc"])
        start = {"params": new_params[stream], "batch_stats": new_stats[stream]}
        expected["params"].pop("fc", None)
        assert_same(start, expected)
    np.testing.assert_array_equal(new_params["attention_head"]["bias"], np.ones(4))
    buffers = [
        x.unsafe_buffer_pointer()
        for tree in (new_params, new_stats)
        for stream in pretrained.STREAMS
        for x in jax.tree.leaves(tree[stream])
    ]
    assert len(set(buffers)) == len(buffers)  # donation needs distinct buffers
    report = "\n".join(lines)
    for part in (
        str(path),
        "no record",
        "60 arrays start classification_stream and regularization_stream",
        "fc.weight, fc.bias; 12 counters",
        "fresh: fc of classification_stream and regularization_stream, attention_head",
    ):
        assert part in report


def test_shared_weights_start_with_the_statistics_of_both_streams(tmp_path):
    model = network(classes=1000)
    path = save(model.state_dict(), tmp_path, "safetensors")
    params, stats = training_state()
    del params["regularization_stream"]
    new_params, new_stats, _ = pretrained.start_from(
        params, stats, pretrained=str(path), arch="resnet10"
    )
    assert set(new_params) == {"classification_stream", "attention_head"}
    for stream in pretrained.STREAMS:
        np.testing.assert_array_equal(
            new_stats[stream]["bn1"]["mean"], model.bn1.running_mean
        )


def test_baseline_starts_from_a_published_name(client, tmp_path, monkeypatch):
    model = network()
    path = save(model.state_dict(), tmp_path, "safetensors")
    client.hf_hub_download = lambda *_: str(path)
    record = resnet.PUBLISHED["timm/resnet18.tv_in1k"]._replace(arch="resnet10")
    monkeypatch.setitem(resnet.PUBLISHED, "timm/resnet18.tv_in1k", record)
    params, stats = training_state(pretrained.STREAMS[:1])
    del params["attention_head"]
    start = partial(pretrained.start_from, pretrained="timm/resnet18.tv_in1k")
    new_params, _, lines = start(params, stats, arch="resnet10")
    np.testing.assert_array_equal(
        new_params["classification_stream"]["bn1"]["scale"], model.bn1.weight.detach()
    )
    report = "\n".join(lines)
    assert f"timm/resnet18.tv_in1k ({path})" in report
    assert "top-1 69.758 % at 224 px (bilinear from 256)" in report
    assert "BSD-3-Clause" in report
    with pytest.raises(ValueError, match=r"is a resnet10.*backbone is 'resnet50'"):
        start(params, stats, arch="resnet50")


def test_weights_without_a_classifier_start_the_other_layers(tmp_path):
    state = dict(network().state_dict())
    del state["fc.weight"], state["fc.bias"]
    path = save(state, tmp_path, "zip.pth")
    params, stats = training_state(pretrained.STREAMS[:1])
    new_params, new_stats, lines = pretrained.start_from(
        params, stats, pretrained=path, arch="resnet10"
    )
    (stream,) = stats
    initial = new_params[stream].pop("fc")
    jax.tree.map(np.testing.assert_array_equal, initial, params[stream]["fc"])
    start = {"params": new_params[stream], "batch_stats": new_stats[stream]}
    assert_same(start, to_linen(state.items()))
    assert (
        lines[3] == "left in the file: no classifier; 12 counters (num_batches_tracked)"
    )


def test_pretrained_weights_of_another_size_are_an_error(tmp_path):
    path = save(network(width=8).state_dict(), tmp_path, "safetensors")
    params, stats = training_state(pretrained.STREAMS[:1])
    start = partial(pretrained.start_from, pretrained=path, arch="resnet10")
    with pytest.raises(ValueError, match=r"width and stem(.|\n)*conv1\.weight \(8, 3"):
        start(params, stats)
    with pytest.raises(ValueError, match=r"attention_head.*none of classification"):
        start({"attention_head": params["attention_head"]}, {})
    path = save(network(stem="small").state_dict(), tmp_path, "safetensors")
    with pytest.raises(ValueError, match=r"\(4, 3, 3, 3\), not \(4, 3, 7, 7\)"):
        start(params, stats)


# --- training from a run or an export -----------------------------------------------

CLASSES = [f"class {i}" for i in range(7)]
ABOUT = {"width": 4, "stem": "imagenet", "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)}


def save_run(folder, state, *, step=3, names=CLASSES):
    """Saves a state as a run's checkpoint."""
    params, stats = state
    about = {"model": {"backbone": "resnet10"} | ABOUT, "data": ABOUT}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        saved = {"params": params, "batch_stats": stats, "step": np.array(step)}
        meta = {"class_names": names, "epoch": 2, "config": about}
        checkpoints.save(step, saved, meta)
    return folder


def save_export(folder, state, names=CLASSES):
    """Writes the files of `--mode export` that `start_from` reads."""
    stream = pretrained.STREAMS[0]
    variables = {"params": state[0][stream], "batch_stats": state[1][stream]}
    weights.save_torch(folder / "model.safetensors", variables)
    about = {"architecture": "resnet10", "class_names": names} | ABOUT
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def trained_state(streams=pretrained.STREAMS):
    """Returns a state far from initial ones."""
    return jax.tree.map(lambda x: x * 0.5 + 3, training_state(streams))


@pytest.mark.parametrize("save_as", [save_run, save_export])
@pytest.mark.parametrize("streams", [pretrained.STREAMS, pretrained.STREAMS[:1]])
def test_both_streams_start_from_a_runs_classification_stream(
    save_as, streams, tmp_path
):
    trained = trained_state(streams)
    folder = save_as(tmp_path, trained)
    params, stats = training_state()
    new_params, new_stats, lines = pretrained.start_from(
        params, stats, pretrained=folder, arch="resnet10", class_names=CLASSES
    )
    for new, old in zip((new_params, new_stats), trained, strict=True):
        for stream in pretrained.STREAMS:  # N_ar starts from N_cls, too
            assert_same(new[stream], old["classification_stream"])
    assert (new_params["attention_head"]["bias"] == 1).all()  # unchanged
    report = "\n".join(lines)
    for part in (
        "step 3, epoch 2" if save_as is save_run else "model.safetensors",
        "resnet10, width 4, stem imagenet, 7 classes",
        "(0.1, 0.2, 0.3)",
        "62 arrays start classification_stream and regularization_stream, classifier",
        "fresh: attention_head",
    ):
        assert part in report


def test_newest_checkpoint_of_a_run_is_used(tmp_path):
    state = training_state(pretrained.STREAMS[:1])
    save_run(tmp_path, trained_state(pretrained.STREAMS[:1]), step=3)
    save_run(tmp_path, state, step=11)
    new, _, lines = pretrained.start_from(*state, pretrained=tmp_path, arch="resnet10")
    assert_same(new, state[0])
    assert "step 11" in lines[0]


@pytest.mark.parametrize("save_as", [save_run, save_export])
@pytest.mark.parametrize(
    ("names", "wanted", "classes"),
    [
        (CLASSES[::-1], CLASSES, 7),  # the same number, but other classes
        (CLASSES[:5], CLASSES, 5),
        (CLASSES[:5], (), 5),
    ],
)
def test_classifier_of_other_classes_is_not_used(
    save_as, names, wanted, classes, tmp_path
):
    trained: Any = trained_state()
    fc = trained[0]["classification_stream"]["fc"]
    fc["kernel"], fc["bias"] = fc["kernel"][:, :classes], fc["bias"][:classes]
    folder = save_as(tmp_path, trained, names=list(names))
    params, stats = training_state()
    new, _, lines = pretrained.start_from(
        params, stats, pretrained=folder, arch="resnet10", class_names=wanted
    )
    for stream in pretrained.STREAMS:
        assert_same(new[stream]["fc"], params[stream]["fc"])
        assert_same(
            new[stream]["layer4_0"], trained[0]["classification_stream"]["layer4_0"]
        )
    assert "left in the file: fc.weight, fc.bias (of other classes)" in lines[3]
    assert "fc of classification_stream and regularization_stream" in lines[4]


def test_run_of_another_network_is_an_error(tmp_path):
    save_run(tmp_path, trained_state())
    wide = training_state()
    del wide[0]["classification_stream"]["layer4_0"]["conv1"]
    params, stats = training_state()
    start = partial(pretrained.start_from, pretrained=tmp_path)
    with pytest.raises(ValueError, match=r"step 3.*does not fit(.|\n)*1 unknown"):
        start(*wide, arch="resnet10")
    other = families.variable_shapes(resnet.create("resnet18", 7, width=4), 32)
    state = [{"classification_stream": other[c]} for c in ("params", "batch_stats")]
    with pytest.raises(ValueError, match=r"fit resnet18 .*like a resnet10"):
        start(*state, arch="resnet18")
    # Other directories are errors, too.
    (empty := tmp_path / "empty").mkdir()
    for folder, message in [
        (empty, "neither a run .* nor an export"),
        (tmp_path / "missing", "no weights file"),
    ]:
        with pytest.raises(ValueError, match=message):
            pretrained.start_from(params, stats, pretrained=folder, arch="resnet10")
    (empty / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="nothing is saved yet"):
        pretrained.start_from(params, stats, pretrained=empty, arch="resnet10")


@pytest.mark.parametrize("about", [None, "{", "{}"])
def test_export_without_its_config_is_an_error(about, tmp_path):
    save_export(tmp_path, trained_state())
    (tmp_path / "config.json").unlink()
    if about:
        (tmp_path / "config.json").write_text(about)
    start = partial(pretrained.start_from, *training_state(), arch="resnet10")
    with pytest.raises(ValueError, match=r"no config\.json of an export"):
        start(pretrained=tmp_path)
    # The weights file itself can be used, as the message says.
    assert "fresh: fc of" in start(pretrained=tmp_path / "model.safetensors")[2][4]


@pytest.mark.parametrize("save_as", [save_run, save_export])
def test_wrong_normalization_is_an_error_before_any_work(save_as, tmp_path):
    folder = save_as(tmp_path / "first", trained_state(pretrained.STREAMS[:1]))
    about = tuple(ABOUT["mean"]), tuple(ABOUT["std"])
    assert pretrained.normalization(folder) == about
    if save_as is save_export:
        assert pretrained.normalization(folder / "model.safetensors") == about
    config = get_config("baseline")
    config.model.pretrained = str(folder)
    config.data.mean = ABOUT["mean"]
    with pytest.raises(
        ValueError, match=r"by mean \(0.1, 0.2, 0.3\) and std \(1, 1, 1"
    ):
        check_config.check(config)
    config.data.std = (1.0, 1.0, 1.0)
    check_config.check(config)


def test_normalization_is_none_if_unknown(tmp_path, monkeypatch):
    record = resnet.PUBLISHED["timm/resnet50.tv2_in1k"]
    for name in ("timm/resnet50.tv2_in1k", tmp_path / record.file):
        assert pretrained.normalization(name) == (record.mean, record.std)
    (tmp_path / "weights.pth").touch()
    for content in (None, "{", "[]", "{}", '{"mean": 0.5, "std": 1}'):
        if content:
            (tmp_path / "config.json").write_text(content)
        for name in ("someone/else", tmp_path, tmp_path / "weights.pth"):
            assert pretrained.normalization(name) is None
    # An empty name is not the current directory, even if that is a run.
    (tmp_path / "checkpoints").mkdir()
    assert pretrained.normalization(tmp_path) is None  # nothing is saved yet
    save_run(tmp_path, trained_state(pretrained.STREAMS[:1]))
    monkeypatch.chdir(tmp_path)
    assert pretrained.normalization(".") is not None
    assert pretrained.normalization("") is None


def test_opened_weights_can_be_used_without_their_file(tmp_path):
    state = training_state()
    path = save(network().state_dict(), tmp_path, "safetensors")
    expected = pretrained.start_from(*state, pretrained=path, arch="resnet10")
    origin = pretrained.open_pretrained(path, arch="resnet10")
    path.unlink()
    again = pretrained.start_from(*state, pretrained=origin, arch="resnet10")
    assert again[2] == expected[2]
    for new, old in zip(again[:2], expected[:2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, new, old)


def test_preview_equals_the_report_of_start_from_and_needs_no_arrays(tmp_path):
    state = training_state()
    abstract = jax.eval_shape(lambda: state)
    path = save(network(classes=1000).state_dict(), tmp_path, "safetensors")
    lines = pretrained.preview(*abstract, pretrained=path, arch="resnet10")
    *_, started = pretrained.start_from(*state, pretrained=path, arch="resnet10")
    assert lines[: len(started)] == started
    rows = [line.split() for line in lines[len(started) :]]
    stages = ["bn1", "conv1", "layer1", "layer2", "layer3", "layer4"]
    assert [row[0] for row in rows] == [
        f"{s}.{n}" for s in pretrained.STREAMS for n in stages
    ]
    assert rows[1][1:] == ["1", "arrays", f"{7 * 7 * 3 * 4}", "values"]
    assert rows[2][1:] == ["10", "arrays", f"{2 * 9 * 4 * 4 + 2 * 4 * 4}", "values"]
    assert sum(int(row[1]) for row in rows) == 2 * 60
    path = save(changed(network().state_dict(), **{BN: None}), tmp_path, "zip.pth")
    with pytest.raises(ValueError, match=f"1 missing: {BN}"):
        pretrained.preview(*abstract, pretrained=path, arch="resnet10")
