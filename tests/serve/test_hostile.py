"""Requests that no client of good will sends, over a bare socket."""

import gzip
import socket
import time
from typing import NamedTuple

import httpx
import pytest

from serve.conftest import memory_bytes

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
JSON = b"Content-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


class Exchange(NamedTuple):
    sent: int  # pieces
    answer: bytes
    reset: bool  # by the server, which may overtake its answer


def exchange(port: int, pieces) -> Exchange:
    """Send until the server closes; take its answer until it says no more."""
    sent, answer, reset = 0, b"", False
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            reset = True
        try:
            while piece := client.recv(2**16):
                answer += piece
                client.settimeout(1)
        except TimeoutError:
            assert answer, "nothing is answered"
        except ConnectionResetError:
            reset = True
    return Exchange(sent, answer, reset)


@pytest.fixture
def grown(served):
    """Count the bytes of memory that were taken since the test began."""
    httpx.get(f"{served.url}/health")
    before = memory_bytes()
    return lambda: memory_bytes() - before


def test_a_body_without_end_is_not_kept(served, grown):
    chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    head = HEAD + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
    found = exchange(served.port, [head, *[chunk] * 1600])  # 105 MB
    assert b" 413 " in found.answer or found.reset
    assert found.sent < 1000  # some more than 1 MiB lie in the system's buffers
    assert grown() < 20e6


def test_a_body_is_not_unpacked(served, grown):
    bomb = gzip.compress(b" " * 10**8)
    head = HEAD + JSON + b"Content-Encoding: gzip\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(bomb)
    assert b" 400 " in exchange(served.port, [head, bomb]).answer
    assert grown() < 20e6


@pytest.mark.parametrize(
    "request_bytes",
    [
        GET + b"X: " + b"x" * 2**20 + b"\r\n\r\n",
        GET + b"X-%d: 1\r\n" % 7 * 20_000 + b"\r\n",
        b"GET /" + b"x" * 2**20 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n" + SMUGGLED,
        GET + b"Content-Length: -1\r\n\r\n",
        GET + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        GET + b"Host: evil.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,  # TLS
    ],
    ids=[
        "a header of 1 MiB", "20,000 headers", "a path of 1 MiB", "two lengths",
        "a negative length", "a strange coding", "two hosts", "no host", "TLS",
    ],
)  # fmt: skip
def test_what_is_no_http_is_refused(served, request_bytes):
    _, answer, reset = exchange(served.port, [request_bytes])
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 403", b"HTTP/1.1 431")) or (
        reset and not answer and len(request_bytes) > 100_000
    )
    assert answer.count(b"HTTP/1.1 ") <= 1


@pytest.mark.parametrize("host", [b"127.0.0.1", b"evil.example"])
def test_a_request_hidden_in_a_body_is_not_answered(served, host):
    """By its chunks it ends before it, by its length behind it: RFC 9112, 6.1."""
    hidden = b"0\r\n\r\n" + SMUGGLED
    head = HEAD.replace(b"127.0.0.1", host) + JSON + b"Transfer-Encoding: chunked\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(hidden)
    answer = exchange(served.port, [head + hidden]).answer
    assert b" 400 " in answer and b"allowed: one" in answer
    assert b"/smuggled" not in answer and answer.count(b"HTTP/1.1 ") == 1


def test_bytes_that_drip_hold_nobody_up(served):
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        for byte in GET[:20]:
            slow.sendall(bytes([byte]))
            began = time.perf_counter()
            assert httpx.get(f"{served.url}/health").status_code == 200
            assert time.perf_counter() - began < 5
