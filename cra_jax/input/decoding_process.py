"""Decodes images of strangers in a process of its own, with little time and memory.

`decode` replaces `decoding.decode` where the images are uploads. Should a file exploit
or exhaust a decoder, that process ends, and this one reports an unreadable image. A
process takes about a third of a second to start.
"""

import json
import os
import resource
import subprocess
import sys
from typing import Any

import numpy as np

from cra_jax.input import decoding
from cra_jax.input.decoding import PathOrBytes

MAX_PIXELS = 50_000_000
"""Limit of an image's pixels: 150 MB as RGB."""
LIMIT_S = 20.0
"""Limit of time, from the start of the process to the last pixel."""

_BYTES_PER_PIXEL = 24  # RGBA twice, and copies
_OTHER_BYTES = 1_500_000_000  # of address space: Python and its libraries


def decode(
    path_or_bytes: PathOrBytes,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    limit_s: float = LIMIT_S,
) -> np.ndarray:
    """Decodes one image, as `decoding.decode` does.

    Raises:
      ImageError: as `decoding.decode`; or decoding took too much time or memory.
    """
    name = name or decoding.default_name(path_or_bytes)
    is_file = not isinstance(path_or_bytes, bytes)
    path: str = os.path.abspath(os.fspath(path_or_bytes)) if is_file else ""
    command = [sys.executable, "-m", __name__, path, name, str(max_pixels)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONUTF8": "1",  # in any locale, the same name and message
        "OPENBLAS_NUM_THREADS": "1",  # each thread reserves address space
    }
    try:
        done = subprocess.run(
            [*command, str(limit_s)],
            input=path_or_bytes if isinstance(path_or_bytes, bytes) else b"",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise decoding.ImageError(
            f"{name}: decoding takes more than {limit_s:g} seconds; save it again as "
            "JPEG or PNG"
        ) from None
    answer: dict[str, Any]
    head, _, pixels = done.stdout.partition(b"\n")
    try:
        answer = json.loads(head)
    except ValueError:
        answer = {"error": f"{name}: decoding takes too much memory or time; shrink it"}
    if "error" in answer:
        raise decoding.ImageError(answer["error"])
    return np.frombuffer(bytearray(pixels), np.uint8).reshape(answer["shape"])


def _main(path: str, name: str, max_pixels: str, limit_s: str) -> None:
    """Writes the image's shape as JSON, then its pixels, to standard output."""
    most = _BYTES_PER_PIXEL * int(max_pixels) + _OTHER_BYTES
    seconds = int(float(limit_s)) + 1
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    out = sys.stdout.buffer
    try:
        source = path or sys.stdin.buffer.read()
        image = decoding.decode(source, name=name, max_pixels=int(max_pixels))
    except decoding.ImageError as error:
        out.write(json.dumps({"error": str(error)}).encode() + b"\n")
    else:
        out.write(json.dumps({"shape": image.shape}).encode() + b"\n")
        out.write(image.data)


if __name__ == "__main__":
    _main(*sys.argv[1:])
