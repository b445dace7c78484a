"""Thousands of malformed requests over sockets: each is refused with a reason, no file is touched, and the service lives on."""

import collections
import json
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.serve.conftest import EXTRA, data_url, make_model, png
from tests.serve.malformed import GOOD, MOST_BODY, MOST_PIXELS, NAME, malformed, posted, slow

uvicorn = pytest.importorskip("uvicorn", reason=EXTRA)
pytest.importorskip("starlette", reason=EXTRA)
pytest.importorskip("python_multipart", reason=EXTRA)

from multimodal.serve.app import make_app  # noqa: E402
from multimodal.serve.checkpoints import Checkpoint  # noqa: E402
from multimodal.serve.http import http_protocol  # noqa: E402
from multimodal.serve.settings import Settings  # noqa: E402

TOUCHES = re.compile(
    r"open|os\.|shutil\.|subprocess\.|socket\.connect|glob\.|tempfile\.|exec|compile|ctypes\.dlopen|import"
)
CLIENTS = 8
touched: list[str] = []  # what the service's threads did with files, processes and hosts
watching: bool | None = None  # None: not yet


def _notice(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and TOUCHES.match(event) and not threading.current_thread().name.startswith("client"):
        touched.append(f"{event} {arguments[:1]}")


@contextmanager
def watched() -> Iterator[list[str]]:
    global watching
    if watching is None:  # a hook stays to the end of the process, so there is none before it is needed
        sys.addaudithook(_notice)
    touched.clear()
    watching = True
    try:
        yield touched
    finally:
        watching = False


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a service in a thread of this process, where what it opens can be seen."""
    settings = Settings(
        rows=4, capacity=128, queue=64, max_body=MOST_BODY, max_pixels=MOST_PIXELS, max_seconds=5, body_s=1.0
    )
    app = make_app([Checkpoint("tiny", make_model, settings)], settings)
    config = uvicorn.Config(app, http=http_protocol(settings), log_config=None, access_log=False, server_header=False)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        for path, body in GOOD.items():  # what a first request of its kind imports
            assert status_of(asked(listening.getsockname()[1], posted(path, body))) == 200, path
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


def asked(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """All that the service sends back to these bytes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as made:
        for number, part in enumerate(parts):
            time.sleep(pause_s if number else 0)
            try:
                made.sendall(part)
            except (BrokenPipeError, ConnectionResetError):  # it was refused before all had come
                break
        while True:
            try:
                got = made.recv(65536)
            except ConnectionResetError:
                break
            if not got:
                break
            received += got
    return received


def status_of(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else 0


def fault(answer: bytes) -> str | None:
    """What is wrong with the refusal of a malformed request."""
    status, (head, _, body) = status_of(answer), answer.partition(b"\r\n\r\n")
    if not 400 <= status < 500:
        return f"status {status}"
    if b"Traceback" in answer or b'File "' in answer:
        return "it shows the code"
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    body = body[: int(length[1])] if length else body  # what came behind a head that is one may be answered as well
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"no error in {body[:100]!r}"
    return None if len(error["message"]) > 10 and {"type", "param", "code"} <= set(error) else f"no reason in {error}"


def attack(port: int, count: int, seed: int) -> collections.Counter[int]:
    """Send this many malformed requests; the number of answers by status."""
    requests = list(malformed(count, seed))
    with watched() as found, ThreadPoolExecutor(CLIENTS, "client") as pool:
        answers = list(pool.map(lambda request: asked(port, request[1]), requests))
    wrong = [
        (kind, told, request, answer[:300])
        for (kind, request), answer in zip(requests, answers, strict=True)
        if (told := fault(answer))
    ]
    assert collections.Counter((kind, told) for kind, told, _, _ in wrong) == {}, wrong[0]
    assert found == []
    good = asked(port, posted(NAME, {"fields": {"image": data_url(png())}}))
    assert status_of(good) == 200
    assert status_of(asked(port, b"GET /health HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")) == 200
    return collections.Counter(map(status_of, answers))


def test_malformed_requests_are_refused_with_a_reason_and_touch_no_file(port):
    statuses = attack(port, 240, seed=1)
    assert {400, 403, 404, 405, 413} <= set(statuses)


@pytest.mark.training
def test_ten_thousand_malformed_requests(port):
    print(attack(port, 10_000, seed=0))


def test_slow_requests_are_refused(port):
    draw = random.Random(0)
    with ThreadPoolExecutor(24, "client") as pool:
        answers = list(pool.map(lambda parts: asked(port, *parts, pause_s=0.3), [slow(draw) for _ in range(24)]))
    assert {status_of(answer) for answer in answers} == {408}
    assert [told for answer in answers if (told := fault(answer))] == []


def test_files_that_are_touched_are_noticed(tmp_path):
    with watched() as found, ThreadPoolExecutor(1, "service") as pool:
        pool.submit(lambda: (tmp_path / "a").write_text("b")).result()
    assert any("open" in event for event in found)


def test_a_good_answer_is_no_refusal(port):
    for path, body in GOOD.items():
        assert fault(asked(port, posted(path, body))) == "status 200"
