"""The serving program: open the port, load the model, answer until told to stop."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2_jax.config import ConfigError, Dtype, Quantize
from gpt2_jax.generation import restrict_vocabulary
from gpt2_jax.pretrained import GPT2, load
from gpt2_jax.serve.app import Doors, make_app
from gpt2_jax.serve.engine import Engine
from gpt2_jax.serve.options import ServeOptions

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SILENT_SECONDS = 10  # without a whole request, or without taking what is sent
MOST_CONNECTIONS = 512


def serve(
    name: str,
    how: ServeOptions,
    *,
    dtype: Dtype = "auto",
    quantize: Quantize | None = None,
    allow_pickle: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the model `name` until SIGTERM or Ctrl-C; then finish what was begun.

    Raises
    ------
    ConfigError
        If the model cannot be served, or the address cannot be listened on.
    """
    with _listen(how.host, how.port) as listener:
        lm = load(name, dtype=dtype, quantize=quantize, allow_pickle=allow_pickle)
        serve_model(lm, name, how, listener, say=say)


def serve_model(
    lm: GPT2,
    name: str,
    how: ServeOptions,
    listener: socket.socket,
    *,
    say: Callable[[str], None],
) -> None:
    """Serve a loaded model on a socket that is bound."""
    if lm.tokenizer is None:
        text = "its directory lacks vocab.json and merges.txt, or tokenizer.json"
        raise ConfigError(f"MODEL {name!r} has no tokenizer: {text}; add them")
    drawable = restrict_vocabulary(lm.config, lm.tokenizer)
    engine = Engine(drawable, lm.unstacked, lanes=how.lanes, queue=how.queue)
    host, port = listener.getsockname()[:2]
    hosts = (*LOOPBACK, how.host.lower(), *(h.lower() for h in how.allowed_host))
    doors = Doors(hosts=hosts, api_key=how.api_key, origins=how.cors_origin)
    server = make_server(make_app(lm, name, engine, doors), how, engine)
    with engine:
        engine.warm_up(1, how.lanes)
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {name} at http://{shown}:{port}; Ctrl-C stops")
        server.run_on(listener)
        engine.stop()
    if engine.error is not None:
        raise RuntimeError("texts can no longer be written") from engine.error
    say("stopped")


def make_server(app: Any, how: ServeOptions, engine: Engine) -> "Server":
    """Return what speaks HTTP for an application."""
    patience: Any = max(how.drain_seconds, 0.01)  # 0 would be for ever
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        http=_ImpatientProtocol,
        ws="none",
        timeout_keep_alive=SILENT_SECONDS,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=patience,
        server_header=False,
    )
    return Server(config, engine)


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Give a bound socket; loading a model first would only delay the bad news."""
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # who comes while the model is read waits
        except OSError as error:
            why = error.strerror or str(error)
            raise ConfigError(
                f"--host {host} --port {port}: {why}; allowed: an address of this "
                "machine and a free port, such as 127.0.0.1 and 0, which is any"
            ) from error
        yield listener


class _ImpatientProtocol(H11Protocol):
    """HTTP that gives up clients that send no request or take no answer.

    uvicorn would wait for either.
    """

    _waiting = 0  # bytes to be sent at the last look

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look_later()

    def _look_later(self):
        self.loop.call_later(SILENT_SECONDS, self._look)

    def _look(self):
        before, self._waiting = self._waiting, self.transport.get_write_buffer_size()
        if self._waiting and self._waiting == before:
            self.transport.abort()  # closing would wait until all is taken
            return
        answered = self.cycle is not None and self.cycle.response_complete
        begun = answered and self.timeout_keep_alive_task is None  # another request
        if self.cycle is None or begun:
            self.transport.close()
        if self._waiting or not self.transport.is_closing():
            self._look_later()


class Server(uvicorn.Server):
    """uvicorn, ending with status 0 where it was asked to end, and with its engine."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    async def on_tick(self, counter: int) -> bool:
        """Say whether to end, ten times a second."""
        return await super().on_tick(counter) or self._engine.error is not None

    def run_on(self, listener: socket.socket) -> None:
        """Serve on a bound socket until told to stop."""
        asyncio.run(self._listen_to_signals(listener))

    async def _listen_to_signals(self, listener):
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
        await self.serve(sockets=[listener])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the loop: uvicorn raises them again when it is done."""
        yield
