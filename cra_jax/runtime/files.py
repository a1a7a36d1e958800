"""Atomic writes, and locks that the system releases when the process ends."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cra_jax.runtime.progress import print_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def advice(error: OSError | ValueError) -> str:
    """What the user can do about a file that cannot be read or written.

    Args:
      error: of the system, or one of tensorstore that has its text.
    """

    def is_one_of(codes: tuple[int, ...]) -> bool:
        if isinstance(error, OSError):
            return error.errno in codes
        return any(os.strerror(code) in str(error) for code in codes)

    if is_one_of(_FULL):
        return "free some space"
    if is_one_of(_FORBIDDEN):
        return "make it readable and writable, or choose another directory"
    if is_one_of((errno.EEXIST, errno.ENOTDIR)):
        return "a file has the name of a directory: choose another"
    if is_one_of((errno.EMFILE, errno.ENFILE)):
        return "raise the limit of open files (ulimit -n)"
    return "check the file, its disk and its network mount"


def local_path(path: str, option: str) -> Path:
    """A path on this machine; `~` is the home directory.

    Args:
      path: as the user has typed it.
      option: the flag or config key, for the message.

    Raises:
      ValueError: it is an address, such as that of a bucket.
    """
    if address := re.match(r"([a-zA-Z][\w+.-]*)://", path):
        raise ValueError(
            f"{option}={path} is an address ({address[1]}), and only paths on this "
            "machine are read and written: copy it here (and results back), or mount "
            "it, such as a bucket with gcsfuse; on Colab mount Google Drive (from "
            "google.colab import drive; drive.mount('/content/drive')) and use a path "
            "below /content/drive/MyDrive"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: a name that begins with ~
        return Path(path)


def partial_path(path: Path) -> Path:
    """The hidden name, in the same directory, under which `path` is written."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def written_atomically(path: Path, *, fsync: bool = False) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block ends without an error.

    After an error `path` is as it was, and the partial file is removed. A second
    process that writes the same file waits.

    Args:
      path: the file; its directory must exist.
      fsync: whether content and name must be on disk when the block has ended.
        Otherwise a power failure can lose them.
    """
    partial = partial_path(path)
    with _open_partial(partial) as file:
        try:
            yield file
            file.flush()
            if fsync:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno:
                error.filename = error.filename or str(path)
            raise
    if fsync:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # else two renames may reach the disk in any order
        finally:
            os.close(directory)


def _open_partial(partial: Path) -> BinaryIO:
    """Opens an empty partial file that this process alone writes."""
    while True:
        file = os.fdopen(_open_without_links(partial), "r+b")
        try:
            with contextlib.suppress(OSError):  # not all file systems have locks
                fcntl.flock(file, fcntl.LOCK_EX)
            # Another process may have renamed it while this one waited.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                    file.truncate()
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _open_without_links(path: Path) -> int:
    """Opens a file for reading and writing; creates it, but follows no link.

    A run directory from a stranger may have a link under this name.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link: remove it") from None
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by one with this text in UTF-8; escapes what UTF-8 cannot hold.

    Names of files can have such bytes.
    """
    with written_atomically(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two paths at once; returns False if the file system cannot do so."""
    here, exchange_flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = here, os.fsencode(one), here, os.fsencode(other)
    return rename is not None and rename(*paths, exchange_flag) == 0


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_no_links_out(directory: Path) -> None:
    """Checks that writing below a directory cannot write anywhere else.

    A run or an export may come from a stranger. The directory may be a link itself.

    Raises:
      ValueError: something below it is a link to a place outside it, or is neither a
        file nor a directory; names the first.
    """
    root = directory.resolve()
    for here, folders, names in os.walk(root):
        for name in sorted([*folders, *names]):
            path = Path(here, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # of a process that writes there
                continue
            if stat.S_ISLNK(mode) and not path.resolve().is_relative_to(root):
                raise ValueError(
                    f"{directory / path.relative_to(root)} is a link to "
                    f"{str(path.resolve())!r}, outside of {directory}, and is not "
                    "followed: replace it by what it links to, or remove it"
                )
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(
                    f"{directory / path.relative_to(root)} is neither a file nor a "
                    "directory: remove it"
                )


@contextlib.contextmanager
def locked(
    lock: Path, title: str, *, show: bool = True, instead: str = ""
) -> Iterator[None]:
    """Holds a lock file. Waits if another process holds it, or raises an error.

    Args:
      lock: the file; its directory must exist.
      title: what is locked, for messages.
      show: whether to report that this process waits.
      instead: what the user can do instead of waiting; if empty, this waits.

    On a file system without locks (some network mounts) it warns and does not lock.

    Raises:
      ValueError: another process holds the lock, and `instead` is not empty.
    """
    with os.fdopen(_open_without_links(lock), "r+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if instead:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise ValueError(
                    f"{title} is in use by another process ({holder}): {instead}"
                ) from None
            if show:
                print_line(f"{title}: waiting for another process that uses it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if show:
                print_line(
                    f"warning: the file system of {lock.parent} has no file locks "
                    f"({os.strerror(error.errno)}): {title} is not protected from a "
                    "second process, so start only one"
                )
        if instead:
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


@contextlib.contextmanager
def writing(target: Path, *, show: bool) -> Iterator[None]:
    """Locks a file or directory for writing; creates its parent directory.

    Args:
      target: the file or directory.
      show: whether to report that this process waits for another one.

    Raises:
      ValueError: the disk or a directory failed, here or in the block.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock")
        with locked(lock, target.name, show=show):
            yield
    except OSError as error:
        raise ValueError(f"cannot write {target} ({error}): {advice(error)}") from error
