"""A local web page that shows prediction, activation and attention of an image.

The server accepts connections from this machine only, and requests from its own page
only. SECURITY.md describes its protections.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cra_jax.inference import overlay, predict
from cra_jax.inference.predictor import Prediction, Predictor
from cra_jax.inference.run_options import RunOptions
from cra_jax.input import decoding_process
from cra_jax.runtime.progress import print_line

LARGEST_BYTES = 20_000_000
"""Limit of an upload."""
MOST_UPLOADS = 4
"""Limit of simultaneous uploads; one is processed, the others wait in memory."""
MOST_CONNECTIONS = 32
TIMEOUT_S = 20.0
"""Time without a byte after which a connection is closed."""

_HOST = "127.0.0.1"
_DRAINED_BYTES = 2 * LARGEST_BYTES  # of a refused upload, so that the answer arrives
_KIND = "application/octet-stream"
_NAME = "this file"  # the server does not get the name of the file
_SHOWN_LONG_SIDE_PX = 1280


def run(options: RunOptions | None, workdir: Path, *, port: int = 8000) -> None:
    """Serves the page until Ctrl-C.

    Args:
      options: as for `predict.run`.
      workdir: as for `predict.run`.
      port: port on this machine; 0: any free port.

    Raises:
      ValueError: there is no such network, or the port cannot be used.
    """
    predictor = predict.open_predictor(options, workdir)
    print_line(f"{predictor.network.about}: warming up")
    predictor.warm_up()
    with make_server(predictor, port=port) as server:
        print(f"http://{_HOST}:{server.server_port}/  (stop with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)


def make_server(predictor: Predictor, *, port: int) -> "Server":
    """Creates the server and binds its port, without serving yet.

    Raises:
      ValueError: the port is out of range or in use.
    """
    try:
        return Server(predictor, port)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"port {port} cannot be used ({error}): choose another with --port, "
            "or 0 for any free port"
        ) from error


class Server(ThreadingHTTPServer):
    """Limits connections and uploads; processes one image at a time."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, predictor: Predictor, port: int):
        self.predictor = predictor
        self.working = threading.Lock()
        self.uploads = threading.BoundedSemaphore(MOST_UPLOADS)
        self._connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((_HOST, port), Handler)
        names = (_HOST, "localhost")
        self.hosts = {f"{name}:{self.server_port}" for name in names}
        if self.server_port == 80:
            self.hosts |= set(names)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Closes a connection if there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handles a connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs errors, except those of closed connections."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print_line(f"demo: {error!r}")


class Handler(BaseHTTPRequestHandler):
    """Handles `GET /` (page), `GET /about` (JSON) and `POST /predict` (an image)."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "cra_jax", ""
    timeout = TIMEOUT_S

    def do_GET(self) -> None:  # noqa: D102 (the base class's name)
        if not self._is_ours():
            return
        if self.path == "/":
            self._send(200, page()[0], "text/html; charset=utf-8")
        elif self.path == "/about":
            network = self.server.predictor.network
            self._send_json(
                200,
                {
                    "about": network.about,
                    "classes": len(network.class_names),
                    "attention": network.head is not None,
                    "largest_bytes": LARGEST_BYTES,
                },
            )
        else:
            self._refuse(404, "there is nothing here")

    def do_POST(self) -> None:  # noqa: D102
        if not self._is_ours():
            return
        if self.path != "/predict":
            self._refuse(404, "there is nothing here")
        elif self.headers.get("Content-Type") != _KIND:
            # A form of another site cannot send this type without a CORS preflight.
            self._refuse(415, f"send the bytes of the image as {_KIND}")
        elif not (length := self.headers.get("Content-Length", "")).isdecimal():
            self._refuse(411, "send the length of the image as Content-Length")
        elif int(length) > LARGEST_BYTES:
            limit = f"{LARGEST_BYTES / 1e6:.0f} MB"
            self._refuse(413, f"the file is larger than {limit}; shrink the image")
        elif not self.server.uploads.acquire(blocking=False):
            self._refuse(503, "too many images at once; try again in a moment")
        else:
            try:
                self._answer(int(length))
            finally:
                self.server.uploads.release()

    def _answer(self, length: int) -> None:
        data = self.rfile.read(length)
        if len(data) < length:
            self.close_connection = True
            return
        predictor = self.server.predictor
        with self.server.working:
            try:
                pixels = decoding_process.decode(data, name=_NAME)
                (answer,) = predictor.each([pixels], keep=True)
            except ValueError as error:
                text = str(error).removeprefix(f"{_NAME}: ")
                self._send_json(422, {"error": text})
                return
        assert isinstance(answer, Prediction)
        self._send_json(200, describe(answer))

    def _is_ours(self) -> bool:
        """Whether a request comes from the page itself, at an address of this host.

        Pages of other sites can reach this server, either through its address or
        through their own host name if it resolves to this machine. Their requests are
        refused.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        site = self.headers.get("Sec-Fetch-Site", "none")
        if host not in self.server.hosts:
            self._refuse(421, f"open http://{_HOST}:{self.server.server_port}/ instead")
        elif origin not in (None, f"http://{host}") or (
            self.command == "POST" and site not in ("none", "same-origin")
        ):
            self._refuse(403, "only the page of this server may send requests")
        else:
            return True
        return False

    def _refuse(self, status: int, text: str) -> None:
        """Sends an error before reading the body, then reads and discards the body."""
        self.close_connection = True
        self._send_json(status, {"error": text})
        if self.command == "POST":
            # With unread bytes, closing would reset the connection and lose the answer.
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                left = _DRAINED_BYTES
                while left > 0 and (data := self.rfile.read1(1 << 16)):
                    left -= len(data)

    def _send_json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": page()[1],
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: the page shows the errors."""


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
