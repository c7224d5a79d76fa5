import json
import resource
import socket
import threading
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from gpt2_jax import model
from gpt2_jax.config import ModelConfig
from gpt2_jax.pretrained import GPT2
from gpt2_jax.serve.app import Doors, make_app
from gpt2_jax.serve.engine import Engine
from gpt2_jax.serve.options import ServeOptions
from gpt2_jax.serve.server import LOOPBACK, make_server
from gpt2_jax.tokenizer import load_tokenizer

SHAPE = ModelConfig(
    n_vocab=257, n_ctx=160, n_layer=2, n_head=2, n_embd=16, initializer_range=0.4
)
NAME = "runs/tiny"
LANES, QUEUE = 4, 8


def body(**more) -> dict[str, Any]:
    """Return what asks for one completion."""
    return {"model": NAME, "prompt": "Hello", "max_tokens": 20, "seed": 2} | more


def post(**more) -> bytes:
    """Return the whole request that asks for it, after which the server closes."""
    data = json.dumps(body(**more)).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def memory_bytes() -> int:
    """Return what this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.fixture(scope="session")
def lm() -> GPT2:
    shape = model.resolve(SHAPE)
    return GPT2(shape, model.init(shape, jax.random.key(0)), load_tokenizer("bytes"))


class Served:
    """A server in a thread of this process."""

    def __init__(self, lm: GPT2, *, doors: Doors, lanes: int = LANES, name: str = NAME):
        self.engine = Engine(lm.config, lm.unstacked, lanes=lanes, queue=QUEUE)
        app = make_app(lm, name, self.engine, doors)
        self._server = make_server(app, ServeOptions(drain_seconds=5.0), self.engine)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        with self.engine:
            self._server.run_on(self._listener)
            self.engine.stop()

    def __enter__(self) -> "Served":
        self._thread.start()
        until = time.monotonic() + 30
        while not self._server.started and time.monotonic() < until:
            time.sleep(0.01)
        return self

    def __exit__(self, *error) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._listener.close()

    @property
    def connections(self) -> int:
        """Count open connections."""
        return len(self._server.server_state.connections)

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Return when nothing is written any more."""
        until = time.monotonic() + seconds
        while self.engine.live or self.engine.waiting:
            assert time.monotonic() < until, "a lane is not free again"
            time.sleep(0.005)


@pytest.fixture(scope="package")
def served(lm):
    with Served(lm, doors=Doors(hosts=LOOPBACK)) as made:
        yield made
    assert made.engine.error is None
