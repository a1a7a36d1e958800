"""Records the code, versions, devices, command and times of a run."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cra_jax.runtime import files

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pillow",
    "ml-collections",
)
_ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def recorded(
    workdir: Path,
    *,
    devices: str,
    first_step: int,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> Iterator[None]:
    """Adds this start of a run to `provenance.json`, and its outcome at the end.

    A start that was killed keeps ``"ended": null``.

    Args:
      workdir: the run directory.
      devices: in words, such as "8 x TPU v5e".
      first_step: the step that training resumes from.
      notes: on the data, for the report.
      warnings: about this start, for the report.
    """
    start: dict[str, Any] = {
        "started": _now(),
        "ended": None,
        "outcome": None,
        "first_step": first_step,
        "command": _command(),
        "code": describe_code(),
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": devices,
        "notes": list(notes),
        "warnings": list(warnings),
    }
    # Steps after the checkpoint that training resumes from are repeated. Starts whose
    # steps are all repeated stay in the record.
    starts = [*read(workdir), start]
    _write(workdir, starts)
    try:
        yield
    except BaseException as error:
        start["outcome"] = f"stopped by {type(error).__name__}"
        raise
    else:
        start["outcome"] = "finished"
    finally:
        start["ended"] = _now()
        _write(workdir, starts)


def _command() -> str:
    """The command line, as `cra-jax ...` or as `python FILE ...`."""
    program = Path(sys.argv[0]).name
    if program == "cra-jax":
        return shlex.join([program, *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


def read(workdir: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; empty if they were not recorded.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir / "provenance.json"
    if not path.is_file():
        return []
    try:
        return list(map(dict, json.loads(path.read_bytes())["starts"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): restore a copy, or move it away (metrics "
            "do not depend on it)"
        ) from error


def versions() -> dict[str, str]:
    """Versions of Python, of this package if it is installed, and of dependencies."""
    found = {"python": platform.python_version()}
    for name in ("cra_jax", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_code() -> dict[str, Any]:
    """The git commit of this package's files.

    Returns:
      ``commit``, and ``changed``: names of files that differ from it or that it lacks,
      among those that can change a run. Empty if the package is not in a git
      repository, or is in one that does not track it.
    """
    # An installed package may be inside an unrelated repository.
    if _git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is None:
        return {}
    commit = _git("rev-parse", "HEAD")
    paths = [name for name in ("cra_jax", "configs", "launch.py") if _is_there(name)]
    status = _git("status", "--porcelain", "--untracked-files=all", "--", *paths)
    if commit is None or status is None:
        return {}
    return {
        "commit": commit.strip(),
        "changed": [line[3:] for line in status.splitlines()],
    }


def describe_commit(code: dict[str, Any]) -> str:
    """Text for messages: "f82792c", "f82792c + 2 changed files", or "unknown"."""
    if not code:
        return "unknown"
    changed = len(code["changed"])
    more = f" + {changed} changed file{'s' * (changed > 1)}" if changed else ""
    return f"{code['commit'][:7]}{more}"


def _is_there(name: str) -> bool:
    return (_ROOT / name).exists()


def _git(*arguments: str) -> str | None:
    """The output of git; None if it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(workdir: Path, starts: list[dict[str, Any]]) -> None:
    text = json.dumps({"starts": starts}, indent=2) + "\n"
    files.write_atomically(workdir / "provenance.json", text)
