"""An image cache is whole or not there, and holds what its records say.

Run as a script, this file prepares a cache in a process of its own, to be killed.
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
    """An image that no other has, of a size that few others have."""
    size = (short_side_px + i % 5, short_side_px) if i % 2 else (short_side_px, 17 + i)
    return np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)


def read(log: Path, i: int, short_side_px: int) -> np.ndarray:
    """Reads image i, and notes it in a file that other processes can see."""
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
    """Prepares the store in another process, told where to die or to wait."""
    with contextlib.ExitStack() as stack:

        def begin(how: str) -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, __file__, str(tmp_path), how],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield begin


def main(folder: Path, how: str) -> None:
    """What `start` starts. Odd images are not in the sample for the estimate."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def reader(log, i, short_side_px):
        if how == f"die at image {i}":
            die()
        if how == f"wait at image {i}":
            wait_for(lambda: (folder / "go").exists())
        return read(log, i, short_side_px)

    real, calls = os.replace, []

    def replace(one, two):
        calls.append(two)
        if how == f"die before rename {len(calls)}":
            die()
        real(one, two)

    os.replace = replace
    prepare(folder, make(folder, reader=reader), workers=2, progress=True)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)


def test_holds_every_image_once_decoded(tmp_path):
    first = prepare(tmp_path)
    assert_holds(first)
    assert first.shapes.tolist() == [list(image(i, SIDE).shape[:2]) for i in range(30)]
    assert [record.name for record in first.records] == [f"{i}.jpg" for i in range(30)]
    assert first.skipped == {}
    assert reads(tmp_path) == 30  # the sample that the size is judged by, too: once
    again = prepare(tmp_path)
    assert_holds(again)
    assert reads(tmp_path) == 0
    assert again.path == first.path
    assert not files(tmp_path, ".partial")


def test_images_are_views_that_cannot_be_written(tmp_path):
    opened = prepare(tmp_path)
    assert opened[3].flags.owndata is False
    with pytest.raises(ValueError, match="read-only"):
        opened[3][0, 0] = 0
    np.testing.assert_array_equal(opened[-1], image(29, SIDE))
    with pytest.raises(IndexError):
        opened[30]


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_no_byte(tmp_path, workers):
    here = prepare(tmp_path / "a", make(tmp_path), workers=workers)
    there = prepare(tmp_path / "b", make(tmp_path), workers=2)
    assert here.path.read_bytes() == there.path.read_bytes()
    assert here.path.name == there.path.name


@pytest.mark.parametrize("how", ["stamp", "name", "order", "size", "count"])
def test_a_change_makes_another_store(tmp_path, how):
    old = prepare(tmp_path)
    before = old.path.read_bytes()
    records, side = make(tmp_path), SIDE
    if how == "stamp":
        records[7] = Record("7.jpg", 1, functools.partial(image, 99), "mended since")
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


def test_labels_are_no_part_of_the_pixels(tmp_path):
    prepare(tmp_path)
    reads(tmp_path)
    relabelled = [Record(r.name, 2 - r.label, r.read, r.stamp) for r in make(tmp_path)]
    assert prepare(tmp_path, relabelled).records[0].label == 2
    assert reads(tmp_path) == 0


@pytest.mark.parametrize(
    "how", ["die at image 21", "die before rename 1", "die before rename 2"]
)
def test_killed_in_the_middle(tmp_path, start, how):
    killed = start(how)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert reads(tmp_path) > 15  # beyond the sample
    assert not files(tmp_path, ".json")
    assert_holds(prepare(tmp_path))
    assert reads(tmp_path) >= 30
    whole = prepare(tmp_path / "untouched", make(tmp_path))
    assert prepare(tmp_path).path.read_bytes() == whole.path.read_bytes()
    assert not files(tmp_path, ".partial")


def test_two_processes_at_once(tmp_path, start):
    first = start("wait at image 21")
    wait_for(lambda: files(tmp_path, ".partial"))
    second = start("wait at image 21")
    assert second.stderr is not None
    assert "waiting for another process that uses it" in second.stderr.readline()
    (tmp_path / "go").touch()
    for process in (first, second):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert reads(tmp_path) == 30  # by one of them
    assert_holds(prepare(tmp_path))
    assert reads(tmp_path) == 0


@pytest.mark.parametrize(
    "damage",
    ["pixels cut", "pixels gone", "index cut", "index changed", "not an index"],
)
def test_damage_is_noticed_and_mended(tmp_path, capsys, damage):
    opened = prepare(tmp_path)
    index = opened.path.with_suffix(".json")
    text = index.read_text()
    if damage == "pixels cut":
        os.truncate(opened.path, opened.path.stat().st_size - 1)
    elif damage == "pixels gone":
        opened.path.unlink()
    elif damage == "index cut":
        index.write_text(text[: len(text) // 2])
    elif damage == "index changed":  # two shapes exchanged: the size is as before
        changed = json.loads(text)
        changed["shapes"][0], changed["shapes"][1] = changed["shapes"][1::-1]
        assert changed != json.loads(text)
        index.write_text(json.dumps(changed))
    else:
        index.write_text("[1, 2]")
    assert_holds(prepare(tmp_path, progress=True))
    errors = capsys.readouterr().err
    assert errors.count("is damaged or truncated") == 1
    assert "older caches" not in errors  # it is not another one than itself
    reads(tmp_path)
    assert_holds(prepare(tmp_path))
    assert reads(tmp_path) == 0


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_said_and_the_image_read_anew(tmp_path, capsys):
    opened = prepare(tmp_path)
    place = 3 * int(opened.shapes[:4].prod(axis=1).sum()) + 5  # of the fifth image
    _flip(opened.path, place)
    reads(tmp_path)
    damaged = prepare(tmp_path)
    for _ in range(2):
        assert_holds(damaged)
    said = capsys.readouterr().err
    assert (
        said.count("warning: ")
        == said.count("the next start makes the image cache")
        == 1
    )
    assert f"4.jpg in {opened.path} is damaged" in said
    assert reads(tmp_path) == 2  # that image, at each access
    assert_holds(prepare(tmp_path))
    assert reads(tmp_path) == 30
    assert not capsys.readouterr().err


def test_an_image_is_looked_at_once(tmp_path, monkeypatch):
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
def test_a_flipped_bit_without_its_original_is_an_error(tmp_path, reader, message):
    opened = prepare(tmp_path)
    _flip(opened.path, 0)
    damaged = prepare(tmp_path, make(tmp_path, reader=reader))
    with pytest.raises(ValueError, match=f"0.jpg in .* is damaged.*{message}"):
        damaged[0]
    assert opened.path.with_suffix(".json").exists()  # nothing is given up
    np.testing.assert_array_equal(opened[1], image(1, SIDE))


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9, 20_000))
    with pytest.raises(ValueError, match=r"30 images takes about .* of 0.00 GB free"):
        prepare(tmp_path)
    assert reads(tmp_path) <= 16
    assert not files(tmp_path, ".pixels")


def test_the_estimate_is_close(tmp_path, capsys, monkeypatch):
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


def test_a_disk_that_fills_up_on_the_way(tmp_path, monkeypatch):
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


def test_nothing_takes_its_name_before_it_is_on_disk(tmp_path, monkeypatch):
    """A loss of power cannot be tested here; the order of the calls can."""
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


def test_progress_is_lines_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    prepare(tmp_path, progress=True)
    assert len(capsys.readouterr().err.splitlines()) == 2  # at the start, at the end
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


def test_silence_when_asked(tmp_path, capsys):
    prepare(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="make it writable"):
        prepare(tmp_path, cache_dir=tmp_path / "file" / "cache")


def test_a_read_only_folder_serves_what_it_holds(tmp_path):
    prepare(tmp_path)
    cache = tmp_path / "cache"
    cache.chmod(0o555)
    if os.access(cache, os.W_OK):
        pytest.skip("this user, root, may write anywhere")
    try:
        assert_holds(prepare(tmp_path))
        with pytest.raises(ValueError, match=r"Permission denied.*make it writable"):
            prepare(tmp_path, short_side_px=16)
    finally:
        cache.chmod(0o755)


def spoil(folder: Path, *bad: int, count: int = 30) -> list[Record]:
    """Records of files, some of which are no images."""
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


def test_one_bad_image_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 30 images cannot be read:\n  7\.png: "):
        prepare(tmp_path, spoil(tmp_path, 7))
    assert not files(tmp_path, ".pixels")
    assert not files(tmp_path, ".partial")
    assert_holds(prepare(tmp_path, spoil(tmp_path)))


def test_many_bad_images_are_counted(tmp_path):
    with pytest.raises(ValueError, match="12 of 30") as error:
        prepare(tmp_path, spoil(tmp_path, *range(12)))
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:11]] == [
        f"  {i}.png" for i in range(10)
    ]
    assert lines[11] == "  and 2 more"


def test_bad_images_are_left_out_when_asked_and_said_each_time(tmp_path, capsys):
    records = spoil(tmp_path, 0, 7)
    for _ in range(2):
        opened = prepare(tmp_path, records, skip_unreadable=True, progress=True)
        assert list(opened.skipped) == ["0.png", "7.png"]
        assert "2 of 30 images cannot be read" in capsys.readouterr().err
        names = [f"{i}.png" for i in range(30) if i not in (0, 7)]
        assert [record.name for record in opened.records] == names
        assert len(opened) == len(opened.shapes) == 28
        for i, record in enumerate(opened.records):
            np.testing.assert_array_equal(opened[i], record.read(SIDE))
    with pytest.raises(ValueError, match="2 of 30"):  # others still want all of them
        prepare(tmp_path, records)


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(ValueError, match="4 of 4"):
        prepare(tmp_path, spoil(tmp_path, *range(4), count=4), skip_unreadable=True)


def test_an_error_of_the_program_is_no_bad_image(tmp_path):
    def broken(short_side_px):
        raise ZeroDivisionError

    records = [Record("a", 0, broken, "")]
    with pytest.raises(ZeroDivisionError):
        prepare(tmp_path, records, skip_unreadable=True)
    grey = [Record("a", 0, lambda s: np.zeros((s, s), np.uint8), "")]
    with pytest.raises(TypeError, match="a was read as uint8"):
        prepare(tmp_path, grey)


def test_threads_end_when_it_fails(tmp_path, monkeypatch):
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
def test_bad_arguments_are_named(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        prepare(tmp_path, **changes)


def test_streamed_decodes_at_each_access(tmp_path):
    streamed = image_cache.StreamedImages(make(tmp_path), SIDE)
    assert_holds(streamed)
    assert_holds(streamed)
    assert reads(tmp_path) == 60
    assert not hasattr(streamed, "shapes")
    assert streamed.skipped == {}
    with pytest.raises(ValueError, match=r"unreadable image: 1\.png"):
        image_cache.StreamedImages(spoil(tmp_path, 1, count=2), SIDE)[1]


def test_cache_goes_into_the_data_or_to_the_user(tmp_path, monkeypatch):
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


def test_real_photographs(shared_data, tmp_path):
    dataset = sources.load("cub", shared_data / "cub_10" / "CUB_200_2011")
    records = dataset.splits["test"][::10]
    opened = prepare(tmp_path, records, short_side_px=128)
    assert (opened.shapes.min(axis=1) == 128).all()
    for i, record in enumerate(records):
        np.testing.assert_array_equal(opened[i], record.read(128))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
