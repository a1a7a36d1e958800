"""The HTTP server of the demo: Starlette and uvicorn, with limits and refusals.

It accepts connections from this machine only, and requests from its own page only.
SECURITY.md describes its protections.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from cra_jax.runtime.progress import print_line

HOST = "127.0.0.1"
LARGEST_BYTES = 20_000_000
"""Limit of an upload."""
MOST_UPLOADS = 4
"""Limit of simultaneous uploads; one is processed, the others wait in memory."""
MOST_CONNECTIONS = 32
HEAD_S = 10.0
"""Time in which the head of a request must have come."""
UPLOAD_S = 30.0
"""Time in which an upload must have come."""
CONNECTION_S = 120.0
"""Time after which a connection is closed, whatever it waits for."""

_KIND = "application/octet-stream"
_DRAINED_BYTES = 2 * LARGEST_BYTES  # of a refused upload, so that the answer arrives
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Connection": "close",  # each connection has the same deadlines
}


class Server:
    """Serves a page that sends images; answers one image at a time.

    It serves `GET /` (the page), `GET /about` (JSON) and `POST /predict` (an image).

    Args:
      page: the HTML page.
      policy: its Content-Security-Policy.
      about: returns the JSON of `/about`.
      answer: returns the JSON for the bytes of an image.
      port: port on this machine; 0: any free port.

    Raises:
      OSError: the port cannot be used.
      OverflowError: the port is out of range.
    """

    def __init__(
        self,
        page: bytes,
        policy: str,
        *,
        about: Callable[[], Any],
        answer: Callable[[bytes], Any],
        port: int,
    ):
        self._page, self._policy = page, policy
        self._about, self._answer = about, answer
        self._working = threading.Lock()
        self.uploads = 0
        self.socket = socket.socket()
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((HOST, port))
            self.socket.listen(MOST_CONNECTIONS)
        except BaseException:
            self.socket.close()
            raise
        self.server_port: int = self.socket.getsockname()[1]
        self._hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        if self.server_port == 80:
            self._hosts |= {HOST, "localhost"}
        routes = [
            Route("/", self._get_page),
            Route("/about", self._get_about),
            Route("/predict", self._predict, methods=["POST"]),
        ]
        self._routes = Starlette(
            routes=routes, exception_handlers={HTTPException: self._refuse}
        )
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._serve,
                interface="asgi3",
                http=_Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="critical",  # the page shows the errors
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=2,
            )
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serves until `shutdown` or, in the main thread, a signal."""
        del poll_interval  # uvicorn has its own
        self._uvicorn.run(sockets=[self.socket])

    def shutdown(self) -> None:
        """Ends `serve_forever` soon."""
        self._uvicorn.should_exit = True

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuses requests of other pages; adds headers to all responses."""

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = {**_HEADERS, "Content-Security-Policy": self._policy}
                message["headers"] = [
                    *message["headers"],
                    *((k.lower().encode(), v.encode()) for k, v in headers.items()),
                ]
            await send(message)

        request = Request(scope, receive)
        app: Any = self._routes
        if error := self._why_not_ours(request):
            app = await self._refuse(request, error)
        await app(scope, receive, send_with_headers)

    def _why_not_ours(self, request: Request) -> HTTPException | None:
        """Why a request does not come from the page at an address of this machine.

        Pages of other sites can reach this server, either through its address or
        through their own host name if it resolves to this machine.
        """
        host = request.headers.get("Host", "")
        origins = request.headers.getlist("Origin")
        sites = request.headers.getlist("Sec-Fetch-Site")
        if host not in self._hosts:
            address = f"http://{HOST}:{self.server_port}/"
            return HTTPException(421, f"open {address} instead")
        if {*origins} - {f"http://{host}"} or (
            request.method not in ("GET", "HEAD") and {*sites} - {"none", "same-origin"}
        ):
            return HTTPException(403, "only the page of this server may send requests")
        return None

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """Reads and discards the body, then answers with an error.

        With unread bytes, closing would reset the connection and lose the answer.
        """
        assert isinstance(error, HTTPException)
        if error.status_code not in (400, 408):  # of a body that was waited for
            try:
                async with asyncio.timeout(UPLOAD_S):
                    await _drain(request)
            except TimeoutError:
                pass
        return _json(error.status_code, {"error": error.detail})

    async def _get_page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html")

    async def _get_about(self, request: Request) -> Response:
        return _json(200, self._about() | {"largest_bytes": LARGEST_BYTES})

    async def _predict(self, request: Request) -> Response:
        if request.headers.getlist("Content-Type") != [_KIND]:
            # A form of another site cannot send this type without a CORS preflight.
            raise HTTPException(415, f"send the bytes of the image as {_KIND}")
        length = request.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in request.headers:
            raise HTTPException(411, "send the length of the image as Content-Length")
        if len(length) > 20 or int(length) > LARGEST_BYTES:
            limit = f"{LARGEST_BYTES / 1e6:.0f} MB"
            raise HTTPException(
                413, f"the file is larger than {limit}; shrink the image"
            )
        if self.uploads >= MOST_UPLOADS:
            raise HTTPException(503, "too many images at once; try again in a moment")
        self.uploads += 1
        try:
            async with asyncio.timeout(UPLOAD_S):
                data = await request.body()
            if len(data) < int(length):
                raise HTTPException(400, "the upload was cut off; try again")
            return await run_in_threadpool(self._respond, data)
        except TimeoutError:
            raise HTTPException(408, "the upload is too slow; try again") from None
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        finally:
            self.uploads -= 1

    def _respond(self, data: bytes) -> Response:
        """The response to an image; every error gets one."""
        try:
            with self._working:
                return _json(200, self._answer(data))
        except ValueError as error:
            return _json(422, {"error": str(error)})
        except Exception as error:
            print_line(f"demo: {error!r}")
            memory = isinstance(error, MemoryError)
            if memory or "RESOURCE_EXHAUSTED" in str(error):
                return _json(507, {"error": "not enough memory; shrink the image"})
            return _json(500, {"error": "the prediction failed; see the terminal"})


class _Connection(H11Protocol):
    """A connection with deadlines, also for a client that sends a little at times."""

    _deadlines: tuple[asyncio.TimerHandle, ...] = ()

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._deadlines = (
            self.loop.call_later(HEAD_S, self._close_without_request),
            self.loop.call_later(CONNECTION_S, transport.abort),
        )

    def connection_lost(self, exc: Exception | None) -> None:
        for deadline in self._deadlines:
            deadline.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Ends an upload that is cut off; the client may still read the answer."""
        if self.cycle is None:
            return False
        self.cycle.more_body = False
        self.cycle.message_event.set()
        return True

    def _close_without_request(self) -> None:
        if self.cycle is None:
            self.transport.close()


async def _drain(request: Request) -> None:
    left = _DRAINED_BYTES
    while left > 0:
        message = await request.receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body"):
            return


def _json(status: int, value: Any) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")
