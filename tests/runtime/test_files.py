"""Atomic writes and locks; test_image_cache.py checks the order of fsync calls."""

import errno
import fcntl
import os
import re
import threading
from pathlib import Path

import pytest

from cra_jax.runtime import files


@pytest.mark.parametrize("fsync", [True, False])
def test_file_is_replaced_at_the_end_of_the_block(fsync, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.written_atomically(path, fsync=fsync) as file:
        file.write(b"new")
        file.flush()
        assert files.partial_path(path).read_text() == "new"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_keeps_the_old_file_and_removes_the_partial_file(error, tmp_path):
    path = tmp_path / "a.json"
    files.write_atomically(path, "Größe\n")

    def fail():
        with files.written_atomically(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == "Größe\n".encode()
    assert os.listdir(tmp_path) == ["a.json"]


def test_mode_of_a_written_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_second_lock_is_an_error_or_waits(tmp_path, capsys):
    lock = tmp_path / "lock"
    holder = rf"process {os.getpid()} on \S+"

    def lock_or_fail():
        return files.locked(lock, "the run", instead="come back later")

    def wait():
        with files.locked(lock, "the run"):
            pass

    with lock_or_fail():
        message = rf"the run is in use by another process \({holder}\): come back later"
        with pytest.raises(ValueError, match=message), lock_or_fail():
            pass
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert re.fullmatch(f"{holder}\n", lock.read_text())
    thread.join()
    waiting = "the run: waiting for another process that uses it\n"
    assert capsys.readouterr().err == waiting
    with lock_or_fail():
        pass


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path, begun, go_on = tmp_path / "a", threading.Event(), threading.Event()

    def write_slowly():
        with files.written_atomically(path) as file:
            file.write(b"one")
            begun.set()
            go_on.wait()
            file.write(b"one")

    first = threading.Thread(target=write_slowly)
    first.start()
    begun.wait()
    second = threading.Thread(target=files.write_atomically, args=(path, "two"))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert not path.exists()
    go_on.set()
    first.join()
    second.join()
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["a"]


def test_links_are_not_followed_when_writing(tmp_path):
    """A stranger's run directory may have links under the names of these files."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "lock").symlink_to(precious)
    files.partial_path(tmp_path / "a").symlink_to(precious)
    lock = files.locked(tmp_path / "lock", "the run", instead="wait")
    with pytest.raises(ValueError, match="lock is a link: remove it"), lock:
        pass
    with pytest.raises(ValueError, match="is a link: remove it"):
        files.write_atomically(tmp_path / "a", "new")
    assert precious.read_text() == "kept"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_is_a_warning(tmp_path, capsys, monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.locked(tmp_path / "lock", "the run", instead="wait"):
        files.write_atomically(tmp_path / "a", "new")
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: the file system of {tmp_path} has no file lo")
    assert "start only one" in warning
    assert (tmp_path / "a").read_text() == "new"


def test_other_errors_of_locks_are_errors(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "of a disk")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="of a disk"), files.locked(tmp_path / "l", "run"):
        pass


def test_text_that_is_no_utf_8_is_escaped(tmp_path):
    files.write_atomically(tmp_path / "a", "gr\xfcn \udcff.png")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "gr\xfcn \\udcff.png"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "make it readable and writable"),
        (errno.EMFILE, "raise the limit of open files"),
        (errno.EIO, "check the file, its disk"),
    ],
)
def test_advice_fits_the_error(code, advice):
    text = os.strerror(code)
    assert files.advice(OSError(code, text)).startswith(advice)
    assert files.advice(ValueError(f"of tensorstore: {text}")).startswith(advice)


def test_paths_are_on_this_machine(monkeypatch):
    monkeypatch.setenv("HOME", "/home/auk")
    assert files.local_path("~/runs/a", "--workdir") == Path("/home/auk/runs/a")
    for path in ("~no-such-user.png", "runs/a:b", "a//b", "://"):
        assert files.local_path(path, "--workdir") == Path(path)
    for path in ("gs://bucket/a", "s3://b", "hdfs://a/b", "https://a.org/b.png"):
        with pytest.raises(ValueError, match=f"--workdir={path} is an address .*Colab"):
            files.local_path(path, "--workdir")


@pytest.mark.parametrize("at", ["lock", "results/test-center.csv", "export", "a/.x"])
@pytest.mark.parametrize("kind", ["file", "directory", "nothing", "pipe"])
def test_links_out_of_a_directory_are_refused(tmp_path, at, kind):
    run, home = tmp_path / "run", tmp_path / "home"
    (run / at).parent.mkdir(parents=True, exist_ok=True)
    home.mkdir()
    (home / "file").write_text("mine")
    (run / "inside").write_text("")
    (run / "link").symlink_to("inside")  # harmless
    (tmp_path / "linked").symlink_to(run)
    for directory in (run, tmp_path / "linked", tmp_path / "missing"):
        files.check_no_links_out(directory)
    if kind == "pipe":
        os.mkfifo(run / at)
    else:
        target = {"file": home / "file", "directory": home, "nothing": home / "none"}
        (run / at).symlink_to(target[kind])
    message = "neither a file nor" if kind == "pipe" else "is a link to .*home"
    for directory in (run, tmp_path / "linked"):
        with pytest.raises(ValueError, match=f"{at}.*{message}"):
            files.check_no_links_out(directory)
