"""The image cache: its content, damage, interruption and errors.

Run as a script, this file prepares a cache; tests kill the process.
"""

import collections
import contextlib
import errno
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cra_jax.datasets import sources
from cra_jax.input import decoding, image_cache
from cra_jax.input.records import Record
from cra_jax.runtime import progress

ROOT = Path(__file__).resolve().parents[2]
SIDE = 12
Disk = collections.namedtuple("Disk", "total used free")


def image(i: int, short_side_px: int) -> np.ndarray:
    """Makes a different image for each i; few have the same size."""
    size = (short_side_px + i % 5, short_side_px) if i % 2 else (short_side_px, 17 + i)
    return np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)


def read(log: Path, i: int, short_side_px: int) -> np.ndarray:
    """Returns image i and records the read in a file shared by processes."""
    with open(log, "a") as file:
        file.write(f"{i}\n")
    return image(i, short_side_px)


def make(folder: Path, count: int = 30, reader=read) -> list[Record]:
    log = folder / "reads.txt"
    return [
        Record(f"{i}.jpg", i % 3, functools.partial(reader, log, i), f"v{i}")
        for i in range(count)
    ]


def reads(folder: Path) -> int:
    log = folder / "reads.txt"
    count = len(log.read_text().split()) if log.exists() else 0
    log.unlink(missing_ok=True)
    return count


def prepare(folder: Path, records=None, **changes) -> image_cache.ImageCache:
    arguments = {
        "short_side_px": SIDE,
        "cache_dir": folder / "cache",
        "name": "birds_train",
        "progress": False,
    }
    records = make(folder) if records is None else records
    return image_cache.prepare(records, **(arguments | changes))


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted((folder / "cache").glob(f"*{suffix}"))


def assert_holds(opened, count: int = 30, side: int = SIDE) -> None:
    assert len(opened) == count
    for i in range(count):
        np.testing.assert_array_equal(opened[i], image(i, side))


@pytest.fixture
def start(tmp_path):
    """Prepares the image cache in a process that ends or waits at a given point."""
    with contextlib.ExitStack() as stack:

        def start_process(how: str) -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, __file__, str(tmp_path), how],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start_process


def main(folder: Path, how: str) -> None:
    """Runs in the process of `start`. Odd images are not in the size estimate."""

    def kill_self():
        os.kill(os.getpid(), signal.SIGKILL)

    def reader(log, i, short_side_px):
        if how == f"die at image {i}":
            kill_self()
        if how == f"wait at image {i}":
            wait_until(lambda: (folder / "go").exists())
        return read(log, i, short_side_px)

    real, calls = os.replace, []

    def replace(one, two):
        calls.append(two)
        if how == f"die before rename {len(calls)}":
            kill_self()
        real(one, two)

    os.replace = replace
    prepare(folder, make(folder, reader=reader), workers=2, progress=True)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)


def test_cache_has_every_image_and_reads_it_once(tmp_path):
    first = prepare(tmp_path)
    assert_holds(first)
    assert first.shapes.tolist() == [list(image(i, SIDE).shape[:2]) for i in range(30)]
    assert [record.name for record in first.records] == [f"{i}.jpg" for i in range(30)]
    assert first.skipped == {}
    assert reads(tmp_path) == 30  # the sample of the size estimate is read once, too
    again = prepare(tmp_path)
    assert_holds(again)
    assert reads(tmp_path) == 0
    assert again.path == first.path
    assert not files(tmp_path, ".partial")


def test_cached_images_are_read_only_views(tmp_path):
    opened = prepare(tmp_path)
    assert opened[3].flags.owndata is False
    with pytest.raises(ValueError, match="read-only"):
        opened[3][0, 0] = 0
    np.testing.assert_array_equal(opened[-1], image(29, SIDE))
    with pytest.raises(IndexError):
        opened[30]


@pytest.mark.parametrize("workers", [1, 4])
def test_cache_does_not_depend_on_workers(tmp_path, workers):
    one = prepare(tmp_path / "a", make(tmp_path), workers=workers)
    other = prepare(tmp_path / "b", make(tmp_path), workers=2)
    assert one.path.read_bytes() == other.path.read_bytes()
    assert one.path.name == other.path.name


@pytest.mark.parametrize("how", ["stamp", "name", "order", "size", "count"])
def test_changed_records_or_size_make_another_cache(tmp_path, how):
    old = prepare(tmp_path)
    before = old.path.read_bytes()
    records, side = make(tmp_path), SIDE
    if how == "stamp":
        records[7] = Record("7.jpg", 1, functools.partial(image, 99), "changed")
    elif how == "name":
        records[7] = Record("x.jpg", 1, records[7].read, "v7")
    elif how == "order":
        records.reverse()
    elif how == "size":
        side = 16
    else:
        records.pop()
    new = prepare(tmp_path, records, short_side_px=side)
    assert new.path != old.path
    assert len(new) == len(records)
    for i, record in enumerate(records):
        np.testing.assert_array_equal(new[i], record.read(side))
    assert old.path.read_bytes() == before


def test_changed_labels_make_no_other_cache(tmp_path):
    prepare(tmp_path)
    reads(tmp_path)
    relabelled = [Record(r.name, 2 - r.label, r.read, r.stamp) for r in make(tmp_path)]
    assert prepare(tmp_path, relabelled).records[0].label == 2
    assert reads(tmp_path) == 0


@pytest.mark.parametrize(
    "how", ["die at image 21", "die before rename 1", "die before rename 2"]
)
def test_killed_process_leaves_no_cache(tmp_path, start, how):
    killed = start(how)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert reads(tmp_path) > 15  # more than the sample
    assert not files(tmp_path, ".json")
    assert_holds(prepare(tmp_path))
    assert reads(tmp_path) >= 30
    whole = prepare(tmp_path / "uninterrupted", make(tmp_path))
    assert prepare(tmp_path).path.read_bytes() == whole.path.read_bytes()
    assert not files(tmp_path, ".partial")


def test_second_process_waits_for_the_first(tmp_path, start):
    first = start("wait at image 21")
    wait_until(lambda: files(tmp_path, ".partial"))
    second = start("wait at image 21")
    assert second.stderr is not None
    assert "waiting for another process that uses it" in second.stderr.readline()
    (tmp_path / "go").touch()
    for process in (first, second):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert reads(tmp_path) == 30  # by one process
    assert_holds(prepare(tmp_path))
    assert reads(tmp_path) == 0


@pytest.mark.parametrize(
    "damage",
    ["pixels cut", "pixels gone", "index cut", "index changed", "not an index"],
)
def test_damaged_cache_is_prepared_again(tmp_path, capsys, damage):
    opened = prepare(tmp_path)
    index = opened.path.with_suffix(".json")
    text = index.read_text()
    if damage == "pixels cut":
        os.truncate(opened.path, opened.path.stat().st_size - 1)
    elif damage == "pixels gone":
        opened.path.unlink()
    elif damage == "index cut":
        index.write_text(text[: len(text) // 2])
    elif damage == "index changed":  # two shapes swapped: the file size is the same
        changed = json.loads(text)
        changed["shapes"][0], changed["shapes"][1] = changed["shapes"][1::-1]
        assert changed != json.loads(text)
        index.write_text(json.dumps(changed))
    else:
        index.write_text("[1, 2]")
    assert_holds(prepare(tmp_path, progress=True))
    errors = capsys.readouterr().err
    assert errors.count("is damaged or truncated") == 1
    assert "older caches" not in errors  # the damaged one is not older
    reads(tmp_path)
    assert_holds(prepare(tmp_path))
    assert reads(tmp_path) == 0


def _flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_image_with_a_flipped_bit_is_reported_and_read_from_its_file(tmp_path, capsys):
    opened = prepare(tmp_path)
    position = 3 * int(opened.shapes[:4].prod(axis=1).sum()) + 5  # of the fifth image
    _flip_bit(opened.path, position)
    reads(tmp_path)
    damaged = prepare(tmp_path)
    for _ in range(2):
        assert_holds(damaged)
    errors = capsys.readouterr().err
    assert (
        errors.count("warning: ")
        == errors.count("the next start makes the image cache")
        == 1
    )
    assert f"4.jpg in {opened.path} is damaged" in errors
    assert reads(tmp_path) == 2  # one image, at each access
    assert_holds(prepare(tmp_path))
    assert reads(tmp_path) == 30
    assert not capsys.readouterr().err


def test_checksum_of_an_image_is_computed_once(tmp_path, monkeypatch):
    opened = prepare(tmp_path)
    calls = []
    crc32 = image_cache.zlib.crc32
    monkeypatch.setattr(
        image_cache.zlib, "crc32", lambda x: calls.append(1) or crc32(x)
    )
    for _ in range(3):
        assert_holds(opened)
    assert len(calls) == 30


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        (lambda log, i, side: image(i + 1, side), "original has changed: remove"),
        (
            lambda log, i, side: Image.open(log / "x"),
            "cannot be read: 0.jpg: .*Not a dir",
        ),
    ],
)
def test_flipped_bit_without_the_original_file_is_an_error(tmp_path, reader, message):
    opened = prepare(tmp_path)
    _flip_bit(opened.path, 0)
    damaged = prepare(tmp_path, make(tmp_path, reader=reader))
    with pytest.raises(ValueError, match=f"0.jpg in .* is damaged.*{message}"):
        damaged[0]
    assert opened.path.with_suffix(".json").exists()  # the cache is kept
    np.testing.assert_array_equal(opened[1], image(1, SIDE))


def test_too_little_disk_space_is_an_error_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9, 20_000))
    with pytest.raises(ValueError, match=r"30 images takes about .* of 0.00 GB free"):
        prepare(tmp_path)
    assert reads(tmp_path) <= 16
    assert not files(tmp_path, ".pixels")


def test_estimated_size_and_older_caches_are_printed(tmp_path, capsys, monkeypatch):
    usage = Disk(10**12, 0, 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    records = [
        Record(f"{i}", 0, lambda s: np.zeros((s, 2 * s, 3), np.uint8), "")
        for i in range(40)
    ]
    prepare(tmp_path, records, short_side_px=300, progress=True)
    errors = capsys.readouterr().err
    assert "caching 40 images, about 0.02 GB of 1000.00 GB free in" in errors
    assert "40 of 40" in errors
    prepare(tmp_path, records, short_side_px=310, progress=True)
    assert "1 older caches" in capsys.readouterr().err


def test_disk_that_becomes_full_is_an_error(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        ValueError, match=r"No space left .*: free some space, or choose"
    ):
        prepare(tmp_path)
    assert not files(tmp_path, ".partial")
    monkeypatch.undo()
    assert_holds(prepare(tmp_path))


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    """Checks the order of the calls, as a power failure cannot be tested."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        calls.append("folder" if os.path.isdir(f"/dev/fd/{descriptor}") else "file")
        fsync(descriptor)

    def logged_replace(one, two):
        calls.append(Path(two).suffix)
        replace(one, two)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    prepare(tmp_path)
    assert calls == ["file", ".pixels", "folder", "file", ".json", "folder"]


def test_progress_is_lines_without_a_terminal(tmp_path, capsys, monkeypatch):
    prepare(tmp_path, progress=True)
    assert len(capsys.readouterr().err.splitlines()) == 2  # at the start and at the end
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0)
    prepare(tmp_path, progress=True, short_side_px=13)
    lines = capsys.readouterr().err.splitlines()[-30:]
    for i, line in enumerate(lines, 1):
        match = rf"birds_train: {i} of 30 images, [\d,]+ images/s, \d+ s left"
        assert re.fullmatch(match, line), line


def test_progress_is_a_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    prepare(tmp_path, progress=True)
    assert "30/30" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_progress_false_prints_nothing(tmp_path, capsys):
    prepare(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_unwritable_cache_dir_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="make it writable"):
        prepare(tmp_path, cache_dir=tmp_path / "file" / "cache")


def test_cache_in_a_read_only_directory_can_be_used(tmp_path):
    prepare(tmp_path)
    cache = tmp_path / "cache"
    cache.chmod(0o555)
    if os.access(cache, os.W_OK):
        pytest.skip("as root, permissions have no effect")
    try:
        assert_holds(prepare(tmp_path))
        with pytest.raises(ValueError, match=r"Permission denied.*make it writable"):
            prepare(tmp_path, short_side_px=16)
    finally:
        cache.chmod(0o755)


def make_files(folder: Path, *bad: int, count: int = 30) -> list[Record]:
    """Makes records of files; the files `bad` are no images."""
    records = []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.fromarray(image(i, SIDE)).save(path)
        if i in bad:
            path.write_bytes(b"<html>not found</html>")
        reader = functools.partial(decoding.read, path, name=path.name)
        stamp = str(path.stat().st_size)
        records.append(Record(path.name, 0, reader, stamp))
    return records


def test_unreadable_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 30 images cannot be read:\n  7\.png: "):
        prepare(tmp_path, make_files(tmp_path, 7))
    assert not files(tmp_path, ".pixels")
    assert not files(tmp_path, ".partial")
    assert_holds(prepare(tmp_path, make_files(tmp_path)))


def test_many_unreadable_images_are_an_error_with_ten_names(tmp_path):
    with pytest.raises(ValueError, match="12 of 30") as error:
        prepare(tmp_path, make_files(tmp_path, *range(12)))
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:11]] == [
        f"  {i}.png" for i in range(10)
    ]
    assert lines[11] == "  and 2 more"


def test_skip_unreadable_skips_images_and_reports_them_at_each_start(tmp_path, capsys):
    records = make_files(tmp_path, 0, 7)
    for _ in range(2):
        opened = prepare(tmp_path, records, skip_unreadable=True, progress=True)
        assert list(opened.skipped) == ["0.png", "7.png"]
        assert "2 of 30 images cannot be read" in capsys.readouterr().err
        names = [f"{i}.png" for i in range(30) if i not in (0, 7)]
        assert [record.name for record in opened.records] == names
        assert len(opened) == len(opened.shapes) == 28
        for i, record in enumerate(opened.records):
            np.testing.assert_array_equal(opened[i], record.read(SIDE))
    with pytest.raises(ValueError, match="2 of 30"):  # by default, all are needed
        prepare(tmp_path, records)


def test_skip_unreadable_with_no_readable_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="4 of 4"):
        prepare(
            tmp_path, make_files(tmp_path, *range(4), count=4), skip_unreadable=True
        )


def test_other_exceptions_are_raised_unchanged(tmp_path):
    def broken(short_side_px):
        raise ZeroDivisionError

    records = [Record("a", 0, broken, "")]
    with pytest.raises(ZeroDivisionError):
        prepare(tmp_path, records, skip_unreadable=True)
    grey = [Record("a", 0, lambda s: np.zeros((s, s), np.uint8), "")]
    with pytest.raises(TypeError, match="a was read as uint8"):
        prepare(tmp_path, grey)


def test_threads_end_after_an_error(tmp_path, monkeypatch):
    def replace(one, two):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ValueError, match="Input/output error"):
        prepare(tmp_path, workers=3)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"records": []}, "no images to cache for 'birds_train'"),
        ({"name": "../train"}, "use only letters, digits"),
        ({"name": ""}, "use only letters, digits"),
        ({"short_side_px": 0}, "data.short_side_px is 0"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_wrong_arguments_are_errors(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        prepare(tmp_path, **changes)


def test_streamed_images_are_decoded_at_each_access(tmp_path):
    streamed = image_cache.StreamedImages(make(tmp_path), SIDE)
    assert_holds(streamed)
    assert_holds(streamed)
    assert reads(tmp_path) == 60
    assert not hasattr(streamed, "shapes")
    assert streamed.skipped == {}
    with pytest.raises(ValueError, match=r"unreadable image: 1\.png"):
        image_cache.StreamedImages(make_files(tmp_path, 1, count=2), SIDE)[1]


def same_named_files(folder: Path, seed: int) -> list[Record]:
    """Makes uncompressed files with the same names, sizes and times for all seeds."""
    for i in range(4):
        file = folder / ("train" if i < 2 else "test") / "ab"[i % 2] / "0.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([seed, i]).integers(0, 256, (20, 20, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(file)
        os.utime(file, (1e9, 1e9))
    return list(sources.load("folder", folder).splits["train"])


def assert_serves(opened: image_cache.ImageCache, records: list[Record]) -> None:
    for i, record in enumerate(records):
        np.testing.assert_array_equal(opened[i], record.read(SIDE))


def test_datasets_that_share_a_directory_have_their_own_pixels(tmp_path):
    for seed, folder in ((0, "one"), (1, "two"), (0, "one")):
        records = same_named_files(tmp_path / folder, seed)
        assert_serves(prepare(tmp_path, records), records)


def test_replaced_image_of_the_same_size_and_time_is_cached_again(tmp_path, capsys):
    prepare(tmp_path, same_named_files(tmp_path / "data", 0))
    records = same_named_files(tmp_path / "data", 1)
    opened = prepare(tmp_path, records, progress=True)
    assert_serves(opened, records)
    assert (
        "2 of 2 images are others now, such as train/a/0.bmp" in capsys.readouterr()[1]
    )


def test_copied_dataset_uses_its_copied_cache(tmp_path):
    prepare(tmp_path, same_named_files(tmp_path / "data", 0))
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    records = list(sources.load("folder", tmp_path / "copy").splits["train"])
    written = files(tmp_path, ".pixels")[0].stat()
    for _ in range(2):
        assert_serves(prepare(tmp_path, records), records)
    assert files(tmp_path, ".pixels")[0].stat().st_ino == written.st_ino


@pytest.mark.parametrize("streamed", [False, True])
def test_long_and_dark_images_are_reported_at_each_start(tmp_path, capsys, streamed):
    for i, (size, value) in enumerate(
        [((400, 20), 200), ((160, 20), 200), ((20, 20), 9)]
    ):
        for split in ("train", "test"):
            file = tmp_path / split / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", size, value).save(file)
    records = sources.load("folder", tmp_path).splits["train"]
    for _ in range(2):
        if streamed:
            images = image_cache.StreamedImages(records, SIDE)
            for i in range(len(images)):
                images[i]
        else:
            prepare(tmp_path, records, progress=True)
        errors = capsys.readouterr().err
        assert errors.count("longer than 8 to 1: their ends are cropped") == 1
        assert errors.count("no value is above 64 of 255") == 1
        assert "train/a/0.png" in errors
        assert "train/a/2.png" in errors
        assert "train/b/1.png" not in errors
        assert ("1 of 3 images" in errors) is not streamed


def test_default_cache_dir_is_in_the_dataset_or_in_the_users_cache(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert image_cache.default_cache_dir(tmp_path) == tmp_path / ".cra_jax_cache"
    (tmp_path / "data").mkdir(mode=0o555)
    for root in (None, tmp_path / "missing", tmp_path / "data"):
        assert image_cache.default_cache_dir(root) == tmp_path / "xdg" / "cra_jax"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert image_cache.default_cache_dir(tmp_path) == tmp_path / "xdg" / "cra_jax"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert image_cache.default_cache_dir(None) == Path.home() / ".cache" / "cra_jax"
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_cache_of_real_photographs_equals_the_decoded_images(shared_data, tmp_path):
    dataset = sources.load("cub", shared_data / "cub_10" / "CUB_200_2011")
    records = dataset.splits["test"][::10]
    opened = prepare(tmp_path, records, short_side_px=128)
    assert (opened.shapes.min(axis=1) == 128).all()
    for i, record in enumerate(records):
        np.testing.assert_array_equal(opened[i], record.read(128))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
