import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.pretrained import GPT2, load
from gpt2_jax.serve.options import ServeOptions
from gpt2_jax.serve.server import serve, serve_model


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "model"
    lm.save(folder)
    return folder


class Program:
    """`gpt2-jax serve` as users run it."""

    def __init__(self, model: Path, *flags: str):
        command = [sys.executable, "-m", "gpt2_jax.start", "serve", str(model)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        env = os.environ | {"GLIBC_TUNABLES": ""}
        self.process = subprocess.Popen(
            [*command, "--port", "0", *flags], env=env, **pipes
        )
        self.line = self.process.stdout.readline()
        self.url = self.line.split(" at ")[-1].split(";")[0]

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> tuple[int, str, str]:
        out, error = self.process.communicate(timeout=60)
        return self.process.returncode, out, error


def test_weights_of_8_bits_are_served(saved):
    body = {"model": str(saved), "prompt": "Hello", "max_tokens": 4, "logprobs": 0}
    with Program(saved, "--quantize", "int8") as program:
        answer = httpx.post(
            f"{program.url}/v1/completions", json=body | {"temperature": 0}, timeout=60
        )
    [served] = [
        choice["logprobs"]["token_logprobs"] for choice in answer.json()["choices"]
    ]
    how: dict = dict(max_new_tokens=4, temperature=0.0, details=True)
    small, exact = load(saved, quantize="int8"), load(saved)
    [narrow], [wide] = (lm.generate("Hello", **how) for lm in (small, exact))
    np.testing.assert_allclose(served, narrow["log_probs"], atol=1e-4)
    assert abs(served[0] - wide["log_probs"][0]) > 1e-3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_was_begun_end(saved, number):
    with Program(saved, "--drain-seconds", "20") as program:
        assert program.line.startswith(f"serving {saved} at http://127.0.0.1:")
        body = {"model": str(saved), "prompt": "Hello", "max_tokens": 150, "seed": 1}
        body |= {"logit_bias": {"256": -100}, "stream": True}
        with httpx.stream(
            "POST", f"{program.url}/v1/completions", json=body, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            program.process.send_signal(number)
            until = time.monotonic() + 20
            with pytest.raises(httpx.HTTPError):  # soon nobody else is let in
                while time.monotonic() < until:
                    httpx.get(f"{program.url}/health", timeout=2)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        last = json.loads(events[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        status, out, error = program.end()
    assert status == 0 and out.endswith("stopped\n") and not error


def test_what_takes_longer_than_the_drain_is_left(saved):
    def ask(url: str) -> str:
        body = {"model": str(saved), "prompt": "a", "max_tokens": 150, "n": 16}
        body |= {"logit_bias": {"256": -100}}
        try:
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60).text
        except httpx.HTTPError:
            return "lost"

    with Program(saved, "--drain-seconds", "0.2") as program:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, program.url) for _ in range(4)]
            until = time.monotonic() + 60
            while "gpt2_live 0.0" in httpx.get(f"{program.url}/metrics").text:
                assert time.monotonic() < until
            program.process.send_signal(signal.SIGTERM)
            status, out, _ = program.end()
        assert status == 0 and out.endswith("stopped\n")
        texts = [one.result() for one in asked]
        assert any(text == "lost" or "is stopping" in text for text in texts), texts


def test_a_port_in_use_is_told_before_the_model_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: Address already in use"):
            serve(str(tmp_path), ServeOptions(port=port))


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(host="no.such.host.invalid", port=0, api_key="k"), "no.such.host"),
        (dict(host="192.0.2.1", port=0, api_key="k"), "an address of this machine"),
    ],
)
def test_refuses_where_it_cannot_listen(tmp_path, how, said):
    with pytest.raises(ConfigError, match=said):
        serve(str(tmp_path), ServeOptions(**how))


def test_a_model_without_a_tokenizer_is_refused(lm):
    bare = GPT2(lm.config, lm.params, None)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ConfigError, match="no tokenizer"),
    ):
        serve_model(bare, "m", ServeOptions(), listener, say=print)


def test_a_server_whose_engine_dies_ends(lm, monkeypatch):
    def fail(*how):
        raise MemoryError("no more")

    def ask(port: int) -> httpx.Response:
        body = {"model": "m", "prompt": "Hello"}
        url = f"http://127.0.0.1:{port}/v1/completions"
        return httpx.post(url, json=body, timeout=60)

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor() as pool,
    ):
        asked = []

        def say(line: str) -> None:
            monkeypatch.setattr("gpt2_jax.serve.engine._forward", fail)
            asked.append(pool.submit(ask, listener.getsockname()[1]))

        with pytest.raises(RuntimeError, match="can no longer be written"):
            serve_model(lm, "m", ServeOptions(), listener, say=say)
        assert asked[0].result().status_code == 500


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--lanes", "3"], "a power of two"),
        (["--prot", "1"], "did you mean 'port'"),
        (["--port", "many"], "--port"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(saved, flags, said):
    command = [sys.executable, "-m", "gpt2_jax.start", "serve", str(saved), *flags]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and said in found.stderr
    assert len(found.stderr.splitlines()) == 1
