"""The web demo: its server over HTTP, and its page in a browser."""

import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

from cra_jax.inference import demo, demo_server, predict
from tests.helpers import tiny_run

ROOT = Path(__file__).resolve().parents[2]
CONTENT_TYPE = {"Content-Type": "application/octet-stream"}


def _png(width=60, height=45, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    tiny_run.save(workdir)
    return predict.load(workdir)


@contextlib.contextmanager
def _serving(predictor):
    with demo.make_server(predictor, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(predictor):
    with _serving(predictor) as server:
        yield server


def _request(server, method="POST", path="/predict", body: Any = None, **headers):
    """Status, headers and body of the response; a header None is not sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    with contextlib.closing(connection):
        sent = {k.replace("_", "-"): v for k, v in headers.items() if v is not None}
        connection.putrequest(method, path, skip_host="Host" in sent)
        if body is not None and "Content_Length" not in headers:
            sent["Content-Length"] = str(len(body))
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()


def _predict(server, body, **headers):
    return _request(
        server, body=body, **{"Content_Type": CONTENT_TYPE["Content-Type"], **headers}
    )


def test_the_response_equals_the_predictors_output(server, predictor):
    data = _png()
    status, _, body = _predict(server, data)
    assert status == 200
    answer = json.loads(body)
    expected = predictor(data)
    assert [c["name"] for c in answer["classes"]] == list(expected.classes)
    probabilities = [c["probability"] for c in answer["classes"]]
    assert_allclose(probabilities, expected.probabilities, rtol=1e-4)
    assert answer["size_px"] == [60, 45]
    assert answer["shown_px"] == [48, 36]
    # Positions are fractions of the image.
    corners = expected.attention_px / [60, 45]
    assert_allclose(answer["corners"], corners, atol=1e-4)
    crop = np.divide(expected.crop_box_px, [60, 45, 60, 45])
    assert_allclose(answer["crop"], crop, atol=1e-6)
    for key, size in (("image", (48, 36)), ("cam", (32, 32))):
        head, _, text = answer[key].partition(",")
        assert head.startswith("data:image/")
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            assert image.size == size


def test_the_page_runs_only_its_own_script(server):
    status, headers, body = _request(server, "GET", "/")
    assert status == 200
    assert body == (ROOT / "cra_jax" / "inference" / "demo.html").read_bytes()
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "*" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"http://" not in body  # the page loads nothing
    assert b"https://" not in body
    assert b"innerHTML" not in body


def test_server_listens_on_this_machine_only(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/", "/about", "/predict"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""]
)
def test_other_host_names_are_refused(server, path, host):
    """Another site can resolve its host name to 127.0.0.1 after its page is open."""
    method = "POST" if path == "/predict" else "GET"
    host = host.format(port=server.server_port)
    status, _, body = _request(
        server,
        method,
        path,
        _png(),
        Content_Type=CONTENT_TYPE["Content-Type"],
        Host=host,
    )
    assert status == 421
    assert b"auk" not in body


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_requests_of_other_sites_are_refused(server, headers):
    sent = {k: v.format(port=server.server_port) for k, v in headers.items()}
    assert _predict(server, _png(), **sent)[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_requests_of_the_page_are_accepted(server, host):
    address = f"{host}:{server.server_port}"
    headers = {
        "Host": address,
        "Origin": f"http://{address}",
        "Sec_Fetch_Site": "same-origin",
    }
    assert _predict(server, _png(), **headers)[0] == 200


def _decompression_bomb():
    """A PNG whose header declares 60,000 x 60,000 pixels."""
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _too_many_pixels():
    """A valid PNG of a few kB with more pixels than the limit."""
    file = io.BytesIO()
    Image.new("1", (8_000, 6_400)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"", {}, 422, "empty"),
        (b"GIF89a", {}, 422, "not an image"),
        (_png()[:-60], {}, 422, "damaged"),
        (_decompression_bomb(), {}, 422, "shrink"),
        (_too_many_pixels(), {}, 422, "limit of 50,000,000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", {}, 422, "not an image"),
        (_png(), {"Content_Type": "image/png"}, 415, "octet-stream"),
        (_png(), {"Content_Type": "text/plain"}, 415, "octet-stream"),
        (_png(), {"Content_Length": None}, 411, "length"),
        (
            b"0\r\n\r\n",
            {"Content_Length": None, "Transfer_Encoding": "chunked"},
            411,
            "length",
        ),
        (b"x" * (demo_server.LARGEST_BYTES + 1), {}, 413, "larger than 20 MB"),
    ],
    ids=[
        "empty",
        "header",
        "truncated",
        "bomb",
        "pixels",
        "postscript",
        "image",
        "text",
        "unknown",
        "chunked",
        "large",
    ],
)
def test_invalid_uploads_are_refused(server, body, headers, status, message):
    code, _, text = _predict(server, body, **headers)
    assert (code, message in json.loads(text)["error"]) == (status, True)
    assert _predict(server, _png())[0] == 200  # the server still works


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/demo.html", 404),
        ("POST", "/", 405),
        ("OPTIONS", "/predict", 405),  # refuses the CORS preflight of other sites
        ("PUT", "/predict", 405),
    ],
)
def test_other_paths_and_methods_are_refused(server, method, path, status):
    body = b"" if method in ("POST", "PUT") else None
    assert _request(server, method, path, body)[0] == status


def test_simultaneous_uploads_are_limited(server):
    """An upload above the limit is refused at once; the others are answered."""
    data = _png()
    head = (
        f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        f"Content-Type: {CONTENT_TYPE['Content-Type']}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        uploads = []
        for _ in range(demo_server.MOST_UPLOADS):
            one = socket.create_connection(("127.0.0.1", server.server_port), 30)
            uploads.append(stack.enter_context(one))
            one.sendall(head.encode())
        for _ in range(100):
            status = _predict(server, data)[0]
            if status == 503:
                break
            time.sleep(0.02)  # until all uploads have started
        assert status == 503
        for one in uploads:
            one.sendall(data)
        for one in uploads:
            assert one.recv(12) == b"HTTP/1.1 200"
    assert _predict(server, data)[0] == 200


def test_simultaneous_connections_are_limited(predictor):
    with _serving(predictor) as server, contextlib.ExitStack() as stack:
        for _ in range(demo_server.MOST_CONNECTIONS):
            one = socket.create_connection(("127.0.0.1", server.server_port), 30)
            stack.enter_context(one)
        # Shorter than the deadline of the idle connections.
        timeout_s = demo_server.HEAD_S / 2
        with socket.create_connection(
            ("127.0.0.1", server.server_port), timeout_s
        ) as late:
            assert late.recv(1) == b""
        stack.close()
        for _ in range(100):
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                assert _request(server, "GET", "/")[0] == 200
                break
            time.sleep(0.02)
        else:
            pytest.fail("the server does not accept connections again")


def _trickle(connection, start):
    """Sends a byte at a time until the server closes; returns what it has sent."""
    connection.settimeout(0.02)
    answer = b""
    with contextlib.suppress(ConnectionError):
        connection.sendall(start)
        for _ in range(500):
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                part = connection.recv(1 << 16)
                if not part:
                    return answer
                answer += part
        pytest.fail("the server does not close the connection")
    return answer


def test_slow_requests_end_at_their_deadlines(predictor, monkeypatch):
    """No matter how often a client sends something, or whether it reads."""
    assert demo_server.HEAD_S < demo_server.UPLOAD_S < demo_server.CONNECTION_S <= 120
    monkeypatch.setattr(demo_server, "HEAD_S", 0.5)
    monkeypatch.setattr(demo_server, "UPLOAD_S", 0.5)
    monkeypatch.setattr(demo_server, "CONNECTION_S", 2.0)
    with _serving(predictor) as server:
        address = "127.0.0.1", server.server_port
        head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % address[1]
        kind = b"Content-Type: application/octet-stream\r\n"
        upload = b"Content-Length: 1000000\r\n\r\n"
        with socket.create_connection(address, 10) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection(address, 10) as slow:
            assert _trickle(slow, head + b"A: ") == b""
        with socket.create_connection(address, 10) as slow:
            assert _trickle(slow, head + kind + upload).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(address, 10) as slow:  # of another type: refused
            assert _trickle(slow, head + upload).startswith(b"HTTP/1.1 415 ")
        assert server.uploads == 0
        # A response that nobody reads.
        monkeypatch.setattr(demo, "describe", lambda answer: {"image": "x" * 10**8})
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(address)
            size = b"Content-Length: %d\r\n\r\n" % len(_png())
            deaf.sendall(head + kind + size + _png())
            time.sleep(3)
            deaf.settimeout(10)
            received = 0
            with contextlib.suppress(ConnectionError):
                while part := deaf.recv(1 << 20):
                    received += len(part)
            assert received < 10**8
        assert not server._uvicorn.server_state.connections


@pytest.mark.parametrize("length", ["9" * 20, "9" * 5000, "-1", "1e3", "\u0664", "1,2"])
def test_invalid_lengths_are_refused_with_an_answer(server, length):
    head = (
        f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {length}\r\n\r\n"
    )
    address = "127.0.0.1", server.server_port
    with socket.create_connection(address, 10) as connection:
        connection.sendall(head.encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (MemoryError(), 507, "not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: of XLA"), 507, "not enough memory"),
        (RuntimeError("of XLA"), 500, "see the terminal"),
        (KeyError("a mistake"), 500, "see the terminal"),
        (ValueError("of the image"), 422, "of the image"),
    ],
)
def test_every_error_of_a_prediction_is_answered(predictor, error, status, message):
    class Failing:
        network = predictor.network

        def each(self, several, *, keep):
            raise error

    with _serving(Failing()) as server:
        code, headers, body = _predict(server, _png())
    assert (code, message in json.loads(body)["error"]) == (status, True)
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_only_one_origin_and_content_type_are_accepted(server):
    """A second header cannot hide behind a first one."""
    address = f"127.0.0.1:{server.server_port}"
    for name, values in (
        ("Origin", (f"http://{address}", "http://evil.example")),
        ("Sec-Fetch-Site", ("same-origin", "cross-site")),
        ("Content-Type", ("application/octet-stream", "text/plain")),
    ):
        connection = http.client.HTTPConnection(address, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest("POST", "/predict")
            for value in values:
                connection.putheader(name, value)
            if name != "Content-Type":
                connection.putheader("Content-Type", "application/octet-stream")
            connection.putheader("Content-Length", str(len(_png())))
            connection.endheaders(_png())
            assert connection.getresponse().status in (403, 415)


def test_a_missing_package_is_an_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    install = r"needs the package starlette, .*: pip install \"cra_jax\[demo\]\" "
    with pytest.raises(ValueError, match=install):
        demo.run(None, tmp_path / "nowhere")


def test_an_upload_that_is_cut_off_is_answered(server):
    head = (
        f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        "Content-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\n"
    )
    address = "127.0.0.1", server.server_port
    with socket.create_connection(address, 10) as connection:
        connection.sendall(head.encode() + _png()[:500])
        connection.shutdown(socket.SHUT_WR)
        assert b"cut off" in connection.makefile("rb").read()
    assert server.uploads == 0


def test_an_unusable_port_is_an_error(server, predictor):
    for port in (server.server_port, 70_000):
        with pytest.raises(ValueError, match=f"port {port} cannot be used"):
            demo.make_server(predictor, port=port)


def test_demo_prints_its_address_and_stops_with_ctrl_c(tmp_path):
    tiny_run.save(tmp_path)
    arguments = ["--mode=demo", f"--workdir={tmp_path}", "--port=0"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("http://127.0.0.1:")
            port = int(line.split("/")[2].split(":")[1])
            reply = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            reply.request("POST", "/predict", _png(), CONTENT_TYPE)
            assert reply.getresponse().status == 200
            reply.close()
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0
    assert stderr.endswith("stopped\n")
    assert "Traceback" not in stderr


# --- in a browser -------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium; the test is skipped if it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(
            "SKIPPED, NOT PASSED: no browser; apt-get install chromium chromium-driver"
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run "
        "disable-background-networking disable-component-update disable-sync"
    )
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    browser.set_page_load_timeout(60)
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, server):
    browser.set_window_size(1280, 900)
    browser.get(f"http://127.0.0.1:{server.server_port}/")
    _wait(browser, lambda: "6 classes" in _text(browser, "about"))
    yield browser
    problems = [x["message"] for x in browser.get_log("browser")]
    # The browser logs the status 422 of refused images; there is no other message.
    assert [x for x in problems if "422" not in x] == []


def _wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30, 0.05).until(lambda _: condition())


def _text(browser, name):
    return browser.find_element("id", name).text


def _choose(browser, file):
    browser.find_element("id", "file").send_keys(str(file))
    _wait(
        browser,
        lambda: (
            file.name in _text(browser, "status" if _ok(browser) else "error")
            and "Classifying" not in _text(browser, "status")
        ),
    )


def _ok(browser):
    return not browser.find_element("id", "error").is_displayed()


def _screenshot(browser, name):
    """Saves a screenshot if CRA_JAX_SCREENSHOTS names a directory."""
    if directory := os.environ.get("CRA_JAX_SCREENSHOTS"):
        browser.save_screenshot(str(Path(directory) / f"{name}.png"))


def _rows(browser):
    items = browser.find_elements("css selector", "#classes li")
    return [item.text.splitlines() for item in items]


def test_an_image_is_classified_and_hostile_names_are_text(opened, predictor, tmp_path):
    file = tmp_path / "<img src=x onerror=alert(1)>.png"
    file.write_bytes(_png(200, 120, seed=3))
    _choose(opened, file)
    expected = predictor(file.read_bytes())
    names = [row[0] for row in _rows(opened)]
    assert names == list(expected.classes)
    assert tiny_run.HOSTILE in names
    first = f"{100 * expected.probabilities[0]:.1f} %"
    assert _rows(opened)[0][1] == first
    status = f"{expected.classes[0]}, {first}: {file.name} (200 × 120 pixels)"
    assert _text(opened, "status") == status
    images = opened.find_elements("tag name", "img")
    assert [one.get_attribute("id") for one in images] == ["image", "cam"]
    assert opened.title == "Image classification - cra_jax"
    assert opened.execute_script("return document.getElementById('image').alt") == (
        f"{file.name}: {expected.classes[0]}"
    )
    _screenshot(opened, "desktop")


def _positions(browser):
    """Positions of the layers, as fractions of the shown image."""
    return browser.execute_script(
        """
        const box = (id) => document.getElementById(id).getBoundingClientRect();
        const whole = box("image");
        const fractions = (r) => [(r.left - whole.left) / whole.width,
          (r.top - whole.top) / whole.height, (r.right - whole.left) / whole.width,
          (r.bottom - whole.top) / whole.height];
        return {cam: fractions(box("cam")), frame: fractions(box("frame")),
          attention: fractions(box("attention")), whole: [whole.width, whole.height],
          page: document.documentElement.scrollWidth};
        """
    )


@pytest.mark.parametrize("window", [(1280, 900), (500, 800)])
def test_layers_have_the_correct_positions_at_any_window_size(
    opened, predictor, tmp_path, window
):
    opened.set_window_size(*window)
    file = tmp_path / "wide.png"
    file.write_bytes(_png(200, 120, seed=4))
    _choose(opened, file)
    answer = predictor(file.read_bytes())
    size = np.array([200, 120])
    _wait(opened, lambda: _positions(opened)["whole"][0] > 0)
    found = _positions(opened)
    crop = (np.reshape(answer.crop_box_px, (2, 2)) / size).ravel()
    assert_allclose(found["cam"], crop, atol=0.01)
    assert_allclose(found["frame"], crop, atol=0.01)
    corners = answer.attention_px / size
    whole = [*corners.min(0), *corners.max(0)]
    # The tolerance includes the width of the line.
    assert_allclose(found["attention"], whole, atol=0.015)
    width, height = found["whole"]
    assert width / height == pytest.approx(200 / 120, rel=0.02)
    assert found["page"] <= opened.execute_script("return innerWidth")


def test_layers_can_be_hidden_by_keyboard(opened, tmp_path):
    from selenium.webdriver.common.keys import Keys

    opened.find_element("tag name", "body").send_keys(Keys.TAB)
    first = opened.switch_to.active_element
    assert first.get_attribute("id") == "file"
    assert first.accessible_name == "Choose an image"
    file = tmp_path / "a.png"
    file.write_bytes(_png())
    _choose(opened, file)
    for box, layer in (("show-cam", "cam"), ("show-attention", "attention")):
        element = opened.find_element("id", layer)
        assert element.is_displayed()
        opened.find_element("id", box).send_keys(Keys.SPACE)
        assert not element.is_displayed()


def test_a_file_that_is_no_image_is_an_error_and_the_next_one_works(opened, tmp_path):
    bad, good = tmp_path / "<img src=x>.jpg", tmp_path / "good.png"
    bad.write_text("<html>404</html>")
    good.write_bytes(_png())
    _choose(opened, bad)
    error = _text(opened, "error")
    assert error.startswith(f"{bad.name}: ")
    assert "not an image" in error
    assert not opened.find_element("id", "result").is_displayed()
    _screenshot(opened, "error")
    _choose(opened, good)
    assert _ok(opened)
    assert len(_rows(opened)) == 5


def test_a_file_that_is_too_large_is_not_sent(opened, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(b"\0" * (demo_server.LARGEST_BYTES + 1))
    _choose(opened, large)
    assert "larger than 20 MB" in _text(opened, "error")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_can_be_dropped_or_pasted(opened, event):
    opened.execute_script(
        """
        const bytes = Uint8Array.from(arguments[0]);
        const data = new DataTransfer();
        data.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        const event = arguments[1] === "drop"
          ? new DragEvent("drop", {dataTransfer: data, bubbles: true})
          : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
        document.body.dispatchEvent(event);
        """,
        list(_png()),
        event,
    )
    _wait(
        opened, lambda: _text(opened, "status").endswith("dropped.png (60 × 45 pixels)")
    )
    assert len(_rows(opened)) == 5
