"""Downloads from an unreliable server, and damaged or malicious archives."""

import fcntl
import gzip
import hashlib
import io
import random
import re
import shutil
import tarfile
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cra_jax.datasets import archives, download, sources

DATA = random.Random(0).randbytes(300_000)


class Server(ThreadingHTTPServer):
    """A server with scripted answers that records the requested ranges."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/data.tgz"
        self.data, self.ranges = DATA, True
        self.script: list[dict] = []
        self.requests: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    """Serves `server.data` as the next entry of `server.script` specifies."""

    def do_GET(self):
        server = self.server
        assert isinstance(server, Server)
        range_header = self.headers.get("Range")
        server.requests.append(range_header)
        step = server.script.pop(0) if server.script else {}
        data = step.get("data", server.data)
        first = 0
        if range_header and step.get("ranges", server.ranges):
            first = int(range_header.removeprefix("bytes=").removesuffix("-"))
        code = step.get("code") or (206 if first else 200)
        self.send_response(code)
        body = data[first:]
        if step.get("length", True):
            self.send_header("Content-Length", str(len(body)))
        if code == 206:
            start = step.get("first", first)
            total = step.get("total", len(data))
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{total}")
        self.end_headers()
        self.wfile.write(body[: step.get("stop", len(body))])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """Runs a server on this machine."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_wait_and_no_proxy(monkeypatch):
    monkeypatch.setattr(download, "_FIRST_WAIT_S", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def fetch(server, target: Path, data: bytes = DATA, **options) -> Path:
    sha256 = hashlib.sha256(data).hexdigest()
    return download.fetch(server.url, target, size=len(data), sha256=sha256, **options)


def file_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# --- fetch -------------------------------------------------------------------------


def test_file_is_downloaded_once(server, tmp_path, capsys):
    target = tmp_path / "new" / "data.tgz"
    assert fetch(server, target) == target
    assert target.read_bytes() == DATA
    shown = capsys.readouterr().err
    assert f"downloading {server.url} (0.3 MB)" in shown
    assert "data.tgz: 0.3 of 0.3 MB, " in shown
    assert fetch(server, target) == target
    assert server.requests == [None]
    assert file_names(target.parent) == [".data.tgz.lock", "data.tgz"]


def test_progress_false_prints_nothing(server, tmp_path, capfd):
    server.script = [{"stop": 100}]
    fetch(server, tmp_path / "a", progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("length", [True, False])
def test_broken_download_is_resumed(server, length, tmp_path, capsys):
    server.script = [
        {"stop": 100_000, "length": length},
        {"stop": 50_000},
        {"code": 503},
    ]
    assert fetch(server, tmp_path / "a").read_bytes() == DATA
    assert server.requests == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    shown = capsys.readouterr().err
    assert "the connection ended early; trying again in" in shown
    assert "the server answers 503" in shown


def test_next_call_resumes_a_failed_download(server, tmp_path, capsys):
    server.script = [{"stop": 40_000}] + [{"code": 500}] * (download.ATTEMPTS - 1)
    with pytest.raises(
        ValueError, match=r"the server answers 500.*5 attempts.*run again"
    ):
        fetch(server, tmp_path / "a")
    assert (tmp_path / "a.partial").stat().st_size == 40_000
    assert len(server.requests) == download.ATTEMPTS
    capsys.readouterr()
    fetch(server, tmp_path / "a")
    assert server.requests[-1] == "bytes=40000-"
    assert "resuming from 0.0 MB" in capsys.readouterr().err
    assert file_names(tmp_path) == [".a.lock", "a"]


def test_attempts_with_much_data_are_not_counted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_PIECE", 10_000)
    server.script = [{"stop": 20_000}] * (2 * download.ATTEMPTS)
    assert fetch(server, tmp_path / "a").read_bytes() == DATA


def test_download_restarts_if_the_server_has_no_ranges(server, tmp_path):
    server.ranges = False
    server.script = [{"stop": 200_000}]
    assert fetch(server, tmp_path / "a").read_bytes() == DATA
    assert server.requests == [None, "bytes=200000-"]


def test_wrong_range_is_not_appended(server, tmp_path):
    server.script = [{"stop": 200_000}, {"first": 7}]
    assert fetch(server, tmp_path / "a").read_bytes() == DATA
    assert server.requests == [None, "bytes=200000-", None]


@pytest.mark.parametrize("size", [len(DATA), len(DATA) + 5])
def test_partial_file_of_full_size_is_checked(server, size, tmp_path):
    (tmp_path / "a.partial").write_bytes((DATA + b"12345")[:size])
    assert fetch(server, tmp_path / "a").read_bytes() == DATA
    assert server.requests == ([] if size == len(DATA) else [None])


def test_partial_file_of_another_version_is_downloaded_again(server, tmp_path):
    (tmp_path / "a.partial").write_bytes(b"x" * 1000)
    assert fetch(server, tmp_path / "a").read_bytes() == DATA
    assert server.requests == ["bytes=1000-", None]


def test_wrong_checksum_is_an_error(server, tmp_path):
    other = DATA[:-1] + b"x"
    with pytest.raises(
        ValueError, match=r"has sha256 .*, not .*check whether it was replaced"
    ):
        fetch(server, tmp_path / "a", other)
    assert server.requests == [None]
    (tmp_path / "a.partial").write_bytes(DATA[:10])
    with pytest.raises(ValueError, match=f"save it as {tmp_path}/a .300,000 bytes"):
        fetch(server, tmp_path / "a", other)
    assert server.requests == [None, "bytes=10-", None]
    assert file_names(tmp_path) == [".a.lock"]


@pytest.mark.parametrize("code", [403, 404, 410])
def test_client_error_is_not_retried(server, code, tmp_path):
    server.script = [{"code": code}] * 9
    with pytest.raises(ValueError, match=f"answers {code}.*get {server.url} by other"):
        fetch(server, tmp_path / "a")
    assert server.requests == [None]


def test_file_of_another_size_is_an_error(server, tmp_path):
    (tmp_path / "a.partial").write_bytes(DATA[:1000])
    server.script = [{"data": b"<html>please log in</html>", "ranges": False}]
    with pytest.raises(ValueError, match=r"now has 26 bytes, not 300,000"):
        fetch(server, tmp_path / "a")
    assert (tmp_path / "a.partial").read_bytes() == DATA[:1000]  # kept
    server.script = [{"total": 400_000}]
    with pytest.raises(ValueError, match=r"now has 400,000 bytes, not 300,000"):
        fetch(server, tmp_path / "a")


def test_unsatisfiable_range_restarts_the_download(server, tmp_path):
    (tmp_path / "a.partial").write_bytes(DATA[:1000])
    server.script = [{"code": 416}]
    assert fetch(server, tmp_path / "a").read_bytes() == DATA
    assert server.requests == ["bytes=1000-", None]


def test_missing_network_is_an_error_that_names_the_file(tmp_path):
    with Server() as stopped:
        url = stopped.url
    with pytest.raises(ValueError, match=r"no answer .*refused") as caught:
        download.fetch(url, tmp_path / "a", size=10, sha256="ab" * 32, progress=False)
    assert f"save it as {tmp_path / 'a'} (10 bytes, sha256 abab" in str(caught.value)


def test_manually_placed_file_is_checked(server, tmp_path):
    (tmp_path / "a").write_bytes(DATA[:-1])
    with pytest.raises(ValueError, match=f"{tmp_path}/a has 299,999 bytes.*remove it"):
        fetch(server, tmp_path / "a")
    (tmp_path / "a").write_bytes(DATA)
    fetch(server, tmp_path / "a")
    assert server.requests == []


def test_too_little_disk_space_is_an_error(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=len(DATA) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"a takes 0\.3 MB more, but .* 0\.3 MB free"):
        fetch(server, tmp_path / "a")
    (tmp_path / "a.partial").write_bytes(DATA[:1])
    fetch(server, tmp_path / "a")


def test_unwritable_directory_is_an_error(server, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"cannot write .*/file/a .*choose another"):
        fetch(server, tmp_path / "file" / "a")


def test_second_process_waits_for_the_lock(server, tmp_path, capsys):
    with (tmp_path / ".a.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=fetch, args=(server, tmp_path / "a"))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert server.requests == []
    thread.join()
    assert (tmp_path / "a").read_bytes() == DATA
    assert "a: waiting for another process that uses it" in capsys.readouterr().err


# --- archives ----------------------------------------------------------------------


def member(name: str, content: bytes = b"abc", **fields) -> tuple:
    info = tarfile.TarInfo(name)
    info.size = 0 if "type" in fields else len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def make_tar(file: Path, *members: tuple, mode: str = "w:gz") -> Path:
    any_mode: Any = mode  # tarfile.open's type hints need a literal
    with tarfile.open(file, any_mode) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return file


def unpack(archive: Path, target: Path, **options) -> Path:
    return archives.unpack_tar(archive, target, **{"max_bytes": 10**6, **options})


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:bz2", "w:xz"])
def test_archive_is_unpacked_once(mode, tmp_path, capsys):
    members = (
        member("./set/deep/a.txt", mode=0o4755, uid=12345),
        member("set", type=tarfile.DIRTYPE),
        member("set/empty", type=tarfile.DIRTYPE),
        member("rest.txt"),
    )
    archive = make_tar(tmp_path / "a.tar", *members, mode=mode)
    target = tmp_path / "new" / "out"
    assert unpack(archive, target) == target
    assert (target / "set/deep/a.txt").read_bytes() == b"abc"
    assert not (target / "set/deep/a.txt").stat().st_mode & 0o6111
    assert (target / "set/empty").is_dir()
    assert file_names(target) == ["rest.txt", "set"]
    assert file_names(target.parent) == [".out.lock", "out"]

    (target / "rest.txt").unlink()
    unpack(archive, target)  # already unpacked: no change
    assert file_names(target) == ["set"]

    unpack(archive, tmp_path / "set", inside="set", progress=False)
    assert file_names(tmp_path / "set") == ["deep", "empty"]
    with pytest.raises(ValueError, match="it has no folder 'other'"):
        unpack(archive, tmp_path / "none", inside="other")
    assert not (tmp_path / "none").exists()


MALICIOUS = {
    "upwards": member("../evil"),
    "upwards from inside": member("set/../../evil"),
    "absolute": member("HERE/evil"),
    "symlink": member("link", type=tarfile.SYMTYPE, linkname=".."),
    "symlink inside": member("link", type=tarfile.SYMTYPE, linkname="good"),
    "hard link": member("link", type=tarfile.LNKTYPE, linkname="good"),
    "device": member("device", type=tarfile.CHRTYPE),
    "pipe": member("pipe", type=tarfile.FIFOTYPE),
    "null": member("x", pax_headers={"path": "evil\0"}),
    "too large": member("big", b"0" * 1001),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_malicious_archive_is_an_error_and_nothing_is_unpacked(case, tmp_path):
    info, content = MALICIOUS[case]
    info.name = info.name.replace("HERE", str(tmp_path))
    archive = make_tar(tmp_path / "a.tgz", member("good"), (info, content), member("c"))
    with pytest.raises(ValueError, match=r"a\.tgz: .*so nothing is unpacked"):
        unpack(archive, tmp_path / "out" / "in", max_bytes=1000)
    assert file_names(tmp_path / "out") == [".in.lock"]
    assert file_names(tmp_path) == ["a.tgz", "out"]


def pax(size: int, *, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Makes a header before a member, of zeros, without its content."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def sparse() -> bytes:
    """Makes a GNU header of a file with ever more holes."""
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    hole = b"00000000001\0" * 42
    return bytes(header) + (hole + b"\1" + bytes(7)) * 40_000


HEADERS = {
    "pax": pax(30_000_000) + bytes(30_000_000),
    "global": (pax(900_000, kind=tarfile.XGLTYPE) + bytes(900_096)) * 30,
    "long name": pax(30_000_000, kind=tarfile.GNUTYPE_LONGNAME) + bytes(30_000_000),
    "chain": pax(0) * 40_000,
    "sparse": sparse(),
}


@pytest.mark.parametrize("case", HEADERS)
def test_large_headers_of_an_archive_are_an_error(case, tmp_path):
    archive = tmp_path / "a.tgz"
    archive.write_bytes(gzip.compress(HEADERS[case], 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.tgz is damaged"):
            unpack(archive, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_archive_with_too_many_files_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 3)
    archive = make_tar(tmp_path / "a", *(member(str(i), b"") for i in range(4)))
    with pytest.raises(ValueError, match=r"'3' exceeds .* or 3 files"):
        unpack(archive, tmp_path / "out")


def test_damaged_and_missing_archives_are_errors(tmp_path):
    archive = make_tar(tmp_path / "a.tgz", *(member(f"{i}", DATA) for i in range(2)))
    content = archive.read_bytes()
    changed = bytearray(content)
    changed[1000:2000] = bytes(1000)
    for damaged in (content[:-20_000], bytes(changed), b"<html>404</html>", b""):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.tgz is damaged .*get it again"):
            unpack(archive, tmp_path / "out", max_bytes=10**6)
        assert file_names(tmp_path) == [".out.lock", "a.tgz"]
    with pytest.raises(ValueError, match="gone: this archive does not exist"):
        unpack(tmp_path / "gone", tmp_path / "out")


def test_partial_directory_of_a_killed_process_is_replaced(tmp_path):
    archive = make_tar(tmp_path / "a.tgz", member("good"))
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("of an image")
    assert file_names(unpack(archive, tmp_path / "out")) == ["good"]


def test_full_disk_is_an_error_and_leaves_no_files(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    archive = make_tar(tmp_path / "a.tgz", member("good"))
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(ValueError, match=r"out .*No space left.*free some space"):
        unpack(archive, tmp_path / "out")
    assert file_names(tmp_path) == [".out.lock", "a.tgz"]


# --- CUB: download and unpack ------------------------------------------------------


def cub_archive(folder: Path) -> bytes:
    """Makes an archive with the layout of CUB_200_2011.tgz: 2 classes, 4 images."""
    files = [f"00{c}.B{c}/{s}.jpg" for c in (1, 2) for s in ("train", "test")]
    lists = {
        "images": files,
        "image_class_labels": [1, 1, 2, 2],
        "train_test_split": [1, 0, 1, 0],
        "bounding_boxes": ["1 1 5 5"] * 4,
    }
    texts = {
        name: "".join(f"{i} {value}\n" for i, value in enumerate(values, 1))
        for name, values in lists.items()
    }
    texts["classes"] = "1 001.B1\n2 002.B2\n"
    members = [member("attributes.txt"), member("CUB_200_2011", type=tarfile.DIRTYPE)]
    members += [
        member(f"CUB_200_2011/{name}.txt", text.encode())
        for name, text in texts.items()
    ]
    for i, name in enumerate(files):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3)).astype(np.uint8)
        jpeg = io.BytesIO()
        Image.fromarray(pixels).save(jpeg, "JPEG")
        members.append(member(f"CUB_200_2011/images/{name}", jpeg.getvalue()))
    return make_tar(folder / "made.tgz", *members).read_bytes()


@pytest.fixture
def cub(server, tmp_path) -> archives.Archive:
    server.data = cub_archive(tmp_path)
    digest = hashlib.sha256(server.data).hexdigest()
    return archives.Archive(server.url, len(server.data), digest, 10**6)


def test_cub_is_downloaded_over_an_unreliable_connection(server, cub, tmp_path, capsys):
    server.script = [{"code": 502}, {"stop": 3000}, {"stop": 10}]
    folder = tmp_path / "data"
    path = archives.cub_200_2011(folder, archive=cub)
    assert path == folder / "CUB_200_2011"
    assert server.requests == [None, None, "bytes=3000-", "bytes=3010-"]
    assert file_names(path) == [
        "bounding_boxes.txt",
        "classes.txt",
        "image_class_labels.txt",
        "images",
        "images.txt",
        "train_test_split.txt",
    ]
    dataset = sources.load("cub", path)
    assert dataset.class_names == ("001.B1", "002.B2")
    assert dataset.splits["test"][1].read(20).shape == (20, 25, 3)
    assert f"{path} is ready" in capsys.readouterr().err

    for root in (folder, path):
        assert archives.cub_200_2011(root, archive=cub) == path
    assert len(server.requests) == 4


def test_cub_is_unpacked_from_a_manually_placed_archive(server, cub, tmp_path):
    (tmp_path / "CUB_200_2011.tgz").write_bytes(server.data)
    path = archives.cub_200_2011(tmp_path, archive=cub, progress=False)
    assert (path / "images.txt").is_file()
    assert server.requests == []


def test_directory_without_cub_is_an_error(cub, tmp_path):
    (tmp_path / "CUB_200_2011").mkdir()
    with pytest.raises(ValueError, match=r"CUB_200_2011 exists, but has no images"):
        archives.cub_200_2011(tmp_path, archive=cub)


def test_url_size_and_checksum_of_cub_are_published_ones():
    assert archives.CUB.url.startswith("https://data.caltech.edu/records/65de6-vp158/")
    assert archives.CUB.size == 1_150_585_339
    assert re.fullmatch("[0-9a-f]{64}", archives.CUB.sha256)
