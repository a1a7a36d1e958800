"""Tests of all file readers on files changed at random.

A reader must return or raise a ValueError. Valid files are truncated, bits are flipped,
bytes are replaced by ones that are difficult to parse, and parts are removed or
repeated.
"""

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cra_jax.backbones import torch_files
from cra_jax.datasets import archives, csv_file, sources
from cra_jax.inference import trained
from cra_jax.input import decoding
from cra_jax.runtime import provenance, run_directory
from cra_jax.training import monitor
from tests.helpers import dataset_folders
from tests.helpers.torch_or_skip import torch
from tests.input import test_image_cache
from tests.oracles.torch_resnet import TorchResNet

_DIFFICULT = [
    b"\x00",
    b"\xff",
    b"\n",
    b'"',
    b"{",
    b"[",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
]
_DIFFICULT += [b"../", b",", b"\x80\x04.", b"9" * 30, b"\xff\xff\xff\x7f", "ä".encode()]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Changes the content at random, at one to five places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        # Headers with lengths and types are changed more often.
        end = rng.choice((len(data), min(len(data), 200)))
        place = rng.randrange(end) if end else 0
        span = rng.randrange(1, 1 + rng.choice((1, 8, 64)))
        match rng.randrange(6):
            case 0:
                del data[place:]
            case 1 if data:
                data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 2:
                text = rng.choice(_DIFFICULT)
                data[place : place + len(text)] = text
            case 3:
                del data[place : place + span]
            case 4:
                data[place:place] = data[place : place + span]
            case 5:
                data[place : place + span] = rng.choice(_DIFFICULT)
    return bytes(data)


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "fc.weight": rng.normal(size=(5, 7)).astype(np.float32),
        "fc.bias": rng.normal(size=5).astype(np.float32),
        "bn1.num_batches_tracked": np.array(3),
    }


def _pth(path: Path, *, zipped: bool, nested: bool = False) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in _arrays().items()}
    saved = {"model": tensors, "epoch": 3} if nested else tensors
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)


def _index(path: Path) -> None:
    arrays = _arrays()
    save_file(arrays, path.with_name("w.safetensors"))
    places = dict.fromkeys(arrays, "w.safetensors")
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in ("set/images/a.jpg", "set/labels.txt"):
            member = tarfile.TarInfo(name)
            member.size = 300
            archive.addfile(member, io.BytesIO(bytes(range(100)) * 3))


def _image(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def _csv(path: Path) -> None:
    (path.parent / "img").mkdir()
    for i in range(12):
        (path.parent / "img" / f"{i}.jpg").touch()
    path.write_text(
        "path,label,split,x_min,y_min,x_max,y_max\n"
        + "".join(
            f"img/{i}.jpg,class {i % 3},{'test' if i % 4 == 0 else 'train'},"
            f"1,2,{50 + i},90.5\n"
            for i in range(12)
        )
    )


def _export(path: Path) -> None:
    weights = TorchResNet("resnet10", 2, 8, "small").state_dict()
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    save_file(arrays, path.with_name("model.safetensors"))
    path.write_text(
        json.dumps(
            {
                "architecture": "resnet10",
                "width": 8,
                "stem": "small",
                "class_names": ["auk", "egret"],
                "mean": [0.5, 0.5, 0.5],
                "std": [0.2, 0.2, 0.2],
                "resize_short_side_px": 36,
                "crop_px": 32,
                "checkpoint_step": 6,
            }
        )
    )


def _lines(path: Path) -> None:
    run_directory.append_lines(
        path, [{"step": i, "epoch": 1, "split": "train", "loss": 0.5} for i in range(9)]
    )


def _results(path: Path) -> None:
    rows = [run_directory.Result(i, f"{i}.jpg", 1, 0, 0.5, 6) for i in range(9)]
    run_directory.write_results(path.parent.parent, "test", "center", rows)


def _config(path: Path) -> None:
    path.write_text(json.dumps({"data": {"mean": [0.5], "source": "cub"}, "seed": 0}))


def _provenance(path: Path) -> None:
    path.write_text(json.dumps({"starts": [{"started": "now", "first_step": 0}]}))


def _unpack(path: Path) -> None:
    target = path.parent / "unpacked"
    shutil.rmtree(target, ignore_errors=True)
    archives.unpack_tar(path, target, max_bytes=10**6, progress=False)


def _within(source: str, tree: Callable[[Path], object], *files: str) -> dict:
    """Readers of the annotation files of a small copy of a published dataset."""

    def reader(name: str):
        depth = len(Path(name).parts)
        return (
            lambda path: tree(path.parents[depth - 1]),
            lambda path: _load(source, path.parents[depth - 1]),
        )

    return {f"{source}/{name}": reader(name) for name in files}


def _load(source: str, root: Path) -> None:
    for records in sources.load(source, root).splits.values():
        for record in records:
            record.box  # noqa: B018 (some boxes are read on access)


_KIT, _DATA = "devkit", "fgvc-aircraft-2013b/data"
_DOG = f"{dataset_folders.DOGS[0]}/train_1"

# name of the file: its writer and its reader
READERS = {
    "weights.pth": (lambda p: _pth(p, zipped=True), torch_files.read),
    "legacy.pth": (lambda p: _pth(p, zipped=False), torch_files.read),
    "nested.pth": (lambda p: _pth(p, zipped=True, nested=True), torch_files.read),
    "w.safetensors.index.json": (_index, torch_files.read),
    "w.safetensors": (lambda p: save_file(_arrays(), p), torch_files.read),
    "list.csv": (_csv, csv_file.csv_list),
    "set.tgz": (_tar, _unpack),
    **{
        f"image.{x}": (_image, lambda p: decoding.read(p, 16))
        for x in ("jpg", "png", "gif", "tif", "webp", "bmp", "ppm", "jp2")
    },
    "metrics.jsonl": (_lines, lambda p: run_directory.read_metrics(p.parent)),
    "bad_steps.jsonl": (_lines, lambda p: monitor.read_bad_steps(p.parent)),
    "results/test-center.csv": (
        _results,
        lambda p: run_directory.read_results(p.parent.parent, "test", "center"),
    ),
    "run/config.json": (_config, lambda p: run_directory.read_config(p.parent)),
    "provenance.json": (_provenance, lambda p: provenance.read(p.parent)),
    "export/config.json": (_export, lambda p: trained.of_export(p.parent)),
    **_within(
        "cub",
        dataset_folders.cub_tree,
        "images.txt",
        "image_class_labels.txt",
        "train_test_split.txt",
        "classes.txt",
        "bounding_boxes.txt",
    ),
    **_within("nabirds", dataset_folders.nabirds_tree, "classes.txt"),
    **_within(
        "aircraft",
        dataset_folders.aircraft_tree,
        f"{_DATA}/variants.txt",
        f"{_DATA}/images_variant_trainval.txt",
        f"{_DATA}/images_box.txt",
    ),
    **_within(
        "cars",
        dataset_folders.devkit_tree,
        f"{_KIT}/cars_meta.mat",
        f"{_KIT}/cars_train_annos.mat",
    ),
    **_within(
        "dogs",
        dataset_folders.dogs_tree,
        "lists/train_list.mat",
        f"Annotation/{_DOG}",
    ),
}


def fuzz(name: str, folder: Path, count: int, seed: int) -> int:
    """Returns how many of the changed files raise a ValueError."""
    write, read = READERS[name]
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    write(path)
    read(path)  # the unchanged file is valid
    whole = path.read_bytes()
    rng, refused = random.Random(seed), 0
    for number in range(count):
        path.write_bytes(mutate(whole, rng))
        try:
            read(path)
        except ValueError as error:
            refused += str(error) != ""
        except Exception as error:
            copy = folder / "failed"
            copy.write_bytes(path.read_bytes())
            pytest.fail(f"change {number} of seed {seed}, see {copy}: {error!r}")
    return refused


@pytest.fixture(autouse=True)
def without_sync(monkeypatch):
    """Skips the slow syncs, because these files do not need to survive a crash."""
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.filterwarnings("ignore")  # warnings of Pillow and csv about damage
@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_raises_a_value_error(name, tmp_path):
    refused = fuzz(name, tmp_path, 40, seed=0)
    assert refused or name.endswith(".jsonl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_thousand_changed_files(name, tmp_path, note):
    refused = fuzz(name, tmp_path, 1000, seed=1)
    fault = f"`{name}` changed at random"
    note(fault, "a ValueError with a message", refused)
    note(fault, "read without an error", 1000 - refused)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_changed_photographs(shared_data, tmp_path, note):
    """Photographs have EXIF blocks, tables and sizes that drawings do not have."""
    folder = shared_data / "cub_10" / "CUB_200_2011" / "images"
    photographs = sorted(folder.rglob("*.jpg"))
    rng, refused, changed = random.Random(2), 0, tmp_path / "changed.jpg"
    for _ in range(1000):
        changed.write_bytes(mutate(rng.choice(photographs).read_bytes(), rng))
        try:
            decoding.read(changed, 16)
        except ValueError as error:
            refused += str(changed) in str(error)
    assert refused
    fault = "a photograph of CUB changed at random"
    note(fault, "a ValueError", refused)
    note(fault, "read without an error", 1000 - refused)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [".pixels", ".json"])
def test_a_changed_image_cache(kind, tmp_path, capsys, note):
    """The images are always those of the original files."""
    rng = random.Random(3)
    for _ in range(40):
        path = test_image_cache.prepare(tmp_path).path.with_suffix(kind)
        whole = path.read_bytes()
        path.write_bytes(changed := mutate(whole, rng))
        capsys.readouterr()
        test_image_cache.assert_holds(test_image_cache.prepare(tmp_path))
        if changed != whole:
            err = capsys.readouterr().err
            assert kind == ".json" or len(changed) != len(whole) or "warning" in err
    part = "pixels" if kind == ".pixels" else "index"
    fault = f"the {part} of the image cache changed at random"
    note(fault, "the original images are read", 40)
