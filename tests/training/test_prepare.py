"""`--mode prepare`: datasets, image caches, weights, and builds of tfds datasets.

Builds run in subprocesses. The test of TensorFlow needs it to be installed.
"""

import functools
import hashlib
import importlib
import importlib.util
import io
import multiprocessing
import socket
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from safetensors.numpy import save_file
from tensorflow_datasets.core import registered
from tensorflow_datasets.core.download import resource

from cra_jax.backbones import weights
from cra_jax.datasets import archives, tfds_archives, tfds_build, tfds_read
from cra_jax.inference import run_options
from cra_jax.training import build, prepare
from tests.helpers import tiny_config, tiny_tfds

# A tfds dataset defined for these tests; its code is on the path of every process.
BUILDER = """
import os
import tarfile
import tensorflow_datasets as tfds


class HandDrawn(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "get images.tar, with train/ and test/"

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["wren", "tit"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        ACT
        archive = dl_manager.manual_dir / "images.tar"
        return {
            split: self._generate_examples(archive, split)
            for split in ("train", "test")
        }

    def _generate_examples(self, archive, split):
        with tarfile.open(archive) as files:
            for name in files.getnames():
                if name.startswith(split):
                    label = "wren" if "wren" in name else "tit"
                    yield name, {"image": files.extractfile(name), "label": label}
"""

IMAGES = {
    f"{split}/{label}{i}.jpg": tiny_tfds.jpeg(seed)
    for seed, (split, label, i) in enumerate(
        (split, label, i)
        for split in ("train", "test")
        for label in ("wren", "tit")
        for i in range(8)
    )
}

ON_TENSORFLOW = """
        import tensorflow as tf
        assert not tf.config.list_physical_devices("GPU")
        assert tf.constant([1, 2]).numpy().sum() == 3"""


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """Makes the builder's code available to tfds, in this and in new processes.

    Returns a function that writes the code; `act` is the first line of the build.
    """
    code = tmp_path / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text("import hand_drawn\n")
    monkeypatch.setenv("PYTHONPATH", str(code))
    monkeypatch.syspath_prepend(code)
    monkeypatch.setattr(tfds_archives, "MODULES", {})  # this builder needs none
    before = dict(registered._DATASET_REGISTRY)

    def write(act: str = "pass") -> None:
        (code / "hand_drawn.py").write_text(BUILDER.replace("ACT", act.strip()))
        importlib.import_module("hand_drawn")

    yield write
    registered._DATASET_REGISTRY.clear()
    registered._DATASET_REGISTRY.update(before)
    sys.modules.pop("hand_drawn", None)


def place_images(folder: Path) -> Path:
    """Writes the archive of images to a directory; returns the directory."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "images.tar", "w") as archive:
        for name, content in IMAGES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


def run(tmp_path: Path, capsys, **changes) -> list[str]:
    """Returns the lines that `--mode prepare` prints."""
    config = tiny_config.config(tmp_path / "cache", **changes)
    prepare.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().out.splitlines()


# --- datasets -------------------------------------------------------------------------


def test_drawings_are_cached_once(tmp_path, capsys):
    first = run(tmp_path, capsys)
    assert first[0] == "data: synthetic, 8 classes"
    for name, count in {"train": 96, "test": 40, "test_shifted": 40}.items():
        (line,) = [line for line in first if line.startswith(f"{name}: ")]
        place = Path(first[first.index(line) + 1].strip())
        files = [place, place.with_suffix(".json")]
        size = sum(file.stat().st_size for file in files) / 1e6
        assert line == (
            f"{name}: {count} images of 8 classes, {size:.1f} MB, stored now"
        )
        assert place.parent == tmp_path / "cache"
    assert first[-2].startswith("all is ready, after ")

    second = run(tmp_path, capsys)
    assert second[-2].startswith("all was there already (")
    assert [line.replace("there already", "stored now") for line in second[:-2]] == (
        first[:-2]
    )
    third = run(tmp_path, capsys, **{"data.short_side_px": 40})
    assert third[-2].startswith("all is ready")


def test_training_uses_the_prepared_image_cache(tmp_path, capsys):
    run(tmp_path, capsys)
    config = tiny_config.config(tmp_path / "cache")
    dataset = build.load_dataset(config)
    for name in dataset.splits:
        build.open_split(config, dataset, name)
    assert "caching" not in capsys.readouterr().err


def test_streamed_images_are_not_cached(tmp_path, capsys):
    lines = run(tmp_path, capsys, **{"data.prepare": False})
    assert "train: 96 images of 8 classes, decoded at each use" in lines[1]
    assert not (tmp_path / "cache").exists()


def test_unreadable_image_is_an_error_unless_skip_unreadable_is_on(tmp_path, capsys):
    for name, content in IMAGES.items():
        split, file = name.split("/")
        place = tmp_path / "birds" / split / file[:-5] / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    (tmp_path / "birds" / "train" / "wren" / "wren0.jpg").write_bytes(b"no image")
    changes = {
        "data.source": "folder",
        "data.path": str(tmp_path / "birds"),
        "model.kind": "baseline",
        "train.batch_size": 8,
    }
    with pytest.raises(ValueError, match=r"1 of 16 images cannot be read:\n.*wren0"):
        run(tmp_path, capsys, **changes)
    capsys.readouterr()
    changes["data.skip_unreadable"] = True
    lines = run(tmp_path, capsys, **changes)
    assert lines[:2] == ["data: folder, 2 classes", f"    {tmp_path / 'birds'}"]
    assert lines[2].startswith(
        "train: 15 images of 2 classes (1 left out as unreadable), "
    )


def test_cub_is_downloaded_once_or_read_from_a_path(tmp_path, capsys, monkeypatch):
    published = tmp_path / "published" / "CUB_200_2011"
    files = [f"00{c}.B{c}/{i}.jpg" for c in (1, 2) for i in range(16)]
    lists = {
        "images": files,
        "image_class_labels": [1] * 16 + [2] * 16,
        "train_test_split": [1, 0] * 16,
        "classes": ["001.B1", "002.B2"],
    }
    for file in files:
        (published / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        (published / "images" / file).write_bytes(tiny_tfds.jpeg(0))
    for name, values in lists.items():
        text = "".join(f"{i} {value}\n" for i, value in enumerate(values, 1))
        (published / f"{name}.txt").write_text(text)

    cub = {"data.source": "cub"}
    lines = run(tmp_path, capsys, **cub, **{"data.path": str(published)})
    assert lines[:2] == ["data: cub, 2 classes", f"    {published}"]
    assert lines[2].startswith("train: 16 images of 2 classes, ")

    cache = tmp_path / "home" / "cra_jax" / "datasets"
    cache.mkdir(parents=True)
    downloaded = cache / "CUB_200_2011.tgz"  # as after a download
    with tarfile.open(downloaded, "w:gz") as archive:
        archive.add(published, "CUB_200_2011")
    digest = hashlib.sha256(downloaded.read_bytes()).hexdigest()
    about = archives.Archive("nowhere", downloaded.stat().st_size, digest, 10**6)
    fetch = functools.partial(archives.cub_200_2011, archive=about)
    monkeypatch.setattr(archives, "cub_200_2011", fetch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    place = cache / "CUB_200_2011"
    lines = run(tmp_path, capsys, **cub, **{"data.prepare": False})
    assert lines[:2] == ["data: cub, 2 classes, fetched now", f"    {place}"]
    assert lines[-2].startswith("all is ready")
    lines = run(tmp_path, capsys, **cub, **{"data.prepare": False})
    assert lines[0] == "data: cub, 2 classes, there already"
    assert lines[-2].startswith("all was there already")


def test_too_few_images_are_an_error_before_decoding(tmp_path, capsys):
    with pytest.raises(ValueError, match="96 training images do not fill one batch"):
        run(tmp_path, capsys, **{"train.batch_size": 128})
    assert not (tmp_path / "cache").exists()


# --- weights --------------------------------------------------------------------------


def test_weights_are_printed_before_the_data(tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    config = tiny_config.config(tmp_path)
    network = run_options.from_config(config).create_backbone(5)
    images = np.zeros((1, 32, 32, 3), np.float32)
    weights.save_torch(file, jax.jit(network.init)(jax.random.key(0), images))
    time.sleep(0.01)  # the file is older than the run on any clock
    lines = run(tmp_path, capsys, **{"model.pretrained": str(file)})
    megabytes = file.stat().st_size / 1e6
    assert lines[0] == f"weights: {file}, {megabytes:.1f} MB, there already"
    assert lines[1] == f"    {file}"
    assert lines[3] == "data: synthetic, 8 classes"


def test_wrong_weights_are_an_error_before_images_are_cached(tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    save_file({"conv1.weight": np.zeros((8, 3, 3, 3), np.float32)}, file)
    with pytest.raises(ValueError, match="59 missing"):
        run(tmp_path, capsys, **{"model.pretrained": str(file)})
    assert not list(tmp_path.rglob("*.json"))  # no image cache


def test_missing_weights_are_an_error_before_images_are_cached(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"there is no weights file 'none\.pth'"):
        run(tmp_path, capsys, **{"model.pretrained": "none.pth"})
    assert not (tmp_path / "cache").exists()


# --- tfds datasets --------------------------------------------------------------------


def test_built_dataset_is_cached(tmp_path, capsys):
    tiny_tfds.plain(tmp_path / "tfds", train=tiny_tfds.rows(16), test=tiny_tfds.rows(2))
    capsys.readouterr()
    options = {
        "data.source": "tfds",
        "data.name": "plain",
        "data.path": str(tmp_path / "tfds"),
    }
    lines = run(tmp_path, capsys, **options)
    assert lines[0] == "data: tfds, 2 classes, there already"
    assert lines[1].strip() == str(tmp_path / "tfds" / "plain" / "1.0.0")
    assert lines[2].startswith("train: 16 images of 2 classes, ")
    assert lines[-2].startswith("all is ready")
    assert run(tmp_path, capsys, **options)[-2].startswith("all was there already")


def test_dataset_is_built_from_manually_placed_archives(tmp_path, capsys, builder):
    builder()
    manual = place_images(tmp_path / "manual")
    options = {
        "data.source": "tfds",
        "data.name": "hand_drawn",
        "data.path": str(tmp_path / "tfds"),
        "data.manual_dir": str(manual),
    }
    lines = run(tmp_path, capsys, **options)
    assert "tensorflow" not in sys.modules
    assert lines[0] == "data: tfds, 2 classes, built now"
    assert lines[2].startswith("train: 16 images of 2 classes, ")
    assert lines[3].endswith(".pixels")
    lines = run(tmp_path, capsys, **options)
    assert lines[0] == "data: tfds, 2 classes, there already"
    assert lines[-2].startswith("all was there already")

    found = tfds_read.read_dataset("hand_drawn", tmp_path / "tfds")
    assert found.class_names == ("wren", "tit")
    for split, examples in found.splits.items():
        contents = {e.content(): found.class_names[e.label] for e in examples}
        assert contents == {
            content: "wren" if "wren" in name else "tit"
            for name, content in IMAGES.items()
            if name.startswith(split)
        }


def test_default_manual_dir_is_below_the_data_dir(tmp_path, builder, capfd):
    builder()
    place_images(tmp_path / "tfds" / "downloads" / "manual")
    assert tfds_build.build("hand_drawn", tmp_path / "tfds") is True
    printed = capfd.readouterr()
    assert printed.out == ""  # tfds prints to standard output
    assert "building hand_drawn in " in printed.err
    assert "Generating" not in printed.err  # progress bars are only for terminals
    assert tfds_build.build("hand_drawn", tmp_path / "tfds") is False


def test_one_of_two_processes_builds(tmp_path, builder):
    builder()
    manual = place_images(tmp_path / "manual")
    build = functools.partial(
        tfds_build.build, "hand_drawn", tmp_path / "tfds", manual_dir=manual
    )
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda _: build(), range(2))) == [False, True]


def test_tensorflow_runs_in_a_subprocess_without_gpu(tmp_path, builder):
    if not importlib.util.find_spec("tensorflow"):
        pytest.skip('SKIPPED, NOT PASSED: no TensorFlow; pip install ".[tfds-build]"')
    builder(ON_TENSORFLOW)
    manual = place_images(tmp_path / "manual")
    assert tfds_build.build("hand_drawn", tmp_path / "tfds", manual_dir=manual)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("raise RuntimeError('the\\n  ink is dry')", "RuntimeError: the ink is dry$"),
        ("os._exit(3)", "its process ended with 3 and no message"),
        ("raise KeyboardInterrupt", "it was interrupted"),
    ],
)
def test_failed_build_is_an_error(act, message, tmp_path, builder):
    builder(act)
    place_images(tmp_path / "manual")
    with pytest.raises(ValueError, match=f"tfds cannot build hand_drawn: {message}"):
        tfds_build.build(
            "hand_drawn", tmp_path / "tfds", manual_dir=tmp_path / "manual"
        )
    assert tfds_read.build_directory("hand_drawn", tmp_path / "tfds") is not None


def test_missing_manual_archives_are_an_error(tmp_path, builder):
    builder()
    with pytest.raises(ValueError, match=r"manual does not exist.* get images\.tar"):
        tfds_build.build("hand_drawn", tmp_path / "tfds")
    with pytest.raises(ValueError, match=r"data\.manual_dir is /.*/typo: there is no"):
        tfds_build.build(
            "hand_drawn", tmp_path / "tfds", manual_dir=tmp_path / "tfds" / "typo"
        )


def test_files_of_a_killed_build_are_reported(tmp_path, builder, capsys):
    builder("raise RuntimeError")
    incomplete = tmp_path / "tfds" / "hand_drawn" / "incomplete.ABC_1.0.0"
    incomplete.mkdir(parents=True)
    with pytest.raises(ValueError, match="tfds cannot build"):
        tfds_build.build("hand_drawn", tmp_path / "tfds")
    assert f"{incomplete}: left by a build that was killed" in capsys.readouterr().err


def test_build_ends_if_its_parent_process_is_killed(tmp_path, builder):
    note = tmp_path / "note"
    builder(
        f"""
        import pathlib, time
        pathlib.Path({str(note)!r}).write_text(str(os.getpid()))
        time.sleep(100)"""
    )
    parent = multiprocessing.get_context("spawn").Process(
        target=tiny_tfds.build_registered, args=("hand_drawn", tmp_path / "tfds")
    )
    parent.start()
    try:
        assert _becomes_true(lambda: note.exists() and note.read_text() != "")
        build_process = Path("/proc") / note.read_text()
        assert _becomes_true(lambda: build_process.exists())
    finally:
        parent.kill()
        parent.join()
    assert _becomes_true(
        lambda: not build_process.exists() or " Z " in _state(build_process)
    )


def _state(process: Path) -> str:
    try:
        return (process / "stat").read_text()
    except OSError:
        return " Z "


def _becomes_true(condition: Callable[[], bool]) -> bool:
    """Returns whether the condition becomes true within half a minute."""
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_missing_packages_are_an_error_before_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_archives, "MODULES", {"no_such_module": "some-package"})
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    with pytest.raises(ValueError, match="building mnist needs no_such_module,") as e:
        tfds_build.build("mnist", tmp_path / "tfds")
    assert 'pip install ".[tfds-build]"' in str(e.value)
    assert sys.executable in str(e.value)
    assert not (tmp_path / "tfds").exists()


def test_missing_archives_of_cars196_are_an_error_before_packages(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tfds_archives, "MODULES", {"no_such_module": "some-package"})
    manual = tmp_path / "tfds" / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "car_devkit.tgz").write_bytes(bytes(330_960))
    (manual / "cars_train.tgz").write_bytes(b"a page in place of the file")
    known = tfds_archives.archives("cars196")
    train, devkit, test, _ = (
        known[f"{name}"]
        for name in (
            "cars_train.tgz",
            "car_devkit.tgz",
            "cars_test.tgz",
            "cars_test_annos_withlabels.mat",
        )
    )
    assert devkit.size == 330_960
    # An archive that tfds has downloaded itself.
    cached = resource.get_dl_fname(test.urls[0], test.sha256)
    (tmp_path / "tfds" / "downloads" / cached).touch()
    with pytest.raises(ValueError, match="have not worked since 2023") as caught:
        tfds_build.build("cars196", tmp_path / "tfds")
    first = str(caught.value).partition("\n")[0]
    assert first == (
        f"{manual}: cars_train.tgz has 27 bytes, not {train.size}; "
        "not there: cars_test_annos_withlabels.mat"
    )


def test_missing_network_is_an_error_that_lists_the_archives(tmp_path, monkeypatch):
    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(tfds_archives, "MODULES", {"no_such_module": "some-package"})
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with pytest.raises(
        ValueError, match=r"no network .*caltech\.edu: Name or"
    ) as error:
        tfds_build.build("caltech_birds2011", tmp_path, manual_dir=tmp_path)
    message = str(error.value)
    infos = tfds.builder_cls("caltech_birds2011").url_infos or {}
    for info in infos.values():
        assert f"{info.filename}  {int(info.size)} bytes\n" in message
        assert f"sha256 {info.checksum}\n" in message
    assert message.count("  sha256 ") == len({i.filename for i in infos.values()}) == 2
    # A proxy may have network access.
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "proxy"})
    with pytest.raises(ValueError, match="needs no_such_module"):
        tfds_build.build("caltech_birds2011", tmp_path)


def test_unknown_tfds_names_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'caltech_birds': .* meant is caltech_birds"):
        tfds_build.build("caltech_birds", tmp_path)
    with pytest.raises(
        ValueError, match=r"data\.name is empty: set it to a dataset of tfds"
    ):
        tfds_build.build("", tmp_path)


def test_unwritable_data_dir_is_an_error(tmp_path, builder):
    builder()
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"cannot write to .*set data\.path to another"
    ):
        tfds_build.build("hand_drawn", tmp_path / "file" / "tfds")
