"""Atomic writes and locks; test_image_cache.py checks the order of fsync calls."""

import os
import re
import threading

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
