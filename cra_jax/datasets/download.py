"""Downloads a file: resumes after an interruption, checks size and SHA-256."""

import dataclasses
import hashlib
import http.client
import itertools
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from cra_jax.runtime import files
from cra_jax.runtime.progress import Progress, print_line

ATTEMPTS = 5  # consecutive ones that receive less than _PIECE
_PIECE = 1 << 20  # bytes per read
_TIMEOUT_S = 30.0
_FIRST_WAIT_S = 1.0  # before the second attempt; doubled for each after it
_PASSING = (408, 416, 425, 429)  # 4xx status codes that may be temporary
_BROKEN = (OSError, http.client.HTTPException)


def fetch(
    url: str, target: Path, *, size: int, sha256: str, progress: bool = True
) -> Path:
    """Downloads a file, unless it exists, and checks its size and SHA-256.

    An interrupted download is kept in `<target>.partial`, and the next attempt, or the
    next call, resumes it. A second process waits for the first.

    Args:
      url: its address; the environment sets proxies.
      target: the file; it exists once its content is complete and on disk.
      size: in bytes.
      sha256: hex digest.
      progress: report on standard error.

    Returns:
      `target`.

    Raises:
      ValueError: the download failed, or the file has another size or digest; the
        message describes how to place it by hand.
    """
    by_hand = (
        f"get {url} by other means and save it as {target} ({size:,} bytes, sha256"
        f" {sha256})"
    )
    with files.writing(target, show=progress):
        if not target.is_file():
            _download(_Source(url, size, sha256, by_hand), target, progress)
        elif problem := _problem(target, size, sha256):
            raise ValueError(f"{target} {problem}: remove it, or {by_hand}")
    return target


@dataclasses.dataclass(frozen=True)
class _Source:
    """What to download, and what the user can do instead."""

    url: str
    size: int
    sha256: str
    by_hand: str


def _download(source: _Source, target: Path, progress: bool) -> None:
    # Not `files.written_atomically`, which removes the partial file after an error:
    # the next call resumes from this one.
    partial = Path(f"{target}.partial")
    had = partial.stat().st_size if partial.is_file() else 0
    need, free = source.size - had, shutil.disk_usage(target.parent).free
    if need > free:
        raise ValueError(
            f"{target.name} takes {need / 1e6:,.1f} MB more, but {target.parent} has"
            f" {free / 1e6:,.1f} MB free: free some space or choose another folder"
        )
    if progress:
        resumes = f", resuming from {had / 1e6:,.1f} MB" if had else ""
        print_line(f"downloading {source.url} ({source.size / 1e6:,.1f} MB){resumes}")
    resumed = had > 0
    with Progress(source.size, target.name, unit="B", done=had, show=progress) as bar:
        for is_last in (False, True):
            with partial.open("ab") as file:
                resumed |= _complete(source, file, bar, progress)
            problem = _problem(partial, source.size, source.sha256)
            if problem is None:
                partial.replace(target)
                return
            partial.unlink()
            if is_last or not resumed:
                raise ValueError(
                    f"{source.url} sent a file that {problem}: check whether it"
                    f" was replaced, or {source.by_hand}"
                )
            bar.back_to(0)  # the parts may be from different files


def _complete(source: _Source, file: BinaryIO, bar: Progress, progress: bool) -> bool:
    """Downloads the rest of a file; returns whether that took several attempts."""
    failures, wait_s = 0, _FIRST_WAIT_S
    for attempt in itertools.count(1):
        before = file.tell()
        reason = _attempt(source, file, bar)
        if reason is None:
            file.flush()
            os.fsync(file.fileno())
            return attempt > 1
        if file.tell() - before >= _PIECE:
            failures, wait_s = 0, _FIRST_WAIT_S
        failures += 1
        if failures >= ATTEMPTS:
            raise ValueError(
                f"cannot download {source.url}: {reason} ({ATTEMPTS} attempts): run"
                f" again to resume the download, or {source.by_hand}"
            )
        if progress:
            print_line(f"{reason}; trying again in {wait_s:.0f} s")
        time.sleep(wait_s)
        wait_s *= 2
    raise AssertionError("unreachable: the count has no end")


def _attempt(source: _Source, file: BinaryIO, bar: Progress) -> str | None:
    """Appends the rest of a file; returns the reason if it was interrupted."""
    have = file.tell()
    if have == source.size:
        return None
    headers = {"User-Agent": "cra_jax", "Accept-Encoding": "identity"}
    if 0 < have < source.size:
        headers["Range"] = f"bytes={have}-"
    try:
        request = urllib.request.Request(source.url, headers=headers)
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            reason = f"the server answers {error.code} ({error.reason})"
        if 400 <= error.code < 500 and error.code not in _PASSING:
            raise ValueError(
                f"cannot download {source.url}: {reason}; {source.by_hand}"
            ) from error
        if error.code == 416:  # the range is not available
            _empty(file, bar)
        return reason
    except _BROKEN as error:
        return f"no answer ({getattr(error, 'reason', error)})"
    with answer:
        _check_length(source, answer)
        first = answer.headers.get("Content-Range", "").removeprefix("bytes ")
        if answer.status != 206:
            have = _empty(
                file, bar
            )  # the full file: the server does not support ranges
        elif not first.startswith(f"{have}-"):
            _empty(file, bar)
            return f"the server sent the range {first!r}"
        while have < source.size:
            try:
                piece = answer.read1(min(_PIECE, source.size - have))
            except _BROKEN as error:
                return f"the connection broke ({error})"
            if not piece:
                return "the connection ended early"
            file.write(piece)
            have += len(piece)
            bar.advance(len(piece))
    return None


def _check_length(source: _Source, answer: http.client.HTTPResponse) -> None:
    """Raises an error for another file, such as a login page, before data is lost."""
    text = answer.headers.get("Content-Length")
    if answer.status == 206:
        text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if text and text.isdecimal() and int(text) != source.size:
        raise ValueError(
            f"{source.url} now has {int(text):,} bytes, not {source.size:,}, so it"
            f" is another file: {source.by_hand}"
        )


def _empty(file: BinaryIO, bar: Progress) -> int:
    file.seek(0)
    file.truncate()
    bar.back_to(0)
    return 0


def _problem(file: Path, size: int, sha256: str) -> str | None:
    """The difference from the expected size and digest, or None."""
    found = file.stat().st_size
    if found != size:
        return f"has {found:,} bytes, not {size:,}"
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return None if digest == sha256 else f"has sha256 {digest}, not {sha256}"
