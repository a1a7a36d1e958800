"""Builds datasets of tfds that are not on disk; the only module that runs TensorFlow.

TensorFlow runs in a process of its own, which sees no GPU and ends with the build.
"""

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from cra_jax.datasets import tfds_archives, tfds_read
from cra_jax.runtime.files import locked
from cra_jax.runtime.progress import LOG_EVERY_S, print_line

_TIDYING_S = 10.0
_UNFINISHED = "incomplete."  # how tfds begins the names of what it is writing


def build(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    manual_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> bool:
    """Builds a dataset as array_record, and downloads it first if needed.

    Safe to kill, and to call from several processes: one builds, the others wait.

    Args:
      name: as in tfds: `set`, `set/config`, `set:1.0.0`.
      data_dir: directory of the datasets of tfds; None or "" for tfds' own default.
      manual_dir: a folder of archives that were placed by hand; None or "" for
        `downloads/manual` below `data_dir`.
      progress: report on standard error.

    Returns:
      Whether it was built now; False if it existed.

    Raises:
      ValueError: TensorFlow is not installed, tfds does not know the dataset, an
        archive is missing, or the build failed; the message says what to do.
    """
    folder = tfds_read.build_directory(name, data_dir)
    if folder is None:
        return False
    if doubt := tfds_archives.unknown_name_hint(name):
        raise ValueError(f"data.name is {name!r}: {doubt}")
    manual = Path(manual_dir or folder / "downloads" / "manual").expanduser().absolute()
    if manual_dir and not manual.is_dir():
        raise ValueError(f"data.manual_dir is {manual}: there is no such folder")
    _check_archives(name, folder, manual)
    _check_modules(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / f".{tfds_archives.dataset_name(name)}.lock"
        with locked(lock, name, show=progress):
            # The process that held the lock may have built it.
            if tfds_read.build_directory(name, data_dir) is None:
                return False
            _report_leftovers(folder / tfds_archives.dataset_name(name), progress)
            reason = _in_own_process(name, folder, manual, progress)
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error}): make it writable, or"
            " set data.path to another"
        ) from error
    if reason:
        raise ValueError(
            f"tfds cannot build {name}: {reason}"
            + tfds_archives.manual_download_help(name, manual)
        )
    if tfds_read.build_directory(name, data_dir) is not None:
        raise ValueError(
            f"tfds has built {name}, but not in {folder}: give the name, or its config"
            " and version, as tfds does"
        )
    return True


def _check_modules(name: str) -> None:
    """Checks for the needed modules before anything is downloaded."""
    missing = [m for m in tfds_archives.MODULES if not importlib.util.find_spec(m)]
    if missing:
        raise ValueError(
            f"building {name} needs {' and '.join(missing)}, which this Python"
            f" ({sys.executable}) does not have: {tfds_archives.INSTALL}. Neither is"
            " needed to read the dataset: it may also be built on another machine, and"
            " copied"
        )


def _check_archives(name: str, folder: Path, manual: Path) -> None:
    """Checks archives in advance: tfds would reject or miss them only at the end."""
    wrong, missing = [], {}
    for file, archive in tfds_archives.archives(name).items():
        placed = manual / file
        if placed.is_file():
            size = placed.stat().st_size
            if size != archive.size:
                wrong.append(f"{file} has {size} bytes, not {archive.size}")
        elif not _was_downloaded(name, folder, archive):
            missing[file] = archive.urls
    if missing and tfds_archives.dataset_name(name) in tfds_archives.UNAVAILABLE:
        wrong.append(f"not there: {', '.join(missing)}")
    elif hosts := _unreachable(itertools.chain(*missing.values())):
        wrong.append(f"not there: {', '.join(missing)}; no network ({hosts})")
    if wrong:
        raise ValueError(
            f"{manual}: {'; '.join(wrong)}"
            + tfds_archives.manual_download_help(name, manual)
        )


def _unreachable(urls: Iterable[str]) -> str:
    """Why no host can be reached; empty if one may be reachable.

    tfds would try for five minutes.
    """
    hosts = {urllib.parse.urlsplit(url).hostname or "" for url in urls}
    reasons = []
    for host in sorted(hosts):
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            reasons.append(f"{host}: {error.strerror}")
    # A proxy may know hosts that this machine does not.
    return "; ".join(reasons) * (
        len(reasons) == len(hosts) and not urllib.request.getproxies()
    )


def _was_downloaded(name: str, folder: Path, archive: tfds_archives.Archive) -> bool:
    """Whether tfds has an archive among its downloads, in the new or old layout."""
    from tensorflow_datasets.core.download import resource

    downloads = folder / "downloads"
    files = {resource.get_dl_fname(url, archive.sha256) for url in archive.urls}
    places = downloads, downloads / tfds_archives.dataset_name(name)
    return any((place / file).exists() for place in places for file in files)


def _report_leftovers(folder: Path, progress: bool) -> None:
    for left in folder.rglob(f"{_UNFINISHED}*") if progress else ():
        print_line(
            f"{left}: left by a build that was killed, unless one is at work; remove it"
        )


def _in_own_process(name: str, folder: Path, manual: Path, progress: bool) -> str:
    """Builds, and returns what went wrong; empty if nothing did."""
    bars = progress and sys.stderr.isatty()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_build, args=(name, str(folder), str(manual), bars, sender)
    )
    begun = time.monotonic()
    if progress:
        print_line(f"building {name} in {folder}, once, in a process of its own")
    process.start()
    sender.close()  # so that the end of the process is seen
    try:
        while not receiver.poll(LOG_EVERY_S):
            if progress and not bars:
                minutes, seconds = divmod(round(time.monotonic() - begun), 60)
                print_line(
                    f"building {name}: {minutes}:{seconds:02} min,"
                    f" {_bytes_below(folder) / 1e6:,.0f} MB in {folder}"
                )
        return receiver.recv()
    except EOFError:
        process.join()
        return (
            f"its process ended with {process.exitcode} and no message (-9: killed,"
            " perhaps out of memory)"
        )
    finally:
        if sys.exception():  # Ctrl-C reaches it as well: time to tidy up
            process.join(_TIDYING_S)
            process.terminate()
        process.join()


def _build(name: str, folder: str, manual: str, bars: bool, sender: Connection) -> None:
    """Runs in a separate process, since TensorFlow reserves all visible devices."""
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "-1",
        "ROCR_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",  # it would report that they are on
    }
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reason = ""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import tensorflow_datasets as tfds

            if not bars:
                tfds.disable_progress_bar()
            builder = tfds.builder(
                name, data_dir=folder, file_format=tfds_read.FORMAT, try_gcs=False
            )
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(
                    manual_dir=manual, try_download_gcs=False
                )
            )
    except KeyboardInterrupt:
        reason = "it was interrupted"
    # Any error becomes one line for the user of the parent process.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    sender.send(reason)


def _end_with_parent() -> None:
    """Ends a build whose parent was killed, since its lock is released."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # of those that come and go
                total += os.stat(os.path.join(parent, file)).st_size
    return total
