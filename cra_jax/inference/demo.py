"""A local web page that shows prediction, activation and attention of an image.

The server, in `demo_server.py`, needs the packages of the extra `demo`.
"""

import base64
import functools
import hashlib
import importlib.util
import io
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cra_jax.datasets.tfds_archives import how_to_install
from cra_jax.inference import overlay, predict
from cra_jax.inference.predictor import Prediction, Predictor
from cra_jax.inference.run_options import RunOptions
from cra_jax.input import decoding_process
from cra_jax.runtime.progress import print_line

if TYPE_CHECKING:
    from cra_jax.inference.demo_server import Server

_NAME = "this file"  # the server does not get the name of the file
_SHOWN_LONG_SIDE_PX = 1280
_PACKAGES = ("starlette", "uvicorn", "h11")


def run(options: RunOptions | None, workdir: Path, *, port: int = 8000) -> None:
    """Serves the page until Ctrl-C.

    Args:
      options: as for `predict.run`.
      workdir: as for `predict.run`.
      port: port on this machine; 0: any free port.

    Raises:
      ValueError: a package is missing, there is no such network, or the port cannot be
        used.
    """
    check_installed()
    predictor = predict.open_predictor(options, workdir)
    print_line(f"{predictor.network.about}: warming up")
    predictor.warm_up()
    with make_server(predictor, port=port) as server:
        address = "http://{}:{}/".format(*server.socket.getsockname())
        print(f"{address}  (stop with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)


def check_installed() -> None:
    """Checks that the packages of the extra `demo` are there.

    Raises:
      ValueError: one is missing; says how to install it.
    """
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--mode demo needs the package {name}, which is not installed: "
                f"{how_to_install('demo')}"
            )


def make_server(predictor: Predictor, *, port: int) -> "Server":
    """Creates the server and binds its port, without serving yet.

    Raises:
      ValueError: a package is missing, or the port is out of range or in use.
    """
    check_installed()
    from cra_jax.inference.demo_server import Server

    def about() -> dict[str, Any]:
        network = predictor.network
        return {
            "about": network.about,
            "classes": len(network.class_names),
            "attention": network.head is not None,
        }

    def answer(data: bytes) -> dict[str, Any]:
        try:
            pixels = decoding_process.decode(data, name=_NAME)
            (found,) = predictor.each([pixels], keep=True)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{_NAME}: ")) from error
        assert isinstance(found, Prediction)
        return describe(found)

    try:
        return Server(*page(), about=about, answer=answer, port=port)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"port {port} cannot be used ({error}): choose another with --port, "
            "or 0 for any free port"
        ) from error


def describe(answer: Prediction) -> dict[str, Any]:
    """JSON of a prediction for the page; positions are fractions of the image."""
    view = answer.view
    assert view is not None
    height, width = view.image.shape[:2]
    size = np.array([width, height], float)
    shown = Image.fromarray(view.image)
    shown.thumbnail((_SHOWN_LONG_SIDE_PX, _SHOWN_LONG_SIDE_PX))
    colours = Image.fromarray(overlay.color_activation(view.activation))
    corners = view.attention_px
    return {
        "classes": [
            {"name": name, "probability": probability}
            for name, probability in zip(
                answer.classes, answer.probabilities, strict=True
            )
        ],
        "size_px": answer.size_px,
        "shown_px": shown.size,
        "image": _data_url(shown, "JPEG"),
        "cam": _data_url(colours, "PNG"),
        "crop": (np.reshape(view.crop_box_px, (2, 2)) / size).ravel().tolist(),
        "corners": None if corners is None else (corners / size).tolist(),
    }


@functools.cache
def page() -> tuple[bytes, str]:
    """The page, and a Content-Security-Policy for its own script and style only."""
    text = Path(__file__).with_name("demo.html").read_text(encoding="utf-8")

    def hashed(tag: str) -> str:
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = hashlib.sha256(inline.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hashed('script')}; "
        f"style-src {hashed('style')}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _data_url(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    text = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{text}"
