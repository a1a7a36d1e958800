"""Files that are written whole or not at all, and locks that end with their process."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cra_jax.runtime.progress import say


@contextlib.contextmanager
def waited_for(lock: Path, title: str, *, show: bool) -> Iterator[None]:
    """Holds a lock file, once any other process has let go of it.

    The system releases it if this process is killed.

    Args:
        lock: the file; its folder must be there.
        title: what the job is called, in the line that says that it waits.
        show: False keeps silent.
    """
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if show:
                say(f"{title}: another process is at work on it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there as a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def replacing(path: Path):
    """A file to write that takes the name `path` only when it is whole and on disk."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the two renames may reach the disk in any order
    finally:
        os.close(folder)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raises errors of the disk as a ValueError that names a cure."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {target} ({error}): free some space, make the folder one you"
            " can write to, or choose another"
        ) from error


def locked(target: Path, progress: bool) -> contextlib.AbstractContextManager[None]:
    """Holds a lock beside `target`; another process waits, and says so if wanted."""
    lock = target.with_name(f".{target.name}.lock")
    return waited_for(lock, target.name, show=progress)
