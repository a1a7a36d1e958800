"""Unpacks tar archives safely and atomically; downloads CUB-200-2011."""

import bz2
import contextlib
import dataclasses
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any

from cra_jax.datasets.download import fetch
from cra_jax.runtime import files
from cra_jax.runtime.progress import Progress, print_line


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive.

    Attributes:
      url: its address.
      size: in bytes.
      sha256: hex digest of its content.
      max_unpacked: upper bound on the total size of its files, in bytes.
    """

    url: str
    size: int
    sha256: str
    max_unpacked: int


CUB = Archive(
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
    1_150_585_339,
    "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
    3_000_000_000,
)

_MAX_MEMBERS = 1_000_000
_MAX_HEADER = 1_000_000  # bytes of headers before a file
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_DAMAGED += (RecursionError,)  # headers of headers
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


def cub_200_2011(
    folder: Path, *, archive: Archive = CUB, progress: bool = True
) -> Path:
    """Downloads CUB-200-2011 into a folder, unless it is there.

    Args:
      folder: of `CUB_200_2011/`; the archive stays next to it.
      archive: the archive to download.
      progress: report on standard error.

    Returns:
      The folder with `images.txt`.

    Raises:
      ValueError: downloading or unpacking failed; the message describes how to do it
        by hand.
    """
    folder = Path(folder).expanduser().absolute()
    target = folder / "CUB_200_2011"
    for found in (folder, target):
        if (found / "images.txt").is_file():
            return found
    if target.exists():
        raise ValueError(
            f"{target} exists, but has no images.txt: remove it to download the"
            " dataset again, or set data.path to the dataset"
        )
    file = fetch(
        archive.url,
        folder / "CUB_200_2011.tgz",
        size=archive.size,
        sha256=archive.sha256,
        progress=progress,
    )
    unpack_tar(
        file,
        target,
        inside="CUB_200_2011",
        max_bytes=archive.max_unpacked,
        progress=progress,
    )
    if progress:
        print_line(f"{target} is ready; {file} can be removed")
    return target


def unpack_tar(
    archive: Path,
    target: Path,
    *,
    inside: str = "",
    max_bytes: int,
    progress: bool = True,
) -> Path:
    """Unpacks a tar archive, compressed or not, into a folder, unless that exists.

    Nothing is written outside the folder, and only files and folders are written: an
    archive with links, devices, absolute names or names with `..` is an error. The
    folder gets its name when everything is on disk. A second process waits for the
    first.

    Args:
      archive: gzip, bzip2, xz or plain.
      target: the folder to create.
      inside: the folder of the archive that becomes `target`; the rest is omitted.
      max_bytes: upper bound on the total size of the files.
      progress: report on standard error.

    Returns:
      `target`.

    Raises:
      ValueError: the archive is damaged, unsafe or too large, or the disk is full.
    """
    if not archive.is_file():
        raise ValueError(f"{archive}: this archive does not exist; check the path")
    partial = files.partial_path(target)
    with files.writing(target, show=progress):
        if target.exists():
            return target
        shutil.rmtree(partial, ignore_errors=True)  # from a killed process
        try:
            _unpack(archive, partial, max_bytes, progress)
            if not (partial / inside).is_dir():
                raise ValueError(
                    f"{archive}: it has no folder {inside!r}; check the archive"
                )
            os.sync()  # else the name may reach the disk before the files
            (partial / inside).rename(target)
        except _DAMAGED as error:
            reason = " ".join(str(error).split())  # some have several lines
            raise ValueError(
                f"{archive} is damaged ({reason}): remove it and get it again"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _unpack(archive: Path, folder: Path, max_bytes: int, progress: bool) -> None:
    folder.mkdir()
    total = 0
    # Early versions of Python 3.11 have no filter; the checks here do not need it.
    data_filter = getattr(tarfile, "data_filter", lambda member, _: member)
    with (
        archive.open("rb") as raw,
        _decompressed(raw) as content,
        tarfile.open(fileobj=(stream := _stream(content)), mode="r:") as tar,
        Progress(
            archive.stat().st_size, f"unpacking {archive.name}", unit="B", show=progress
        ) as bar,
    ):
        read = number = 0
        # The library keeps all members unless they are cleared.
        while (member := tar.next()) is not None:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            number += 1
            total += member.size
            path = PurePosixPath(member.name)
            if not (member.isreg() or member.isdir()):
                problem = "is a link or a device"
            elif path.is_absolute() or ".." in path.parts or "\0" in member.name:
                problem = "is outside the folder"
            elif total > max_bytes or number > _MAX_MEMBERS:
                problem = f"exceeds {max_bytes:,} bytes or {_MAX_MEMBERS:,} files"
            else:
                problem = ""
            if problem:
                raise ValueError(
                    f"{archive}: {member.name!r} {problem}, so nothing is unpacked; get"
                    " the archive from its publisher"
                )
            place = folder / data_filter(member, str(folder)).name
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                data = tar.extractfile(member)
                assert data is not None, "it is a file"
                stream.left = member.size + _MAX_HEADER
                with data, place.open("xb") as file:
                    shutil.copyfileobj(data, file, 1 << 20)
            bar.advance(raw.tell() - read)
            read = raw.tell()
            stream.left = _MAX_HEADER
        content.read(1 << 24)  # to the end, where gzip and others have checksums


def _decompressed(raw: IO[bytes]) -> Any:
    """Opens an archive that may be compressed."""
    start = raw.read(6)
    raw.seek(0)
    for magic, decompress in _COMPRESSED.items():
        if start.startswith(magic):
            return decompress(raw)
    return contextlib.nullcontext(raw)


def _stream(content: Any) -> Any:
    return _Stream(content)  # it has what reading needs of a file


class _Stream:
    """A stream of which only `left` bytes may be read.

    The library reads a header of any size into memory, and a chain of them.
    """

    def __init__(self, file: Any):
        self._file = file
        self.left = _MAX_HEADER
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError("a header is too large")
        return self._file.read(size)
