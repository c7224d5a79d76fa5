"""The routes of the server, and what guards them."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.exceptions import HTTPException

from gpt2_jax.config import ConfigError
from gpt2_jax.features import attentions, next_log_probs, pad
from gpt2_jax.pretrained import GPT2
from gpt2_jax.serve.completions import Answer, check_model, name_token, refuse_if
from gpt2_jax.serve.engine import ClosedError, Engine, FullError, likeliest
from gpt2_jax.serve.protocol import (
    INSPECTED,
    Completion,
    CompletionRequest,
    ErrorBody,
    Inspection,
    InspectRequest,
    ModelCard,
    ModelList,
    NextToken,
    Refused,
)

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
KINDS |= {".svg": "image/svg+xml"}
MOST_BYTES = 2**20  # of a request's body
RECEIVE_SECONDS = 10.0  # for a body to arrive
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src "
    "'self'; connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
COUNTED = ("/v1/completions", "/v1/inspect", "/v1/models", "/health", "/metrics", "/")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What the client did wrong"},
    "5XX": {"model": ErrorBody, "description": "The server cannot"},
}


@dataclass(frozen=True, kw_only=True)
class Doors:
    """Who may come in."""

    hosts: tuple[str, ...]  # names in the Host header, without port; * is any
    api_key: str | None = None
    origins: tuple[str, ...] = ()  # of pages that may call from a browser


def make_app(lm: GPT2, name: str, engine: Engine, doors: Doors) -> Any:
    """Return the ASGI application that serves `lm` as `name`."""
    app = FastAPI(
        title="gpt2_jax",
        version="1",
        docs_url=None,  # its page is from a CDN
        redoc_url=None,
        description="One GPT-2 behind OpenAI's completions API.",
    )
    metrics = _Metrics(engine)
    started = int(time.time())

    @app.post("/v1/completions", response_model=Completion, responses=ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Write on from a prompt."""
        answer = Answer(lm, name, engine, body)
        answer.start()
        if body.stream:
            return _EventStream(answer, metrics)
        async with _watched(request, answer):
            whole = await answer.whole()
        metrics.note(answer)
        return JSONResponse(whole.model_dump())

    @app.post("/v1/inspect", responses=ERRORS)
    async def inspect(body: InspectRequest) -> Inspection:
        """Give tokens, their log-probabilities, what could follow, and attention."""
        check_model(body.model, name)
        work = engine.call(lambda: _inspect(lm, body))
        return await asyncio.wrap_future(work)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        """List the one model that is served."""
        return ModelList(data=[_card(lm, name, started)])

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def model(model: str) -> ModelCard:
        """Describe a model."""
        check_model(model, name)
        return _card(lm, name, started)

    @app.get("/health", responses=ERRORS)
    async def health() -> dict[str, str]:
        """Say whether texts can be written."""
        if engine.error is not None:
            raise Refused(f"the engine has stopped: {engine.error}", status=503)
        return {"status": "ok"}

    @app.get("/metrics", responses=ERRORS)
    async def show_metrics() -> Response:
        """Give what Prometheus collects."""
        return Response(
            generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST
        )

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file("index.html")

    @app.get("/page/{file}", include_in_schema=False)
    async def page(file: str) -> Response:
        return _file(file)

    _handle_errors(app)
    if doors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(doors.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return _Guard(app, doors, metrics)


def _card(lm, name, started) -> ModelCard:
    return ModelCard(
        id=name,
        created=started,
        max_model_len=lm.config.n_ctx,
        n_layer=lm.config.n_layer,
        n_head=lm.config.n_head,
    )


def _file(name: str) -> Response:
    path = PAGE / name
    if path.parent != PAGE or path.suffix not in KINDS or not path.is_file():
        raise HTTPException(404)
    kind = f"{KINDS[path.suffix]}; charset=utf-8"
    headers = {"Cache-Control": "no-cache"}
    return Response(path.read_bytes(), media_type=kind, headers=headers)


def _inspect(lm: GPT2, asked: InspectRequest) -> Inspection:
    tokenizer: Any = lm.tokenizer
    given = asked.prompt
    try:
        ids = tokenizer.encode(given) if isinstance(given, str) else given
        batch = pad(lm.config, [np.asarray(ids, np.int64)])
    except ConfigError as error:
        raise Refused(f"prompt: {error}", param="prompt") from error
    ids = batch.ids[0].tolist()
    if max(ids) >= tokenizer.n_vocab:
        allowed = f"allowed: ids below {tokenizer.n_vocab}"
        raise Refused(f"prompt: token id {max(ids)}; {allowed}", param="prompt")
    maps = None
    if asked.layer is not None:
        most = lm.config.n_layer
        refuse_if(asked.layer >= most, "layer", f"{asked.layer}; allowed: below {most}")
        text = f"{len(ids)} tokens; allowed with layer: {INSPECTED}"
        refuse_if(len(ids) > INSPECTED, "prompt", text)
        heads = attentions(lm.config, lm.params, batch)[asked.layer, 0]
        maps = [
            [np.round(row[: i + 1], 4).tolist() for i, row in enumerate(head)]
            for head in heads
        ]
    log_probs: list[float | None] = [None]
    following: list[list[NextToken]] = []
    for i, row in enumerate(next_log_probs(lm.config, lm.params, batch.ids[0])):
        row = row[: tokenizer.n_vocab]
        following.append(
            [
                NextToken(token=name_token(tokenizer, token), id=token, logprob=p)
                for token, p in likeliest(row, asked.top)
            ]
        )
        if i + 1 < len(ids):
            log_probs.append(float(row[ids[i + 1]]))
    return Inspection(
        tokens=[name_token(tokenizer, token) for token in ids],
        token_ids=ids,
        logprobs=log_probs,
        next=following,
        attention=maps,
    )


class _Metrics:
    """What Prometheus collects."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        how: dict[str, Any] = dict(registry=self.registry)
        self.requests = Counter(
            "gpt2_requests", "Requests answered", ["path", "status"], **how
        )
        tokens = Counter("gpt2_tokens", "Tokens read and written", ["kind"], **how)
        self.read, self.written = tokens.labels("prompt"), tokens.labels("completion")
        self.seconds = Histogram(
            "gpt2_request_seconds", "From the request to its answer", **how
        )
        self.first = Histogram(
            "gpt2_first_token_seconds", "From the request to its first token", **how
        )
        Gauge("gpt2_live", "Texts being written", **how).set_function(
            lambda: engine.live
        )
        Gauge("gpt2_waiting", "Texts that wait for a lane", **how).set_function(
            lambda: engine.waiting
        )

    def note(self, answer: Answer) -> None:
        """Count what an answer took."""
        self.read.inc(answer.prompt_tokens)
        self.written.inc(answer.completion_tokens)
        self.seconds.observe(time.perf_counter() - answer.began)
        if answer.first_token_at is not None:
            self.first.observe(answer.first_token_at - answer.began)


class _EventStream(Response):
    """Server-sent events, one a piece; a client that goes away cancels the answer."""

    def __init__(self, answer: Answer, metrics: _Metrics):
        super().__init__(media_type="text/event-stream")
        self._answer, self._metrics = answer, metrics
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # nginx would hold events back

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send the events."""
        start = {"type": "http.response.start", "status": 200}
        gone = asyncio.create_task(_wait_until_gone(receive, self._answer))
        try:
            await send(start | {"headers": self.raw_headers})
            async for line in self._lines():
                data = f"data: {line}\n\n".encode()
                body = {"type": "http.response.body", "body": data, "more_body": True}
                await send(body)
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self._answer.cancel()
            self._metrics.note(self._answer)

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async for event in self._answer.events():
                yield event.model_dump_json()
        except FloatingPointError as error:  # too late for a status
            yield json.dumps(Refused(str(error), status=500).body)
        yield "[DONE]"


@contextlib.asynccontextmanager
async def _watched(request: Request, answer: Answer) -> AsyncIterator[None]:
    """Cancel the answer if the client goes away meanwhile."""
    gone = asyncio.create_task(_wait_until_gone(request.receive, answer))
    try:
        yield
    finally:
        gone.cancel()
        answer.cancel()


async def _wait_until_gone(receive: Receive, answer: Answer) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


class _Guard:
    """The outermost layer: hosts, key, size and time of a body, security headers."""

    def __init__(self, app: Any, doors: Doors, metrics: _Metrics):
        self._app, self._doors, self._metrics = app, doors, metrics

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                pairs = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *pairs]
                path = scope["path"] if scope["path"] in COUNTED else "other"
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            self._check(scope)
            body = await _read_body(receive)
        except Refused as refusal:
            await _respond(refusal)(scope, receive, send_on)
            return
        if body is None:
            return
        try:
            await self._app(scope, _replay(body, receive), send_on)
        except asyncio.CancelledError:  # the time to drain is over
            if begun:
                raise
            refusal = Refused(str(ClosedError()), status=503)
            await _respond(refusal)(scope, receive, send_on)

    def _check(self, scope: Any) -> None:
        headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy that counts the length would take what follows for the body.
            text = "both Transfer-Encoding and Content-Length are given; allowed: one"
            raise Refused(text, status=400, headers={"Connection": "close"})
        host = headers.get("host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if "*" not in self._doors.hosts and name not in self._doors.hosts:
            allowed = ", ".join(self._doors.hosts)
            text = (
                f"Host is {host[:100]!r}; allowed: {allowed}; --allowed-host adds one"
            )
            raise Refused(text, status=403, code="host_not_allowed")
        wanted = self._doors.api_key
        origin = headers.get("origin", b"").decode("latin-1").lower()
        own = ("", f"http://{host}", f"https://{host}")
        if origin not in own and not {origin, "*"} & set(self._doors.origins):
            text = f"Origin is {origin[:100]!r}; --cors-origin lets a page call"
            raise Refused(text, status=403, code="origin_not_allowed")
        path = scope["path"]  # without a key, the page alone, which asks for it
        locked = path not in ("/", "/health") and not path.startswith("/page/")
        asks = scope["method"] == "OPTIONS"  # a browser does, before it sends the key
        if wanted is not None and locked and not asks:
            given = headers.get("authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {wanted}".encode()):
                text = "no or a wrong key; send Authorization: Bearer KEY"
                how = {"WWW-Authenticate": "Bearer"}
                code = "invalid_api_key"
                raise Refused(text, status=401, code=code, headers=how)
        length = headers.get("content-length", b"0")
        if length.isdigit() and len(length) < 20 and int(length) > MOST_BYTES:
            raise _too_large()


async def _read_body(receive: Receive) -> bytes | None:
    """Return the body, or None if the client went away before its end."""
    body, deadline = bytearray(), time.monotonic() + RECEIVE_SECONDS
    while True:
        left = deadline - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(left, 0.001))
        except TimeoutError as error:
            text = f"the body took more than {RECEIVE_SECONDS:.0f} s"
            raise Refused(text, status=408, headers={"Connection": "close"}) from error
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            raise _too_large()
        if not message.get("more_body"):
            return bytes(body)


def _too_large() -> Refused:
    text = f"the body is too large; allowed: {MOST_BYTES} bytes"
    return Refused(text, status=413, headers={"Connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return first.pop() if first else await receive()

    return receive_again


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _respond(error)

    @app.exception_handler(FullError)
    async def full(request: Request, error: FullError) -> Response:
        headers = {"Retry-After": "1"}
        text = f"the server is full: {error}; try again"
        return _respond(Refused(text, status=429, code="full", headers=headers))

    @app.exception_handler(ClosedError)
    async def closed(request: Request, error: ClosedError) -> Response:
        return _respond(Refused(str(error), status=503))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _respond(_explain(error.errors()))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path[:200]}: {error.detail}"
        headers = dict(error.headers or {})
        return _respond(Refused(text, status=error.status_code, headers=headers))

    @app.exception_handler(FloatingPointError)
    async def not_finite(request: Request, error: FloatingPointError) -> Response:
        return _respond(Refused(str(error), status=500, code="not_finite"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _respond(Refused(f"{type(error).__name__}: {error}", status=500))


def _respond(refusal: Refused) -> Response:
    return JSONResponse(
        refusal.body, status_code=refusal.status, headers=refusal.headers
    )


def _explain(errors: Any) -> Refused:
    """Return what is wrong with a body, of all that pydantic says the first."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Refused(f"the body is no JSON: {first['ctx']['error']}")
    if not place:
        return Refused("the body is no JSON object; Content-Type: application/json")
    name, found = place[0][:100], repr(first.get("input"))[:100]
    if first["type"] == "extra_forbidden":
        return Refused(f"{name}: no such field", param=name, code="unknown_field")
    if first["type"] == "missing":
        return Refused(f"{name}: it is missing", param=name)
    if any(error["type"] == "string_unicode" for error in errors):
        return Refused(f"{name}: a lone surrogate is in no text", param=name)
    if name == "prompt":
        allowed = "a text, a list of texts, token ids, or a list of those; none empty"
        return Refused(f"prompt: {found}; allowed: {allowed}", param=name)
    if name == "suffix":
        return Refused("suffix: it is not supported", param=name)
    problems = [e["msg"] for e in errors if e["loc"][:2] == first["loc"][:2]]
    text = "; or ".join(dict.fromkeys(problems))[:300]
    return Refused(f"{'.'.join(place[:1])}: {found}; {text}", param=name)
