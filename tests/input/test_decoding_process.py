import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cra_jax.input import decoding, decoding_process


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_image_equals_that_of_decode(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    data = encoded(Image.fromarray(pixels))
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        image = decoding_process.decode(source)
        np.testing.assert_array_equal(image, pixels)
        assert image.flags.writeable


SMALL = encoded(Image.new("L", (20, 20)))


@pytest.mark.parametrize(
    ("data", "limits", "message"),
    [
        (b"no image", {}, "^this: not an image"),
        (SMALL, {"max_pixels": 399}, "^this: 20 x 20 pixels are more than the limit"),
        (SMALL, {"limit_s": 0.05}, "^this: decoding takes more than 0.05 seconds"),
    ],
)
def test_limits_are_errors(data, limits: Any, message):
    with pytest.raises(decoding.ImageError, match=message):
        decoding_process.decode(data, name="this", **limits)


def test_process_that_ends_without_an_image_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(decoding.ImageError, match=r"too much memory or time"):
        decoding_process.decode(SMALL, name="this")


def test_memory_of_the_process_is_limited():
    # Its limit is for 1 pixel, as if the size in the header were not checked.
    code = (
        "from cra_jax.input import decoding, decoding_process as p; import numpy as np;"
        "decoding.decode = lambda *_, **__: np.zeros(2 * p._OTHER_BYTES, np.uint8);"
        "p._main('', 'this', '1', '20')"
    )
    done = subprocess.run([sys.executable, "-c", code], input=b"", capture_output=True)
    assert done.returncode != 0
    assert b"MemoryError" in done.stderr
    assert done.stdout == b""
