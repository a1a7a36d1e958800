"""Tests of full and read-only disks, clocks, and deleted datasets."""

import contextlib
import errno
import shutil
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from cra_jax.runtime import run_directory, training_log
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build, train
from tests.helpers import tiny_config

pytestmark = [
    # of threads of orbax and tensorboard, for which the disk is full as well
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"SKIPPED, NOT PASSED: no right to mount ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_it_resumes(tmp_path, note):
    config = tiny_config.config(
        tmp_path / "images",
        **{"model.kind": "baseline", "train.epochs": 2, "checkpoint.every_steps": 1},
    )
    whole = tmp_path / "whole"
    train.run(config, whole)
    size = sum(p.stat().st_size for p in (whole / "checkpoints" / "12").rglob("*"))
    with mounted(tmp_path / "small", f"size={size * 5 // 2 // 1024}k") as disk:
        with pytest.raises(ValueError, match="No space left") as caught:
            train.run(config, disk / "run")
        assert "run the same command again, which resumes from" in str(caught.value)
        with Checkpoints(disk / "run" / "checkpoints", writable=False) as checkpoints:
            step = checkpoints.latest_step()
            assert step is not None
            checkpoints.verify(step)
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        train.run(config, disk / "run")
        arrays = []
        for folder in (disk / "run", whole):
            with Checkpoints(folder / "checkpoints", writable=False) as checkpoints:
                arrays.append(checkpoints.restore(12, checkpoints.shapes(12)))
    jax.tree.map(assert_array_equal, *arrays)
    note(
        "the disk is full while training",
        "an error; with free space, the same command resumes to bit-identical arrays",
    )


def test_a_full_disk_is_an_error_and_not_a_wait(tmp_path, monkeypatch, note):
    """Every number fails to be written: none may wait for a place in a queue."""
    (tmp_path / "tensorboard").mkdir()
    numbers = {"loss": 1.0, "top1": 0.5, "images_per_second": 9.0, "eta_seconds": 75.0}
    opened = open

    def open_full(path, *arguments, **options):
        is_event_file = "tfevents" in str(path)
        return opened("/dev/full" if is_event_file else path, *arguments, **options)

    monkeypatch.setattr("builtins.open", open_full)

    def log_for_long():
        with training_log.Log(tmp_path, first_step=0, total_steps=999) as log:
            for step in range(999):
                log.train(step=step, epoch=1, numbers=numbers)

    with pytest.raises(OSError, match="No space left"):
        log_for_long()
    assert len(run_directory.read_metrics(tmp_path)) < 100
    note(
        "the disk is full for TensorBoard's event files",
        "an error; no thread and no queue waits",
    )


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_file_of_a_checkpoint_cannot_be_read(tmp_path, note):
    """The first byte of /proc/self/mem cannot be read: EIO, as of a failing disk."""
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": np.full(3, step)}, {})
    refused, needless = set(), "the file is not needed: training resumes from it"
    for path in _files(tmp_path / "c" / "2"):
        kept = path.rename(tmp_path / "kept")
        path.symlink_to("/proc/self/mem")
        with Checkpoints(tmp_path / "c") as checkpoints:
            try:
                assert checkpoints.move_damaged(pytest.fail) == 2
                outcome = needless
            except OSError as error:
                refused.add((path.name, error.errno, error.filename == str(path)))
                outcome = "an error that names the file; no file is moved"
        note("a file of the newest checkpoint cannot be read (EIO)", outcome)
        path.unlink()
        kept.rename(path)
    names = {name for name, *_ in refused}
    assert {"metadata", "_METADATA", "manifest.ocdbt"} <= names
    assert {tuple(found) for _, *found in refused} == {(errno.EIO, True)}
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_a_read_only_run_directory(tmp_path, note):
    with (
        mounted(tmp_path / "disk", "ro") as disk,
        pytest.raises(
            ValueError,
            match=r"Read-only file system: .*: make it readable and writable",
        ),
        run_directory.locked(disk / "run"),
    ):
        pytest.fail("the run directory was locked")
    note("the run directory is read-only", "an error before training")


def test_a_clock_that_goes_backwards(tmp_path, monkeypatch, note):
    """Checkpoints are kept and chosen by step, not by time."""
    real, back = time.time, 0
    monkeypatch.setattr(time, "time", lambda: real() - back)
    monkeypatch.setattr(time, "time_ns", lambda: int((real() - back) * 1e9))
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in range(1, 6):
            back += 100_000
            checkpoints.save(step, {"x": np.full(3, step)}, {}, metric=float(step == 2))
        checkpoints.wait()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.latest_step() == 5
        assert checkpoints.best_step() == 2
    note(
        "the clock goes back by a day at each save",
        "the same checkpoints are kept and found",
    )


def test_a_deleted_dataset(tmp_path, note):
    from PIL import Image

    for split, name, count in (("train", "a", 8), ("train", "b", 8), ("test", "a", 2)):
        folder = tmp_path / "set" / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 40), (i, 0, 0)).save(folder / f"{i}.png")
    changes = {"data.source": "folder", "data.path": str(tmp_path / "set")}
    changes |= {"data.prepare": False, "train.epochs": 1, "model.kind": "baseline"}
    config = tiny_config.config(tmp_path / "cache", **changes)
    listed = build.load_dataset(config)
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(ValueError, match="there is no such folder"):
        train.run(config, tmp_path / "run")
    streamed = build.open_split(config, listed, "train")
    with pytest.raises(ValueError, match=r"unreadable image: .*0.png"):
        streamed.images[0]
    note(
        "the dataset directory was deleted",
        "an error that names the directory or the image",
    )
