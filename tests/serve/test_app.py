import asyncio
import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

from gpt2_jax.serve.app import MOST_BYTES, PAGE, Doors
from serve.conftest import LANES, NAME, QUEUE, Served, body, memory_bytes, post

HOSTS = ("127.0.0.1",)


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served.url, timeout=60) as made:
        yield made


@pytest.fixture
def lib(served):
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


def generate(lm, prompt="Hello", **how):
    how = dict(max_new_tokens=20, seed=2) | how
    return lm.generate(prompt, return_full_text=False, **how)[0]["generated_text"]


def test_openais_client(lm, lib):
    found = lib.completions.create(**body(n=2, logprobs=2, stop=["\x02"]))
    assert found.object == "text_completion" and len(found.choices) == 2
    assert found.choices[0].text == generate(lm, stop=["\x02"])
    assert found.usage.total_tokens == found.usage.prompt_tokens + (
        found.usage.completion_tokens
    )
    models = list(lib.models.list())
    assert [model.id for model in models] == [NAME]
    assert lib.models.retrieve(NAME).max_model_len == 160


def test_openais_client_streams(lm, lib):
    events = list(
        lib.completions.create(**body(n=2, logprobs=1, echo=True), stream=True,
                               stream_options={"include_usage": True})
    )  # fmt: skip
    whole = lib.completions.create(**body(n=2, logprobs=1, echo=True))
    for choice in whole.choices:
        pieces = [e.choices[0] for e in events if e.choices]
        pieces = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert pieces[-1].finish_reason == choice.finish_reason
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        for name in ("tokens", "text_offset"):
            joined = sum((getattr(p.logprobs, name) for p in pieces), [])
            assert joined == getattr(choice.logprobs, name)
    assert len(events) > 10
    assert events[-1].usage == whole.usage


def test_openais_async_client(lm, served):
    async def ask() -> list[str]:
        how = dict(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        async with openai.AsyncOpenAI(**how) as lib:
            asked = [lib.completions.create(**body(seed=i)) for i in range(6)]
            found = await asyncio.gather(*asked)
            text = ""
            async for event in await lib.completions.create(**body(), stream=True):
                text += event.choices[0].text
            return [one.choices[0].text for one in found] + [text]

    *texts, streamed = asyncio.run(ask())
    assert texts == [generate(lm, seed=i) for i in range(6)]
    assert streamed == generate(lm)


def test_openais_client_knows_our_errors(lib):
    with pytest.raises(openai.BadRequestError) as error:
        lib.completions.create(**body(max_tokens=1000))
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "max_tokens" and "by 845" in str(error.value)
    with pytest.raises(openai.NotFoundError):
        lib.completions.create(**body(model="gpt-4"))


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "no JSON object"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "parsing the body"),
        (b"[]", ""),
        (b"\xff\xfe", "JSON"),
        (b'{"model": "runs/tiny", "prompt": "a", "top": 1}', "top: no such field"),
        (b'{"model": "runs/tiny"}', "prompt: it is missing"),
        (b'{"model": "runs/tiny", "prompt": "a", "n": "two"}', "n: 'two'"),
        (b'{"model": "runs/tiny", "prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"model": "runs/tiny", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}", ""),
        (b'{"model": "runs/tiny", "prompt": ""}', "none empty"),
        (b'{"model": "runs/tiny", "prompt": "a", "suffix": "b"}', "not supported"),
    ],
)
def test_a_body_that_is_wrong_is_the_clients_fault(client, content, said):
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert said in error["message"] and len(error["message"]) < 600


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/chat/completions", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/page/..%2fapp.py", 404),
        ("GET", "/page/nothing.js", 404),
        ("GET", "/docs", 404),
    ],
)
def test_no_such_place(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_body_has_a_limit(client):
    large = body(prompt="x" * MOST_BYTES)
    assert client.post("/v1/completions", json=large).status_code == 413

    def pieces():
        yield from (b"x" * 2**16 for _ in range(20))

    answer = client.post("/v1/completions", content=pieces())
    assert answer.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr("gpt2_jax.serve.app.RECEIVE_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in slow.recv(4096)


WHOLE = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize("begun", [b"", WHOLE[:25], WHOLE + WHOLE[:25]])
def test_a_request_that_does_not_come_is_not_waited_for(served, monkeypatch, begun):
    monkeypatch.setattr("gpt2_jax.serve.server.SILENT_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as slow:
        slow.sendall(begun)
        if len(begun) > len(WHOLE):
            assert b" 200 " in slow.recv(4096)
        while slow.recv(4096):  # the rest of an answer
            pass  # and then it is closed


def test_a_request_that_takes_long_is_not_cut(served, client, monkeypatch):
    monkeypatch.setattr("gpt2_jax.serve.server.SILENT_SECONDS", 0.01)
    with httpx.Client(base_url=served.url, timeout=60) as fresh:
        answer = fresh.post("/v1/completions", json=body(max_tokens=150, n=4))
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 4


@contextlib.contextmanager
def slow_client(lm, **how):
    """Give a server that has few bytes under way, and a client that asked it for many.

    The answer, of over 0.1 MB, is waited for until its first bytes are there.
    """
    asked = post(max_tokens=150, n=2 * LANES, logprobs=5, **how)
    with Served(lm, doors=Doors(hosts=HOSTS)) as mine, socket.socket() as slow:
        mine._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect(("127.0.0.1", mine.port))
        slow.sendall(asked)
        assert slow.recv(15) == b"HTTP/1.1 200 OK"
        yield mine, slow


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_takes_nothing_is_given_up(lm, monkeypatch, stream):
    monkeypatch.setattr("gpt2_jax.serve.server.SILENT_SECONDS", 0.3)
    with slow_client(lm, stream=stream) as (mine, _):
        until = time.monotonic() + 30
        while mine.connections:
            assert time.monotonic() < until, "still waited for"
            time.sleep(0.01)
        mine.wait_until_idle()


def test_a_client_that_takes_little_at_a_time_gets_all(lm, monkeypatch):
    monkeypatch.setattr("gpt2_jax.serve.server.SILENT_SECONDS", 1.5)
    began, answer = time.monotonic(), b""
    with slow_client(lm) as (_, slow):
        while piece := slow.recv(2048):
            answer += piece
            time.sleep(0.05)
    assert time.monotonic() - began > 2 * 1.5
    found = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert len(found["choices"]) == 2 * LANES


def test_a_full_server_says_so_at_once(served, client):
    hold = ThreadPoolExecutor(LANES + QUEUE)
    long = body(max_tokens=150, seed=None)
    with httpx.Client(base_url=served.url, timeout=60) as many:
        asked = [
            hold.submit(many.post, "/v1/completions", json=long)
            for _ in range(LANES + QUEUE)
        ]
        until = time.monotonic() + 20
        while served.engine.live + served.engine.waiting < LANES + QUEUE:
            assert time.monotonic() < until
            time.sleep(0.001)
        began = time.perf_counter()
        answer = client.post("/v1/completions", json=long)
        seconds = time.perf_counter() - began
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert seconds < 5.0  # 0.04 alone; for a machine that does much else
        assert all(one.result().status_code == 200 for one in asked)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_lane(served, client, stream):
    how = dict(max_tokens=150, n=2 * LANES, stream=stream)
    before = served.engine.drawn
    assert client.post("/v1/completions", json=body(**how)).status_code == 200
    whole, before = served.engine.drawn - before, served.engine.drawn
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as gone:
        gone.sendall(post(**how))
        until = time.monotonic() + 20
        while served.engine.drawn == before:
            assert time.monotonic() < until
            time.sleep(0.001)
    served.wait_until_idle()
    assert served.engine.drawn - before < whole


def test_a_thousand_disconnects_leak_nothing(served):
    """Clients leave at every moment: before, while and after they are answered."""
    draw = np.random.default_rng(0)

    def leave(number: int) -> None:
        whole = post(max_tokens=30, stream=bool(number % 2), seed=number)
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as gone:
            gone.sendall(whole[: draw.integers(1, len(whole) + 1)])
            time.sleep(float(draw.random()) * 0.01)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, range(200)))
        served.wait_until_idle()
        before = memory_bytes()
        list(pool.map(leave, range(800)))
    served.wait_until_idle()
    assert memory_bytes() < 1.05 * before
    assert served.engine.call(lambda: 1).result(10) == 1


def test_inspect_shows_what_features_and_score_say(lm, client):
    asked = {"model": NAME, "prompt": "Hello", "layer": 1, "top": 5}
    found = client.post("/v1/inspect", json=asked).json()
    assert found["tokens"] == list("Hello") and found["token_ids"] == [
        72,
        101,
        108,
        108,
        111,
    ]
    assert found["logprobs"][0] is None
    np.testing.assert_allclose(
        found["logprobs"][1:], lm.score("Hello").log_probs, atol=1e-4
    )
    logits = np.asarray(lm.logits(lm.tokenizer.encode("Hello").astype(int)))
    best = np.argsort(-logits, axis=-1)[:, :5]
    assert [[t["id"] for t in row] for row in found["next"]] == best.tolist()
    maps = lm.attentions("Hello")[1, 0]
    for head, rows in zip(maps, found["attention"], strict=True):
        for i, row in enumerate(rows):
            np.testing.assert_allclose(row, head[i, : i + 1], atol=1e-4)
            assert sum(row) == pytest.approx(1, abs=1e-3)
    del asked["layer"]
    assert client.post("/v1/inspect", json=asked).json()["attention"] is None


@pytest.mark.parametrize(
    "asked, said",
    [
        (dict(layer=2), "layer: 2; allowed: below 2"),
        (dict(prompt="x" * 161), "by 1"),
        (dict(prompt=[300]), "300"),
        (dict(prompt=""), "none empty"),
        (dict(model="other"), "served here"),
        (dict(head=1), "head: no such field"),
    ],
)
def test_inspect_refuses(client, asked, said):
    answer = client.post("/v1/inspect", json={"model": NAME, "prompt": "a"} | asked)
    assert answer.status_code in (400, 404)
    assert said in answer.json()["error"]["message"]


def test_health_metrics_and_schema(client):
    assert client.get("/health").json() == {"status": "ok"}
    client.post("/v1/completions", json=body())
    text = client.get("/metrics").text
    assert 'gpt2_requests_total{path="/v1/completions",status="200"}' in text
    assert "gpt2_first_token_seconds_count" in text and "gpt2_live 0.0" in text
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/completions", "/v1/inspect", "/v1/models", "/v1/models/{model}",
        "/health", "/metrics",
    }  # fmt: skip


def test_the_page_and_its_security(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in PAGE.iterdir():
        found = client.get(f"/page/{path.name}")
        assert found.status_code == 200 and found.content == path.read_bytes()
    page = "".join(path.read_text() for path in PAGE.iterdir())
    assert "innerHTML" not in page and "eval(" not in page
    outside = [w for w in page.split() if "://" in w and "www.w3.org/2000/svg" not in w]
    assert not outside  # nothing from elsewhere
    assert "style=" not in (PAGE / "index.html").read_text()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", "127.0.0.1.x"]
)
def test_a_name_that_was_rebound_is_refused(client, host):
    answer = client.get("/v1/models", headers={"Host": host})
    assert answer.status_code == 403
    assert "--allowed-host" in answer.json()["error"]["message"]


def test_no_page_of_elsewhere_may_call_unless_told(lm, client):
    ask = {"Origin": "http://elsewhere"}
    for origin in ("http://elsewhere", "null", f"{client.base_url}0"):
        found = client.post("/v1/completions", json=body(), headers={"Origin": origin})
        assert found.status_code == 403 and "--cors-origin" in found.text
        assert "access-control-allow-origin" not in found.headers
    mine = {"Origin": str(client.base_url).rstrip("/")}  # as browsers send it
    assert client.post("/v1/completions", json=body(), headers=mine).status_code == 200
    plain = {"Content-Type": "text/plain"}  # which a page may send without asking
    content = json.dumps(body()).encode()
    found = client.post("/v1/completions", content=content, headers=plain)
    assert found.status_code == 400
    doors = Doors(hosts=HOSTS, origins=("http://elsewhere",), api_key="sesame")
    with Served(lm, doors=doors) as open_to, httpx.Client() as other:
        found = other.get(f"{open_to.url}/health", headers=ask)
        assert found.headers["access-control-allow-origin"] == "http://elsewhere"
        before = ask | {"Access-Control-Request-Method": "POST"}
        found = other.options(f"{open_to.url}/v1/completions", headers=before)
        assert found.status_code == 200  # no key goes with this question


def test_a_key(lm):
    doors = Doors(hosts=HOSTS, api_key="sesame")
    with Served(lm, doors=doors) as locked:
        paths = ("/v1/models", "/metrics", "/openapi.json", "/v1/inspect", "/v1/x")
        for path in paths:
            found = httpx.get(locked.url + path)
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(locked.url).status_code == 200  # the page asks for the key
        assert httpx.get(f"{locked.url}/health").status_code == 200
        how = dict(base_url=f"{locked.url}/v1", max_retries=0)
        with openai.OpenAI(api_key="sesame", **how) as lib:
            assert lib.completions.create(**body()).choices
        with (
            openai.OpenAI(api_key="sesamé"[:5], **how) as lib,
            pytest.raises(openai.AuthenticationError),
        ):
            lib.completions.create(**body())


def test_weights_that_are_not_finite_are_told(lm, served, monkeypatch):
    import jax

    from gpt2_jax.pretrained import GPT2

    params = jax.tree.map(np.array, lm.params)
    params["ln_f"]["scale"][:] = np.nan
    broken = GPT2(lm.config, jax.tree.map(jax.numpy.asarray, params), lm.tokenizer)
    with Served(broken, doors=Doors(hosts=HOSTS)) as bad, httpx.Client() as other:
        found = other.post(f"{bad.url}/v1/completions", json=body())
        assert found.status_code == 500
        assert found.json()["error"]["code"] == "not_finite"
        found = other.post(f"{bad.url}/v1/completions", json=body(stream=True))
        events = [line for line in found.text.splitlines() if line]
        assert "not finite" in events[-2] and events[-1] == "data: [DONE]"
        assert other.get(f"{bad.url}/health").status_code == 200
